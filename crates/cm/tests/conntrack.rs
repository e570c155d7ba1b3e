//! Connections through a real router with real connection tracking and address translation, as CM tells them.
//!
//! ```text
//! client (10.0.0.2, 2001:db8:1::2) eth0 ---- in (.1, ::1) router out (192.0.2.1, 2001:db8:2::1) ---- eth0 server (.2, ::2)
//! ```

mod support;

use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};
use support::{Model, Running};
use towpath_cm::conntrack::Table;
use towpath_cm::conntrack::entry::{ESTABLISHED, Tcp, status};
use towpath_cm::guard::{Nftables, Rules};
use towpath_cm::{FlowMode, Options, Watcher};
use towpath_fpc::{Listener, Message, PolicySource, Scope, Snapshot};
use towpath_lab::{Lab, Node, supported, wait_for};
use towpath_tables::flow::{Connection, Tuple};
use towpath_tables::record::Family;

const LIMIT: Duration = Duration::from_secs(20);
const SERVERS: [&str; 2] = ["192.0.2.2", "2001:db8:2::2"];
const MASQUERADE: &str =
    "table inet nat { chain post { type nat hook postrouting priority srcnat; oifname out masquerade; }; }";

/// Lines for `ip -batch` that give addresses to an interface.
fn ends(port: &str, addresses: [&str; 2]) -> String {
    addresses.map(|address| format!("address add {address} dev {port}\\n")).concat()
}

/// Lines that make default routes.
fn via(gateways: [&str; 2]) -> String {
    gateways.map(|gateway| format!("route add default via {gateway}\\n")).concat()
}

struct Net {
    _lab: Lab,
    client: Node,
    router: Node,
    server: Node,
}

impl Net {
    fn new(name: &str) -> Result<Self> {
        let lab = Lab::new(name)?;
        let (client, router, server) = (lab.node("client")?, lab.node("router")?, lab.node("server")?);
        lab.link((&client, "eth0"), (&router, "in"))?;
        lab.link((&router, "out"), (&server, "eth0"))?;
        router.forward()?;
        for (node, lines) in [
            (
                &router,
                [ends("in", ["10.0.0.1/24", "2001:db8:1::1/64"]), ends("out", ["192.0.2.1/24", "2001:db8:2::1/64"])]
                    .concat(),
            ),
            (&client, [ends("eth0", ["10.0.0.2/24", "2001:db8:1::2/64"]), via(["10.0.0.1", "2001:db8:1::1"])].concat()),
            (
                &server,
                [ends("eth0", ["192.0.2.2/24", "2001:db8:2::2/64"]), via(["192.0.2.1", "2001:db8:2::1"])].concat(),
            ),
        ] {
            node.sh(&format!("printf '{lines}' | ip -batch -"))?;
        }
        Ok(Self { _lab: lab, client, router, server })
    }

    fn nft(&self, rules: &str) -> Result<()> {
        self.router.run(["nft", rules]).map(drop)
    }

    /// A CM in the router with the watcher of nftables, which has told its first connections.
    fn cm(&self, mode: &str, receive_buffer: Option<usize>) -> Result<Running> {
        let receive_buffer = receive_buffer.unwrap_or(Options::default().receive_buffer);
        self.cm_with(Options { flows: mode.parse()?, receive_buffer, ..Options::default() })
    }

    fn cm_with(&self, options: Options) -> Result<Running> {
        let flows = options.flows;
        let nftables = move || Box::new(Nftables::new(flows).expect("nftables"));
        let watchers = move || vec![nftables() as Box<dyn Watcher>, Box::new(Rules::new().expect("rules"))];
        let cm = self.router.enter(|| Running::with(options, watchers))?;
        wait_for(LIMIT, "first connections", || {
            cm.receiver.lock().unwrap().ended.contains(&Snapshot::Flows).then_some(())
        })?;
        Ok(cm)
    }

