//! Netlink for the watchers: asking, dumping, and being woken by a multicast group. Framing and attributes come from
//! netlink-packet-core; the payloads of nfnetlink, XFRM and sock_diag are decoded where they are used.

use crate::error::CmError;
use crate::netlink::put;
use netlink_packet_core::{
    NLM_F_ACK_TLVS, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NlasIterator,
};
use netlink_sys::{Socket, SocketAddr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

const HEADER: usize = 16;
/// The kernel fills at most 32 KiB of one read with a dump (net/netlink/af_netlink.c).
const RECEIVE: usize = 1 << 16;
/// A dump is asked for again this often if the objects change meanwhile.
const ATTEMPTS: usize = 16;

/// A netlink socket for questions.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

/// What a dump's function gets of each message: its type and its payload behind the netlink header.
pub struct Message<'a> {
    /// nlmsg_type
    pub kind: u16,
    /// Payload: the protocol's own header, then attributes
    pub payload: &'a [u8],
}

impl Netlink {
    /// A socket of the protocol (NETLINK_*) in the thread's network namespace.
    pub fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        // Both only improve error texts; kernels that lack them lack nothing else.
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        set_receive_timeout(&socket)?;
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(RECEIVE) })
    }

    /// Dumps objects: `decode` sees each message and may keep something of it. Repeated from the start while the
    /// objects change under it. `what` names the dump in errors.
    pub fn dump<T>(
        &mut self,
        what: &str,
        kind: u16,
        body: &[u8],
        mut decode: impl FnMut(Message<'_>) -> Result<Option<T>, CmError>,
    ) -> Result<Vec<T>, CmError> {
        for _ in 0..ATTEMPTS {
            let mut found = Vec::new();
            let consistent = self.exchange(what, kind, NLM_F_DUMP, body, |message| {
                found.extend(decode(message)?);
                Ok(())
            })?;
            if consistent {
                return Ok(found);
            }
        }
        Err(CmError::decode(what, "the objects change faster than they can be listed"))
    }

    /// Asks one question and gives the answer's type and payload.
    pub fn ask(&mut self, what: &str, kind: u16, body: &[u8]) -> Result<(u16, Vec<u8>), CmError> {
        let mut answer = None;
        self.exchange(what, kind, 0, body, |message| {
            answer = Some((message.kind, message.payload.to_vec()));
            Ok(())
        })?;
        answer.ok_or_else(|| CmError::decode(what, "the kernel gave no answer"))
    }

    /// Sends several requests at once, each of which must have exactly one answer; `each` gets its number and the answer:
    /// a message (an acknowledgement is one), or the kernel's refusal.
    pub fn batch(
        &mut self,
        what: &str,
        kind: u16,
        flags: u16,
        bodies: &[Vec<u8>],
        mut each: impl FnMut(usize, Result<Message<'_>, CmError>) -> Result<(), CmError>,
    ) -> Result<(), CmError> {
        let first = self.sequence.wrapping_add(1);
        let mut requests = Vec::new();
        for body in bodies {
            self.sequence = self.sequence.wrapping_add(1);
            requests.extend(request(kind, flags | NLM_F_REQUEST, self.sequence, body));
        }
        self.socket.send_to(&requests, &SocketAddr::new(0, 0), 0).map_err(|e| CmError::io(what, e))?;
        let mut awaited = bodies.len();
        while awaited > 0 {
            self.buffer.clear();
            self.socket.recv(&mut self.buffer, 0).map_err(|e| CmError::io(what, e))?;
            let mut rest = self.buffer.as_slice();
            while let Some((message, payload)) = next(what, &mut rest)? {
                let number = message.sequence_number().wrapping_sub(first) as usize;
                if number >= bodies.len() {
                    continue; // left over from a question that was given up
                }
                awaited -= 1;
                let kind = message.message_type();
                let refusal = if kind == NLMSG_ERROR { done(what, payload, message.flags()) } else { Ok(()) };
                each(number, refusal.map(|()| Message { kind, payload }))?;
            }
        }
        Ok(())
    }

    /// Sends a request and feeds the answers to `each`, up to the end of a dump or to the first answer otherwise.
    /// False if the kernel says that the dump is inconsistent.
    fn exchange(
        &mut self,
        what: &str,
        kind: u16,
        flags: u16,
        body: &[u8],
        mut each: impl FnMut(Message<'_>) -> Result<(), CmError>,
    ) -> Result<bool, CmError> {
        self.sequence = self.sequence.wrapping_add(1);
        let request = request(kind, flags | NLM_F_REQUEST, self.sequence, body);
        self.socket.send_to(&request, &SocketAddr::new(0, 0), 0).map_err(|e| CmError::io(what, e))?;
        let mut consistent = true;
        loop {
            self.buffer.clear();
            self.socket.recv(&mut self.buffer, 0).map_err(|e| CmError::io(what, e))?;
            let mut rest = self.buffer.as_slice();
            while let Some((message, payload)) = next(what, &mut rest)? {
                if message.sequence_number() != self.sequence {
                    continue; // left over from a dump that was given up
                }
                consistent &= message.flags() & NLM_F_DUMP_INTR == 0;
                match message.message_type() {
                    NLMSG_DONE => return done(what, payload, message.flags()).map(|()| consistent),
                    NLMSG_ERROR => return done(what, payload, message.flags()).map(|()| consistent),
                    kind => each(Message { kind, payload })?,
                }
                if flags & NLM_F_DUMP == 0 {
                    return Ok(consistent);
                }
            }
        }
    }
}

/// The result that ends a dump or acknowledges a request: a negative error number, or 0.
fn done(what: &str, payload: &[u8], flags: u16) -> Result<(), CmError> {
    let code = ne32(payload).map_or(0, |code| code as i32);
    if code >= 0 {
        return Ok(());
    }
    // Behind the number comes the request's header (the rest of it is left out), then the kernel's own words.
    let attributes = payload.get(4 + HEADER..).filter(|_| flags & NLM_F_ACK_TLVS != 0).unwrap_or_default();
    let words = attrs(what, attributes).unwrap_or_default();
    let ext = words.iter().find(|(kind, _)| *kind == 1).map(|(_, text)| text_of(text));
    Err(CmError::Kernel { what: what.to_owned(), source: io::Error::from_raw_os_error(-code), ext })
}

/// The first of the messages in `rest`, and what it carries; `rest` is then what follows it. None if there is none.
fn next<'a>(what: &str, rest: &mut &'a [u8]) -> Result<Option<(NetlinkBuffer<&'a [u8]>, &'a [u8])>, CmError> {
    if rest.is_empty() {
        return Ok(None);
    }
    let message = NetlinkBuffer::new_checked(*rest).map_err(|e| CmError::decode(what, e))?;
    let length = message.length() as usize;
    let payload = &rest[HEADER..length];
    *rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    Ok(Some((message, payload)))
}

fn request(kind: u16, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    put(kind, flags, sequence, body, &mut bytes);
    bytes
}

/// The kernel answers while it is asked, so a silent second is an error and not a wait without end.
fn set_receive_timeout(socket: &Socket) -> io::Result<()> {
    let time = libc::timeval { tv_sec: 2, tv_usec: 0 };
    // SAFETY: the option's value is a timeval that lives through the call, and its size is given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const time).cast(),
            size_of::<libc::timeval>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Multicast groups whose messages only mean "look again": their content is not used, so losing some loses nothing.
pub struct Wakeup {
    socket: Socket,
    buffer: Vec<u8>,
    lost: bool,
}

impl Wakeup {
    /// Joins groups (numbers, not masks) of the protocol.
    pub fn join(protocol: isize, groups: &[u32]) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        for group in groups {
            socket.add_membership(*group)?;
        }
        Ok(Self { socket, buffer: Vec::with_capacity(RECEIVE), lost: false })
    }

    /// Becomes readable when there is a message.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether messages were lost since this was asked last.
    pub fn take_lost(&mut self) -> bool {
        std::mem::take(&mut self.lost)
    }

    /// Reads everything that waits; true if there was something.
    pub fn drain(&mut self, what: &str) -> Result<bool, CmError> {
        let mut woken = false;
        loop {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, libc::MSG_DONTWAIT) {
                Ok(_) => woken = true,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(woken),
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => (woken, self.lost) = (true, true),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(CmError::io(what, e)),
            }
        }
    }
}

