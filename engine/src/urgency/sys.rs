//! Scheduling policies: what the compiler cannot check.

use std::io;

/// The lowest real-time priority: before every thread without one, and after everything that the machine's owner gave one.
const PRIORITY: libc::c_int = 1;

/// Gives the calling thread a real-time policy, which threads that it starts do not inherit.
pub(super) fn real_time() -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: PRIORITY };
    // SAFETY: 0 is the calling thread; the kernel reads the structure, which lives on this frame, before the call returns.
    let result = unsafe {
        libc::sched_setscheduler(0, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, &raw const parameters)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Takes it away again.
pub(super) fn ordinary() -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: as above.
    let result = unsafe {
        // Only who may do more can take back that threads which it starts do not inherit it.
        libc::sched_setscheduler(0, libc::SCHED_OTHER | libc::SCHED_RESET_ON_FORK, &raw const parameters)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
pub(super) fn is_real_time() -> bool {
    // SAFETY: the call takes no memory; 0 is the calling thread.
    let policy = unsafe { libc::sched_getscheduler(0) };
    policy & !libc::SCHED_RESET_ON_FORK == libc::SCHED_FIFO
}
