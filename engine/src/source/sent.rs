//! What the destination holds: one digest for every page that was sent, and the digest of the whole space.
//!
//! 16 bytes and a bit for every page, in tables of 2 MiB of address space, is 0.4 % of what is tracked.

use pageferry_tracker::PageSet;
use pageferry_wire_format::digest::{SpaceDigest, ZERO_PAGE};
use pageferry_wire_format::{PageDigest, PageNo, PageRun};

const PAGES: u64 = 512;
const WORDS: usize = (PAGES / 64) as usize;

struct Table {
    given: [u64; WORDS],
    /// Given since the destination last said that it has everything.
    doubted: [u64; WORDS],
    digests: [PageDigest; PAGES as usize],
    /// Named among the tables in which there may be pages in doubt.
    doubtful: bool,
}

impl Table {
    fn new() -> Box<Self> {
        Box::new(Self {
            given: [0; WORDS],
            doubted: [0; WORDS],
            digests: [PageDigest([0; 16]); PAGES as usize],
            doubtful: false,
        })
    }

    fn has(&self, index: usize) -> bool {
        self.given[index / 64] >> (index % 64) & 1 == 1
    }
}

/// The pages of one space that the destination was given.
#[derive(Default)]
pub(crate) struct SentPages {
    /// By the number of the stretch of address space, in order: mostly the next one is the last.
    tables: Vec<(u64, Box<Table>)>,
    /// Where in `tables` a page was entered last: the next one is mostly in the same.
    last: usize,
    /// The tables in which there may be pages in doubt.
    doubtful: Vec<u64>,
    digest: SpaceDigest,
    pages: u64,
}

impl SentPages {
    /// Where the table of a stretch is, or belongs.
    fn find(&self, chunk: u64) -> Result<usize, usize> {
        match self.tables.get(self.last) {
            Some((number, _)) if *number == chunk => Ok(self.last),
            _ => self.tables.binary_search_by_key(&chunk, |(number, _)| *number),
        }
    }

    fn table(&self, chunk: u64) -> Option<&Table> {
        self.find(chunk).ok().map(|at| &*self.tables[at].1)
    }

    fn table_mut(&mut self, chunk: u64) -> Option<&mut Table> {
        self.find(chunk).ok().map(|at| &mut *self.tables[at].1)
    }

    /// The digest of the content that the destination has for `page`.
    pub(crate) fn get(&self, page: u64) -> Option<&PageDigest> {
        let table = self.table(page / PAGES)?;
        let index = (page % PAGES) as usize;
        table.has(index).then(|| &table.digests[index])
    }

    /// `page` is about to be sent with the content of `digest`, unless the destination has that already. Gives what it
    /// had before. Whether the new content has arrived is in doubt until [`SentPages::settle`].
    pub(crate) fn insert(&mut self, page: u64, digest: PageDigest) -> Option<PageDigest> {
        let (chunk, index) = (page / PAGES, (page % PAGES) as usize);
        self.last = self.find(chunk).unwrap_or_else(|at| {
            self.tables.insert(at, (chunk, Table::new()));
            at
        });
        let table = &mut self.tables[self.last].1;
        let before = table.has(index).then(|| table.digests[index]);
        if before == Some(digest) {
            return before;
        }
        if !table.doubtful {
            table.doubtful = true;
            self.doubtful.push(chunk);
        }
        table.doubted[index / 64] |= 1 << (index % 64);
        match &before {
            Some(before) => self.digest.remove(PageNo(page), before),
            None => {
                table.given[index / 64] |= 1 << (index % 64);
                self.pages += 1;
            }
        }
        table.digests[index] = digest;
        self.digest.insert(PageNo(page), &digest);
        before
    }

    /// The destination does not have `page`.
    pub(crate) fn remove(&mut self, page: u64) {
        let index = (page % PAGES) as usize;
        let Some(table) = self.table_mut(page / PAGES).filter(|table| table.has(index)) else { return };
        table.given[index / 64] &= !(1 << (index % 64));
        let before = table.digests[index];
        self.digest.remove(PageNo(page), &before);
        self.pages -= 1;
    }

