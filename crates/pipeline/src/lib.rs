//! The packet path, once for every engine: it is compiled for BPF (crate `xdp`) and natively (tests, `explain`, the
//! user engine), generic over the frame and the tables.
//!
//! The contract: nothing in a frame changes until everything is decided, so an exception is the packet as it arrived;
//! every exception is counted on the port that the packet entered by (the VLAN sub-interface, once the tags named
//! one). A packet of a port that is in no slot is left alone and counted nowhere.
//!
//! Three stages: [`parse`] (ports, tags, headers), [`route`] (sources, look-up, next hop) and [`rewrite`]; [`process`] runs
//! them one after another, [`batch`] each with all packets of a batch in turn.
#![cfg_attr(not(any(test, feature = "std")), no_std)]

mod accept;
#[cfg(any(test, feature = "std"))]
pub mod batch;
pub mod cache;
pub mod checksum;
pub mod filters;
mod flow;
mod hash;
mod ingress;
#[cfg(any(test, feature = "std"))]
pub mod mapped;
pub mod nat;
mod network;
mod partial;
mod rewrite;
pub mod roots;
mod route;
#[cfg(any(test, feature = "std"))]
pub mod slices;
mod slot_set;
mod source;
mod stats;
mod tunnel;

#[cfg(any(test, feature = "std"))]
pub mod cases;
#[cfg(any(test, feature = "std"))]
pub mod packet;

pub use accept::{Sent, accept};
pub use flow::forward as forward_flow;
pub use ingress::{Candidate, Entry, Parsed, Stop, parse};
pub use rewrite::rewrite;
pub use route::{Hop, Refusal, route};
pub use slot_set::SlotSet;
#[cfg(any(test, feature = "std"))]
pub use source::accepts;
pub use source::leads_back;
pub use stats::{count_exception, count_exceptions, count_exceptions_lost, count_forward, count_tx_lost};
pub use tunnel::{
    Entering, Inside, Place, Turn, advance as advance_tunnelled, enter6, forward as forward_tunnelled, look_through6,
};

use towpath_tables::Reason;
use towpath_tables::flow::{self as flows, FlowRead, Found, Key};
use towpath_tables::lpm::{self, LpmRead};
use towpath_tables::mapping::{self, Way, Words};
use towpath_tables::record::{
    Config, CpuMappings, CpuStats, Family, Filter, FilterCounters, Group, MappingSet, Nexthop, Port, SourceList,
    VlanTable,
};
use towpath_tables::trace::Outcome;
use towpath_wire::{Sum, View};

/// What travels beside a frame instead of in it: what a sender left to its device, where that hands frames over as they are
/// (veth, TAP).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Beside {
    /// Whether the transport checksum is still to be completed; None if the engine cannot see that
    pub partial: Option<bool>,
    /// The outermost VLAN tag, if it is not in the frame: protocol and tag control information (802.1Q). None also if
    /// the engine cannot see it
    pub tag: Option<(u16, u16)>,
}

impl Beside {
    /// Nothing does.
    pub const NOTHING: Self = Self { partial: Some(false), tag: None };
    /// The engine cannot see whether anything does.
    pub const UNKNOWN: Self = Self { partial: None, tag: None };
}

/// A frame, from its Ethernet header on. The first buffer of a multi-buffer frame is what can be read and written.
pub trait Frame: Sized {
    /// A view of the bytes at `offset`; None if they are not all in the first buffer.
    fn get<T: View>(&self, offset: usize) -> Option<&T>;
    /// As `get`, to be written.
    fn get_mut<T: View>(&mut self, offset: usize) -> Option<&mut T>;
    /// Length of the first buffer.
    fn first_len(&self) -> usize;
    /// Length of the whole frame, all buffers counted.
    fn total_len(&self) -> usize;
    /// What travels beside the frame; asked only for ports with `port_flags::BESIDE`.
    fn beside(&self) -> Beside;
    /// Moves the frame's beginning: removes `by` bytes, or adds as many if `by` is negative. Bytes removed come back
    /// as they were when they are added again. False if it could not be done; then nothing changed.
    fn move_head(&mut self, by: i32) -> bool;
    /// It is only found out what would become of the frame: it stays as it is, and Linux has it whatever the verdict.
    #[inline(always)]
    fn is_shadow(&self) -> bool {
        false
    }
    /// Cuts `by` bytes off the end. False if it could not be done; then nothing changed.
    fn trim(&mut self, by: u32) -> bool;
    /// The number itself. An engine whose code is verified may make the verifier forget what it knows
    /// of it: it then takes frames for alike that came here by different ways, and looks at what follows once.
    #[inline(always)]
    fn forget(number: u32) -> u32 {
        number
    }
    /// Calls `checksum::sum`, as a function of its own like `tunnelled`.
    #[cold]
    #[inline(never)]
    fn sum(&self, offset: usize, len: usize) -> Option<Sum> {
        checksum::sum(self, offset, len)
    }
    /// Calls `forward_tunnelled`, as a function of its own: so seldom that what other packets take is not to pay for it.
    #[cold]
    #[inline(never)]
    fn tunnelled<T: Tables>(
        &mut self,
        tables: &T,
        entry: &Entry,
        parsed: &Parsed,
        refusal: Refusal,
    ) -> Result<u32, Reason> {
        forward_tunnelled(self, tables, entry, parsed, refusal)
    }
    /// Calls `forward_flow`, as a function of its own like `tunnelled`.
    #[cold]
    #[inline(never)]
    fn flow<T: Tables>(&mut self, tables: &T, entry: &Entry, candidate: Candidate) -> Result<u32, Reason> {
        forward_flow(self, tables, entry, candidate)
    }
    /// Calls `nat::forward`, as a function of its own like `tunnelled`.
    #[cold]
    #[inline(never)]
    fn mapped<T: Tables>(&mut self, tables: &T, entry: &Entry, candidate: Candidate) -> Result<u32, Reason> {
        nat::forward(self, tables, entry, candidate)
    }
    /// Goes on with a packet that `route` refused.
    #[inline(always)]
    fn refused<T: Tables>(
        &mut self,
        tables: &T,
        entry: &Entry,
        parsed: &Parsed,
        refusal: Refusal,
    ) -> Result<u32, Reason> {
        match refusal {
            Refusal::Exception(reason @ Reason::Mapped) => {
                self.mapped(tables, entry, Candidate { family: parsed.family, offset: parsed.offset, reason })
            }
            refusal => self.tunnelled(tables, entry, parsed, refusal),
        }
    }
}

