//! One restored task's memory: what of the store is still missing in it, and where it belongs.

use super::address_map::{AddressMap, Piece};
use super::locality::Locality;
use crate::destination::store::{Mask, PageStore};
use crate::page_bits::PageBits;
use pageferry_tracker::uffd::Uffd;
use pageferry_wire_format::SpaceId;
use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

/// Pages of a table of the store.
pub(super) const TABLE_PAGES: u64 = 512;

/// The store's pages that are not in a program yet. Zero pages are never among them: memory that nobody put
/// anything into reads as zero.
#[derive(Clone, Debug, Default)]
pub(super) struct Pending {
    tables: BTreeMap<u64, Mask>,
    pages: u64,
}

impl Pending {
    pub(super) fn of(store: &PageStore, space: SpaceId) -> Self {
        let tables: BTreeMap<u64, Mask> = store.stored_pages(space).collect();
        let pages = tables.values().map(Mask::count).sum();
        Self { tables, pages }
    }

    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    pub(super) fn has(&self, page: u64) -> bool {
        self.tables.get(&(page / TABLE_PAGES)).is_some_and(|mask| mask.has((page % TABLE_PAGES) as usize))
    }

    /// The first page in [from, end).
    pub(super) fn next(&self, from: u64, end: u64) -> Option<u64> {
        if from >= end {
            return None;
        }
        let first = from / TABLE_PAGES;
        let mut tables = self.tables.range(first..end.div_ceil(TABLE_PAGES));
        tables
            .find_map(|(&number, mask)| {
                let at = if number == first { (from % TABLE_PAGES) as usize } else { 0 };
                mask.next(at).map(|at| number * TABLE_PAGES + at as u64)
            })
            .filter(|&page| page < end)
    }

    /// How many pages from `page` on are all pending, at most `most`.
    pub(super) fn run(&self, page: u64, most: u64) -> u64 {
        (0..most).take_while(|ahead| self.has(page + ahead)).count() as u64
    }

    /// The tables from number `from` on.
    pub(super) fn tables(&self, from: u64) -> impl Iterator<Item = (u64, &Mask)> {
        self.tables.range(from..).map(|(&number, mask)| (number, mask))
    }

    /// A page has come late.
    pub(super) fn insert(&mut self, page: u64) {
        let mask = self.tables.entry(page / TABLE_PAGES).or_default();
        let at = (page % TABLE_PAGES) as usize;
        if !mask.has(at) {
            mask.set(at);
            self.pages += 1;
        }
    }

    pub(super) fn remove(&mut self, page: u64) -> bool {
        let number = page / TABLE_PAGES;
        let Some(mask) = self.tables.get_mut(&number) else { return false };
        let at = (page % TABLE_PAGES) as usize;
        if !mask.has(at) {
            return false;
        }
        mask.clear(at);
        self.pages -= 1;
        if mask.is_empty() {
            self.tables.remove(&number);
        }
        true
    }

    /// Removes all of [first, first + count); gives those that were pending.
    pub(super) fn remove_range(&mut self, first: u64, count: u64) -> Vec<u64> {
        let end = first.saturating_add(count);
        let mut removed = Vec::new();
        let mut from = first;
        while let Some(page) = self.next(from, end) {
            self.remove(page);
            removed.push(page);
            from = page + 1;
        }
        removed
    }

    pub(super) fn all(&self) -> impl Iterator<Item = u64> + '_ {
        self.tables
            .iter()
            .flat_map(|(number, mask)| mask.iter().map(move |at| number * TABLE_PAGES + at as u64))
    }
}

/// A page fault that nobody has answered yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fault {
    /// The page in the program.
    pub(super) page: u64,
    /// When its message was read.
    pub(super) read: Instant,
    /// Whether the page had to come first.
    pub(super) late: bool,
}

pub(super) struct View {
    pub(super) uffd: Uffd,
    pub(super) space: SpaceId,
    pub(super) map: AddressMap,
    pub(super) pending: Pending,
    /// Pages that come late, by their numbers in the store, and have not come.
    pub(super) owed: PageBits,
    /// Faults on these.
    pub(super) waiting: Vec<Fault>,
    pub(super) faults: VecDeque<Fault>,
    /// Its events could not be read: not to be tried again before this moment.
    pub(super) unreadable: Option<Instant>,
    /// Where the background is, as a page of the program.
    pub(super) cursor: u64,
    /// What the program has waited for, in its own pages.
    pub(super) locality: Locality,
}

