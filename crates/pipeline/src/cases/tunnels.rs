//! Cases of tunnels: out of them, into them, from one into another.

mod over_ipv6;

use super::*;
use towpath_tables::record::{TUNNEL_BUCKETS, TUNNEL_PROBES, tunnel_flags};
use towpath_wire::gre::Gre;

/// The router's end of its tunnels
const NEAR: [u8; 4] = [192, 0, 2, 1];
/// The other ends of `TUNNEL` and `KEYED`, both behind `OUT`
const FAR: [u8; 4] = [198, 51, 100, 50];
/// See `FAR`
const FAR_KEYED: [u8; 4] = [198, 51, 100, 51];

/// As `NEAR` over IPv6
fn near6() -> [u8; 16] {
    address6(0, 0, 1)
}

/// As `FAR` over IPv6: the last group of the address
fn far6(last: u16) -> [u8; 16] {
    address6(1, 0, last)
}

/// What comes before a packet in a GRE packet.
fn gre(key: Option<u32>, ethertype: u16) -> Vec<u8> {
    let flags: u16 = if key.is_some() { 0x2000 } else { 0 };
    let mut header = [flags.to_be_bytes(), ethertype.to_be_bytes()].concat();
    header.extend(key.into_iter().flat_map(u32::to_be_bytes));
    header
}

/// As `gre`, with this packet behind it and a checksum over both, and a sequence number if one is given.
fn summed(key: Option<u32>, sequence: Option<u32>, packet: &[u8]) -> Vec<u8> {
    let flag = |option: Option<u32>, flag: u16| option.map_or(0, |_| flag);
    let flags = Gre::CHECKSUM | flag(key, Gre::KEY) | flag(sequence, Gre::SEQUENCE);
    let mut bytes = [flags.to_be_bytes(), ethertype(packet).to_be_bytes(), [0; 2], [0; 2]].concat();
    bytes.extend([key, sequence].into_iter().flatten().flat_map(u32::to_be_bytes));
    bytes.extend(packet);
    let sum = match !sum(&[&bytes]) {
        0 => 0xffff,
        sum => sum,
    };
    bytes[4..6].copy_from_slice(&sum.to_be_bytes());
    bytes
}

fn ethertype(packet: &[u8]) -> u16 {
    if packet[0] >> 4 == 4 { 0x0800 } else { 0x86dd }
}

/// The packet in one from a tunnel's other end.
fn wrapped(from: [u8; 4], key: Option<u32>, packet: &[u8]) -> Vec<u8> {
    ipv4(from, NEAR, GRE, &[gre(key, ethertype(packet)), packet.to_vec()].concat())
}

/// As `wrapped`, the other way, as Linux makes it but for the identification.
fn wrap(to: [u8; 4], key: Option<u32>, tos: u8, ttl: u8, packet: &[u8]) -> Vec<u8> {
    with4(ipv4(NEAR, to, GRE, &[gre(key, ethertype(packet)), packet.to_vec()].concat()), |p| {
        (p[1], p[8]) = (tos, ttl);
        p[4..8].copy_from_slice(&[0, 0, 0x40, 0]);
    })
}

/// As `wrap` with everything inherited, with a checksum.
fn wrap_summed(to: [u8; 4], key: Option<u32>, [tos, ttl]: [u8; 2], packet: &[u8]) -> Vec<u8> {
    with4(ipv4(NEAR, to, GRE, &summed(key, None, packet)), |p| {
        (p[1], p[8]) = (tos, ttl);
        p[4..8].copy_from_slice(&[0, 0, 0x40, 0]);
    })
}

/// The packet with one hop less.
fn aged(packet: &[u8]) -> Vec<u8> {
    if packet[0] >> 4 == 4 { with4(packet.to_vec(), |p| p[8] -= 1) } else { with(packet.to_vec(), |p| p[7] -= 1) }
}

/// The frame in which the packet leaves by a port as it is.
fn leave(slot: u32, packet: &[u8]) -> Vec<u8> {
    let mut frame = [neighbour(slot), mac(slot)].concat();
    frame.extend(ethertype(packet).to_be_bytes());
    frame.extend(packet);
    frame
}

/// What leaves by `OUT`.
fn sent(frame: Vec<u8>) -> Expect {
    Expect::Forward { frame, from: IN, to: OUT, device: OUT, hop: HOP }
}

/// To what is behind `TUNNEL` and behind `KEYED`.
fn behind(second: u8, third: u16, len: usize) -> [Vec<u8>; 2] {
    [packet4([10, second, 0, 9], len), packet6(address6(third, 0, 7), len)]
}

impl Cases {
    fn tunnelled(
        &mut self,
        name: impl Into<String>,
        configure: impl Fn(&mut World) + 'static,
        frame: Vec<u8>,
        expect: Expect,
        tunnels: &[(u32, Way, usize)],
    ) {
        self.add(name, configure, frame, expect);
        self.0.last_mut().expect("just added").tunnels = tunnels.to_vec();
    }

