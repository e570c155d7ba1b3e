//! What a worker asks of its ports, and where it leaves exceptions.

use crate::pool::{Buffer, Pool};
use std::os::fd::BorrowedFd;

pub use towpath_pipeline::batch::BATCH;
use towpath_tables::trace::Outcome;

/// The queues of one interface that a worker has to itself.
pub trait PortDriver: Send {
    /// Takes what it needs from the pool to receive its first frames.
    fn start(&mut self, pool: &mut Pool);

    /// Appends frames that have arrived to `frames`, which is empty and has room for `BATCH`.
    fn receive(&mut self, pool: &mut Pool, frames: &mut Vec<Buffer>);

    /// As `receive`; what the port would hand to Linux itself (`passed`) is dropped instead where `drops` says so.
    fn receive_unless(&mut self, pool: &mut Pool, frames: &mut Vec<Buffer>, _drops: &dyn Fn(&[u8]) -> bool) {
        self.receive(pool, frames);
    }

    /// Sends frames in their order and takes those that it sends out of `frames`; what remains found no room.
    fn transmit(&mut self, pool: &mut Pool, frames: &mut Vec<Buffer>);

    /// Hands frames that arrived here to Linux, if the port has a way of its own, so that Linux sees them received by its
    /// interface. Returns how many could not be.
    fn deliver(&mut self, _frames: &[Buffer]) -> Option<usize> {
        None
    }

    /// Whether an XDP program has asked the operator's filters and captures about the frames that it receives.
    fn filtered(&self) -> bool {
        false
    }

    /// What it has handed to Linux itself since it was last asked: frames that are several packets in one.
    fn passed(&mut self) -> Passed {
        Passed::default()
    }

    /// Appends what can be read from (`poll`) when frames have arrived; false if only asking tells.
    fn readable<'d>(&'d self, fds: &mut Vec<BorrowedFd<'d>>) -> bool;

    /// Ends; all its buffers are in the pool then.
    fn close(self: Box<Self>, pool: &mut Pool);
}

/// Frames that a driver has handed to Linux itself.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Passed {
    /// All
    pub frames: u64,
    /// Those of them that Linux did not take
    pub lost: u64,
}

/// What is to be done with frames besides taking them along the packet path.
pub trait Lookout: Send + Sync {
    /// Whether a capture is to see a frame that came in by the interface with this index, so that it is Linux's. Asked where
    /// no XDP program has done so (`PortDriver::filtered`).
    fn captures(&self, ifindex: u32, frame: &[u8]) -> bool;

    /// The traces that look at a frame, by bits.
    fn traces(&self, frame: &[u8]) -> u32;

    /// Tells them what became of it. The frame is as it arrived by the interface with this index.
    fn tell(&self, traces: u32, ifindex: u32, frame: &[u8], outcome: Outcome);
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
