//! The two ptrace requests that nix does not have: the signal mask of a stopped thread.

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