/// The tables. Each look-up returns None if the index is outside its table.
pub trait Tables: LpmRead + FlowRead + Sized {
    /// What holds for the whole region
    fn config(&self) -> Option<&Config>;
    /// A port by its slot
    fn port(&self, slot: u32) -> Option<&Port>;
    /// The sub-interfaces of a port
    fn vlan_table(&self, index: u32) -> Option<&VlanTable>;
    /// A next hop
    fn nexthop(&self, index: u32) -> Option<&Nexthop>;
    /// Asks for the memory of a next hop, where that can be done.
    #[inline(always)]
    fn prefetch_nexthop(&self, _index: u32) {}
    /// A next-hop group
    fn group(&self, index: u32) -> Option<&Group>;
    /// The caller's CPU or worker, as `stats` numbers them
    fn cpu(&self) -> u32;
    /// Whether packets are counted, and leave marks of use
    #[inline(always)]
    fn counts(&self) -> bool {
        true
    }
    /// CLOCK_MONOTONIC_COARSE in nanoseconds
    fn now(&self) -> u64;
    /// Counters that only this CPU or worker writes
    fn stats(&self, cpu: u32) -> Option<&CpuStats>;
    /// The route to an IPv4 address. An engine may make look-ups functions of their own.
    #[inline(always)]
    fn lookup4(&self, root: u32, address: &[u8; 4]) -> Result<lpm::Word, lpm::Internal> {
        lpm::lookup(self, root, address)
    }
    /// The route to an IPv6 address
    #[inline(always)]
    fn lookup6(&self, root: u32, address: &[u8; 16]) -> Result<lpm::Word, lpm::Internal> {
        lpm::lookup(self, root, address)
    }
    /// What a list of roots says for a source, see `roots`. An engine may make it a function of its own.
    #[inline(always)]
    fn root_by_source(&self, list: u32, source: [u64; 2]) -> Option<u32> {
        roots::by_source(self, list, source)
    }
    /// Whether a group leads back to the port in a slot. An engine may make it a function of its own.
    #[inline(always)]
    fn leads_back(&self, group: u32, slot: u32) -> Result<bool, Reason> {
        source::leads_back(self, group, slot)
    }
    /// The flow that has this tuple. An engine may make it a function of its own.
    #[inline(always)]
    fn find_flow<const WORDS: usize>(&self, key: &Key<WORDS>) -> Option<Found> {
        flows::find(self, self.config()?.flow_seed.load(), key)
    }
    /// One of the operator's filters
    fn filter(&self, index: u32) -> Option<&Filter>;
    /// Counters of some of them that only this CPU or worker writes, by their number over `FILTERS_COUNTED`
    fn filter_stats(&self, line: u32, cpu: u32) -> Option<&FilterCounters>;
    /// A list of roots by source
    fn sources(&self, index: u32) -> Option<&SourceList>;
    /// A set of mappings
    fn mapping_set(&self, index: u32) -> Option<&MappingSet>;
    /// Counters of mappings that only this CPU or worker writes
    fn mapping_stats(&self, cpu: u32) -> Option<&CpuMappings>;
    /// The mapping that an address, or a port of it, has at the port in a slot. An engine may make it a function of its own.
    #[inline(always)]
    fn find_mapping(
        &self,
        slot: u32,
        way: Way,
        family: Family,
        address: Words,
        service: mapping::Service,
    ) -> Option<mapping::Found> {
        let index = mapping::in_force(self.config()?)?;
        mapping::find(self.mapping_set(index)?, index, slot, way, family, address, service)
    }
    /// What an address becomes by a mapping that was found.
    #[inline(always)]
    fn apply_mapping(&self, found: mapping::Found, way: Way, address: Words) -> Option<Words> {
        Some(self.mapping_set(found.set())?.apply(found, way, address))
    }
    /// The port that it has then, as on the wire; 0 if it keeps its own.
    #[inline(always)]
    fn mapped_port(&self, found: mapping::Found, way: Way) -> u16 {
        self.mapping_set(found.set()).map_or(0, |set| set.port(found, way))
    }
    /// Whether a mapping that was found translates an address.
    #[inline(always)]
    fn maps(&self, found: mapping::Found, way: Way, address: Words) -> bool {
        self.mapping_set(found.set()).is_some_and(|set| set.has(found, way, address))
    }
    /// Whether frames can be handed to the interface in this slot; an engine that must name the receiver before the
    /// frame is changed does it here.
    fn transmitter(&self, slot: u32) -> bool;
}

