//! AF_XDP on veth: Towpath's user engine beside DPDK's testpmd and l3fwd over net_af_xdp, one after the other on the same
//! veth pairs and the same core, again and again.

use crate::dpdk;
use crate::findings::{Aim, Findings};
use crate::path::{Arrangement, Contender as Path, OUT, ROUTER_CORE, cpu_time, towpath_binary};
use crate::routes;
use crate::stats::Summary;
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use std::time::Duration;
use towpath_lab::{Process, wait_for};
use towpath_report::{Bar, Report};

/// Packets of a window.
const WINDOW: u32 = 400_000;
const LIMIT: Duration = Duration::from_secs(30);

/// Who forwards.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Contender {
    Towpath,
    /// Takes frames from port to port and looks at none
    Testpmd,
    L3fwd,
}

impl Contender {
    const ALL: [Self; 3] = [Self::Towpath, Self::Testpmd, Self::L3fwd];

    fn name(self) -> &'static str {
        match self {
            Self::Towpath => "Towpath's user engine",
            Self::Testpmd => "DPDK's testpmd (io)",
            Self::L3fwd => "DPDK's l3fwd (FIB)",
        }
    }

    /// Its command line, and what it says when it forwards.
    fn command(self, port: &str, rules: &dpdk::Rules) -> Result<(Vec<String>, &'static str)> {
        let core = ROUTER_CORE;
        let (line, ready) = match self {
            Self::Towpath => (format!("{} up --engine user --cores {core} {port} {OUT}", towpath_binary()?), "ready"),
            Self::Testpmd => (
                format!(
                    "stdbuf -oL dpdk-testpmd {} -l 0,{core} {} -- --forward-mode=io --auto-start --nb-cores=1 \
                     --stats-period=1",
                    dpdk::SMALL_PAGES,
                    dpdk::xdp_ports(port, OUT)
                ),
                "io packet forwarding",
            ),
            Self::L3fwd => (
                format!(
                    "{} {} -l {core} {} -- {}",
                    dpdk::program()?.display(),
                    dpdk::SMALL_PAGES,
                    dpdk::xdp_ports(port, OUT),
                    dpdk::l3fwd_options(core, rules)
                ),
                "entering main loop",
            ),
        };
        Ok((line.split(' ').map(str::to_owned).collect(), ready))
    }
}

/// What one contender did.
#[derive(Clone, Debug, Serialize)]
struct Outcome {
    contender: &'static str,
    /// Nanoseconds of the process's CPU time for each packet that arrived
    cost: Summary,
    /// Share of what was sent that arrived
    arrived: Summary,
    /// How many times Towpath's cost this is in the same round
    towpath: Summary,
}

/// Runs the section.
pub fn run(findings: &mut Findings, report: &mut Report, rounds: usize) -> Result<()> {
    println!("AF_XDP on veth: {rounds} rounds of windows of {WINDOW} packets each");
    if let Err(error) = dpdk::check() {
        println!("  left out: {error:#}");
        return Ok(());
    }
    let all = routes::ipv4(1);
    let rules = dpdk::Rules::write("sockets", &all)?;
    let mut arrangement = Arrangement::new("sockets", &[Path::Linux], 1)?;
    // Received is on the sender's core then, which so is held back, and the other core is the contender's alone.
    let port = arrangement.ports().first().context("a port")?.to_string();
    arrangement.router.sh(&format!("echo 0 > /sys/class/net/{port}/threaded"))?;
    arrangement.add_routes(&all)?;
    arrangement.set_destinations(&routes::destinations(&all, 1), false)?;
    let mut found = vec![Vec::new(); Contender::ALL.len()];
    for _ in 0..rounds {
        for (contender, found) in Contender::ALL.into_iter().zip(&mut found) {
            found.push(window(&mut arrangement, contender, &rules).with_context(|| contender.name().to_owned())?);
        }
    }
    let outcomes: Vec<Outcome> = Contender::ALL
        .into_iter()
        .zip(&found)
        .map(|(contender, windows)| Outcome::of(contender, windows, &found[0]))
        .collect::<Result<_>>()?;
    for outcome in &outcomes {
        println!(
            "  {:22} {:6.0} ns of CPU time a packet ({:.0} to {:.0}), {:.0} % of those sent arrived; {:.2} times Towpath's \
             ({:.2} to {:.2})",
            outcome.contender,
            outcome.cost.median,
            outcome.cost.floor,
            outcome.cost.high,
            outcome.arrived.median * 100.0,
            outcome.towpath.median,
            outcome.towpath.floor,
            outcome.towpath.high
        );
    }
    for outcome in outcomes.iter().skip(1) {
        let what = format!("AF_XDP on veth: times faster than {}", outcome.contender);
        findings.goal(what, outcome.towpath.median, Aim::AtLeast(1.2));
    }
    report.section("AF_XDP on veth").text(
        "One core sends as fast as it can and receives from the veth on the router's side, the other forwards in user space \
         over AF_XDP sockets in copy mode, without hugepages, and always finds more than it can take. Its CPU time, system calls \
         included, is divided by the packets that arrive at the sink. The contenders take turns on the same veth pairs; each \
         is started and stopped for each window.",
    );
    let bars: Vec<Bar> = outcomes
        .iter()
        .map(|outcome| Bar {
            label: outcome.contender.into(),
            value: outcome.cost.median,
            low: outcome.cost.floor,
            high: outcome.cost.high,
        })
        .collect();
    report.bars("ns per packet: median, 10th to 90th percentile", "ns", &bars)?;
    findings.keep("sockets", outcomes);
    Ok(())
}

