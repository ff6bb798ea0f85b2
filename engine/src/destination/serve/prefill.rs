//! Putting the hottest pages in place before the program runs.

use super::Budget;
use super::error::ServeError;
use super::latest::{Found, Latest};
use super::stride;
use super::worker::{Put, Worker};
use pageferry_wire_format::PageNo;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

/// Pages put in at once where no time is to be kept: a large copy is the quickest.
const LARGE_STEP: u64 = 512;

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

/// A prefill under way, the latest pages first.
pub(super) struct Prefill {
    budget: Budget,
    reply: Sender<Result<PrefillStats, ServeError>>,
    started: Instant,
    pages: u64,
    latest: Latest,
}

impl Prefill {
    pub(super) fn new(
        budget: Budget,
        reply: Sender<Result<PrefillStats, ServeError>>,
        started: Instant,
    ) -> Self {
        Self { budget, reply, started, pages: 0, latest: Latest::down_to(0) }
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
        let (at, origin, run) = match self.latest.next(worker) {
            Found::Pages { view, origin, run } => (view, origin, run),
            Found::Later => return Some(self),
            Found::Nothing => return self.end(worker),
        };
        let view = &worker.views()[at];
        let space = view.space;
        let Some((page, together)) = view.map.find(origin) else {
            self.fail(ServeError::Lost { space, page: PageNo(origin) });
            return None;
        };
        let most = run.min(together).min(most);
        let put = match brief {
            true => worker.put_briefly(at, origin, page, most),
            false => worker.put(at, origin, page, most),
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
