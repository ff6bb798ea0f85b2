//! Sets of pages as bits, for sets that lose their pages one by one: what is still to be sent, and what is still to come.
//!
//! A set of sorted runs ([`pageferry_tracker::PageSet`]) is smaller, but taking a page out of its middle moves all that is
//! behind. Here it is one bit of a table for 2 MiB of address space.

use pageferry_tracker::Run;
use std::collections::BTreeMap;

/// Pages of a table.
const PAGES: u64 = 512;
const WORDS: usize = PAGES as usize / 64;

/// A set of page numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PageBits {
    tables: BTreeMap<u64, [u64; WORDS]>,
    pages: u64,
}

/// The word and the bit of a page in its table.
fn place(page: u64) -> (usize, u64) {
    let at = page % PAGES;
    ((at / 64) as usize, 1 << (at % 64))
}

impl PageBits {
    /// Number of pages.
    pub(crate) fn len(&self) -> u64 {
        self.pages
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.pages == 0
    }

    pub(crate) fn has(&self, page: u64) -> bool {
        let (word, bit) = place(page);
        self.tables.get(&(page / PAGES)).is_some_and(|table| table[word] & bit != 0)
    }

    /// Adds `len` pages from `start` on.
    pub(crate) fn insert(&mut self, start: u64, len: u64) {
        let (mut at, end) = (start, start.saturating_add(len));
        while at < end {
            let table = self.tables.entry(at / PAGES).or_default();
            let stop = end.min((at / PAGES + 1) * PAGES);
            while at < stop {
                let span = (64 - at % 64).min(stop - at);
                let mask = (u64::MAX >> (64 - span)) << (at % 64);
                let word = &mut table[place(at).0];
                self.pages += u64::from((mask & !*word).count_ones());
                *word |= mask;
                at += span;
            }
        }
    }

    /// Takes a page out; says whether it was there.
    pub(crate) fn remove(&mut self, page: u64) -> bool {
        let (word, bit) = place(page);
        let Some(table) = self.tables.get_mut(&(page / PAGES)).filter(|table| table[word] & bit != 0) else {
            return false;
        };
        table[word] &= !bit;
        self.pages -= 1;
        if *table == [0; WORDS] {
            self.tables.remove(&(page / PAGES));
        }
        true
    }

    /// Takes out `len` pages from `start` on; gives those that were there.
    pub(crate) fn remove_run(&mut self, start: u64, len: u64) -> Vec<Run> {
        let end = start.saturating_add(len);
        let mut removed: Vec<Run> = Vec::new();
        let mut from = start;
        while let Some(page) = self.next(from, end) {
            self.remove(page);
            match removed.last_mut() {
                Some(run) if run.end() == page => run.len += 1,
                _ => removed.push(Run { start: page, len: 1 }),
            }
            from = page + 1;
        }
        removed
    }

    /// The first page in [from, end).
    pub(crate) fn next(&self, from: u64, end: u64) -> Option<u64> {
        if from >= end {
            return None;
        }
        let first = from / PAGES;
        let found = self.tables.range(first..end.div_ceil(PAGES)).find_map(|(&number, table)| {
            let at = if number == first { from % PAGES } else { 0 };
            (at / 64..WORDS as u64).find_map(|word| {
                let cut = if word == at / 64 { u64::MAX << (at % 64) } else { u64::MAX };
                let rest = table[word as usize] & cut;
                (rest != 0).then(|| number * PAGES + word * 64 + u64::from(rest.trailing_zeros()))
            })
        });
        found.filter(|page| *page < end)
    }

    /// The last page in [from, end).
    pub(crate) fn last(&self, from: u64, end: u64) -> Option<u64> {
        if from >= end {
            return None;
        }
        let number = (end - 1) / PAGES;
        let found = self.tables.range(from / PAGES..=number).next_back();
        let found = found.and_then(|(&of, table)| {
            let at = if of == number { (end - 1) % PAGES } else { PAGES - 1 };
            last_of(table, at).map(|at| of * PAGES + at)
        });
        match found {
            Some(page) => Some(page).filter(|page| *page >= from),
            // The table of the end has pages behind the end only.
            None => {
                let (&of, table) = self.tables.range(from / PAGES..number).next_back()?;
                last_of(table, PAGES - 1).map(|at| of * PAGES + at).filter(|page| *page >= from)
            }
        }
    }

