//! Sets of pages as sorted runs: a program's memory is a few runs, its dirty pages some thousands.

/// Neighbouring pages, by number (address / 4096).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Run {
    /// The first.
    pub start: u64,
    /// How many.
    pub len: u64,
}

impl Run {
    /// One past the last page.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// A set of page numbers: runs that are sorted, apart from each other, and not empty.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    runs: Vec<Run>,
}

impl Clone for PageSet {
    fn clone(&self) -> Self {
        Self { runs: self.runs.clone() }
    }

    /// Into the memory that the set has already.
    fn clone_from(&mut self, other: &Self) {
        self.runs.clone_from(&other.runs);
    }
}

impl PageSet {
    /// Adds `len` pages from `start` on. Quick when they lie behind all others, as in a scan.
    #[inline]
    pub fn insert(&mut self, start: u64, len: u64) {
        match self.runs.last() {
            Some(last) if last.end() < start && len > 0 => self.runs.push(Run { start, len }),
            _ => self.insert_anywhere(start, len),
        }
    }

    fn insert_anywhere(&mut self, start: u64, len: u64) {
        if len == 0 {
            return;
        }
        let end = start + len;
        match self.runs.last_mut() {
            None => self.runs.push(Run { start, len }),
            Some(last) if last.end() < start => self.runs.push(Run { start, len }),
            Some(last) if last.start <= start => last.len = last.len.max(end - last.start),
            Some(_) => {
                // All runs that touch the new one become one with it.
                let first = self.runs.partition_point(|run| run.end() < start);
                let behind = self.runs.partition_point(|run| run.start <= end);
                if first == behind {
                    self.runs.insert(first, Run { start, len });
                } else {
                    let from = self.runs[first].start.min(start);
                    let to = self.runs[behind - 1].end().max(end);
                    self.runs.splice(first..behind, [Run { start: from, len: to - from }]);
                }
            }
        }
    }

    /// Takes all pages out, and keeps the memory for others.
    pub(crate) fn clear(&mut self) {
        self.runs.clear();
    }

    /// The runs, in order.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Number of pages.
    pub fn len(&self) -> u64 {
        self.runs.iter().map(|run| run.len).sum()
    }

    /// Whether there are no pages.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Whether the page is in the set.
    pub fn contains(&self, page: u64) -> bool {
        let at = self.runs.partition_point(|run| run.end() <= page);
        self.runs.get(at).is_some_and(|run| run.start <= page)
    }

    /// Whether every page of the run is in the set.
    pub fn contains_run(&self, wanted: Run) -> bool {
        let at = self.runs.partition_point(|run| run.end() <= wanted.start);
        wanted.len == 0
            || self.runs.get(at).is_some_and(|run| run.start <= wanted.start && wanted.end() <= run.end())
    }

    /// From the first page to the last.
    fn bounds(&self) -> Option<Run> {
        let (first, last) = (self.runs.first()?, self.runs.last()?);
        Some(Run { start: first.start, len: last.end() - first.start })
    }

