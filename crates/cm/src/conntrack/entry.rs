//! An entry of connection tracking as ctnetlink tells it (include/uapi/linux/netfilter/nfnetlink_conntrack.h,
//! net/netfilter/nf_conntrack_netlink.c, Linux 6.1).

use crate::decode::{address, attrs, family_number, fixed, split};
use crate::error::CmError;
use crate::guard::nl::attr;
use std::net::IpAddr;
use towpath_tables::flow::{Connection, Tuple};
use towpath_tables::record::Family;
use towpath_wire::transport::protocol;

const WHAT: &str = "conntrack entry";

/// Bits of an entry's status (include/uapi/linux/netfilter/nf_conntrack_common.h).
pub mod status {
    /// It was seen in both directions
    pub const SEEN_REPLY: u32 = 1 << 1;
    /// It is not given up early
    pub const ASSURED: u32 = 1 << 2;
    /// Its first packet has left
    pub const CONFIRMED: u32 = 1 << 3;
    /// Sequence numbers are changed
    pub const SEQ_ADJUST: u32 = 1 << 6;
    /// It is being removed
    pub const DYING: u32 = 1 << 9;
    /// Its timeout must not be changed
    pub const FIXED_TIMEOUT: u32 = 1 << 10;
    /// It is none, but says how others are to be made
    pub const TEMPLATE: u32 = 1 << 11;
    /// It is one of two that share a tuple
    pub const NAT_CLASH: u32 = 1 << 12;
    /// A rule gave it a helper
    pub const HELPER: u32 = 1 << 13;
    /// It is in a flowtable
    pub const OFFLOAD: u32 = 1 << 14;
}

/// TCP_CONNTRACK_ESTABLISHED
pub const ESTABLISHED: u8 = 3;
/// IP_CT_TCP_FLAG_BE_LIBERAL: sequence numbers outside of the window do not matter
const BE_LIBERAL: u8 = 8;
/// IP_CT_TCP_FLAG_MAXACK_SET: it is known what this end has acknowledged
const MAXACK_SET: u8 = 0x20;

/// Attributes of an entry, CTA_*.
mod cta {
    pub const TUPLE_ORIG: u16 = 1;
    pub const TUPLE_REPLY: u16 = 2;
    pub const STATUS: u16 = 3;
    pub const PROTOINFO: u16 = 4;
    pub const HELP: u16 = 5;
    pub const TIMEOUT: u16 = 7;
    pub const MARK: u16 = 8;
    pub const ZONE: u16 = 18;
    pub const LABELS: u16 = 22;
    pub const SYNPROXY: u16 = 24;
}
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const TUPLE_ZONE: u16 = 3;
/// Attributes of a nested protocol: number, source port, destination port.
const PROTO: [u16; 3] = [1, 2, 3];
const PROTOINFO_TCP: u16 = 1;
const TCP_STATE: u16 = 1;
/// Flags of the original direction and of the reply
const TCP_FLAGS: [u16; 2] = [4, 5];
const NESTED: u16 = 0x8000;

/// What is known of a TCP connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tcp {
    /// TCP_CONNTRACK_*
    pub state: u8,
    /// Windows are checked in neither direction
    pub liberal: bool,
}

/// Bits of connection labels (NF_CT_LABELS_MAX_SIZE bytes).
pub type Labels = [u8; 16];

/// A TCP or UDP connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Its tuples
    pub connection: Connection,
    /// `status` bits
    pub status: u32,
    /// Connection mark
    pub mark: u32,
    /// Connection labels, if there are any and they were told: an event may leave them out, but a dump does not
    pub labels: Option<Labels>,
    /// Seconds until it is removed; not told of entries in a flowtable
    pub timeout: Option<u32>,
    /// State of TCP; told only when it may have changed, and not of entries in a flowtable
    pub tcp: Option<Tcp>,
    /// It has a zone other than 0, in one direction or both
    pub zoned: bool,
    /// It has a helper
    pub helped: bool,
    /// SYNPROXY answered for it
    pub proxied: bool,
}

