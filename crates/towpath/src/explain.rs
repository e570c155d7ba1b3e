//! `explain`: sends a made-up packet through the very pipeline that the engine runs, over the same tables, and puts
//! names to what decides. The verdict is the pipeline's; only the words around it are made here.

use crate::control::Packet;
use crate::frame::{Link, build, tunnelled};
use crate::report::{Explanation, Step, Verdict};
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use towpath_fpc::{Policy, Scope, Tunnel};
use towpath_pipeline::filters;
use towpath_pipeline::mapped::Mapped;
use towpath_pipeline::packet;
use towpath_pipeline::roots;
use towpath_pipeline::{Candidate, Entry, Frame, Parsed, Refusal, SlotSet, Stop, Tables, parse, rewrite, route};
use towpath_tables::backing::View;
use towpath_tables::flow::Direction;
use towpath_tables::flows::{self, FlowView};
use towpath_tables::lpm::{self, Kind};
use towpath_tables::mapping::{Service, Way};
use towpath_tables::mappings;
use towpath_tables::nexthop::NexthopIdentity;
use towpath_tables::record::{Family, PORT_SLOTS, Port};
use towpath_tables::writer::MAIN_ROOT;
use towpath_tables::{Reason, Tuple};

/// Room before the frame, as drivers leave it.
pub const HEADROOM: usize = 256;

/// What is known about the objects in the tables, for people.
pub trait Names {
    /// Name of an interface
    fn interface(&self, ifindex: u32) -> String;
    /// The route that Linux has for a destination
    fn route(&self, destination: IpAddr) -> Option<String>;
    /// The neighbour entry for an address on an interface
    fn neighbour(&self, ifindex: u32, address: IpAddr) -> Option<String>;
    /// Settings of Linux that stand in the way
    fn policies(&self) -> Vec<&Policy>;
    /// Whether a policy about an interface is about the packets of a port
    fn is_about(&self, interface: u32, port: u32) -> bool;
    /// The operator's filter of a number
    fn filter(&self, number: u32) -> Option<String>;
    /// Captures that take what their filters match before anything else
    fn filters(&self) -> Vec<&Policy>;
    /// A setting of an interface alone that the fast path does not repeat
    fn unsupported(&self, ifindex: u32) -> Option<String>;
    /// The tunnel that an interface is
    fn tunnel(&self, ifindex: u32) -> Option<Tunnel>;
    /// The VRF that an interface belongs to, and its table
    fn vrf(&self, ifindex: u32) -> Option<String>;
    /// Why nothing can be redirected to an interface
    fn cannot_transmit(&self, ifindex: u32) -> Option<String>;
    /// Why packets that come in by an interface cannot take the fast path
    fn why_not(&self, ifindex: u32) -> Option<String>;
}

/// Where the packet comes in.
pub struct Ingress {
    /// The interface whose driver receives it
    pub device: u32,
    /// The port it is meant for: the device or a VLAN sub-interface of it
    pub port: u32,
    /// VLAN tags on the wire, outermost first
    pub tags: Vec<(u16, u16)>,
    /// MAC address of the port that the frame is meant for
    pub mac: [u8; 6],
    /// The tunnel that the packet comes out of, if it does
    pub tunnel: Option<Tunnel>,
    /// Why this port
    pub because: String,
}

/// What is said of a packet: its ends, those inside if it is in a tunnel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Subject {
    /// Addresses, protocol and ports
    pub tuple: Tuple,
    /// TTL or hop limit
    pub ttl: u8,
}

impl From<&Packet> for Subject {
    fn from(packet: &Packet) -> Self {
        let Packet { source, destination, sport, dport, protocol, ttl, .. } = *packet;
        let protocol = protocol.number();
        Self { tuple: Tuple { source, destination, source_port: sport, destination_port: dport, protocol }, ttl }
    }
}

