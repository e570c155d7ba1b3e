//! Words that several parties read and one writes. On the host they are relaxed atomics; the BPF target reads and
//! writes them as single volatile accesses, which is what its plain loads and stores are. This file is the only place
//! where the two differ.

macro_rules! word {
    ($name:ident, $int:ty) => {
        /// One shared word; loads and stores are single accesses and relaxed. Order comes from fences at publication.
        #[repr(transparent)]
        #[derive(Default)]
        pub struct $name(imp::Cell<$int>);

        impl $name {
            /// A word that holds `value`.
            pub const fn new(value: $int) -> Self {
                Self(imp::Cell::<$int>::new(value))
            }

            /// The value, read once.
            #[inline(always)]
            pub fn load(&self) -> $int {
                self.0.load()
            }

            /// Writes `value` at once.
            #[inline(always)]
            pub fn store(&self, value: $int) {
                self.0.store(value)
            }

            /// Adds to a word that others add to at the same time.
            #[inline(always)]
            pub fn add(&self, value: $int) {
                self.0.add(value)
            }

            /// Sets bits of a word of which others change other bits at the same time.
            #[inline(always)]
            pub fn set(&self, bits: $int) {
                self.0.set(bits)
            }

            /// Clears bits of a word of which others change other bits at the same time.
            #[cfg(not(target_arch = "bpf"))]
            #[inline(always)]
            pub fn clear(&self, bits: $int) {
                self.0.clear(bits)
            }
        }
    };
}

word!(W32, u32);
word!(W64, u64);

#[cfg(not(target_arch = "bpf"))]
mod imp {
    use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

    /// The atomic for an integer.
    pub trait Int {
        type Atomic: Default;
    }

    #[repr(transparent)]
    #[derive(Default)]
    pub struct Cell<I: Int>(I::Atomic);

    macro_rules! cell {
        ($int:ty, $atomic:ident) => {
            impl Int for $int {
                type Atomic = $atomic;
            }

            impl Cell<$int> {
                pub const fn new(value: $int) -> Self {
                    Self($atomic::new(value))
                }
                #[inline(always)]
                pub fn load(&self) -> $int {
                    self.0.load(Relaxed)
                }
                #[inline(always)]
                pub fn store(&self, value: $int) {
                    self.0.store(value, Relaxed)
                }
                #[inline(always)]
                pub fn add(&self, value: $int) {
                    self.0.fetch_add(value, Relaxed);
                }
                #[inline(always)]
                pub fn set(&self, bits: $int) {
                    self.0.fetch_or(bits, Relaxed);
                }
                #[inline(always)]
                pub fn clear(&self, bits: $int) {
                    self.0.fetch_and(!bits, Relaxed);
                }
            }
        };
    }
    cell!(u32, AtomicU32);
    cell!(u64, AtomicU64);
}

#[cfg(target_arch = "bpf")]
mod imp {
    use core::arch::asm;
    use core::cell::UnsafeCell;

    #[repr(transparent)]
    #[derive(Default)]
    pub struct Cell<I>(UnsafeCell<I>);

    impl<I: Copy> Cell<I> {
        pub const fn new(value: I) -> Self {
            Self(UnsafeCell::new(value))
        }
        #[inline(always)]
        pub fn load(&self) -> I {
            // SAFETY: the cell is valid and aligned; the BPF target has no threads in the language's sense, and a
            // volatile access of a word is one load instruction.
            unsafe { core::ptr::read_volatile(self.0.get()) }
        }
        #[inline(always)]
        pub fn store(&self, value: I) {
            // SAFETY: as for `load`.
            unsafe { core::ptr::write_volatile(self.0.get(), value) }
        }
    }

    // The language has no atomic additions for this target.
    macro_rules! atomic {
        ($int:ty, $add:literal, $set:literal, $class:ident) => {
            impl Cell<$int> {
                #[inline(always)]
                pub fn add(&self, value: $int) {
                    // SAFETY: the cell is valid and aligned.
                    unsafe { asm!($add, in(reg) self.0.get(), in($class) value, options(nostack)) }
                }
                #[inline(always)]
                pub fn set(&self, bits: $int) {
                    // SAFETY: as for `add`.
                    unsafe { asm!($set, in(reg) self.0.get(), in($class) bits, options(nostack)) }
                }
            }
        };
    }
    atomic!(u32, "lock *(u32 *)({0} + 0) += {1}", "lock *(u32 *)({0} + 0) |= {1}", wreg);
    atomic!(u64, "lock *(u64 *)({0} + 0) += {1}", "lock *(u64 *)({0} + 0) |= {1}", reg);

    // SAFETY: a word is only ever accessed as a whole by volatile loads and stores.
    unsafe impl<I> Sync for Cell<I> {}
}
