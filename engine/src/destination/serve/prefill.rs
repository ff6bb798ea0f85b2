//! Putting the hottest pages in place before the program runs.

use super::Budget;
use super::error::ServeError;
use super::stride;
use super::worker::{Put, Worker};
use crate::destination::store::PageStore;
use pageferry_wire_format::PageNo;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

/// Pages put in at once where no time is to be kept: a large copy is the quickest.
const LARGE_STEP: u64 = 512;
const TABLE_PAGES: u64 = 512;

/// What prefilling did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefillStats {
    /// Pages put in place.
    pub pages: u64,
    /// Pages with bytes that are still missing in some task.
    pub missing: u64,
    /// How long it took.
    pub duration: Duration,
}

/// A prefill under way: pages in the order of the rounds in which they came last, the latest first.
pub(super) struct Prefill {
    budget: Budget,
    reply: Sender<Result<PrefillStats, ServeError>>,
    started: Instant,
    pages: u64,
    round: u32,
    view: usize,
    table: u64,
}

impl Prefill {
    pub(super) fn new(
        budget: Budget,
        reply: Sender<Result<PrefillStats, ServeError>>,
        started: Instant,
    ) -> Self {
        Self { budget, reply, started, pages: 0, round: PageStore::LAST_ROUND, view: 0, table: 0 }
    }

    /// One copy. Gives itself back when there is more to do.
    pub(super) fn step(mut self, worker: &mut Worker) -> Option<Self> {
        let (brief, most) = match self.budget {
            Budget::Time(time) if self.started.elapsed() >= time => return self.end(worker),
            Budget::Time(_) => (true, stride::MOST),
            #[cfg(test)]
            Budget::Pages(pages) if self.pages >= pages => return self.end(worker),
            #[cfg(test)]
            Budget::Pages(pages) => (false, LARGE_STEP.min(pages - self.pages)),
            Budget::All => (false, LARGE_STEP),
        };
        let Some((origin, run)) = self.next(worker) else { return self.end(worker) };
        let view = &worker.views()[self.view];
        let space = view.space;
        let Some((page, together)) = view.map.find(origin) else {
            self.fail(ServeError::Lost { space, page: PageNo(origin) });
            return None;
        };
        let most = run.min(together).min(most);
        let put = match brief {
            true => worker.put_briefly(self.view, origin, page, most),
            false => worker.put(self.view, origin, page, most),
        };
        match put {
            Put::Done(pages) => {
                self.pages += pages;
                worker.prefilled(pages);
                Some(self)
            }
            Put::Events | Put::Waits => Some(self),
            Put::Gone => self.give_up(ServeError::TaskGone { space }),
            Put::NotRegistered => self.give_up(ServeError::NotRegistered { space, page: PageNo(origin) }),
            Put::Failed(error) => self.give_up(error),
        }
    }

    /// The next pages in order: the first, and how many behind it are of the same round.
    fn next(&mut self, worker: &Worker) -> Option<(u64, u64)> {
        loop {
            while let Some(view) = worker.views().get(self.view) {
                let store = worker.lock();
                if !store.has_round(view.space, self.round) {
                    (self.view, self.table) = (self.view + 1, 0);
                    continue;
                }
                for (number, pending) in view.pending.tables(self.table) {
                    self.table = number;
                    let pages = store.stored_in_round(view.space, number, self.round).and(pending);
                    if let Some(first) = pages.next(0) {
                        let run = (first..TABLE_PAGES as usize).take_while(|&at| pages.has(at)).count();
                        return Some((number * TABLE_PAGES + first as u64, run as u64));
                    }
                }
                (self.view, self.table) = (self.view + 1, 0);
            }
            self.round = self.round.checked_sub(1)?;
            self.view = 0;
        }
    }

    fn end(self, worker: &Worker) -> Option<Self> {
        let missing = worker.views().iter().map(|view| view.pending.pages()).sum();
        let stats = PrefillStats { pages: self.pages, missing, duration: self.started.elapsed() };
        // Who asked may have gone; the pages are in place all the same.
        let _ = self.reply.send(Ok(stats));
        None
    }

    fn give_up(self, error: ServeError) -> Option<Self> {
        self.fail(error);
        None
    }

    pub(super) fn fail(self, error: ServeError) {
        let _ = self.reply.send(Err(error));
    }
}
