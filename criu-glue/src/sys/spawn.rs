//! What has to happen in a child between fork and exec.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// `CLOSE_RANGE_CLOEXEC` of `linux/close_range.h`.
const CLOSE_RANGE_CLOEXEC: libc::c_uint = 1 << 2;
const _: () = assert!(libc::SYS_close_range == 436);

/// Lets `command` inherit `keep` and nothing else beyond its standard streams; with `subreaper`, what its
/// descendants leave behind becomes its own child instead of init's.
///
/// A parent-death signal is deliberately not set. If we die, criu reads the end of its RPC socket and undoes what
/// it did; a signal instead would end it between two steps, perhaps with its parasite inside the task.
pub(crate) fn inherit_only(command: &mut Command, keep: BorrowedFd<'_>, subreaper: bool) {
    let keep = keep.as_raw_fd();
    let prepare = move || {
        // SAFETY: only flags descriptors of this child; close_range(2) touches no memory of ours.
        if unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, CLOSE_RANGE_CLOEXEC) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: F_SETFD takes an int and touches no memory of ours.
        if unsafe { libc::fcntl(keep, libc::F_SETFD, 0) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
        if subreaper {
            // SAFETY: PR_SET_CHILD_SUBREAPER takes integers only.
            if unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) } != 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe system calls are made, and nothing is allocated.
    unsafe { command.pre_exec(prepare) };
}
