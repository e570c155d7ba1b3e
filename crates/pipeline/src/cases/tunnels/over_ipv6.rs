//! Cases of tunnels over IPv6, as far as they differ from those over IPv4.

use super::*;
use crate::{hash, packet};
use towpath_wire::View;
use towpath_wire::ipv4::Ipv4;
use towpath_wire::ipv6::Ipv6;

/// The encapsulation limit of `KEYED6`, as Linux writes it
const LIMIT: [u8; 8] = [GRE, 0, 4, 1, 4, 1, 1, 0];

/// GRE, a protocol and what comes before it: an encapsulation limit, if there is one
fn payload(limited: bool, gre: &[u8]) -> (u8, Vec<u8>) {
    match limited {
        false => (GRE, gre.to_vec()),
        true => (60, [&LIMIT, gre].concat()),
    }
}

/// A packet from a tunnel's other end with this in it.
fn carried(from: [u8; 16], limited: bool, gre: &[u8]) -> Vec<u8> {
    let (next, payload) = payload(limited, gre);
    ipv6(from, near6(), next, &payload)
}

fn plain_gre(key: Option<u32>, packet: &[u8]) -> Vec<u8> {
    [gre(key, ethertype(packet)), packet.to_vec()].concat()
}

/// What a packet in a tunnel is sent as: class, flow label and hop limit.
fn sent_in(to: [u8; 16], limited: bool, (class, label, hops): (u8, u32, u8), gre: &[u8]) -> Vec<u8> {
    let (next, payload) = payload(limited, gre);
    with(ipv6(near6(), to, next, &payload), |p| {
        p[..4].copy_from_slice(&(6 << 28 | u32::from(class) << 20 | label).to_be_bytes());
        p[7] = hops;
    })
}

/// The packet with this class and, if it has one, flow label.
fn marked(packet: &[u8], class: u8, label: u32) -> Vec<u8> {
    if packet[0] >> 4 == 4 {
        return with4(packet.to_vec(), |p| p[1] = class);
    }
    let word = 6 << 28 | u32::from(class) << 20 | label;
    with(packet.to_vec(), |p| p[..4].copy_from_slice(&word.to_be_bytes()))
}

/// A tunnel and its other end, the key of packets out of it, and whether they bear limits
fn ways_out() -> [(u32, [u8; 16], Option<u32>, bool); 4] {
    [
        (TUNNEL6, far6(0x50), None, false),
        (TUNNEL6, far6(0x50), None, true),
        (KEYED6, far6(0x51), Some(7), false),
        (KEYED6, far6(0x51), Some(7), true),
    ]
}

impl Cases {
    pub(super) fn tunnels_over_ipv6(&mut self) {
        self.out_of_ipv6();
        self.not_out_of_ipv6();
        self.entering_ipv6();
        self.not_entering_ipv6();
        self.between_families();
        self.checksums_in_ipv6();
    }

