//! `towpath up --shadow`: Linux carries everything as before, and the counters are those that `towpath up` would have.

mod common;
#[path = "flows/support.rs"]
#[allow(dead_code, reason = "each test file uses a part")]
mod support;

use common::{DEADLINE, LEFT, Net, RIGHT, RIGHT6, Stream, eventually};
use serde_json::Value;
use std::net::IpAddr;
use support::{Talk, echoes, fast_packets, firewall, flow, is_fast, tracked};
use towpath_cm::conntrack::Table;
use towpath_lab::PacketSocket;
use towpath_lab::packet::udp;
use towpath_tables::Tuple;

const PORT: u16 = 7011;
const LEFT6: &str = "2001:db8:1::2";

/// Frames of each kind, as the left host sends them; the last one is forwarded.
fn frames(net: &Net) -> Vec<Vec<u8>> {
    let macs = net.macs()[0];
    let frame = |source: &str, destination: &str, length: usize| {
        let [source, destination] = [source, destination].map(|address| address.parse::<IpAddr>().expect("an address"));
        udp(macs, (source, destination), (1024, PORT), &vec![7; length])
    };
    let mut padded = frame(LEFT, RIGHT, 1);
    padded.resize(60, 0);
    let mut expired = frame(LEFT, RIGHT, 3);
    (expired[22], expired[24], expired[25]) = (1, 0, 0);
    let sum = towpath_lab::packet::checksum(&expired[14..34]);
    expired[24..26].copy_from_slice(&sum.to_be_bytes());
    vec![
        frame(LEFT, RIGHT, 32),
        frame(LEFT6, RIGHT6, 33),
        padded,
        expired,
        frame(LEFT, "192.0.2.1", 4),
        frame(LEFT, "100.64.0.1", 5),
        frame(LEFT, RIGHT, 1472),
        frame(LEFT, RIGHT, 34),
    ]
}

/// Sends the frames; what comes out on the right, without the addresses of the link.
fn exchange(net: &Net, [left, right]: &[PacketSocket; 2]) -> Vec<Vec<u8>> {
    let ours = |bytes: &[u8]| {
        bytes.windows(4).any(|ports| ports == [4, 0, (PORT >> 8) as u8, PORT as u8]) && bytes[6] & 1 == 0
    };
    right.drain().expect("what came before");
    let frames = frames(net);
    let own = net.macs()[1].1;
    frames.iter().for_each(|frame| left.send(frame).expect("sent"));
    let mut seen = Vec::new();
    while seen.len() < 5 {
        let frame = right.receive_matching(DEADLINE, |frame| frame.bytes[6..12] == own && ours(&frame.bytes));
        seen.push(frame.expect("received").expect("in time").bytes);
    }
    seen
}

/// What the fast path counts of the left port's packets: forwarded ones, their bytes, and exceptions by reason.
fn counted(net: &Net) -> (u64, u64, Vec<(String, u64)>) {
    let (stats, all) = (net.json(&["show", "stats"]), net.json(&["show", "exceptions"]));
    let number = |value: &Value| value.as_u64().expect("a number");
    let rows = |value: &Value, name: &str| value[name].as_array().expect("rows").clone();
    let port = rows(&stats, "ports").into_iter().find(|port| port["port"] == "eth0").expect("eth0");
    let of_port = rows(&all, "exceptions").into_iter().filter(|row| row["port"] == "eth0");
    let told = ["local-destination", "no-route", "ttl-expired", "policy-netfilter", "mtu-exceeded"];
    let mut reasons: Vec<_> = of_port
        .map(|row| (row["reason"].as_str().expect("text").to_owned(), number(&row["packets"])))
        .filter(|(reason, _)| told.contains(&reason.as_str()))
        .collect();
    reasons.sort();
    (number(&port["rx_packets"]), number(&port["rx_bytes"]), reasons)
}

/// Packets that Linux has forwarded, of both families.
fn by_linux(net: &Net) -> u64 {
    let text = net.exec("cat /proc/net/snmp /proc/net/snmp6");
    let mut lines = text.lines().filter(|line| line.starts_with("Ip:"));
    let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
    let place = names.split_whitespace().position(|name| name == "ForwDatagrams").expect("a column");
    let four: u64 = values.split_whitespace().nth(place).expect("a value").parse().expect("a number");
    let six = text.lines().find_map(|line| line.strip_prefix("Ip6OutForwDatagrams")).expect("a line");
    four + six.trim().parse::<u64>().expect("a number")
}