/// What the pipeline came to, and how.
pub struct Explained {
    /// In words
    pub explanation: Explanation,
    /// Slot of the device that sends the frame, or why it is Linux's
    pub result: Result<u32, Reason>,
    /// For what the route was looked up last, if it was
    pub destination: Option<IpAddr>,
}

/// Says what becomes of the packet.
pub fn explain(packet: &Packet, ingress: &Ingress, view: View<'_>, names: &dyn Names) -> Explanation {
    let link = Link { mac: ingress.mac, tags: ingress.tags.clone() };
    let frame = match &ingress.tunnel {
        Some(tunnel) => tunnelled(packet, &link, tunnel),
        None => build(packet, &link),
    };
    explain_frame(packet::Packet::new(&frame, HEADROOM), packet.into(), ingress, view, names).explanation
}

/// Says what becomes of a frame, which has this in it.
pub fn explain_frame(
    frame: packet::Packet,
    subject: Subject,
    ingress: &Ingress,
    view: View<'_>,
    names: &dyn Names,
) -> Explained {
    let tables = Mapped { view, counters: None, transmitters: SlotSet::ALL };
    Walk { subject, ingress, view, tables, names, steps: Vec::new(), destination: None }.run(frame)
}

struct Walk<'a> {
    subject: Subject,
    ingress: &'a Ingress,
    view: View<'a>,
    tables: Mapped<'a>,
    names: &'a dyn Names,
    steps: Vec<Step>,
    /// For what the route was looked up last
    destination: Option<IpAddr>,
}

/// The next hop that the tables name for the destination.
#[derive(Clone, Copy)]
struct Target {
    /// Its index, if it is not a group's
    index: Option<u32>,
    /// Its interface, if it has one
    ifindex: Option<u32>,
    /// The neighbour it leads to
    neighbour: IpAddr,
    mtu: u32,
}

impl<'a> Walk<'a> {
    fn step(&mut self, step: &str, found: String) {
        self.steps.push(Step { step: step.into(), found });
    }

    fn family(&self) -> Family {
        Family::of(self.subject.tuple.source)
    }

    fn run(mut self, mut frame: packet::Packet) -> Explained {
        let name = self.names.interface(self.ingress.port);
        self.step("port", format!("in by {name}: {}", self.ingress.because));
        let tables = self.tables;
        let Some(mut entry) = Entry::find(&tables, self.ingress.device) else {
            let detail = format!("{} is not served", self.names.interface(self.ingress.device));
            return self.left_to_linux(Reason::PortNotReady, Some(detail));
        };
        if let Some(index) = filters::decide(&frame, &tables, self.ingress.device) {
            let filter = self.names.filter(filters::number(index));
            self.step("filter", filter.clone().unwrap_or_default());
            if tables.filter(index).is_some_and(|filter| filter.drops()) {
                return self.dropped(filter);
            }
        }
        let parsed = match parse(&frame, &tables, &mut entry) {
            Ok(parsed) => parsed,
            Err(Stop::Exception(reason)) => {
                let detail = self.detail(reason, None, None);
                return self.left_to_linux(reason, detail);
            }
            Err(Stop::Flow(candidate)) => return self.by_flow(&mut frame, &entry, candidate),
            Err(Stop::Mapped(candidate)) => return self.mapped(&mut frame, &entry, candidate),
        };
        self.accepted(entry.port, &parsed);
        let routed = route(&frame, &tables, &entry, &parsed);
        if let Err(Refusal::Exception(reason @ Reason::Mapped)) = routed {
            let candidate = Candidate { family: parsed.family, offset: parsed.offset, reason };
            return self.mapped(&mut frame, &entry, candidate);
        }
        let target = self.look_up(entry.port, self.subject.tuple.destination);
        let routed = match routed {
            Ok(hop) => Ok(hop),
            Err(refusal) => match frame.tunnelled(&tables, &entry, &parsed, refusal) {
                Ok(device) => return self.through_tunnels(&frame, device, target),
                Err(reason) => Err(reason),
            },
        };
        match routed {
            Ok(hop) => {
                let out = self.interface_in(hop.port);
                self.step("source", format!("{} may come in here", self.subject.tuple.source));
                if let Err(reason) = rewrite(&mut frame, &parsed, &hop) {
                    return self.left_to_linux(reason, None);
                }
                self.step("next hop", self.describe(out, target));
                let mtu = target.map_or(0, |target| target.mtu);
                if mtu != 0 {
                    self.step("mtu", format!("{} bytes fit into {mtu}", parsed.packet_len));
                }
                self.fast(&frame, hop.device, out)
            }
            Err(reason) => {
                let detail = self.detail(reason, target, Some(&parsed));
                self.left_to_linux(reason, detail)
            }
        }
    }

