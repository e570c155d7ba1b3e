//! Where the messages go.

use crate::error::CmError;
use std::sync::mpsc::{Sender, SyncSender};
use towpath_fpc::Message;

/// Receives the messages in order, in batches: one batch per turn of the loop, or per 1024 messages.
pub trait FpcSink {
    /// Takes a batch. May block; while it does, the kernel's socket buffers hold what happens.
    fn send(&mut self, batch: Vec<Message>) -> Result<(), CmError>;
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
