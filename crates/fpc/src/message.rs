//! The messages. Each describes one object of Linux whole, so that it replaces what was known under the same key;
//! nothing is a delta. Interfaces are named by Linux's own index. Addresses are `core::net` types.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use towpath_filter::Filter;
use towpath_tables::flow::{Connection, Tuple};
use towpath_tables::{Reason, record::Family};

/// One message from CM to FPM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Message {
    /// A full description of some object classes begins: what is not mentioned before the matching end is gone.
    /// Changes may come in between and count as mentions. A second begin without an end starts the description over.
    SnapshotBegin(Snapshot),
    /// The snapshot is complete: sweep what it did not mention.
    SnapshotEnd(Snapshot),
    /// An interface and the settings that decide over forwarding through it.
    Port(Port),
    /// The interface with this index is gone.
    PortDelete(u32),
    /// An address of this host.
    Address(Address),
    /// The address is gone.
    AddressDelete(Address),
    /// A neighbour whose link-layer address may be used (`lladdr` set), or may not (None).
    Neighbour(Neighbour),
    /// The neighbour entry is gone.
    NeighbourDelete(NeighbourKey),
    /// A route.
    Route(Route),
    /// The route is gone.
    RouteDelete(RouteKey),
    /// A nexthop object (`ip nexthop`).
    Nexthop(NexthopObject),
    /// The nexthop object is gone.
    NexthopDelete(u32),
    /// A connection whose packets Linux hands over.
    Flow(Connection),
    /// The connection with this original tuple is gone, or is handed over no longer.
    FlowDelete(Tuple),
    /// A setting that the fast path does not repeat holds, or no longer holds.
    Policy(Policy),
    /// Settings of a whole network namespace and family.
    FamilySettings(FamilySettings),
    /// Policies that were just found. This message may overtake any other: it goes ahead of what the receiver has not
    /// taken yet. What it names holds, beside what snapshots say, until its `AlarmOver`.
    Alarm(Alarm),
    /// A snapshot before this message told what the alarms of this source up to this number told. It overtakes nothing.
    AlarmOver(AlarmId),
    /// Linux's rules were looked at, at this time (CLOCK_MONOTONIC_COARSE in nanoseconds), and what was found is in alarms sent
    /// before. Comes every second, and overtakes other messages as alarms do.
    Heartbeat(u64),
    /// Linux's notifications to this listener were more than there was room for, and some are lost. What they told is read
    /// again and described as ever; this is to be counted.
    Lost(Listener),
}

impl Message {
    /// Has each number of an interface in it be another; 0, which is none, stays.
    pub fn renumber(&mut self, mut number: impl FnMut(u32) -> u32) {
        let mut change = |ifindex: &mut u32| {
            if *ifindex != 0 {
                *ifindex = number(*ifindex);
            }
        };
        match self {
            Self::Port(port) => {
                change(&mut port.ifindex);
                change(&mut port.master);
                port.vrf.iter_mut().for_each(|vrf| change(&mut vrf.ifindex));
                match &mut port.kind {
                    PortKind::Vlan { lower, .. } => change(lower),
                    PortKind::Tunnel(tunnel) => change(&mut tunnel.link),
                    PortKind::Ethernet | PortKind::Virtual | PortKind::Loopback | PortKind::Other => {}
                }
            }
            Self::PortDelete(ifindex) => change(ifindex),
            Self::Address(address) | Self::AddressDelete(address) => change(&mut address.ifindex),
            Self::Neighbour(Neighbour { key, .. }) | Self::NeighbourDelete(key) => change(&mut key.ifindex),
            Self::Route(Route { via: Via::Hops(hops), .. }) => hops.iter_mut().for_each(|hop| change(&mut hop.ifindex)),
            Self::Nexthop(NexthopObject { kind: NexthopObjectKind::Hop(hop), .. }) => change(&mut hop.ifindex),
            Self::Policy(policy) => policy.scope.renumber(&mut change),
            Self::Alarm(alarm) => alarm.policies.iter_mut().for_each(|policy| policy.scope.renumber(&mut change)),
            Self::SnapshotBegin(_) | Self::SnapshotEnd(_) | Self::FamilySettings(_) => {}
            Self::Route(_) | Self::RouteDelete(_) | Self::Nexthop(_) | Self::NexthopDelete(_) => {}
            Self::Flow(_) | Self::FlowDelete(_) | Self::AlarmOver(_) | Self::Heartbeat(_) | Self::Lost(_) => {}
        }
    }
}