    /// A UDP connection with a packet each way: the client's end, the server's end, and how the server sees the client.
    fn udp(&self, server: &str, port: u16) -> Result<Udp> {
        let server: IpAddr = server.parse()?;
        let any = |port| SocketAddr::new(if server.is_ipv4() { [0; 4].into() } else { [0; 16].into() }, port);
        let there = self.server.enter(|| UdpSocket::bind(any(port)))??;
        let here = self.client.enter(|| UdpSocket::bind(any(0)))??;
        here.connect((server, port))?;
        let seen = exchange(&here, &there)?;
        Ok(Udp { here, there, seen })
    }

    /// An established TCP connection: the client's end and the server's end.
    fn tcp(&self, server: &str, listener: &TcpListener) -> Result<(TcpStream, TcpStream)> {
        let address = SocketAddr::new(server.parse()?, listener.local_addr()?.port());
        let mut here = self.client.enter(|| TcpStream::connect_timeout(&address, LIMIT))??;
        let (mut there, _) = listener.accept()?;
        here.write_all(b"there")?;
        there.read_exact(&mut [0; 5])?;
        there.write_all(b"back")?;
        here.read_exact(&mut [0; 4])?;
        Ok((here, there))
    }

    fn listener(&self, server: &str) -> Result<TcpListener> {
        let any: IpAddr = if server.contains(':') { [0; 16].into() } else { [0; 4].into() };
        Ok(self.server.enter(|| TcpListener::bind((any, 0)))??)
    }
}

/// A packet each way, and whom the other end sees. What is lost, as packets may be, is sent again.
fn exchange(here: &UdpSocket, there: &UdpSocket) -> Result<SocketAddr> {
    for socket in [here, there] {
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    }
    let seen = wait_for(LIMIT, "a packet there", || {
        here.send(b"there").ok()?;
        Some(there.recv_from(&mut [0; 16]).ok()?.1)
    })?;
    wait_for(LIMIT, "a packet back", || {
        there.send_to(b"and back", seen).ok()?;
        here.recv(&mut [0; 16]).ok()
    })?;
    Ok(seen)
}

struct Udp {
    here: UdpSocket,
    there: UdpSocket,
    seen: SocketAddr,
}

impl Udp {
    /// What connection tracking must have: the client as it is, and as the server sees it.
    fn connection(&self, client: &str) -> Result<Connection> {
        let (here, server) = (self.here.local_addr()?.port(), self.here.peer_addr()?);
        connection(17, SocketAddr::new(client.parse()?, here), server, self.seen)
    }
}

fn connection(protocol: u8, client: SocketAddr, server: SocketAddr, seen: SocketAddr) -> Result<Connection> {
    let tuple = |from: SocketAddr, to: SocketAddr| Tuple {
        source: from.ip(),
        destination: to.ip(),
        source_port: from.port(),
        destination_port: to.port(),
        protocol,
    };
    Connection::new(tuple(client, server), tuple(server, seen)).context("no connection")
}

fn tcp_connection((here, there): &(TcpStream, TcpStream)) -> Result<Connection> {
    connection(6, here.local_addr()?, here.peer_addr()?, there.peer_addr()?)
}

fn flows(model: &Model) -> BTreeSet<Connection> {
    model.flows.values().copied().collect()
}

/// Waits until exactly these connections are told.
fn expect(cm: &Running, what: &str, expected: &[Connection]) -> Result<()> {
    let expected: BTreeSet<_> = expected.iter().copied().collect();
    wait_for(LIMIT, what, || (flows(&cm.model()) == expected).then_some(())).with_context(|| {
        let told = flows(&cm.model());
        let [extra, missing] = [&told - &expected, &expected - &told];
        format!("extra: {extra:#?}\nmissing: {missing:#?}")
    })
}

/// What the router's connection tracking says of connections.
fn entry(router: &Node, connection: &Connection) -> Result<Option<towpath_cm::conntrack::entry::Entry>> {
    Ok(router.enter(|| Table::open()?.entries(&[connection.original]))??[0])
}

const LIBERAL: Option<Tcp> = Some(Tcp { state: ESTABLISHED, liberal: true });