    pub(super) fn tunnels(&mut self) {
        self.decapsulated();
        self.not_decapsulated();
        self.encapsulated();
        self.not_encapsulated();
        self.between_tunnels();
        self.with_checksums();
        self.numbered();
        self.partial_in_tunnels();
        self.tunnels_over_ipv6();
    }

    fn decapsulated(&mut self) {
        for (family, packet) in [("IPv4", plain4()), ("IPv6", plain6())] {
            for (tunnel, from, key) in [(TUNNEL, FAR, None), (KEYED, FAR_KEYED, Some(7))] {
                for padding in [0, 5, 200] {
                    let frame = [arrive(&wrapped(from, key, &packet)), vec![0xee; padding]].concat();
                    let expect = sent(forwarded(OUT, &[], &packet));
                    let counted = [(tunnel, Way::Out, packet.len())];
                    let name = format!("out of a tunnel, {family}, key {key:?}, padding {padding}");
                    self.tunnelled(name, nothing, frame, expect, &counted);
                }
            }
            let large = |world: &mut World| world.nexthop(HOP).mtu.store(9000);
            let packet = with_data(&packet, 4000);
            let expect = sent(forwarded(OUT, &[], &packet));
            let frame = arrive(&wrapped(FAR, None, &packet));
            let counted = [(TUNNEL, Way::Out, packet.len())];
            self.tunnelled(format!("out of a tunnel, {family}, several buffers"), large, frame, expect, &counted);
        }
        let packet = plain4();
        let counted = [(TUNNEL, Way::Out, packet.len())];
        let frame = [link(IN_DOUBLE, &[(0x88a8, 300), (0x8100, 5)], 0x0800), wrapped(FAR, None, &packet)].concat();
        let expect =
            Expect::Forward { frame: forwarded(OUT, &[], &packet), from: IN_DOUBLE, to: OUT, device: OUT, hop: HOP };
        self.tunnelled("out of a tunnel, outer tags", nothing, frame, expect, &counted);
        let to_tags = packet4([203, 1, 113, 7], 22);
        let expect = Expect::Forward {
            frame: forwarded(OUT_DOUBLE, &[(0x88a8, 400), (0x8100, 7)], &to_tags),
            from: IN,
            to: OUT_DOUBLE,
            device: OTHER,
            hop: HOP_DOUBLE,
        };
        let frame = arrive(&wrapped(FAR, None, &to_tags));
        self.tunnelled("out of a tunnel, into tags", nothing, frame, expect, &counted);
        for (outer, inner) in [(0, 0), (0, 1), (0, 2), (0, 3), (2, 1), (2, 2), (2, 3), (1, 1), (3, 3)] {
            let packet = with4(plain4(), |p| p[1] = 0xb8 | inner);
            let frame = arrive(&with4(wrapped(FAR, None, &packet), |p| p[1] = 0x20 | outer));
            let name = format!("out of a tunnel, ECN {outer} outside, {inner} inside");
            self.tunnelled(name, nothing, frame, sent(forwarded(OUT, &[], &packet)), &counted);
        }
        let strict = |world: &mut World| {
            world.flag(TUNNEL, RP_STRICT);
            world.route(0, &[192, 0, 2, 99], hop(INTO));
        };
        let frame = arrive(&wrapped(FAR, None, &packet));
        self.tunnelled(
            "out of a tunnel, the way back is the tunnel",
            strict,
            frame,
            sent(forwarded(OUT, &[], &packet)),
            &counted,
        );
        // Three other tunnels have the places before.
        let crowded = |world: &mut World| {
            let place = world.tunnel_place(TUNNEL);
            for tunnel in 0..3 {
                world.config().tunnels[place + tunnel].store(1 + KEYED);
            }
            world.config().tunnels[place + 3].store(1 + TUNNEL);
        };
        let frame = arrive(&wrapped(FAR, None, &packet));
        self.tunnelled(
            "out of a tunnel at its last place",
            crowded,
            frame,
            sent(forwarded(OUT, &[], &packet)),
            &counted,
        );
    }