/// Sockets of CM to which Linux tells what happens.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Listener {
    /// rtnetlink: interfaces and their settings
    Interfaces,
    /// rtnetlink: routes, next hops, neighbours and addresses
    Routes,
    /// ctnetlink
    Connections,
    /// What wakes the watcher of these policies
    Policies(PolicySource),
}

/// One message from FPM back to CM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Feedback {
    /// These neighbours were used by the fast path since the last such message: Linux is to keep them alive.
    Hits(Vec<NeighbourKey>),
    /// Packets of these connections (original tuples) took the fast path since the last such message: Linux is to keep
    /// them alive.
    FlowsUsed(Vec<Tuple>),
    /// These TCP connections (original tuples) have carried so much by the fast path that their sequence numbers cannot be
    /// compared with what Linux has seen.
    FlowsAhead(Vec<Tuple>),
    /// FPM cannot trust what it has (why, for people): describe everything again, by snapshots.
    Resync(String),
}

/// Where CM's messages go: FPM in the same process, or a socket.
pub trait Sink {
    /// Takes one message. It may wait in a batch until `flush`; blocks while the receiver is behind.
    fn send(&mut self, message: Message) -> Result<(), SinkError>;
    /// Ends a batch: what was sent so far takes effect together, now.
    fn flush(&mut self) -> Result<(), SinkError>;
}

/// The receiver is gone or refuses; what was sent since the last `flush` may be lost.
#[derive(thiserror::Error, Debug)]
#[error("fast path manager does not take messages: {0}")]
pub struct SinkError(pub String);

/// The classes of objects a snapshot speaks for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Snapshot {
    /// `Port`
    Ports,
    /// `Address`, of one family
    Addresses(Family),
    /// `Neighbour`, of one family
    Neighbours(Family),
    /// `Nexthop`
    Nexthops,
    /// `Route`, of one family
    Routes(Family),
    /// `Flow`
    Flows,
    /// `Policy`, those of one watcher
    Policies(PolicySource),
}

/// An interface. CM describes every interface of the namespace; FPM serves those it was asked to serve (and VLAN
/// sub-interfaces of them).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Port {
    /// Interface index
    pub ifindex: u32,
    /// Name in Linux
    pub name: String,
    /// Link-layer address; None if the interface has none of six bytes
    pub mac: Option<[u8; 6]>,
    /// MTU in bytes
    pub mtu: u32,
    /// What kind of interface it is
    pub kind: PortKind,
    /// IFF_UP
    pub up: bool,
    /// Lower layer up (IFF_LOWER_UP) and operational state not down
    pub carrier: bool,
    /// Index of the master (bridge, bond, …), 0 if there is none, or it is a VRF
    pub master: u32,
    /// The VRF that it belongs to
    pub vrf: Option<Vrf>,
    /// IFF_PROMISC as Linux counts it
    pub promiscuous: bool,
    /// Settings per family, IPv4 first
    pub family: [PortFamily; 2],
    /// IPv4 `send_redirects` (all or this)
    pub send_redirects: bool,
    /// IPv4 `rp_filter`, the larger of all's and this
    pub rp_filter: u8,
    /// IPv4 `route_localnet`
    pub route_localnet: bool,
    /// A port-local setting that the fast path does not repeat, if there is one (proxy_arp does not count; an
    /// egress-qos-map of a VLAN, `accept_local`, `seg6_enabled`, … do): ingress and egress, per family.
    pub unsupported: Option<String>,
}

/// A VRF, as Linux has it: a device that others are enslaved to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Vrf {
    /// Interface index of the device
    pub ifindex: u32,
    /// Its name
    pub name: String,
    /// The routing table
    pub table: u32,
}

/// Settings of an interface for one family.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct PortFamily {
    /// Forwarding is on for packets that come in here
    pub forwarding: bool,
    /// `ignore_routes_with_linkdown`
    pub ignore_linkdown: bool,
}

