//! What rules may read of a packet that goes fast, and whether it is the same for all packets of its connection's direction.
//!
//! Such a packet is the whole of a datagram or segment without options of IP (`towpath_pipeline::flow`), of a connection that
//! was answered, and leaves by the port by which Linux let others of its direction leave. Numbers are those of
//! include/uapi/linux/netfilter/nf_tables.h, Linux 6.1. What is not in here may change from packet to packet.

use super::super::netfilter::pf;
use super::super::nl::{be32, find};
use super::bits::Byte;
use towpath_tables::record::Family;
use towpath_wire::ethernet as ethertype;
use towpath_wire::transport::{Tcp, protocol};

/// Packets between which rules may not tell any more.
#[derive(Clone, Copy, Debug)]
pub struct Class {
    pub family: Family,
    /// IP's number of TCP or UDP
    pub protocol: u8,
    /// Connection tracking has said what it is, and that it is no other than established
    pub tracked: bool,
    /// What they have in common of the way in
    pub by: By,
}

/// By what packets came in that may stand for each other (`towpath_pipeline::accept`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum By {
    /// The same interface
    Interface,
    /// The same VRF: they have its device for the one that they came in by (drivers/net/vrf.c, `vrf_ip_rcv`)
    Vrf,
    /// The same VRF, but they have their ports yet: in prerouting, which they pass once so and once with the VRF's device
    Ports,
}

impl By {
    /// Of which ports of a VRF do not differ.
    fn same(self) -> Byte {
        if self == Self::Interface { Byte::FIXED } else { Byte::VARYING }
    }

    /// The same for the interface that they came in by.
    pub fn device(self) -> Byte {
        if self == Self::Ports { Byte::VARYING } else { Byte::FIXED }
    }
}

impl Class {
    /// The netfilter family.
    pub fn pf(self) -> u8 {
        match self.family {
            Family::V4 => pf::IPV4,
            Family::V6 => pf::IPV6,
        }
    }

    /// As on the wire
    fn ethertype(self) -> [u8; 2] {
        match self.family {
            Family::V4 => ethertype::IPV4,
            Family::V6 => ethertype::IPV6,
        }
        .to_be_bytes()
    }
}

/// NF_CT_STATE_BIT(IP_CT_ESTABLISHED)
const ESTABLISHED: u32 = 2;
/// IPS_SEEN_REPLY and IPS_CONFIRMED, which all have; IPS_EXPECTED, _SRC_NAT, _DST_NAT and both _NAT_DONE, which stay.
const STATUS: u32 = 0x002 | 0x008;
const STATUS_FIXED: u32 = 0x001 | 0x010 | 0x020 | 0x080 | 0x100;

type Attributes<'a> = [(u16, &'a [u8])];

fn number(data: &Attributes<'_>, kind: u16) -> Option<u32> {
    find(data, kind).and_then(be32)
}

fn word(value: u32, known: u32, fixed: u32) -> Vec<Byte> {
    let bytes = value.to_ne_bytes().into_iter().zip(known.to_ne_bytes()).zip(fixed.to_ne_bytes());
    bytes.map(|((value, known), fixed)| Byte::partly(value, known, fixed)).collect()
}

/// What `meta` loads, and what it is called.
pub fn meta(class: Class, data: &Attributes<'_>) -> (Vec<Byte>, String) {
    let key = number(data, 2);
    let bytes = match key {
        Some(1) => class.ethertype().map(Byte::known).to_vec(),
        // mark, oif, its group
        Some(3 | 5 | 22) => vec![Byte::FIXED; 4],
        // its name and kind
        Some(7 | 27) => vec![Byte::FIXED; 16],
        // its type
        Some(9) => vec![Byte::FIXED; 2],
        // iif, its group
        Some(4 | 21) => vec![class.by.device(); 4],
        // its name and kind
        Some(6 | 26) => vec![class.by.device(); 16],
        // its type
        Some(8) => vec![class.by.device(); 2],
        Some(33) => vec![class.by.same(); 4],
        Some(34) => vec![class.by.same(); 16],
        Some(15) => vec![Byte::known(class.pf())],
        Some(16) => vec![Byte::known(class.protocol)],
        // PACKET_HOST
        Some(19) => vec![Byte::known(0)],
        _ => vec![Byte::VARYING; 16],
    };
    let name = match key {
        Some(0) => "length",
        Some(2) => "priority",
        Some(4) => "iif",
        Some(6) => "iifname",
        Some(8) => "iiftype",
        Some(21) => "iifgroup",
        Some(26) => "iifkind",
        Some(33) => "sdif",
        Some(34) => "sdifname",
        Some(13) => "rtclassid",
        Some(20) => "cpu",
        Some(24) => "random",
        Some(30) => "time",
        Some(31) => "day",
        Some(32) => "hour",
        _ => "",
    };
    (bytes, format!("meta {name}").trim().to_owned())
}