    fn not_decapsulated(&mut self) {
        use Reason::*;
        let packet = plain4();
        let good = || wrapped(FAR, None, &plain4());
        type Change = fn(&mut Vec<u8>);
        let changes: [(&str, Change, Reason); 12] = [
            ("checksum", |p| p[20] = 0x80, Tunnel),
            ("strict source route", |p| p[20] = 8, Tunnel),
            ("routing", |p| p[20] = 0x40, Tunnel),
            ("version 1", |p| p[21] = 1, Tunnel),
            ("recursion", |p| p[20] = 1, Tunnel),
            ("bridged Ethernet", |p| p[22..24].copy_from_slice(&[0x65, 0x58]), Tunnel),
            ("MPLS", |p| p[22..24].copy_from_slice(&[0x88, 0x47]), Tunnel),
            ("another protocol", |p| p[9] = 4, LocalDestination),
            ("another's tunnel", |p| p[15] = 60, LocalDestination),
            ("first fragment", |p| p[6] = 0x20, Fragment),
            ("last fragment", |p| p[7] = 9, Fragment),
            ("source of our own", |p| p[12..16].copy_from_slice(&NEAR), LocalDestination),
        ];
        for (name, change, reason) in changes {
            self.except(format!("not out of a tunnel: {name}"), nothing, arrive(&with4(good(), change)), reason);
        }
        for (outer, inner) in [(1, 0), (2, 0), (3, 0), (1, 2), (3, 1), (3, 2)] {
            let packet = with4(plain4(), |p| p[1] = inner);
            let frame = arrive(&with4(wrapped(FAR, None, &packet), |p| p[1] = outer));
            self.except(format!("not out of a tunnel: ECN {outer} outside, {inner} inside"), nothing, frame, Tunnel);
        }
        for (name, from, key) in
            [("key where none is", FAR, Some(7)), ("no key", FAR_KEYED, None), ("other key", FAR_KEYED, Some(9))]
        {
            let frame = arrive(&wrapped(from, key, &packet));
            self.except(format!("not out of a tunnel: {name}"), nothing, frame, LocalDestination);
        }
        let key_of_none = |world: &mut World| {
            world.port(KEYED).tunnel.input_key.store(0);
            world.index_tunnels();
        };
        self.except(
            "not out of a tunnel: no key instead of key 0",
            key_of_none,
            arrive(&wrapped(FAR_KEYED, None, &packet)),
            LocalDestination,
        );
        type Step = fn(&mut World);
        let steps: [(&str, Step, Reason); 10] = [
            ("down", |w| w.unflag(TUNNEL, READY), PortNotReady),
            ("not forwarding", |w| w.unflag(TUNNEL, FORWARD_V4), PortNotReady),
            ("policy of its port", |w| w.port(TUNNEL).ingress_policy[0].store(1 + PolicyTc as u32), PolicyTc),
            ("policy of its own", |w| w.port(TUNNEL).tunnel.policy.store(1 + PolicyXfrm as u32), PolicyXfrm),
            ("in change", |w| w.port(TUNNEL).tunnel.sequence.store(3), TableBusy),
            ("place out of range", |w| w.config().tunnels[w.tunnel_place(TUNNEL)].store(5000), Internal),
            ("no place", |w| w.config().tunnels.iter().for_each(|place| place.store(0)), LocalDestination),
            (
                "source outside refused",
                |w| {
                    w.flag(IN, RP_STRICT);
                },
                RpFilter,
            ),
            ("source inside refused", |w| w.flag(TUNNEL, RP_STRICT), RpFilter),
            ("too large for its way out", |w| w.nexthop(HOP).mtu.store(40), MtuExceeded),
        ];
        for (name, step, reason) in steps {
            self.except(format!("not out of a tunnel: {name}"), step, arrive(&good()), reason);
        }
        let inside: [(&str, Vec<u8>, Reason); 9] = [
            ("last hop", with4(plain4(), |p| p[8] = 1), TtlExpired),
            ("last hop, IPv6", with(plain6(), |p| p[7] = 1), TtlExpired),
            ("wrong checksum", with(plain4(), |p| p[10] ^= 1), BadChecksum),
            ("to the router", packet4(NEAR, 8), LocalDestination),
            ("multicast", packet4([224, 0, 0, 5], 8), Multicast),
            ("options", with(plain4(), |p| p[0] = 0x46), IpOptions),
            ("longer than what it is in", with4(plain4(), |p| p[3] += 1), Truncated),
            ("no route", packet4([8, 8, 8, 8], 8), NoRoute),
            ("redirect", packet6(address6(11, 0, 7), 8), Redirect),
        ];
        for (name, packet, reason) in inside {
            let frame = [arrive(&wrapped(FAR, None, &packet)), vec![0; 9]].concat();
            self.except(format!("not out of a tunnel: inside {name}"), nothing, frame, reason);
        }
        for cut in [20, 22, 24, 26, 27, 30, 43] {
            let packet = with4(good(), |p| p[3] = cut as u8);
            let name = format!("not out of a tunnel: {cut} bytes");
            self.except(name.clone(), nothing, arrive(&packet[..cut]), Truncated);
            self.except(format!("{name}, the rest is padding"), nothing, arrive(&packet), Truncated);
        }
    }

