//! FPC on a byte stream. Integers are in network byte order. A frame is a header of 12 bytes and a body:
//!
//! | bytes | field |
//! |---|---|
//! | 0..2 | type, see `Packet` |
//! | 2..4 | flags: bit 0 asks for an `Ack` once the message has taken effect; the others are zero |
//! | 4..8 | length of the body, at most `MAX_BODY` |
//! | 8..12 | sequence number, chosen by the sender |
//!
//! In a body the fields follow one another in the order of their declaration, without padding. A flag is a byte 0 or
//! 1; an optional field is such a byte and, if it is 1, the value; lists and strings (UTF-8) are a count of 32 bits and
//! the items; an IP address is the byte 4 or 6 and 4 or 16 bytes; an enum is its number in one byte and the fields of
//! the variant. Decoding is strict: whatever `encode` would not have written is refused with the field and its offset.

use crate::message::*;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use towpath_filter::{Filter, Layer};
use towpath_tables::flow::{Connection, Tuple};
use towpath_tables::{Reason, record::Family};

/// First field of the `Hello`.
pub const MAGIC: u32 = u32::from_be_bytes(*b"TFPC");
/// Version of the messages' layout; both ends must have the same.
pub const VERSION: u16 = 13;
/// Bytes of a frame's header; the same in every version.
pub const HEADER: usize = 12;
/// Longest body.
pub const MAX_BODY: usize = 1 << 24;

const FLAG_REPORT: u16 = 1;

/// What a frame carries.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Packet {
    /// First frame in either direction: who speaks. The layout of this one never changes.
    Hello(Hello),
    /// The connection ends for this reason.
    Bye(String),
    /// The message with this sequence number, and all before it, have taken effect.
    Ack(u32),
    /// CM to FPM
    Message(Message),
    /// FPM to CM
    Feedback(Feedback),
}

/// The opening of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hello {
    /// `MAGIC`
    pub magic: u32,
    /// `VERSION`
    pub version: u16,
}

/// One frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frame {
    /// Chosen by the sender, rising
    pub sequence: u32,
    /// The sender wants an `Ack`
    pub report: bool,
    /// What it carries
    pub packet: Packet,
}

/// A frame that cannot be decoded. `offset` counts from the first byte of the body.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DecodeError {
    /// The type in the header means nothing
    #[error("unknown message type {0}")]
    UnknownType(u16),
    /// Reserved bits are set in the header
    #[error("unknown flags {0:#06x}")]
    UnknownFlags(u16),
    /// The length in the header exceeds `MAX_BODY`
    #[error("body of {0} bytes exceeds the limit of {MAX_BODY}")]
    TooLong(u32),
    /// The body ends inside a field
    #[error("truncated in {field} at byte {offset}")]
    Truncated {
        /// Which
        field: &'static str,
        /// Where
        offset: usize,
    },
    /// A field holds what it may not
    #[error("bad value {value} in {field} at byte {offset}")]
    BadValue {
        /// Which
        field: &'static str,
        /// Where
        offset: usize,
        /// The value, a count or a length
        value: u64,
    },
    /// The body goes on after the last field
    #[error("{excess} bytes too many after byte {offset}")]
    Trailing {
        /// Where the message ended
        offset: usize,
        /// Bytes left over
        excess: usize,
    },
}

/// A message whose body would exceed `MAX_BODY`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("message of {0} bytes exceeds the limit of {MAX_BODY}")]
pub struct EncodeError(pub usize);

/// Appends a frame to `out`; on error `out` is as before.
pub fn encode(frame: &Frame, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let start = out.len();
    let flags = if frame.report { FLAG_REPORT } else { 0 };
    packet_type(&frame.packet).put(out);
    flags.put(out);
    0u32.put(out);
    frame.sequence.put(out);
    put_body(&frame.packet, out);
    let body = out.len() - start - HEADER;
    if body > MAX_BODY {
        out.truncate(start);
        return Err(EncodeError(body));
    }
    out[start + 4..start + 8].copy_from_slice(&(body as u32).to_be_bytes());
    Ok(())
}

/// Decodes the first frame in `bytes`. `Ok(None)` if it is not complete yet; otherwise the frame and its length.
pub fn decode(bytes: &[u8]) -> Result<Option<(Frame, usize)>, DecodeError> {
    let Some(header) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
    let mut fields = Reader { bytes: header, at: 0 };
    let kind = u16::get(&mut fields, "type")?;
    let flags = u16::get(&mut fields, "flags")?;
    let length = u32::get(&mut fields, "length")?;
    let sequence = u32::get(&mut fields, "sequence")?;
    if flags & !FLAG_REPORT != 0 {
        return Err(DecodeError::UnknownFlags(flags));
    }
    if length as usize > MAX_BODY {
        return Err(DecodeError::TooLong(length));
    }
    let end = HEADER + length as usize;
    let Some(body) = bytes.get(HEADER..end) else { return Ok(None) };
    let mut reader = Reader { bytes: body, at: 0 };
    let packet = get_body(kind, &mut reader)?;
    if reader.at != body.len() {
        return Err(DecodeError::Trailing { offset: reader.at, excess: body.len() - reader.at });
    }
    Ok(Some((Frame { sequence, report: flags & FLAG_REPORT != 0, packet }, end)))
}

