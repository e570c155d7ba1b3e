//! CM against the real kernel. Each test has a network namespace of its own:
//!
//!     v0 (192.0.2.1/24, 2001:db8::1/64) ---- p0       v1 (198.51.100.1/24, 2001:db8:1::1/64) ---- p1

mod support;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use support::*;
use towpath_cm::{Cm, CmError, Finding, FpcSink, Options, PortIndex, Watcher};
use towpath_fpc::*;
use towpath_tables::{Reason, record::Family};

fn topology() {
    for i in [0, 1] {
        ip(&format!("link add v{i} type veth peer name p{i}"));
        ip(&format!("link set p{i} up"));
        ip(&format!("link set v{i} up"));
    }
    ip("addr add 192.0.2.1/24 dev v0");
    ip("addr add 198.51.100.1/24 dev v1");
    ip("addr add 2001:db8::1/64 dev v0 nodad");
    ip("addr add 2001:db8:1::1/64 dev v1 nodad");
}

fn route<'a>(model: &'a Model, prefix: &str) -> Option<&'a Route> {
    model.routes.values().find(|route| route.key.prefix.to_string() == prefix && route.key.table == 254)
}

fn gateways(route: &Route) -> Vec<String> {
    match &route.via {
        Via::Hops(hops) => hops.iter().map(|hop| hop.gateway.map_or("link".into(), |via| via.to_string())).collect(),
        Via::Object(id) => vec![format!("nhid {id}")],
    }
}

fn port<'a>(model: &'a Model, name: &str) -> Option<&'a Port> {
    model.ports.values().find(|port| port.name == name)
}

#[test]
fn the_first_description_is_what_linux_has() {
    in_namespace(|| {
        topology();
        ip("neigh add 192.0.2.9 lladdr 02:00:00:00:00:09 dev v0");
        ip("neigh add proxy 192.0.2.77 dev v0");
        ip("nexthop add id 7 via 192.0.2.9 dev v0");
        ip("nexthop add id 8 via 198.51.100.9 dev v1");
        ip("nexthop add id 9 group 7,3/8,5");
        ip("nexthop add id 10 blackhole");
        ip("route add 203.0.113.0/25 nhid 9");
        ip("route add 203.0.113.128/25 via inet6 2001:db8::9 dev v0 mtu 1400");
        ip("route add blackhole 203.0.113.200/32 metric 4");
        ip("route add 10.0.0.0/8 via 192.0.2.9 mtu lock 1300");
        ip("route add 10.1.0.0/16 via 192.0.2.9 table 1000");
        ip("-6 route add 2001:db8:2::/48 nexthop via 2001:db8::9 weight 2 nexthop via 2001:db8:1::9");
        let model = fresh();

        let (v0, v1) = (ifindex("v0"), ifindex("v1"));
        let hop = |ifindex, gateway: &str| Hop { ifindex, gateway: gateway.parse().ok(), weight: 1, flags: 0 };
        let get = |prefix: &str| route(&model, prefix).unwrap_or_else(|| panic!("{prefix} is missing"));
        assert_eq!(get("203.0.113.0/25").via, Via::Object(9));
        assert_eq!(get("203.0.113.128/25").via, Via::Hops(vec![hop(v0, "2001:db8::9")]));
        assert_eq!(get("203.0.113.128/25").mtu, 1400);
        assert_eq!((get("203.0.113.200/32").kind, get("203.0.113.200/32").key.priority), (6, 4));
        assert_eq!((get("10.0.0.0/8").mtu, get("10.0.0.0/8").unsupported), (1300, true));
        assert_eq!(route(&model, "10.1.0.0/16"), None, "table 1000 is not CM's");
        let multipath = vec![Hop { weight: 2, ..hop(v0, "2001:db8::9") }, hop(v1, "2001:db8:1::9")];
        assert_eq!(get("2001:db8:2::/48").via, Via::Hops(multipath));
        let object = |id: u32| model.nexthops[&id].kind.clone();
        assert_eq!(object(7), NexthopObjectKind::Hop(hop(v0, "192.0.2.9")));
        assert_eq!(object(9), NexthopObjectKind::Group(vec![(7, 3), (8, 5)]));
        assert_eq!(object(10), NexthopObjectKind::Blackhole);
        let neighbours: Vec<_> = model.neighbours.iter().filter(|(key, _)| key.address.is_ipv4()).collect();
        let key = NeighbourKey { ifindex: v0, address: "192.0.2.9".parse().unwrap() };
        assert_eq!(neighbours, [(&key, &Some([2, 0, 0, 0, 0, 9]))], "and no proxied address");
        let local = model
            .routes
            .values()
            .find(|route| route.key.table == 255 && route.key.prefix.to_string() == "192.0.2.1/32");
        assert_eq!(local.map(|route| route.kind), Some(2));
        let port = port(&model, "v0").unwrap();
        assert_eq!((port.kind, port.up, port.carrier, port.mtu), (PortKind::Virtual, true, true, 1500));
        assert_eq!(model.ports[&1].kind, PortKind::Loopback);
        assert_eq!(model.settings, [Some(0), Some(0)]);
    });
}

