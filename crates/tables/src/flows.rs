//! The flows as their writer and those who show them see them.

use std::hash::{BuildHasher, RandomState};
use std::ops::Range;

use crate::backing::View;
use crate::flow::{AnyKey, Connection, Direction, FlowRead, Found, Key, Tuple, in_line, line_at};
use crate::order;
use crate::pool::Slots;
use crate::record::{Config, Family, Flow, FlowLine, flow_state};
use crate::word::W64;

const DIRECTIONS: [Direction; 2] = [Direction::Original, Direction::Reply];

/// There is no room for another flow: the connection stays in Linux.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the table of flows is full: the connection stays in Linux")]
pub struct Full;

/// What passed of a flow, by direction (`Direction`).
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct FlowTotals {
    /// Packets
    pub packets: [u64; 2],
    /// Their bytes, from the IP header on
    pub bytes: [u64; 2],
}

/// A flow as it is now. What comes in pairs is by direction (`Direction`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FlowView {
    /// Its index in the table, its own as long as it is a flow
    pub index: u32,
    /// The connection
    pub connection: Connection,
    /// What passed
    pub totals: FlowTotals,
    /// Slots of the ports that Linux accepted a packet from and to, in the current generation; from: or the number of a VRF
    /// (`record::Port::arrival`)
    pub accepted: [Option<(u32, u32)>; 2],
    /// A FIN or RST was seen
    pub closed: bool,
}

impl FlowRead for View<'_> {
    #[inline(always)]
    fn flow_line(&self, number: u32) -> Option<&FlowLine> {
        line_at(self.flow_lines(), number)
    }

    #[inline(always)]
    fn flow(&self, index: u32) -> Option<&Flow> {
        self.flows().get(index as usize)
    }
}

/// All flows.
pub fn views<'a>(view: &View<'a>) -> impl Iterator<Item = FlowView> + use<'a> {
    views_in(view, 0..view.flows().len() as u32)
}

/// The flows with these indices.
pub fn views_in<'a>(view: &View<'a>, indices: Range<u32>) -> impl Iterator<Item = FlowView> + use<'a> {
    let (view, generation) = (*view, view.config().flow_generation.load());
    indices.filter_map(move |index| view_of(index, view.flows().get(index as usize)?, generation))
}

/// How many flows are in which state.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct FlowStates {
    /// One direction at least passes: Linux has accepted it in the current generation, and nothing is in its way
    pub fast: u64,
    /// None does
    pub waiting: u64,
    /// A FIN or RST was seen
    pub closed: u64,
}

/// Counts the flows in these records. `passes` says of a family's flows whether they pass between two slots.
pub(crate) fn count(records: &[Flow], generation: u32, passes: impl Fn(Family, (u32, u32)) -> bool) -> FlowStates {
    let mut states = FlowStates::default();
    for flow in records {
        let state = flow.state.load();
        if state & flow_state::KIND == 0 {
            continue;
        }
        let family = if state & 0xff == 1 + Family::V4 as u32 { Family::V4 } else { Family::V6 };
        let mut ways = flow.accepted.iter().filter_map(|word| way(word.load(), generation));
        let fast = ways.any(|way| passes(family, way));
        let of = match (state & flow_state::CLOSED != 0, fast) {
            (true, _) => &mut states.closed,
            (false, true) => &mut states.fast,
            (false, false) => &mut states.waiting,
        };
        *of += 1;
    }
    states
}

/// The flow with this tuple, and the tuple's direction.
pub fn find(view: &View<'_>, tuple: &Tuple) -> Option<(FlowView, Direction)> {
    let config = view.config();
    let found = AnyKey::from(tuple).find(view, config.flow_seed.load())?;
    let flow = view.flows().get(found.index() as usize)?;
    Some((view_of(found.index(), flow, config.flow_generation.load())?, found.direction()))
}

fn view_of(index: u32, flow: &Flow, generation: u32) -> Option<FlowView> {
    let [original, reply] = DIRECTIONS.map(|direction| AnyKey::of(flow, direction));
    Some(FlowView {
        index,
        connection: Connection { original: Tuple::from(&original?), reply: Tuple::from(&reply?) },
        totals: totals(flow),
        accepted: flow.accepted.each_ref().map(|word| way(word.load(), generation)),
        closed: flow.state.load() & flow_state::CLOSED != 0,
    })
}

