//! The tables as BPF maps. Names are those of `TableId`; sizes are set by whoever loads the program.
//!
//! Tables of a fixed size are global data instead, each in a section of its own, for which the loader gives the table's
//! map (one element that holds all records): their addresses are constants to the program, so reading them takes no
//! look-up and leaves all registers as they are.

use aya_ebpf::bindings::xdp_action::{XDP_PASS, XDP_REDIRECT};
use aya_ebpf::helpers::{bpf_get_smp_processor_id, bpf_redirect_map};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, DevMap};
use towpath_pipeline::Tables;
use towpath_tables::lpm::LpmRead;
use towpath_tables::record::{
    Config, Group, Line, Nexthop, NexthopKey, PORT_SLOTS, Port, PortStats, Root, TableId, VlanTable,
};
use towpath_tables::word::W32;

/// Maps may be mapped into the daemon (linux/bpf.h, BPF_F_MMAPABLE).
const MMAPABLE: u32 = 1 << 10;

macro_rules! tables {
    ($($map:ident: $record:ty, $id:ident, $name:literal;)*) => {
        $(
            #[map(name = $name)]
            #[used]
            static $map: Array<$record> = Array::with_max_entries(1, MMAPABLE);
            const _: () = assert!(same(TableId::$id.name(), $name) && TableId::$id.element_size() == size_of::<$record>());
        )*
        const _: () = assert!(TableId::ALL.len() == [$($name),*].len() + GLOBALS);
    };
}

const fn same(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut equal = a.len() == b.len();
    let mut i = 0;
    while equal && i < a.len() {
        equal = a[i] == b[i];
        i += 1;
    }
    equal
}

tables! {
    VLANS: VlanTable, Vlans, "vlans";
    ROOTS: Root, Roots, "roots";
    NODES: Line, Nodes, "nodes";
    NEXTHOPS: Nexthop, Nexthops, "nexthops";
    NEXTHOP_KEYS: NexthopKey, NexthopKeys, "nexthop_keys";
    GROUPS: Group, Groups, "groups";
    STATS: PortStats, Stats, "stats";
}

/// The number itself, of which the compiler no longer knows anything.
#[cfg(target_arch = "bpf")]
#[inline(always)]
fn opaque(number: usize) -> usize {
    let mut same = number;
    // SAFETY: moves a register onto itself.
    unsafe { core::arch::asm!("{0} = {0}", inout(reg) same, options(pure, nomem, nostack)) };
    same
}
/// For lints, which look at the crate as the host sees it.
#[cfg(not(target_arch = "bpf"))]
use core::hint::black_box as opaque;

/// How many tables are global data.
const GLOBALS: usize = 2;

// SAFETY: both are words of integers, for which zero is valid. Read by volatile loads only, so the compiler cannot take
// the zeros for their contents.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".bss.config")]
static CONFIG: Config = unsafe { core::mem::zeroed() };
const _: () = assert!(same(TableId::Config.global().unwrap(), ".bss.config"));

// SAFETY: as for `CONFIG`.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".bss.ports")]
static PORTS: [Port; PORT_SLOTS as usize] = unsafe { core::mem::zeroed() };
const _: () = assert!(same(TableId::Ports.global().unwrap(), ".bss.ports"));

/// The interface of each port, by slot: whom frames are redirected to.
#[map(name = "devices")]
static DEVICES: DevMap = DevMap::with_max_entries(PORT_SLOTS, 0);

/// The maps of this program.
pub struct Maps;

impl LpmRead for Maps {
    #[inline(always)]
    fn root_word(&self, root: u32, slot: u16) -> Option<u32> {
        ROOTS.get(root)?.direct.get(usize::from(slot)).map(W32::load)
    }

    #[inline(always)]
    fn root_default(&self, root: u32) -> Option<u32> {
        Some(ROOTS.get(root)?.default.load())
    }

    #[inline(always)]
    fn line(&self, index: u32) -> Option<&Line> {
        NODES.get(index)
    }
}

impl Tables for Maps {
    #[inline(always)]
    fn config(&self) -> Option<&Config> {
        Some(&CONFIG)
    }

    #[inline(always)]
    fn port(&self, slot: u32) -> Option<&Port> {
        let slot = slot as usize;
        // The verifier must see the bound on the very register that is added to the address; Linux 6.1 forgets it when
        // the compiler compares one copy and uses another.
        if slot < PORTS.len() { PORTS.get(opaque(slot) % PORTS.len()) } else { None }
    }

    #[inline(always)]
    fn vlan_table(&self, index: u32) -> Option<&VlanTable> {
        VLANS.get(index)
    }

    #[inline(always)]
    fn nexthop(&self, index: u32) -> Option<&Nexthop> {
        NEXTHOPS.get(index)
    }

    #[inline(always)]
    fn group(&self, index: u32) -> Option<&Group> {
        GROUPS.get(index)
    }

    #[inline(always)]
    fn cpu(&self) -> u32 {
        // SAFETY: takes no arguments and cannot fail.
        unsafe { bpf_get_smp_processor_id() }
    }

    #[inline(always)]
    fn stats(&self, cpu: u32, slot: u32) -> Option<&PortStats> {
        STATS.get(cpu * PORT_SLOTS + slot)
    }

    /// Names the receiver for the verdict XDP_REDIRECT that is to follow.
    #[inline(always)]
    fn transmitter(&self, slot: u32) -> bool {
        // SAFETY: the map is a device map.
        let action = unsafe { bpf_redirect_map((&raw const DEVICES).cast_mut().cast(), slot.into(), XDP_PASS.into()) };
        action == i64::from(XDP_REDIRECT)
    }
}