/// Kinds of interfaces that matter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PortKind {
    /// An Ethernet interface with a driver of its own
    Ethernet,
    /// One end of a veth pair, or a TAP device: its frames may carry partial checksums
    Virtual,
    /// A VLAN sub-interface
    Vlan {
        /// Index of the interface underneath
        lower: u32,
        /// 0x8100 or 0x88a8
        protocol: u16,
        /// VLAN identifier
        id: u16,
    },
    /// The loopback interface
    Loopback,
    /// Anything else: not served
    Other,
    /// A GRE tunnel for IP packets
    Tunnel(Tunnel),
}

/// A tunnel, as Linux's tunnel interfaces have it. What it has beyond this is in `Port::unsupported`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tunnel {
    /// This host's end; unspecified if it takes packets to any address
    pub local: IpAddr,
    /// The other end; unspecified if it takes packets from any
    pub remote: IpAddr,
    /// Interface index of the only way out, 0 if any will do. Of tunnels that a packet may belong to, one that is bound to
    /// the interface that it came in by goes before others
    pub link: u32,
    /// What packets in bear
    pub input: GreOptions,
    /// What packets out bear
    pub output: GreOptions,
    /// Time to live of packets out; 0 to inherit it
    pub ttl: u8,
    /// TOS or traffic class of packets out; None to inherit it
    pub class: Option<u8>,
    /// Flow label of packets out over IPv6, 0 if they have none of their own; None to inherit it
    pub label: Option<u32>,
    /// Encapsulation limit that packets out over IPv6 bear (RFC 2473), if they do
    pub limit: Option<u8>,
}

impl Tunnel {
    /// The family of its packets outside
    pub fn family(&self) -> Family {
        Family::of(self.remote)
    }
}

/// What the GRE header of a tunnel's packets holds in one direction.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct GreOptions {
    /// The key
    pub key: Option<u32>,
    /// A checksum
    pub checksum: bool,
    /// A sequence number
    pub sequence: bool,
}

/// An address of this host.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Address {
    /// Interface index
    pub ifindex: u32,
    /// The address itself (the local one of a point-to-point pair)
    pub address: IpAddr,
    /// Prefix length
    pub prefix_len: u8,
}

/// What names a neighbour.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct NeighbourKey {
    /// Interface index
    pub ifindex: u32,
    /// Protocol address
    pub address: IpAddr,
}

/// A neighbour.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Neighbour {
    /// Which
    pub key: NeighbourKey,
    /// Link-layer address while Linux itself would use it (NUD_VALID); None while it would not
    pub lladdr: Option<[u8; 6]>,
    /// NUD_* state bits as Linux gave them
    pub state: u16,
}

/// An IP prefix; bits beyond the length are zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Prefix {
    address: IpAddr,
    len: u8,
}

impl Prefix {
    /// The prefix of `address` with `len` bits; None if the length does not fit the family. Host bits are cleared.
    pub fn new(address: IpAddr, len: u8) -> Option<Self> {
        let address = match address {
            IpAddr::V4(a) if len <= 32 => {
                let mask = u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0);
                IpAddr::V4(Ipv4Addr::from_bits(a.to_bits() & mask))
            }
            IpAddr::V6(a) if len <= 128 => {
                let mask = u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0);
                IpAddr::V6(Ipv6Addr::from_bits(a.to_bits() & mask))
            }
            _ => return None,
        };
        Some(Self { address, len })
    }

    /// First address of the prefix.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Length in bits.
    pub fn prefix_len(&self) -> u8 {
        self.len
    }

    /// Family of the prefix.
    pub fn family(&self) -> Family {
        Family::of(self.address)
    }

    /// Whether an address is in it.
    pub fn contains(&self, address: IpAddr) -> bool {
        Self::new(address, self.len) == Some(*self)
    }
}

impl std::fmt::Display for Prefix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.len)
    }
}

/// Numbers of the routing tables that every Linux has (`RT_TABLE_*`, include/uapi/linux/rtnetlink.h).
pub mod table {
    /// Looked up last
    pub const DEFAULT: u32 = 253;
    /// Where routes are if nothing else is said
    pub const MAIN: u32 = 254;
    /// The host's own addresses and broadcasts
    pub const LOCAL: u32 = 255;
}

