//! Cases of flows: connections that Linux handed over, through rules.

use super::*;
use std::net::IpAddr;
use towpath_tables::clock;
use towpath_tables::flow::{AnyKey, Direction, Found, LEASE, acceptance};
use towpath_tables::record::{PORT_SLOTS, flow_state};
use towpath_tables::{Connection, Obstacle, Tuple};

/// The generation in which the cases' flows are accepted
const GENERATION: u32 = 6;
const POLICY: Reason = Reason::PolicyNetfilter;

/// What becomes of the flow in record 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effect {
    /// A packet of this length passed in a direction
    Passed(Direction, usize),
    /// These bits of its state are set
    Closed(u32),
}

impl Effect {
    pub(super) fn apply(self, world: &World) {
        let flow = &world.flows()[0];
        match self {
            Effect::Passed(direction, len) => {
                flow.counters[direction as usize].packets.store(1);
                flow.counters[direction as usize].bytes.store(len as u64);
            }
            Effect::Closed(bits) => flow.state.store(flow.state.load() | bits),
        }
    }
}

/// Addresses and ports: where from and where to.
type Ends = ((IpAddr, u16), (IpAddr, u16));

fn tuple(((source, source_port), (destination, destination_port)): Ends, protocol: u8) -> Tuple {
    Tuple { source, destination, source_port, destination_port, protocol }
}

/// The connection of which packets arrive with the first ends in a direction and leave with the second.
fn connection(arrive: Ends, leave: Ends, protocol: u8, direction: Direction) -> Connection {
    let (arrive, leave) = (tuple(arrive, protocol), tuple(leave, protocol).inverse());
    let (original, reply) = if direction == Direction::Original { (arrive, leave) } else { (leave, arrive) };
    Connection::new(original, reply).expect("both are of one kind")
}

/// A packet with these ends and a right checksum.
fn packet((from, to): Ends, protocol: u8, flags: u8, data: &[u8]) -> Vec<u8> {
    let (payload, at) = match protocol {
        TCP => (tcp(from.1, to.1, flags, data), 16),
        _ => (udp(from.1, to.1, data), 6),
    };
    let bare = match (from.0, to.0) {
        (IpAddr::V4(from), IpAddr::V4(to)) => ipv4(from.octets(), to.octets(), protocol, &payload),
        (IpAddr::V6(from), IpAddr::V6(to)) => ipv6(from.octets(), to.octets(), protocol, &payload),
        _ => panic!("two families"),
    };
    complete(bare, protocol, at)
}

const ACK: u8 = 0x10;

/// A TCP segment without checksum.
fn tcp(source: u16, destination: u16, flags: u8, data: &[u8]) -> Vec<u8> {
    let mut segment = [source.to_be_bytes(), destination.to_be_bytes()].concat();
    segment.extend([0, 0, 1, 2, 0, 0, 3, 4, 0x50, flags, 0x20, 0, 0, 0, 0, 0]);
    segment.extend(data);
    segment
}

/// The addresses of a family: client, server, the router's own towards either, and another host beside the client.
fn addresses(six: bool) -> [IpAddr; 5] {
    if six {
        ["2001:db8::63", "2001:db8:1::7", "2001:db8::1", "2001:db8:1::1:1", "2001:db8::1234:64"]
    } else {
        ["192.0.2.99", "198.51.100.7", "192.0.2.1", "198.51.100.1", "192.0.2.100"]
    }
    .map(|address| address.parse().expect("an address"))
}

const FAMILIES: [(&str, bool); 2] = [("IPv4", false), ("IPv6", true)];
const PROTOCOLS: [(&str, u8); 2] = [("TCP", TCP), ("UDP", UDP)];
const DIRECTIONS: [Direction; 2] = [Direction::Original, Direction::Reply];

