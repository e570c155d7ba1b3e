//! Real clients and real servers, as they are installed, through a gateway with a stateful firewall, masquerade, port
//! forwarding and FTP's helper, while the rules are replaced again and again.
//!
//! Servers on the right are reached through masquerade, those on the left through the port forwarding.

mod common;
#[path = "gateway/real.rs"]
mod real;
#[path = "flows/support.rs"]
#[allow(dead_code, reason = "each test file uses a part")]
mod support;

use common::{DEADLINE, Daemon, LEFT, Net, RIGHT, eventually};
use real::{FILTER, Transfer, folder, serve};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use support::{OUTSIDE, fast_packets, flow, is_fast, tracked};
use towpath_lab::{Node, Process, supported};

const NAT: &str = "\
    table ip nat { \
        chain out { \
            type nat hook postrouting priority srcnat; \
            oifname eth1 masquerade; \
            iifname eth0 oifname eth0 ct status dnat masquerade; \
        }; \
        chain in { \
            type nat hook prerouting priority dstnat; \
            ip daddr 198.51.100.1 tcp dport 8080 dnat to 192.0.2.2:80; \
            ip daddr 198.51.100.1 meta l4proto { tcp, udp } th dport { 53, 5201 } dnat to 192.0.2.2; \
        }; \
    };";

/// FTP's helper for what goes to its port.
const HELPER: &str = "\
    table inet helpers { \
        ct helper ftp { type \"ftp\" protocol tcp; }; \
        chain pre { type filter hook prerouting priority 0; tcp dport 21 ct helper set \"ftp\"; }; \
    };";

fn gateway() -> (Net, Daemon) {
    let net = Net::new();
    replace_rules(&net, "");
    // So that what is read slowly also comes slowly.
    for node in [&net.left, &net.right] {
        node.sysctl("net.ipv4.tcp_rmem", "4096 65536 65536").expect("set");
    }
    // A gateway does not tell its clients to talk to each other past it.
    for name in ["all", "eth0"] {
        net.router.sysctl(&format!("net.ipv4.conf.{name}.send_redirects"), "0").expect("set");
    }
    let daemon = net.up(&["--flows", "established", "eth0", "eth1"]);
    (net, daemon)
}

/// Replaces all rules at once, by the same ones and these.
fn replace_rules(net: &Net, more: &str) {
    net.router.run(["nft", &format!("flush ruleset; {FILTER} {NAT} {more}")]).expect("rules");
}

/// Something that runs in a node and ends by itself.
struct Running(Process);

impl Running {
    fn start(node: &Node, line: &str) -> Self {
        Self(node.spawn(["sh", "-ec", line]).expect("started"))
    }

    /// Waits for the end, which must be a good one.
    fn finish(mut self) -> String {
        let status = self.0.wait(DEADLINE).expect("an end");
        assert!(status.success(), "{status}: {}", self.0.log());
        self.0.log()
    }
}

/// Packets that the fast path forwarded, and those that it left to Linux.
fn counts(net: &Net) -> [u64; 2] {
    let all = net.json(&["show", "exceptions"]);
    let rows = all["exceptions"].as_array().expect("exceptions");
    [net.forwarded(), rows.iter().map(|row| row["packets"].as_u64().expect("count")).sum()]
}

/// Whether what was forwarded since `before` went fast, but for what Linux has to see.
fn is_mostly_fast(net: &Net, before: [u64; 2]) -> bool {
    let after = counts(net);
    let [fast, linux] = [after[0] - before[0], after[1] - before[1]];
    println!("{fast} packets fast, {linux} by Linux");
    fast > 4 * linux
}

/// Waits until most of the packets go fast, of so many at a time.
fn becomes_mostly_fast(net: &Net, packets: u64) {
    eventually("most packets go fast", || {
        let before = counts(net);
        net.flows(packets);
        is_mostly_fast(net, before).then_some(())
    });
}