#[test]
fn linux_carries_all_and_the_counters_are_those_of_up() {
    let net = Net::new();
    let sockets = net.packet_sockets();
    let plain = exchange(&net, &sockets);

    let mut shadow = net.up(&["--shadow", "eth0", "eth1"]);
    let status = net.json(&["status"]);
    assert_eq!((&status["shadow"], &status["engine"]), (&true.into(), &"xdp".into()));
    let (before, linux) = (counted(&net), by_linux(&net));
    assert_eq!(exchange(&net, &sockets), plain);
    assert!(by_linux(&net) >= linux + 5, "Linux has forwarded them");
    let predicted = counted(&net);
    assert_ne!(predicted, before);
    assert!(shadow.signal(libc::SIGTERM).success());

    let _up = net.up(&["eth0", "eth1"]);
    assert_eq!(net.json(&["status"])["shadow"], false);
    let (start, linux) = (counted(&net), by_linux(&net));
    assert_eq!(exchange(&net, &sockets), plain);
    let real = counted(&net);
    let difference = |before: &(u64, u64, Vec<(String, u64)>), after: &(u64, u64, Vec<(String, u64)>)| {
        let reasons = before.2.iter().zip(&after.2).map(|(before, after)| (before.0.clone(), after.1 - before.1));
        (after.0 - before.0, after.1 - before.1, reasons.collect::<Vec<_>>())
    };
    assert_eq!(difference(&before, &predicted), difference(&start, &real));
    assert_eq!(difference(&start, &real).0, 5, "{real:?}");
    assert!(by_linux(&net) < linux + 5, "they went past Linux");
}

/// What each command says of the shadow, in order: status, show stats, top, the metrics, doctor.
fn told(net: &Net) -> [bool; 5] {
    let text = |command: &[&str]| String::from_utf8(net.towpath(command).stdout).expect("text");
    let says = |command: &[&str]| {
        let said = text(command).starts_with("SHADOW: nothing is forwarded");
        assert_eq!(net.json(command)["shadow"], said, "{command:?}");
        said
    };
    let (status, stats) = (says(&["status"]), says(&["show", "stats"]));
    let top: Value = serde_json::from_str(&text(&["top", "-n", "1", "-d", "0.1", "--json"])).expect("JSON");
    let metrics = net.exec("curl -sSf -m 10 http://127.0.0.1:9475/metrics").contains("\ntowpath_shadow 1\n");
    let doctor = net.json(&["doctor"]);
    let finding = doctor["findings"].as_array().expect("findings").iter().find(|finding| finding["check"] == "shadow");
    let remedy = finding.map(|finding| finding["remedy"].clone());
    assert!(remedy.as_ref().is_none_or(|remedy| *remedy == "towpath down && towpath up eth0 eth1"), "{remedy:?}");
    [status, stats, top["shadow"] == true, metrics, remedy.is_some()]
}

#[test]
fn every_command_says_that_it_is_a_shadow_and_tables_pass_to_and_fro() {
    let net = Net::new();
    let stream = Stream::start(&net, RIGHT);
    let mut daemon = net.up(&["--shadow", "--metrics", "eth0", "eth1"]);
    for shadow in [true, false, true] {
        let by_linux = net.forwarded_by_linux();
        // Each packet of the stream is one that goes fast, or would.
        net.flows(300);
        assert_eq!(net.forwarded_by_linux() >= by_linux + 200, shadow, "from {by_linux} {}", net.forwarded_by_linux());
        assert_eq!(told(&net), [shadow; 5]);
        assert_eq!(net.ip("-d link show eth0").contains("towpath_shadow"), shadow);
        daemon.signal(libc::SIGKILL);
        let arguments = ["--shadow", "--metrics", "eth0", "eth1"];
        daemon = net.up(&arguments[usize::from(shadow)..]);
        assert_eq!(net.json(&["status"])["adopted"], true);
    }
    stream.finish_complete();
}

