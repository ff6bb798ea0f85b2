//! How many pages a window holds, from how long pages stay unwritten.
//!
//! A run of tracking is n intervals, one between each two scans. A page that was written at least once divides them
//! into write-free gaps: the one before its first write, those between writes, and the one behind its last. A window
//! of k intervals misses the page if it lies within a gap; a gap of g intervals has g - k + 1 such windows. So of the
//! n - k + 1 windows, the page is in all but the sum of max(0, g - k + 1) over its gaps, and the mean number of pages
//! in a window is
//!
//! ```text
//! WWS(k) = pages - sum over all gaps of max(0, g - k + 1) / (n - k + 1)
//! ```
//!
//! This is how the mean working set of a reference string is had in one pass from its interreference intervals
//! (Denning and Schwartz 1972; Slutz and Traiger 1974 for the exact correction at the ends of the string).
//! Only a histogram of gaps is kept, whatever the number of pages.

/// The gaps of all pages of a run.
#[derive(Clone, Debug, Default)]
pub(super) struct Gaps {
    /// `closed[g]`: gaps of g intervals that a write has ended.
    closed: Vec<u64>,
    /// `open[i]`: pages whose last write was in interval i (from 0).
    open: Vec<u64>,
    /// Pages written at least once.
    pages: u64,
}

impl Gaps {
    /// One more interval has passed.
    pub(super) fn advance(&mut self) {
        self.open.push(0);
        self.closed.push(0);
    }

    /// Number of intervals.
    pub(super) fn intervals(&self) -> usize {
        self.open.len()
    }

    /// A page is written in the latest interval for the first time.
    pub(super) fn first(&mut self) {
        let now = self.open.len() - 1;
        self.pages += 1;
        self.closed[now] += 1;
        self.open[now] += 1;
    }

    /// A page that was last written in interval `last` is written in the latest, which is another.
    pub(super) fn again(&mut self, last: usize) {
        let now = self.open.len() - 1;
        self.closed[now - last - 1] += 1;
        self.open[last] -= 1;
        self.open[now] += 1;
    }

    /// Mean number of pages written in k intervals, at index k, from 0 (no interval, no page) to the whole run.
    pub(super) fn curve(&self) -> Vec<f64> {
        let n = self.intervals();
        // count[g]: gaps of g intervals, the open ones being over when the run is.
        let mut count = self.closed.clone();
        for (last, pages) in self.open.iter().enumerate() {
            count[n - 1 - last] += pages;
        }
        let mut curve = vec![0.0; n + 1];
        // Gaps of at least k intervals, and the windows of k intervals in them.
        let (mut gaps, mut windows) = (0u128, 0u128);
        for k in (1..=n).rev() {
            gaps += u128::from(count.get(k).copied().unwrap_or(0));
            windows += gaps;
            curve[k] = self.pages as f64 - windows as f64 / (n - k + 1) as f64;
        }
        curve
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        /// The formula against its meaning: every window, and the pages in it.
        #[test]
        fn the_curve_is_the_mean_over_all_windows(
            writes in proptest::collection::vec(proptest::collection::btree_set(0usize..12, 0..8), 0..24),
        ) {
            let mut gaps = Gaps::default();
            let mut last = [None; 12];
            for (interval, pages) in writes.iter().enumerate() {
                gaps.advance();
                for page in pages {
                    match last[*page].replace(interval) {
                        None => gaps.first(),
                        Some(before) => gaps.again(before),
                    }
                }
            }
            let curve = gaps.curve();
            prop_assert_eq!(curve.len(), writes.len() + 1);
            for (k, mean_pages) in curve.iter().enumerate().skip(1) {
                let windows: Vec<usize> = writes
                    .windows(k)
                    .map(|window| window.iter().flatten().collect::<BTreeSet<_>>().len())
                    .collect();
                let mean = windows.iter().sum::<usize>() as f64 / windows.len() as f64;
                prop_assert!((mean_pages - mean).abs() < 1e-9, "{} intervals: {} for {}", k, mean_pages, mean);
            }
        }
    }
}
