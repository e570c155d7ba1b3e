//! Latency through the router and CPU against load, beside Linux.

use crate::findings::{Aim, Findings};
use crate::path::{Arrangement, Contender};
use crate::routes;
use crate::stats::Summary;
use anyhow::{Context, Result};
use serde::Serialize;
use std::net::IpAddr;
use std::time::Duration;
use towpath_report::{Report, Series};

const CONTENDERS: [Contender; 2] = [Contender::Linux, Contender::Towpath];
const SPAN: Duration = Duration::from_millis(500);

#[derive(Serialize)]
struct Latency {
    contender: &'static str,
    load: f64,
    median_us: Summary,
    p99_us: Summary,
}

#[derive(Serialize)]
struct Share {
    contender: &'static str,
    packets_a_second: Summary,
    share_of_a_core: Summary,
}

/// Runs the section.
pub fn run(findings: &mut Findings, report: &mut Report, rounds: usize) -> Result<()> {
    let mut arrangement = Arrangement::observed("latency", &CONTENDERS, 1)?;
    let all: Vec<(IpAddr, u8)> = vec![("203.0.113.0".parse()?, 24)];
    arrangement.add_routes(&all)?;
    arrangement.wait_in_sync(&all)?;
    arrangement.set_destinations(&routes::destinations(&all, 1), true)?;
    arrangement.window(0, 200_000)?;
    let capacity = 1e9 / arrangement.window(0, 200_000)?;
    println!("Linux takes {:.2} million packets a second here; loads are parts of that", capacity / 1e6);
    latency(findings, report, &mut arrangement, capacity, rounds)?;
    load(findings, report, &mut arrangement, capacity, rounds)
}

fn latency(
    findings: &mut Findings,
    report: &mut Report,
    arrangement: &mut Arrangement,
    capacity: f64,
    rounds: usize,
) -> Result<()> {
    report.section("Latency").text("From the source's XDP program to the sink's, at parts of Linux's own capacity.");
    let mut figures = Vec::new();
    for part in [0.1, 0.9] {
        let mut found = [(Vec::new(), Vec::new()), (Vec::new(), Vec::new())];
        let mut spread = [Vec::new(), Vec::new()];
        for _ in 0..rounds {
            for (number, (medians, tails)) in found.iter_mut().enumerate() {
                arrangement.load(number, capacity * part, SPAN)?;
                let buckets = arrangement.take_latencies()?;
                medians.push(quantile(&buckets, 0.5).context("no packets")?);
                tails.push(quantile(&buckets, 0.99).context("no packets")?);
                add(&mut spread[number], &buckets);
            }
        }
        for (number, (medians, tails)) in found.iter().enumerate() {
            let median_us = Summary::of(medians).context("no rounds")?;
            let p99_us = Summary::of(tails).context("no rounds")?;
            let contender = CONTENDERS[number].name();
            println!(
                "  {contender} at {:.0} %: median {:.1} us, 99th {:.1} us",
                part * 100.0,
                median_us.median,
                p99_us.median
            );
            figures.push(Latency { contender, load: part, median_us, p99_us });
        }
        for (what, pick) in [("median", 0), ("99th percentile", 1)] {
            let of = |number: usize| {
                let values = if pick == 0 { &found[number].0 } else { &found[number].1 };
                Summary::of(values).map(|summary| summary.median)
            };
            let ratio = of(1).context("no rounds")? / of(0).context("no rounds")?;
            let label = format!("latency at {:.0} % of Linux's load, {what}: Towpath over Linux", part * 100.0);
            findings.goal(label, ratio, Aim::AtMost(1.0));
        }
        let lines: Vec<Series> = CONTENDERS
            .iter()
            .zip(&spread)
            .map(|(contender, buckets)| Series { label: contender.name().to_owned(), points: cumulative(buckets) })
            .collect();
        let title = format!("Latency at {:.0} % of Linux's load", part * 100.0);
        report.lines(&title, "microseconds", "share of packets that took at most so long", true, &lines)?;
    }
    findings.keep("latency", figures);
    Ok(())
}

