//! 100,000 routes come and go by BGP while traffic runs: no frame goes to a neighbour that its destination never had, and BGP
//! with BFD and OSPF hold over the very ports that carry the traffic.
//!
//!                     eth1 198.51.100.1 ---- 198.51.100.2 eth0 preferred (AS 64496; also OSPF)
//!     source ---- eth0 router
//!                     eth2 203.0.113.1  ---- 203.0.113.2  eth0 other (AS 64498)
//!
//! Of the destinations, /32s of 198.18.0.0/15, one in three is announced by one neighbour, one by the other, and one by both.

use anyhow::{Context, Result, ensure};
use std::fmt::Write;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};
use towpath_lab::packet::{checksum, udp};
use towpath_lab::{Frr, Lab, Node, PacketSocket, Towpath, wait_for};

const ROUTES: u32 = 100_000;
const BATCH: usize = 64;
/// How long all routes may take to come or go.
const LIMIT: Duration = Duration::from_secs(240);
const PEERS: [&str; 2] = ["198.51.100.2", "203.0.113.2"];
/// Batches in a row that must all go the new way before a change counts as done.
const CERTAIN: u32 = 200;

/// Slower than a busy machine: that a session holds is what is tested, not how soon its loss is found.
const BFD: &str = "bfd\n profile patient\n  receive-interval 500\n  transmit-interval 500\n  detect-multiplier 8\n";
const BGP: &str = "no bgp ebgp-requires-policy\n timers bgp 3 30\n";
const OSPF: &str =
    "ip ospf hello-interval 1\n ip ospf dead-interval 10\nrouter ospf\n network 198.51.100.0/24 area 0\n";

fn destination(index: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(198, 18, 0, 0).to_bits() + index)
}

/// Whether a neighbour ever announces it.
fn announces(peer: usize, index: u32) -> bool {
    index % 3 == 2 || index % 3 == peer as u32
}

/// A neighbour that has its routes in Linux and tells them when it is asked to.
fn neighbour(node: &Node, peer: usize) -> Result<Frr> {
    let file = node.folder("routes");
    let mut text = String::new();
    for index in (0..ROUTES).filter(|index| announces(peer, *index)) {
        writeln!(text, "route add blackhole {}", destination(index))?;
    }
    std::fs::write(&file, text)?;
    node.run(["ip", "-batch", &file.display().to_string()])?;
    let router = ["198.51.100.1", "203.0.113.1"][peer];
    let bgpd = format!(
        "router bgp {}\n {BGP} neighbor {router} remote-as 64497\n neighbor {router} bfd profile patient\n",
        [64496, 64498][peer]
    );
    let mut daemons = vec![("bfdd", BFD), ("bgpd", &bgpd)];
    let ospfd = format!("interface eth0\n {OSPF}");
    if peer == 0 {
        daemons.push(("ospfd", &ospfd));
    }
    Frr::start_daemons(node, &daemons)
}

fn router(node: &Node) -> Result<Frr> {
    let mut bgpd = format!("router bgp 64497\n {BGP}");
    for (peer, number) in PEERS.iter().zip([64496, 64498]) {
        writeln!(bgpd, " neighbor {peer} remote-as {number}\n neighbor {peer} timers connect 1")?;
        writeln!(bgpd, " neighbor {peer} bfd profile patient")?;
    }
    writeln!(bgpd, " address-family ipv4 unicast\n  neighbor {} weight 200", PEERS[0])?;
    let ospfd = format!("interface eth1\n {OSPF}");
    Frr::start_daemons(node, &[("bfdd", BFD), ("bgpd", &bgpd), ("ospfd", &ospfd)])
}

