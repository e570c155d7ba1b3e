//! The table of cases of the packet path. Each is a router, a frame, and everything that must become of them; the
//! native build and the BPF object are both held against it.

mod filters;
mod flows;
pub mod frames;
mod nat;
pub mod translate;
mod tunnels;
pub mod world;

use crate::Beside;
pub use flows::Effect;
use frames::*;
use towpath_tables::record::port_flags::{
    BESIDE, FORWARD_V4, FORWARD_V6, PARTIAL_CSUM, PRESENT, READY, REDIRECTS, ROUTE_LOCALNET, RP_LOOSE, RP_STRICT,
    SINGLE_BUFFER,
};
use towpath_tables::record::{FILTERS_COUNTED, tunnel_bucket};
use towpath_tables::{REASONS, Reason};
use towpath_wire::transport::protocol::{GRE, TCP, UDP};
use world::*;

/// What must become of a frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Expect {
    /// Left alone, counted nowhere
    NotAPort,
    /// Dropped by a filter, counted on the port in the slot
    Drop(u32),
    /// Left alone, counted on the port in the slot
    Exception(u32, Reason),
    /// Forwarded
    Forward {
        /// The whole frame afterwards
        frame: Vec<u8>,
        /// Slot of the port that it entered by
        from: u32,
        /// Slot of the port that it leaves by
        to: u32,
        /// Slot of the interface that transmits it
        device: u32,
        /// The next hop that is hit
        hop: u32,
    },
}

/// One case.
pub struct Case {
    /// What it shows
    pub name: String,
    /// Changes the router from what `World::new` makes
    pub configure: Box<dyn Fn(&mut World)>,
    /// The frame that arrives
    pub frame: Vec<u8>,
    /// What travels beside it, where that matters
    pub beside: Option<Beside>,
    /// What must become of it
    pub expect: Expect,
    /// Packets that tunnels count: slot, direction, and length
    pub tunnels: Vec<(u32, Way, usize)>,
    /// What becomes of the flow, if something does
    pub flow: Option<Effect>,
    /// What mappings count
    pub mapped: Vec<nat::Mapped>,
    /// The filter that decides over it, if one does: its number, and the length that it counts
    pub filtered: Option<(u32, usize)>,
}

/// Which way a packet passes a tunnel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// Out of it
    Out,
    /// Into it
    Into,
}

impl Case {
    /// The router as the frame finds it.
    pub fn router(&self) -> World {
        let mut world = World::new();
        (self.configure)(&mut world);
        world.find_ways();
        world
    }

    /// Writes into the router the counters and hit flags that must be found afterwards.
    pub fn apply(&self, world: &World) {
        self.expect.apply(world, self.frame.len());
        if let Some(effect) = self.flow {
            effect.apply(world);
        }
        if let Some((number, len)) = self.filtered {
            let (line, place) = (number as usize / FILTERS_COUNTED, number as usize % FILTERS_COUNTED);
            world.filter_stats()[line].packets[place].store(1);
            world.filter_stats()[line].bytes[place].store(len as u64);
        }
        for (number, way, len) in &self.mapped {
            let counters = &world.mapping_stats()[*number as usize];
            counters.packets[*way as usize].store(1);
            counters.bytes[*way as usize].store(*len as u64);
        }
        for (slot, way, len) in &self.tunnels {
            let stats = world.stats(*slot);
            let (packets, bytes) = match way {
                Way::Out => (&stats.rx_packets, &stats.rx_bytes),
                Way::Into => (&stats.tx_packets, &stats.tx_bytes),
            };
            packets.store(1);
            bytes.store(*len as u64);
        }
    }
}

impl Expect {
    fn apply(&self, world: &World, frame_len: usize) {
        match self {
            Expect::NotAPort => {}
            Expect::Drop(slot) => world.stats(*slot).exceptions[Reason::Filtered as usize].store(1),
            Expect::Exception(slot, reason) => world.stats(*slot).exceptions[*reason as usize].store(1),
            Expect::Forward { frame, from, to, hop, .. } => {
                world.stats(*from).rx_packets.store(1);
                world.stats(*from).rx_bytes.store(frame_len as u64);
                world.stats(*to).tx_packets.store(1);
                world.stats(*to).tx_bytes.store(frame.len() as u64);
                world.nexthop(*hop).hit.store(1);
            }
        }
    }
}

/// All cases.
pub fn all() -> Vec<Case> {
    let mut cases = Cases(Vec::new());
    cases.forwarding();
    cases.link_layer();
    cases.tags();
    cases.ports();
    cases.ipv4_headers();
    cases.ipv4_addresses();
    cases.ipv6_headers();
    cases.ipv6_addresses();
    cases.reverse_path();
    cases.by_source();
    cases.routes();
    cases.groups();
    cases.partial_checksums();
    cases.beside();
    cases.tunnels();
    cases.flows();
    cases.mappings();
    cases.filters();
    cases.0
}

fn data(len: usize) -> Vec<u8> {
    (0..len).map(|i| i as u8).collect()
}

/// An IPv4 datagram with a right checksum to an address.
fn packet4(destination: [u8; 4], len: usize) -> Vec<u8> {
    complete(ipv4(SOURCE4, destination, UDP, &udp(1000, 2000, &data(len))), UDP, 6)
}

/// An IPv6 datagram with a right checksum to an address.
fn packet6(destination: [u8; 16], len: usize) -> Vec<u8> {
    complete(ipv6(address6(0, 0, 99), destination, UDP, &udp(1000, 2000, &data(len))), UDP, 6)
}

/// Those to `OUT`.
fn plain4() -> Vec<u8> {
    packet4(DESTINATION4, 22)
}

fn plain6() -> Vec<u8> {
    packet6(address6(1, 0, 7), 22)
}

/// The packet in an untagged frame for `IN`.
fn arrive(packet: &[u8]) -> Vec<u8> {
    [link(IN, &[], if packet[0] >> 4 == 4 { 0x0800 } else { 0x86dd }), packet.to_vec()].concat()
}

fn with(mut bytes: Vec<u8>, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    change(&mut bytes);
    bytes
}

/// An IPv4 packet with changed header and a right checksum.
fn with4(packet: Vec<u8>, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    with(with(packet, change), |packet| fix4(packet))
}

fn nothing(_: &mut World) {}

struct Cases(Vec<Case>);

