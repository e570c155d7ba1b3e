//! Two gateways, of which one is active: keepalived gives it the addresses that hosts know, conntrackd tells the other one of
//! its connections. When it fails, connections go on through the other, and become fast there.
//!
//! ```text
//!                      .2 eth0 [a] eth1 .2
//! client 192.0.2.10 --       |sync|        -- 198.51.100.10 server
//!                      .3 eth0 [b] eth1 .3
//!         the active one: .1            .1
//! ```

mod common;
#[path = "gateway/real.rs"]
mod real;
#[path = "flows/support.rs"]
#[allow(dead_code, reason = "each test file uses a part")]
mod support;

use common::{DEADLINE, eventually};
use real::{Transfer, folder, serve};
use serde_json::Value;
use std::path::PathBuf;
use support::{Pulse, Talk, echo, fast_packets, is_fast};
use towpath_lab::{Lab, Node, Process, Towpath, supported};

const CLIENT: &str = "192.0.2.10";
const SERVER: &str = "198.51.100.10";
/// The active gateway's address at the server's side.
const OUTSIDE: &str = "198.51.100.1";

/// Replies that come before their connections are known must not be answered by a RST, nor be taken for new connections.
const RULES: &str = "\
    table inet filter { \
        chain input { \
            type filter hook input priority 0; policy drop; \
            ct state established,related accept; \
            meta l4proto { icmp, ipv6-icmp, vrrp } accept; \
            iifname sync accept; \
        }; \
        chain forward { \
            type filter hook forward priority 0; policy drop; \
            ct state invalid drop; \
            ct state established,related accept; \
            iifname eth0 accept; \
            ct status dnat accept; \
        }; \
    }; \
    table ip nat { \
        chain out { type nat hook postrouting priority srcnat; iifname eth0 oifname eth1 snat to 198.51.100.1; }; \
        chain in { type nat hook prerouting priority dstnat; ip daddr 198.51.100.1 tcp dport 8080 dnat to 192.0.2.10:80; }; \
    };";

/// NAME stands for the gateway, FOLDER for a path of its own.
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
            192.0.2.1/24
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
            198.51.100.1/24
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
    _conntrackd: Process,
}

impl Gateway {
    /// One of the two, at its ends of the links, which hands over the connections of this mode.
    fn start(node: &Node, [own, other]: [u8; 2], mode: &str) -> Self {
        let folder = node.folder("gateway");
        std::fs::create_dir(&folder).expect("a folder");
        let path = folder.display().to_string();
        for (name, text) in [("keepalived.conf", KEEPALIVED), ("conntrackd.conf", CONNTRACKD), ("notify", NOTIFY)] {
            let numbers = [("OWN", own), ("OTHER", other)];
            let text = text.replace("FOLDER", &path).replace("NAME", node.name());
            let text = numbers.iter().fold(text, |text, (word, number)| text.replace(word, &number.to_string()));
            let lines: Vec<_> = text.lines().map(str::trim_start).collect();
            std::fs::write(folder.join(name), lines.join("\n") + "\n").expect("written");
        }
        node.run(["chmod", "+x", &format!("{path}/notify")]).expect("a program");
        node.sysctl("net.netfilter.nf_conntrack_tcp_loose", "0").expect("set");
        let towpath = Towpath::up(node, &["--flows", mode, "eth0", "eth1"]).expect("towpath");
        let conntrackd = node.spawn(["conntrackd", "-C", &format!("{path}/conntrackd.conf")]).expect("started");
        let mut gateway = Self { node: node.clone(), folder, towpath, keepalived: None, _conntrackd: conntrackd };
        eventually("conntrackd answers", || gateway.conntrackd("-s").ok());
        gateway.keepalived = Some(gateway.start_keepalived());
        gateway
    }

    fn start_keepalived(&self) -> Process {
        let path = self.folder.display();
        let line = format!("exec keepalived -n -l -G -P -f {path}/keepalived.conf -p {path}/pid -r {path}/vrrp.pid");
        self.node.spawn(["sh", "-ec", &line]).expect("started")
    }

    /// Gives an order to conntrackd, or asks it something.
    fn conntrackd(&self, order: &str) -> anyhow::Result<String> {
        self.node.run(["conntrackd", "-C", &format!("{}/conntrackd.conf", self.folder.display()), order])
    }

    /// The states that keepalived has told, the last one last.
    fn states(&self) -> Vec<String> {
        let said = std::fs::read_to_string(self.folder.join("notified")).unwrap_or_default();
        said.lines().filter(|line| ["primary", "backup", "fault"].contains(line)).map(str::to_owned).collect()
    }

    fn becomes(&self, state: &str) {
        let what = format!("{} is told to be {state}", self.node.name());
        eventually(&what, || (self.states().last()? == state).then_some(()));
    }

    fn links(&self, state: &str) {
        for port in ["eth0", "eth1"] {
            self.node.run(["ip", "link", "set", port, state]).expect("set");
        }
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
        let before = eventually(&what, &mut packets);
        eventually(&what, || {
            let after = packets()?;
            (0..2).all(|way| after[way] >= before[way] + 5).then_some(())
        });
    }

