//! A safe handle on a userfaultfd that serves missing pages.

use crate::sys::uffd as sys;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A userfaultfd, of whatever process.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

/// What the kernel tells.
#[derive(Debug)]
pub enum Event {
    /// A thread waits for a page.
    PageFault {
        /// The address that was touched.
        addr: u64,
        /// Whether it was written.
        write: bool,
    },
    /// The process forked; the child has this userfaultfd.
    Fork {
        /// The child's.
        uffd: OwnedFd,
    },
    /// A range moved (`mremap`).
    Remap {
        /// From here.
        from: u64,
        /// To here.
        to: u64,
        /// So many bytes.
        len: u64,
    },
    /// A range was given back (`madvise`): it reads as zero from now on.
    Remove {
        /// First byte.
        start: u64,
        /// One past the last.
        end: u64,
    },
    /// A range was unmapped.
    Unmap {
        /// First byte.
        start: u64,
        /// One past the last.
        end: u64,
    },
}

/// Why a page could not be put in place.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// There is a page already.
    #[error("a page is there already")]
    Exists,
    /// The address space is changing: read the events, then go on.
    #[error("the address space is changing ({copied} bytes were put in place)")]
    Again {
        /// Bytes that were put in place before.
        copied: usize,
    },
    /// Nothing is registered there (any more).
    #[error("the range is not registered")]
    NotRegistered,
    /// The process is gone.
    #[error("the process is gone")]
    Gone,
    /// Anything else.
    #[error("the kernel refused")]
    Other(#[source] io::Error),
}

fn failed((copied, error): (usize, io::Error)) -> UffdError {
    match error.raw_os_error() {
        Some(libc::EEXIST) => UffdError::Exists,
        Some(libc::EAGAIN) => UffdError::Again { copied },
        Some(libc::ENOENT) => UffdError::NotRegistered,
        Some(libc::ESRCH | libc::ENOSPC) => UffdError::Gone,
        _ => UffdError::Other(error),
    }
}

impl Uffd {
    /// Takes a descriptor over.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Copies whole pages to `dst`, and wakes who waits for them if `wake`. Returns the bytes that were copied:
    /// all of them.
    ///
    /// # Errors
    /// [`UffdError`]; pages before the one that failed may be in place.
    pub fn copy(&self, dst: u64, src: &[u8], wake: bool) -> Result<usize, UffdError> {
        sys::copy(&self.0, dst, src, wake).map_err(failed)
    }

    /// Maps zero pages, and wakes who waits for them.
    ///
    /// # Errors
    /// As [`Uffd::copy`].
    pub fn zeropage(&self, dst: u64, len: u64) -> Result<usize, UffdError> {
        sys::zeropage(&self.0, dst, len).map_err(failed)
    }

    /// Wakes who waits for pages of a range.
    ///
    /// # Errors
    /// When the range makes no sense.
    pub fn wake(&self, dst: u64, len: u64) -> Result<(), UffdError> {
        sys::wake(&self.0, dst, len).map_err(|error| failed((0, error)))
    }

    /// Takes a range out of this userfaultfd.
    ///
    /// # Errors
    /// When nothing is mapped there.
    pub fn unregister(&self, dst: u64, len: u64) -> Result<(), UffdError> {
        sys::unregister(&self.0, dst, dst + len).map_err(|error| failed((0, error)))
    }

    /// Reads what the kernel tells, as much as there is, and appends it to `out`; returns how much it was. The
    /// descriptor should be non-blocking.
    ///
    /// # Errors
    /// When the descriptor cannot be read, or a message is of a kind that was not asked for.
    pub fn read_events(&self, out: &mut Vec<Event>) -> io::Result<usize> {
        const MESSAGE: usize = 32;
        let mut count = 0;
        loop {
            let mut buffer = [0u8; 16 * MESSAGE];
            let got = match rustix::io::read(&self.0, &mut buffer) {
                Ok(0) => return Ok(count),
                Ok(got) => got,
                Err(rustix::io::Errno::AGAIN) => return Ok(count),
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            for message in buffer[..got].chunks_exact(MESSAGE) {
                let word = |at: usize| {
                    u64::from_ne_bytes(message[at..at + 8].try_into().expect("eight bytes of a message"))
                };
                out.push(match message[0] {
                    0x12 => Event::PageFault { addr: word(16), write: word(8) & 1 != 0 },
                    0x13 => Event::Fork { uffd: sys::adopt(word(8) as u32) },
                    0x14 => Event::Remap { from: word(8), to: word(16), len: word(24) },
                    0x15 => Event::Remove { start: word(8), end: word(16) },
                    0x16 => Event::Unmap { start: word(8), end: word(16) },
                    other => {
                        return Err(io::Error::other(format!("an unknown userfaultfd message {other:#x}")));
                    }
                });
                count += 1;
            }
        }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
