//! The tables as slices of records: mapped memory, or vectors in tests.

use crate::Tables;
use towpath_tables::lpm::LpmRead;
use towpath_tables::order;
use towpath_tables::record::{Config, Group, Line, Nexthop, PORT_SLOTS, Port, PortStats, Root, VlanTable, port_flags};

/// The tables that the packet path reads, and the counters of all CPUs.
#[derive(Clone, Copy)]
pub struct Slices<'t> {
    /// What holds for the whole region
    pub config: &'t Config,
    /// By slot
    pub ports: &'t [Port],
    /// Sub-interfaces
    pub vlans: &'t [VlanTable],
    /// Route tables
    pub roots: &'t [Root],
    /// Their nodes' lines
    pub nodes: &'t [Line],
    /// Next hops
    pub nexthops: &'t [Nexthop],
    /// Next-hop groups
    pub groups: &'t [Group],
    /// Counters: `cpu * PORT_SLOTS + slot`
    pub stats: &'t [PortStats],
    /// Whose counters to write
    pub cpu: u32,
}

impl LpmRead for Slices<'_> {
    fn root_word(&self, root: u32, slot: u16) -> Option<u32> {
        self.roots.get(root as usize)?.direct.get(usize::from(slot)).map(order::load)
    }
    fn root_default(&self, root: u32) -> Option<u32> {
        self.roots.get(root as usize).map(|root| order::load(&root.default))
    }
    fn line(&self, index: u32) -> Option<&Line> {
        self.nodes.get(index as usize)
    }
}

impl Tables for Slices<'_> {
    fn config(&self) -> Option<&Config> {
        Some(self.config)
    }
    fn port(&self, slot: u32) -> Option<&Port> {
        self.ports.get(slot as usize)
    }
    fn vlan_table(&self, index: u32) -> Option<&VlanTable> {
        self.vlans.get(index as usize)
    }
    fn nexthop(&self, index: u32) -> Option<&Nexthop> {
        self.nexthops.get(index as usize)
    }
    fn group(&self, index: u32) -> Option<&Group> {
        self.groups.get(index as usize)
    }
    fn cpu(&self) -> u32 {
        self.cpu
    }
    fn stats(&self, cpu: u32, slot: u32) -> Option<&PortStats> {
        self.stats.get(cpu as usize * PORT_SLOTS as usize + slot as usize)
    }
    fn transmitter(&self, slot: u32) -> bool {
        self.port(slot).is_some_and(|port| port.ifindex.load() != 0 && port.flags.load() & port_flags::VLAN == 0)
    }
}
