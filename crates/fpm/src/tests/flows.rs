//! Connections: which are in the tables, when they pass, and which are in use.

use super::*;
use crate::idle::{AHEAD, PASS};
use proptest::prelude::*;
use std::time::{Duration, Instant};
use towpath_tables::flow::acceptance;
use towpath_tables::record::flow_state;
use towpath_tables::{Connection, Tuple};

/// Host `host` talks to a server by port `port`, and is seen there as `seen`.
fn connection(host: u8, port: u16, seen: u16) -> Connection {
    let server = ip("198.51.100.1");
    let protocol = if port.is_multiple_of(2) { 6 } else { 17 };
    let original = Tuple {
        source: [192, 0, 2, host].into(),
        destination: server,
        source_port: port,
        destination_port: 443,
        protocol,
    };
    let reply =
        Tuple { source: server, destination: ip("203.0.113.1"), source_port: 443, destination_port: seen, protocol };
    Connection::new(original, reply).expect("sound")
}

/// One that is seen as no other.
pub fn flow(host: u8, port: u16) -> Connection {
    connection(host, port, 10_000 + u16::from(host) * 256 + port % 256)
}

fn known(fpm: &TestFpm) -> BTreeSet<Connection> {
    fpm.tables().flows().map(|flow| flow.connection).collect()
}

fn is_closed(fpm: &TestFpm) -> bool {
    fpm.tables().view().config().flow_generation.load() & 1 == 1
}

fn rules(generation: Option<u32>) -> Policy {
    let (source, scope) = (PolicySource::Nftables, Scope::Family(Family::V4));
    Policy { flows: generation, ..Policy::new(source, scope, Reason::PolicyConntrack, "rules") }
}

const POLICIES: Snapshot = Snapshot::Policies(PolicySource::Nftables);
const LONG: Duration = Duration::from_secs(3600);

impl Fixture {
    fn with_rules(generation: u32) -> Self {
        let mut fixture = Self::new();
        fixture.snapshot(POLICIES, [Message::Policy(rules(Some(generation)))]);
        fixture
    }

    /// Opens for the rules told last; false if there is nothing to open for.
    fn open(&mut self) -> bool {
        let change = self.fpm.settled_flows(Instant::now() + LONG);
        change.into_iter().for_each(|change| self.fpm.open_flows(change));
        !is_closed(&self.fpm)
    }
}

#[test]
fn connections_come_and_go_at_once() {
    let mut fixture = Fixture::new();
    let [one, two, three] = [1, 2, 3].map(|host| flow(host, 1000));
    fixture.fpm.apply(Message::Flow(one));
    fixture.fpm.apply(Message::Flow(two));
    assert_eq!(known(&fixture.fpm), [one, two].into());
    fixture.fpm.apply(Message::FlowDelete(one.original));
    fixture.fpm.apply(Message::FlowDelete(three.original));
    fixture.fpm.apply(Message::FlowDelete(two.reply));
    assert_eq!(known(&fixture.fpm), [two].into(), "a connection goes by its original tuple");
    // Of another's addresses is another connection.
    let moved = connection(2, 1000, 1001);
    fixture.fpm.apply(Message::Flow(moved));
    assert_eq!(known(&fixture.fpm), [moved].into());
}

#[test]
fn the_routers_own_connections_are_not_taken() {
    let mut fixture = Fixture::new();
    let there = flow(1, 1000);
    let back = Connection::new(there.reply, there.original).expect("sound");
    let own = Address { ifindex: 9, address: there.original.source, prefix_len: 24 };
    for taken in [there, back] {
        fixture.fpm.apply(Message::Flow(taken));
        assert_eq!(known(&fixture.fpm), [taken].into());
        // On two interfaces, and gone from one of them.
        [3, 9].into_iter().for_each(|ifindex| fixture.fpm.apply(Message::Address(Address { ifindex, ..own })));
        fixture.fpm.apply(Message::AddressDelete(Address { ifindex: 3, ..own }));
        fixture.fpm.apply(Message::Flow(taken));
        assert_eq!(known(&fixture.fpm), BTreeSet::new());
        fixture.fpm.apply(Message::AddressDelete(own));
    }
    // An address that packets are translated to is no end.
    fixture.fpm.apply(Message::Address(Address { address: there.reply.destination, ..own }));
    fixture.fpm.apply(Message::Flow(there));
    assert_eq!(known(&fixture.fpm), [there].into());
}

