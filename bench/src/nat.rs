//! What a packet of a translated connection costs the router's core, beside a bare redirect and Linux.

use crate::cost::{Outcome, WINDOW, bars, outcomes, ratio, take_turns};
use crate::findings::{Aim, Findings};
use crate::path::{Arrangement, Contender, ask, gateway};
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;
use towpath_lab::{Node, wait_for};
use towpath_report::Report;

const CONTENDERS: [Contender; 3] = [Contender::Redirect, Contender::Linux, Contender::Towpath];
/// Which of them Towpath is
const TOWPATH: usize = 2;
const PATIENCE: Duration = Duration::from_secs(60);
/// Packets a second while Linux accepts connections
const ACCEPTED: f64 = 150_000.0;
/// Sources are masqueraded to the router's address on its port towards the sink.
const RULES: &str = "
table ip nat { chain postrouting { type nat hook postrouting priority srcnat; oifname o masquerade; }; }
table ip filter { chain forward { type filter hook forward priority filter; policy drop;
    ct state established accept; oifname o accept; }; }";

/// All contenders with so many connections.
#[derive(Clone, Debug, Serialize)]
struct Case {
    flows: usize,
    results: Vec<Outcome>,
}

/// Runs the section; `sizes` are powers of two.
pub fn run(findings: &mut Findings, report: &mut Report, rounds: usize, sizes: &[usize]) -> Result<()> {
    println!(
        "masquerade: {rounds} rounds of windows of {WINDOW} packets each, each packet of another connection than the last"
    );
    let mut cases = Vec::new();
    for flows in sizes {
        match measure(*flows, rounds)? {
            Some(case) => cases.push(case),
            None => println!("{flows} connections: left out, this kernel keeps fewer (net.netfilter.nf_conntrack_max)"),
        }
    }
    println!("aims:");
    for case in &cases {
        let (towpath, linux) = (ratio(&case.results, Contender::Towpath)?, ratio(&case.results, Contender::Linux)?);
        let times = linux / towpath;
        match case.flows {
            32_768 => {
                findings.goal("NAT, 32,768 flows: times the bare redirect", towpath, Aim::AtMost(1.6));
                findings.goal("NAT, 32,768 flows: times faster than Linux", times, Aim::AtLeast(3.3));
            }
            flows if flows >= 1_000_000 => {
                findings.goal("NAT, 1,000,000 flows: times faster than Linux", times, Aim::AtLeast(3.0));
            }
            flows => println!(
                "  NAT, {flows} flows: {towpath:.2} times the bare redirect, {times:.2} times faster than Linux"
            ),
        }
    }
    plot(report, &cases)?;
    findings.keep("nat", &cases);
    Ok(())
}

/// None if conntrack cannot hold so many entries.
fn measure(flows: usize, rounds: usize) -> Result<Option<Case>> {
    let capacity = (flows + flows / 8).to_string();
    let options = ["--flows", "established", "--max-flows", &capacity];
    let mut arrangement = Arrangement::with_options("nat", &CONTENDERS, flows, &options)?;
    let router = arrangement.router.clone();
    let room: usize = router.sysctl_get("net.netfilter.nf_conntrack_max")?.trim().parse()?;
    if room < flows + flows / 8 {
        return Ok(None);
    }
    router.sh(&format!("nft -f - <<'END'\n{RULES}\nEND\nip route add 10.0.0.0/8 via {}", gateway(false, 0)))?;
    let destinations: Vec<IpAddr> = (0..flows as u32).map(|n| Ipv4Addr::from_bits(10 << 24 | n).into()).collect();
    connect(&router, &destinations, true)?;
    wait_for_connections(&router, flows)?;
    arrangement.set_destinations(&destinations, false)?;
    // A connection without packets for as long as Linux would keep it is Linux's again.
    router.sysctl("net.netfilter.nf_conntrack_udp_timeout", "3600")?;
    // The first packets go through Linux, which accepts them: at a rate at which it loses few.
    wait_for(PATIENCE, "Linux to accept a packet of each connection", || {
        arrangement.load(TOWPATH, ACCEPTED, Duration::from_secs(1)).ok()?;
        (ask(&router, &["status"])?["flows"]["waiting"] == 0).then_some(())
    })?;
    // To warm caches; it is not counted.
    take_turns(&mut arrangement, 1)?;
    let counted = |arrangement: &Arrangement| arrangement.forwarded_of_taken(None)?.context("Towpath takes no part");
    let before = counted(&arrangement)?;
    let costs = take_turns(&mut arrangement, rounds)?;
    let after = counted(&arrangement)?;
    let [fast, taken] = [after[0] - before[0], after[1] - before[1]];
    ensure!(fast * 100 >= taken * 99, "Towpath forwarded only {fast} of {taken} packets of flows");
    println!("{flows} connections:");
    Ok(Some(Case { flows, results: outcomes(&CONTENDERS, &costs, Contender::Redirect)? }))
}

/// Has conntrack know an established connection from the sources to each destination, masqueraded or as it is.
pub(crate) fn connect(router: &Node, destinations: &[IpAddr], masqueraded: bool) -> Result<()> {
    let translation = if masqueraded { "--src-nat 198.19.255.1" } else { "" };
    let mut text = String::new();
    for destination in destinations {
        writeln!(
            text,
            "-I -p udp -s 198.51.100.2 -d {destination} --sport 9 --dport 9 -t 3600 -u SEEN_REPLY,ASSURED {translation}"
        )?;
    }
    let file = router.folder("connections");
    std::fs::write(&file, text).with_context(|| file.display().to_string())?;
    // What hosts say of themselves makes the source send a frame, and conntrack may know its connection already.
    let load = format!("conntrack -F 2>&1; conntrack -R {} 2>&1", file.display());
    wait_for(PATIENCE, "conntrack to take the connections", || router.sh(&load).ok().map(drop))
}

/// Waits until Towpath knows so many.
pub(crate) fn wait_for_connections(router: &Node, count: usize) -> Result<()> {
    wait_for(PATIENCE, "Towpath to know the connections", || {
        let status = ask(router, &["status"])?;
        let known: u64 = ["fast", "waiting"].iter().filter_map(|state| status["flows"][state].as_u64()).sum();
        (known >= count as u64).then_some(())
    })
}

fn plot(report: &mut Report, cases: &[Case]) -> Result<()> {
    report.section("Cost of a masqueraded packet").text(
        "The same arrangement; the router masquerades all that goes to the sink. conntrack knows the connections before, \
         each packet is of another one, and Towpath runs with --flows established.",
    );
    for case in cases {
        let title = format!("{} connections: ns per packet, median, floor to 90th percentile", case.flows);
        report.bars(&title, "ns", &bars(&case.results))?;
    }
    Ok(())
}