    fn encapsulated(&mut self) {
        for (tunnel, to, key, second, third, tos, ttl) in
            [(TUNNEL, FAR, None, 2, 11, 0, 63), (KEYED, FAR_KEYED, Some(9), 3, 12, 0x48, 33)]
        {
            for packet in behind(second, third, 22) {
                for padding in [0, 5, 100] {
                    let frame = [arrive(&packet), vec![0xee; padding]].concat();
                    let expect = sent(leave(OUT, &wrap(to, key, tos, ttl, &aged(&packet))));
                    let counted = [(tunnel, Way::Into, packet.len())];
                    let name = format!("into a tunnel, {:04x}, key {key:?}, padding {padding}", ethertype(&packet));
                    self.tunnelled(name, nothing, frame, expect, &counted);
                }
            }
        }
        let counted = |packet: &Vec<u8>| [(TUNNEL, Way::Into, packet.len())];
        for packet in behind(2, 11, 22) {
            let four = packet[0] >> 4 == 4;
            let family = ethertype(&packet);
            let classed = |class: u8| {
                if four {
                    with4(packet.clone(), |p| p[1] = class)
                } else {
                    with(packet.clone(), |p| (p[0], p[1]) = (0x60 | class >> 4, class << 4))
                }
            };
            for (class, outer) in [(0xb8, 0), (0xb9, 1), (0xba, 2), (0xbb, 2)] {
                let packet = classed(class);
                let expect = sent(leave(OUT, &wrap(FAR, None, outer, 63, &aged(&packet))));
                let name = format!("into a tunnel, {family:04x}, class {class:x}");
                self.tunnelled(name, nothing, arrive(&packet), expect, &counted(&packet));
                let inherit = |world: &mut World| {
                    world.port(TUNNEL).tunnel.ttl_tos.store(0x4000);
                    world.ask(TUNNEL, tunnel_flags::INHERIT_CLASS);
                };
                let expect = sent(leave(OUT, &wrap(FAR, None, 0xb8 | outer, 63, &aged(&packet))));
                let name = format!("into a tunnel, {family:04x}, class {class:x} inherited");
                let inherit = move |world: &mut World| {
                    inherit(world);
                };
                self.tunnelled(name, inherit, arrive(&packet), expect, &counted(&packet));
            }
            let tags = |world: &mut World| world.route(0, &FAR, hop(HOP_DOUBLE));
            let inside = aged(&packet);
            let frame = with(link(OUT_DOUBLE, &[(0x88a8, 400), (0x8100, 7)], 0x0800), |f| {
                f[..6].copy_from_slice(&neighbour(OUT_DOUBLE));
                f[6..12].copy_from_slice(&mac(OUT_DOUBLE));
                f.extend(wrap(FAR, None, 0, 63, &inside));
            });
            let expect = Expect::Forward { frame, from: IN, to: OUT_DOUBLE, device: OTHER, hop: HOP_DOUBLE };
            self.tunnelled(
                format!("into a tunnel, {family:04x}, into tags"),
                tags,
                arrive(&packet),
                expect,
                &counted(&packet),
            );
            let largest = with_data(&packet, 1476 - if four { 28 } else { 48 });
            let expect = sent(leave(OUT, &wrap(FAR, None, 0, 63, &aged(&largest))));
            self.tunnelled(
                format!("into a tunnel, {family:04x}, largest"),
                nothing,
                arrive(&largest),
                expect,
                &counted(&largest),
            );
            let large = |world: &mut World| [HOP, INTO].iter().for_each(|hop| world.nexthop(*hop).mtu.store(9000));
            let several = with_data(&packet, 4000);
            let expect = sent(leave(OUT, &wrap(FAR, None, 0, 63, &aged(&several))));
            let name = format!("into a tunnel, {family:04x}, several buffers");
            self.tunnelled(name, large, arrive(&several), expect, &counted(&several));
        }
        let packet = behind(2, 11, 22)[0].clone();
        let expect = sent(leave(OUT, &wrap(FAR, None, 0, 63, &aged(&packet))));
        let bound = |world: &mut World| world.port(TUNNEL).tunnel.link.store(OUT);
        self.tunnelled("into a tunnel bound to its way out", bound, arrive(&packet), expect, &counted(&packet));
        let grouped = |world: &mut World| {
            world.route(0, &FAR, group(GROUP));
            world.group(GROUP).buckets.iter().for_each(|bucket| bucket.store(HOP_OTHER));
        };
        let frame = leave(OTHER, &wrap(FAR, None, 0, 63, &aged(&packet)));
        let expect = Expect::Forward { frame, from: IN, to: OTHER, device: OTHER, hop: HOP_OTHER };
        self.tunnelled("into a tunnel, by a group", grouped, arrive(&packet), expect, &counted(&packet));
    }