#[test]
fn a_description_ends_what_it_does_not_mention() {
    let mut fixture = Fixture::new();
    let [one, two, three, four] = [1, 2, 3, 4].map(|host| flow(host, 1000));
    [one, two, three].into_iter().for_each(|flow| fixture.fpm.apply(Message::Flow(flow)));
    fixture.fpm.apply(Message::SnapshotEnd(Snapshot::Flows));
    assert_eq!(known(&fixture.fpm), [one, two, three].into(), "an end without a begin");
    fixture.fpm.apply(Message::SnapshotBegin(Snapshot::Flows));
    fixture.fpm.apply(Message::Flow(one));
    // A description that starts over says all of it again.
    fixture.fpm.apply(Message::SnapshotBegin(Snapshot::Flows));
    [two, four].into_iter().for_each(|flow| fixture.fpm.apply(Message::Flow(flow)));
    assert_eq!(known(&fixture.fpm), [one, two, three, four].into());
    fixture.fpm.apply(Message::SnapshotEnd(Snapshot::Flows));
    assert_eq!(known(&fixture.fpm), [two, four].into());
    assert!(fixture.fpm.is_complete(), "nobody waits for connections");
}

#[test]
fn what_finds_no_room_is_counted() {
    let mut fixture = Fixture::new();
    let room = fixture.fpm.tables().view().flows().len() as u64;
    let many = |count: u64| (0..count).map(|n| Message::Flow(flow(1 + (n / 250) as u8, 1000 + (n % 250) as u16)));
    many(room + 5).for_each(|message| fixture.fpm.apply(message));
    assert_eq!(fixture.fpm.refused_flows(), Refused { total: 5, full: true });
    assert_eq!(known(&fixture.fpm).len() as u64, room);
    fixture.fpm.apply(Message::FlowDelete(flow(1, 1000).original));
    assert_eq!(fixture.fpm.refused_flows(), Refused { total: 5, full: false });
}

#[test]
fn new_rules_stop_connections_at_once() {
    let mut fixture = Fixture::with_rules(1);
    assert!(is_closed(&fixture.fpm));
    assert!(fixture.open());
    // A change of something else.
    fixture.batch([policy(Scope::Egress(2, None), Reason::PolicyTc)]);
    assert!(!is_closed(&fixture.fpm));
    // By an alarm, which goes ahead of the snapshot that tells the same.
    let id = AlarmId { source: PolicySource::Nftables, number: 1 };
    fixture.batch([Message::Alarm(Alarm { id, policies: vec![rules(Some(2))] })]);
    assert!(is_closed(&fixture.fpm));
    assert!(!fixture.open(), "what Linux told before is still to come");
    fixture.snapshot(POLICIES, [Message::Policy(rules(Some(2)))]);
    let change = fixture.fpm.settled_flows(Instant::now() + LONG).expect("to be opened again");
    fixture.batch([Message::AlarmOver(id)]);
    fixture.fpm.open_flows(change);
    assert!(!is_closed(&fixture.fpm), "the end of the alarm told nothing new");
    // The rules change while somebody waits.
    fixture.snapshot(POLICIES, [Message::Policy(rules(Some(3)))]);
    let change = fixture.fpm.settled_flows(Instant::now() + LONG).expect("to be opened again");
    fixture.snapshot(POLICIES, [Message::Policy(rules(Some(4)))]);
    fixture.fpm.open_flows(change);
    assert!(is_closed(&fixture.fpm), "of other rules");
    assert!(fixture.open());
    // Without rules there is nothing to pass.
    fixture.snapshot(POLICIES, []);
    assert!(is_closed(&fixture.fpm) && !fixture.open());
}

