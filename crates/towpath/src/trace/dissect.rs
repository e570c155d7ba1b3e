//! What is in a frame, for people: the packet path itself decides by its own look at it.

use crate::explain::Subject;
use std::net::IpAddr;
use towpath_tables::Tuple;
use towpath_wire::View;
use towpath_wire::ethernet::{self, Ethernet, Tag};
use towpath_wire::gre::Gre;
use towpath_wire::ipv4::Ipv4;
use towpath_wire::ipv6::{EncapsulationLimit, Ipv6};
use towpath_wire::transport::{Ports, protocol};

/// Tags that are looked for.
const TAGS: usize = 2;

/// A frame taken apart, as far as that was possible.
#[derive(PartialEq, Eq, Debug)]
pub struct Dissected<'a> {
    /// Tags in it, outermost first: protocol and VLAN identifier
    pub tags: Vec<(u16, u16)>,
    /// EtherType behind the tags
    pub ethertype: u16,
    /// The IP packet
    pub packet: Option<Packet<'a>>,
}

/// An IP packet taken apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet<'a> {
    /// Its ends
    pub subject: Subject,
    payload: &'a [u8],
}

/// A packet in GRE.
#[derive(PartialEq, Eq, Debug)]
pub struct Inner<'a> {
    /// The key
    pub key: Option<u32>,
    /// The packet
    pub packet: Packet<'a>,
}

/// Takes a frame apart; `beside` is a tag that is not in it.
pub fn dissect(frame: &[u8], beside: Option<(u16, u16)>) -> Option<Dissected<'_>> {
    let (header, mut rest) = view::<Ethernet>(frame)?;
    let mut ethertype = header.ethertype.get();
    let mut tags: Vec<_> = beside.map(|(protocol, control)| (protocol, control & Tag::ID)).into_iter().collect();
    while tags.len() < TAGS && matches!(ethertype, ethernet::VLAN | ethernet::SERVICE_VLAN) {
        let Some((tag, behind)) = view::<Tag>(rest) else { break };
        tags.push((ethertype, tag.id()));
        (ethertype, rest) = (tag.ethertype.get(), behind);
    }
    Some(Dissected { tags, ethertype, packet: packet(ethertype, rest) })
}

fn packet(ethertype: u16, bytes: &[u8]) -> Option<Packet<'_>> {
    match ethertype {
        ethernet::IPV4 => ipv4(bytes),
        ethernet::IPV6 => ipv6(bytes),
        _ => None,
    }
}

fn ipv4(bytes: &[u8]) -> Option<Packet<'_>> {
    let (header, _) = view::<Ipv4>(bytes)?;
    let length = usize::from(header.version_ihl & 15) * 4;
    let payload = bytes.get(length..).unwrap_or_default();
    let begins = header.fragment.get() & Ipv4::OFFSET == 0;
    let ends = [IpAddr::from(header.source), header.destination.into()];
    Some(whole(ends, header.protocol, header.ttl, payload, begins))
}

fn ipv6(bytes: &[u8]) -> Option<Packet<'_>> {
    let (header, payload) = view::<Ipv6>(bytes)?;
    let ends = [IpAddr::from(header.source), header.destination.into()];
    Some(whole(ends, header.next_header, header.hop_limit, payload, true))
}

/// A packet with the ports that its payload begins with, if it does.
fn whole([source, destination]: [IpAddr; 2], protocol: u8, ttl: u8, payload: &[u8], begins: bool) -> Packet<'_> {
    let ports = view::<Ports>(payload).filter(|_| begins && has_ports(protocol));
    let [source_port, destination_port] =
        ports.map_or([0, 0], |(ports, _)| [ports.source, ports.destination].map(|port| port.get()));
    Packet {
        subject: Subject { tuple: Tuple { source, destination, source_port, destination_port, protocol }, ttl },
        payload,
    }
}

/// Whether a protocol's header begins with ports.
pub fn has_ports(number: u8) -> bool {
    matches!(number, protocol::TCP | protocol::UDP | protocol::SCTP | protocol::DCCP | protocol::UDP_LITE)
}