/// The attributes in `bytes` as (type without flags, value).
pub fn attrs<'a>(what: &str, bytes: &'a [u8]) -> Result<Vec<(u16, &'a [u8])>, CmError> {
    NlasIterator::new(bytes)
        .map(|attribute| {
            let attribute = attribute.map_err(|e| CmError::decode(what, e))?;
            let (kind, length) = (attribute.kind(), attribute.length() as usize);
            Ok((kind, attribute.into_inner().get(4..length).unwrap_or_default()))
        })
        .collect()
}

/// The value of the attribute of type `kind`.
pub fn find<'a>(attributes: &[(u16, &'a [u8])], kind: u16) -> Option<&'a [u8]> {
    attributes.iter().find(|(k, _)| *k == kind).map(|(_, value)| *value)
}

/// An attribute with its header and padding, ready to be put behind a request.
pub fn attr(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = ((value.len() + 4) as u16).to_ne_bytes().to_vec();
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// The first four bytes as a number in network byte order (nfnetlink).
pub fn be32(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().map(|b| u32::from_be_bytes(*b))
}

/// The first four bytes as a number in the machine's byte order (rtnetlink, XFRM, sock_diag).
pub fn ne32(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().map(|b| u32::from_ne_bytes(*b))
}

/// A string up to its NUL; what is not UTF-8 is replaced.
pub fn text_of(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_cut_at_their_length_and_padding_is_skipped() {
        let bytes = [attr(1, b"eth0\0"), attr(0x8002, &[1, 2, 3, 4])].concat();
        assert_eq!(attrs("test", &bytes).unwrap(), vec![(1, b"eth0\0".as_slice()), (2, [1, 2, 3, 4].as_slice())]);
    }

    #[test]
    fn truncated_attributes_are_an_error() {
        let bytes = attr(1, b"something");
        for length in 1..bytes.len() - 3 {
            assert!(attrs("test", &bytes[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn kernel_words_are_kept() {
        let mut payload = (-libc::EINVAL).to_ne_bytes().to_vec();
        payload.extend_from_slice(&[0; HEADER]);
        payload.extend_from_slice(&attr(1, b"no such thing\0"));
        let error = done("dump of things", &payload, NLM_F_ACK_TLVS).unwrap_err().to_string();
        assert!(error.contains("dump of things") && error.contains("(kernel: no such thing)"), "{error}");
        assert!(done("dump of things", &0i32.to_ne_bytes(), 0).is_ok());
    }
}