impl Entry {
    /// The entry in a message behind its netlink header; None if it is neither TCP nor UDP.
    pub fn parse(payload: &[u8]) -> Result<Option<Self>, CmError> {
        let (_, attributes) = split::<4>(WHAT, payload)?;
        let (mut original, mut reply) = (None, None);
        let (mut status, mut mark, mut timeout, mut tcp) = (0, 0, None, None);
        let (mut zoned, mut helped, mut proxied, mut labels) = (false, false, false, None);
        for attribute in attrs(WHAT, attributes) {
            let (kind, value) = attribute?;
            match kind {
                cta::TUPLE_ORIG | cta::TUPLE_REPLY => {
                    let (tuple, zone) = tuple(value)?;
                    let Some(tuple) = tuple else { return Ok(None) };
                    zoned |= zone;
                    *(if kind == cta::TUPLE_ORIG { &mut original } else { &mut reply }) = Some(tuple);
                }
                cta::STATUS => status = be32(value)?,
                cta::PROTOINFO => tcp = protoinfo(value)?,
                cta::HELP => helped = true,
                cta::TIMEOUT => timeout = Some(be32(value)?),
                cta::MARK => mark = be32(value)?,
                cta::ZONE => zoned = true,
                cta::LABELS => labels = Some(fixed(WHAT, value)?),
                cta::SYNPROXY => proxied = synproxy(value)?,
                _ => {}
            }
        }
        let missing = || CmError::decode(WHAT, "a direction's tuple is missing");
        let (original, reply) = (original.ok_or_else(missing)?, reply.ok_or_else(missing)?);
        let mixed = || CmError::decode(WHAT, format!("its tuples do not fit: {original:?}, {reply:?}"));
        let connection = Connection::new(original, reply).ok_or_else(mixed)?;
        Ok(Some(Self { connection, status, mark, labels, timeout, tcp, zoned, helped, proxied }))
    }

    /// Whether all these status bits are set.
    pub fn is(&self, bits: u32) -> bool {
        self.status & bits == bits
    }
}

fn be32(value: &[u8]) -> Result<u32, CmError> {
    fixed(WHAT, value).map(u32::from_be_bytes)
}

/// A tuple, unless it is of another protocol than TCP and UDP, and whether it has a zone.
fn tuple(value: &[u8]) -> Result<(Option<Tuple>, bool), CmError> {
    let (mut ends, mut ports, mut protocol, mut zone) = ([None; 2], [None; 2], 0, false);
    for attribute in attrs(WHAT, value) {
        match attribute? {
            (TUPLE_IP, value) => {
                for attribute in attrs(WHAT, value) {
                    let (kind, value) = attribute?;
                    // IPv4 source and destination, IPv6 source and destination
                    if let 1..=4 = kind {
                        ends[usize::from((kind - 1) % 2)] = Some(address(WHAT, value)?);
                    }
                }
            }
            (TUPLE_PROTO, value) => {
                for attribute in attrs(WHAT, value) {
                    match attribute? {
                        (kind, value) if kind == PROTO[0] => [protocol] = fixed(WHAT, value)?,
                        (kind, value) if kind == PROTO[1] => ports[0] = Some(fixed(WHAT, value)?),
                        (kind, value) if kind == PROTO[2] => ports[1] = Some(fixed(WHAT, value)?),
                        _ => {}
                    }
                }
            }
            (TUPLE_ZONE, _) => zone = true,
            _ => {}
        }
    }
    if !matches!(protocol, protocol::TCP | protocol::UDP) {
        return Ok((None, zone));
    }
    match (ends, ports) {
        ([Some(source), Some(destination)], [Some(from), Some(to)]) => {
            let (source_port, destination_port) = (u16::from_be_bytes(from), u16::from_be_bytes(to));
            Ok((Some(Tuple { source, destination, source_port, destination_port, protocol }), zone))
        }
        _ => Err(CmError::decode(WHAT, "a tuple without all of its addresses and ports")),
    }
}