impl Cases {
    fn add(
        &mut self,
        name: impl Into<String>,
        configure: impl Fn(&mut World) + 'static,
        frame: Vec<u8>,
        expect: Expect,
    ) {
        self.0.push(Case {
            name: name.into(),
            configure: Box::new(configure),
            frame,
            beside: None,
            expect,
            tunnels: Vec::new(),
            flow: None,
            mapped: Vec::new(),
            filtered: None,
        });
    }

    /// The frame is an exception of `IN`.
    fn except(
        &mut self,
        name: impl Into<String>,
        configure: impl Fn(&mut World) + 'static,
        frame: Vec<u8>,
        reason: Reason,
    ) {
        self.add(name, configure, frame, Expect::Exception(IN, reason));
    }

    /// The packet, untagged and with padding, leaves by `OUT` without.
    fn pass(
        &mut self,
        name: impl Into<String>,
        configure: impl Fn(&mut World) + 'static,
        packet: Vec<u8>,
        padding: usize,
    ) {
        let frame = [arrive(&packet), vec![0xee; padding]].concat();
        let expect = Expect::Forward { frame: forwarded(OUT, &[], &packet), from: IN, to: OUT, device: OUT, hop: HOP };
        self.add(name, configure, frame, expect);
    }

    fn forwarding(&mut self) {
        for padding in [0, 1, 18, 100] {
            self.pass(format!("IPv4, padding {padding}"), nothing, plain4(), padding);
            self.pass(format!("IPv6, padding {padding}"), nothing, plain6(), padding);
        }
        self.pass("IPv4, nothing but a header", nothing, ipv4(SOURCE4, DESTINATION4, 253, &[]), 26);
        self.pass("IPv6, nothing but a header", nothing, ipv6(address6(0, 0, 9), address6(1, 0, 7), 59, &[]), 6);
        // Linux takes a payload length of 0 for what it says unless hop-by-hop options follow.
        self.pass(
            "IPv6, nothing follows but padding",
            nothing,
            ipv6(address6(0, 0, 9), address6(1, 0, 7), UDP, &[]),
            60,
        );
        for len in [1471, 1472, 1473] {
            let packet = packet4(DESTINATION4, len);
            match len {
                1473 => self.except("IPv4, MTU + 1", nothing, arrive(&packet), Reason::MtuExceeded),
                _ => self.pass(format!("IPv4, {len} bytes of data"), nothing, packet, 0),
            }
        }
        self.pass("IPv6, as large as the MTU", nothing, packet6(address6(1, 0, 7), 1452), 0);
        self.except("IPv6, MTU + 1", nothing, arrive(&packet6(address6(1, 0, 7), 1453)), Reason::MtuExceeded);
        self.pass("IPv4, padding does not count for the MTU", nothing, packet4(DESTINATION4, 1472), 40);
        let jumbo = |world: &mut World| world.nexthop(HOP).mtu.store(9000);
        self.pass("IPv4, several buffers", jumbo, packet4(DESTINATION4, 4000), 0);
        self.pass("IPv6, several buffers", jumbo, packet6(address6(1, 0, 7), 4000), 0);
        self.pass("IPv4, several buffers and padding", jumbo, packet4(DESTINATION4, 4000), 30);
        self.pass("IPv4, several buffers of padding", jumbo, packet4(DESTINATION4, 100), 4000);
        let single = move |world: &mut World| {
            jumbo(world);
            world.flag(OUT, SINGLE_BUFFER);
        };
        self.except(
            "several buffers to a port that sends one",
            single,
            arrive(&packet4(DESTINATION4, 4000)),
            Reason::EgressNotServed,
        );
        self.pass("one buffer to a port that sends one", single, packet4(DESTINATION4, 3000), 0);
        for (name, tos, fragment, ttl) in [
            ("last hop but one", 0, 0, 2),
            ("longest life", 0, 0, 255),
            ("all of TOS", 0xff, 0, 64),
            ("don't fragment", 0, 0x4000, 64),
            ("reserved flag", 0, 0x8000, 64),
            ("first fragment", 0, 0x2000, 64),
            ("later fragment", 0, 0x2010, 64),
            ("last fragment", 0, 0x00b9, 64),
        ] {
            let packet = with4(plain4(), |p| {
                p[1] = tos;
                p[6..8].copy_from_slice(&u16::to_be_bytes(fragment));
                p[8] = ttl;
            });
            self.pass(format!("IPv4, {name}"), nothing, packet, 0);
        }
        // Checksums that the decrement carries over the end: FEFF, FF00 and FFFE once updated.
        for wanted in [0xfeffu16, 0xfefe, 0xff00, 0xfffe, 0x0000, 0x00ff] {
            let found = (0..=u16::MAX).map(|id| with4(plain4(), |p| p[4..6].copy_from_slice(&id.to_be_bytes())));
            for packet in found.filter(|p| p[10..12] == wanted.to_be_bytes()).take(1) {
                self.pass(format!("IPv4, header checksum {wanted:04x}"), nothing, packet, 0);
            }
        }
        self.pass("IPv6, last hop but one", nothing, with(plain6(), |p| p[7] = 2), 0);
        self.pass(
            "IPv6, class and label",
            nothing,
            with(plain6(), |p| p[..4].copy_from_slice(&[0x6a, 0xbc, 0xde, 0xf1])),
            0,
        );
        for next in [43, 44, 50, 51, 60, 135] {
            let packet = ipv6(address6(0, 0, 9), address6(1, 0, 7), next, &data(40));
            self.pass(format!("IPv6, next header {next}"), nothing, packet, 0);
        }
    }

    fn link_layer(&mut self) {
        for (family, packet) in [("IPv4", plain4()), ("IPv6", plain6())] {
            let to = |mac: [u8; 6]| with(arrive(&packet), |f| f[..6].copy_from_slice(&mac));
            self.except(format!("{family}, broadcast frame"), nothing, to([0xff; 6]), Reason::L2Multicast);
            self.except(format!("{family}, multicast frame"), nothing, to([1, 0, 0x5e, 0, 0, 1]), Reason::L2Multicast);
            self.except(format!("{family}, another's frame"), nothing, to(mac(OUT)), Reason::NotForUs);
            self.except(format!("{family}, first byte differs"), nothing, to([6, 0, 0, 0, 0, 1]), Reason::NotForUs);
            self.except(format!("{family}, fifth byte differs"), nothing, to([2, 0, 0, 0, 1, 1]), Reason::NotForUs);
        }
        for ethertype in [0x0806, 0x8863, 0x8847, 0x05dc, 0x0000, 0x9100, 0x0801] {
            let frame = [link(IN, &[], ethertype), plain4()].concat();
            self.except(format!("EtherType {ethertype:04x}"), nothing, frame, Reason::UnsupportedEncap);
        }
        self.except("nothing but an Ethernet header", nothing, link(IN, &[], 0x0800), Reason::Truncated);
        self.except("nothing but an Ethernet header, IPv6", nothing, link(IN, &[], 0x86dd), Reason::Truncated);
    }