impl View {
    pub(super) fn new(uffd: Uffd, space: SpaceId, pending: Pending, owed: PageBits) -> Self {
        Self {
            uffd,
            space,
            map: AddressMap::identity(),
            pending,
            owed,
            waiting: Vec::new(),
            faults: VecDeque::new(),
            unreadable: None,
            cursor: 0,
            locality: Locality::default(),
        }
    }

    /// Whether anything is still to be put in place, now or when it comes.
    pub(super) fn misses(&self) -> bool {
        self.pending.pages() > 0 || !self.owed.is_empty()
    }

    /// Puts faults in line again that waited for pages, and have no reason to wait any more.
    pub(super) fn recall(&mut self) {
        let (map, owed) = (&self.map, &self.owed);
        let waits = |fault: &Fault| map.at(fault.page).is_some_and(|piece| owed.has(piece.origin));
        let (waiting, ready) = std::mem::take(&mut self.waiting).into_iter().partition(waits);
        self.waiting = waiting;
        let ready: Vec<Fault> = ready;
        ready.into_iter().rev().for_each(|fault| self.faults.push_front(fault));
    }

    /// The same memory in a forked child.
    pub(super) fn forked(&self, uffd: Uffd) -> Self {
        Self {
            uffd,
            space: self.space,
            map: self.map.clone(),
            pending: self.pending.clone(),
            owed: self.owed.clone(),
            waiting: Vec::new(),
            faults: VecDeque::new(),
            unreadable: None,
            cursor: self.cursor,
            locality: Locality::default(),
        }
    }

    /// The next of the pages that the program is likely to touch next; `None` when they are all there, or nobody knows.
    pub(super) fn next_near(&mut self) -> Option<Piece> {
        let (from, to) = self.locality.window()?;
        let found = self.next_between(from, to);
        if found.is_none() {
            self.locality.is_filled();
        }
        found
    }

    /// The next pages for the background: on from the cursor, and around. `None` when nothing is missing.
    pub(super) fn next(&mut self) -> Option<Piece> {
        if self.pending.pages() == 0 {
            return None;
        }
        let found = self.next_between(self.cursor, u64::MAX).or_else(|| self.next_between(0, self.cursor));
        if let Some(piece) = found {
            self.cursor = piece.start;
        }
        found
    }

    fn next_between(&self, mut from: u64, end: u64) -> Option<Piece> {
        while let Some(piece) = self.map.from(from).filter(|piece| piece.start < end) {
            let len = piece.len.min(end - piece.start);
            if let Some(origin) = self.pending.next(piece.origin, piece.origin + len) {
                let into = origin - piece.origin;
                return Some(Piece { start: piece.start + into, len: len - into, origin });
            }
            from = piece.start + piece.len;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pending(pages: &[u64]) -> Pending {
        let mut pending = Pending::default();
        for &page in pages {
            pending.tables.entry(page / TABLE_PAGES).or_default().set((page % TABLE_PAGES) as usize);
            pending.pages += 1;
        }
        pending
    }

    #[test]
    fn what_is_pending_is_found_and_removed() {
        let mut p = pending(&[3, 4, 5, 511, 512, 5000]);
        assert_eq!(p.next(0, 3), None);
        assert_eq!(p.next(0, 4), Some(3));
        assert_eq!(p.next(6, 10_000), Some(511));
        assert_eq!(p.next(513, 10_000), Some(5000));
        assert_eq!((p.run(3, 10), p.run(511, 10), p.run(3, 2), p.run(6, 1)), (3, 2, 2, 0));
        assert_eq!(p.remove_range(4, 600), [4, 5, 511, 512]);
        assert!(!p.remove(4) && p.remove(3));
        assert_eq!((p.pages(), p.all().collect::<Vec<_>>()), (1, vec![5000]));
    }
}