#[test]
fn routes_that_linux_removes_silently_go_and_their_port_waits_for_it() {
    in_namespace(|| {
        topology();
        ip("route add 203.0.113.0/24 via 192.0.2.9");
        let cm = Running::start();
        assert!(route(&cm.model(), "203.0.113.0/24").is_some());
        ip("link set v0 down");
        cm.wait("the route goes", |model| route(model, "203.0.113.0/24").is_none().then_some(()));
        cm.settle("link down");
        ip("link set v0 up");
        let v0 = cm.wait("the port is up again", |model| port(model, "v0").filter(|v0| v0.up && v0.carrier).cloned());
        assert_eq!(v0.ifindex, ifindex("v0"));
        cm.settle("link up");

        // Never up while a route is known that Linux had dropped.
        ip("route add 203.0.113.0/24 via 192.0.2.9");
        cm.wait("the route", |model| route(model, "203.0.113.0/24").map(drop));
        let before = cm.receiver.lock().unwrap().log.len();
        ip("link set v0 down");
        ip("link set v0 up");
        cm.wait("down", |model| route(model, "203.0.113.0/24").is_none().then_some(()));
        cm.wait("up", |model| port(model, "v0").filter(|v0| v0.up && v0.carrier).map(drop));
        cm.settle("flap");
        let mut replayed = Replay::default();
        let mut was_down = false;
        for (index, message) in cm.receiver.lock().unwrap().log.iter().enumerate() {
            replayed.apply(message.clone());
            let up = port(&replayed.model, "v0").is_some_and(|v0| v0.up && v0.carrier);
            was_down |= index >= before && !up;
            let known = route(&replayed.model, "203.0.113.0/24").is_some();
            assert!(!(was_down && up && known), "told up with a route that Linux had dropped");
        }
        assert!(was_down, "the port was never told as down");
    });
}

#[test]
fn deleting_a_nexthop_object_takes_its_routes() {
    in_namespace(|| {
        topology();
        ip("nexthop add id 7 via 192.0.2.9 dev v0");
        ip("nexthop add id 8 via 198.51.100.9 dev v1");
        ip("nexthop add id 9 group 7/8");
        ip("route add 203.0.113.0/24 nhid 7");
        ip("route add 10.0.0.0/8 nhid 9");
        let cm = Running::start();
        ip("nexthop replace id 8 via 198.51.100.10 dev v1");
        let eight = |model: &Model| match model.nexthops.get(&8)?.kind {
            NexthopObjectKind::Hop(hop) => hop.gateway.filter(|via| via.to_string() == "198.51.100.10"),
            _ => None,
        };
        cm.wait("replacement", eight);
        ip("nexthop del id 7");
        cm.wait("the route goes", |model| route(model, "203.0.113.0/24").is_none().then_some(()));
        let group = cm.model().nexthops[&9].kind.clone();
        assert_eq!(group, NexthopObjectKind::Group(vec![(8, 1)]));
        assert_eq!(gateways(route(&cm.model(), "10.0.0.0/8").unwrap()), ["nhid 9"]);
        cm.settle("nexthop deleted");
    });
}