    fn tags(&mut self) {
        const C100: (u16, u16) = (0x8100, 100);
        const S300: (u16, u16) = (0x88a8, 300);
        const C5: (u16, u16) = (0x8100, 5);
        let entries: [(u32, Vec<(u16, u16)>); 4] =
            [(IN, vec![]), (IN_VLAN, vec![C100]), (IN_SERVICE, vec![S300]), (IN_DOUBLE, vec![S300, C5])];
        let exits: [(u32, u32, u32, &[(u16, u16)], [u8; 4], u16); 3] = [
            (OUT, OUT, HOP, &[], [198, 51, 100, 7], 1),
            (OUT_VLAN, OUT, HOP_VLAN, &[(0x8100, 200)], [203, 0, 113, 7], 2),
            (OUT_DOUBLE, OTHER, HOP_DOUBLE, &[(0x88a8, 400), (0x8100, 7)], [203, 1, 113, 7], 3),
        ];
        for (from, tags_in) in &entries {
            for (to, device, hop, tags_out, address4, third) in exits {
                for packet in [packet4(address4, 22), packet6(address6(third, 0, 7), 22)] {
                    for padding in [0, 7] {
                        let ethertype = if packet[0] >> 4 == 4 { 0x0800 } else { 0x86dd };
                        let frame = [link(*from, tags_in, ethertype), packet.clone(), vec![9; padding]].concat();
                        let name = format!(
                            "{ethertype:04x}, from port {from}, {} tags in, {} out, padding {padding}",
                            tags_in.len(),
                            tags_out.len()
                        );
                        let expect =
                            Expect::Forward { frame: forwarded(to, tags_out, &packet), from: *from, to, device, hop };
                        self.add(name, nothing, frame, expect);
                    }
                }
            }
        }
        let tagged = |slot, tags: &[(u16, u16)]| [link(slot, tags, 0x0800), plain4()].concat();
        let forward =
            |from| Expect::Forward { frame: forwarded(OUT, &[], &plain4()), from, to: OUT, device: OUT, hop: HOP };
        self.add(
            "priority bits of a tag do not matter",
            nothing,
            tagged(IN_VLAN, &[(0x8100, 0xf064)]),
            forward(IN_VLAN),
        );
        self.except("priority tag", nothing, tagged(IN, &[(0x8100, 0)]), Reason::UnsupportedEncap);
        let zero = |world: &mut World| {
            world.set_vlan(0, 0, IN_VLAN);
            world.port(IN_VLAN).vlan.store(0x8100 << 16);
        };
        self.except(
            "VLAN 0 cannot be a sub-interface",
            zero,
            tagged(IN_VLAN, &[(0x8100, 0)]),
            Reason::UnsupportedEncap,
        );
        self.except("unknown VLAN", nothing, tagged(IN, &[(0x8100, 101)]), Reason::UnsupportedEncap);
        self.except("VLAN 4095", nothing, tagged(IN, &[(0x8100, 4095)]), Reason::UnsupportedEncap);
        let last = |world: &mut World| {
            world.set_vlan(0, 4094, IN_VLAN);
            world.port(IN_VLAN).vlan.store(0x8100 << 16 | 4094);
        };
        self.add("VLAN 4094", last, tagged(IN_VLAN, &[(0x8100, 4094)]), forward(IN_VLAN));
        self.except(
            "right VLAN under the wrong protocol",
            nothing,
            tagged(IN_VLAN, &[(0x88a8, 100)]),
            Reason::UnsupportedEncap,
        );
        let none = |world: &mut World| world.port(IN).vlans.store(towpath_tables::record::NO_VLANS);
        self.except("port without sub-interfaces", none, tagged(IN_VLAN, &[C100]), Reason::UnsupportedEncap);
        let outside = |world: &mut World| world.port(IN).vlans.store(77);
        self.except("VLAN table out of range", outside, tagged(IN_VLAN, &[C100]), Reason::Internal);
        let gone = |world: &mut World| world.set_vlan(0, 100, 4000);
        self.except("sub-interface out of range", gone, tagged(IN_VLAN, &[C100]), Reason::Internal);
        let inner = Expect::Exception(IN_SERVICE, Reason::UnsupportedEncap);
        self.add("unknown inner VLAN", nothing, tagged(IN_DOUBLE, &[S300, (0x8100, 6)]), inner);
        let third = Expect::Exception(IN_DOUBLE, Reason::UnsupportedEncap);
        self.add("three tags", nothing, tagged(IN_DOUBLE, &[S300, C5, C100]), third);
        let alien = Expect::Exception(IN_VLAN, Reason::NotForUs);
        self.add("the sub-interface has a MAC address of its own", nothing, tagged(IN, &[C100]), alien);
        for (name, first) in [("broadcast", 0xff), ("multicast", 1)] {
            let group = with(tagged(IN_VLAN, &[C100]), |frame| frame[0] = first);
            let counted = Expect::Exception(IN_VLAN, Reason::L2Multicast);
            self.add(format!("{name} to a sub-interface"), nothing, group, counted);
        }
        let down = |world: &mut World| world.unflag(IN_VLAN, READY);
        self.add(
            "sub-interface down",
            down,
            tagged(IN_VLAN, &[C100]),
            Expect::Exception(IN_VLAN, Reason::PortNotReady),
        );
        let down = |world: &mut World| world.unflag(IN, READY);
        self.except("sub-interface of a port that is down", down, tagged(IN_VLAN, &[C100]), Reason::PortNotReady);
        let policy = |world: &mut World| world.port(IN_VLAN).ingress_policy[0].store(1 + Reason::PolicyTc as u32);
        self.add(
            "sub-interface's policy",
            policy,
            tagged(IN_VLAN, &[C100]),
            Expect::Exception(IN_VLAN, Reason::PolicyTc),
        );
        let policy = |world: &mut World| world.port(IN).ingress_policy[0].store(1 + Reason::PolicyTc as u32);
        self.add(
            "the policy of the port below is not the sub-interface's",
            policy,
            tagged(IN_VLAN, &[C100]),
            forward(IN_VLAN),
        );
        let root = |world: &mut World| {
            world.port(IN_VLAN).root[0].store(2);
            world.default_route(2, hop(HOP_OTHER));
        };
        let expect = Expect::Forward {
            frame: forwarded(OTHER, &[], &plain4()),
            from: IN_VLAN,
            to: OTHER,
            device: OTHER,
            hop: HOP_OTHER,
        };
        self.add("sub-interface's own routes", root, tagged(IN_VLAN, &[C100]), expect);
        self.except("tag cut off", nothing, link(IN, &[], 0x8100), Reason::Truncated);
        let cut = with(tagged(IN_VLAN, &[C100]), |f| f.truncate(17));
        self.except("tag cut in half", nothing, cut, Reason::Truncated);
        let cut = with(tagged(IN_DOUBLE, &[S300, C5]), |f| f.truncate(20));
        self.add("second tag cut off", nothing, cut, Expect::Exception(IN_SERVICE, Reason::Truncated));
    }

