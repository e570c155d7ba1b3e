//! What a worker asks of its ports, and where it leaves exceptions.

use crate::pool::{Buffer, Pool};
use std::os::fd::BorrowedFd;

pub use towpath_pipeline::batch::BATCH;

/// The queues of one interface that a worker has to itself.
pub trait PortDriver: Send {
    /// Takes what it needs from the pool to receive its first frames.
    fn start(&mut self, pool: &mut Pool);

    /// Appends frames that have arrived to `frames`, which is empty and has room for `BATCH`.
    fn receive(&mut self, pool: &mut Pool, frames: &mut Vec<Buffer>);

    /// Sends frames in their order and takes those that it sends out of `frames`; what remains found no room.
    fn transmit(&mut self, pool: &mut Pool, frames: &mut Vec<Buffer>);

    /// Hands frames that arrived here to Linux, if the port has a way of its own, so that Linux sees them received by its
    /// interface. Returns how many could not be.
    fn deliver(&mut self, _frames: &[Buffer]) -> Option<usize> {
        None
    }

    /// Appends what can be read from (`poll`) when frames have arrived; false if only asking tells.
    fn readable<'d>(&'d self, fds: &mut Vec<BorrowedFd<'d>>) -> bool;

    /// Ends; all its buffers are in the pool then.
    fn close(self: Box<Self>, pool: &mut Pool);
}

/// The way to Linux for what is not forwarded.
pub trait Linux: Send {
    /// Hands over frames as they arrived, so that Linux sees them received by the interface with this index. Returns how
    /// many could not be.
    fn deliver(&mut self, ifindex: u32, frames: &[Buffer]) -> usize;
}

/// A way to Linux for one frame at a time; false if it could not be handed over.
impl<F: FnMut(u32, &[u8]) -> bool + Send> Linux for F {
    fn deliver(&mut self, ifindex: u32, frames: &[Buffer]) -> usize {
        frames.iter().filter(|frame| !self(ifindex, frame.bytes())).count()
    }
}