/// Bytes that `ct` sets: a label's, or a number's.
pub fn ct_length(data: &Attributes<'_>) -> usize {
    if number(data, 2) == Some(13) { 16 } else { 4 }
}

/// What `ct` loads, and what it is called.
pub fn ct(class: Class, data: &Attributes<'_>) -> (Vec<Byte>, String) {
    let key = number(data, 2);
    let address = match class.family {
        Family::V4 => 4,
        Family::V6 => 16,
    };
    let bytes = match key {
        Some(0) if class.tracked => word(ESTABLISHED, u32::MAX, u32::MAX),
        // state, mark, eventmask, id, src_ip, dst_ip
        Some(0 | 3 | 18 | 19 | 20 | 23) => vec![Byte::FIXED; 4],
        Some(1) => vec![Byte::FIXED],
        Some(2) if class.tracked => word(STATUS, STATUS, STATUS_FIXED),
        // helper, label, src_ip6, dst_ip6
        Some(6 | 13 | 21 | 22) => vec![Byte::FIXED; 16],
        Some(7) => vec![Byte::known(class.pf())],
        Some(8 | 9) => vec![Byte::FIXED; address],
        Some(10) => vec![Byte::known(class.protocol)],
        // ports, zone
        Some(11 | 12 | 17) => vec![Byte::FIXED; 2],
        _ => vec![Byte::VARYING; 16],
    };
    let name = match key {
        Some(2) => "status",
        Some(4) => "secmark",
        Some(5) => "expiration",
        Some(14) => "packets",
        Some(15) => "bytes",
        Some(16) => "avgpkt",
        _ => "",
    };
    (bytes, format!("ct {name}").trim().to_owned())
}

/// What `fib` loads, and what it is called: by addresses, the mark and interfaces, while routes are what they are.
pub fn fib(class: Class, data: &Attributes<'_>) -> (Vec<Byte>, String) {
    /// NFTA_FIB_F_IIF
    const IIF: u32 = 1 << 3;
    /// NFTA_FIB_F_PRESENT
    const PRESENT: u32 = 1 << 5;
    let has = |flag| number(data, 3).is_some_and(|flags| flags & flag != 0);
    let (present, byte) = (has(PRESENT), if has(IIF) { class.by.device() } else { Byte::FIXED });
    let length = match number(data, 2) {
        // Index, name, type of an address
        Some(1 | 3) => 4,
        Some(2) if present => 4,
        Some(2) => 16,
        _ => return (vec![Byte::VARYING; 16], "fib".to_owned()),
    };
    (vec![byte; length], "fib".to_owned())
}

/// What `payload` loads, and what it is called.
pub fn payload(class: Class, data: &Attributes<'_>) -> (Vec<Byte>, String) {
    let (base, offset) = (number(data, 2), number(data, 3).unwrap_or(0));
    let length = number(data, 4).unwrap_or(0).min(64);
    let byte = |at: u32| match base {
        Some(0) => link(class, at),
        Some(1) => network(class, at),
        Some(2) => transport(class, at),
        _ => Byte::VARYING,
    };
    let header = match base {
        Some(0) => "link",
        Some(1) => "network",
        Some(2) => "transport",
        _ => "inner",
    };
    let bytes = (0..length).map(|at| byte(offset.saturating_add(at))).collect();
    (bytes, format!("payload ({header} header, byte {offset})"))
}

/// The source may be any of those who send the connection's packets here.
fn link(class: Class, at: u32) -> Byte {
    let [high, low] = class.ethertype();
    match at {
        0..6 => class.by.same(),
        12 => Byte::known(high),
        13 => Byte::known(low),
        _ => Byte::VARYING,
    }
}

fn network(class: Class, at: u32) -> Byte {
    match (class.family, at) {
        (Family::V4, 0) => Byte::known(0x45),
        // No fragment, but for what else is in these bits
        (Family::V4, 6) => Byte::partly(0, 0x3f, 0),
        (Family::V4, 7) => Byte::known(0),
        (Family::V4, 9) | (Family::V6, 6) => Byte::known(class.protocol),
        (Family::V4, 12..20) | (Family::V6, 8..40) => Byte::FIXED,
        (Family::V6, 0) => Byte::partly(0x60, 0xf0, 0),
        _ => Byte::VARYING,
    }
}

fn transport(class: Class, at: u32) -> Byte {
    match at {
        0..4 => Byte::FIXED,
        13 if class.protocol == protocol::TCP => Byte::partly(Tcp::ACK, TURNS, 0),
        _ => Byte::VARYING,
    }
}

/// Segments with these go fast only if they have ACK, and nothing of the others.
pub const TURNS: u8 = Tcp::SYN | Tcp::FIN | Tcp::RST | Tcp::ACK;