    fn ports(&mut self) {
        let nowhere = |world: &mut World| world.port(IN).ifindex.store(257);
        self.add("no such port", nowhere, arrive(&plain4()), Expect::NotAPort);
        for slot in [4, 5] {
            // Slots 1 to 4 are looked at; the others are taken by interfaces whose index leaves the same remainder.
            let moved = move |world: &mut World| world.move_port(IN, slot);
            let expect =
                Expect::Forward { frame: forwarded(OUT, &[], &plain4()), from: slot, to: OUT, device: OUT, hop: HOP };
            self.add(
                format!("port in slot {slot}"),
                moved,
                arrive(&plain4()),
                if slot == 4 { expect } else { Expect::NotAPort },
            );
        }
        for (name, packet, flag, family) in [("IPv4", plain4(), FORWARD_V4, 0), ("IPv6", plain6(), FORWARD_V6, 1)] {
            for (what, flag) in [("absent", PRESENT), ("not ready", READY), ("not forwarding", flag)] {
                let off = move |world: &mut World| world.unflag(IN, flag);
                self.except(format!("{name}, port {what}"), off, arrive(&packet), Reason::PortNotReady);
            }
            let other = move |world: &mut World| world.unflag(IN, (FORWARD_V4 | FORWARD_V6) & !flag);
            self.pass(format!("{name}, the other family does not forward"), other, packet.clone(), 0);
            // Mappings are no policy: what has none goes on.
            for reason in Reason::ALL.iter().filter(|reason| **reason != Reason::Mapped) {
                let port = move |world: &mut World| world.port(IN).ingress_policy[family].store(1 + *reason as u32);
                self.except(format!("{name}, port's policy {}", reason.name()), port, arrive(&packet), *reason);
            }
            let all = move |world: &mut World| {
                world.config().policy[family].store(1 + Reason::PolicyNetfilter as u32);
                world.port(IN).ingress_policy[family].store(1 + Reason::PolicyCapture as u32);
            };
            self.except(
                format!("{name}, the family's policy goes first"),
                all,
                arrive(&packet),
                Reason::PolicyNetfilter,
            );
            let other = move |world: &mut World| {
                world.config().policy[1 - family].store(1 + Reason::PolicyXfrm as u32);
                world.port(IN).ingress_policy[1 - family].store(1 + Reason::PolicyXfrm as u32);
                world.port(OUT).ingress_policy[family].store(1 + Reason::PolicyXfrm as u32);
            };
            self.pass(format!("{name}, others' policies"), other, packet.clone(), 0);
            for word in [REASONS as u32, 513, u32::MAX] {
                let wild = move |world: &mut World| world.config().policy[family].store(word);
                self.except(format!("{name}, policy word {word}"), wild, arrive(&packet), Reason::Internal);
            }
        }
    }

    fn ipv4_headers(&mut self) {
        for cut in 1..=20 {
            let frame = with(arrive(&ipv4(SOURCE4, DESTINATION4, 253, &[])), |f| f.truncate(34 - cut));
            self.except(format!("IPv4, {cut} bytes cut off the header"), nothing, frame, Reason::Truncated);
        }
        let cut = with(arrive(&plain4()), |f| f.truncate(f.len() - 1));
        self.except("IPv4, last byte cut off", nothing, cut, Reason::Truncated);
        let long = with4(plain4(), |p| p[2] = 0xff);
        self.except("IPv4, length beyond the frame", nothing, arrive(&long), Reason::Truncated);
        for len in [0, 1, 19] {
            let short = with4(plain4(), |p| p[2..4].copy_from_slice(&u16::to_be_bytes(len)));
            self.except(format!("IPv4, total length {len}"), nothing, arrive(&short), Reason::BadHeader);
        }
        for (first, reason) in [
            (0x55, Reason::BadHeader),
            (0x05, Reason::BadHeader),
            (0x65, Reason::BadHeader),
            (0x44, Reason::BadHeader),
            (0x40, Reason::BadHeader),
            (0x46, Reason::IpOptions),
            (0x4f, Reason::IpOptions),
        ] {
            let packet = with4(packet4(DESTINATION4, 60), |p| p[0] = first);
            let frame = [link(IN, &[], 0x0800), packet].concat();
            self.except(format!("IPv4, first byte {first:02x}"), nothing, frame, reason);
        }
        for at in 0..20 {
            let frame = with(arrive(&plain4()), |f| f[14 + at] ^= 0x10);
            let reason = match at {
                0 => Reason::BadHeader,
                2 => Reason::Truncated,
                _ => Reason::BadChecksum,
            };
            self.except(format!("IPv4, one wrong bit in byte {at}"), nothing, frame, reason);
        }
        for ttl in [0, 1] {
            let packet = with4(plain4(), |p| p[8] = ttl);
            self.except(format!("IPv4, TTL {ttl}"), nothing, arrive(&packet), Reason::TtlExpired);
            let local = with4(packet4([192, 0, 2, 1], 4), |p| p[8] = ttl);
            self.except(
                format!("IPv4, TTL {ttl} does not matter at the end"),
                nothing,
                arrive(&local),
                Reason::LocalDestination,
            );
        }
    }

