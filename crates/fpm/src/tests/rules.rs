//! Rules: roots of their own, led to by port and by source.

use super::*;
use towpath_tables::record::{BY_SOURCE, PORT_SLOTS};

const POLICIES: Snapshot = Snapshot::Policies(PolicySource::Rules);
const ELSEWHERE: &str = "10.1.1.1";

fn lookup(iif: Option<&str>, from: Option<&str>, table: u32) -> Rule {
    let from = from.map(prefix);
    Rule { priority: 0, iif: iif.map(str::to_owned), from, to: None, by_mark: false, action: RuleAction::Lookup(table) }
}

/// The usual rules with others between local and main.
fn rules(others: impl IntoIterator<Item = Rule>) -> Policy {
    let all = [lookup(None, None, 255)].into_iter().chain(others).chain([lookup(None, None, 254)]);
    Policy {
        source: PolicySource::Rules,
        scope: Scope::Family(Family::V4),
        reason: Reason::PolicyRule,
        detail: "rules".into(),
        filter: None,
        flows: None,
        in_vrfs: InVrfs::Stay,
        rules: Some(all.collect()),
        momentary: false,
    }
}

fn in_table(table: u32, mut route: Route) -> Message {
    route.key.table = table;
    Message::Route(route)
}

fn by_1() -> Outcome {
    forward(1, 1, 1500, 0x11, &[])
}

impl Fixture {
    fn root(&self, ifindex: u32) -> u32 {
        let slot = self.fpm.ports().find(|port| port.port.ifindex == ifindex).unwrap().slot;
        self.fpm.tables().view().ports()[slot as usize].root[0].load()
    }

    /// The root for a source that is in the n-th prefix of a port's list, or in none.
    fn root_by(&self, ifindex: u32, place: Option<usize>) -> u32 {
        let list = self.root(ifindex);
        assert_ne!(list & BY_SOURCE, 0);
        let view = self.fpm.tables().view();
        let list = &view.sources()[(list & !BY_SOURCE) as usize];
        place.map_or(&list.root, |place| &list.prefixes[place].root).load()
    }

    #[track_caller]
    fn leads(&self, root: u32, address: &str, expected: Outcome) {
        let found: BTreeSet<_> = shares_in(&self.fpm.tables().view(), root, ip(address)).into_keys().collect();
        assert_eq!(found, [expected].into(), "{address}");
    }

    fn policy_word(&self) -> u32 {
        self.fpm.tables().view().config().policy[0].load()
    }
}

#[test]
fn a_rule_for_an_interface_leads_its_port_to_a_root_of_its_own() {
    let mut fixture = Fixture::new();
    fixture.batch([
        in_table(100, route("203.0.113.0/24", &[hop(1, Some("192.0.2.1"))])),
        in_table(100, route("203.0.113.128/25", &[hop(2, Some("198.51.100.1"))])),
        Message::Route(route("203.0.113.64/26", &[hop(2, Some("198.51.100.1"))])),
        Message::Route(route("10.0.0.0/8", &[hop(2, Some("198.51.100.1"))])),
    ]);
    fixture.snapshot(POLICIES, [Message::Policy(rules([lookup(Some("eth1"), None, 100)]))]);
    assert_eq!((fixture.policy_word(), fixture.fpm.policies().count()), (0, 0));
    assert_eq!(fixture.root(2), MAIN_ROOT[0]);
    let root = fixture.root(1);
    assert!(!MAIN_ROOT.contains(&root));
    // The table goes before what is longer in main; where it has nothing, main decides.
    fixture.leads(root, "203.0.113.7", by_1());
    fixture.leads(root, "203.0.113.70", by_1());
    fixture.leads(root, "203.0.113.130", via_2());
    fixture.leads(root, ELSEWHERE, via_2());
    fixture.leads(root, "192.0.2.1", by_1());
    fixture.expect("203.0.113.7", via_2());
    // Routes and neighbours of either table change there.
    fixture.batch([neighbour(1, "192.0.2.2", Some(0x12)), Message::RouteDelete(key("10.0.0.0/8"))]);
    fixture.leads(root, "192.0.2.2", forward(1, 1, 1500, 0x12, &[]));
    fixture.leads(root, ELSEWHERE, Outcome::Exception(Reason::NoRoute));
    fixture.batch([Message::RouteDelete(RouteKey { table: 100, ..key("203.0.113.0/24") })]);
    fixture.leads(root, "203.0.113.7", via_2());
    fixture.snapshot(POLICIES, []);
    assert_eq!(fixture.root(1), MAIN_ROOT[0]);
    fixture.fpm.tables_mut().reclaim();
    assert_eq!(fixture.fpm.tables().roots().count(), 2);
}

