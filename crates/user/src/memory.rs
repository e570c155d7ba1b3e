//! Ports whose wire is memory, for tests and benchmarks: a buffer is taken for each frame that arrives and given back
//! for each that leaves, as drivers do.

use crate::driver::{BATCH, Linux, PortDriver};
use crate::pool::{Buffer, Pool};
use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The other end of a port.
pub trait Wire: Send {
    /// Puts the next frame that arrives into the buffer; false if there is none.
    fn arrive(&mut self, buffer: &mut Buffer) -> bool;
    /// Takes a frame that leaves; false if there is no room for it.
    fn leave(&mut self, frame: &[u8]) -> bool;
}

/// A port on a wire.
pub struct MemoryPort<W>(pub W);

impl<W: Wire> PortDriver for MemoryPort<W> {
    fn start(&mut self, _pool: &mut Pool) {}

    #[inline]
    fn receive(&mut self, pool: &mut Pool, frames: &mut Vec<Buffer>) {
        while frames.len() < BATCH {
            let Some(mut buffer) = pool.take() else { return };
            if !self.0.arrive(&mut buffer) {
                return pool.give(buffer);
            }
            frames.push(buffer);
        }
    }

    #[inline]
    fn transmit(&mut self, pool: &mut Pool, frames: &mut Vec<Buffer>) {
        let sent = frames.iter().take_while(|frame| self.0.leave(frame.bytes())).count();
        frames.drain(..sent).for_each(|frame| pool.give(frame));
    }

    fn readable<'d>(&'d self, _fds: &mut Vec<BorrowedFd<'d>>) -> bool {
        false
    }

    fn close(self: Box<Self>, _pool: &mut Pool) {}
}

/// Frames on their way, in order; clones are ends of the same queue.
#[derive(Clone, Debug)]
pub struct Queue {
    frames: Arc<Mutex<VecDeque<Vec<u8>>>>,
    room: usize,
}

impl Queue {
    /// An empty queue for so many frames.
    pub fn new(room: usize) -> Self {
        Self { frames: Arc::default(), room }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Vec<u8>>> {
        self.frames.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a frame; false if there is no room.
    pub fn push(&self, frame: &[u8]) -> bool {
        let mut frames = self.lock();
        let fits = frames.len() < self.room;
        if fits {
            frames.push_back(frame.to_vec());
        }
        fits
    }

    /// Takes the first frame.
    pub fn pop(&self) -> Option<Vec<u8>> {
        self.lock().pop_front()
    }
}

/// A cable: what arrives is taken from one queue, what leaves is put into another.
#[derive(Clone, Debug)]
pub struct Cable {
    /// To the port
    pub inwards: Queue,
    /// From the port
    pub outwards: Queue,
}

impl Cable {
    /// A cable with room for so many frames each way.
    pub fn new(room: usize) -> Self {
        Self { inwards: Queue::new(room), outwards: Queue::new(room) }
    }
}

impl Wire for Cable {
    fn arrive(&mut self, buffer: &mut Buffer) -> bool {
        let Some(frame) = self.inwards.pop() else { return false };
        // As on an Ethernet: what is longer than the receiver takes arrives cut, and is seen to be.
        let place = buffer.resize(frame.len());
        let len = place.len();
        place.copy_from_slice(&frame[..len]);
        true
    }

    fn leave(&mut self, frame: &[u8]) -> bool {
        self.outwards.push(frame)
    }
}

/// Linux that takes nothing.
#[derive(Clone, Copy, Debug)]
pub struct Nowhere;

impl Linux for Nowhere {
    fn deliver(&mut self, _: u32, frames: &[Buffer]) -> usize {
        frames.len()
    }
}

/// Exceptions as they would reach Linux: interface index and frame.
#[derive(Clone, Default, Debug)]
pub struct Exceptions(Arc<Mutex<Vec<(u32, Vec<u8>)>>>);

impl Exceptions {
    /// Takes all that have come.
    pub fn take(&self) -> Vec<(u32, Vec<u8>)> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Linux for Exceptions {
    fn deliver(&mut self, ifindex: u32, frames: &[Buffer]) -> usize {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.extend(frames.iter().map(|frame| (ifindex, frame.bytes().to_vec())));
        0
    }
}
