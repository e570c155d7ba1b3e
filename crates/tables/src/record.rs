//! The records of the shared tables, as they lie in memory. No pointers, only indices; no padding; integers in the
//! machine's byte order unless a field says otherwise. The XDP program, the user engine and the manager all use these
//! definitions; nothing else in the project describes the layout.
//!
//! Fields that change while readers look are words (`W32`, `W64`: relaxed atomics). The lines of
//! nodes are immutable once published and may be read as they are.

use crate::word::{W32, W64};
use core::net::IpAddr;

/// Version of this layout; a region of another version is never adopted, only replaced.
pub const LAYOUT_VERSION: u32 = 17;
/// First word of a region's `Config`.
pub const MAGIC: u32 = u32::from_be_bytes(*b"TOWP");

/// Index into `Config::family` and per-family arrays.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum Family {
    /// IPv4
    V4 = 0,
    /// IPv6
    V6 = 1,
}

impl Family {
    /// In the order of their indices
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address
    pub const fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// Bits of the source address filter (see `Config::local_filter`).
pub const LOCAL_FILTER_BITS: u32 = 4096;

/// What holds for the whole region: one record.
#[repr(C, align(64))]
pub struct Config {
    /// `MAGIC`
    pub magic: W32,
    /// `LAYOUT_VERSION`
    pub version: W32,
    /// Hash of the record layouts, from `layout_hash()`
    pub layout: W32,
    /// Rises by one each time a writer takes the region over
    pub epoch: W32,
    /// When Linux's rules were last looked at, and what was found is in force: CLOCK_MONOTONIC_COARSE in nanoseconds
    pub heartbeat: W64,
    /// Per family: the policy word (`Obstacle`) for every packet of the family
    pub policy: [W32; 2],
    /// Per family: fields that choose among a group's next hops, `sysctl fib_multipath_hash_policy` (0 or 1)
    pub hash_policy: [W32; 2],
    /// Seed of the multipath hash
    pub hash_seed: W32,
    /// Seed of the flows' hash; changes only while there are none
    pub flow_seed: W32,
    /// Even: packets of flows pass that were accepted in this generation. Odd: none passes, and none is accepted
    pub flow_generation: W32,
    /// The set of mappings in force: 1 + its index, or 0 if there is none
    pub mappings: W32,
    /// Reserved, zero
    pub reserved: [W32; 2],
    /// Per family: the operator's filters in force, see `filtering::in_force`; 0 if there are none
    pub filters: [W32; 2],
    /// Reserved, zero
    pub rest: [W32; 14],
    /// IPv4 addresses of this host, as a bitmap over a hash of the address (`local_filter_bit`). A clear bit proves
    /// that a source is not one of ours; a set bit sends the packet to the exact check.
    pub local_filter: [W64; LOCAL_FILTER_BITS as usize / 64],
    /// The tunnels' ports by what their packets bear: 1 + the slot, or 0. A tunnel has one of the `TUNNEL_PROBES` places
    /// from its `tunnel_bucket` on.
    pub tunnels: [W32; TUNNEL_BUCKETS],
}
const _: () = assert!(size_of::<Config>() == 128 + 512 + 512);

/// Places in `Config::tunnels`.
pub const TUNNEL_BUCKETS: usize = 128;
/// Longest chain of places looked at to find a tunnel.
pub const TUNNEL_PROBES: usize = 4;

/// The first place to look for a tunnel at: addresses and key as on the wire (as in `Tunnel`), no key is key 0.
#[inline(always)]
pub const fn tunnel_bucket(local: [u32; 4], remote: [u32; 4], key: u32) -> usize {
    const fn fold([a, b, c, d]: [u32; 4]) -> u32 {
        a ^ b ^ c ^ d
    }
    let mixed = (fold(local).rotate_left(16) ^ fold(remote) ^ key.rotate_left(8)).wrapping_mul(0x9e37_79b1);
    (mixed >> 25) as usize % TUNNEL_BUCKETS
}

/// Slots in the table of ports.
pub const PORT_SLOTS: u32 = 256;

/// Queues of a port that may have sockets of the user engine (AF_XDP). The socket of a queue is element `slot *
/// SOCKET_QUEUES + queue` of the XDP program's map of sockets.
pub const SOCKET_QUEUES: u32 = 16;
/// Longest frame that goes to a socket. It fits into a chunk of a page with what the kernel keeps before it
/// (XDP_PACKET_HEADROOM; net/xdp/xsk.c `xsk_rcv`, Linux 6.1, drops what does not), and can be handed to Linux again (a page
/// less some 700 bytes; net/bpf/test_run.c `bpf_prog_test_run_xdp`).
pub const SOCKET_FRAME: usize = 3072;

/// Longest chain of slots looked at to find a port by interface index.
pub const PORT_PROBES: u32 = 4;

/// `Port::flags`
pub mod port_flags {
    /// The slot is in use by the interface in `ifindex`.
    pub const PRESENT: u32 = 1 << 0;
    /// Administratively up, with carrier, not enslaved, and served: packets may enter by it.
    pub const READY: u32 = 1 << 1;
    /// IPv4 forwarding is on (`net.ipv4.conf.<port>.forwarding`)
    pub const FORWARD_V4: u32 = 1 << 2;
    /// IPv6 forwarding is on
    pub const FORWARD_V6: u32 = 1 << 3;
    /// IPv4 redirects may be sent (`send_redirects`): a packet that leaves by this port again is Linux's
    pub const REDIRECTS: u32 = 1 << 4;
    /// Sources must be reachable by this port (`rp_filter` 1)
    pub const RP_STRICT: u32 = 1 << 5;
    /// Sources must be reachable (`rp_filter` 2)
    pub const RP_LOOSE: u32 = 1 << 6;
    /// 127.0.0.0/8 is not martian here (`route_localnet`)
    pub const ROUTE_LOCALNET: u32 = 1 << 7;
    /// Frames may carry transport checksums that a local sender left to the device (veth, tap)
    pub const PARTIAL_CSUM: u32 = 1 << 8;
    /// A VLAN sub-interface: no XDP link of its own
    pub const VLAN: u32 = 1 << 9;
    /// The driver transmits redirected frames only if they lie in one buffer (before Linux 6.3 all do,
    /// net/core/filter.c `xdp_do_redirect`): a frame in several buffers that would leave here is `EgressNotServed`,
    /// since the kernel would drop it without a word
    pub const SINGLE_BUFFER: u32 = 1 << 10;
    /// The engine may look at what travels beside frames that enter here
    pub const BESIDE: u32 = 1 << 11;
    /// A tunnel (`Port::tunnel`): no XDP link of its own
    pub const TUNNEL: u32 = 1 << 12;
    /// It belongs to a VRF: the way back to a source is looked up there, too
    pub const VRF: u32 = 1 << 13;
}

/// One port: an interface that the fast path serves, a VLAN sub-interface of one, or a tunnel. Its index in the table is
/// its *slot*: for an interface with a program, one of `PORT_PROBES` slots from `ifindex % slots` on; for the others,
/// any.
#[repr(C, align(64))]
pub struct Port {
    /// Interface index in Linux; 0 if the slot is free
    pub ifindex: W32,
    /// `port_flags`
    pub flags: W32,
    /// MAC address, see `mac_word`
    pub mac: W64,
    /// Per family: root of the routes to look up in (index into `Roots`); with `BY_SOURCE`, the index into `Sources` of the
    /// list that chooses the root
    pub root: [W32; 2],
    /// Per family: the policy word (`Obstacle`) for packets that enter here
    pub ingress_policy: [W32; 2],
    /// Index into `Vlans` of the table that gives the sub-interface for a tag; `NO_VLANS` if there are none
    pub vlans: W32,
    /// VLAN sub-interface: its tag protocol (0x8100, 0x88a8) in the high half and its identifier in the low half
    pub vlan: W32,
    /// Slot of the interface underneath (for a plain port, the slot itself)
    pub lower: W32,
    /// IP MTU in bytes
    pub mtu: W32,
    /// Interface index of the VRF that it belongs to, where Linux's rules judge connections by VRF; 0 otherwise
    pub vrf: W32,
    /// Per family: what `Flow::accepted` has for packets that come in here. 0: the slot, as always but in VRFs, where it may be
    /// the VRF's number, `PORT_SLOTS` or more: Linux makes the VRF's device the one that they came in by
    pub arrival: [W32; 2],
    /// Reserved, zero
    pub reserved: W32,
    /// What makes it a tunnel, on a line of its own
    pub tunnel: Tunnel,
}
const _: () = assert!(size_of::<Port>() == 128 && core::mem::offset_of!(Port, tunnel) == 64);

/// `Tunnel::flags`
pub mod tunnel_flags {
    /// It is one: GRE, as RFC 2784 and 2890 have it
    pub const GRE: u32 = 1 << 0;
    /// Packets to us bear a key
    pub const INPUT_KEY: u32 = 1 << 1;
    /// Packets from us bear a key
    pub const OUTPUT_KEY: u32 = 1 << 2;
    /// Packets to us bear a checksum
    pub const INPUT_CHECKSUM: u32 = 1 << 3;
    /// Packets from us bear a checksum
    pub const OUTPUT_CHECKSUM: u32 = 1 << 4;
    /// Over IPv6
    pub const V6: u32 = 1 << 5;
    /// Packets from us have the TOS or traffic class of what is inside
    pub const INHERIT_CLASS: u32 = 1 << 6;
    /// IPv6: they have the flow label of what is inside, if that has one
    pub const INHERIT_LABEL: u32 = 1 << 7;
    /// IPv6: where they would have no flow label they get one that follows from what is inside
    pub const MAKE_LABEL: u32 = 1 << 8;
    /// IPv6: they bear an encapsulation limit (RFC 2473)
    pub const LIMIT: u32 = 1 << 9;
    /// The flow label of packets from us, or 0, from this bit on
    pub const LABEL_SHIFT: u32 = 12;
}

/// A tunnel. Changed in place under `sequence`: odd while a change is under way. Addresses and keys are as on the wire.
#[repr(C, align(64))]
pub struct Tunnel {
    /// Sequence count
    pub sequence: W32,
    /// `tunnel_flags`; 0 if the port is no tunnel
    pub flags: W32,
    /// Our end; IPv4 in the first word, and the others 0
    pub local: [W32; 4],
    /// The other end
    pub remote: [W32; 4],
    /// Key of packets to us, or 0
    pub input_key: W32,
    /// Key of packets from us, or 0
    pub output_key: W32,
    /// Bits 0..8: time to live of packets from us, 0 to inherit it. Bits 8..16: their TOS or traffic class. Bits 16..24: their
    /// encapsulation limit
    pub ttl_tos: W32,
    /// Interface index of the only way out for packets from us, or 0
    pub link: W32,
    /// 0, or 1 + the `Reason` for which its packets are exceptions, in both directions
    pub policy: W32,
    /// The way to the other end: what a look-up of it among the port's routes comes to (see `lpm`), 0 if to nothing.
    /// Published by itself, but 0 in a record that was just changed
    pub way: W32,
}
const _: () = assert!(size_of::<Tunnel>() == 64);

/// A MAC address as the number as which addresses are stored and compared.
pub const fn mac_word([a, b, c, d, e, f]: [u8; 6]) -> u64 {
    destination_word(u64::from_ne_bytes([a, b, c, d, e, f, 0, 0]))
}

/// The destination, as `mac_word` gives it, of a frame with these first eight bytes.
#[inline(always)]
pub const fn destination_word(first: u64) -> u64 {
    if cfg!(target_endian = "little") { first << 16 } else { first >> 16 }
}

/// `Port::vlans` of a port without VLAN sub-interfaces.
pub const NO_VLANS: u32 = u32::MAX;

/// In `Port::root`: what it names is a list of roots by source.
pub const BY_SOURCE: u32 = 1 << 31;
/// Source prefixes in a list at most.
pub const SOURCES: usize = 8;

/// Which root to look a packet up in, by its source: rules of `ip rule` with `from`. Immutable while a port leads to it.
#[repr(C, align(64))]
pub struct SourceList {
    /// The shortest prefixes first: the last one that has the source chooses. What is not in use matches nothing
    pub prefixes: [SourcePrefix; SOURCES],
    /// For sources in none of them
    pub root: W32,
    /// Reserved, zero
    pub reserved: [W32; 15],
}
const _: () = assert!(size_of::<SourceList>() == SOURCES * 64 + 64);

/// A prefix of sources. Addresses as on the wire; IPv4 in the first half of the first word.
#[repr(C, align(64))]
pub struct SourcePrefix {
    /// Its first address
    pub address: [W64; 2],
    /// The bits that decide
    pub mask: [W64; 2],
    /// The root for them
    pub root: W32,
    /// Reserved, zero
    pub reserved: [W32; 7],
}
const _: () = assert!(size_of::<SourcePrefix>() == 64);

/// For each VLAN identifier 1 + the slot of the sub-interface's port, or 0.
#[repr(C)]
pub struct VlanTable {
    /// By VLAN identifier, two to a word: the even identifier in the low half
    pub slots: [W32; 2048],
}

/// Top level of a route table: 65536 words indexed by the first 16 bits of the address, then the leaf for packets
/// that match nothing longer than /0. See `lpm` for what a word means.
#[repr(C, align(64))]
pub struct Root {
    /// By the address's first 16 bits
    pub direct: [W32; 65536],
    /// Leaf of the default route; 0 if there is none
    pub default: W32,
    /// 0, or 1 + the family this root serves, or `FILTER_ROOT` + the family whose filters it leads to
    pub family: W32,
    /// Reserved, zero
    pub reserved: [W32; 14],
}
const _: () = assert!(size_of::<Root>() == 65536 * 4 + 64);

/// See `Root::family`.
pub const FILTER_ROOT: u32 = 3;

/// Words of a line.
pub const LINE_WORDS: usize = 16;
/// Bytes of a line.
pub const LINE_BYTES: usize = 4 * LINE_WORDS;

/// One cache line of the table of nodes. A node takes one line or several in a row: what finds the word for a value (see
/// `Node` and `Wide`), and right behind it, up to the end of the last line, the words. Immutable once published. So a
/// look-up meets one place in memory for each node.
#[repr(C, align(64))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Line {
    /// Its words
    pub words: [u32; LINE_WORDS],
}
const _: () = assert!(size_of::<Line>() == 64);

