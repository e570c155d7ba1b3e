//! What workers do besides taking frames along the packet path: they trace them, and where no XDP program has seen them (on wires),
//! leave to Linux what captures are to see.

use crate::daemon::{Daemon, Event};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use towpath_engine::{Frames, Seen, Trace};
use towpath_filter::{Capture, Runnable};
use towpath_tables::Reason;
use towpath_tables::clock;
use towpath_tables::trace::{Gate, HEAD, Outcome, Traced, Wanted};

/// For the workers of one daemon; made anew whenever captures or traces are others.
struct Lookout {
    /// Filters, and the interface that each is for, if it is for one
    captures: Vec<(Runnable, Option<u32>)>,
    /// By number
    traces: Vec<(usize, Arc<WorkersTrace>)>,
    events: SyncSender<Event>,
}

/// A trace, as far as it is about what workers receive.
pub struct WorkersTrace {
    sieve: Sieve,
    gate: Gate,
}

enum Sieve {
    All,
    Matching(Runnable),
    OneIn(NonZeroU32),
}

impl WorkersTrace {
    pub fn new(trace: &Trace) -> Self {
        let sieve = match &trace.frames {
            Frames::All => Sieve::All,
            Frames::Matching(filter) => Sieve::Matching(filter.runnable()),
            Frames::OneIn(number) => Sieve::OneIn(*number),
        };
        Self { sieve, gate: Gate::new(trace.rate, trace.wanted) }
    }

    pub fn seen(&self) -> Seen {
        Seen { matched: self.gate.matched.load(), missed: self.gate.missed.load() }
    }

    fn looks_at(&self, frame: &[u8]) -> bool {
        match &self.sieve {
            Sieve::All => true,
            Sieve::Matching(filter) => filter.matches(frame),
            Sieve::OneIn(number) => fastrand::u32(..) <= u32::MAX / *number,
        }
    }

    /// Whether it may be told of a frame of which this became.
    fn admits(&self, outcome: Outcome, now: u64) -> bool {
        Wanted::takes(self.gate.wanted.load(), outcome.word()) && self.gate.admits(now)
    }
}

impl towpath_user::Lookout for Lookout {
    fn captures(&self, ifindex: u32, frame: &[u8]) -> bool {
        let is_here = |only: Option<u32>| only.is_none_or(|only| only == ifindex);
        self.captures.iter().any(|(filter, only)| is_here(*only) && filter.matches(frame))
    }

    fn traces(&self, frame: &[u8]) -> u32 {
        bits(self.traces.iter().filter(|(_, trace)| trace.looks_at(frame)))
    }

    fn tell(&self, traces: u32, ifindex: u32, frame: &[u8], outcome: Outcome) {
        let now = clock::exact();
        let asked = self.traces.iter().filter(|(number, _)| traces >> number & 1 != 0);
        let told: Vec<_> = asked.filter(|(_, trace)| trace.admits(outcome, now)).collect();
        if told.is_empty() {
            return;
        }
        let packet = Traced { time: now, traces: bits(told.iter().copied()), ..traced(ifindex, frame, outcome) };
        // A worker waits for nobody.
        if self.events.try_send(Event::Traced(vec![packet])).is_err() {
            told.iter().for_each(|(_, trace)| trace.gate.missed.add(1));
        }
    }
}

fn bits<'t>(traces: impl Iterator<Item = &'t (usize, Arc<WorkersTrace>)>) -> u32 {
    traces.fold(0, |bits, (number, _)| bits | 1 << number)
}

/// What is told of a frame, but for when and to whom.
fn traced(ifindex: u32, frame: &[u8], outcome: Outcome) -> Traced {
    let (length, kept) = (frame.len() as u32, frame.len().min(HEAD));
    let mut head = [0; HEAD];
    head[..kept].copy_from_slice(&frame[..kept]);
    // SAFETY: asks for a number; it fails (-1) on no kernel that there is.
    let cpu = unsafe { libc::sched_getcpu() }.cast_unsigned();
    Traced {
        time: 0,
        ifindex,
        queue: 0,
        cpu,
        total_len: length,
        first_len: length,
        head_len: kept as u32,
        traces: 0,
        outcome: outcome.word(),
        partial: u32::from(outcome == Outcome::Exception(Reason::PartialChecksum)),
        tag: 0,
        head,
    }
}

impl Daemon {
    /// Has the workers look out for the captures and traces of now.
    pub fn look_out(&self) {
        let Some(workers) = &self.workers else { return };
        let filter = |capture: &Capture| (capture.filter.runnable(), capture.only);
        let captures: Vec<_> = self.captures.loaded().iter().map(filter).collect();
        let traces: Vec<_> = self.traces.of_workers().collect();
        let needed = !captures.is_empty() || !traces.is_empty();
        let lookout = needed.then(|| Lookout { captures, traces, events: self.events.clone() });
        workers.set_lookout(lookout.map(|lookout| Arc::new(lookout) as Arc<dyn towpath_user::Lookout>).as_ref());
    }
}