#[test]
fn what_was_accepted_beside_a_policy_that_goes_does_not_count() {
    let mut fixture = Fixture::with_rules(1);
    let passed = || Message::Policy(rules(Some(1)));
    let held = || Message::Policy(Policy { detail: "held".into(), ..rules(None) });
    fixture.snapshot(POLICIES, [passed(), held()]);
    assert!(fixture.open());
    let id = AlarmId { source: PolicySource::Nftables, number: 1 };
    let Message::Policy(policy) = held() else { unreachable!() };
    fixture.batch([Message::Alarm(Alarm { id, policies: vec![policy] }), Message::AlarmOver(id)]);
    assert!(!is_closed(&fixture.fpm), "it is still there");
    fixture.snapshot(POLICIES, [passed()]);
    assert!(is_closed(&fixture.fpm));
    assert!(fixture.open());
}

#[test]
fn what_no_connection_passes_is_told_from_what_they_do() {
    let mut fixture = Fixture::with_rules(1);
    assert!(fixture.open());
    let connection = flow(1, 1000);
    fixture.fpm.apply(Message::Flow(connection));
    let slot = |fixture: &Fixture, ifindex: u32| {
        fixture.fpm.ports().find(|state| state.port.ifindex == ifindex).expect("a port").slot
    };
    let [one, two] = [1, 2].map(|ifindex| slot(&fixture, ifindex));
    let told = |fixture: &Fixture| {
        let states = fixture.fpm.tables().flow_states(fixture.fpm.passes());
        assert_eq!((states.fast + states.waiting, states.closed), (1, 0));
        states.fast == 1
    };
    let held = |scope| Policy::new(PolicySource::Xfrm, scope, Reason::PolicyXfrm, "held");
    let xfrm = Snapshot::Policies(PolicySource::Xfrm);
    let (v4, v6) = (Some(Family::V4), Some(Family::V6));
    for (scope, passes) in [
        (Scope::Family(Family::V4), false),
        (Scope::Family(Family::V6), true),
        (Scope::Ingress(1, None), false),
        (Scope::Ingress(1, v6), true),
        (Scope::Ingress(2, None), true),
        (Scope::Egress(2, v4), false),
        (Scope::Egress(1, None), true),
    ] {
        let view = fixture.fpm.tables().view();
        view.flows()[0].accepted[0].store(acceptance(view.config().flow_generation.load(), one, two));
        assert!(told(&fixture));
        fixture.snapshot(xfrm, [Message::Policy(held(scope))]);
        assert!(!is_closed(&fixture.fpm), "the rules are the same");
        assert_eq!(told(&fixture), passes, "{scope:?}");
        fixture.snapshot(xfrm, []);
        assert!(fixture.open() && !told(&fixture), "it is to be accepted anew");
    }
}

#[test]
fn nothing_passes_while_neighbours_are_read_anew() {
    for family in Family::ALL {
        let mut fixture = Fixture::with_rules(1);
        assert!(fixture.open());
        fixture.batch([Message::SnapshotBegin(Snapshot::Neighbours(family))]);
        assert!(is_closed(&fixture.fpm) && !fixture.open());
        fixture.batch([policy(Scope::Egress(2, None), Reason::PolicyTc)]);
        assert!(!fixture.open());
        fixture.batch([Message::SnapshotEnd(Snapshot::Neighbours(family))]);
        assert!(is_closed(&fixture.fpm));
        assert!(fixture.open());
    }
}

#[test]
fn nothing_passes_where_nobody_would_see_rules_change() {
    let mut fixture = Fixture::with_rules(1);
    assert!(fixture.open());
    fixture.fpm.follow_rules(false);
    fixture.batch([]);
    assert!(is_closed(&fixture.fpm) && !fixture.open());
    fixture.batch([policy(Scope::Egress(2, None), Reason::PolicyTc)]);
    assert!(is_closed(&fixture.fpm) && !fixture.open());
    fixture.fpm.follow_rules(true);
    fixture.batch([]);
    assert!(is_closed(&fixture.fpm), "those of before may be others now");
    assert!(fixture.open());
    fixture.fpm.follow_rules(true);
    fixture.batch([]);
    assert!(!is_closed(&fixture.fpm));
}