    fn out_of_ipv6(&mut self) {
        let partial = |world: &mut World| world.flag(IN, PARTIAL_CSUM);
        for (packet, (tunnel, from, key, limited)) in
            [plain4(), plain6()].iter().flat_map(|packet| ways_out().map(|way| (packet, way)))
        {
            let name = format!("{:04x}, key {key:?}, limit {limited}", ethertype(packet));
            let (expect, counted) = (sent(forwarded(OUT, &[], packet)), [(tunnel, Way::Out, packet.len())]);
            let arriving = carried(from, limited, &plain_gre(key, packet));
            for padding in [0, 5] {
                let frame = [arrive(&arriving), vec![0xee; padding]].concat();
                let name = format!("out of IPv6, {name}, padding {padding}");
                self.tunnelled(name, nothing, frame, expect.clone(), &counted);
            }
            let name_of = |what: &str| format!("out of IPv6, {name}, {what}");
            self.tunnelled(name_of("complete"), partial, arrive(&arriving), expect, &counted);
            let large = |world: &mut World| world.nexthop(HOP).mtu.store(9000);
            let several = with_data(packet, 4000);
            let counted = [(tunnel, Way::Out, several.len())];
            let frame = arrive(&carried(from, limited, &plain_gre(key, &several)));
            let expect = sent(forwarded(OUT, &[], &several));
            self.tunnelled(name_of("several buffers"), large, frame, expect, &counted);
            let header = if packet[0] >> 4 == 4 { 20 } else { 40 };
            let seed = seed(packet, UDP).to_be_bytes();
            let left = with(packet.clone(), |p| p[header + 6..header + 8].copy_from_slice(&seed));
            let frame = arrive(&carried(from, limited, &plain_gre(key, &left)));
            self.except(name_of("partial"), partial, frame, Reason::PartialChecksum);
            let frame = [
                link(IN_DOUBLE, &[(0x88a8, 300), (0x8100, 5)], 0x86dd),
                carried(from, limited, &plain_gre(key, packet)),
            ]
            .concat();
            let expect =
                Expect::Forward { frame: forwarded(OUT, &[], packet), from: IN_DOUBLE, to: OUT, device: OUT, hop: HOP };
            self.tunnelled(name_of("outer tags"), nothing, frame, expect, &[(tunnel, Way::Out, packet.len())]);
        }
        for (outer, inner) in [(0, 0), (0, 1), (0, 2), (0, 3), (2, 1), (2, 2), (2, 3), (1, 1), (3, 3)] {
            let packet = marked(&plain6(), 0xb8 | inner, 0);
            let frame = arrive(&marked(&carried(far6(0x50), false, &plain_gre(None, &packet)), 0x20 | outer, 9));
            let name = format!("out of IPv6, ECN {outer} outside, {inner} inside");
            let counted = [(TUNNEL6, Way::Out, packet.len())];
            self.tunnelled(name, nothing, frame, sent(forwarded(OUT, &[], &packet)), &counted);
        }
    }

