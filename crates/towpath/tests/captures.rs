//! Captures by tcpdump while the fast path carries two flows: what the filter matches is seen whole, in both directions, and
//! the rest stays fast.

mod common;

use common::{DEADLINE, LEFT, LEFT6, Net, RIGHT, RIGHT6, Stream, eventually};
use serde_json::Value;
use std::net::UdpSocket;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use towpath_lab::{Node, Process, wait_for};

/// The flow that filters are about, and another.
const WANTED: u16 = 7001;
const OTHER: u16 = 7002;
/// Packets of each flow in each direction.
const COUNT: u64 = 200;

/// How long to wait for a program to be loaded: a machine that is only emulated takes 20 s to verify it.
const LOAD: Duration = Duration::from_secs(120);

/// A running tcpdump that writes a file.
struct Tcpdump {
    process: Process,
    file: PathBuf,
}

impl Tcpdump {
    /// Waits until the fast path knows of it: `narrow` says which scopes let through what does not match.
    fn start(net: &Net, arguments: &str, narrow: &[&str]) -> Self {
        let file = net.router.folder("capture").with_extension("pcap");
        let mut command = net.router.command("tcpdump");
        command
            .args(["-n", "-s", "96", "-B", "16384", "--immediate-mode", "-U", "-w"])
            .arg(&file)
            .args(arguments.split_whitespace());
        let mut process = net.router.start(command).expect("tcpdump");
        process.wait_for_output(DEADLINE, "listening on").expect("it listens");
        wait_for(LOAD, &format!("{arguments}: narrow in {narrow:?}"), || {
            let policies = captures(net);
            let scopes = |filtered: bool| -> Vec<String> {
                let of = policies.iter().filter(|policy| policy["filtered"] == filtered);
                of.map(|policy| policy["scope"].as_str().expect("a scope").to_owned()).collect()
            };
            let mut own = scopes(true);
            own.dedup();
            let whole = scopes(false).iter().all(|scope| !narrow.contains(&scope.as_str()));
            (!policies.is_empty() && own == narrow && whole).then_some(())
        })
        .expect("in time");
        Self { process, file }
    }

    /// Waits until it has seen as many packets to or from each of the two ports, and ends it; it may not have seen more.
    fn finish(mut self, net: &Net, seen: [u64; 2]) {
        // What it has not read when it is told to end is lost.
        let _ = wait_for(DEADLINE, "packets", || (self.seen(net) == seen).then_some(()));
        self.process.signal(libc::SIGINT);
        self.process.wait(DEADLINE).expect("an end");
        assert_eq!(self.seen(net), seen, "seen of each flow: {}", self.process.log());
        std::fs::remove_file(&self.file).expect("its file");
        eventually("the capture is over", || captures(net).is_empty().then_some(()));
    }

    /// Packets of the two flows in its file.
    fn seen(&self, net: &Net) -> [u64; 2] {
        [WANTED, OTHER].map(|port| {
            let mut command = net.router.command("tcpdump");
            let output = command.arg("-nr").arg(&self.file).arg(format!("udp port {port}")).output().expect("tcpdump");
            output.stdout.split(|byte| *byte == b'\n').count() as u64 - 1
        })
    }
}

/// The policies for captures.
fn captures(net: &Net) -> Vec<Value> {
    let status = net.json(&["status"]);
    let policies = status["policies"].as_array().expect("policies");
    policies.iter().filter(|policy| policy["source"] == "capture").cloned().collect()
}

/// Two hosts that exchange packets of the two flows.
struct Flows<'a> {
    net: &'a Net,
    ends: [(&'a Node, &'a str); 2],
}

impl<'a> Flows<'a> {
    fn v4(net: &'a Net) -> Self {
        Self { net, ends: [(&net.left, LEFT), (&net.right, RIGHT)] }
    }

    fn v6(net: &'a Net) -> Self {
        Self { net, ends: [(&net.left, LEFT6), (&net.right, RIGHT6)] }
    }