/// The types on the wire and the bodies they announce, both ways from one list.
macro_rules! packets {
    ($($number:literal => $outer:ident $(:: $inner:ident)? ($body:ty);)*) => {
        fn packet_type(packet: &Packet) -> u16 {
            match packet { $(packets!(@wrap _body $outer $($inner)?) => $number,)* }
        }
        fn put_body(packet: &Packet, out: &mut Vec<u8>) {
            match packet { $(packets!(@wrap body $outer $($inner)?) => body.put(out),)* }
        }
        fn get_body(kind: u16, reader: &mut Reader) -> Result<Packet, DecodeError> {
            match kind {
                $($number => {
                    let body = <$body>::get(reader, concat!(stringify!($outer) $(, "::", stringify!($inner))?))?;
                    Ok(packets!(@wrap body $outer $($inner)?))
                })*
                _ => Err(DecodeError::UnknownType(kind)),
            }
        }
    };
    (@wrap $body:ident $outer:ident) => { Packet::$outer($body) };
    (@wrap $body:ident $outer:ident $inner:ident) => { Packet::$outer($outer::$inner($body)) };
}

packets! {
    1 => Hello(Hello);
    2 => Bye(String);
    3 => Ack(u32);
    16 => Message::SnapshotBegin(Snapshot);
    17 => Message::SnapshotEnd(Snapshot);
    18 => Message::Port(Port);
    19 => Message::PortDelete(u32);
    20 => Message::Address(Address);
    21 => Message::AddressDelete(Address);
    22 => Message::Neighbour(Neighbour);
    23 => Message::NeighbourDelete(NeighbourKey);
    24 => Message::Route(Route);
    25 => Message::RouteDelete(RouteKey);
    26 => Message::Nexthop(NexthopObject);
    27 => Message::NexthopDelete(u32);
    28 => Message::Policy(Policy);
    29 => Message::FamilySettings(FamilySettings);
    30 => Message::Alarm(Alarm);
    31 => Message::AlarmOver(AlarmId);
    32 => Message::Flow(Connection);
    33 => Message::FlowDelete(Tuple);
    34 => Message::Heartbeat(u64);
    35 => Message::Lost(Listener);
    64 => Feedback::Hits(Vec<NeighbourKey>);
    65 => Feedback::Resync(String);
    66 => Feedback::FlowsUsed(Vec<Tuple>);
    67 => Feedback::FlowsAhead(Vec<Tuple>);
}

/// Reads a body from front to back.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize, field: &'static str) -> Result<&'a [u8], DecodeError> {
        let end = self.at.checked_add(count);
        let taken = end.and_then(|end| self.bytes.get(self.at..end));
        let taken = taken.ok_or(DecodeError::Truncated { field, offset: self.at })?;
        self.at += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], DecodeError> {
        let offset = self.at;
        self.take(N, field)?.try_into().map_err(|_| DecodeError::Truncated { field, offset })
    }

    /// A count of items that take at least one byte each: more than there are bytes is refused before any memory is
    /// asked for.
    fn count(&mut self, field: &'static str) -> Result<usize, DecodeError> {
        let count = u32::get(self, field)? as usize;
        if count > self.bytes.len() - self.at {
            return Err(DecodeError::Truncated { field, offset: self.at });
        }
        Ok(count)
    }

    /// The error for a value of `size` bytes that was just read.
    fn bad(&self, field: &'static str, size: usize, value: impl Into<u64>) -> DecodeError {
        DecodeError::BadValue { field, offset: self.at - size, value: value.into() }
    }
}

/// A value with a layout.
trait Wire: Sized {
    fn put(&self, out: &mut Vec<u8>);
    fn get(reader: &mut Reader, field: &'static str) -> Result<Self, DecodeError>;
}

macro_rules! integers {
    ($($int:ty)*) => {$(
        impl Wire for $int {
            fn put(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_be_bytes());
            }
            fn get(reader: &mut Reader, field: &'static str) -> Result<Self, DecodeError> {
                Ok(Self::from_be_bytes(reader.array(field)?))
            }
        }
    )*};
}
integers!(u8 u16 u32 u64);

