//! What a running capture that matches nothing costs the other traffic: windows of one router with a tcpdump and without
//! one, in turn.

use crate::cost::{DESTINATIONS, WINDOW};
use crate::findings::{Aim, Findings};
use crate::path::{Arrangement, Contender, OUT, towpath_binary};
use crate::routes;
use crate::stats::Summary;
use anyhow::{Context, Result};
use serde_json::Value;
use std::time::Duration;
use towpath_lab::{Node, wait_for};
use towpath_report::{Bar, Report};

/// The traffic is UDP to other ports, so nearly all of the filter is run.
const FILTER: &str = "udp port 7001";
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs the section.
pub fn run(findings: &mut Findings, report: &mut Report, rounds: usize) -> Result<()> {
    println!(
        "a capture that matches nothing: {rounds} rounds of windows of {WINDOW} packets each, with it and without"
    );
    let mut arrangement = Arrangement::new("capture", &[Contender::Towpath], DESTINATIONS)?;
    let all = routes::ipv4(1_000);
    arrangement.add_routes(&all)?;
    arrangement.wait_in_sync(&all)?;
    arrangement.set_destinations(&routes::destinations(&all, DESTINATIONS), false)?;
    arrangement.window(0, WINDOW)?;
    let (mut without, mut with) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        without.push(arrangement.window(0, WINDOW)?);
        with.push(beside_tcpdump(&mut arrangement)?);
    }
    arrangement.assert_fast_path()?;
    let ratios: Vec<f64> = with.iter().zip(&without).map(|(with, without)| with / without).collect();
    let summary = |values: &[f64]| Summary::of(values).context("no windows");
    let (without, with, ratio) = (summary(&without)?, summary(&with)?, summary(&ratios)?);
    for (name, cost) in [("without", &without), ("with", &with)] {
        println!("  {name:24} floor {:6.1} ns  median {:6.1} ns  90th {:6.1} ns", cost.floor, cost.median, cost.high);
    }
    println!("  x {:.3} (median of rounds, {:.3} to {:.3})", ratio.median, ratio.floor, ratio.high);
    findings.goal("a capture that matches nothing: cost of other packets", ratio.median, Aim::AtMost(1.05));
    plot(report, &[("without", &without), ("tcpdump udp port 7001", &with)])?;
    findings.keep("capture", ratio);
    Ok(())
}

/// A window while a tcpdump runs whose filter the fast path runs, too.
fn beside_tcpdump(arrangement: &mut Arrangement) -> Result<f64> {
    let router = arrangement.router.clone();
    let mut tcpdump = router.spawn(["tcpdump", "-n", "-i", OUT, "-w", "/dev/null", FILTER])?;
    wait_for(PATIENCE, "the filter to be run", || {
        let policies = status(&router).ok()?["policies"].as_array()?.clone();
        (!policies.is_empty() && policies.iter().all(|policy| policy["filtered"] == true)).then_some(())
    })?;
    let program = program(&router);
    let cost = arrangement.window(0, WINDOW)?;
    tcpdump.signal(libc::SIGINT);
    tcpdump.wait(PATIENCE)?;
    wait_for(PATIENCE, "the program without it", || (self::program(&router) != program).then_some(()))?;
    Ok(cost)
}

fn status(router: &Node) -> Result<Value> {
    Ok(serde_json::from_str(&router.run([&towpath_binary()?, "status", "--json"])?)?)
}

/// Which program runs
fn program(router: &Node) -> Option<u64> {
    status(router).ok()?["program"]["id"].as_u64()
}

fn plot(report: &mut Report, costs: &[(&str, &Summary)]) -> Result<()> {
    report.section("A capture beside other traffic").text(
        "The cost of a packet that a running tcpdump's filter does not match, beside the cost without tcpdump: the router's \
         CPU time per packet as above, in windows that alternate.",
    );
    let bar = |(label, cost): &(&str, &Summary)| Bar {
        label: (*label).to_owned(),
        value: cost.median,
        low: cost.floor,
        high: cost.high,
    };
    let bars: Vec<Bar> = costs.iter().map(bar).collect();
    report.bars("ns per packet, median, floor to 90th percentile", "ns", &bars)?;
    Ok(())
}
