//! Linux's own answers, asked anew: what an audit of the tables compares them with. Nothing here is remembered from
//! notifications.

use crate::decode::link::Link;
use crate::decode::{self, rtm};
use crate::error::CmError;
use crate::guard::dump_rules;
use crate::guard::nl::{Message, Netlink};
use crate::netlink::Request;
use netlink_packet_core::Emitable;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::IpAddr;
use towpath_fpc::{NeighbourKey, NexthopObject, NexthopObjectKind, Prefix, Route, Rule};
use towpath_tables::record::Family;

const WHAT: &str = "audit";
/// Questions sent at once: their answers fit the socket's buffer.
const AT_ONCE: usize = 16;

/// A socket for questions to the thread's network namespace.
pub struct Linux(Netlink);

/// The link-layer addresses that Linux would send to.
pub type Neighbours = HashMap<NeighbourKey, Option<[u8; 6]>>;

impl Linux {
    /// Opens one.
    pub fn open() -> Result<Self, CmError> {
        Netlink::open(NETLINK_ROUTE).map(Self).map_err(|e| CmError::io("audit: netlink socket", e))
    }

    /// Every prefix of every table.
    pub fn prefixes(&mut self) -> Result<BTreeSet<Prefix>, CmError> {
        let mut all = BTreeSet::new();
        for family in Family::ALL {
            all.extend(self.dump(Request::Routes(family), |message| {
                Ok(decode::route::parse(message.payload)?.map(|route| route.route.key.prefix))
            })?);
        }
        Ok(all)
    }

    /// The rules of both families, in the order in which they are tried.
    pub fn rules(&mut self) -> Result<Vec<(Family, Vec<Rule>)>, CmError> {
        Family::ALL.into_iter().map(|family| Ok((family, dump_rules(&mut self.0, family)?))).collect()
    }

    /// The route that Linux takes to each address, for packets of its own, or for those that come in by an interface from
    /// an address of the same family (or, in IPv6, from none). None where it has none, or one that forwards nothing, or
    /// does not believe the source.
    pub fn routes(
        &mut self,
        addresses: &[IpAddr],
        arrival: Option<(u32, IpAddr)>,
    ) -> Result<Vec<Option<Route>>, CmError> {
        let mut routes = Vec::with_capacity(addresses.len());
        for some in addresses.chunks(AT_ONCE) {
            let begin = routes.len();
            routes.resize(begin + some.len(), None);
            let questions: Vec<_> = some.iter().map(|address| question(*address, arrival)).collect();
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

    /// An interface; None if there is none with this index.
    pub fn link(&mut self, ifindex: u32) -> Result<Option<Link>, CmError> {
        let mut message = LinkMessage::default();
        message.header.index = ifindex;
        let mut found = None;
        self.0.batch(WHAT, rtm::GETLINK, 0, &[bytes(&message)], |_, answer| {
            found = match answer {
                Ok(message) => decode::link::parse(message.payload)?,
                Err(CmError::Kernel { source, .. }) if source.raw_os_error() == Some(libc::ENODEV) => None,
                Err(error) => return Err(error),
            };
            Ok(())
        })?;
        Ok(found)
    }

    /// All neighbours.
    pub fn neighbours(&mut self) -> Result<Neighbours, CmError> {
        let mut all = Neighbours::new();
        for family in Family::ALL {
            let found = self.dump(Request::Neighbours(family), |message| decode::neighbour::parse(message.payload))?;
            all.extend(found.into_iter().map(|neighbour| (neighbour.key, neighbour.lladdr)));
        }
        Ok(all)
    }

    /// The nexthop objects.
    pub fn objects(&mut self) -> Result<HashMap<u32, NexthopObjectKind>, CmError> {
        let found = self.dump(Request::Nexthops, |message| decode::nexthop::parse(message.payload).map(Some))?;
        Ok(found.into_iter().map(|NexthopObject { id, kind }| (id, kind)).collect())
    }

    fn dump<T>(
        &mut self,
        request: Request,
        decode: impl FnMut(Message<'_>) -> Result<Option<T>, CmError>,
    ) -> Result<Vec<T>, CmError> {
        self.0.dump(WHAT, request.message_type(), &request.payload(), decode)
    }
}

/// Asks for the route itself, not what one packet would do (Linux 4.13).
fn question(address: IpAddr, arrival: Option<(u32, IpAddr)>) -> Vec<u8> {
    let (family, bits) = if address.is_ipv4() { (AddressFamily::Inet, 32) } else { (AddressFamily::Inet6, 128) };
    let mut message = RouteMessage::default();
    message.header.address_family = family;
    message.header.destination_prefix_length = bits;
    message.header.flags = RouteFlags::FibMatch;
    message.attributes.push(RouteAttribute::Destination(address.into()));
    if let Some((ifindex, source)) = arrival {
        message.attributes.push(RouteAttribute::Iif(ifindex));
        if !source.is_unspecified() {
            message.header.source_prefix_length = bits;
            message.attributes.push(RouteAttribute::Source(source.into()));
        }
    }
    bytes(&message)
}

fn bytes(message: &impl Emitable) -> Vec<u8> {
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    bytes
}

/// What Linux answers about unreachable, prohibited and black-holed destinations, those without a route
/// (net/ipv4/fib_semantics.c `fib_props`), and sources that it drops (net/ipv4/fib_frontend.c `fib_validate_source`).
fn is_no_route(error: &io::Error) -> bool {
    let codes = [libc::ENETUNREACH, libc::EHOSTUNREACH, libc::EACCES, libc::EINVAL, libc::EAGAIN, libc::EXDEV];
    error.raw_os_error().is_some_and(|code| codes.contains(&code))
}