    fn not_out_of_ipv6(&mut self) {
        use Reason::*;
        type Change = fn(&mut Vec<u8>);
        let plain: [(&str, Change, Reason); 10] = [
            ("routing", |p| p[40] = 0x40, Tunnel),
            ("version 1", |p| p[41] = 1, Tunnel),
            ("checksum that nobody asked for", |p| p[40] = 0x80, Tunnel),
            ("bridged Ethernet", |p| p[42..44].copy_from_slice(&[0x65, 0x58]), Tunnel),
            ("key where none is", |p| p[40] = 0x20, LocalDestination),
            ("another protocol", |p| p[6] = 41, LocalDestination),
            ("another's tunnel", |p| p[23] = 0x60, LocalDestination),
            ("another's tunnel by its first word", |p| p[11] = 0xb9, LocalDestination),
            ("hop-by-hop options", |p| p[6] = 0, ExtensionHeader),
            ("a fragment", |p| p[6] = 44, LocalDestination),
        ];
        let limited: [(&str, Change, Reason); 7] = [
            ("no limit but another option", |p| p[42] = 5, LocalDestination),
            ("a limit of two bytes", |p| p[43] = 2, LocalDestination),
            ("other padding", |p| p[47] = 1, LocalDestination),
            ("longer options", |p| p[41] = 1, LocalDestination),
            ("another header behind", |p| p[40] = 43, LocalDestination),
            ("a routing header", |p| p[6] = 43, LocalDestination),
            ("a limit, and routing", |p| p[48] = 0x40, Tunnel),
        ];
        let changes = plain.iter().map(|c| (false, c)).chain(limited.iter().map(|c| (true, c)));
        for (limited, (name, change, reason)) in changes {
            let frame = arrive(&with(carried(far6(0x50), limited, &plain_gre(None, &plain4())), change));
            self.except(format!("not out of IPv6: {name}"), nothing, frame, *reason);
        }
        for key in [None, Some(9)] {
            let frame = arrive(&carried(far6(0x51), true, &plain_gre(key, &plain4())));
            self.except(format!("not out of IPv6: key {key:?}"), nothing, frame, LocalDestination);
        }
        for (outer, inner) in [(1, 0), (2, 0), (3, 0), (1, 2), (3, 1), (3, 2)] {
            let packet = marked(&plain6(), inner, 0);
            let frame = arrive(&marked(&carried(far6(0x50), false, &plain_gre(None, &packet)), outer, 0));
            self.except(format!("not out of IPv6: ECN {outer} outside, {inner} inside"), nothing, frame, Tunnel);
        }
        type Step = fn(&mut World);
        let steps: [(&str, Step, Reason); 6] = [
            ("down", |w| w.unflag(TUNNEL6, READY), PortNotReady),
            ("policy of its port", |w| w.port(TUNNEL6).ingress_policy[0].store(1 + PolicyTc as u32), PolicyTc),
            ("policy of its own", |w| w.port(TUNNEL6).tunnel.policy.store(1 + PolicyXfrm as u32), PolicyXfrm),
            ("in change", |w| w.port(TUNNEL6).tunnel.sequence.store(3), TableBusy),
            ("no place", |w| w.config().tunnels.iter().for_each(|place| place.store(0)), LocalDestination),
            ("source inside refused", |w| w.flag(TUNNEL6, RP_STRICT), RpFilter),
        ];
        for (name, step, reason) in steps {
            let frame = arrive(&carried(far6(0x50), true, &plain_gre(None, &plain4())));
            self.except(format!("not out of IPv6: {name}"), step, frame, reason);
        }
        let over_ipv4 = |world: &mut World| {
            let flags = &world.port(TUNNEL6).tunnel.flags;
            flags.store(flags.load() & !tunnel_flags::V6);
        };
        let frame = arrive(&carried(far6(0x50), false, &plain_gre(None, &plain4())));
        self.except("not out of IPv6: it is one over IPv4", over_ipv4, frame, LocalDestination);
        for (limited, cuts) in [(false, [0, 2, 4, 6, 23]), (true, [0, 7, 10, 12, 31])] {
            for cut in cuts {
                let whole = carried(far6(0x50), limited, &plain_gre(None, &plain4()));
                let packet = with(whole, |p| p[4..6].copy_from_slice(&u16::to_be_bytes(cut)));
                // Of options that are cut off nobody can say what they are.
                let reason = if limited && cut < 8 { LocalDestination } else { Truncated };
                let name = format!("not out of IPv6: {cut} bytes, limit {limited}");
                let short = &packet[..40 + usize::from(cut)];
                self.except(name, nothing, arrive(short), reason);
            }
        }
    }

