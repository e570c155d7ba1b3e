//! A port whose wire is no interface of Linux's: a TAP, the port's *twin*, stands for it there. Linux's settings (addresses,
//! MTU, forwarding) are the twin's. What arrives by the wire and is not forwarded Linux receives by the twin; what Linux
//! sends by the twin leaves by the wire.

use crate::driver::{BATCH, Passed, PortDriver};
use crate::pool::{Buffer, Pool};
use crate::tap::Tap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// While frames keep arriving, Linux's are looked for once in so many turns: each look is a system call.
const TURNS: u32 = 8;

/// The wire and its twin.
pub struct Twinned {
    wire: Box<dyn PortDriver>,
    twin: Arc<Tap>,
    turn: u32,
    /// From Linux to the wire, empty between two turns
    through: Vec<Buffer>,
}

impl Twinned {
    /// The port of a wire.
    pub fn new(wire: Box<dyn PortDriver>, twin: Arc<Tap>) -> Self {
        Self { wire, twin, turn: 0, through: Vec::with_capacity(BATCH) }
    }

    /// Sends what Linux has sent. What finds no room on the wire is lost, as by any device.
    fn pass(&mut self, pool: &mut Pool) {
        while self.through.len() < BATCH
            && let Some(mut buffer) = pool.take()
        {
            if !self.twin.receive(&mut buffer) {
                pool.give(buffer);
                break;
            }
            self.through.push(buffer);
        }
        if !self.through.is_empty() {
            self.wire.transmit(pool, &mut self.through);
            self.through.drain(..).for_each(|frame| pool.give(frame));
        }
    }
}

impl PortDriver for Twinned {
    fn start(&mut self, pool: &mut Pool) {
        self.wire.start(pool);
    }

    fn receive(&mut self, pool: &mut Pool, frames: &mut Vec<Buffer>) {
        self.receive_unless(pool, frames, &|_| false);
    }

    fn receive_unless(&mut self, pool: &mut Pool, frames: &mut Vec<Buffer>, drops: &dyn Fn(&[u8]) -> bool) {
        self.wire.receive_unless(pool, frames, drops);
        self.turn = self.turn.wrapping_add(1);
        if frames.is_empty() || self.turn.is_multiple_of(TURNS) {
            self.pass(pool);
        }
    }

    fn transmit(&mut self, pool: &mut Pool, frames: &mut Vec<Buffer>) {
        self.wire.transmit(pool, frames);
    }

    fn deliver(&mut self, frames: &[Buffer]) -> Option<usize> {
        Some(frames.iter().filter(|frame| !self.twin.send_frame(frame)).count())
    }

    fn filtered(&self) -> bool {
        self.wire.filtered()
    }

    fn passed(&mut self) -> Passed {
        self.wire.passed()
    }

    fn readable<'d>(&'d self, fds: &mut Vec<BorrowedFd<'d>>) -> bool {
        fds.push(self.twin.as_fd());
        self.wire.readable(fds)
    }

    fn close(self: Box<Self>, pool: &mut Pool) {
        self.wire.close(pool);
    }
}
