//! Which slots of the tables are free. Slots given back while readers may still look at them wait in limbo until a
//! grace period has passed.

use crate::record::ENTRIES_PER_PAGE;

/// Free single slots of a table.
#[derive(Debug)]
pub struct Slots {
    first: u32,
    next: u32,
    free: Vec<u32>,
}

impl Slots {
    /// All slots from `first` on are free.
    pub fn new(first: u32) -> Self {
        Self { first, next: first, free: Vec::new() }
    }

    /// Exactly the slots in `used` (ascending, none below `first`) are taken.
    pub fn with_used(first: u32, used: impl IntoIterator<Item = u32>) -> Self {
        let mut slots = Self::new(first);
        for index in used {
            slots.free.extend(slots.next..index);
            slots.next = index + 1;
        }
        slots
    }

    /// Takes a slot below `capacity`.
    pub fn take(&mut self, capacity: u32) -> Option<u32> {
        if let Some(index) = self.free.pop() {
            return Some(index);
        }
        let index = (self.next < capacity).then_some(self.next)?;
        self.next += 1;
        Some(index)
    }

    /// Gives a slot back.
    pub fn give(&mut self, index: u32) {
        debug_assert!((self.first..self.next).contains(&index));
        self.free.push(index);
    }

    /// Number of slots taken.
    pub fn used(&self) -> usize {
        (self.next - self.first) as usize - self.free.len()
    }
}

/// Runs of entries are handed out in units of this many words.
pub const RUN_UNIT: u32 = 8;
/// Units of the longest run: a node stores at most 256 words.
const MAX_UNITS: usize = 256 / RUN_UNIT as usize;

/// Units that a run of `words` takes.
pub fn run_units(words: u32) -> u32 {
    words.div_ceil(RUN_UNIT)
}

/// Free runs of entries.
#[derive(Debug)]
pub struct Runs {
    /// First units of free runs, by their length in units
    free: [Vec<u32>; MAX_UNITS + 1],
    /// Everything from this unit on is free
    next: u32,
    used: usize,
    /// Something was given back since the free runs were last merged
    mergeable: bool,
}

impl Default for Runs {
    fn default() -> Self {
        Self { free: [const { Vec::new() }; MAX_UNITS + 1], next: 0, used: 0, mergeable: false }
    }
}

impl Runs {
    /// Exactly the given runs (first word, number of words) are taken; None if two overlap or one is not as `take`
    /// would have given it.
    pub fn with_used(mut used: Vec<(u32, u32)>) -> Option<Self> {
        used.sort_unstable();
        let mut runs = Self::default();
        for (base, words) in used {
            let (start, units) = (base / RUN_UNIT, run_units(words));
            if base % RUN_UNIT != 0 || start < runs.next || units == 0 || units as usize > MAX_UNITS {
                return None;
            }
            runs.add_free(runs.next, start);
            runs.next = start + units;
            runs.used += units as usize;
        }
        Some(runs)
    }

    /// Takes a run for `words` words in a table of `pages` pages; returns its first word.
    pub fn take(&mut self, words: u32, pages: usize) -> Option<u32> {
        let units = run_units(words) as usize;
        let start = self.find(units, pages).or_else(|| {
            self.merge();
            self.find(units, pages)
        })?;
        self.used += units;
        Some(start * RUN_UNIT)
    }

    fn find(&mut self, units: usize, pages: usize) -> Option<u32> {
        if let Some(start) = self.free[units].pop() {
            return Some(start);
        }
        let end = (pages * ENTRIES_PER_PAGE / RUN_UNIT as usize) as u64;
        if u64::from(self.next) + units as u64 <= end {
            let start = self.next;
            self.next += units as u32;
            return Some(start);
        }
        let larger = (units + 1..=MAX_UNITS).find(|&n| !self.free[n].is_empty())?;
        let start = self.free[larger].pop()?;
        self.free[larger - units].push(start + units as u32);
        Some(start)
    }

    /// Gives a run back.
    pub fn give(&mut self, base: u32, words: u32) {
        let units = run_units(words) as usize;
        self.free[units].push(base / RUN_UNIT);
        self.used -= units;
        self.mergeable = true;
    }

    /// Joins neighbouring free runs.
    fn merge(&mut self) {
        if !core::mem::take(&mut self.mergeable) {
            return;
        }
        let mut all: Vec<(u32, u32)> = Vec::new();
        for (units, starts) in self.free.iter_mut().enumerate() {
            all.extend(starts.drain(..).map(|start| (start, start + units as u32)));
        }
        all.sort_unstable();
        let mut area: Option<(u32, u32)> = None;
        for (start, end) in all {
            area = match area {
                Some((first, last)) if last == start => Some((first, end)),
                Some((first, last)) => {
                    self.add_free(first, last);
                    Some((start, end))
                }
                None => Some((start, end)),
            };
        }
        match area {
            Some((first, last)) if last == self.next => self.next = first,
            Some((first, last)) => self.add_free(first, last),
            None => {}
        }
    }

    /// Files an area of free units as runs.
    fn add_free(&mut self, mut start: u32, end: u32) {
        while start < end {
            let units = (end - start).min(MAX_UNITS as u32);
            self.free[units as usize].push(start);
            start += units;
        }
    }

    /// Words taken, rounded up to whole units.
    pub fn used_words(&self) -> usize {
        self.used * RUN_UNIT as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn slots_are_taken_once_and_come_back() {
        let mut slots = Slots::new(1);
        assert_eq!([slots.take(3), slots.take(3), slots.take(3)], [Some(1), Some(2), None]);
        slots.give(1);
        assert_eq!((slots.used(), slots.take(3), slots.take(3)), (1, Some(1), None));
        let mut slots = Slots::with_used(1, [2, 5]);
        assert_eq!(slots.used(), 2);
        let mut taken: Vec<_> = std::iter::from_fn(|| slots.take(7)).collect();
        taken.sort_unstable();
        assert_eq!(taken, [1, 3, 4, 6]);
    }

    proptest! {
        /// Runs handed out never overlap, never leave the table, and after everything is given back the table can be
        /// filled to the brim.
        #[test]
        fn runs_never_overlap(steps in prop::collection::vec((any::<bool>(), 1u32..=256, any::<prop::sample::Index>()), 1..200)) {
            let mut runs = Runs::default();
            let mut taken: Vec<(u32, u32)> = Vec::new();
            for (take, words, which) in steps {
                if take {
                    if let Some(base) = runs.take(words, 2) {
                        let end = base + run_units(words) * RUN_UNIT;
                        prop_assert!(end as usize <= 2 * ENTRIES_PER_PAGE);
                        for &(other, length) in &taken {
                            prop_assert!(end <= other || other + run_units(length) * RUN_UNIT <= base);
                        }
                        taken.push((base, words));
                    }
                } else if !taken.is_empty() {
                    let (base, words) = taken.swap_remove(which.index(taken.len()));
                    runs.give(base, words);
                }
                let adopted = Runs::with_used(taken.clone()).expect("runs as handed out");
                prop_assert_eq!(adopted.used_words(), runs.used_words());
            }
            for (base, words) in taken.drain(..) {
                runs.give(base, words);
            }
            prop_assert_eq!(runs.used_words(), 0);
            for _ in 0..2 * ENTRIES_PER_PAGE / RUN_UNIT as usize {
                prop_assert!(runs.take(RUN_UNIT, 2).is_some());
            }
            prop_assert!(runs.take(1, 2).is_none());
        }
    }
}
