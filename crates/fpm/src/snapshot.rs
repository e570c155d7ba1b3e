//! Mark and sweep. Every object carries the generation of its class in which it was last mentioned; the end of a
//! snapshot sweeps those of older generations.

use std::collections::{HashMap, HashSet};
use towpath_fpc::Snapshot;

/// A value and the generation that last mentioned it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Marked<T> {
    /// The value
    pub value: T,
    pub(crate) generation: u8,
}

/// Generations of all classes, and which classes were ever described whole.
#[derive(Default, Debug)]
pub(crate) struct Generations {
    current: HashMap<Snapshot, u8>,
    open: HashSet<Snapshot>,
    awaited: HashSet<Snapshot>,
}

impl Generations {
    /// Nothing is complete until each of `awaited` was described whole once.
    pub fn awaiting(awaited: impl IntoIterator<Item = Snapshot>) -> Self {
        Self { awaited: awaited.into_iter().collect(), ..Self::default() }
    }

    /// The generation of objects mentioned now.
    pub fn current(&self, class: Snapshot) -> u8 {
        self.current.get(&class).copied().unwrap_or(0)
    }

    pub fn begin(&mut self, class: Snapshot) {
        let generation = self.current.entry(class).or_default();
        *generation = generation.wrapping_add(1);
        self.open.insert(class);
    }

    /// Ends a snapshot; returns the generation to keep, or None if none was begun.
    pub fn end(&mut self, class: Snapshot) -> Option<u8> {
        self.awaited.remove(&class);
        self.open.remove(&class).then(|| self.current(class))
    }

    /// Whether a snapshot has begun and not ended.
    pub fn is_open(&self, class: Snapshot) -> bool {
        self.open.contains(&class)
    }

    pub fn complete(&self) -> bool {
        self.awaited.is_empty()
    }

    /// Classes still to be described.
    pub fn awaited(&self) -> impl Iterator<Item = Snapshot> {
        self.awaited.iter().copied()
    }
}
