//! Memory that outlives its mappings: shared, of files, huge.

use std::ffi::{CString, c_void};
use std::io;
use std::os::fd::{OwnedFd, RawFd};

const PAGE: u64 = 4096;
/// A page of hugetlbfs, in small pages.
pub const HUGE: u64 = 512;

fn address(result: *mut c_void) -> io::Result<u64> {
    if result == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(result as u64) }
}

fn number(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn map(at: Option<u64>, pages: u64, flags: i32, fd: RawFd, offset: u64) -> io::Result<u64> {
    let flags = if at.is_some() { flags | libc::MAP_FIXED } else { flags };
    let (length, access) = ((pages * PAGE) as usize, libc::PROT_READ | libc::PROT_WRITE);
    let place = at.unwrap_or(0) as usize as *mut c_void;
    // SAFETY: with MAP_FIXED the range lies in one that `reserve` has made for it; without, nothing that exists is
    // touched.
    address(unsafe { libc::mmap(place, length, access, flags, fd, (offset * PAGE) as i64) })
}

/// Addresses between two pages that nobody may touch, so that the kernel merges nothing with what comes there.
fn reserve(pages: u64) -> io::Result<u64> {
    Ok(super::memory::map(None, pages + 2, libc::PROT_NONE)? + PAGE)
}

/// Shared anonymous memory.
pub fn shared(pages: u64) -> io::Result<u64> {
    map(Some(reserve(pages)?), pages, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0)
}

/// Pages of a descriptor, from page `offset` on.
pub fn map_descriptor(fd: RawFd, pages: u64, offset: u64, shared: bool) -> io::Result<u64> {
    let flags = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
    map(Some(reserve(pages)?), pages, flags, fd, offset)
}

/// Memory of hugetlbfs, in pages of 2 MiB.
pub fn huge(count: u64, shared: bool) -> io::Result<u64> {
    let flags = libc::MAP_HUGETLB | libc::MAP_HUGE_2MB | libc::MAP_ANONYMOUS;
    let share = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
    map(None, count * HUGE, flags | share, -1, 0)
}

/// An anonymous file in memory; its descriptor is never closed.
pub fn memfd(pages: u64) -> io::Result<RawFd> {
    // SAFETY: the name ends with a zero byte.
    let fd = number(unsafe { libc::memfd_create(c"tracked".as_ptr(), 0) })?;
    truncate(fd, pages)?;
    Ok(fd)
}

/// POSIX shared memory, whose name is gone when this returns; its descriptor is never closed.
pub fn posix(pages: u64) -> io::Result<RawFd> {
    let name = CString::new(format!("/pageferry-live-{}", std::process::id())).map_err(io::Error::other)?;
    // SAFETY: the name ends with a zero byte.
    let fd =
        number(unsafe { libc::shm_open(name.as_ptr(), libc::O_RDWR | libc::O_CREAT | libc::O_EXCL, 0o600) })?;
    // SAFETY: as above.
    number(unsafe { libc::shm_unlink(name.as_ptr()) })?;
    truncate(fd, pages)?;
    Ok(fd)
}

/// System V shared memory, attached; it goes with the last process that has it.
pub fn system_v(pages: u64) -> io::Result<u64> {
    // SAFETY: takes no pointers.
    let id =
        number(unsafe { libc::shmget(libc::IPC_PRIVATE, (pages * PAGE) as usize, libc::IPC_CREAT | 0o600) })?;
    // SAFETY: the kernel chooses a place where nothing is.
    let at = address(unsafe { libc::shmat(id, std::ptr::null(), 0) });
    // SAFETY: removing takes no structure.
    number(unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) })?;
    at
}

/// Sets the length.
pub fn truncate(fd: RawFd, pages: u64) -> io::Result<()> {
    // SAFETY: takes no pointers.
    number(unsafe { libc::ftruncate(fd, (pages * PAGE) as i64) }).map(drop)
}

/// Gives pages of a file back.
pub fn punch(fd: RawFd, page: u64, pages: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: takes no pointers.
    number(unsafe { libc::fallocate(fd, mode, (page * PAGE) as i64, (pages * PAGE) as i64) }).map(drop)
}

/// Writes a word through the descriptor.
pub fn write_word(fd: RawFd, page: u64, value: u64) -> io::Result<()> {
    let bytes = value.to_ne_bytes();
    // SAFETY: eight bytes that live until the call returns.
    let wrote = unsafe { libc::pwrite(fd, bytes.as_ptr().cast(), bytes.len(), (page * PAGE) as i64) };
    if wrote == 8 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A file of this many pages that has no name, on the disk.
pub fn file(pages: u64) -> io::Result<RawFd> {
    use std::io::Write;
    use std::os::fd::IntoRawFd;
    let path = std::path::Path::new("/var/tmp").join(format!("pageferry-live-{}", std::process::id()));
    let mut file = std::fs::File::options().read(true).write(true).create_new(true).open(&path)?;
    std::fs::remove_file(&path)?;
    for page in 0..pages {
        file.write_all(&[page as u8 + 1; PAGE as usize])?;
    }
    Ok(OwnedFd::from(file).into_raw_fd())
}
