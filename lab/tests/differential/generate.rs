//! Frames: ordinary transit packets, and packets spoilt in every field that a router looks at.

use crate::gre;
use crate::random::Random;
use crate::router::{HOST_MACS, MTUS, NEIGHBOURS_V4, PORTS, Profile, ROUTER_MACS, ROUTER_V4, TUNNELS, Tunnel, VLANS};
use std::net::{Ipv4Addr, Ipv6Addr};
use towpath_lab::packet::checksum;

/// A frame and where it enters.
#[derive(Clone)]
pub struct Case {
    pub port: usize,
    pub bytes: Vec<u8>,
    /// Nothing is wrong with the packet: only routes decide.
    pub plain: bool,
}

/// Destinations, from whose prefixes an address is drawn.
const DESTINATIONS_V4: &[(&str, u32)] = &[
    ("198.18.0.0", 24),
    ("198.18.1.0", 24),
    ("198.18.1.128", 25),
    ("198.18.1.129", 32),
    ("198.18.2.0", 24),
    ("198.18.3.0", 24),
    ("198.18.4.0", 24),
    ("198.18.5.0", 24),
    ("198.18.6.0", 24),
    ("198.18.7.0", 24),
    ("198.18.8.0", 24),
    ("198.18.9.0", 24),
    ("198.18.9.9", 32),
    ("198.18.0.0", 16),
    ("198.18.100.10", 32),
    ("198.18.101.10", 32),
    ("192.0.2.1", 32),
    ("198.51.100.1", 32),
    ("203.0.113.1", 32),
    ("192.0.2.10", 32),
    ("198.51.100.10", 32),
    ("203.0.113.10", 32),
    ("192.0.2.0", 24),
    ("198.51.100.99", 32),
    ("198.51.100.255", 32),
    ("198.51.100.0", 32),
    ("203.0.113.255", 32),
    ("255.255.255.255", 32),
    ("0.0.0.0", 32),
    ("0.0.0.0", 8),
    ("127.0.0.1", 32),
    ("127.0.0.0", 8),
    ("169.254.0.0", 16),
    ("224.0.0.1", 32),
    ("224.0.0.0", 4),
    ("240.0.0.0", 4),
    ("0.0.0.0", 0),
];
const DESTINATIONS_V6: &[(&str, u32)] = &[
    ("2001:db8:100::", 48),
    ("2001:db8:101::", 48),
    ("2001:db8:101:8000::", 49),
    ("2001:db8:101:8000::1", 128),
    ("2001:db8:102::", 48),
    ("2001:db8:103::", 48),
    ("2001:db8:104::", 48),
    ("2001:db8:105::", 48),
    ("2001:db8:106::", 48),
    ("2001:db8:107::", 48),
    ("2001:db8:108::", 48),
    ("2001:db8::", 32),
    ("2001:db8:1100::10", 128),
    ("2001:db8:1200::10", 128),
    ("2001:db8::1", 128),
    ("2001:db8:1::1", 128),
    ("2001:db8:2::1", 128),
    ("2001:db8::10", 128),
    ("2001:db8:1::10", 128),
    ("2001:db8:2::10", 128),
    ("2001:db8:1::99", 128),
    ("2001:db8:1::", 128),
    ("2001:db8:1::", 64),
    ("::", 128),
    ("::1", 128),
    ("::", 96),
    ("::ffff:0:0", 96),
    ("::ffff:198.18.0.1", 128),
    ("64:ff9b::", 96),
    ("fe80::", 64),
    ("fec0::", 10),
    ("fc00::", 7),
    ("ff02::1", 128),
    ("ff02::2", 128),
    ("ff01::", 16),
    ("ff05::", 16),
    ("ff0e::", 16),
    ("2002::", 16),
    ("::", 0),
];
/// Destinations to which ordinary packets go.
const TRANSIT_V4: &[(&str, u32)] = &[
    ("198.18.0.0", 24),
    ("198.18.1.0", 25),
    ("198.18.1.192", 26),
    ("198.18.8.0", 24),
    ("198.51.100.10", 32),
    ("203.0.113.10", 32),
    ("198.18.9.9", 32),
    ("198.18.2.0", 24),
];
const TRANSIT_V6: &[(&str, u32)] = &[
    ("2001:db8:100::", 48),
    ("2001:db8:101::", 49),
    ("2001:db8:101:c000::", 50),
    ("2001:db8:108::", 48),
    ("2001:db8:1::10", 128),
    ("2001:db8:2::10", 128),
    ("2001:db8:102::", 48),
];
const SOURCES_V4: &[(&str, u32)] = &[
    ("192.0.2.10", 32),
    ("192.0.2.1", 32),
    ("198.51.100.1", 32),
    ("203.0.113.1", 32),
    ("198.51.100.10", 32),
    ("192.0.2.255", 32),
    ("198.51.100.255", 32),
    ("203.0.113.0", 32),
    ("0.0.0.0", 32),
    ("0.0.0.0", 8),
    ("127.0.0.1", 32),
    ("127.0.0.0", 8),
    ("169.254.0.0", 16),
    ("224.0.0.0", 4),
    ("240.0.0.0", 4),
    ("255.255.255.255", 32),
    ("198.18.0.0", 16),
    ("0.0.0.0", 0),
];
const SOURCES_V6: &[(&str, u32)] = &[
    ("2001:db8::10", 128),
    ("2001:db8::1", 128),
    ("2001:db8:1::1", 128),
    ("2001:db8:1::", 128),
    ("::", 128),
    ("::1", 128),
    ("::", 96),
    ("::ffff:0:0", 96),
    ("fe80::", 64),
    ("fec0::", 10),
    ("fc00::", 7),
    ("ff02::1", 128),
    ("ff0e::", 16),
    ("2001:db8:100::", 48),
    ("2002::", 16),
    ("::", 0),
];
const ETHERTYPES: &[u16] = &[
    0x0800, 0x86dd, 0x0806, 0x8100, 0x88a8, 0x9100, 0x8847, 0x8863, 0x8864, 0x88cc, 0x0000, 0x002e, 0x05dc, 0x0600,
    0xffff,
];
const PROTOCOLS: &[u8] =
    &[0, 1, 4, 6, 17, 33, 41, 43, 44, 46, 47, 50, 51, 58, 59, 60, 89, 103, 132, 135, 136, 137, 254, 255];
