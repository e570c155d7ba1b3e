//! Grace periods: when nobody can still look at what was taken out of use.

use crate::order::Shared;

/// Waits until no reader holds anything that it found before the call.
pub trait Grace {
    /// Returns when every look-up that was under way at the call has ended.
    fn wait(&mut self);
}

/// For tables without concurrent readers.
#[derive(Clone, Copy, Default, Debug)]
pub struct NoReaders;

impl Grace for NoReaders {
    fn wait(&mut self) {}
}

/// A worker's word is odd while it reads the tables. Called by the worker before each batch.
pub fn enter<W: Shared<u32>>(word: &W) {
    word.store(word.load() | 1);
    // Pairs with the fence in `Workers::wait`: either that sees the odd word, or this worker sees everything that was
    // published before. Without it a worker could go on at a piece that is being reused.
    W::full_fence();
}

/// The worker's batch is done; it holds nothing from the tables any more.
pub fn leave<W: Shared<u32>>(word: &W) {
    // Pairs with the load in `Workers::wait`: the batch's reads stay before it.
    crate::order::publish(word, (word.load() | 1).wrapping_add(1));
}

/// The words of all workers that read the tables, for whoever waits for them.
#[derive(Clone, Default, Debug)]
pub struct Workers<I>(pub I);

impl<W: Shared<u32>, I: Clone + IntoIterator<Item: core::ops::Deref<Target = W>>> Grace for Workers<I> {
    fn wait(&mut self) {
        // Pairs with the fence in `enter`.
        W::full_fence();
        for word in self.0.clone() {
            let seen = crate::order::load(&*word);
            while seen & 1 == 1 && crate::order::load(&*word) == seen {
                W::pause();
            }
        }
    }
}
