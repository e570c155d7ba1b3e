//! The orderings that publication and sequence counts depend on, over a small trait of atomic words so that the same
//! code runs on shared memory and under loom.

use crate::word::{W32, W64};

/// A word of type `T` with relaxed single accesses, and the fences that order them.
pub trait Shared<T> {
    /// Reads the word once, relaxed.
    fn load(&self) -> T;
    /// Writes the word at once, relaxed.
    fn store(&self, value: T);
    /// Earlier relaxed loads stay before later accesses.
    fn acquire_fence();
    /// Earlier accesses stay before later relaxed stores.
    fn release_fence();
    /// Earlier stores stay before later loads. Not for the BPF target, which never writes what others wait for.
    #[cfg(not(target_arch = "bpf"))]
    fn full_fence();
    /// Lets others run while waiting for a word to change.
    #[cfg(feature = "std")]
    fn pause();
}

macro_rules! shared {
    ($word:ty, $int:ty) => {
        impl Shared<$int> for $word {
            #[inline(always)]
            fn load(&self) -> $int {
                <$word>::load(self)
            }
            #[inline(always)]
            fn store(&self, value: $int) {
                <$word>::store(self, value)
            }
            #[inline(always)]
            fn acquire_fence() {
                // BPF: words are volatile, so the compiler keeps their order; the processor keeps that of loads on
                // x86, and of dependent loads everywhere.
                #[cfg(not(target_arch = "bpf"))]
                core::sync::atomic::fence(core::sync::atomic::Ordering::Acquire)
            }
            #[inline(always)]
            fn release_fence() {
                #[cfg(not(target_arch = "bpf"))]
                core::sync::atomic::fence(core::sync::atomic::Ordering::Release)
            }
            #[cfg(not(target_arch = "bpf"))]
            fn full_fence() {
                core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst)
            }
            #[cfg(feature = "std")]
            fn pause() {
                std::thread::yield_now()
            }
        }
    };
}
shared!(W32, u32);
shared!(W64, u64);

/// Publishes `value`: whatever was written before is seen by a reader that got it with `load`.
#[inline(always)]
pub fn publish<T, W: Shared<T>>(word: &W, value: T) {
    // Pairs with the fence in `load`; without it a reader could meet a node before its contents.
    W::release_fence();
    word.store(value);
}

/// Reads a word written by `publish`; what it leads to may be read afterwards.
#[inline(always)]
pub fn load<T, W: Shared<T>>(word: &W) -> T {
    let value = word.load();
    // Pairs with the fence in `publish`.
    W::acquire_fence();
    value
}

/// Changes a record in place: `sequence` is odd while `payload` stores the record's words.
#[inline(always)]
pub fn change<W: Shared<u32>>(sequence: &W, payload: impl FnOnce()) {
    let even = sequence.load() & !1;
    sequence.store(even.wrapping_add(1));
    // Pairs with the fence in `unchanged`: a reader that got a new word sees the odd or a later count.
    W::release_fence();
    payload();
    // Pairs with the fence in `begin`: a reader that got the new count sees all new words.
    publish(sequence, even.wrapping_add(2));
}

/// What `payload` read from a record's words, or None if the record was being changed meanwhile.
#[inline(always)]
pub fn consistent<T, W: Shared<u32>>(sequence: &W, payload: impl FnOnce() -> T) -> Option<T> {
    let before = begin(sequence)?;
    let value = payload();
    unchanged(sequence, before).then_some(value)
}

/// Begins to read a record's words: its count, or None if the record is being changed.
#[inline(always)]
pub fn begin<W: Shared<u32>>(sequence: &W) -> Option<u32> {
    // Pairs with the publication in `change`.
    let before = load(sequence);
    (before & 1 == 0).then_some(before)
}

/// Whether all words read since `begin` belong together.
#[inline(always)]
pub fn unchanged<W: Shared<u32>>(sequence: &W, before: u32) -> bool {
    // Pairs with the first fence in `change`.
    W::acquire_fence();
    sequence.load() == before
}
