//! Netlink sockets for what is mirrored, of rtnetlink and ctnetlink: some listen to notifications, others ask.

use crate::decode::{attrs, family_number, rtm};
use crate::error::CmError;
use netlink_packet_core::NetlinkBuffer;
pub use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{Socket, SocketAddr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use towpath_tables::record::Family;

/// `nlmsg_type` of an error or acknowledgement (include/uapi/linux/netlink.h).
pub const NLMSG_ERROR: u16 = 2;
/// `nlmsg_type` of the last message of a dump.
pub const NLMSG_DONE: u16 = 3;
/// The dump was not consistent.
pub const NLM_F_DUMP_INTR: u16 = 0x10;
/// The object replaces another.
pub const NLM_F_REPLACE: u16 = 0x100;
/// Of a notification: the object is the only one under its key.
pub const NLM_F_EXCL: u16 = 0x200;
/// Of a notification: the route stands behind those that were under its key.
pub const NLM_F_APPEND: u16 = 0x800;
/// The request asks for a dump.
pub const NLM_F_REQUEST_DUMP: u16 = 0x301;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSGERR_ATTR_MSG: u16 = 1;

/// Multicast groups (RTNLGRP_*) about interfaces: link, IPv4 and IPv6 netconf.
pub const PORT_GROUPS: &[u32] = &[1, 24, 25];
/// All others: neigh, IPv4 ifaddr and route, IPv6 ifaddr and route, nexthop.
pub const OTHER_GROUPS: &[u32] = &[3, 5, 7, 9, 11, 32];

/// The kernel sends at most 32 KiB at once in dumps; single notifications can be larger (SR-IOV, wide groups).
const BUFFER: usize = 256 * 1024;

/// What reading a socket gave.
pub enum Received {
    /// So many bytes of messages
    Bytes(usize),
    /// Nothing is there
    Empty,
    /// The kernel had to drop messages
    Overrun,
}

/// A netlink socket.
pub struct Channel {
    socket: Socket,
    /// Its address: what it causes is told with this number
    port: u32,
    sequence: u32,
}

impl Channel {
    /// A socket that gets the notifications of these groups, with a receive buffer of (twice) this size.
    pub fn listener(protocol: isize, groups: &[u32], receive_buffer: usize) -> Result<Self, CmError> {
        let listener = Self::open(protocol)?;
        listener.set_receive_buffer(receive_buffer)?;
        for group in groups {
            let joined = listener.socket.add_membership(*group);
            joined.map_err(|e| CmError::io(format!("subscribing to netlink group {group}"), e))?;
        }
        Ok(listener)
    }

    /// A socket for requests.
    pub fn requester(protocol: isize) -> Result<Self, CmError> {
        let requester = Self::open(protocol)?;
        let set = |what: &str, result: io::Result<()>| result.map_err(|e| CmError::io(what, e));
        set("NETLINK_GET_STRICT_CHK", requester.socket.set_netlink_get_strict_chk(true))?;
        set("NETLINK_EXT_ACK", requester.socket.set_ext_ack(true))?;
        set("NETLINK_CAP_ACK", requester.socket.set_cap_ack(true))?;
        Ok(requester)
    }

    fn open(protocol: isize) -> Result<Self, CmError> {
        let open = || {
            let mut socket = Socket::new(protocol)?;
            let port = socket.bind_auto()?.port_number();
            socket.set_non_blocking(true)?;
            Ok(Self { socket, port, sequence: 0 })
        };
        open().map_err(|e| CmError::io("opening a netlink socket", e))
    }

    /// The number that messages about what it caused carry.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Sets the receive buffer beyond the administrator's limit if CM may do so, within it otherwise.
    fn set_receive_buffer(&self, bytes: usize) -> Result<(), CmError> {
        let value = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX / 2);
        // SAFETY: the pointer and length describe `value`, which lives across the call.
        let rc = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVBUFFORCE,
                (&raw const value).cast(),
                size_of_val(&value) as libc::socklen_t,
            )
        };
        if rc == 0 {
            return Ok(());
        }
        self.socket.set_rx_buf_sz(value).map_err(|e| CmError::io("setting a netlink receive buffer", e))
    }

    /// A buffer large enough for `receive`.
    pub fn buffer() -> Vec<u8> {
        vec![0; BUFFER]
    }

    /// Reads what the kernel sent at once, without waiting.
    pub fn receive(&self, buffer: &mut [u8]) -> Result<Received, CmError> {
        let size = buffer.len();
        let mut slice = buffer;
        match self.socket.recv(&mut slice, libc::MSG_TRUNC) {
            Ok(len) if len > size => Ok(Received::Overrun),
            Ok(len) => Ok(Received::Bytes(len)),
            Err(e) => match e.raw_os_error() {
                Some(libc::EAGAIN) => Ok(Received::Empty),
                Some(libc::ENOBUFS) => Ok(Received::Overrun),
                Some(libc::EINTR) => Ok(Received::Bytes(0)),
                _ => Err(CmError::io("reading a netlink socket", e)),
            },
        }
    }

    /// Asks for a dump; its messages will carry the sequence number given back.
    pub fn dump(&mut self, request: Request) -> Result<u32, CmError> {
        let mut bytes = Vec::new();
        let sequence = self.put(request.message_type(), NLM_F_REQUEST_DUMP, &request.payload(), &mut bytes);
        self.send(&bytes, || format!("asking for a {request:?} dump"))?;
        Ok(sequence)
    }

    /// Appends a request to those in `bytes`, to be sent together; gives the sequence number that its answers carry.
    pub fn put(&mut self, kind: u16, flags: u16, payload: &[u8], bytes: &mut Vec<u8>) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        put(kind, flags, self.sequence, payload, bytes);
        self.sequence
    }

    /// Sends requests; `what` is being done by them.
    pub fn send(&self, bytes: &[u8], what: impl FnOnce() -> String) -> Result<(), CmError> {
        let sent = self.socket.send_to(bytes, &SocketAddr::new(0, 0), 0);
        sent.map(drop).map_err(|e| CmError::io(what(), e))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Appends a message with a header to `bytes`, so that another may follow.
pub fn put(kind: u16, flags: u16, sequence: u32, payload: &[u8], bytes: &mut Vec<u8>) {
    const HEADER: usize = 16;
    let len = HEADER + payload.len();
    bytes.extend((len as u32).to_ne_bytes());
    bytes.extend([kind, flags].map(u16::to_ne_bytes).as_flattened());
    // From whom: the kernel knows.
    bytes.extend([sequence, 0].map(u32::to_ne_bytes).as_flattened());
    bytes.extend(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// A dump that CM can ask for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// Interfaces
    Links,
    /// Addresses
    Addresses(Family),
    /// Neighbours
    Neighbours(Family),
    /// Routes of all tables
    Routes(Family),
    /// Nexthop objects
    Nexthops,
    /// Settings per interface
    Netconf(Family),
}

impl Request {
    /// `nlmsg_type` of the request.
    pub fn message_type(self) -> u16 {
        match self {
            Request::Links => rtm::GETLINK,
            Request::Addresses(_) => rtm::GETADDR,
            Request::Neighbours(_) => rtm::GETNEIGH,
            Request::Routes(_) => rtm::GETROUTE,
            Request::Nexthops => rtm::GETNEXTHOP,
            Request::Netconf(_) => rtm::GETNETCONF,
        }
    }

    /// The fixed header of the request: family first, then zero but for (links) a filter attribute.
    pub fn payload(self) -> Vec<u8> {
        const IFLA_EXT_MASK: u16 = 29;
        const RTEXT_FILTER_SKIP_STATS: u32 = 8;
        let header = |family: u8, len: usize| {
            let mut header = vec![0; len];
            header[0] = family;
            header
        };
        match self {
            Request::Links => {
                let mut payload = header(0, 16);
                payload.extend(8u16.to_ne_bytes());
                payload.extend(IFLA_EXT_MASK.to_ne_bytes());
                payload.extend(RTEXT_FILTER_SKIP_STATS.to_ne_bytes());
                payload
            }
            Request::Addresses(family) => header(family_number(family), 8),
            Request::Neighbours(family) => header(family_number(family), 12),
            Request::Routes(family) => header(family_number(family), 12),
            Request::Nexthops => header(0, 8),
            Request::Netconf(family) => header(family_number(family), 4),
        }
    }
}

/// One netlink message.
pub struct Incoming<'a> {
    /// `nlmsg_type`
    pub kind: u16,
    /// `nlmsg_flags`
    pub flags: u16,
    /// `nlmsg_seq`
    pub sequence: u32,
    /// `nlmsg_pid`: the socket that asked, or caused what is told; 0 for none
    pub port: u32,
    /// What follows the header
    pub payload: &'a [u8],
}

/// The messages in what was received at once.
pub fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Result<Incoming<'_>, CmError>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let message = match NetlinkBuffer::new_checked(bytes) {
            Ok(message) => message,
            Err(e) => {
                bytes = &[];
                return Some(Err(CmError::decode("netlink message", e)));
            }
        };
        let len = message.length() as usize;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(Ok(Incoming {
            kind: message.message_type(),
            flags: message.flags(),
            sequence: message.sequence_number(),
            port: message.port_number(),
            payload: message.payload(),
        }))
    })
}

/// The error in the payload of NLMSG_ERROR or NLMSG_DONE, with the kernel's own words; None if it says success.
pub fn failure(what: impl Into<String>, message: &Incoming<'_>) -> Option<CmError> {
    let code = message.payload.first_chunk::<4>().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
    if code >= 0 {
        return None;
    }
    // An error repeats the request's header (only that, because of NETLINK_CAP_ACK) before its attributes.
    let skip = if message.kind == NLMSG_ERROR { 20 } else { 4 };
    let words = message.payload.get(skip..).filter(|_| message.flags & NLM_F_ACK_TLVS != 0).and_then(|bytes| {
        attrs("extended acknowledgement", bytes).flatten().find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG)
    });
    let ext = words.map(|(_, text)| String::from_utf8_lossy(text).trim_end_matches('\0').to_owned());
    Some(CmError::Kernel { what: what.into(), source: io::Error::from_raw_os_error(-code), ext })
}
