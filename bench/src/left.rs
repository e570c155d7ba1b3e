//! What packets cost that the fast path must leave to Linux: beside Linux alone, behind the same firewall.

use crate::cost::{Outcome, WINDOW, bars, outcomes, ratio, take_turns};
use crate::findings::{Aim, Findings};
use crate::path::{Arrangement, Contender, gateway};
use anyhow::{Context, Result, ensure};
use std::net::{IpAddr, Ipv4Addr};
use towpath_report::Report;

/// A program that lets everything pass says what XDP itself costs there.
const CONTENDERS: [Contender; 3] = [Contender::Linux, Contender::Pass, Contender::Towpath];
const DESTINATIONS: u32 = 1 << 10;

/// A firewall for whose sake all packets are Linux's.
struct Case {
    name: &'static str,
    options: &'static [&'static str],
    rules: &'static str,
}

const CASES: [Case; 2] = [
    Case {
        name: "a rule for other packets",
        options: &[],
        rules: "table ip t { chain forward { type filter hook forward priority 0; udp dport 1 drop; }; }",
    },
    // Nothing ever answers, so Linux never says that they may go fast; each is looked for among those that may.
    Case {
        name: "connections without an answer",
        options: &["--flows", "established"],
        rules: "table ip t { chain forward { type filter hook forward priority 0; policy drop;
            ct state established accept; oifname o accept; }; }",
    },
];

/// Runs the section.
pub fn run(findings: &mut Findings, report: &mut Report, rounds: usize) -> Result<()> {
    println!("what is left to Linux: {rounds} rounds of windows of {WINDOW} packets each, with Towpath and without");
    report.section("What is left to Linux").text(
        "Behind a firewall, packets that must be Linux's: the router's CPU time per packet as above, by a port that Towpath \
         serves, by one that it does not, and by one with a program that only says XDP_PASS.",
    );
    for case in &CASES {
        println!("{}:", case.name);
        let found = measure(case, rounds)?;
        let over = ratio(&found, Contender::Towpath)?;
        findings.goal(format!("{}: cost over Linux alone", case.name), over, Aim::AtMost(1.05));
        report.bars(&format!("{}: ns per packet, median, floor to 90th percentile", case.name), "ns", &bars(&found))?;
        findings.keep(case.name, found);
    }
    Ok(())
}

fn measure(case: &Case, rounds: usize) -> Result<Vec<Outcome>> {
    let mut arrangement = Arrangement::with_options("left", &CONTENDERS, DESTINATIONS as usize, case.options)?;
    let router = arrangement.router.clone();
    router.sh(&format!("nft -f - <<'END'\n{}\nEND\nip route add 10.0.0.0/8 via {}", case.rules, gateway(false, 0)))?;
    let destinations: Vec<IpAddr> = (0..DESTINATIONS).map(|n| Ipv4Addr::from_bits(10 << 24 | n).into()).collect();
    arrangement.set_destinations(&destinations, false)?;
    // To warm caches; it is not counted.
    take_turns(&mut arrangement, 1)?;
    let costs = take_turns(&mut arrangement, rounds)?;
    let [fast, taken] = arrangement.forwarded_of_taken(None)?.context("Towpath takes no part")?;
    ensure!(fast * 100 < taken, "Towpath forwarded {fast} of {taken} packets");
    outcomes(&CONTENDERS, &costs, Contender::Linux)
}
