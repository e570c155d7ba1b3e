//! A wire's device beside its frames: what Linux does with devices of its own.

use std::io;

/// What can be asked of a wire's device by any thread, while a worker has its frames.
pub trait Device: Send + Sync {
    /// Frames that it has lost for want of room, since it was opened.
    fn lost(&self) -> u64;

    /// Whether it has a carrier; None if it does not say.
    fn carrier(&self) -> Option<bool>;

    /// Has it take packets of so many bytes. A device that is somebody else's stays as it is; so for what follows.
    fn set_mtu(&self, _mtu: u32) -> io::Result<()> {
        Ok(())
    }

    /// Gives it this MAC address.
    fn set_mac(&self, _mac: [u8; 6]) -> io::Result<()> {
        Ok(())
    }

    /// Whether it is to receive the frames of others, too.
    fn set_promiscuous(&self, _on: bool) -> io::Result<()> {
        Ok(())
    }
}