impl Wire for bool {
    fn put(&self, out: &mut Vec<u8>) {
        u8::from(*self).put(out);
    }
    fn get(reader: &mut Reader, field: &'static str) -> Result<Self, DecodeError> {
        match u8::get(reader, field)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(reader.bad(field, 1, other)),
        }
    }
}

impl Wire for String {
    fn put(&self, out: &mut Vec<u8>) {
        (self.len() as u32).put(out);
        out.extend_from_slice(self.as_bytes());
    }
    fn get(reader: &mut Reader, field: &'static str) -> Result<Self, DecodeError> {
        let length = reader.count(field)?;
        let text = std::str::from_utf8(reader.take(length, field)?);
        text.map(str::to_owned).map_err(|_| reader.bad(field, length, length as u64))
    }
}

impl<T: Wire> Wire for Option<T> {
    fn put(&self, out: &mut Vec<u8>) {
        self.is_some().put(out);
        if let Some(value) = self {
            value.put(out);
        }
    }
    fn get(reader: &mut Reader, field: &'static str) -> Result<Self, DecodeError> {
        if bool::get(reader, field)? { T::get(reader, field).map(Some) } else { Ok(None) }
    }
}

impl<T: Wire> Wire for Vec<T> {
    fn put(&self, out: &mut Vec<u8>) {
        (self.len() as u32).put(out);
        self.iter().for_each(|item| item.put(out));
    }
    fn get(reader: &mut Reader, field: &'static str) -> Result<Self, DecodeError> {
        let count = reader.count(field)?;
        (0..count).map(|_| T::get(reader, field)).collect()
    }
}

impl<A: Wire, B: Wire> Wire for (A, B) {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
        self.1.put(out);
    }
    fn get(reader: &mut Reader, field: &'static str) -> Result<Self, DecodeError> {
        Ok((A::get(reader, field)?, B::get(reader, field)?))
    }
}

impl Wire for [u8; 6] {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self);
    }
    fn get(reader: &mut Reader, field: &'static str) -> Result<Self, DecodeError> {
        reader.array(field)
    }
}

impl Wire for [PortFamily; 2] {
    fn put(&self, out: &mut Vec<u8>) {
        self.iter().for_each(|family| family.put(out));
    }
    fn get(reader: &mut Reader, field: &'static str) -> Result<Self, DecodeError> {
        Ok([PortFamily::get(reader, field)?, PortFamily::get(reader, field)?])
    }
}

impl Wire for IpAddr {
    fn put(&self, out: &mut Vec<u8>) {
        match self {
            IpAddr::V4(address) => {
                4u8.put(out);
                out.extend_from_slice(&address.octets());
            }
            IpAddr::V6(address) => {
                6u8.put(out);
                out.extend_from_slice(&address.octets());
            }
        }
    }
    fn get(reader: &mut Reader, field: &'static str) -> Result<Self, DecodeError> {
        match Family::get(reader, field)? {
            Family::V4 => Ok(Ipv4Addr::from(reader.array::<4>(field)?).into()),
            Family::V6 => Ok(Ipv6Addr::from(reader.array::<16>(field)?).into()),
        }
    }
}

impl Wire for Family {
    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Family::V4 => 4u8,
            Family::V6 => 6,
        }
        .put(out);
    }
    fn get(reader: &mut Reader, field: &'static str) -> Result<Self, DecodeError> {
        match u8::get(reader, field)? {
            4 => Ok(Family::V4),
            6 => Ok(Family::V6),
            other => Err(reader.bad(field, 1, other)),
        }
    }
}

/// Its two tuples.
impl Wire for Connection {
    fn put(&self, out: &mut Vec<u8>) {
        self.original.put(out);
        self.reply.put(out);
    }
    fn get(reader: &mut Reader, field: &'static str) -> Result<Self, DecodeError> {
        let original = Tuple::get(reader, field)?;
        let reply = Tuple::get(reader, field)?;
        Connection::new(original, reply).ok_or_else(|| reader.bad(field, 1, reply.protocol))
    }
}

/// Where it counts from (0 link, 1 network header), and its instructions.
impl Wire for Filter {
    fn put(&self, out: &mut Vec<u8>) {
        (self.layer() == Layer::Network).put(out);
        self.code().to_vec().put(out);
    }
    fn get(reader: &mut Reader, field: &'static str) -> Result<Self, DecodeError> {
        let layer = if bool::get(reader, field)? { Layer::Network } else { Layer::Link };
        let code = Vec::<u64>::get(reader, field)?;
        let size = code.len() * size_of::<u64>();
        Filter::new(layer, code).map_err(|_| reader.bad(field, size, size as u64))
    }
}

