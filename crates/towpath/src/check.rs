//! `towpath check`: an audit of the tables against Linux, address by address. Linux is asked anew; the daemon looks into the
//! tables that packets meet, not at what it remembers.

mod arrivals;

use crate::cli::Output;
use crate::control::{Arrival, Client, DESTINATIONS, Request};
use crate::explain::mac;
use crate::interfaces;
use crate::read::{all_pages, connect, json, write_out};
use crate::report::{self, Check, Destinations, Difference, Way};
use crate::text::table;
use anyhow::{Result, bail};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;
use towpath_cm::audit::{Linux, Neighbours};
use towpath_engine::Interface;
use towpath_fpc::{Hop, NeighbourKey, NexthopObjectKind, Prefix, Route, Via};
use towpath_tables::Reason;

/// What differs is asked for again so often, in case that it has only just changed.
const ATTEMPTS: usize = 5;
const PAUSE: Duration = Duration::from_millis(200);
const UNICAST: u8 = 1;
/// `RTNH_F_DEAD`
const DEAD: u32 = 1;

/// Compares, prints, and fails if there are differences.
pub fn run(output: Output) -> Result<()> {
    let mut client = connect()?;
    let status: report::Status = client.ask(&Request::Status)?;
    if status.remote {
        bail!(
            "the tables hold what Linux says on the cache manager's host, and this one's Linux cannot be compared with them"
        );
    }
    if !status.in_sync {
        bail!("the fast path is not in sync with Linux; see `towpath status`, and try again when it is");
    }
    let mut audit = Audit { client, linux: Linux::open()?, names: interfaces::all()?.into_iter().map(swap).collect() };
    let check = audit.run(&status)?;
    write_out(&if output.json { json(&check)? } else { text(&check) })?;
    match check.differences.len() {
        0 => Ok(()),
        1 => bail!("1 difference"),
        count => bail!("{count} differences"),
    }
}

struct Audit {
    client: Client,
    linux: Linux,
    names: HashMap<u32, String>,
}

/// Where Linux sends packets, as of now.
struct Now {
    neighbours: Neighbours,
    objects: HashMap<u32, NexthopObjectKind>,
}

/// What was found out about packets from one place.
#[derive(Default)]
struct Found {
    forwarded: u64,
    left_to_linux: BTreeMap<String, u64>,
    differences: Vec<Difference>,
}

impl Audit {
    fn run(&mut self, status: &report::Status) -> Result<Check> {
        let mut prefixes = self.linux.prefixes()?;
        let pages = |after| Request::Routes { within: None, after };
        for route in all_pages(pages, |page: report::Routes| (page.routes, page.next))? {
            prefixes.extend(parse(&route.prefix));
        }
        let mut now = self.now()?;
        let hosts = now.neighbours.keys().map(|key| key.address).filter(is_routed);
        let addresses: BTreeSet<IpAddr> = prefixes.iter().flat_map(|prefix| ends(*prefix)).chain(hosts).collect();
        let addresses: Vec<_> = addresses.into_iter().collect();
        let arrivals = arrivals::all(&status.ports, &self.linux.rules()?, &now.neighbours);
        let Found { forwarded, left_to_linux, differences } = self.audit(&addresses, None, &mut now)?;
        let (prefixes, count) = (prefixes.len() as u64, addresses.len() as u64);
        let mut check =
            Check { prefixes, addresses: count, forwarded, left_to_linux, arrivals: Vec::new(), differences };
        for arrival in arrivals {
            self.audit_arrival(&addresses, arrival, &mut now, &mut check)?;
        }
        check.differences.extend(status.ports.iter().filter_map(|port| without_program(port, status)));
        Ok(check)
    }

    fn now(&mut self) -> Result<Now> {
        Ok(Now { neighbours: self.linux.neighbours()?, objects: self.linux.objects()? })
    }

