//! The destination's memory of the pages that were received: an index for each address space, over slots of
//! memory that is made ready ahead of use.
//!
//! A batch is received straight into fresh slots ([`PageStore::begin_batch`] says where), checked against its
//! digest, and only then replaces what was there ([`PageStore::finish_batch`]): a broken batch changes nothing.
//! The digest over each space is kept up with every page, so that sealing, which happens while the program is
//! frozen, does not read the memory again.

mod budget;
mod copies;
mod error;
mod index;
mod kills;
mod landing;
mod limits;
mod prefault;
mod slots;
mod tables;

pub(crate) use prefault::populating;

pub use copies::CopyOrder;
#[cfg(test)]
use error::Bound;
pub use error::StoreError;
pub(crate) use index::Mask;
pub(crate) use kills::Kills;
pub use landing::Landing;
pub(crate) use limits::{Bounds, Limits, Taken};

use super::sys::arena::SLOT_BYTES;
use crate::effort::Effort;
use crate::kept::KeptPages;
use index::{Place, SpaceIndex, TABLE_BYTES, TABLE_PAGES, by_table, split};
use landing::Returned;
use pageferry_wire_format::digest::{self, SpaceDigest};
use pageferry_wire_format::{Chain, Coding, PageBatch, PageNo, PageRef as PageAt, PageRun, SpaceId};
use slots::Slots;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The pages received so far.
#[derive(Debug)]
pub struct PageStore {
    slots: Slots,
    spaces: BTreeMap<SpaceId, SpaceIndex>,
    returned: Arc<Mutex<Returned>>,
    /// From before this session.
    kept: Arc<KeptPages>,
}

/// Where the bytes of a page are that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageState {
    /// Here, or it is zeros.
    Held,
    /// In the restored program.
    Delivered,
}

/// The bytes of a page.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageRef<'a> {
    /// All are zero.
    Zero,
    /// These.
    Bytes(&'a [u8; SLOT_BYTES]),
    /// They are in the restored program already, and no longer here.
    Delivered,
}

/// What a finished batch brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchOutcome {
    /// Pages with bytes.
    pub stored: u64,
    /// Zero pages.
    pub zero: u64,
}

/// What a space consists of once it is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SealOutcome {
    /// Pages that belong to the program, all of them here.
    pub pages: u64,
    /// How many of them have bytes that are not all zero.
    pub stored: u64,
    /// Pages that were here and do not belong to the program: they were dropped.
    pub dropped: u64,
    /// Digest over page numbers and page digests.
    pub digest: SpaceDigest,
}

impl PageStore {
    /// An empty store, which takes at most `pages` bytes of memory for pages and their index, and never more than the machine has
    /// available; and `index` bytes for the index alone, with the lists that others keep of pages.
    ///
    /// # Errors
    /// When no thread can be started.
    #[cfg(test)]
    pub fn new(pages: Option<u64>, index: Option<u64>) -> Result<Self, StoreError> {
        Self::sparing(Limits { pages, index }, &Effort::default())
    }

