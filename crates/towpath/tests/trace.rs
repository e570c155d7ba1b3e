//! `towpath trace`: real frames through a router, what is said of each, and that nothing remains of a trace.

mod common;
#[path = "flows/support.rs"]
#[allow(dead_code, reason = "each test file uses a part")]
mod support;

use common::{DEADLINE, Daemon, LEFT, Net, RIGHT, RIGHT6, eventually};
use serde_json::Value;
use std::net::IpAddr;
use std::time::Duration;
use support::{Talk, echoes, firewall};
use towpath_lab::packet::udp;
use towpath_lab::{PacketSocket, supported, wait_for};

/// How long a program may take to be verified on a machine that is only emulated.
const LOAD: Duration = Duration::from_secs(120);
const PORT: u16 = 7009;

/// A running `towpath trace --json`.
struct Trace(Daemon);

impl Trace {
    fn start(net: &Net, arguments: &[&str]) -> Self {
        let mut command = net.router.command(env!("CARGO_BIN_EXE_towpath"));
        command.args(["trace", "--json"]).args(arguments);
        let trace = Self(net.start(command));
        wait_for(LOAD, "the trace", || trace.0.log().contains("tracing").then_some(())).expect("it begins");
        trace
    }

    /// The packets told so far.
    fn packets(&self) -> Vec<Value> {
        self.lines().filter_map(|line| line.get("packet").cloned()).collect()
    }

    fn lines(&self) -> impl Iterator<Item = Value> {
        let log = self.0.log();
        let lines: Vec<_> = log.lines().filter(|line| line.starts_with('{')).map(str::to_owned).collect();
        lines.into_iter().filter_map(|line| serde_json::from_str(&line).ok())
    }

    /// Waits until so many packets were told.
    fn told(&self, count: usize) -> Vec<Value> {
        eventually("packets are told", || {
            let packets = self.packets();
            (packets.len() >= count).then_some(packets)
        })
    }

    /// Ends it; how many packets matched and were missed.
    fn finish(mut self) -> (u64, u64) {
        let status = self.0.signal(libc::SIGINT);
        assert!(status.success(), "{}", self.0.log());
        let end = self.lines().find_map(|line| line.get("end").cloned()).expect("a last line");
        (end["matched"].as_u64().expect("a number"), end["missed"].as_u64().expect("a number"))
    }
}

/// Frames from the left host.
struct Sender {
    socket: PacketSocket,
    macs: ([u8; 6], [u8; 6]),
}

impl Sender {
    fn new(net: &Net) -> Self {
        let [socket, _] = net.packet_sockets();
        Self { socket, macs: net.macs()[0] }
    }

    fn frame(&self, source: &str, destination: &str) -> Vec<u8> {
        let [source, destination] = [source, destination].map(|address| address.parse::<IpAddr>().expect("an address"));
        udp(self.macs, (source, destination), (1024, PORT), &[0; 32])
    }

    fn send(&self, frames: &[Vec<u8>]) {
        self.socket.send_all(frames).expect("sent");
    }
}

/// What was found in a step.
fn found<'a>(packet: &'a Value, step: &str) -> &'a str {
    let steps = packet["steps"].as_array().expect("steps");
    let step = steps.iter().find(|found| found["step"] == step).unwrap_or_else(|| panic!("no {step}: {packet}"));
    step["found"].as_str().expect("text")
}

/// Packets of the left host that were forwarded fast.
fn from_left(net: &Net) -> u64 {
    let stats = net.json(&["show", "stats"]);
    let port = stats["ports"].as_array().expect("ports").iter().find(|port| port["port"] == "eth0").cloned();
    port.expect("eth0")["rx_packets"].as_u64().expect("a number")
}

/// The program is one without traces again.
fn no_trace_remains(net: &Net, before: &str) {
    let name = || net.exec("ip -d link show eth0").contains("towpath_traced");
    wait_for(LOAD, "the program without traces", || (!name()).then_some(())).expect("it returns");
    assert_eq!(net.traces().split("prog").count(), before.split("prog").count());
    let sender = Sender::new(net);
    let forwarded = from_left(net);
    sender.send(&vec![sender.frame(LEFT, RIGHT); 10]);
    eventually("it forwards", || (from_left(net) >= forwarded + 10).then_some(()));
}

