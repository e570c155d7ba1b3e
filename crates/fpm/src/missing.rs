//! What found no room in the tables. Its packets are exceptions meanwhile; `Fpm::retry` tries again.

use crate::state::Changes;
use crate::via::ViaId;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use towpath_fpc::{NeighbourKey, Prefix};
use towpath_tables::backing::GrowError;
use towpath_tables::record::TableId;

/// How many of each kind of object wait for room.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Waiting {
    /// Ports without a slot, or without a table for their VLAN sub-interfaces
    pub ports: usize,
    /// Answers of routes, one or several next hops each
    pub vias: usize,
    /// Neighbours without a next hop of their own
    pub neighbours: usize,
    /// Prefixes that are exceptions, but for want of room not for their own reason
    pub prefixes: usize,
}

impl Waiting {
    /// All together.
    pub fn total(&self) -> usize {
        self.ports + self.vias + self.neighbours + self.prefixes
    }
}

#[derive(Default)]
pub(crate) struct Missing {
    pub ports: BTreeSet<u32>,
    pub vias: BTreeSet<ViaId>,
    pub neighbours: BTreeSet<NeighbourKey>,
    pub prefixes: HashSet<Prefix>,
    /// What the tables said that refused one of these
    refused: BTreeMap<TableId, GrowError>,
    /// Tables that had no room for routes at the last publication, which every publication tries again by itself
    routes: Vec<GrowError>,
    /// How many of each kind were last tried again, if all of them found room; 0 if not
    found: usize,
    /// How much waited beside what is being tried again
    others: Option<usize>,
}

/// Most of each kind that are tried again at once.
const MOST: usize = 512;
/// How much more is tried if all that was tried found room.
const FACTOR: usize = 8;

impl Missing {
    /// Notes why something is missing.
    pub fn refuse(&mut self, error: GrowError) {
        tracing::debug!(%error, "no room");
        self.refused.insert(error.table, error);
    }

    pub fn waiting(&self) -> Waiting {
        Waiting {
            ports: self.ports.len(),
            vias: self.vias.len(),
            neighbours: self.neighbours.len(),
            prefixes: self.prefixes.len(),
        }
    }

    /// True if nothing waits for room.
    pub fn is_empty(&self) -> bool {
        self.waiting().total() == 0 && self.routes.is_empty()
    }

    /// Tables that are full, each once.
    pub fn full(&self) -> impl Iterator<Item = &GrowError> {
        let refused = self.refused.values().filter(|_| self.waiting().total() > 0);
        refused.chain(self.routes.iter().filter(|error| !self.refused.contains_key(&error.table)))
    }

    /// Takes some of each kind out, as changes to be worked in again.
    pub fn take(&mut self) -> Changes {
        fn first<T: Ord>(set: &mut BTreeSet<T>, most: usize) -> impl Iterator<Item = T> {
            std::iter::from_fn(|| set.pop_first()).take(most)
        }
        self.found = (self.found * FACTOR).clamp(1, MOST);
        let most = self.found;
        let prefixes: Vec<_> = self.prefixes.iter().copied().take(most).collect();
        for prefix in &prefixes {
            self.prefixes.remove(prefix);
        }
        let changes = Changes {
            ports: first(&mut self.ports, most).collect(),
            vias: first(&mut self.vias, most).collect(),
            neighbours: first(&mut self.neighbours, most).collect(),
            prefixes,
            ..Changes::default()
        };
        let others = self.waiting().total();
        if others == 0 {
            self.refused.clear();
        }
        self.others = Some(others);
        changes
    }

    /// A publication is complete, but for the routes that these tables had no room for.
    pub fn settle(&mut self, routes: &[GrowError]) {
        self.routes = routes.to_vec();
        if self.others.take().is_some_and(|others| self.waiting().total() > others) {
            self.found = 0;
        }
    }

    /// True if all that was last tried again found room, but more waits.
    pub fn finds_room(&self) -> bool {
        self.found > 0 && self.waiting().total() > 0
    }
}
