//! Pages in the order of the rounds in which they came last, the latest first.

use super::view::TABLE_PAGES;
use super::worker::Worker;
use crate::destination::store::PageStore;

/// Tables that are looked at in one go: somebody may wait meanwhile.
const TABLES_AT_ONCE: usize = 256;

/// A place in that order. Only where to go on: pages that are put in place meanwhile, by whomever, are passed over.
#[derive(Debug)]
pub(super) struct Latest {
    round: u32,
    view: usize,
    table: u64,
    /// The last round that counts.
    until: u32,
}

/// What comes next.
pub(super) enum Found {
    /// So many pages, from `origin` in the store on, of a view.
    Pages { view: usize, origin: u64, run: u64 },
    /// It is still looked for.
    Later,
    /// None.
    Nothing,
}

impl Latest {
    /// All pages of the rounds down to `until`.
    pub(super) fn down_to(until: u32) -> Self {
        Self { round: PageStore::LAST_ROUND, view: 0, table: 0, until }
    }

    pub(super) fn next(&mut self, worker: &Worker) -> Found {
        let mut looks = TABLES_AT_ONCE;
        loop {
            while let Some(view) = worker.views().get(self.view) {
                let store = worker.lock();
                if !store.has_round(view.space, self.round) {
                    (self.view, self.table) = (self.view + 1, 0);
                    continue;
                }
                for (number, pending) in view.pending.tables(self.table) {
                    self.table = number;
                    if looks == 0 {
                        return Found::Later;
                    }
                    looks -= 1;
                    let pages = store.stored_in_round(view.space, number, self.round).and(pending);
                    if let Some(first) = pages.next(0) {
                        let run = (first..TABLE_PAGES as usize).take_while(|&at| pages.has(at)).count();
                        let origin = number * TABLE_PAGES + first as u64;
                        return Found::Pages { view: self.view, origin, run: run as u64 };
                    }
                }
                (self.view, self.table) = (self.view + 1, 0);
            }
            if self.round == self.until {
                return Found::Nothing;
            }
            (self.round, self.view, self.table) = (self.round - 1, 0, 0);
        }
    }
}