fn protoinfo(value: &[u8]) -> Result<Option<Tcp>, CmError> {
    let mut found = None;
    for attribute in attrs(WHAT, value) {
        let (PROTOINFO_TCP, value) = attribute? else { continue };
        let (mut state, mut liberal) = (None, [false; 2]);
        for attribute in attrs(WHAT, value) {
            let (kind, value) = attribute?;
            match TCP_FLAGS.iter().position(|flags| *flags == kind) {
                Some(direction) => liberal[direction] = value.first().is_some_and(|flags| flags & BE_LIBERAL != 0),
                None if kind == TCP_STATE => state = value.first().copied(),
                None => {}
            }
        }
        found = state.map(|state| Tcp { state, liberal: liberal == [true; 2] });
    }
    Ok(found)
}

/// Entries that were made by ctnetlink have room for SYNPROXY's numbers, all of them 0.
fn synproxy(value: &[u8]) -> Result<bool, CmError> {
    let mut proxied = false;
    for attribute in attrs(WHAT, value) {
        proxied |= attribute?.1.iter().any(|byte| *byte != 0);
    }
    Ok(proxied)
}

/// nfgenmsg and attribute that name the entry with this original tuple.
pub fn named(original: &Tuple) -> Vec<u8> {
    let family = Family::of(original.source);
    let octets = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let first = if original.source.is_ipv4() { 1 } else { 3 };
    let ends = [attr(first, &octets(original.source)), attr(first + 1, &octets(original.destination))].concat();
    let proto = [
        attr(PROTO[0], &[original.protocol]),
        attr(PROTO[1], &original.source_port.to_be_bytes()),
        attr(PROTO[2], &original.destination_port.to_be_bytes()),
    ]
    .concat();
    let tuple = [attr(TUPLE_IP | NESTED, &ends), attr(TUPLE_PROTO | NESTED, &proto)].concat();
    let mut body = vec![family_number(family), 0, 0, 0];
    body.extend(attr(cta::TUPLE_ORIG | NESTED, &tuple));
    body
}

/// Attribute that has windows no longer checked, in both directions.
pub fn liberal() -> Vec<u8> {
    tcp_flags(BE_LIBERAL, BE_LIBERAL)
}

/// Attribute that has nothing known of what was acknowledged, in both directions.
pub fn unacknowledged() -> Vec<u8> {
    tcp_flags(0, MAXACK_SET)
}

/// Attribute that sets the flags under a mask, in both directions.
fn tcp_flags(flags: u8, mask: u8) -> Vec<u8> {
    let flags = TCP_FLAGS.map(|kind| attr(kind, &[flags, mask])).concat();
    attr(cta::PROTOINFO | NESTED, &attr(PROTOINFO_TCP | NESTED, &flags))
}

/// Attribute with a timeout in seconds.
pub fn timeout(seconds: u32) -> Vec<u8> {
    attr(cta::TIMEOUT, &seconds.to_be_bytes())
}