fn load(
    findings: &mut Findings,
    report: &mut Report,
    arrangement: &mut Arrangement,
    capacity: f64,
    rounds: usize,
) -> Result<()> {
    println!("CPU against load");
    let parts = [0.0, 0.1, 0.25, 0.5, 0.75, 0.9];
    let mut figures = Vec::new();
    for part in parts {
        let mut found = [(Vec::new(), Vec::new()), (Vec::new(), Vec::new())];
        for _ in 0..rounds {
            for (number, (rates, shares)) in found.iter_mut().enumerate() {
                let (rate, share) = arrangement.load(number, capacity * part, SPAN)?;
                rates.push(rate);
                shares.push(share);
            }
        }
        for (number, (rates, shares)) in found.iter().enumerate() {
            let packets_a_second = Summary::of(rates).context("no rounds")?;
            let share_of_a_core = Summary::of(shares).context("no rounds")?;
            let contender = CONTENDERS[number].name();
            let (rate, share) = (packets_a_second.median / 1e3, share_of_a_core.median * 100.0);
            println!("  {contender} at {:.0} %: {rate:.0} thousand a second, {share:.1} % of a core", part * 100.0);
            figures.push(Share { contender, packets_a_second, share_of_a_core });
        }
    }
    let mut lines: Vec<Series> = CONTENDERS
        .iter()
        .map(|contender| Series {
            label: contender.name().to_owned(),
            points: figures
                .iter()
                .filter(|share| share.contender == contender.name())
                .map(|share| (share.packets_a_second.median / 1e6, share.share_of_a_core.median * 100.0))
                .collect(),
        })
        .collect();
    let most = figures.iter().map(|share| share.packets_a_second.median / 1e6).fold(0.0, f64::max);
    lines.push(Series {
        label: "an engine that polls (by definition)".into(),
        points: vec![(0.0, 100.0), (most, 100.0)],
    });
    let idle = figures.iter().find(|share| share.contender == Contender::Towpath.name()).context("no figures")?;
    findings.goal("CPU without load, percent of a core", idle.share_of_a_core.median * 100.0, Aim::AtMost(0.5));
    report.section("CPU against load");
    report.lines("CPU of the router's thread", "million packets a second", "percent of a core", false, &lines)?;
    findings.keep("load", figures);
    Ok(())
}

/// Microseconds below which this share of the packets lies.
fn quantile(buckets: &[u64], share: f64) -> Option<f64> {
    let wanted = (buckets.iter().sum::<u64>() as f64 * share).ceil() as u64;
    let mut seen = 0;
    let bucket = buckets.iter().position(|count| {
        seen += count;
        seen >= wanted.max(1)
    })?;
    Some((bucket + 1) as f64 / 10.0)
}

fn add(sum: &mut Vec<u64>, more: &[u64]) {
    sum.resize(sum.len().max(more.len()), 0);
    for (sum, more) in sum.iter_mut().zip(more) {
        *sum += more;
    }
}

/// Points of the cumulative distribution, thinned out to those that show.
fn cumulative(buckets: &[u64]) -> Vec<(f64, f64)> {
    let total = buckets.iter().sum::<u64>().max(1) as f64;
    let (mut seen, mut last) = (0, -1.0);
    let mut points = Vec::new();
    for (bucket, count) in buckets.iter().enumerate() {
        seen += count;
        let share = seen as f64 / total;
        if share - last >= 0.005 && *count > 0 {
            points.push(((bucket + 1) as f64 / 10.0, share));
            last = share;
        }
    }
    points
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_upper_ends_of_buckets() {
        let buckets = [0, 5, 0, 4, 1];
        assert_eq!(quantile(&buckets, 0.5), Some(0.2));
        assert_eq!(quantile(&buckets, 0.9), Some(0.4));
        assert_eq!(quantile(&buckets, 1.0), Some(0.5));
        assert_eq!(quantile(&[0, 0], 0.5), None);
    }
}