/// What a word of `Flow::accepted` says in this generation: the slots between which packets pass.
fn way(word: u64, generation: u32) -> Option<(u32, u32)> {
    let (of, from, to) = ((word >> 32) as u32, word as u32 >> 16, word as u32 & 0xffff);
    (of == generation).then_some((from.checked_sub(1)?, to.checked_sub(1)?))
}

fn totals(flow: &Flow) -> FlowTotals {
    FlowTotals {
        packets: flow.counters.each_ref().map(|counters| counters.packets.load()),
        bytes: flow.counters.each_ref().map(|counters| counters.bytes.load()),
    }
}

/// No flow passes any more, and none is accepted.
pub fn close(config: &Config) {
    let generation = config.flow_generation.load();
    order::publish(&config.flow_generation, generation | 1);
}

/// Flows pass that are accepted from now on.
pub(crate) fn open(config: &Config) {
    let generation = config.flow_generation.load();
    order::publish(&config.flow_generation, generation.wrapping_add(generation & 1));
}

/// Makes all flows impossible to find.
pub(crate) fn end(view: &View<'_>) {
    close(view.config());
    view.flow_lines().iter().flat_map(|line| &line.places).for_each(|place| place.store(0));
}

/// Which records are in use: the writer's part of the flows.
#[derive(Debug)]
pub(crate) struct Flows {
    slots: Slots,
    /// Removed, but perhaps still looked at
    limbo: Vec<u32>,
    /// The same, but those who may look are being waited for
    sealed: Vec<u32>,
    /// How often some were sealed
    seals: u64,
}

impl Default for Flows {
    fn default() -> Self {
        Self { slots: Slots::new(0), limbo: Vec::new(), sealed: Vec::new(), seals: 0 }
    }
}

impl Flows {
    /// Begins without flows, closed. No reader looks at one.
    pub fn begin(&mut self, view: &View<'_>) {
        let config = view.config();
        close(config);
        view.flows().iter().filter(|flow| flow.state.load() != 0).for_each(|flow| flow.state.store(0));
        config.flow_seed.store(RandomState::new().hash_one(0) as u32);
        *self = Self { seals: self.seals, ..Self::default() };
    }

    pub fn count(&self) -> usize {
        self.slots.used() - self.limbo()
    }

    /// Records that were removed and are not free yet.
    pub fn limbo(&self) -> usize {
        self.limbo.len() + self.sealed.len()
    }

    /// Records behind these were never used.
    pub fn end(&self) -> usize {
        self.slots.end() as usize
    }

    /// Whether a grace period would make so much room that it is worth while, and there is none else.
    pub fn wants_grace(&self, view: &View<'_>) -> bool {
        let room = view.flows().len();
        self.slots.used() == room && self.limbo() > room / 64
    }

    /// Makes records free that were removed; no reader looks at them any more.
    pub fn reclaim(&mut self) {
        for index in self.limbo.drain(..).chain(self.sealed.drain(..)) {
            self.slots.give(index);
        }
    }

    /// Has what was removed become free by `reclaim_sealed` with this number; None if there is nothing, or something waits
    /// already.
    pub fn seal(&mut self) -> Option<u64> {
        if self.limbo.is_empty() || !self.sealed.is_empty() {
            return None;
        }
        std::mem::swap(&mut self.limbo, &mut self.sealed);
        self.seals += 1;
        Some(self.seals)
    }

    pub fn reclaim_sealed(&mut self, seal: u64) {
        if seal == self.seals {
            self.sealed.drain(..).for_each(|index| self.slots.give(index));
        }
    }

