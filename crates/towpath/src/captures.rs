//! The filters of captures: from what FPM would have filtered to what the engine's program filters, and back to FPM, which
//! then lets everything else go fast.
//!
//! A policy touches everything in its scope until the program that runs its filter is in every link, and what arrived before
//! has been worked off. So nothing that a capture is to see passes it by in between.

use crate::daemon::Daemon;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use towpath_filter::{Capture, Filter, TooLong, translate};
use towpath_fpc::{Policy, Scope};

/// How long captures stay as they are before a program is loaded for them, since that takes its time and tcpdump changes
/// its filter twice when it starts; and how long what arrived before, and may lie in a socket's ring, has afterwards.
const SETTLE: Duration = Duration::from_millis(100);

/// What is to be done next.
#[derive(Default)]
enum Step {
    #[default]
    Nothing,
    /// Load the program, from this time on
    Load(Instant),
    /// Have these policies touch only what their filters match, from this time on
    Narrow(BTreeSet<Policy>, Instant),
}

/// Where the filters are.
#[derive(Default)]
pub struct Captures {
    /// Policies with filters that could be run
    wanted: BTreeSet<Policy>,
    /// Of those, what FPM takes to be filtered
    narrow: BTreeSet<Policy>,
    /// What the program filters, and workers for what they take from wires
    loaded: Vec<Capture>,
    /// Why some see everything by way of Linux that have a filter which could be run
    refused: Option<String>,
    next: Step,
}

impl Captures {
    /// When there is something to do; None if there is nothing.
    pub fn due(&self) -> Option<Instant> {
        match self.next {
            Step::Nothing => None,
            Step::Load(due) | Step::Narrow(_, due) => Some(due),
        }
    }

    /// What is filtered.
    pub fn loaded(&self) -> &[Capture] {
        &self.loaded
    }

    /// What people are to know.
    pub fn notice(&self) -> Option<String> {
        let refused = self.refused.as_ref()?;
        Some(format!("captures see everything by way of Linux, whatever their filter: {refused}"))
    }
}

impl Daemon {
    /// Does what is due for captures.
    pub fn follow_captures(&mut self) {
        let wanted = self.fpm.filters();
        if wanted != self.captures.wanted {
            let narrow = self.captures.narrow.intersection(&wanted).cloned().collect();
            self.captures.wanted = wanted;
            self.narrow(narrow);
            self.captures.next = Step::Load(Instant::now() + SETTLE);
        }
        if self.captures.due().is_some_and(|due| due <= Instant::now()) {
            match std::mem::take(&mut self.captures.next) {
                Step::Load(_) => self.load_captures(),
                Step::Narrow(policies, _) => self.narrow(policies),
                Step::Nothing => {}
            }
        }
    }

    fn load_captures(&mut self) {
        let (captures, policies) = choose(&self.captures.wanted);
        self.captures.refused = (policies != self.captures.wanted).then(|| TooLong.to_string());
        if captures != self.captures.loaded {
            if let Err(error) = self.engine.set_captures(&captures) {
                tracing::warn!("captures see everything by way of Linux: {error}");
                self.captures.refused = Some(error.to_string());
                return;
            }
            self.captures.loaded = captures;
            self.look_out();
        }
        self.captures.next = Step::Narrow(policies, Instant::now() + SETTLE);
    }

    fn narrow(&mut self, policies: BTreeSet<Policy>) {
        if policies != self.captures.narrow {
            self.fpm.set_filtered(policies.clone());
            self.captures.narrow = policies;
            self.sync();
        }
    }
}

/// What the program is to filter, as much as it can, and the policies that this is enough for. A filter is run on frames
/// that come in by any port where it is to see those that leave by one.
fn choose(wanted: &BTreeSet<Policy>) -> (Vec<Capture>, BTreeSet<Policy>) {
    let mut by_filter: BTreeMap<&Filter, Vec<&Policy>> = BTreeMap::new();
    for policy in wanted {
        if let Some(filter) = &policy.filter {
            by_filter.entry(filter).or_default().push(policy);
        }
    }
    let (mut captures, mut enough) = (Vec::new(), BTreeSet::new());
    for (filter, policies) in by_filter {
        let capture = |only| Capture { filter: filter.clone(), only };
        let leaves = policies.iter().any(|policy| matches!(policy.scope, Scope::Egress(..)));
        let own: BTreeSet<Capture> =
            policies.iter().map(|policy| capture(entered(policy).filter(|_| !leaves))).collect();
        let before = captures.len();
        captures.extend(own);
        if translate(&captures).is_ok() {
            enough.extend(policies.into_iter().cloned());
        } else {
            captures.truncate(before);
        }
    }
    (captures, enough)
}

/// The interface that a policy's packets enter by, if it is one.
fn entered(policy: &Policy) -> Option<u32> {
    match policy.scope {
        Scope::Ingress(ifindex, _) => Some(ifindex),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use towpath_filter::{Layer, MAX_FILTERS, instruction};
    use towpath_fpc::PolicySource;
    use towpath_tables::Reason;

    fn filter(number: u32) -> Filter {
        Filter::new(Layer::Link, vec![instruction(0x06, 0, 0, number)]).unwrap()
    }

    fn policy(scope: Scope, number: u32) -> Policy {
        let (source, reason) = (PolicySource::Capture, Reason::PolicyCapture);
        Policy { filter: Some(filter(number)), ..Policy::new(source, scope, reason, "the test") }
    }

    fn enters(ifindex: u32, number: u32) -> Policy {
        policy(Scope::Ingress(ifindex, None), number)
    }

    fn leaves(ifindex: u32, number: u32) -> Policy {
        policy(Scope::Egress(ifindex, None), number)
    }

    #[test]
    fn a_filter_for_what_leaves_is_run_everywhere_and_once() {
        let wanted = BTreeSet::from([enters(1, 7), leaves(1, 7), enters(2, 7), leaves(2, 7)]);
        assert_eq!(choose(&wanted), (vec![Capture { filter: filter(7), only: None }], wanted));
    }

    #[test]
    fn a_filter_for_what_enters_is_run_there() {
        let wanted = BTreeSet::from([enters(1, 7), enters(2, 7)]);
        let captures = [1, 2].map(|ifindex| Capture { filter: filter(7), only: Some(ifindex) });
        assert_eq!(choose(&wanted), (captures.to_vec(), wanted));
    }

    #[test]
    fn what_does_not_fit_stays_whole() {
        let wanted: BTreeSet<_> = (0..=MAX_FILTERS as u32).map(|number| leaves(1, number)).collect();
        let (captures, enough) = choose(&wanted);
        assert_eq!((captures.len(), enough.len()), (MAX_FILTERS, MAX_FILTERS));
        assert!(enough.is_subset(&wanted));
        let single = BTreeSet::from_iter((0..=MAX_FILTERS as u32).map(|ifindex| enters(ifindex, 7)));
        assert_eq!(choose(&single), (vec![], BTreeSet::new()), "a port more than filters can be run");
    }
}
