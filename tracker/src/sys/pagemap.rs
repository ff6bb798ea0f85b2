//! `ioctl(PAGEMAP_SCAN)` (Linux 6.7, include/uapi/linux/fs.h).

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};

const PAGEMAP_SCAN: libc::c_ulong = 0xC060_6610;

/// `PM_SCAN_WP_MATCHING`: write-protect what is reported, in the same step.
pub(crate) const WP_MATCHING: u64 = 1 << 0;

/// Categories of pages.
pub(crate) const WPALLOWED: u64 = 1 << 0;
pub(crate) const WRITTEN: u64 = 1 << 1;
/// A page of a file, or of shared memory.
pub(crate) const FILE: u64 = 1 << 2;
pub(crate) const PRESENT: u64 = 1 << 3;
pub(crate) const SWAPPED: u64 = 1 << 4;
pub(crate) const PFNZERO: u64 = 1 << 5;
pub(crate) const SOFT_DIRTY: u64 = 1 << 7;
/// A guard page (`MADV_GUARD_INSTALL`): known to newer kernels only, which also call it swapped.
pub(crate) const GUARD: u64 = 1 << 8;

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

/// A range of addresses whose pages share their categories.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Found {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) categories: u64,
}

const _: () = assert!(size_of::<Arg>() == 96 && size_of::<Found>() == 24);

/// Which pages to look for: all bits of `mask` must be as wanted (set, or clear if they are in `inverted`), and
/// one of `any_of` must be set, if it is not empty.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Query {
    pub(crate) flags: u64,
    pub(crate) mask: u64,
    pub(crate) inverted: u64,
    pub(crate) any_of: u64,
    pub(crate) returned: u64,
}

/// Answers of one call. The kernel allocates a buffer of up to 512 of these and loops by itself.
const ANSWERS: usize = 2048;

/// Finds the ranges of `[start, end)` that match, and gives each to `found`. They come in order but for one case:
/// when the answers fill the buffer to the last, the next call may begin again a little before where this one ended.
pub(crate) fn scan(
    pagemap: &impl AsFd,
    start: u64,
    end: u64,
    query: Query,
    mut found: impl FnMut(Found),
) -> io::Result<()> {
    let mut answers = [const { MaybeUninit::<Found>::uninit() }; ANSWERS];
    let mut at = start;
    while at < end {
        let mut arg = Arg {
            size: size_of::<Arg>() as u64,
            flags: query.flags,
            start: at,
            end,
            vec: answers.as_mut_ptr() as u64,
            vec_len: ANSWERS as u64,
            category_inverted: query.inverted,
            category_mask: query.mask,
            category_anyof_mask: query.any_of,
            return_mask: query.returned,
            ..Arg::default()
        };
        // SAFETY: `arg` has the size that it says, and names a buffer of `vec_len` answers; both live on this
        // stack frame until the call returns, and the kernel writes to nothing else of this process.
        let count = unsafe { libc::ioctl(pagemap.as_fd().as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
        if count < 0 {
            // Also EINTR is an error: what the call had found and protected before it was interrupted is not told.
            return Err(io::Error::last_os_error());
        }
        for answer in &answers[..(count as usize).min(ANSWERS)] {
            // SAFETY: the kernel has written the first `count` answers, and every pattern of bits is one: they are integers.
            found(unsafe { answer.assume_init() });
        }
        // Room was left, so the walk has come to the end. `walk_end` does not say so: it keeps the address at which
        // the kernel last emptied its own buffer of 512 ranges (Linux 6.7 to 6.18 at least), and going on from
        // there would walk the rest twice.
        if (count as usize) < ANSWERS {
            return Ok(());
        }
        // A walk that does not go on would go round for ever.
        if arg.walk_end <= at {
            return Err(io::Error::other("PAGEMAP_SCAN made no progress"));
        }
        at = arg.walk_end;
    }
    Ok(())
}