/// The ports by which clients began the connections that go fast both ways, to this port of a server.
fn fast_to(net: &Net, port: u16) -> Vec<u16> {
    let flows = net.json(&["show", "flows"]);
    let all = flows["flows"].as_array().expect("flows").iter();
    all.filter(|flow| flow["original"]["destination_port"] == port && is_fast(flow))
        .map(|flow| flow["original"]["source_port"].as_u64().expect("a port") as u16)
        .collect()
}

/// Waits until packets of the connection of this client's port go fast both ways, beyond those that went before.
fn goes_on_fast(net: &Net, port: u16) {
    let packets = || flow(net, port).filter(is_fast).map(|found| fast_packets(&found));
    let before = eventually("the connection is fast", packets);
    eventually("its packets go fast", || {
        let after = packets()?;
        (0..2).all(|way| after[way] > before[way]).then_some(())
    });
}

#[test]
fn web_transfers_survive_what_happens_to_rules_and_entries() {
    let (net, _daemon) = gateway();
    let (left, left_file) = folder(&net.left, "www");
    let (right, right_file) = folder(&net.right, "www");
    let web = |node, address: &str, port, folder: &Path| {
        let line = format!("cd {}; exec python3 -u -m http.server --bind {address} {port}", folder.display());
        serve(node, &format!("{address}:{port}"), &line)
    };
    let _servers = [web(&net.left, LEFT, 80, &left), web(&net.right, RIGHT, 8000, &right)];
    let before = counts(&net);
    let paths = [
        (&net.left, format!("{RIGHT}:8000"), &right_file),
        (&net.right, format!("{OUTSIDE}:8080"), &left_file),
        // The left's own server, by the address outside: in and out by one port.
        (&net.left, format!("{OUTSIDE}:8080"), &left_file),
    ];
    let fetches = paths.each_ref().map(|(node, at, _)| Transfer::fetch(node, &[&format!("http://{at}/file")]));
    let ports = eventually("all go fast", || {
        let ports = [fast_to(&net, 8000), fast_to(&net, 8080)].concat();
        (ports.len() == paths.len()).then_some(ports)
    });
    for round in 0..4 {
        replace_rules(&net, &format!("table ip other {{ chain c {{ tcp dport {} drop; }}; }};", round + 1));
        ports.iter().for_each(|port| goes_on_fast(&net, *port));
    }
    // A rule that stops them, for a moment.
    let stop = "table inet stop { chain c { type filter hook forward priority 1; tcp dport { 80, 8000 } drop; }; };";
    replace_rules(&net, stop);
    eventually("they wait", || {
        ports
            .iter()
            .all(|port| flow(&net, *port).is_some_and(|found| found["original"]["state"] == "waiting"))
            .then_some(())
    });
    replace_rules(&net, "");
    ports.iter().for_each(|port| goes_on_fast(&net, *port));
    // Linux takes a connection up again that it has forgotten, by the client's next packet.
    let forgotten = fast_to(&net, 8000)[0];
    net.exec(&format!("conntrack -D -p tcp --orig-port-src {forgotten}"));
    goes_on_fast(&net, forgotten);
    for (fetch, (_, at, data)) in fetches.into_iter().zip(&paths) {
        assert!(fetch.finish() == **data, "from {at} as it is there");
    }
    assert!(is_mostly_fast(&net, before));
}

