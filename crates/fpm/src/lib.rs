//! FPM, the fast path manager: FPC messages in, shared tables out. It is the tables' only writer.
//!
//! `State` holds what Linux said; `Mirror` holds what stands for it in the tables and brings them in line. Messages only
//! change the state; `publish` works out, once for all messages of a batch, what that means for the tables. Nothing is
//! published before every awaited class of objects was described whole once, so that tables taken over from a daemon
//! that died go on saying what they said until this one knows as much.

mod filters;
mod flows;
mod gate;
mod idle;
mod inspect;
mod mappings;
mod mirror;
mod missing;
mod rooms;
mod routes;
mod rules;
mod snapshot;
mod state;
mod via;

pub use filters::{Fault, FilterChange, FilterRefused};
pub use flows::Refused;
pub use gate::Phase;
pub use idle::{Timeouts, Told};
pub use inspect::{Explanation, Matched, NexthopState, NexthopUsers, PortState};
pub use mappings::{End, Mapping, MappingError};

pub use missing::Waiting;

use flows::Flows;
use gate::Gate;
use idle::Idle;
use mirror::Mirror;
use state::State;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use towpath_fpc::{Message, NeighbourKey, Policy, PolicySource, Snapshot};
use towpath_tables::backing::{Backing, GrowError};
use towpath_tables::filters::{self as in_force, Decision, FilterTotals, FilterValue, Filters};
use towpath_tables::grace::Grace;
use towpath_tables::mappings::{self as in_tables, MappingTotals, MappingValue};
use towpath_tables::record::Family;
use towpath_tables::writer::{Published, TableWriter};

/// How often records of connections that ended are made reusable.
const RECLAIM: Duration = Duration::from_secs(1);

/// Whether the engine can transmit by an interface.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transmit {
    /// Any frame
    Any,
    /// Frames that lie in one buffer
    SingleBuffer,
    /// None: what would leave by it is Linux's
    Nothing,
}

/// The fast path manager.
pub struct Fpm<B, G> {
    state: State,
    mirror: Mirror<B, G>,
    flows: Flows,
    gate: Gate,
    /// When records of connections that ended may be reclaimed again
    reclaim_due: Option<Instant>,
    idle: Idle,
    filters: Filters,
    /// Interfaces that filters are of
    filtered_ports: BTreeSet<u32>,
    /// A publication is under way
    unfinished: bool,
}

/// How far a publication has come.
#[derive(Debug)]
pub enum Progress {
    /// There was nothing to do, or not everything awaited has been described
    Nothing,
    /// There is more to do
    More,
    /// The tables say what was applied
    Done(Published),
}

/// The classes of objects that a complete description consists of.
pub fn all_classes() -> impl Iterator<Item = Snapshot> {
    use PolicySource::*;
    let families = Family::ALL;
    let of_families = families
        .into_iter()
        .flat_map(|family| [Snapshot::Addresses(family), Snapshot::Neighbours(family), Snapshot::Routes(family)]);
    let policies = [Nftables, Xtables, Xfrm, Rules, Tc, Capture, Sysctl, Tunnels].map(Snapshot::Policies);
    [Snapshot::Ports, Snapshot::Nexthops].into_iter().chain(of_families).chain(policies)
}

impl<B: Backing, G: Grace> Fpm<B, G> {
    /// A manager for these tables, new (`TableWriter::create`) or taken over (`TableWriter::adopt`). It publishes
    /// nothing before it has seen the end of a snapshot of each of `awaited` (usually `all_classes()`).
    pub fn new(tables: TableWriter<B, G>, awaited: impl IntoIterator<Item = Snapshot>) -> Self {
        let mut state = State::awaiting(awaited);
        let ports: BTreeMap<u32, u32> = tables.ports().collect();
        let of_port = |value: &MappingValue| Mapping::of_value(*ports.get(&value.slot)?, value);
        let mapped = tables.mappings().into_iter().filter_map(|(number, value)| Some((number, of_port(&value)?)));
        state.mappings = mapped.collect();
        let filters = tables.filters().unwrap_or_default();
        Self {
            state,
            filtered_ports: ports_of(&filters),
            filters,
            mirror: Mirror::new(tables),
            flows: Flows::default(),
            gate: Gate::default(),
            reclaim_due: None,
            idle: Idle::default(),
            unfinished: false,
        }
    }