    /// Sends `COUNT` packets of each flow in each direction; all arrive, each once. How many were forwarded fast, and how
    /// many went to Linux since a capture is to see them.
    fn exchange(&self) -> [u64; 2] {
        let before = (self.net.forwarded(), self.net.exceptions("policy-capture"));
        for (from, to) in [(0, 1), (1, 0)] {
            for port in [WANTED, OTHER] {
                self.send(self.ends[from], self.ends[to], port);
            }
        }
        [self.net.forwarded() - before.0, self.net.exceptions("policy-capture") - before.1]
    }

    /// Waits until the program without filters is there again.
    fn all_fast(&self) {
        let fast = || (self.exchange() == [4 * COUNT, 0]).then_some(());
        wait_for(LOAD, "everything to be fast again", fast).expect("in time");
    }

    fn send(&self, (from, source): (&Node, &str), (to, destination): (&Node, &str), port: u16) {
        let bound = |node: &Node, address: &str, port: u16| {
            let address: std::net::IpAddr = address.parse().expect("an address");
            node.enter(|| UdpSocket::bind((address, port))).expect("in the node").expect("bound")
        };
        let (sender, receiver) = (bound(from, source, port), bound(to, destination, port));
        receiver.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        sender.connect(receiver.local_addr().expect("an address")).expect("connected");
        let mut buffer = [0; 64];
        for number in 0..COUNT {
            sender.send(&number.to_be_bytes()).expect("sent");
            // One after the other: nothing overflows, and nothing comes twice in place of another.
            let length = receiver.recv(&mut buffer).unwrap_or_else(|error| panic!("{port}, packet {number}: {error}"));
            assert_eq!(buffer[..length], number.to_be_bytes(), "port {port}");
        }
        receiver.set_read_timeout(Some(Duration::from_millis(20))).expect("a timeout");
        assert!(receiver.recv(&mut buffer).is_err(), "port {port}: something came twice");
    }
}

/// A capture of `arguments`: what it sees of the two flows, and how many packets go fast and to Linux.
fn prove(flows: &Flows, arguments: &str, narrow: &[&str], seen: [u64; 2], ways: [u64; 2]) {
    let tcpdump = Tcpdump::start(flows.net, arguments, narrow);
    assert_eq!(flows.exchange(), ways, "{arguments}: fast, to Linux");
    tcpdump.finish(flows.net, seen);
    flows.all_fast();
}

const BOTH: &[&str] = &["ingress", "egress"];
const IN: &[&str] = &["ingress"];

#[test]
fn a_filter_takes_what_it_matches_from_the_fast_path_and_nothing_else() {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    let flows = Flows::v4(&net);
    flows.exchange();
    for port in ["eth0", "eth1"] {
        prove(&flows, &format!("-i {port} udp port 7001"), BOTH, [2 * COUNT, 0], [2 * COUNT, 2 * COUNT]);
    }
    prove(&flows, "-i eth1 tcp port 80", BOTH, [0, 0], [4 * COUNT, 0]);
    prove(&flows, "-i eth1 src host 192.0.2.2 and udp port 7001", BOTH, [COUNT, 0], [3 * COUNT, COUNT]);
    // Each packet passes two ports.
    prove(&flows, "-i any udp port 7001", BOTH, [4 * COUNT, 0], [2 * COUNT, 2 * COUNT]);
    let flows = Flows::v6(&net);
    flows.exchange();
    prove(&flows, "-i eth1 udp port 7001", BOTH, [2 * COUNT, 0], [2 * COUNT, 2 * COUNT]);
    prove(&flows, "-i any ip6 and udp port 7001", BOTH, [4 * COUNT, 0], [2 * COUNT, 2 * COUNT]);
}