    fn not_encapsulated(&mut self) {
        use Reason::*;
        type Step = fn(&mut World);
        let steps: [(&str, Step, Reason); 13] = [
            ("policy of its own", |w| w.port(TUNNEL).tunnel.policy.store(1 + PolicyXfrm as u32), PolicyXfrm),
            ("in change", |w| w.port(TUNNEL).tunnel.sequence.store(3), TableBusy),
            ("gone", |w| w.port(TUNNEL).tunnel.flags.store(0), TableBusy),
            ("next hop in change", |w| w.nexthop(INTO).sequence.store(1), TableBusy),
            ("port out of range", |w| w.nexthop(INTO).port.store(999), Internal),
            ("way out in change", |w| w.nexthop(HOP).sequence.store(1), TableBusy),
            ("no way out", |w| w.route(0, &FAR, hop(HOP_REASON + NoNeighbour as u32)), NoNeighbour),
            ("way out by itself", |w| w.route(0, &FAR, hop(INTO)), Tunnel),
            ("way out too narrow", |w| w.nexthop(HOP).mtu.store(50), MtuExceeded),
            ("too narrow", |w| w.nexthop(INTO).mtu.store(49), MtuExceeded),
            ("bound to another way out", |w| w.port(TUNNEL).tunnel.link.store(OTHER), Tunnel),
            (
                "bound, by a group",
                |w| {
                    w.route(0, &FAR, group(GROUP));
                    w.port(TUNNEL).tunnel.link.store(OUT);
                },
                Tunnel,
            ),
            ("way out by nothing that transmits", |w| w.port(OUT).ifindex.store(0), EgressNotServed),
        ];
        for (name, step, reason) in steps {
            for packet in behind(2, 11, 22) {
                let family = ethertype(&packet);
                self.except(format!("not into a tunnel, {family:04x}: {name}"), step, arrive(&packet), reason);
            }
        }
        let policy = |w: &mut World| w.config().policy[0].store(1 + PolicyNetfilter as u32);
        let [four, six] = behind(2, 11, 22);
        self.except("not into a tunnel: policy of IPv4 outside", policy, arrive(&six), PolicyNetfilter);
        self.except("not into a tunnel: last hop", nothing, arrive(&with4(four.clone(), |p| p[8] = 1)), TtlExpired);
        self.except("not into a tunnel: last hop, IPv6", nothing, arrive(&with(six.clone(), |p| p[7] = 1)), TtlExpired);
        self.except(
            "not into a tunnel: source refused",
            |w| w.flag(IN, RP_STRICT),
            arrive(&with4(four.clone(), |p| p[12] = 172)),
            RpFilter,
        );
        for packet in [four, six] {
            let header = if packet[0] >> 4 == 4 { 28 } else { 48 };
            let larger = with_data(&packet, 1477 - header);
            let family = ethertype(&packet);
            self.except(
                format!("not into a tunnel, {family:04x}: a byte too long"),
                nothing,
                arrive(&larger),
                MtuExceeded,
            );
            let wide = |world: &mut World| world.nexthop(INTO).mtu.store(9000);
            self.except(
                format!("not into a tunnel, {family:04x}: a byte too long for the way out"),
                wide,
                arrive(&larger),
                MtuExceeded,
            );
            let huge = |world: &mut World| {
                [HOP, INTO].iter().for_each(|hop| world.nexthop(*hop).mtu.store(9000));
                world.flag(OUT, SINGLE_BUFFER);
            };
            let several = arrive(&with_data(&packet, 4000));
            self.except(
                format!("not into a tunnel, {family:04x}: several buffers to a port that sends one"),
                huge,
                several,
                EgressNotServed,
            );
        }
    }

    fn between_tunnels(&mut self) {
        for (from, (near, source, key), (far, to, out_key, second, third, tos, ttl)) in [
            ("plain", (TUNNEL, FAR, None), (KEYED, FAR_KEYED, Some(9), 3, 12, 0x48, 33)),
            ("keyed", (KEYED, FAR_KEYED, Some(7)), (TUNNEL, FAR, None, 2, 11, 0, 63)),
        ] {
            for packet in behind(second, third, 22) {
                for padding in [0, 9] {
                    let frame = [arrive(&wrapped(source, key, &packet)), vec![1; padding]].concat();
                    let expect = sent(leave(OUT, &wrap(to, out_key, tos, ttl, &aged(&packet))));
                    let counted = [(near, Way::Out, packet.len()), (far, Way::Into, packet.len())];
                    let name = format!("tunnel to tunnel, {from} first, {:04x}, padding {padding}", ethertype(&packet));
                    self.tunnelled(name, nothing, frame, expect, &counted);
                }
            }
        }
        let packet = behind(3, 12, 22)[0].clone();
        let frame = arrive(&wrapped(FAR, None, &packet));
        let policy = |w: &mut World| w.port(KEYED).tunnel.policy.store(1 + Reason::PolicyXfrm as u32);
        self.except("tunnel to tunnel, policy of the second", policy, frame, Reason::PolicyXfrm);
        let packet = behind(2, 11, 22)[0].clone();
        let same = |w: &mut World| w.unflag(TUNNEL, REDIRECTS);
        let expect = sent(leave(OUT, &wrap(FAR, None, 0, 63, &aged(&packet))));
        let counted = [(TUNNEL, Way::Out, packet.len()), (TUNNEL, Way::Into, packet.len())];
        let frame = arrive(&wrapped(FAR, None, &packet));
        self.tunnelled("out of a tunnel and back into it", same, frame.clone(), expect, &counted);
        self.except("out of a tunnel and back into it, redirects", nothing, frame, Reason::Redirect);
    }