impl Line {
    /// A line of zeros.
    pub const ZERO: Line = Line { words: [0; LINE_WORDS] };

    /// The line read as the first one of a node.
    #[inline(always)]
    pub fn as_node(&self) -> &Node {
        // SAFETY: both are plain integers of the same size and alignment, without padding.
        unsafe { &*(&raw const *self).cast() }
    }

    /// The line read as the first one of a wide node.
    #[inline(always)]
    pub fn as_wide(&self) -> &Wide {
        // SAFETY: as for `as_node`.
        unsafe { &*(&raw const *self).cast() }
    }

    /// The line read as a packed wide node.
    #[inline(always)]
    pub fn as_packed_wide(&self) -> &PackedWide {
        // SAFETY: as for `as_node`.
        unsafe { &*(&raw const *self).cast() }
    }

    /// The line's bytes.
    #[inline(always)]
    pub fn bytes(&self) -> &[u8; LINE_BYTES] {
        // SAFETY: as for `as_node`.
        unsafe { &*(&raw const *self).cast() }
    }

    /// The line's bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8; LINE_BYTES] {
        // SAFETY: as for `as_node`; any bytes make a line.
        unsafe { &mut *(&raw mut *self).cast() }
    }
}

/// Position of the first stored word in a node, in words.
pub const NODE_HEAD: usize = 9;
/// Position of the first stored byte in a packed node, in bytes.
pub const PACKED_HEAD: usize = 4 * NODE_HEAD;
/// Lines of the largest node.
pub const NODE_LINES: usize = (NODE_HEAD + 256).div_ceil(LINE_WORDS);
/// So many lines at the end of the table are never used. A power of two, and no node is longer: one comparison of a node's
/// first line, and a mask over a position in it, show a verifier that a look-up stays in the table.
pub const NODE_REACH: usize = NODE_LINES.next_power_of_two();