#[test]
fn rules_for_sources_make_a_list() {
    let mut fixture = Fixture::new();
    fixture.batch([in_table(7, route("0.0.0.0/0", &[hop(1, Some("192.0.2.1"))]))]);
    let others = [lookup(None, Some("10.1.0.0/16"), 9), lookup(None, Some("10.0.0.0/8"), 7)];
    fixture.snapshot(POLICIES, [Message::Policy(rules(others))]);
    for ifindex in [1, 2] {
        assert_eq!(fixture.root_by(ifindex, None), MAIN_ROOT[0]);
        for place in 0..2 {
            fixture.leads(fixture.root_by(ifindex, Some(place)), VIA_2, by_1());
        }
        assert_ne!(fixture.root_by(ifindex, Some(0)), fixture.root_by(ifindex, Some(1)));
    }
    fixture.batch([in_table(9, route("203.0.113.0/24", &[hop(2, Some("198.51.100.1"))]))]);
    fixture.leads(fixture.root_by(1, Some(0)), VIA_2, by_1());
    fixture.leads(fixture.root_by(1, Some(1)), VIA_2, via_2());
}

#[test]
fn what_is_not_repeated_stays_linuxs() {
    let mut fixture = Fixture::new();
    let mut to = lookup(None, None, 100);
    to.to = Some(prefix("203.0.113.0/28"));
    let unknown = Rule { action: RuleAction::Unknown, ..lookup(Some("eth2"), None, 0) };
    fixture.snapshot(POLICIES, [Message::Policy(rules([to, unknown]))]);
    let root = fixture.root(1);
    fixture.leads(root, "203.0.113.7", Outcome::Exception(Reason::PolicyRule));
    fixture.leads(root, "203.0.113.70", via_2());
    fixture.leads(fixture.root(2), "203.0.113.70", Outcome::Exception(Reason::PolicyRule));
    let many = (0..9).map(|n| lookup(None, Some(&format!("10.{n}.0.0/16")), 100));
    fixture.snapshot(POLICIES, [Message::Policy(rules(many))]);
    assert_eq!(enters(&fixture, 1), Some(Reason::PolicyRule));
    assert_eq!(fixture.fpm.policies().count(), 1);
    assert_eq!(fixture.fpm.leads_to(ip(VIA_2)).err(), Some(Reason::PolicyRule));
    fixture.snapshot(POLICIES, []);
    assert_eq!(enters(&fixture, 1), None);
    assert_eq!(fixture.fpm.policies().count(), 0);
}

#[test]
fn rules_by_mark_are_for_packets_without_one() {
    let mut fixture = Fixture::new();
    fixture.batch([in_table(100, route("203.0.113.0/24", &[hop(1, Some("192.0.2.1"))]))]);
    let asks = |action| Rule { by_mark: true, action, ..lookup(None, None, 0) };
    [1, 2].into_iter().for_each(|ifindex| fixture.fpm.set_unmarked(ifindex, true));
    fixture.snapshot(POLICIES, [Message::Policy(rules([asks(RuleAction::Skip)]))]);
    assert_eq!((fixture.policy_word(), fixture.fpm.policies().count()), (0, 0));
    assert_eq!([1, 2].map(|ifindex| fixture.root(ifindex)), [MAIN_ROOT[0]; 2]);
    fixture.snapshot(POLICIES, [Message::Policy(rules([asks(RuleAction::Lookup(100))]))]);
    fixture.leads(fixture.root(1), VIA_2, by_1());
    // Where packets may have one, it is not known what the rules say.
    fixture.fpm.set_unmarked(2, false);
    fixture.fpm.publish().expect("a change");
    assert_eq!([1, 2].map(|ifindex| enters(&fixture, ifindex)), [None, Some(Reason::PolicyRule)]);
    assert_eq!(fixture.fpm.policies().count(), 1, "it is told");
    fixture.snapshot(POLICIES, []);
    assert_eq!(enters(&fixture, 2), None);
}

