//! `towpath cm` and `towpath fpm` on two hosts: what one's Linux decides, the other forwards, and nobody else has a say.

mod common;

use common::{
    DEADLINE, Daemon, LEFT, LEFT6, Net, RIGHT, Stream, eventually, sees_a_neighbour_in_use_probed,
    shorten_reachability, with_only,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use towpath_fpc::codec::{self, Frame, Hello, MAGIC, Packet, VERSION};
use towpath_fpc::stream::Stream as Wire;
use towpath_fpc::tls::Identity;
use towpath_fpc::{Connection, Message, Snapshot};
use towpath_lab::{Authority, Files, Node, Validity, relay};
use towpath_tables::record::Family;

const ADDRESS: &str = "198.18.0.1:7676";
const FPM: &str = "fpm.example";
const CM: &str = "cm.example";

/// The two hosts, and the authority that both know.
struct Hosts {
    net: Net,
    decider: Node,
    authority: Authority,
}

impl Hosts {
    fn new() -> Self {
        let (net, decider) = Net::apart();
        for port in ["eth0", "eth1"] {
            assert_ne!(net.router.ifindex(port).expect("a number"), decider.ifindex(port).expect("a number"));
        }
        Self { net, decider, authority: Authority::new("authority").expect("an authority") }
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.net.folder().join(name)
    }

    /// Files for a host of this name, in a folder of their own.
    fn files(&self, folder: &str, name: &str, validity: Validity) -> Files {
        self.authority.certify(&self.folder(folder), name, validity).expect("certificates")
    }

    fn start_fpm(&self) -> Daemon {
        self.start_fpm_with(&[])
    }

    fn start_fpm_with(&self, more: &[&str]) -> Daemon {
        let files = self.files("fpm", FPM, Validity::Now);
        let arguments = [&["fpm", "--listen", ADDRESS, "eth0", "eth1"], &*options(&files, CM), more].concat();
        self.net.start(with_only(&self.net.router, "-all,+bpf,+net_admin,+perfmon", &arguments))
    }

    fn start_cm(&self) -> Daemon {
        self.start_cm_as(&self.files("cm", CM, Validity::Now))
    }

    fn start_cm_as(&self, files: &Files) -> Daemon {
        let arguments = [&["cm", "--connect", ADDRESS], &*options(files, FPM)].concat();
        let command = with_only(&self.decider, "-all,+net_admin,+sys_admin", &arguments);
        Daemon::of(self.decider.start(command).expect("started"))
    }

    /// Both, and the ports served.
    fn start(&self) -> (Daemon, Daemon) {
        let mut fpm = self.start_fpm();
        let cm = self.start_cm();
        fpm.await_log("ready: 2 ports, ");
        (fpm, cm)
    }

    /// The cache manager's end of a session that a test itself has.
    fn session(&self) -> Wire {
        let files = self.files("test", CM, Validity::Now);
        identity(&files).connect(self.tcp(ADDRESS)).expect("a session").into()
    }

    /// A connection from the cache manager's host.
    fn tcp(&self, address: &str) -> TcpStream {
        self.decider.enter(|| TcpStream::connect(address)).expect("in the node").expect("connected")
    }

    fn ip(&self, arguments: &str) {
        self.decider.sh(&format!("ip {arguments}")).expect("ip");
    }

    fn in_sync(&self) -> bool {
        self.net.json(&["status"])["in_sync"].as_bool().expect("in_sync")
    }

    fn becomes(&self, destination: &str, wanted: &str) {
        eventually(&format!("{destination} becomes {wanted}"), || (self.verdict(destination) == wanted).then_some(()));
    }

    /// What would become of a packet to `destination`: `fast`, the reason why it is Linux's, or why nobody can tell.
    fn verdict(&self, destination: &str) -> String {
        let explained = self.net.towpath(&["explain", LEFT, destination, "in", "eth0", "--json"]);
        if !explained.status.success() {
            // Its port may not be known yet.
            return String::from_utf8_lossy(&explained.stderr).into_owned();
        }
        let verdict = serde_json::from_slice::<serde_json::Value>(&explained.stdout).expect("JSON")["verdict"].clone();
        let word = if verdict["path"] == "fast" { &verdict["path"] } else { &verdict["reason"] };
        word.as_str().expect("a word").to_string()
    }

    /// All that the tables say, but for counters.
    fn tables(&self) -> String {
        let mut status = self.net.json(&["status"]);
        let about =
            ["ports", "routes", "tables", "program", "resyncs", "resyncs_by_cause"].map(|name| status[name].take());
        let rest = [["show", "routes"], ["show", "neighbors"], ["show", "ports"]].map(|words| self.net.json(&words));
        let nexthops = self.net.json(&["show", "nexthops"]);
        format!("{about:?} {rest:?} {nexthops}")
    }
}

fn identity(files: &Files) -> Identity {
    let Files { certificate, key, authority } = files.clone();
    Identity { certificate, key, authority, peer: FPM.parse().expect("a name") }
}

fn options<'a>(files: &'a Files, peer: &'a str) -> Vec<&'a str> {
    let text = |path: &'a PathBuf| path.to_str().expect("text");
    let (certificate, key, authority) = (text(&files.certificate), text(&files.key), text(&files.authority));
    let all = ["--tls-certificate", certificate, "--tls-key", key, "--tls-authority", authority, "--tls-peer", peer];
    all.into()
}

#[test]
fn what_another_hosts_linux_decides_is_forwarded_here() {
    let hosts = Hosts::new();
    let (net, decider) = (&hosts.net, &hosts.decider);
    let clean = net.traces();
    let (mut fpm, mut cm) = hosts.start();
    cm.await_log("connected to 198.18.0.1:7676");
    let stream = Stream::start(net, RIGHT);
    net.flows(100);

    // Changes come through.
    hosts.ip("route add 203.0.113.0/24 via 198.51.100.2");
    hosts.becomes("203.0.113.1", "fast");
    hosts.ip("route replace blackhole 203.0.113.0/24");
    hosts.becomes("203.0.113.1", "non-unicast-route");
    // Policies of all, and of one interface.
    decider.sh("nft add table ip t; nft 'add chain ip t c { type filter hook forward priority 0; }'; nft add rule ip t c counter")
        .expect("rules");
    hosts.becomes(RIGHT, "policy-netfilter");
    let before = net.forwarded();
    stream.advance(100);
    assert_eq!(net.forwarded(), before, "all of it goes through the other host");
    decider.sh("nft delete table ip t").expect("no rules");
    hosts.becomes(RIGHT, "fast");
    net.flows(100);

    // Exceptions are the other host's: its answers come back.
    let expired = net.left.sh(&format!("ping -c1 -W5 -t1 {RIGHT} || true")).expect("ping");
    assert!(expired.contains("From 192.0.2.1") && expired.contains("Time to live exceeded"), "{expired}");
    assert!(net.ping(&net.left, "198.51.100.1") && net.ping(&net.right, LEFT6));
    let status = net.json(&["status"]);
    assert_eq!((&status["remote"], &status["flows"]["capacity"]), (&true.into(), &0.into()), "{status}");
    assert!(net.refused(&["check"]).contains("cache manager's host"), "nothing here to compare with");

    stream.finish_complete();

    // To have another qdisc costs packets in Linux itself.
    decider.sh("tc qdisc add dev eth1 root tbf rate 1gbit burst 1mb latency 50ms").expect("a qdisc");
    hosts.becomes(RIGHT, "policy-tc");
    decider.sh("tc qdisc del dev eth1 root").expect("no qdisc");
    hosts.becomes(RIGHT, "fast");
    assert!(net.towpath(&["down"]).status.success());
    assert!(fpm.wait().success());
    assert_eq!(net.traces(), clean);
}

#[test]
fn a_neighbour_in_use_is_probed_by_the_other_host() {
    let hosts = Hosts::new();
    let net = &hosts.net;
    shorten_reachability(&hosts.decider);
    eventually("it resolves", || net.ping(&net.left, RIGHT).then_some(()));
    let (_fpm, _cm) = hosts.start();
    sees_a_neighbour_in_use_probed(net, &hosts.decider);
}

#[test]
fn the_loss_of_the_link_is_survived() {
    let hosts = Hosts::new();
    let net = &hosts.net;
    let (fpm, mut cm) = hosts.start();
    let lost = |fpm: &Daemon, times| {
        let lines = || fpm.log().matches("the fast path keeps its last state").count();
        eventually("the loss is noticed", || (lines() == times).then_some(()));
    };
    let stream = Stream::start(net, RIGHT);
    net.flows(100);
    let (id, adopted) = (net.json(&["status"])["program"]["id"].clone(), net.json(&["status"])["adopted"].clone());

    hosts.ip("link set ctl down");
    hosts.ip("route add 203.0.113.0/24 via 198.51.100.2");
    lost(&fpm, 1);
    assert!(!hosts.in_sync());
    net.flows(200);
    assert_eq!(hosts.verdict("203.0.113.1"), "no-route", "the last state");
    hosts.ip("link set ctl up");
    hosts.becomes("203.0.113.1", "fast");
    eventually("everything is described again", || hosts.in_sync().then_some(()));
    let status = net.json(&["status"]);
    assert_eq!((&status["program"]["id"], &status["adopted"]), (&id, &adopted), "one daemon all the time");

    cm.signal(libc::SIGKILL);
    lost(&fpm, 2);
    hosts.ip("route del 203.0.113.0/24");
    net.flows(100);
    let mut cm = hosts.start_cm();
    hosts.becomes("203.0.113.1", "no-route");
    eventually("everything is described again", || hosts.in_sync().then_some(()));

    let mut fpm = fpm;
    let before = net.forwarded();
    fpm.signal(libc::SIGKILL);
    cm.await_log("waiting for a towpath fpm at 198.18.0.1:7676: Connection refused");
    let sent = stream.sent();
    stream.advance(300);
    let mut fpm = hosts.start_fpm();
    fpm.await_log("ready: 2 ports, ");
    assert_eq!(net.json(&["status"])["adopted"], true);
    assert!(net.forwarded() >= before + 250, "{before} before, {} after, {sent} sent", net.forwarded());
    eventually("everything is described again", || hosts.in_sync().then_some(()));
    net.flows(100);
    stream.finish_complete();
}

#[test]
fn without_the_link_linux_decides_again_if_that_is_asked_for() {
    let hosts = Hosts::new();
    let net = &hosts.net;
    let mut fpm = hosts.start_fpm_with(&["--detach-after", "3"]);
    let mut cm = hosts.start_cm();
    fpm.await_log("ready: 2 ports, ");
    let stream = Stream::start(net, RIGHT);
    net.flows(100);
    for round in 0..2 {
        match round {
            0 => hosts.ip("link set ctl down"),
            _ => drop(cm.signal(libc::SIGKILL)),
        }
        eventually("packets are left to Linux", || (net.exceptions("unattended") > 0).then_some(()));
        eventually("none is forwarded", || {
            let before = net.forwarded();
            stream.advance(50);
            (net.forwarded() == before).then_some(())
        });
        let unattended = net.exceptions("unattended");
        stream.advance(100);
        assert!(net.exceptions("unattended") >= unattended + 90);
        match round {
            0 => hosts.ip("link set ctl up"),
            _ => cm = hosts.start_cm(),
        }
        net.flows(200);
        eventually("everything is described again", || hosts.in_sync().then_some(()));
    }
    stream.finish_complete();
}

/// What deletes most of the tables if it is believed.
fn wiping() -> impl Iterator<Item = Packet> {
    let classes = [Snapshot::Ports, Snapshot::Nexthops, Snapshot::Routes(Family::V4)];
    classes
        .into_iter()
        .flat_map(|class| [Message::SnapshotBegin(class), Message::SnapshotEnd(class)])
        .map(Packet::Message)
}

fn frame(packet: Packet) -> Vec<u8> {
    let mut bytes = Vec::new();
    codec::encode(&Frame { sequence: 0, report: false, packet }, &mut bytes).expect("a frame");
    bytes
}

#[test]
fn whoever_is_not_the_cache_manager_changes_nothing() {
    let hosts = Hosts::new();
    let net = &hosts.net;
    let (fpm, mut cm) = hosts.start();
    let stream = Stream::start(net, RIGHT);
    net.flows(100);
    let says = |words: &str| {
        eventually(&format!("{words:?} in the log"), || fpm.log().contains(words).then_some(()));
    };

    // One at a time.
    let mut second = hosts.start_cm_as(&hosts.files("second", CM, Validity::Now));
    second.await_log("closed the connection: another cache manager is connected, from 198.18.0.2:");
    says("another cache manager is connected");
    second.signal(libc::SIGKILL);
    assert!(hosts.in_sync());

    // A session that is recorded, and says things that would be seen.
    cm.signal(libc::SIGKILL);
    says("lost the cache manager at 198.18.0.2:");
    let listener = hosts.decider.enter(|| TcpListener::bind("127.0.0.1:7677")).expect("in the node").expect("bound");
    let onward = hosts.tcp(ADDRESS);
    let recorder = std::thread::spawn(move || relay(listener.accept()?.0, onward));
    let wire = identity(&hosts.files("test", CM, Validity::Now)).connect(hosts.tcp("127.0.0.1:7677"));
    let mut recorded = Connection::open(wire.expect("a session")).expect("FPC");
    let whole = hosts.tables();
    for packet in wiping() {
        recorded.sender.push(packet, false).expect("sent");
    }
    recorded.sender.flush_frames().expect("sent");
    eventually("what it says happens", || (hosts.tables() != whole).then_some(()));
    recorded.sender.bye("the recording is done");
    drop(recorded);
    let recording = recorder.join().expect("an end").expect("a recording");
    says("the other end closed the connection: the recording is done");
    let mut cm = hosts.start_cm();
    hosts.becomes(RIGHT, "fast");
    eventually("everything is described again", || hosts.in_sync().then_some(()));
    cm.signal(libc::SIGKILL);
    eventually("the end is noticed", || (!hosts.in_sync()).then_some(()));

    let before = hosts.tables();
    let unchanged = || assert_eq!(hosts.tables(), before);
    let raw = |bytes: &[u8]| {
        let mut tcp = hosts.tcp(ADDRESS);
        let _ = tcp.write_all(bytes);
        let _ = tcp.shutdown(Shutdown::Write);
        drop(tcp.read_to_end(&mut Vec::new()));
    };
    raw(&recording);
    says("TLS: cannot decrypt peer's message");
    raw(b"GET / HTTP/1.1\r\n\r\n");
    says("TLS: received corrupt message");
    raw(&frame(Packet::Hello(Hello { magic: MAGIC, version: VERSION })));
    raw(&recording[..recording.len() / 3]);
    says("the other end closed the connection during the TLS handshake");
    unchanged();

    let authority = hosts.files("test", CM, Validity::Now).authority;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(&authority).expect("a certificate")).expect("an authority");
    let no_certificate =
        rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3")
            .with_root_certificates(roots)
            .with_no_client_auth();
    let name = rustls::pki_types::ServerName::try_from(FPM).expect("a name");
    let mut tls = rustls::ClientConnection::new(Arc::new(no_certificate), name).expect("TLS");
    let mut tcp = hosts.tcp(ADDRESS);
    let mut nobody = rustls::Stream::new(&mut tls, &mut tcp);
    let refusal = nobody.write_all(b"hello").and_then(|()| nobody.read(&mut [0; 8])).expect_err("refused");
    assert!(refusal.to_string().contains("CertificateRequired"), "{refusal}");
    says("TLS: peer sent no certificates");

    // Others that have certificates: of another authority, for another name, from the past.
    let stranger = Authority::new("another authority").expect("an authority");
    let stranger = stranger.certify(&hosts.folder("stranger"), CM, Validity::Now).expect("certificates");
    for (files, at_fpm, at_cm) in [
        (Files { authority, ..stranger.clone() }, "invalid peer certificate: UnknownIssuer", "UnknownCA"),
        (hosts.files("other", "other.example", Validity::Now), "certificate not valid for name \"cm.example\"", ""),
        (hosts.files("past", CM, Validity::Past), "certificate expired", "CertificateExpired"),
        (stranger, "received fatal alert: UnknownCA", "UnknownIssuer"),
    ] {
        let mut cm = hosts.start_cm_as(&files);
        says(at_fpm);
        cm.await_log("waiting for a towpath fpm at 198.18.0.1:7676: ");
        cm.await_log(at_cm);
        cm.signal(libc::SIGKILL);
        unchanged();
    }

    // The right one, that speaks another FPC, none, or a spoilt one.
    let mut wire = hosts.session();
    wire.write_all(&frame(Packet::Hello(Hello { magic: MAGIC, version: VERSION + 1 }))).expect("sent");
    let mut said = Vec::new();
    let _ = wire.read_to_end(&mut said);
    assert!(String::from_utf8_lossy(&said).contains("use the same release of towpath for both"), "{said:?}");
    says(&format!("the other end speaks version {}", VERSION + 1));
    let mut wire = hosts.session();
    wire.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("sent");
    says("did not open with an FPC hello");
    unchanged();
    stream.finish_complete();
}

