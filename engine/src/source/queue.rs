//! What is to be sent in a round, handed out batch by batch to whichever worker comes next.

use crate::layout::Place;
use pageferry_tracker::{PageReader, PageSet, Run, WriteCheck};
use pageferry_wire_format::SpaceId;
use std::cmp::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What is to be sent of one space.
pub(crate) struct Task<'a> {
    pub(crate) place: &'a Place,
    pub(crate) reader: &'a PageReader,
    /// Says which pages have been written meanwhile, where that can be said.
    pub(crate) check: Option<&'a WriteCheck>,
    pub(crate) pages: &'a PageSet,
}

/// Pages whose entries lie in one page table, which the kernel locks while it reads any of them: they are read by one worker.
const TABLE: u64 = 512;

/// The queue.
pub(crate) struct Queue<'a> {
    tasks: Vec<Task<'a>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next: Next,
    /// What each worker has taken for itself.
    hands: Vec<Taken>,
}

/// How far everything was taken.
#[derive(Clone, Copy, Default)]
struct Next {
    task: usize,
    run: usize,
    /// Pages of that run that were taken.
    offset: u64,
}

/// Pages of one page table that a worker has taken, and that are not in a batch yet. In order, and the next one last.
#[derive(Default)]
struct Taken {
    task: usize,
    runs: Vec<Run>,
}

impl Taken {
    /// Moves at most `room` pages to `runs`. How many they were.
    fn give(&mut self, room: u64, runs: &mut Vec<Run>) -> u64 {
        let mut given = 0;
        while given < room
            && let Some(run) = self.runs.last_mut()
        {
            let len = run.len.min(room - given);
            match runs.last_mut() {
                Some(last) if last.end() == run.start => last.len += len,
                _ => runs.push(Run { start: run.start, len }),
            }
            given += len;
            (run.start, run.len) = (run.start + len, run.len - len);
            if run.len == 0 {
                self.runs.pop();
            }
        }
        given
    }
}

/// A worker's place at the queue ([`Queue::hand`]).
#[derive(Clone, Copy)]
pub(crate) struct Hand(usize);

impl<'a> Queue<'a> {
    pub(crate) fn new(tasks: Vec<Task<'a>>) -> Self {
        Self { tasks, state: Mutex::default() }
    }

    /// A place for a worker.
    pub(crate) fn hand(&self) -> Hand {
        let mut state = self.lock();
        state.hands.push(Taken::default());
        Hand(state.hands.len() - 1)
    }

    /// All pages.
    pub(crate) fn pages(&self) -> u64 {
        self.tasks.iter().map(|task| task.pages.len()).sum()
    }

    /// Whether everything was handed out.
    pub(crate) fn is_empty(&self) -> bool {
        let state = self.lock();
        let left = |task: &Task<'_>| !task.pages.is_empty();
        state.hands.iter().all(|taken| taken.runs.is_empty())
            && match self.tasks.get(state.next.task) {
                Some(task) if state.next.run < task.pages.runs().len() => false,
                _ => !self.tasks.iter().skip(state.next.task + 1).any(left),
            }
    }

