//! userfaultfd (include/uapi/linux/userfaultfd.h): the ioctls and messages, on any descriptor that has them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

pub(crate) const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
pub(crate) const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
pub(crate) const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
pub(crate) const FEATURE_WP_ASYNC: u64 = 1 << 15;
pub(crate) const MODE_WP: u64 = 1 << 1;
/// `UFFD_USER_MODE_ONLY`: all that an unprivileged process may have.
pub(crate) const USER_MODE_ONLY: u64 = 1;

const UFFD_API: u64 = 0xAA;
const UFFDIO_API: libc::c_ulong = 0xC018_AA3F;
const UFFDIO_REGISTER: libc::c_ulong = 0xC020_AA00;
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_AA01;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_AA02;
const UFFDIO_COPY: libc::c_ulong = 0xC028_AA03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xC020_AA04;

/// The size field of an ioctl number must be the size of what is passed.
const fn size_of_request(request: libc::c_ulong) -> usize {
    (request >> 16 & 0x3fff) as usize
}
const _: () = assert!(
    size_of_request(UFFDIO_API) == 24
        && size_of_request(UFFDIO_REGISTER) == 32
        && size_of_request(UFFDIO_UNREGISTER) == 16
        && size_of_request(UFFDIO_WAKE) == 16
        && size_of_request(UFFDIO_COPY) == 40
        && size_of_request(UFFDIO_ZEROPAGE) == 32
);

fn call<const N: usize>(fd: &impl AsFd, request: libc::c_ulong, words: &mut [u64; N]) -> io::Result<()> {
    assert_eq!(size_of_request(request), N * 8, "a request with the structure of another");
    // SAFETY: the kernel reads and writes as many bytes as the request's number says, which is the size of
    // `words`. Where a word is an address of this process (UFFDIO_COPY), the caller passed a live slice.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, words.as_mut_ptr()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Enables the interface with `features`.
pub(crate) fn api(fd: &impl AsFd, features: u64) -> io::Result<()> {
    call(fd, UFFDIO_API, &mut [UFFD_API, features, 0])
}

/// Registers a range.
pub(crate) fn register(fd: &impl AsFd, start: u64, end: u64, mode: u64) -> io::Result<()> {
    call(fd, UFFDIO_REGISTER, &mut [start, end - start, mode, 0])
}

/// Takes a range out.
pub(crate) fn unregister(fd: &impl AsFd, start: u64, end: u64) -> io::Result<()> {
    call(fd, UFFDIO_UNREGISTER, &mut [start, end - start])
}

/// Wakes who waits for a range.
pub(crate) fn wake(fd: &impl AsFd, start: u64, len: u64) -> io::Result<()> {
    call(fd, UFFDIO_WAKE, &mut [start, len])
}

/// Puts pages in place; the error comes with the bytes that were put before it.
pub(crate) fn copy(fd: &impl AsFd, to: u64, from: &[u8], wake: bool) -> Result<usize, (usize, io::Error)> {
    let mut words = [to, from.as_ptr() as u64, from.len() as u64, u64::from(!wake), 0];
    match call(fd, UFFDIO_COPY, &mut words) {
        Ok(()) => Ok(words[4] as usize),
        Err(error) => Err(((words[4] as i64).max(0) as usize, error)),
    }
}

/// Puts zero pages in place; the error comes with the bytes that were put before it.
pub(crate) fn zeropage(fd: &impl AsFd, to: u64, len: u64) -> Result<usize, (usize, io::Error)> {
    let mut words = [to, len, 0, 0];
    match call(fd, UFFDIO_ZEROPAGE, &mut words) {
        Ok(()) => Ok(words[3] as usize),
        Err(error) => Err(((words[3] as i64).max(0) as usize, error)),
    }
}

/// A userfaultfd of this process.
pub(crate) fn open_own() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the call takes no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Takes the descriptor over that a fork message carries.
pub(crate) fn adopt(number: u32) -> OwnedFd {
    // SAFETY: the kernel installs a new descriptor in the reader of a UFFD_EVENT_FORK message, for that reader
    // alone; each message is looked at once.
    unsafe { OwnedFd::from_raw_fd(number as i32) }
}