    /// The destination has everything that was sent so far.
    pub(crate) fn settle(&mut self) {
        for chunk in std::mem::take(&mut self.doubtful) {
            if let Some(table) = self.table_mut(chunk) {
                table.doubted = [0; WORDS];
                table.doubtful = false;
            }
        }
    }

    /// Forgets the pages of which it is in doubt what the destination has of them, and gives them: those that were sent since
    /// [`SentPages::settle`], and are still there.
    pub(crate) fn forget_doubted(&mut self) -> PageSet {
        let mut forgotten = PageSet::default();
        let mut chunks = std::mem::take(&mut self.doubtful);
        chunks.sort_unstable();
        chunks.dedup();
        for chunk in chunks {
            let Ok(at) = self.find(chunk) else { continue };
            let table = &mut self.tables[at].1;
            table.doubtful = false;
            let doubted = std::mem::replace(&mut table.doubted, [0; WORDS]);
            for (word, doubted) in doubted.iter().enumerate() {
                let mut gone = table.given[word] & doubted;
                table.given[word] &= !doubted;
                while gone != 0 {
                    let index = word * 64 + gone.trailing_zeros() as usize;
                    let page = chunk * PAGES + index as u64;
                    self.digest.remove(PageNo(page), &table.digests[index]);
                    forgotten.insert(page, 1);
                    gone &= gone - 1;
                }
            }
        }
        self.pages -= forgotten.len();
        forgotten
    }

    /// All pages.
    pub(crate) fn pages(&self) -> PageSet {
        let mut pages = PageSet::default();
        for (chunk, table) in &self.tables {
            for (word, given) in table.given.iter().enumerate() {
                let (start, mut given) = (chunk * PAGES + word as u64 * 64, *given);
                while given != 0 {
                    let from = given.trailing_zeros();
                    let len = (given >> from).trailing_ones();
                    pages.insert(start + u64::from(from), u64::from(len));
                    given &= !(mask(u64::from(len)) << from);
                }
            }
        }
        pages
    }

    /// Calls `tell` with every page that is not zero and its content, in order.
    pub(crate) fn each(&self, mut tell: impl FnMut(u64, &PageDigest)) {
        for (chunk, table) in &self.tables {
            for index in (0..PAGES as usize).filter(|index| table.has(*index)) {
                if table.digests[index] != ZERO_PAGE {
                    tell(chunk * PAGES + index as u64, &table.digests[index]);
                }
            }
        }
    }

    /// Number of pages.
    pub(crate) fn len(&self) -> u64 {
        self.pages
    }

    /// Digest over all of them.
    pub(crate) fn digest(&self) -> SpaceDigest {
        self.digest
    }

    /// The pages of `wanted` that were never given.
    pub(crate) fn missing(&self, wanted: &PageSet) -> PageSet {
        let mut missing = PageSet::default();
        for run in wanted.runs() {
            let (mut at, end) = (run.start, run.start + run.len);
            while at < end {
                let stop = end.min((at / PAGES + 1) * PAGES);
                match self.table(at / PAGES) {
                    None => missing.insert(at, stop - at),
                    Some(table) => {
                        let mut page = at;
                        while page < stop {
                            let (word, bit) = ((page % PAGES) as usize / 64, page % 64);
                            let span = (64 - bit).min(stop - page);
                            let given = table.given[word] >> bit;
                            if given & mask(span) != mask(span) {
                                for offset in 0..span {
                                    if given >> offset & 1 == 0 {
                                        missing.insert(page + offset, 1);
                                    }
                                }
                            }
                            page += span;
                        }
                    }
                }
                at = stop;
            }
        }
        missing
    }