#[test]
fn no_connection_passes_where_rules_ask_for_marks() {
    let mut fixture = Fixture::new();
    [1, 2].into_iter().for_each(|ifindex| fixture.fpm.set_unmarked(ifindex, true));
    let reason = Reason::PolicyNetfilter;
    let passed = Policy { source: PolicySource::Nftables, reason, flows: Some(5), rules: None, ..rules([]) };
    fixture.snapshot(Snapshot::Policies(PolicySource::Nftables), [Message::Policy(passed)]);
    let word = |flows| Obstacle::word(Some(Obstacle { reason, flows }));
    assert_eq!(fixture.policy_word(), word(true));
    let skip = Rule { by_mark: true, action: RuleAction::Skip, ..lookup(None, None, 0) };
    fixture.snapshot(POLICIES, [Message::Policy(rules([skip]))]);
    assert_eq!(fixture.policy_word(), word(false));
    assert_eq!(fixture.fpm.policies().count(), 2, "the rules are told, since connections stay in Linux");
    assert_eq!(fixture.fpm.tables().view().config().flow_generation.load() & 1, 1, "closed");
    fixture.snapshot(POLICIES, []);
    assert_eq!(fixture.policy_word(), word(true));
}

#[test]
fn a_port_in_a_vrf_is_led_by_its_table() {
    let mut fixture = Fixture::new();
    let red = Vrf { ifindex: 9, name: "red".into(), table: 10 };
    let in_red = |ifindex| Port { vrf: Some(red.clone()), ..port(ifindex) };
    let l3mdev = Rule { action: RuleAction::Vrf, ..lookup(None, None, 0) };
    fixture.batch([in_table(10, route("203.0.113.0/24", &[hop(1, Some("192.0.2.1"))]))]);
    fixture.snapshot(POLICIES, [Message::Policy(rules([l3mdev.clone()]))]);
    assert_eq!([1, 2].map(|ifindex| fixture.root(ifindex)), [MAIN_ROOT[0]; 2]);
    fixture.batch([Message::Port(in_red(1))]);
    let slot = |fixture: &Fixture, ifindex| {
        let slot = fixture.fpm.ports().find(|port| port.port.ifindex == ifindex).unwrap().slot;
        fixture.fpm.tables().view().ports()[slot as usize].flags.load()
    };
    assert_eq!([1, 2].map(|ifindex| slot(&fixture, ifindex) & port_flags::VRF != 0), [true, false]);
    assert_ne!(slot(&fixture, 1) & port_flags::READY, 0);
    fixture.leads(fixture.root(1), "203.0.113.7", by_1());
    fixture.expect("203.0.113.7", via_2());
    // What is about the VRF is about its ports.
    let capture = Policy {
        source: PolicySource::Capture,
        scope: Scope::Ingress(9, None),
        reason: Reason::PolicyCapture,
        rules: None,
        ..rules([])
    };
    let captures = Snapshot::Policies(PolicySource::Capture);
    fixture.snapshot(captures, [Message::Policy(capture)]);
    assert_eq!([1, 2].map(|ifindex| enters(&fixture, ifindex)), [Some(Reason::PolicyCapture), None]);
    fixture.snapshot(captures, []);
    assert_eq!(enters(&fixture, 1), None);
    // Rules by which the way back cannot be told are not repeated.
    fixture.snapshot(POLICIES, [Message::Policy(rules([l3mdev, lookup(Some("red"), None, 100)]))]);
    assert_eq!([1, 2].map(|ifindex| enters(&fixture, ifindex)), [Some(Reason::PolicyRule), None]);
    // Without a rule the VRF's table counts for nothing.
    fixture.snapshot(POLICIES, []);
    assert_eq!((fixture.root(1), enters(&fixture, 1)), (MAIN_ROOT[0], None));
}

