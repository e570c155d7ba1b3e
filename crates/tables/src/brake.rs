//! The words by which all of a family is Linux's. The writer sets them to what it knows to be right. Whoever holds the
//! brake may send a family to Linux ahead of a writer that is busy, and never takes one back: the writer lets go once it
//! has caught up.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::policy::{Obstacle, POLICY_FLOWS};
use crate::reason::Reason;
use crate::record::{Config, Family};

/// A brake on one region, shared by its writer, who takes it from the backing, and others. Every change of the region's
/// policies goes through it, so that neither undoes what the other wants.
#[derive(Clone, Default, Debug)]
pub struct Brake(Arc<Mutex<[Wanted; 2]>>);

/// What a family's word should say: the stricter of two.
#[derive(Clone, Copy, Default, Debug)]
struct Wanted {
    /// By the writer; None while it has said nothing, and the word is as another writer left it
    writer: Option<u32>,
    /// By whoever pulled the brake; 0 if nobody did
    pulled: u32,
}

impl Brake {
    /// Makes every packet of a family an exception for this reason, unless the family is Linux's already; until
    /// `release`.
    pub fn pull(&self, config: &Config, family: Family, reason: Reason) {
        self.change(config, family, |wanted| wanted.pulled = Obstacle::word(Some(Obstacle::new(reason))));
    }

    /// Only what the writer wants holds from now on.
    pub fn release(&self, config: &Config) {
        for family in Family::ALL {
            self.change(config, family, |wanted| wanted.pulled = 0);
        }
    }

    /// What the writer wants.
    pub(crate) fn set(&self, config: &Config, family: Family, obstacle: Option<Obstacle>) {
        self.change(config, family, |wanted| wanted.writer = Some(Obstacle::word(obstacle)));
    }

    fn change(&self, config: &Config, family: Family, change: impl FnOnce(&mut Wanted)) {
        let word = &config.policy[family as usize];
        let mut all = self.lock();
        let wanted = &mut all[family as usize];
        change(wanted);
        let writer = *wanted.writer.get_or_insert_with(|| word.load());
        let passes = writer == 0 || writer & POLICY_FLOWS != 0;
        word.store(if passes && wanted.pulled != 0 { wanted.pulled } else { writer });
    }

    fn lock(&self) -> MutexGuard<'_, [Wanted; 2]> {
        // Nothing panics under the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::{Backing, HeapBacking, initial_elements};
    use crate::grace::NoReaders;
    use crate::writer::TableWriter;

    const NETFILTER: u32 = 1 + Reason::PolicyNetfilter as u32;
    const TC: u32 = 1 + Reason::PolicyTc as u32;

    fn words(config: &Config) -> [u32; 2] {
        [0, 1].map(|family| config.policy[family].load())
    }

    #[test]
    fn neither_the_writer_nor_the_brake_undoes_what_the_other_wants() {
        let heap = HeapBacking::new(initial_elements(1));
        let brake = heap.brake();
        let mut writer = TableWriter::create(heap, NoReaders).unwrap();
        brake.pull(writer.view().config(), Family::V4, Reason::PolicyTc);
        assert_eq!(words(writer.view().config()), [TC, 0]);
        writer.set_policy(Family::V4, None);
        assert_eq!(words(writer.view().config()), [TC, 0], "the writer does not know yet");
        writer.set_policy(Family::V6, Some(Obstacle::new(Reason::PolicyNetfilter)));
        brake.pull(writer.view().config(), Family::V6, Reason::PolicyTc);
        assert_eq!(words(writer.view().config()), [TC, NETFILTER]);
        writer.set_policy(Family::V6, None);
        assert_eq!(words(writer.view().config()), [TC, TC]);
        writer.set_policy(Family::V4, Some(Obstacle::new(Reason::PolicyNetfilter)));
        brake.release(writer.view().config());
        assert_eq!(words(writer.view().config()), [NETFILTER, 0]);
    }

    #[test]
    fn the_brake_stops_connections_that_the_writer_lets_pass() {
        let heap = HeapBacking::new(initial_elements(1));
        let brake = heap.brake();
        let mut writer = TableWriter::create(heap, NoReaders).unwrap();
        let flows = Obstacle { reason: Reason::PolicyNetfilter, flows: true };
        writer.set_policy(Family::V4, Some(flows));
        assert_eq!(words(writer.view().config()), [NETFILTER | POLICY_FLOWS, 0]);
        brake.pull(writer.view().config(), Family::V4, Reason::PolicyTc);
        assert_eq!(words(writer.view().config()), [TC, 0]);
        brake.release(writer.view().config());
        assert_eq!(words(writer.view().config()), [NETFILTER | POLICY_FLOWS, 0]);
    }

    #[test]
    fn what_another_writer_left_stays_until_the_new_one_says_otherwise() {
        let heap = HeapBacking::new(initial_elements(1));
        heap.view().config().policy[0].store(NETFILTER);
        let brake = heap.brake();
        for family in Family::ALL {
            brake.pull(heap.view().config(), family, Reason::PolicyTc);
        }
        assert_eq!(words(heap.view().config()), [NETFILTER, TC]);
        brake.release(heap.view().config());
        assert_eq!(words(heap.view().config()), [NETFILTER, 0]);
    }
}
