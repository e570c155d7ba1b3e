//! What the XDP program and the process that reads traces share: the record of a traced packet, and each trace's gate.

use crate::Reason;
use crate::word::W64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Traces that may run at once.
pub const TRACES: usize = 4;
/// Bytes of a frame that are copied: every header that the packet path looks at, with two tags and a tunnel.
pub const HEAD: usize = 256;

/// A packet that a trace saw, and what became of it.
#[repr(C)]
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Clone, Debug)]
pub struct Traced {
    /// When it arrived: CLOCK_MONOTONIC in nanoseconds
    pub time: u64,
    /// The interface that received it
    pub ifindex: u32,
    /// The receive queue
    pub queue: u32,
    /// The processor
    pub cpu: u32,
    /// Length of the frame in bytes
    pub total_len: u32,
    /// Length of its first buffer
    pub first_len: u32,
    /// Bytes of `head` that are the frame's
    pub head_len: u32,
    /// Bit n: it is for trace n
    pub traces: u32,
    /// As `Outcome::word`
    pub outcome: u32,
    /// `Beside::partial` of crate `pipeline`: 0 no, 1 yes, 2 not known
    pub partial: u32,
    /// The tag beside the frame, protocol in the upper half; 0 if there is none
    pub tag: u32,
    /// The frame's beginning as it arrived
    pub head: [u8; HEAD],
}

impl Traced {
    /// A tag beside the frame was seen: control information 0 is one, too.
    pub const HAS_TAG: u32 = 1 << 8;
}

/// What the program did with a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Linux's: it came in by no port
    NotAPort,
    /// Forwarded by the interface in this slot
    Forward(u32),
    /// Linux's, for this reason
    Exception(Reason),
}

/// Kinds of outcomes, in the upper half of the word.
const NOT_A_PORT: u32 = 0;
const FORWARD: u32 = 1 << 16;
const EXCEPTION: u32 = 2 << 16;
const VALUE: u32 = 0xffff;

impl Outcome {
    /// As a number.
    #[inline(always)]
    pub fn word(self) -> u32 {
        match self {
            Self::NotAPort => NOT_A_PORT,
            Self::Forward(slot) => FORWARD | slot & VALUE,
            Self::Exception(reason) => EXCEPTION | reason as u32,
        }
    }

    /// From a number; None if it stands for nothing.
    pub fn from_word(word: u32) -> Option<Self> {
        let value = word & VALUE;
        Some(match word & !VALUE {
            NOT_A_PORT => Self::NotAPort,
            FORWARD => Self::Forward(value),
            EXCEPTION => Self::Exception(Reason::from_index(u8::try_from(value).ok()?)?),
            _ => return None,
        })
    }
}

/// Which packets a trace is for, among those that its filter matches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wanted {
    /// All
    Everything,
    /// Those that go to Linux
    Exceptions,
    /// Those that go to Linux for this reason
    For(Reason),
}

/// `Gate::wanted` of `Wanted::For` is this and the reason.
const FIRST_REASON: u64 = 2;

impl Wanted {
    /// As a number.
    pub fn word(self) -> u64 {
        match self {
            Self::Everything => 0,
            Self::Exceptions => 1,
            Self::For(reason) => FIRST_REASON + reason as u64,
        }
    }

    /// Whether a word asks for packets of which this became.
    #[inline(always)]
    pub fn takes(word: u64, outcome: u32) -> bool {
        match word {
            0 => true,
            1 => outcome & !VALUE == EXCEPTION,
            reason => u64::from(outcome ^ EXCEPTION) == reason - FIRST_REASON,
        }
    }
}

/// How many packets of a trace are told: the program's own state, kept by it, in which times are CLOCK_MONOTONIC in
/// nanoseconds.
#[repr(C)]
#[derive(Default)]
pub struct Gate {
    /// Time from one packet to the next
    pub interval: W64,
    /// So much time may be used in advance
    pub room: W64,
    /// When the next packet would be due if each came in its time
    pub due: W64,
    /// As `Wanted::word`
    pub wanted: W64,
    /// Packets that were wanted
    pub matched: W64,
    /// Of those, the ones that were not told
    pub missed: W64,
}

impl Gate {
    /// One that nothing has passed. `rate`: packets a second, and so many at once at most.
    pub fn new(rate: u32, wanted: Wanted) -> Self {
        const SECOND: u64 = 1_000_000_000;
        let interval = SECOND / u64::from(rate.max(1));
        let (interval, room, wanted) = (W64::new(interval), W64::new(SECOND - interval), W64::new(wanted.word()));
        Self { interval, room, wanted, ..Self::default() }
    }

    /// Whether a packet may be told; it is counted. Several processors may ask at once: then a few more may.
    #[inline(always)]
    pub fn admits(&self, now: u64) -> bool {
        self.matched.add(1);
        let due = self.due.load();
        let due = if due < now { now } else { due };
        let admitted = due - now <= self.room.load();
        if admitted {
            self.due.store(due.wrapping_add(self.interval.load()));
        } else {
            self.missed.add(1);
        }
        admitted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_are_numbers_and_back() {
        let reasons = Reason::ALL.iter().map(|reason| Outcome::Exception(*reason));
        let others = [Outcome::NotAPort, Outcome::Forward(0), Outcome::Forward(1023)];
        for outcome in reasons.chain(others) {
            assert_eq!(Outcome::from_word(outcome.word()), Some(outcome));
        }
        assert_eq!(Outcome::from_word(EXCEPTION | 255), None);
        assert_eq!(Outcome::from_word(4 << 16), None);
    }

    #[test]
    fn a_trace_takes_what_it_is_for() {
        let no_route = Outcome::Exception(Reason::NoRoute);
        let outcomes = [Outcome::NotAPort, Outcome::Forward(Reason::NoRoute as u32), no_route];
        let taken = |wanted: Wanted| outcomes.map(|outcome| Wanted::takes(wanted.word(), outcome.word()));
        assert_eq!(taken(Wanted::Everything), [true; 3]);
        assert_eq!(taken(Wanted::Exceptions), [false, false, true]);
        assert_eq!(taken(Wanted::For(Reason::NoRoute)), [false, false, true]);
        assert_eq!(taken(Wanted::For(Reason::TtlExpired)), [false; 3]);
        let first = Outcome::Exception(Reason::PortNotReady);
        assert!(Wanted::takes(Wanted::For(Reason::PortNotReady).word(), first.word()));
    }

    #[test]
    fn a_gate_admits_so_many_at_once_and_then_one_at_a_time() {
        let gate = Gate { interval: W64::new(100), room: W64::new(200), ..Gate::default() };
        let admitted = |now| (0..5).filter(|_| gate.admits(now)).count();
        assert_eq!([1000, 1050, 1100, 1300, 9000].map(admitted), [3, 0, 1, 2, 3]);
        assert_eq!((gate.matched.load(), gate.missed.load()), (25, 16));
    }
}