#[test]
fn malformed_messages_end_the_session_and_the_rest_of_it_is_not_believed() {
    let hosts = Hosts::new();
    let (fpm, mut cm) = hosts.start();
    let mut lost = 0;
    let mut says = |words: &str| {
        lost += 1;
        let lines = || fpm.log().matches("the fast path keeps its last state").count();
        eventually(&format!("the end of session {lost}"), || (lines() == lost).then_some(()));
        let log = fpm.log();
        let last = log.lines().rfind(|line| line.contains("keeps its last state")).expect("a line");
        assert!(last.contains(words), "{words:?} is missing in {last}");
    };
    cm.signal(libc::SIGKILL);
    says("lost the cache manager");
    let before = hosts.tables();
    let good = frame(Packet::Message(Message::PortDelete(7)));
    let spoilt = [&good[..2], &[0xff; 40]].concat();
    for (bytes, words) in [(spoilt, "FPC stream: "), (good[..good.len() - 1].to_vec(), "cut off")] {
        let mut wire = hosts.session();
        wire.write_all(&frame(Packet::Hello(Hello { magic: MAGIC, version: VERSION }))).expect("sent");
        wire.write_all(&bytes).expect("sent");
        if words == "cut off" {
            wire.part();
        } else {
            // What follows in the same breath counts no more.
            let _ = wire.write_all(&wiping().flat_map(frame).collect::<Vec<_>>());
            wire.set_read_timeout(Some(DEADLINE)).expect("a limit");
            let mut said = Vec::new();
            let _ = wire.read_to_end(&mut said);
            assert!(String::from_utf8_lossy(&said).contains(words), "the reason is said: {said:?}");
        }
        says(words);
        assert_eq!(hosts.tables(), before);
    }
    let _cm = hosts.start_cm();
    eventually("everything is described again", || hosts.in_sync().then_some(()));
}

