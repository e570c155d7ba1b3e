//! The tables as BPF maps. Names are those of `TableId`; sizes are set by whoever loads the program.

use aya_ebpf::bindings::xdp_action::{XDP_PASS, XDP_REDIRECT};
use aya_ebpf::helpers::{bpf_get_smp_processor_id, bpf_redirect_map};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, DevMap};
use towpath_pipeline::Tables;
use towpath_tables::lpm::LpmRead;
use towpath_tables::record::{
    Config, ENTRIES_PER_PAGE, EntryPage, Group, Nexthop, NexthopKey, Node, PORT_SLOTS, Port, PortStats, Root, TableId,
    VlanTable,
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
        const _: () = assert!(TableId::ALL.len() == [$($name),*].len());
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
    CONFIG: Config, Config, "config";
    PORTS: Port, Ports, "ports";
    VLANS: VlanTable, Vlans, "vlans";
    ROOTS: Root, Roots, "roots";
    NODES: Node, Nodes, "nodes";
    ENTRIES: EntryPage, Entries, "entries";
    NEXTHOPS: Nexthop, Nexthops, "nexthops";
    NEXTHOP_KEYS: NexthopKey, NexthopKeys, "nexthop_keys";
    GROUPS: Group, Groups, "groups";
    STATS: PortStats, Stats, "stats";
}

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
    fn node(&self, index: u32) -> Option<&Node> {
        NODES.get(index)
    }

    #[inline(always)]
    fn entry(&self, index: u32) -> Option<u32> {
        let index = index as usize;
        let page = ENTRIES.get((index / ENTRIES_PER_PAGE) as u32)?;
        page.words.get(index % ENTRIES_PER_PAGE).map(W32::load)
    }
}

impl Tables for Maps {
    #[inline(always)]
    fn config(&self) -> Option<&Config> {
        CONFIG.get(0)
    }

    #[inline(always)]
    fn port(&self, slot: u32) -> Option<&Port> {
        PORTS.get(slot)
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
    fn stats(&self, slot: u32) -> Option<&PortStats> {
        // SAFETY: takes no arguments and cannot fail.
        let cpu = unsafe { bpf_get_smp_processor_id() };
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
