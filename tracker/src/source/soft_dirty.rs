//! Soft-dirty: bit 55 of pagemap, cleared through `clear_refs`. Reading and clearing are two steps, and a write
//! between them would be lost: so the tree stands still meanwhile.

use super::entries::Entries;
use super::{Answer, DirtySource, WatchError, still_there, survey};
use crate::scope::{Untracked, View};
use crate::sys::pagemap::SOFT_DIRTY;
use crate::target::Target;
use std::fs::File;
use std::io::{self, Write};

/// The source over one address space.
#[derive(Debug)]
pub(crate) struct SoftDirty {
    target: Target,
    pagemap: File,
    /// For the entries, read one by one; without it PAGEMAP_SCAN, where it knows soft-dirty.
    entries: Option<Entries>,
    /// Clearing broke off: nobody knows which marks are gone, so everything counts as written.
    spoiled: bool,
}

impl SoftDirty {
    pub(crate) fn new(target: &Target, scan: bool) -> io::Result<Self> {
        Ok(Self {
            target: target.clone(),
            pagemap: target.open_file("pagemap")?,
            entries: if scan { None } else { Some(Entries::new()?) },
            spoiled: false,
        })
    }
}

impl DirtySource for SoftDirty {
    fn watch(&mut self, _view: &View) -> Result<(), WatchError> {
        // New mappings carry the bit from their birth.
        Ok(())
    }

    fn collect(&mut self, view: &View, frozen: bool) -> io::Result<Answer> {
        // The file is of the memory that the process had when it was opened; clearing is of what it has now.
        still_there(&self.pagemap, ())?;
        self.pagemap = self.target.open_file("pagemap")?;
        let mut answer = match &self.entries {
            Some(entries) => entries.read(&self.pagemap, view.spans())?,
            None => survey(&self.pagemap, view, SOFT_DIRTY)?,
        };
        if self.spoiled {
            answer.dirty = answer.populated.clone();
        }
        for (region, _) in view.watched().filter(|(_, care)| care.huge) {
            let (start, end, reason) =
                (region.start, region.end, "soft-dirty knows no pages of hugetlbfs".to_owned());
            answer.untracked.push(Untracked { start, end, reason, named: true });
        }
        let blind = view.pages(|_, care| care.huge);
        answer.dirty = answer.dirty.union(&blind.intersect(&answer.populated));
        if !frozen {
            self.clear()?;
        }
        Ok(answer)
    }

    fn clear(&mut self) -> io::Result<()> {
        self.spoiled = true;
        // Opened for each time: a descriptor less for each process of a large tree.
        self.target.open_to_write("clear_refs")?.write_all(b"4")?;
        self.spoiled = false;
        Ok(())
    }

    fn watches(&self) -> bool {
        true
    }
}
