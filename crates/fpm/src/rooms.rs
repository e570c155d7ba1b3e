//! Roots of their own for what rules come to: one for each sequence of steps, and lists that choose among them by source.
//!
//! A port is led to a root once that is published. Until then its packets, and those that look back through it, are
//! exceptions; and so are all of the family until the roots of all ports say what the rules say.

use crate::mirror::Mirror;
use crate::rules::{self, Asking, Plan, Step, Steps};
use crate::state::{Changes, State};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use towpath_fpc::Prefix;
use towpath_tables::backing::Backing;
use towpath_tables::grace::Grace;
use towpath_tables::record::{BY_SOURCE, Family};
use towpath_tables::sources::SourceRoots;
use towpath_tables::writer::MAIN_ROOT;

/// Names no root: what is looked up there is an exception.
pub(crate) const NOWHERE: u32 = !BY_SOURCE;
/// Roots of a family for rules at most.
const ROOMS: usize = 16;
/// Routes in them at most, all together.
const ROUTES: usize = 4_000_000;

/// A root for a sequence of steps.
struct Room {
    root: u32,
    progress: Progress,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    /// Routes are being put in; the last prefix that was
    UpTo(Option<Prefix>),
    /// All routes are in, but not published
    Full,
    /// Packets may be looked up there
    Ready,
}

/// Where a port's packets are looked up.
struct Way {
    /// None if it has no room for so much
    plan: Option<Plan>,
    /// As in `Port::root`
    root: u32,
}

#[derive(Default)]
pub(crate) struct Rooms {
    rooms: BTreeMap<(Family, Steps), Room>,
    ways: BTreeMap<(u32, Family), Way>,
    /// Roots to be freed with the next publication
    leaving: Vec<u32>,
}

impl Rooms {
    /// Where packets of a family that come in by a port are looked up, if that is as the rules are now.
    pub fn way(&self, state: &State, ifindex: u32, family: Family) -> Option<u32> {
        let wanted = wanted(state, ifindex, family).filter(|_| state.rules_hold(ifindex, family))?;
        let way = self.ways.get(&(ifindex, family))?;
        (way.plan == wanted && way.root != NOWHERE).then_some(way.root)
    }

    /// The roots of a family beside the main one, and their steps.
    pub fn of(&self, family: Family) -> impl Iterator<Item = (u32, &Steps)> {
        self.rooms.iter().filter(move |((of, _), _)| *of == family).map(|((_, steps), room)| (room.root, steps))
    }

    /// All routes have been published: false if that makes no difference.
    pub fn publish(&mut self) -> bool {
        let full = self.rooms.values_mut().filter(|room| room.progress == Progress::Full);
        full.map(|room| room.progress = Progress::Ready).count() > 0
    }

    /// The root for packets that this host sends itself from no particular address; None if there is none, or the rules of
    /// the family are not repeated.
    pub fn own(&self, state: &State, family: Family) -> Option<u32> {
        if state.has_unapplied_rules(family) {
            return None;
        }
        self.root(family, &rules::plan(family, state.rules_of(family)?, Asking::OWN)?.other)
    }

    fn root(&self, family: Family, steps: &Steps) -> Option<u32> {
        if rules::is_usual(steps) {
            return Some(MAIN_ROOT[family as usize]);
        }
        let room = self.rooms.get(&(family, steps.clone()))?;
        (room.progress == Progress::Ready).then_some(room.root)
    }
}

/// The plan for a port; None while the rules are not known.
fn wanted(state: &State, ifindex: u32, family: Family) -> Option<Option<Plan>> {
    let rules = state.rules_of(family)?;
    Some(rules::plan(family, rules, Asking::of(&state.ports.get(&ifindex)?.value)))
}

impl<B: Backing, G: Grace> Mirror<B, G> {
    /// Has the roots of a writer that was here before freed: nothing is known about them.
    pub(crate) fn leave_adopted_rooms(&mut self) {
        self.rooms.leaving.extend(self.tables.roots().map(|(root, _)| root).filter(|root| !MAIN_ROOT.contains(root)));
    }

    /// Leads ports to the roots that the rules ask for, as far as those are ready, and has the others made.
    pub(crate) fn follow_rules(&mut self, state: &mut State, changes: &mut Changes) {
        if !changes.rules && changes.ports.is_empty() && !self.is_new() {
            return;
        }
        let ports: Vec<u32> = state.ports.keys().copied().filter(|ifindex| state.chain(*ifindex).is_some()).collect();
        for family in Family::ALL {
            let mut complete = true;
            for ifindex in &ports {
                complete &= self.lead(state, changes, *ifindex, family);
            }
            if let Some(rules) = state.rules_of(family).filter(|_| complete).map(|rules| rules.cloned())
                && state.set_applied(family, rules)
            {
                changes.config = true;
                // Tunnels depend on whether there are rules.
                changes.ports.extend(&ports);
            }
        }
        let gone: Vec<_> = self.rooms.ways.keys().copied().filter(|(ifindex, _)| !ports.contains(ifindex)).collect();
        gone.into_iter().for_each(|key| self.drop_way(key));
        self.leave_unused(state, &ports);
    }

