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

    /// Whether everything was handed out.
    pub(crate) fn is_empty(&self) -> bool {
        let next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let left = |task: &Task<'_>| !task.pages.is_empty();
        match self.tasks.get(next.task) {
            Some(task) if next.run < task.pages.runs().len() => false,
            _ => !self.tasks.iter().skip(next.task + 1).any(left),
        }
    }

    /// What was not handed out, task by task in their order.
    pub(crate) fn rest(&self) -> Vec<PageSet> {
        let next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let rest = |(index, task): (usize, &Task<'_>)| {
            if index != next.task {
                return if index < next.task { PageSet::default() } else { task.pages.clone() };
            }
            let mut rest = PageSet::default();
            let mut offset = next.offset;
            for run in task.pages.runs().get(next.run..).unwrap_or_default() {
                rest.insert(run.start + offset, run.len - offset);
                offset = 0;
            }
            rest
        };
        self.tasks.iter().enumerate().map(rest).collect()
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

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_tracker::Target;
    use std::process::{Command, Stdio};

    #[test]
    fn what_was_handed_out_and_the_rest_are_the_whole() {
        let mut child = Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap();
        let target = Target::open(child.id() as i32).unwrap();
        let reader = PageReader::new(&target).unwrap();
        let place = |id| Place { id: SpaceId(id), target: target.clone(), vpid: 1 };
        let places = [place(0), place(1), place(2), place(3)];
        let set = |runs: &[(u64, u64)]| {
            let mut set = PageSet::default();
            runs.iter().for_each(|(start, len)| set.insert(*start, *len));
            set
        };
        let pages = [set(&[(1, 5), (10, 3), (20, 1)]), set(&[]), set(&[(7, 9)]), set(&[])];
        for most in 1..20 {
            let tasks = places.iter().zip(&pages);
            let queue =
                Queue::new(tasks.map(|(place, pages)| Task { place, reader: &reader, pages }).collect());
            let mut given = vec![PageSet::default(); pages.len()];
            let mut runs = Vec::new();
            loop {
                let rest = queue.rest();
                for ((pages, given), rest) in pages.iter().zip(&given).zip(&rest) {
                    assert!(given.intersect(rest).is_empty(), "{most} at a time");
                    assert_eq!(&given.union(rest), pages, "{most} at a time");
                }
                assert_eq!(queue.is_empty(), rest.iter().all(PageSet::is_empty), "{most} at a time");
                let Some(task) = queue.next(most, &mut runs) else { break };
                let given = &mut given[task.place.id.0 as usize];
                runs.iter().for_each(|run| given.insert(run.start, run.len));
            }
            assert!(queue.is_empty());
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