    fn with_checksums(&mut self) {
        let lengths = [0, 1, 2, 3, 22, 63, 64, 65, 1391];
        let partial = |world: &mut World| world.flag(IN, PARTIAL_CSUM);
        for (tunnel, far, keys, settings) in
            [(TUNNEL, FAR, (None, None), [0, 63]), (KEYED, FAR_KEYED, (Some(7), Some(9)), [0x48, 33])]
        {
            let asked = move |world: &mut World| world.ask(tunnel, tunnel_flags::INPUT_CHECKSUM);
            let made = move |world: &mut World| world.ask(tunnel, tunnel_flags::OUTPUT_CHECKSUM);
            for packet in [plain4(), plain6()].iter().flat_map(|packet| lengths.map(|len| with_data(packet, len))) {
                let name = format!("{:04x}, key {:?}, {} bytes", ethertype(&packet), keys.0, packet.len());
                let frame = |change: fn(&mut Vec<u8>)| {
                    let packet = with4(ipv4(far, NEAR, GRE, &summed(keys.0, None, &packet)), change);
                    [arrive(&packet), vec![0xee; 7]].concat()
                };
                let (expect, counted) = (sent(forwarded(OUT, &[], &packet)), [(tunnel, Way::Out, packet.len())]);
                self.tunnelled(format!("out with a checksum, {name}"), asked, frame(|_| ()), expect.clone(), &counted);
                let visible = move |world: &mut World| {
                    asked(world);
                    partial(world);
                };
                self.tunnelled(
                    format!("out with a checksum, {name}, looked at"),
                    visible,
                    frame(|_| ()),
                    expect,
                    &counted,
                );
                let last = |p: &mut Vec<u8>| *p.last_mut().expect("a packet") ^= 1;
                self.except(format!("out with a wrong checksum, {name}"), asked, frame(last), Reason::Tunnel);
                self.except(format!("out with an unwanted checksum, {name}"), nothing, frame(|_| ()), Reason::Tunnel);
            }
            let (second, third) = if tunnel == TUNNEL { (2, 11) } else { (3, 12) };
            for packet in lengths.iter().flat_map(|len| behind(second, third, *len)) {
                let name = format!("{:04x}, key {:?}, {} bytes", ethertype(&packet), keys.1, packet.len());
                let expect = sent(leave(OUT, &wrap_summed(far, keys.1, settings, &aged(&packet))));
                let counted = [(tunnel, Way::Into, packet.len())];
                let frame = [arrive(&packet), vec![0xee; 7]].concat();
                self.tunnelled(format!("into with a checksum, {name}"), made, frame, expect, &counted);
            }
        }
        let asked = |world: &mut World| world.ask(TUNNEL, tunnel_flags::INPUT_CHECKSUM);
        let made = |world: &mut World| world.ask(TUNNEL, tunnel_flags::OUTPUT_CHECKSUM);
        for packet in [plain4(), plain6()] {
            let frame = arrive(&wrapped(FAR, None, &packet));
            let family = ethertype(&packet);
            self.except(format!("out without the checksum that is wanted, {family:04x}"), asked, frame, Reason::Tunnel);
            let large = move |world: &mut World| {
                asked(world);
                world.nexthop(HOP).mtu.store(9000);
            };
            let frame = arrive(&ipv4(FAR, NEAR, GRE, &summed(None, None, &with_data(&packet, 4200))));
            self.except(
                format!("out with a checksum over several buffers, {family:04x}"),
                large,
                frame,
                Reason::Tunnel,
            );
        }
        for packet in behind(2, 11, 22) {
            let header = if packet[0] >> 4 == 4 { 28 } else { 48 };
            let name = |what: &str| format!("into with a checksum, {:04x}: {what}", ethertype(&packet));
            // The checksum takes four bytes of what the way out carries.
            let wide = move |world: &mut World| {
                made(world);
                world.nexthop(INTO).mtu.store(9000);
            };
            let largest = with_data(&packet, 1472 - header);
            let expect = sent(leave(OUT, &wrap_summed(FAR, None, [0, 63], &aged(&largest))));
            let counted = [(TUNNEL, Way::Into, largest.len())];
            self.tunnelled(name("largest"), wide, arrive(&largest), expect, &counted);
            let larger = arrive(&with_data(&packet, 1473 - header));
            self.except(name("a byte too long for the way out"), wide, larger, Reason::MtuExceeded);
            let huge = move |world: &mut World| {
                wide(world);
                world.nexthop(HOP).mtu.store(9000);
            };
            let several = arrive(&with_data(&packet, 4200));
            self.except(name("several buffers"), huge, several, Reason::Tunnel);
            // Both zeros: what is inside makes the sum all ones.
            let none = with_data(&packet, 22);
            let zero = |checksum: u16| {
                let mut packet = none.clone();
                let at = packet.len() - 2;
                packet[at..].copy_from_slice(&[0; 2]);
                let rest = u16::from_be_bytes(summed(None, None, &aged(&packet))[4..6].try_into().expect("two bytes"));
                packet[at..].copy_from_slice(&if checksum == 0 { rest } else { rest.wrapping_sub(1) }.to_be_bytes());
                packet
            };
            for checksum in [0, 1] {
                let packet = zero(checksum);
                let expect = sent(leave(OUT, &wrap_summed(FAR, None, [0, 63], &aged(&packet))));
                let counted = [(TUNNEL, Way::Into, packet.len())];
                self.tunnelled(name(&format!("its value is {checksum}")), made, arrive(&packet), expect, &counted);
            }
        }
        let transit = |packet: &[u8]| ipv4(SOURCE4, DESTINATION4, GRE, &summed(None, None, packet));
        self.pass("GRE on its way, complete with a checksum", partial, transit(&plain4()), 0);
        let wrong = with4(transit(&plain4()), |p| p[24] ^= 1);
        self.except("GRE on its way, its checksum to be completed", partial, arrive(&wrong), Reason::PartialChecksum);
    }