/// Eight bits of an address: 256 words, of which only those that differ from their left neighbour are stored. The first
/// line of the node.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct Node {
    /// Bit b is set if the word for value b differs from that of b - 1; bit 0 is always set
    pub bitmap: [u64; 4],
    /// Number of set bits before each quarter of the bitmap (at most 192)
    pub counts: [u8; 4],
    /// The first stored words; the others follow in the next lines
    pub words: [u32; LINE_WORDS - NODE_HEAD],
}
const _: () = assert!(size_of::<Node>() == 64 && core::mem::offset_of!(Node, words) == NODE_HEAD * 4);

impl Node {
    /// The line.
    pub fn to_line(self) -> Line {
        // SAFETY: as for `Line::as_node`.
        unsafe { core::mem::transmute(self) }
    }
}

/// Ends in a packed wide node come in so many fours.
pub const PACKED_FOURS: usize = 5;
/// Runs of a packed wide node at most; as in `Wide`, the last of the last four is never an end.
pub const PACKED_WIDE_RUNS: usize = PACKED_FOURS * 4;
/// Position of the first stored byte in a packed wide node, in bytes.
pub const PACKED_WIDE_HEAD: usize = PACKED_FOURS * 8;

/// A wide node (see `Wide`) whose words are leaves that fit into a byte each: one line.
#[repr(C, align(64))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PackedWide {
    /// As in `Wide`
    pub ends: [[u16; 4]; PACKED_FOURS],
    /// See `Word::packed`
    pub leaves: [u8; LINE_BYTES - PACKED_WIDE_HEAD],
}
const _: () = assert!(size_of::<PackedWide>() == 64 && core::mem::offset_of!(PackedWide, leaves) == PACKED_WIDE_HEAD);
const _: () = assert!(PACKED_WIDE_HEAD + PACKED_WIDE_RUNS <= LINE_BYTES);