impl<'a> Packet<'a> {
    /// The packet in this one, if it is GRE.
    pub fn inner(&self) -> Option<Inner<'a>> {
        let payload = match self.subject.tuple.protocol {
            protocol::GRE => self.payload,
            protocol::DESTINATION_OPTIONS => {
                let (options, rest) = view::<EncapsulationLimit>(self.payload)?;
                (*options == EncapsulationLimit::new(options.limit, protocol::GRE)).then_some(rest)?
            }
            _ => return None,
        };
        let (gre, _) = view::<Gre>(payload)?;
        let flags = gre.flags.get();
        let rest = payload.get(Gre::len(flags)?..)?;
        let key = payload.get(Gre::key_place(flags)..).and_then(|key| key.first_chunk());
        let key = key.filter(|_| flags & Gre::KEY != 0).map(|key| u32::from_be_bytes(*key));
        Some(Inner { key, packet: packet(gre.protocol.get(), rest)? })
    }
}

fn view<T: View>(bytes: &[u8]) -> Option<(&T, &[u8])> {
    T::ref_from_prefix(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Protocol;
    use crate::control;
    use crate::frame::{Link, build, tunnelled};
    use proptest::prelude::*;
    use towpath_fpc::{GreOptions, Tunnel};

    fn made(source: &str, destination: &str) -> control::Packet {
        let [source, destination] = [source, destination].map(|address| address.parse().unwrap());
        control::Packet {
            source,
            destination,
            port: None,
            protocol: Protocol::Tcp,
            sport: 1024,
            dport: 179,
            length: 100,
            ttl: 7,
        }
    }

    fn link(tags: &[(u16, u16)]) -> Link {
        Link { mac: [2, 0, 0, 0, 0, 9], tags: tags.into() }
    }

    #[test]
    fn packets_of_both_families_are_known_behind_their_tags() {
        let tags = [(0x88a8, 7), (0x8100, 100)];
        for (ends, ethertype) in [(("192.0.2.1", "198.51.100.2"), 0x0800), (("2001:db8::1", "2001:db8::2"), 0x86dd)] {
            let packet = made(ends.0, ends.1);
            let frame = build(&packet, &link(&tags));
            let found = dissect(&frame, None).unwrap();
            assert_eq!((found.tags.as_slice(), found.ethertype), (&tags[..], ethertype));
            assert_eq!(found.packet.unwrap().subject, Subject::from(&packet));
            let frame = build(&packet, &link(&tags[1..]));
            assert_eq!(dissect(&frame, Some((0x88a8, 0xe007))).unwrap().tags, tags);
        }
    }

    #[test]
    fn a_later_fragment_has_no_ports() {
        let mut frame = build(&made("192.0.2.1", "198.51.100.2"), &link(&[]));
        frame[21] = 3;
        let subject = dissect(&frame, None).unwrap().packet.unwrap().subject;
        assert_eq!((subject.tuple.source_port, subject.tuple.destination_port), (0, 0));
    }

    #[test]
    fn a_tunnel_s_packet_is_found() {
        let packet = made("2001:db8::1", "2001:db8::2");
        let ends = [["203.0.113.1", "203.0.113.2"], ["2001:db8:7::1", "2001:db8:7::2"]];
        let options = [(None, false), (Some(0x0102_0304), false), (None, true), (Some(7), true)];
        for (ends, (key, checksum)) in ends.into_iter().flat_map(|ends| options.map(|options| (ends, options))) {
            let [local, remote] = ends.map(|address| address.parse::<IpAddr>().unwrap());
            let (input, output) = (GreOptions { key, checksum, sequence: false }, GreOptions::default());
            let tunnel =
                Tunnel { local, remote, link: 0, input, output, ttl: 0, class: None, label: None, limit: None };
            let plain = tunnelled(&packet, &link(&[]), &tunnel);
            let mut limited = plain.clone();
            if local.is_ipv6() {
                limited[20] = protocol::DESTINATION_OPTIONS;
                limited.splice(54..54, [protocol::GRE, 0, 4, 1, 3, 1, 1, 0]);
            }
            for frame in [plain, limited] {
                let outer = dissect(&frame, None).unwrap().packet.unwrap();
                assert_eq!((outer.subject.tuple.source, outer.subject.tuple.destination), (remote, local));
                let inner = outer.inner().unwrap();
                assert_eq!((inner.key, inner.packet.subject), (key, Subject::from(&packet)));
                assert_eq!(inner.packet.inner(), None);
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_apart(bytes in proptest::collection::vec(any::<u8>(), 0..128), kind in 0..4usize) {
            let mut bytes = bytes;
            if let Some(place) = bytes.get_mut(12..14) {
                place.copy_from_slice(&[[8, 0], [0x86, 0xdd], [0x81, 0], [8, 6]][kind]);
            }
            let found = dissect(&bytes, None);
            prop_assert_eq!(found.is_some(), bytes.len() >= 14);
            let _ = found.and_then(|found| Some(found.packet?.inner().is_some()));
        }
    }
}
