//! TCP through a masquerading gateway, by Linux and by Towpath in turn: iperf3 between two hosts.

use crate::beside::{Beside, Unit};
use crate::findings::{Aim, Findings};
use crate::path::{ask, towpath_binary};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::Duration;
use towpath_lab::{Lab, Node, Process};
use towpath_report::Report;

const PATIENCE: Duration = Duration::from_secs(20);
const SERVER: &str = "198.51.100.10";
const RULES: &str = "
table ip nat { chain postrouting { type nat hook postrouting priority srcnat; oifname eth1 masquerade; }; }
table ip filter { chain forward { type filter hook forward priority filter; policy drop;
    ct state established accept; iifname eth0 accept; }; }";

/// Of the gateway's devices: as a driver has them.
const OFFLOADS: &str = "tx on tso on gso on gro on";

/// What the hosts leave to their devices.
struct Hosts {
    name: &'static str,
    /// Of each host's device
    offloads: &'static str,
    /// Whether the fast path can carry what they send
    fast: bool,
}

const HOSTS: [Hosts; 2] = [
    // What arrives is as from a wire, and Linux merges it as it would with a driver.
    Hosts { name: "packets as from a wire", offloads: "tx off tso off gso off gro on", fast: true },
    // Containers and virtual machines of the same host: neither segments nor checksums are made anywhere.
    Hosts { name: "hosts that leave checksums to their veth", offloads: OFFLOADS, fast: false },
];

/// Runs the section.
pub fn run(findings: &mut Findings, report: &mut Report, rounds: usize) -> Result<()> {
    println!("TCP through a masquerading gateway, veth, {rounds} rounds of 2 s each, by Linux and by Towpath");
    report.section("TCP through a gateway").text(
        "iperf3 from one network namespace to another through a third one that masquerades, all on the same cores, by Linux \
         alone and with Towpath. Linux merges TCP (GRO) and forwards the merged packets.",
    );
    for hosts in &HOSTS {
        let gateways = [Gateway::new("linux", hosts, false)?, Gateway::new("towpath", hosts, true)?];
        for streams in [1, 8] {
            let name = format!("{}, {streams} streams", hosts.name);
            println!("{name}:");
            let found = Beside::measure(["Linux", "Towpath"], Unit::Gigabits, rounds, |number| {
                gateways[number].transfer(streams)
            })?;
            let share = gateways[1].fast_share()?;
            println!("  {:.1} % of the packets by the fast path", share * 100.0);
            ensure!(!hosts.fast || share > 0.9, "Towpath forwarded too little");
            findings.goal(format!("TCP, {name}: throughput over Linux's"), found.ratio.median, Aim::AtLeast(1.0));
            found.plot(report, &name)?;
            findings.keep(&format!("tcp, {name}"), found);
        }
    }
    Ok(())
}

struct Gateway {
    client: Node,
    router: Node,
    /// They end before the lab does
    _running: Vec<Process>,
    _lab: Lab,
}

impl Gateway {
    fn new(name: &str, hosts: &Hosts, towpath: bool) -> Result<Self> {
        let lab = Lab::new(&format!("tcp-{name}"))?;
        let [client, router, server] = ["client", "router", "server"].map(|node| lab.node(node));
        let (client, router, server) = (client?, router?, server?);
        lab.link((&router, "eth0"), (&client, "up0"))?;
        lab.link((&router, "eth1"), (&server, "up0"))?;
        router.forward()?;
        router.sh("ip address add 192.0.2.1/24 dev eth0; ip address add 198.51.100.1/24 dev eth1")?;
        router.sh(&format!(
            "for port in eth0 eth1; do ethtool -K $port {OFFLOADS}; done; nft -f - <<'END'\n{RULES}\nEND"
        ))?;
        for (host, address, gateway) in [(&client, "192.0.2.10", "192.0.2.1"), (&server, SERVER, "198.51.100.1")] {
            host.sh(&format!(
                "ethtool -K up0 {}; ip address add {address}/24 dev up0; ip route add default via {gateway}",
                hosts.offloads
            ))?;
        }
        let mut running = vec![server.spawn(["iperf3", "-s", "--forceflush"])?];
        running[0].wait_for_output(PATIENCE, "Server listening")?;
        if towpath {
            let mut daemon = router.spawn([&towpath_binary()?, "up", "--flows", "established", "eth0", "eth1"])?;
            daemon.wait_for_output(Duration::from_secs(120), "ready")?;
            running.push(daemon);
        }
        Ok(Self { client, router, _running: running, _lab: lab })
    }

    /// Gigabits a second that arrived.
    fn transfer(&self, streams: u32) -> Result<f64> {
        let output = self.client.run(["iperf3", "-J", "-t", "2", "-c", SERVER, "-P", &streams.to_string()])?;
        let told: Value = serde_json::from_str(&output).context("iperf3's answer")?;
        let rate = told["end"]["sum_received"]["bits_per_second"].as_f64();
        Ok(rate.with_context(|| format!("no rate in iperf3's answer: {}", told["error"]))? / 1e9)
    }

    /// The part of all packets so far that the fast path forwarded, by Towpath's counters.
    fn fast_share(&self) -> Result<f64> {
        let stats = ask(&self.router, &["show", "stats"]).context("no statistics")?;
        let sum = |what: &str| -> u64 {
            stats["ports"].as_array().into_iter().flatten().filter_map(|port| port[what].as_u64()).sum()
        };
        let (fast, exceptions) = (sum("rx_packets"), sum("exceptions"));
        Ok(fast as f64 / (fast + exceptions).max(1) as f64)
    }
}
