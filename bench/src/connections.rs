//! Many connections: how fast those that conntrack gets are known, the memory they take, and what it costs to look at all of
//! them again and again.

use crate::feeder::feed;
use crate::findings::{Aim, Findings};
use crate::nat::wait_for_connections;
use crate::path::{Arrangement, Contender, OUT, towpath_binary};
use crate::sync::{idle_share, memory_of, table_memory};
use anyhow::Result;
use serde::Serialize;
use std::time::{Duration, Instant};
use towpath_report::Report;
use towpath_tables::Tuple;

/// Connections a second that conntrack gets
const RATE: f64 = 100_000.0;

#[derive(Serialize)]
struct Found {
    connections: usize,
    a_second: f64,
    known_after_ms: f64,
    losses: usize,
    memory_bytes: u64,
    share_of_a_core: f64,
}

/// Runs the section, with each of these numbers of connections.
pub fn run(findings: &mut Findings, report: &mut Report, sizes: &[usize]) -> Result<()> {
    println!("connections that conntrack gets, {RATE:.0} a second");
    report.section("Many connections").text(
        "conntrack is given established connections at a fixed rate; then Towpath has nothing to do but to look at all of \
         them every other second. Its memory is that of the daemon and of the tables.",
    );
    for connections in sizes {
        match measure(*connections)? {
            Some(found) => judge(findings, report, found),
            None => println!("{connections}: left out, this kernel keeps fewer (net.netfilter.nf_conntrack_max)"),
        }
    }
    Ok(())
}

fn measure(connections: usize) -> Result<Option<Found>> {
    let arrangement = Arrangement::new("connections", &[Contender::Linux], 1)?;
    let (router, port) = (&arrangement.router, arrangement.ports()[0].to_owned());
    let room: usize = router.sysctl_get("net.netfilter.nf_conntrack_max")?.trim().parse()?;
    if room < connections + connections / 8 {
        return Ok(None);
    }
    router.sh("nft add table ip t; nft 'add chain ip t c { type filter hook forward priority 0; }'; nft add rule ip t c ct state established accept")?;
    let command =
        [&towpath_binary()?, "up", "--flows", "established", "--max-flows", &connections.to_string(), &port, OUT];
    let mut towpath = router.spawn(command)?;
    towpath.wait_for_output(Duration::from_secs(120), "ready")?;
    let first = Tuple {
        source: [198, 51, 100, 2].into(),
        destination: [10, 0, 0, 0].into(),
        source_port: 9,
        destination_port: 9,
        protocol: 17,
    };
    let a_second = router.enter(|| feed(first, connections as u32, RATE))??;
    let end = Instant::now();
    wait_for_connections(router, connections)?;
    let known_after_ms = end.elapsed().as_secs_f64() * 1e3;
    let losses = towpath.log().matches("notifications of connections were lost").count();
    let found = Found {
        connections,
        a_second,
        known_after_ms,
        losses,
        memory_bytes: memory_of(towpath.pid())? + table_memory(router)?,
        share_of_a_core: idle_share(towpath.pid())?,
    };
    towpath.stop(Duration::from_secs(30))?;
    Ok(Some(found))
}

fn judge(findings: &mut Findings, report: &mut Report, found: Found) {
    let (name, memory) = (format!("{} connections", found.connections), found.memory_bytes >> 20);
    let line = format!(
        "{name} at {:.0} a second: all known {:.0} ms after the last, notifications lost {} times; {memory} MiB; {:.2} % of a \
         core while nothing happens.",
        found.a_second,
        found.known_after_ms,
        found.losses,
        found.share_of_a_core * 100.0
    );
    println!("  {line}");
    report.text(&line);
    findings.goal(format!("{name}: times that notifications were lost"), found.losses as f64, Aim::AtMost(0.0));
    if found.connections >= 2_000_000 {
        findings.goal(format!("{name}: memory, MiB"), memory as f64, Aim::AtMost(1024.0));
    } else {
        findings.goal(
            format!("{name}: percent of a core to look at all"),
            found.share_of_a_core * 100.0,
            Aim::AtMost(2.0),
        );
    }
    findings.keep(&name, found);
}
