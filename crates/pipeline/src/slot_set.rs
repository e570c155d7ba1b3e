//! Sets of ports.

use towpath_tables::record::PORT_SLOTS;

/// A set of port slots.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlotSet([u64; PORT_SLOTS as usize / 64]);

impl SlotSet {
    /// No slot
    pub const NONE: Self = Self([0; PORT_SLOTS as usize / 64]);
    /// Every slot
    pub const ALL: Self = Self([u64::MAX; PORT_SLOTS as usize / 64]);

    /// Adds a slot; nothing if there is no such slot.
    pub fn insert(&mut self, slot: u32) {
        if let Some(word) = self.0.get_mut(slot as usize / 64) {
            *word |= 1 << (slot % 64);
        }
    }

    /// Whether the slot is in the set
    #[inline(always)]
    pub fn contains(&self, slot: u32) -> bool {
        self.0.get(slot as usize / 64).is_some_and(|word| word >> (slot % 64) & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_was_put_in() {
        let mut set = SlotSet::NONE;
        for slot in [0, 63, 64, 255, 256, u32::MAX] {
            set.insert(slot);
        }
        let found: Vec<u32> = (0..1000).filter(|slot| set.contains(*slot)).collect();
        assert_eq!(found, [0, 63, 64, 255]);
        assert!((0..PORT_SLOTS).all(|slot| SlotSet::ALL.contains(slot)));
        assert!(!SlotSet::ALL.contains(PORT_SLOTS));
    }
}