/// Ends in a wide node come in so many fours.
pub const WIDE_FOURS: usize = 7;
/// Last values that a wide node stores: one less than there is room for, so the last of the last four is never the end of
/// a run.
pub const WIDE_ENDS: usize = WIDE_FOURS * 4 - 1;
/// Words of a wide node at most.
pub const WIDE_RUNS: usize = WIDE_ENDS + 1;
/// Stands for an end that is not there; no run but the last one ends here.
pub const NO_END: u16 = u16::MAX;
/// Position of the first stored word in a wide node, in words.
pub const WIDE_HEAD: usize = WIDE_FOURS * 2;

/// Sixteen bits of an address that have few different words: each stands for a run of values. The first line of the
/// node; what leads to it is marked (see `lpm`).
#[repr(C, align(64))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wide {
    /// Last value of each run but the last one, ascending, then `NO_END`
    pub ends: [[u16; 4]; WIDE_FOURS],
    /// The first stored words; the others follow in the next lines
    pub words: [u32; LINE_WORDS - WIDE_HEAD],
}
const _: () = assert!(size_of::<Wide>() == 64 && core::mem::offset_of!(Wide, words) == WIDE_HEAD * 4);

impl Wide {
    /// The line.
    pub fn to_line(self) -> Line {
        // SAFETY: as for `Line::as_node`.
        unsafe { core::mem::transmute(self) }
    }
}