    /// Waits until it has been told of the connection by the other's conntrackd.
    fn awaits(&self, port: u16) {
        let word = format!("sport={port} ");
        let what = format!("{} is told of the connection from port {port}", self.node.name());
        eventually(&what, || self.conntrackd("-e").ok()?.contains(&word).then_some(()));
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
    client: Node,
    server: Node,
    gateways: [Node; 2],
    _lab: Lab,
}

impl Net {
    fn new() -> anyhow::Result<Self> {
        let lab = Lab::new("failover")?;
        let (client, server, switch) = (lab.node("client")?, lab.node("server")?, lab.node("switch")?);
        let gateways = [lab.node("a")?, lab.node("b")?];
        switch.sh("ip link add inside up type bridge; ip link add outside up type bridge")?;
        let join = |node: &Node, port: &str, at: &str, name: &str, bridge: &str| {
            lab.link((node, port), (&switch, name))?;
            switch.run(["ip", "link", "set", name, "master", bridge])?;
            node.run(["ip", "address", "add", at, "dev", port])
        };
        join(&client, "eth0", &format!("{CLIENT}/24"), "client", "inside")?;
        join(&server, "eth0", &format!("{SERVER}/24"), "server", "outside")?;
        client.sh("ip route add default via 192.0.2.1")?;
        lab.link((&gateways[0], "sync"), (&gateways[1], "sync"))?;
        for (node, number) in gateways.iter().zip([2, 3]) {
            let name = node.name();
            join(node, "eth0", &format!("192.0.2.{number}/24"), &format!("{name}-in"), "inside")?;
            join(node, "eth1", &format!("198.51.100.{number}/24"), &format!("{name}-out"), "outside")?;
            node.sh(&format!("ip address add 203.0.113.{number}/29 dev sync"))?;
            node.forward()?;
            node.run(["nft", RULES])?;
        }
        for node in [&client, &server] {
            node.sysctl("net.ipv4.tcp_rmem", "4096 65536 65536")?;
        }
        Ok(Self { client, server, gateways, _lab: lab })
    }
}

#[test]
fn connections_go_on_through_the_other_gateway_and_back() {
    there_and_back(&Net::new().expect("a net"), "established");
}

#[test]
fn connections_in_a_flowtable_do_so_too() {
    let net = Net::new().expect("a net");
    let flowtable = "add flowtable inet filter f { hook ingress priority 0; devices = { eth0, eth1 }; }; \
        insert rule inet filter forward meta l4proto { tcp, udp } flow add @f";
    let add = || net.gateways.iter().try_for_each(|node| node.run(["nft", flowtable]).map(drop));
    if supported("flowtables of nftables", add) {
        there_and_back(&net, "flowtable");
    }
}

fn there_and_back(net: &Net, mode: &str) {
    let [node_a, node_b] = &net.gateways;
    let a = Gateway::start(node_a, [2, 3], mode);
    a.becomes("primary");
    let mut b = Gateway::start(node_b, [3, 2], mode);
    b.becomes("backup");

    let (files, file) = folder(&net.server, "www");
    let line = format!("cd {}; exec python3 -u -m http.server --bind {SERVER} 8000", files.display());
    let _web = serve(&net.server, &format!("{SERVER}:8000"), &line);
    echo(&net.server, &format!("{SERVER}:7001"));
    echo(&net.client, &format!("{CLIENT}:80"));
    let fetch = Transfer::fetch(&net.client, &[&format!("http://{SERVER}:8000/file")]);
    let pulse = Pulse::between(&net.client, &net.server, (SERVER, 7002));
    let mut talks =
        [Talk::start(&net.client, &format!("{SERVER}:7001")), Talk::start(&net.server, &format!("{OUTSIDE}:8080"))];
    let fetch_port = eventually("the transfer is known", || {
        let flows = a.towpath.json(&["show", "flows"]).expect("flows");
        let found =
            flows["flows"].as_array()?.iter().find(|flow| flow["original"]["destination_port"] == 8000)?.clone();
        found["original"]["source_port"].as_u64().map(|port| port as u16)
    });
    let mut all_by = |gateway: &Gateway| {
        gateway.carries(fetch_port, || ());
        gateway.carries(pulse.port, || ());
        pulse.goes_on();
        for talk in &mut talks {
            let port = talk.port();
            gateway.carries(port, || talk.exchange(1));
        }
        [fetch_port, pulse.port, talks[0].port(), talks[1].port()]
    };
    let ports = all_by(&a);
    assert!(ports.iter().all(|port| b.flow(*port).is_none()), "the other has nothing of them");
    let heard = b.multicast();
    eventually("the other hears that this one is alive", || (b.multicast() >= heard + 4).then_some(()));
    assert_eq!(b.states(), ["backup"]);

    // The active one's ports fail.
    ports.iter().for_each(|port| b.awaits(*port));
    a.links("down");
    b.becomes("primary");
    a.becomes("fault");
    all_by(&b);

    // It comes back, and waits. Then the other is to rest.
    a.links("up");
    a.becomes("backup");
    ports.iter().for_each(|port| a.awaits(*port));
    let status = b.keepalived.take().expect("it runs").stop(DEADLINE).expect("an end");
    assert!(status.success(), "{status}");
    a.becomes("primary");
    assert_eq!(all_by(&a), ports, "the same connections");
    assert!(fetch.finish() == file, "as it is at the server");
    assert_eq!(a.states(), ["backup", "primary", "fault", "backup", "primary"]);
    assert_eq!(b.states(), ["backup", "primary", "fault"]);
}