#[test]
fn ipv6_siblings_come_and_go_one_by_one() {
    in_namespace(|| {
        topology();
        let cm = Running::start();
        let expect = |what: &str, expected: &[&str]| {
            cm.wait(what, |model| {
                let mut now = route(model, "2001:db8:2::/48").map(gateways).unwrap_or_default();
                now.sort();
                (now == expected).then_some(())
            });
            cm.settle(what);
        };
        ip("-6 route add 2001:db8:2::/48 via 2001:db8::9");
        expect("one", &["2001:db8::9"]);
        ip("-6 route append 2001:db8:2::/48 via 2001:db8:1::9");
        expect("two", &["2001:db8:1::9", "2001:db8::9"]);
        ip("-6 route append 2001:db8:2::/48 via 2001:db8:1::8");
        ip("-6 route del 2001:db8:2::/48 via 2001:db8::9");
        expect("without the first", &["2001:db8:1::8", "2001:db8:1::9"]);
        ip("-6 route replace 2001:db8:2::/48 via 2001:db8::7");
        expect("replaced", &["2001:db8::7"]);
        ip("-6 route append 2001:db8:2::/48 via 2001:db8::6");
        ip("-6 route del 2001:db8:2::/48");
        ip("-6 route add 2001:db8:2::/48 nexthop via 2001:db8::5 nexthop via 2001:db8:1::5");
        expect("both at once", &["2001:db8:1::5", "2001:db8::5"]);
        ip("-6 route del 2001:db8:2::/48 nexthop via 2001:db8::5 nexthop via 2001:db8:1::5");
        expect("gone", &[]);
    });
}

#[test]
fn several_routes_under_one_key_are_left_to_linux() {
    in_namespace(|| {
        topology();
        let cm = Running::start();
        let expect = |what: &str, expected: Option<(bool, &str)>| {
            cm.wait(what, |model| {
                let now = route(model, "203.0.113.0/24").map(|route| (route.unsupported, gateways(route).join(" ")));
                (now == expected.map(|(unsupported, via)| (unsupported, via.to_owned()))).then_some(())
            });
            cm.settle(what);
        };
        ip("route add 203.0.113.0/24 via 192.0.2.9");
        expect("one", Some((false, "192.0.2.9")));
        ip("route append 203.0.113.0/24 via 198.51.100.9");
        expect("appended", Some((true, "192.0.2.9")));
        ip("route del 203.0.113.0/24 via 192.0.2.9");
        expect("the appended one is left", Some((false, "198.51.100.9")));
        ip("route prepend 203.0.113.0/24 via 192.0.2.8");
        expect("prepended", Some((true, "192.0.2.8")));
        ip("route replace 203.0.113.0/24 via 192.0.2.7");
        expect("the first one is replaced", Some((true, "192.0.2.7")));
        ip("route del 203.0.113.0/24");
        ip("route del 203.0.113.0/24");
        expect("none", None);
    });
}

#[test]
fn interfaces_appear_move_change_names_and_vanish() {
    in_namespace(|| {
        topology();
        let cm = Running::start();
        ip("link add w0 type veth peer name w1");
        let index = cm.wait("appears", |model| port(model, "w0").map(|port| port.ifindex));
        ip("link set w0 name w0-renamed");
        let renamed = cm.wait("renamed", |model| port(model, "w0-renamed").map(|port| port.ifindex));
        assert_eq!(renamed, index);
        ip("link set w0-renamed mtu 1400 promisc on up");
        cm.wait("changed", |model| {
            port(model, "w0-renamed").filter(|port| port.mtu == 1400 && port.promiscuous && port.up).map(drop)
        });
        ip("link add br0 type bridge");
        ip("link set w0-renamed master br0");
        let bridge = ifindex("br0");
        cm.wait("enslaved", |model| port(model, "w0-renamed").filter(|port| port.master == bridge).map(drop));
        assert_eq!(port(&cm.model(), "br0").map(|port| port.kind), Some(PortKind::Other));
        ip("link set w0-renamed nomaster");
        cm.wait("free", |model| port(model, "w0-renamed").filter(|port| port.master == 0).map(drop));

        let (hold, held) = std::sync::mpsc::channel::<()>();
        let (tell, told) = std::sync::mpsc::channel();
        let elsewhere = std::thread::spawn(move || {
            enter_new_namespace();
            // SAFETY: takes no arguments.
            tell.send(unsafe { libc::gettid() }).unwrap();
            let _ = held.recv();
        });
        ip(&format!("link set w0-renamed netns {}", told.recv().unwrap()));
        cm.wait("moved away", |model| port(model, "w0-renamed").is_none().then_some(()));
        cm.settle("moved");
        drop(hold);
        elsewhere.join().unwrap();
        ip("link del v1");
        cm.wait("vanishes", |model| (port(model, "v1").is_none() && port(model, "p1").is_none()).then_some(()));
        cm.settle("vanished");
    });
}

