//! Linux's own answers, asked anew: what an audit of the tables compares them with. Nothing here is remembered from
//! notifications.

use crate::decode::{self, family_number, rtm};
use crate::error::CmError;
use crate::guard::nl::Netlink;
use netlink_sys::protocols::NETLINK_ROUTE;
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::IpAddr;
use towpath_fpc::{NeighbourKey, NexthopObject, NexthopObjectKind, Prefix, Route};
use towpath_tables::record::Family;

const WHAT: &str = "audit";
/// Questions sent at once: their answers fit the socket's buffer.
const AT_ONCE: usize = 16;
/// `RTM_F_FIB_MATCH`: the answer is the route itself, not what one packet would do (Linux 4.13)
const FIB_MATCH: u32 = 0x2000;
const RTA_DST: u16 = 1;
const MAIN: u32 = 254;
const LOCAL: u32 = 255;

/// A socket for questions to the thread's network namespace.
pub struct Linux(Netlink);

/// The link-layer addresses that Linux would send to.
pub type Neighbours = HashMap<NeighbourKey, Option<[u8; 6]>>;

impl Linux {
    /// Opens one.
    pub fn open() -> Result<Self, CmError> {
        Netlink::open(NETLINK_ROUTE).map(Self).map_err(|e| CmError::io("audit: netlink socket", e))
    }

    /// Every prefix of the tables main and local.
    pub fn prefixes(&mut self) -> Result<BTreeSet<Prefix>, CmError> {
        let mut all = BTreeSet::new();
        for family in Family::ALL {
            let mut header = [0; 12];
            header[0] = family_number(family);
            all.extend(self.0.dump(WHAT, rtm::GETROUTE, &header, |message| {
                let route = decode::route::parse(message.payload)?.map(|route| route.route.key);
                Ok(route.filter(|key| [MAIN, LOCAL].contains(&key.table)).map(|key| key.prefix))
            })?);
        }
        Ok(all)
    }

    /// The route that Linux takes to each address; None where it has none, or one that forwards nothing.
    pub fn routes(&mut self, addresses: &[IpAddr]) -> Result<Vec<Option<Route>>, CmError> {
        let mut routes = Vec::with_capacity(addresses.len());
        for some in addresses.chunks(AT_ONCE) {
            let begin = routes.len();
            routes.resize(begin + some.len(), None);
            let questions: Vec<_> = some.iter().map(question).collect();
            self.0.batch(WHAT, rtm::GETROUTE, 0, &questions, |number, answer| {
                routes[begin + number] = match answer {
                    Ok(message) => decode::route::parse(message.payload)?.map(|route| route.route),
                    Err(CmError::Kernel { source, .. }) if is_no_route(&source) => None,
                    Err(error) => return Err(error),
                };
                Ok(())
            })?;
        }
        Ok(routes)
    }

    /// All neighbours.
    pub fn neighbours(&mut self) -> Result<Neighbours, CmError> {
        let mut all = Neighbours::new();
        for family in Family::ALL {
            let mut header = [0; 12];
            header[0] = family_number(family);
            let found =
                self.0.dump(WHAT, rtm::GETNEIGH, &header, |message| decode::neighbour::parse(message.payload))?;
            all.extend(found.into_iter().map(|neighbour| (neighbour.key, neighbour.lladdr)));
        }
        Ok(all)
    }

    /// The nexthop objects.
    pub fn objects(&mut self) -> Result<HashMap<u32, NexthopObjectKind>, CmError> {
        let found =
            self.0.dump(WHAT, rtm::GETNEXTHOP, &[0; 8], |message| decode::nexthop::parse(message.payload).map(Some))?;
        Ok(found.into_iter().map(|NexthopObject { id, kind }| (id, kind)).collect())
    }
}

/// `struct rtmsg` and the address.
fn question(address: &IpAddr) -> Vec<u8> {
    let (family, bytes) = match address {
        IpAddr::V4(address) => (Family::V4, address.octets().to_vec()),
        IpAddr::V6(address) => (Family::V6, address.octets().to_vec()),
    };
    let mut body = vec![0; 8];
    (body[0], body[1]) = (family_number(family), bytes.len() as u8 * 8);
    body.extend(FIB_MATCH.to_ne_bytes());
    body.extend([4 + bytes.len() as u16, RTA_DST].map(u16::to_ne_bytes).as_flattened());
    body.extend(bytes);
    body
}

/// What Linux answers about unreachable, prohibited and black-holed destinations, and those without a route
/// (net/ipv4/fib_semantics.c `fib_props`).
fn is_no_route(error: &io::Error) -> bool {
    let codes = [libc::ENETUNREACH, libc::EHOSTUNREACH, libc::EACCES, libc::EINVAL, libc::EAGAIN];
    error.raw_os_error().is_some_and(|code| codes.contains(&code))
}
