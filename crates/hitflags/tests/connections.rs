//! Used connections against a real connection tracking.
//!
//! ```text
//! client (10.0.0.2) eth0 ---- in (.1) router out (192.0.2.1) ---- eth0 (.2) server
//! ```

use anyhow::{Context, Result, ensure};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::Duration;
use towpath_cm::conntrack::entry::{ESTABLISHED, Entry, status};
use towpath_cm::conntrack::{Change, Table};
use towpath_hitflags::{Connections, RefreshConnections};
use towpath_lab::packet::checksum;
use towpath_lab::{Frame, Lab, Node, PacketSocket, wait_for};
use towpath_tables::flow::Tuple;

const LIMIT: Duration = Duration::from_secs(20);
/// TCP_CONNTRACK_CLOSE
const CLOSE: u8 = 8;
const TCP: u32 = 700;
const UDP: u32 = 40;
const STREAM: u32 = 150;
/// Long enough not to run out, and shorter than every timeout.
const SHORT: u32 = 25;

struct Net {
    _lab: Lab,
    client: Node,
    router: Node,
    server: Node,
}

fn net(name: &str) -> Result<Net> {
    let lab = Lab::new(name)?;
    let (client, router, server) = (lab.node("client")?, lab.node("router")?, lab.node("server")?);
    lab.link((&client, "eth0"), (&router, "in"))?;
    lab.link((&router, "out"), (&server, "eth0"))?;
    for (node, port, address) in [
        (&client, "eth0", "10.0.0.2/24"),
        (&router, "in", "10.0.0.1/24"),
        (&router, "out", "192.0.2.1/24"),
        (&server, "eth0", "192.0.2.2/24"),
    ] {
        node.run(["ip", "address", "add", address, "dev", port])?;
    }
    router.forward()?;
    client.run(["ip", "route", "add", "default", "via", "10.0.0.1"])?;
    router.run([
        "nft",
        "table ip nat { chain post { type nat hook postrouting priority srcnat; oifname out masquerade; }; }",
    ])?;
    for (name, value) in [("tcp_timeout_established", TCP), ("udp_timeout", UDP), ("udp_timeout_stream", STREAM)] {
        router.sysctl(&format!("net.netfilter.nf_conntrack_{name}"), &value.to_string())?;
    }
    Ok(Net { _lab: lab, client, router, server })
}

impl Net {
    fn udp(&self, port: u16) -> Result<(UdpSocket, Tuple)> {
        let there = self.server.enter(|| UdpSocket::bind(("0.0.0.0", port)))??;
        let here = self.client.enter(|| UdpSocket::bind("10.0.0.2:0"))??;
        here.connect(("192.0.2.2", port))?;
        for socket in [&here, &there] {
            socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        }
        // What is lost, as packets may be, is sent again.
        let seen = wait_for(LIMIT, "a packet there", || {
            here.send(b"there").ok()?;
            Some(there.recv_from(&mut [0; 8]).ok()?.1)
        })?;
        wait_for(LIMIT, "a packet back", || {
            there.send_to(b"back", seen).ok()?;
            here.recv(&mut [0; 8]).ok()
        })?;
        let original = tuple(17, here.local_addr()?.port(), port)?;
        Ok((here, original))
    }

    fn tcp(&self) -> Result<(TcpStream, TcpStream, Tuple)> {
        let listener = self.server.enter(|| TcpListener::bind("192.0.2.2:0"))??;
        let port = listener.local_addr()?.port();
        let mut here = self.client.enter(|| TcpStream::connect(("192.0.2.2", port)))??;
        let (mut there, _) = listener.accept()?;
        here.write_all(b"there")?;
        there.read_exact(&mut [0; 5])?;
        let original = tuple(6, here.local_addr()?.port(), port)?;
        Ok((here, there, original))
    }

    fn entries(&self, originals: &[Tuple]) -> Result<Vec<Option<Entry>>> {
        Ok(self.router.enter(|| Table::open()?.entries(originals))??)
    }

    fn entry(&self, original: Tuple) -> Result<Entry> {
        self.entries(&[original])?[0].context("no entry")
    }

    /// Lets little time be left to these.
    fn shorten(&self, originals: &[Tuple]) -> Result<()> {
        let change = |original: &Tuple| Change { original: *original, timeout: SHORT, status: None };
        let changes: Vec<_> = originals.iter().map(change).collect();
        let gone = self.router.enter(|| Table::open()?.change(&changes))??;
        ensure!(gone == 0, "{gone} are gone");
        Ok(())
    }
}

fn tuple(protocol: u8, source_port: u16, destination_port: u16) -> Result<Tuple> {
    let (source, destination) = ("10.0.0.2".parse()?, "192.0.2.2".parse()?);
    Ok(Tuple { source, destination, source_port, destination_port, protocol })
}

/// Whether the timeout was set a moment ago.
fn is_new(entry: &Entry, timeout: u32) -> bool {
    entry.timeout.is_some_and(|left| left <= timeout && left + 10 >= timeout)
}