#[test]
fn settings_are_honoured_soon() {
    in_namespace(|| {
        topology();
        let cm = Running::start();
        let toggle = |path: &str, value: &str, seen: fn(&Port) -> bool| {
            assert!(!seen(port(&cm.model(), "v0").unwrap()), "{path} is already seen");
            sysctl(path, value);
            let start = Instant::now();
            cm.wait(path, |model| port(model, "v0").filter(|v0| seen(v0)).map(drop));
            println!("{path}: seen after {:?}", start.elapsed());
        };
        toggle("ipv4/conf/v0/forwarding", "1", |v0| v0.family[0].forwarding);
        assert!(!port(&cm.model(), "v1").unwrap().family[0].forwarding);
        toggle("ipv6/conf/all/forwarding", "1", |v0| v0.family[1].forwarding);
        assert!(port(&cm.model(), "v1").unwrap().family[1].forwarding);
        toggle("ipv6/conf/v0/disable_ipv6", "1", |v0| !v0.family[1].forwarding);
        toggle("ipv4/conf/all/rp_filter", "1", |v0| v0.rp_filter == 1);
        toggle("ipv4/conf/v0/rp_filter", "2", |v0| v0.rp_filter == 2);
        toggle("ipv4/conf/v0/ignore_routes_with_linkdown", "1", |v0| v0.family[0].ignore_linkdown);
        assert!(port(&cm.model(), "v0").unwrap().send_redirects);
        sysctl("ipv4/conf/all/send_redirects", "0");
        toggle("ipv4/conf/v0/send_redirects", "0", |v0| !v0.send_redirects);
        assert!(port(&cm.model(), "v1").unwrap().send_redirects, "v1's own still says yes");
        toggle("ipv4/conf/v0/route_localnet", "1", |v0| v0.route_localnet);
        sysctl("ipv4/fib_multipath_hash_policy", "1");
        cm.wait("hash policy", |model| (model.settings == [Some(1), Some(0)]).then_some(()));
        sysctl("ipv6/conf/v1/mtu", "1300");
        cm.wait("IPv6 MTU", |model| port(model, "v1").and_then(|v1| v1.unsupported.clone()));
        cm.settle("settings");
    });
}

/// A receiver that lags behind when it is told to.
#[derive(Clone, Default)]
struct Lagging {
    full: Arc<AtomicBool>,
    /// CM knows that it is full
    known: Arc<AtomicBool>,
    alarms: Arc<Mutex<Vec<Alarm>>>,
    told: Arc<Mutex<Vec<Message>>>,
}

impl FpcSink for Lagging {
    fn send(&mut self, batch: Vec<Message>) -> Result<(), CmError> {
        self.told.lock().unwrap().extend(batch);
        Ok(())
    }

    fn alarm(&mut self, alarm: Alarm) -> Result<(), CmError> {
        self.alarms.lock().unwrap().push(alarm);
        Ok(())
    }

    fn is_full(&mut self) -> Result<bool, CmError> {
        let full = self.full.load(Ordering::SeqCst);
        self.known.store(full, Ordering::SeqCst);
        Ok(full)
    }
}

impl Lagging {
    fn has_told(&self, is: impl Fn(&Message) -> bool) -> Option<usize> {
        self.told.lock().unwrap().iter().position(is)
    }

