//! The ends of a connection, and the frames that they send.

use crate::router::{HOST_MACS, ROUTER_MACS};
use etherparse::{PacketBuilder, PacketBuilderStep, TcpHeader, icmpv4};
use std::net::{IpAddr, SocketAddr};

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const PUSH: u8 = 8;
pub const ACK: u8 = 16;

/// What one end sees: its own address and the other's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct View {
    pub own: SocketAddr,
    pub other: SocketAddr,
}

impl View {
    /// What the other end sees, if nobody translates.
    pub fn turned(self) -> Self {
        Self { own: self.other, other: self.own }
    }
}

/// One end of a conversation.
#[derive(Clone, Copy, Debug)]
pub struct End {
    /// The router's port that it is behind
    pub port: usize,
    pub view: View,
    /// The next byte that it sends, and the next that it expects
    pub sequence: u32,
    pub expected: u32,
}

impl End {
    /// The frame of a segment with these flags, or of a datagram if there are none.
    pub fn frame(&self, flags: Option<u8>, identification: u16, payload: &[u8]) -> Vec<u8> {
        let (ip, mut bytes) = (self.packet(identification), Vec::new());
        let (own, other) = (self.view.own.port(), self.view.other.port());
        match flags {
            Some(flags) => {
                let mut header = TcpHeader::new(own, other, self.sequence, 64_000);
                header.fin = flags & FIN != 0;
                header.syn = flags & SYN != 0;
                header.rst = flags & RST != 0;
                header.psh = flags & PUSH != 0;
                header.ack = flags & ACK != 0;
                header.acknowledgment_number = if header.ack { self.expected } else { 0 };
                ip.tcp_header(header).write(&mut bytes, payload)
            }
            None => ip.udp(own, other).write(&mut bytes, payload),
        }
        .expect("writing to memory");
        bytes
    }

    /// "Host unreachable" about a packet of the other end as this end would have got it; IPv4 only.
    pub fn unreachable(&self, tcp: bool, identification: u16) -> Option<Vec<u8>> {
        if self.view.own.is_ipv6() {
            return None;
        }
        let received = End { view: self.view.turned(), sequence: self.expected, ..*self };
        let quoted = received.frame(tcp.then_some(0), 1, &[]);
        let unreachable = etherparse::Icmpv4Type::DestinationUnreachable(icmpv4::DestUnreachableHeader::Host);
        let mut bytes = Vec::new();
        self.packet(identification).icmpv4(unreachable).write(&mut bytes, &quoted[14..]).expect("writing to memory");
        Some(bytes)
    }

    /// The beginning of a packet to the other end.
    pub fn packet(&self, identification: u16) -> PacketBuilderStep<etherparse::IpHeaders> {
        let ethernet = PacketBuilder::ethernet2(HOST_MACS[self.port], ROUTER_MACS[self.port]);
        match (self.view.own.ip(), self.view.other.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let mut header = etherparse::Ipv4Header {
                    time_to_live: 64,
                    identification,
                    dont_fragment: true,
                    source: source.octets(),
                    destination: destination.octets(),
                    ..Default::default()
                };
                header.header_checksum = header.calc_header_checksum();
                ethernet.ip(etherparse::IpHeaders::Ipv4(header, Default::default()))
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => ethernet.ip(etherparse::IpHeaders::Ipv6(
                etherparse::Ipv6Header {
                    hop_limit: 64,
                    source: source.octets(),
                    destination: destination.octets(),
                    ..Default::default()
                },
                Default::default(),
            )),
            _ => unreachable!("both ends are of one family"),
        }
    }
}