    pub fn set(&mut self, view: &View<'_>, connection: &Connection) -> Result<(), Full> {
        let keys = [&connection.original, &connection.reply].map(AnyKey::from);
        let seed = view.config().flow_seed.load();
        let found = keys.map(|key| key.find(view, seed));
        if let [Some(original), Some(reply)] = found
            && original.index() == reply.index()
            && original.direction() == Direction::Original
        {
            let state = &view.flows()[original.index() as usize].state;
            // A RST may have been one that Linux takes no notice of.
            if state.load() & flow_state::FINISHED == 0 {
                state.clear(flow_state::CLOSED);
            }
            return Ok(());
        }
        for key in &keys {
            if let Some(found) = key.find(view, seed) {
                self.retire(view, found.index());
            }
        }
        let index = self.slots.take(view.flows().len() as u32).ok_or(Full)?;
        write(&view.flows()[index as usize], &keys);
        let entered = DIRECTIONS.map(|direction| enter(view, &keys[direction as usize], Found::new(index, direction)));
        if entered.contains(&None) {
            // One of the two may have been looked at.
            self.retire(view, index);
            return Err(Full);
        }
        Ok(())
    }

    pub fn remove(&mut self, view: &View<'_>, original: &Tuple) -> Option<FlowTotals> {
        let found = AnyKey::from(original).find(view, view.config().flow_seed.load())?;
        if found.direction() != Direction::Original {
            return None;
        }
        let totals = totals(&view.flows()[found.index() as usize]);
        self.retire(view, found.index());
        Some(totals)
    }

    fn retire(&mut self, view: &View<'_>, index: u32) {
        let flow = &view.flows()[index as usize];
        for direction in DIRECTIONS {
            if let Some(place) =
                AnyKey::of(flow, direction).and_then(|key| place_of(view, &key, Found::new(index, direction)))
            {
                place.store(0);
            }
        }
        // For those who list flows.
        flow.state.store(0);
        self.limbo.push(index);
    }
}

/// Writes a record at which nobody looks.
fn write(flow: &Flow, keys: &[AnyKey; 2]) {
    flow.accepted.iter().for_each(|word| word.store(0));
    flow.counters.iter().for_each(|counters| {
        counters.packets.store(0);
        counters.bytes.store(0);
    });
    let mut kind = 0;
    for (direction, key) in keys.iter().enumerate() {
        let (addresses, ports): (&[u64], _) = match key {
            AnyKey::V4(key) => (&key.addresses, key.ports),
            AnyKey::V6(key) => (&key.addresses, key.ports),
        };
        let words = addresses.iter().copied().chain(std::iter::repeat(0));
        flow.addresses[direction].iter().zip(words).for_each(|(word, value)| word.store(value));
        flow.ports[direction].store(ports);
        kind = match key {
            AnyKey::V4(key) => key.kind,
            AnyKey::V6(key) => key.kind,
        };
    }
    order::publish(&flow.state, kind);
}

fn place(key: &AnyKey, seed: u32) -> ([u32; 2], u32) {
    match key {
        AnyKey::V4(key) => Key::place(key, seed),
        AnyKey::V6(key) => Key::place(key, seed),
    }
}

/// Enters a tuple in the emptier of its lines that has no other with its tag; None if there is no room.
fn enter(view: &View<'_>, key: &AnyKey, found: Found) -> Option<()> {
    let (lines, tag) = place(key, view.config().flow_seed.load());
    let line = |number| line_at(view.flow_lines(), number);
    let free = |line: &&FlowLine| line.places.iter().filter(|place| place.load() == 0).count();
    let candidates = lines.into_iter().filter_map(line).filter(|line| in_line(line, tag).is_none());
    // Of two that are alike, the first: most are then found there.
    let line = candidates.rev().max_by_key(free)?;
    let place = line.places.iter().find(|place| place.load() == 0)?;
    order::publish(place, u64::from(tag) << 32 | u64::from(found.0));
    Some(())
}

/// Where a tuple is entered.
fn place_of<'a>(view: &View<'a>, key: &AnyKey, found: Found) -> Option<&'a W64> {
    let (lines, tag) = place(key, view.config().flow_seed.load());
    let wanted = u64::from(tag) << 32 | u64::from(found.0);
    let places = lines.into_iter().filter_map(|number| line_at(view.flow_lines(), number));
    places.flat_map(|line| &line.places).find(|place| place.load() == wanted)
}