/// What is translated: how packets arrive, and how they leave.
fn translations(six: bool) -> [(&'static str, Ends, Ends); 4] {
    let [client, server, inner, outer, _] = addresses(six);
    let plain = ((client, 4000), (server, 80));
    [
        ("untranslated", plain, plain),
        ("SNAT", plain, ((outer, 61_000), (server, 80))),
        ("DNAT", ((client, 4000), (inner, 8080)), plain),
        ("both", ((client, 4000), (inner, 8080)), ((outer, 61_000), (server, 80))),
    ]
}

/// A router whose rules let this connection pass from `IN` by `to`, in one direction.
fn accepted(connection: Connection, direction: Direction, from: u32, to: u32) -> impl Fn(&mut World) {
    move |world: &mut World| {
        let obstacle = Obstacle::word(Some(Obstacle { reason: POLICY, flows: true }));
        world.config().policy.iter().for_each(|policy| policy.store(obstacle));
        world.config().flow_generation.store(GENERATION);
        world.add_flow(&connection);
        world.flows()[0].accepted[direction as usize].store(acceptance(GENERATION, from, to));
    }
}

impl Cases {
    /// The packet passes by the flow in record 0 and leaves as another.
    fn flow(
        &mut self,
        name: impl Into<String>,
        configure: impl Fn(&mut World) + 'static,
        frame: Vec<u8>,
        expect: Expect,
        effect: Effect,
    ) {
        self.add(name, configure, frame, expect);
        self.0.last_mut().expect("just added").flow = Some(effect);
    }

    pub(super) fn flows(&mut self) {
        self.translated();
        self.hairpin();
        self.tagged_flows();
        self.flows_in_vrfs();
        self.checksums_of_flows();
        self.turns();
        self.not_of_a_flow();
        self.policies_of_flows();
    }

    fn translated(&mut self) {
        for (family, six) in FAMILIES {
            for (name, protocol) in PROTOCOLS {
                for (what, arrives, leaves) in translations(six) {
                    for direction in DIRECTIONS {
                        for (len, padding) in [(0, 0), (22, 3), (1, 60)] {
                            let before = packet(arrives, protocol, ACK, &data(len));
                            let after = packet(leaves, protocol, ACK, &data(len));
                            let connection = connection(arrives, leaves, protocol, direction);
                            let frame = [arrive(&before), vec![0xee; padding]].concat();
                            let expect = Expect::Forward {
                                frame: forwarded(OUT, &[], &after),
                                from: IN,
                                to: OUT,
                                device: OUT,
                                hop: HOP,
                            };
                            self.flow(
                                format!("flow, {family}, {name}, {what}, {direction:?}, {len} bytes"),
                                accepted(connection, direction, IN, OUT),
                                frame,
                                expect,
                                Effect::Passed(direction, before.len()),
                            );
                        }
                    }
                }
            }
        }
    }

    /// Back to where it came from, with the router's address instead.
    fn hairpin(&mut self) {
        for (family, six) in FAMILIES {
            let [client, _, inner, _, other] = addresses(six);
            let (arrives, leaves) = (((client, 4000), (inner, 8080)), ((inner, 61_000), (other, 80)));
            let connection = connection(arrives, leaves, TCP, Direction::Original);
            let (before, after) = (packet(arrives, TCP, ACK, &data(9)), packet(leaves, TCP, ACK, &data(9)));
            let router = accepted(connection, Direction::Original, IN, IN);
            let quiet = move |world: &mut World| {
                router(world);
                world.unflag(IN, REDIRECTS);
            };
            let expect =
                Expect::Forward { frame: forwarded(IN, &[], &after), from: IN, to: IN, device: IN, hop: HOP_BACK };
            match six {
                // ip6_forward sends redirects whatever is set.
                true => self.except(format!("flow, {family}, hairpin"), quiet, arrive(&before), Reason::Redirect),
                false => self.flow(
                    format!("flow, {family}, hairpin"),
                    quiet,
                    arrive(&before),
                    expect,
                    Effect::Passed(Direction::Original, before.len()),
                ),
            }
            let router = accepted(connection, Direction::Original, IN, IN);
            self.except(format!("flow, {family}, hairpin with redirects"), router, arrive(&before), Reason::Redirect);
        }
    }

    fn tagged_flows(&mut self) {
        for (family, six) in FAMILIES {
            let server: IpAddr = if six { "2001:db8:3::7" } else { "203.1.113.7" }.parse().expect("an address");
            let [client, _, inner, outer, _] = addresses(six);
            let (arrives, leaves) = (((client, 4000), (inner, 8080)), ((outer, 61_000), (server, 80)));
            let (before, after) = (packet(arrives, UDP, 0, &data(9)), packet(leaves, UDP, 0, &data(9)));
            let frame = |slot, tags: &[(u16, u16)]| {
                [link(slot, tags, if six { 0x86dd } else { 0x0800 }), before.clone(), vec![1, 2, 3]].concat()
            };
            let connection = connection(arrives, leaves, UDP, Direction::Reply);
            for (from, tags) in
                [(IN, &[] as &[_]), (IN_VLAN, &[(0x8100, 100)]), (IN_DOUBLE, &[(0x88a8, 300), (0x8100, 5)])]
            {
                let expect = Expect::Forward {
                    frame: forwarded(OUT_DOUBLE, &[(0x88a8, 400), (0x8100, 7)], &after),
                    from,
                    to: OUT_DOUBLE,
                    device: OTHER,
                    hop: HOP_DOUBLE,
                };
                self.flow(
                    format!("flow, {family}, from port {from} into two tags"),
                    accepted(connection, Direction::Reply, from, OUT_DOUBLE),
                    frame(from, tags),
                    expect,
                    Effect::Passed(Direction::Reply, before.len()),
                );
            }
            self.add(
                format!("flow, {family}, accepted from the port underneath"),
                accepted(connection, Direction::Reply, IN, OUT_DOUBLE),
                frame(IN_VLAN, &[(0x8100, 100)]),
                Expect::Exception(IN_VLAN, Reason::FlowWaiting),
            );
            self.except(
                format!("flow, {family}, accepted to the port underneath"),
                accepted(connection, Direction::Reply, IN, OTHER),
                frame(IN, &[]),
                Reason::FlowWaiting,
            );
        }
    }

    /// Of what comes in by a VRF's port the VRF is known, per family.
    fn flows_in_vrfs(&mut self) {
        const VRF: u32 = PORT_SLOTS + 3;
        for (family, six) in FAMILIES {
            let [.., (_, arrives, leaves)] = translations(six);
            let connection = connection(arrives, leaves, UDP, Direction::Reply);
            let (before, after) = (packet(arrives, UDP, 0, &data(9)), packet(leaves, UDP, 0, &data(9)));
            let router = |from, numbers: [u32; 2]| {
                let router = accepted(connection, Direction::Reply, from, OUT);
                move |world: &mut World| {
                    router(world);
                    world.port(IN).vrf.store(77);
                    world.port(IN).arrival.iter().zip(numbers).for_each(|(arrival, number)| arrival.store(number));
                }
            };
            let of = |own, other| if six { [other, own] } else { [own, other] };
            for (name, from, numbers) in [("VRF", VRF, of(VRF, 0)), ("port of one", IN, of(0, VRF))] {
                let expect =
                    Expect::Forward { frame: forwarded(OUT, &[], &after), from: IN, to: OUT, device: OUT, hop: HOP };
                self.flow(
                    format!("flow, {family}, accepted from a {name}"),
                    router(from, numbers),
                    arrive(&before),
                    expect,
                    Effect::Passed(Direction::Reply, before.len()),
                );
            }
            for (name, from, numbers) in [
                ("another VRF", VRF + 1, of(VRF, VRF + 1)),
                ("a VRF's port", IN, of(VRF, 0)),
                ("the VRF, which does not stand for its ports", VRF, of(0, VRF)),
            ] {
                let name = format!("flow, {family}, accepted from {name}");
                self.except(name, router(from, numbers), arrive(&before), Reason::FlowWaiting);
            }
        }
    }

    fn checksums_of_flows(&mut self) {
        for (family, six) in FAMILIES {
            let [_, _, _, (_, arrives, leaves)] = translations(six);
            let at = if six { 46 } else { 26 };
            let pass = |name: String, before: Vec<u8>, after: Vec<u8>| {
                let connection = connection(arrives, leaves, UDP, Direction::Original);
                let expect =
                    Expect::Forward { frame: forwarded(OUT, &[], &after), from: IN, to: OUT, device: OUT, hop: HOP };
                let effect = Effect::Passed(Direction::Original, before.len());
                (name, accepted(connection, Direction::Original, IN, OUT), arrive(&before), expect, effect)
            };
            let bare = |ends| with(packet(ends, UDP, 0, &data(5)), |p| p[at..at + 2].fill(0));
            let (name, router, frame, expect, effect) =
                pass(format!("flow, {family}, UDP without checksum"), bare(arrives), bare(leaves));
            self.flow(name, router, frame, expect, effect);
            // The data that make the checksum zero of what leaves: it is sent as ones.
            let zero =
                (0..=u16::MAX).map(u16::to_be_bytes).find(|data| packet(leaves, UDP, 0, data)[at..at + 2] == [0, 0]);
            let zero = zero.expect("one of all sums");
            let ones = with(packet(leaves, UDP, 0, &zero), |p| p[at..at + 2].fill(0xff));
            let (name, router, frame, expect, effect) =
                pass(format!("flow, {family}, UDP checksum becomes zero"), packet(arrives, UDP, 0, &zero), ones);
            self.flow(name, router, frame, expect, effect);
            // A wrong checksum stays as wrong as it was: the receiver finds out.
            let wrong = |ends| {
                with(packet(ends, UDP, 0, &data(6)), |p| {
                    let last = p.len() - 1;
                    p[last] ^= 0x55;
                })
            };
            let (name, router, frame, expect, effect) =
                pass(format!("flow, {family}, wrong checksum"), wrong(arrives), wrong(leaves));
            self.flow(name, router, frame, expect, effect);
            for (name, protocol) in PROTOCOLS {
                let connection = connection(arrives, leaves, protocol, Direction::Original);
                let partial = move |world: &mut World| {
                    accepted(connection, Direction::Original, IN, OUT)(world);
                    world.flag(IN, PARTIAL_CSUM);
                };
                let before = packet(arrives, protocol, ACK, &data(8));
                let after = packet(leaves, protocol, ACK, &data(8));
                let expect =
                    Expect::Forward { frame: forwarded(OUT, &[], &after), from: IN, to: OUT, device: OUT, hop: HOP };
                self.flow(
                    format!("flow, {family}, {name}, complete where it may not be"),
                    partial,
                    arrive(&before),
                    expect,
                    Effect::Passed(Direction::Original, before.len()),
                );
                let at = if six { 40 } else { 20 } + if protocol == TCP { 16 } else { 6 };
                let seed = seed(&before, protocol).to_be_bytes();
                let left = with(before, |p| p[at..at + 2].copy_from_slice(&seed));
                self.except(
                    format!("flow, {family}, {name}, left to the device"),
                    partial,
                    arrive(&left),
                    Reason::PartialChecksum,
                );
            }
        }
    }

    /// How TCP connections begin and end.
    fn turns(&mut self) {
        for (family, six) in FAMILIES {
            let [_, _, _, (_, arrives, leaves)] = translations(six);
            for direction in DIRECTIONS {
                let connection = connection(arrives, leaves, TCP, direction);
                let segment = |flags| arrive(&packet(arrives, TCP, flags, &data(4)));
                let (reset, finished) = (flow_state::CLOSED, flow_state::CLOSED | flow_state::FINISHED);
                let ends = [(0x04, reset), (0x14, reset), (0x05, reset)];
                for (flags, state) in ends.into_iter().chain([0x11, 0x19, 0x31, 0x01].map(|flags| (flags, finished))) {
                    self.flow(
                        format!("flow, {family}, {direction:?}, TCP flags {flags:x}"),
                        accepted(connection, direction, IN, OUT),
                        segment(flags),
                        Expect::Exception(IN, Reason::FlowClosing),
                        Effect::Closed(state),
                    );
                }
                for (flags, reason) in
                    [(0x02, Reason::FlowClosing), (0x12, Reason::FlowClosing), (0x08, Reason::FlowNew)]
                {
                    let name = format!("flow, {family}, {direction:?}, TCP flags {flags:x}");
                    self.except(name, accepted(connection, direction, IN, OUT), segment(flags), reason);
                }
                let router = accepted(connection, direction, IN, OUT);
                let closed = move |world: &mut World| {
                    router(world);
                    Effect::Closed(reset).apply(world);
                };
                let name = format!("flow, {family}, {direction:?}, closed");
                self.except(name, closed, segment(ACK), Reason::FlowClosing);
            }
        }
    }

    fn not_of_a_flow(&mut self) {
        for (family, six) in FAMILIES {
            let [_, _, _, (_, arrives, leaves)] = translations(six);
            let [client, server, ..] = addresses(six);
            let ((_, port), to) = arrives;
            let connection = connection(arrives, leaves, TCP, Direction::Original);
            let router = move || accepted(connection, Direction::Original, IN, OUT);
            let segment = |ends| packet(ends, TCP, ACK, &data(4));
            for (name, ends) in [
                ("source", ((server, port), to)),
                ("destination", (arrives.0, (client, to.1))),
                ("source port", ((client, port + 1), to)),
                ("destination port", (arrives.0, (to.0, to.1 ^ 0x100))),
                ("direction", (to, arrives.0)),
                ("translation", leaves),
            ] {
                self.except(format!("no flow, {family}: {name}"), router(), arrive(&segment(ends)), Reason::FlowNew);
            }
            let datagram = arrive(&packet(arrives, UDP, 0, &data(4)));
            self.except(format!("no flow, {family}: protocol"), router(), datagram, Reason::FlowNew);
            let other = match six {
                true => with(segment(arrives), |p| p[6] = 132),
                false => with4(segment(arrives), |p| p[9] = 132),
            };
            self.except(format!("no flow, {family}: neither TCP nor UDP"), router(), arrive(&other), POLICY);

            let good = arrive(&segment(arrives));
            type Step = fn(&mut World);
            let steps: [(&str, Step, Reason); 17] = [
                ("never accepted", |w| w.flows()[0].accepted[0].store(0), Reason::FlowWaiting),
                ("an older generation", |w| w.config().flow_generation.store(GENERATION + 2), Reason::FlowWaiting),
                ("closed generation", |w| w.config().flow_generation.store(GENERATION + 1), Reason::FlowWaiting),
                (
                    "accepted in a closed generation",
                    |w| {
                        w.config().flow_generation.store(7);
                        w.flows()[0].accepted[0].store(acceptance(7, IN, OUT));
                    },
                    Reason::FlowWaiting,
                ),
                (
                    "accepted from another port",
                    |w| w.flows()[0].accepted[0].store(acceptance(GENERATION, OTHER, OUT)),
                    Reason::FlowWaiting,
                ),
                (
                    "accepted to another port",
                    |w| w.flows()[0].accepted[0].store(acceptance(GENERATION, IN, OTHER)),
                    Reason::FlowWaiting,
                ),
                (
                    "accepted the other way only",
                    |w| {
                        w.flows()[0].accepted[0].store(0);
                        w.flows()[0].accepted[1].store(acceptance(GENERATION, IN, OUT));
                    },
                    Reason::FlowWaiting,
                ),
                ("unwatched", |w| w.config().heartbeat.store(clock::now() - LEASE - 1), Reason::FlowUnwatched),
                ("another clock", |w| w.config().heartbeat.store(clock::now() + LEASE), Reason::FlowUnwatched),
                ("record out of range", |w| w.break_flow_index(), Reason::FlowNew),
                ("the record is another's", |w| w.flows()[0].ports[0].store(1), Reason::FlowNew),
                ("the record is not in use", |w| w.flows()[0].state.store(0), Reason::FlowNew),
                (
                    "no neighbour",
                    |w| w.nexthop(HOP).state.store(0x2 | (Reason::NoNeighbour as u32) << 8),
                    Reason::NoNeighbour,
                ),
                ("in change", |w| w.nexthop(HOP).sequence.store(1), Reason::TableBusy),
                ("into a tunnel", |w| w.nexthop(HOP).state.store(3), Reason::Tunnel),
                ("too narrow", |w| w.nexthop(HOP).mtu.store(43), Reason::MtuExceeded),
                ("nothing transmits", |w| w.port(OUT).ifindex.store(0), Reason::EgressNotServed),
            ];
            for (name, step, reason) in steps {
                let router = router();
                let router = move |world: &mut World| {
                    router(world);
                    step(world);
                };
                self.except(format!("no flow, {family}: {name}"), router, good.clone(), reason);
            }
            let last = match six {
                true => with(segment(arrives), |p| p[7] = 1),
                false => with4(segment(arrives), |p| p[8] = 1),
            };
            self.except(format!("no flow, {family}: last hop"), router(), arrive(&last), Reason::TtlExpired);
            let start = if six { 40 } else { 20 };
            for (name, at, value) in [("header too short", 12, 0x40), ("header too long", 12, 0x70)] {
                let packet = with(segment(arrives), |p| p[start + at] = value);
                self.except(format!("no flow, {family}: TCP {name}"), router(), arrive(&packet), Reason::Truncated);
            }
            let udp_connection = super::flows::connection(arrives, leaves, UDP, Direction::Original);
            for len in [7, 13] {
                let router = accepted(udp_connection, Direction::Original, IN, OUT);
                let packet = with(packet(arrives, UDP, 0, &data(4)), |p| p[start + 5] = len);
                self.except(format!("no flow, {family}: UDP length {len}"), router, arrive(&packet), Reason::Truncated);
            }
            for (name, len) in [("ports", 6), ("TCP header", 16)] {
                let cut = match six {
                    true => with(segment(arrives), |p| p[5] = len),
                    false => with4(segment(arrives), |p| p[3] = 20 + len),
                };
                self.except(format!("no flow, {family}: {name} cut off"), router(), arrive(&cut), Reason::Truncated);
            }
        }
        let [_, _, _, (_, arrives, leaves)] = translations(false);
        let connection = connection(arrives, leaves, TCP, Direction::Original);
        let router = || accepted(connection, Direction::Original, IN, OUT);
        let good = packet(arrives, TCP, ACK, &data(4));
        for (name, fragment) in [("first", 0x2000u16), ("later", 0x0010)] {
            let packet = with4(good.clone(), |p| p[6..8].copy_from_slice(&fragment.to_be_bytes()));
            self.except(format!("no flow: {name} fragment"), router(), arrive(&packet), Reason::Fragment);
        }
        let options = with(good.clone(), |p| {
            p.splice(20..20, [1, 1, 1, 0]);
            p[0] = 0x46;
            p[3] += 4;
            fix4(p);
        });
        self.except("no flow: options", router(), arrive(&options), Reason::IpOptions);
        self.except(
            "no flow: header checksum",
            router(),
            arrive(&with(good.clone(), |p| p[10] ^= 1)),
            Reason::BadChecksum,
        );
        for (mode, flag, reason) in [("strict", RP_STRICT, Reason::RpFilter), ("loose", RP_LOOSE, Reason::RpFilter)] {
            let arrives = (("172.16.0.9".parse().expect("an address"), 4000), arrives.1);
            let connection = super::flows::connection(arrives, leaves, TCP, Direction::Original);
            let filtered = move |world: &mut World| {
                accepted(connection, Direction::Original, IN, OUT)(world);
                world.flag(IN, flag);
            };
            let frame = arrive(&packet(arrives, TCP, ACK, &[]));
            self.except(format!("no flow: source refused, {mode}"), filtered, frame, reason);
        }
    }

    /// Which policies let flows pass: all that say something must.
    fn policies_of_flows(&mut self) {
        let flows = Some(Obstacle { reason: POLICY, flows: true });
        let strict = Some(Obstacle::new(Reason::PolicyTc));
        let other = Some(Obstacle { reason: Reason::PolicyConntrack, flows: true });
        for (family, six) in FAMILIES {
            let [_, _, _, (_, arrives, leaves)] = translations(six);
            let connection = connection(arrives, leaves, TCP, Direction::Original);
            let (before, after) = (packet(arrives, TCP, ACK, &[1]), packet(leaves, TCP, ACK, &[1]));
            let with_policies = |all: Option<Obstacle>, here: Option<Obstacle>, known: bool| {
                move |world: &mut World| {
                    if known {
                        accepted(connection, Direction::Original, IN, OUT)(world);
                    }
                    world.config().policy[usize::from(six)].store(Obstacle::word(all));
                    world.port(IN).ingress_policy[usize::from(six)].store(Obstacle::word(here));
                }
            };
            for (name, all, here) in [("everywhere", flows, None), ("here", None, flows), ("both", flows, other)] {
                let expect =
                    Expect::Forward { frame: forwarded(OUT, &[], &after), from: IN, to: OUT, device: OUT, hop: HOP };
                let name = format!("{family}, a policy that lets flows pass, {name}");
                let effect = Effect::Passed(Direction::Original, before.len());
                self.flow(name, with_policies(all, here, true), arrive(&before), expect, effect);
            }
            for (name, all, here) in [
                ("everywhere", strict, None),
                ("here", None, strict),
                ("here too", flows, strict),
                ("too", strict, flows),
            ] {
                let name = format!("{family}, a policy that lets nothing pass, {name}");
                self.except(name, with_policies(all, here, true), arrive(&before), Reason::PolicyTc);
            }
            let name = format!("{family}, a policy that lets flows pass, and there are none");
            self.except(name, with_policies(flows, None, false), arrive(&before), Reason::FlowNew);
            // Without a policy nothing is translated: Linux would not.
            let (to, frame) = (leaves, packet(leaves, TCP, ACK, &[1]));
            let connection = super::flows::connection(to, arrives, TCP, Direction::Original);
            let open = move |world: &mut World| {
                accepted(connection, Direction::Original, IN, OUT)(world);
                world.config().policy.iter().for_each(|policy| policy.store(0));
            };
            self.pass(format!("{family}, no policy, and a flow"), open, frame, 0);
        }
    }
}

impl World {
    /// Makes the connection the flow in record 0, of which nothing was accepted yet.
    pub(crate) fn add_flow(&mut self, connection: &Connection) {
        for (tuple, direction) in [(connection.original, DIRECTIONS[0]), (connection.reply, DIRECTIONS[1])] {
            let flow = &self.flows()[0];
            let (addresses, ports, kind, (lines, tag)) = match AnyKey::from(&tuple) {
                AnyKey::V4(key) => (key.addresses.to_vec(), key.ports, key.kind, key.place(0)),
                AnyKey::V6(key) => (key.addresses.to_vec(), key.ports, key.kind, key.place(0)),
            };
            flow.state.store(kind);
            flow.ports[direction as usize].store(ports);
            for (word, value) in flow.addresses[direction as usize].iter().zip(addresses) {
                word.store(value);
            }
            // The second line: the way there leads past the first.
            let line = &self.flow_lines()[lines[1] as usize % self.flow_lines().len()];
            let free = line.places.iter().rev().find(|place| place.load() == 0).expect("a free place");
            free.store(u64::from(tag) << 32 | u64::from(Found::new(0, direction).0));
        }
    }

    /// Lets the index lead to records that are not there.
    fn break_flow_index(&mut self) {
        for place in self.flow_lines().iter().flat_map(|line| &line.places).filter(|place| place.load() != 0) {
            place.store(place.load() & !0xffff_ffff | 10_000);
        }
    }
}