    /// The alarm that names all of these.
    fn alarm_about(&self, scopes: &[Scope]) -> Option<AlarmId> {
        let names = |alarm: &Alarm, scope: &Scope| alarm.policies.iter().any(|policy| policy.scope == *scope);
        let alarms = self.alarms.lock().unwrap();
        alarms.iter().find(|alarm| scopes.iter().all(|scope| names(alarm, scope))).map(|alarm| alarm.id)
    }
}

#[test]
fn changed_interfaces_are_linux_s_while_their_description_waits() {
    in_namespace(|| {
        topology();
        let (v0, v1) = (ifindex("v0"), ifindex("v1"));
        let lagging = Lagging::default();
        let (end, stop) = std::io::pipe().unwrap();
        let mut sink = lagging.clone();
        let cm = std::thread::spawn(move || Cm::new(Options::default(), Vec::new())?.run(&mut sink, end.as_fd()));
        let last = Message::SnapshotEnd(Snapshot::Routes(Family::V6));
        wait("first snapshots", || lagging.has_told(|message| *message == last));

        lagging.full.store(true, Ordering::SeqCst);
        wait("CM to know", || lagging.known.load(Ordering::SeqCst).then_some(()));
        ip("route add 203.0.113.0/24 via 192.0.2.9");
        sysctl("ipv4/conf/v0/forwarding", "1");
        let both = |ifindex| [Scope::Ingress(ifindex, None), Scope::Egress(ifindex, None)];
        let forwarding = wait("an alarm", || lagging.alarm_about(&both(v0)));
        ip("link set v1 down");
        let down = wait("another", || lagging.alarm_about(&both(v1)));
        sysctl("ipv4/fib_multipath_hash_policy", "1");
        let hash_policy = wait("a third", || lagging.alarm_about(&[Scope::Family(Family::V4)]));
        let is_route =
            |message: &Message| matches!(message, Message::Route(r) if r.key.prefix.to_string() == "203.0.113.0/24");
        assert_eq!(lagging.has_told(is_route), None, "they overtook the route");

        lagging.full.store(false, Ordering::SeqCst);
        wait("the route", || lagging.has_told(is_route));
        // Each ends behind the description that makes it needless.
        let told = |is: &dyn Fn(&Message) -> bool| lagging.has_told(is).expect("told");
        let over = |id: AlarmId| told(&|message| *message == Message::AlarmOver(id));
        let port = |message: &Message, ifindex| matches!(message, Message::Port(port) if port.ifindex == ifindex);
        assert!(
            told(&|m| matches!(m, Message::Port(p) if p.ifindex == v0 && p.family[0].forwarding)) < over(forwarding)
        );
        assert!(told(&|m| port(m, v1) && matches!(m, Message::Port(p) if !p.up)) < over(down));
        let settings = FamilySettings { family: Family::V4, hash_policy: 1, flow_labels: false };
        assert!(told(&|m| *m == Message::FamilySettings(settings)) < over(hash_policy));
        drop(stop);
        cm.join().unwrap().unwrap();
    });
}

#[test]
fn neighbours_are_told_only_while_linux_would_use_them() {
    in_namespace(|| {
        topology();
        let cm = Running::start();
        let key = NeighbourKey { ifindex: ifindex("v0"), address: "192.0.2.9".parse().unwrap() };
        let expect = |what: &str, expected: Option<Option<[u8; 6]>>| {
            cm.wait(what, |model| (model.neighbours.get(&key).copied() == expected).then_some(()));
        };
        ip("neigh add 192.0.2.9 lladdr 02:00:00:00:00:09 dev v0 nud reachable");
        expect("reachable", Some(Some([2, 0, 0, 0, 0, 9])));
        ip("neigh change 192.0.2.9 lladdr 02:00:00:00:00:0a dev v0 nud stale");
        expect("another address", Some(Some([2, 0, 0, 0, 0, 10])));
        ip("neigh change 192.0.2.9 dev v0 nud failed");
        expect("failed", Some(None));
        ip("neigh del 192.0.2.9 dev v0");
        expect("gone", None);
    });
}