/// The program's name on a port.
fn program(net: &Net) -> String {
    let id = net.json(&["status"])["program"]["id"].as_u64().expect("an id");
    net.exec("ip -d link show eth0").contains(&format!("id {id}")).then(|| id.to_string()).expect("it runs there")
}

fn mac(bytes: [u8; 6]) -> String {
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}

#[test]
fn each_packet_s_way_is_told_with_what_it_met() {
    let net = Net::new();
    net.ip("route add blackhole 203.0.113.0/24");
    let mut daemon = net.up(&["eth0", "eth1"]);
    let before = net.traces();
    let trace = Trace::start(&net, &["--rate", "1000", "udp", "port", &PORT.to_string()]);
    let sender = Sender::new(&net);
    let mut expired = sender.frame(LEFT, RIGHT);
    expired[22] = 1;
    expired[24..26].copy_from_slice(&[0, 0]);
    let sum = towpath_lab::packet::checksum(&expired[14..34]);
    expired[24..26].copy_from_slice(&sum.to_be_bytes());
    let mut other = sender.frame(LEFT, RIGHT);
    other[37] = 8;
    let (forwarded, local) = (from_left(&net), net.exceptions("local-destination"));
    let frames = [
        sender.frame(LEFT, RIGHT),
        sender.frame("2001:db8:1::2", RIGHT6),
        other,
        sender.frame(LEFT, "192.0.2.1"),
        sender.frame(LEFT, "100.64.0.1"),
        sender.frame(LEFT, "203.0.113.9"),
        expired,
    ];
    for frame in &frames {
        sender.send(std::slice::from_ref(frame));
    }
    let packets = trace.told(6);
    let (matched, missed) = trace.finish();
    assert_eq!((matched, missed, packets.len()), (6, 0, 6));
    // The one that the filter does not match was forwarded too; nothing was counted twice.
    assert_eq!((from_left(&net), net.exceptions("local-destination")), (forwarded + 3, local + 1));

    for packet in &packets {
        assert_eq!(
            (&packet["port"], &packet["agrees"], &packet["queue"]),
            (&"eth0".into(), &true.into(), &0.into()),
            "{packet}"
        );
        assert!(found(packet, "port").starts_with("in by eth0: received on queue 0"), "{packet}");
        assert!(packet["time_ns"].as_u64().expect("a time") > 1_600_000_000_000_000_000, "{packet}");
    }
    let [plain, six, local, lost, hole, expired] = packets.as_slice() else { panic!("six: {packets:?}") };
    let right = mac(net.macs()[1].0);
    assert_eq!(plain["packet"], format!("{LEFT}:1024 > {RIGHT}:{PORT} udp"));
    assert_eq!(plain["length"], 74);
    assert_eq!(plain["became"], serde_json::json!({"path": "fast", "port": "eth1"}));
    assert_eq!((&plain["verdict"]["port"], &plain["verdict"]["destination"]), (&"eth1".into(), &right.as_str().into()));
    assert!(found(plain, "route").contains("198.51.100.0/24 of table main"), "{plain}");
    assert!(found(plain, "next hop").contains(&right), "{plain}");
    assert_eq!(six["packet"], format!("[2001:db8:1::2]:1024 > [{RIGHT6}]:{PORT} udp"));
    assert_eq!((&six["became"]["path"], &six["verdict"]["port"]), (&"fast".into(), &"eth1".into()));
    for (packet, reason, step, words) in [
        (local, "local-destination", "route", "local 192.0.2.1/32"),
        (lost, "no-route", "route", "100.64.0.1: none known"),
        (hole, "non-unicast-route", "route", "blackhole 203.0.113.0/24"),
        (expired, "ttl-expired", "frame", "60 bytes"),
    ] {
        assert_eq!(
            (&packet["became"]["path"], &packet["became"]["reason"]),
            (&"linux".into(), &reason.into()),
            "{packet}"
        );
        assert_eq!(packet["verdict"]["reason"], reason, "{packet}");
        assert!(found(packet, step).contains(words), "{packet}");
    }
    no_trace_remains(&net, &before);
    assert!(daemon.signal(libc::SIGTERM).success());
}