/// What names a route.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct RouteKey {
    /// Routing table (255 local, 254 main, …)
    pub table: u32,
    /// Destination
    pub prefix: Prefix,
    /// Metric; the lowest wins
    pub priority: u32,
    /// IPv4 TOS the route is for; 0 for all
    pub tos: u8,
}

/// A route.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Route {
    /// Which
    pub key: RouteKey,
    /// RTN_*: 1 unicast, 2 local, 3 broadcast, 4 anycast, 5 multicast, 6 blackhole, 7 unreachable, 8 prohibit, 9 throw
    pub kind: u8,
    /// RTPROT_*, for display
    pub protocol: u8,
    /// Where to
    pub via: Via,
    /// RTAX_MTU, 0 if there is none
    pub mtu: u32,
    /// Something about the route that the fast path does not repeat (lwtunnel, source-specific, …): always an exception
    pub unsupported: bool,
}

/// A route's next hops.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Via {
    /// Listed in the route itself; none for blackhole and friends
    Hops(Vec<Hop>),
    /// A nexthop object by its id
    Object(u32),
}

/// One next hop of a route or nexthop object.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Hop {
    /// Way out; 0 if there is none
    pub ifindex: u32,
    /// Gateway of either family (RFC 8950); None if the destination is on the link
    pub gateway: Option<IpAddr>,
    /// 1 and more; the share of flows
    pub weight: u16,
    /// RTNH_F_* flags as Linux gave them (dead 1, linkdown 16, …)
    pub flags: u32,
}

/// A nexthop object.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NexthopObject {
    /// Its id
    pub id: u32,
    /// What it is
    pub kind: NexthopObjectKind,
}

/// Kinds of nexthop objects.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NexthopObjectKind {
    /// A single next hop
    Hop(Hop),
    /// Discards (ICMP as Linux does)
    Blackhole,
    /// A group: ids and weights
    Group(Vec<(u32, u16)>),
    /// Anything else (resilient groups, encapsulations, fdb): always an exception
    Unsupported,
}

/// Who found a policy; a snapshot replaces the policies of one source.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum PolicySource {
    /// nftables, and hooks listed by nfnetlink_hook
    Nftables = 0,
    /// iptables-legacy, ip6tables-legacy
    Xtables = 1,
    /// XFRM policies
    Xfrm = 2,
    /// `ip rule`
    Rules = 3,
    /// qdiscs, filters, tcx
    Tc = 4,
    /// Packet sockets
    Capture = 5,
    /// sysctls
    Sysctl = 6,
    /// What Linux learned about tunnels, and who else listens to their packets
    Tunnels = 8,
    /// Interfaces described anew: alarms only, until the description that follows has been taken
    Ports = 7,
}

/// A setting of Linux that the fast path does not repeat: the traffic it may touch goes to Linux while it stands.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Policy {
    /// Who found it
    pub source: PolicySource,
    /// What it touches
    pub scope: Scope,
    /// The reason counted
    pub reason: Reason,
    /// For people: the object that stands in the way, e.g. "nft table inet filter, chain forward: 3 rules"
    pub detail: String,
    /// Of the packets in the scope it touches those that this filter matches; None: all. In a scope of packets that leave
    /// only a filter that survives forwarding may stand: it is run when they arrive
    pub filter: Option<Filter>,
    /// Packets of connections that Linux handed over may pass it, once Linux itself accepted one of their direction under
    /// the rules of this generation: the number changes whenever the rules do. None: nothing passes
    pub flows: Option<u32>,
    /// Where these connections pass that come in by a VRF's port
    pub in_vrfs: InVrfs,
    /// All policy routing rules of the family, in the order in which Linux tries them, if they are known: the policy touches
    /// nothing any more once they are repeated
    pub rules: Option<Vec<Rule>>,
    /// It is there for a moment, since something has just changed, and is no setting that stands
    pub momentary: bool,
}

impl Policy {
    /// One that touches all of its scope.
    pub fn new(source: PolicySource, scope: Scope, reason: Reason, detail: impl Into<String>) -> Self {
        let (filter, flows, in_vrfs, rules) = (None, None, InVrfs::Stay, None);
        Self { source, scope, reason, detail: detail.into(), filter, flows, in_vrfs, rules, momentary: false }
    }
}

