//! Leaves pages that the program is ahead of for the next round ([`crate::policy::ahead`]).

use crate::policy::ahead::Pass;
use pageferry_tracker::{PageSet, Run, WriteCheck};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// A first pass over the memory of the tree, by all workers.
#[derive(Debug)]
pub(crate) struct Ahead {
    began: Instant,
    pass: Mutex<Pass>,
}

impl Ahead {
    /// A pass over so many pages, which begins now; 0 if nothing is to be left.
    pub(crate) fn new(pages: u64) -> Self {
        Self { began: Instant::now(), pass: Mutex::new(Pass::new(pages)) }
    }

    /// Takes the pages out of the `runs` of a batch that are better left for the next round. Says how many.
    pub(crate) fn leave(&self, check: &WriteCheck, runs: &mut Vec<Run>) -> u64 {
        // A pass is whole whenever the lock is free.
        let lock = || self.pass.lock().unwrap_or_else(PoisonError::into_inner);
        if lock().is_over() {
            return 0;
        }
        // Of a process that ends nothing can be said, and reading it says so.
        let Ok(written) = check.written(runs) else { return 0 };
        let pages = runs.iter().map(|run| run.len).sum();
        if !lock().leaves(self.began.elapsed(), written.len(), pages) {
            return 0;
        }
        let rest = runs.iter().copied().collect::<PageSet>().subtract(&written);
        runs.clear();
        runs.extend_from_slice(rest.runs());
        written.len()
    }
}
