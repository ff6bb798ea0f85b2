//! Medians and how far the runs lie apart.

use serde::Serialize;

/// Runs of one quantity.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Runs {
    /// The middle one, or the mean of the two in the middle.
    pub median: f64,
    /// Every run, in the order they were made.
    pub runs: Vec<f64>,
}

impl Runs {
    /// From the values of all runs.
    pub fn new(runs: Vec<f64>) -> Self {
        let mut sorted = runs.clone();
        sorted.sort_by(f64::total_cmp);
        let median = match sorted.len() {
            0 => f64::NAN,
            len if len % 2 == 1 => sorted[len / 2],
            len => f64::midpoint(sorted[len / 2 - 1], sorted[len / 2]),
        };
        Self { median, runs }
    }

    /// Smallest and largest.
    pub fn spread(&self) -> (f64, f64) {
        let smallest = self.runs.iter().copied().fold(f64::INFINITY, f64::min);
        let largest = self.runs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        (smallest, largest)
    }

    /// How far the median of all other runs is off each run, as a share of it: the median. What a prediction that knows
    /// everything about the other runs would be off by; `None` for a single run.
    pub fn apart(&self) -> Option<f64> {
        let off = |at: usize| {
            let others = self.runs.iter().enumerate().filter(|(other, _)| *other != at).map(|(_, run)| *run);
            (Self::new(others.collect()).median / self.runs[at] - 1.0).abs()
        };
        (self.runs.len() > 1).then(|| Self::new((0..self.runs.len()).map(off).collect()).median)
    }

    /// `median (smallest..largest)`, or the median alone when there is one run.
    pub fn display(&self, digits: usize) -> String {
        let (smallest, largest) = self.spread();
        match self.runs.len() {
            0 => "-".to_owned(),
            1 => format!("{:.digits$}", self.median),
            _ => format!("{:.digits$} ({smallest:.digits$}..{largest:.digits$})", self.median),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle_and_runs_keep_their_order() {
        assert_eq!(Runs::new(vec![3.0, 1.0, 2.0]).median, 2.0);
        assert_eq!(Runs::new(vec![4.0, 1.0, 3.0, 2.0]).median, 2.5);
        assert_eq!(Runs::new(vec![7.0]).median, 7.0);
        assert!(Runs::new(vec![]).median.is_nan());
        let runs = Runs::new(vec![3.0, 1.0, 2.0]);
        assert_eq!(runs.runs, [3.0, 1.0, 2.0]);
        assert_eq!(runs.spread(), (1.0, 3.0));
        assert_eq!(runs.display(1), "2.0 (1.0..3.0)");
        assert_eq!(Runs::new(vec![7.25]).display(1), "7.2");
        assert_eq!(Runs::new(vec![7.25]).apart(), None);
        assert_eq!(Runs::new(vec![2.0, 2.0, 4.0]).apart(), Some(0.5), "3 for 2 twice, 2 for 4");
        assert_eq!(Runs::new(vec![]).display(1), "-");
    }
}