impl Outcome {
    fn of(contender: Contender, windows: &[(f64, f64)], towpath: &[(f64, f64)]) -> Result<Self> {
        let summary = |values: Vec<f64>| Summary::of(&values).context("no windows");
        Ok(Self {
            contender: contender.name(),
            cost: summary(windows.iter().map(|(cost, _)| *cost).collect())?,
            arrived: summary(windows.iter().map(|(_, arrived)| *arrived).collect())?,
            towpath: summary(windows.iter().zip(towpath).map(|(this, towpath)| this.0 / towpath.0).collect())?,
        })
    }
}

/// Nanoseconds of CPU time for each packet that arrived, and their share of those sent.
fn window(arrangement: &mut Arrangement, contender: Contender, rules: &dpdk::Rules) -> Result<(f64, f64)> {
    let port = arrangement.ports().first().context("a port")?.to_string();
    let (line, ready) = contender.command(&port, rules)?;
    // What Linux forwards is not DPDK's; of Towpath's worker it is asked below.
    arrangement.router.sysctl("net.ipv4.ip_forward", if contender == Contender::Towpath { "1" } else { "0" })?;
    let mut process: Process = arrangement.router.spawn(&line)?;
    process.wait_for_output(LIMIT, ready)?;
    let mut before = arrangement.arrived()?;
    wait_for(LIMIT, "the first packets to arrive", || {
        arrangement.send(0, 64).ok()?;
        std::thread::sleep(Duration::from_millis(10));
        (arrangement.arrived().ok()? > before).then_some(())
    })?;
    before = settle(arrangement)?;
    let start = process_time(process.pid())?;
    arrangement.send(0, WINDOW)?;
    // Not what it spends on looking for more when all has been sent.
    let (spent, in_time) = (process_time(process.pid())? - start, arrangement.arrived()? - before);
    let arrived = settle(arrangement)? - before;
    ensure!(process.ended()?.is_none(), "it has ended:\n{}", process.log());
    ensure!(in_time > 0, "nothing arrived");
    if contender == Contender::Towpath {
        let status = arrangement.router.run([&towpath_binary()?, "status", "--json"])?;
        let status: serde_json::Value = serde_json::from_str(&status)?;
        let forwarded = status["workers"][0]["tx_packets"].as_u64().unwrap_or_default();
        ensure!(forwarded * 100 >= arrived * 99, "the worker forwarded {forwarded} of {arrived} packets that arrived");
        arrangement.router.run([&towpath_binary()?, "down"])?;
    }
    process.stop(LIMIT)?;
    Ok((spent as f64 / in_time as f64, arrived as f64 / f64::from(WINDOW)))
}

/// Nanoseconds that all threads of a process have run.
fn process_time(process: u32) -> Result<u64> {
    let path = format!("/proc/{process}/task");
    let threads = std::fs::read_dir(&path).with_context(|| format!("cannot read {path}"))?.flatten();
    let numbers = threads.filter_map(|thread| thread.file_name().to_str()?.parse().ok());
    // A thread that has just ended is missed.
    Ok(numbers.filter_map(|thread| cpu_time(thread).ok()).sum())
}

/// Waits until no more arrives; what has arrived in all.
fn settle(arrangement: &mut Arrangement) -> Result<u64> {
    let mut last = arrangement.arrived()?;
    wait_for(LIMIT, "the traffic to end", || {
        std::thread::sleep(Duration::from_millis(50));
        let now = arrangement.arrived().ok()?;
        let quiet = now == last;
        last = now;
        quiet.then_some(last)
    })
}