    /// The same, whose memory is made ready with no more of the processors than `effort` says.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(crate) fn sparing(limits: Limits, effort: &Effort) -> Result<Self, StoreError> {
        Ok(Self {
            slots: Slots::new(limits, effort)?,
            spaces: BTreeMap::new(),
            returned: Arc::default(),
            kept: Arc::default(),
        })
    }

    /// What its limits can be changed by while it is used.
    pub(crate) fn bounds(&self) -> Bounds {
        self.slots.bounds()
    }

    /// What pages may be copied from besides: those of a store that was kept.
    pub(crate) fn set_kept(&mut self, kept: Arc<KeptPages>) {
        self.kept = kept;
    }

    /// Announces that `bytes` of pages will come altogether, counted from the start: their memory is made ready
    /// in the background from now on.
    ///
    /// # Errors
    /// [`StoreError::OutOfMemory`] when that much cannot be had: better now than in the middle.
    pub fn reserve(&self, bytes: u64) -> Result<(), StoreError> {
        self.slots.reserve(bytes)
    }

    /// Bytes that were announced.
    pub fn announced_bytes(&self) -> u64 {
        self.slots.announced()
    }

    /// Whether the machine, or the control group, has `bytes` of memory for something else beside the pages.
    ///
    /// # Errors
    /// [`StoreError::OutOfMemory`].
    pub fn check_beside(&self, bytes: u64) -> Result<(), StoreError> {
        self.slots.check_beside(bytes)
    }

    /// Others keep lists of pages that take so many bytes, beside the index.
    ///
    /// # Errors
    /// [`StoreError::OutOfMemory`].
    pub fn keep_lists(&self, bytes: u64) -> Result<(), StoreError> {
        self.slots.keep_lists(bytes)
    }

    /// Bytes of memory that are ready for pages, and taken from the machine already.
    pub fn ready_bytes(&self) -> u64 {
        self.slots.ready()
    }

    /// Whether memory is ready for all that was announced, or as much of it as there is.
    pub fn is_ready(&self) -> bool {
        self.slots.is_ready()
    }

    /// How long it has taken so far to make memory ready.
    pub fn ready_in(&self) -> Duration {
        self.slots.ready_in()
    }

    /// Bytes of memory that pages take now; zero pages take none.
    #[cfg(test)]
    pub fn page_bytes(&self) -> u64 {
        self.slots.used() * SLOT_BYTES as u64
    }

    /// The bulk has arrived: stops making memory ready. That work holds up everything else that maps memory in
    /// this process, and from now on time matters more.
    pub fn settle(&mut self) {
        self.slots.settle();
    }

    /// Bytes that the index takes.
    pub fn index_bytes(&self) -> u64 {
        self.spaces.values().map(|space| space.tables.len() as u64 * TABLE_BYTES).sum()
    }

    /// Makes room for a batch with a payload of `payload_len` bytes, which are to be received into
    /// [`Landing::slices`]; then the batch is to be finished. Dropping it instead leaves everything as it was.
    ///
    /// The round of the batch says how recent its pages are: those of later rounds are put in place first.
    ///
    /// # Errors
    /// [`StoreError::OutOfMemory`]; [`StoreError::Base`] when it was made from something else than is here;
    /// [`StoreError::Coding`] for a coding that it does not take.
    pub fn begin_batch(&mut self, batch: &PageBatch, payload_len: usize) -> Result<Landing, StoreError> {
        let mut buffers = {
            let mut returned = self.returned.lock().unwrap_or_else(PoisonError::into_inner);
            for extent in returned.extents.drain(..) {
                self.slots.give_back(extent);
            }
            std::mem::take(&mut returned.buffers)
        };
        let (space, round, coding) = (batch.space(), batch.round(), batch.coding());
        if coding == Coding::Copy {
            return Err(StoreError::Coding { space, coding });
        }
        self.expect_bases(batch)?;
        let tables = self.spaces.get(&space).map(|index| &index.tables);
        let (mut pages, mut zeros) = (Vec::with_capacity(batch.nonzero()), Vec::new());
        let (mut grown, mut last) = (0, None);
        for (page, zero) in batch.pages() {
            if zero { &mut zeros } else { &mut pages }.push(page);
            let number = split(page).0;
            if last.replace(number) != Some(number) && tables.is_none_or(|t| !t.contains(number)) {
                grown += TABLE_BYTES;
            }
        }
        let extents = self.slots.take(pages.len() as u32, self.index_bytes() + grown)?;
        if coding != Coding::Raw {
            buffers.packed.resize(payload_len, 0);
        }
        let returned = Arc::clone(&self.returned);
        // From here on the slots find their way back whatever happens.
        let digests = Vec::with_capacity(pages.len());
        let (content, each) = (batch.content(), batch.each().to_vec());
        let mut landing = Landing {
            space,
            round,
            pages,
            digests,
            content,
            each,
            zeros,
            extents,
            coding,
            buffers,
            checked: false,
            returned,
        };
        match coding {
            Coding::Raw | Coding::Zstd | Coding::Copy => {}
            Coding::Delta => self.lay_bases(&mut landing, batch.sources())?,
            Coding::ZstdOnBase => self.gather_bases(&mut landing, batch.sources())?,
        }
        Ok(landing)
    }

    /// Whether the pages that a batch is made from are here, and are those.
    fn expect_bases(&self, batch: &PageBatch) -> Result<(), StoreError> {
        let wrong = || StoreError::Base { space: batch.space(), page: batch.runs()[0].start };
        let mut bases = Chain::default();
        for source in batch.sources() {
            bases.push(&self.content_at(source).ok_or_else(wrong)?);
        }
        if bases == batch.bases() { Ok(()) } else { Err(wrong()) }
    }

    /// The digest of what is at a place.
    fn content_at(&self, place: &PageAt) -> Option<digest::PageDigest> {
        match place.space {
            SpaceId::KEPT => self.kept.digests().get(usize::try_from(place.page.0).ok()?).copied(),
            space => self.spaces.get(&space)?.digest_of(place.page),
        }
    }

    /// Puts into the slots of a batch of deltas what they were made from.
    fn lay_bases(&self, landing: &mut Landing, sources: &[PageAt]) -> Result<(), StoreError> {
        let space = landing.space;
        let slots =
            landing.extents.iter_mut().flat_map(|extent| extent.bytes_mut().as_chunks_mut::<SLOT_BYTES>().0);
        for ((bytes, &page), source) in slots.zip(&landing.pages).zip(sources) {
            self.read(source, bytes).ok_or(StoreError::Base { space, page })?;
        }
        Ok(())
    }

    /// Puts together what a batch was compressed on top of.
    fn gather_bases(&self, landing: &mut Landing, sources: &[PageAt]) -> Result<(), StoreError> {
        let space = landing.space;
        let room = &mut landing.buffers.bases;
        room.resize(landing.pages.len() * SLOT_BYTES, 0);
        let slots = room.as_chunks_mut::<SLOT_BYTES>().0.iter_mut();
        for ((bytes, &page), source) in slots.zip(&landing.pages).zip(sources) {
            self.read(source, bytes).ok_or(StoreError::Base { space, page })?;
        }
        Ok(())
    }

    /// Copies the bytes at a place out, if they are here; those of a kept page are compared with its digest.
    fn read(&self, place: &PageAt, into: &mut [u8; SLOT_BYTES]) -> Option<()> {
        let content = self.content_at(place)?;
        if place.space == SpaceId::KEPT {
            return self.kept.read(place.page.0, &content, into).then_some(());
        }
        match self.stretch(place.space, place.page, 1) {
            Some(bytes) => into.copy_from_slice(bytes),
            None if content == digest::ZERO_PAGE => into.fill(0),
            // It was handed on to the restored program.
            None => return None,
        }
        Some(())
    }

    /// Checks a received batch against its digests and lets its pages replace what was there.
    ///
    /// # Errors
    /// [`StoreError::DigestMismatch`], [`StoreError::Unpack`]: then no page of the batch counts, and what was
    /// there before is still there.
    pub fn finish_batch(&mut self, mut landing: Landing) -> Result<BatchOutcome, StoreError> {
        let space = landing.space;
        if !Arc::ptr_eq(&self.returned, &landing.returned) {
            return Err(StoreError::Foreign { space });
        }
        landing.check()?;
        let mut places = Vec::with_capacity(landing.pages.len());
        for extent in std::mem::take(&mut landing.extents) {
            places.extend((extent.first()..extent.first() + extent.slots()).map(Place::Slot));
            if self.slots.keep(extent).is_err() {
                return Err(StoreError::Foreign { space });
            }
        }
        let index = self.spaces.entry(space).or_default();
        let slots = &mut self.slots;
        let contents = landing.pages.iter().zip(&landing.digests);
        let stored = contents.zip(places).map(|((&page, &digest), place)| (page, place, digest));
        index.insert(landing.round, stored, |slot| slots.free(slot));
        let zeros = landing.zeros.iter().map(|&page| (page, Place::Zero, digest::ZERO_PAGE));
        index.insert(landing.round, zeros, |slot| slots.free(slot));
        Ok(BatchOutcome { stored: landing.pages.len() as u64, zero: landing.zeros.len() as u64 })
    }

    /// Forgets pages that are gone from the program.
    pub fn discard(&mut self, space: SpaceId, runs: &[PageRun]) {
        let Some(index) = self.spaces.get_mut(&space) else { return };
        for run in runs {
            // A run may span the whole address space: only the tables that exist are visited.
            let end = run.start.0.saturating_add(run.len);
            let tables = split(run.start).0..end.div_ceil(TABLE_PAGES);
            for number in index.tables.numbers(tables) {
                let base = number * TABLE_PAGES;
                let mut mask = Mask::default();
                let from = run.start.0.saturating_sub(base).min(TABLE_PAGES) as usize;
                mask.set_range(from, (end - base).min(TABLE_PAGES) as usize);
                index.remove(number, &mask, |slot| self.slots.free(slot));
            }
        }
    }

    /// Forgets a whole space: its process has ended.
    pub fn remove_space(&mut self, space: SpaceId) {
        if let Some(index) = self.spaces.remove(&space) {
            index.slots().for_each(|slot| self.slots.free(slot));
        }
    }

    /// Those of the given pages (first page and pages of each run) that are here, in order, and what they are.
    pub(crate) fn held_of(
        &self,
        space: SpaceId,
        runs: impl Iterator<Item = (u64, u64)>,
    ) -> Vec<(PageNo, digest::PageDigest)> {
        let mut held = Vec::new();
        let Some(index) = self.spaces.get(&space) else { return held };
        for (start, len) in runs {
            // A run may span the whole address space: only the tables that exist are visited.
            let end = start.saturating_add(len);
            for number in index.tables.numbers(start / TABLE_PAGES..end.div_ceil(TABLE_PAGES)) {
                let pages = number * TABLE_PAGES..(number + 1) * TABLE_PAGES;
                let pages = (start.max(pages.start)..end.min(pages.end)).map(PageNo);
                held.extend(pages.filter_map(|page| Some((page, index.digest_of(page)?))));
            }
        }
        held
    }

    /// Settles what belongs to the program: exactly the pages of `owned`, whose runs are in order and apart.
    /// Each of them has to be here. What is here beyond them is dropped.
    ///
    /// # Errors
    /// [`StoreError::Missing`], [`StoreError::Disorder`]: then nothing is dropped.
    pub fn seal(&mut self, space: SpaceId, owned: &[PageRun]) -> Result<SealOutcome, StoreError> {
        let index = self.spaces.entry(space).or_default();
        let mut extra = Vec::new();
        let mut tables = index.tables.iter();
        // Compares one table's owned pages with what is held, and notes all tables before it as not owned.
        let mut compare = |number: u64, owned: Mask| -> Result<(), StoreError> {
            let missing = |page| StoreError::Missing { space, page: PageNo(page) };
            for (held, table) in tables.by_ref() {
                if held < number {
                    extra.push((held, table.held));
                    continue;
                }
                if held > number {
                    break;
                }
                if let Some(at) = owned.minus(&table.held).next(0) {
                    return Err(missing(number * TABLE_PAGES + at as u64));
                }
                let surplus = table.held.minus(&owned);
                if !surplus.is_empty() {
                    extra.push((number, surplus));
                }
                return Ok(());
            }
            Err(missing(number * TABLE_PAGES + owned.next(0).unwrap_or(0) as u64))
        };
        let (mut at, mut mask, mut end) = (None, Mask::default(), 0);
        for run in owned.iter().filter(|run| run.len > 0) {
            if run.start.0 < end {
                return Err(StoreError::Disorder { space, page: run.start });
            }
            end = run.start.0.saturating_add(run.len);
            for (number, from, to) in by_table(run.start.0, run.len) {
                if at != Some(number)
                    && let Some(done) = at.replace(number)
                {
                    compare(done, std::mem::take(&mut mask))?;
                }
                mask.set_range(from, to);
            }
        }
        if let Some(done) = at {
            compare(done, mask)?;
        }
        extra.extend(tables.map(|(number, table)| (number, table.held)));
        let dropped = extra.iter().map(|(_, mask)| mask.count()).sum();
        for (number, mask) in extra {
            index.remove(number, &mask, |slot| self.slots.free(slot));
        }
        Ok(SealOutcome { pages: index.pages(), stored: index.stored(), dropped, digest: index.digest() })
    }

    /// Where a page's bytes are. `None` when the page is not known.
    pub fn state_of(&self, space: SpaceId, page: PageNo) -> Option<PageState> {
        let index = self.spaces.get(&space)?;
        index.digest_of(page)?;
        Some(if index.is_delivered(page) { PageState::Delivered } else { PageState::Held })
    }

    /// The bytes of a page. `None` when it is not held.
    #[cfg(test)]
    pub fn page(&self, space: SpaceId, page: PageNo) -> Option<PageRef<'_>> {
        let index = self.spaces.get(&space)?;
        index.digest_of(page)?;
        if let Some(bytes) = self.stretch(space, page, 1) {
            return bytes.first_chunk().map(PageRef::Bytes);
        }
        Some(if index.is_delivered(page) { PageRef::Delivered } else { PageRef::Zero })
    }

    /// The digest of a page, also of one that was delivered. `None` when it is not held.
    #[cfg(test)]
    pub fn digest_of(&self, space: SpaceId, page: PageNo) -> Option<digest::PageDigest> {
        self.spaces.get(&space)?.digest_of(page)
    }

    /// The bytes of the longest run of pages from `page` on that lies in one piece of memory, at most `most`
    /// pages. `None` when the page has no bytes here.
    pub fn stretch(&self, space: SpaceId, page: PageNo, most: u64) -> Option<&[u8]> {
        let index = self.spaces.get(&space)?;
        let (mut number, mut at) = split(page);
        let mut table = index.table(number)?;
        let first = table.slot(at)?;
        let mut pages = 1;
        while u64::from(pages) < most {
            at += 1;
            if at as u64 == TABLE_PAGES {
                (number, at) = (number + 1, 0);
                let Some(next) = index.table(number) else { break };
                table = next;
            }
            let slot = first + pages;
            if table.slot(at) != Some(slot) || slot.is_multiple_of(super::sys::arena::REGION_SLOTS) {
                break;
            }
            pages += 1;
        }
        self.slots.bytes(first, pages)
    }

    /// Pages of a space that have bytes here, by table (512 pages).
    pub(crate) fn stored_pages(&self, space: SpaceId) -> impl Iterator<Item = (u64, Mask)> + '_ {
        let tables = self.spaces.get(&space).into_iter().flat_map(|index| index.tables.iter());
        tables.map(|(number, table)| (number, table.stored)).filter(|(_, stored)| !stored.is_empty())
    }

    /// Whether there may be pages whose bytes came last in `round`.
    pub(crate) fn has_round(&self, space: SpaceId, round: u32) -> bool {
        self.spaces.get(&space).is_some_and(|index| index.has_round(round))
    }

    /// Those of a table whose bytes came last in `round` ([`PageStore::LAST_ROUND`] stands for all later ones).
    pub(crate) fn stored_in_round(&self, space: SpaceId, table: u64, round: u32) -> Mask {
        let table = self.spaces.get(&space).and_then(|index| index.table(table));
        table.map(|table| table.stored_in_round(round)).unwrap_or_default()
    }

    /// The most recent round that is told apart from later ones.
    pub(crate) const LAST_ROUND: u32 = index::LAST_ROUND;

    /// Nothing more will be received: from now on memory is given back to the system as pages are delivered.
    /// Memory that is unused already is given back here, `blocks` pieces of 2 MiB of it at most; says whether
    /// there may be more, and so whether to call again.
    pub fn drain(&mut self, blocks: usize) -> bool {
        self.slots.drain(blocks)
    }

    /// The page is in the restored program: its bytes are not needed here any more; its digest stays.
    pub fn deliver(&mut self, space: SpaceId, page: PageNo) {
        if let Some(slot) = self.spaces.get_mut(&space).and_then(|index| index.deliver(page)) {
            self.slots.free(slot);
        }
    }
}

#[cfg(test)]
mod tests;