/// Attribute with status bits: what is to be set, or in a dump what is to be shown.
pub fn with_status(bits: u32) -> Vec<u8> {
    attr(cta::STATUS, &bits.to_be_bytes())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn tuple_attributes(tuple: &Tuple, kind: u16) -> Vec<u8> {
        let mut named = named(tuple).split_off(4);
        named[2..4].copy_from_slice(&(kind | NESTED).to_ne_bytes());
        named
    }

    /// The message of an entry, with attributes behind its tuples.
    pub fn payload(connection: &Connection, others: &[Vec<u8>]) -> Vec<u8> {
        let mut payload = vec![2, 0, 0, 0];
        payload.extend(tuple_attributes(&connection.original, cta::TUPLE_ORIG));
        payload.extend(tuple_attributes(&connection.reply, cta::TUPLE_REPLY));
        payload.extend(others.concat());
        payload
    }

    pub fn connection(protocol: u8) -> Connection {
        let original = Tuple {
            source: [10, 0, 0, 2].into(),
            destination: [192, 0, 2, 9].into(),
            source_port: 4000,
            destination_port: 443,
            protocol,
        };
        let reply = Tuple { destination: [192, 0, 2, 1].into(), destination_port: 61000, ..original.inverse() };
        Connection::new(original, reply).unwrap()
    }

    fn tcp(state: u8, flags: [u8; 2]) -> Vec<u8> {
        let flags = [attr(4, &[flags[0], 0]), attr(5, &[flags[1], 0])].concat();
        attr(4 | NESTED, &attr(1 | NESTED, &[attr(1, &[state]), attr(2, &[7]), flags].concat()))
    }

    fn parsed(others: &[Vec<u8>]) -> Entry {
        Entry::parse(&payload(&connection(6), others)).unwrap().unwrap()
    }

    #[test]
    fn everything_told_is_read() {
        let entry = parsed(&[
            with_status(0x418e),
            timeout(431_999),
            attr(8, &[0, 0, 1, 2]),
            attr(22, &[3; 16]),
            tcp(3, [0x0a, 0x2a]),
        ]);
        let expected = Entry {
            connection: connection(6),
            status: 0x418e,
            mark: 0x102,
            labels: Some([3; 16]),
            timeout: Some(431_999),
            tcp: Some(Tcp { state: ESTABLISHED, liberal: true }),
            zoned: false,
            helped: false,
            proxied: false,
        };
        assert_eq!(entry, expected);
        assert!(entry.is(status::OFFLOAD | status::SEEN_REPLY) && !entry.is(status::DYING));
        for flags in [[8, 0], [0, 8], [2, 2]] {
            assert_eq!(parsed(&[tcp(4, flags)]).tcp, Some(Tcp { state: 4, liberal: false }));
        }
        assert_eq!(parsed(&[liberal()]).tcp, None, "flags without a state");
    }

    #[test]
    fn what_keeps_a_connection_in_linux_is_seen() {
        let plain = parsed(&[]);
        assert!(!plain.zoned && !plain.helped && !plain.proxied);
        assert!(parsed(&[attr(18, &[0, 5])]).zoned);
        assert!(parsed(&[attr(5 | NESTED, &attr(1, b"ftp\0"))]).helped);
        let synproxy = |isn: u8| attr(24 | NESTED, &[attr(1, &[0, 0, 0, isn]), attr(2, &[0; 4])].concat());
        assert!(parsed(&[synproxy(1)]).proxied);
        assert!(!parsed(&[synproxy(0)]).proxied);
        let mut zoned = payload(&connection(6), &[]);
        let zone = attr(TUPLE_ZONE, &[0, 5]);
        let length = u16::from_ne_bytes([zoned[4], zoned[5]]);
        zoned[4..6].copy_from_slice(&(length + zone.len() as u16).to_ne_bytes());
        zoned.splice(usize::from(length) + 4..usize::from(length) + 4, zone);
        assert!(Entry::parse(&zoned).unwrap().unwrap().zoned, "one direction");
    }

    #[test]
    fn both_families_and_protocols() {
        for protocol in [6, 17] {
            let v4 = connection(protocol);
            let six = |last| std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last).into();
            let there = Tuple { source: six(1), destination: six(2), ..v4.original };
            let v6 = Connection::new(there, there.inverse()).unwrap();
            for connection in [v4, v6] {
                assert_eq!(Entry::parse(&payload(&connection, &[])).unwrap().unwrap().connection, connection);
            }
        }
        let icmp = Tuple { protocol: 1, ..connection(6).original };
        let icmp = Connection { original: icmp, reply: icmp.inverse() };
        assert_eq!(Entry::parse(&payload(&icmp, &[])).unwrap(), None);
    }

    #[test]
    fn malformed_entries_are_errors_and_never_a_panic() {
        let whole = payload(&connection(17), &[with_status(0x8e), tcp(3, [8, 8])]);
        for length in 0..whole.len() {
            let _ = Entry::parse(&whole[..length]);
        }
        assert!(Entry::parse(&whole[..30]).is_err());
        let udp = connection(17);
        let mixed = Connection { original: connection(6).original, reply: udp.reply };
        assert!(Entry::parse(&payload(&mixed, &[])).unwrap_err().to_string().contains("do not fit"));
        let only = [vec![2, 0, 0, 0], tuple_attributes(&udp.original, cta::TUPLE_ORIG)].concat();
        assert!(Entry::parse(&only).unwrap_err().to_string().contains("missing"));
    }
}
