//! What the read commands say, as it goes over the control socket and out with `--json`. docs/json.md describes these
//! shapes; fields may be added, never renamed or removed.

use crate::cli::Protocol;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// `towpath status`
#[derive(Serialize, Deserialize, Debug)]
pub struct Status {
    /// Engine that runs the packet path: `xdp`, `user`
    pub engine: String,
    /// Process id of the daemon
    pub pid: u32,
    /// Inode of the network namespace
    pub namespace: u64,
    /// Start of the daemon, seconds since 1970-01-01 UTC, by the clock of that time
    pub since: u64,
    /// Seconds since then, whatever became of that clock
    #[serde(default)]
    pub up_seconds: u64,
    /// The tables were taken over from an earlier daemon
    pub adopted: bool,
    /// The tables hold what Linux says on another host
    #[serde(default)]
    pub remote: bool,
    /// Nothing is forwarded: what is counted as such would be
    #[serde(default)]
    pub shadow: bool,
    /// The tables hold all that Linux has told
    pub in_sync: bool,
    /// How often all of Linux's state was described anew: notifications were lost, or another cache manager came
    #[serde(default)]
    pub resyncs: u64,
    /// How often Linux's state, or a part of it, was read again because it could not be followed
    #[serde(default)]
    pub resyncs_by_cause: Vec<Resync>,
    /// Ports asked for
    pub ports: Vec<Port>,
    /// Settings of Linux that the fast path does not repeat, and what they touch
    pub policies: Vec<Policy>,
    /// Routes of each family in the tables
    pub routes: Families,
    /// The shared tables
    pub tables: Vec<Table>,
    /// Memory of all tables together
    pub memory_bytes: u64,
    /// The program in the kernel
    pub program: Option<Program>,
    /// The user engine's workers
    #[serde(default)]
    pub workers: Vec<Worker>,
    /// What became of packets on their way from workers to Linux
    #[serde(default)]
    pub fptun: Vec<Entered>,
    /// Connections that Linux hands over
    #[serde(default)]
    pub flows: FlowSummary,
    /// Filters of the operator's
    #[serde(default)]
    pub filters: u64,
    /// What the operator should know
    pub notices: Vec<String>,
}

/// Why Linux's state, or a part of it, was read again, and how often.
#[derive(Serialize, Deserialize, Debug)]
pub struct Resync {
    /// Whose notifications were lost: `interfaces`, `routes`, `connections`, `nftables`, `xfrm`, `rules`, `tc`,
    /// `xdp-features`; or `cache-manager`, if another one came
    pub cause: String,
    /// How often since the daemon started
    pub count: u64,
}

/// A worker of the user engine. Its counters start with the tables and belong to the core, but `rx_lost`, which starts
/// with the sockets.
#[derive(Serialize, Deserialize, Debug, Default)]
pub struct Worker {
    /// The core that it runs on
    pub core: u32,
    /// The queues that it serves
    pub queues: Vec<Queue>,
    /// Packets that it has forwarded
    pub rx_packets: u64,
    /// Packets that it has counted as sent
    pub tx_packets: u64,
    /// Packets that it has handed to Linux
    pub exceptions: u64,
    /// Frames that came and found its queues full
    pub rx_lost: u64,
    /// Packets in `tx_packets` that found no room where they were to leave
    pub tx_lost: u64,
    /// Packets in `exceptions` that Linux did not take
    pub exceptions_lost: u64,
}

/// A counter of packets that were sent by the device that leads into Linux (FPTUN), by whomever; since the daemon's start.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
pub struct Entered {
    /// Short name of what became of them
    pub outcome: String,
    /// The same in words
    pub text: String,
    /// They were dropped
    pub dropped: bool,
    /// How many
    pub packets: u64,
}

/// A receive queue of a port.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
pub struct Queue {
    /// The port
    pub port: String,
    /// Which one
    pub queue: u32,
}

/// A figure for each family.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Families {
    /// IPv4
    pub ipv4: u64,
    /// IPv6
    pub ipv6: u64,
}