/// Ends what goes on in other threads, also when a test fails.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn garbage_at_line_rate_disturbs_nobody() {
    let hosts = Hosts::new();
    let net = &hosts.net;
    let (fpm, _cm) = hosts.start();
    let stream = Stream::start(net, RIGHT);
    net.flows(100);
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let garbage: Vec<u8> = (0..1 << 16).map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    std::thread::scope(|scope| {
        let end = End(&stop);
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let tcp = hosts.decider.enter(|| {
                        TcpStream::connect_timeout(&ADDRESS.parse().expect("an address"), Duration::from_millis(200))
                    });
                    let Ok(Ok(mut tcp)) = tcp else { continue };
                    let _ = tcp.set_write_timeout(Some(Duration::from_millis(200)));
                    while tcp.write_all(&garbage).is_ok() && !stop.load(Ordering::Relaxed) {
                        written.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        let refused = || fpm.log().matches("TLS: received corrupt message").count();
        for number in 0..4 {
            let before = refused();
            hosts.ip(&format!("route add 203.0.113.{number} via 198.51.100.2"));
            hosts.becomes(&format!("203.0.113.{number}"), "fast");
            net.flows(200);
            eventually("garbage is refused", || (refused() > before).then_some(()));
        }
        drop(end);
    });
    assert!(hosts.in_sync() && !fpm.log().contains("lost the cache manager"), "{}", fpm.log());
    assert!(written.load(Ordering::Relaxed) > 0, "there was garbage");
    stream.finish_complete();
}