/// IPv6 extension headers, with one number that is none.
const EXTENSIONS: &[u8] = &[0, 43, 44, 51, 60, 135, 139, 140, 59, 253];

/// A veth carries frames longer than the receiver's MTU by an Ethernet header and one tag.
const LINK_EXCESS: usize = 18;

/// A frame before it becomes bytes.
#[derive(Clone)]
pub struct Draft {
    destination: [u8; 6],
    source: [u8; 6],
    tags: Vec<(u16, u16)>,
    pub ethertype: u16,
    pub packet: Vec<u8>,
    trailer: Vec<u8>,
    v6: bool,
    fix_checksum: bool,
}

/// An endless source of cases.
pub struct Generator {
    random: Random,
    flow: u32,
    vlans: bool,
    tunnels: bool,
}

impl Generator {
    pub fn new(seed: u64, profile: &Profile) -> Generator {
        Generator { random: Random::new(seed), flow: 0, vlans: profile.vlans, tunnels: profile.tunnels }
    }

    /// The next frame, to enter at `port`.
    pub fn case(&mut self, port: usize) -> Case {
        loop {
            let case = self.any_case(port);
            if !depends_on_time(&case.bytes) {
                return case;
            }
        }
    }

    /// Frames of many kinds, each a flow of its own.
    pub fn batch(&mut self, port: usize, count: usize) -> Vec<Case> {
        (0..count).map(|_| self.case(port)).collect()
    }

    /// Ordinary frames of one flow, numbered.
    pub fn flow(&mut self, port: usize, count: usize) -> Vec<Case> {
        self.flow += 1;
        let packet = self.ipv4(port, 17, &[0x80, 0, 0, 9, 0, 40, 0x12, 0x34].repeat(5));
        let mut draft = Draft::new(port, false, packet);
        let number = draft.packet.len() - 1;
        let numbered = (0..count).map(|index| {
            draft.packet[number] = index as u8;
            Case { port, bytes: draft.clone().into_bytes(), plain: true }
        });
        numbered.collect()
    }

