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
        let (mut populated, mut dirty) = (PageSet::default(), PageSet::default());
        let mut buffer = vec![0u8; BUFFER];
        for span in spans {
            let (mut page, end) = (span.start / 4096, span.end / 4096);
            while page < end {
                let want = ((end - page) as usize * 8).min(buffer.len());
                let got = pagemap.read_at(&mut buffer[..want], page * 8)?;
                if got < 8 {
                    // The address space is gone.
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
                for entry in buffer[..got - got % 8].chunks_exact(8) {
                    let entry = u64::from_ne_bytes(entry.try_into().expect("chunks of eight"));
                    if self.exists(entry, span.shared) {
                        populated.insert(page, 1);
                        if entry >> 55 & 1 == 1 {
                            dirty.insert(page, 1);
                        }
                    }
                    page += 1;
                }
            }
        }
        still_there(pagemap, Answer { populated, dirty, ..Answer::default() })
    }

    fn exists(&self, entry: u64, shared: bool) -> bool {
        let (present, of_file) = (entry >> 63 == 1, entry >> 61 & 1 == 1);
        let swapped = entry >> 62 & 1 == 1 && !is_note(entry);
        let zeros = present && self.zero_frame == Some(entry & FRAME);
        (present || swapped) && of_file == shared && !zeros
    }
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
            let want = ((run.end() - page) as usize * 8).min(buffer.len());
            let got = pagemap.read_at(&mut buffer[..want], page * 8)?;
            if got < 8 {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            for entry in buffer[..got - got % 8].chunks_exact(8) {
                if is_note(u64::from_ne_bytes(entry.try_into().expect("chunks of eight"))) {
                    notes.insert(page, 1);
                }
                page += 1;
            }
        }
    }
    Ok(notes)
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
