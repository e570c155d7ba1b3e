//! Kernel messages into FPC objects. One file per object; all read attributes by `attrs`, without allocation, because
//! a million of them pass at start. What is malformed is an error, what is unknown and harmless is skipped, and what
//! is unknown and could change the way of a packet makes the object `unsupported`.

pub mod address;
pub mod link;
pub mod neighbour;
pub mod netconf;
pub mod nexthop;
pub mod route;

use crate::error::CmError;
use netlink_packet_core::NlasIterator;
use std::net::IpAddr;
use towpath_tables::record::Family;

/// The `nlmsg_type` values that CM understands (include/uapi/linux/rtnetlink.h).
pub mod rtm {
    #![allow(missing_docs)]
    pub const NEWLINK: u16 = 16;
    pub const DELLINK: u16 = 17;
    pub const GETLINK: u16 = 18;
    pub const NEWADDR: u16 = 20;
    pub const DELADDR: u16 = 21;
    pub const GETADDR: u16 = 22;
    pub const NEWROUTE: u16 = 24;
    pub const DELROUTE: u16 = 25;
    pub const GETROUTE: u16 = 26;
    pub const NEWNEIGH: u16 = 28;
    pub const DELNEIGH: u16 = 29;
    pub const GETNEIGH: u16 = 30;
    pub const NEWNETCONF: u16 = 80;
    pub const DELNETCONF: u16 = 81;
    pub const GETNETCONF: u16 = 82;
    pub const NEWNEXTHOP: u16 = 104;
    pub const DELNEXTHOP: u16 = 105;
    pub const GETNEXTHOP: u16 = 106;
}

/// The family of an address family number of the kernel.
pub fn family(number: u8) -> Option<Family> {
    match i32::from(number) {
        libc::AF_INET => Some(Family::V4),
        libc::AF_INET6 => Some(Family::V6),
        _ => None,
    }
}

/// The kernel's number of a family.
pub fn family_number(family: Family) -> u8 {
    match family {
        Family::V4 => libc::AF_INET as u8,
        Family::V6 => libc::AF_INET6 as u8,
    }
}

/// The type and value of each attribute in `bytes`.
pub fn attrs<'a>(what: &'static str, bytes: &'a [u8]) -> impl Iterator<Item = Result<(u16, &'a [u8]), CmError>> {
    NlasIterator::new(bytes).map(move |nla| {
        let nla = nla.map_err(|e| CmError::decode(what, e))?;
        let (kind, len) = (nla.kind(), usize::from(nla.length()));
        let value = nla.into_inner().get(4..len).ok_or_else(|| CmError::decode(what, "attribute runs over its end"))?;
        Ok((kind, value))
    })
}

/// A fixed header of `N` bytes and the attributes behind it.
pub fn split<'a, const N: usize>(what: &'static str, payload: &'a [u8]) -> Result<(&'a [u8; N], &'a [u8]), CmError> {
    payload
        .split_first_chunk::<N>()
        .ok_or_else(|| CmError::decode(what, format!("{} bytes are too few", payload.len())))
}

/// The value of an attribute as an integer in the machine's byte order.
pub fn int32(what: &'static str, value: &[u8]) -> Result<u32, CmError> {
    fixed(what, value).map(u32::from_ne_bytes)
}

/// The value of an attribute as an integer in the machine's byte order.
pub fn int16(what: &'static str, value: &[u8]) -> Result<u16, CmError> {
    fixed(what, value).map(u16::from_ne_bytes)
}

/// The value of an attribute as bytes of fixed length.
pub fn fixed<const N: usize>(what: &'static str, value: &[u8]) -> Result<[u8; N], CmError> {
    value.try_into().map_err(|_| CmError::decode(what, format!("attribute of {} bytes instead of {N}", value.len())))
}

/// The value of an attribute as an address: four bytes are IPv4, sixteen IPv6.
pub fn address(what: &'static str, value: &[u8]) -> Result<IpAddr, CmError> {
    match value.len() {
        4 => fixed::<4>(what, value).map(IpAddr::from),
        _ => fixed::<16>(what, value).map(IpAddr::from),
    }
}
