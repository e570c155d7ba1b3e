//! The tables as slices of records that nobody writes but by words: vectors in tests.

use crate::cache::prefetch;
use crate::{SlotSet, Tables};
use towpath_tables::clock;
use towpath_tables::flow::{FlowRead, line_at};
use towpath_tables::lpm::LpmRead;
use towpath_tables::order;
use towpath_tables::record::{
    Config, CpuMappings, CpuStats, Filter, FilterCounters, Flow, FlowLine, Group, Line, MappingCounters, MappingSet,
    Nexthop, Port, PortStats, Root, SourceList, VlanTable, port_flags,
};

/// The tables that the packet path reads, and the counters of all CPUs.
#[derive(Clone, Copy)]
pub struct Slices<'t> {
    /// What holds for the whole region
    pub config: &'t Config,
    /// By slot
    pub ports: &'t [Port],
    /// Sub-interfaces
    pub vlans: &'t [VlanTable],
    /// Lists of roots by source
    pub sources: &'t [SourceList],
    /// Route tables
    pub roots: &'t [Root],
    /// Their nodes' lines
    pub nodes: &'t [Line],
    /// Next hops
    pub nexthops: &'t [Nexthop],
    /// Next-hop groups
    pub groups: &'t [Group],
    /// Flows
    pub flows: &'t [Flow],
    /// Their index
    pub flow_lines: &'t [FlowLine],
    /// Sets of mappings
    pub mapping_sets: &'t [MappingSet],
    /// Their counters: `cpu * MAPPINGS + mapping`
    pub mapping_stats: &'t [MappingCounters],
    /// The operator's filters
    pub filters: &'t [Filter],
    /// Their counters
    pub filter_stats: &'t [FilterCounters],
    /// Counters: `cpu * PORT_SLOTS + slot`
    pub stats: &'t [PortStats],
    /// Whose counters to write
    pub cpu: u32,
    /// Interfaces to which this reader can hand frames
    pub transmitters: SlotSet,
}

impl LpmRead for Slices<'_> {
    #[inline(always)]
    fn root_word(&self, root: u32, slot: u16) -> Option<u32> {
        self.roots.get(root as usize)?.direct.get(usize::from(slot)).map(order::load)
    }
    #[inline(always)]
    fn root_default(&self, root: u32) -> Option<u32> {
        self.roots.get(root as usize).map(|root| order::load(&root.default))
    }
    #[inline(always)]
    fn line(&self, index: u32) -> Option<&Line> {
        self.nodes.get(index as usize)
    }
    #[inline(always)]
    fn prefetch_root_word(&self, root: u32, slot: u16) {
        if let Some(root) = self.roots.get(root as usize) {
            prefetch(&root.direct[usize::from(slot)]);
        }
    }
    #[inline(always)]
    fn prefetch_line(&self, index: u32) {
        if let Some(line) = self.nodes.get(index as usize) {
            prefetch(line);
        }
    }
}

impl FlowRead for Slices<'_> {
    #[inline(always)]
    fn flow_line(&self, number: u32) -> Option<&FlowLine> {
        line_at(self.flow_lines, number)
    }
    #[inline(always)]
    fn flow(&self, index: u32) -> Option<&Flow> {
        self.flows.get(index as usize)
    }
}

impl Tables for Slices<'_> {
    #[inline(always)]
    fn config(&self) -> Option<&Config> {
        Some(self.config)
    }
    #[inline(always)]
    fn port(&self, slot: u32) -> Option<&Port> {
        self.ports.get(slot as usize)
    }
    #[inline(always)]
    fn vlan_table(&self, index: u32) -> Option<&VlanTable> {
        self.vlans.get(index as usize)
    }
    #[inline(always)]
    fn nexthop(&self, index: u32) -> Option<&Nexthop> {
        self.nexthops.get(index as usize)
    }
    #[inline(always)]
    fn prefetch_nexthop(&self, index: u32) {
        if let Some(hop) = self.nexthops.get(index as usize) {
            prefetch(hop);
        }
    }
    #[inline(always)]
    fn group(&self, index: u32) -> Option<&Group> {
        self.groups.get(index as usize)
    }
    #[inline(always)]
    fn cpu(&self) -> u32 {
        self.cpu
    }
    #[inline(always)]
    fn now(&self) -> u64 {
        clock::now()
    }
    #[inline(always)]
    fn stats(&self, cpu: u32) -> Option<&CpuStats> {
        self.stats.as_chunks().0.get(cpu as usize)
    }
    #[inline(always)]
    fn filter(&self, index: u32) -> Option<&Filter> {
        self.filters.get(index as usize)
    }
    #[inline(always)]
    fn filter_stats(&self, line: u32, cpu: u32) -> Option<&FilterCounters> {
        let cpus = self.stats.len() / self.ports.len().max(1);
        self.filter_stats.get(line as usize * cpus + cpu as usize)
    }
    #[inline(always)]
    fn sources(&self, index: u32) -> Option<&SourceList> {
        self.sources.get(index as usize)
    }
    #[inline(always)]
    fn mapping_set(&self, index: u32) -> Option<&MappingSet> {
        self.mapping_sets.get(index as usize)
    }
    #[inline(always)]
    fn mapping_stats(&self, cpu: u32) -> Option<&CpuMappings> {
        self.mapping_stats.as_chunks().0.get(cpu as usize)
    }
    #[inline(always)]
    fn transmitter(&self, slot: u32) -> bool {
        self.transmitters.contains(slot)
            && self.port(slot).is_some_and(|port| {
                port.ifindex.load() != 0 && port.flags.load() & (port_flags::VLAN | port_flags::TUNNEL) == 0
            })
    }
}
