//! Next hops as values, and how they lie in their records.

use std::net::IpAddr;

use crate::order;
use crate::reason::Reason;
use crate::record::{Nexthop, NexthopKey, NexthopKind};

/// The Ethernet header that a next hop puts in front of its packets, up to the EtherType.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    bytes: [u8; 24],
    tags: u8,
}

impl Header {
    /// Addresses as they are on the wire, then VLAN tags from the outside in: (TPID, TCI). None if there are more than
    /// two tags.
    pub fn new(destination: [u8; 6], source: [u8; 6], tags: &[(u16, u16)]) -> Option<Self> {
        let mut bytes = [0; 24];
        bytes[..6].copy_from_slice(&destination);
        bytes[6..12].copy_from_slice(&source);
        for (index, (tpid, tci)) in tags.iter().enumerate() {
            let tag = bytes.get_mut(12 + 4 * index..16 + 4 * index).filter(|_| index < 2)?;
            tag[..2].copy_from_slice(&tpid.to_be_bytes());
            tag[2..].copy_from_slice(&tci.to_be_bytes());
        }
        Some(Self { bytes, tags: tags.len() as u8 })
    }

    fn words(&self) -> [u64; 3] {
        let mut words = [0; 3];
        for (word, bytes) in words.iter_mut().zip(self.bytes.as_chunks().0) {
            *word = u64::from_ne_bytes(*bytes);
        }
        words
    }

    fn of_words(words: [u64; 3], tags: u8) -> Self {
        let mut bytes = [0; 24];
        for (part, word) in bytes.as_chunks_mut().0.iter_mut().zip(words) {
            *part = word.to_ne_bytes();
        }
        Self { bytes, tags }
    }

    /// The header without its EtherType: 12, 16 or 20 bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..12 + 4 * usize::from(self.tags)]
    }
}

/// What becomes of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Sent with this header
    Forward(Header),
    /// As `Forward`, by a port with mappings
    Mapped(Header),
    /// Put into the tunnel that the port is
    Tunnel,
    /// Handed to Linux
    Exception(Reason),
}

/// A next hop's content.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NexthopValue {
    /// What becomes of a packet
    pub action: Action,
    /// Slot of the port it leaves by
    pub port: u32,
    /// Slot of the interface underneath, whose driver transmits
    pub device: u32,
    /// Largest IP packet in bytes that may leave
    pub mtu: u32,
}

impl NexthopValue {
    /// A next hop that leaves everything to Linux and has no port.
    pub const fn exception(reason: Reason) -> Self {
        Self { action: Action::Exception(reason), port: 0, device: 0, mtu: 0 }
    }

    fn words(&self) -> (u32, [u64; 3]) {
        match self.action {
            Action::Exception(reason) => (NexthopKind::Exception as u32 | (reason as u32) << 8, [0; 3]),
            Action::Tunnel => (NexthopKind::Tunnel as u32, [0; 3]),
            Action::Forward(header) => (NexthopKind::Forward as u32 | u32::from(header.tags) << 16, header.words()),
            Action::Mapped(header) => (NexthopKind::Mapped as u32 | u32::from(header.tags) << 16, header.words()),
        }
    }

    fn from_words(state: u32, l2: [u64; 3]) -> Option<Action> {
        const FORWARD: u8 = NexthopKind::Forward as u8;
        const EXCEPTION: u8 = NexthopKind::Exception as u8;
        const TUNNEL: u8 = NexthopKind::Tunnel as u8;
        const MAPPED: u8 = NexthopKind::Mapped as u8;
        let [kind, reason, tags, _] = state.to_le_bytes();
        match kind {
            FORWARD if tags <= 2 => Some(Action::Forward(Header::of_words(l2, tags))),
            MAPPED if tags <= 2 => Some(Action::Mapped(Header::of_words(l2, tags))),
            EXCEPTION => Reason::from_index(reason).map(Action::Exception),
            TUNNEL => Some(Action::Tunnel),
            _ => None,
        }
    }

    /// Writes the content into a record in use. Readers see the old or the new content, or that it is changing.
    pub(crate) fn write(&self, record: &Nexthop) {
        let (state, l2) = self.words();
        order::change(&record.sequence, || {
            record.state.store(state);
            record.port.store(self.port);
            record.device.store(self.device);
            record.mtu.store(self.mtu);
            record.l2.iter().zip(l2).for_each(|(word, value)| word.store(value));
        });
    }

