//! Policy words: why all packets of a family or of a port are exceptions, and which may pass nevertheless.

use crate::reason::Reason;

/// In a policy word: connections that Linux accepted may pass. The low byte is 1 + the reason; a word of 0 is no policy.
pub const POLICY_FLOWS: u32 = 1 << 8;

/// Why packets are exceptions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Obstacle {
    /// The reason counted
    pub reason: Reason,
    /// Packets of connections that Linux accepted may pass
    pub flows: bool,
}

impl Obstacle {
    /// What nothing passes.
    pub const fn new(reason: Reason) -> Self {
        Self { reason, flows: false }
    }

    /// A policy as it is stored.
    pub const fn word(obstacle: Option<Obstacle>) -> u32 {
        match obstacle {
            None => 0,
            Some(Obstacle { reason, flows }) => 1 + reason as u32 + if flows { POLICY_FLOWS } else { 0 },
        }
    }

    /// What a word says; None of 0 and of nonsense.
    #[inline(always)]
    pub fn of(word: u32) -> Option<Self> {
        let index = (word & !POLICY_FLOWS).checked_sub(1).and_then(|index| u8::try_from(index).ok())?;
        Some(Self { reason: Reason::from_index(index)?, flows: word & POLICY_FLOWS != 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_say_what_was_put_in() {
        for reason in Reason::ALL {
            for flows in [false, true] {
                let obstacle = Obstacle { reason: *reason, flows };
                assert_eq!(Obstacle::of(Obstacle::word(Some(obstacle))), Some(obstacle));
            }
        }
        assert_eq!([0, POLICY_FLOWS, 0x80, 0x201, u32::MAX].map(Obstacle::of), [None; 5]);
    }
}
