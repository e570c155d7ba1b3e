//! Two gateways, of which one is active: keepalived gives it the addresses that hosts know, conntrackd tells the other one of
//! its connections. When it fails, connections go on through the other, and become fast there.
//!
//! ```text
//!                            .2 eth0 [a] eth1 .2
//! client 192.0.2.10       --       |sync|        -- 198.51.100.10     server
//!        2001:db8:1::10      .3 eth0 [b] eth1 .3    2001:db8:2::10
//!               the active one: .1            .1
//! ```

mod common;
#[path = "gateway/real.rs"]
mod real;
#[path = "flows/support.rs"]
#[allow(dead_code, reason = "each test file uses a part")]
mod support;

use common::{DEADLINE, eventually};
use real::{FILTER, Transfer, folder, serve};
use serde_json::Value;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;
use support::{Pulse, Talk, echo, fast_packets, is_fast};
use towpath_lab::{Lab, Node, Process, Towpath, supported, wait_for};

/// Addresses of one family: on the client's side and on the server's.
struct Family {
    /// Nftables' word for it
    word: &'static str,
    /// What the addresses of each side begin with
    networks: [&'static str; 2],
    /// Bits of these
    bits: u8,
    /// What an active gateway has besides: VRRP for IPv6 wants an address of the link first (RFC 5798, section 5.2.9)
    link_local: &'static str,
}

const V4: Family = Family { word: "ip", networks: ["192.0.2.", "198.51.100."], bits: 24, link_local: "" };
const V6: Family =
    Family { word: "ip6", networks: ["2001:db8:1::", "2001:db8:2::"], bits: 64, link_local: "fe80::1/64\n" };

/// A fail-over takes many processes. And what is in a flowtable is found by dumps of all connections, which are seconds
/// apart, and more in a slow machine.
const PATIENCE: Duration = Duration::from_secs(90);

const INSIDE: usize = 0;
const OUTSIDE: usize = 1;
/// The last part of addresses: the active gateway's, and that of the client and of the server.
const SHARED: u8 = 1;
const HOST: u8 = 10;

impl Family {
    fn address(&self, side: usize, number: u8) -> IpAddr {
        format!("{}{number}", self.networks[side]).parse().expect("an address")
    }

    fn at(&self, side: usize, number: u8, port: u16) -> String {
        SocketAddr::new(self.address(side, number), port).to_string()
    }

    /// What the active gateway has, for keepalived.
    fn shared(&self, side: usize) -> String {
        format!("{}{}/{}", self.link_local, self.address(side, SHARED), self.bits)
    }

    /// The rules of both gateways. Replies that come before their connections are known must not be answered by a RST, nor
    /// be taken for new connections.
    fn rules(&self) -> String {
        let (word, shared, client) = (self.word, self.address(OUTSIDE, SHARED), self.at(INSIDE, HOST, 80));
        format!(
            "{FILTER} \
            table {word} nat {{ \
                chain out {{ type nat hook postrouting priority srcnat; iifname eth0 oifname eth1 snat to {shared}; }}; \
                chain in {{ \
                    type nat hook prerouting priority dstnat; {word} daddr {shared} tcp dport 8080 dnat to {client}; \
                }}; \
            }};"
        )
    }
}

/// NAME stands for the gateway, FOLDER for a path of its own, INSIDE and OUTSIDE for the addresses of the active one.
const KEEPALIVED: &str = "\
    global_defs {
        router_id NAME
        vrrp_version 3
        script_user root
    }
    vrrp_sync_group gateway {
        group {
            inside
            outside
        }
        notify_master \"FOLDER/notify primary\"
        notify_backup \"FOLDER/notify backup\"
        notify_fault \"FOLDER/notify fault\"
        notify_stop \"FOLDER/notify fault\"
    }
    vrrp_instance inside {
        interface eth0
        state BACKUP
        nopreempt
        virtual_router_id 61
        priority 100
        advert_int 0.5
        virtual_ipaddress {
            INSIDE
        }
    }
    vrrp_instance outside {
        interface eth1
        state BACKUP
        nopreempt
        virtual_router_id 62
        priority 100
        advert_int 0.5
        virtual_ipaddress {
            OUTSIDE
        }
    }
