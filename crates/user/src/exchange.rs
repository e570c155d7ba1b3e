//! Frames from one worker to another, which has the port that they leave by. A buffer belongs to its worker's pool: the
//! other one copies the frame and gives the buffer back.

use crate::bell::Bell;
use crate::pool::Buffer;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// Frames that may wait for a worker.
const INBOX: usize = 512;

/// A frame for a port of the receiver's.
pub struct Parcel {
    /// Slot of the port
    pub slot: u32,
    /// Who is to have the buffer back
    from: usize,
    /// The frame
    pub frame: Buffer,
}

/// A worker's ways to the others and from them.
pub struct Exchange {
    number: usize,
    inbox: Receiver<Parcel>,
    returned: Receiver<Buffer>,
    others: Vec<Other>,
}

#[derive(Clone)]
struct Other {
    inbox: SyncSender<Parcel>,
    returns: SyncSender<Buffer>,
    bell: Arc<Bell>,
    /// It was handed something since it was last looked at whether it sleeps
    handed: bool,
}

impl Exchange {
    /// One for each of the workers whose pools have so many buffers and whose bells these are.
    pub fn among(workers: &[(usize, Arc<Bell>)]) -> Vec<Self> {
        let (mut ends, mut others) = (Vec::new(), Vec::new());
        for (buffers, bell) in workers {
            let (inbox, parcels) = sync_channel(INBOX);
            // Room for all that can ever be away.
            let (returns, returned) = sync_channel(*buffers);
            ends.push((parcels, returned));
            others.push(Other { inbox, returns, bell: bell.clone(), handed: false });
        }
        let exchange = |(number, (inbox, returned))| Self { number, inbox, returned, others: others.clone() };
        ends.into_iter().enumerate().map(exchange).collect()
    }

    /// Hands a frame to a worker that has the port in this slot; None if it has room for it.
    #[inline]
    pub fn hand(&mut self, worker: usize, slot: u32, frame: Buffer) -> Option<Buffer> {
        let Some(other) = self.others.get_mut(worker) else { return Some(frame) };
        let refused = other.inbox.try_send(Parcel { slot, from: self.number, frame }).err();
        other.handed |= refused.is_none();
        refused.map(|error| match error {
            std::sync::mpsc::TrySendError::Full(parcel) | std::sync::mpsc::TrySendError::Disconnected(parcel) => {
                parcel.frame
            }
        })
    }

    /// Wakes those that were handed something.
    #[inline]
    pub fn wake(&mut self) {
        for other in self.others.iter_mut().filter(|other| other.handed) {
            other.handed = false;
            other.bell.ring_if_asleep();
        }
    }

    /// The next frame from another worker.
    #[inline]
    pub fn take(&self) -> Option<Parcel> {
        self.inbox.try_recv().ok()
    }

    /// Gives the buffer of a parcel back to its owner.
    #[inline]
    pub fn give_back(&self, parcel: Parcel) {
        if let Some(owner) = self.others.get(parcel.from) {
            // There is room; an owner that is gone has left the buffer's memory behind.
            let _ = owner.returns.try_send(parcel.frame);
        }
    }

    /// A buffer that has come back.
    #[inline]
    pub fn returned(&self) -> Option<Buffer> {
        self.returned.try_recv().ok()
    }
}