#[test]
fn masqueraded_connections_of_both_families_are_told_and_end() -> Result<()> {
    let net = Net::new("ctmasq")?;
    net.nft(MASQUERADE)?;
    let cm = net.cm("established", None)?;
    let mut told = Vec::new();
    let mut open = Vec::new();
    for ((server, client), port) in SERVERS.into_iter().zip(["10.0.0.2", "2001:db8:1::2"]).zip(5300..) {
        let udp = net.udp(server, port)?;
        ensure!(udp.seen.ip() != client.parse::<IpAddr>()?, "not masqueraded: {}", udp.seen);
        let listener = net.listener(server)?;
        let tcp = net.tcp(server, &listener)?;
        told.extend([udp.connection(client)?, tcp_connection(&tcp)?]);
        open.push((udp, tcp));
    }
    expect(&cm, "four connections", &told)?;
    for connection in told.iter().filter(|connection| connection.original.protocol == 6) {
        let entry = entry(&net.router, connection)?.context("no entry")?;
        ensure!(entry.tcp == LIBERAL && entry.connection == *connection, "{entry:?}");
    }
    // The client closes one: conntrack goes to FIN_WAIT.
    let (udp, (here, there)) = open.pop().context("open")?;
    drop(here);
    expect(&cm, "a FIN", &told[..3])?;
    drop((udp, there));
    let started = Instant::now();
    net.router.run(["conntrack", "-D", "-p", "udp", "-f", "ipv6"])?;
    expect(&cm, "conntrack -D", &told[..2])?;
    net.router.run(["conntrack", "-F"])?;
    expect(&cm, "conntrack -F", &[])?;
    ensure!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    Ok(())
}

#[test]
fn who_only_observes_leaves_windows_checked() -> Result<()> {
    let net = Net::new("ctobserve")?;
    net.nft(MASQUERADE)?;
    net.router.sysctl("net.netfilter.nf_conntrack_events", "1")?;
    let listener = net.listener(SERVERS[0])?;
    let older = net.tcp(SERVERS[0], &listener)?;
    let cm = net.cm_with(Options { flows: FlowMode::Established, observe: true, ..Options::default() })?;
    let newer = net.tcp(SERVERS[0], &listener)?;
    // One is told as it begins, the other after a dump has shown it.
    let told = [tcp_connection(&older)?, tcp_connection(&newer)?];
    expect(&cm, "both", &told)?;
    for connection in &told {
        let entry = entry(&net.router, connection)?.context("no entry")?;
        ensure!(entry.tcp == Some(Tcp { state: ESTABLISHED, liberal: false }), "{entry:?}");
    }
    Ok(())
}

#[test]
fn forwarded_ports_and_hairpins_are_connections_like_others() -> Result<()> {
    let net = Net::new("ctdnat")?;
    net.nft(
        "table ip nat { chain pre { type nat hook prerouting priority dstnat; ip daddr 192.0.2.1 udp dport 53 dnat to 10.0.0.2:5353; ip daddr 192.0.2.1 udp dport 54 dnat to 192.0.2.2:5354; }; chain post { type nat hook postrouting priority srcnat; ip daddr 192.0.2.2 masquerade; }; }",
    )?;
    let cm = net.cm("established", None)?;
    for (inside, port, to) in [(&net.client, 5353, 53), (&net.server, 5354, 54)] {
        let there = inside.enter(|| UdpSocket::bind(("0.0.0.0", port)))??;
        let here = net.server.enter(|| UdpSocket::bind("0.0.0.0:0"))??;
        here.connect(("192.0.2.1", to))?;
        let seen = exchange(&here, &there)?;
        let client = SocketAddr::new("192.0.2.2".parse()?, here.local_addr()?.port());
        let (inside, public): (SocketAddr, SocketAddr) = match port {
            5353 => ("10.0.0.2:5353".parse()?, "192.0.2.1:53".parse()?),
            _ => ("192.0.2.2:5354".parse()?, "192.0.2.1:54".parse()?),
        };
        let original = connection(17, client, public, client)?.original;
        let reply = connection(17, client, inside, seen)?.reply;
        let expected = Connection::new(original, reply).context("no connection")?;
        wait_for(LIMIT, "the connection", || flows(&cm.model()).contains(&expected).then_some(()))
            .with_context(|| format!("told {:#?}\nexpected {expected:#?}", flows(&cm.model())))?;
    }
    Ok(())
}