";

/// OWN and OTHER are the ends of the link between the gateways.
const CONNTRACKD: &str = "\
    Sync {
        Mode FTFW {
        }
        UDP {
            IPv4_address 203.0.113.OWN
            IPv4_Destination_Address 203.0.113.OTHER
            Port 3780
            Interface sync
            Checksum on
        }
    }
    General {
        Systemd off
        HashSize 32768
        HashLimit 131072
        LogFile FOLDER/conntrackd.log
        LockFile FOLDER/lock
        UNIX {
            Path FOLDER/control
        }
        NetlinkBufferSize 2097152
        NetlinkBufferSizeMaxGrowth 8388608
        Filter From Userspace {
            Protocol Accept {
                TCP
                UDP
            }
            Address Ignore {
                IPv4_address 127.0.0.1
                IPv4_address 203.0.113.OWN
                IPv4_address 203.0.113.OTHER
            }
        }
    }
";

/// What conntrackd's documentation has keepalived do (primary-backup.sh).
const NOTIFY: &str = "\
    #!/bin/sh
    case \"$1\" in
        primary) orders='-c -f -R -B' ;;
        backup) orders='-t -n' ;;
        fault) orders='-t' ;;
    esac
    for order in $orders; do
        conntrackd -C FOLDER/conntrackd.conf $order || echo \"conntrackd $order failed\"
    done >>FOLDER/notified 2>&1
    echo \"$1\" >>FOLDER/notified
";

struct Gateway {
    node: Node,
    folder: PathBuf,
    towpath: Towpath,
    keepalived: Option<Process>,
    conntrackd: Process,
}

impl Gateway {
    /// Number 2 or number 3, which hands over the connections of this mode.
    fn start(net: &Net, number: u8, mode: &str) -> Self {
        let node = &net.gateways[usize::from(number) - 2];
        let folder = node.folder("gateway");
        std::fs::create_dir(&folder).expect("a folder");
        let path = folder.display().to_string();
        for (name, text) in [("keepalived.conf", KEEPALIVED), ("conntrackd.conf", CONNTRACKD), ("notify", NOTIFY)] {
            let words = [
                ("FOLDER", path.clone()),
                ("NAME", node.name().to_owned()),
                ("OWN", number.to_string()),
                ("OTHER", (5 - number).to_string()),
                ("INSIDE", net.family.shared(INSIDE)),
                ("OUTSIDE", net.family.shared(OUTSIDE)),
            ];
            let text = words.iter().fold(text.to_owned(), |text, (word, value)| text.replace(word, value));
            let lines: Vec<_> = text.lines().map(str::trim_start).collect();
            std::fs::write(folder.join(name), lines.join("\n") + "\n").expect("written");
        }
        node.run(["chmod", "+x", &format!("{path}/notify")]).expect("a program");
        node.sysctl("net.netfilter.nf_conntrack_tcp_loose", "0").expect("set");
        let towpath = Towpath::up(node, &["--flows", mode, "eth0", "eth1"]).expect("towpath");
        let conntrackd = node.spawn(["conntrackd", "-C", &format!("{path}/conntrackd.conf")]).expect("started");
        let mut gateway = Self { node: node.clone(), folder, towpath, keepalived: None, conntrackd };
        eventually("conntrackd answers", || gateway.ask_conntrackd("-s").ok());
        gateway.keepalived = Some(gateway.start_keepalived());
        gateway
    }

