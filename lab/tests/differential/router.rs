//! One of the two routers, its configuration, and the ends of its links.
//!
//!                  h0 ---- eth0  mtu 1500  192.0.2.1/24     2001:db8:0::1/64
//!     wire         h1 ---- eth1  mtu 1400  198.51.100.1/24  2001:db8:1::1/64    router
//!     (silent)     h2 ---- eth2  mtu 1500  203.0.113.1/24   2001:db8:2::1/64
//!
//! On each link there is a neighbour .10 (::10) with a permanent entry; .99 (::99) has none. Both routers have the
//! same addresses, MAC addresses and routes; the hosts' side has no addresses and says nothing by itself.

use crate::memory;
use anyhow::{Context, Result};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::rc::Rc;
use std::time::{Duration, Instant};
use towpath_lab::{Frame, Lab, Node, PacketSocket};
use towpath_user::tap::Tap;

pub const PORTS: usize = 3;
/// MAC addresses of the router's ports and of the neighbours on their links.
pub const ROUTER_MACS: [[u8; 6]; PORTS] = [[2, 0, 0, 0, 0, 0x10], [2, 0, 0, 0, 0, 0x11], [2, 0, 0, 0, 0, 0x12]];
pub const HOST_MACS: [[u8; 6]; PORTS] = [[2, 0, 0, 0, 0, 0x20], [2, 0, 0, 0, 0, 0x21], [2, 0, 0, 0, 0, 0x22]];
pub const MTUS: [usize; PORTS] = [1500, 1400, 1500];
/// Addresses of the router's own, as prefixes of its links.
pub const ROUTER_V4: [[u8; 4]; PORTS] = [[192, 0, 2, 1], [198, 51, 100, 1], [203, 0, 113, 1]];
/// The neighbours with a permanent entry.
pub const NEIGHBOURS_V4: [[u8; 4]; PORTS] = [[192, 0, 2, 10], [198, 51, 100, 10], [203, 0, 113, 10]];
/// VLAN sub-interfaces of eth2, where the kernel has them: identifier, and third byte of 198.18.<n>.1/24.
pub const VLANS: [(u16, u8); 2] = [(100, 100), (200, 101)];

/// A GRE tunnel from the router's own address on a port to the neighbour there, over either family. Routes lead
/// 198.18.<third>.0/24 and 2001:db8:1<third>::/48 there (the latter in hexadecimal digits).
pub struct Tunnel {
    pub name: &'static str,
    pub port: usize,
    pub third: u8,
    /// Of what comes out of it
    pub key: Option<u32>,
    /// The same
    pub checksum: bool,
    /// Over IPv6
    pub six: bool,
    options: &'static str,
}

pub static TUNNELS: [Tunnel; 6] = [
    Tunnel {
        name: "gre1",
        port: 1,
        third: 0x50,
        key: None,
        checksum: false,
        six: false,
        options: "ttl inherit tos inherit",
    },
    Tunnel {
        name: "gre2",
        port: 2,
        third: 0x60,
        key: Some(70_000),
        checksum: false,
        six: false,
        options: "ikey 70000 okey 9 ocsum ttl 33 tos 0x48",
    },
    Tunnel { name: "gre3", port: 0, third: 0x70, key: None, checksum: true, six: false, options: "csum ttl 64" },
    Tunnel {
        name: "gre4",
        port: 1,
        third: 0x51,
        key: None,
        checksum: false,
        six: true,
        options: "hoplimit 0 tclass inherit flowlabel inherit",
    },
    Tunnel {
        name: "gre5",
        port: 2,
        third: 0x61,
        key: Some(70_000),
        checksum: false,
        six: true,
        options: "ikey 70000 okey 9 ocsum encaplimit none hoplimit 33 tclass 0x49 flowlabel 0x12345",
    },
    Tunnel {
        name: "gre6",
        port: 0,
        third: 0x71,
        key: None,
        checksum: true,
        six: true,
        options: "csum encaplimit 7 hoplimit 64",
    },
];