#[test]
fn iperf3_by_one_stream_and_several_and_udp() {
    let (net, _daemon) = gateway();
    let _servers = [(&net.left, LEFT), (&net.right, RIGHT)]
        .map(|(node, address)| serve(node, &format!("{address}:5201"), "exec iperf3 -s"));
    // Not as fast as they can: that would leave the gateway no processor.
    let [outward, inward] = [(&net.left, RIGHT), (&net.right, OUTSIDE)];
    for (arguments, streams, (node, to)) in [
        ("-b 100M", 1, outward),
        ("-b 100M -R", 1, inward),
        ("-b 25M -P 4", 4, outward),
        ("-u -b 2M -l 500", 1, inward),
        ("-u -b 2M -l 500 -R", 1, outward),
    ] {
        println!("iperf3 {arguments} to {to}");
        let overflown = overflows(&net);
        let client = Running::start(node, &format!("exec iperf3 -J -t 3 -c {to} {arguments}"));
        becomes_mostly_fast(&net, 100);
        replace_rules(&net, "");
        becomes_mostly_fast(&net, 100);
        let report: serde_json::Value = serde_json::from_str(&client.finish()).expect("JSON");
        assert!(report["error"].is_null(), "{report}");
        let end = &report["end"];
        assert_eq!(end["streams"].as_array().map(Vec::len), Some(streams), "{arguments}: {report}");
        if arguments.starts_with("-u") {
            let [lost, sent] = ["lost_packets", "packets"].map(|name| end["sum"][name].as_u64().expect("a number"));
            let late = overflows(&net) - overflown;
            assert!(sent > 100 && lost <= late + sent / 50, "{lost} lost of {sent}, {late} because nobody read them");
        }
    }
}

/// Packets that came to one of the hosts and found no room in the socket.
fn overflows(net: &Net) -> u64 {
    let count = |node: &Node| {
        let counters = node.sh("nstat -asz UdpRcvbufErrors").expect("counters");
        let found = counters.lines().find_map(|line| line.strip_prefix("UdpRcvbufErrors"));
        found.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).expect("a count")
    };
    count(&net.left) + count(&net.right)
}

#[test]
fn names_are_resolved() {
    const CLIENT: u16 = 5300;
    let (net, _daemon) = gateway();
    let server = |node, address: &str| {
        let options = "--no-resolv --no-hosts --local-ttl=60 --address=/example.test/203.0.113.7";
        let line = format!("exec dnsmasq -k -C /dev/null --user=root --pid-file= -a {address} -z {options}");
        serve(node, &format!("{address}:53"), &line)
    };
    let _servers = [server(&net.left, LEFT), server(&net.right, RIGHT)];
    for (node, own, to) in [(&net.left, LEFT, RIGHT), (&net.right, RIGHT, OUTSIDE)] {
        // As a resolver that asks by one port.
        let ask = |words: &str| {
            let names: String = (0..20).map(|number| format!("n{number}.example.test ")).collect();
            let line = format!("dig +short +tries=5 +timeout=1 -b {own}#{CLIENT} @{to} {words} {names}");
            let answers = node.sh(&line).expect("answers");
            assert_eq!(answers.lines().collect::<Vec<_>>(), ["203.0.113.7"; 20], "{words}");
        };
        ask("");
        let before = eventually("the questions go fast", || {
            ask("");
            flow(&net, CLIENT).filter(is_fast).map(|found| fast_packets(&found))
        });
        replace_rules(&net, "");
        eventually("they do again", || {
            ask("");
            let after = fast_packets(&flow(&net, CLIENT)?);
            (0..2).all(|way| after[way] >= before[way] + 15).then_some(())
        });
        node.sh(&format!("dig +tcp +short @{to} www.example.test | grep -qx 203.0.113.7")).expect("by TCP, too");
        net.exec(&format!("conntrack -D -p udp --orig-port-src {CLIENT}"));
    }
}

/// A session of ssh with a command that says every line again.
struct Session {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    said: u32,
}

impl Session {
    fn start(mut command: Command) -> Self {
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("started");
        let (input, output) = (child.stdin.take().expect("input"), child.stdout.take().expect("output"));
        Self { child, input, output: BufReader::new(output), said: 0 }
    }