    fn start_keepalived(&self) -> Process {
        let path = self.folder.display();
        let line = format!("exec keepalived -n -l -G -P -f {path}/keepalived.conf -p {path}/pid -r {path}/vrrp.pid");
        self.node.spawn(["sh", "-ec", &line]).expect("started")
    }

    /// Gives an order to conntrackd, or asks it something.
    fn ask_conntrackd(&self, order: &str) -> anyhow::Result<String> {
        self.node.run(["conntrackd", "-C", &format!("{}/conntrackd.conf", self.folder.display()), order])
    }

    /// The states that keepalived has told, the last one last. It may tell the same one again: each of two ports may fail.
    fn states(&self) -> Vec<String> {
        let said = std::fs::read_to_string(self.folder.join("notified")).unwrap_or_default();
        let states = said.lines().filter(|line| ["primary", "backup", "fault"].contains(line));
        let mut states: Vec<_> = states.map(str::to_owned).collect();
        states.dedup();
        states
    }

    fn becomes(&self, state: &str) {
        let what = format!("{} is told to be {state}", self.node.name());
        wait_for(PATIENCE, &what, || (self.states().last()? == state).then_some(())).expect("in time");
    }

    fn links(&self, state: &str) {
        for port in ["eth0", "eth1"] {
            self.node.run(["ip", "link", "set", port, state]).expect("set");
        }
    }

    /// As if it lost its power: nothing ends in order.
    fn dies(&mut self) {
        let vrrp = std::fs::read_to_string(self.folder.join("vrrp.pid")).expect("keepalived's second process");
        let mut keepalived = self.keepalived.take().expect("it runs");
        // Of its two processes neither may see the other one's end.
        keepalived.signal(libc::SIGSTOP);
        self.node.run(["kill", "-KILL", vrrp.trim()]).expect("killed");
        for process in [&mut keepalived, &mut self.conntrackd, &mut self.towpath.process] {
            process.kill().expect("killed");
        }
        self.links("down");
    }

    /// Frames to more than one station, the other's word that it is alive among them.
    fn multicast(&self) -> u64 {
        let all = self.towpath.json(&["show", "exceptions"]).expect("exceptions");
        let rows = all["exceptions"].as_array().expect("exceptions");
        rows.iter()
            .filter(|row| row["reason"] == "l2-multicast")
            .map(|row| row["packets"].as_u64().expect("count"))
            .sum()
    }

    /// What it knows of the connection that was begun by this port.
    fn flow(&self, port: u16) -> Option<Value> {
        let flows = self.towpath.json(&["show", "flows"]).expect("flows");
        let all = flows["flows"].as_array().expect("flows");
        all.iter().find(|flow| flow["original"]["source_port"] == port).cloned()
    }

    /// Waits until packets of the connection go fast through it, both ways.
    fn carries(&self, port: u16, mut meanwhile: impl FnMut()) {
        let what = format!("{} carries the connection from port {port}", self.node.name());
        let mut packets = || {
            meanwhile();
            self.flow(port).filter(is_fast).map(|found| fast_packets(&found))
        };
        let before = wait_for(PATIENCE, &what, &mut packets).expect("in time");
        let go_on = || {
            let after = packets()?;
            (0..2).all(|way| after[way] >= before[way] + 5).then_some(())
        };
        wait_for(PATIENCE, &what, go_on).expect("in time");
    }

    /// Waits until it has been told of the connection by the other's conntrackd.
    fn awaits(&self, port: u16) {
        let word = format!("sport={port} ");
        let what = format!("{} is told of the connection from port {port}", self.node.name());
        eventually(&what, || self.ask_conntrackd("-e").ok()?.contains(&word).then_some(()));
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for name in ["notified", "conntrackd.log"] {
                let text = std::fs::read_to_string(self.folder.join(name)).unwrap_or_default();
                eprintln!("{} of {}:\n{text}", name, self.node.name());
            }
            for words in [&["conntrack", "-L"][..], &["ip", "-br", "address"]] {
                eprintln!("{words:?} of {}: {}", self.node.name(), self.node.run(words).unwrap_or_default());
            }
        }
    }
}