#[test]
fn a_connection_is_told_as_linux_first_and_then_as_fast() {
    let net = firewall();
    let _daemon = net.up(&["--flows", "established", "eth0", "eth1"]);
    echoes(&net);
    let trace = Trace::start(&net, &["--rate", "1000", "tcp", "port", "7001"]);
    let mut talk = Talk::start(&net.left, &format!("{RIGHT}:7001"));
    talk.becomes_fast(&net);
    let fast = |packet: &Value| packet["became"]["path"] == "fast" && packet["port"] == "eth0";
    let packets = eventually("a fast packet", || Some(trace.packets()).filter(|packets| packets.iter().any(fast)));
    let first = &packets[0];
    assert_eq!(first["became"]["path"], "linux", "{first}");
    let packet = packets.iter().find(|packet| fast(packet)).expect("just seen");
    assert!(found(packet, "connection").contains("of whoever began it, leaves as 198.51.100.1:"), "{packet}");
    assert!(found(packet, "policy").contains("only connections that Linux accepted pass"), "{packet}");
    trace.finish();
}

#[test]
fn a_flood_is_told_at_its_rate_and_the_rest_is_counted() {
    const FLOOD: u64 = 5000;
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    let trace = Trace::start(&net, &["--rate", "5", &format!("udp port {PORT}")]);
    let sender = Sender::new(&net);
    let begin = std::time::Instant::now();
    let forwarded = from_left(&net);
    for _ in 0..FLOOD / 100 {
        sender.send(&vec![sender.frame(LEFT, RIGHT); 100]);
    }
    eventually("the flood is forwarded", || (from_left(&net) >= forwarded + FLOOD).then_some(()));
    let packets = trace.told(5);
    let most = 5 + 5 * (begin.elapsed().as_secs() + 1);
    let (matched, missed) = trace.finish();
    assert_eq!(matched, FLOOD);
    assert!(packets.len() as u64 <= most && missed >= FLOOD - most, "{missed} missed, {} told", packets.len());
    assert!(packets.last().expect("some")["missed"].as_u64() <= Some(missed));
}

#[test]
fn exceptions_are_told_beside_a_flood_of_fast_packets() {
    for engine in ["xdp", "user"] {
        exceptions_beside_a_flood(engine);
    }
}

fn exceptions_beside_a_flood(engine: &str) {
    let net = Net::new();
    let _daemon = net.up(&["--engine", engine, "eth0", "eth1"]);
    let by_reason = Trace::start(&net, &["--rate", "2", "--reason", "no-route"]);
    let exceptions = Trace::start(&net, &["--rate", "1000", "--exceptions", &format!("udp port {PORT}")]);
    let sender = Sender::new(&net);
    let mut frames = vec![sender.frame(LEFT, RIGHT); 400];
    frames[200] = sender.frame(LEFT, "100.64.0.1");
    frames[300] = sender.frame(LEFT, "192.0.2.1");
    sender.send(&frames);
    let (told, single) = (exceptions.told(2), by_reason.told(1));
    let reasons: Vec<_> = told.iter().map(|packet| packet["became"]["reason"].as_str().expect("Linux's")).collect();
    assert_eq!(reasons, ["no-route", "local-destination"]);
    assert_eq!(single[0]["became"]["reason"], "no-route");
    assert_eq!(exceptions.finish(), (2, 0));
    assert_eq!(by_reason.finish(), (1, 0));
}

#[test]
fn a_client_that_is_killed_leaves_nothing() {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    let (before, program_before) = (net.traces(), program(&net));
    let mut traces: Vec<_> = (0..4).map(|_| Trace::start(&net, &["udp"])).collect();
    assert_ne!(program(&net), program_before);
    let message = net.refused(&["trace"]);
    assert!(message.contains("4 traces run already"), "{message}");
    for trace in &mut traces {
        trace.0.signal(libc::SIGKILL);
    }
    no_trace_remains(&net, &before);
    // There is room again.
    let again = Trace::start(&net, &["-c", "1", "udp"]);
    let sender = Sender::new(&net);
    sender.send(&[sender.frame(LEFT, RIGHT)]);
    let mut again = again;
    assert!(again.0.wait().success());
    assert_eq!(again.packets().len(), 1);
    no_trace_remains(&net, &before);
}