#[test]
fn only_marked_connections_are_told_and_only_while_they_are() -> Result<()> {
    let net = Net::new("ctmark")?;
    // Long packets change the mark.
    net.nft("table inet f { chain forward { type filter hook forward priority 0; udp dport 5301 ct mark set 0x17; meta length > 500 tcp dport > 0 ct mark set 0x10; meta length > 500 udp dport > 0 ct mark set 0x20; }; }")?;
    let cm = net.cm("mark=0x10/0xf0", None)?;
    let other = net.udp(SERVERS[0], 5302)?;
    let marked = net.udp(SERVERS[0], 5301)?;
    let told = marked.connection("10.0.0.2")?;
    expect(&cm, "the marked one", &[told])?;
    let listener = net.listener(SERVERS[0])?;
    let mut tcp = net.tcp(SERVERS[0], &listener)?;
    tcp.0.write_all(&[0; 600])?;
    let tcp_told = tcp_connection(&tcp)?;
    expect(&cm, "one that is marked later", &[told, tcp_told])?;
    ensure!(entry(&net.router, &tcp_told)?.context("no entry")?.tcp == LIBERAL, "windows are still checked");
    net.nft("flush chain inet f forward; add rule inet f forward meta length > 500 udp dport > 0 ct mark set 0x20")?;
    marked.here.send(&[0; 600])?;
    expect(&cm, "a mark taken away", &[tcp_told])?;
    drop((other, marked.there));
    Ok(())
}

#[test]
fn a_connection_with_other_labels_is_told_anew() -> Result<()> {
    let net = Net::new("ctlabel")?;
    let rules = "table inet f { chain forward { type filter hook forward priority 0; ct label 3 accept; meta length > 500 ct label set 5; }; }";
    if !supported("labels of connections", || net.nft(rules)) {
        return Ok(());
    }
    let cm = net.cm("established", None)?;
    let udp = net.udp(SERVERS[0], 5300)?;
    let told = udp.connection("10.0.0.2")?;
    expect(&cm, "the connection", &[told])?;
    let anew = || {
        let log = cm.receiver.lock().expect("lock").log.clone();
        let gone = log.iter().position(|message| *message == Message::FlowDelete(told.original))?;
        log[gone..].contains(&Message::Flow(told)).then_some(())
    };
    ensure!(anew().is_none(), "nothing has changed");
    udp.here.send(&[0; 600])?;
    wait_for(LIMIT, "the connection anew", anew)?;
    let labels = entry(&net.router, &told)?.context("no entry")?.labels.context("no labels")?;
    ensure!(labels[0] == 1 << 5 && labels[1..] == [0; 15], "{labels:?}");
    // By a dump, too.
    let ended = || {
        let log = cm.receiver.lock().expect("lock").log.clone();
        let ends = |message: &&Message| **message == Message::SnapshotEnd(Snapshot::Flows);
        let deletes = |message: &&Message| **message == Message::FlowDelete(told.original);
        (log.iter().filter(ends).count(), log.iter().filter(deletes).count())
    };
    let before = ended();
    wait_for(LIMIT, "two dumps more", || (ended().0 >= before.0 + 2).then_some(()))?;
    ensure!(ended().1 == before.1, "the labels are the same");
    Ok(())
}