    /// Every page, in order.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.runs.iter().flat_map(|run| run.start..run.end())
    }

    /// The pages of either set.
    #[must_use]
    pub fn union(&self, other: &PageSet) -> PageSet {
        match (self.is_empty(), other.is_empty()) {
            (_, true) => return self.clone(),
            (true, _) => return other.clone(),
            _ => {}
        }
        let mut union = PageSet { runs: Vec::with_capacity(self.runs.len() + other.runs.len()) };
        let (mut left, mut right) = (self.runs.iter().peekable(), other.runs.iter().peekable());
        while let Some(run) = match (left.peek(), right.peek()) {
            (Some(a), Some(b)) if b.start < a.start => right.next(),
            (Some(_), _) => left.next(),
            (None, _) => right.next(),
        } {
            // In order of their starts: each insertion is at the end.
            union.insert(run.start, run.len);
        }
        union
    }

    /// Adds the pages of another set: little work if one of the two has few.
    pub fn absorb(&mut self, other: PageSet) {
        /// So many insertions in the middle cost less than going over all of the runs.
        const FEW: usize = 4;
        let (mut more, less) = match self.runs.len() >= other.runs.len() {
            true => (std::mem::take(self), other),
            false => (other, std::mem::take(self)),
        };
        let is_behind = less.runs.first().zip(more.runs.last()).is_some_and(|(a, b)| a.start > b.end());
        if is_behind || less.runs.len() <= FEW {
            less.runs.iter().for_each(|run| more.insert(run.start, run.len));
            *self = more;
        } else {
            *self = more.union(&less);
        }
    }

    /// The pages of both sets.
    #[must_use]
    pub fn intersect(&self, other: &PageSet) -> PageSet {
        // A set that lies in one run of the other, as what was written lies in what exists.
        if self.bounds().is_some_and(|bounds| other.contains_run(bounds)) {
            return self.clone();
        }
        let mut both = PageSet::default();
        let (mut a, mut b) = (0, 0);
        while let (Some(left), Some(right)) = (self.runs.get(a), other.runs.get(b)) {
            let start = left.start.max(right.start);
            let end = left.end().min(right.end());
            if start < end {
                both.runs.push(Run { start, len: end - start });
            }
            if left.end() <= right.end() {
                a += 1;
            } else {
                b += 1;
            }
        }
        both
    }

    /// The first `count` pages, and the others.
    #[must_use]
    pub fn split(&self, count: u64) -> (PageSet, PageSet) {
        let (mut first, mut rest) = (PageSet::default(), PageSet::default());
        let mut room = count;
        for run in &self.runs {
            let len = run.len.min(room);
            first.insert(run.start, len);
            rest.insert(run.start + len, run.len - len);
            room -= len;
        }
        (first, rest)
    }

    /// The pages of this set that are not in the other.
    #[must_use]
    pub fn subtract(&self, other: &PageSet) -> PageSet {
        if other.is_empty() {
            return self.clone();
        }
        if self == other {
            return PageSet::default();
        }
        let mut rest = PageSet::default();
        let mut b = 0;
        for run in &self.runs {
            let (mut at, end) = (run.start, run.end());
            while b < other.runs.len() && other.runs[b].end() <= at {
                b += 1;
            }
            let mut hole = b;
            while at < end {
                match other.runs.get(hole) {
                    Some(cut) if cut.start < end => {
                        if cut.start > at {
                            rest.runs.push(Run { start: at, len: cut.start - at });
                        }
                        at = at.max(cut.end());
                        hole += 1;
                    }
                    _ => {
                        rest.runs.push(Run { start: at, len: end - at });
                        at = end;
                    }
                }
            }
        }
        rest
    }
}

impl FromIterator<Run> for PageSet {
    fn from_iter<I: IntoIterator<Item = Run>>(runs: I) -> Self {
        let mut set = PageSet::default();
        for run in runs {
            set.insert(run.start, run.len);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn both(runs: &[(u64, u64)]) -> (PageSet, BTreeSet<u64>) {
        let (mut set, mut model) = (PageSet::default(), BTreeSet::new());
        for (start, len) in runs {
            set.insert(*start, *len);
            model.extend(*start..start + len);
        }
        (set, model)
    }

    fn absorbed(a: &PageSet, b: &PageSet) -> PageSet {
        let mut both = a.clone();
        both.absorb(b.clone());
        both
    }

    fn is_canonical(set: &PageSet) -> bool {
        set.runs.iter().all(|run| run.len > 0) && set.runs.windows(2).all(|w| w[0].end() < w[1].start)
    }

    proptest! {
        #[test]
        fn behaves_like_a_set(
            a in proptest::collection::vec((0u64..200, 0u64..20), 0..20),
            b in proptest::collection::vec((0u64..200, 0u64..20), 0..20),
        ) {
            let ((a, model_a), (b, model_b)) = (both(&a), both(&b));
            let count = b.len();
            let (first, rest) = a.split(count);
            let model_first: BTreeSet<u64> = model_a.iter().copied().take(count as usize).collect();
            let model_rest = &model_a - &model_first;
            for (set, model) in [
                (first, model_first),
                (rest, model_rest),
                (a.clone(), model_a.clone()),
                (a.union(&b), &model_a | &model_b),
                (absorbed(&a, &b), &model_a | &model_b),
                (a.intersect(&b), &model_a & &model_b),
                (a.subtract(&b), &model_a - &model_b),
                (a.subtract(&a), BTreeSet::new()),
                (b.intersect(&a.union(&b)), model_b.clone()),
            ] {
                prop_assert!(is_canonical(&set));
                prop_assert_eq!(set.len(), model.len() as u64);
                prop_assert_eq!(set.iter().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
                for page in 0..230 {
                    prop_assert_eq!(set.contains(page), model.contains(&page));
                    for len in [0, 1, 2, 7] {
                        let all = (page..page + len).all(|page| model.contains(&page));
                        prop_assert_eq!(set.contains_run(Run { start: page, len }), all);
                    }
                }
            }
        }
    }
}