/// What a next hop does with a packet: low byte of `Nexthop::state`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum NexthopKind {
    /// The slot is free
    Free = 0,
    /// Send it: `l2` is complete
    Forward = 1,
    /// Hand it to Linux for the reason in the second byte
    Exception = 2,
    /// Put it into the tunnel that `port` is
    Tunnel = 3,
    /// As `Forward`, by a port with mappings
    Mapped = 4,
}

/// One next hop. Changed in place under `sequence`: odd while a change is under way.
#[repr(C, align(64))]
pub struct Nexthop {
    /// Sequence count
    pub sequence: W32,
    /// `NexthopKind` in bits 0..8, `Reason` in bits 8..16, number of VLAN tags in `l2` (0, 1, 2) in bits 16..24
    pub state: W32,
    /// Slot of the port it leaves by
    pub port: W32,
    /// Slot of the interface underneath, whose driver transmits (differs from `port` for VLAN sub-interfaces)
    pub device: W32,
    /// Largest IP packet that may leave: the smaller of the port's and the route's MTU
    pub mtu: W32,
    /// Hit flag: set to 1 by an engine when a packet took this next hop, cleared by the manager
    pub hit: W32,
    /// Destination MAC, source MAC and up to two VLAN tags (TPID and TCI each), as they are on the wire; the
    /// EtherType follows from the packet
    pub l2: [W64; 3],
    /// Reserved, zero
    pub reserved: [W32; 4],
}
const _: () = assert!(size_of::<Nexthop>() == 64);

/// What a next hop is, for tools and for a daemon that adopts the tables; engines do not read it.
#[repr(C)]
pub struct NexthopKey {
    /// Interface index in Linux, 0 for next hops without one (local, blackhole, …)
    pub ifindex: W32,
    /// 0 none, 4 or 6: family of `gateway`
    pub family: W32,
    /// Gateway (or directly connected host), network byte order; IPv4 in the first four bytes
    pub gateway: [W32; 4],
    /// Route MTU metric, 0 if there is none
    pub mtu: W32,
    /// For next hops that are always exceptions: 1 + their `Reason`; 0 otherwise
    pub reason: W32,
}
const _: () = assert!(size_of::<NexthopKey>() == 32);

/// Buckets of a group; weights are granular to one part in this many.
pub const GROUP_BUCKETS: usize = 256;

/// A next-hop group: the flow's hash selects a bucket, the bucket names a next hop.
#[repr(C, align(64))]
pub struct Group {
    /// Next-hop indices
    pub buckets: [W32; GROUP_BUCKETS],
}

