//! Soft-dirty: bit 55 of pagemap, cleared through `clear_refs`. Reading and clearing are two steps, and a write
//! between them would be lost: so the tree stands still meanwhile.

use super::{Answer, DirtySource, WatchError, lazy_spans, still_there, survey};
use crate::page_set::PageSet;
use crate::region::Region;
use crate::sys::pagemap::SOFT_DIRTY;
use crate::target::Target;
use memmap2::MmapMut;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

/// The source over one address space.
#[derive(Debug)]
pub(crate) struct SoftDirty {
    target: Target,
    pagemap: File,
    clear_refs: File,
    /// PAGEMAP_SCAN knows soft-dirty here; otherwise the entries are read one by one.
    scan: bool,
    /// The frame of the kernel's page of zeros, as entries show it. `None` where we may not see frames: then it counts
    /// as a page like others.
    zero_frame: Option<u64>,
    /// Clearing broke off: nobody knows which marks are gone, so everything counts as written.
    spoiled: bool,
}

impl SoftDirty {
    pub(crate) fn new(target: &Target, scan: bool) -> io::Result<Self> {
        Ok(Self {
            target: target.clone(),
            pagemap: target.open_file("pagemap")?,
            clear_refs: target.open_to_write("clear_refs")?,
            scan,
            zero_frame: if scan { None } else { zero_frame()? },
            spoiled: false,
        })
    }

    /// Reads pagemap entries (Documentation/admin-guide/mm/pagemap.rst): 63 present, 62 swapped, 55 soft-dirty.
    fn read_entries(&self, spans: &[(u64, u64)]) -> io::Result<Answer> {
        let (mut populated, mut dirty) = (PageSet::default(), PageSet::default());
        let mut buffer = vec![0u8; 64 << 10];
        for (start, end) in spans {
            let (mut page, end) = (start / 4096, end / 4096);
            while page < end {
                let want = ((end - page) as usize * 8).min(buffer.len());
                let got = self.pagemap.read_at(&mut buffer[..want], page * 8)?;
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
        still_there(&self.pagemap, Answer { populated, dirty })
    }
}

/// The bits of an entry that name the frame of a present page.
const FRAME: u64 = (1 << 55) - 1;

/// Which frame a page of ours has that was read and never written.
fn zero_frame() -> io::Result<Option<u64>> {
    let page = MmapMut::map_anon(4096)?;
    std::hint::black_box(page[0]);
    let mut entry = [0; 8];
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, page.as_ptr() as u64 / 4096 * 8)?;
    let entry = u64::from_ne_bytes(entry);
    Ok((entry >> 63 == 1 && entry & FRAME != 0).then_some(entry & FRAME))
}

impl DirtySource for SoftDirty {
    fn watch(&mut self, _regions: &[Region]) -> Result<(), WatchError> {
        // New mappings carry the bit from their birth.
        Ok(())
    }

    fn collect(&mut self, regions: &[Region], frozen: bool) -> io::Result<Answer> {
        // The file is of the memory that the process had when it was opened; clearing is of what it has now.
        still_there(&self.pagemap, ())?;
        self.pagemap = self.target.open_file("pagemap")?;
        let spans = lazy_spans(regions);
        let mut answer =
            if self.scan { survey(&self.pagemap, &spans, SOFT_DIRTY)? } else { self.read_entries(&spans)? };
        if self.spoiled {
            answer.dirty = answer.populated.clone();
        }
        if !frozen {
            self.clear()?;
        }
        Ok(answer)
    }

    fn clear(&mut self) -> io::Result<()> {
        self.spoiled = true;
        self.clear_refs.write_all(b"4")?;
        self.spoiled = false;
        Ok(())
    }

    fn watches(&self) -> bool {
        true
    }
}