/// A port.
#[derive(Serialize, Deserialize, Debug)]
pub struct Port {
    /// Name in Linux
    pub name: String,
    /// Index in Linux; None while there is no such interface
    pub ifindex: Option<u32>,
    /// `native`, `generic`, `user` (workers serve it), `vlan` (served by the interface underneath),
    /// `tunnel`, `none`
    pub mode: String,
    /// Driver, if it is known
    pub driver: Option<String>,
    /// By what its frames come and go: `xdp`, `af_xdp`, or its wire as the command line named it (`af_packet:…`, …)
    #[serde(default)]
    pub served_by: Option<String>,
    /// Packets that come in here may take the fast path
    pub ready: bool,
    /// Why not
    pub why_not: Option<String>,
    /// MAC address
    pub mac: Option<String>,
    /// IP MTU in bytes
    pub mtu: Option<u32>,
    /// It receives the frames of others too
    pub promiscuous: Option<bool>,
    /// Linux forwards IPv4 and IPv6 that comes in here
    pub forwarding: Option<Forwarding>,
    /// The VRF that it belongs to
    #[serde(default)]
    pub vrf: Option<Vrf>,
}

/// A VRF.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Vrf {
    /// Name of its device
    pub name: String,
    /// Routing table
    pub table: u32,
}

/// Forwarding by family.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forwarding {
    /// IPv4
    pub ipv4: bool,
    /// IPv6
    pub ipv6: bool,
}

/// A setting of Linux that the fast path does not repeat.
#[derive(Serialize, Deserialize, Debug)]
pub struct Policy {
    /// Which part of Linux: `nftables`, `iptables`, `xfrm`, `rules`, `tc`, `capture`, `sysctl`
    pub source: String,
    /// What is touched: `all`, `ingress`, `egress`
    pub scope: String,
    /// The port, for `ingress` and `egress`
    pub port: Option<String>,
    /// `ipv4` or `ipv6`; None: both
    pub family: Option<String>,
    /// The reason counted for its packets
    pub reason: String,
    /// The object
    pub detail: String,
    /// Of the packets in question only those are touched that the filter of the packet socket matches
    pub filtered: bool,
}

/// Occupancy of a shared table.
#[derive(Serialize, Deserialize, Debug)]
pub struct Table {
    /// Its name
    pub name: String,
    /// Elements in use
    pub used: u64,
    /// Elements there are
    pub capacity: u64,
    /// Memory in bytes
    pub memory_bytes: u64,
}

/// The program in the kernel.
#[derive(Serialize, Deserialize, Debug)]
pub struct Program {
    /// Its id, as bpftool shows it
    pub id: u32,
    /// Instructions that the verifier walked through; None on kernels that do not tell
    pub verified_instructions: Option<u32>,
}

/// `towpath show ports`
#[derive(Serialize, Deserialize, Debug)]
pub struct Ports {
    /// Ports asked for
    pub ports: Vec<Port>,
}

