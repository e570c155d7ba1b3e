//! Which slots of the tables are free. Slots given back while readers may still look at them wait in limbo until a
//! grace period has passed.

use crate::record::NODE_LINES;

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

    /// One more than the highest that was ever taken.
    pub fn end(&self) -> u32 {
        self.next
    }

    /// Number of slots taken.
    pub fn used(&self) -> usize {
        (self.next - self.first) as usize - self.free.len()
    }
}

/// Free runs of lines, for nodes.
#[derive(Debug)]
pub struct Runs {
    /// First lines of free runs, by their length
    free: [Vec<u32>; NODE_LINES + 1],
    /// Everything from this line on is free
    next: u32,
    used: usize,
    /// Something was given back since the free runs were last merged
    mergeable: bool,
}

/// Line 0 is never used.
const FIRST_LINE: u32 = 1;

impl Default for Runs {
    fn default() -> Self {
        Self { free: [const { Vec::new() }; NODE_LINES + 1], next: FIRST_LINE, used: 0, mergeable: false }
    }
}

impl Runs {
    /// Exactly the given runs (first line, number of lines) are taken; None if two overlap or one is not as `take` would
    /// have given it.
    pub fn with_used(mut used: Vec<(u32, u32)>) -> Option<Self> {
        used.sort_unstable();
        let mut runs = Self::default();
        for (start, lines) in used {
            if start < runs.next || lines == 0 || lines as usize > NODE_LINES {
                return None;
            }
            runs.add_free(runs.next, start);
            runs.next = start + lines;
            runs.used += lines as usize;
        }
        Some(runs)
    }

    /// Takes a run of `lines` lines in a table of `capacity`; returns its first line.
    pub fn take(&mut self, lines: usize, capacity: u32) -> Option<u32> {
        let start = self.find(lines, capacity).or_else(|| {
            self.merge();
            self.find(lines, capacity)
        })?;
        self.used += lines;
        Some(start)
    }

    fn find(&mut self, lines: usize, capacity: u32) -> Option<u32> {
        if let Some(start) = self.free[lines].pop() {
            return Some(start);
        }
        if u64::from(self.next) + lines as u64 <= u64::from(capacity) {
            let start = self.next;
            self.next += lines as u32;
            return Some(start);
        }
        let larger = (lines + 1..=NODE_LINES).find(|&n| !self.free[n].is_empty())?;
        let start = self.free[larger].pop()?;
        self.free[larger - lines].push(start + lines as u32);
        Some(start)
    }

    /// Gives a run back.
    pub fn give(&mut self, start: u32, lines: u32) {
        self.free[lines as usize].push(start);
        self.used -= lines as usize;
        self.mergeable = true;
    }

    /// Joins neighbouring free runs.
    fn merge(&mut self) {
        if !core::mem::take(&mut self.mergeable) {
            return;
        }
        let mut all: Vec<(u32, u32)> = Vec::new();
        for (lines, starts) in self.free.iter_mut().enumerate() {
            all.extend(starts.drain(..).map(|start| (start, start + lines as u32)));
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

    /// Files an area of free lines as runs.
    fn add_free(&mut self, mut start: u32, end: u32) {
        while start < end {
            let lines = (end - start).min(NODE_LINES as u32);
            self.free[lines as usize].push(start);
            start += lines;
        }
    }

    /// Lines taken.
    pub fn used(&self) -> usize {
        self.used
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
        fn runs_never_overlap(steps in prop::collection::vec((any::<bool>(), 1..=NODE_LINES, any::<prop::sample::Index>()), 1..200)) {
            const CAPACITY: u32 = 128;
            let mut runs = Runs::default();
            let mut taken: Vec<(u32, u32)> = Vec::new();
            for (take, lines, which) in steps {
                if take {
                    if let Some(start) = runs.take(lines, CAPACITY) {
                        let end = start + lines as u32;
                        prop_assert!(start >= FIRST_LINE && end <= CAPACITY);
                        for &(other, length) in &taken {
                            prop_assert!(end <= other || other + length <= start);
                        }
                        taken.push((start, lines as u32));
                    }
                } else if !taken.is_empty() {
                    let (start, lines) = taken.swap_remove(which.index(taken.len()));
                    runs.give(start, lines);
                }
                let adopted = Runs::with_used(taken.clone()).expect("runs as handed out");
                prop_assert_eq!(adopted.used(), runs.used());
            }
            for (start, lines) in taken.drain(..) {
                runs.give(start, lines);
            }
            prop_assert_eq!(runs.used(), 0);
            for _ in FIRST_LINE..CAPACITY {
                prop_assert!(runs.take(1, CAPACITY).is_some());
            }
            prop_assert!(runs.take(1, CAPACITY).is_none());
        }
    }
}
