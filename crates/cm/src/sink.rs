//! Where the messages go.

use crate::error::CmError;
use std::sync::mpsc::{Sender, SyncSender};
use towpath_fpc::{Alarm, Message};

/// Receives the messages in order, in batches: one batch per turn of the loop, or per 512 messages.
pub trait FpcSink {
    /// Takes a batch. May block; while it does, the kernel's socket buffers hold what happens.
    fn send(&mut self, batch: Vec<Message>) -> Result<(), CmError>;

    /// Takes an alarm, ahead of the batches that the receiver has not taken yet if there is a way.
    fn alarm(&mut self, alarm: Alarm) -> Result<(), CmError> {
        self.send(vec![Message::Alarm(alarm)])
    }

    /// Takes a heartbeat (see `Message::Heartbeat`), ahead of batches but behind alarms.
    fn heartbeat(&mut self, at: u64) -> Result<(), CmError> {
        self.send(vec![Message::Heartbeat(at)])
    }

    /// The receiver lags so far behind that another batch would have to wait. Meanwhile the cache manager leaves in the
    /// kernel what it has not read, and only watches for policies.
    fn is_full(&mut self) -> Result<bool, CmError> {
        Ok(false)
    }
}

impl<F: FnMut(Vec<Message>) -> Result<(), CmError>> FpcSink for F {
    fn send(&mut self, batch: Vec<Message>) -> Result<(), CmError> {
        self(batch)
    }
}

impl FpcSink for Sender<Vec<Message>> {
    fn send(&mut self, batch: Vec<Message>) -> Result<(), CmError> {
        Sender::send(self, batch).map_err(|e| CmError::Sink(e.to_string()))
    }
}

impl FpcSink for SyncSender<Vec<Message>> {
    fn send(&mut self, batch: Vec<Message>) -> Result<(), CmError> {
        SyncSender::send(self, batch).map_err(|e| CmError::Sink(e.to_string()))
    }
}