    fn ipv4_addresses(&mut self) {
        use Reason::{Broadcast, MartianDestination, MartianSource, Multicast, NoRoute};
        let localnet = |world: &mut World| world.flag(IN, ROUTE_LOCALNET);
        for (address, reason) in [
            ([0, 0, 0, 0], MartianDestination),
            ([0, 0, 0, 1], NoRoute),
            ([127, 0, 0, 1], MartianDestination),
            ([127, 255, 255, 255], MartianDestination),
            ([126, 255, 255, 255], NoRoute),
            ([128, 0, 0, 0], NoRoute),
            ([223, 255, 255, 255], NoRoute),
            ([224, 0, 0, 0], Multicast),
            ([239, 255, 255, 255], Multicast),
            ([240, 0, 0, 0], NoRoute),
            ([255, 255, 255, 254], NoRoute),
            ([255, 255, 255, 255], Broadcast),
        ] {
            self.except(format!("IPv4, to {address:?}"), nothing, arrive(&packet4(address, 4)), reason);
            let reason = if address[0] == 127 { NoRoute } else { reason };
            self.except(
                format!("IPv4, to {address:?}, route_localnet"),
                localnet,
                arrive(&packet4(address, 4)),
                reason,
            );
        }
        for (address, martian) in [
            ([0, 0, 0, 0], true),
            ([0, 0, 0, 1], false),
            ([0, 255, 255, 255], false),
            ([126, 255, 255, 255], false),
            ([127, 0, 0, 0], true),
            ([127, 255, 255, 255], true),
            ([128, 0, 0, 0], false),
            ([223, 255, 255, 255], false),
            ([224, 0, 0, 0], true),
            ([239, 255, 255, 255], true),
            ([240, 0, 0, 0], false),
            ([255, 255, 255, 254], false),
            ([255, 255, 255, 255], true),
        ] {
            let packet = ipv4(address, DESTINATION4, 253, &data(9));
            let name = format!("IPv4, from {address:?}");
            match martian {
                true => self.except(name, nothing, arrive(&packet), MartianSource),
                false => self.pass(name, nothing, packet.clone(), 0),
            }
            if address[0] == 127 {
                self.pass(format!("IPv4, from {address:?}, route_localnet"), localnet, packet, 0);
            }
        }
        let own = ipv4([192, 0, 2, 1], DESTINATION4, 253, &data(9));
        self.except("IPv4, from the router itself", nothing, arrive(&own), MartianSource);
        // Another address with the same bit in the filter is told from the router's by its route.
        let filter = |address| towpath_tables::filter::local_filter_bit(address);
        let twin = (0..=u16::MAX)
            .map(|n| [192, 0, (n >> 8) as u8, n as u8])
            .find(|a| *a != [192, 0, 2, 1] && filter(*a) == filter([192, 0, 2, 1]));
        if let Some(twin) = twin {
            self.pass(
                "IPv4, from an address that shares the filter's bit",
                nothing,
                ipv4(twin, DESTINATION4, 253, &[]),
                0,
            );
        }
        for (reason, passes) in [
            (Reason::NonUnicastRoute, false),
            (Reason::Broadcast, false),
            (Reason::NexthopDown, false),
            (Reason::NoNeighbour, true),
        ] {
            let source = [10, 200, reason as u8, 1];
            let packet = ipv4(source, DESTINATION4, 253, &[]);
            self.pass(format!("IPv4, from where {reason:?} says nothing"), nothing, packet.clone(), 0);
            let suspect = move |world: &mut World| world.suspect(source);
            let name = format!("IPv4, suspect, from where {reason:?}");
            match passes {
                true => self.pass(name, suspect, packet, 0),
                false => self.except(name, suspect, arrive(&packet), MartianSource),
            }
        }
        let lone = |world: &mut World| world.local(0, &[172, 16, 0, 1]);
        self.pass("IPv4, near an own address", lone, ipv4([172, 16, 0, 2], DESTINATION4, 253, &[]), 0);
        self.except(
            "IPv4, own address without route around",
            lone,
            arrive(&ipv4([172, 16, 0, 1], DESTINATION4, 253, &[])),
            MartianSource,
        );
    }

    fn ipv6_headers(&mut self) {
        for cut in 1..=40 {
            let frame = with(arrive(&ipv6(address6(0, 0, 9), address6(1, 0, 7), 59, &[])), |f| f.truncate(54 - cut));
            self.except(format!("IPv6, {cut} bytes cut off the header"), nothing, frame, Reason::Truncated);
        }
        let cut = with(arrive(&plain6()), |f| f.truncate(f.len() - 1));
        self.except("IPv6, last byte cut off", nothing, cut, Reason::Truncated);
        self.except(
            "IPv6, length beyond the frame",
            nothing,
            arrive(&with(plain6(), |p| p[4] = 0xff)),
            Reason::Truncated,
        );
        for version in [0, 4, 5, 7, 15] {
            let packet = with(plain6(), |p| p[0] = version << 4);
            let frame = [link(IN, &[], 0x86dd), packet].concat();
            self.except(format!("IPv6, version {version}"), nothing, frame, Reason::BadHeader);
        }
        let options = ipv6(address6(0, 0, 9), address6(1, 0, 7), 0, &[59, 0, 1, 4, 0, 0, 0, 0]);
        self.except("IPv6, hop-by-hop options", nothing, arrive(&options), Reason::ExtensionHeader);
        let jumbo = with(options, |p| p[4..6].fill(0));
        self.except("IPv6, jumbogram", nothing, arrive(&jumbo), Reason::ExtensionHeader);
        for limit in [0, 1] {
            let packet = with(plain6(), |p| p[7] = limit);
            self.except(format!("IPv6, hop limit {limit}"), nothing, arrive(&packet), Reason::TtlExpired);
            let local = with(packet6(address6(0, 0, 1), 4), |p| p[7] = limit);
            self.except(
                format!("IPv6, hop limit {limit} does not matter at the end"),
                nothing,
                arrive(&local),
                Reason::LocalDestination,
            );
        }
    }

    fn ipv6_addresses(&mut self) {
        use Reason::{LinkLocal, MartianDestination, MartianSource, Multicast, NoRoute};
        let address = |text: &str| text.parse::<std::net::Ipv6Addr>().expect("an address").octets();
        for (text, reason) in [
            ("::", MartianDestination),
            ("::1", MartianDestination),
            ("::2", NoRoute),
            ("1::1", NoRoute),
            ("::ffff:198.51.100.7", NoRoute),
            ("fe7f:ffff::1", NoRoute),
            ("fe80::1", LinkLocal),
            ("febf:ffff::1", LinkLocal),
            ("fec0::1", NoRoute),
            ("feff:ffff::1", NoRoute),
            ("ff00::1", Multicast),
            ("ff02::1", Multicast),
            ("ff0e::1", Multicast),
            ("fc00::1", NoRoute),
        ] {
            self.except(format!("IPv6, to {text}"), nothing, arrive(&packet6(address(text), 4)), reason);
        }
        for (text, reason) in [
            ("::", Some(MartianSource)),
            ("::1", Some(MartianSource)),
            ("::2", None),
            ("1::1", None),
            ("::ffff:192.0.2.9", Some(MartianSource)),
            ("fe7f:ffff::1", None),
            ("fe80::1", Some(LinkLocal)),
            ("febf:ffff::1", Some(LinkLocal)),
            ("fec0::1", None),
            ("ff02::1", Some(MartianSource)),
            ("fc00::1", None),
            // Unlike IPv4, Linux asks nothing more of IPv6 sources.
            ("2001:db8::1", None),
        ] {
            let packet = ipv6(address(text), address6(1, 0, 7), 59, &[]);
            match reason {
                Some(reason) => self.except(format!("IPv6, from {text}"), nothing, arrive(&packet), reason),
                None => self.pass(format!("IPv6, from {text}"), nothing, packet, 0),
            }
        }
    }

