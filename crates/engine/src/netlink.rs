//! A netlink socket for single questions and their answers.

use netlink_packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use std::io;
use std::time::Duration;

/// Bytes of a netlink header.
pub const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_MULTI: u16 = 2;

/// A socket in the network namespace of the thread that opened it.
pub struct Socket(netlink_sys::Socket);

impl Socket {
    /// Opens one for `protocol` (`NETLINK_*`).
    pub fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = netlink_sys::Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
        Ok(Self(socket))
    }

    /// Subscribes to a multicast group.
    pub fn join(&mut self, group: u32) -> io::Result<()> {
        self.0.add_membership(group)
    }

    /// Sends one message and collects the answers (whole messages), until the last or the kernel's refusal.
    pub fn request(&mut self, message: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        self.0.send(message, 0)?;
        let mut answers = Vec::new();
        loop {
            let (datagram, _) = self.0.recv_from_full()?;
            for message in messages(&datagram) {
                match word16(message, 4) {
                    NLMSG_ERROR => match word32(message, HEADER) as i32 {
                        0 => return Ok(answers),
                        code => return Err(io::Error::from_raw_os_error(-code)),
                    },
                    NLMSG_DONE => return Ok(answers),
                    _ => answers.push(message.to_vec()),
                }
                if word16(message, 6) & NLM_F_MULTI == 0 {
                    return Ok(answers);
                }
            }
        }
    }

    /// Waits for a notification; no messages if none came in time.
    pub fn wait(&mut self, timeout: Duration) -> io::Result<Vec<Vec<u8>>> {
        use std::os::fd::AsRawFd;
        let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let millis = timeout.as_millis().try_into().unwrap_or(i32::MAX);
        // SAFETY: one valid pollfd.
        match unsafe { libc::poll(&mut poll, 1, millis) } {
            0 => Ok(Vec::new()),
            n if n < 0 => Err(io::Error::last_os_error()),
            _ => {
                let (datagram, _) = self.0.recv_from_full()?;
                Ok(messages(&datagram).map(<[u8]>::to_vec).collect())
            }
        }
    }
}

/// Asks rtnetlink one thing, with flags (`NLM_F_*`) beside that of a request.
///
/// # Errors
/// The kernel's refusal; `InvalidData` for an answer that cannot be read.
pub fn ask(request: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
    let mut message = NetlinkMessage::from(request);
    message.header.flags = NLM_F_REQUEST | flags;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    let answers = Socket::open(netlink_sys::protocols::NETLINK_ROUTE)?.request(&bytes)?;
    let mut payloads = Vec::new();
    for bytes in answers {
        let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&bytes)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        if let NetlinkPayload::InnerMessage(payload) = message.payload {
            payloads.push(payload);
        }
    }
    Ok(payloads)
}

/// The messages of one datagram; what does not fit the lengths given is left out.
fn messages(mut datagram: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let len = word32(datagram, 0) as usize;
        let message = datagram.get(..len).filter(|message| message.len() >= HEADER)?;
        datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// The attributes in `bytes`: type without flags, and payload.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(word16(bytes, 0));
        let attribute = bytes.get(..len).filter(|attribute| attribute.len() >= 4)?;
        let kind = word16(attribute, 2) & 0x3fff;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, &attribute[4..]))
    })
}

/// Two bytes at `at`, 0 beyond the end.
pub fn word16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_ne_bytes)
}

/// Four bytes at `at`, 0 beyond the end.
pub fn word32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

/// Eight bytes at `at`, 0 beyond the end.
pub fn word64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_ne_bytes)
}