    /// What a policy leaves to Linux unless it is of a connection that Linux accepted.
    fn by_flow(mut self, frame: &mut packet::Packet, entry: &Entry, candidate: Candidate) -> Explained {
        let policies = self.policies(candidate.reason, None).join("; ");
        self.step("policy", format!("only connections that Linux accepted pass: {policies}"));
        let found = flows::find(&self.view, &self.subject.tuple);
        let leaving = found.as_ref().map(|(flow, direction)| leaving(flow, *direction));
        if let (Some((flow, direction)), Some(leaving)) = (&found, leaving) {
            self.step("connection", self.describe_flow(flow, *direction, leaving));
        }
        let destination = leaving.map(|leaving| leaving.destination);
        let target = destination.and_then(|destination| self.look_up(entry.port, destination));
        let tables = self.tables;
        match frame.flow(&tables, entry, candidate) {
            Ok(device) => {
                let out = target.and_then(|target| target.ifindex).unwrap_or_else(|| self.interface_in(device));
                self.step("next hop", self.describe(out, target));
                self.fast(frame, device, out)
            }
            Err(reason) => {
                let detail = self.flow_detail(reason, found.as_ref()).or_else(|| self.detail(reason, target, None));
                self.left_to_linux(reason, detail)
            }
        }
    }

    /// The frame leaves by an interface, as it is now.
    fn fast(self, frame: &packet::Packet, device: u32, out: u32) -> Explained {
        let bytes = frame.bytes();
        let (destination, source) = (mac(bytes.get(..6)), mac(bytes.get(6..12)));
        let verdict = Verdict::Fast { port: self.names.interface(out), destination, source };
        self.ended(verdict, Ok(device))
    }

    /// What comes in or leaves by a port with mappings.
    fn mapped(mut self, frame: &mut packet::Packet, entry: &Entry, candidate: Candidate) -> Explained {
        let tables = self.tables;
        let (slot, family) = (entry.slot, candidate.family);
        let destination = self.exchange(slot, Way::In, family);
        let target = self.look_up(entry.port, destination.unwrap_or(self.subject.tuple.destination));
        let out = target.and_then(|target| target.ifindex);
        if let Some(slot) = out.and_then(|out| self.view.ports().iter().position(|port| port.ifindex.load() == out)) {
            self.exchange(slot as u32, Way::Out, family);
        }
        match frame.mapped(&tables, entry, candidate) {
            Ok(device) => {
                let out = out.unwrap_or_else(|| self.interface_in(device));
                self.step("next hop", self.describe(out, target));
                self.fast(frame, device, out)
            }
            Err(reason) => {
                let detail = self.detail(reason, target, None);
                self.left_to_linux(reason, detail)
            }
        }
    }

    /// What an address is by the mappings of a port, if there is one for it.
    fn exchange(&mut self, slot: u32, way: Way, family: Family) -> Option<IpAddr> {
        let tuple = self.subject.tuple;
        let (what, address, port) = match way {
            Way::Out => ("source", tuple.source, tuple.source_port),
            Way::In => ("destination", tuple.destination, tuple.destination_port),
        };
        let (words, service) = (mappings::words(address), Service::new(tuple.protocol, port.to_be()));
        let found = self.tables.find_mapping(slot, way, family, words, service)?;
        let new = mappings::address(family, self.tables.apply_mapping(found, way, words)?);
        let change = match u16::from_be(self.tables.mapped_port(found, way)) {
            0 => format!("{address} becomes {new}"),
            new_port => format!("{} becomes {}", SocketAddr::new(address, port), SocketAddr::new(new, new_port)),
        };
        let at = self.names.interface(self.interface_in(slot));
        self.step("mapping", format!("{what} {change} at {at}"));
        Some(new)
    }