/// What becomes of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It came in by an interface that is no port: to Linux, untouched and not counted.
    NotAPort,
    /// The operator has it dropped
    Drop,
    /// To Linux, untouched, for this reason.
    Exception(Reason),
    /// Rewritten, to be sent by the interface in this slot.
    Forward(u32),
}

impl From<Verdict> for Outcome {
    #[inline(always)]
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::NotAPort => Self::NotAPort,
            Verdict::Drop => Self::Exception(Reason::Filtered),
            Verdict::Exception(reason) => Self::Exception(reason),
            Verdict::Forward(slot) => Self::Forward(slot),
        }
    }
}

/// Takes one frame that came in by the interface with index `ifindex` along the whole path, and counts it.
#[inline(always)]
pub fn process<F: Frame, T: Tables>(frame: &mut F, tables: &T, ifindex: u32) -> Verdict {
    if filters::are_there(tables) && filters::drops(frame, tables, ifindex) {
        return Verdict::Drop;
    }
    process_unfiltered(frame, tables, ifindex)
}

/// As `process`, for a frame that filters let pass.
#[inline(always)]
pub fn process_unfiltered<F: Frame, T: Tables>(frame: &mut F, tables: &T, ifindex: u32) -> Verdict {
    let Some(mut entry) = Entry::find(tables, ifindex) else { return Verdict::NotAPort };
    match take_along(frame, tables, &mut entry) {
        Ok(device) => Verdict::Forward(device),
        Err(reason) => {
            count_exception(tables, entry.slot, reason);
            Verdict::Exception(reason)
        }
    }
}

/// Counts a frame that goes to Linux since a capture is to see it, or for a reason that is found before.
#[inline(always)]
pub fn capture<F: Frame, T: Tables>(frame: &F, tables: &T, ifindex: u32) -> Verdict {
    let Some(mut entry) = Entry::find(tables, ifindex) else { return Verdict::NotAPort };
    let reason = match parse(frame, tables, &mut entry) {
        Err(Stop::Exception(reason)) => reason,
        Ok(_) | Err(Stop::Flow(_) | Stop::Mapped(_)) => Reason::PolicyCapture,
    };
    count_exception(tables, entry.slot, reason);
    Verdict::Exception(reason)
}

#[inline(always)]
fn take_along<'t, F: Frame, T: Tables>(frame: &mut F, tables: &'t T, entry: &mut Entry<'t>) -> Result<u32, Reason> {
    let candidate = match parse(frame, tables, entry) {
        Ok(parsed) => match route(frame, tables, entry, &parsed) {
            Ok(hop) => return forward(frame, tables, entry, &parsed, &hop),
            Err(Refusal::Exception(reason @ Reason::Mapped)) => {
                Candidate { family: parsed.family, offset: parsed.offset, reason }
            }
            Err(refusal) => return frame.tunnelled(tables, entry, &parsed, refusal),
        },
        Err(Stop::Flow(candidate)) => return frame.flow(tables, entry, candidate),
        Err(Stop::Mapped(candidate)) => candidate,
        Err(Stop::Exception(reason)) => return Err(reason),
    };
    frame.mapped(tables, entry, candidate)
}

#[inline(always)]
fn forward<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    entry: &Entry,
    parsed: &Parsed,
    hop: &Hop,
) -> Result<u32, Reason> {
    finish(frame, parsed, hop)?;
    count_forward(tables, entry.slot, parsed, hop);
    Ok(hop.device)
}

/// The last stage of a frame; what is forwarded is then to be counted.
#[inline(always)]
fn finish<F: Frame>(frame: &mut F, parsed: &Parsed, hop: &Hop) -> Result<(), Reason> {
    rewrite(frame, parsed, hop)?;
    hop.mark_hit();
    Ok(())
}
