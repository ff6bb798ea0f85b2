//! As much of userfaultfd as it takes to try a lazy restore.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// `UFFDIO_COPY` and `UFFDIO_ZEROPAGE` of `linux/userfaultfd.h`.
const UFFDIO_COPY: libc::c_ulong = 0xC028_AA03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xC020_AA04;

#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}
const _: () = assert!(size_of::<UffdioCopy>() == 40);

#[repr(C)]
struct UffdioZeropage {
    start: u64,
    len: u64,
    mode: u64,
    zeropage: i64,
}
const _: () = assert!(size_of::<UffdioZeropage>() == 32);

/// What a userfaultfd reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A task waits for the page at this address.
    Fault(u64),
    /// Anything else; the number is the kernel's.
    Other(u8),
}

/// Reads one event of a non-blocking userfaultfd, `None` if there is none now.
pub fn next_event(uffd: impl AsFd) -> io::Result<Option<Event>> {
    let mut message = [0u8; 32];
    match rustix::io::read(uffd, &mut message) {
        Ok(32) => {}
        Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
        Err(rustix::io::Errno::AGAIN) => return Ok(None),
        Err(e) => return Err(e.into()),
    }
    let mut address = [0; 8];
    address.copy_from_slice(&message[16..24]);
    Ok(Some(match message[0] {
        0x12 => Event::Fault(u64::from_ne_bytes(address)),
        other => Event::Other(other),
    }))
}

/// Puts `bytes` (whole pages) at `address` of the other process and wakes who waits for them.
pub fn copy(uffd: impl AsFd, address: u64, bytes: &[u8]) -> io::Result<()> {
    let mut request =
        UffdioCopy { dst: address, src: bytes.as_ptr() as u64, len: bytes.len() as u64, mode: 0, copy: 0 };
    // SAFETY: the kernel reads `len` bytes of `bytes`, which lives through the call, and writes `request.copy`.
    let result = unsafe { libc::ioctl(uffd.as_fd().as_raw_fd(), UFFDIO_COPY, &raw mut request) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Puts zero pages there.
pub fn zero(uffd: impl AsFd, address: u64, len: u64) -> io::Result<()> {
    let mut request = UffdioZeropage { start: address, len, mode: 0, zeropage: 0 };
    // SAFETY: the kernel reads and writes `request` and no other memory of ours.
    let result = unsafe { libc::ioctl(uffd.as_fd().as_raw_fd(), UFFDIO_ZEROPAGE, &raw mut request) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