#[test]
fn used_connections_get_the_timeout_of_a_packet_and_idle_ones_age() -> Result<()> {
    let net = net("hitconn")?;
    let mut connections = net.router.enter(Connections::open)??;
    let (used, idle) = (net.tcp()?, net.tcp()?);
    let many: Vec<_> = (6000..6100).map(|port| net.udp(port)).collect::<Result<_>>()?;
    let udp: Vec<_> = many.iter().map(|(_, original)| *original).collect();
    let all: Vec<_> = udp.iter().copied().chain([used.2, idle.2]).collect();
    net.shorten(&all)?;
    let mut report: Vec<_> = udp.iter().copied().chain([used.2]).collect();
    // One that was never there, and one that goes.
    report.push(tuple(17, 1, 2)?);
    net.router.run(["conntrack", "-D", "-p", "udp", "--dport", "6000"])?;
    connections.refresh(&report)?;
    ensure!(is_new(&net.entry(used.2)?, TCP), "{:?}", net.entry(used.2)?);
    ensure!(is_new(&net.entry(idle.2)?, SHORT), "{:?}", net.entry(idle.2)?);
    let entries = net.entries(&udp)?;
    ensure!(entries[0].is_none(), "the report brought it back: {:?}", entries[0]);
    for entry in &entries[1..] {
        let entry = entry.context("no entry")?;
        ensure!(is_new(&entry, UDP) && !entry.is(status::ASSURED), "{entry:?}");
    }
    // Used for longer than two seconds, it is a stream.
    let stream = wait_for(LIMIT, "a stream", || {
        connections.refresh(&udp[1..2]).ok()?;
        net.entry(udp[1]).ok().filter(|entry| entry.is(status::ASSURED))
    })?;
    ensure!(is_new(&stream, STREAM), "{stream:?}");
    net.shorten(&udp[1..2])?;
    connections.refresh(&udp[1..2])?;
    ensure!(is_new(&net.entry(udp[1])?, STREAM), "{:?}", net.entry(udp[1])?);
    Ok(())
}

#[test]
fn a_connection_that_ends_is_left_to_end() -> Result<()> {
    let net = net("hitend")?;
    let mut connections = net.router.enter(Connections::open)??;
    let (here, there, original) = net.tcp()?;
    drop(here);
    let state = |entry: Entry| entry.tcp.map(|tcp| tcp.state);
    // CLOSE_WAIT: the FIN is acknowledged, and nothing more comes.
    wait_for(LIMIT, "a FIN", || net.entry(original).ok().filter(|entry| state(*entry) == Some(5)))?;
    net.shorten(&[original])?;
    connections.refresh(&[original])?;
    ensure!(is_new(&net.entry(original)?, SHORT), "{:?}", net.entry(original)?);
    drop(there);
    Ok(())
}

/// What lies where in a frame of IPv4 without options.
const ADDRESSES: std::ops::Range<usize> = 26..34;
const TCP_HEADER: usize = 34;
const SEQUENCE: std::ops::Range<usize> = TCP_HEADER + 4..TCP_HEADER + 8;
const FLAGS: usize = TCP_HEADER + 13;
const CHECKSUM: std::ops::Range<usize> = TCP_HEADER + 16..TCP_HEADER + 18;
const RST: u8 = 4;

/// The segment as a RST with a number so much later.
fn reset(segment: &Frame, later: u32) -> Vec<u8> {
    let mut bytes = segment.bytes.clone();
    let sequence = u32::from_be_bytes(bytes[SEQUENCE].try_into().expect("four bytes")).wrapping_add(later);
    bytes[SEQUENCE].copy_from_slice(&sequence.to_be_bytes());
    bytes[FLAGS] |= RST;
    bytes[CHECKSUM].fill(0);
    let length = (bytes.len() - TCP_HEADER) as u16;
    let sum = checksum(&[&bytes[ADDRESSES], &[0, 6], &length.to_be_bytes(), &bytes[TCP_HEADER..]].concat());
    bytes[CHECKSUM].copy_from_slice(&sum.to_be_bytes());
    bytes
}

/// Who seems to have sent the RST that comes next.
fn sender_of_reset(socket: &PacketSocket) -> Result<[u8; 4]> {
    let is_reset = |frame: &Frame| frame.bytes.get(FLAGS).is_some_and(|flags| flags & RST != 0);
    let frame = socket.receive_matching(LIMIT, is_reset)?.context("no RST")?;
    Ok(frame.bytes[ADDRESSES][..4].try_into()?)
}

#[test]
fn a_reset_ends_a_connection_that_is_ahead_of_what_linux_has_seen() -> Result<()> {
    const LATER: u32 = 3 << 30;
    let net = net("hitahead")?;
    // As it is for each connection that was handed over.
    net.router.sysctl("net.netfilter.nf_conntrack_tcp_be_liberal", "1")?;
    let (router, server) = (net.router.packet_socket("in")?, net.server.packet_socket("eth0")?);
    let client = net.client.packet_socket("eth0")?;
    let (_here, _there, original) = net.tcp()?;
    let segment = router.receive_matching(LIMIT, |frame| frame.bytes.ends_with(b"there"))?.context("no segment")?;
    let state = || net.entry(original).map(|entry| entry.tcp.map(|tcp| tcp.state));
    // Linux takes it for one from long ago: it has nothing to do with any connection, and is not translated.
    client.send(&reset(&segment, LATER))?;
    assert_eq!(sender_of_reset(&server)?, [10, 0, 0, 2]);
    assert_eq!(state()?, Some(ESTABLISHED));
    let mut connections = net.router.enter(Connections::open)??;
    connections.forget_acknowledged(&[tuple(6, 1, 2)?, original])?;
    client.send(&reset(&segment, LATER))?;
    assert_eq!(sender_of_reset(&server)?, [192, 0, 2, 1]);
    assert_eq!(state()?, Some(CLOSE));
    Ok(())
}
