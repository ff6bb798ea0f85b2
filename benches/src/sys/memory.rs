//! Owned memory mappings with the odd properties that a migration has to carry over.

use rustix::mm::{self, Advice, MapFlags, MprotectFlags, MremapFlags, ProtFlags};
use std::ffi::c_void;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::{io, slice};

/// Size of a page in bytes.
pub const PAGE: usize = 4096;

/// What a mapping is made of.
#[derive(Clone, Copy, Debug)]
pub enum Backing<'a> {
    /// `MAP_PRIVATE | MAP_ANONYMOUS`.
    Private,
    /// `MAP_SHARED | MAP_ANONYMOUS`.
    Shared,
    /// `MAP_PRIVATE` of a file: written pages are copies.
    FilePrivate(BorrowedFd<'a>),
    /// `MAP_SHARED` of a file (or memfd).
    FileShared(BorrowedFd<'a>),
}

/// What may be done with a mapping's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// `PROT_NONE`.
    None,
    /// `PROT_READ`.
    Read,
    /// `PROT_READ | PROT_WRITE`.
    ReadWrite,
}

/// A mapping that belongs to its owner alone and is unmapped on drop.
///
/// Invariant: `base..base + bytes` is page aligned, not empty, mapped by this value with at least `access`, and
/// referenced by no other `Mapping`.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
    access: Access,
}