    /// Numbers that nobody asked for are passed over.
    fn numbered(&mut self) {
        for packet in [plain4(), plain6()] {
            for key in [None, Some(7)] {
                let (tunnel, far) = if key.is_some() { (KEYED, FAR_KEYED) } else { (TUNNEL, FAR) };
                let counted = [(tunnel, Way::Out, packet.len())];
                let mut header = gre(key, ethertype(&packet));
                header[0] |= 0x10;
                header.extend([0, 0, 1, 2]);
                let frame = arrive(&ipv4(far, NEAR, GRE, &[header, packet.clone()].concat()));
                let name = format!("out with a number, {:04x}, key {key:?}", ethertype(&packet));
                self.tunnelled(name, nothing, frame, sent(forwarded(OUT, &[], &packet)), &counted);
                let asked = move |world: &mut World| world.ask(tunnel, tunnel_flags::INPUT_CHECKSUM);
                let frame = arrive(&ipv4(far, NEAR, GRE, &summed(key, Some(9), &packet)));
                let name = format!("out with a number and a checksum, {:04x}, key {key:?}", ethertype(&packet));
                self.tunnelled(name, asked, frame.clone(), sent(forwarded(OUT, &[], &packet)), &counted);
                let wanted = move |world: &mut World| {
                    let policy = &world.port(tunnel).ingress_policy;
                    policy.iter().for_each(|word| word.store(1 + Reason::TunnelSequence as u32));
                    asked(world);
                };
                let name = format!("not out: numbers are wanted, {:04x}, key {key:?}", ethertype(&packet));
                self.except(name, wanted, frame, Reason::TunnelSequence);
            }
        }
    }

    /// Ports where frames may carry checksums that are to be completed.
    fn partial_in_tunnels(&mut self) {
        let partial = |world: &mut World| world.flag(IN, PARTIAL_CSUM);
        for (packet, header) in [(plain4(), 20), (plain6(), 40)] {
            let family = ethertype(&packet);
            for key in [None, Some(7)] {
                let (tunnel, far) = if key.is_some() { (KEYED, FAR_KEYED) } else { (TUNNEL, FAR) };
                let frame = arrive(&wrapped(far, key, &packet));
                let counted = [(tunnel, Way::Out, packet.len())];
                let name = format!("complete in a tunnel, {family:04x}, key {key:?}");
                self.tunnelled(name, partial, frame, sent(forwarded(OUT, &[], &packet)), &counted);
                let seed = seed(&packet, UDP).to_be_bytes();
                let left = with(packet.clone(), |p| p[header + 6..header + 8].copy_from_slice(&seed));
                let frame = arrive(&wrapped(far, key, &left));
                self.except(
                    format!("partial in a tunnel, {family:04x}, key {key:?}"),
                    partial,
                    frame,
                    Reason::PartialChecksum,
                );
            }
        }
        // A router on the way looks inside, too.
        let through = |packet: &[u8]| ipv4(SOURCE4, DESTINATION4, GRE, &[gre(None, 0x0800), packet.to_vec()].concat());
        self.pass("GRE on its way, complete inside", partial, through(&plain4()), 0);
        for (name, change) in [
            ("GRE's checksum", (|p: &mut Vec<u8>| p[20] = 0x80) as fn(&mut Vec<u8>)),
            ("a tunnel inside", |p| p[24 + 9] = GRE),
            ("bridged Ethernet", |p| p[22..24].copy_from_slice(&[0x65, 0x58])),
            ("nonsense inside", |p| p[24] = 0x51),
        ] {
            let packet = with4(through(&plain4()), |p| {
                change(p);
                fix4(&mut p[24..]);
            });
            self.except(format!("GRE on its way, {name}"), partial, arrive(&packet), Reason::PartialChecksum);
        }
    }
}

