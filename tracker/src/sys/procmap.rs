//! `ioctl(PROCMAP_QUERY)` on `/proc/PID/maps` (Linux 6.11, include/uapi/linux/fs.h): one mapping, without its text.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

const PROCMAP_QUERY: libc::c_ulong = 0xC068_6611;

/// `PROCMAP_QUERY_COVERING_OR_NEXT_VMA`: the mapping at an address, or the first behind it.
const COVERING_OR_NEXT: u64 = 0x10;

/// What a mapping allows.
pub(crate) const READABLE: u64 = 0x01;
pub(crate) const WRITABLE: u64 = 0x02;
pub(crate) const EXECUTABLE: u64 = 0x04;
pub(crate) const SHARED: u64 = 0x08;

/// The longest name that is asked for, with a zero at its end. A longer one is an error of the kernel's (`ENAMETOOLONG`).
pub(crate) const NAME: usize = 256;

#[repr(C)]
#[derive(Default)]
struct Arg {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    start: u64,
    end: u64,
    flags: u64,
    page_size: u64,
    offset: u64,
    inode: u64,
    major: u32,
    minor: u32,
    name_size: u32,
    build_id_size: u32,
    name_addr: u64,
    build_id_addr: u64,
}

const _: () = assert!(size_of::<Arg>() == 104);

/// A mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapping<'a> {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) flags: u64,
    pub(crate) offset: u64,
    pub(crate) inode: u64,
    pub(crate) device: (u32, u32),
    /// As in the text; empty where there is none, or it was not asked for.
    pub(crate) name: &'a [u8],
}

/// The mapping at `address`, or the first behind it; `None` if there is none. The name costs the kernel more than all the
/// rest where it is a path, so it is given only if there is room for it.
///
/// # Errors
/// What the kernel says: `ENOTTY` where it does not know the question, `ESRCH` when the memory is gone.
pub(crate) fn query<'a>(
    maps: &impl AsFd,
    address: u64,
    name: Option<&'a mut [u8; NAME]>,
) -> io::Result<Option<Mapping<'a>>> {
    let mut arg = Arg {
        size: size_of::<Arg>() as u64,
        query_flags: COVERING_OR_NEXT,
        query_addr: address,
        ..Arg::default()
    };
    let name: &'a mut [u8] = match name {
        Some(name) => name,
        None => &mut [],
    };
    if !name.is_empty() {
        (arg.name_addr, arg.name_size) = (name.as_mut_ptr() as u64, name.len() as u32);
    }
    // SAFETY: `arg` has the size that it says, and names a buffer of `name_size` bytes or none; both outlive the call, and
    // the kernel writes to nothing else of this process.
    if unsafe { libc::ioctl(maps.as_fd().as_raw_fd(), PROCMAP_QUERY, &raw mut arg) } < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::ENOENT) { Ok(None) } else { Err(error) };
    }
    // With the zero at its end.
    let length = (arg.name_size as usize).saturating_sub(1).min(name.len());
    let Arg { start, end, flags, offset, inode, major, minor, .. } = arg;
    Ok(Some(Mapping { start, end, flags, offset, inode, device: (major, minor), name: &name[..length] }))
}
