//! What FPC travels by: a UNIX stream socket, or TLS over TCP. Either can be read by one thread while another writes.

use crate::tls;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A connected stream.
pub enum Stream {
    /// To a process of this host
    Unix(UnixStream),
    /// To another host, both ends known by their certificates
    Tls(tls::Stream),
}

impl Stream {
    /// A second handle on the same stream: for another thread, to read, to write or to end it.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
            Self::Tls(stream) => Self::Tls(stream.another()),
        })
    }

    /// How long a read waits; None: for ever.
    pub fn set_read_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_read_timeout(limit),
            Self::Tls(stream) => stream.set_read_timeout(limit),
        }
    }

    /// Says that nothing more will be sent, and has the other end read what was. Errors do not matter any more.
    pub fn part(&self) {
        match self {
            Self::Unix(stream) => drop(stream.shutdown(Shutdown::Write)),
            Self::Tls(stream) => stream.part(),
        }
    }

    /// Ends what comes in, also for whoever reads at the moment.
    pub fn stop_reading(&self) {
        // It may have ended already, which is what is wanted.
        drop(match self {
            Self::Unix(stream) => stream.shutdown(Shutdown::Read),
            Self::Tls(stream) => stream.stop_reading(),
        });
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(bytes),
            Self::Tls(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl From<UnixStream> for Stream {
    fn from(stream: UnixStream) -> Self {
        Self::Unix(stream)
    }
}

impl From<tls::Stream> for Stream {
    fn from(stream: tls::Stream) -> Self {
        Self::Tls(stream)
    }
}