#[test]
fn what_a_filter_cannot_tell_when_a_packet_arrives_is_linuxs() {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    let flows = Flows::v4(&net);
    flows.exchange();
    // It comes with 64 hops and leaves with 63.
    prove(&flows, "-i eth1 ip[8] = 63 and udp port 7001", IN, [COUNT, 0], [2 * COUNT, 2 * COUNT]);
    prove(&flows, "-i eth1 ip[8] = 64 and udp port 7001", IN, [COUNT, 0], [COUNT, 3 * COUNT]);
    let mac = net.router.mac("eth1").expect("an address").map(|byte| format!("{byte:02x}")).join(":");
    prove(&flows, &format!("-i eth1 ether src {mac}"), IN, [COUNT, COUNT], [2 * COUNT, 2 * COUNT]);
    prove(&flows, "-i eth1", &[], [2 * COUNT, 2 * COUNT], [0, 4 * COUNT]);
    // More instructions than are run
    let far: String = (0..600).map(|number| format!(" or host 198.18.{}.{}", number / 200, number % 200)).collect();
    prove(&flows, &format!("-i eth1 udp port 7001 and (net 192.0.2.0/24{far})"), &[], [2 * COUNT, 0], [0, 4 * COUNT]);
}

#[test]
fn several_captures_see_each_its_own() {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    let flows = Flows::v4(&net);
    flows.exchange();
    let first = Tcpdump::start(&net, "-i eth0 udp port 7001 and src host 192.0.2.2", BOTH);
    let mut second = net.router.command("tcpdump");
    second.args(["-ni", "eth1", "-c", "1", "udp port 7002 and dst host 192.0.2.2"]);
    let mut second = net.router.start(second).expect("tcpdump");
    second.wait_for_output(DEADLINE, "listening on").expect("it listens");
    let both = || {
        let policies = captures(&net);
        (policies.len() == 4 && policies.iter().all(|policy| policy["filtered"] == true)).then_some(())
    };
    wait_for(LOAD, "both filters to be run", both).expect("in time");
    assert_eq!(flows.exchange(), [2 * COUNT, 2 * COUNT]);
    second.wait(DEADLINE).expect("it ends when it has seen one");
    first.finish(&net, [COUNT, 0]);
    flows.all_fast();
}

#[test]
fn explain_and_status_name_the_filter() {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    Flows::v4(&net).exchange();
    let tcpdump = Tcpdump::start(&net, "-i eth1 udp port 7001", BOTH);
    let text = |arguments: &[&str]| String::from_utf8(net.towpath(arguments).stdout).expect("text");
    let status = text(&["status"]);
    assert!(status.contains("matching") && status.contains("with a filter of"), "{status}");
    let explained = text(&["explain", "192.0.2.2", "198.51.100.2"]);
    assert!(explained.contains("it goes to Linux if it matches: packet socket"), "{explained}");
    tcpdump.finish(&net, [0, 0]);
    let whole = Tcpdump::start(&net, "-i eth1 greater 1", IN);
    let status = text(&["status"]);
    assert!(status.contains("with a filter that looks at what forwarding changes"), "{status}");
    whole.finish(&net, [0, 0]);
}

#[test]
fn status_says_that_there_are_more_filters_than_can_be_run() {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    let start = |port: u16| {
        let mut command = net.router.command("tcpdump");
        command.args(["-ni", "eth0", "-w", "/dev/null"]).arg(format!("udp port {port}"));
        let mut process = net.router.start(command).expect("tcpdump");
        process.wait_for_output(DEADLINE, "listening on").expect("it listens");
        process
    };
    let mut running: Vec<Process> = (9001..=9009).map(start).collect();
    let notices = || net.json(&["status"])["notices"].to_string();
    let narrow = || captures(&net).iter().filter(|policy| policy["filtered"] == true).count();
    // Two policies each: what enters and what leaves.
    wait_for(LOAD, "eight of nine", || (narrow() == 16 && notices().contains("more than 8 filters")).then_some(()))
        .expect("in time");
    running.pop().expect("nine").kill().expect("killed");
    wait_for(LOAD, "eight", || (narrow() == 16 && !notices().contains("filters")).then_some(())).expect("in time");
}

