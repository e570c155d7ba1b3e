//! What rules ask for that is no rule, and that others change: names and groups of interfaces, routes.
//!
//! What a rule said of a connection by those holds while they stand. When they change, no connection passes for a moment, and
//! Linux has to accept each anew: as with every policy that goes, what was accepted beside it counts no longer. Where they
//! change all the time, connections stay in Linux.

use super::super::Finding;
use super::ruleset::Ruleset;
use crate::watch::Moved;
use std::time::{Duration, Instant};
use towpath_tables::Reason;
use towpath_tables::record::Family;

/// For how long nothing may have changed.
const QUIET: Duration = Duration::from_millis(200);

/// What changed last, and when.
#[derive(Default)]
pub struct Aside {
    links: Option<Instant>,
    /// By family
    routes: [Option<Instant>; 2],
    uneven: [bool; 2],
}

impl Aside {
    /// Takes in what has changed; true if it stood for long enough before.
    pub fn moved(&mut self, moved: Moved, uneven: [bool; 2], now: Instant) -> bool {
        let mut new = self.uneven != uneven;
        self.uneven = uneven;
        let [v4, v6] = &mut self.routes;
        for (has, when) in [(moved.links, &mut self.links), (moved.routes[0], v4), (moved.routes[1], v6)] {
            if has {
                new |= !is_new(*when, now);
                *when = Some(now);
            }
        }
        new
    }

    /// What no connection may pass.
    pub fn findings(&self, ruleset: &Ruleset, now: Instant) -> Vec<Finding> {
        let mut findings = Vec::new();
        for family in Family::ALL {
            if is_new(self.links, now) {
                let detail = "the name or group of an interface has just changed (no connection may pass)";
                findings.push(Finding::family(family, Reason::PolicyNetfilter, detail).for_a_moment());
            }
            let number = family as usize;
            if self.uneven[number] {
                findings.extend(ruleset.uncertain(family, ", which may answer each packet differently"));
            } else if is_new(self.routes[number], now) {
                let moved = ruleset.uncertain(family, ", which have just changed");
                findings.extend(moved.into_iter().map(Finding::for_a_moment));
            }
        }
        findings
    }
}

fn is_new(when: Option<Instant>, now: Instant) -> bool {
    when.is_some_and(|when| now.saturating_duration_since(when) < QUIET)
}