#[test]
fn changes_of_interfaces_and_routes_keep_connections_back_where_rules_ask_for_them() -> Result<()> {
    let net = Net::new("ctmoved")?;
    let rules = "table inet f { chain pre { type filter hook prerouting priority mangle; fib saddr . iif oif missing drop; ct state established accept; }; }";
    if !supported("fib in rules of nftables", || net.nft(rules)) {
        return Ok(());
    }
    let cm = net.cm("established", None)?;
    let stops = |cm: &Running, family| {
        let policies = cm.model().policies.get(&PolicySource::Nftables).cloned().unwrap_or_default();
        let of = policies.into_iter().filter(|policy| policy.scope == Scope::Family(family) && policy.flows.is_none());
        of.map(|policy| policy.detail).collect::<Vec<_>>().join("; ")
    };
    let quiet = || wait_for(LIMIT, "quiet", || Family::ALL.iter().all(|of| stops(&cm, *of).is_empty()).then_some(()));
    let ip = |words: &str| net.router.sh(&format!("ip {words}"));
    quiet()?;
    for (command, undo, of, what) in [
        ("route add 203.0.113.0/24 via 192.0.2.2", "route del 203.0.113.0/24", Family::V4, "have just changed"),
        (
            "-6 route add 2001:db8:9::/48 via 2001:db8:2::2",
            "-6 route del 2001:db8:9::/48",
            Family::V6,
            "have just changed",
        ),
        ("address add 203.0.113.1/32 dev in", "address del 203.0.113.1/32 dev in", Family::V4, "have just changed"),
        ("rule add iif in lookup main", "rule del iif in lookup main", Family::V6, "have just changed"),
        ("link set dev in group 7", "link set dev in group 0", Family::V6, "name or group"),
    ] {
        for command in [command, undo] {
            ip(command)?;
            wait_for(LIMIT, command, || stops(&cm, of).contains(what).then_some(()))
                .with_context(|| format!("{command}: {}", stops(&cm, of)))?;
            quiet().with_context(|| format!("{command}: {:?}", Family::ALL.map(|of| stops(&cm, of))))?;
        }
    }
    // While packets of a connection may be routed differently, none passes.
    for (command, undo, of) in [
        ("route add 203.0.113.0/24 tos 0x10 via 192.0.2.2", "route del 203.0.113.0/24 tos 0x10", Family::V4),
        (
            "-6 route add 2001:db8:9::/48 nexthop via 2001:db8:1::2 nexthop via 2001:db8:2::2",
            "-6 route del 2001:db8:9::/48",
            Family::V6,
        ),
        ("nexthop add id 7 via 192.0.2.2 dev out", "nexthop del id 7", Family::V6),
    ] {
        ip(command)?;
        wait_for(LIMIT, command, || stops(&cm, of).contains("may answer each packet differently").then_some(()))?;
        ip(undo)?;
        quiet().with_context(|| format!("{undo}: {:?}", Family::ALL.map(|of| stops(&cm, of))))?;
    }
    ip("link set dev in down")?;
    wait_for(LIMIT, "a link down", || stops(&cm, Family::V4).contains("have just changed").then_some(()))?;
    quiet()?;
    ip("link set dev in name inside")?;
    wait_for(LIMIT, "another name", || stops(&cm, Family::V4).contains("name or group").then_some(()))?;
    quiet()
}

#[test]
fn zones_helpers_and_half_open_connections_stay_in_linux() -> Result<()> {
    let net = Net::new("ctstay")?;
    net.nft("table inet f { chain pre { type filter hook prerouting priority raw; udp dport 5311 ct zone set 5; udp sport 5311 ct zone set 5; }; chain forward { type filter hook forward priority 0; ct state established accept; }; }")?;
    let helper = "table ip h { ct helper ftp { type \"ftp\" protocol tcp; }; chain pre { type filter hook prerouting priority 0; tcp dport 2100 ct helper set \"ftp\"; }; }";
    let helped = net.nft(helper).is_ok();
    let cm = net.cm("established", None)?;
    let zoned = net.udp(SERVERS[0], 5311)?;
    let silent = net.client.enter(|| UdpSocket::bind("0.0.0.0:0"))??;
    silent.send_to(b"nobody answers", "192.0.2.2:5312")?;
    let listener = net.server.enter(|| TcpListener::bind("0.0.0.0:2100"))??;
    let ftp = net.tcp(SERVERS[0], &listener)?;
    let plain = net.udp(SERVERS[0], 5313)?.connection("10.0.0.2")?;
    let mut expected = vec![plain];
    if helped {
        let entry = entry(&net.router, &tcp_connection(&ftp)?)?.context("no entry")?;
        ensure!(entry.helped, "{entry:?}");
    } else {
        eprintln!("no FTP helper here: not tested");
        expected.push(tcp_connection(&ftp)?);
    }
    expect(&cm, "the plain one", &expected)?;
    let zones = net.router.run(["conntrack", "-L", "-w", "5"])?;
    ensure!(zones.contains("dport=5311"), "{zones}");
    // No connection may pass rules that choose a zone.
    let policies = cm.model().policies[&PolicySource::Nftables].clone();
    let of = |family| policies.iter().filter(move |policy| policy.scope == Scope::Family(family));
    for family in Family::ALL {
        ensure!(
            of(family).any(|policy| policy.flows.is_none() && policy.detail.contains("ct zone set")),
            "{policies:#?}"
        );
        ensure!(of(family).any(|policy| policy.flows.is_some()), "{policies:#?}");
    }
    drop(zoned);
    Ok(())
}

