//! RTM_NEWROUTE, RTM_DELROUTE (include/uapi/linux/rtnetlink.h).

use super::{address, attrs, family, fixed, int16, int32, split};
use crate::error::CmError;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use towpath_fpc::{Hop, Prefix, Route, RouteKey, Via};
use towpath_tables::record::Family;

const WHAT: &str = "route message";
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_METRICS: u16 = 8;
const RTA_MULTIPATH: u16 = 9;
const RTA_FLOW: u16 = 11;
const RTA_TABLE: u16 = 15;
const RTA_MARK: u16 = 16;
const RTA_VIA: u16 = 18;
const RTA_NEWDST: u16 = 19;
const RTA_ENCAP_TYPE: u16 = 21;
const RTA_ENCAP: u16 = 22;
const RTA_NH_ID: u16 = 30;

const RTM_F_CLONED: u32 = 0x200;
/// The next hop's flags within `rtm_flags` (RTNH_F_*).
const RTNH_FLAGS: u32 = 0xff;
const RTN_MULTICAST: u8 = 5;

const RTAX_LOCK: u16 = 1;
const RTAX_MTU: u16 = 2;
/// Highest metric known (RTAX_FASTOPEN_NO_COOKIE); apart from the MTU they concern local sockets only.
const RTAX_KNOWN: u16 = 17;

/// One route of the kernel. Several may share a key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KernelRoute {
    /// As FPM is to see it if it is alone under its key
    pub route: Route,
    /// Its next hops came as RTA_MULTIPATH (those of IPv6 are sorted)
    pub multipath: bool,
    /// For sources of a prefix only
    pub source_specific: bool,
}

/// The route in a message; None for cached routes and other families.
pub fn parse(payload: &[u8]) -> Result<Option<KernelRoute>, CmError> {
    let (header, rest) = split::<12>(WHAT, payload)?;
    let [number, len, src_len, tos, table, protocol, _scope, kind, f0, f1, f2, f3] = *header;
    let flags = u32::from_ne_bytes([f0, f1, f2, f3]);
    let Some(family) = family(number) else { return Ok(None) };
    if flags & RTM_F_CLONED != 0 {
        return Ok(None);
    }
    let mut destination = match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        Family::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let mut hop = Hop { ifindex: 0, gateway: None, weight: 1, flags: flags & RTNH_FLAGS };
    let (mut table, mut priority, mut mtu) = (u32::from(table), 0, 0);
    let (mut object, mut multipath) = (None, None);
    let mut unsupported = src_len != 0;
    for attr in attrs(WHAT, rest) {
        let (attribute, value) = attr?;
        match attribute {
            RTA_DST => destination = address(WHAT, value)?,
            RTA_OIF => hop.ifindex = int32(WHAT, value)?,
            RTA_GATEWAY => hop.gateway = Some(address(WHAT, value)?),
            RTA_VIA => hop.gateway = Some(via(value)?),
            RTA_PRIORITY => priority = int32(WHAT, value)?,
            RTA_TABLE => table = int32(WHAT, value)?,
            RTA_NH_ID => object = Some(int32(WHAT, value)?),
            RTA_METRICS => unsupported |= !metrics(value, &mut mtu)?,
            RTA_MULTIPATH => multipath = Some(hops(value, &mut unsupported)?),
            // An lwtunnel type of 0 is none.
            RTA_ENCAP_TYPE => unsupported |= int16(WHAT, value)? != 0,
            RTA_ENCAP | RTA_FLOW | RTA_MARK | RTA_NEWDST => unsupported = true,
            _ => {}
        }
    }
    let prefix = Prefix::new(destination, len)
        .ok_or_else(|| CmError::decode(WHAT, format!("{destination}/{len}: bad length")))?;
    if prefix.family() != family {
        return Err(CmError::decode(WHAT, format!("{destination}: not an address of the route's family")));
    }
    let is_multipath = multipath.is_some();
    if let (Family::V6, Some(hops)) = (family, &mut multipath) {
        // A dump begins with the oldest sibling, a notification with the one that changed; Linux attaches no meaning
        // to it.
        hops.sort_by_key(|hop| (hop.ifindex, hop.gateway));
    }
    let via = match (object, multipath) {
        (Some(id), _) => Via::Object(id),
        _ if kind > RTN_MULTICAST => Via::Hops(Vec::new()),
        (None, Some(hops)) => Via::Hops(hops),
        (None, None) => Via::Hops(vec![hop]),
    };
    let key = RouteKey { table, prefix, priority, tos };
    let route = Route { key, kind, protocol, via, mtu, unsupported };
    Ok(Some(KernelRoute { route, multipath: is_multipath, source_specific: src_len != 0 }))
}

/// `struct rtvia`: family, then the address.
fn via(value: &[u8]) -> Result<IpAddr, CmError> {
    address(WHAT, value.get(2..).unwrap_or_default())
}

/// Reads RTA_METRICS; false if one of them matters to forwarding and is not the plain MTU.
fn metrics(value: &[u8], mtu: &mut u32) -> Result<bool, CmError> {
    let mut plain = true;
    for attr in attrs(WHAT, value) {
        match attr? {
            (RTAX_MTU, value) => *mtu = int32(WHAT, value)?,
            // A locked MTU makes forwarding look at learned path MTUs (net/ipv4/ip_output.c, ip_dst_mtu_maybe_forward).
            (RTAX_LOCK, value) => plain &= int32(WHAT, value)? & (1 << RTAX_MTU) == 0,
            (metric, _) => plain &= metric <= RTAX_KNOWN,
        }
    }
    Ok(plain)
}

/// The hops in RTA_MULTIPATH: `struct rtnexthop` (length, flags, weight - 1, interface), each with attributes.
fn hops(mut bytes: &[u8], unsupported: &mut bool) -> Result<Vec<Hop>, CmError> {
    let mut hops = Vec::new();
    while !bytes.is_empty() {
        let (header, _) = split::<8>(WHAT, bytes)?;
        let [l0, l1, flags, weight, i0, i1, i2, i3] = *header;
        let len = usize::from(u16::from_ne_bytes([l0, l1]));
        let rest = bytes.get(8..len).ok_or_else(|| CmError::decode(WHAT, "next hop runs over its end"))?;
        let mut hop = Hop {
            ifindex: u32::from_ne_bytes([i0, i1, i2, i3]),
            gateway: None,
            weight: u16::from(weight) + 1,
            flags: u32::from(flags),
        };
        for attr in attrs(WHAT, rest) {
            match attr? {
                (RTA_GATEWAY, value) => hop.gateway = Some(address(WHAT, value)?),
                (RTA_VIA, value) => hop.gateway = Some(via(value)?),
                (RTA_ENCAP_TYPE, value) => *unsupported |= u16::from_ne_bytes(fixed(WHAT, value)?) != 0,
                (RTA_ENCAP | RTA_FLOW | RTA_NEWDST, _) => *unsupported = true,
                _ => {}
            }
        }
        hops.push(hop);
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(hops)
}
