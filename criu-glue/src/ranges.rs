//! Sorted, disjoint ranges of addresses: `(start, end)`, end exclusive.

use crate::PAGE_SIZE;

/// First byte, one past the last byte.
pub type Range = (u64, u64);

/// Runs of pages that do not describe memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RunError {
    /// Empty, or beyond what an address can be.
    #[error("a run of {pages} pages from page {start:#x} is empty or beyond the address space")]
    Impossible {
        /// First page number.
        start: u64,
        /// Number of pages.
        pages: u64,
    },
    /// Not ascending.
    #[error("the run from page {start:#x} begins before the one in front of it ends")]
    Unsorted {
        /// First page number.
        start: u64,
    },
}

/// Turns runs of (first page number, pages) into ranges of addresses, and merges those that touch.
pub(crate) fn from_runs(runs: &[(u64, u64)]) -> Result<Vec<Range>, RunError> {
    let mut ranges: Vec<Range> = Vec::with_capacity(runs.len());
    for &(start, pages) in runs {
        let end = start.checked_add(pages).and_then(|end| end.checked_mul(PAGE_SIZE));
        let Some(end) = end.filter(|_| pages > 0) else { return Err(RunError::Impossible { start, pages }) };
        let first = start * PAGE_SIZE;
        match ranges.last_mut() {
            Some(last) if last.1 > first => return Err(RunError::Unsorted { start }),
            Some(last) if last.1 == first => last.1 = end,
            _ => ranges.push((first, end)),
        }
    }
    Ok(ranges)
}

/// `a` without `b`.
pub(crate) fn subtract(a: &[Range], b: &[Range]) -> Vec<Range> {
    let mut left = Vec::with_capacity(a.len());
    let mut next = 0;
    for &(start, end) in a {
        let mut at = start;
        while b.get(next).is_some_and(|r| r.1 <= at) {
            next += 1;
        }
        let mut hole = next;
        while at < end {
            let (hole_start, hole_end) = b.get(hole).copied().unwrap_or((end, end));
            if hole_start > at {
                left.push((at, hole_start.min(end)));
            }
            at = at.max(hole_end.max(hole_start));
            hole += 1;
        }
    }
    left
}

/// `a` and `b`.
pub(crate) fn intersect(a: &[Range], b: &[Range]) -> Vec<Range> {
    let mut both = Vec::new();
    let (mut i, mut k) = (0, 0);
    while let (Some(&(a_start, a_end)), Some(&(b_start, b_end))) = (a.get(i), b.get(k)) {
        let (start, end) = (a_start.max(b_start), a_end.min(b_end));
        if start < end {
            both.push((start, end));
        }
        if a_end <= b_end { i += 1 } else { k += 1 }
    }
    both
}

/// The first part of `a` that is not in `b`.
pub(crate) fn first_outside(a: &[Range], b: &[Range]) -> Option<Range> {
    subtract(a, b).first().copied()
}

/// The first part of `a` that is in `b`.
pub(crate) fn first_common(a: &[Range], b: &[Range]) -> Option<Range> {
    intersect(a, b).first().copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn runs() {
        assert_eq!(from_runs(&[(1, 2), (3, 1), (9, 1)]).unwrap(), [(0x1000, 0x4000), (0x9000, 0xa000)]);
        assert_eq!(from_runs(&[(3, 1), (3, 1)]), Err(RunError::Unsorted { start: 3 }));
        for (start, pages) in [(1, 0), (u64::MAX, 1), (1, u64::MAX), (1 << 52, 1)] {
            assert_eq!(from_runs(&[(start, pages)]), Err(RunError::Impossible { start, pages }));
        }
    }

    fn some() -> impl Strategy<Value = Vec<Range>> {
        proptest::collection::vec((0u64..9, 1u64..9), 0..20).prop_map(|steps| {
            let mut at = 0;
            steps
                .into_iter()
                .map(|(gap, len)| {
                    let start = at + gap;
                    at = start + len;
                    (start, at)
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn set_arithmetic(a in some(), b in some()) {
            let has = |set: &[Range], x: u64| set.iter().any(|&(s, e)| (s..e).contains(&x));
            let (less, both) = (subtract(&a, &b), intersect(&a, &b));
            for x in 0..400 {
                prop_assert_eq!(has(&less, x), has(&a, x) && !has(&b, x));
                prop_assert_eq!(has(&both, x), has(&a, x) && has(&b, x));
            }
            prop_assert!(less.iter().chain(&both).all(|r| r.0 < r.1));
        }
    }
}
