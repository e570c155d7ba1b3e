//! When connections that Linux accepted pass: while the rules stand under which it did. Rules that are new shut the gate at
//! once. It opens for connections that Linux accepts anew, when no packet is left that it let pass under the old ones, but for
//! those that wait for a neighbour: these are told from others by neighbours that are known as they were then, or later
//! (`towpath_pipeline::accept`).

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// How long packets have to leave that Linux has decided about. Those on their way through it at the moment are waited for
/// by a grace period that follows.
const SETTLE: Duration = Duration::from_millis(20);

/// Whether connections pass, and what has to happen until they do.
#[derive(Default, Debug)]
pub(crate) struct Gate {
    /// Generations of the rules in force
    rules: BTreeSet<u32>,
    /// Number of the last change
    change: u64,
    state: State,
}

/// Whether connections pass.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// No rules hand any over
    Shut,
    /// They will soon: the rules are new
    Opening,
    /// Those do that Linux has accepted
    Open,
}

#[derive(Default, PartialEq, Eq, Debug)]
enum State {
    /// Nothing is to pass
    #[default]
    Shut,
    /// Neighbours are to be told
    Behind,
    /// Until this time packets have to leave
    Settling(Instant),
    /// Somebody waits for a grace period
    Waiting,
    Open,
}

impl Gate {
    /// Takes in the rules in force, whether something has gone that had a say in what they accepted (`freed`), and whether
    /// neighbours are known as they were when these began, or later; true if connections must no longer pass, as of now.
    pub fn govern(&mut self, rules: BTreeSet<u32>, freed: bool, neighbours: bool, now: Instant) -> bool {
        let new = freed || !rules.is_subset(&self.rules) || self.state == State::Behind;
        self.rules = rules;
        self.state = match (self.rules.is_empty(), neighbours) {
            (true, _) => State::Shut,
            (false, false) => State::Behind,
            (false, true) if new => State::Settling(now + SETTLE),
            (false, true) => return false,
        };
        self.change += 1;
        true
    }

    /// When a grace period is to begin; None if none is.
    pub fn due(&self) -> Option<Instant> {
        match self.state {
            State::Settling(until) => Some(until),
            State::Shut | State::Behind | State::Waiting | State::Open => None,
        }
    }

    /// The change for which a grace period is to begin now; given once.
    pub fn settled(&mut self, now: Instant) -> Option<u64> {
        if self.due()? > now {
            return None;
        }
        self.state = State::Waiting;
        Some(self.change)
    }

    /// After a grace period that began for this change: whether connections pass from now on.
    pub fn open(&mut self, change: u64) -> bool {
        let opens = self.state == State::Waiting && change == self.change;
        if opens {
            self.state = State::Open;
        }
        opens
    }

    /// Whether connections pass, or will.
    pub fn phase(&self) -> Phase {
        match self.state {
            State::Shut => Phase::Shut,
            State::Behind | State::Settling(_) | State::Waiting => Phase::Opening,
            State::Open => Phase::Open,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(generations: &[u32]) -> BTreeSet<u32> {
        generations.iter().copied().collect()
    }

    /// Opens it for what it was told last.
    fn opened(gate: &mut Gate, begin: Instant) {
        let change = gate.settled(begin + SETTLE).expect("due");
        assert!(gate.open(change) && is_open(gate));
    }

    fn is_open(gate: &Gate) -> bool {
        gate.phase() == Phase::Open
    }

    #[test]
    fn it_opens_when_what_was_on_its_way_has_left() {
        let (mut gate, begin) = (Gate::default(), Instant::now());
        assert!(gate.govern(rules(&[1]), false, true, begin));
        assert_eq!((gate.due(), gate.settled(begin)), (Some(begin + SETTLE), None));
        let change = gate.settled(begin + SETTLE).expect("due");
        assert_eq!((gate.due(), gate.settled(begin + SETTLE)), (None, None), "waited for once");
        assert!(!is_open(&gate));
        assert!(gate.open(change) && is_open(&gate));
        assert!(!gate.open(change), "opened once");
        assert!(!gate.govern(rules(&[1]), false, true, begin) && is_open(&gate), "nothing is new");
    }

    #[test]
    fn a_change_meanwhile_starts_the_wait_anew() {
        let (mut gate, begin) = (Gate::default(), Instant::now());
        gate.govern(rules(&[1]), false, true, begin);
        let later = begin + SETTLE / 2;
        assert!(gate.govern(rules(&[2]), false, true, later));
        assert_eq!(gate.settled(begin + SETTLE), None);
        let stale = gate.settled(later + SETTLE).expect("due");
        assert!(gate.govern(rules(&[3]), false, true, later + SETTLE));
        assert!(!gate.open(stale) && !is_open(&gate), "of another change");
        opened(&mut gate, later + SETTLE);
    }

    #[test]
    fn it_stays_shut_while_neighbours_are_to_be_told() {
        let (mut gate, begin) = (Gate::default(), Instant::now());
        assert!(gate.govern(rules(&[1]), false, false, begin));
        assert_eq!((gate.due(), gate.settled(begin + SETTLE)), (None, None));
        let later = begin + SETTLE;
        assert!(gate.govern(rules(&[1]), false, true, later));
        assert_eq!(gate.settled(later), None, "packets have to leave from now on");
        opened(&mut gate, later);
        assert!(gate.govern(rules(&[1]), false, false, later) && !is_open(&gate), "they are read anew");
        assert!(gate.govern(rules(&[]), false, false, later));
        assert!(gate.govern(rules(&[1]), false, true, later));
        opened(&mut gate, later);
    }

    #[test]
    fn what_was_accepted_beside_something_that_has_gone_counts_no_longer() {
        let (mut gate, begin) = (Gate::default(), Instant::now());
        gate.govern(rules(&[1]), false, true, begin);
        opened(&mut gate, begin);
        assert!(gate.govern(rules(&[1]), true, true, begin) && !is_open(&gate));
        opened(&mut gate, begin);
        assert!(!gate.govern(rules(&[1]), false, true, begin) && is_open(&gate));
    }

    #[test]
    fn rules_that_go_shut_nothing_unless_they_were_the_last() {
        let (mut gate, begin) = (Gate::default(), Instant::now());
        gate.govern(rules(&[1, 2]), false, true, begin);
        opened(&mut gate, begin);
        assert!(!gate.govern(rules(&[2]), false, true, begin) && is_open(&gate));
        assert!(gate.govern(rules(&[1, 2]), false, true, begin), "one that comes back may not be the same");
        opened(&mut gate, begin);
        assert!(gate.govern(rules(&[]), false, true, begin) && !is_open(&gate));
        assert_eq!(gate.due(), None, "nobody is to pass");
    }
}