    fn exchange(&mut self, times: u32) {
        for _ in 0..times {
            self.said += 1;
            let line = format!("line {}\n", self.said);
            self.input.write_all(line.as_bytes()).expect("sent");
            let mut answer = String::new();
            self.output.read_line(&mut answer).expect("an answer");
            assert_eq!(answer, line);
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A server of ssh on the right with a host key of its own, and a client that it knows, to run `cat` there. The server sees
/// another home of its user than the machine's.
fn ssh(net: &Net) -> (Process, Session) {
    let home = net.right.folder("home");
    let make = "mkdir -m 700 $home $home/.ssh; \
        for name in host user; do dropbearkey -t ed25519 -f $home/$name >$home/$name.pub; done; \
        grep ^ssh $home/user.pub >$home/.ssh/authorized_keys";
    let home = home.display();
    net.right.sh(&format!("home={home}; {make}")).expect("keys");
    let server = format!("mount --bind {home} ~root; exec dropbear -F -E -r {home}/host -P {home}/pid");
    let server = serve(&net.right, &format!("{RIGHT}:22"), &server);
    let mut client = net.left.command("dbclient");
    client.args(["-y", "-y", "-i", &format!("{home}/user"), &format!("root@{RIGHT}"), "cat"]);
    (server, Session::start(client))
}

#[test]
fn a_session_of_ssh_lasts() {
    let (net, _daemon) = gateway();
    let (_server, mut session) = ssh(&net);
    session.exchange(3);
    for round in 0..5 {
        let port = eventually("the session is fast", || {
            session.exchange(1);
            fast_to(&net, 22).pop()
        });
        let before = fast_packets(&flow(&net, port).expect("it is known"));
        session.exchange(20);
        let after = fast_packets(&flow(&net, port).expect("it is known"));
        assert!((0..2).all(|way| after[way] >= before[way] + 20), "{before:?} {after:?}");
        match round {
            // Between a line and its answer there is nothing on its way that could be taken for another's.
            3 => drop(net.exec(&format!("conntrack -D -p tcp --orig-port-src {port}"))),
            _ => replace_rules(&net, ""),
        }
    }
    session.exchange(3);
}

/// The client's port of the one connection that goes fast, which is not the one that the helper reads.
fn data_connection(net: &Net) -> Option<u16> {
    let flows = net.json(&["show", "flows"]);
    let all = flows["flows"].as_array().expect("flows");
    assert!(all.iter().all(|flow| flow["original"]["destination_port"] != 21), "{flows}");
    let found = all.iter().find(|flow| is_fast(flow))?;
    Some(found["original"]["source_port"].as_u64().expect("a port") as u16)
}

#[test]
fn files_are_sent_and_fetched_by_ftp() {
    let (net, _daemon) = gateway();
    let helper = || net.router.run(["nft", HELPER]).map(drop);
    if !supported("a connection tracking helper for FTP", helper) {
        return;
    }
    let (files, file) = folder(&net.right, "ftp");
    let line = format!("exec /usr/bin/python3 -Wi -m pyftpdlib -w -i {RIGHT} -p 21 -d {}", files.display());
    let _server = serve(&net.right, &format!("{RIGHT}:21"), &line);
    for (number, way) in [&["--ftp-pasv"][..], &["--ftp-port", "-"]].into_iter().enumerate() {
        let before = counts(&net);
        let url = |path: &str| format!("ftp://{RIGHT}/{path}");
        let fetch = || Transfer::fetch(&net.left, &[way, &[&url("file")]].concat());
        let send = || Transfer::send(&net.left, &[way, &[&url(&format!("sent{number}"))]].concat(), &file);
        for begin in [&fetch as &dyn Fn() -> Transfer, &send] {
            let transfer = begin();
            let port = eventually("the data connection goes fast", || data_connection(&net));
            replace_rules(&net, HELPER);
            goes_on_fast(&net, port);
            let control = net.exec("conntrack -L -p tcp --orig-port-dst 21");
            assert!(control.contains("helper=ftp"), "{control}");
            let entry = tracked(&net, port).concat();
            assert_eq!(entry.contains(&format!("src={RIGHT} dst={OUTSIDE} sport={port} ")), number == 1, "{entry}");
            assert!(entry.contains("ASSURED") && !entry.contains("helper="), "{entry}");
            assert!(transfer.finish() == file, "{way:?}: fetched as it is");
        }
        eventually("sent as it is", || {
            (std::fs::read(files.join(format!("sent{number}"))).expect("the file") == file).then_some(())
        });
        assert!(is_mostly_fast(&net, before));
    }
}