    fn describe_flow(&self, flow: &FlowView, direction: Direction, leaving: Tuple) -> String {
        let which = match direction {
            Direction::Original => "of whoever began it",
            Direction::Reply => "an answer",
        };
        let translated = match leaving == self.subject.tuple {
            true => "as it is".to_owned(),
            false => format!("as {}", ends(&leaving)),
        };
        let packets = flow.totals.packets[direction as usize];
        format!("{}, {which}, leaves {translated}; {packets} packets went fast so far", ends(&self.subject.tuple))
    }

    /// Why a connection's packet is Linux's.
    fn flow_detail(&self, reason: Reason, found: Option<&(FlowView, Direction)>) -> Option<String> {
        match (reason, found) {
            (Reason::FlowNew, None) => {
                Some(format!("Linux has handed over no connection with {}", ends(&self.subject.tuple)))
            }
            (Reason::FlowWaiting, Some((flow, direction))) => Some(match flow.accepted[*direction as usize] {
                None => "the next packet of it that Linux forwards makes it fast".into(),
                Some((from, to)) => {
                    let [from, to] =
                        [self.arrived_by(from), self.interface_in(to)].map(|index| self.names.interface(index));
                    format!("Linux accepted it from {from} to {to}, and this is another way")
                }
            }),
            (Reason::FlowClosing, Some(_)) => Some("a FIN or RST was seen: Linux ends it".into()),
            _ => None,
        }
    }

    /// What left by a device, out of a tunnel or into one or both.
    fn through_tunnels(mut self, frame: &packet::Packet, device: u32, target: Option<Target>) -> Explained {
        if let Some(tunnel) = &self.ingress.tunnel {
            let name = self.names.interface(self.ingress.port);
            self.step("tunnel", format!("out of {name}: in GRE from {} to {}", tunnel.remote, tunnel.local));
        }
        self.step("source", format!("{} may come in here", self.subject.tuple.source));
        if let Some(out) = target.and_then(|target| target.ifindex) {
            self.step("next hop", self.describe(out, target));
            if let Some(Tunnel { local, remote, .. }) = self.names.tunnel(out) {
                let name = self.names.interface(out);
                self.step("tunnel", format!("into {name}: in GRE from {local} to {remote}"));
            }
        }
        let out = self.interface_in(device);
        self.fast(frame, device, out)
    }

    /// Steps for what `parse` has let pass.
    fn accepted(&mut self, port: &Port, parsed: &Parsed) {
        let family = family_name(parsed.family);
        let name = self.names.interface(port.ifindex.load());
        let tags = self.ingress.tags.iter().map(|(_, id)| format!("VLAN {id}, ")).collect::<String>();
        self.step(
            "frame",
            format!("{tags}to {name}'s MAC address, {family}, {} bytes, header sound", parsed.packet_len),
        );
        self.step("policy", format!("forwarding is on; no setting of Linux is in the way of {family} in by {name}"));
        let captures: BTreeSet<_> = self.names.filters().into_iter().map(|policy| policy.detail.as_str()).collect();
        for capture in captures {
            self.step("capture", format!("it goes to Linux if it matches: {capture}"));
        }
    }