    /// Serves an interface and its VLAN sub-interfaces, or no longer. Takes effect with `publish`.
    pub fn serve(&mut self, ifindex: u32, on: bool) {
        self.state.serve(ifindex, on);
    }

    /// Says whether the engine can transmit by an interface; it can until something else is said. Takes effect with
    /// `publish`.
    pub fn set_transmit(&mut self, ifindex: u32, transmit: Transmit) {
        self.state.set_transmit(ifindex, transmit);
    }

    /// Says whether the engine sees what travels beside frames that come in by an interface; it does not until something
    /// else is said. Takes effect with `publish`.
    pub fn set_beside(&mut self, ifindex: u32, seen: bool) {
        self.state.set_beside(ifindex, seen);
    }

    /// Says whether packets that come in by an interface have no mark (`sk_buff`); they may have one until something else is
    /// said. Takes effect with `publish`.
    pub fn set_unmarked(&mut self, ifindex: u32, on: bool) {
        self.state.set_unmarked(ifindex, on);
    }

    /// The policies that touch less if the engine runs their filters. See `set_filtered`.
    pub fn filters(&self) -> BTreeSet<Policy> {
        self.state.filters()
    }

    /// Says for which policies the engine sends what their filters match to Linux, on every frame that arrives: only that is
    /// what they touch then. What it no longer does must be said before. Takes effect with `publish`.
    pub fn set_filtered(&mut self, filtered: BTreeSet<Policy>) {
        self.state.set_filtered(filtered);
    }

    /// Whether a policy touches what its filter matches and nothing else.
    pub fn is_filtered(&self, policy: &Policy) -> bool {
        self.state.is_filtered(policy)
    }

    /// Takes one message. Takes effect with `publish`, but for connections: those are in the tables at once.
    pub fn apply(&mut self, message: Message) {
        let tables = &mut self.mirror.tables;
        match message {
            Message::Flow(connection) if self.state.is_end_of(&connection) => {
                self.flows.remove(tables, &connection.original);
            }
            Message::Flow(connection) => self.flows.set(tables, &connection),
            Message::FlowDelete(original) => self.flows.remove(tables, &original),
            Message::SnapshotBegin(Snapshot::Flows) => self.flows.begin(),
            Message::SnapshotEnd(Snapshot::Flows) => self.flows.end(tables),
            message => self.state.apply(message),
        }
    }

    /// True once everything awaited has been described.
    pub fn is_complete(&self) -> bool {
        self.state.generations.complete()
    }

    /// What is still to be described before anything is published.
    pub fn awaited(&self) -> impl Iterator<Item = Snapshot> {
        self.state.generations.awaited()
    }

    /// Ends a batch: makes the tables say what was applied. None if there was nothing to do, or not everything awaited
    /// has been described.
    pub fn publish(&mut self) -> Option<Published> {
        match self.publish_while(|| true) {
            Progress::Done(published) => Some(published),
            Progress::Nothing | Progress::More => None,
        }
    }

    /// As `publish`, but with routes only as long as `go_on`, asked again and again, says so. Everything else takes
    /// effect at once. Routes must not be applied before it is `Done`; alarms may.
    pub fn publish_while(&mut self, go_on: impl FnMut() -> bool) -> Progress {
        if !self.is_complete() || !(self.unfinished || self.state.is_changed() || !self.mirror.is_filled()) {
            return Progress::Nothing;
        }
        // First of all: rules that are new may be about connections that pass.
        let freed = self.state.take_freed();
        if self.gate.govern(self.state.rules(), freed, self.state.knows_neighbours(), Instant::now()) {
            self.mirror.tables.close_flows();
        }
        let published = self.mirror.sync(&mut self.state, go_on);
        self.unfinished = published.is_none();
        self.drop_stale_filters();
        published.map_or(Progress::More, Progress::Done)
    }

