//! `towpath cm` and `towpath fpm` as processes of their own: each may die, and packets go on.

mod common;

use common::{Daemon, LEFT, Net, RIGHT, Stream, eventually, sees_a_neighbour_in_use_probed, shorten_reachability};
use towpath_fpc::codec::Packet;
use towpath_fpc::{Alarm, AlarmId, Connection, Message, Policy, PolicySource, Scope};
use towpath_tables::{Reason, record::Family};

/// Starts `towpath fpm` with no more capabilities than it needs.
fn start_fpm(net: &Net) -> Daemon {
    net.start(net.with_only("-all,+bpf,+net_admin,+perfmon", &["fpm", "eth0", "eth1"]))
}

/// Starts `towpath cm` without the right to load programs; CAP_SYS_ADMIN lists BPF links where the kernel does not list
/// netfilter's hooks.
fn start_cm(net: &Net) -> Daemon {
    net.start(net.with_only("-all,+net_admin,+sys_admin", &["cm"]))
}

fn in_sync(net: &Net) -> bool {
    net.json(&["status"])["in_sync"].as_bool().expect("in_sync")
}

/// What would become of a packet to `destination`: `fast`, or the reason why it is Linux's.
fn verdict(net: &Net, destination: &str) -> String {
    let verdict = net.json(&["explain", LEFT, destination, "in", "eth0"])["verdict"].clone();
    let word = if verdict["path"] == "fast" { &verdict["path"] } else { &verdict["reason"] };
    word.as_str().expect("a word").to_string()
}

fn becomes(net: &Net, destination: &str, wanted: &str) {
    eventually(&format!("{destination} becomes {wanted}"), || (verdict(net, destination) == wanted).then_some(()));
}

#[test]
fn either_may_die_and_the_other_goes_on() {
    let net = Net::new();
    let clean = net.traces();
    let mut fpm = start_fpm(&net);
    let mut cm = start_cm(&net);
    fpm.await_log("ready: 2 ports, ");
    let stream = Stream::start(&net, RIGHT);
    net.flows(100);

    // Changes come through, and hits go back.
    net.ip("route add 203.0.113.0/24 via 198.51.100.2");
    becomes(&net, "203.0.113.1", "fast");
    net.ip("route del 203.0.113.0/24");
    becomes(&net, "203.0.113.1", "no-route");

    cm.signal(libc::SIGKILL);
    fpm.await_log("the fast path keeps its last state");
    eventually("the loss is known", || (!in_sync(&net)).then_some(()));
    net.ip("route add 203.0.113.0/24 via 198.51.100.2");
    net.flows(300);
    assert_eq!(verdict(&net, "203.0.113.1"), "no-route", "the last state");
    let mut cm = start_cm(&net);
    becomes(&net, "203.0.113.1", "fast");
    eventually("everything is described again", || in_sync(&net).then_some(()));
    net.flows(100);

    let (id, before) = (net.json(&["status"])["program"]["id"].clone(), net.forwarded());
    fpm.signal(libc::SIGKILL);
    cm.await_log("the fast path manager has left");
    net.ip("route replace blackhole 203.0.113.0/24");
    std::thread::sleep(std::time::Duration::from_millis(300));
    let mut fpm = start_fpm(&net);
    fpm.await_log("ready: 2 ports, ");
    let status = net.json(&["status"]);
    assert_eq!(status["adopted"], true);
    assert_ne!(status["program"]["id"], id);
    let after = net.forwarded();
    assert!(after >= before + 250, "forwarding went on while nobody was there: {before} before, {after} after");
    becomes(&net, "203.0.113.1", "non-unicast-route");
    net.flows(100);

    // The tables are those from before: counters go on, and nothing is forgotten or lost.
    assert!(net.towpath(&["down"]).status.success());
    assert!(fpm.wait().success());
    assert_eq!(net.traces(), clean);
    stream.finish_complete();
    drop(cm);
}

/// Alarms of three sources: from a watcher, about one interface, and of a description that was to come.
fn alarms(net: &Net) -> Vec<Packet> {
    let port = |name| net.router.ifindex(name).expect("an index");
    let policies = [
        (PolicySource::Nftables, Scope::Family(Family::V4), Reason::PolicyNetfilter),
        (PolicySource::Tc, Scope::Egress(port("eth1"), None), Reason::PolicyTc),
        (PolicySource::Ports, Scope::Ingress(port("eth0"), None), Reason::PortNotReady),
    ];
    let alarm = |(source, scope, reason)| {
        let policy = Policy::new(source, scope, reason, "the test");
        Packet::Message(Message::Alarm(Alarm { id: AlarmId { source, number: 1 }, policies: vec![policy] }))
    };
    policies.map(alarm).into()
}

#[test]
fn what_a_dead_manager_raised_the_alarm_for_stays_linuxs_until_the_next_one_knows() {
    let net = Net::new();
    let mut fpm = start_fpm(&net);
    let mut cm = start_cm(&net);
    fpm.await_log("ready: 2 ports, ");
    let stream = Stream::start(&net, RIGHT);
    net.flows(100);
    let left = |fpm: &Daemon, times| {
        let lines = || fpm.log().matches("the fast path keeps its last state").count();
        eventually("the loss is noticed", || (lines() == times).then_some(()));
    };
    cm.signal(libc::SIGKILL);
    left(&fpm, 1);

    // One that dies between an alarm and the snapshot that tells the same.
    let path = format!("/run/towpath/{}/fpc.sock", net.inode());
    let mut dying = Connection::connect(path.as_ref()).expect("connected");
    for alarm in alarms(&net) {
        dying.sender.push(alarm, false).expect("sent");
    }
    dying.sender.flush_frames().expect("sent");
    becomes(&net, RIGHT, "policy-netfilter");
    drop(dying);
    left(&fpm, 2);
    let before = net.forwarded();
    stream.advance(200);
    assert_eq!(net.forwarded(), before, "all of it goes through Linux");
    assert_eq!(verdict(&net, RIGHT), "policy-netfilter");
    assert!(!in_sync(&net));

    let _cm = start_cm(&net);
    becomes(&net, RIGHT, "fast");
    eventually("everything is described again", || in_sync(&net).then_some(()));
    assert_eq!(net.json(&["status"])["policies"].as_array().expect("a list").len(), 0);
    net.flows(100);
    stream.finish_complete();
}

#[test]
fn a_neighbour_in_use_is_probed_through_the_socket() {
    let net = Net::new();
    shorten_reachability(&net.router);
    eventually("it resolves", || net.ping(&net.left, RIGHT).then_some(()));
    let mut fpm = start_fpm(&net);
    let _cm = start_cm(&net);
    fpm.await_log("ready: 2 ports, ");
    sees_a_neighbour_in_use_probed(&net, &net.router);
}
