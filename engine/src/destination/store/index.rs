//! What is held of one address space: which pages, where their bytes are, their digests, and how recent they are.

use super::tables::Tables;
use pageferry_wire_format::digest::SpaceDigest;
use pageferry_wire_format::{PageDigest, PageNo};

/// Pages of a table: 2 MiB of address space.
pub(super) const TABLE_PAGES: u64 = 512;
const WORDS: usize = TABLE_PAGES as usize / 64;

/// Rounds are told apart up to this number; later ones count as equally recent.
pub(super) const LAST_ROUND: u32 = 63;

/// Where the bytes of a page that arrives are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// All its bytes are zero; they take no memory.
    Zero,
    /// In this slot.
    Slot(u32),
}

// The numbers are above every slot number (slots::MOST_SLOTS).
const ZERO: u32 = u32::MAX;
const DELIVERED: u32 = u32::MAX - 1;

impl Place {
    fn pack(self) -> u32 {
        match self {
            Place::Zero => ZERO,
            Place::Slot(slot) => slot,
        }
    }
}

/// One bit for each page of a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mask([u64; WORDS]);

impl Mask {
    pub(crate) fn set(&mut self, at: usize) {
        self.0[at / 64] |= 1 << (at % 64);
    }

    pub(crate) fn clear(&mut self, at: usize) {
        self.0[at / 64] &= !(1 << (at % 64));
    }

    pub(crate) fn has(&self, at: usize) -> bool {
        self.0[at / 64] & (1 << (at % 64)) != 0
    }

    pub(crate) fn set_range(&mut self, from: usize, to: usize) {
        for word in from / 64..to.div_ceil(64) {
            let low = from.max(word * 64) - word * 64;
            let high = to.min(word * 64 + 64) - word * 64;
            self.0[word] |= (u64::MAX >> (64 - (high - low))) << low;
        }
    }

    pub(crate) fn count(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0 == [0; WORDS]
    }

    pub(crate) fn minus(&self, other: &Mask) -> Mask {
        Mask(std::array::from_fn(|word| self.0[word] & !other.0[word]))
    }

    pub(crate) fn and(&self, other: &Mask) -> Mask {
        Mask(std::array::from_fn(|word| self.0[word] & other.0[word]))
    }

    /// The first page at or behind `from` that is set.
    pub(crate) fn next(&self, from: usize) -> Option<usize> {
        let mut word = from / 64;
        let mut rest = *self.0.get(word)? & (u64::MAX << (from % 64));
        loop {
            if rest != 0 {
                return Some(word * 64 + rest.trailing_zeros() as usize);
            }
            word += 1;
            rest = *self.0.get(word)?;
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let at = self.next(from)?;
            from = at + 1;
            Some(at)
        })
    }
}

#[derive(Debug)]
pub(super) struct Table {
    pub(super) held: Mask,
    /// Held, and their bytes are in slots.
    pub(super) stored: Mask,
    /// A bit for each round of which there may be pages here.
    rounds_seen: u64,
    rounds: [u8; TABLE_PAGES as usize],
    places: [u32; TABLE_PAGES as usize],
    digests: [PageDigest; TABLE_PAGES as usize],
}

impl Table {
    pub(super) fn new() -> Self {
        Self {
            held: Mask::default(),
            stored: Mask::default(),
            rounds_seen: 0,
            rounds: [0; TABLE_PAGES as usize],
            places: [ZERO; TABLE_PAGES as usize],
            digests: [PageDigest([0; 16]); TABLE_PAGES as usize],
        }
    }

    pub(super) fn slot(&self, at: usize) -> Option<u32> {
        self.stored.has(at).then(|| self.places[at])
    }

    /// The stored pages that came last in round `round`.
    pub(super) fn stored_in_round(&self, round: u32) -> Mask {
        let mut mask = Mask::default();
        if self.rounds_seen & (1 << round.min(LAST_ROUND)) != 0 {
            for (at, &of) in self.rounds.iter().enumerate() {
                if u32::from(of) == round {
                    mask.set(at);
                }
            }
        }
        mask.and(&self.stored)
    }
}

/// What is held of one address space.
#[derive(Debug, Default)]
pub(super) struct SpaceIndex {
    pub(super) tables: Tables,
    digest: SpaceDigest,
    /// A bit for each round of which there may be pages.
    rounds_seen: u64,
    pages: u64,
    stored: u64,
}

/// Bytes that a table takes, with its share of the map.
pub(super) const TABLE_BYTES: u64 = size_of::<Table>() as u64 + 32;

