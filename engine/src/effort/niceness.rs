//! The pace at which the engine copies beside a program that others wait for: its threads' nice value until the freeze.

use rustix::process::{getpriority_process, setpriority_process};
use std::io;

/// The calling thread at a lower priority. On Linux the nice value is a thread's own (setpriority(2), "C library/kernel differences"), and
/// the threads that it starts have it too. Dropping this on the same thread gives the priority back.
#[derive(Debug)]
pub(crate) struct Niceness {
    before: i32,
    /// What it is now.
    nice: i32,
}

impl Niceness {
    /// Lowers the priority of this thread to that of `nice`, unless it is as low already.
    ///
    /// # Errors
    /// When it could not be raised again, which takes `CAP_SYS_NICE`; nothing has changed then.
    pub(crate) fn lower(nice: i32) -> io::Result<Self> {
        let before = getpriority_process(None)?;
        let nice = nice.max(before);
        // A freeze at a low priority would be worse than none at all: tried on a thread that ends.
        let way_back = || setpriority_process(None, nice).and_then(|()| setpriority_process(None, before));
        std::thread::scope(|scope| scope.spawn(way_back).join()).map_err(|_| io::ErrorKind::Other)??;
        setpriority_process(None, nice)?;
        Ok(Self { before, nice })
    }

    /// Does something that starts what is to have the priority of before.
    pub(crate) fn lifted<R>(&self, act: impl FnOnce() -> R) -> R {
        self.set(self.before);
        let result = act();
        self.set(self.nice);
        result
    }

    fn set(&self, nice: i32) {
        if let Err(error) = setpriority_process(None, nice) {
            tracing::warn!(%error, nice, "the priority of the engine could not be changed");
        }
    }
}

impl Drop for Niceness {
    fn drop(&mut self) {
        self.set(self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_thread_and_those_it_starts_and_only_until_it_is_over() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        // A thread of its own: others run in this process.
        std::thread::spawn(|| {
            let now = || getpriority_process(None).unwrap();
            let before = now();
            let lowered = Niceness::lower(19).unwrap();
            assert_eq!((now(), std::thread::spawn(now).join().unwrap()), (19, 19));
            lowered.lifted(|| assert_eq!((now(), std::thread::spawn(now).join().unwrap()), (before, before)));
            assert_eq!(now(), 19);
            let lower = Niceness::lower(5).unwrap();
            assert_eq!(now(), 19, "it was lower already");
            drop(lower);
            drop(lowered);
            assert_eq!(now(), before);
        })
        .join()
        .unwrap();
    }
}
