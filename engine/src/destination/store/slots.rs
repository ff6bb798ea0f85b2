//! Which slots are free, and where the next ones come from.

use super::error::{Bound, StoreError};
use super::limits::{Bounds, Limits};
use super::prefault::Prefault;
use crate::destination::sys::arena::{Arena, BLOCK_SLOTS, Extent, REGION_SLOTS, SLOT_BYTES};
use crate::effort::Effort;
use std::time::Duration;

/// Slots between two looks at the budget: 4 MiB.
const STRIDE: u64 = 1024;

/// Highest number of slots: the numbers above say something else in the index.
pub(super) const MOST_SLOTS: u64 = (u32::MAX - REGION_SLOTS) as u64;

/// Consecutive slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    first: u32,
    slots: u32,
}

#[derive(Debug)]
pub(super) struct Slots {
    arena: Arena,
    prefault: Prefault,
    /// Slots that were used before; the last one first, it may still be in the cache.
    free: Vec<Range>,
    free_slots: u64,
    /// The first slot that was never used.
    fresh: u64,
    /// Fresh slots before this number were allowed by the budget.
    allowed: u64,
    /// Bytes of index at the last look at the budget.
    index_bytes: u64,
    /// Slots in use per block.
    in_use: Vec<u16>,
    /// Set when nothing more is to come: a block without slots in use goes back to the system.
    /// Blocks before this one were looked at.
    draining: Option<usize>,
}

impl Slots {
    pub(super) fn new(limits: Limits, effort: &Effort) -> Result<Self, StoreError> {
        Ok(Self {
            arena: Arena::default(),
            prefault: Prefault::new(limits, effort.clone())?,
            free: Vec::new(),
            free_slots: 0,
            fresh: 0,
            allowed: 0,
            index_bytes: 0,
            in_use: Vec::new(),
            draining: None,
        })
    }

    /// The bulk has arrived: no more memory is made ready ahead. What still comes maps its memory itself.
    pub(super) fn settle(&mut self) {
        self.prefault.stop();
    }

    /// See [`super::PageStore::bounds`].
    pub(super) fn bounds(&self) -> Bounds {
        Bounds::of(self.prefault.shared())
    }

    /// See [`super::PageStore::reserve`].
    pub(super) fn reserve(&self, bytes: u64) -> Result<(), StoreError> {
        self.prefault.reserve(bytes)
    }

    /// Bytes that were announced.
    pub(super) fn announced(&self) -> u64 {
        self.prefault.announced()
    }

    /// See [`super::PageStore::check_beside`].
    pub(super) fn check_beside(&self, bytes: u64) -> Result<(), StoreError> {
        self.prefault.check_beside(bytes)
    }

    /// Bytes of memory that are ready for pages.
    pub(super) fn ready(&self) -> u64 {
        self.prefault.ready()
    }

    /// Lists of pages that others keep.
    pub(super) fn keep_lists(&self, bytes: u64) -> Result<(), StoreError> {
        self.prefault.keep_lists(bytes)
    }

    /// Whether all that was announced is ready, or as much as there is.
    pub(super) fn is_ready(&self) -> bool {
        self.prefault.is_done()
    }

    /// How long it has taken to make memory ready.
    pub(super) fn ready_in(&self) -> Duration {
        self.prefault.spent()
    }

    /// Slots that hold pages, or are about to.
    #[cfg(test)]
    pub(super) fn used(&self) -> u64 {
        self.fresh - self.free_slots
    }

    /// Lends `wanted` slots, as few extents as may be. On failure none is lent.
    pub(super) fn take(&mut self, wanted: u32, index_bytes: u64) -> Result<Vec<Extent>, StoreError> {
        let from_free = u64::from(wanted).min(self.free_slots);
        self.allow(self.fresh + u64::from(wanted) - from_free, index_bytes)?;
        let mut extents = Vec::new();
        let mut left = wanted;
        while left > 0 {
            let range = match self.reuse(left) {
                Some(range) => range,
                None => self.fresh_range(left)?,
            };
            left -= range.slots;
            match self.arena.lend(range.first, range.slots) {
                Some(extent) => {
                    self.count(range, true);
                    extents.push(extent);
                }
                // Free and lent at once cannot be; if it were, the slots would be lost, and no page with them.
                None => {
                    debug_assert!(false, "free slots {range:?} are lent");
                    left += range.slots;
                }
            }
        }
        Ok(extents)
    }

    /// Slots that were lent hold a page from now on. Gives an extent that is not ours back.
    pub(super) fn keep(&mut self, extent: Extent) -> Result<(), Extent> {
        self.arena.take_back(extent)
    }