/// `Flow::state`
pub mod flow_state {
    /// The family plus one and, from bit 8 on, the protocol; 0 in a record that is not in use
    pub const KIND: u32 = 0xffff;
    /// A FIN or RST was seen: every packet is Linux's
    pub const CLOSED: u32 = 1 << 16;
    /// A FIN was seen: that stays so, whatever CM tells of the time before it
    pub const FINISHED: u32 = 1 << 17;
}

/// A connection that Linux handed over. Only the state's bits, what was accepted and the counters change while it can be
/// found; a record is used again after a grace period only.
#[repr(C, align(64))]
pub struct Flow {
    /// `flow_state`
    pub state: W32,
    /// Reserved, zero
    pub reserved: W32,
    /// Per direction, what Linux accepted last of it: the generation in the upper half, then 1 + the slot of the port that it
    /// came in by (or its `Port::arrival`) and 1 + that of the one that it left by, in 16 bits each; 0 if nothing
    pub accepted: [W64; 2],
    /// Per direction, source and destination port as packets of it arrive, as on the wire
    pub ports: [W32; 2],
    /// Per direction, source and destination address as packets of it arrive, as on the wire; both IPv4 addresses in the
    /// first word
    pub addresses: [[W64; 4]; 2],
    /// Per direction
    pub counters: [FlowCounters; 2],
}
const _: () = assert!(size_of::<Flow>() == 128);

/// What passed of a flow in one direction.
#[repr(C)]
pub struct FlowCounters {
    /// Packets
    pub packets: W64,
    /// Their bytes, from the IP header on
    pub bytes: W64,
}

/// Places in a line of the index of flows.
pub const FLOW_PLACES: usize = 8;

/// A line of the index of flows. The upper half of a word is the tag of a tuple, which no other one in the line has; the lower
/// half twice the flow's index plus two, and one more for the second direction; 0 if the place is free.
#[repr(C, align(64))]
pub struct FlowLine {
    /// By place
    pub places: [W64; FLOW_PLACES],
}
const _: () = assert!(size_of::<FlowLine>() == 64);

/// Mappings at most.
pub const MAPPINGS: usize = 1024;
/// Places of the index of mappings. A mapping is there up to six times: each way by its port, by the protocol alone and by
/// neither.
pub const MAPPING_PLACES: usize = 16 * MAPPINGS;
/// Different prefix lengths of the mappings of a port and family at most; address and port count as one more.
pub const MAPPING_LENGTHS: usize = 8;

/// `Mapping::kind`'s prefix length of a mapping of one address with one TCP or UDP port.
pub const MAPPING_SERVICE: u32 = 129;

/// Addresses inside that are others outside, beyond a port. Immutable while its set is in force.
#[repr(C)]
pub struct Mapping {
    /// Slot of the port in bits 0..8, family in bits 8..16, prefix length or `MAPPING_SERVICE` in bits 16..24, and bit 31; 0 if
    /// not in use
    pub kind: W32,
    /// Reserved, zero
    pub reserved: W32,
    /// First address inside, and outside, as on the wire; IPv4 in the first half of the first word
    pub addresses: [[W64; 2]; 2],
    /// Of `MAPPING_SERVICE`, inside and outside: the protocol in bits 16..24, the port as on the wire in bits 0..16; else 0
    pub services: [W32; 2],
    /// Reserved, zero
    pub rest: [W64; 2],
}
const _: () = assert!(size_of::<Mapping>() == 64);

/// All mappings, as they are in force at once. There are two sets: one is in force, the other can be written.
#[repr(C, align(64))]
pub struct MappingSet {
    /// Seed of the index
    pub seed: W32,
    /// Reserved, zero
    pub reserved: [W32; 15],
    /// The bits that a prefix of each length has, as on the wire
    pub masks: [[W64; 2]; 256],
    /// By slot and family: 1 + each prefix length that there is, a byte each, the longest in the lowest byte
    pub lengths: [[W64; 2]; PORT_SLOTS as usize],
    /// 0 or 1 + a mapping's index: `mapping::places` says where
    pub places: [W32; MAPPING_PLACES],
    /// The mappings
    pub mappings: [Mapping; MAPPINGS],
}

/// Counters of a mapping on one CPU, written by that CPU only: for what leaves by its port, and for what comes in. Index in
/// the table: `cpu * MAPPINGS + mapping`.
#[repr(C, align(64))]
pub struct MappingCounters {
    /// Packets translated
    pub packets: [W64; 2],
    /// Their bytes, from the IP header on
    pub bytes: [W64; 2],
    /// Packets dropped, since they could not be translated as a whole
    pub dropped: [W64; 2],
    /// Reserved, zero
    pub reserved: [W64; 2],
}
const _: () = assert!(size_of::<MappingCounters>() == 64);