#[test]
fn lost_notifications_end_in_what_linux_has() -> Result<()> {
    let net = Net::new("ctlost")?;
    net.nft(MASQUERADE)?;
    let cm = net.cm("established", Some(4096))?;
    let blocked = cm.receiver.lock().expect("lock");
    let kept: Vec<_> = (5400..5440).map(|port| net.udp(SERVERS[0], port)).collect::<Result<_>>()?;
    // Hundreds of entries that are never told, and for which there is no room.
    let noise = net.client.enter(|| UdpSocket::bind("0.0.0.0:0"))??;
    for port in 10_000..10_600u16 {
        noise.send_to(b"x", ("192.0.2.2", port))?;
    }
    drop(blocked);
    let started = Instant::now();
    let connections = kept.iter().map(|udp| udp.connection("10.0.0.2")).collect::<Result<Vec<_>>>()?;
    expect(&cm, "all that there are", &connections)?;
    ensure!(
        started.elapsed() < Duration::from_secs(4),
        "told by the dump that was due anyhow: {:?}",
        started.elapsed()
    );
    ensure!(cm.receiver.lock().expect("lock").lost.contains_key(&Listener::Connections), "not counted");
    net.router.run(["conntrack", "-D", "-p", "udp", "--dport", "5400"])?;
    expect(&cm, "one less", &connections[1..])
}

#[test]
fn another_rule_set_is_another_generation_and_an_alarm() -> Result<()> {
    let net = Net::new("ctgen")?;
    net.nft(MASQUERADE)?;
    let cm = net.cm("established", None)?;
    let udp = net.udp(SERVERS[0], 5300)?;
    expect(&cm, "the connection", &[udp.connection("10.0.0.2")?])?;
    let generations = |model: &Model| -> BTreeSet<Option<u32>> {
        model.policies[&PolicySource::Nftables].iter().map(|policy| policy.flows).collect()
    };
    let before = generations(&cm.model());
    ensure!(before.len() == 1, "{before:?}");
    let first = before.first().copied().flatten().context("no generation")?;
    net.nft("add rule inet nat post counter")?;
    let after = wait_for(LIMIT, "another generation", || Some(generations(&cm.model())).filter(|now| *now != before))?;
    ensure!(after.iter().all(|generation| generation.is_some_and(|generation| generation > first)), "{after:?}");
    let log = cm.receiver.lock().unwrap().log.clone();
    let announced = log.iter().any(|message| match message {
        Message::Alarm(alarm) => alarm.policies.iter().any(|policy| after.contains(&policy.flows)),
        _ => false,
    });
    ensure!(announced, "no alarm");
    // At once and a second later: sooner than by the dump that is due anyhow.
    wait_for(Duration::from_secs(4), "connections read anew", || {
        let log = cm.receiver.lock().unwrap().log.clone();
        let changed = log.iter().rposition(|message| matches!(message, Message::Alarm(_)))?;
        let ended = |message: &&Message| **message == Message::SnapshotEnd(Snapshot::Flows);
        (log[changed..].iter().filter(ended).count() == 2).then_some(())
    })?;
    expect(&cm, "the connection still", &[udp.connection("10.0.0.2")?])?;
    let deleted = Instant::now();
    net.router.run(["conntrack", "-D", "-p", "udp"])?;
    expect(&cm, "one that a dump told, gone", &[])?;
    ensure!(deleted.elapsed() < Duration::from_secs(3), "told by the dump that was due anyhow");
    let udp = net.udp(SERVERS[0], 5301)?;
    expect(&cm, "another", &[udp.connection("10.0.0.2")?])?;
    net.nft("flush ruleset")?;
    expect(&cm, "no rules, no connections", &[])
}