/// Lost notifications: a sink that does not take anything while many routes change.
#[test]
fn an_overrun_is_survived_by_reading_again() {
    in_namespace(|| {
        topology();
        let cm = Running::with(Options { receive_buffer: 4096, ..Options::default() }, Vec::new);
        let batch: String =
            (0..2000u32).map(|i| format!("route add 10.{}.{}.0/24 via 192.0.2.9\n", i / 250, i % 250)).collect();
        let file = std::env::temp_dir().join(format!("towpath-cm-overrun-{}", std::process::id()));
        std::fs::write(&file, batch).unwrap();
        {
            let blocked = cm.receiver.lock().unwrap();
            ip(&format!("-batch {}", file.display()));
            ip("route del 10.0.0.0/24");
            drop(blocked);
        }
        std::fs::remove_file(&file).unwrap();
        cm.settle("after the overrun");
        let receiver = cm.receiver.lock().unwrap();
        assert_eq!(
            receiver.model.routes.values().filter(|route| route.key.prefix.prefix_len() == 24).count(),
            1999 + 2
        );
        let dumps = receiver.ended.iter().filter(|ended| **ended == Snapshot::Neighbours(Family::V4)).count();
        assert!(dumps >= 2, "no overrun was provoked, so nothing was shown");
        assert!(receiver.lost.contains_key(&Listener::Routes), "{:?}", receiver.lost);
        assert!(port(&receiver.model, "v0").unwrap().up);
    });
}

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }
}

/// Random commands out of `words`; those that make no sense at the moment fail, and that is all right.
fn history(rng: &mut Rng, cm: &Running, rounds: usize, commands: &[&str]) {
    for round in 0..rounds {
        let mut done = Vec::new();
        for _ in 0..12 {
            let command = commands[rng.below(commands.len())];
            let mark = if try_ip(command).is_ok() { "" } else { " (refused)" };
            done.push(format!("ip {command}{mark}"));
        }
        cm.settle(&format!("round {round}:\n{}", done.join("\n")));
    }
}

fn seed() -> Rng {
    let given = std::env::var("TOWPATH_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = given.unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |now| now.as_nanos() as u64 | 1)
    });
    println!("TOWPATH_SEED={seed}");
    Rng(seed)
}

/// Not mixed: siblings and routes that cannot be siblings, because the kernel's dump hides some of these.
const ROUTES: &[&str] = &[
    "route add 10.0.0.0/24 via 192.0.2.9",
    "route append 10.0.0.0/24 via 192.0.2.8",
    "route prepend 10.0.0.0/24 via 192.0.2.7",
    "route replace 10.0.0.0/24 via 192.0.2.6",
    "route replace 10.0.0.0/24 nexthop via 192.0.2.5 nexthop via 198.51.100.5",
    "route append blackhole 10.0.0.0/24",
    "route del 10.0.0.0/24",
    "route del 10.0.0.0/24 via 192.0.2.8",
    "route add 10.0.0.0/24 via 192.0.2.9 tos 0x10",
    "route del 10.0.0.0/24 tos 0x10",
    "route add 10.0.0.0/24 nhid 7",
    "route replace 10.0.0.0/24 nhid 7",
    "-6 route add 2001:db8:2::/48 via 2001:db8::9",
    "-6 route add 2001:db8:2::/48 via 2001:db8:1::9",
    "-6 route append 2001:db8:2::/48 via 2001:db8::8",
    "-6 route append 2001:db8:5::/48 dev v0",
    "-6 route append 2001:db8:5::/48 dev v1",
    "-6 route append 2001:db8:2::/48 nexthop via 2001:db8::7 nexthop via 2001:db8:1::7",
    "-6 route replace 2001:db8:2::/48 via 2001:db8::6",
    "-6 route replace 2001:db8:2::/48 dev v0",
    "-6 route replace 2001:db8:2::/48 nexthop via 2001:db8::5 nexthop via 2001:db8:1::5",
    "-6 route add 2001:db8:2::/48 nexthop via 2001:db8::4 nexthop via 2001:db8:1::4",
    "-6 route add 2001:db8:2::/48 from 2001:db8:9::/48 via 2001:db8::9",
    "-6 route del 2001:db8:2::/48 from 2001:db8:9::/48",
    "-6 route append 2001:db8:5::/48 nhid 17",
    "-6 route append blackhole 2001:db8:5::/48",
    "-6 route del 2001:db8:2::/48",
    "-6 route del 2001:db8:2::/48",
    "-6 route add 2001:db8:5::/48 via 2001:db8::9",
    "-6 route replace 2001:db8:5::/48 via 2001:db8::8",
    "-6 route replace 2001:db8:5::/48 dev v1",
    "-6 route del 2001:db8:5::/48",
    "-6 route del 2001:db8:5::/48 via 2001:db8::9",
    "-6 route del 2001:db8:2::/48 via 2001:db8::9",
    "-6 route del 2001:db8:2::/48 via 2001:db8::8",
    "-6 route del 2001:db8:2::/48 via 2001:db8:1::9",
    "-6 route del 2001:db8:2::/48 nexthop via 2001:db8::5 nexthop via 2001:db8:1::5",
];

