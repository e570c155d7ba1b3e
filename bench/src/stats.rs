//! Medians, floors and spreads of repeated measurements.

use serde::Serialize;

/// What many windows of one case gave.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Summary {
    /// 10th percentile: other work on the host only ever adds, so this is what the code costs
    pub floor: f64,
    /// Median: what the day was like
    pub median: f64,
    /// 90th percentile
    pub high: f64,
    /// How many windows
    pub windows: usize,
}

impl Summary {
    /// Of at least one value.
    pub fn of(values: &[f64]) -> Option<Summary> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        Some(Summary {
            floor: percentile(&sorted, 10.0)?,
            median: percentile(&sorted, 50.0)?,
            high: percentile(&sorted, 90.0)?,
            windows: sorted.len(),
        })
    }
}

/// Nearest-rank percentile of sorted values.
pub fn percentile(sorted: &[f64], percent: f64) -> Option<f64> {
    let rank = (percent / 100.0 * sorted.len() as f64).ceil().max(1.0) as usize;
    sorted.get(rank - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_rank() {
        let values: Vec<f64> = (1..=20).map(f64::from).rev().collect();
        let summary = Summary::of(&values).unwrap();
        assert_eq!((summary.floor, summary.median, summary.high, summary.windows), (2.0, 10.0, 18.0, 20));
        assert!(Summary::of(&[]).is_none());
    }
}
