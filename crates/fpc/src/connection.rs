//! A connection between CM and FPM over a stream: frames with sequence numbers, gathered into large writes. A sender
//! blocks while the stream is full, so a slow receiver slows the sender instead of losing messages.

use crate::codec::{self, DecodeError, EncodeError, Frame, HEADER, Hello, MAGIC, Packet, VERSION};
use crate::message::{Feedback, Message, Sink, SinkError};
use crate::stream::Stream;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Bytes gathered before they are written without being asked to.
const BATCH: usize = 64 * 1024;
/// The other end has so long to say hello.
const HELLO: Duration = Duration::from_secs(5);

/// Why a connection cannot be opened, or ended.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The socket failed
    #[error("FPC socket: {0}")]
    Io(#[from] io::Error),
    /// What came in is not FPC
    #[error("FPC stream: {0}")]
    Decode(#[from] DecodeError),
    /// A message is too long to be sent
    #[error("FPC: {0}")]
    Encode(#[from] EncodeError),
    /// The other end speaks something else
    #[error("FPC: the other end speaks version {theirs}, this one {VERSION}; use the same release of towpath for both")]
    Version {
        /// Its version
        theirs: u16,
    },
    /// The other end does not say hello
    #[error("FPC: the other end did not say hello within {} s", HELLO.as_secs())]
    Silent,
    /// The other end is no FPC speaker
    #[error("FPC: the other end did not open with an FPC hello")]
    NotFpc,
    /// The other end closed and said why
    #[error("FPC: the other end closed the connection: {0}")]
    Refused(String),
    /// The stream ended inside a frame, or before the hello
    #[error("FPC: the connection was cut off")]
    CutOff,
}

/// An open connection whose two ends agreed on the version.
pub struct Connection {
    /// Frames out
    pub sender: Sender,
    /// Frames in
    pub receiver: Receiver,
}

impl Connection {
    /// Connects to the socket at `path`.
    pub fn connect(path: &Path) -> Result<Self, ConnectionError> {
        Self::open(UnixStream::connect(path)?)
    }

    /// Opens the protocol on a connected socket: both ends say hello, and part with a reason if they do not match.
    pub fn open(stream: impl Into<Stream>) -> Result<Self, ConnectionError> {
        let stream = stream.into();
        let mut sender = Sender { stream: stream.try_clone()?, buffer: Vec::new(), sequence: 0 };
        let mut receiver = Receiver { stream, buffer: Vec::new(), start: 0 };
        sender.push(Packet::Hello(Hello { magic: MAGIC, version: VERSION }), false)?;
        sender.flush_frames()?;
        receiver.stream.set_read_timeout(Some(HELLO))?;
        let greeted = greeting(&mut receiver);
        receiver.stream.set_read_timeout(None)?;
        match greeted {
            Ok(()) => Ok(Self { sender, receiver }),
            Err(error) => {
                sender.bye(&error.to_string());
                Err(error)
            }
        }
    }
}

/// Checks the other end's first frame. Its magic is looked at before anything else, so that a stranger's bytes are not
/// taken for a length to wait for.
fn greeting(receiver: &mut Receiver) -> Result<(), ConnectionError> {
    while receiver.pending().len() < HEADER + 4 {
        match receiver.fill() {
            Ok(true) => {}
            Ok(false) => return Err(ConnectionError::CutOff),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(ConnectionError::Silent),
            Err(error) => return Err(error.into()),
        }
    }
    if receiver.pending().get(..2) != Some(&[0, 1])
        || receiver.pending().get(HEADER..HEADER + 4) != Some(&MAGIC.to_be_bytes())
    {
        return Err(ConnectionError::NotFpc);
    }
    match receiver.next()? {
        Some(Frame { packet: Packet::Hello(Hello { version: VERSION, .. }), .. }) => Ok(()),
        Some(Frame { packet: Packet::Hello(Hello { version, .. }), .. }) => {
            Err(ConnectionError::Version { theirs: version })
        }
        Some(_) => Err(ConnectionError::NotFpc),
        None => Err(ConnectionError::CutOff),
    }
}

/// The sending half.
pub struct Sender {
    stream: Stream,
    buffer: Vec<u8>,
    sequence: u32,
}

impl Sender {
    /// Puts a frame into the batch and returns its sequence number; `report` asks the receiver for an `Ack`.
    pub fn push(&mut self, packet: Packet, report: bool) -> Result<u32, ConnectionError> {
        let sequence = self.sequence;
        codec::encode(&Frame { sequence, report, packet }, &mut self.buffer)?;
        self.sequence = sequence.wrapping_add(1);
        if self.buffer.len() >= BATCH {
            self.flush_frames()?;
        }
        Ok(sequence)
    }

    /// Sends FPM's word back to CM at once.
    pub fn feedback(&mut self, feedback: Feedback) -> Result<(), ConnectionError> {
        self.push(Packet::Feedback(feedback), false)?;
        self.flush_frames()
    }

    /// Writes out what was gathered.
    pub fn flush_frames(&mut self) -> Result<(), ConnectionError> {
        let written = self.stream.write_all(&self.buffer);
        self.buffer.clear();
        Ok(written?)
    }

    /// Says why and closes; errors do not matter any more.
    pub fn bye(&mut self, reason: &str) {
        let said = self.push(Packet::Bye(reason.to_owned()), false).and_then(|_| self.flush_frames());
        // The other end may be gone already, which is what is wanted.
        drop(said);
        self.stream.part();
    }

    /// Another handle on the stream.
    pub fn handle(&self) -> io::Result<Stream> {
        self.stream.try_clone()
    }
}

impl Sink for Sender {
    fn send(&mut self, message: Message) -> Result<(), SinkError> {
        self.push(Packet::Message(message), false).map(drop).map_err(|error| SinkError(error.to_string()))
    }

    fn flush(&mut self) -> Result<(), SinkError> {
        self.flush_frames().map_err(|error| SinkError(error.to_string()))
    }
}

/// The receiving half.
pub struct Receiver {
    stream: Stream,
    buffer: Vec<u8>,
    start: usize,
}

impl Receiver {
    /// Waits for the next frame; None once the other end has closed between two frames.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<Option<Frame>, ConnectionError> {
        loop {
            if let Some(frame) = self.take()? {
                return Ok(Some(frame));
            }
            if !self.fill()? {
                return if self.pending().is_empty() { Ok(None) } else { Err(ConnectionError::CutOff) };
            }
        }
    }

    /// Waits for a frame and returns it with all that came in with it, at most `limit`; empty once the other end closed.
    pub fn batch(&mut self, limit: usize) -> Result<Vec<Frame>, ConnectionError> {
        let mut frames: Vec<Frame> = self.next()?.into_iter().collect();
        while !frames.is_empty() && frames.len() < limit {
            let Some(frame) = self.take()? else { break };
            frames.push(frame);
        }
        Ok(frames)
    }

    /// The next frame if it is already complete in the buffer. A `Bye` is an error with its reason.
    fn take(&mut self) -> Result<Option<Frame>, ConnectionError> {
        let Some((frame, length)) = codec::decode(self.pending())? else { return Ok(None) };
        self.start += length;
        match frame.packet {
            Packet::Bye(reason) => Err(ConnectionError::Refused(reason)),
            _ => Ok(Some(frame)),
        }
    }

    fn pending(&self) -> &[u8] {
        self.buffer.get(self.start..).unwrap_or_default()
    }

    /// Reads once; false at the end of the stream.
    fn fill(&mut self) -> io::Result<bool> {
        self.buffer.drain(..self.start);
        self.start = 0;
        let filled = self.buffer.len();
        self.buffer.resize(filled + BATCH, 0);
        let read = loop {
            match self.stream.read(&mut self.buffer[filled..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result,
            }
        };
        self.buffer.truncate(filled + *read.as_ref().unwrap_or(&0));
        Ok(read? > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn pair() -> (Connection, Connection) {
        let (left, right) = UnixStream::pair().unwrap();
        let other = thread::spawn(|| Connection::open(right).unwrap());
        (Connection::open(left).unwrap(), other.join().unwrap())
    }

    #[test]
    fn many_messages_arrive_in_order_and_are_acknowledged() {
        const COUNT: u32 = 50_000;
        let (mut cm, mut fpm) = pair();
        let receiver = thread::spawn(move || {
            let (mut expected, mut batches) = (0, 0);
            while expected < COUNT {
                batches += 1;
                for frame in fpm.receiver.batch(10_000).unwrap() {
                    assert_eq!(frame.packet, Packet::Message(Message::PortDelete(expected)));
                    expected += 1;
                    if frame.report {
                        fpm.sender.push(Packet::Ack(frame.sequence), false).unwrap();
                        fpm.sender.flush_frames().unwrap();
                    }
                }
            }
            batches
        });
        for index in 0..COUNT - 1 {
            cm.sender.send(Message::PortDelete(index)).unwrap();
        }
        let last = cm.sender.push(Packet::Message(Message::PortDelete(COUNT - 1)), true).unwrap();
        cm.sender.flush().unwrap();
        assert_eq!(cm.receiver.next().unwrap().unwrap().packet, Packet::Ack(last));
        assert!(receiver.join().unwrap() < COUNT / 100, "messages travel in batches");
        assert!(cm.receiver.next().unwrap().is_none(), "closed between frames");
    }

    #[test]
    fn another_version_is_refused_with_a_reason_on_both_ends() {
        let (left, mut right) = UnixStream::pair().unwrap();
        let ours = thread::spawn(|| Connection::open(left).err().unwrap());
        let mut hello = Vec::new();
        let packet = Packet::Hello(Hello { magic: MAGIC, version: VERSION + 1 });
        codec::encode(&Frame { sequence: 0, report: false, packet }, &mut hello).unwrap();
        right.write_all(&hello).unwrap();
        assert!(matches!(ours.join().unwrap(), ConnectionError::Version { theirs } if theirs == VERSION + 1));
        let mut receiver = Receiver { stream: right.into(), buffer: Vec::new(), start: 0 };
        assert!(matches!(receiver.next().unwrap().unwrap().packet, Packet::Hello(_)));
        let theirs = format!("version {}", VERSION + 1);
        assert!(matches!(receiver.next(), Err(ConnectionError::Refused(reason)) if reason.contains(&theirs)));
    }

    #[test]
    fn a_stranger_is_refused() {
        let (left, mut right) = UnixStream::pair().unwrap();
        right.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        assert!(matches!(Connection::open(left), Err(ConnectionError::NotFpc)));
    }

    #[test]
    fn a_cut_frame_is_an_error() {
        let (mut cm, mut fpm) = pair();
        fpm.sender.stream.write_all(&[0, 16, 0, 0, 0]).unwrap();
        drop(fpm);
        assert!(matches!(cm.receiver.next(), Err(ConnectionError::CutOff)));
    }
}