/// The packet with so much data instead of its own.
fn with_data(packet: &[u8], len: usize) -> Vec<u8> {
    if packet[0] >> 4 == 4 {
        packet4(packet[16..20].try_into().expect("four bytes"), len)
    } else {
        packet6(packet[24..40].try_into().expect("sixteen bytes"), len)
    }
}

impl World {
    /// Adds the tunnels: `TUNNEL` without key and with everything inherited but TOS, `KEYED` with a key in each
    /// direction and settings of its own. 10.2 and 2001:db8:b are behind the one, 10.3 and 2001:db8:c behind the other. The same
    /// over IPv6, with 10.4 and 2001:db8:d, 10.5 and 2001:db8:e behind, and an encapsulation limit for `KEYED6`.
    pub(super) fn add_tunnels(&mut self) {
        let keys = tunnel_flags::INPUT_KEY | tunnel_flags::OUTPUT_KEY;
        let six = tunnel_flags::V6;
        let words = |address: &[u8]| -> Vec<u32> {
            address.chunks(4).map(|word| u32::from_ne_bytes(word.try_into().expect("four bytes"))).collect()
        };
        let own = 0x48 << 8 | 33;
        for (slot, next, remote, flags, keys, ttl_tos, second, third) in [
            (TUNNEL, INTO, words(&FAR), 0, (0, 0), 0, 2, 11),
            (KEYED, INTO_KEYED, words(&FAR_KEYED), keys, (7, 9), own, 3, 12),
            (TUNNEL6, INTO6, words(&far6(0x50)), six, (0, 0), 0, 4, 13),
            (KEYED6, INTO_KEYED6, words(&far6(0x51)), six | tunnel_flags::LIMIT | keys, (7, 9), 4 << 16 | 33, 5, 14),
        ] {
            self.add_port(slot, slot, 0);
            self.flag(slot, TUNNEL_FLAG);
            self.port(slot).mtu.store(1476);
            let tunnel = &self.port(slot).tunnel;
            tunnel.sequence.store(2);
            tunnel.flags.store(tunnel_flags::GRE | flags);
            let local = if flags & six != 0 { words(&near6()) } else { words(&NEAR) };
            tunnel.local.iter().zip(local).for_each(|(word, value)| word.store(value));
            tunnel.remote.iter().zip(remote).for_each(|(word, value)| word.store(value));
            tunnel.input_key.store(u32::to_be(keys.0));
            tunnel.output_key.store(u32::to_be(keys.1));
            tunnel.ttl_tos.store(ttl_tos);
            self.add_tunnel_hop(next, slot);
            self.insert(0, &[10, second], hop(next));
            self.insert(1, &[0x20, 1, 0xd, 0xb8, 0, third], hop(next));
        }
        self.index_tunnels();
    }

    /// Asks for something in a tunnel's packets.
    fn ask(&mut self, slot: u32, flag: u32) {
        let flags = &self.port(slot).tunnel.flags;
        flags.store(flags.load() | flag);
    }

    /// Where the tunnel in a slot is looked for first.
    pub(super) fn tunnel_place(&self, slot: u32) -> usize {
        let tunnel = &self.port(slot).tunnel;
        let [local, remote] =
            [&tunnel.local, &tunnel.remote].map(|end| [0, 1, 2, 3].map(|word: usize| end[word].load()));
        tunnel_bucket(local, remote, tunnel.input_key.load())
    }

    pub(super) fn index_tunnels(&self) {
        for slot in [TUNNEL, KEYED, TUNNEL6, KEYED6] {
            let first = self.tunnel_place(slot);
            let mut places = (first..first + TUNNEL_PROBES).map(|place| &self.config().tunnels[place % TUNNEL_BUCKETS]);
            let place = places.find(|place| [0, 1 + slot].contains(&place.load()));
            place.expect("a place").store(1 + slot);
        }
    }
}
