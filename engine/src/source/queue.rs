//! What is to be sent in a round, handed out batch by batch to whichever worker comes next.

use crate::layout::Place;
use pageferry_tracker::{PageReader, PageSet, Run};
use pageferry_wire_format::SpaceId;
use std::sync::{Mutex, PoisonError};

/// What is to be sent of one space.
pub(crate) struct Task<'a> {
    pub(crate) place: &'a Place,
    pub(crate) reader: &'a PageReader,
    pub(crate) pages: &'a PageSet,
}

/// The queue.
pub(crate) struct Queue<'a> {
    tasks: Vec<Task<'a>>,
    next: Mutex<Next>,
}

#[derive(Default)]
struct Next {
    task: usize,
    run: usize,
    /// Pages of that run that were handed out.
    offset: u64,
}

impl<'a> Queue<'a> {
    pub(crate) fn new(tasks: Vec<Task<'a>>) -> Self {
        Self { tasks, next: Mutex::default() }
    }

    /// All pages.
    pub(crate) fn pages(&self) -> u64 {
        self.tasks.iter().map(|task| task.pages.len()).sum()
    }

    /// Whether a page is among what is to be sent.
    pub(crate) fn contains(&self, space: SpaceId, page: u64) -> bool {
        self.tasks.iter().any(|task| task.place.id == space && task.pages.contains(page))
    }

    /// Puts the next pages into `runs`, at most `most` of one space; `None` when everything was handed out.
    pub(crate) fn next(&self, most: u64, runs: &mut Vec<Run>) -> Option<&Task<'a>> {
        runs.clear();
        // The place in the queue is whole whenever the lock is free.
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let mut room = most;
        loop {
            let task = self.tasks.get(next.task)?;
            while room > 0
                && let Some(run) = task.pages.runs().get(next.run)
            {
                let len = (run.len - next.offset).min(room);
                runs.push(Run { start: run.start + next.offset, len });
                room -= len;
                next.offset += len;
                if next.offset == run.len {
                    (next.run, next.offset) = (next.run + 1, 0);
                }
            }
            if !runs.is_empty() {
                return Some(task);
            }
            *next = Next { task: next.task + 1, ..Next::default() };
        }
    }
}
