//! What nix does not have of ptrace: the signal mask of a stopped thread, and signals that it has no name for
//! (real-time ones), which must not be lost on their way.

use nix::unistd::Pid;
use std::io;

const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;
/// Bytes of the kernel's signal set.
const SET: usize = 8;

/// The signals that the thread blocks.
pub(crate) fn blocked(thread: Pid) -> io::Result<u64> {
    let mut mask = 0u64;
    // SAFETY: the kernel writes `SET` bytes to the address, which is that of a u64.
    let result = unsafe { libc::ptrace(PTRACE_GETSIGMASK, thread.as_raw(), SET, &raw mut mask) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(mask) }
}

/// Has the thread block exactly these signals.
pub(crate) fn set_blocked(thread: Pid, mask: u64) -> io::Result<()> {
    // SAFETY: the kernel reads `SET` bytes from the address, which is that of a u64.
    let result = unsafe { libc::ptrace(PTRACE_SETSIGMASK, thread.as_raw(), SET, &raw const mask) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether two processes share one address space (`kcmp(2)`, KCMP_VM).
pub(crate) fn same_memory(a: i32, b: i32) -> io::Result<bool> {
    const KCMP_VM: libc::c_int = 1;
    // SAFETY: the call takes no pointers.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_VM, 0, 0) };
    if order < 0 { Err(io::Error::last_os_error()) } else { Ok(order == 0) }
}

/// How a stopped thread goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Resume {
    /// Until a signal, or the stop that it was asked for.
    Continue,
    /// Until a system call begins or ends.
    Syscall,
    /// For good: we are its tracer no more.
    Detach,
}

/// Has a stopped thread go on, with a signal or with none (0).
pub(crate) fn resume(thread: Pid, how: Resume, signal: i32) -> io::Result<()> {
    let request = match how {
        Resume::Continue => libc::PTRACE_CONT,
        Resume::Syscall => libc::PTRACE_SYSCALL,
        Resume::Detach => libc::PTRACE_DETACH,
    };
    // SAFETY: these requests take numbers, and the kernel looks at no memory of this process for them.
    let result = unsafe { libc::ptrace(request, thread.as_raw(), 0usize, signal as usize) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Waits for a thread that we trace, and returns its status as the kernel has it.
pub(crate) fn wait(thread: Pid) -> io::Result<i32> {
    let mut status = 0;
    // SAFETY: the kernel writes one int to the address, which is that of `status`.
    let result = unsafe { libc::waitpid(thread.as_raw(), &raw mut status, libc::__WALL) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(status) }
}