#[test]
fn a_trace_goes_on_when_tables_grow() {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    let trace = Trace::start(&net, &["--rate", "1000", &format!("udp port {PORT}")]);
    let traced = program(&net);
    let route = |n: u32| format!("route add 10.{}.{}.1/32 via {RIGHT}\n", n >> 8, n & 255);
    let batch: String = (0..24_000).map(route).collect();
    let file = net.router.folder("routes").with_extension("batch");
    std::fs::write(&file, batch).expect("a file");
    net.exec(&format!("ip -batch {}", file.display()));
    wait_for(LOAD, "another program", || (program(&net) != traced).then_some(())).expect("tables have grown");
    let sender = Sender::new(&net);
    sender.send(&[sender.frame(LEFT, RIGHT)]);
    trace.told(1);
    assert_eq!(trace.finish(), (1, 0));
}

#[test]
fn what_a_worker_has_is_told_too() {
    let net = Net::new();
    let _daemon = net.up(&["--engine", "user", "eth0", "eth1"]);
    let trace = Trace::start(&net, &["--rate", "1000", &format!("udp port {PORT}")]);
    let sender = Sender::new(&net);
    sender.send(&[sender.frame(LEFT, RIGHT), sender.frame(LEFT, "100.64.0.1")]);
    let packets = trace.told(2);
    assert!(packets.iter().all(|packet| packet["agrees"] == true), "{packets:?}");
    assert_eq!((&packets[0]["became"]["port"], &packets[1]["became"]["reason"]), (&"eth1".into(), &"no-route".into()));
    assert_eq!(trace.finish(), (2, 0));
}

#[test]
fn tagged_frames_are_told_with_their_port() {
    let net = Net::new();
    let probe = ["ip", "link", "add", "link", "eth0", "name", "eth0.10", "type", "vlan", "id", "10"];
    if !supported("802.1Q", || net.router.run(probe).map(drop)) {
        return;
    }
    net.ip("link set eth0.10 up");
    net.ip("address add 198.18.10.1/24 dev eth0.10");
    net.router.forward().expect("forwarding");
    let _daemon = net.up(&["eth0", "eth1"]);
    let trace = Trace::start(&net, &["vlan", "10", "and", "udp"]);
    let sender = Sender::new(&net);
    let plain = sender.frame("198.18.10.2", RIGHT);
    sender.send(&[[&plain[..12], &[0x81, 0, 0, 10], &plain[12..]].concat(), plain]);
    let packets = trace.told(1);
    assert!(found(&packets[0], "port").starts_with("in by eth0.10: "), "{}", packets[0]);
    assert_eq!((&packets[0]["became"]["port"], &packets[0]["agrees"]), (&"eth1".into(), &true.into()));
    assert_eq!(trace.finish(), (1, 0));
}

#[test]
fn people_read_lines_and_wrong_wishes_are_refused() {
    let net = Net::new();
    assert!(net.refused(&["trace"]).contains("no towpath runs"));
    let _daemon = net.up(&["eth0", "eth1"]);
    let message = net.refused(&["trace", "udp", "porf", "9"]);
    assert!(message.contains("syntax error"), "{message}");
    let message = net.refused(&["trace", "--reason", "no-ruote"]);
    assert!(message.contains("no-ruote") && message.contains("no-route"), "{message}");
    let mut command = net.router.command(env!("CARGO_BIN_EXE_towpath"));
    command.args(["trace", "-c", "2", &format!("udp port {PORT}")]);
    let mut trace = net.start(command);
    wait_for(LOAD, "the trace", || trace.log().contains("tracing").then_some(())).expect("it begins");
    let sender = Sender::new(&net);
    sender.send(&[sender.frame(LEFT, RIGHT), sender.frame(LEFT, "100.64.0.1")]);
    wait_for(DEADLINE, "its end", || trace.log().contains("packets matched").then_some(())).expect("after two");
    assert!(trace.wait().success());
    let log = trace.log();
    for words in [
        "Z eth0 192.0.2.2:1024 > 198.51.100.2:7009 udp, 74 bytes",
        "\n  => fast path: out eth1 to ",
        "\n  => Linux: no-route: no route to the destination",
        "2 packets matched, 0 of them",
    ] {
        assert!(log.contains(words), "{words:?} is missing in: {log}");
    }
}