/// A manager with two connections that Linux has accepted, one of TCP and one of UDP, and a time to look at them.
struct Used {
    fixture: Fixture,
    flows: [Connection; 2],
    now: Instant,
    /// Of which Linux was told that they are ahead
    ahead: Vec<Tuple>,
}

const TIMEOUTS: Timeouts = Timeouts { tcp: Duration::from_secs(40), udp: Duration::from_secs(20) };

impl Used {
    fn new() -> Self {
        let (mut fixture, flows) = (Fixture::with_rules(1), [flow(1, 1000), flow(2, 1001)]);
        fixture.open();
        fixture.fpm.set_flow_timeouts(TIMEOUTS);
        flows.into_iter().for_each(|flow| fixture.fpm.apply(Message::Flow(flow)));
        let mut used = Self { fixture, flows, now: Instant::now(), ahead: Vec::new() };
        used.accept();
        used.pass(Duration::from_secs(2), [0, 0]);
        used
    }

    fn index(&self, flow: usize) -> usize {
        let wanted = self.flows[flow];
        self.fixture.fpm.tables().flows().find(|flow| flow.connection == wanted).expect("known").index as usize
    }

    /// Linux accepts a packet of each.
    fn accept(&mut self) {
        let view = self.fixture.fpm.tables().view();
        let generation = view.config().flow_generation.load();
        for flow in [0, 1] {
            view.flows()[self.index(flow)].accepted[0].store(acceptance(generation, 1, 2));
        }
    }

    fn accepted(&self) -> [bool; 2] {
        [0, 1].map(|flow| {
            let index = self.index(flow) as u32;
            let found = self.fixture.fpm.tables().flows().find(|flow| flow.index == index).expect("known");
            found.accepted[0].is_some()
        })
    }

    /// Lets time pass, in which each connection has so many packets a second; how often Linux is told of each.
    fn pass(&mut self, time: Duration, packets: [u64; 2]) -> [usize; 2] {
        let (end, mut second, mut told) = (self.now + time, self.now, Vec::new());
        while self.now < end {
            if self.now >= second {
                second += Duration::from_secs(1);
                let view = self.fixture.fpm.tables().view();
                for flow in [0, 1] {
                    view.flows()[self.index(flow)].counters[flow].packets.add(packets[flow]);
                }
            }
            let Told { used, ahead } = self.fixture.fpm.take_used_flows(self.now);
            told.extend(used);
            self.ahead.extend(ahead);
            self.now += Duration::from_millis(50);
        }
        self.flows.map(|flow| told.iter().filter(|told| **told == flow.original).count())
    }
}

#[test]
fn linux_is_told_of_connections_in_use_before_it_forgets_them() {
    let mut used = Used::new();
    let told = used.pass(Duration::from_secs(120), [5, 1]);
    assert!((9..13).contains(&told[0]) && (16..25).contains(&told[1]), "every quarter of a timeout: {told:?}");
    assert_eq!(used.accepted(), [true; 2]);
    assert_eq!(used.pass(Duration::from_secs(10), [0, 0]), [1, 1], "what it was not told yet");
    assert_eq!(used.pass(Duration::from_secs(120), [0, 0]), [0, 0]);
}

#[test]
fn idle_connections_are_linuxs_before_it_forgets_them() {
    let mut used = Used::new();
    used.pass(Duration::from_secs(10), [1, 1]);
    used.pass(Duration::from_secs(15), [1, 0]);
    assert_eq!(used.accepted(), [true, true]);
    used.pass(Duration::from_secs(4), [1, 0]);
    assert_eq!(used.accepted(), [true, false]);
    assert_eq!(known(&used.fixture.fpm).len(), 2, "it is Linux that forgets");
    // Linux accepts another packet: it may be fast again, for no longer than that.
    used.accept();
    used.pass(Duration::from_secs(11), [1, 0]);
    assert_eq!(used.accepted(), [true, true]);
    used.pass(Duration::from_secs(9), [0, 0]);
    assert_eq!(used.accepted(), [true, false]);
    used.pass(Duration::from_secs(30), [0, 0]);
    assert_eq!(used.accepted(), [false, false]);
}

