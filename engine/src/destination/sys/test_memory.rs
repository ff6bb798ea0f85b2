//! For tests: memory of this process whose missing pages a userfaultfd reports, and what a program does with it.

use rustix::mm::{Advice, MapFlags, MremapFlags, ProtFlags, UserfaultfdFlags};
use rustix::mm::{madvise, mmap_anonymous, mremap_fixed, munmap, userfaultfd};
use std::ffi::c_void;
use std::os::fd::{AsRawFd, OwnedFd};

/// `_IOWR(0xAA, 0x3F, struct uffdio_api)` and `_IOWR(0xAA, 0x00, struct uffdio_register)` of linux/userfaultfd.h.
const UFFDIO_API: libc::c_ulong = 0xC018_AA3F;
const UFFDIO_REGISTER: libc::c_ulong = 0xC020_AA00;
/// Events of forks, moves, removals and unmappings (features 1, 2, 3 and 6).
const FEATURES: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6;
const REGISTER_MISSING: u64 = 1;

/// A mapping of this process. It stays mapped: its address is never anybody else's.
#[derive(Clone, Copy, Debug)]
pub struct TestMemory {
    /// First address.
    pub base: usize,
    /// Bytes.
    pub len: usize,
}

impl TestMemory {
    /// Maps `pages` pages.
    pub fn map(pages: usize) -> Self {
        let len = pages * 4096;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses an address where nothing is mapped.
        let base = unsafe { mmap_anonymous(std::ptr::null_mut(), len, prot, MapFlags::PRIVATE) }.unwrap();
        Self { base: base as usize, len }
    }

    /// The number of its first page.
    pub fn first_page(&self) -> u64 {
        self.base as u64 / 4096
    }

    fn at(&self, page: usize) -> *mut c_void {
        assert!(page * 4096 <= self.len);
        (self.base + page * 4096) as *mut c_void
    }

    /// Has missing pages reported, with events.
    pub fn register(&self, uffd: &OwnedFd) {
        let mut register = [self.base as u64, self.len as u64, REGISTER_MISSING, 0];
        // SAFETY: the argument is a `struct uffdio_register`: four words, the last of which is written.
        let done = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_REGISTER, register.as_mut_ptr()) };
        assert_eq!(done, 0, "registering: {}", std::io::Error::last_os_error());
    }

    /// Reads a word, which waits for the page if it is missing.
    pub fn word(&self, page: usize, word: usize) -> u64 {
        assert!(page * 4096 < self.len && word < 512);
        let at = self.at(page).cast::<u64>().wrapping_add(word);
        // SAFETY: in the mapping, which the tests unmap only where they no longer read; every value is a `u64`.
        unsafe { at.read_volatile() }
    }

    /// Writes a word.
    pub fn set_word(&self, page: usize, word: usize, value: u64) {
        assert!(page * 4096 < self.len && word < 512);
        let at = self.at(page).cast::<u64>().wrapping_add(word);
        // SAFETY: as in `word`; nobody holds a reference into the mapping.
        unsafe { at.write_volatile(value) };
    }

    /// madvise(MADV_DONTNEED).
    pub fn remove(&self, page: usize, pages: usize) {
        // SAFETY: the mapping's own pages, to which no references exist.
        unsafe { madvise(self.at(page), pages * 4096, Advice::LinuxDontNeed) }.unwrap();
    }

    /// munmap(2).
    pub fn unmap(&self, page: usize, pages: usize) {
        // SAFETY: the mapping's own pages, to which no references exist.
        unsafe { munmap(self.at(page), pages * 4096) }.unwrap();
    }

    /// Moves the first `pages` pages somewhere else with mremap(2), and gives the new place.
    pub fn relocate(&self, pages: usize) -> TestMemory {
        let len = pages * 4096;
        // A place that is larger than needed and free again: growing in place would be no move.
        let target = TestMemory::map(pages);
        let flags = MremapFlags::MAYMOVE;
        // SAFETY: from the mapping's own pages to a mapping made for them; no references into either exist.
        let base = unsafe { mremap_fixed(self.at(0), len, len, flags, target.at(0)) };
        TestMemory { base: base.unwrap() as usize, len }
    }

    /// Has the range split into several mappings, as a program's mprotect calls do.
    pub fn split(&self, page: usize) {
        // SAFETY: the mapping's own page; the advice only marks it.
        unsafe { madvise(self.at(page), 4096, Advice::LinuxDontDump) }.unwrap();
    }

    /// Marks pages as not to be given to forked children.
    pub fn keep_from_children(&self, page: usize, pages: usize) {
        // SAFETY: the mapping's own pages; the advice only marks them.
        unsafe { madvise(self.at(page), pages * 4096, Advice::LinuxDontFork) }.unwrap();
    }
}

/// A userfaultfd of this process, as CRIU makes them.
pub fn new_uffd() -> OwnedFd {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: the descriptor has no effect on any memory until ranges are registered.
    let uffd = unsafe { userfaultfd(flags) }.expect("userfaultfd: these tests need root");
    let mut api = [0xAA, FEATURES, 0u64];
    // SAFETY: the argument is a `struct uffdio_api`: three words, which are read and written.
    let done = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) };
    assert_eq!(done, 0, "handshake: {}", std::io::Error::last_os_error());
    uffd
}

/// Forks; the child compares words of `memory` with `expected` (page, value of its first word), and its exit
/// status says how many differ. Waits for `go` to be written to in between, if it is given.
pub fn forked_child_differs(
    memory: TestMemory,
    expected: &[(usize, u64)],
    go: Option<&OwnedFd>,
) -> libc::pid_t {
    // Not libc's fork: it holds the allocator's locks meanwhile, and waits for the page server, which allocates.
    // SAFETY: the child only makes system calls and reads memory: no allocation, no lock of another thread.
    let pid = unsafe { libc::syscall(libc::SYS_fork) } as libc::pid_t;
    assert!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
    if pid > 0 {
        return pid;
    }
    if let Some(go) = go {
        let mut byte = [0u8];
        let _ = rustix::io::read(go, &mut byte);
    }
    let wrong = expected.iter().filter(|(page, value)| memory.word(*page, 0) != *value).count();
    // SAFETY: ends the child without running anything of the test harness.
    unsafe { libc::_exit(wrong.min(100) as i32) };
}

/// The exit status of a child.
pub fn wait_for(pid: libc::pid_t) -> i32 {
    let mut status = 0;
    // SAFETY: `status` is written by the kernel and lives on this stack.
    let waited = unsafe { libc::waitpid(pid, &mut status, 0) };
    assert_eq!(waited, pid);
    assert!(libc::WIFEXITED(status), "the child died: {status}");
    libc::WEXITSTATUS(status)
}