    /// Compares what becomes of packets that come in so, provided that Linux forwards any from there.
    fn audit_arrival(&mut self, all: &[IpAddr], arrival: Arrival, now: &mut Now, check: &mut Check) -> Result<()> {
        let addresses: Vec<_> = all.iter().filter(|address| can_arrive(**address, arrival)).copied().collect();
        if !self.is_believed(&addresses, arrival, now)? {
            return Ok(());
        }
        let found = self.audit(&addresses, Some(arrival), now)?;
        let left_to_linux = found.left_to_linux.values().sum();
        let (port, from) = (self.name(arrival.ifindex), arrival.source);
        check.arrivals.push(report::Arrival { port, from, forwarded: found.forwarded, left_to_linux });
        check.differences.extend(found.differences);
        Ok(())
    }

    /// Linux asks for the route back to the source wherever a packet goes to: so it takes packets to all addresses or none.
    fn is_believed(&mut self, addresses: &[IpAddr], arrival: Arrival, now: &Now) -> Result<bool> {
        for addresses in addresses.chunks(DESTINATIONS) {
            let routes = self.linux.routes(addresses, Some((arrival.ifindex, arrival.source)))?;
            if routes.iter().flatten().any(|route| !hops(route, now).is_empty()) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Compares all of these; again what differs, because it may have only just changed.
    fn audit(&mut self, addresses: &[IpAddr], arrival: Option<Arrival>, now: &mut Now) -> Result<Found> {
        let mut found = Found::default();
        let mut doubtful = self.compare(addresses, arrival, now, &mut found)?;
        for _ in 1..ATTEMPTS {
            if doubtful.is_empty() {
                break;
            }
            std::thread::sleep(PAUSE);
            *now = self.now()?;
            found.differences.clear();
            doubtful = self.compare(&doubtful, arrival, now, &mut found)?;
        }
        Ok(found)
    }

    /// Compares all of these once; gives those that differ.
    fn compare(
        &mut self,
        addresses: &[IpAddr],
        arrival: Option<Arrival>,
        now: &Now,
        found: &mut Found,
    ) -> Result<Vec<IpAddr>> {
        let mut doubtful = Vec::new();
        for addresses in addresses.chunks(DESTINATIONS) {
            let routes = self.linux.routes(addresses, arrival.map(|arrival| (arrival.ifindex, arrival.source)))?;
            let request = Request::Destinations { addresses: addresses.to_vec(), arrival };
            let Destinations { destinations } = self.client.ask(&request)?;
            for ((address, route), ways) in addresses.iter().zip(&routes).zip(&destinations) {
                match judge(*address, route.as_ref(), ways, now) {
                    Verdict::Same => found.forwarded += 1,
                    Verdict::Left(reason) => *found.left_to_linux.entry(reason).or_default() += 1,
                    Verdict::Differs => {
                        doubtful.push(*address);
                        let difference = self.difference(*address, route.as_ref(), ways, now);
                        let about = match arrival {
                            Some(Arrival { ifindex, source }) => {
                                format!("{} from {source} in by {}", difference.about, self.name(ifindex))
                            }
                            None => difference.about,
                        };
                        found.differences.push(Difference { about, ..difference });
                    }
                }
            }
        }
        Ok(doubtful)
    }

    fn name(&self, ifindex: u32) -> String {
        self.names.get(&ifindex).cloned().unwrap_or_else(|| format!("#{ifindex}"))
    }

    fn difference(&self, address: IpAddr, route: Option<&Route>, ways: &[Way], now: &Now) -> Difference {
        let to = |gateway: Option<IpAddr>, ifindex: u32, lladdr: Option<[u8; 6]>| {
            let at = lladdr.map_or_else(|| "no MAC address".into(), |bytes| mac(Some(bytes.as_slice())));
            format!("{} at {at}, out by {}", gateway.unwrap_or(address), self.name(ifindex))
        };
        let ours = ways.iter().map(|way| match &way.reason {
            Some(reason) => format!("to Linux ({reason})"),
            None => to(way.gateway, way.ifindex, way.lladdr),
        });
        let hops = route.map(|route| hops(route, now)).unwrap_or_default();
        let linux = hops.iter().map(|hop| to(hop.gateway, hop.ifindex, lladdr(hop, address, now)));
        Difference {
            about: address.to_string(),
            towpath: joined(ours).unwrap_or_else(|| "no route".into()),
            linux: joined(linux).unwrap_or_else(|| "does not forward it".into()),
        }
    }
}

#[derive(PartialEq, Eq, Debug)]
enum Verdict {
    /// Forwarded as Linux does
    Same,
    /// It goes to Linux, for this reason
    Left(String),
    Differs,
}

/// Whether packets to an address take Linux's way, as far as they are forwarded.
fn judge(address: IpAddr, route: Option<&Route>, ways: &[Way], now: &Now) -> Verdict {
    if ways.iter().all(|way| way.reason.is_some()) {
        let reason = ways.iter().find_map(|way| way.reason.clone());
        return Verdict::Left(reason.unwrap_or_else(|| Reason::NoRoute.name().into()));
    }
    let hops = route.map(|route| hops(route, now)).unwrap_or_default();
    let takes = |way: &Way| {
        let same = |hop: &&Hop| hop.ifindex == way.ifindex && gateway(hop, address) == way.gateway.unwrap_or(address);
        let hop = hops.iter().find(same);
        hop.is_some_and(|hop| way.lladdr.is_none() || lladdr(hop, address, now) == way.lladdr)
    };
    let (fast, left): (Vec<_>, Vec<_>) = ways.iter().partition(|way| way.reason.is_none());
    // With fewer next hops, the hash would choose others than Linux's.
    let whole = !left.is_empty() || fast.len() == hops.len();
    if whole && fast.into_iter().all(takes) { Verdict::Same } else { Verdict::Differs }
}

/// The next hops that Linux chooses among; none where it forwards nothing.
fn hops(route: &Route, now: &Now) -> Vec<Hop> {
    let all = match &route.via {
        _ if route.kind != UNICAST => Vec::new(),
        Via::Hops(hops) => hops.clone(),
        Via::Object(id) => objects_hops(*id, now),
    };
    let mut alive: Vec<_> = all.into_iter().filter(|hop| hop.flags & DEAD == 0).collect();
    let place = |hop: &Hop| (hop.ifindex, hop.gateway);
    alive.sort_by_key(place);
    alive.dedup_by_key(|hop| place(hop));
    alive
}

fn objects_hops(id: u32, now: &Now) -> Vec<Hop> {
    let hop = |id: u32| match now.objects.get(&id)? {
        NexthopObjectKind::Hop(hop) => Some(*hop),
        _ => None,
    };
    match now.objects.get(&id) {
        Some(NexthopObjectKind::Group(members)) => members.iter().filter_map(|(id, _)| hop(*id)).collect(),
        _ => hop(id).into_iter().collect(),
    }
}

fn gateway(hop: &Hop, address: IpAddr) -> IpAddr {
    hop.gateway.unwrap_or(address)
}

fn lladdr(hop: &Hop, address: IpAddr, now: &Now) -> Option<[u8; 6]> {
    let key = NeighbourKey { ifindex: hop.ifindex, address: gateway(hop, address) };
    now.neighbours.get(&key).copied().flatten()
}

/// A port that should have the program, and has none or another.
fn without_program(port: &report::Port, status: &report::Status) -> Option<Difference> {
    let wanted = status.program.as_ref()?.id;
    let ifindex = port.ifindex.filter(|_| !["vlan", "tunnel"].contains(&port.mode.as_str()))?;
    if port.served_by.as_deref().is_some_and(|by| by.contains(':')) {
        return None; // a wire: no program is on it
    }
    let found = Interface::query(ifindex).ok()?.xdp;
    let linux = match &found {
        Some(xdp) if xdp.id == wanted => return None,
        Some(xdp) => format!("runs XDP program {} ({})", xdp.id, xdp.name),
        None => "runs no XDP program".into(),
    };
    Some(Difference { about: format!("port {}", port.name), towpath: format!("runs XDP program {wanted}"), linux })
}

fn swap((name, ifindex): (String, u32)) -> (u32, String) {
    (ifindex, name)
}

fn joined(parts: impl Iterator<Item = String>) -> Option<String> {
    let parts: Vec<_> = parts.collect();
    (!parts.is_empty()).then(|| parts.join("; "))
}

fn parse(prefix: &str) -> Option<Prefix> {
    let (address, len) = prefix.split_once('/')?;
    Prefix::new(address.parse().ok()?, len.parse().ok()?)
}

/// The first and the last address of a prefix.
fn ends(prefix: Prefix) -> [IpAddr; 2] {
    let len = u32::from(prefix.prefix_len());
    let last = match prefix.address() {
        IpAddr::V4(first) => Ipv4Addr::from_bits(first.to_bits() | u32::MAX.checked_shr(len).unwrap_or(0)).into(),
        IpAddr::V6(first) => Ipv6Addr::from_bits(first.to_bits() | u128::MAX.checked_shr(len).unwrap_or(0)).into(),
    };
    [prefix.address(), last].map(forwarded)
}

/// The address, or for the two that nothing is ever forwarded to, whatever the routes, another one at that end.
fn forwarded(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::new(1, 0, 0, 0).into(),
        IpAddr::V4(Ipv4Addr::BROADCAST) => Ipv4Addr::new(223, 255, 255, 255).into(),
        _ => address,
    }
}

/// Whether packets to an address may be looked up that come in so. Those to groups are looked up in no root (and of them Linux
/// 6.18 answers with EMSGSIZE if a port is named); the loopback net is martian, whatever routes lead there, which the packet
/// path says before it looks (with `route_localnet` it is not, and then nothing is compared).
fn can_arrive(to: IpAddr, arrival: Arrival) -> bool {
    to.is_ipv4() == arrival.source.is_ipv4() && !to.is_multicast() && !to.is_loopback()
}

/// Whether a neighbour's address is one that packets are forwarded to.
fn is_routed(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !address.is_link_local() && !address.is_multicast() && !address.is_unspecified(),
        IpAddr::V6(address) => !address.is_unicast_link_local() && !address.is_multicast() && !address.is_unspecified(),
    }
}