// SAFETY: a mapping is plain memory owned by the value; nothing about it is bound to the thread that made it.
unsafe impl Send for Mapping {}
// SAFETY: through a shared reference it is only read, or changed through atomics.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `pages` fresh pages, readable and writable.
    ///
    /// # Errors
    /// What mmap says; `InvalidInput` for no pages at all.
    pub fn new(backing: Backing<'_>, pages: usize) -> io::Result<Self> {
        if pages == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a mapping has at least one page"));
        }
        let bytes = pages * PAGE;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let at = std::ptr::null_mut();
        let base = match backing {
            // SAFETY: no fixed address is asked for, so the kernel chooses a range that nothing else uses.
            Backing::Private => unsafe { mm::mmap_anonymous(at, bytes, prot, MapFlags::PRIVATE) },
            // SAFETY: as above.
            Backing::Shared => unsafe { mm::mmap_anonymous(at, bytes, prot, MapFlags::SHARED) },
            // SAFETY: as above; a private mapping does not even see later writes to pages it has copied.
            Backing::FilePrivate(fd) => unsafe { mm::mmap(at, bytes, prot, MapFlags::PRIVATE, fd, 0) },
            // SAFETY: as above; the callers' files are their own (a memfd nobody else has).
            Backing::FileShared(fd) => unsafe { mm::mmap(at, bytes, prot, MapFlags::SHARED, fd, 0) },
        }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, bytes, access: Access::ReadWrite })
    }

    /// First address.
    pub fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Length in pages.
    pub fn pages(&self) -> usize {
        self.bytes / PAGE
    }

    /// The content.
    ///
    /// # Panics
    /// If the mapping is not readable now.
    pub fn words(&self) -> &[u64] {
        assert!(self.access >= Access::Read, "this mapping cannot be read now");
        // SAFETY: by the type's invariant the range is mapped, readable (just asserted), aligned to pages and
        // ours; every bit pattern is a u64, and writing needs `&mut self`.
        unsafe { slice::from_raw_parts(self.base.as_ptr().cast(), self.bytes / 8) }
    }

    /// The content, to write.
    ///
    /// # Panics
    /// If the mapping is not writable now.
    pub fn words_mut(&mut self) -> &mut [u64] {
        assert!(self.access == Access::ReadWrite, "this mapping cannot be written now");
        // SAFETY: as in `words`; `&mut self` makes this the only reference.
        unsafe { slice::from_raw_parts_mut(self.base.as_ptr().cast(), self.bytes / 8) }
    }

    /// The content as atomics, for memory that several processes share.
    ///
    /// # Panics
    /// If the mapping is not writable now.
    pub fn atomics(&self) -> &[AtomicU64] {
        assert!(self.access == Access::ReadWrite, "this mapping cannot be written now");
        // SAFETY: as in `words`; an AtomicU64 has the size and bit validity of u64 and may change under `&self`.
        // `words` and `atomics` of one mapping are not used side by side: callers keep a mapping to one purpose.
        unsafe { slice::from_raw_parts(self.base.as_ptr().cast(), self.bytes / 8) }
    }

    /// Changes the protection of the whole mapping.
    ///
    /// # Errors
    /// What mprotect says.
    pub fn protect(&mut self, access: Access) -> io::Result<()> {
        let flags = match access {
            Access::None => MprotectFlags::empty(),
            Access::Read => MprotectFlags::READ,
            Access::ReadWrite => MprotectFlags::READ | MprotectFlags::WRITE,
        };
        // SAFETY: the range is ours, and `&mut self` says that no slice of it is alive.
        unsafe { mm::mprotect(self.pointer(), self.bytes, flags) }?;
        self.access = access;
        Ok(())
    }

    /// Locks all pages in memory.
    ///
    /// # Errors
    /// What mlock says.
    pub fn lock(&self) -> io::Result<()> {
        // SAFETY: the range is ours; locking does not change its content.
        Ok(unsafe { mm::mlock(self.pointer(), self.bytes) }?)
    }

    /// Asks for transparent huge pages.
    ///
    /// # Errors
    /// What madvise says.
    pub fn prefer_huge_pages(&self) -> io::Result<()> {
        // SAFETY: the range is ours; this advice does not change its content.
        Ok(unsafe { mm::madvise(self.pointer(), self.bytes, Advice::LinuxHugepage) }?)
    }

    /// Asks for no transparent huge pages, whatever the machine's default.
    ///
    /// # Errors
    /// What madvise says.
    pub fn avoid_huge_pages(&self) -> io::Result<()> {
        // SAFETY: the range is ours; this advice does not change its content.
        Ok(unsafe { mm::madvise(self.pointer(), self.bytes, Advice::LinuxNoHugepage) }?)
    }

    /// Gives `pages` pages from page `start` on back to the kernel: private anonymous ones read as zeros then.
    ///
    /// # Errors
    /// What madvise says.
    ///
    /// # Panics
    /// If the range is not inside of the mapping.
    pub fn forget(&mut self, start: usize, pages: usize) -> io::Result<()> {
        assert!(pages <= self.pages() && start <= self.pages() - pages, "range outside of the mapping");
        // SAFETY: asserted to be inside of our range.
        let at = unsafe { self.base.as_ptr().add(start * PAGE) };
        // SAFETY: inside of our range, and `&mut self` says that no slice of it is alive; zero bytes (or the
        // file's) are valid content.
        Ok(unsafe { mm::madvise(at.cast(), pages * PAGE, Advice::LinuxDontNeed) }?)
    }

    /// Makes the mapping longer or shorter; it may move.
    ///
    /// # Errors
    /// What mremap says (the mapping is unchanged then); `InvalidInput` for no pages at all.
    pub fn resize(&mut self, pages: usize) -> io::Result<()> {
        if pages == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a mapping has at least one page"));
        }
        // SAFETY: the range is ours as a whole, no slice of it is alive, and the address it may move to is
        // chosen by the kernel.
        let moved = unsafe { mm::mremap(self.pointer(), self.bytes, pages * PAGE, MremapFlags::MAYMOVE) }?;
        self.base = NonNull::new(moved.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        self.bytes = pages * PAGE;
        Ok(())
    }

    /// Cuts the mapping in two before page `at`; no system call is made.
    ///
    /// # Panics
    /// If one of the parts would be empty.
    pub fn split(self, at: usize) -> (Self, Self) {
        assert!(at > 0 && at < self.pages(), "both parts need a page");
        let whole = std::mem::ManuallyDrop::new(self);
        // SAFETY: `at` was asserted to be inside of our range.
        let second = unsafe { whole.base.add(at * PAGE) };
        (
            Self { base: whole.base, bytes: at * PAGE, access: whole.access },
            Self { base: second, bytes: whole.bytes - at * PAGE, access: whole.access },
        )
    }

    fn pointer(&self) -> *mut c_void {
        self.base.as_ptr().cast()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is ours, and a value that is dropped has no slices alive.
        let gone = unsafe { mm::munmap(self.pointer(), self.bytes) };
        debug_assert!(gone.is_ok(), "munmap of an own mapping failed: {gone:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_parts_keep_their_content_and_a_resized_mapping_too() {
        let mut whole = Mapping::new(Backing::Private, 4).expect("map");
        for (at, word) in whole.words_mut().iter_mut().enumerate() {
            *word = at as u64;
        }
        let (first, mut second) = whole.split(1);
        assert_eq!(first.pages(), 1);
        assert_eq!(second.words()[0], 512);
        drop(first);
        second.resize(64).expect("grow");
        assert_eq!(second.words()[511], 1023);
        assert_eq!(second.words()[3 * 512], 0);
        second.forget(0, 1).expect("forget");
        assert_eq!(second.words()[0], 0);
        assert_eq!(second.words()[512], 1024);
    }

    #[test]
    fn protection_is_enforced_before_the_hardware_does() {
        let mut mapping = Mapping::new(Backing::Shared, 1).expect("map");
        mapping.words_mut()[7] = 7;
        mapping.protect(Access::None).expect("hide");
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| mapping.words()[0])).is_err());
        mapping.protect(Access::Read).expect("show");
        assert_eq!(mapping.words()[7], 7);
    }
}
