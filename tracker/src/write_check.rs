//! Whether pages were written since the last collect, without taking part in it.

use crate::page_set::{PageSet, Run};
use crate::probe::TrackerKind;
use crate::source::soft_dirty_entries;
use crate::sys::pagemap::{self, Query, SOFT_DIRTY, WPALLOWED, WRITTEN};
use crate::target::Target;
use std::fs::File;
use std::io;

/// Runs with fewer pages between them than a page table has are looked at in one walk.
const TABLE: u64 = 512;

/// Looks at the marks that a tracker of the same process will collect next, and leaves them as they are. Any thread may look,
/// at any time: the answer is of that moment.
///
/// It says what has been seen of writes so far, so it is good for guesses only. A page that is named is named by the next
/// collect too, unless it is gone by then; one that is not named may be written a moment later.
#[derive(Debug)]
pub struct WriteCheck {
    pagemap: File,
    marks: Marks,
}

#[derive(Clone, Copy, Debug)]
enum Marks {
    /// Pages that have all of these categories.
    Scan(u64),
    Entries,
}

impl WriteCheck {
    /// For the memory that `target` has now, and a tracker of this kind; `None` if that has no marks.
    ///
    /// # Errors
    /// When the process has ended, or may not be looked at.
    pub fn new(target: &Target, kind: TrackerKind) -> io::Result<Option<Self>> {
        let marks = match kind {
            TrackerKind::UffdWp => Marks::Scan(WPALLOWED | WRITTEN),
            TrackerKind::SoftDirtyScan => Marks::Scan(SOFT_DIRTY),
            TrackerKind::SoftDirty => Marks::Entries,
            TrackerKind::Compare => return Ok(None),
        };
        Ok(Some(Self { pagemap: target.open_file("pagemap")?, marks }))
    }

    /// The pages of `runs`, which come in order, that were written since the last collect. Page numbers.
    ///
    /// # Errors
    /// What the kernel said; `ESRCH` when the memory is gone.
    pub fn written(&self, runs: &[Run]) -> io::Result<PageSet> {
        let mut found = PageSet::default();
        for near in runs.chunk_by(|one, next| next.start.saturating_sub(one.end()) < TABLE) {
            let (Some(first), Some(last)) = (near.first(), near.last()) else { continue };
            match self.marks {
                Marks::Scan(mask) => {
                    let query = Query { mask, returned: mask, ..Query::default() };
                    pagemap::scan(&self.pagemap, first.start * 4096, last.end() * 4096, query, |stretch| {
                        found.insert(stretch.start / 4096, (stretch.end - stretch.start) / 4096);
                    })?;
                }
                Marks::Entries => found.absorb(soft_dirty_entries(&self.pagemap, first.start, last.end())?),
            }
        }
        Ok(found.intersect(&runs.iter().copied().collect()))
    }
}