#[test]
fn a_capture_stays_whole_over_a_restart() {
    let net = Net::new();
    let mut daemon = net.up(&["eth0", "eth1"]);
    let flows = Flows::v4(&net);
    flows.exchange();
    let tcpdump = Tcpdump::start(&net, "-i eth1 udp port 7001", BOTH);
    daemon.signal(libc::SIGKILL);
    // Without a daemon the program goes on.
    let receiver = net.right.enter(|| UdpSocket::bind((RIGHT, WANTED))).expect("in the node").expect("bound");
    let sender = net.left.enter(|| UdpSocket::bind((LEFT, 0))).expect("in the node").expect("bound");
    receiver.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    let _daemon = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                sender.send_to(b"over", (RIGHT, WANTED)).expect("sent");
                receiver.recv(&mut [0; 8]).expect("received");
                sent.fetch_add(1, Relaxed);
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        let daemon = net.up(&["eth0", "eth1"]);
        let again = || captures(&net).iter().all(|policy| policy["filtered"] == true).then_some(());
        wait_for(LOAD, "the filter to be run again", again).expect("in time");
        stop.store(true, Relaxed);
        daemon
    });
    assert!(sent.load(Relaxed) > 1000, "{sent:?} packets");
    tcpdump.finish(&net, [sent.load(Relaxed), 0]);
}

/// The numbers of a stream's packets in a capture of an Ethernet port, in the machine's byte order.
fn numbers(file: &PathBuf) -> Vec<u64> {
    const HEADERS: usize = 42;
    let bytes = std::fs::read(file).expect("the capture");
    let (mut rest, mut numbers) = (&bytes[24..], Vec::new());
    while let Some((header, frame)) = rest.split_first_chunk::<16>() {
        let length = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]) as usize;
        numbers.push(u64::from_be_bytes(frame[HEADERS..HEADERS + 8].try_into().expect("a number")));
        rest = &frame[length..];
    }
    numbers
}

#[test]
fn a_stream_passes_whole_while_captures_come_and_go_and_each_sees_all_of_it() {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    let stream = Stream::start(&net, RIGHT);
    net.flows(50);
    for _ in 0..3 {
        // From the moment when everything goes to Linux to the one when only this does.
        let mut tcpdump = Tcpdump::start(&net, "-i eth1 udp port 7000", BOTH);
        let counted = net.exceptions("policy-capture");
        stream.advance(200);
        assert!(net.exceptions("policy-capture") >= counted + 190, "it goes by way of Linux");
        tcpdump.process.signal(libc::SIGINT);
        tcpdump.process.wait(DEADLINE).expect("an end");
        // While it puts its filter in place tcpdump itself misses some, at the very beginning.
        let seen = numbers(&tcpdump.file).split_off(100);
        let gaps: Vec<_> = seen.array_windows().filter(|[one, next]| one + 1 != *next).collect();
        assert!(gaps.is_empty(), "packets missed between {gaps:?}");
        assert!(seen.len() > 200, "{} packets", seen.len());
        net.flows(50);
    }
    stream.finish_complete();
}

#[test]
fn what_a_filter_matches_never_reaches_a_worker() {
    let net = Net::new();
    let _daemon = net.up(&["--engine", "user", "eth0", "eth1"]);
    let flows = Flows::v4(&net);
    flows.exchange();
    prove(&flows, "-i eth1 udp port 7001", BOTH, [2 * COUNT, 0], [2 * COUNT, 2 * COUNT]);
    prove(&flows, "-i any udp port 7001", BOTH, [4 * COUNT, 0], [2 * COUNT, 2 * COUNT]);
}

#[test]
fn what_a_filter_matches_is_linuxs_where_it_comes_in_by_a_wire() {
    let net = Net::wired();
    let _daemon = net.up(&["--engine", "user", "lan0=tap:tap0", "eth1"]);
    net.connect_tap();
    for flows in [Flows::v4(&net), Flows::v6(&net)] {
        flows.exchange();
        for port in ["lan0", "eth1"] {
            prove(&flows, &format!("-i {port} udp port 7001"), BOTH, [2 * COUNT, 0], [2 * COUNT, 2 * COUNT]);
        }
    }
    let flows = Flows::v4(&net);
    prove(&flows, "-i lan0 ip[8] = 64 and udp port 7001", IN, [COUNT, 0], [COUNT, 3 * COUNT]);
    prove(&flows, "-i lan0", &[], [2 * COUNT, 2 * COUNT], [0, 4 * COUNT]);
}