    /// What the tables say about a destination, for the words only: `route` looks it up itself.
    fn look_up(&mut self, port: &Port, destination: IpAddr) -> Option<Target> {
        self.destination = Some(destination);
        let family = self.family();
        let source = mappings::words(self.subject.tuple.source);
        let root = roots::choose(&self.tables, port.root[family as usize].load(), || source).ok()?;
        let by_rules = root != MAIN_ROOT[family as usize];
        if by_rules {
            let (from, name) = (self.subject.tuple.source, self.names.interface(port.ifindex.load()));
            let vrf = self.names.vrf(port.ifindex.load()).map_or(String::new(), |vrf| format!(", in {vrf}"));
            self.step("rules", format!("rules (ip rule) for packets from {from} in by {name}{vrf}: root {root}"));
        }
        let word = match destination {
            IpAddr::V4(address) => lpm::lookup(&self.tables, root, &address.octets()),
            IpAddr::V6(address) => lpm::lookup(&self.tables, root, &address.octets()),
        };
        let known = self.names.route(destination).filter(|_| !by_rules);
        let known = known.unwrap_or_else(|| if by_rules { "by rules" } else { "none known" }.into());
        let (leaf, target) = match word.ok()?.kind() {
            Kind::Nexthop(index) => (format!("next hop {index}"), self.target(index, destination)),
            Kind::Group(index) => (format!("group {index}, next hop by the flow's hash"), None),
            Kind::None | Kind::Node(_) => ("no leaf".into(), None),
        };
        self.step("route", format!("{destination}: {known}; in the tables: {leaf}"));
        target
    }

    fn target(&self, index: u32, destination: IpAddr) -> Option<Target> {
        let identity = NexthopIdentity::read(self.view.nexthop_keys().get(index as usize)?)?;
        let ifindex = (identity.ifindex != 0).then_some(identity.ifindex);
        let mtu = self.view.nexthops().get(index as usize)?.mtu.load();
        Some(Target { index: Some(index), ifindex, neighbour: identity.gateway.unwrap_or(destination), mtu })
    }

    fn describe(&self, out: u32, target: Option<Target>) -> String {
        let name = self.names.interface(out);
        let Some(target) = target else { return format!("out by {name}") };
        let known = self.names.neighbour(out, target.neighbour).map_or(String::new(), |text| format!(" at {text}"));
        let index = target.index.map_or(String::new(), |index| format!(" (next hop {index})"));
        format!("{}{known}, out by {name}{index}", target.neighbour)
    }

    fn interface_in(&self, slot: u32) -> u32 {
        self.view.ports().get(slot as usize).map_or(0, |port| port.ifindex.load())
    }

    /// The interface that Linux says a packet came in by, which it accepted: a port or a VRF.
    fn arrived_by(&self, number: u32) -> u32 {
        let of_vrf = |port: &&Port| port.arrival[self.family() as usize].load() == number;
        let vrf = self.view.ports().iter().find(of_vrf).filter(|_| number >= PORT_SLOTS).map(|port| port.vrf.load());
        vrf.unwrap_or_else(|| self.interface_in(number))
    }

    /// The object that decides, if there is one to name.
    fn detail(&self, reason: Reason, target: Option<Target>, parsed: Option<&Parsed>) -> Option<String> {
        let policies = self.policies(reason, target);
        if !policies.is_empty() {
            return Some(policies.join("; "));
        }
        let out = target.and_then(|target| target.ifindex).map(|ifindex| self.names.interface(ifindex));
        let name = self.names.interface(self.ingress.port);
        match reason {
            Reason::PolicySysctl => {
                let unsupported =
                    |ifindex| self.names.unsupported(ifindex).map(|text| (self.names.interface(ifindex), text));
                let (port, text) = unsupported(self.ingress.port).or_else(|| unsupported(target?.ifindex?))?;
                Some(format!("{port}: {text}"))
            }
            Reason::PortNotReady => self.names.why_not(self.ingress.port),
            Reason::NoNeighbour => target.map(|target| {
                let state = target.ifindex.and_then(|ifindex| self.names.neighbour(ifindex, target.neighbour));
                let state = state.unwrap_or_else(|| "no entry".into());
                format!("{} on {}: {state}", target.neighbour, out.unwrap_or_else(|| "?".into()))
            }),
            Reason::MtuExceeded => {
                let (target, parsed) = (target?, parsed?);
                Some(format!("{} bytes do not fit into {} of {}", parsed.packet_len, target.mtu, out?))
            }
            Reason::Redirect => Some(format!("it would leave by {name} again")),
            Reason::RpFilter | Reason::MartianSource => {
                let back = self.names.route(self.subject.tuple.source).unwrap_or_else(|| "none".into());
                Some(format!("{} in by {name}; the route back is: {back}", self.subject.tuple.source))
            }
            Reason::NexthopDown | Reason::EgressNotServed => {
                let ifindex = target?.ifindex?;
                let why = self
                    .names
                    .cannot_transmit(ifindex)
                    .or_else(|| self.names.why_not(ifindex))
                    .map_or(String::new(), |why| format!(": {why}"));
                Some(format!("{}{why}", out?))
            }
            Reason::NonUnicastRoute | Reason::UnsupportedRoute | Reason::LocalDestination | Reason::Broadcast => {
                self.names.route(self.subject.tuple.destination)
            }
            Reason::TtlExpired => Some(format!("it arrives with {}", self.subject.ttl)),
            _ => None,
        }
    }

