//! What is left on this machine of the tree that a journal speaks of.

use super::recover::RecoverError;
use super::verdict::Tree;
use super::{Entry, Process};
use crate::kept::{KeptError, KeptStore, give_pages};
use pageferry_tracker::{self as tracker, PageReader, Target};
use rustix::process::{Signal, pidfd_send_signal};
use std::path::Path;
use std::time::{Duration, Instant};

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
            spaces.iter().try_for_each(|(reader, pages)| give_pages(reader, pages.runs(), take))
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