/// Routes of both families. 198.19.0.0/16 and 2001:db8:f00::/40 hold the sources, a part behind each port.
const ROUTES: &[&str] = &[
    "198.18.0.0/24 via 198.51.100.10",
    "198.18.1.0/24 via 203.0.113.10",
    "198.18.1.128/25 via 198.51.100.10",
    "blackhole 198.18.1.129/32",
    "198.18.2.0/24 via 192.0.2.10",
    "blackhole 198.18.3.0/24",
    "unreachable 198.18.4.0/24",
    "prohibit 198.18.5.0/24",
    "throw 198.18.6.0/24",
    "198.18.7.0/24 via 198.51.100.99",
    "198.18.8.0/24 via 203.0.113.10 mtu 1300",
    "198.18.9.0/24 dev eth1",
    "198.19.0.0/18 via 192.0.2.10",
    "198.19.64.0/18 via 198.51.100.10",
    "198.19.128.0/18 via 203.0.113.10",
    "2001:db8:100::/48 via 2001:db8:1::10",
    "2001:db8:101::/48 via 2001:db8:2::10",
    "2001:db8:101:8000::/49 via 2001:db8:1::10",
    "blackhole 2001:db8:101:8000::1/128",
    "2001:db8:102::/48 via 2001:db8::10",
    "blackhole 2001:db8:103::/48",
    "unreachable 2001:db8:104::/48",
    "prohibit 2001:db8:105::/48",
    "throw 2001:db8:106::/48",
    "2001:db8:107::/48 via 2001:db8:1::99",
    "2001:db8:108::/48 via 2001:db8:2::10 mtu 1300",
    "2001:db8:f00::/48 via 2001:db8::10",
    "2001:db8:f01::/48 via 2001:db8:1::10",
    "2001:db8:f02::/48 via 2001:db8:2::10",
];

const SYSCTLS: &[(&str, &str)] = &[
    // Every ICMP error is sent, so that both routers send the same ones.
    ("net.ipv4.icmp_ratelimit", "0"),
    ("net.ipv4.icmp_ratemask", "0"),
    ("net.ipv6.icmp.ratelimit", "0"),
    ("net.ipv6.icmp.ratemask", "200"),
    // Flow labels of the router's own packets are random otherwise.
    ("net.ipv6.auto_flowlabels", "0"),
    // Fragments to the router itself never expire here: an ICMP error for them would come at some later time.
    ("net.ipv4.ipfrag_time", "3600"),
    ("net.ipv6.ip6frag_time", "3600"),
];

/// What differs between runs.
#[derive(Clone, Copy)]
pub struct Profile {
    pub name: &'static str,
    /// rp_filter of each port
    pub rp_filter: [u8; PORTS],
    pub send_redirects: bool,
    pub vlans: bool,
    pub tunnels: bool,
    /// The first two ports are in one VRF, the third is in another, and routes of each lead to the ports of the other
    pub vrfs: bool,
    /// Rules and the tables that they lead to: what `ip` is to do
    pub rules: &'static [&'static str],
}

const VRFS: [(&str, u32); 2] = [("red", 10), ("blue", 20)];
const PORTS_VRF: [&str; PORTS] = ["red", "red", "blue"];

pub const PORT_NAMES: [&str; PORTS] = ["eth0", "eth1", "eth2"];

/// The other ends of a router's links.
pub trait Ends {
    /// Sends frames to a port, in order.
    fn send(&self, port: usize, frames: &[&[u8]]) -> Result<()>;
    /// What has come out of a port by now.
    fn drain(&self, port: usize) -> Result<Vec<Frame>>;
}

impl Ends for Vec<PacketSocket> {
    fn send(&self, port: usize, frames: &[&[u8]]) -> Result<()> {
        self[port].send_all(frames)
    }

    fn drain(&self, port: usize) -> Result<Vec<Frame>> {
        let frames = self[port].drain()?;
        anyhow::ensure!(self[port].lost()? == 0, "the receiving socket lost frames");
        Ok(frames)
    }
}

pub struct Router {
    pub name: &'static str,
    pub node: Node,
    ends: Rc<dyn Ends>,
}

impl Router {
    pub fn new(lab: &Lab, name: &'static str, profile: &Profile) -> Result<Router> {
        let (node, wire) = (node(lab, name)?, lab.node(&format!("wire-{name}"))?);
        wire.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
        for port in 0..PORTS {
            let (end, host) = (PORT_NAMES[port], format!("h{port}"));
            lab.link((&node, end), (&wire, &host))?;
            wire.run(["ip", "link", "set", &host, "address", &mac(HOST_MACS[port]), "mtu", "9000"])?;
            set_port(&node, port)?;
        }
        configure(&node, profile)?;
        let sockets = (0..PORTS).map(|port| wire.packet_socket(&format!("h{port}"))).collect::<Result<Vec<_>>>()?;
        Ok(Router { name, node, ends: Rc::new(sockets) })
    }