    fn entering_ipv6(&mut self) {
        for (tunnel, to, key, limited, second, third, hops) in
            [(TUNNEL6, far6(0x50), None, false, 4, 13, None), (KEYED6, far6(0x51), Some(9), true, 5, 14, Some(33))]
        {
            for (packet, padding) in behind(second, third, 22).iter().flat_map(|packet| [0, 5].map(|n| (packet, n))) {
                let name = format!("{:04x}, key {key:?}, padding {padding}", ethertype(packet));
                let expect = |packet: &[u8], class, label| {
                    let outside = (class, label, hops.unwrap_or(63));
                    sent(leave(OUT, &sent_in(to, limited, outside, &plain_gre(key, &aged(packet)))))
                };
                let frame = |packet: &[u8]| [arrive(packet), vec![0xee; padding]].concat();
                let counted = [(tunnel, Way::Into, packet.len())];
                let of_its_own = move |world: &mut World| world.outside(tunnel, 0xba, 0x54321);
                let name_of = |what: &str| format!("into IPv6, {name}, {what}");
                let six = packet[0] >> 4 == 6;
                for ecn in 0..4 {
                    let packet = marked(packet, 0x44 | ecn, 0x9abcd);
                    let what = format!("a class and label of its own, ECN {ecn}");
                    let expected = expect(&packet, 0xba, 0x54321);
                    self.tunnelled(name_of(&what), of_its_own, frame(&packet), expected, &counted);
                    let inherit = move |world: &mut World| {
                        world.outside(tunnel, 0, 0);
                        world.ask(tunnel, tunnel_flags::INHERIT_CLASS | tunnel_flags::INHERIT_LABEL);
                    };
                    let expected = expect(&packet, 0x44 | ecn, if six { 0x9abcd } else { 0 });
                    let what = format!("both inherited, ECN {ecn}");
                    self.tunnelled(name_of(&what), inherit, frame(&packet), expected, &counted);
                }
                let made = move |world: &mut World| {
                    world.outside(tunnel, 0, 0);
                    world.ask(tunnel, tunnel_flags::INHERIT_LABEL | tunnel_flags::MAKE_LABEL);
                };
                let expected = expect(packet, 0, label_of(packet));
                self.tunnelled(name_of("a label that is made"), made, frame(packet), expected, &counted);
                let labelled = marked(packet, 0, 0x9abcd);
                let expected = expect(&labelled, 0, if six { 0x9abcd } else { label_of(packet) });
                self.tunnelled(name_of("a label that there is"), made, frame(&labelled), expected, &counted);
            }
            let place = if limited { 56 } else { 44 };
            for packet in behind(second, third, 22) {
                let wide = move |world: &mut World| {
                    world.outside(tunnel, 0, 1);
                    [INTO6, INTO_KEYED6].iter().for_each(|hop| world.nexthop(*hop).mtu.store(9000));
                };
                let header = if packet[0] >> 4 == 4 { 28 } else { 48 };
                let name = |what: &str| format!("into IPv6, {:04x}, limit {limited}: {what}", ethertype(&packet));
                let largest = with_data(&packet, 1500 - place - header);
                let outside = (0, 1, hops.unwrap_or(63));
                let inside = plain_gre(key, &aged(&largest));
                let expect = sent(leave(OUT, &sent_in(to, limited, outside, &inside)));
                let counted = [(tunnel, Way::Into, largest.len())];
                self.tunnelled(name("largest"), wide, arrive(&largest), expect, &counted);
                let larger = with_data(&packet, 1501 - place - header);
                self.except(name("a byte too long for the way out"), wide, arrive(&larger), Reason::MtuExceeded);
                let huge = move |world: &mut World| {
                    wide(world);
                    world.nexthop(HOP).mtu.store(9000);
                };
                let several = with_data(&packet, 4000);
                let inside = plain_gre(key, &aged(&several));
                let expect = sent(leave(OUT, &sent_in(to, limited, outside, &inside)));
                let counted = [(tunnel, Way::Into, several.len())];
                self.tunnelled(name("several buffers"), huge, arrive(&several), expect, &counted);
                let tags = move |world: &mut World| {
                    wide(world);
                    world.route(1, &to, hop(HOP_DOUBLE));
                };
                let inside = plain_gre(key, &aged(&packet));
                let frame = with(link(OUT_DOUBLE, &[(0x88a8, 400), (0x8100, 7)], 0x86dd), |f| {
                    f[..6].copy_from_slice(&neighbour(OUT_DOUBLE));
                    f[6..12].copy_from_slice(&mac(OUT_DOUBLE));
                    f.extend(sent_in(to, limited, outside, &inside));
                });
                let expect = Expect::Forward { frame, from: IN, to: OUT_DOUBLE, device: OTHER, hop: HOP_DOUBLE };
                let counted = [(tunnel, Way::Into, packet.len())];
                self.tunnelled(name("into tags"), tags, arrive(&packet), expect, &counted);
            }
        }
        // What is in no destination options bears no limit.
        let [_, six] = behind(4, 13, 40);
        for (name, next, bytes) in [
            ("first fragment", 44, vec![UDP, 0, 0, 1, 0, 0, 0, 9]),
            ("last fragment", 44, vec![UDP, 0, 0, 8, 0, 0, 0, 9]),
            ("reserved bit of a fragment", 44, vec![60, 0, 0, 2, 0, 0, 0, 9]),
            ("nothing", 59, vec![]),
            ("mobility", 135, vec![]),
        ] {
            let packet = with(six.clone(), |p| {
                p[6] = next;
                p.splice(40..40 + bytes.len(), bytes);
            });
            let outside = (0, 0, 63);
            let expect = sent(leave(OUT, &sent_in(far6(0x50), false, outside, &plain_gre(None, &aged(&packet)))));
            let counted = [(TUNNEL6, Way::Into, packet.len())];
            self.tunnelled(format!("into IPv6: {name} inside"), nothing, arrive(&packet), expect, &counted);
        }
    }

