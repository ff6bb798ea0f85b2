//! Reads the bytes of a process' pages.

use crate::page_set::{PageSet, Run};
use crate::region;
use crate::target::Target;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;

const PAGE: usize = 4096;
/// Pieces that the kernel takes at a call (`UIO_MAXIOV`).
const PIECES: usize = 1024;

/// Why pages could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The process has ended.
    #[error("process {0} has ended")]
    Gone(i32),
    /// The buffer is not as long as the pages.
    #[error("{pages} pages do not fit a buffer of {bytes} bytes")]
    Buffer {
        /// Pages that were asked for.
        pages: u64,
        /// Bytes of the buffer.
        bytes: usize,
    },
    /// The kernel refused.
    #[error("could not read page {page:#x} of process {pid}")]
    Io {
        /// Whose.
        pid: i32,
        /// The page that failed.
        page: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Reads pages of one process. Never skips silently: what cannot be read by the quick way (pages that the process
/// itself may not read) is read by the slow one, and what is not there any more is named.
#[derive(Debug)]
pub struct PageReader {
    target: Target,
    memory: File,
}

impl PageReader {
    /// A reader of the memory that `target` has now: after an `exec` it is of no use any more.
    ///
    /// # Errors
    /// When the process has ended, or may not be read.
    pub fn new(target: &Target) -> Result<Self, ReadError> {
        let pid = target.pid();
        let memory =
            File::open(format!("/proc/{pid}/mem")).map_err(|source| match source.raw_os_error() {
                // It is ending: its memory goes a moment before it has ended for everybody else.
                Some(libc::ESRCH | libc::ENOENT) => ReadError::Gone(pid),
                _ => ReadError::Io { pid, page: 0, source },
            })?;
        if !target.is_alive() {
            return Err(ReadError::Gone(pid));
        }
        Ok(Self { target: target.clone(), memory })
    }

    /// Whose memory it reads.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Reads the pages of `runs`, one after the other, into `buffer`, which has to be exactly as long. Returns the
    /// pages that are not mapped any more; their part of the buffer is zero.
    ///
    /// # Errors
    /// [`ReadError`]; the buffer's content means nothing then.
    pub fn read(&self, runs: &[Run], buffer: &mut [u8]) -> Result<Vec<u64>, ReadError> {
        let pid = self.target.pid();
        let pages: u64 = runs.iter().map(|run| run.len).sum();
        if pages as usize * PAGE != buffer.len() {
            return Err(ReadError::Buffer { pages, bytes: buffer.len() });
        }
        let mut missing = Vec::new();
        let mut sealed: Option<PageSet> = None;
        let mut done = 0usize;
        let mut remote = Vec::with_capacity(runs.len().min(PIECES));
        while done < buffer.len() {
            remote.clear();
            let mut skip = done as u64 / PAGE as u64;
            for run in runs {
                if skip >= run.len {
                    skip -= run.len;
                    continue;
                }
                let base = (run.start + skip) as usize * PAGE;
                remote.push(RemoteIoVec { base, len: (run.len - skip) as usize * PAGE });
                skip = 0;
                if remote.len() == PIECES {
                    break;
                }
            }
            let mut local = [IoSliceMut::new(&mut buffer[done..])];
            match process_vm_readv(Pid::from_raw(pid), &mut local, &remote) {
                Ok(got) if got >= PAGE => {
                    done += got - got % PAGE;
                    continue;
                }
                Ok(_) | Err(nix::Error::EFAULT) => {}
                Err(nix::Error::ESRCH) => return Err(ReadError::Gone(pid)),
                Err(errno) => {
                    let page = page_at(runs, done);
                    return Err(ReadError::Io { pid, page, source: errno.into() });
                }
            }
            // The first page of the rest is the one that failed.
            let page = page_at(runs, done);
            if !self.read_one(page, &mut buffer[done..done + PAGE])? {
                // Or it is there, and the kernel refuses (`proc_mem.force_override=never`): that is no hole.
                let sealed = match &mut sealed {
                    Some(sealed) => sealed,
                    none => none.insert(sealed_pages(&self.target)?),
                };
                if sealed.contains(page) && !self.read_one(page, &mut buffer[done..done + PAGE])? {
                    let source = io::Error::from(io::ErrorKind::PermissionDenied);
                    return Err(ReadError::Io { pid, page, source });
                }
                if !sealed.contains(page) {
                    missing.push(page);
                }
            }
            done += PAGE;
        }
        if !self.target.is_alive() {
            return Err(ReadError::Gone(pid));
        }
        Ok(missing)
    }

    /// Reads a page through `/proc/PID/mem`, which does not ask for the page's protection; false if there is none.
    fn read_one(&self, page: u64, buffer: &mut [u8]) -> Result<bool, ReadError> {
        let pid = self.target.pid();
        match self.memory.read_exact_at(buffer, page * PAGE as u64) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EIO) => {
                buffer.fill(0);
                Ok(false)
            }
            // No bytes at all: the address space itself is gone.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(ReadError::Gone(pid)),
            Err(source) => Err(ReadError::Io { pid, page, source }),
        }
    }
}

/// Pages of mappings that the process itself may not read.
fn sealed_pages(target: &Target) -> Result<PageSet, ReadError> {
    let pid = target.pid();
    let regions = region::read(target).map_err(|error| match target.is_alive() {
        true => ReadError::Io { pid, page: 0, source: io::Error::other(error) },
        false => ReadError::Gone(pid),
    })?;
    let sealed = regions.iter().filter(|region| !region.read);
    Ok(sealed.map(|region| Run { start: region.start / 4096, len: region.pages() }).collect())
}

/// The page that stands at byte `offset` of the buffer.
fn page_at(runs: &[Run], offset: usize) -> u64 {
    let mut skip = (offset / PAGE) as u64;
    for run in runs {
        if skip < run.len {
            return run.start + skip;
        }
        skip -= run.len;
    }
    0
}