/// A session counts as up with how often it came up and went down.
fn sessions(frr: &Frr) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for peer in PEERS {
        let bgp = &frr.vtysh(&format!("show bgp neighbors {peer} json"))?[peer];
        all.push(format!("{peer} {} {} {}", bgp["bgpState"], bgp["connectionsEstablished"], bgp["connectionsDropped"]));
        let bfd = frr.vtysh(&format!("show bfd peer {peer} counters json"))?;
        let status = frr.vtysh(&format!("show bfd peer {peer} json"))?;
        all.push(format!("BFD {} {} {}", status["status"], bfd["session-up"], bfd["session-down"]));
    }
    let ospf = frr.vtysh("show ip ospf neighbor json")?;
    let neighbours = ospf["neighbors"].as_object().context("no neighbours in OSPF's answer")?;
    let states = neighbours.values().flat_map(|list| list.as_array().into_iter().flatten());
    // Whatever the key is called in this version.
    let state = |one: &serde_json::Value| one.get("nbrState").or(one.get("state")).cloned().unwrap_or_default();
    all.extend(states.map(|one| format!("OSPF {}", state(one))));
    Ok(all)
}

/// Frames from the source to all destinations in turn, and where they come out.
struct Traffic {
    source: PacketSocket,
    sinks: [PacketSocket; 2],
    macs: [[u8; 6]; 2],
    frame: Vec<u8>,
    next: u32,
    sent: u64,
    out: [u64; 2],
}

impl Traffic {
    /// Sends a batch and looks at what has come out; an error if any of it went astray. How many of the destinations
    /// that both neighbours announce went to each.
    fn turn(&mut self) -> Result<[u64; 2]> {
        let frames: Vec<Vec<u8>> = (0..BATCH as u32).map(|number| self.to(self.next + number)).collect();
        self.next = (self.next + 7919 * BATCH as u32) % ROUTES;
        self.source.send_all(&frames)?;
        self.sent += BATCH as u64;
        let mut both = [0; 2];
        for (peer, sink) in self.sinks.iter().enumerate() {
            for frame in sink.drain()?.iter().filter(|frame| frame.bytes[12..14] == [8, 0]) {
                let (Some(source), Some(destination)) = (frame.bytes.get(26..30), frame.bytes.get(30..34)) else {
                    continue;
                };
                if source != [192, 0, 2, 10] {
                    continue;
                }
                let to = Ipv4Addr::from(*destination.first_chunk::<4>().context("no address")?);
                let index = to.to_bits().wrapping_sub(self::destination(0).to_bits());
                ensure!(announces(peer, index), "{to} came out to {}, which never announced it", PEERS[peer]);
                ensure!(frame.bytes[..6] == self.macs[peer], "{to} went to {:02x?}", &frame.bytes[..6]);
                self.out[peer] += 1;
                both[peer] += u64::from(index % 3 == 2);
            }
        }
        Ok(both)
    }

    /// The frame to a destination.
    fn to(&self, index: u32) -> Vec<u8> {
        let mut frame = self.frame.clone();
        frame[30..34].copy_from_slice(&destination(index % ROUTES).octets());
        frame[24..26].fill(0);
        let sum = checksum(&frame[14..34]);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
        // No transport checksum.
        frame[40..42].fill(0);
        frame
    }

    /// Goes on until the tables have so many routes more than at first, and everything goes to `to` (or nothing, if None)
    /// that both neighbours announce.
    fn until(&mut self, towpath: &Towpath, routes: u64, to: Option<usize>) -> Result<()> {
        let (begin, mut certain, mut asked) = (Instant::now(), 0, Instant::now());
        let mut complete = false;
        while !complete || certain < CERTAIN {
            ensure!(begin.elapsed() < LIMIT, "{routes} routes, to {to:?}: not within {LIMIT:?}");
            let both = self.turn()?;
            let astray = (0..2).filter(|peer| Some(*peer) != to).any(|peer| both[peer] != 0);
            let missing = to.is_some_and(|to| both[to] == 0);
            certain = if astray || missing { 0 } else { certain + 1 };
            if !complete && asked.elapsed() > Duration::from_millis(300) {
                complete = routes_v4(towpath)? == routes;
                asked = Instant::now();
            }
        }
        eprintln!("lab: {routes} routes after {:.1} s", begin.elapsed().as_secs_f32());
        Ok(())
    }
}

fn routes_v4(towpath: &Towpath) -> Result<u64> {
    towpath.json(&["status"])?["routes"]["ipv4"].as_u64().context("no number of routes in status")
}