const REST: &[&str] = &[
    "link set v0 down",
    "link set v0 up",
    "link set p0 down",
    "link set p0 up",
    "link set v0 mtu 1400",
    "link set v0 mtu 1500",
    "link set v0 name x0",
    "link set x0 name v0",
    "addr add 192.0.2.1/24 dev v0",
    "addr add 192.0.2.2/24 dev v0",
    "addr add 192.0.2.2/24 dev v1",
    "addr del 192.0.2.1/24 dev v0",
    "addr del 192.0.2.2/24 dev v0",
    "addr del 192.0.2.2/24 dev v1",
    "addr add 2001:db8::1/64 dev v0 nodad",
    "addr del 2001:db8::1/64 dev v0",
    "route add 10.2.0.0/16 dev v1 src 192.0.2.2",
    "route add 10.3.0.0/16 via 192.0.2.9",
    "-6 route add 2001:db8:3::/48 nexthop via 2001:db8::9 nexthop via 2001:db8:1::9",
    "nexthop add id 7 via 192.0.2.9 dev v0",
    "nexthop del id 7",
    "nexthop replace id 8 via 198.51.100.9 dev v1",
    "nexthop add id 9 group 7/8",
    "nexthop replace id 9 group 8",
    "nexthop del id 8",
    "route add 10.4.0.0/16 nhid 9",
    "route replace 10.5.0.0/16 nhid 7",
    "-6 route add 2001:db8:4::/48 nhid 17",
    "nexthop add id 17 via 2001:db8::9 dev v0",
    "nexthop del id 17",
    "neigh replace 192.0.2.9 lladdr 02:00:00:00:00:09 dev v0",
    "neigh del 192.0.2.9 dev v0",
    "link add w0 type veth peer name w1",
    "link del w0",
];

#[test]
fn any_history_of_routes_ends_in_what_linux_has() {
    in_namespace(|| {
        topology();
        ip("nexthop add id 7 via 192.0.2.9 dev v0");
        ip("nexthop add id 17 via 2001:db8::9 dev v0");
        let cm = Running::start();
        history(&mut seed(), &cm, 25, ROUTES);
    });
}

/// As above without nexthop objects, whose existence makes CM more careful.
#[test]
fn any_history_of_routes_without_objects_ends_in_what_linux_has() {
    in_namespace(|| {
        topology();
        let cm = Running::start();
        history(&mut seed(), &cm, 25, ROUTES);
    });
}

#[test]
fn any_history_ends_in_what_linux_has() {
    in_namespace(|| {
        topology();
        let cm = Running::start();
        let commands = [ROUTES, REST].concat();
        history(&mut seed(), &cm, 15, &commands);
    });
}

/// A watcher that says what the test tells it.
struct Told {
    said: std::sync::mpsc::Receiver<Result<Vec<Finding>, ()>>,
    wake: std::io::PipeReader,
    last: Vec<Finding>,
}

