//! The comparison of contents: a digest of every page, held against the digest of the look before. Needs no dirty
//! tracking of the kernel, and reads all of the memory at every look.
//!
//! A page counts as written when its digest (128-bit XXH3) is another, or when it is new. What that means exactly:
//!
//! - A page that was written with the bytes that it had before is not written. Nor is one that was changed and changed
//!   back between two looks.
//! - A write during the look is not lost. If it lands behind the page's reading, the digest is the old one and the next
//!   look finds another. If it lands in the middle, the digest is of bytes that the page never had as a whole (a torn
//!   read); the page is named now, because that digest is not the old one, or else at the next look, because then
//!   the whole page has another digest than its half did. Should the half's digest equal both, the bytes do.
//! - Who copies pages after a look may copy bytes that the page had only for a moment: it reads B where this source read A,
//!   before and after. No look at a running program can find that. So a look at a *frozen* program names every page
//!   and reads none: whoever copies compares what he reads then with what he copied before. After a frozen look the
//!   digests are no base any more (they are older than what was copied), and the next look names everything too.
//!
//! Two pages of other bytes with the same digest: 2^-128 for each comparison, if nobody wants it. XXH3 is no
//! cryptographic hash, and a program that searches for such pages can find them; it harms itself only.

use super::entries::Entries;
use super::{Answer, DirtySource, WatchError, still_there, survey};
use crate::page_set::{PageSet, Run};
use crate::read::{PageReader, ReadError};
use crate::scope::View;
use crate::sys::pagemap::{self, PRESENT, Query};
use crate::target::Target;
use std::fs::File;
use std::io;
use std::sync::OnceLock;
use xxhash_rust::xxh3::xxh3_128;

const PAGE: usize = 4096;
/// Pages that are read at a time: 256 KiB stay in the processor's cache until they are digested.
const BATCH: u64 = 64;

/// The source over one address space. It leaves no trace there.
#[derive(Debug)]
pub(crate) struct Compare {
    target: Target,
    pagemap: File,
    /// For what exists, where PAGEMAP_SCAN does not say it.
    entries: Option<Entries>,
    base: Base,
}

/// What the pages had at the last look.
#[derive(Debug, Default)]
struct Base {
    pages: PageSet,
    /// Of each of `pages`, in their order.
    digests: Vec<u128>,
}

impl Compare {
    pub(crate) fn new(target: &Target) -> io::Result<Self> {
        Ok(Self {
            target: target.clone(),
            pagemap: target.open_file("pagemap")?,
            entries: if scan_works() { None } else { Some(Entries::new()?) },
            base: Base::default(),
        })
    }

    fn populated(&self, view: &View) -> io::Result<PageSet> {
        let answer = match &self.entries {
            Some(entries) => entries.read(&self.pagemap, view.spans())?,
            None => survey(&self.pagemap, view, 0)?,
        };
        Ok(answer.populated)
    }

    /// The digests that the pages have now, of those that can be read.
    fn digest(&self, populated: &PageSet) -> io::Result<Base> {
        let reader = PageReader::new(&self.target).map_err(refused)?;
        let mut now =
            Base { pages: PageSet::default(), digests: Vec::with_capacity(populated.len() as usize) };
        let mut buffer = vec![0; BATCH as usize * PAGE];
        for batch in batches(populated.runs()) {
            let pages: u64 = batch.iter().map(|run| run.len).sum();
            let bytes = &mut buffer[..pages as usize * PAGE];
            let mut missing = reader.read(&batch, bytes).map_err(refused)?.into_iter().peekable();
            let numbers = batch.iter().flat_map(|run| run.start..run.end());
            for (page, bytes) in numbers.zip(bytes.chunks_exact(PAGE)) {
                // It is gone since we asked what exists, or nobody may read it (a guard page).
                if missing.next_if_eq(&page).is_none() {
                    now.pages.insert(page, 1);
                    now.digests.push(xxh3_128(bytes));
                }
            }
        }
        Ok(now)
    }
}

impl Base {
    /// Pages that `self` had with other bytes, or had not.
    fn changed_to(&self, now: &Base) -> PageSet {
        let mut changed = PageSet::default();
        let mut before = self.pages.iter().zip(&self.digests).peekable();
        for (page, digest) in now.pages.iter().zip(&now.digests) {
            while before.next_if(|(old, _)| *old < page).is_some() {}
            if before.next_if(|(old, _)| *old == page).is_none_or(|(_, old)| old != digest) {
                changed.insert(page, 1);
            }
        }
        changed
    }
}