    /// Root 2 for some IPv4 sources, root 3 for some of IPv6; for shorter prefixes, and for all others, nothing.
    fn by_source(&mut self) {
        let world = |w: &mut World| {
            w.by_source(IN, 0, &[([192, 0, 0, 0].into(), 16, 7), ([192, 0, 2, 0].into(), 24, 2)]);
            let own = address6(0, 0, 0).into();
            w.by_source(IN, 1, &[(own, 32, 7), (own, 48, 3)]);
            w.route(2, &[198, 51], hop(HOP_VLAN));
            w.route(3, &[0x20, 1, 0xd, 0xb8, 0, 1], hop(HOP_VLAN));
        };
        for (family, packet) in [("IPv4", plain4()), ("IPv6", plain6())] {
            let frame = arrive(&packet);
            let expect = Expect::Forward {
                frame: forwarded(OUT_VLAN, &[(0x8100, 200)], &packet),
                from: IN,
                to: OUT_VLAN,
                device: OUT,
                hop: HOP_VLAN,
            };
            self.add(format!("route for the {family} source"), world, frame, expect);
        }
        let other4 = with4(plain4(), |p| p[14] = 3);
        let other6 = with(plain6(), |p| p[13] = 1);
        for (family, packet) in [("IPv4", other4), ("IPv6", other6)] {
            self.except(format!("no route table for the {family} source"), world, arrive(&packet), Reason::Internal);
        }
        // The way back: in by the port out, from the destination.
        let strict = |w: &mut World| {
            let port = w.port(IN);
            port.flags.store(port.flags.load() | RP_STRICT);
            w.by_source(OUT, 0, &[([198, 51, 0, 0].into(), 16, 2)]);
        };
        self.except("no route back for the destination", strict, arrive(&plain4()), Reason::RpFilter);
        let back = move |w: &mut World| {
            strict(w);
            w.route(2, &[192, 0], hop(HOP_BACK));
        };
        self.pass("a route back for the destination", back, plain4(), 0);
    }

    fn reverse_path(&mut self) {
        use Reason::{MartianSource, RpFilter, TableBusy};
        type Step = fn(&mut World);
        // Source, what is strict about it, what is loose: None is forwarded
        let table: [(&str, Step, [u8; 4], Option<Reason>, Option<Reason>); 13] = [
            ("back to the port", |_| (), SOURCE4, None, None),
            ("by another port", |_| (), [198, 51, 100, 9], Some(RpFilter), None),
            ("no route", |_| (), [172, 16, 0, 1], Some(RpFilter), Some(RpFilter)),
            ("default route back", |w| w.default_route(0, hop(HOP_BACK)), [172, 16, 0, 1], None, None),
            ("own address", |_| (), [192, 0, 2, 1], Some(MartianSource), Some(MartianSource)),
            ("group without the port", |_| (), [10, 1, 0, 1], Some(RpFilter), None),
            (
                "group with the port",
                |w| {
                    for bucket in &w.group(GROUP).buckets[16..] {
                        bucket.store(HOP_BACK);
                    }
                },
                [10, 1, 0, 1],
                None,
                None,
            ),
            (
                "unresolved neighbour by another port",
                |_| (),
                [10, 200, Reason::NoNeighbour as u8, 1],
                Some(RpFilter),
                None,
            ),
            (
                "unresolved neighbour on the port",
                |w| {
                    w.nexthop(HOP_REASON + Reason::NoNeighbour as u32).port.store(IN);
                },
                [10, 200, Reason::NoNeighbour as u8, 1],
                None,
                None,
            ),
            (
                "by an interface that is not served",
                |w| {
                    w.nexthop(HOP_REASON + Reason::EgressNotServed as u32).port.store(IN);
                },
                [10, 200, Reason::EgressNotServed as u8, 1],
                Some(RpFilter),
                None,
            ),
            ("broadcast", |_| (), [10, 200, Reason::Broadcast as u8, 1], Some(RpFilter), Some(RpFilter)),
            ("blackhole", |_| (), [10, 200, Reason::NonUnicastRoute as u8, 1], Some(RpFilter), Some(RpFilter)),
            (
                "next hop in change",
                |w| w.nexthop(HOP_BACK).sequence.store(9),
                SOURCE4,
                Some(TableBusy),
                Some(TableBusy),
            ),
        ];
        for (name, step, source, strict, loose) in table {
            for (mode, flag, reason) in [("strict", RP_STRICT, strict), ("loose", RP_LOOSE, loose)] {
                let configure = move |world: &mut World| {
                    step(world);
                    world.flag(IN, flag);
                };
                let packet = ipv4(source, DESTINATION4, 253, &data(4));
                let name = format!("rp_filter {mode}: {name}");
                match reason {
                    Some(reason) => self.except(name, configure, arrive(&packet), reason),
                    None => self.pass(name, configure, packet, 0),
                }
            }
        }
        let strict = |world: &mut World| world.flag(IN, RP_STRICT);
        self.pass("rp_filter is not for IPv6", strict, ipv6(address6(1, 0, 9), address6(1, 0, 7), 59, &[]), 0);
    }