#[test]
fn linux_is_not_told_of_connections_that_it_ends() {
    let mut used = Used::new();
    let close = |used: &Used| used.fixture.fpm.tables().view().flows()[used.index(0)].state.set(flow_state::CLOSED);
    close(&used);
    assert_eq!(used.pass(Duration::from_secs(30), [1, 0]), [0, 0]);
    assert_eq!(used.pass(Duration::from_secs(3), [0, 0]), [0, 0]);
    // Described again, it is as any other.
    used.fixture.fpm.apply(Message::Flow(used.flows[0]));
    assert_eq!(used.pass(Duration::from_secs(3), [0, 0]), [0, 0]);
    assert_eq!(used.pass(Duration::from_secs(3), [1, 0]), [1, 0]);
}

#[test]
fn what_became_another_connection_is_looked_at_as_such() {
    let mut used = Used::new();
    used.pass(Duration::from_secs(15), [1, 0]);
    let old = used.flows[0];
    used.fixture.fpm.apply(Message::FlowDelete(old.original));
    used.fixture.fpm.tables_mut().reclaim();
    used.flows[0] = flow(3, 1002);
    used.fixture.fpm.apply(Message::Flow(used.flows[0]));
    used.accept();
    assert_eq!(used.pass(Duration::from_secs(8), [0, 0]), [0, 0], "counters that begin anew are no packets");
    // Every quarter of 40 s.
    assert_eq!(used.pass(Duration::from_secs(24), [1, 0])[0], 3);
}

#[test]
fn linux_is_told_once_of_a_tcp_connection_that_is_ahead_of_it() {
    let mut used = Used::new();
    let carry = |used: &Used, bytes| {
        let view = used.fixture.fpm.tables().view();
        [0, 1].into_iter().for_each(|flow| view.flows()[used.index(flow)].counters[1].bytes.add(bytes));
    };
    carry(&used, AHEAD - 1);
    used.pass(Duration::from_secs(4), [1, 1]);
    used.pass(Duration::from_secs(4), [0, 0]);
    assert_eq!(used.ahead, []);
    carry(&used, 1);
    used.pass(Duration::from_secs(4), [0, 0]);
    assert_eq!(used.ahead, [], "without a packet it is where it was");
    used.pass(Duration::from_secs(4), [1, 1]);
    assert_eq!(used.ahead, [used.flows[0].original]);
    used.pass(Duration::from_secs(70), [1, 1]);
    assert_eq!(used.ahead.len(), 1);
}

#[test]
fn nothing_is_looked_at_without_connections() {
    let mut fixture = Fixture::with_rules(1);
    assert!(fixture.open());
    assert_eq!(fixture.fpm.flows_due(), None);
    fixture.fpm.apply(Message::Flow(flow(1, 1000)));
    assert!(fixture.fpm.flows_due().is_some());
    fixture.fpm.apply(Message::FlowDelete(flow(1, 1000).original));
    assert_eq!(fixture.fpm.flows_due(), None);
}

#[derive(Clone, Debug)]
enum Step {
    Set(Connection),
    Remove(Tuple),
    Close(Connection),
    Describe(Vec<Connection>),
}

fn a_connection() -> impl Strategy<Value = Connection> {
    // Several may be seen as the same, and one in several ways: then only one can be.
    (1u8..5, 1000u16..1003, 2000u16..2005).prop_map(|(host, port, seen)| connection(host, port, seen))
}

fn a_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => a_connection().prop_map(Step::Set),
        2 => a_connection().prop_map(|connection| Step::Remove(connection.original)),
        1 => a_connection().prop_map(Step::Close),
        1 => prop::collection::vec(a_connection(), 0..6).prop_map(Step::Describe),
    ]
}