    fn policies(&self, reason: Reason, target: Option<Target>) -> Vec<String> {
        let family = self.family();
        let into = target.and_then(|target| self.names.tunnel(target.ifindex?));
        let tunnels = [self.ingress.tunnel, into];
        let outside = |of| tunnels.iter().flatten().any(|tunnel| tunnel.family() == of);
        let touches = |scope: Scope| match scope {
            Scope::Family(of) => of == family || outside(of),
            Scope::Local(of) => outside(of),
            Scope::Ingress(on, of) => self.names.is_about(on, self.ingress.port) && of.is_none_or(|of| of == family),
            Scope::Egress(on, of) => {
                let leaves = |port| self.names.is_about(on, port);
                target.is_none_or(|target| target.ifindex.is_some_and(leaves)) && of.is_none_or(|of| of == family)
            }
        };
        let policies = self.names.policies().into_iter();
        let policies: Vec<_> = policies.filter(|policy| policy.reason == reason && touches(policy.scope)).collect();
        // Those that connections pass decide only if there are no others.
        let strict = policies.iter().any(|policy| policy.flows.is_none());
        let deciding = policies.into_iter().filter(|policy| strict == policy.flows.is_none());
        // One thing may be in the way of both directions.
        let details: BTreeSet<_> = deciding.map(|policy| policy.detail.clone()).collect();
        details.into_iter().collect()
    }

    fn dropped(self, detail: Option<String>) -> Explained {
        let reason = Reason::Filtered;
        let verdict = Verdict::Dropped { reason: reason.name().into(), text: reason.text().into(), detail };
        self.ended(verdict, Err(reason))
    }

    fn ended(self, verdict: Verdict, result: Result<u32, Reason>) -> Explained {
        let explanation = Explanation { steps: self.steps, verdict };
        Explained { explanation, result, destination: self.destination }
    }

    fn left_to_linux(self, reason: Reason, detail: Option<String>) -> Explained {
        let verdict = Verdict::Linux { reason: reason.name().into(), text: reason.text().into(), detail };
        self.ended(verdict, Err(reason))
    }
}

/// What a packet of a flow leaves as.
fn leaving(flow: &FlowView, direction: Direction) -> Tuple {
    match direction {
        Direction::Original => flow.connection.reply.inverse(),
        Direction::Reply => flow.connection.original.inverse(),
    }
}

/// Addresses and ports of a tuple.
fn ends(tuple: &Tuple) -> String {
    let from = SocketAddr::new(tuple.source, tuple.source_port);
    format!("{from} to {}", SocketAddr::new(tuple.destination, tuple.destination_port))
}

/// A family in words.
pub fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

/// A MAC address as `ip` prints it.
pub fn mac(bytes: Option<&[u8]>) -> String {
    bytes.unwrap_or_default().iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}
