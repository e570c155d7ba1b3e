//! What Linux says about an interface that is to become a port.

use crate::error::{Error, Result};
use crate::ethtool::Ethtool;
use crate::netlink::ask;
use crate::{program, sys};
use netlink_packet_core::NLM_F_DUMP;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage, LinkXdp, XdpAttached};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;

/// An interface of this thread's network namespace.
pub struct Interface {
    /// Index
    pub index: u32,
    /// Name
    pub name: String,
    /// Driver, `unknown` if it does not say
    pub driver: String,
    /// The XDP program on it, if there is one
    pub xdp: Option<Attached>,
    /// For the driver's settings
    pub ethtool: Ethtool,
}

/// An XDP program found on an interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attached {
    /// Program id
    pub id: u32,
    /// Program name
    pub name: String,
    /// native, generic or offloaded
    pub mode: &'static str,
}

impl Attached {
    /// Whether it is one of this engine's, of whichever instance.
    pub fn is_ours(&self) -> bool {
        program::NAMES.contains(&self.name.as_str())
    }
}

impl Interface {
    /// The interface with this index.
    pub fn query(index: u32) -> Result<Self> {
        let link = get_link(index)?;
        let name = link
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name.clone()),
                _ => None,
            })
            .ok_or(Error::NoPort(index))?;
        let ethtool = Ethtool::open(&name).map_err(|e| Error::io(format!("open a socket for {name}"), e))?;
        let driver = ethtool.driver().unwrap_or_else(|_| "unknown".into());
        Ok(Self { index, driver, xdp: attached(&link), ethtool, name })
    }

    /// True for one end of a veth pair.
    pub fn is_veth(&self) -> bool {
        self.driver == "veth"
    }
}

/// Numbers of queues by which an interface receives and transmits. A driver that does not tell is taken to have one each.
pub fn queues(ifindex: u32) -> Result<(u32, u32)> {
    let interface = Interface::query(ifindex)?;
    match interface.ethtool.queues() {
        Ok((receiving, transmitting)) => Ok((receiving.max(1), transmitting.max(1))),
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok((1, 1)),
        Err(error) => Err(Error::io(format!("ask for the queues of {}", interface.name), error)),
    }
}

/// Frames that each veth of this thread's network namespace has dropped instead of transmitting.
pub fn dropped_by_veths() -> Result<BTreeMap<u32, u64>> {
    let mut request = LinkMessage::default();
    request.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth)]));
    let links = links(request, NLM_F_DUMP).map_err(|e| Error::io("ask for the veths' statistics", e))?;
    let dropped = |link: &LinkMessage| {
        link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Stats64(stats) => Some((link.header.index, stats.tx_dropped)),
            _ => None,
        })
    };
    Ok(links.iter().filter_map(dropped).collect())
}

fn get_link(index: u32) -> Result<LinkMessage> {
    let mut request = LinkMessage::default();
    request.header.index = index;
    let links = links(request, 0).map_err(|e| match e.raw_os_error() {
        Some(libc::ENODEV) => Error::NoPort(index),
        _ => Error::io(format!("ask for interface {index}"), e),
    })?;
    links.into_iter().next().ok_or(Error::NoPort(index))
}

/// Asks rtnetlink for interfaces.
fn links(request: LinkMessage, flags: u16) -> io::Result<Vec<LinkMessage>> {
    let answers = ask(RouteNetlinkMessage::GetLink(request), flags)?;
    let links = answers.into_iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewLink(link) => Some(link),
        _ => None,
    });
    Ok(links.collect())
}

fn attached(link: &LinkMessage) -> Option<Attached> {
    let xdp = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Xdp(xdp) => Some(xdp),
        _ => None,
    })?;
    let mode = xdp.iter().find_map(|attribute| match attribute {
        LinkXdp::Attached(XdpAttached::None) => None,
        LinkXdp::Attached(XdpAttached::SocketBuffer) => Some("generic"),
        LinkXdp::Attached(XdpAttached::Hardware) => Some("offloaded"),
        LinkXdp::Attached(_) => Some("native"),
        _ => None,
    })?;
    let id = xdp.iter().find_map(|attribute| match attribute {
        LinkXdp::ProgId(id) | LinkXdp::DrvProgId(id) | LinkXdp::SkbProgId(id) | LinkXdp::HwProgId(id) => Some(*id),
        _ => None,
    })?;
    Some(Attached { id, name: program_name(id).unwrap_or_else(|_| "without a name".into()), mode })
}

fn program_name(id: u32) -> io::Result<String> {
    let info = sys::program_info(sys::program_by_id(id)?.as_fd())?;
    Ok(info.name.iter().take_while(|&&c| c != 0).map(|&c| c as u8 as char).collect())
}
