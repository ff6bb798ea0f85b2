//! `ioctl(PAGEMAP_SCAN)` (Linux 6.7, include/uapi/linux/fs.h) with nothing around it: the least that a scan can cost.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

const PAGEMAP_SCAN: libc::c_ulong = 0xC060_6610;
const WP_MATCHING: u64 = 1;
const WRITTEN: u64 = 1 << 1;
const SOFT_DIRTY: u64 = 1 << 7;

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct Arg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`: pages from `start` up to `end` that share their categories.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Found {
    start: u64,
    end: u64,
    categories: u64,
}

const _: () = assert!(size_of::<Arg>() == 96 && size_of::<Found>() == 24);

/// Finds the pages of `[start, end)` that were written, protects them again, and returns how many they were. Nothing is
/// remembered of where they are. Asks for what the kernel has its quickest walk for: "written", and nothing else.
///
/// # Errors
/// What the kernel says: `ENOTTY` before Linux 6.7, `ESRCH` when the memory is gone.
pub fn written(pagemap: &File, start: u64, end: u64, answers: &mut [Found]) -> io::Result<u64> {
    count(pagemap, start, end, answers, WP_MATCHING, WRITTEN)
}

/// Finds the pages of `[start, end)` that are soft-dirty, leaves them so, and returns how many they are.
///
/// # Errors
/// As [`written`].
pub fn soft_dirty(pagemap: &File, start: u64, end: u64, answers: &mut [Found]) -> io::Result<u64> {
    count(pagemap, start, end, answers, 0, SOFT_DIRTY)
}

/// Walks over the pages of `category`, with `flags`.
fn count(
    pagemap: &File,
    start: u64,
    end: u64,
    answers: &mut [Found],
    flags: u64,
    category: u64,
) -> io::Result<u64> {
    let (mut at, mut bytes) = (start, 0);
    while at < end {
        let mut arg = Arg {
            size: size_of::<Arg>() as u64,
            flags,
            start: at,
            end,
            vec: answers.as_mut_ptr() as u64,
            vec_len: answers.len() as u64,
            category_mask: category,
            return_mask: category,
            ..Arg::default()
        };
        // SAFETY: `arg` has the size that it says and lives until the call returns; `vec` and `vec_len` are the slice
        // that is borrowed mutably, of a type without padding for which every bit pattern is valid.
        let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        bytes += answers[..count].iter().map(|found| found.end - found.start).sum::<u64>();
        if count < answers.len() {
            break;
        }
        at = arg.walk_end;
    }
    Ok(bytes / 4096)
}