    /// Keeps the pages of `kept` only: what is not in it is gone, or is left to CRIU.
    ///
    /// Returns those that were forgotten.
    pub(crate) fn retain(&mut self, kept: &PageSet) -> PageSet {
        let mut forgotten = PageSet::default();
        let mut runs = kept.runs().iter().peekable();
        let digest = &mut self.digest;
        self.tables.retain_mut(|(chunk, table)| {
            let (first, end) = (*chunk * PAGES, (*chunk + 1) * PAGES);
            let mut keep = [0u64; WORDS];
            while let Some(run) = runs.peek() {
                if run.start >= end {
                    break;
                }
                let from = run.start.max(first);
                let to = (run.start + run.len).min(end);
                let mut page = from;
                while page < to {
                    let (word, bit) = ((page % PAGES) as usize / 64, page % 64);
                    let span = (64 - bit).min(to - page);
                    keep[word] |= mask(span) << bit;
                    page += span;
                }
                if run.start + run.len > end {
                    break;
                }
                runs.next();
            }
            for (word, keep) in keep.iter().enumerate() {
                let mut gone = table.given[word] & !keep;
                table.given[word] &= keep;
                while gone != 0 {
                    let index = word * 64 + gone.trailing_zeros() as usize;
                    digest.remove(PageNo(first + index as u64), &table.digests[index]);
                    forgotten.insert(first + index as u64, 1);
                    gone &= gone - 1;
                }
            }
            table.given.iter().any(|word| *word != 0)
        });
        self.pages -= forgotten.len();
        forgotten
    }
}

fn mask(bits: u64) -> u64 {
    if bits >= 64 { u64::MAX } else { (1 << bits) - 1 }
}

/// The tracker's runs in the words of the wire.
pub(crate) fn wire_runs(set: &PageSet) -> Vec<PageRun> {
    set.runs().iter().map(|run| PageRun { start: PageNo(run.start), len: run.len }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_wire_format::digest;
    use proptest::prelude::*;

    fn digest_of(n: u64) -> PageDigest {
        digest::page(&[n as u8; 4096])
    }

    fn set(runs: &[(u64, u64)]) -> PageSet {
        let mut set = PageSet::default();
        for (start, len) in runs {
            set.insert(*start, *len);
        }
        set
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn behaves_like_a_map(
            given in proptest::collection::vec((0u64..3000, 0u64..8), 0..300),
            kept in proptest::collection::vec((0u64..3000, 1u64..700), 0..12),
            wanted in proptest::collection::vec((0u64..3000, 1u64..700), 0..12),
            removed in proptest::collection::vec(0u64..3000, 0..100),
            arrived in 0usize..300,
        ) {
            let (kept, wanted) = (set(&kept), set(&wanted));
            let mut sent = SentPages::default();
            let mut model = std::collections::BTreeMap::new();
            let mut doubted = std::collections::BTreeSet::new();
            for (n, (page, content)) in given.into_iter().enumerate() {
                if n == arrived {
                    sent.settle();
                    doubted.clear();
                }
                let before = model.insert(page, digest_of(content));
                prop_assert_eq!(sent.insert(page, digest_of(content)), before);
                if before != Some(digest_of(content)) {
                    doubted.insert(page);
                }
            }
            for page in removed {
                sent.remove(page);
                model.remove(&page);
            }
            let missing = sent.missing(&wanted);
            for page in 0..4000 {
                prop_assert_eq!(missing.contains(page), wanted.contains(page) && !model.contains_key(&page));
            }
            let before = model.len();
            model.retain(|page, _| kept.contains(*page));
            prop_assert_eq!(sent.retain(&kept).len(), (before - model.len()) as u64);
            prop_assert_eq!(sent.len(), model.len() as u64);
            let mut digest = SpaceDigest::default();
            for (page, content) in &model {
                prop_assert_eq!(sent.get(*page), Some(content));
                digest.insert(PageNo(*page), content);
            }
            prop_assert!(sent.digest() == digest);
            prop_assert!(model.keys().all(|page| sent.pages().contains(*page)));
            prop_assert_eq!(sent.pages().len(), model.len() as u64);

            // The link is lost: what has arrived for sure stays, and nothing else does.
            let mut forgotten = PageSet::default();
            doubted.iter().filter(|page| model.contains_key(page)).for_each(|page| forgotten.insert(*page, 1));
            prop_assert_eq!(sent.forget_doubted(), forgotten);
            model.retain(|page, _| !doubted.contains(page));
            let mut digest = SpaceDigest::default();
            model.iter().for_each(|(page, content)| digest.insert(PageNo(*page), content));
            prop_assert_eq!((sent.len(), sent.digest()), (model.len() as u64, digest));
            for page in 0..3000 {
                prop_assert_eq!(sent.get(page), model.get(&page));
            }
            prop_assert!(sent.forget_doubted().is_empty());
        }
    }
}
