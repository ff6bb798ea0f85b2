//! What existed at the last scan, kept so that the next need not look at every page twice.
//!
//! A page that comes into being is not protected, so a scan for written pages finds it. A page that ceases to be leaves no
//! mark: but the kernel counts the pages that are a process' own, in memory and in swap, and where that count has changed by
//! just the pages that have come, none has gone. Two changes can cancel each other out (as many pages given back as came, in
//! mappings that are not watched): then what has gone still counts as existing while the program runs, [`LOOKS`] scans long
//! at most. It never hides a write, and a frozen program is always looked at page by page. Pages that are not counted (shared
//! memory, hugetlbfs) are none of this.

use crate::page_set::PageSet;
use crate::scope::Span;

/// After so many scans everything is looked at again, whatever the counts say.
const LOOKS: u32 = 16;
/// Neighbouring pages that exist, from which on a scan of their own is worth its system call.
const LONG: u64 = 512;

/// The pages that existed at a scan.
#[derive(Debug)]
pub(crate) struct Known {
    spans: Vec<Span>,
    populated: PageSet,
    /// What the kernel counted before that scan.
    counted: u64,
    looks: u32,
}

impl Known {
    pub(crate) fn new(spans: Vec<Span>, populated: PageSet, counted: u64) -> Self {
        Self { spans, populated, counted, looks: 0 }
    }

    /// Whether the mappings are the same, and pages may have come, but hardly gone.
    pub(crate) fn may_hold(&self, spans: &[Span], counted: u64) -> bool {
        self.looks < LOOKS && counted >= self.counted && self.spans == spans
    }

    /// Stretches of which all pages existed.
    pub(crate) fn long_runs(&self) -> PageSet {
        self.populated.runs().iter().filter(|run| run.len >= LONG).copied().collect()
    }

    /// What exists now, if the pages that have come (all of them are among `written`) explain what the kernel counts.
    pub(crate) fn grown(mut self, written: &PageSet, counted: u64) -> Option<Self> {
        let come = written.subtract(&self.populated);
        if come.len() != counted - self.counted {
            return None;
        }
        if !come.is_empty() {
            self.populated = self.populated.union(&come);
        }
        (self.counted, self.looks) = (counted, self.looks + 1);
        Some(self)
    }

    pub(crate) fn populated(&self) -> &PageSet {
        &self.populated
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page_set::Run;

    fn pages(runs: &[(u64, u64)]) -> PageSet {
        runs.iter().map(|&(start, len)| Run { start, len }).collect()
    }

    fn known() -> Known {
        let spans = vec![Span { start: 0, end: 4096 << 12, shared: false }];
        Known::new(spans, pages(&[(0, 600), (700, 10)]), 1000)
    }

    #[test]
    fn pages_that_come_are_explained_by_the_count_and_others_are_not() {
        let grown = known().grown(&pages(&[(5, 10), (710, 3)]), 1003).expect("explained");
        assert_eq!(*grown.populated(), pages(&[(0, 600), (700, 13)]));
        assert!(known().grown(&pages(&[(710, 3)]), 1002).is_none(), "one has gone");
        assert!(known().grown(&pages(&[]), 1001).is_none(), "one has come unseen");
    }

    #[test]
    fn it_does_not_hold_when_pages_go_or_mappings_change_or_for_ever() {
        let spans = known().spans;
        assert!(known().may_hold(&spans, 1000) && known().may_hold(&spans, 2000));
        assert!(!known().may_hold(&spans, 999));
        assert!(!known().may_hold(&[], 1000));
        let mut often = known();
        for _ in 0..LOOKS {
            assert!(often.may_hold(&spans, 1000));
            often = often.grown(&PageSet::default(), 1000).expect("nothing changed");
        }
        assert!(!often.may_hold(&spans, 1000));
    }

    #[test]
    fn only_long_stretches_are_scanned_by_themselves() {
        assert_eq!(known().long_runs(), pages(&[(0, 600)]));
    }
}