/// Table number and page within it.
pub(super) fn split(page: PageNo) -> (u64, usize) {
    (page.0 / TABLE_PAGES, (page.0 % TABLE_PAGES) as usize)
}

impl SpaceIndex {
    pub(super) fn digest(&self) -> SpaceDigest {
        self.digest
    }

    pub(super) fn has_round(&self, round: u32) -> bool {
        self.rounds_seen & (1 << round.min(LAST_ROUND)) != 0
    }

    /// Pages that are held.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    /// Pages that are held and not zero.
    pub(super) fn stored(&self) -> u64 {
        self.stored
    }

    pub(super) fn table(&self, number: u64) -> Option<&Table> {
        self.tables.get(number)
    }

    /// Whether a page that is held was delivered.
    pub(super) fn is_delivered(&self, page: PageNo) -> bool {
        let (number, at) = split(page);
        self.table(number).is_some_and(|table| table.held.has(at) && table.places[at] == DELIVERED)
    }

    pub(super) fn digest_of(&self, page: PageNo) -> Option<PageDigest> {
        let (number, at) = split(page);
        let table = self.tables.get(number)?;
        table.held.has(at).then(|| table.digests[at])
    }

    /// Puts pages in, in any order. `freed` is told the slots of what they replace.
    pub(super) fn insert(
        &mut self,
        round: u32,
        pages: impl Iterator<Item = (PageNo, Place, PageDigest)>,
        mut freed: impl FnMut(u32),
    ) {
        let round = round.min(LAST_ROUND);
        self.rounds_seen |= 1 << round;
        let mut pages = pages.peekable();
        while let Some(&(page, ..)) = pages.peek() {
            // Neighbours share a table: it is looked up once for all of them.
            let number = split(page).0;
            let table = self.tables.get_or_new(number);
            table.rounds_seen |= 1 << round;
            while let Some((page, place, digest)) = pages.next_if(|(page, ..)| split(*page).0 == number) {
                let at = split(page).1;
                if table.held.has(at) {
                    self.digest.remove(page, &table.digests[at]);
                    if let Some(slot) = table.slot(at) {
                        freed(slot);
                        self.stored -= 1;
                    }
                } else {
                    self.pages += 1;
                }
                self.digest.insert(page, &digest);
                table.held.set(at);
                if matches!(place, Place::Slot(_)) {
                    table.stored.set(at);
                    self.stored += 1;
                } else {
                    table.stored.clear(at);
                }
                table.rounds[at] = round as u8;
                table.places[at] = place.pack();
                table.digests[at] = digest;
            }
        }
    }

    /// Forgets pages of one table. `freed` is told their slots.
    pub(super) fn remove(&mut self, number: u64, pages: &Mask, mut freed: impl FnMut(u32)) {
        let Some(table) = self.tables.get_mut(number) else { return };
        for at in table.held.and(pages).iter() {
            self.digest.remove(PageNo(number * TABLE_PAGES + at as u64), &table.digests[at]);
            self.pages -= 1;
            if let Some(slot) = table.slot(at) {
                freed(slot);
                self.stored -= 1;
            }
        }
        table.held = table.held.minus(pages);
        table.stored = table.stored.minus(pages);
        if table.held.is_empty() {
            self.tables.remove(number);
        }
    }

    /// The page is where it belongs: its bytes are no longer needed here. Gives the slot that held them.
    pub(super) fn deliver(&mut self, page: PageNo) -> Option<u32> {
        let (number, at) = split(page);
        let table = self.tables.get_mut(number)?;
        let slot = table.slot(at)?;
        table.stored.clear(at);
        table.places[at] = DELIVERED;
        self.stored -= 1;
        Some(slot)
    }

    /// Slots of all stored pages.
    pub(super) fn slots(&self) -> impl Iterator<Item = u32> + '_ {
        self.tables.iter().flat_map(|(_, table)| table.stored.iter().map(|at| table.places[at]))
    }
}

/// Cuts a run of pages at the borders of tables: table number and pages [from, to) in it.
pub(super) fn by_table(start: u64, len: u64) -> impl Iterator<Item = (u64, usize, usize)> {
    let end = start.saturating_add(len);
    let mut at = start;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let number = at / TABLE_PAGES;
        let stop = end.min((number + 1).saturating_mul(TABLE_PAGES));
        let part = (number, (at % TABLE_PAGES) as usize, (stop - number * TABLE_PAGES) as usize);
        at = stop;
        Some(part)
    })
}