    fn not_entering_ipv6(&mut self) {
        use Reason::*;
        let [four, six] = behind(4, 13, 40);
        let from_the_end = with(six.clone(), |p| p[8..24].copy_from_slice(&far6(0x50)));
        self.except("not into IPv6: from its other end", nothing, arrive(&from_the_end), Tunnel);
        for (name, next) in [("routing", 43), ("authentication", 51), ("destination options", 60)] {
            let packet = with(six.clone(), |p| p[6] = next);
            self.except(format!("not into IPv6: {name} inside"), nothing, arrive(&packet), ExtensionHeader);
        }
        let atomic = with(six.clone(), |p| {
            p[6] = 44;
            p[40..48].copy_from_slice(&[60, 0, 0, 0, 0, 0, 0, 1]);
        });
        self.except("not into IPv6: an atomic fragment inside", nothing, arrive(&atomic), ExtensionHeader);
        type Step = fn(&mut World);
        let steps: [(&str, Step, Reason); 9] = [
            ("policy of its own", |w| w.port(TUNNEL6).tunnel.policy.store(1 + PolicyXfrm as u32), PolicyXfrm),
            ("in change", |w| w.port(TUNNEL6).tunnel.sequence.store(3), TableBusy),
            ("only the bit of its family is left", |w| w.port(TUNNEL6).tunnel.flags.store(tunnel_flags::V6), TableBusy),
            ("no way out", |w| w.route(1, &far6(0x50), hop(HOP_REASON + NoNeighbour as u32)), NoNeighbour),
            ("way out by itself", |w| w.route(1, &far6(0x50), hop(INTO6)), Tunnel),
            ("way out too narrow", |w| w.nexthop(HOP).mtu.store(100), MtuExceeded),
            ("too narrow", |w| w.nexthop(INTO6).mtu.store(60), MtuExceeded),
            ("bound to another way out", |w| w.port(TUNNEL6).tunnel.link.store(OTHER), Tunnel),
            ("way out by nothing that transmits", |w| w.port(OUT).ifindex.store(0), EgressNotServed),
        ];
        for (name, step, reason) in steps {
            for packet in [&four, &six] {
                let name = format!("not into IPv6, {:04x}: {name}", ethertype(packet));
                self.except(name, step, arrive(packet), reason);
            }
        }
        let policy = |w: &mut World| w.config().policy[1].store(1 + PolicyNetfilter as u32);
        self.except("not into IPv6: policy of IPv6 outside", policy, arrive(&four), PolicyNetfilter);
    }

    fn between_families(&mut self) {
        let outer4 = |packet: &[u8]| wrapped(FAR, None, packet);
        let outer6 = |packet: &[u8]| carried(far6(0x51), true, &plain_gre(Some(7), packet));
        for packet in behind(4, 13, 22) {
            let name = |what: &str| format!("tunnel to tunnel, {:04x}: {what}", ethertype(&packet));
            let leaving = sent_in(far6(0x50), false, (0, 0, 63), &plain_gre(None, &aged(&packet)));
            for (what, from, outer) in
                [("IPv4 to IPv6", TUNNEL, outer4(&packet)), ("IPv6 to IPv6", KEYED6, outer6(&packet))]
            {
                let counted = [(from, Way::Out, packet.len()), (TUNNEL6, Way::Into, packet.len())];
                let frame = [arrive(&outer), vec![1; 3]].concat();
                self.tunnelled(name(what), nothing, frame, sent(leave(OUT, &leaving)), &counted);
            }
        }
        for packet in behind(2, 11, 22) {
            let expect = sent(leave(OUT, &wrap(FAR, None, 0, 63, &aged(&packet))));
            let counted = [(KEYED6, Way::Out, packet.len()), (TUNNEL, Way::Into, packet.len())];
            let name = format!("tunnel to tunnel, {:04x}: IPv6 to IPv4", ethertype(&packet));
            self.tunnelled(name, nothing, arrive(&outer6(&packet)), expect, &counted);
        }
    }