    fn any_case(&mut self, port: usize) -> Case {
        let v6 = self.random.percent(45);
        let plain = self.random.percent(40);
        let carrier = self.carrier(port);
        let room = MTUS[port] - carrier.map_or(0, gre::overhead);
        let mut draft = self.transit(port, v6, room);
        if !plain {
            for _ in 0..1 + self.random.below(2) {
                if v6 { self.spoil_v6(&mut draft) } else { self.spoil_v4(&mut draft) }
            }
        }
        if let Some(tunnel) = carrier {
            draft = gre::carried(&mut self.random, tunnel, draft);
            if !plain && self.random.percent(30) {
                if self.random.percent(50) {
                    gre::spoil(&mut self.random, &mut draft.packet);
                } else if draft.v6 {
                    self.spoil_v6(&mut draft);
                } else {
                    self.spoil_v4(&mut draft);
                }
            }
        }
        let mut bytes = draft.into_bytes();
        if !plain && self.random.percent(10) {
            self.spoil_bytes(&mut bytes);
        }
        // A link carries no more; the sender would be told.
        bytes.truncate(MTUS[port] + LINK_EXCESS);
        Case { port, bytes, plain }
    }

    /// An ordinary packet of a flow of its own: nothing on the way may merge it with another.
    fn transit(&mut self, port: usize, v6: bool, room: usize) -> Draft {
        self.flow += 1;
        let length = self.payload_length(v6, room);
        // Some sources are reached by another port: what reverse path filters look at.
        let behind = if self.random.percent(15) { self.random.below(PORTS) } else { port };
        let protocol = self.random.pick(&[17, 17, 17, 6, 6, if v6 { 58 } else { 1 }, 50, 132]);
        let payload = self.transport(protocol, length);
        let packet = if v6 { self.ipv6(behind, protocol, &payload) } else { self.ipv4(behind, protocol, &payload) };
        let mut draft = Draft::new(port, v6, packet);
        if self.vlans && port == 2 && self.random.percent(40) {
            draft.tags.push((0x8100, self.random.pick(&VLANS).0));
        }
        // Senders pad to the least frame length.
        let frame = 14 + draft.tags.len() * 4 + draft.packet.len();
        if frame < 60 && self.random.percent(70) {
            draft.trailer = self.random.bytes(60 - frame);
        }
        draft
    }

