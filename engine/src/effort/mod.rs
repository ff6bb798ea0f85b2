//! What the engine takes of the processors for work that nobody waits for: a share of their time, and a place behind others. While a
//! program stands still neither holds.

mod niceness;
mod share;

pub(crate) use niceness::Niceness;
pub(crate) use share::{CpuMeter, CpuShare, processor_time};

use rustix::process::{Pid, getpriority_process, setpriority_process};
use rustix::thread::gettid;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a receiver may take for its work, which several threads do.
#[derive(Clone, Debug)]
pub(crate) struct Effort {
    cpu: CpuShare,
    ranks: Arc<Mutex<Ranks>>,
}

/// The nice values of threads. On Linux each has its own (setpriority(2), "C library/kernel differences").
#[derive(Debug)]
struct Ranks {
    nice: i32,
    lifted: bool,
    /// Those that live, and what each had before.
    threads: Vec<(Pid, i32)>,
}

impl Default for Effort {
    /// As much as it takes.
    fn default() -> Self {
        Self::new(None, 0)
    }
}

impl Effort {
    /// Per cent of one processor (200: two of them), and a nice value.
    pub(crate) fn new(percent: Option<u32>, nice: u8) -> Self {
        let ranks = Ranks { nice: nice.into(), lifted: false, threads: Vec::new() };
        Self { cpu: CpuShare::new(percent), ranks: Arc::new(Mutex::new(ranks)) }
    }

    /// Whether a thread that has become nice could be as before again, which takes `CAP_SYS_NICE`: a freeze at a low priority would be
    /// worse than no nice value at all, so nobody becomes nice then.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn check(&self) -> io::Result<()> {
        let nice = self.lock().nice;
        if nice == 0 {
            return Ok(());
        }
        let tried = std::thread::scope(|scope| scope.spawn(|| Niceness::lower(nice).map(drop)).join());
        let tried = tried.unwrap_or_else(|_| Err(io::ErrorKind::Other.into()));
        if tried.is_err() {
            self.lock().nice = 0;
        }
        tried
    }

    /// The share that work is paid from.
    pub(crate) fn cpu(&self) -> &CpuShare {
        &self.cpu
    }

    /// The calling thread works on what nobody waits for: it is nice as long as what is returned lives, and neither of these is lifted.
    pub(crate) fn enter(&self) -> Entered<'_> {
        let mut ranks = self.lock();
        let thread = gettid();
        if ranks.nice != 0
            && let Ok(before) = getpriority_process(None)
        {
            ranks.threads.push((thread, before));
            ranks.apply(thread, before);
        }
        Entered { effort: self, thread }
    }

    /// A program stands still from now on, or runs again: as much as it takes, or not any more.
    pub(crate) fn lift(&self, lifted: bool) {
        self.cpu.lift(lifted);
        let mut ranks = self.lock();
        if std::mem::replace(&mut ranks.lifted, lifted) != lifted {
            ranks.threads.iter().for_each(|(thread, before)| ranks.apply(*thread, *before));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Ranks> {
        // Every change is one step.
        self.ranks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ranks {
    fn apply(&self, thread: Pid, before: i32) {
        let nice = if self.lifted { before } else { self.nice.max(before) };
        if let Err(error) = setpriority_process(Some(thread), nice) {
            tracing::warn!(%error, nice, "the priority of a thread could not be changed");
        }
    }
}

/// A thread that is nice. Has to be dropped on it.
#[derive(Debug)]
pub(crate) struct Entered<'a> {
    effort: &'a Effort,
    thread: Pid,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut ranks = self.effort.lock();
        if let Some(at) = ranks.threads.iter().position(|(thread, _)| *thread == self.thread) {
            let (thread, before) = ranks.threads.swap_remove(at);
            let _ = setpriority_process(Some(thread), before);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn threads_are_nice_until_that_is_lifted_and_again_after_it() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let effort = Effort::new(None, 7);
        effort.check().unwrap();
        let (tell, told) = channel();
        let (end, ends) = channel::<()>();
        std::thread::scope(|scope| {
            let effort = &effort;
            let thread = scope.spawn(move || {
                let before = getpriority_process(None).unwrap();
                let entered = effort.enter();
                tell.send((gettid(), before)).unwrap();
                let _ = ends.recv();
                drop(entered);
                assert_eq!(getpriority_process(None).unwrap(), before);
            });
            let (id, before) = told.recv().unwrap();
            let nice = || getpriority_process(Some(id)).unwrap();
            assert_eq!(nice(), 7.max(before));
            effort.lift(true);
            assert_eq!(nice(), before);
            // One that comes then is not.
            let late = scope.spawn(move || {
                let now = getpriority_process(None).unwrap();
                let _entered = effort.enter();
                assert_eq!(getpriority_process(None).unwrap(), now);
            });
            late.join().unwrap();
            effort.lift(false);
            assert_eq!(nice(), 7.max(before));
            drop(end);
            thread.join().unwrap();
        });
        assert!(effort.lock().threads.is_empty());
    }

    #[test]
    fn nobody_is_nice_unless_it_was_asked_for() {
        let effort = Effort::default();
        let before = getpriority_process(None).unwrap();
        let _entered = effort.enter();
        effort.lift(true);
        effort.lift(false);
        assert_eq!(getpriority_process(None).unwrap(), before);
        assert!(effort.lock().threads.is_empty() && effort.check().is_ok());
    }
}
