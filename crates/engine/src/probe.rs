//! Whether a veth takes redirected frames, on kernels that do not say (before 6.3): an attempt that leaves no trace.
//!
//! A veth without a polling peer refuses frames as a whole; with one it takes each, or counts an error for each that is
//! longer than the peer's MTU allows (drivers/net/veth.c 6.1, `veth_xdp_xmit`, `veth_ndo_xdp_xmit`). So a frame is
//! redirected that becomes too long on its way, after the kernel has compared it with the port's own MTU: a program in
//! the map of devices makes it longer (kernel/bpf/devmap.c 6.1, `bq_xmit_all`). Both counters tell the same, but the
//! frame arrives only at a peer of an MTU above `LENGTH`, in which case it is one that nobody accepts: of the local
//! experimental EtherType, to the address of zeros.

use crate::interface::Interface;
use crate::sys::{self, AttachType, MapSpec};
use aya_obj::generated::bpf_map_type;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Bytes of the frame as it is redirected: within any port's MTU.
const SHORT: usize = 60;
/// Bytes of the frame as the veth gets it: a page holds it with all that the kernel puts beside it.
const LENGTH: usize = 3000;

/// Key of the veth in the map of devices
const ONLY: u32 = 0;

/// `struct bpf_devmap_val`
#[derive(Clone, Copy)]
#[repr(C)]
struct Device {
    ifindex: u32,
    program: i32,
}

/// Whether the veth takes frames that are redirected to it.
pub fn takes_frames(interface: &Interface) -> io::Result<bool> {
    let longer = sys::prog_load("towpath_longer", c"Dual MIT/GPL", AttachType::Devmap, &LONGER, None, &mut [])?;
    let devices = sys::map_create(
        MapSpec {
            kind: bpf_map_type::BPF_MAP_TYPE_DEVMAP,
            name: "towpath_probe",
            value_size: size_of::<Device>() as u32,
            max_entries: 1,
            flags: 0,
        },
        None,
    )?;
    let device = Device { ifindex: interface.index, program: longer.as_raw_fd() };
    sys::map_update(devices.as_fd(), ONLY, &device)?;
    let redirect = redirect_by(devices.as_raw_fd());
    let program = sys::prog_load("towpath_probe", c"Dual MIT/GPL", AttachType::Xdp, &redirect, None, &mut [])?;
    let mut frame = [0u8; SHORT];
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    let before = noticed(interface)?;
    sys::run_live(program.as_fd(), &frame, interface.index)?;
    Ok(noticed(interface)? != before)
}

/// `bpf_xdp_adjust_tail(context, LENGTH - SHORT); return XDP_PASS`
const LONGER: [u64; 4] = [0x02b7 | ((LENGTH - SHORT) as u64) << 32, 0x85 | 65 << 32, 0xb7 | 2 << 32, 0x95];

/// `return bpf_redirect_map(devices, ONLY, 0)`
fn redirect_by(devices: i32) -> [u64; 6] {
    [0x1118 | (devices as u64) << 32, 0, 0x02b7 | (ONLY as u64) << 32, 0x03b7, 0x85 | 51 << 32, 0x95]
}

/// Redirected frames that the veth has taken or found too long so far.
fn noticed(interface: &Interface) -> io::Result<u64> {
    let statistics = interface.ethtool.statistics()?;
    let counts = |name: &str| {
        name.starts_with("tx_queue_") && (name.ends_with("_xdp_xmit") || name.ends_with("_xdp_xmit_errors"))
    };
    Ok(statistics.iter().filter(|(name, _)| counts(name)).map(|(_, n)| n).sum())
}
