//! Windows under two conditions, in turn.

use crate::stats::Summary;
use anyhow::{Context, Result};
use serde::Serialize;
use towpath_report::{Bar, Report};

/// What is measured.
#[derive(Clone, Copy, Debug, Serialize)]
pub enum Unit {
    /// Nanoseconds a packet
    Nanoseconds,
    /// Gigabits a second
    Gigabits,
}

impl Unit {
    fn short(self) -> &'static str {
        match self {
            Self::Nanoseconds => "ns",
            Self::Gigabits => "Gbit/s",
        }
    }

    fn long(self) -> &'static str {
        match self {
            Self::Nanoseconds => "ns per packet",
            Self::Gigabits => "Gbit/s",
        }
    }
}

/// What windows under two conditions came to.
#[derive(Clone, Debug, Serialize)]
pub struct Beside {
    /// The conditions
    pub names: [&'static str; 2],
    /// Of the figures
    pub unit: Unit,
    /// By condition
    pub figures: [Summary; 2],
    /// The second in multiples of the first, of the same round
    pub ratio: Summary,
}

impl Beside {
    /// Has `window` measure under the first (0) and the second condition (1) in every round, and prints what that comes to.
    pub fn measure(
        names: [&'static str; 2],
        unit: Unit,
        rounds: usize,
        mut window: impl FnMut(usize) -> Result<f64>,
    ) -> Result<Self> {
        // To warm caches; it is not counted.
        (0..2).try_for_each(|condition| window(condition).map(drop))?;
        let mut seen = [Vec::new(), Vec::new()];
        for _ in 0..rounds {
            for (condition, seen) in seen.iter_mut().enumerate() {
                seen.push(window(condition)?);
            }
        }
        let ratios: Vec<f64> = seen[1].iter().zip(&seen[0]).map(|(second, first)| second / first).collect();
        let summary = |values: &[f64]| Summary::of(values).context("no windows");
        let found = Self { names, unit, figures: [summary(&seen[0])?, summary(&seen[1])?], ratio: summary(&ratios)? };
        found.print();
        Ok(found)
    }

    fn print(&self) {
        let unit = self.unit.short();
        for (name, Summary { floor, median, high, .. }) in self.names.iter().zip(&self.figures) {
            println!("  {name:24} floor {floor:6.1} {unit}  median {median:6.1} {unit}  90th {high:6.1} {unit}");
        }
        let Summary { floor, median, high, .. } = self.ratio;
        println!("  x {median:.3} (median of rounds, {floor:.3} to {high:.3})");
    }

    /// Both as bars.
    pub fn plot(&self, report: &mut Report, title: &str) -> Result<()> {
        let bar = |(name, cost): (&&str, &Summary)| Bar {
            label: (*name).to_owned(),
            value: cost.median,
            low: cost.floor,
            high: cost.high,
        };
        let bars: Vec<Bar> = self.names.iter().zip(&self.figures).map(bar).collect();
        let title = format!("{title}: {}, median, 10th to 90th percentile", self.unit.long());
        report.bars(&title, self.unit.short(), &bars)?;
        Ok(())
    }
}