/// `towpath show routes`, a page of them
#[derive(Serialize, Deserialize, Debug)]
pub struct Routes {
    /// IPv4 first, by address, prefix length and Linux's order of preference
    pub routes: Vec<Route>,
    /// Present if there are more: the last prefix of this page
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// A route.
#[derive(Serialize, Deserialize, Debug)]
pub struct Route {
    /// Destination
    pub prefix: String,
    /// Table in Linux (254 main, 255 local)
    pub table: u32,
    /// Metric
    pub metric: u32,
    /// Who made it, as `ip route` names it
    pub protocol: String,
    /// `unicast`, `local`, `blackhole`, …
    pub kind: String,
    /// Next hops
    pub via: Vec<Hop>,
    /// Nexthop object, if the route names one
    pub nexthop_object: Option<u32>,
    /// This is the route the fast path uses for its prefix
    pub chosen: bool,
}

/// One next hop of a route.
#[derive(Serialize, Deserialize, Debug)]
pub struct Hop {
    /// Way out
    pub port: Option<String>,
    /// Gateway; None if the destination is on the link
    pub gateway: Option<String>,
    /// Share of flows
    pub weight: u16,
}

/// What the tables do with packets to some addresses, in the order asked
#[derive(Serialize, Deserialize, Debug)]
pub struct Destinations {
    /// One for each
    pub destinations: Vec<Vec<Way>>,
}

/// One of the ways that packets to an address take.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
pub struct Way {
    /// Index of the interface that they leave by
    pub ifindex: u32,
    /// Gateway; None if the destination is on the link
    pub gateway: Option<IpAddr>,
    /// MAC address that frames are sent to; None in a tunnel
    pub lladdr: Option<[u8; 6]>,
    /// Why they go to Linux, if they do
    pub reason: Option<String>,
}

/// `towpath check`
#[derive(Serialize, Deserialize, Debug, Default)]
pub struct Check {
    /// Prefixes of Linux's tables, and of the fast path's
    pub prefixes: u64,
    /// Addresses compared: the first and last of each prefix
    pub addresses: u64,
    /// Those that the fast path forwards to where Linux does
    pub forwarded: u64,
    /// Those that it leaves to Linux, by reason
    pub left_to_linux: BTreeMap<String, u64>,
    /// The same addresses once more, for packets that rules (`ip rule`) may be about
    #[serde(default)]
    pub arrivals: Vec<Arrival>,
    /// Those that are forwarded to where Linux does not
    pub differences: Vec<Difference>,
}

/// Packets that come in by a port from an address, to all addresses of its family that are compared.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
pub struct Arrival {
    /// Name of the port
    pub port: String,
    /// Source: one that stands for all that the same rules are about
    pub from: IpAddr,
    /// Addresses that the fast path forwards to where Linux does
    pub forwarded: u64,
    /// Those that it leaves to Linux
    pub left_to_linux: u64,
}

/// Something that the tables say and Linux does not.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Address, or port
    pub about: String,
    /// What the fast path does
    pub towpath: String,
    /// What Linux does
    pub linux: String,
}

/// `towpath top`: what happened in an interval
#[derive(Serialize, Deserialize, Debug)]
pub struct Top {
    /// Its length
    pub seconds: f64,
    /// Nothing is forwarded: these are the rates that would be
    #[serde(default)]
    pub shadow: bool,
    /// The tables hold all that Linux has told
    pub in_sync: bool,
    /// Settings of Linux that keep traffic in Linux
    pub policies: u64,
    /// In order of ports
    pub ports: Vec<TopPort>,
    /// Those that occurred, the most frequent first
    pub exceptions: Vec<TopException>,
    /// Connections that Linux hands over
    pub flows: FlowSummary,
    /// Where packets go, from a sample; None: not asked for
    pub prefixes: Option<TopPrefixes>,
}

/// Estimates from a sample of the packets that came in.
#[derive(Serialize, Deserialize, Debug, PartialEq)]
pub struct TopPrefixes {
    /// One packet in so many was drawn
    pub one_in: u32,
    /// Packets that were looked at
    pub seen: u64,
    /// Drawn besides, and not looked at since they were too many
    pub missed: u64,
    /// The busiest first
    pub busiest: Vec<TopPrefix>,
}

/// Rates of a prefix, a second: estimates.
#[derive(Serialize, Deserialize, Debug, PartialEq)]
pub struct TopPrefix {
    /// As in `Drawn`
    pub prefix: Option<String>,
    /// Packets to it that came in
    pub packets: f64,
    /// Their bits, Ethernet header included
    pub bits: f64,
    /// Of these packets the share that was forwarded fast
    pub fast: f64,
    /// Packets of the sample that this is said from
    pub seen: u64,
}

/// Rates of a port, a second.
#[derive(Serialize, Deserialize, Debug)]
pub struct TopPort {
    /// Its name
    pub port: String,
    /// Packets that came in here and were forwarded by the fast path
    pub rx_packets: f64,
    /// Their bits, Ethernet header included
    pub rx_bits: f64,
    /// Packets that left here from the fast path
    pub tx_packets: f64,
    /// Their bits
    pub tx_bits: f64,
    /// Packets that came in here and were handed to Linux
    pub exceptions: f64,
    /// Of the packets that came in here, the share that was forwarded fast; None if none came
    pub fast: Option<f64>,
}

