//! A ring of io_uring with a registered buffer: the kernel writes there without touching a page table.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

const PAGE: usize = 4096;
/// `IORING_OFF_SQ_RING`, `IORING_OFF_SQES`.
const RING: i64 = 0;
const ENTRIES: i64 = 0x1000_0000;
const REGISTER_BUFFERS: u32 = 0;
const UNREGISTER_BUFFERS: u32 = 1;
const READ_FIXED: u8 = 4;
const GETEVENTS: u32 = 1;
const FEATURE_SINGLE_MMAP: u32 = 1;

/// `struct io_uring_params` (include/uapi/linux/io_uring.h).
#[repr(C)]
#[derive(Default)]
struct Parameters {
    sq_entries: u32,
    cq_entries: u32,
    flags: u32,
    sq_thread: [u32; 2],
    features: u32,
    wq_fd: u32,
    reserved: [u32; 3],
    /// head, tail, ring_mask, ring_entries, flags, dropped, array, reserved, user address (two words).
    sq: [u32; 10],
    /// head, tail, ring_mask, ring_entries, overflow, cqes, flags, reserved, user address (two words).
    cq: [u32; 10],
}

/// `struct io_uring_sqe`, as far as a read into a fixed buffer needs it.
#[repr(C)]
#[derive(Default)]
struct Entry {
    opcode: u8,
    flags: u8,
    priority: u16,
    fd: i32,
    offset: u64,
    address: u64,
    length: u32,
    rw_flags: u32,
    user_data: u64,
    buffer: u16,
    personality: u16,
    splice: i32,
    rest: [u64; 2],
}

const _: () = assert!(size_of::<Parameters>() == 120 && size_of::<Entry>() == 64);

/// A ring with room for one entry.
pub struct Ring {
    fd: i32,
    /// Where they are mapped, for good.
    ring: usize,
    entries: usize,
    sq: [u32; 10],
    cq: [u32; 10],
}

fn done(result: i64) -> io::Result<i64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

impl Ring {
    /// Makes one.
    pub fn new() -> io::Result<Self> {
        let mut parameters = Parameters::default();
        // SAFETY: the structure is as large as the kernel's, and lives until the call returns.
        let fd = done(unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, &raw mut parameters) })? as i32;
        assert!(parameters.features & FEATURE_SINGLE_MMAP != 0, "a kernel from 5.4 on");
        let map = |offset| {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: nothing that exists is touched.
            let at = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, access, libc::MAP_SHARED, fd, offset) };
            if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(at as usize) }
        };
        let (ring, entries) = (map(RING)?, map(ENTRIES)?);
        Ok(Self { fd, ring, entries, sq: parameters.sq, cq: parameters.cq })
    }

    /// Pins pages as its only buffer.
    pub fn register(&self, address: u64, pages: u64) -> io::Result<()> {
        let buffer = libc::iovec { iov_base: address as *mut _, iov_len: pages as usize * PAGE };
        // SAFETY: one buffer, which the order names; the kernel writes there only when it is told to read.
        let result = unsafe {
            libc::syscall(libc::SYS_io_uring_register, self.fd, REGISTER_BUFFERS, &raw const buffer, 1)
        };
        done(result).map(drop)
    }

    /// Lets them go.
    pub fn unregister(&self) -> io::Result<()> {
        // SAFETY: takes no pointers.
        let result = unsafe { libc::syscall(libc::SYS_io_uring_register, self.fd, UNREGISTER_BUFFERS, 0, 0) };
        done(result).map(drop)
    }

    /// Has the kernel read a page of `from` into the buffer, at `address`.
    pub fn read(&self, from: i32, address: u64) -> io::Result<()> {
        let entry = Entry { opcode: READ_FIXED, fd: from, address, length: PAGE as u32, ..Entry::default() };
        // SAFETY: the ring has one entry; the kernel is not looking at it, because the last was waited for.
        unsafe { (self.entries as *mut Entry).write_volatile(entry) };
        // SAFETY: offsets that the kernel gave, within the mapping of the ring.
        let word = |offset: u32| unsafe { AtomicU32::from_ptr((self.ring + offset as usize) as *mut u32) };
        word(self.sq[6]).store(0, Ordering::Relaxed);
        word(self.sq[1]).fetch_add(1, Ordering::Release);
        let no_set = std::ptr::null::<libc::sigset_t>();
        // SAFETY: no set of signals is passed.
        let result = unsafe { libc::syscall(libc::SYS_io_uring_enter, self.fd, 1, 1, GETEVENTS, no_set, 0) };
        done(result)?;
        let head = word(self.cq[0]).load(Ordering::Acquire);
        let at = self.cq[5] + (head & word(self.cq[2]).load(Ordering::Relaxed)) * 16;
        let outcome = word(at + 8).load(Ordering::Acquire) as i32;
        word(self.cq[0]).store(head.wrapping_add(1), Ordering::Release);
        if outcome == PAGE as i32 { Ok(()) } else { Err(io::Error::other(format!("it read {outcome}"))) }
    }
}