    /// The content of a record; None if it is free or being changed.
    pub fn read(record: &Nexthop) -> Option<Self> {
        order::consistent(&record.sequence, || {
            let l2 = [record.l2[0].load(), record.l2[1].load(), record.l2[2].load()];
            let action = Self::from_words(record.state.load(), l2)?;
            Some(Self { action, port: record.port.load(), device: record.device.load(), mtu: record.mtu.load() })
        })?
    }
}

/// What a next hop is: two next hops of the same identity do the same.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct NexthopIdentity {
    /// Interface index in Linux, 0 if there is none
    pub ifindex: u32,
    /// Gateway or directly connected host
    pub gateway: Option<IpAddr>,
    /// Route MTU metric in bytes, 0 if there is none
    pub mtu: u32,
    /// Set for next hops that are always exceptions
    pub reason: Option<Reason>,
}

impl NexthopIdentity {
    pub(crate) fn write(&self, record: &NexthopKey) {
        let mut bytes = [0; 16];
        let family = match self.gateway {
            None => 0,
            Some(IpAddr::V4(gateway)) => {
                bytes[..4].copy_from_slice(&gateway.octets());
                4
            }
            Some(IpAddr::V6(gateway)) => {
                bytes = gateway.octets();
                6
            }
        };
        record.ifindex.store(self.ifindex);
        record.family.store(family);
        record.gateway.iter().zip(bytes.as_chunks().0).for_each(|(word, part)| word.store(u32::from_ne_bytes(*part)));
        record.mtu.store(self.mtu);
        record.reason.store(self.reason.map_or(0, |reason| 1 + reason as u32));
    }

    /// The identity in a record; None if the record makes no sense.
    pub fn read(record: &NexthopKey) -> Option<Self> {
        let mut bytes = [0; 16];
        for (part, word) in bytes.as_chunks_mut().0.iter_mut().zip(&record.gateway) {
            *part = word.load().to_ne_bytes();
        }
        let gateway = match record.family.load() {
            0 => None,
            4 => Some(IpAddr::from([bytes[0], bytes[1], bytes[2], bytes[3]])),
            6 => Some(IpAddr::from(bytes)),
            _ => return None,
        };
        let reason = match record.reason.load() {
            0 => None,
            index => Some(Reason::from_index(u8::try_from(index - 1).ok()?)?),
        };
        Some(Self { ifindex: record.ifindex.load(), gateway, mtu: record.mtu.load(), reason })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Nexthop {
        // SAFETY: a next hop consists of integers, for which zero is a value.
        unsafe { core::mem::zeroed() }
    }

    #[test]
    fn content_and_identity_round_trip() {
        let header = Header::new([2, 0, 0, 0, 0, 9], [2, 0, 0, 0, 0, 1], &[(0x88a8, 7), (0x8100, 4095)]).unwrap();
        assert_eq!(header.bytes(), [2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 1, 0x88, 0xa8, 0, 7, 0x81, 0, 0x0f, 0xff]);
        assert_eq!(Header::new([0; 6], [0; 6], &[(0, 0); 3]), None);
        let record = record();
        assert_eq!(NexthopValue::read(&record), None, "a free record");
        for value in [
            NexthopValue { action: Action::Forward(header), port: 3, device: 2, mtu: 1496 },
            NexthopValue { action: Action::Exception(Reason::NoNeighbour), port: 3, device: 3, mtu: 1500 },
            NexthopValue { action: Action::Tunnel, port: 200, device: 200, mtu: 1476 },
        ] {
            value.write(&record);
            assert_eq!(NexthopValue::read(&record), Some(value));
        }
        assert_eq!(record.sequence.load(), 6);
        record.sequence.store(7);
        assert_eq!(NexthopValue::read(&record), None, "a record that is being changed");

        // SAFETY: as for `record`.
        let key: NexthopKey = unsafe { core::mem::zeroed() };
        for gateway in [None, Some("192.0.2.1".parse().unwrap()), Some("2001:db8::1".parse().unwrap())] {
            for reason in [None, Some(Reason::PortNotReady), Some(Reason::NoRoute)] {
                let identity = NexthopIdentity { ifindex: 7, gateway, mtu: 1400, reason };
                identity.write(&key);
                assert_eq!(NexthopIdentity::read(&key), Some(identity));
            }
        }
        key.family.store(5);
        assert_eq!(NexthopIdentity::read(&key), None);
    }
}
