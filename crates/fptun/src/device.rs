//! The device that packets with records are sent by. It is known again by its address, which it has from the first moment.

use crate::error::{Error, Result};
use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use std::io;
use towpath_wire::fptun::Record;

/// Name of the device.
pub const NAME: &str = "fptun";
const ADDRESS: [u8; 6] = *b"\x02fptun";
/// Devices that drop what is sent by them, in order of preference. An ifb drops what was not redirected to it.
const KINDS: [InfoKind; 2] = [InfoKind::Dummy, InfoKind::Ifb];
/// Any packet with its record.
const MTU: u32 = 0xffff + size_of::<Record>() as u32;

/// The device; it goes when this is dropped.
#[derive(Debug)]
pub struct Device {
    netlink: Netlink,
    index: u32,
}

impl Device {
    /// Makes it, in place of one that was left. It is down.
    pub fn make() -> Result<Self> {
        let mut netlink = Netlink::open()?;
        netlink.remove()?;
        for kind in KINDS {
            let mut device = LinkMessage::default();
            device.attributes = vec![
                LinkAttribute::IfName(NAME.into()),
                LinkAttribute::Address(ADDRESS.into()),
                LinkAttribute::Mtu(MTU),
                LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]),
            ];
            match netlink.ask(RouteNetlinkMessage::NewLink(device), NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL) {
                Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
                Err(e) if e.raw_os_error() == Some(libc::EEXIST) => return Err(Error::Taken),
                made => {
                    made.map_err(Error::io("make the device"))?;
                    let index = netlink.find()?.ok_or(Error::Taken)?;
                    return Ok(Self { netlink, index });
                }
            }
        }
        Err(Error::NoDevice)
    }

    /// Its interface index.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Takes it into use. Linux itself is to send nothing by it, so it gets no address while it comes up.
    pub fn start(&mut self) -> Result<()> {
        let mut quiet = self.change();
        let no_address = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        quiet.attributes = vec![LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![no_address])])];
        match self.netlink.set(quiet) {
            // A kernel without IPv6.
            Err(e) if e.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
            done => done.map_err(Error::io("keep IPv6 addresses from the device"))?,
        }
        let mut up = self.change();
        up.header.flags = LinkFlags::Up | LinkFlags::Noarp;
        up.header.change_mask = up.header.flags;
        self.netlink.set(up).map_err(Error::io("set the device up"))
    }

    fn change(&self) -> LinkMessage {
        let mut change = LinkMessage::default();
        change.header.index = self.index;
        change
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Err(error) = self.netlink.remove() {
            tracing::warn!("{error}");
        }
    }
}

/// Removes the device that a former process left in the calling thread's network namespace, if there is one.
pub fn remove() -> Result<()> {
    Netlink::open()?.remove()
}

/// A rtnetlink socket; it belongs to the namespace that it was opened in.
#[derive(Debug)]
struct Netlink(Socket);

impl Netlink {
    fn open() -> Result<Self> {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            Ok(Self(socket))
        };
        open().map_err(Error::io("open a netlink socket"))
    }

    /// Sends a request and gives the answer; None for a mere acknowledgement. Each has one.
    fn ask(&mut self, request: RouteNetlinkMessage, flags: u16) -> io::Result<Option<LinkMessage>> {
        let mut request = NetlinkMessage::from(request);
        request.header.flags = NLM_F_REQUEST | flags;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.0.send(&bytes, 0)?;
        let (answer, _) = self.0.recv_from_full()?;
        match NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer).map_err(io::Error::other)?.payload {
            NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => Ok(Some(link)),
            _ => Ok(None),
        }
    }

    fn set(&mut self, change: LinkMessage) -> io::Result<()> {
        self.ask(RouteNetlinkMessage::SetLink(change), NLM_F_ACK).map(drop)
    }

    /// Index of our device; None if there is none.
    fn find(&mut self) -> Result<Option<u32>> {
        let mut wanted = LinkMessage::default();
        wanted.attributes = vec![LinkAttribute::IfName(NAME.into())];
        let found = match self.ask(RouteNetlinkMessage::GetLink(wanted), 0) {
            Err(e) if e.raw_os_error() == Some(libc::ENODEV) => return Ok(None),
            found => found.map_err(Error::io("look for the device"))?,
        };
        let Some(link) = found else { return Ok(None) };
        let ours = |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::Address(a) if *a == ADDRESS);
        Ok(link.attributes.iter().any(ours).then_some(link.header.index))
    }

    fn remove(&mut self) -> Result<()> {
        let Some(index) = self.find()? else { return Ok(()) };
        let mut device = LinkMessage::default();
        device.header.index = index;
        self.ask(RouteNetlinkMessage::DelLink(device), NLM_F_ACK).map(drop).map_err(Error::io("remove the device"))
    }
}