#[test]
fn connections_are_predicted_and_linux_s_entries_stay_what_they_were() {
    let net = firewall();
    let _daemon = net.up(&["--shadow", "--flows", "established", "eth0", "eth1"]);
    echoes(&net);
    let mut talk = Talk::start(&net.left, &format!("{RIGHT}:7001"));
    talk.becomes_fast(&net);
    let before = (fast_packets(&flow(&net, talk.port()).expect("it is known")), net.forwarded_by_linux());
    talk.transfer(1 << 20);
    let found = flow(&net, talk.port()).expect("it is known");
    assert!(is_fast(&found), "{found}");
    let predicted: u64 = fast_packets(&found).iter().sum::<u64>() - before.0.iter().sum::<u64>();
    assert!(predicted >= 2 * (1 << 20) / 1460, "{predicted} packets");
    // In packets merged to 64 KiB at most.
    assert!(net.forwarded_by_linux() >= before.1 + (2 << 20 >> 16), "Linux has forwarded them");
    assert_eq!(tracked(&net, talk.port()).len(), 1);
    let [source, destination] = [LEFT, RIGHT].map(|address| address.parse().expect("an address"));
    let original = Tuple { source, destination, source_port: talk.port(), destination_port: 7001, protocol: 6 };
    let entries = net.router.enter(|| Table::open().and_then(|mut table| table.entries(&[original])));
    let entry = entries.expect("in the router").expect("conntrack").remove(0).expect("an entry");
    assert!(!entry.tcp.expect("TCP").liberal, "windows are still checked: {entry:?}");
}

#[test]
fn a_trace_tells_what_would_be() {
    let net = Net::new();
    let _daemon = net.up(&["--shadow", "eth0", "eth1"]);
    let mut command = net.router.command(env!("CARGO_BIN_EXE_towpath"));
    command.args(["trace", "--json", "udp", "port", &PORT.to_string()]);
    let mut trace = net.start(command);
    trace.await_log("tracing");
    let sockets = net.packet_sockets();
    let (counts, linux) = (counted(&net).0, by_linux(&net));
    assert_eq!(exchange(&net, &sockets).len(), 5);
    assert!(by_linux(&net) >= linux + 5, "Linux has forwarded them");
    assert_eq!(counted(&net).0, counts + 5);
    eventually("five are told as forwarded", || {
        (trace.log().matches(r#""became":{"path":"fast""#).count() == 5).then_some(())
    });
    assert!(trace.signal(libc::SIGINT).success(), "{}", trace.log());
}

#[test]
fn filters_drop_since_they_were_asked_for() {
    let net = Net::new();
    let _daemon = net.up(&["--shadow", "eth0", "eth1"]);
    let added = net.towpath(&["filter", "add", "--from", "0.0.0.0/0", "--protocol", "udp", "--dport", "7012"]);
    assert!(added.status.success(), "{}", String::from_utf8_lossy(&added.stderr));
    let sockets = net.packet_sockets();
    let frame = |port| {
        let [source, destination] = [LEFT, RIGHT].map(|address| address.parse::<IpAddr>().expect("an address"));
        udp(net.macs()[0], (source, destination), (1024, port), &[7; 32])
    };
    sockets[0].send(&frame(7012)).expect("sent");
    assert_eq!(exchange(&net, &sockets).len(), 5);
    eventually("the dropped one is counted", || (net.exceptions("filtered") == 1).then_some(()));
}

#[test]
fn a_rule_is_predicted() {
    let net = Net::new();
    net.exec("nft add table ip t");
    net.exec("nft add chain ip t c { type filter hook forward priority 0 ; }");
    net.exec("nft add rule ip t c udp dport 7012 drop");
    let _daemon = net.up(&["--shadow", "eth0", "eth1"]);
    let sockets = net.packet_sockets();
    assert_eq!(exchange(&net, &sockets).len(), 5);
    let fast = eventually("the IPv6 packet is predicted", || Some(counted(&net)).filter(|counted| counted.0 >= 1));
    assert_eq!(fast.0, 1);
    let kept = fast.2.iter().find(|(reason, _)| reason == "policy-netfilter").expect("a reason");
    assert!(kept.1 >= 5, "{fast:?}");
}

#[test]
fn workers_have_no_shadow() {
    let net = Net::new();
    net.up_refused(&["--shadow", "--engine", "user", "eth0", "eth1"], 2, &["--shadow", "--engine user"]);
}
