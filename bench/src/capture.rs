//! What a running capture that matches nothing costs the other traffic: windows of one router with a tcpdump and without
//! one, in turn.

use crate::beside::{Beside, Unit};
use crate::cost::{DESTINATIONS, WINDOW};
use crate::findings::{Aim, Findings};
use crate::path::{Arrangement, Contender, OUT, towpath_binary};
use crate::routes;
use anyhow::Result;
use serde_json::Value;
use std::time::Duration;
use towpath_lab::{Node, wait_for};
use towpath_report::Report;

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
    let found =
        Beside::measure(
            ["without", "tcpdump udp port 7001"],
            Unit::Nanoseconds,
            rounds,
            |condition| match condition {
                0 => arrangement.window(0, WINDOW),
                _ => beside_tcpdump(&mut arrangement),
            },
        )?;
    arrangement.assert_fast_path()?;
    findings.goal("a capture that matches nothing: cost of other packets", found.ratio.median, Aim::AtMost(1.05));
    report.section("A capture beside other traffic").text(
        "The cost of a packet that a running tcpdump's filter does not match, beside the cost without tcpdump: the router's \
         CPU time per packet as above, in windows that alternate.",
    );
    found.plot(report, "A capture that matches nothing")?;
    findings.keep("capture", found.ratio);
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
