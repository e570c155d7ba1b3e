//! What the XDP program does besides the packet path, for frames that workers take from wires: captures and traces.

use crate::daemon::{Daemon, Event};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use towpath_engine::{Frames, Seen, Trace};
use towpath_filter::{Capture, Runnable};
use towpath_tables::clock;
use towpath_tables::trace::{Gate, HEAD, Outcome, Traced, Wanted};

/// For the workers of one daemon; made anew whenever captures or traces are others.
struct Lookout {
    /// Filters, and the interface that each is for, if it is for one
    captures: Vec<(Runnable, Option<u32>)>,
    /// By number
    traces: Vec<(usize, Arc<WireTrace>)>,
    events: SyncSender<Event>,
}

/// A trace, as far as it is about wires.
pub struct WireTrace {
    sieve: Sieve,
    gate: Gate,
}

enum Sieve {
    All,
    Matching(Runnable),
    OneIn(NonZeroU32),
}

impl WireTrace {
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

    /// Whether it is to be told of a frame of which this became.
    fn takes(&self, frame: &[u8], outcome: Outcome, now: u64) -> bool {
        let matches = match &self.sieve {
            Sieve::All => true,
            Sieve::Matching(filter) => filter.matches(frame),
            Sieve::OneIn(number) => fastrand::u32(..) <= u32::MAX / *number,
        };
        matches && Wanted::takes(self.gate.wanted.load(), outcome.word()) && self.gate.admits(now)
    }
}

impl towpath_user::Lookout for Lookout {
    fn captures(&self, ifindex: u32, frame: &[u8]) -> bool {
        let is_here = |only: Option<u32>| only.is_none_or(|only| only == ifindex);
        self.captures.iter().any(|(filter, only)| is_here(*only) && filter.matches(frame))
    }

    fn trace(&self, ifindex: u32, frame: &[u8], outcome: Outcome) {
        if self.traces.is_empty() {
            return;
        }
        let now = clock::exact();
        let traces: Vec<_> = self.traces.iter().filter(|(_, trace)| trace.takes(frame, outcome, now)).collect();
        if traces.is_empty() {
            return;
        }
        let bits = traces.iter().fold(0, |bits, (number, _)| bits | 1 << number);
        // A worker waits for nobody.
        if self.events.try_send(Event::Traced(vec![traced(ifindex, frame, outcome, now, bits)])).is_err() {
            traces.iter().for_each(|(_, trace)| trace.gate.missed.add(1));
        }
    }
}

fn traced(ifindex: u32, frame: &[u8], outcome: Outcome, time: u64, traces: u32) -> Traced {
    let (length, kept) = (frame.len() as u32, frame.len().min(HEAD));
    let mut head = [0; HEAD];
    head[..kept].copy_from_slice(&frame[..kept]);
    // SAFETY: asks for a number; it fails (-1) on no kernel that there is.
    let cpu = unsafe { libc::sched_getcpu() }.cast_unsigned();
    Traced {
        time,
        ifindex,
        queue: 0,
        cpu,
        total_len: length,
        first_len: length,
        head_len: kept as u32,
        traces,
        outcome: outcome.word(),
        partial: u32::from(outcome == Outcome::Exception(towpath_tables::Reason::PartialChecksum)),
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
        let traces: Vec<_> = self.traces.of_wires().collect();
        let needed = !captures.is_empty() || !traces.is_empty();
        let lookout = needed.then(|| Lookout { captures, traces, events: self.events.clone() });
        workers.set_lookout(lookout.map(|lookout| Arc::new(lookout) as Arc<dyn towpath_user::Lookout>).as_ref());
    }
}