/// The counters of one CPU, by mapping.
pub type CpuMappings = [MappingCounters; MAPPINGS];

/// Filters at most.
pub const FILTERS: usize = 1 << 20;
/// Filters that a packet is compared with at most.
pub const FILTER_STEPS: usize = 32;

/// `Filter::state`
pub mod filter_state {
    /// The record is in use
    pub const USED: u32 = 1 << 0;
    /// What it matches passes; without this bit it is dropped
    pub const PASS: u32 = 1 << 1;
}

/// What the operator has dropped, or passed in spite of another filter. Found by the source (`Root::family`), and there is a
/// half in force and one that can be written: index `2 * number + half`. Number 0 is never used.
#[repr(C, align(64))]
pub struct Filter {
    /// `filter_state`
    pub state: W32,
    /// Index of the filter that decides if this one does not match, or 0
    pub next: W32,
    /// Index of the interface that the frame must come in by, or 0
    pub ifindex: W32,
    /// Reserved, zero
    pub reserved: W32,
    /// What `filtering::Subject::transport` must be
    pub transport: W64,
    /// The bits of it that count
    pub transport_mask: W64,
    /// What the destination must be, as on the wire; IPv4 in the first half of the first word
    pub destination: [W64; 2],
    /// The bits of it that count
    pub destination_mask: [W64; 2],
}
const _: () = assert!(size_of::<Filter>() == 64);

/// The rest of a filter, for a daemon that adopts the tables; engines do not read it.
#[repr(C)]
pub struct FilterKey {
    /// First source address, as `Filter::destination`
    pub source: [W64; 2],
    /// Length of the source prefix in bits 0..8, of the destination's in bits 8..16, and 1 + the family in bits 16..24
    pub lengths: W32,
    /// Reserved, zero
    pub reserved: [W32; 3],
}
const _: () = assert!(size_of::<FilterKey>() == 32);

/// Filters that are counted in one record.
pub const FILTERS_COUNTED: usize = 4;

/// Counters of some filters on one CPU, written by that CPU only. Index in the table: `number / FILTERS_COUNTED * CPUs + cpu`,
/// so that filters can become more.
#[repr(C, align(64))]
pub struct FilterCounters {
    /// Packets that a filter decided over, by `number % FILTERS_COUNTED`
    pub packets: [W64; FILTERS_COUNTED],
    /// Their bytes, from the Ethernet header on
    pub bytes: [W64; FILTERS_COUNTED],
}
const _: () = assert!(size_of::<FilterCounters>() == 64);

/// Counters of one port on one CPU, written by that CPU only. Index in the table: `cpu * port slots + slot`.
#[repr(C, align(64))]
pub struct PortStats {
    /// Packets and bytes (from the Ethernet header on, without FCS) that entered here and were forwarded fast
    pub rx_packets: W64,
    /// See `rx_packets`
    pub rx_bytes: W64,
    /// Packets and bytes that left by this port from the fast path
    pub tx_packets: W64,
    /// See `tx_packets`
    pub tx_bytes: W64,
    /// Packets counted in `tx_packets` that found no room in the port's transmit ring (user engine; what a driver drops
    /// after an XDP redirect is in the interface's own statistics)
    pub tx_lost: W64,
    /// Exceptions that could not be handed to Linux (user engine)
    pub exceptions_lost: W64,
    /// Reserved, zero
    pub reserved: [W64; 2],
    /// Exceptions of packets that entered here, by `Reason`
    pub exceptions: [W64; crate::reason::REASONS],
}
const _: () = assert!(size_of::<PortStats>() == 512);

/// The counters of one CPU, by slot.
pub type CpuStats = [PortStats; PORT_SLOTS as usize];

/// The shared tables, each an array of one record type. Names are the names of the BPF maps.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum TableId {
    /// `Config`, one element
    Config = 0,
    /// `Port` by slot
    Ports = 1,
    /// `VlanTable`
    Vlans = 2,
    /// `Root`
    Roots = 3,
    /// `Line`; a node is named by its first one, and line 0 is never used
    Nodes = 4,
    /// `Nexthop`; 0 is never used
    Nexthops = 5,
    /// `NexthopKey`, as many as next hops
    NexthopKeys = 6,
    /// `Group`
    Groups = 7,
    /// `PortStats`
    Stats = 8,
    /// `Flow`
    Flows = 9,
    /// `FlowLine`; their number is a power of two
    FlowLines = 10,
    /// `MappingSet`, two elements
    Mappings = 11,
    /// `MappingCounters`
    MappingStats = 12,
    /// `Filter`; with one record there have never been any
    Filters = 13,
    /// `FilterKey`, as many as filters
    FilterKeys = 14,
    /// `FilterCounters`
    FilterStats = 15,
    /// `SourceList`
    Sources = 16,
}

