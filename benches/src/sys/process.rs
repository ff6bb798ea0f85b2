//! Fork without exec.

use std::{fs, io};

/// Forks; the child runs `body` and exits with what it returns, without unwinding into the parent's frames.
/// Returns the child's pid.
///
/// # Errors
/// What fork says, or that this process has more than one thread.
pub fn fork(body: impl FnOnce() -> i32) -> io::Result<i32> {
    let threads = fs::read_dir("/proc/self/task")?.count();
    if threads != 1 {
        return Err(io::Error::other(format!(
            "cannot fork with {threads} threads: their locks would be lost"
        )));
    }
    // SAFETY: this is the only thread (checked above, and only this thread could start another), so no lock is
    // held by a thread that the child lacks, and the child may do whatever the parent may.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(101);
            // SAFETY: `_exit` only ends the process; the parent's exit handlers must not run twice.
            unsafe { libc::_exit(code) }
        }
        child => Ok(child),
    }
}