impl Wire for Prefix {
    fn put(&self, out: &mut Vec<u8>) {
        self.address().put(out);
        self.prefix_len().put(out);
    }
    fn get(reader: &mut Reader, field: &'static str) -> Result<Self, DecodeError> {
        let address = IpAddr::get(reader, field)?;
        let length = u8::get(reader, field)?;
        let prefix = Prefix::new(address, length).filter(|prefix| prefix.address() == address);
        prefix.ok_or_else(|| reader.bad(field, 1, length))
    }
}

impl Wire for Reason {
    fn put(&self, out: &mut Vec<u8>) {
        (*self as u8).put(out);
    }
    fn get(reader: &mut Reader, field: &'static str) -> Result<Self, DecodeError> {
        let index = u8::get(reader, field)?;
        Reason::from_index(index).ok_or_else(|| reader.bad(field, 1, index))
    }
}

/// Layouts of structs: the named fields one after another.
macro_rules! structs {
    ($($name:ident { $($field:ident),* })*) => {$(
        impl Wire for $name {
            fn put(&self, out: &mut Vec<u8>) {
                $(self.$field.put(out);)*
            }
            fn get(reader: &mut Reader, _: &'static str) -> Result<Self, DecodeError> {
                Ok($name { $($field: Wire::get(reader, concat!(stringify!($name), ".", stringify!($field)))?),* })
            }
        }
    )*};
}

structs! {
    Hello { magic, version }
    Port { ifindex, name, mac, mtu, kind, up, carrier, master, vrf, promiscuous, family, send_redirects, rp_filter, route_localnet, unsupported }
    Tunnel { local, remote, link, input, output, ttl, class, label, limit }
    GreOptions { key, checksum, sequence }
    Vrf { ifindex, name, table }
    PortFamily { forwarding, ignore_linkdown }
    Address { ifindex, address, prefix_len }
    NeighbourKey { ifindex, address }
    Neighbour { key, lladdr, state }
    RouteKey { table, prefix, priority, tos }
    Route { key, kind, protocol, via, mtu, unsupported }
    Hop { ifindex, gateway, weight, flags }
    NexthopObject { id, kind }
    Policy { source, scope, reason, detail, filter, flows, in_vrfs, rules, momentary }
    Rule { priority, iif, from, to, by_mark, action }
    Tuple { source, destination, source_port, destination_port, protocol }
    FamilySettings { family, hash_policy, flow_labels }
    AlarmId { source, number }
    Alarm { id, policies }
}

/// Layouts of enums: a number, then the fields of the variant.
macro_rules! enums {
    ($($name:ident { $($number:literal => $variant:ident $(($($tuple:ident),*))? $({$($field:ident),*})?),* $(,)? })*) => {$(
        impl Wire for $name {
            fn put(&self, out: &mut Vec<u8>) {
                match self {
                    $($name::$variant $(($($tuple),*))? $({$($field),*})? => {
                        let number: u8 = $number;
                        number.put(out);
                        $($($tuple.put(out);)*)?
                        $($($field.put(out);)*)?
                    })*
                }
            }
            fn get(reader: &mut Reader, _: &'static str) -> Result<Self, DecodeError> {
                match u8::get(reader, stringify!($name))? {
                    $($number => {
                        let _field = concat!(stringify!($name), "::", stringify!($variant));
                        $($(let $tuple = Wire::get(reader, _field)?;)*)?
                        $($(let $field = Wire::get(reader, _field)?;)*)?
                        Ok($name::$variant $(($($tuple),*))? $({$($field),*})?)
                    })*
                    other => Err(reader.bad(stringify!($name), 1, other)),
                }
            }
        }
    )*};
}

enums! {
    Snapshot { 0 => Ports, 1 => Addresses(family), 2 => Neighbours(family), 3 => Nexthops, 4 => Routes(family), 5 => Policies(source), 6 => Flows }
    Listener { 0 => Interfaces, 1 => Routes, 2 => Connections, 3 => Policies(source) }
    PortKind { 0 => Ethernet, 1 => Virtual, 2 => Vlan { lower, protocol, id }, 3 => Loopback, 4 => Other, 5 => Tunnel(tunnel) }
    Via { 0 => Hops(hops), 1 => Object(id) }
    NexthopObjectKind { 0 => Hop(hop), 1 => Blackhole, 2 => Group(members), 3 => Unsupported }
    InVrfs { 0 => Stay, 1 => ByPort, 2 => ByVrf }
    PolicySource { 0 => Nftables, 1 => Xtables, 2 => Xfrm, 3 => Rules, 4 => Tc, 5 => Capture, 6 => Sysctl, 7 => Ports, 8 => Tunnels }
    RuleAction { 0 => Lookup(table), 1 => LookupBeyond(table, len), 2 => Vrf, 3 => Unknown, 4 => Skip }
    Scope { 0 => Family(family), 1 => Ingress(ifindex, family), 2 => Egress(ifindex, family), 3 => Local(family) }
}

#[cfg(test)]
mod tests;
