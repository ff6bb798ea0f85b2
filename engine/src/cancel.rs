//! A request to stop that every wait of a migration can see.
//!
//! A token is a flag and a pipe: code between two steps asks [`Cancel::is_cancelled`], code that waits in
//! `poll` adds [`Cancel::fd`], which becomes readable for good once cancellation was asked for.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

/// A token that is shared between the one who runs a migration and the one who may want it to stop.
///
/// Cancelling is a request: before the commit of the handover it rolls the migration back, after it it has
/// no effect (the process already belongs to the destination).
#[derive(Clone, Debug)]
pub struct Cancel {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// 0 = not cancelled; otherwise the reason (a signal number, or -1 for a caller's own decision).
    reason: AtomicI32,
    read: OwnedFd,
    write: OwnedFd,
}

impl Cancel {
    /// A token that is not cancelled.
    ///
    /// # Errors
    /// When the process has no file descriptors left.
    pub fn new() -> io::Result<Self> {
        let (read, write) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK)?;
        Ok(Self { inner: Arc::new(Inner { reason: AtomicI32::new(0), read, write }) })
    }

    /// Asks for the migration to stop.
    pub fn cancel(&self) {
        self.raise(-1);
    }

    /// Asks for the migration to stop because signal `signal` arrived.
    pub fn cancel_by_signal(&self, signal: i32) {
        self.raise(signal);
    }

    fn raise(&self, reason: i32) {
        if self.inner.reason.compare_exchange(0, reason, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            // One byte that nobody reads: the descriptor stays readable. The pipe cannot be full.
            let _ = rustix::io::write(&self.inner.write, &[1]);
        }
    }

    /// Whether somebody asked for the migration to stop.
    pub fn is_cancelled(&self) -> bool {
        self.inner.reason.load(Ordering::SeqCst) != 0
    }

    /// The signal that asked for it, if one did.
    pub fn signal(&self) -> Option<i32> {
        match self.inner.reason.load(Ordering::SeqCst) {
            reason if reason > 0 => Some(reason),
            _ => None,
        }
    }

    /// Waits so long, or until the migration is to stop.
    pub(crate) fn sleep(&self, time: std::time::Duration) {
        let spec = Timespec { tv_sec: time.as_secs() as i64, tv_nsec: i64::from(time.subsec_nanos()) };
        // Woken too early by a signal, whoever waits looks once more too often.
        let _ = poll(&mut [PollFd::from_borrowed_fd(self.fd(), PollFlags::IN)], Some(&spec));
    }

    /// A descriptor that is readable from the moment of cancellation on. Never read from it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.inner.read.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_stays() {
        let cancel = Cancel::new().unwrap();
        let other = cancel.clone();
        assert!(!cancel.is_cancelled());
        other.cancel_by_signal(15);
        cancel.cancel();
        assert!(cancel.is_cancelled());
        assert_eq!(cancel.signal(), Some(15));
    }
}
