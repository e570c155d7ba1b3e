//! What a forwarded packet costs the router's core, each contender beside the others in every round.

use crate::findings::{Aim, Findings};
use crate::path::{Arrangement, Contender};
use crate::routes;
use crate::stats::Summary;
use anyhow::{Context, Result};
use serde::Serialize;
use std::net::IpAddr;
use towpath_report::{Bar, Report, Series};

const CONTENDERS: [Contender; 6] = [
    Contender::Drop,
    Contender::Redirect,
    Contender::Rewrite,
    Contender::FibForward,
    Contender::Linux,
    Contender::Towpath,
];
pub(crate) const DESTINATIONS: usize = 1 << 18;
pub(crate) const WINDOW: u32 = 200_000;

/// All contenders with one table.
#[derive(Clone, Debug, Serialize)]
pub struct Case {
    /// "IPv4" or "IPv6"
    pub family: &'static str,
    /// Routes in the table besides those of the links
    pub routes: usize,
    /// By contender
    pub results: Vec<Outcome>,
}

/// One contender with one table.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Which
    pub contender: &'static str,
    /// Nanoseconds a packet
    pub cost: Summary,
    /// Cost in multiples of the base's, a bare redirect if not said otherwise, in the same round
    pub ratio: Summary,
}

/// Runs the section: `sizes` IPv4 tables, then IPv6 with 250,000 routes beside as many of IPv4.
pub fn run(findings: &mut Findings, report: &mut Report, rounds: usize, sizes: &[usize]) -> Result<()> {
    println!("forwarding cost: {rounds} rounds of windows of {WINDOW} packets each, 60-byte frames without FCS");
    let most = sizes.iter().copied().max().unwrap_or(1);
    let mut cases = Vec::new();
    {
        let mut arrangement = Arrangement::new("cost4", &CONTENDERS, DESTINATIONS)?;
        let all = routes::ipv4(most);
        let mut loaded = 0;
        for size in sizes {
            arrangement.add_routes(&all[loaded..*size])?;
            loaded = *size;
            cases.push(measure(&mut arrangement, "IPv4", &all[..loaded], rounds)?);
        }
    }
    for (name, family, all) in [("even4", "IPv4", routes::ipv4(250_000)), ("even6", "IPv6", routes::ipv6(250_000))] {
        let mut arrangement = Arrangement::new(name, &CONTENDERS, DESTINATIONS)?;
        arrangement.add_routes(&all)?;
        cases.push(measure(&mut arrangement, family, &all, rounds)?);
    }
    judge(findings, &cases)?;
    plot(report, &cases)?;
    findings.keep("cost", &cases);
    Ok(())
}

fn measure(arrangement: &mut Arrangement, family: &'static str, all: &[(IpAddr, u8)], rounds: usize) -> Result<Case> {
    arrangement.wait_in_sync(all)?;
    let destinations = routes::destinations(all, if all.len() == 1 { 1 } else { DESTINATIONS });
    arrangement.set_destinations(&destinations, false)?;
    // To warm caches and neighbours; it is not counted.
    take_turns(arrangement, 1)?;
    let costs = take_turns(arrangement, rounds)?;
    arrangement.assert_fast_path()?;
    println!("{family}, {} routes:", all.len());
    Ok(Case { family, routes: all.len(), results: outcomes(&arrangement.contenders(), &costs, Contender::Redirect)? })
}

/// A window of each contender in every round: nanoseconds a packet, by contender.
pub(crate) fn take_turns(arrangement: &mut Arrangement, rounds: usize) -> Result<Vec<Vec<f64>>> {
    let mut costs = vec![Vec::new(); arrangement.contenders().len()];
    for _ in 0..rounds {
        for (number, costs) in costs.iter_mut().enumerate() {
            costs.push(arrangement.window(number, WINDOW)?);
        }
    }
    Ok(costs)
}

/// What the contenders' costs come to, also in multiples of one of them; printed as well.
pub(crate) fn outcomes(contenders: &[Contender], costs: &[Vec<f64>], base: Contender) -> Result<Vec<Outcome>> {
    let base = contenders.iter().position(|contender| *contender == base).context("no base")?;
    let outcome = |(contender, cost): (&Contender, &Vec<f64>)| {
        let ratios: Vec<f64> = cost.iter().zip(&costs[base]).map(|(cost, base)| cost / base).collect();
        let (cost, ratio) = (Summary::of(cost).context("no windows")?, Summary::of(&ratios).context("no windows")?);
        println!(
            "  {:24} floor {:6.1} ns  median {:6.1} ns  90th {:6.1} ns   x {:.2} (median of rounds, {:.2} to {:.2})",
            contender.name(),
            cost.floor,
            cost.median,
            cost.high,
            ratio.median,
            ratio.floor,
            ratio.high
        );
        Ok(Outcome { contender: contender.name(), cost, ratio })
    };
    contenders.iter().zip(costs).map(outcome).collect()
}