impl DirtySource for Compare {
    fn watch(&mut self, _view: &View) -> Result<(), WatchError> {
        // What is not in the base is new, wherever it lies.
        Ok(())
    }

    fn collect(&mut self, view: &View, frozen: bool) -> io::Result<Answer> {
        // The file is of the memory that the process had when it was opened; reading is of what it has now.
        still_there(&self.pagemap, ())?;
        self.pagemap = self.target.open_file("pagemap")?;
        let populated = self.populated(view)?;
        if frozen {
            self.base = Base::default();
            return Ok(Answer { dirty: populated.clone(), populated, ..Answer::default() });
        }
        let now = match self.digest(&populated) {
            Ok(now) => now,
            // What a process that ends says of itself depends on how far it has come.
            Err(error) => return Err(still_there(&self.pagemap, error)?),
        };
        let dirty = self.base.changed_to(&now);
        still_there(&self.pagemap, ())?;
        self.base = now;
        Ok(Answer { populated: self.base.pages.clone(), dirty, ..Answer::default() })
    }

    fn clear(&mut self) -> io::Result<()> {
        // There are no marks: what was collected last is the base already.
        Ok(())
    }

    fn watches(&self) -> bool {
        true
    }
}

/// Pieces of at most [`BATCH`] pages, each a few runs or a part of one.
fn batches(runs: &[Run]) -> impl Iterator<Item = Vec<Run>> {
    let mut rest = runs.iter().copied();
    let mut open: Option<Run> = None;
    std::iter::from_fn(move || {
        let (mut batch, mut room) = (Vec::new(), BATCH);
        while room > 0
            && let Some(run) = open.take().or_else(|| rest.next())
        {
            let len = run.len.min(room);
            batch.push(Run { start: run.start, len });
            room -= len;
            open = (run.len > len).then_some(Run { start: run.start + len, len: run.len - len });
        }
        (!batch.is_empty()).then_some(batch)
    })
}

fn refused(error: ReadError) -> io::Error {
    match error {
        ReadError::Gone(_) => io::Error::from_raw_os_error(libc::ESRCH),
        // Its folder in /proc is gone, or its memory.
        ReadError::Io { source, .. } if matches!(source.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {
            io::Error::from_raw_os_error(libc::ESRCH)
        }
        other => io::Error::other(other),
    }
}

/// Whether PAGEMAP_SCAN says what exists: it does since it came, or is not there.
pub(super) fn scan_works() -> bool {
    static WORKS: OnceLock<bool> = OnceLock::new();
    *WORKS.get_or_init(|| {
        let query = Query { mask: PRESENT, returned: PRESENT, ..Query::default() };
        let here = &raw const query as u64 / 4096 * 4096;
        let mut seen = false;
        let scanned = File::open("/proc/self/pagemap")
            .and_then(|file| pagemap::scan(&file, here, here + 4096, query, |_| seen = true));
        scanned.is_ok() && seen
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn base(pages: &BTreeMap<u64, u128>) -> Base {
        let mut base = Base::default();
        for (page, digest) in pages {
            base.pages.insert(*page, 1);
            base.digests.push(*digest);
        }
        base
    }

    proptest! {
        #[test]
        fn what_changed_is_what_a_map_says(
            before in proptest::collection::btree_map(0u64..40, 0u128..3, 0..30),
            now in proptest::collection::btree_map(0u64..40, 0u128..3, 0..30),
        ) {
            let wanted: Vec<u64> =
                now.iter().filter(|(page, digest)| before.get(page) != Some(digest)).map(|(page, _)| *page).collect();
            prop_assert_eq!(base(&before).changed_to(&base(&now)).iter().collect::<Vec<_>>(), wanted);
        }

        #[test]
        fn batches_hold_every_page_once(runs in proptest::collection::vec((1u64..9, 1u64..200), 0..20)) {
            let mut set = PageSet::default();
            let mut at = 0;
            for (gap, len) in runs {
                set.insert(at + gap, len);
                at += gap + len;
            }
            let batches: Vec<Vec<Run>> = batches(set.runs()).collect();
            let size = |batch: &Vec<Run>| batch.iter().map(|run| run.len).sum::<u64>();
            prop_assert!(batches.iter().rev().skip(1).all(|batch| size(batch) == BATCH));
            prop_assert!(batches.iter().all(|batch| (1..=BATCH).contains(&size(batch))));
            let pages: Vec<u64> = batches.iter().flatten().flat_map(|run| run.start..run.end()).collect();
            prop_assert_eq!(pages, set.iter().collect::<Vec<_>>());
        }
    }
}