/// The dumb reference: connections, and whether packets that end them were seen.
#[derive(Default)]
struct Reference(BTreeMap<Connection, bool>);

impl Reference {
    fn set(&mut self, new: Connection) {
        let tuples = |connection: &Connection| [connection.original, connection.reply];
        self.0.retain(|old, _| *old == new || !tuples(old).iter().any(|tuple| tuples(&new).contains(tuple)));
        self.0.insert(new, false);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn connections_are_those_that_were_told(steps in prop::collection::vec(a_step(), 1..60)) {
        let (mut fpm, mut reference) = (Fixture::new().fpm, Reference::default());
        for step in steps {
            match step {
                Step::Set(connection) => {
                    reference.set(connection);
                    fpm.apply(Message::Flow(connection));
                }
                Step::Remove(original) => {
                    reference.0.retain(|connection, _| connection.original != original);
                    fpm.apply(Message::FlowDelete(original));
                }
                Step::Close(connection) => {
                    if let Some(closed) = reference.0.get_mut(&connection) {
                        *closed = true;
                        let found = fpm.tables().flows().find(|flow| flow.connection == connection).expect("known");
                        fpm.tables().view().flows()[found.index as usize].state.set(flow_state::CLOSED);
                    }
                }
                Step::Describe(connections) => {
                    fpm.apply(Message::SnapshotBegin(Snapshot::Flows));
                    connections.iter().for_each(|connection| fpm.apply(Message::Flow(*connection)));
                    fpm.apply(Message::SnapshotEnd(Snapshot::Flows));
                    connections.iter().for_each(|connection| reference.set(*connection));
                    let mentioned: BTreeSet<_> = connections.iter().map(|connection| connection.original).collect();
                    reference.0.retain(|connection, _| mentioned.contains(&connection.original));
                }
            }
            fpm.tables_mut().reclaim();
            let now: BTreeMap<_, _> = fpm.tables().flows().map(|flow| (flow.connection, flow.closed)).collect();
            prop_assert_eq!(&now, &reference.0);
        }
    }
}

/// What looking at a million connections takes. Run with `--ignored --nocapture` to see figures.
#[test]
#[ignore = "wants a release build; prints figures"]
fn a_million_connections() {
    const COUNT: u32 = 1_000_000;
    let tables = TableWriter::create(HeapBacking::new(initial_elements(1).with_flows(COUNT as usize)), NoReaders);
    let mut fpm = Fixture::unfinished(tables.unwrap()).fpm;
    let busy = || -> Duration {
        let times = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        Duration::from_nanos(times.split(' ').next().unwrap().parse().unwrap())
    };
    let many = || {
        (0..COUNT).map(|n| {
            let mut connection = flow(1, 1000 + (n % 2) as u16);
            connection.original.source = std::net::Ipv4Addr::from_bits(0x0a00_0000 + n).into();
            connection.reply.destination = connection.original.source;
            connection
        })
    };
    let start = busy();
    many().for_each(|connection| fpm.apply(Message::Flow(connection)));
    println!("told: {:?} each; {:?} refused", (busy() - start) / COUNT, fpm.refused_flows());
    let mut now = Instant::now();
    for (what, packets) in [("idle", 0), ("in use", 1), ("in use", 1)] {
        fpm.tables().view().flows().iter().for_each(|flow| flow.counters[0].packets.add(packets));
        let (start, end, mut used) = (busy(), now + PASS, 0);
        while now < end {
            used += fpm.take_used_flows(now).used.len();
            now += Duration::from_millis(50);
        }
        let share = (busy() - start).as_secs_f64() / PASS.as_secs_f64();
        println!("{what}: {:.2} % of a core, {used} told", 100.0 * share);
    }
    let start = busy();
    fpm.apply(Message::SnapshotBegin(Snapshot::Flows));
    many().for_each(|connection| fpm.apply(Message::Flow(connection)));
    let described = busy();
    fpm.apply(Message::SnapshotEnd(Snapshot::Flows));
    println!("described again: {:?} each, and {:?} at the end", (described - start) / COUNT, busy() - described);
}