impl TableId {
    /// Every table.
    pub const ALL: [TableId; 17] = [
        TableId::Config,
        TableId::Ports,
        TableId::Vlans,
        TableId::Roots,
        TableId::Nodes,
        TableId::Nexthops,
        TableId::NexthopKeys,
        TableId::Groups,
        TableId::Stats,
        TableId::Flows,
        TableId::FlowLines,
        TableId::Mappings,
        TableId::MappingStats,
        TableId::Filters,
        TableId::FilterKeys,
        TableId::FilterStats,
        TableId::Sources,
    ];

    /// Name of the BPF map and of its pin.
    pub const fn name(self) -> &'static str {
        match self {
            TableId::Config => "config",
            TableId::Ports => "ports",
            TableId::Vlans => "vlans",
            TableId::Roots => "roots",
            TableId::Nodes => "nodes",
            TableId::Nexthops => "nexthops",
            TableId::NexthopKeys => "nexthop_keys",
            TableId::Groups => "groups",
            TableId::Stats => "stats",
            TableId::Flows => "flows",
            TableId::FlowLines => "flow_lines",
            TableId::Mappings => "mappings",
            TableId::MappingStats => "mapping_stats",
            TableId::Filters => "filters",
            TableId::FilterKeys => "filter_keys",
            TableId::FilterStats => "filter_stats",
            TableId::Sources => "sources",
        }
    }

    /// The section of global data as which XDP programs see the table: its map has one element, which holds all records.
    pub const fn section(self) -> &'static str {
        match self {
            TableId::Config => ".bss.config",
            TableId::Ports => ".bss.ports",
            TableId::Vlans => ".bss.vlans",
            TableId::Roots => ".bss.roots",
            TableId::Nodes => ".bss.nodes",
            TableId::Nexthops => ".bss.nexthops",
            TableId::NexthopKeys => ".bss.nexthop_keys",
            TableId::Groups => ".bss.groups",
            TableId::Stats => ".bss.stats",
            TableId::Flows => ".bss.flows",
            TableId::FlowLines => ".bss.flow_lines",
            TableId::Mappings => ".bss.mappings",
            TableId::MappingStats => ".bss.mapping_stats",
            TableId::Filters => ".bss.filters",
            TableId::FilterKeys => ".bss.filter_keys",
            TableId::FilterStats => ".bss.filter_stats",
            TableId::Sources => ".bss.sources",
        }
    }

    /// What stands in an XDP program for the number of the table's records, until whoever loads the program puts the
    /// number there.
    pub const fn length_mark(self) -> u64 {
        (MAGIC as u64) << 32 | self as u64
    }

    /// The table whose length this stands for.
    pub fn from_length_mark(mark: u64) -> Option<TableId> {
        TableId::ALL.into_iter().find(|id| id.length_mark() == mark)
    }

    /// Bytes of one element; always a multiple of 8, so a BPF array has no gaps between elements.
    pub const fn element_size(self) -> usize {
        match self {
            TableId::Config => size_of::<Config>(),
            TableId::Ports => size_of::<Port>(),
            TableId::Vlans => size_of::<VlanTable>(),
            TableId::Roots => size_of::<Root>(),
            TableId::Nodes => size_of::<Line>(),
            TableId::Nexthops => size_of::<Nexthop>(),
            TableId::NexthopKeys => size_of::<NexthopKey>(),
            TableId::Groups => size_of::<Group>(),
            TableId::Stats => size_of::<PortStats>(),
            TableId::Flows => size_of::<Flow>(),
            TableId::FlowLines => size_of::<FlowLine>(),
            TableId::Mappings => size_of::<MappingSet>(),
            TableId::MappingStats => size_of::<MappingCounters>(),
            TableId::Filters => size_of::<Filter>(),
            TableId::FilterKeys => size_of::<FilterKey>(),
            TableId::FilterStats => size_of::<FilterCounters>(),
            TableId::Sources => size_of::<SourceList>(),
        }
    }
}
