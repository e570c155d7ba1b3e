//! One end of a ring that is shared with the kernel (Documentation/networking/af_xdp.rst): one side produces, the other
//! consumes, and each tells the other how far it is by a counter that only it writes.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

/// Where a ring lies.
#[derive(Clone, Copy)]
pub struct Place<T> {
    /// How far the producer is
    pub producer: NonNull<AtomicU32>,
    /// How far the consumer is
    pub consumer: NonNull<AtomicU32>,
    /// The elements
    pub elements: NonNull<T>,
    /// How many; a power of two
    pub count: u32,
}

impl<T> Place<T> {
    fn producer(&self) -> &AtomicU32 {
        // SAFETY: by the promise given to the ends' constructors.
        unsafe { self.producer.as_ref() }
    }

    fn consumer(&self) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { self.consumer.as_ref() }
    }

    fn element(&self, number: u32) -> *mut T {
        // SAFETY: below `count`, as many as there are.
        unsafe { self.elements.as_ptr().add((number & (self.count - 1)) as usize) }
    }
}

/// The end that puts elements in.
pub struct Producer<T> {
    place: Place<T>,
    /// Elements ever put in
    put: u32,
    /// Elements that the other side is known to have taken
    taken: u32,
}

// SAFETY: the memory may be used from any thread, and this end is one thread's at a time.
unsafe impl<T: Send> Send for Producer<T> {}

impl<T: Copy> Producer<T> {
    /// # Safety
    /// There is a ring at `place` for as long as this lives, nobody else produces, and whoever consumes follows the
    /// protocol.
    pub unsafe fn new(place: Place<T>) -> Self {
        let (put, taken) = (place.producer().load(Ordering::Relaxed), place.consumer().load(Ordering::Relaxed));
        Self { place, put, taken }
    }

    /// Room for elements.
    #[inline]
    pub fn room(&mut self, wanted: u32) -> u32 {
        let room = self.place.count - self.put.wrapping_sub(self.taken);
        if room >= wanted {
            return room;
        }
        // Pairs with the consumer's release of the elements: they may be overwritten only when it has read them.
        self.taken = self.place.consumer().load(Ordering::Acquire);
        self.place.count.saturating_sub(self.put.wrapping_sub(self.taken))
    }

    /// Puts an element in; false if there is no room. The other side sees it after `publish`.
    #[inline]
    pub fn put(&mut self, element: T) -> bool {
        let room = self.room(1) > 0;
        if room {
            // SAFETY: there is room, so the other side does not look at this element before it is published.
            unsafe { self.place.element(self.put).write(element) };
            self.put = self.put.wrapping_add(1);
        }
        room
    }

    /// Lets the other side see what was put in.
    #[inline]
    pub fn publish(&mut self) {
        // Pairs with the consumer's acquiring load: it must not see elements before they are there.
        self.place.producer().store(self.put, Ordering::Release);
    }

    /// As `waiting`, straight from the ring.
    pub fn unread(&self) -> u32 {
        self.put.wrapping_sub(self.place.consumer().load(Ordering::Relaxed))
    }

    /// Elements that the other side has not taken yet.
    #[inline]
    pub fn waiting(&mut self) -> u32 {
        self.place.count - self.room(self.place.count)
    }
}

/// The end that takes elements out.
pub struct Consumer<T> {
    place: Place<T>,
    /// Elements ever taken
    taken: u32,
    /// Elements that the other side is known to have put in
    put: u32,
}

// SAFETY: as for `Producer`.
unsafe impl<T: Send> Send for Consumer<T> {}

impl<T: Copy> Consumer<T> {
    /// # Safety
    /// As for `Producer::new`, with the sides exchanged.
    pub unsafe fn new(place: Place<T>) -> Self {
        let (put, taken) = (place.producer().load(Ordering::Relaxed), place.consumer().load(Ordering::Relaxed));
        Self { place, taken, put }
    }

    /// Takes the next element. Its place is free for others after `release`.
    #[inline]
    pub fn take(&mut self) -> Option<T> {
        if self.taken == self.put {
            // Pairs with the producer's `publish`.
            self.put = self.place.producer().load(Ordering::Acquire);
            if self.taken == self.put {
                return None;
            }
        }
        // SAFETY: it was published, and is not overwritten before `release`.
        let element = unsafe { self.place.element(self.taken).read() };
        self.taken = self.taken.wrapping_add(1);
        Some(element)
    }

    /// Lets the other side use the places of what was taken.
    #[inline]
    pub fn release(&mut self) {
        // Pairs with the producer's acquiring load in `room`.
        self.place.consumer().store(self.taken, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A ring in memory of the program's own; both ends are ours.
    struct Fake {
        counters: Box<[AtomicU32; 2]>,
        elements: Box<[u64]>,
    }

    impl Fake {
        /// `start`: how many elements have been through the ring already
        fn new(count: usize, start: u32) -> Self {
            let counters = Box::new([AtomicU32::new(start), AtomicU32::new(start)]);
            Self { counters, elements: vec![0; count].into() }
        }

        fn ends(&mut self) -> (Producer<u64>, Consumer<u64>) {
            let counters = NonNull::from(&mut *self.counters).cast::<AtomicU32>();
            let place = Place {
                producer: counters,
                // SAFETY: the second of two.
                consumer: unsafe { counters.add(1) },
                elements: NonNull::from(&mut *self.elements).cast(),
                count: self.elements.len() as u32,
            };
            // SAFETY: tests drop the ends before the ring, and make one of each.
            unsafe { (Producer::new(place), Consumer::new(place)) }
        }
    }

    #[test]
    fn elements_come_in_order_and_only_when_published() {
        // The counters pass their end on the way.
        let mut ring = Fake::new(4, u32::MAX - 5);
        let (mut producer, mut consumer) = ring.ends();
        for round in 0..5 {
            let first = round * 10;
            assert_eq!(producer.room(4), 4);
            assert_eq!((0..5).map(|n| producer.put(first + n)).collect::<Vec<_>>(), [true, true, true, true, false]);
            assert_eq!(consumer.take(), None, "nothing is published");
            producer.publish();
            assert_eq!(producer.waiting(), 4);
            assert_eq!((0..5).map(|_| consumer.take()).collect::<Vec<_>>(), {
                [Some(first), Some(first + 1), Some(first + 2), Some(first + 3), None]
            });
            assert!(!producer.put(99), "nothing is released");
            consumer.release();
            assert_eq!(producer.waiting(), 0);
        }
    }

    #[test]
    fn ends_in_two_threads_lose_nothing() {
        const ELEMENTS: u64 = if cfg!(miri) { 200 } else { 200_000 };
        let mut ring = Fake::new(64, 0);
        let (mut producer, mut consumer) = ring.ends();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for n in 0..ELEMENTS {
                    while !producer.put(n) {
                        producer.publish();
                        std::thread::yield_now();
                    }
                }
                producer.publish();
            });
            for n in 0..ELEMENTS {
                let got = loop {
                    match consumer.take() {
                        Some(got) => break got,
                        None => {
                            consumer.release();
                            std::thread::yield_now();
                        }
                    }
                };
                assert_eq!(got, n);
            }
        });
    }
}
