//! Reporting to the Linux of the calling thread's network namespace.

use crate::{Refresh, RefreshError};
use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use towpath_fpc::NeighbourKey;

/// The kernel answers within the system call; waiting longer means that it will not.
const PATIENCE_SECONDS: libc::time_t = 5;

/// Reports hits by a rtnetlink socket.
///
/// A report takes permanence and the mark of a foreign control plane from an entry, and asks for an entry that is not
/// there (neigh_add, __neigh_update). So each entry is looked at first, only entries that Linux itself keeps alive by
/// probing are reported, and none is ever created.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// A socket in the calling thread's network namespace.
    pub fn open() -> Result<Self, RefreshError> {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            set_receive_timeout(&socket)?;
            Ok(socket)
        };
        Ok(Self { socket: open().map_err(RefreshError::Socket)?, sequence: 0, buffer: Vec::new() })
    }

    /// The entry of a neighbour; None if Linux has none.
    fn look_up(&mut self, neighbour: &NeighbourKey) -> io::Result<Option<NeighbourMessage>> {
        match self.ask(RouteNetlinkMessage::GetNeighbour(message(neighbour, NeighbourFlags::empty())), NLM_F_REQUEST) {
            Ok(entry) => Ok(entry),
            Err(error) if is_gone(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn report(&mut self, neighbour: &NeighbourKey) -> io::Result<()> {
        let Some(flags) = self.look_up(neighbour)?.as_ref().and_then(report_flags) else { return Ok(()) };
        // Without NLM_F_CREATE an entry that vanished meanwhile stays away.
        let used = RouteNetlinkMessage::NewNeighbour(message(neighbour, flags));
        match self.ask(used, NLM_F_REQUEST | NLM_F_ACK) {
            Err(error) if !is_gone(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Sends a request and waits for the answer; None for a mere acknowledgement.
    fn ask(&mut self, request: RouteNetlinkMessage, flags: u16) -> io::Result<Option<NeighbourMessage>> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut request = NetlinkMessage::from(request);
        request.header.flags = flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        self.buffer.resize(request.buffer_len(), 0);
        request.serialize(&mut self.buffer);
        self.socket.send(&self.buffer, 0)?;
        loop {
            let (answer, _) = self.socket.recv_from_full()?;
            let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer).map_err(io::Error::other)?;
            if answer.header.sequence_number != self.sequence {
                continue;
            }
            return match answer.payload {
                NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(entry)) => Ok(Some(entry)),
                _ => Ok(None),
            };
        }
    }
}

impl Refresh for Netlink {
    fn refresh(&mut self, neighbours: &[NeighbourKey]) -> Result<(), RefreshError> {
        neighbours.iter().try_for_each(|neighbour| {
            self.report(neighbour).map_err(|cause| RefreshError::Refused { neighbour: *neighbour, cause })
        })
    }
}

fn message(neighbour: &NeighbourKey, flags: NeighbourFlags) -> NeighbourMessage {
    let (family, address) = match neighbour.address {
        IpAddr::V4(address) => (AddressFamily::Inet, NeighbourAddress::Inet(address)),
        IpAddr::V6(address) => (AddressFamily::Inet6, NeighbourAddress::Inet6(address)),
    };
    let mut message = NeighbourMessage::default();
    message.header.family = family;
    message.header.ifindex = neighbour.ifindex;
    message.header.flags = flags;
    message.attributes.push(NeighbourAttribute::Destination(address));
    message
}

/// The flags to report an entry as used with, so that its own stay what they are; None if it must be left alone:
/// permanent and unprobed entries need nothing and would lose that state, managed ones are probed anyhow, and those
/// that are not valid are for packets to resolve.
fn report_flags(entry: &NeighbourMessage) -> Option<NeighbourFlags> {
    use NeighbourState::{Delay, Probe, Reachable, Stale};
    let probed = matches!(entry.header.state, Reachable | Stale | Delay | Probe);
    let managed = entry.attributes.iter().any(
        |attribute| matches!(attribute, NeighbourAttribute::ExtFlags(flags) if flags.contains(NeighbourExtFlags::Managed)),
    );
    (probed && !managed).then_some(NeighbourFlags::Use | entry.header.flags & NeighbourFlags::ExtLearned)
}

/// The entry, or its interface, is no longer there.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

fn set_receive_timeout(socket: &Socket) -> io::Result<()> {
    let timeout = libc::timeval { tv_sec: PATIENCE_SECONDS, tv_usec: 0 };
    // SAFETY: the pointer and length describe `timeout`, which lives across the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const timeout).cast(),
            size_of_val(&timeout) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
