//! The shared tables as a process sees them that has them mapped, while their writer works.

use crate::cache::prefetch;
use crate::{SlotSet, Tables};
use towpath_tables::backing::View;
use towpath_tables::clock;
use towpath_tables::flow::FlowRead;
use towpath_tables::lpm::LpmRead;
use towpath_tables::record::{
    Config, CpuMappings, CpuStats, Filter, FilterCounters, Flow, FlowLine, Group, Line, MappingSet, Nexthop, Port,
    SourceList, VlanTable, port_flags,
};

/// Mapped tables, and what their reader may do.
#[derive(Clone, Copy)]
pub struct Mapped<'t> {
    /// The tables
    pub view: View<'t>,
    /// Whose counters to write, as `stats` numbers them; None: nobody's
    pub counters: Option<u32>,
    /// Interfaces to which this reader can hand frames
    pub transmitters: SlotSet,
}

impl LpmRead for Mapped<'_> {
    #[inline(always)]
    fn root_word(&self, root: u32, slot: u16) -> Option<u32> {
        self.view.root_word(root, slot)
    }
    #[inline(always)]
    fn root_default(&self, root: u32) -> Option<u32> {
        self.view.root_default(root)
    }
    #[inline(always)]
    fn line(&self, index: u32) -> Option<&Line> {
        self.view.line(index)
    }
    #[inline(always)]
    fn prefetch_root_word(&self, root: u32, slot: u16) {
        if let Some(root) = self.view.roots().get(root as usize) {
            prefetch(&root.direct[usize::from(slot)]);
        }
    }
    #[inline(always)]
    fn prefetch_line(&self, index: u32) {
        if let Some(line) = self.view.line_of(index) {
            prefetch(line);
        }
    }
}

impl FlowRead for Mapped<'_> {
    #[inline(always)]
    fn flow_line(&self, number: u32) -> Option<&FlowLine> {
        self.view.flow_line(number)
    }
    #[inline(always)]
    fn flow(&self, index: u32) -> Option<&Flow> {
        self.view.flow(index)
    }
}

impl Tables for Mapped<'_> {
    #[inline(always)]
    fn config(&self) -> Option<&Config> {
        Some(self.view.config())
    }
    #[inline(always)]
    fn port(&self, slot: u32) -> Option<&Port> {
        self.view.ports().get(slot as usize)
    }
    #[inline(always)]
    fn vlan_table(&self, index: u32) -> Option<&VlanTable> {
        self.view.vlans().get(index as usize)
    }
    #[inline(always)]
    fn nexthop(&self, index: u32) -> Option<&Nexthop> {
        self.view.nexthops().get(index as usize)
    }
    #[inline(always)]
    fn prefetch_nexthop(&self, index: u32) {
        if let Some(hop) = self.view.nexthops().get(index as usize) {
            prefetch(hop);
        }
    }
    #[inline(always)]
    fn group(&self, index: u32) -> Option<&Group> {
        self.view.groups().get(index as usize)
    }
    #[inline(always)]
    fn counts(&self) -> bool {
        self.counters.is_some()
    }
    #[inline(always)]
    fn cpu(&self) -> u32 {
        self.counters.unwrap_or_default()
    }
    #[inline(always)]
    fn now(&self) -> u64 {
        clock::now()
    }
    #[inline(always)]
    fn stats(&self, cpu: u32) -> Option<&CpuStats> {
        self.counters?;
        self.view.stats().as_chunks().0.get(cpu as usize)
    }
    #[inline(always)]
    fn filter(&self, index: u32) -> Option<&Filter> {
        self.view.filters().get(index as usize)
    }
    #[inline(always)]
    fn filter_stats(&self, line: u32, cpu: u32) -> Option<&FilterCounters> {
        self.counters?;
        self.view.filter_stats().get(line as usize * self.view.cpus() + cpu as usize)
    }
    #[inline(always)]
    fn sources(&self, index: u32) -> Option<&SourceList> {
        self.view.sources().get(index as usize)
    }
    #[inline(always)]
    fn mapping_set(&self, index: u32) -> Option<&MappingSet> {
        self.view.mapping_sets().get(index as usize)
    }
    #[inline(always)]
    fn mapping_stats(&self, cpu: u32) -> Option<&CpuMappings> {
        self.counters?;
        self.view.mapping_stats().as_chunks().0.get(cpu as usize)
    }
    #[inline(always)]
    fn transmitter(&self, slot: u32) -> bool {
        let serves =
            |port: &Port| port.ifindex.load() != 0 && port.flags.load() & (port_flags::VLAN | port_flags::TUNNEL) == 0;
        self.transmitters.contains(slot) && self.port(slot).is_some_and(serves)
    }
}
