//! What a dirty bit means, and where it comes from.
//!
//! Every source answers one question about one address space: which pages may differ from what they were when the
//! question was last asked? "May" is the important word. A source can name too many pages (a soft-dirty huge page
//! stands for 512 small ones; two mappings that the kernel merges show as dirty altogether), and those cost a
//! comparison of digests. It must never name too few.
//!
//! Asking changes the answer: bits are cleared as they are read. So whatever was collected and then not delivered
//! (a link that broke, a round that was given up) has to come back with the next answer. [`crate::Tracker`]
//! keeps it until it is acknowledged; the sources need not know.
//!
//! And there are pages that no source knows anything of: those of mappings that cannot be tracked, and those that
//! the kernel forgot to mark (soft-dirty is lost when certain mappings merge). The first are named dirty at every
//! question. Against the second stands a rule of whoever sends: a page that the other side was never given is
//! sent, whatever its bit says.

pub(crate) mod compare;
mod entries;
pub(crate) mod soft_dirty;
pub(crate) mod uffd_wp;

use crate::inject::InjectError;
use crate::page_set::{PageSet, Run};
use crate::region::Region;
use crate::sys::pagemap::{self, GUARD, PFNZERO, PRESENT, Query, SWAPPED};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

/// What a source has to say about a space.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    /// Pages of lazy regions that are in memory or in swap.
    pub(crate) populated: PageSet,
    /// Of these, the ones that may have been written.
    pub(crate) dirty: PageSet,
}

/// Why mappings cannot be watched.
#[derive(Debug)]
pub(crate) enum WatchError {
    /// The process could not be prepared.
    Inject(InjectError),
    /// The kernel refused; `ESRCH` when the memory is gone.
    Io(io::Error),
}

impl From<io::Error> for WatchError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// A source of dirty pages for one address space. All errors are `ESRCH` when that is gone.
pub(crate) trait DirtySource: std::fmt::Debug + Send {
    /// Begins to watch mappings that are new. The program may run, and the process may be stopped for it.
    fn watch(&mut self, regions: &[Region]) -> Result<(), WatchError>;

    /// What was written since the last call. `frozen`: nothing runs, and nothing will before this source is
    /// either asked again or dropped; the bits may be left as they are.
    fn collect(&mut self, regions: &[Region], frozen: bool) -> io::Result<Answer>;

    /// Forgets what was written so far, without looking.
    fn clear(&mut self) -> io::Result<()>;

    /// Whether it watches at all. One that does not calls everything dirty.
    fn watches(&self) -> bool;
}

/// Merges the lazy regions that lie next to each other: fewer, longer scans.
pub(crate) fn lazy_spans(regions: &[Region]) -> Vec<(u64, u64)> {
    let mut spans: Vec<(u64, u64)> = Vec::new();
    for region in regions.iter().filter(|region| region.can_be_lazy()) {
        match spans.last_mut() {
            Some(last) if last.1 == region.start => last.1 = region.end,
            _ => spans.push((region.start, region.end)),
        }
    }
    spans
}

/// Runs `query` over the spans, and returns the pages that match. One walk from the first to the last span: the
/// kernel skips what is not mapped quicker than we could ask again.
pub(crate) fn matching(pagemap_file: &File, spans: &[(u64, u64)], query: Query) -> io::Result<PageSet> {
    let mut pages = PageSet::default();
    let (Some(first), Some(last)) = (spans.first(), spans.last()) else {
        return still_there(pagemap_file, pages);
    };
    let mut at = 0;
    pagemap::scan(pagemap_file, first.0, last.1, query, |found| {
        let mut start = found.start;
        // A scan may go back (see `pagemap::scan`), and what it reports then counts like everything else: a page
        // that was reported is protected again, and would not be reported twice.
        if at > 0 && (at >= spans.len() || spans[at - 1].1 > start) {
            at = spans.partition_point(|span| span.1 <= start);
        }
        while start < found.end && at < spans.len() {
            let (from, to) = spans[at];
            if to <= start {
                at += 1;
                continue;
            }
            if from >= found.end {
                break;
            }
            let (low, high) = (start.max(from), found.end.min(to));
            pages.insert(low / 4096, (high - low) / 4096);
            start = high;
        }
    })?;
    still_there(pagemap_file, pages)
}

/// Passes a result on if the address space that the file was opened for still exists, else `ESRCH`. PAGEMAP_SCAN says
/// so only on newer kernels; on 6.12 it finds nothing in a space that is gone, as if it were empty. A read of no bytes
/// says it on all. After the scan: what is there then was there all the time.
fn still_there<T>(pagemap_file: &File, result: T) -> io::Result<T> {
    match pagemap_file.read_at(&mut [0; 8], 0)? {
        0 => Err(io::Error::from_raw_os_error(libc::ESRCH)),
        _ => Ok(result),
    }
}

/// `PAGE_IS_GUARD` if this kernel knows it, else nothing.
fn guard_category() -> u64 {
    static KNOWN: OnceLock<u64> = OnceLock::new();
    *KNOWN.get_or_init(|| {
        let query = Query { mask: PRESENT, returned: GUARD, ..Query::default() };
        let known = File::open("/proc/self/pagemap").and_then(|file| {
            let here = &raw const query as u64 / 4096 * 4096;
            pagemap::scan(&file, here, here + 4096, query, |_| {})
        });
        if known.is_ok() { GUARD } else { 0 }
    })
}

/// Pages that exist (in memory or in swap, but not the kernel's shared page of zeros, nor a guard), and which of them have the
/// category `mark`: one walk for both.
///
/// Asks for the others and takes the complement: the kernel spends five times as long on a page that it reports as
/// on one that it passes by (11 ns and 2 ns), and most pages of a program exist, and were not written lately.
/// What is unmapped while a program runs counts as existing until the next look.
pub(crate) fn survey(pagemap_file: &File, spans: &[(u64, u64)], mark: u64) -> io::Result<Answer> {
    let query = Query {
        inverted: PRESENT,
        any_of: PRESENT | PFNZERO | mark,
        returned: PRESENT | SWAPPED | PFNZERO | mark | guard_category(),
        ..Query::default()
    };
    let (Some(first), Some(last)) = (spans.first(), spans.last()) else {
        return still_there(pagemap_file, Answer::default());
    };
    let (mut others, mut marked) = (PageSet::default(), PageSet::default());
    pagemap::scan(pagemap_file, first.0, last.1, query, |found| {
        let exists = found.categories & (PRESENT | SWAPPED) != 0 && found.categories & (PFNZERO | GUARD) == 0;
        let set = match (exists, found.categories & mark != 0) {
            (false, _) => &mut others,
            (true, true) => &mut marked,
            (true, false) => return,
        };
        set.insert(found.start / 4096, (found.end - found.start) / 4096);
    })?;
    let all: PageSet =
        spans.iter().map(|(start, end)| Run { start: start / 4096, len: (end - start) / 4096 }).collect();
    let populated = all.subtract(&others);
    let dirty = marked.intersect(&populated);
    still_there(pagemap_file, Answer { populated, dirty })
}