    /// Leads a port to its root; false if it is not ready.
    fn lead(&mut self, state: &State, changes: &mut Changes, ifindex: u32, family: Family) -> bool {
        let Some(plan) = wanted(state, ifindex, family) else { return false };
        if self.rooms.ways.get(&(ifindex, family)).is_some_and(|way| way.plan == plan) {
            return true;
        }
        let made = plan.as_ref().map(|plan| self.make(state, family, plan));
        let root = match (&plan, made) {
            (Some(_), Some(Made::Not)) => return false,
            (Some(plan), Some(Made::All)) => match self.root_of(family, plan) {
                Some(root) => root,
                None => return false,
            },
            _ => NOWHERE,
        };
        self.drop_way((ifindex, family));
        self.rooms.ways.insert((ifindex, family), Way { plan, root });
        changes.ports.insert(ifindex);
        true
    }

    /// Makes the roots of a plan that are not there yet.
    fn make(&mut self, state: &State, family: Family, plan: &Plan) -> Made {
        for steps in plan.steps().filter(|steps| !rules::is_usual(steps)) {
            if self.rooms.rooms.contains_key(&(family, steps.clone())) {
                continue;
            }
            let others = self.rooms.of(family).count();
            if others >= ROOMS || (others + 1) * state.routes.len(family) > ROUTES {
                return Made::Never;
            }
            let root = match self.tables.alloc_root(family) {
                Ok(root) => root,
                Err(error) => {
                    self.missing.refuse(error);
                    return Made::Not;
                }
            };
            self.rooms.rooms.insert((family, steps.clone()), Room { root, progress: Progress::UpTo(None) });
            self.place_hosts(root, family);
            for step in steps {
                if let Step::Refuse(prefix) = step {
                    self.update_route_in(state, root, *prefix, state.choose_by(steps, *prefix));
                }
            }
        }
        Made::All
    }

    /// What a port's `root` says for a plan whose roots are all ready.
    fn root_of(&mut self, family: Family, plan: &Plan) -> Option<u32> {
        let other = self.rooms.root(family, &plan.other)?;
        let of = |(prefix, steps): &(Prefix, Steps)| {
            Some((prefix.address(), prefix.prefix_len(), self.rooms.root(family, steps)?))
        };
        let prefixes = plan.sources.iter().map(of).collect::<Option<Vec<_>>>()?;
        if prefixes.iter().all(|(_, _, root)| *root == other) {
            return Some(other);
        }
        let list = self.tables.alloc_sources(&SourceRoots { prefixes, other });
        list.map(|list| list | BY_SOURCE).map_err(|error| self.missing.refuse(error)).ok()
    }

    fn drop_way(&mut self, key: (u32, Family)) {
        if let Some(way) = self.rooms.ways.remove(&key)
            && way.root & BY_SOURCE != 0
        {
            self.tables.free_sources(way.root & !BY_SOURCE);
        }
    }

    /// Gives up the roots that no port is led to, or is to be.
    fn leave_unused(&mut self, state: &State, ports: &[u32]) {
        let mut used = BTreeSet::new();
        for (ifindex, family) in ports.iter().flat_map(|ifindex| Family::ALL.map(|family| (*ifindex, family))) {
            let plans = [self.rooms.ways.get(&(ifindex, family)).and_then(|way| way.plan.clone())];
            let plans = plans.into_iter().chain([wanted(state, ifindex, family).flatten()]).flatten();
            used.extend(plans.flat_map(|plan| plan.steps().cloned().collect::<Vec<_>>()).map(|steps| (family, steps)));
        }
        let unused = self.rooms.rooms.extract_if(.., |key, _| !used.contains(key)).map(|(_, room)| room.root);
        self.rooms.leaving.extend(unused);
    }

    /// Frees what no port leads to any more.
    pub(crate) fn free_rooms(&mut self) {
        std::mem::take(&mut self.rooms.leaving).into_iter().for_each(|root| self.tables.free_root(root));
    }

    /// Puts all routes into new roots; false if it stopped before the end.
    pub(crate) fn fill_rooms(&mut self, state: &State, go_on: &mut impl FnMut() -> bool) -> bool {
        let filling = |(key, room): (&(Family, Steps), &Room)| match room.progress {
            Progress::UpTo(last) => Some((key.clone(), room.root, last)),
            _ => None,
        };
        while let Some((key, root, last)) = self.rooms.rooms.iter().find_map(filling) {
            let (family, steps) = &key;
            for prefix in state.routes.prefixes(*family, last.map_or(Bound::Unbounded, Bound::Excluded)) {
                self.update_route_in(state, root, prefix, state.choose_by(steps, prefix));
                if !go_on() {
                    self.progress(&key, Progress::UpTo(Some(prefix)));
                    return false;
                }
            }
            self.progress(&key, Progress::Full);
        }
        true
    }

    fn progress(&mut self, key: &(Family, Steps), progress: Progress) {
        if let Some(room) = self.rooms.rooms.get_mut(key) {
            room.progress = progress;
        }
    }
}

/// Whether the roots of a plan are there.
enum Made {
    /// They are, but perhaps not ready
    All,
    /// There is no room in the tables now
    Not,
    /// They would be too many
    Never,
}
