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
mod known;
mod reach;
pub(crate) mod soft_dirty;
pub(crate) mod uffd_wp;

pub(crate) use entries::soft_dirty as soft_dirty_entries;

use crate::inject::InjectError;
use crate::page_set::{PageSet, Run};
use crate::scope::{Span, Untracked, View};
use crate::sys::pagemap::{self, FILE, GUARD, PFNZERO, PRESENT, Query, SWAPPED};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::time::Duration;

/// What a source has to say about a space.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    /// Pages of watched mappings, by address: of private ones those that are the program's own, in memory or in swap; of
    /// shared ones those that it has mapped in.
    pub(crate) populated: PageSet,
    /// Of these, the ones that may have been written.
    pub(crate) dirty: PageSet,
    /// Mappings that this source cannot watch; their pages are all dirty.
    pub(crate) untracked: Vec<Untracked>,
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
    fn watch(&mut self, view: &View) -> Result<(), WatchError>;

    /// What was written since the last call. `frozen`: nothing runs, and nothing will before this source is
    /// either asked again or dropped; the bits may be left as they are.
    fn collect(&mut self, view: &View, frozen: bool) -> io::Result<Answer>;

    /// Forgets what was written so far, without looking.
    fn clear(&mut self) -> io::Result<()>;

    /// Whether it watches at all. One that does not calls everything dirty.
    fn watches(&self) -> bool;

    /// How long one thread of the process was stopped, so that it could be watched.
    fn attach_stop(&self) -> Duration {
        Duration::ZERO
    }
}

/// Runs `query` over the spans, and returns the pages that match. One walk from the first to the last span: the
/// kernel skips what is not mapped quicker than we could ask again. What it finds is only true if the space still exists
/// afterwards ([`still_there`]).
pub(crate) fn matching(pagemap_file: &File, spans: &[Span], query: Query) -> io::Result<PageSet> {
    let mut pages = PageSet::default();
    let (Some(first), Some(last)) = (spans.first(), spans.last()) else { return Ok(pages) };
    let mut at = 0;
    pagemap::scan(pagemap_file, first.start, last.end, query, |found| {
        let mut start = found.start;
        // A scan may go back (see `pagemap::scan`), and what it reports then counts like everything else: a page
        // that was reported is protected again, and would not be reported twice.
        if at > 0 && (at >= spans.len() || spans[at - 1].end > start) {
            at = spans.partition_point(|span| span.end <= start);
        }
        while start < found.end && at < spans.len() {
            let Span { start: from, end: to, .. } = spans[at];
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
    Ok(pages)
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
/// category `mark`: one walk for both. Of a private mapping of a file only the pages count that were changed: they are
/// the file's no more. Of a shared one only those that are mapped in: the kernel says "swapped" also of notes that it
/// keeps where no page is.
///
/// Asks for the others and takes the complement: the kernel spends five times as long on a page that it reports as
/// on one that it passes by (11 ns and 2 ns), and most pages of a program exist, and were not written lately.
/// What is unmapped while a program runs counts as existing until the next survey.
pub(crate) fn survey(pagemap_file: &File, view: &View, mark: u64) -> io::Result<Answer> {
    survey_spans(pagemap_file, view.spans(), view.has_files(), mark)
}

/// The same of a part of the mappings; `has_files` if there are any of files or of shared memory.
fn survey_spans(pagemap_file: &File, spans: &[Span], has_files: bool, mark: u64) -> io::Result<Answer> {
    let file = if has_files { FILE } else { 0 };
    let query = Query {
        inverted: PRESENT,
        any_of: PRESENT | PFNZERO | file | mark,
        returned: PRESENT | SWAPPED | PFNZERO | file | mark | guard_category(),
        ..Query::default()
    };
    let (Some(first), Some(last)) = (spans.first(), spans.last()) else {
        return still_there(pagemap_file, Answer::default());
    };
    let (mut others, mut marked, mut of_files) = <(PageSet, PageSet, PageSet)>::default();
    let mut swapped = PageSet::default();
    pagemap::scan(pagemap_file, first.start, last.end, query, |found| {
        let exists = found.categories & (PRESENT | SWAPPED) != 0 && found.categories & (PFNZERO | GUARD) == 0;
        let (start, len) = (found.start / 4096, (found.end - found.start) / 4096);
        if !exists {
            return others.insert(start, len);
        }
        if found.categories & mark != 0 {
            marked.insert(start, len);
        }
        if found.categories & file != 0 {
            of_files.insert(start, len);
        } else if found.categories & SWAPPED != 0 {
            swapped.insert(start, len);
        }
    })?;
    let of = |shared| all(spans.iter().filter(|span| span.shared == shared));
    let mut populated = of(false).subtract(&others).subtract(&of_files);
    // Where a protected page of a file's mapping was given back the kernel keeps a note, and calls that swapped too; and
    // it makes one where a page has gone that a scan took for existing (`known`).
    let doubtful = swapped.intersect(&populated);
    populated = populated.subtract(&entries::notes(pagemap_file, &doubtful)?);
    let shared = of(true);
    if !shared.is_empty() {
        populated = populated.union(&of_files.intersect(&shared));
    }
    let dirty = marked.intersect(&populated);
    still_there(pagemap_file, Answer { populated, dirty, ..Answer::default() })
}

/// Pages that exist, in the sense of [`survey`], by the way that this kernel has.
pub(crate) fn existing(pagemap_file: &File, view: &View) -> io::Result<PageSet> {
    let answer = match compare::scan_works() {
        true => survey(pagemap_file, view, 0)?,
        false => entries::Entries::new()?.read(pagemap_file, view.spans())?,
    };
    Ok(answer.populated)
}

/// The pages of spans.
pub(crate) fn all<'a>(spans: impl IntoIterator<Item = &'a Span>) -> PageSet {
    let run = |span: &Span| Run { start: span.start / 4096, len: (span.end - span.start) / 4096 };
    spans.into_iter().map(run).collect()
}