    /// A router whose ports are TAPs; `ends` is given the router when all is configured.
    pub fn with_taps<E: Ends + 'static>(
        lab: &Lab,
        name: &'static str,
        profile: &Profile,
        ends: impl FnOnce(&Node, Vec<Tap>) -> Result<E>,
    ) -> Result<(Router, Rc<E>)> {
        let node = node(lab, name)?;
        for (port, name) in PORT_NAMES.iter().enumerate() {
            node.run(["ip", "tuntap", "add", "dev", name, "mode", "tap"])?;
            set_port(&node, port)?;
            node.run(["ip", "link", "set", name, "up"])?;
        }
        let taps = memory::taps(&node)?;
        configure(&node, profile)?;
        let ends = Rc::new(ends(&node, taps)?);
        Ok((Router { name, node, ends: ends.clone() }, ends))
    }

    pub fn send(&self, port: usize, frames: &[impl AsRef<[u8]>]) -> Result<()> {
        let frames: Vec<&[u8]> = frames.iter().map(AsRef::as_ref).collect();
        self.ends.send(port, &frames).with_context(|| format!("to eth{port} of {}", self.name))
    }

    /// Adds what has come out of each port; true once nothing more is there to be read.
    pub fn collect(&self, into: &mut [Vec<Frame>; PORTS]) -> Result<()> {
        for (port, frames) in into.iter_mut().enumerate() {
            frames.extend(self.ends.drain(port).with_context(|| format!("from eth{port} of {}", self.name))?);
        }
        Ok(())
    }

    /// Waits until no frame has come for a while.
    pub fn settle(&self) -> Result<()> {
        let mut quiet_since = Instant::now();
        while quiet_since.elapsed() < Duration::from_millis(200) {
            let mut frames = Default::default();
            self.collect(&mut frames)?;
            if frames.iter().any(|f| !f.is_empty()) {
                quiet_since = Instant::now();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

fn node(lab: &Lab, name: &str) -> Result<Node> {
    let node = lab.node(name)?;
    // Link-local addresses come from MAC addresses otherwise, and the routers' are not equal yet.
    node.sysctl("net.ipv6.conf.default.addr_gen_mode", "1")?;
    Ok(node)
}

fn set_port(node: &Node, port: usize) -> Result<()> {
    let (address, mtu) = (mac(ROUTER_MACS[port]), MTUS[port].to_string());
    node.run(["ip", "link", "set", PORT_NAMES[port], "address", &address, "mtu", &mtu]).map(drop)
}

fn configure(node: &Node, profile: &Profile) -> Result<()> {
    node.forward()?;
    for (key, value) in SYSCTLS {
        node.sysctl(key, value)?;
    }
    for (vrf, table) in VRFS.iter().filter(|_| profile.vrfs) {
        node.sh(&format!("ip link add {vrf} type vrf table {table} && ip link set {vrf} up"))?;
    }
    for (port, vrf) in PORT_NAMES.iter().zip(PORTS_VRF).filter(|_| profile.vrfs) {
        node.run(["ip", "link", "set", port, "master", vrf])?;
    }
    let redirects = if profile.send_redirects { "1" } else { "0" };
    node.sysctl("net.ipv4.conf.all.send_redirects", redirects)?;
    for port in 0..PORTS {
        let name = format!("eth{port}");
        let v4 = ROUTER_V4[port];
        let link = |last: &str| (format!("{}.{}.{}.{last}", v4[0], v4[1], v4[2]), format!("2001:db8:{port}::{last}"));
        let (own, own6) = link("1");
        node.run(["ip", "addr", "add", &format!("{own}/24"), "broadcast", "+", "dev", &name])?;
        node.run(["ip", "addr", "add", &format!("{own6}/64"), "dev", &name, "nodad"])?;
        node.run(["ip", "addr", "add", "fe80::1/64", "dev", &name, "nodad"])?;
        let (host, host6) = link("10");
        for neighbour in [host, host6] {
            node.run(["ip", "neigh", "add", &neighbour, "lladdr", &mac(HOST_MACS[port]), "dev", &name])?;
        }
        node.sysctl(&format!("net.ipv4.conf.{name}.rp_filter"), &profile.rp_filter[port].to_string())?;
        node.sysctl(&format!("net.ipv4.conf.{name}.send_redirects"), redirects)?;
        for family in ["ipv4", "ipv6"] {
            // No solicitation: an unknown neighbour fails at once and silently, instead of three seconds later.
            node.sysctl(&format!("net.{family}.neigh.{name}.mcast_solicit"), "0")?;
        }
    }
    node.run(["ip", "neigh", "add", "198.18.9.9", "lladdr", &mac(HOST_MACS[1]), "dev", "eth1"])?;
    if profile.vlans {
        configure_vlans(node)?;
    }
    for tunnel in TUNNELS.iter().filter(|_| profile.tunnels) {
        configure_tunnel(node, tunnel)?;
    }
    for route in ROUTES {
        match profile.vrfs {
            false => drop(node.run(["ip", "route", "add"].into_iter().chain(route.split(' ')))?),
            true => add_to_vrfs(node, route)?,
        }
    }
    for command in profile.rules {
        node.run(["ip"].into_iter().chain(command.split(' ')))?;
    }
    Ok(())
}

/// Adds a route to the tables of both VRFs, whichever its gateway is in.
fn add_to_vrfs(node: &Node, route: &str) -> Result<()> {
    let gateway = route.split(' ').skip_while(|word| *word != "via").nth(1);
    let of_port = |port: &usize| {
        let [a, b, c, _] = ROUTER_V4[*port];
        let six = if *port == 0 { "2001:db8::".into() } else { format!("2001:db8:{port}::") };
        gateway.is_some_and(|gateway| gateway.starts_with(&six) || gateway.starts_with(&format!("{a}.{b}.{c}.")))
    };
    let out = (0..PORTS).find(of_port).map_or(String::new(), |port| format!(" dev {}", PORT_NAMES[port]));
    for (_, table) in VRFS {
        node.run(["ip", "route", "add"].into_iter().chain(format!("{route}{out} table {table}").split(' ')))?;
    }
    Ok(())
}

fn configure_vlans(node: &Node) -> Result<()> {
    for (id, third) in VLANS {
        let name = format!("eth2.{id}");
        let id = id.to_string();
        node.run(["ip", "link", "add", "link", "eth2", "name", &name, "type", "vlan", "id", &id])?;
        node.run(["ip", "link", "set", &name, "up"])?;
        node.run(["ip", "addr", "add", &format!("198.18.{third}.1/24"), "dev", &name])?;
        node.run(["ip", "addr", "add", &format!("2001:db8:1{id}::1/64"), "dev", &name, "nodad"])?;
        node.run(["ip", "addr", "add", "fe80::1/64", "dev", &name, "nodad"])?;
        for neighbour in [format!("198.18.{third}.10"), format!("2001:db8:1{id}::10")] {
            node.run(["ip", "neigh", "add", &neighbour, "lladdr", &mac(HOST_MACS[2]), "dev", &name])?;
        }
        for family in ["ipv4", "ipv6"] {
            node.sysctl(&format!("net/{family}/neigh/{name}/mcast_solicit"), "0")?;
        }
    }
    Ok(())
}

fn configure_tunnel(node: &Node, tunnel: &Tunnel) -> Result<()> {
    let Tunnel { name, port, third, options, six, .. } = tunnel;
    let (kind, [local, remote]) = match six {
        false => ("gre", [ROUTER_V4[*port], NEIGHBOURS_V4[*port]].map(|end| Ipv4Addr::from(end).to_string())),
        true => ("ip6gre", [1, 10].map(|last| end_v6(*port, last).to_string())),
    };
    node.sh(&format!(
        "sysctl -qw net.ipv6.auto_flowlabels=0 &&
         ip link add {name} type {kind} local {local} remote {remote} {options} && ip link set {name} up &&
         sysctl -qw net.ipv4.conf.{name}.send_redirects=0 &&
         ip route add 198.18.{third}.0/24 dev {name} && ip route add 2001:db8:1{third:x}::/48 dev {name}"
    ))?;
    Ok(())
}

/// The router's IPv6 address on a port, or that of the neighbour there, which both end in a byte in decimal digits.
pub fn end_v6(port: usize, last: u16) -> Ipv6Addr {
    let last = if last == 10 { 0x10 } else { last };
    Ipv6Addr::new(0x2001, 0xdb8, port as u16, 0, 0, 0, 0, last)
}

/// As `ip` takes it.
pub fn mac(bytes: [u8; 6]) -> String {
    bytes.map(|b| format!("{b:02x}")).join(":")
}
