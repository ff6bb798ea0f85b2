//! What is left on this machine of the tree that a journal speaks of.

use super::recover::RecoverError;
use super::verdict::Tree;
use super::{Entry, Process, Role, Step, Stood};
use crate::kept::{KeptError, KeptStore, give_pages};
use pageferry_tracker::{self as tracker, PageReader, Stillness, Target};
use rustix::process::{Signal, pidfd_send_signal};
use std::path::Path;
use std::time::{Duration, Instant};

/// Longest wait for a CRIU whose engine was killed to let its tree go: milliseconds, as a rule.
const RELEASE: Duration = Duration::from_secs(10);

/// Longest time for which a tree that is to stand is looked at again if it does not.
const INTO_THE_STOP: Duration = Duration::from_millis(100);

/// The processes of a tree that are still those that were written down.
pub(super) struct Copy(pub(super) Vec<Target>);

impl Copy {
    pub(super) fn find(entry: &Entry) -> Self {
        let open = |process: &Process| {
            Target::open(process.pid).ok().filter(|target| target.start_time() == process.start)
        };
        if !entry.processes.is_empty() {
            return Self(entry.processes.iter().filter_map(open).collect());
        }
        let root = entry.begin.root.as_ref().and_then(open);
        Self(root.and_then(|root| tracker::tree::discover(&root).ok()).unwrap_or_default())
    }

    pub(super) fn state(&self) -> Tree {
        let states: Vec<char> = self.0.iter().filter_map(Self::letter).collect();
        if states.is_empty() {
            Tree::Gone
        } else if states.iter().all(|state| matches!(state, 'T' | 't')) {
            Tree::Stopped
        } else {
            Tree::Running
        }
    }

    /// The same; and whether it has stood since somebody went on in place of its engine.
    pub(super) fn look(&self, entry: &Entry) -> Tree {
        let ran_on = |target: &Target| {
            let noted = entry.stood.iter().find(|stood| stood.is_of(target));
            noted.is_some_and(|noted| target.stillness() != Some(noted.stillness()))
        };
        // A CRIU whose engine has just been killed lets the tree go, and each thread runs into the signal that waits for it.
        let held = entry.begin.role == Role::Source && entry.step >= Step::Held;
        let until = Instant::now() + INTO_THE_STOP;
        while held && self.state() == Tree::Running && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        match self.state() {
            Tree::Stopped if self.0.iter().any(ran_on) => Tree::RanOn,
            state => state,
        }
    }

    /// Its processes, and how they are noted to have stood.
    ///
    /// # Errors
    /// The first process of which nothing is noted.
    pub(super) fn noted(&self, stood: &[Stood]) -> Result<Vec<(Target, Stillness)>, i32> {
        let noted = |target: &Target| {
            let noted = stood.iter().find(|stood| stood.is_of(target)).ok_or(target.pid())?;
            Ok((target.clone(), noted.stillness()))
        };
        self.0.iter().map(noted).collect()
    }

    /// Waits for CRIU, which still has the tree where its engine has just been killed: it ends the repair mode of the sockets first, and lets
    /// the tree run into the signal that waits for it.
    pub(super) fn await_release(&self) {
        let until = Instant::now() + RELEASE;
        while self.0.iter().any(Target::is_traced) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// How it stands.
    ///
    /// # Errors
    /// The first process that does not.
    pub(super) fn stand(&self) -> Result<Vec<Stood>, i32> {
        self.await_release();
        let stood = |target: &Target| {
            let process = Process { pid: target.pid(), start: target.start_time() };
            let Stillness { threads, switches } = target.stillness().ok_or(process.pid)?;
            Ok(Stood { process, threads, switches })
        };
        let until = Instant::now() + INTO_THE_STOP;
        loop {
            let all: Result<Vec<Stood>, i32> = self.0.iter().map(stood).collect();
            if all.is_ok() || Instant::now() > until {
                return all;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Its state in `/proc`, unless it has ended.
    fn letter(target: &Target) -> Option<char> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", target.pid())).ok()?;
        let state = stat.rsplit(") ").next()?.chars().next()?;
        (target.is_alive() && !matches!(state, 'Z' | 'X')).then_some(state)
    }

    pub(super) fn signal(&self, signal: Signal) -> Result<(), RecoverError> {
        for target in &self.0 {
            match pidfd_send_signal(target.pidfd(), signal) {
                Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                Err(errno) => {
                    return Err(RecoverError::Signal { pid: target.pid(), source: errno.into() });
                }
            }
        }
        Ok(())
    }

    /// Puts the pages of a copy that stands still into a store, as its engine does when the program runs elsewhere. Says how many they are.
    pub(super) fn keep(&self, dir: &Path) -> Result<u64, NotKept> {
        let look = |source: Box<dyn std::error::Error + Send + Sync>| NotKept::Look(source.to_string());
        if self.state() != Tree::Stopped {
            return Err(NotKept::Look("it does not stand still".to_owned()));
        }
        let mut spaces = Vec::with_capacity(self.0.len());
        for target in &self.0 {
            let pages = tracker::populated(target).map_err(|error| look(error.into()))?;
            spaces.push((PageReader::new(target).map_err(|error| look(error.into()))?, pages));
        }
        let mut store = KeptStore::open(dir)?;
        let give = |take: crate::kept::Take<'_>| {
            spaces.iter().try_for_each(|(reader, pages)| give_pages(reader, pages.runs(), take, &mut || ()))
        };
        Ok(store.refill(give)?)
    }

    pub(super) fn end(&self) -> Result<(), RecoverError> {
        self.signal(Signal::KILL)?;
        let until = Instant::now() + Duration::from_secs(10);
        for target in &self.0 {
            while Self::letter(target).is_some() {
                if Instant::now() > until {
                    return Err(RecoverError::Immortal(target.pid()));
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        Ok(())
    }
}

/// Why the pages of a copy could not be kept.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotKept {
    /// It could not be looked at.
    #[error("{0}")]
    Look(String),
    /// The store is another's just now, or cannot be written.
    #[error("{}", .0.chain())]
    Store(#[from] KeptError),
}