struct Net {
    family: Family,
    client: Node,
    server: Node,
    gateways: [Node; 2],
    _lab: Lab,
}

impl Net {
    fn new(family: Family) -> anyhow::Result<Self> {
        let lab = Lab::new("failover")?;
        let (client, server, switch) = (lab.node("client")?, lab.node("server")?, lab.node("switch")?);
        let gateways = [lab.node("a")?, lab.node("b")?];
        switch.sh("ip link add inside up type bridge; ip link add outside up type bridge")?;
        let join = |node: &Node, port: &str, side: usize, number: u8| {
            let name = format!("{}-{side}", node.name());
            lab.link((node, port), (&switch, &name))?;
            switch.run(["ip", "link", "set", &name, "master", ["inside", "outside"][side]])?;
            let at = format!("{}/{}", family.address(side, number), family.bits);
            node.run(["ip", "address", "add", &at, "dev", port])
        };
        join(&client, "eth0", INSIDE, HOST)?;
        join(&server, "eth0", OUTSIDE, HOST)?;
        client.run(["ip", "route", "add", "default", "via", &family.address(INSIDE, SHARED).to_string()])?;
        lab.link((&gateways[0], "sync"), (&gateways[1], "sync"))?;
        for (node, number) in gateways.iter().zip([2, 3]) {
            // As IPv4's do, addresses stay while a port is down.
            node.sysctl("net.ipv6.conf.all.keep_addr_on_down", "1")?;
            join(node, "eth0", INSIDE, number)?;
            join(node, "eth1", OUTSIDE, number)?;
            node.sh(&format!("ip address add 203.0.113.{number}/29 dev sync"))?;
            node.forward()?;
            node.run(["nft", &family.rules()])?;
        }
        for node in [&client, &server] {
            node.sysctl("net.ipv4.tcp_rmem", "4096 65536 65536")?;
        }
        Ok(Self { family, client, server, gateways, _lab: lab })
    }

    /// Both gateways, of which the first one is active.
    fn start(&self, mode: &str) -> [Gateway; 2] {
        let a = Gateway::start(self, 2, mode);
        a.becomes("primary");
        let b = Gateway::start(self, 3, mode);
        b.becomes("backup");
        [a, b]
    }
}

/// A transfer, a UDP stream, and a TCP session begun at each side, by way of the active gateway.
struct Traffic {
    _web: Process,
    file: Vec<u8>,
    fetch: Transfer,
    fetch_port: u16,
    pulse: Pulse,
    talks: [Talk; 2],
}

impl Traffic {
    fn start(net: &Net, by: &Gateway) -> Self {
        let (client, server) = (&net.client, &net.server);
        let address = net.family.address(OUTSIDE, HOST).to_string();
        let at = |port| net.family.at(OUTSIDE, HOST, port);
        let (files, file) = folder(server, "www");
        let line = format!("cd {}; exec python3 -u -m http.server --bind {address} 8000", files.display());
        let web = serve(server, &at(8000), &line);
        echo(server, &at(7001));
        echo(client, &net.family.at(INSIDE, HOST, 80));
        let fetch = Transfer::fetch(client, &[&format!("http://{}/file", at(8000))]);
        let pulse = Pulse::paced(client, server, (&address, 7002), Duration::from_millis(10));
        let talks = [Talk::start(client, &at(7001)), Talk::start(server, &net.family.at(OUTSIDE, SHARED, 8080))];
        let fetch_port = eventually("the transfer is known", || {
            let flows = by.towpath.json(&["show", "flows"]).expect("flows");
            let mut all = flows["flows"].as_array()?.iter();
            let found = all.find(|flow| flow["original"]["destination_port"] == 8000)?;
            found["original"]["source_port"].as_u64().map(|port| port as u16)
        });
        Self { _web: web, file, fetch, fetch_port, pulse, talks }
    }