    /// Until everything awaited has been described, tables that were taken over stay as they are, but for this: what
    /// a policy touches that is known by now goes to Linux with its whole family.
    pub fn restrain(&mut self) {
        if !self.is_complete() {
            self.mirror.restrain(&self.state);
        }
    }

    /// Has what found no room in the tables tried again with the next `publish`: some of it, more each time all that
    /// was tried found room, so that little is tried in vain. To be called now and then, since neither freed places
    /// nor memory that a table could grow into are announced. False if nothing is missing, or a publication is under
    /// way.
    pub fn retry(&mut self) -> bool {
        if self.unfinished || !self.mirror.is_filled() || self.mirror.missing.is_empty() {
            return false;
        }
        self.state.work_in_again(self.mirror.missing.take());
        self.unfinished = true;
        true
    }

    /// True if all that was last tried again found room, but more is missing.
    pub fn finds_room(&self) -> bool {
        self.mirror.missing.finds_room()
    }

    /// What waits for room, and is Linux's meanwhile.
    pub fn waiting(&self) -> Waiting {
        self.mirror.missing.waiting()
    }

    /// The tables that have no room for all they should hold, and why they do not grow.
    pub fn full(&self) -> impl Iterator<Item = &GrowError> {
        self.mirror.missing.full()
    }

    /// The neighbours that packets were sent to since the last call.
    pub fn take_hits(&self) -> Vec<NeighbourKey> {
        let used = |index| self.mirror.tables.take_hit(index);
        let mut hits: Vec<_> = self
            .mirror
            .nexthops
            .iter()
            .filter_map(|(identity, placed)| {
                Some((NeighbourKey { ifindex: identity.ifindex, address: identity.gateway? }, placed.index))
            })
            .filter(|(_, index)| used(*index))
            .map(|(key, _)| key)
            .collect();
        hits.dedup();
        hits
    }

    /// Says whether Linux's rules are followed; they are until something else is said. Where nobody would see them change, no
    /// connection passes. Takes effect with `publish`.
    pub fn follow_rules(&mut self, on: bool) {
        self.state.follow_rules(on);
    }

    /// After the rules have changed, the number of the change once what Linux had let pass before has had time to leave:
    /// then somebody is to wait for a grace period, and to call `open_flows`. Given once for each change.
    pub fn settled_flows(&mut self, now: Instant) -> Option<u64> {
        self.gate.settled(now)
    }

    /// Lets connections pass as soon as Linux has accepted them anew, unless the rules have changed again.
    pub fn open_flows(&mut self, change: u64) {
        if self.gate.open(change) {
            self.mirror.tables.open_flows();
        }
    }

    /// Whether connections pass.
    pub fn flow_phase(&self) -> Phase {
        self.gate.phase()
    }

    /// Sets for how long Linux keeps connections that are not used.
    pub fn set_flow_timeouts(&mut self, timeouts: Timeouts) {
        self.idle.set_timeouts(timeouts);
    }

    /// If it is due, looks at some of the connections: gives those with packets that Linux is to be told of; makes those
    /// Linux's that had none for so long that it may be about to forget them.
    pub fn take_used_flows(&mut self, now: Instant) -> Told {
        let tables = &mut self.mirror.tables;
        if tables.flow_count() == 0 {
            return Told::default();
        }
        let found = self.idle.step(tables.flow_records(), now);
        found.idle.into_iter().for_each(|index| tables.reject_flow(index));
        found.told
    }

    /// If it is due, begins to make the records of connections that ended reusable: somebody is to wait for a grace period, and
    /// to call `reclaim_flows` with this number.
    pub fn seal_flows(&mut self, now: Instant) -> Option<u64> {
        if self.reclaim_due.is_some_and(|due| now < due) {
            return None;
        }
        let seal = self.mirror.tables.seal_flows()?;
        self.reclaim_due = Some(now + RECLAIM);
        Some(seal)
    }

    /// See `seal_flows`.
    pub fn reclaim_flows(&mut self, seal: u64) {
        self.mirror.tables.reclaim_flows(seal);
    }

    /// When `settled_flows` or `take_used_flows` has something to do.
    pub fn flows_due(&self) -> Option<Instant> {
        let idle = (self.mirror.tables.flow_count() > 0).then(|| self.idle.due());
        [idle, self.gate.due()].into_iter().flatten().min()
    }

