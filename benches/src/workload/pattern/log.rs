//! What the pattern workload wrote, and when: the truth with which an estimate of its working set is compared.
//!
//! The file is shared memory in the byte order of the machine: a `u64` count of the records that are whole, the `u64`
//! address of the first page, then the records: `u64` CLOCK_MONOTONIC in nanoseconds, taken after the write, and the
//! `u64` number of the page, counted from the first.

use crate::sys::memory::{Backing, Mapping, PAGE};
use rustix::time::{ClockId, clock_gettime};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::Ordering;

/// Words before the first record.
const HEAD: usize = 2;

/// One write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Write {
    /// CLOCK_MONOTONIC after the write, in nanoseconds.
    pub at_ns: u64,
    /// Page, counted from the first of the field.
    pub page: u64,
}

/// CLOCK_MONOTONIC in nanoseconds: the same clock in all processes of a machine.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// The log of a running workload, on its side or on that of a reader.
#[derive(Debug)]
pub struct Log {
    memory: Mapping,
    records: usize,
}

impl Log {
    /// A new log with space for this many records, of a field that starts at `base`.
    ///
    /// # Errors
    /// What the file system says.
    pub fn create(path: &Path, records: usize, base: u64) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
        let pages = (HEAD + 2 * records).div_ceil(PAGE / 8);
        file.set_len((pages * PAGE) as u64)?;
        let log = Self { memory: Mapping::new(Backing::FileShared(file.as_fd()), pages)?, records };
        log.memory.atomics()[1].store(base, Ordering::Release);
        Ok(log)
    }

    /// The log that a workload writes.
    ///
    /// # Errors
    /// What the file system says; `InvalidData` for a file that is no log.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let bytes = usize::try_from(File::metadata(&file)?.len()).unwrap_or(0);
        let log = Self {
            memory: Mapping::new(Backing::FileShared(file.as_fd()), bytes / PAGE)?,
            records: (bytes / 8).saturating_sub(HEAD) / 2,
        };
        if log.base() == 0 || log.len() > log.records {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "this is no log of writes"));
        }
        Ok(log)
    }

    /// Address of the first page of the field.
    pub fn base(&self) -> u64 {
        self.memory.atomics()[1].load(Ordering::Acquire)
    }

    /// Records that are whole.
    pub fn len(&self) -> usize {
        self.memory.atomics()[0].load(Ordering::Acquire) as usize
    }

    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds the write of a page, with the time that it is now.
    ///
    /// # Errors
    /// `StorageFull` when there is no more space.
    pub fn append(&self, page: usize) -> io::Result<()> {
        let words = self.memory.atomics();
        let count = self.len();
        if count == self.records {
            let full = format!("the log is full after {count} writes: give it more with --log-records");
            return Err(io::Error::new(io::ErrorKind::StorageFull, full));
        }
        words[HEAD + 2 * count].store(monotonic_ns(), Ordering::Relaxed);
        words[HEAD + 2 * count + 1].store(page as u64, Ordering::Relaxed);
        words[0].store(count as u64 + 1, Ordering::Release);
        Ok(())
    }

    /// The writes from the `from`-th on that are there now.
    pub fn writes(&self, from: usize) -> impl Iterator<Item = Write> + '_ {
        let words = self.memory.atomics();
        (from..self.len()).map(|n| Write {
            at_ns: words[HEAD + 2 * n].load(Ordering::Relaxed),
            page: words[HEAD + 2 * n + 1].load(Ordering::Relaxed),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_sees_what_was_written_and_a_full_log_says_so() {
        let folder = tempfile::tempdir().expect("tempdir");
        let path = folder.path().join("log");
        let before = monotonic_ns();
        let log = Log::create(&path, 300, 0x7000_0000).expect("create");
        let reader = Log::open(&path).expect("open");
        assert!(reader.is_empty());
        (0..300).for_each(|page| log.append(7 * page).expect("space"));
        assert_eq!(reader.base(), 0x7000_0000);
        let writes: Vec<Write> = reader.writes(100).collect();
        assert_eq!(
            writes.iter().map(|write| write.page).collect::<Vec<_>>(),
            (100..300).map(|n| 7 * n).collect::<Vec<_>>()
        );
        assert!(writes.is_sorted_by_key(|write| write.at_ns));
        assert!(writes[0].at_ns > before && writes[199].at_ns < monotonic_ns());
        let full = log.append(0).expect_err("no space");
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
        assert_eq!(reader.len(), 300);
    }

    #[test]
    fn another_file_is_no_log() {
        let folder = tempfile::tempdir().expect("tempdir");
        let path = folder.path().join("log");
        std::fs::write(&path, vec![0xff; 2 * PAGE]).expect("write");
        assert_eq!(Log::open(&path).expect_err("no log").kind(), io::ErrorKind::InvalidData);
    }
}