#[test]
fn connections_in_a_vrf_pass_rules_that_do_not_tell_its_ports_apart() {
    let mut fixture = Fixture::new();
    let vrf = |ifindex, name: &str| Some(Vrf { ifindex, name: name.into(), table: 10 });
    fixture.batch([1, 2].map(|ifindex| Message::Port(Port { vrf: vrf(9, "red"), ..port(ifindex) })));
    let reason = Reason::PolicyNetfilter;
    let nftables = Snapshot::Policies(PolicySource::Nftables);
    let passed = |in_vrfs, generation| {
        let policy =
            Policy { source: PolicySource::Nftables, reason, flows: Some(generation), rules: None, ..rules([]) };
        Message::Policy(Policy { in_vrfs, ..policy })
    };
    let record = |fixture: &Fixture, ifindex| {
        let slot = fixture.fpm.tables().ports().find(|(_, of)| *of == ifindex).unwrap().0;
        let port = &fixture.fpm.tables().view().ports()[slot as usize];
        (port.vrf.load(), port.arrival.each_ref().map(|number| number.load()))
    };
    fixture.snapshot(nftables, [passed(InVrfs::ByVrf, 5)]);
    assert_eq!([1, 2].map(|ifindex| enters(&fixture, ifindex)), [None; 2]);
    assert_eq!([1, 2].map(|ifindex| record(&fixture, ifindex)), [(9, [PORT_SLOTS, 0]); 2], "of one family");
    fixture.batch([Message::Port(Port { vrf: vrf(8, "blue"), ..port(2) })]);
    assert_eq!([1, 2].map(|ifindex| record(&fixture, ifindex).1[0]), [PORT_SLOTS, PORT_SLOTS + 1]);
    // A flowtable's packets have their port yet.
    fixture.snapshot(nftables, [passed(InVrfs::ByPort, 6)]);
    assert_eq!([1, 2].map(|ifindex| (enters(&fixture, ifindex), record(&fixture, ifindex))), [(None, (0, [0; 2])); 2]);
    // One policy that knows of no such packets is enough.
    fixture.snapshot(nftables, [passed(InVrfs::ByVrf, 7), passed(InVrfs::Stay, 7)]);
    assert_eq!(
        [1, 2].map(|ifindex| (enters(&fixture, ifindex), record(&fixture, ifindex))),
        [(Some(reason), (0, [0; 2])); 2]
    );
    assert_eq!(fixture.policy_word(), Obstacle::word(Some(Obstacle { reason, flows: true })));
    fixture.batch([Message::Port(port(1))]);
    assert_eq!((enters(&fixture, 1), record(&fixture, 1)), (None, (0, [0; 2])), "out of it");
    fixture.snapshot(nftables, []);
    assert_eq!(enters(&fixture, 2), None);
}

#[test]
fn new_rules_stop_the_family_until_they_are_repeated() {
    let mut fixture = Fixture::new();
    let new = rules([lookup(None, Some("10.0.0.0/8"), 100)]);
    let id = AlarmId { source: PolicySource::Rules, number: 1 };
    fixture.batch([Message::Alarm(Alarm { id, policies: vec![new.clone()] })]);
    assert_eq!(fixture.policy_word(), 1 + Reason::PolicyRule as u32);
    fixture.snapshot(POLICIES, [Message::Policy(new)]).batch([Message::AlarmOver(id)]);
    assert_eq!(fixture.policy_word(), 0);
    assert_ne!(fixture.root(1), MAIN_ROOT[0]);
    // A port that comes by this name is led by its rules, too.
    let named = Port { name: "wan".into(), ..port(2) };
    let other = rules([lookup(Some("wan"), None, 100)]);
    fixture.snapshot(POLICIES, [Message::Policy(other)]);
    assert_eq!([1, 2].map(|ifindex| fixture.root(ifindex)), [MAIN_ROOT[0]; 2]);
    fixture.batch([Message::Port(named)]);
    assert_ne!(fixture.root(2), MAIN_ROOT[0]);
    assert_eq!(enters(&fixture, 2), None);
}

#[test]
fn a_root_is_filled_piece_by_piece() {
    let mut fixture = Fixture::new();
    fixture.fpm.apply(Message::SnapshotBegin(POLICIES));
    fixture.fpm.apply(Message::Policy(rules([lookup(Some("eth1"), None, 100)])));
    fixture.fpm.apply(Message::SnapshotEnd(POLICIES));
    let mut pieces = 0;
    while !matches!(fixture.fpm.publish_while(|| false), Progress::Done(_)) {
        let root = fixture.root(1);
        assert!(root == MAIN_ROOT[0] || enters(&fixture, 1).is_some() || fixture.policy_word() == 0);
        pieces += 1;
        assert!(pieces < 200_000);
    }
    assert!(pieces > 3);
    fixture.leads(fixture.root(1), VIA_2, via_2());
    assert_eq!(fixture.policy_word(), 0);
}
