//! The report: what was found, as a table and plots.

use crate::scenes::{Cost, Outcome};
use crate::view::Sample;
use anyhow::Result;
use std::path::Path;
use towpath_report::{Bar, Report, Series};

/// Writes the report.
pub fn write(path: &Path, outcomes: &[Outcome], costs: &[Cost], samples: &[Sample]) -> Result<()> {
    let mut report = Report::new("Towpath demo");
    report.text(
        "A client's packets pass a router with two BGP sessions to its upstream, first by Linux alone, then with \
         Towpath. Packets are counted one by one where they are sent and behind the router's links.",
    );
    report.section("What was found").table(&["", "found", "promise"], &rows(outcomes));
    report.section("Cost of a packet").text(
        "Time of the router's core a packet, in floods of 60-byte UDP packets. The bar is the floor (10th percentile): \
         what else the machine does only adds. The line reaches from there over the other floods to the 90th.",
    );
    let bar = |cost: &Cost| Bar { label: cost.label.clone(), value: cost.floor, low: cost.floor, high: cost.high };
    report.bars("Nanoseconds of the router's core a packet", "ns", &costs.iter().map(bar).collect::<Vec<_>>())?;
    report.section("The stream over time").text(
        "Without the floods, and without the moments in which the stream rests so that nothing is on its way when it \
         is counted. It ends at the router only while the firewall rule stands.",
    );
    let steady: Vec<&Sample> = samples.iter().filter(|sample| sample.steady && sample.sent > 0.0).collect();
    let series = |label: &str, value: fn(&Sample) -> f64| Series {
        label: label.to_owned(),
        points: steady.iter().map(|sample| (sample.at, value(sample))).collect(),
    };
    let rates = [
        series("sent", |sample| sample.sent),
        series("left by up1", |sample| sample.arrived[0]),
        series("left by up2", |sample| sample.arrived[1]),
    ];
    report.lines("Packets a second", "seconds", "packets a second", false, &rates)?;
    let share = [series("fast path", |sample| sample.fast * 100.0)];
    report.lines("Share of the fast path", "seconds", "%", false, &share)?;
    report.write(path)
}

/// A row for each outcome: scene and what, found, whether the promise was kept.
pub fn rows(outcomes: &[Outcome]) -> Vec<[String; 3]> {
    let promise = |kept| match kept {
        Some(true) => "kept",
        Some(false) => "BROKEN",
        None => "",
    };
    let row = |o: &Outcome| [format!("{}: {}", o.scene, o.what), o.found.clone(), promise(o.kept).to_owned()];
    outcomes.iter().map(row).collect()
}
