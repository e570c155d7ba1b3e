//! Words that several parties read and one writes. On the host they are relaxed atomics; the BPF target reads and
//! writes them as single volatile accesses, which is what its plain loads and stores are. This file is the only place
//! where the two differ.

macro_rules! word {
    ($name:ident, $int:ty, $atomic:ty) => {
        /// One shared word; loads and stores are single accesses and relaxed. Order comes from fences at publication.
        #[repr(transparent)]
        #[derive(Default)]
        pub struct $name(imp::Cell<$int, $atomic>);

        impl $name {
            /// A word that holds `value`.
            pub const fn new(value: $int) -> Self {
                Self(imp::Cell::<$int, $atomic>::new(value))
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
        }
    };
}

word!(W32, u32, core::sync::atomic::AtomicU32);
word!(W64, u64, core::sync::atomic::AtomicU64);

#[cfg(not(target_arch = "bpf"))]
mod imp {
    use core::marker::PhantomData;
    use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

    #[repr(transparent)]
    #[derive(Default)]
    pub struct Cell<I, A>(A, PhantomData<I>);

    impl Cell<u32, AtomicU32> {
        pub const fn new(value: u32) -> Self {
            Self(AtomicU32::new(value), PhantomData)
        }
        #[inline(always)]
        pub fn load(&self) -> u32 {
            self.0.load(Relaxed)
        }
        #[inline(always)]
        pub fn store(&self, value: u32) {
            self.0.store(value, Relaxed)
        }
    }

    impl Cell<u64, AtomicU64> {
        pub const fn new(value: u64) -> Self {
            Self(AtomicU64::new(value), PhantomData)
        }
        #[inline(always)]
        pub fn load(&self) -> u64 {
            self.0.load(Relaxed)
        }
        #[inline(always)]
        pub fn store(&self, value: u64) {
            self.0.store(value, Relaxed)
        }
    }
}

#[cfg(target_arch = "bpf")]
mod imp {
    use core::cell::UnsafeCell;
    use core::marker::PhantomData;

    #[repr(transparent)]
    #[derive(Default)]
    pub struct Cell<I, A>(UnsafeCell<I>, PhantomData<A>);

    impl<I: Copy, A> Cell<I, A> {
        pub const fn new(value: I) -> Self {
            Self(UnsafeCell::new(value), PhantomData)
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

    // SAFETY: a word is only ever accessed as a whole by volatile loads and stores.
    unsafe impl<I, A> Sync for Cell<I, A> {}
}
