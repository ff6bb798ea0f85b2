//! The curve over time instead of over numbers of intervals, and how far it may be off.

use super::{CurvePoint, Estimate};
use std::time::Duration;

/// WWS for every number of intervals.
#[derive(Debug)]
pub(super) struct Curve<'a> {
    scans: &'a [Duration],
    /// Seconds of all scans before the i-th, to have the mean length of windows at once.
    sums: Vec<f64>,
    pages: Vec<f64>,
    /// What a scan takes in the mean, in seconds.
    took: f64,
}

/// Windows whose length is looked at to know how even the intervals are. More would tell the same.
const SAMPLED: usize = 1024;

impl<'a> Curve<'a> {
    pub(super) fn new(scans: &'a [Duration], pages: Vec<f64>, took: f64) -> Self {
        let mut sums = Vec::with_capacity(scans.len() + 1);
        let mut sum = 0.0;
        sums.push(sum);
        for scan in scans {
            sum += scan.as_secs_f64();
            sums.push(sum);
        }
        Self { scans, sums, pages, took }
    }

    fn intervals(&self) -> usize {
        self.pages.len() - 1
    }

    /// The mean length of the windows of k intervals, in seconds.
    fn tau(&self, k: usize) -> f64 {
        let scans = self.scans.len();
        if k == 0 || k >= scans {
            return 0.0;
        }
        let ends = self.sums[scans] - self.sums[k];
        let starts = self.sums[scans - k];
        (ends - starts) / (scans - k) as f64
    }

    /// How far these windows are from their mean length (standard deviation, seconds).
    fn jitter(&self, k: usize) -> f64 {
        let windows = self.scans.len() - k;
        let (mean, step) = (self.tau(k), windows.div_ceil(SAMPLED));
        let squares = (0..windows).step_by(step).map(|start| {
            let length = (self.scans[start + k] - self.scans[start]).as_secs_f64();
            (length - mean) * (length - mean)
        });
        let sampled = windows.div_ceil(step) as f64;
        (squares.sum::<f64>() / sampled).sqrt()
    }

    pub(super) fn point(&self, k: usize) -> CurvePoint {
        let tau = self.tau(k);
        // The steeper of the two sides.
        let mut slope = 0.0f64;
        for (low, high) in [(k.saturating_sub(1), k), (k, (k + 1).min(self.intervals()))] {
            let time = self.tau(high) - self.tau(low);
            if low < high && time > 0.0 {
                slope = slope.max((self.pages[high] - self.pages[low]) / time);
            }
        }
        let error = slope * (self.took + self.jitter(k));
        CurvePoint { tau: Duration::from_secs_f64(tau.max(0.0)), pages: self.pages[k], error }
    }

    pub(super) fn at(&self, tau: Duration) -> Option<Estimate> {
        let n = self.intervals();
        let wanted = tau.as_secs_f64();
        // Nanoseconds are what durations have: the whole run is not longer than the run.
        if n == 0 || wanted > self.tau(n) + 1e-9 {
            return None;
        }
        // Lengths grow with k.
        let (mut below, mut above) = (0, n);
        while above - below > 1 {
            let middle = below.midpoint(above);
            if self.tau(middle) <= wanted { below = middle } else { above = middle }
        }
        for k in [below, above] {
            if k > 0 && (self.tau(k) - wanted).abs() < 1e-9 {
                let point = self.point(k);
                return Some(Estimate { pages: point.pages, error: point.error });
            }
        }
        let (low, high) = (self.pages[below], self.pages[above]);
        let share = (wanted - self.tau(below)) / (self.tau(above) - self.tau(below));
        let pages = low + (high - low) * share;
        let error = (high - pages).max(pages - low) + self.point(above).error;
        Some(Estimate { pages, error })
    }
}

/// 1 to 16 intervals, then 16 numbers for each doubling, and n itself.
pub(super) fn thinned(n: usize) -> Vec<usize> {
    let mut all = Vec::new();
    let mut k = 1;
    while k < n {
        all.push(k);
        k += 1 << (k / 16).max(1).ilog2();
    }
    if n > 0 {
        all.push(n);
    }
    all
}
