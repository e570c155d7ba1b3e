//! What a packet to a group of next hops costs beside one to a single next hop.

use crate::beside::{Beside, Unit};
use crate::cost::WINDOW;
use crate::findings::{Aim, Findings};
use crate::path::{Arrangement, Contender, OUT, ask};
use anyhow::{Context, Result};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;
use towpath_lab::{Node, wait_for};
use towpath_report::Report;

const DESTINATIONS: u32 = 1 << 16;
const HOPS: usize = 16;
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs the section.
pub fn run(findings: &mut Findings, report: &mut Report, rounds: usize) -> Result<()> {
    println!("{HOPS} next hops: {rounds} rounds of windows of {WINDOW} packets each, by one next hop and by all");
    let mut arrangement = Arrangement::new("groups", &[Contender::Towpath], DESTINATIONS as usize)?;
    let router = arrangement.router.clone();
    for number in 0..HOPS {
        let mac = format!("02:00:00:00:03:{number:02x}");
        router.run(["ip", "neigh", "add", &hop(number), "lladdr", &mac, "dev", OUT])?;
    }
    let destinations: Vec<IpAddr> = (0..DESTINATIONS).map(|n| Ipv4Addr::from_bits(10 << 24 | n).into()).collect();
    arrangement.set_destinations(&destinations, false)?;
    let port = arrangement.ports().first().context("no port")?.to_string();
    let found = Beside::measure(["one next hop", "16 next hops"], Unit::Nanoseconds, rounds, |condition| {
        route(&router, &port, [1, HOPS][condition])?;
        arrangement.window(0, WINDOW)
    })?;
    arrangement.assert_fast_path()?;
    findings.goal("16 next hops: cost over one", found.ratio.median, Aim::AtMost(1.1));
    report.section("A group of next hops").text(
        "A route with 16 next hops beside the same route with one: the router's CPU time per packet as above, to 65,536 \
         destinations, in windows that alternate.",
    );
    found.plot(report, "A route with one next hop and with 16")?;
    findings.keep("groups", found);
    Ok(())
}

fn hop(number: usize) -> String {
    format!("198.19.255.{}", 16 + number)
}

/// Has all packets go by the first so many, and waits until Towpath sends them so.
fn route(router: &Node, port: &str, hops: usize) -> Result<()> {
    let hops: String = (0..hops).map(|number| format!(" nexthop via {}", hop(number))).collect();
    router.sh(&format!("ip route replace 10.0.0.0/8{hops}"))?;
    let group = hops.matches("nexthop").count() > 1;
    wait_for(PATIENCE, "Towpath to have the route", || {
        let explained = ask(router, &["explain", "198.51.100.2", "10.0.0.1", "in", port])?;
        let fast = explained["verdict"]["path"] == "fast";
        (fast && explained.to_string().contains("group") == group).then_some(())
    })?;
    Ok(())
}