impl Watcher for Told {
    fn name(&self) -> &'static str {
        "told"
    }
    fn source(&self) -> PolicySource {
        PolicySource::Xfrm
    }
    fn fds(&self) -> Vec<std::os::fd::BorrowedFd<'_>> {
        vec![std::os::fd::AsFd::as_fd(&self.wake)]
    }
    fn interval(&self) -> Option<Duration> {
        None
    }
    fn findings(&mut self, _: &PortIndex) -> Result<Vec<Finding>, CmError> {
        if let Ok(said) = self.said.try_recv() {
            std::io::Read::read_exact(&mut self.wake, &mut [0]).unwrap();
            self.last = said.map_err(|()| CmError::decode("xfrm", "gibberish"))?;
        }
        Ok(self.last.clone())
    }
}

#[test]
fn a_watcher_that_fails_makes_everything_unknown() {
    in_namespace(|| {
        topology();
        let (say, said) = std::sync::mpsc::channel();
        let (reader, mut wake) = std::io::pipe().unwrap();
        let cm =
            Running::with(Options::default(), move || vec![Box::new(Told { said, wake: reader, last: Vec::new() })]);
        let mut say = |what| {
            say.send(what).unwrap();
            std::io::Write::write_all(&mut wake, &[1]).unwrap();
        };
        let policies = |model: &Model| model.policies.get(&PolicySource::Xfrm).cloned();
        assert_eq!(policies(&cm.model()), Some(Vec::new()));
        let finding = Finding::new(Scope::Egress(1, None), Reason::PolicyXfrm, "one");
        let Finding { scope, reason, detail, filter, flows, in_vrfs, rules, momentary } = finding.clone();
        let policy =
            Policy { source: PolicySource::Xfrm, scope, reason, detail, filter, flows, in_vrfs, rules, momentary };
        say(Ok(vec![finding.clone()]));
        cm.wait("policy", |model| (policies(model) == Some(vec![policy.clone()])).then_some(()));
        say(Err(()));
        let unknown = cm.wait("unknown", |model| policies(model).filter(|set| set.len() == 2));
        let scopes: Vec<_> = unknown.iter().map(|policy| (policy.scope, policy.reason)).collect();
        let family = |family| (Scope::Family(family), Reason::PolicyUnknown);
        assert_eq!(scopes, [family(Family::V4), family(Family::V6)]);
        say(Ok(vec![finding.clone()]));
        cm.wait("known again", |model| (policies(model) == Some(vec![policy.clone()])).then_some(()));
    });
}

#[test]
fn policies_are_told_behind_all_that_linux_told_before() {
    in_namespace(|| {
        topology();
        let lagging = Lagging::default();
        let (end, stop) = std::io::pipe().unwrap();
        let (say, said) = std::sync::mpsc::channel();
        let (wake, mut waker) = std::io::pipe().unwrap();
        let mut sink = lagging.clone();
        let cm = std::thread::spawn(move || {
            let watchers: Vec<Box<dyn Watcher>> = vec![Box::new(Told { said, wake, last: Vec::new() })];
            Cm::new(Options::default(), watchers)?.run(&mut sink, end.as_fd())
        });
        let last = Message::SnapshotEnd(Snapshot::Routes(Family::V6));
        wait("first snapshots", || lagging.has_told(|message| *message == last));
        lagging.full.store(true, Ordering::SeqCst);
        wait("CM to know", || lagging.known.load(Ordering::SeqCst).then_some(()));
        ip("neighbor add 192.0.2.77 lladdr 02:00:00:00:00:77 dev v0 nud permanent");
        let scope = Scope::Family(Family::V4);
        say.send(Ok(vec![Finding::new(scope, Reason::PolicyXfrm, "one")])).unwrap();
        std::io::Write::write_all(&mut waker, &[1]).unwrap();
        wait("an alarm", || lagging.alarm_about(&[scope]));
        lagging.full.store(false, Ordering::SeqCst);
        let is_policy = |message: &Message| matches!(message, Message::Policy(policy) if policy.scope == scope);
        let policy = wait("the policy", || lagging.has_told(is_policy));
        let neighbour = lagging.has_told(
            |message| matches!(message, Message::Neighbour(told) if told.key.address.to_string() == "192.0.2.77"),
        );
        assert!(neighbour.is_some_and(|neighbour| neighbour < policy), "{neighbour:?} {policy}");
        drop(stop);
        cm.join().unwrap().unwrap();
    });
}
