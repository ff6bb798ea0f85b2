//! Mappings by address. The program that is tracked gets its addresses from the test that drives it.

use std::ffi::c_void;
use std::io;

const PAGE: u64 = 4096;

pub const NO_ACCESS: i32 = libc::PROT_NONE;
pub const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

fn pointer(address: u64) -> *mut c_void {
    address as usize as *mut c_void
}

fn done(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Maps private anonymous pages; at a place of the kernel's choice, or over whatever is at `at`.
pub fn map(at: Option<u64>, pages: u64, protection: i32) -> io::Result<u64> {
    let fixed = if at.is_some() { libc::MAP_FIXED } else { 0 };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed;
    let length = (pages * PAGE) as usize;
    // SAFETY: without MAP_FIXED nothing that exists is touched; with it, `at` lies in a range that this program has
    // mapped for its test, and that no Rust object lives in.
    let address = unsafe { libc::mmap(pointer(at.unwrap_or(0)), length, protection, flags, -1, 0) };
    if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(address as u64) }
}

/// Maps pages of which few will be there: the kernel does not ask whether it has so many.
pub fn map_sparse(pages: u64) -> io::Result<u64> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: nothing that exists is touched.
    let address =
        unsafe { libc::mmap(std::ptr::null_mut(), (pages * PAGE) as usize, READ_WRITE, flags, -1, 0) };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    advise(address as u64, pages, libc::MADV_NOHUGEPAGE)?;
    Ok(address as u64)
}

/// Goes so many pages down the stack, writes to each, and returns where the last is.
#[inline(never)]
pub fn descend(pages: u64, value: u64) -> u64 {
    let mut frame = [0u8; PAGE as usize];
    frame[..8].copy_from_slice(&value.to_ne_bytes());
    let here = std::hint::black_box(&mut frame).as_ptr() as u64;
    if pages == 0 {
        here
    } else {
        descend(pages - 1, value).min(std::hint::black_box(&frame).as_ptr() as u64)
    }
}

/// Unmaps pages.
pub fn unmap(at: u64, pages: u64) -> io::Result<()> {
    // SAFETY: the range was mapped by `map`, and no Rust object lives in it.
    done(unsafe { libc::munmap(pointer(at), (pages * PAGE) as usize) })
}

/// Moves pages to a place, over whatever is there.
pub fn relocate(from: u64, pages: u64, to: u64) -> io::Result<()> {
    let length = (pages * PAGE) as usize;
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: both ranges were mapped by `map`, and no Rust object lives in them.
    let address = unsafe { libc::mremap(pointer(from), length, length, flags, pointer(to)) };
    if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Grows a mapping where it is.
pub fn grow(at: u64, pages: u64, to_pages: u64) -> io::Result<()> {
    // SAFETY: the range was mapped by `map`; without MREMAP_MAYMOVE the kernel only grows it into free space.
    let address =
        unsafe { libc::mremap(pointer(at), (pages * PAGE) as usize, (to_pages * PAGE) as usize, 0) };
    if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Grows or shrinks a mapping, wherever it fits; its address afterwards.
pub fn resize(at: u64, pages: u64, to_pages: u64) -> io::Result<u64> {
    let length = |pages| (pages * PAGE) as usize;
    // SAFETY: the range was mapped by `map`, no Rust object lives in it, and the caller goes on with the new address.
    let address = unsafe { libc::mremap(pointer(at), length(pages), length(to_pages), libc::MREMAP_MAYMOVE) };
    if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(address as u64) }
}

/// Gives advice about pages.
pub fn advise(at: u64, pages: u64, advice: i32) -> io::Result<()> {
    // SAFETY: the range was mapped by `map`, and no Rust object lives in it.
    done(unsafe { libc::madvise(pointer(at), (pages * PAGE) as usize, advice) })
}

/// Changes who may touch pages.
pub fn protect(at: u64, pages: u64, protection: i32) -> io::Result<()> {
    // SAFETY: the range was mapped by `map`, and no Rust object lives in it.
    done(unsafe { libc::mprotect(pointer(at), (pages * PAGE) as usize, protection) })
}

/// Locks pages in memory.
pub fn lock(at: u64, pages: u64) -> io::Result<()> {
    // SAFETY: locking changes no content.
    done(unsafe { libc::mlock(pointer(at), (pages * PAGE) as usize) })
}

/// Lets locked pages go.
pub fn unlock(at: u64, pages: u64) -> io::Result<()> {
    // SAFETY: unlocking changes no content.
    done(unsafe { libc::munlock(pointer(at), (pages * PAGE) as usize) })
}

/// Grows the heap by pages and returns where they begin.
pub fn grow_heap(pages: u64) -> io::Result<u64> {
    // SAFETY: the C library's allocator copes with others that move the break (it goes on behind them).
    let before = unsafe { libc::sbrk((pages * PAGE) as isize) };
    if before as isize == -1 { Err(io::Error::last_os_error()) } else { Ok(before as u64) }
}

/// Writes a word.
pub fn store(address: u64, value: u64) {
    // SAFETY: the test names addresses that `map` returned and that are still writable; the word is aligned.
    unsafe { std::ptr::write_volatile(pointer(address).cast::<u64>(), value) }
}

/// Reads a word.
pub fn load(address: u64) -> u64 {
    // SAFETY: as for `store`, and readable.
    unsafe { std::ptr::read_volatile(pointer(address).cast::<u64>()) }
}