    /// What was not handed out, task by task in their order.
    pub(crate) fn rest(&self) -> Vec<PageSet> {
        let state = self.lock();
        let rest = |(index, task): (usize, &Task<'_>)| {
            let mut rest = PageSet::default();
            for taken in state.hands.iter().filter(|taken| taken.task == index) {
                taken.runs.iter().for_each(|run| rest.insert(run.start, run.len));
            }
            let next = match index.cmp(&state.next.task) {
                Ordering::Less => return rest,
                Ordering::Equal => state.next,
                Ordering::Greater => Next::default(),
            };
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

    /// Puts the next pages into `runs`, at most `most` of one space and in their order; `None` when everything was handed out.
    ///
    /// A worker takes the pages of a whole page table for itself: two that read there at the same time wait for each other. When there
    /// is nothing more to take, those that have nothing help the others.
    pub(crate) fn next(&self, hand: Hand, most: u64, runs: &mut Vec<Run>) -> Option<&Task<'a>> {
        runs.clear();
        let mut state = self.lock();
        let State { next, hands } = &mut *state;
        let mut room = most;
        while room > 0 {
            let has = hands[hand.0].task;
            if hands[hand.0].runs.is_empty() {
                let same = (!runs.is_empty()).then_some(has);
                if !self.take(next, same, &mut hands[hand.0]) {
                    break;
                }
            }
            room -= hands[hand.0].give(room, runs);
        }
        let mut task = hands[hand.0].task;
        if runs.is_empty() {
            let other = hands.iter_mut().find(|taken| !taken.runs.is_empty())?;
            other.give(most, runs);
            task = other.task;
        }
        self.tasks.get(task)
    }

    /// Takes the pages of the next page table, of the task `of` if it is told; false if there are none.
    fn take(&self, next: &mut Next, of: Option<usize>, taken: &mut Taken) -> bool {
        while let Some(task) = self.tasks.get(next.task).filter(|_| of.is_none_or(|of| of == next.task)) {
            let mut table = None;
            while let Some(run) = task.pages.runs().get(next.run) {
                let start = run.start + next.offset;
                if *table.get_or_insert(start / TABLE) != start / TABLE {
                    break;
                }
                let len = (run.end() - start).min(TABLE - start % TABLE);
                taken.runs.push(Run { start, len });
                next.offset += len;
                if next.offset == run.len {
                    (next.run, next.offset) = (next.run + 1, 0);
                }
            }
            if table.is_some() {
                taken.task = next.task;
                taken.runs.reverse();
                return true;
            }
            if of.is_some() {
                return false;
            }
            *next = Next { task: next.task + 1, ..Next::default() };
        }
        false
    }

    /// The state is whole whenever the lock is free.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
        let pages = [
            set(&[(1, 5), (10, 3), (20, 1), (505, 40), (1100, 1), (1534, 3)]),
            set(&[]),
            set(&[(7, 9), (1000, 1200)]),
            set(&[]),
        ];
        for (most, workers) in
            (1..20).chain([64, 700, 5000]).flat_map(|most| [(most, 1), (most, 2), (most, 3)])
        {
            let tasks = places.iter().zip(&pages);
            let queue = Queue::new(
                tasks.map(|(place, pages)| Task { place, reader: &reader, check: None, pages }).collect(),
            );
            let hands: Vec<Hand> = (0..workers).map(|_| queue.hand()).collect();
            let mut given = vec![PageSet::default(); pages.len()];
            let mut runs = Vec::new();
            // One has two turns of three, so that others are left with what they have taken.
            for turn in 0.. {
                let rest = queue.rest();
                for ((pages, given), rest) in pages.iter().zip(&given).zip(&rest) {
                    assert!(given.intersect(rest).is_empty(), "{most} at a time");
                    assert_eq!(&given.union(rest), pages, "{most} at a time");
                }
                assert_eq!(queue.is_empty(), rest.iter().all(PageSet::is_empty), "{most} at a time");
                let hand = hands[if turn % 3 == 2 { turn / 3 % workers } else { 0 }];
                let Some(task) = queue.next(hand, most, &mut runs) else { break };
                assert!(
                    runs.windows(2).all(|pair| pair[0].end() < pair[1].start),
                    "in order, and no two that touch"
                );
                let pages: u64 = runs.iter().map(|run| run.len).sum();
                assert!((1..=most).contains(&pages));
                let given = &mut given[task.place.id.0 as usize];
                runs.iter().for_each(|run| given.insert(run.start, run.len));
            }
            assert!(queue.is_empty());
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn the_pages_of_a_page_table_go_to_one_worker_as_long_as_there_are_others() {
        let mut child = Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap();
        let target = Target::open(child.id() as i32).unwrap();
        let reader = PageReader::new(&target).unwrap();
        let place = Place { id: SpaceId(0), target: target.clone(), vpid: 1 };
        let pages: PageSet = std::iter::once(Run { start: 100, len: 1500 }).collect();
        let queue = Queue::new(vec![Task { place: &place, reader: &reader, check: None, pages: &pages }]);
        let (one, other) = (queue.hand(), queue.hand());
        let next = |hand| {
            let mut runs = Vec::new();
            queue
                .next(hand, 200, &mut runs)
                .map(|_| runs.iter().map(|r| (r.start, r.len)).collect::<Vec<_>>())
        };
        assert_eq!(next(one), Some(vec![(100, 200)]));
        assert_eq!(next(other), Some(vec![(512, 200)]));
        assert_eq!(next(one), Some(vec![(300, 200)]));
        // The rest of its own and the beginning of the next one that is free.
        assert_eq!(next(one), Some(vec![(500, 12), (1024, 188)]));
        assert_eq!(next(other), Some(vec![(712, 200)]));
        assert_eq!(next(other), Some(vec![(912, 112), (1536, 64)]));
        // Nothing is left to be taken: it helps.
        assert_eq!(next(other), Some(vec![(1212, 200)]));
        assert_eq!(next(one), Some(vec![(1412, 124)]));
        assert_eq!(next(one), None);
        assert_eq!(next(other), None);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
