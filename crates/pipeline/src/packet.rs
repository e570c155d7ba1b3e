//! A frame in the program's own memory.

use crate::{Beside, Frame};
use towpath_wire::View;

/// A frame with room before it. Its first buffer may be shorter than the frame, as with multi-buffer frames.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Packet {
    memory: Vec<u8>,
    start: usize,
    linear: usize,
    beside: Beside,
}

impl Packet {
    /// The frame in `bytes`, all in one buffer, with `headroom` bytes before it.
    pub fn new(bytes: &[u8], headroom: usize) -> Self {
        Self::with_linear(bytes, headroom, bytes.len())
    }

    /// The frame in `bytes`, of which only the first `linear` lie in the first buffer.
    pub fn with_linear(bytes: &[u8], headroom: usize, linear: usize) -> Self {
        let mut memory = vec![0; headroom];
        memory.extend_from_slice(bytes);
        let linear = headroom + linear.min(bytes.len());
        Self { memory, start: headroom, linear, beside: Beside::NOTHING }
    }

    /// The same, with this beside it.
    pub fn with_beside(self, beside: Beside) -> Self {
        Self { beside, ..self }
    }

    /// The frame as it is now.
    pub fn bytes(&self) -> &[u8] {
        self.memory.get(self.start..).unwrap_or_default()
    }
}

impl Frame for Packet {
    fn get<T: View>(&self, offset: usize) -> Option<&T> {
        let bytes = self.memory.get(self.start + offset..self.linear)?;
        T::ref_from_prefix(bytes).ok().map(|(view, _)| view)
    }

    fn get_mut<T: View>(&mut self, offset: usize) -> Option<&mut T> {
        let bytes = self.memory.get_mut(self.start + offset..self.linear)?;
        T::mut_from_prefix(bytes).ok().map(|(view, _)| view)
    }

    fn first_len(&self) -> usize {
        self.linear - self.start
    }

    fn total_len(&self) -> usize {
        self.memory.len() - self.start
    }

    fn beside(&self) -> Beside {
        self.beside
    }

    fn move_head(&mut self, by: i32) -> bool {
        let start = self.start as i64 + i64::from(by);
        let fits = usize::try_from(start).is_ok_and(|start| start < self.linear);
        if fits {
            self.start = start as usize;
        }
        fits
    }

    fn trim(&mut self, by: u32) -> bool {
        let Some(len) = self.total_len().checked_sub(by as usize) else { return false };
        self.memory.truncate(self.start + len);
        self.linear = self.linear.min(self.memory.len());
        true
    }
}
