//! The tc program on the ports' egress hook, which notes what Linux transmits of flows.

use crate::maps::FAR_MAPS;
use aya_ebpf::bindings::{__sk_buff, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated::bpf_skb_load_bytes_relative;
use core::mem::MaybeUninit;
use towpath_pipeline::{Sent, accept};
use towpath_wire::View;

// Where offsets count from: `enum bpf_hdr_start_off`, include/uapi/linux/bpf.h
const BPF_HDR_START_MAC: u32 = 0;
const BPF_HDR_START_NET: u32 = 1;

/// Changes nothing about the packet.
#[unsafe(no_mangle)]
#[unsafe(link_section = "classifier")]
fn towpath_accept(ctx: *mut __sk_buff) -> i32 {
    accept(&Skb(ctx), &FAR_MAPS);
    TC_ACT_UNSPEC
}

struct Skb(*mut __sk_buff);

impl Skb {
    #[inline(always)]
    fn load_from<T: View>(&self, begin: u32, offset: usize) -> Option<T> {
        let mut bytes = MaybeUninit::<T>::uninit();
        let (place, len) = (bytes.as_mut_ptr().cast(), size_of::<T>() as u32);
        // SAFETY: the context is the kernel's, and the bytes are as many as there is room for.
        let read = unsafe { bpf_skb_load_bytes_relative(self.0.cast(), offset as u32, place, len, begin) };
        // SAFETY: all of it was written, and any bytes make a view.
        (read == 0).then(|| unsafe { bytes.assume_init() })
    }
}

impl Sent for Skb {
    #[inline(always)]
    fn load<T: View>(&self, offset: usize) -> Option<T> {
        self.load_from(BPF_HDR_START_NET, offset)
    }

    #[inline(always)]
    fn link(&self) -> Option<u64> {
        self.load_from(BPF_HDR_START_MAC, 0).map(u64::from_ne_bytes)
    }

    #[inline(always)]
    fn ethertype(&self) -> u16 {
        // SAFETY: the context is the kernel's.
        u16::from_be(unsafe { (*self.0).protocol } as u16)
    }

    #[inline(always)]
    fn tag(&self) -> Option<(u16, u16)> {
        // SAFETY: as for `ethertype`.
        let (present, protocol, control) =
            unsafe { ((*self.0).vlan_present, (*self.0).vlan_proto, (*self.0).vlan_tci) };
        (present != 0).then_some((u16::from_be(protocol as u16), control as u16))
    }

    #[inline(always)]
    fn from(&self) -> u32 {
        // SAFETY: as for `ethertype`.
        unsafe { (*self.0).ingress_ifindex }
    }

    #[inline(always)]
    fn to(&self) -> u32 {
        // SAFETY: as for `ethertype`.
        unsafe { (*self.0).ifindex }
    }
}