/// Cost of one of them in multiples of the base.
pub(crate) fn ratio(results: &[Outcome], contender: Contender) -> Result<f64> {
    let found = results.iter().find(|outcome| outcome.contender == contender.name());
    Ok(found.with_context(|| format!("{} was not measured", contender.name()))?.ratio.median)
}

/// The contenders' costs as bars.
pub(crate) fn bars(results: &[Outcome]) -> Vec<Bar> {
    let bar = |outcome: &Outcome| Bar {
        label: outcome.contender.to_owned(),
        value: outcome.cost.median,
        low: outcome.cost.floor,
        high: outcome.cost.high,
    };
    results.iter().map(bar).collect()
}

impl Case {
    fn ratio(&self, contender: Contender) -> Result<f64> {
        ratio(&self.results, contender)
    }

    fn label(&self) -> String {
        format!("{}, {} routes", self.family, self.routes)
    }
}

fn judge(findings: &mut Findings, cases: &[Case]) -> Result<()> {
    println!("aims:");
    for case in cases.iter().filter(|case| case.family == "IPv4") {
        let towpath = case.ratio(Contender::Towpath)?;
        let fib = case.ratio(Contender::FibForward)? / towpath;
        let linux = case.ratio(Contender::Linux)? / towpath;
        let label = case.label();
        match case.routes {
            1 => {
                findings.goal(format!("{label}: times the bare redirect"), towpath, Aim::AtMost(1.15));
                findings.goal(format!("{label}: times faster than Linux"), linux, Aim::AtLeast(2.0));
                findings.goal(format!("{label}: times faster than bpf_fib_lookup"), fib, Aim::AtLeast(1.2));
            }
            1_000_000 => {
                findings.goal(format!("{label}: times the bare redirect"), towpath, Aim::AtMost(1.5));
                findings.goal(format!("{label}: times faster than Linux"), linux, Aim::AtLeast(3.4));
                findings.goal(format!("{label}: times faster than bpf_fib_lookup"), fib, Aim::AtLeast(2.2));
            }
            _ => {}
        }
    }
    let cost = |family| {
        let found = cases.iter().rfind(|case| case.family == family && case.routes == 250_000);
        found.context("no case with 250,000 routes")?.ratio(Contender::Towpath)
    };
    let even = cost("IPv6")? / cost("IPv4")?;
    findings.goal("250,000 routes: IPv6 over IPv4", even, Aim::AtMost(1.25));
    Ok(())
}

fn plot(report: &mut Report, cases: &[Case]) -> Result<()> {
    report.section("Cost of forwarding a packet").text(
        "Source, router and sink are three network namespaces joined by veth. The receiving NAPI of the router's port is \
         a thread of its own on one core, the source runs on the other. The cost is that thread's CPU time per packet, \
         with 60-byte UDP frames (64 with FCS). The source hands XDP frames to the veth, so that the receiving side pays \
         what it would pay with a driver. Windows of all contenders alternate; other work on the machine only ever adds, \
         so the 10th percentile (floor) says what the code costs and the median what the day was like. Ratios are \
         formed inside a round.",
    );
    for case in cases {
        report.bars(
            &format!("{}: ns per packet, median, floor to 90th percentile", case.label()),
            "ns",
            &bars(&case.results),
        )?;
    }
    let lines: Vec<Series> = CONTENDERS[1..]
        .iter()
        .map(|contender| Series {
            label: contender.name().to_owned(),
            points: cases
                .iter()
                .filter(|case| case.family == "IPv4")
                .filter_map(|case| {
                    let outcome = case.results.iter().find(|outcome| outcome.contender == contender.name())?;
                    Some((case.routes as f64, 1e3 / outcome.cost.median))
                })
                .collect(),
        })
        .collect();
    report.lines(
        "Throughput of one core, IPv4, random destinations",
        "routes",
        "million packets a second",
        true,
        &lines,
    )?;
    Ok(())
}
