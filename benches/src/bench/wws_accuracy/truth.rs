//! The true working set, from a log of every write.
//!
//! A window of length tau misses a page if it lies within a time in which the page is not written; of all windows
//! that begin in a run of length T, those that do so begin within gap - tau. So the mean number of pages in a window is
//! pages - sum over all gaps of max(0, gap - tau) / (T - tau), without any grid of scans. It shares no code with the
//! estimator, and knows the time of every write.

use crate::workload::pattern::log::Write;
use std::collections::HashMap;

/// What a program wrote between two moments.
#[derive(Debug)]
pub struct Truth {
    /// Length of the run, in nanoseconds.
    length: u64,
    pages: u64,
    /// Times without a write to a page, in nanoseconds, the longest first.
    gaps: Vec<u64>,
    /// Sums of the longest gaps: the i-th is that of the first i.
    sums: Vec<u128>,
}

impl Truth {
    /// From the writes between `from` and `to` (CLOCK_MONOTONIC, nanoseconds); others are passed over.
    pub fn new(writes: impl Iterator<Item = Write>, from: u64, to: u64) -> Self {
        let mut last: HashMap<u64, u64> = HashMap::new();
        let mut gaps = Vec::new();
        for write in writes.filter(|write| (from..to).contains(&write.at_ns)) {
            let before = last.insert(write.page, write.at_ns).unwrap_or(from);
            gaps.push(write.at_ns.saturating_sub(before));
        }
        gaps.extend(last.values().map(|at| to - at));
        gaps.sort_unstable_by_key(|gap| std::cmp::Reverse(*gap));
        let mut sum = 0;
        let mut sums = vec![0];
        sums.extend(gaps.iter().map(|gap| {
            sum += u128::from(*gap);
            sum
        }));
        Self { length: to - from, pages: last.len() as u64, gaps, sums }
    }

    /// Different pages of the whole run.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Mean number of pages written in windows of so many nanoseconds.
    pub fn wws(&self, tau: u64) -> f64 {
        if tau >= self.length {
            return self.pages as f64;
        }
        let longer = self.gaps.partition_point(|gap| *gap > tau);
        let missed = self.sums[longer] - longer as u128 * u128::from(tau);
        self.pages as f64 - missed as f64 / (self.length - tau) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_averaged_over_every_moment_that_they_can_begin() {
        let write = |at_ns, page| Write { at_ns, page };
        let log = [write(5, 9), write(20, 1), write(50, 1), write(60, 2), write(110, 3)];
        let truth = Truth::new(log.into_iter(), 10, 110);
        assert_eq!(truth.pages(), 2);
        assert_eq!(truth.wws(100), 2.0);
        assert_eq!(truth.wws(1000), 2.0);
        // Windows of 30 begin from 10 to 80. Page 1 is in those from 10 to 50, page 2 in those from 30 to 60.
        assert!((truth.wws(30) - (40.0 + 30.0) / 70.0).abs() < 1e-12);
        assert_eq!(truth.wws(0), 0.0);
    }
}