    /// How many pages from `page` on are all in the set, at most `most`.
    pub(crate) fn run(&self, page: u64, most: u64) -> u64 {
        (0..most).take_while(|ahead| self.has(page + ahead)).count() as u64
    }

    /// All pages, as runs in order.
    pub(crate) fn runs(&self) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for (number, table) in &self.tables {
            for (word, bits) in table.iter().enumerate() {
                let (mut bits, mut at) = (*bits, number * PAGES + word as u64 * 64);
                while bits != 0 {
                    let gap = u64::from(bits.trailing_zeros());
                    bits >>= gap;
                    let len = u64::from(bits.trailing_ones());
                    at += gap;
                    match runs.last_mut() {
                        Some(run) if run.end() == at => run.len += len,
                        _ => runs.push(Run { start: at, len }),
                    }
                    bits = if len == 64 { 0 } else { bits >> len };
                    at += len;
                }
            }
        }
        runs
    }
}

impl FromIterator<Run> for PageBits {
    fn from_iter<I: IntoIterator<Item = Run>>(runs: I) -> Self {
        let mut bits = Self::default();
        runs.into_iter().for_each(|run| bits.insert(run.start, run.len));
        bits
    }
}

/// The last page of a table up to `at`.
fn last_of(table: &[u64; WORDS], at: u64) -> Option<u64> {
    (0..=at / 64).rev().find_map(|word| {
        let cut = if word == at / 64 { u64::MAX >> (63 - at % 64) } else { u64::MAX };
        let rest = table[word as usize] & cut;
        (rest != 0).then(|| word * 64 + 63 - u64::from(rest.leading_zeros()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u64, u64),
        Remove(u64),
        RemoveRun(u64, u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..3000u64, 0..700u64).prop_map(|(start, len)| Step::Insert(start, len)),
            (0..3000u64).prop_map(Step::Remove),
            (0..3000u64, 0..300u64).prop_map(|(start, len)| Step::RemoveRun(start, len)),
        ]
    }

    proptest! {
        #[test]
        fn agrees_with_a_set_of_numbers(
            steps in proptest::collection::vec(step(), 0..12),
            looks in proptest::collection::vec((0..4000u64, 0..4000u64), 20),
        ) {
            let (mut bits, mut model) = (PageBits::default(), BTreeSet::new());
            for step in steps {
                match step {
                    Step::Insert(start, len) => {
                        bits.insert(start, len);
                        model.extend(start..start + len);
                    }
                    Step::Remove(page) => prop_assert_eq!(bits.remove(page), model.remove(&page)),
                    Step::RemoveRun(start, len) => {
                        let removed: Vec<u64> =
                            bits.remove_run(start, len).iter().flat_map(|run| run.start..run.end()).collect();
                        let expected: Vec<u64> = model.range(start..start + len).copied().collect();
                        expected.iter().for_each(|page| assert!(model.remove(page)));
                        prop_assert_eq!(removed, expected);
                    }
                }
            }
            prop_assert_eq!(bits.len(), model.len() as u64);
            prop_assert_eq!(bits.is_empty(), model.is_empty());
            let runs = bits.runs();
            prop_assert!(runs.is_sorted_by(|a, b| a.end() < b.start));
            prop_assert!(runs.iter().flat_map(|run| run.start..run.end()).eq(model.iter().copied()));
            prop_assert_eq!(&runs.into_iter().collect::<PageBits>(), &bits);
            for (from, end) in looks {
                let (first, last) = match from < end {
                    true => (model.range(from..end).next(), model.range(from..end).next_back()),
                    false => (None, None),
                };
                prop_assert_eq!(bits.next(from, end), first.copied());
                prop_assert_eq!(bits.last(from, end), last.copied());
                prop_assert_eq!(bits.has(from), model.contains(&from));
                let run = (from..from + 100).take_while(|page| model.contains(page)).count() as u64;
                prop_assert_eq!(bits.run(from, 100), run);
            }
        }
    }
}