    fn checksums_in_ipv6(&mut self) {
        let lengths = [0, 1, 22, 65, 1300];
        for (tunnel, far, keys, limited, second, third) in
            [(TUNNEL6, far6(0x50), (None, None), false, 4, 13), (KEYED6, far6(0x51), (Some(7), Some(9)), true, 5, 14)]
        {
            let asked = move |world: &mut World| world.ask(tunnel, tunnel_flags::INPUT_CHECKSUM);
            let made = move |world: &mut World| world.ask(tunnel, tunnel_flags::OUTPUT_CHECKSUM);
            for packet in [plain4(), plain6()].iter().flat_map(|packet| lengths.map(|len| with_data(packet, len))) {
                let name = format!("{:04x}, key {:?}, {} bytes", ethertype(&packet), keys.0, packet.len());
                let arriving = carried(far, limited, &summed(keys.0, None, &packet));
                let (expect, counted) = (sent(forwarded(OUT, &[], &packet)), [(tunnel, Way::Out, packet.len())]);
                let frame = arrive(&arriving);
                self.tunnelled(format!("out of IPv6 with a checksum, {name}"), asked, frame, expect, &counted);
                let wrong = with(arriving, |p| *p.last_mut().expect("a packet") ^= 1);
                self.except(
                    format!("out of IPv6 with a wrong checksum, {name}"),
                    asked,
                    arrive(&wrong),
                    Reason::Tunnel,
                );
                let missing = arrive(&carried(far, limited, &plain_gre(keys.0, &packet)));
                self.except(format!("out of IPv6 without a checksum, {name}"), asked, missing, Reason::Tunnel);
            }
            for packet in lengths.iter().flat_map(|len| behind(second, third, *len)) {
                let name = format!("{:04x}, key {:?}, {} bytes", ethertype(&packet), keys.1, packet.len());
                let outside = (0, 0, if limited { 33 } else { 63 });
                let inside = summed(keys.1, None, &aged(&packet));
                let expect = sent(leave(OUT, &sent_in(far, limited, outside, &inside)));
                let counted = [(tunnel, Way::Into, packet.len())];
                let frame = [arrive(&packet), vec![0xee; 7]].concat();
                self.tunnelled(format!("into IPv6 with a checksum, {name}"), made, frame, expect, &counted);
            }
        }
    }
}

/// The flow label that is made for a packet.
fn label_of(packet: &[u8]) -> u32 {
    let (world, frame) = (World::new(), packet::Packet::new(packet, 0));
    let label = match packet[0] >> 4 {
        4 => hash::flow_label(world.config(), view::<Ipv4>(&frame)),
        _ => hash::flow_label(world.config(), view::<Ipv6>(&frame)),
    };
    assert_eq!(label >> 19, 1, "one of those that are given without a state");
    label
}

fn view<T: View>(frame: &packet::Packet) -> &T {
    crate::Frame::get(frame, 0).expect("a header")
}

impl World {
    /// Gives packets into a tunnel over IPv6 this class and flow label.
    fn outside(&self, slot: u32, class: u8, label: u32) {
        let tunnel = &self.port(slot).tunnel;
        tunnel.ttl_tos.store(tunnel.ttl_tos.load() & !0xff00 | u32::from(class) << 8);
        tunnel.flags.store(tunnel.flags.load() | label << tunnel_flags::LABEL_SHIFT);
    }
}