/// How often packets were handed to Linux for a reason.
#[derive(Serialize, Deserialize, Debug)]
pub struct TopException {
    /// Port they came in by
    pub port: String,
    /// Short name of the reason
    pub reason: String,
    /// The reason in words
    pub text: String,
    /// How many a second
    pub packets: f64,
}

/// `towpath doctor`
#[derive(Serialize, Deserialize, Debug)]
pub struct Doctor {
    /// Version of the kernel
    pub kernel: String,
    /// Process id of the instance of this network namespace, if one runs
    pub pid: Option<u32>,
    /// Which connections are taken to be handed over, as `--flows` says it
    pub flows: String,
    /// The ports looked at
    pub ports: Vec<String>,
    /// Something stops the fast path
    pub stopped: bool,
    /// What was found, in the order in which it was looked for
    pub findings: Vec<Finding>,
}

/// Something that the fast path depends on.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Short name of what was looked at
    pub check: String,
    /// `kernel`, `process`, `settings`, `user engine`, or a port
    pub about: String,
    /// How it is
    pub state: State,
    /// What was found
    pub found: String,
    /// What it gains or costs
    pub effect: String,
    /// A command that mends it, or shows what stands in the way
    pub remedy: Option<String>,
}

/// How something is that the fast path depends on.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be
    Well,
    /// It cannot be told
    Unknown,
    /// It costs time, or keeps part of the traffic in Linux
    Slower,
    /// It keeps all traffic in Linux, or all of a family or port
    Stops,
}

/// `towpath show neighbors`
#[derive(Serialize, Deserialize, Debug)]
pub struct Neighbors {
    /// In order of port and address
    pub neighbors: Vec<Neighbor>,
}

/// A neighbour.
#[derive(Serialize, Deserialize, Debug)]
pub struct Neighbor {
    /// Port it is on
    pub port: String,
    /// Its address
    pub address: String,
    /// Its link-layer address while Linux would use it
    pub lladdr: Option<String>,
    /// State in Linux: `reachable`, `stale`, …
    pub state: String,
}

/// `towpath show nexthops`
#[derive(Serialize, Deserialize, Debug)]
pub struct Nexthops {
    /// In order of index
    pub nexthops: Vec<Nexthop>,
}

/// A next hop in the tables.
#[derive(Serialize, Deserialize, Debug)]
pub struct Nexthop {
    /// Index in the tables
    pub index: u32,
    /// Way out
    pub port: Option<String>,
    /// Gateway or directly connected host
    pub gateway: Option<String>,
    /// Destination MAC address, if packets are forwarded
    pub lladdr: Option<String>,
    /// Largest IP packet
    pub mtu: Option<u32>,
    /// Why packets go to Linux, if they do
    pub reason: Option<String>,
    /// Used since the hit flags were last looked at
    pub hit: bool,
}

/// `towpath show exceptions`
#[derive(Serialize, Deserialize, Debug)]
pub struct Exceptions {
    /// Non-zero counters first
    pub exceptions: Vec<Exception>,
    /// What was dropped on the way from workers to Linux, or where they send
    #[serde(default)]
    pub fptun: Vec<Entered>,
}

/// A counter of packets handed to Linux.
#[derive(Serialize, Deserialize, Debug)]
pub struct Exception {
    /// Port they came in by
    pub port: String,
    /// Short name of the reason
    pub reason: String,
    /// The reason in words
    pub text: String,
    /// How many
    pub packets: u64,
}

/// `towpath show stats`
#[derive(Serialize, Deserialize, Debug)]
pub struct Stats {
    /// Nothing is forwarded: the counters say what would be
    #[serde(default)]
    pub shadow: bool,
    /// In order of ports
    pub ports: Vec<PortStats>,
}

