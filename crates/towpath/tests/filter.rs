//! The operator's filters from end to end: what they match is dropped where it comes in, by either engine, and nothing else.

mod common;

use common::{Daemon, LEFT, LEFT6, Net, RIGHT, RIGHT6, Stream, at, datagrams, eventually};
use serde_json::{Value, json};
use std::io::Write;
use std::net::{SocketAddr, UdpSocket};
use std::process::Stdio;
use std::time::Duration;
use towpath_lab::Frame;

const ENGINES: [&[&str]; 2] = [&["--engine", "xdp", "eth0", "eth1"], &["--engine", "user", "eth0", "eth1"]];

fn filter(net: &Net, arguments: &str) {
    let words: Vec<&str> = ["filter"].into_iter().chain(arguments.split_whitespace()).collect();
    let output = net.towpath(&words);
    assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Makes changes that are written to the command's standard input; what it says if they are refused.
fn apply(net: &Net, lines: &str) -> Result<(), String> {
    let mut command = net.router.command(env!("CARGO_BIN_EXE_towpath"));
    command.args(["filter", "apply", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("started");
    child.stdin.take().expect("a pipe").write_all(lines.as_bytes()).expect("written");
    let output = child.wait_with_output().expect("an end");
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

fn list(net: &Net) -> Vec<Value> {
    net.json(&["filter", "list"])["filters"].as_array().expect("filters").clone()
}

/// Packets over which the filter of a source has decided.
fn packets(net: &Net, from: &str) -> u64 {
    let all = list(net);
    let row = all.iter().find(|row| row["from"] == from).unwrap_or_else(|| panic!("{from} in {all:?}"));
    row["packets"].as_u64().expect("a count")
}

/// Sends a datagram and one that nobody drops behind it: whether the first came, too.
fn comes(from: &UdpSocket, to: (&UdpSocket, SocketAddr), marker: (&UdpSocket, SocketAddr)) -> bool {
    from.send_to(b"asked", to.1).expect("sent");
    from.send_to(b"marker", marker.1).expect("sent");
    let mut buffer = [0; 99];
    marker.0.recv_from(&mut buffer).expect("what is not filtered comes");
    to.0.set_read_timeout(Some(Duration::from_millis(1))).expect("set");
    to.0.recv_from(&mut buffer).is_ok()
}

/// What filters match is dropped and counted, by IPv4 and IPv6, by the program and by workers.
#[test]
fn what_is_matched_is_dropped_and_nothing_else() {
    for engine in ENGINES {
        let net = Net::new();
        let mut daemon = net.up(engine);
        for (left, right, any, whole) in [(LEFT, RIGHT, "0.0.0.0/0", 32), (LEFT6, RIGHT6, "::/0", 128)] {
            let (here, there, marker) = (
                datagrams(&net.left, left, 4000),
                datagrams(&net.right, right, 5000),
                datagrams(&net.right, right, 5001),
            );
            let passes = || comes(&here, (&there, at(right, 5000)), (&marker, at(right, 5001)));
            assert!(passes(), "{engine:?}: before");
            let (before, forwarded) = (net.exceptions("filtered"), net.forwarded());
            filter(&net, &format!("add --from {any} --to {right} --protocol udp --dport 5000"));
            assert!(!passes(), "{engine:?}: dropped");
            assert!(net.forwarded() > forwarded, "the marker went fast");
            assert_eq!((packets(&net, any), net.exceptions("filtered")), (1, before + 1));
            filter(&net, &format!("add --from {left}/{whole} --protocol udp --pass"));
            assert!(passes(), "{engine:?}: passed, in spite of the wider one");
            let counted = list(&net);
            let pass = counted.iter().find(|row| row["action"] == "pass").expect("it is listed");
            assert_eq!(pass["packets"], 2, "what it decided over, once each");
            filter(&net, &format!("del --from {left}/{whole} --protocol udp --pass"));
            assert!(!passes());
            filter(&net, &format!("del --from {any} --to {right} --protocol udp --dport 5000"));
            assert!(passes(), "{engine:?}: after");
        }
        assert!(list(&net).is_empty());
        net.towpath(&["down"]);
        assert!(daemon.wait().success());
    }
}

/// Not even the router itself, or who captures there, sees what is dropped; every answer says so.
#[test]
fn dropped_is_before_linux_and_said_everywhere() {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    assert!(net.ping(&net.left, "192.0.2.1"));
    filter(&net, &format!("add --port eth0 --from {LEFT} --protocol icmp"));
    let socket = net.router.packet_socket("eth0").expect("a packet socket");
    assert!(!net.ping(&net.left, "192.0.2.1") && !net.ping(&net.left, RIGHT));
    let source: Vec<u8> = LEFT.parse::<std::net::Ipv4Addr>().expect("an address").octets().to_vec();
    let from_left = |frame: &Frame| frame.bytes.get(26..30) == Some(&source);
    let seen = socket.receive_matching(Duration::from_millis(1), from_left).expect("received");
    assert!(seen.is_none(), "a capture sees {:02x?}", seen.map(|frame| frame.bytes));
    drop(socket);
    eventually("the capture is over", || (net.json(&["status"])["policies"] == json!([])).then_some(()));
    let status = net.json(&["status"]);
    assert_eq!(status["filters"], 1);
    assert!(status["notices"].to_string().contains("drop packets before Linux or tcpdump"), "{status}");
    let explained = net.json(&["explain", LEFT, RIGHT, "in", "eth0"]);
    assert_eq!(explained["verdict"]["path"], "fast", "UDP is not asked for");
    filter(&net, &format!("add --port eth0 --from {LEFT} --protocol udp"));
    let explained = net.json(&["explain", LEFT, RIGHT, "in", "eth0"]);
    assert_eq!(
        (&explained["verdict"]["path"], &explained["verdict"]["reason"]),
        (&"dropped".into(), &"filtered".into())
    );
    let detail = explained["verdict"]["detail"].as_str().expect("a detail");
    assert_eq!(detail, format!("--from {LEFT}/32 --protocol udp --port eth0"));
    let stats = net.json(&["show", "stats"])["ports"][0]["exceptions"].as_u64().expect("a count");
    let filtered = net.exceptions("filtered");
    assert!(filtered >= 2, "{filtered}");
    let exceptions = net.json(&["show", "exceptions"])["exceptions"].as_array().expect("rows").clone();
    let eth0 =
        exceptions.iter().filter(|row| row["port"] == "eth0").map(|row| row["packets"].as_u64().expect("a count"));
    assert!(stats + filtered <= eth0.sum::<u64>(), "what was dropped does not count as handed to Linux");
    filter(&net, "flush");
    assert!(net.ping(&net.left, "192.0.2.1") && net.ping(&net.left, RIGHT));
}

/// Filters become many, other ones, and none while packets flow by: none of these is lost.
#[test]
fn changes_lose_nothing_that_is_not_filtered() {
    for engine in ENGINES {
        let net = Net::new();
        let _daemon = net.up(engine);
        let streams = [RIGHT, RIGHT6].map(|destination| Stream::start(&net, destination));
        net.flows(100);
        let many = |base: u8, count: u32| -> String {
            let line = |n: u32| format!("add --from {base}.{}.{}.{}/32\n", n >> 16, n >> 8 & 255, n & 255);
            (0..count).map(line).collect::<String>() + &format!("add --from 2001:db8:{base}::/48\n")
        };
        apply(&net, &many(10, 20_000)).expect("allowed");
        assert_eq!(net.json(&["status"])["filters"], 20_001);
        apply(&net, &format!("flush\n{}", many(11, 300))).expect("allowed");
        for n in 0..10 {
            filter(&net, &format!("add --from 12.0.{n}.0/24 --protocol tcp --dport 80"));
        }
        assert_eq!(list(&net).len(), 311);
        filter(&net, "flush");
        net.flows(100);
        for stream in streams {
            stream.finish_complete();
        }
        assert_eq!(net.exceptions("filtered"), 0, "{engine:?}");
    }
}

/// A daemon that is killed leaves its filters in force, and the next one has them and their counters.
#[test]
fn filters_outlive_the_daemon() {
    let net = Net::new();
    let mut daemon: Daemon = net.up(&["eth0", "eth1"]);
    filter(&net, &format!("add --from {LEFT} --port eth0"));
    filter(&net, &format!("add --from {LEFT6} --protocol icmp"));
    filter(&net, "add --from 198.51.100.0/24 --to 203.0.113.0/24 --protocol udp --sport 53 --pass");
    assert!(!net.ping(&net.left, RIGHT) && !net.ping(&net.left, RIGHT6));
    let before = list(&net);
    assert!(packets(&net, "192.0.2.2/32") >= 1 && packets(&net, "2001:db8:1::2/128") >= 1);
    daemon.signal(libc::SIGKILL);
    assert!(!net.ping(&net.left, RIGHT) && !net.ping(&net.left, RIGHT6), "without a daemon");
    let _daemon = net.up(&["eth0", "eth1"]);
    assert_eq!(net.json(&["status"])["adopted"], true);
    let after = list(&net);
    assert_eq!(after.len(), 3);
    for (before, after) in before.iter().zip(&after) {
        assert!(after["packets"].as_u64() >= before["packets"].as_u64());
        let asked =
            |row: &Value| ["action", "from", "to", "protocol", "sport", "dport", "port"].map(|key| row[key].clone());
        assert_eq!(asked(before), asked(after));
    }
    assert!(packets(&net, "192.0.2.2/32") >= 2, "those without a daemon, too");
    assert!(!net.ping(&net.left, RIGHT) && !net.ping(&net.left, RIGHT6), "with the next one");
    filter(&net, &format!("del --from {LEFT} --port eth0"));
    filter(&net, &format!("del --from {LEFT6} --protocol icmp"));
    assert!(net.ping(&net.left, RIGHT) && net.ping(&net.left, RIGHT6));
    net.ip("link del eth1");
    filter(&net, "flush");
}

/// What cannot be is refused with a message, and nothing changes.
#[test]
fn bad_filters_are_refused_and_change_nothing() {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    filter(&net, "add --from 10.0.0.0/8");
    let before = list(&net);
    let too_deep: String = (0..33).map(|n| format!("add --from 11.0.0.0/8 --protocol udp --dport {n}\n")).collect();
    for (lines, words) in [
        ("add --from 10.0.0.0/8", &["add --from 10.0.0.0/8", "such a filter already"][..]),
        ("add --from 10.0.0.0/8 --pass", &["such a filter already"]),
        ("add --from 11.0.0.0/8\nadd --from 12.0.0.0/8\nadd --from 11.0.0.0/8", &["add --from 11.0.0.0/8", "already"]),
        ("flush\ndel --from 10.0.0.0/8", &["del --from 10.0.0.0/8", "no such filter"]),
        ("del --from 10.0.0.0/8 --pass", &["no such filter"]),
        ("flush\nadd --from 10.0.0.1/8", &["line 2", "did you mean 10.0.0.0/8?"]),
        ("add --from 11.0.0.0/8 --port eth7", &["there is no port eth7"]),
        ("add --from 11.0.0.0/8 --port lo", &["lo", "no port"]),
        (&too_deep, &["11.0.0.0/8", "more than 32 filters"]),
        ("nonsense", &["line 1", "nonsense"]),
    ] {
        let message = apply(&net, lines).expect_err(lines);
        for word in words {
            assert!(message.contains(word), "{lines}: {word:?} is missing in: {message}");
        }
        assert_eq!(list(&net), before, "{lines}");
    }
    let session = |force: &str| {
        let mut command = net.router.command(env!("CARGO_BIN_EXE_towpath"));
        command.env("SSH_CONNECTION", "192.0.2.2 50022 192.0.2.1 22").args(["filter", "add", "--from", "192.0.2.0/24"]);
        command.args(force.split_whitespace()).output().expect("run")
    };
    let refused = session("");
    let message = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && message.contains("where you are logged in"), "{message}");
    assert_eq!(list(&net), before);
    assert!(session("--force").status.success());
    filter(&net, "flush");
    filter(&net, "add --from 192.0.2.2 --pass");
    assert!(session("").status.success(), "the session passes");
}