    fn routes(&mut self) {
        for reason in Reason::ALL {
            let frame = arrive(&packet4([10, 200, *reason as u8, 5], 4));
            self.except(format!("IPv4, route to exception {}", reason.name()), nothing, frame, *reason);
            let frame = arrive(&packet6(address6(0xff, *reason as u16, 5), 4));
            self.except(format!("IPv6, route to exception {}", reason.name()), nothing, frame, *reason);
        }
        let default = |world: &mut World| {
            world.default_route(0, hop(HOP));
            world.default_route(1, hop(HOP));
        };
        self.pass("IPv4, default route", default, packet4([8, 8, 8, 8], 4), 0);
        self.pass("IPv4, default route beside longer ones", default, packet4([10, 200, 250, 8], 4), 0);
        self.pass("IPv6, default route", default, packet6(address6(0x1000, 0, 8), 4), 0);
        let longer = |world: &mut World| {
            world.route(0, &[100, 64], hop(HOP_OTHER));
            world.route(0, &[100, 64, 7], hop(LOCAL));
            world.route(0, &[100, 64, 7, 9], hop(HOP));
        };
        self.pass("IPv4, host route", longer, packet4([100, 64, 7, 9], 4), 0);
        self.except(
            "IPv4, beside the host route",
            longer,
            arrive(&packet4([100, 64, 7, 8], 4)),
            Reason::LocalDestination,
        );
        for (packet, name) in [(plain4(), "IPv4"), (plain6(), "IPv6")] {
            let (four, frame) = (name == "IPv4", arrive(&packet));
            let busy = |world: &mut World| world.nexthop(HOP).sequence.store(9);
            self.except(format!("{name}, next hop in change"), busy, frame.clone(), Reason::TableBusy);
            for state in [0u32, 5, 0xff, 1 | 3 << 16, 1 | 255 << 16, 2 | 0xfe << 8, 2 | (Reason::ALL.len() as u32) << 8]
            {
                let wild = move |world: &mut World| world.nexthop(HOP).state.store(state);
                self.except(format!("{name}, next hop state {state:x}"), wild, frame.clone(), Reason::Internal);
            }
            let outside = move |world: &mut World| {
                world.default_route(0, hop(1 << 20));
                world.default_route(1, hop(1 << 20));
            };
            let lost = if four { packet4([8, 8, 8, 8], 4) } else { packet6(address6(0x1000, 0, 8), 4) };
            self.except(format!("{name}, next hop out of range"), outside, arrive(&lost), Reason::Internal);
            self.except(format!("{name}, no route"), nothing, arrive(&lost), Reason::NoRoute);
            let outside = move |world: &mut World| world.port(IN).root[usize::from(!four)].store(9);
            self.except(format!("{name}, root out of range"), outside, frame.clone(), Reason::Internal);
            let outside = move |world: &mut World| {
                world.default_route(0, group(9));
                world.default_route(1, group(9));
            };
            self.except(format!("{name}, group out of range"), outside, arrive(&lost), Reason::Internal);
            let back = if four { packet4([192, 0, 2, 5], 4) } else { packet6(address6(0, 0, 5), 4) };
            self.except(format!("{name}, back by the same port"), nothing, arrive(&back), Reason::Redirect);
            let unserved = |world: &mut World| world.nexthop(HOP).device.store(99);
            self.except(format!("{name}, no such device"), unserved, frame.clone(), Reason::EgressNotServed);
            let sub = |world: &mut World| world.nexthop(HOP).device.store(OUT_VLAN);
            self.except(format!("{name}, a sub-interface is no device"), sub, frame.clone(), Reason::EgressNotServed);
            let small = move |world: &mut World| world.nexthop(HOP).mtu.store(packet.len() as u32 - 1);
            self.except(format!("{name}, small MTU"), small, frame, Reason::MtuExceeded);
        }
        let quiet = |world: &mut World| world.unflag(IN, REDIRECTS);
        let packet = packet4([192, 0, 2, 5], 4);
        let expect =
            Expect::Forward { frame: forwarded(IN, &[], &packet), from: IN, to: IN, device: IN, hop: HOP_BACK };
        self.add("IPv4, back by the same port without redirects", quiet, arrive(&packet), expect);
        self.except("IPv6, redirects ask no sysctl", quiet, arrive(&packet6(address6(0, 0, 5), 4)), Reason::Redirect);
        let hit = |world: &mut World| world.nexthop(HOP).hit.store(1);
        self.pass("hit flag is set already", hit, plain4(), 0);
    }

    fn groups(&mut self) {
        // All buckets but the flow's lead nowhere: both directions of a flow, and the ICMP errors about it, find it.
        for policy in [0, 1] {
            for (packet, name) in [
                (packet4([10, 1, 2, 3], 8), "IPv4"),
                (packet6(address6(10, 0, 3), 8), "IPv6"),
                (with4(packet4([10, 1, 2, 3], 8), |p| p[6] = 0x20), "IPv4 fragment"),
                (ipv4(SOURCE4, [10, 1, 2, 3], TCP, &data(3)), "IPv4, ports cut off"),
                (ipv4(SOURCE4, [10, 1, 2, 3], 1, &[8, 0, 0, 0]), "IPv4 ping"),
            ] {
                let configure = move |world: &mut World| {
                    world.config().hash_policy[0].store(policy);
                    world.config().hash_policy[1].store(policy);
                    for bucket in &world.group(GROUP).buckets {
                        bucket.store(HOP_OTHER);
                    }
                };
                let expect = Expect::Forward {
                    frame: forwarded(OTHER, &[], &packet),
                    from: IN,
                    to: OTHER,
                    device: OTHER,
                    hop: HOP_OTHER,
                };
                self.add(format!("group, policy {policy}, {name}"), configure, arrive(&packet), expect);
            }
        }
        let broken = |world: &mut World| {
            for bucket in &world.group(GROUP).buckets {
                bucket.store(HOP_REASON + Reason::NexthopDown as u32);
            }
        };
        self.except("group, member down", broken, arrive(&packet4([10, 1, 2, 3], 8)), Reason::NexthopDown);
    }