#[test]
fn connections_older_than_the_mirror_stay_in_linux_and_without_a_mode_all() -> Result<()> {
    let net = Net::new("ctold")?;
    net.nft(MASQUERADE)?;
    // As if nobody had listened; a listener in any namespace is one.
    net.router.sysctl("net.netfilter.nf_conntrack_events", "0")?;
    let old = net.udp(SERVERS[0], 5300)?;
    net.router.sysctl("net.netfilter.nf_conntrack_events", "1")?;
    let before = entry(&net.router, &old.connection("10.0.0.2")?)?.context("no entry")?;
    ensure!(before.is(status::SEEN_REPLY | status::CONFIRMED), "{before:?}");
    let cm = net.cm("established", None)?;
    let new = net.udp(SERVERS[0], 5301)?.connection("10.0.0.2")?;
    expect(&cm, "the new one", &[new])?;
    // Its packets go on all the same.
    exchange(&old.here, &old.there)?;
    // Nothing is told where nothing is wanted.
    let watchers = || vec![Box::new(Nftables::new(FlowMode::None).expect("nftables")) as Box<dyn Watcher>];
    let options = Options { flows: FlowMode::None, ..Options::default() };
    let none = net.router.enter(|| Running::with(options, watchers))?;
    let policies = wait_for(LIMIT, "policies", || {
        none.model().policies.get(&PolicySource::Nftables).filter(|policies| !policies.is_empty()).cloned()
    })?;
    ensure!(policies.iter().all(|policy| policy.flows.is_none()), "{policies:#?}");
    net.udp(SERVERS[0], 5302)?;
    wait_for(LIMIT, "what the other is told", || (cm.model().flows.len() == 2).then_some(()))?;
    let log = none.receiver.lock().expect("lock").log.clone();
    let spoken = |message: &Message| {
        matches!(message, Message::Flow(_) | Message::FlowDelete(_) | Message::SnapshotBegin(Snapshot::Flows))
    };
    ensure!(!log.iter().any(spoken), "{log:#?}");
    Ok(())
}

#[test]
fn connections_of_a_flowtable_are_told_until_the_rules_change_without_it() -> Result<()> {
    let net = Net::new("ctflow")?;
    let rules = "table inet f { flowtable ft { hook ingress priority 0; devices = { in, out }; }; chain forward { type filter hook forward priority 0; udp dport 5302 accept; udp sport 5302 accept; meta l4proto { tcp, udp } flow add @ft; }; }";
    if !supported("flowtables of nftables", || net.nft(rules)) {
        return Ok(());
    }
    // Linux lets go of what it does not see for this long.
    net.router.sysctl("net.netfilter.nf_flowtable_udp_timeout", "1")?;
    let cm = net.cm("flowtable", None)?;
    let policies = cm.model().policies[&PolicySource::Nftables].clone();
    ensure!(policies.iter().all(|policy| policy.flows.is_some()), "{policies:#?}");
    let other = net.udp(SERVERS[0], 5302)?;
    let udp = net.udp(SERVERS[0], 5303)?;
    let listener = net.listener(SERVERS[1])?;
    let tcp = net.tcp(SERVERS[1], &listener)?;
    let (udp_told, tcp_told) = (udp.connection("10.0.0.2")?, tcp_connection(&tcp)?);
    expect(&cm, "two in the flowtable", &[udp_told, tcp_told])?;
    wait_for(LIMIT, "Linux to let go", || {
        entry(&net.router, &udp_told).ok().flatten().filter(|entry| !entry.is(status::OFFLOAD))
    })?;
    let dumps = |cm: &Running| {
        cm.receiver.lock().expect("lock").ended.iter().filter(|ended| **ended == Snapshot::Flows).count()
    };
    let before = dumps(&cm);
    wait_for(LIMIT, "another dump", || (dumps(&cm) > before).then_some(()))?;
    expect(&cm, "both still", &[udp_told, tcp_told])?;
    net.nft("add rule inet f forward counter")?;
    expect(&cm, "the one that is there under these rules", &[tcp_told])?;
    net.nft("delete chain inet f forward; delete flowtable inet f ft; table inet f { chain forward { type filter hook forward priority 0; ct state established accept; }; }")?;
    expect(&cm, "no flowtable", &[])?;
    drop(other);
    Ok(())
}