    /// Slots that were lent are not needed.
    pub(super) fn give_back(&mut self, extent: Extent) {
        let range = Range { first: extent.first(), slots: extent.slots() };
        if self.arena.take_back(extent).is_ok() {
            self.release(range);
        }
    }

    /// The page in `slot` is not needed any more.
    pub(super) fn free(&mut self, slot: u32) {
        self.release(Range { first: slot, slots: 1 });
    }

    /// The bytes of `slots` slots that hold pages.
    pub(super) fn bytes(&self, first: u32, slots: u32) -> Option<&[u8]> {
        self.arena.bytes(first, slots)
    }

    /// Nothing more is to come: from now on memory goes back to the system as soon as a block of it is unused.
    /// Looks for blocks that are unused already, until `most` of them went back; says whether there may be more.
    pub(super) fn drain(&mut self, most: usize) -> bool {
        if self.draining.is_none() {
            self.prefault.stop();
        }
        let blocks = (self.arena.slots() / u64::from(BLOCK_SLOTS)) as usize;
        let (mut at, mut released) = (self.draining.unwrap_or(0), 0);
        while at < blocks && released < most {
            if self.in_use.get(at).is_none_or(|&used| used == 0) {
                self.arena.release(at as u32 * BLOCK_SLOTS, BLOCK_SLOTS);
                released += 1;
            }
            at += 1;
        }
        self.draining = Some(at);
        at < blocks
    }

    fn release(&mut self, range: Range) {
        self.count(range, false);
        self.free_slots += u64::from(range.slots);
        match self.free.last_mut() {
            Some(last) if range.first.checked_add(range.slots) == Some(last.first) => {
                *last = Range { first: range.first, slots: last.slots + range.slots };
            }
            Some(last) if last.first + last.slots == range.first => last.slots += range.slots,
            _ => self.free.push(range),
        }
    }

    fn reuse(&mut self, most: u32) -> Option<Range> {
        let last = self.free.last_mut()?;
        let in_region = REGION_SLOTS - last.first % REGION_SLOTS;
        let taken = Range { first: last.first, slots: last.slots.min(most).min(in_region) };
        if taken.slots == last.slots {
            self.free.pop();
        } else {
            *last = Range { first: last.first + taken.slots, slots: last.slots - taken.slots };
        }
        self.free_slots -= u64::from(taken.slots);
        Some(taken)
    }

    fn fresh_range(&mut self, most: u32) -> Result<Range, StoreError> {
        if self.fresh == self.arena.slots() {
            self.arena.push(self.prefault.region()?);
        }
        let first = self.fresh as u32;
        let slots = most.min(REGION_SLOTS - first % REGION_SLOTS);
        self.fresh += u64::from(slots);
        Ok(Range { first, slots })
    }

    /// Asks the budget for fresh slots before number `end`, a stride ahead, and tells it how far we are.
    fn allow(&mut self, end: u64, index_bytes: u64) -> Result<(), StoreError> {
        if end <= self.allowed && index_bytes <= self.index_bytes {
            return Ok(());
        }
        if end > MOST_SLOTS {
            let left = (MOST_SLOTS - self.fresh) * SLOT_BYTES as u64;
            let wanted = (end - self.fresh) * SLOT_BYTES as u64;
            return Err(StoreError::OutOfMemory { wanted, left, of: Bound::Numbers });
        }
        let ahead = if end > self.allowed { end + STRIDE } else { self.allowed };
        let bytes = |slots: u64| slots * SLOT_BYTES as u64;
        // A stride ahead of both, and without that stride only when the memory is nearly used up.
        if self.prefault.advance(bytes(ahead), index_bytes + index_bytes / 64).is_ok() {
            self.allowed = ahead;
            self.index_bytes = index_bytes + index_bytes / 64;
            return Ok(());
        }
        self.prefault.advance(bytes(end), index_bytes)?;
        self.allowed = self.allowed.max(end);
        self.index_bytes = index_bytes;
        Ok(())
    }

    /// Counts the slots of `range` as in use, or not any more.
    fn count(&mut self, range: Range, in_use: bool) {
        let (mut at, end) = (range.first, range.first + range.slots);
        while at < end {
            let block = (at / BLOCK_SLOTS) as usize;
            let stop = end.min((at / BLOCK_SLOTS + 1) * BLOCK_SLOTS);
            if self.in_use.len() <= block {
                self.in_use.resize(block + 1, 0);
            }
            let slots = (stop - at) as u16;
            if in_use {
                self.in_use[block] += slots;
            } else {
                self.in_use[block] -= slots;
                if self.draining.is_some() && self.in_use[block] == 0 {
                    self.arena.release(block as u32 * BLOCK_SLOTS, BLOCK_SLOTS);
                }
            }
            at = stop;
        }
    }
}