    /// Adds a mapping to those of its port. Takes effect with `publish`.
    pub fn add_mapping(&mut self, mapping: Mapping) -> Result<(), MappingError> {
        self.state.add_mapping(mapping)
    }

    /// Ends a mapping. Takes effect with `publish`.
    pub fn remove_mapping(&mut self, mapping: &Mapping) -> Result<(), MappingError> {
        self.state.remove_mapping(mapping)
    }

    /// Ends the mappings of ports that this is not said of; gives those ports. Takes effect with `publish`.
    pub fn keep_mappings(&mut self, of: impl Fn(u32) -> bool) -> BTreeSet<u32> {
        let ended = self.mapped_ports().into_iter().filter(|ifindex| !of(*ifindex)).collect();
        self.state.keep_mappings(of);
        ended
    }

    /// All mappings, and what passed of each.
    pub fn mappings(&self) -> impl Iterator<Item = (Mapping, MappingTotals)> {
        let view = self.mirror.tables.view();
        self.state.mappings.iter().map(move |(number, mapping)| (*mapping, in_tables::totals(&view, *number)))
    }

    /// Interfaces with mappings
    pub fn mapped_ports(&self) -> BTreeSet<u32> {
        self.state.mappings.values().map(|mapping| mapping.ifindex).collect()
    }

    /// Changes the operator's filters: all of it, or nothing. It is in force when this returns.
    pub fn change_filters(&mut self, changes: &[FilterChange]) -> Result<(), Fault> {
        let all = filters::changed(&self.filters, changes, |ifindex| self.state.check_filter_port(ifindex))?;
        self.set_filters(all).map_err(|error| Fault { at: None, why: error.into() })
    }

    /// The filters after such changes.
    pub fn filters_after(&self, changes: &[FilterChange]) -> Result<Filters, Fault> {
        filters::changed(&self.filters, changes, |ifindex| self.state.check_filter_port(ifindex))
    }

    fn set_filters(&mut self, all: Filters) -> Result<(), in_force::FilterError> {
        self.mirror.tables.set_filters(&all)?;
        (self.filtered_ports, self.filters) = (ports_of(&all), all);
        Ok(())
    }

    /// Ends the filters of interfaces that are not there any more.
    fn drop_stale_filters(&mut self) {
        if self.filtered_ports.iter().all(|ifindex| self.state.ports.contains_key(ifindex)) {
            return;
        }
        let is_there = |value: &FilterValue| value.ifindex == 0 || self.state.ports.contains_key(&value.ifindex);
        let left: Filters = self.filters.iter().filter(|(value, _)| is_there(value)).map(|(v, d)| (*v, *d)).collect();
        tracing::warn!("{} filters end with the interfaces that they were of", self.filters.len() - left.len());
        if let Err(error) = self.set_filters(left) {
            tracing::error!("filters stay what they were: {error}");
        }
    }

    /// The operator's filters.
    pub fn traffic_filters(&self) -> &Filters {
        &self.filters
    }

    /// What a filter has decided over.
    pub fn filter_totals(&self, decision: Decision) -> FilterTotals {
        in_force::totals(&self.mirror.tables.view(), decision.number)
    }

    /// Connections for which there was no room.
    pub fn refused_flows(&self) -> Refused {
        self.flows.refused()
    }

    /// The tables' writer, to read from.
    pub fn tables(&self) -> &TableWriter<B, G> {
        &self.mirror.tables
    }

    /// The tables' writer, for what is not in FPC: the hash seed, reclaiming in quiet moments, the engine's backing.
    pub fn tables_mut(&mut self) -> &mut TableWriter<B, G> {
        &mut self.mirror.tables
    }

    /// Ends managing; what is published stays published.
    pub fn into_tables(self) -> TableWriter<B, G> {
        self.mirror.tables
    }
}

fn ports_of(filters: &Filters) -> BTreeSet<u32> {
    filters.keys().map(|value| value.ifindex).filter(|ifindex| *ifindex != 0).collect()
}

#[cfg(test)]
mod tests;
