//! The entries of pagemap, read one by one: what every kernel has.

use super::{Answer, still_there};
use crate::page_set::PageSet;
use memmap2::MmapMut;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Reads pagemap entries (Documentation/admin-guide/mm/pagemap.rst): 63 present, 62 swapped, 55 soft-dirty.
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

    /// Which pages exist, and which of them have their soft-dirty bit.
    pub(crate) fn read(&self, pagemap: &File, spans: &[(u64, u64)]) -> io::Result<Answer> {
        let (mut populated, mut dirty) = (PageSet::default(), PageSet::default());
        let mut buffer = vec![0u8; BUFFER];
        for (start, end) in spans {
            let (mut page, end) = (start / 4096, end / 4096);
            while page < end {
                let want = ((end - page) as usize * 8).min(buffer.len());
                let got = pagemap.read_at(&mut buffer[..want], page * 8)?;
                if got < 8 {
                    // The address space is gone.
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
                for entry in buffer[..got - got % 8].chunks_exact(8) {
                    let entry = u64::from_ne_bytes(entry.try_into().expect("chunks of eight"));
                    if entry >> 62 != 0 && (entry >> 63 == 0 || self.zero_frame != Some(entry & FRAME)) {
                        populated.insert(page, 1);
                        if entry >> 55 & 1 == 1 {
                            dirty.insert(page, 1);
                        }
                    }
                    page += 1;
                }
            }
        }
        still_there(pagemap, Answer { populated, dirty })
    }
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