    /// For some packets, the tunnel that they come in by; for a few by the wrong port.
    fn carrier(&mut self, port: usize) -> Option<&'static Tunnel> {
        let tunnel = &TUNNELS[self.random.below(TUNNELS.len())];
        let chance = if tunnel.port == port { 80 } else { 10 };
        (self.tunnels && self.random.percent(chance)).then_some(tunnel)
    }

    /// The same for what goes into a tunnel: the third byte of its addresses.
    fn tunnel_ahead(&mut self) -> Option<u8> {
        let tunnel = &TUNNELS[self.random.below(TUNNELS.len())];
        (self.tunnels && self.random.percent(30)).then_some(tunnel.third)
    }

    /// Lengths about every limit, short ones, and any, of packets no longer than `room`.
    fn payload_length(&mut self, v6: bool, room: usize) -> usize {
        let header = if v6 { 40 } else { 20 };
        let limit = self.random.pick(&[1280, 1300, MTUS[1] - 24, MTUS[1], MTUS[0] - 28, MTUS[0]]) - header;
        let length = match self.random.below(10) {
            0..5 => self.random.below(64),
            5 => limit - 1,
            6 => limit,
            7 => limit + 1,
            _ => self.random.below(MTUS[0] - header),
        };
        length.min(room - header)
    }

    fn transport(&mut self, protocol: u8, length: usize) -> Vec<u8> {
        let mut bytes = self.random.bytes(length);
        let Some(header) = bytes.get_mut(..8) else { return bytes };
        match protocol {
            // An echo request has type 8 or 128; other types are made by spoiling.
            1 => header[..2].copy_from_slice(&[8, 0]),
            58 => header[..2].copy_from_slice(&[128, 0]),
            17 => header[4..6].copy_from_slice(&(length as u16).to_be_bytes()),
            _ => {}
        }
        // Ports that filters ask for
        if matches!(protocol, 6 | 17) && self.random.percent(30) {
            let (port, at) = (self.random.pick(&[53u16, 443]), self.random.pick(&[0, 2]));
            header[at..at + 2].copy_from_slice(&port.to_be_bytes());
        }
        if protocol == 6 && length >= 20 {
            bytes[12] = 0x50;
        }
        if protocol == 1 {
            bytes[2..4].fill(0);
            let sum = checksum(&bytes);
            bytes[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        bytes
    }

    fn ipv4(&mut self, port: usize, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let destination = match self.tunnel_ahead() {
            Some(third) => [198, 18, third, self.random.byte()],
            None => self.address_v4(TRANSIT_V4),
        };
        let source = [198, 19, port as u8 * 64 + (self.flow >> 8) as u8 % 64, self.flow as u8];
        let mut packet = vec![0x45, self.random.pick(&[0, 0, 0, 0x10, 0xb8, 0x03])];
        packet.extend((20 + payload.len() as u16).to_be_bytes());
        packet.extend(self.random.word().to_be_bytes());
        packet.extend(self.random.pick(&[0u16, 0x4000]).to_be_bytes());
        packet.extend([self.random.pick(&[2, 3, 64, 128, 255]), protocol, 0, 0]);
        packet.extend(source);
        packet.extend(destination);
        packet.extend(payload);
        packet
    }

    fn ipv6(&mut self, port: usize, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut destination = self.address_v6(TRANSIT_V6);
        if let Some(third) = self.tunnel_ahead() {
            destination[4..6].copy_from_slice(&[1, third]);
        }
        let mut source = [0x20, 0x01, 0x0d, 0xb8, 0x0f, port as u8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        source[12..].copy_from_slice(&self.flow.to_be_bytes());
        let class = u32::from(self.random.pick(&[0u8, 0, 0xb8, 0x03]));
        let label = self.random.pick(&[0, 0, 0x12345, 0xfffff]);
        let mut packet = (6 << 28 | class << 20 | label).to_be_bytes().to_vec();
        packet.extend((payload.len() as u16).to_be_bytes());
        packet.extend([protocol, self.random.pick(&[2, 3, 64, 128, 255])]);
        packet.extend(source);
        packet.extend(destination);
        packet.extend(payload);
        packet
    }

    fn address_v4(&mut self, from: &[(&str, u32)]) -> [u8; 4] {
        let (base, length) = self.random.pick(from);
        let base = base.parse::<Ipv4Addr>().expect("an address of the lists above").to_bits();
        let host = u32::MAX.checked_shr(length).unwrap_or(0);
        (base | (self.random.next() as u32 & host)).to_be_bytes()
    }

    fn address_v6(&mut self, from: &[(&str, u32)]) -> [u8; 16] {
        let (base, length) = self.random.pick(from);
        let base = base.parse::<Ipv6Addr>().expect("an address of the lists above").to_bits();
        let host = u128::MAX.checked_shr(length).unwrap_or(0);
        let bits = u128::from(self.random.next()) << 64 | u128::from(self.random.next());
        (base | (bits & host)).to_be_bytes()
    }

    fn spoil_v4(&mut self, draft: &mut Draft) {
        if draft.packet.len() < 20 {
            return self.spoil_link(draft);
        }
        match self.random.below(17) {
            0 => draft.packet[8] = self.random.pick(&[0, 1, 1, 2, 255]),
            1 => {
                draft.fix_checksum = false;
                draft.packet[10..12].copy_from_slice(&self.random.next().to_be_bytes()[..2]);
            }
            2 => self.choose_checksum(&mut draft.packet),
            3 => draft.packet[0] = self.random.byte(),
            4 => draft.packet[0] = 0x40 | self.random.below(16) as u8,
            5 => self.spoil_length(&mut draft.packet, 2, 20),
            6 => self.insert_options(&mut draft.packet),
            7 => {
                let flags: u16 =
                    self.random.pick(&[0x2000, 0x4000, 0x6000, 0x8000, 0x0001, 0x2001, 0x1fff, 0x3fff, 0x00b9]);
                draft.packet[6..8].copy_from_slice(&flags.to_be_bytes());
            }
            8 | 9 => draft.packet[12..16].copy_from_slice(&self.address_v4(SOURCES_V4)),
            10 | 11 => draft.packet[16..20].copy_from_slice(&self.address_v4(DESTINATIONS_V4)),
            12 => draft.packet[1] = self.random.byte(),
            13 => draft.packet[9] = self.random.pick(PROTOCOLS),
            14 => spoil_transport(&mut draft.packet, 20),
            _ => self.spoil_link(draft),
        }
    }

    fn spoil_v6(&mut self, draft: &mut Draft) {
        if draft.packet.len() < 40 {
            return self.spoil_link(draft);
        }
        match self.random.below(15) {
            0 => draft.packet[7] = self.random.pick(&[0, 1, 1, 2, 255]),
            1 => draft.packet[0] = self.random.byte(),
            2 => draft.packet[1..4].copy_from_slice(&self.random.next().to_be_bytes()[..3]),
            3 => self.spoil_length(&mut draft.packet, 4, 0),
            4..7 => self.insert_extension(&mut draft.packet),
            7 | 8 => draft.packet[8..24].copy_from_slice(&self.address_v6(SOURCES_V6)),
            9 | 10 => draft.packet[24..40].copy_from_slice(&self.address_v6(DESTINATIONS_V6)),
            11 => draft.packet[6] = self.random.pick(PROTOCOLS),
            12 => spoil_transport(&mut draft.packet, 40),
            _ => self.spoil_link(draft),
        }
    }

    fn spoil_link(&mut self, draft: &mut Draft) {
        match self.random.below(10) {
            0 => draft.destination = [0xff; 6],
            1 => {
                draft.destination =
                    self.random.pick(&[[1, 0, 0x5e, 0, 0, 1], [0x33, 0x33, 0, 0, 0, 1], [1, 0x80, 0xc2, 0, 0, 0]])
            }
            2 => draft.destination = self.random.pick(&[ROUTER_MACS[0], ROUTER_MACS[1], HOST_MACS[1], [0; 6]]),
            3 => {
                draft.source =
                    self.random.pick(&[[0; 6], [0xff; 6], ROUTER_MACS[0], ROUTER_MACS[1], [1, 0, 0, 0, 0, 1]])
            }
            4 | 5 => {
                let protocol = self.random.pick(&[0x8100, 0x8100, 0x88a8, 0x9100]);
                let id = self.random.pick(&[0, 1, VLANS[0].0, VLANS[1].0, 4095, 77]);
                draft.tags.push((protocol, id | self.random.pick(&[0, 0, 0x2000, 0x1000])));
            }
            6 => draft.ethertype = self.random.pick(ETHERTYPES),
            7 => {
                let keep = self.random.below(draft.packet.len() + 1);
                draft.packet.truncate(keep);
                draft.trailer.clear();
            }
            8 => {
                let length = self.random.below(64);
                draft.trailer = self.random.bytes(length);
            }
            // The other family's EtherType.
            _ => draft.ethertype ^= 0x0800 ^ 0x86dd,
        }
    }

    /// A length field at `at` that disagrees with what is there.
    fn spoil_length(&mut self, packet: &mut [u8], at: usize, least: u16) {
        let value = u16::from_be_bytes([packet[at], packet[at + 1]]);
        let value = match self.random.below(6) {
            0 => value.wrapping_sub(1),
            1 => value.wrapping_add(1),
            2 => least,
            3 => least.wrapping_sub(1),
            4 => value / 2,
            _ => self.random.word(),
        };
        packet[at..at + 2].copy_from_slice(&value.to_be_bytes());
    }

    /// An identification for which the header's checksum comes out at a corner of one's complement arithmetic.
    fn choose_checksum(&mut self, packet: &mut [u8]) {
        let wanted: u16 = self.random.pick(&[0x0000, 0x0001, 0x00ff, 0x0100, 0xfeff, 0xff00, 0xfffe]);
        packet[4..6].fill(0);
        packet[10..12].fill(0);
        let sum = !checksum(&packet[..20]);
        let (id, borrow) = (!wanted).overflowing_sub(sum);
        packet[4..6].copy_from_slice(&id.wrapping_sub(u16::from(borrow)).to_be_bytes());
    }

    fn insert_options(&mut self, packet: &mut Vec<u8>) {
        let words = 1 + self.random.below(10);
        let route = [131, 7, 4, 192, 0, 2, 1];
        let mut options = match self.random.below(6) {
            0 => vec![1; 4],
            1 => vec![0; 4],
            2 => vec![148, 4, 0, 0],
            3 => [&[7, 11, 4][..], &[0; 8]].concat(),
            4 => [&[self.random.pick(&[131, 137])], &route[1..]].concat(),
            _ => self.random.bytes(words * 4),
        };
        options.resize(options.len().next_multiple_of(4), 0);
        packet[0] = 0x40 | (5 + options.len() / 4) as u8;
        let total = u16::from_be_bytes([packet[2], packet[3]]).wrapping_add(options.len() as u16);
        packet[2..4].copy_from_slice(&total.to_be_bytes());
        packet.splice(20..20, options);
    }

    fn insert_extension(&mut self, packet: &mut Vec<u8>) {
        let kind = self.random.pick(EXTENSIONS);
        let mut header = vec![packet[6], 0];
        header.extend(match (kind, self.random.below(4)) {
            // Router alert, jumbo payload, padding, an option that asks for an ICMP error.
            (0, 0) => vec![5, 2, 0, 0, 1, 0],
            (0, 1) => vec![0xc2, 4, 0, 1, 0, 0],
            (0 | 60, 2) => vec![1, 4, 0, 0, 0, 0],
            (0 | 60, 3) => vec![0xbe, 4, 0, 0, 0, 0],
            // A whole packet in a fragment; a first one; a later one.
            (44, 0) => vec![0, 0, 0, 0, 0, 1],
            (44, 1) => vec![0, 1, 0, 0, 0, 2],
            (44, 2) => vec![0, 8, 0, 0, 0, 3],
            (43, 0) => vec![0, 0, 0, 0, 0, 0],
            (43, 1) => vec![4, 1, 0, 0, 0, 0],
            _ => self.random.bytes(6),
        });
        packet[6] = kind;
        let length = u16::from_be_bytes([packet[4], packet[5]]).wrapping_add(8);
        packet[4..6].copy_from_slice(&length.to_be_bytes());
        packet.splice(40..40, header);
    }

    /// Changes after all checksums: anything may be wrong now.
    fn spoil_bytes(&mut self, bytes: &mut Vec<u8>) {
        match self.random.below(3) {
            0 => {
                for _ in 0..1 + self.random.below(4) {
                    let at = self.random.below(bytes.len().min(80));
                    bytes[at] ^= 1 << self.random.below(8);
                }
            }
            1 => bytes.truncate(14 + self.random.below(bytes.len() - 13)),
            _ => {
                let length = 14 + self.random.below(100);
                let from = self.random.below(34);
                bytes.truncate(from);
                bytes.extend(self.random.bytes(length));
            }
        }
    }
}

impl Draft {
    /// From the neighbour on `port` to the router.
    fn new(port: usize, v6: bool, packet: Vec<u8>) -> Draft {
        Draft {
            destination: ROUTER_MACS[port],
            source: HOST_MACS[port],
            tags: Vec::new(),
            ethertype: if v6 { 0x86dd } else { 0x0800 },
            packet,
            trailer: Vec::new(),
            v6,
            fix_checksum: true,
        }
    }

    /// The packet, which is complete, inside one with these headers.
    pub fn carried(mut self, headers: &[u8]) -> Draft {
        self.packet.splice(..0, headers.iter().copied());
        let v6 = headers.first().is_some_and(|first| first >> 4 == 6);
        Draft { ethertype: if v6 { 0x86dd } else { 0x0800 }, v6, fix_checksum: true, ..self }
    }

    /// Makes the header's checksum right, if it is to be.
    pub fn complete(&mut self) {
        let header = usize::from(self.packet.first().unwrap_or(&0) & 15) * 4;
        if self.fix_checksum && !self.v6 && header >= 20 && self.packet.len() >= header {
            self.packet[10..12].fill(0);
            let sum = checksum(&self.packet[..header]);
            self.packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
    }

    fn into_bytes(mut self) -> Vec<u8> {
        self.complete();
        let mut bytes = [self.destination, self.source].concat();
        for (protocol, tci) in self.tags {
            bytes.extend(protocol.to_be_bytes());
            bytes.extend(tci.to_be_bytes());
        }
        bytes.extend(self.ethertype.to_be_bytes());
        bytes.extend(self.packet);
        bytes.extend(self.trailer);
        bytes
    }
}

/// A transport checksum of zero: absent (UDP over IPv4), or left to a device (SCTP).
fn spoil_transport(packet: &mut [u8], at: usize) {
    for place in [at + 6..at + 8, at + 8..at + 12] {
        packet.get_mut(place).unwrap_or_default().fill(0);
    }
}

/// Packets whose treatment shows the time of day, or starts something that ends at a time of its own, cannot be
/// compared: timestamps (IPv4 option 68, ICMP type 13), queries of IGMP and MLD (answered after a random delay), and
/// what makes the router learn a neighbour, whose entry then ages (ARP, neighbour discovery).
pub fn depends_on_time(bytes: &[u8]) -> bool {
    let mut at = 12;
    while matches!(bytes.get(at..at + 2), Some([0x81, 0] | [0x88, 0xa8] | [0x91, 0])) {
        at += 4;
    }
    let ethertype = bytes.get(at..).and_then(<[u8]>::first_chunk);
    ethertype.is_some_and(|ethertype| packet_depends_on_time(*ethertype, &bytes[at + 2..]))
}

fn packet_depends_on_time(ethertype: [u8; 2], packet: &[u8]) -> bool {
    let gre = gre::place(packet).and_then(|at| packet.get(at..));
    let inside = gre.and_then(|gre| gre::inside(gre).map(|(at, ethertype)| (ethertype, &gre[at..])));
    if inside.is_some_and(|(ethertype, packet)| packet_depends_on_time(ethertype, packet)) {
        return true;
    }
    match ethertype {
        [8, 0] => {
            let header = usize::from(packet.first().unwrap_or(&0) & 15) * 4;
            let options = packet.get(20..header.min(packet.len())).unwrap_or_default();
            let timestamp = packet.get(9) == Some(&1) && packet.get(header) == Some(&13);
            options.contains(&68) || timestamp || packet.get(9) == Some(&2)
        }
        // The type lies behind any extension headers: eight bytes each, or more.
        [0x86, 0xdd] => {
            let mut types = packet.iter().skip(40).step_by(8).take(4);
            types.any(|kind| (130..=137).contains(kind) || *kind == 143) && has_icmp6(packet)
        }
        [8, 6] => true,
        _ => false,
    }
}

/// Whether ICMPv6 is the next header or that of an extension header near the front.
fn has_icmp6(packet: &[u8]) -> bool {
    packet.get(6) == Some(&58) || packet.iter().skip(40).step_by(8).take(3).any(|next| *next == 58)
}

/// The packets sent behind each batch, one ordinary and one with an IPv4 option to each port: once they have come
/// out, everything before them has.
pub fn markers(port: usize, batch: u32) -> Vec<Vec<u8>> {
    let mut markers = Vec::new();
    for destination in NEIGHBOURS_V4 {
        for options in [&[][..], &[1, 1, 1, 0]] {
            let mut packet = vec![0x45 + (options.len() / 4) as u8, 0];
            packet.extend((32 + options.len() as u16).to_be_bytes());
            packet.extend([0, 0, 0, 0, 64, MARKER_PROTOCOL, 0, 0]);
            packet.extend(NEIGHBOURS_V4[port]);
            packet.extend(destination);
            packet.extend(options);
            packet.extend(MARKER);
            packet.extend(batch.to_be_bytes());
            markers.push(Draft::new(port, false, packet).into_bytes());
        }
    }
    markers
}

const MARKER: [u8; 8] = *b"\xffmarker\xff";
/// ESP: nothing looks at what follows.
const MARKER_PROTOCOL: u8 = 50;

/// The batch of which a received frame is the marker, if it is one.
pub fn marker_batch(bytes: &[u8]) -> Option<u32> {
    let header = 14 + usize::from(bytes.get(14)? & 15) * 4;
    let is_marker = bytes.get(12..14)? == [8, 0] && bytes.get(23) == Some(&MARKER_PROTOCOL);
    let (text, batch) = bytes.get(header..header + 12)?.split_at(8);
    (is_marker && text == MARKER).then(|| u32::from_be_bytes([batch[0], batch[1], batch[2], batch[3]]))
}

/// Whether an address is one of the router's own (or may be, in a history).
pub fn is_router_v4(address: &[u8]) -> bool {
    ROUTER_V4.iter().any(|own| own == address)
        || matches!(address, [198, 18, 0 | 200..203, 1])
        || VLANS.iter().any(|(_, third)| address == [198, 18, *third, 1])
        || address == [127, 0, 0, 1]
}
