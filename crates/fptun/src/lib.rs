//! FPTUN: packets from user space that enter Linux's stack where a record behind them says: as received by an interface or
//! as to be sent by one, with a mark. For packets that cannot be handed over as they arrived, because headers were removed.
//!
//! A packet is sent, with its record behind it, by a device of its own that leads nowhere. A program on the device's egress
//! hook checks the record, cuts it off and redirects the packet. Whatever else is sent by the device is dropped and
//! counted: that somebody may send by it (CAP_NET_RAW, a route) is not enough, records hold a key that is drawn when the
//! device is made. Packet sockets and the device's statistics see neither records nor the packets behind them, since the
//! program runs before them.
//!
//! The device goes with the [`Fptun`] that made it. What a killed process left drops everything, since the key died with the
//! process, and goes when the next one is made or by [`remove`].

mod device;
mod error;
mod program;
mod sender;
#[cfg(test)]
mod tests;

pub use device::{NAME, remove};
pub use error::{Error, Result};
pub use sender::{Kind, Packet, Sender};
pub use towpath_wire::fptun::{Entry, Outcome};

use device::Device;
use program::Program;
use towpath_wire::fptun::Key;

/// A way into Linux.
#[derive(Debug)]
pub struct Fptun {
    device: Device,
    program: Program,
    key: Key,
}

impl Fptun {
    /// Makes the device in the calling thread's network namespace, in place of one that a former process left. Takes
    /// CAP_NET_ADMIN, CAP_BPF and, for senders, CAP_NET_RAW.
    pub fn open() -> Result<Self> {
        let key = draw_key()?;
        let mut device = Device::make()?;
        let program = Program::attach(&key)?;
        device.start()?;
        Ok(Self { device, program, key })
    }

    /// A sender of its own, for one thread of the same network namespace.
    pub fn sender(&self, kind: Kind) -> Result<Sender> {
        Sender::open(self.device.index(), self.key, kind)
    }

    /// Packets so far by what became of them, in the order of `Outcome::ALL`.
    pub fn outcomes(&self) -> Result<[u64; Outcome::ALL.len()]> {
        self.program.outcomes()
    }
}

fn draw_key() -> Result<Key> {
    let mut key = Key::default();
    // SAFETY: the buffer has the length given, and the call writes nothing else.
    let drawn = unsafe { libc::getrandom(key.as_mut_ptr().cast(), size_of::<Key>(), 0) };
    if drawn == size_of::<Key>() as isize { Ok(key) } else { Err(Error::last("draw a key")) }
}