/// Counters of a port.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
pub struct PortStats {
    /// Its name
    pub port: String,
    /// Packets that came in here and were forwarded by the fast path
    pub rx_packets: u64,
    /// Their bytes, Ethernet header included
    pub rx_bytes: u64,
    /// Packets that left here from the fast path
    pub tx_packets: u64,
    /// Their bytes
    pub tx_bytes: u64,
    /// Packets that came in here and were handed to Linux
    pub exceptions: u64,
}

/// How connections that Linux hands over are doing.
#[derive(Serialize, Deserialize, Debug, Default, Clone, PartialEq, Eq)]
pub struct FlowSummary {
    /// Which ones are taken, as `--flows` says it; None if the cache manager at the other end of a socket decides
    pub mode: Option<String>,
    /// `open`: those pass that Linux has accepted; `opening`: they will soon, since the rules are new; `shut`: no rules
    /// hand any over
    pub gate: String,
    /// Connections of which one direction at least goes fast
    pub fast: u64,
    /// Connections of which Linux has not accepted a packet since its rules changed, or that a setting keeps in Linux
    pub waiting: u64,
    /// Connections that are ending, in Linux
    pub closing: u64,
    /// How often one stayed in Linux because the table was full
    pub refused: u64,
    /// Room in the table
    pub capacity: u64,
}

/// `towpath nat list`
#[derive(Serialize, Deserialize, Debug)]
pub struct Mappings {
    /// In the order of their numbers
    pub mappings: Vec<Mapping>,
}

/// A mapping of addresses at a port.
#[derive(Serialize, Deserialize, Debug)]
pub struct Mapping {
    /// Name of the port
    pub port: String,
    /// `tcp` or `udp` if it is of one port of an address; else null
    pub protocol: Option<Protocol>,
    /// Prefix inside, or address and port
    pub inside: String,
    /// As `inside`, outside
    pub outside: String,
    /// What left by the port
    pub out: MappingWay,
    /// What came in by it
    pub r#in: MappingWay,
}

/// What passed of a mapping one way, fast and by Linux.
#[derive(Serialize, Deserialize, Debug)]
pub struct MappingWay {
    /// Packets translated
    pub packets: u64,
    /// Their bytes, from the IP header on
    pub bytes: u64,
    /// Packets dropped, since they could not be translated as a whole
    pub dropped: u64,
}

/// `towpath filter list`, a page of it
#[derive(Serialize, Deserialize, Debug)]
pub struct Filters {
    /// In order of their sources
    pub filters: Vec<Filter>,
    /// Present if there are more
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<usize>,
}

/// A filter of the operator's.
#[derive(Serialize, Deserialize, Debug)]
pub struct Filter {
    /// `drop` or `pass`
    pub action: String,
    /// Source prefix
    pub from: String,
    /// Destination prefix, or null for any
    pub to: Option<String>,
    /// Protocol's name or number, or null for any
    pub protocol: Option<String>,
    /// Source port, or null
    pub sport: Option<u16>,
    /// Destination port, or null
    pub dport: Option<u16>,
    /// Port by which packets come in, or null for any
    pub port: Option<String>,
    /// Packets that it has decided over
    pub packets: u64,
    /// Their bytes, from the Ethernet header on
    pub bytes: u64,
}

/// `towpath show flows`, a page of them
#[derive(Serialize, Deserialize, Debug)]
pub struct Flows {
    /// In no order
    pub flows: Vec<Flow>,
    /// Present if there are more
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<u32>,
}

/// A connection that Linux hands over.
#[derive(Serialize, Deserialize, Debug)]
pub struct Flow {
    /// `tcp` or `udp`
    pub protocol: String,
    /// Packets of whoever began it
    pub original: FlowDirection,
    /// The answers
    pub reply: FlowDirection,
}