    fn partial_checksums(&mut self) {
        let partial = |world: &mut World| world.flag(IN, PARTIAL_CSUM);
        let mut case = |name: String, packet: Vec<u8>, complete: bool| match complete {
            true => self.pass(format!("{name}, on a port that may leave checksums out"), partial, packet, 3),
            false => {
                self.pass(format!("{name}, on a port where none are"), nothing, packet.clone(), 0);
                self.except(
                    format!("{name}, on a port that may leave checksums out"),
                    partial,
                    [arrive(&packet), vec![0; 3]].concat(),
                    Reason::PartialChecksum,
                );
            }
        };
        type Make = fn(u8, &[u8]) -> Vec<u8>;
        let families: [(&str, Make); 2] = [
            ("IPv4", |protocol, payload| ipv4(SOURCE4, DESTINATION4, protocol, payload)),
            ("IPv6", |protocol, payload| ipv6(address6(0, 0, 9), address6(1, 0, 7), protocol, payload)),
        ];
        for (name, make) in families {
            let header = make(0, &[]).len();
            let seeded = |protocol, at: usize, payload: &[u8]| {
                with(make(protocol, payload), |p| {
                    let seed = seed(p, protocol);
                    p[header + at..header + at + 2].copy_from_slice(&seed.to_be_bytes());
                })
            };
            let whole = |protocol, at, payload: &[u8]| complete(make(protocol, payload), protocol, at);
            for (what, protocol, at, payload) in [
                ("TCP", TCP, 16, data(20)),
                ("TCP with odd length", TCP, 16, data(27)),
                ("TCP, shortest", TCP, 16, data(18)),
                ("UDP", UDP, 6, udp(1, 2, &data(30))),
                ("UDP, empty", UDP, 6, udp(1, 2, &[])),
            ] {
                case(format!("{name}, {what}, complete"), whole(protocol, at, &payload), true);
                case(format!("{name}, {what}, partial"), seeded(protocol, at, &payload), false);
                let off = with(seeded(protocol, at, &payload), |p| p[header + at + 1] ^= 1);
                case(format!("{name}, {what}, one off the seed"), off, true);
                let inverted = with(seeded(protocol, at, &payload), |p| {
                    p[header + at..header + at + 2].iter_mut().for_each(|b| *b = !*b)
                });
                case(format!("{name}, {what}, complement of the seed"), inverted, true);
            }
            case(format!("{name}, UDP without checksum"), make(UDP, &udp(1, 2, &data(9))), false);
            case(format!("{name}, TCP cut before its checksum"), make(TCP, &data(17)), true);
            case(format!("{name}, UDP cut before its checksum"), make(UDP, &data(7)), true);
            for port in [1701, 2152, 4789, 4790, 6081, 8472] {
                let tunnel = whole(UDP, 6, &udp(1, port, &data(30)));
                case(format!("{name}, tunnel to UDP port {port}"), tunnel, false);
            }
            case(format!("{name}, SCTP, CRC left out"), make(132, &[0; 20]), false);
            case(format!("{name}, SCTP, CRC there"), make(132, &data(20)), true);
            for (protocol, complete) in [
                (4, false),
                (41, false),
                (47, false),
                (137, false),
                (1, true),
                (50, true),
                (58, true),
                (89, true),
                (59, true),
            ] {
                case(format!("{name}, protocol {protocol}"), make(protocol, &data(40)), complete);
            }
        }
        let fragment = |flags: u16| {
            with4(ipv4(SOURCE4, DESTINATION4, UDP, &udp(1, 2, &data(8))), |p| {
                p[6..8].copy_from_slice(&flags.to_be_bytes())
            })
        };
        case("IPv4, first fragment".into(), fragment(0x2000), false);
        case("IPv4, later fragment".into(), fragment(0x2001), true);
        case("IPv6, fragment".into(), ipv6(address6(0, 0, 9), address6(1, 0, 7), 44, &data(16)), true);
        case("IPv6, destination options".into(), ipv6(address6(0, 0, 9), address6(1, 0, 7), 60, &data(16)), false);
    }

    fn beside(&mut self) {
        let seen = |world: &mut World| world.flag(IN, PARTIAL_CSUM | BESIDE);
        let mut case = |name: &str, beside, frame: Vec<u8>, expect| {
            self.add(name, seen, frame, expect);
            self.0.last_mut().expect("just added").beside = Some(beside);
        };
        let forward = |from, packet: &[u8]| Expect::Forward {
            frame: forwarded(OUT, &[], packet),
            from,
            to: OUT,
            device: OUT,
            hop: HOP,
        };
        let bare = ipv4(SOURCE4, DESTINATION4, UDP, &udp(1, 2, &data(9)));
        let tunnel = ipv6(address6(0, 0, 9), address6(1, 0, 7), 41, &data(40));
        let packets =
            [("IPv4", &plain4()), ("IPv6", &plain6()), ("UDP without checksum", &bare), ("a tunnel", &tunnel)];
        for (what, packet) in packets {
            let partial = Beside { partial: Some(true), tag: None };
            case(&format!("{what}, nothing beside it"), Beside::NOTHING, arrive(packet), forward(IN, packet));
            let expect = Expect::Exception(IN, Reason::PartialChecksum);
            case(&format!("{what}, known to be partial"), partial, arrive(packet), expect);
        }
        case(
            "no checksum, nobody knows",
            Beside::UNKNOWN,
            arrive(&bare),
            Expect::Exception(IN, Reason::PartialChecksum),
        );
        case("a checksum, nobody knows", Beside::UNKNOWN, arrive(&plain4()), forward(IN, &plain4()));

        let tag = |protocol, control| Beside { partial: Some(false), tag: Some((protocol, control)) };
        let inner = |tags: &[(u16, u16)]| [link(IN_DOUBLE, tags, 0x0800), plain4()].concat();
        let refused = |slot| Expect::Exception(slot, Reason::UnsupportedEncap);
        let untagged = [link(IN_VLAN, &[], 0x86dd), plain6()].concat();
        case("a tag beside the frame", tag(0x8100, 100), untagged.clone(), forward(IN_VLAN, &plain6()));
        case(
            "a tag with priority beside the frame",
            tag(0x8100, 0xf064),
            untagged.clone(),
            forward(IN_VLAN, &plain6()),
        );
        case(
            "a tag beside the frame and one in it",
            tag(0x88a8, 300),
            inner(&[(0x8100, 5)]),
            forward(IN_DOUBLE, &plain4()),
        );
        case("an unknown VLAN beside the frame", tag(0x8100, 101), untagged.clone(), refused(IN));
        case("another protocol's tag beside the frame", tag(0x88a8, 100), untagged.clone(), refused(IN));
        case("a priority tag beside the frame", tag(0x8100, 0xe000), arrive(&plain4()), refused(IN));
        let three = inner(&[(0x8100, 5), (0x8100, 100)]);
        case("a tag beside the frame and two in it", tag(0x88a8, 300), three, refused(IN_DOUBLE));
        let everyone = with(untagged.clone(), |frame| frame[..6].copy_from_slice(&[0xff; 6]));
        case(
            "broadcast with a tag beside it",
            tag(0x8100, 100),
            everyone,
            Expect::Exception(IN_VLAN, Reason::L2Multicast),
        );
        let both = Beside { partial: Some(true), ..tag(0x8100, 100) };
        case("a tag and a checksum beside the frame", both, untagged, Expect::Exception(IN, Reason::PartialChecksum));
    }
}
