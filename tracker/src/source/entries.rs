//! The entries of pagemap, read one by one: what every kernel has.

use super::{Answer, still_there};
use crate::page_set::PageSet;
use crate::scope::Span;
use memmap2::MmapMut;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Reads pagemap entries (Documentation/admin-guide/mm/pagemap.rst): 63 present, 62 swapped, 61 of a file
/// or of shared memory, 55 soft-dirty.
#[derive(Debug)]
pub(crate) struct Entries {
    /// The frame of the kernel's page of zeros, as entries show it. `None` where we may not see frames: then it counts
    /// as a page like others.
    zero_frame: Option<u64>,
}

/// The bits of an entry that name the frame of a present page.
const FRAME: u64 = (1 << 55) - 1;
/// 64 KiB at a read: 8192 entries, 32 MiB of memory.
const BUFFER: usize = 64 << 10;

impl Entries {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { zero_frame: zero_frame()? })
    }

    /// Which pages exist, in the sense of [`super::survey`], and which of them have their soft-dirty bit.
    pub(crate) fn read(&self, pagemap: &File, spans: &[Span]) -> io::Result<Answer> {
        let (mut populated, mut dirty) = (Collector::default(), Collector::default());
        let mut buffer = vec![0u8; BUFFER];
        let zero_frame = self.zero_frame.unwrap_or(u64::MAX);
        for span in spans {
            let (mut page, end) = (span.start / 4096, span.end / 4096);
            while page < end {
                for entry in read(pagemap, page, end - page, &mut buffer)? {
                    let there = exists(entry, span.shared, zero_frame);
                    populated.take(page, there);
                    dirty.take(page, there && entry >> 55 & 1 == 1);
                    page += 1;
                }
            }
            populated.end(page);
            dirty.end(page);
        }
        let (populated, dirty) = (populated.pages, dirty.pages);
        still_there(pagemap, Answer { populated, dirty, ..Answer::default() })
    }
}

/// `zero_frame` is one that no page has if it is not known.
#[inline]
fn exists(entry: u64, shared: bool, zero_frame: u64) -> bool {
    let (present, of_file) = (entry >> 63 == 1, entry >> 61 & 1 == 1);
    let swapped = entry >> 62 & 1 == 1 && !is_note(entry);
    let zeros = present && zero_frame == entry & FRAME;
    (present || swapped) && of_file == shared && !zeros
}

/// Makes runs of pages that come one after the other.
#[derive(Default)]
struct Collector {
    pages: PageSet,
    /// Where the run begins that is under way.
    since: Option<u64>,
}

impl Collector {
    #[inline]
    fn take(&mut self, page: u64, is_in: bool) {
        if is_in != self.since.is_some() {
            self.turn(page);
        }
    }

    fn turn(&mut self, page: u64) {
        match self.since.take() {
            None => self.since = Some(page),
            Some(start) => self.pages.insert(start, page - start),
        }
    }

    fn end(&mut self, page: u64) {
        self.take(page, false);
    }
}

/// Up to `count` entries from `page` on, as many as the kernel gives at once.
fn read<'a>(
    pagemap: &File,
    page: u64,
    count: u64,
    buffer: &'a mut [u8],
) -> io::Result<impl Iterator<Item = u64> + use<'a>> {
    let want = (count as usize).min(buffer.len() / 8) * 8;
    let got = pagemap.read_at(&mut buffer[..want], page * 8)?;
    if got < 8 {
        // The address space is gone.
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    let entries = buffer[..got].chunks_exact(8);
    Ok(entries.map(|entry| u64::from_ne_bytes(entry.try_into().expect("chunks of eight"))))
}

/// Whether an entry that says "swapped" is only a note of the kernel's (a "marker": a guard, or that a page that comes there
/// is to be write-protected). It has the last of the 32 types of swap, on every kernel that has notes
/// (include/linux/swap.h). Where we may not see frames there is no type, and it counts as a page.
fn is_note(entry: u64) -> bool {
    entry >> 62 == 1 && entry & 0x1f == 0x1f
}

/// The pages of `pages` that have only a note in the page table.
pub(crate) fn notes(pagemap: &File, pages: &PageSet) -> io::Result<PageSet> {
    let mut notes = PageSet::default();
    let mut buffer = vec![0u8; BUFFER];
    for run in pages.runs() {
        let mut page = run.start;
        while page < run.end() {
            for entry in read(pagemap, page, run.end() - page, &mut buffer)? {
                if is_note(entry) {
                    notes.insert(page, 1);
                }
                page += 1;
            }
        }
    }
    Ok(notes)
}

/// The pages from `page` to `end` that have their soft-dirty bit, whether they exist or not.
pub(crate) fn soft_dirty(pagemap: &File, mut page: u64, end: u64) -> io::Result<PageSet> {
    let mut dirty = Collector::default();
    let mut buffer = vec![0u8; BUFFER.min((end - page) as usize * 8)];
    while page < end {
        for entry in read(pagemap, page, end - page, &mut buffer)? {
            dirty.take(page, entry >> 55 & 1 == 1);
            page += 1;
        }
    }
    dirty.end(page);
    Ok(dirty.pages)
}

/// Which frame a page of ours has that was read and never written.
fn zero_frame() -> io::Result<Option<u64>> {
    let page = MmapMut::map_anon(4096)?;
    std::hint::black_box(page[0]);
    let mut entry = [0; 8];
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, page.as_ptr() as u64 / 4096 * 8)?;
    let entry = u64::from_ne_bytes(entry);
    Ok((entry >> 63 == 1 && entry & FRAME != 0).then_some(entry & FRAME))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_entries_are_pages() {
        const PRESENT: u64 = 1 << 63;
        const SWAPPED: u64 = 1 << 62;
        const OF_FILE: u64 = 1 << 61;
        for (entry, private, shared) in [
            (PRESENT | 5, true, false),
            (PRESENT | 7, false, false),
            (PRESENT | OF_FILE | 5, false, true),
            (SWAPPED | 5, true, false),
            (SWAPPED | 0x1f, false, false),
            (0, false, false),
        ] {
            assert_eq!((exists(entry, false, 7), exists(entry, true, 7)), (private, shared), "{entry:#x}");
        }
    }

    #[test]
    fn runs_are_collected() {
        let mut collector = Collector::default();
        for page in 0..10 {
            collector.take(page, matches!(page, 2..=4 | 6 | 9));
        }
        collector.end(10);
        let runs = [(2, 3), (6, 1), (9, 1)].map(|(start, len)| crate::page_set::Run { start, len });
        assert_eq!(collector.pages.runs(), runs);
    }
}