fn text(check: &Check) -> String {
    let Check { prefixes, addresses, forwarded, .. } = check;
    let mut text = format!("{addresses} addresses in {prefixes} prefixes compared with Linux\n");
    let row = |what: String, count: &u64| vec![what, count.to_string()];
    let reasons = check.left_to_linux.iter().map(|(reason, count)| row(format!("left to Linux: {reason}"), count));
    let rows: Vec<_> = std::iter::once(row("forwarded as by Linux".into(), forwarded)).chain(reasons).collect();
    text += &table(&["what", ">addresses"], &rows);
    if !check.arrivals.is_empty() {
        let row = |arrival: &report::Arrival| {
            let counts = [arrival.forwarded, arrival.left_to_linux].map(|count| count.to_string());
            [vec![arrival.port.clone(), arrival.from.to_string()], counts.to_vec()].concat()
        };
        let rows: Vec<_> = check.arrivals.iter().map(row).collect();
        text += "the same by rules (ip rule)\n";
        text += &table(&["in by", "from", ">forwarded as by Linux", ">left to Linux"], &rows);
    }
    for Difference { about, towpath, linux } in &check.differences {
        text += &format!("{about}\n  the fast path: {towpath}\n  Linux: {linux}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_prefix_has_a_first_and_a_last_address() {
        let of = |text| ends(parse(text).unwrap()).map(|address| address.to_string());
        assert_eq!(of("10.1.0.0/16"), ["10.1.0.0", "10.1.255.255"]);
        assert_eq!(of("10.1.2.3/32"), ["10.1.2.3", "10.1.2.3"]);
        assert_eq!(
            of("0.0.0.0/0"),
            ["1.0.0.0", "223.255.255.255"],
            "Linux forwards nothing to the very first and last"
        );
        assert_eq!(of("2001:db8::/127"), ["2001:db8::", "2001:db8::1"]);
        assert_eq!(of("::/0"), ["::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"]);
    }

    fn hop(ifindex: u32, gateway: &str) -> Hop {
        Hop { ifindex, gateway: Some(address(gateway)), weight: 1, flags: 0 }
    }

    fn route(kind: u8, hops: &[Hop]) -> Route {
        let key = towpath_fpc::RouteKey {
            table: towpath_fpc::table::MAIN,
            prefix: parse("10.0.0.0/8").unwrap(),
            priority: 0,
            tos: 0,
        };
        Route { key, kind, protocol: 0, via: Via::Hops(hops.to_vec()), mtu: 0, unsupported: false }
    }

    fn way(ifindex: u32, gateway: &str, last: u8) -> Way {
        Way { ifindex, gateway: Some(address(gateway)), lladdr: Some([2, 0, 0, 0, 0, last]), reason: None }
    }

    #[test]
    fn only_linuxs_own_way_is_the_same() {
        let key = |ifindex, gateway| NeighbourKey { ifindex, address: address(gateway) };
        let at = |last| Some([2, 0, 0, 0, 0, last]);
        let neighbours = [(key(1, "192.0.2.1"), at(1)), (key(2, "192.0.2.2"), at(2)), (key(3, "10.0.0.1"), at(3))];
        let now = Now { neighbours: neighbours.into(), objects: HashMap::new() };
        let (one, two) = (hop(1, "192.0.2.1"), hop(2, "192.0.2.2"));
        let dead = Hop { flags: DEAD, ..two };
        let here = Hop { ifindex: 3, gateway: None, weight: 1, flags: 0 };
        let (first, second) = (way(1, "192.0.2.1", 1), way(2, "192.0.2.2", 2));
        let (alone, both) = ([first.clone()], [second.clone(), first]);
        let judged = |hops: &[Hop], ways: &[Way]| judge(address("10.0.0.1"), Some(&route(UNICAST, hops)), ways, &now);
        assert_eq!(judged(&[one], &alone), Verdict::Same);
        assert_eq!(judged(&[one, two], &both), Verdict::Same);
        assert_eq!(judged(&[one, dead], &alone), Verdict::Same);
        assert_eq!(judged(&[here], &[way(3, "10.0.0.1", 3)]), Verdict::Same, "on the link");
        assert_eq!(judged(&[one, two], &alone), Verdict::Differs, "one is missing");
        assert_eq!(judged(&[one], &both), Verdict::Differs, "one too many");
        assert_eq!(judged(&[two], &alone), Verdict::Differs, "another gateway");
        assert_eq!(judged(&[one], &[way(2, "192.0.2.1", 1)]), Verdict::Differs, "another port");
        assert_eq!(judged(&[one], &[way(1, "192.0.2.1", 9)]), Verdict::Differs, "another MAC address");
        assert_eq!(judge(address("10.0.0.1"), None, &alone, &now), Verdict::Differs, "no route");
        let discarded = route(6, &[one]);
        assert_eq!(judge(address("10.0.0.1"), Some(&discarded), &alone, &now), Verdict::Differs, "a black hole");
        let left = Way { reason: Some("no-neighbour".into()), ..second };
        assert_eq!(judged(&[one], &[left]), Verdict::Left("no-neighbour".into()));
        assert_eq!(judged(&[one], &[]), Verdict::Left("no-route".into()));
    }
}