#[test]
fn ports_that_are_not_the_same_on_both_hosts_are_left_to_the_other_one() {
    let hosts = Hosts::new();
    let net = &hosts.net;
    let (mut fpm, _cm) = hosts.start();
    let stream = Stream::start(net, RIGHT);
    net.flows(100);
    let mut left = |words: &str| {
        hosts.becomes(RIGHT, "policy-sysctl");
        let before = net.forwarded();
        stream.advance(100);
        assert_eq!(net.forwarded(), before, "all of it goes through the other host: {words}");
        fpm.await_log(words);
    };
    // Linux on this host would forward, too.
    let set = |name: &str, value| net.router.sysctl(name, value).expect("set");
    set("net/ipv4/conf/eth1/forwarding", "1");
    left("run there: sysctl -w net.ipv4.conf.eth1.forwarding=0");
    set("net/ipv4/conf/eth1/forwarding", "0");
    hosts.becomes(RIGHT, "fast");
    set("net/ipv6/conf/eth1/disable_ipv6", "0");
    set("net/ipv6/conf/all/forwarding", "1");
    left("run there: sysctl -w net.ipv6.conf.eth1.disable_ipv6=1");
    set("net/ipv6/conf/eth1/disable_ipv6", "1");
    hosts.becomes(RIGHT, "fast");
    // Somebody wants to see the packets here.
    let capture = net.router.packet_socket("eth0").expect("a packet socket");
    left("on the fast path's host: ");
    drop(capture);
    hosts.becomes(RIGHT, "fast");
    // Frames are longer here than there.
    net.ip("link set eth1 mtu 1400");
    left("eth1 has an MTU of 1400 on the fast path's host and 1500 on the other one");
    net.ip("link set eth1 mtu 1500");
    hosts.becomes(RIGHT, "fast");
    stream.finish_complete();

    // It would send otherwise. To have another qdisc costs packets in Linux itself.
    net.exec("tc qdisc add dev eth1 root tbf rate 1gbit burst 1mb latency 50ms");
    fpm.await_log("on the fast path's host: qdisc tbf");
    hosts.becomes(RIGHT, "policy-sysctl");
    net.exec("tc qdisc del dev eth1 root");
    hosts.becomes(RIGHT, "fast");
    // Another MAC address: hosts know only one of them.
    net.ip("link set eth1 address 02:00:00:00:00:77");
    fpm.await_log("eth1 is 02:00:00:00:00:77 on the fast path's host");
    hosts.becomes(RIGHT, "policy-sysctl");
    net.take_address(&hosts.decider, "eth1");
    hosts.becomes(RIGHT, "fast");
}

#[test]
fn files_that_cannot_be_used_are_named_before_anything_is_changed() {
    let hosts = Hosts::new();
    let net = &hosts.net;
    let clean = net.traces();
    let files = hosts.files("fpm", FPM, Validity::Now);
    let mode = |mode| {
        std::fs::set_permissions(&files.key, std::os::unix::fs::PermissionsExt::from_mode(mode)).expect("permissions");
    };
    mode(0o644);
    let fpm = [&["fpm", "--listen", ADDRESS, "eth0", "eth1"], &*options(&files, CM)].concat();
    let cm = [&["cm", "--connect", ADDRESS], &*options(&files, FPM)].concat();
    for command in [&fpm, &cm] {
        let message = net.refused(command);
        for words in [files.key.to_str().expect("text"), "may be read by everyone (mode 644)", "chmod o= "] {
            assert!(message.contains(words), "{words:?} is missing in {message}");
        }
    }
    mode(0o600);
    std::fs::remove_file(&files.authority).expect("removed");
    let message = net.refused(&fpm);
    assert!(message.contains(files.authority.to_str().expect("text")) && message.contains("No such file"), "{message}");
    assert_eq!(net.traces(), clean);
}