    /// The ports by which it was begun.
    fn ports(&self) -> [u16; 4] {
        let [inside, outside] = &self.talks;
        [self.fetch_port, self.pulse.port, inside.port(), outside.port()]
    }

    /// Waits until all of it goes fast by this gateway.
    fn goes_by(&mut self, gateway: &Gateway) {
        gateway.carries(self.fetch_port, || ());
        gateway.carries(self.pulse.port, || ());
        self.pulse.goes_on();
        for talk in &mut self.talks {
            let port = talk.port();
            gateway.carries(port, || talk.exchange(10));
        }
    }

    /// The transfer comes to its end, and is as it is at the server.
    fn ends_whole(self) {
        assert!(self.fetch.finish() == self.file);
    }
}

#[test]
fn connections_go_on_through_the_other_gateway_and_back() {
    there_and_back(&Net::new(V4).expect("a net"), "established");
}

#[test]
fn connections_by_ipv6_do_so_too() {
    there_and_back(&Net::new(V6).expect("a net"), "established");
}

#[test]
fn connections_in_a_flowtable_do_so_too() {
    let net = Net::new(V4).expect("a net");
    if hands_over(&net) {
        there_and_back(&net, "flowtable");
    }
}

#[test]
fn connections_in_a_flowtable_outlive_a_gateway_that_dies() {
    let net = Net::new(V6).expect("a net");
    if hands_over(&net) {
        dies(&net, "flowtable");
    }
}

/// Has both gateways' rules put connections into a flowtable, if their kernel has such.
fn hands_over(net: &Net) -> bool {
    let flowtable = "add flowtable inet filter f { hook ingress priority 0; devices = { eth0, eth1 }; }; \
        insert rule inet filter forward meta l4proto { tcp, udp } flow add @f";
    let add = || net.gateways.iter().try_for_each(|node| node.run(["nft", flowtable]).map(drop));
    supported("flowtables of nftables", add)
}

fn there_and_back(net: &Net, mode: &str) {
    let [a, mut b] = net.start(mode);
    let mut traffic = Traffic::start(net, &a);
    traffic.goes_by(&a);
    let ports = traffic.ports();
    assert!(ports.iter().all(|port| b.flow(*port).is_none()), "the other has nothing of them");
    let heard = b.multicast();
    eventually("the other hears that this one is alive", || (b.multicast() >= heard + 4).then_some(()));
    assert_eq!(b.states(), ["backup"]);

    // The active one's ports fail.
    ports.iter().for_each(|port| b.awaits(*port));
    a.links("down");
    b.becomes("primary");
    a.becomes("fault");
    traffic.goes_by(&b);

    // It comes back, and waits. Then the other is to rest.
    a.links("up");
    a.becomes("backup");
    ports.iter().for_each(|port| a.awaits(*port));
    let status = b.keepalived.take().expect("it runs").stop(DEADLINE).expect("an end");
    assert!(status.success(), "{status}");
    a.becomes("primary");
    traffic.goes_by(&a);
    traffic.ends_whole();
    assert_eq!(a.states(), ["backup", "primary", "fault", "backup", "primary"]);
    b.becomes("fault");
    assert_eq!(b.states(), ["backup", "primary", "fault"]);
}

#[test]
fn connections_outlive_a_gateway_that_dies() {
    for family in [V4, V6] {
        dies(&Net::new(family).expect("a net"), "established");
    }
}

fn dies(net: &Net, mode: &str) {
    let [mut a, b] = net.start(mode);
    let mut traffic = Traffic::start(net, &a);
    traffic.goes_by(&a);
    traffic.ports().iter().for_each(|port| b.awaits(*port));
    a.dies();
    b.becomes("primary");
    traffic.goes_by(&b);
    traffic.ends_whole();
    assert_eq!(b.states(), ["backup", "primary"]);
}