/// What packets of a connection that Linux accepted stand for others that came in by a port of a VRF. Linux makes the VRF's
/// device the one that they came in by, so of an accepted packet it can mostly be seen no longer by which port it came. The
/// least that the policies of a family say holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Debug)]
#[repr(u8)]
pub enum InVrfs {
    /// None: connections in VRFs are Linux's
    #[default]
    Stay = 0,
    /// Those of which Linux still tells the port: they went past the VRF's device, by a flowtable
    ByPort = 1,
    /// All that came in by the VRF: the rules do not tell its ports apart
    ByVrf = 2,
}

/// A policy routing rule (`ip rule`), as it is for packets without a mark. Where Linux asks for more than is here, the
/// action is `Unknown`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Rule {
    /// The lowest goes first
    pub priority: u32,
    /// Name of the interface that packets come in by; None: any
    pub iif: Option<String>,
    /// Where they come from
    pub from: Option<Prefix>,
    /// Where they go to
    pub to: Option<Prefix>,
    /// It asks for marks: packets with one may be treated otherwise
    pub by_mark: bool,
    /// What to do with them
    pub action: RuleAction,
}

impl Rule {
    /// Whether it may leave packets to Linux that it touches.
    pub fn refuses(&self) -> bool {
        self.action != RuleAction::Skip && (self.to.is_some() || self.action == RuleAction::Unknown)
    }

    /// Whether it is about some packets only.
    pub fn selects(&self) -> bool {
        self.iif.is_some() || self.from.is_some() || self.to.is_some()
    }

    /// Whether all packets are Linux's from here on.
    pub fn refuses_all(&self) -> bool {
        !self.selects() && self.action == RuleAction::Unknown
    }
}

/// What a rule does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum RuleAction {
    /// Look up in this table
    Lookup(u32),
    /// The same, but a route to a prefix of at most so many bits counts for none (`suppress_prefixlength`)
    LookupBeyond(u32, u8),
    /// Look up in the table of the VRF that the packet belongs to, if there is one
    Vrf,
    /// Nothing: only packets with a mark are meant, or such as the host itself sends
    Skip,
    /// Nothing that is known: all packets that may be meant are Linux's
    Unknown,
}

/// What a policy touches. An interface stands for its VLAN sub-interfaces too: their packets pass it, tagged.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Scope {
    /// Every forwarded packet of the family
    Family(Family),
    /// Packets that come in by the interface, of one family or (None) of both
    Ingress(u32, Option<Family>),
    /// Packets that leave by the interface, of one family or (None) of both
    Egress(u32, Option<Family>),
    /// Packets to this host and from it: of what is forwarded, those that carry a tunnel's
    Local(Family),
}

impl Scope {
    /// The interface that it is about; None if it is about all.
    pub fn interface(&self) -> Option<u32> {
        match self {
            Self::Ingress(ifindex, _) | Self::Egress(ifindex, _) => Some(*ifindex),
            Self::Family(_) | Self::Local(_) => None,
        }
    }

    fn renumber(&mut self, mut change: impl FnMut(&mut u32)) {
        match self {
            Self::Ingress(ifindex, _) | Self::Egress(ifindex, _) => change(ifindex),
            Self::Family(_) | Self::Local(_) => {}
        }
    }

    /// Whether there are packets of the family in it.
    pub fn concerns(&self, family: Family) -> bool {
        match self {
            Self::Family(of) | Self::Local(of) => *of == family,
            Self::Ingress(_, of) | Self::Egress(_, of) => of.is_none_or(|of| of == family),
        }
    }
}

/// What names an alarm.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct AlarmId {
    /// Who found the policies
    pub source: PolicySource,
    /// Rises from alarm to alarm, also from one CM on this host to the next (nanoseconds of CLOCK_MONOTONIC)
    pub number: u64,
}

/// Policies ahead of the snapshot that tells them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Alarm {
    /// Which
    pub id: AlarmId,
    /// Those that are new
    pub policies: Vec<Policy>,
}

/// Settings of the namespace for a family.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FamilySettings {
    /// Which family
    pub family: Family,
    /// `fib_multipath_hash_policy`; other values than 0 and 1 are reported as a policy too
    pub hash_policy: u8,
    /// Whether Linux gives tunnels' packets a flow label that would have none: IPv6 `auto_flowlabels`
    pub flow_labels: bool,
}