/// One direction of a connection: its packets as they arrive.
#[derive(Serialize, Deserialize, Debug)]
pub struct FlowDirection {
    /// Source address
    pub source: String,
    /// Source port
    pub source_port: u16,
    /// Destination address
    pub destination: String,
    /// Destination port
    pub destination_port: u16,
    /// `fast`, `waiting` (Linux has not accepted a packet since its rules changed, or a setting keeps it in Linux), `closing`
    pub state: String,
    /// Packets that went fast
    pub packets: u64,
    /// Their bytes, IP header included
    pub bytes: u64,
    /// The port that they come in by, while they go fast
    pub r#in: Option<String>,
    /// The port that they leave by, while they go fast
    pub out: Option<String>,
}

/// A line of `towpath trace --json`
#[derive(Serialize, Deserialize, Debug)]
#[serde(rename_all = "lowercase")]
pub enum TraceLine {
    /// A packet
    Packet(Box<TracedPacket>),
    /// A packet, in brief
    Drawn(Drawn),
    /// The last line
    End {
        /// Packets that the trace was for
        matched: u64,
        /// Of those, the ones that were more than it tells at once
        missed: u64,
    },
}

/// A packet of a sample.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub struct Drawn {
    /// When it arrived, nanoseconds since 1970-01-01 UTC
    pub time_ns: u64,
    /// The prefix of the route that it takes, and before it the route's kind if it leads to no other host; None: there is none
    pub prefix: Option<String>,
    /// It took the fast path
    pub fast: bool,
    /// Length of the frame in bytes
    pub length: u32,
    /// Packets drawn before this one that were not told, since that would have been too many
    pub missed: u64,
}

/// A packet that a trace saw.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub struct TracedPacket {
    /// When it arrived, nanoseconds since 1970-01-01 UTC
    pub time_ns: u64,
    /// The interface that received it
    pub port: String,
    /// The receive queue
    pub queue: u32,
    /// Length of the frame in bytes
    pub length: u32,
    /// Its ends and protocol, those inside if it came out of a tunnel; None if it is no IP packet
    pub packet: Option<String>,
    /// What became of it
    pub became: Became,
    /// The same by the tables as they were when it was told
    #[serde(flatten)]
    pub explanation: Explanation,
    /// Whether both are the same: if not, the tables have changed in between
    pub agrees: bool,
    /// Packets before it that this trace was for and did not tell
    pub missed: u64,
}

/// What became of a packet.
#[derive(Serialize, Deserialize, Clone, Debug)]
#[serde(tag = "path", rename_all = "lowercase")]
pub enum Became {
    /// The fast path sent it
    Fast {
        /// by this port's device
        port: String,
    },
    /// It was handed to Linux
    Linux {
        /// Short name of the reason
        reason: String,
        /// The reason in words
        text: String,
    },
}

/// A trace has begun.
#[derive(Serialize, Deserialize, Debug)]
pub struct TraceBegun {}

/// `towpath explain`
#[derive(Serialize, Deserialize, Clone, Debug)]
pub struct Explanation {
    /// What happens, in order
    pub steps: Vec<Step>,
    /// What becomes of the packet
    pub verdict: Verdict,
}

/// One step of the packet's way.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub struct Step {
    /// What is looked at: `port`, `policy`, `source`, `route`, `next hop`, `neighbor`, `mtu`, `capture`
    pub step: String,
    /// What is found
    pub found: String,
}

/// What becomes of a packet.
#[derive(Serialize, Deserialize, Clone, Debug)]
#[serde(tag = "path", rename_all = "lowercase")]
pub enum Verdict {
    /// It is forwarded by the fast path
    Fast {
        /// Port it leaves by
        port: String,
        /// Destination MAC address it leaves with
        destination: String,
        /// Source MAC address it leaves with
        source: String,
    },
    /// A filter drops it
    Dropped {
        /// Short name of the reason
        reason: String,
        /// The reason in words
        text: String,
        /// The filter
        detail: Option<String>,
    },
    /// It is handed to Linux
    Linux {
        /// Short name of the reason
        reason: String,
        /// The reason in words
        text: String,
        /// The object that decides
        detail: Option<String>,
    },
}