/// Has a neighbour announce its routes, or withdraw them.
fn tell(frr: &Frr, peer: usize, command: &str) -> Result<()> {
    let router = format!("router bgp {}", [64496, 64498][peer]);
    frr.vtysh_all(&["configure terminal", &router, "address-family ipv4 unicast", command]).map(drop)
}

#[test]
fn a_hundred_thousand_routes_come_and_go_by_bgp_under_traffic() -> Result<()> {
    let lab = Lab::new("bgp")?;
    let [source, node, preferred, other] = ["source", "router", "preferred", "other"].map(|name| lab.node(name));
    let (source, node, peers) = (source?, node?, [preferred?, other?]);
    lab.link((&source, "eth0"), (&node, "eth0"))?;
    lab.link((&node, "eth1"), (&peers[0], "eth0"))?;
    lab.link((&node, "eth2"), (&peers[1], "eth0"))?;
    node.sh(
        "ip addr add 192.0.2.1/24 dev eth0; ip addr add 198.51.100.1/24 dev eth1; ip addr add 203.0.113.1/24 dev eth2",
    )?;
    for (peer, address) in peers.iter().zip(PEERS) {
        peer.run(["ip", "addr", "add", &format!("{address}/24"), "dev", "eth0"])?;
    }
    node.forward()?;
    let towpath = Towpath::up(&node, &["eth0", "eth1", "eth2"])?;
    let neighbours = [neighbour(&peers[0], 0)?, neighbour(&peers[1], 1)?];
    let router = router(&node)?;
    let full = |all: &[String]| {
        all.len() == 5 && all.iter().all(|s| ["Established", "\"up\"", "Full"].iter().any(|up| s.contains(up)))
    };
    let mut before = Vec::new();
    wait_for(Duration::from_secs(60), "all sessions", || {
        before = sessions(&router).ok()?;
        full(&before).then_some(())
    })
    .with_context(|| format!("{before:?}"))?;

    let addresses = ("192.0.2.10".parse()?, "198.18.0.0".parse()?);
    let mut traffic = Traffic {
        frame: udp(([2, 0, 0, 0, 0, 9], node.mac("eth0")?), addresses, (7, 9), b"by way of the router"),
        source: source.packet_socket("eth0")?,
        sinks: [peers[0].packet_socket("eth0")?, peers[1].packet_socket("eth0")?],
        macs: [peers[0].mac("eth0")?, peers[1].mac("eth0")?],
        next: 0,
        sent: 0,
        out: [0; 2],
    };
    let few = routes_v4(&towpath)?;
    let of =
        |peers: &[usize]| (0..ROUTES).filter(|i| peers.iter().any(|peer| announces(*peer, *i))).count() as u64 + few;
    tell(&neighbours[1], 1, "redistribute kernel")?;
    traffic.until(&towpath, of(&[1]), Some(1))?;
    tell(&neighbours[0], 0, "redistribute kernel")?;
    traffic.until(&towpath, of(&[0, 1]), Some(0))?;
    tell(&neighbours[0], 0, "no redistribute kernel")?;
    traffic.until(&towpath, of(&[1]), Some(1))?;
    tell(&neighbours[1], 1, "no redistribute kernel")?;
    traffic.until(&towpath, few, None)?;

    assert_eq!(sessions(&router)?, before, "no session was lost");
    let check = towpath.json(&["check"])?;
    ensure!(check["differences"].as_array().is_some_and(Vec::is_empty), "{check}");
    let stats = towpath.json(&["show", "stats"])?;
    let ports = stats["ports"].as_array().context("no ports")?;
    let fast: u64 = ports.iter().filter_map(|port| port["rx_packets"].as_u64()).sum();
    let Traffic { sent, out, .. } = traffic;
    eprintln!("lab: {sent} frames sent, {out:?} came out, {fast} by the fast path; {before:?}");
    ensure!(fast * 10 > (out[0] + out[1]) * 9 && out.iter().all(|out| *out > 10_000), "too few by the fast path");
    Ok(())
}
