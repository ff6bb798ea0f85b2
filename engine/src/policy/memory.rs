//! What the engine's own memory goes to where it may take only so much: first what it cannot do without, then connections, then what
//! makes the pages of a program travel in fewer bytes. Pure.
//!
//! The engine's own is everything but the pages of the program in the receiver's store: code, stacks, buffers, books. What each of these
//! takes is known, but for what the allocator makes of it, which the fixed parts leave room for.

use std::fmt;

/// Share of the program's memory that the delta cache takes unless it is told: 1/16.
pub const DELTA_CACHE_SHARE: u64 = 16;

const MIB: u64 = 1 << 20;

/// What a side takes before there is any program: code, stacks, CRIU's messages, a piece of an image, what the allocator keeps.
const BASE: u64 = 20 * MIB;
/// What a worker at the source takes at most: batches of 1 MiB, read, gathered, compressed, and their bases, and the compressor; and the
/// thread that sends owed pages in its place later, whose batches are small.
const WORKER: u64 = 14 * MIB;
/// What a connection at the destination takes at most: a packed batch, its bases, its pages in one piece, and the unpacker.
const STREAM: u64 = 5 * MIB;

/// What the books at the source take for 2 MiB of address space of which there is a page.
const TABLE: u64 = 8448;
/// What of [`BASE`] lists of pages may take: a program writes here and there in one round and not in the next, and none is to be given up
/// for that after it was begun.
const LISTS: u64 = 8 * MIB;
/// What lists of pages take for a stretch of pages, while several of them are compared: some copies of 16 bytes.
const RUN: u64 = 128;
/// What the destination's own pages that were kept take in the source's books, each.
const KEPT: u64 = 17;
/// What a file's other end takes: its buffers, and the digests of all pages once more at its end, each.
const FILE: u64 = 8 * MIB;
const FILE_PAGE: u64 = 32;
/// What writing a program's pages into a kept store takes: their digests, some of them twice.
const KEEPING: u64 = 100;
/// What a page takes in the table of equal pages, at most.
const TWIN: u64 = 12;

/// What a page that waits for others may take of the destination's memory altogether, unless there is less.
pub(crate) const LATER: u64 = 32 * MIB;

/// The least that a source may be told.
pub const LEAST_AT_SOURCE: u64 = BASE + WORKER;
/// The least that a destination may be told.
pub const LEAST_AT_DESTINATION: u64 = BASE + STREAM + MIB;

/// What of a program the books have to hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Pages that it has in memory.
    pub(crate) pages: u64,
    /// Stretches of 2 MiB of address space in which there are some.
    pub(crate) tables: u64,
    /// Stretches of pages that are there, or dirty.
    pub(crate) runs: u64,
    /// Pages that the destination has kept.
    pub(crate) kept: u64,
    /// Whether the other end is a file, which a thread of the same engine writes and keeps books over.
    pub(crate) file: bool,
    /// Whether its pages are kept when it has moved.
    pub(crate) keeps: bool,
}

impl Extent {
    /// What is expected of a program of which only the number of its pages is known.
    pub(crate) fn of_pages(pages: u64, processes: u64) -> Self {
        let (tables, runs) = (pages.div_ceil(512) + 16 * processes, pages / 32 + 64 * processes);
        Self { pages, tables, runs, ..Self::default() }
    }

    fn bytes(&self) -> u64 {
        let lists = (self.runs * RUN).saturating_sub(LISTS);
        let books = self.tables * TABLE + lists + self.kept * KEPT;
        let file =
            if self.file { FILE + self.tables * TABLE + (self.pages + self.kept) * FILE_PAGE } else { 0 };
        books + file + if self.keeps { self.pages * KEEPING } else { 0 }
    }
}

/// The engine may take less than it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLittle {
    /// Bytes that it may take.
    pub limit: u64,
    /// Bytes that it needs.
    pub needed: u64,
}

impl fmt::Display for TooLittle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (limit, needed) = (self.limit / MIB, self.needed.div_ceil(MIB));
        write!(f, "the engine may take {limit} MiB of memory for itself, and needs {needed} MiB")
    }
}

impl std::error::Error for TooLittle {}

/// What the source needs with so many workers.
pub(crate) fn needed(extent: &Extent, workers: usize) -> u64 {
    BASE + WORKER * workers as u64 + extent.bytes()
}

/// How many workers there may be of those that are wanted: they take half of what is left by the books, and there is one at least.
pub(crate) fn workers(limit: Option<u64>, extent: &Extent, wanted: usize) -> Result<usize, TooLittle> {
    let Some(limit) = limit else { return Ok(wanted) };
    let spare = spare(limit, extent, 1)?;
    let more = usize::try_from(spare / 2 / WORKER).unwrap_or(usize::MAX);
    Ok(wanted.clamp(1, more.saturating_add(1)))
}

/// What is left by the books and the workers.
fn spare(limit: u64, extent: &Extent, workers: usize) -> Result<u64, TooLittle> {
    let needed = needed(extent, workers);
    limit.checked_sub(needed).ok_or(TooLittle { limit, needed })
}

/// What makes a program's pages travel in fewer bytes, and how many bytes of memory each part may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Savings {
    /// The table of equal pages.
    pub(crate) twins: u64,
    /// The delta cache.
    pub(crate) cache: u64,
}

/// What is left goes to the delta cache, as far as it is wanted; a quarter of it at most to the table of equal pages.
pub(crate) fn savings(
    limit: Option<u64>,
    extent: &Extent,
    workers: usize,
    cache: u64,
) -> Result<Savings, TooLittle> {
    let Some(limit) = limit else { return Ok(Savings { twins: u64::MAX, cache }) };
    let spare = spare(limit, extent, workers)?;
    let twins = ((extent.pages + extent.kept) * TWIN).min(spare / 4);
    // The allocator takes a little for each page.
    let room = spare - twins;
    Ok(Savings { twins, cache: cache.min(room - room / 32) })
}

/// What the destination's memory goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AtDestination {
    /// Connections that it takes.
    pub(crate) streams: u16,
    /// Bytes of pages that may wait for what they are made of; those beyond are asked for again.
    pub(crate) later: u64,
    /// Bytes of the index of the store, and of lists of pages; `None` is as many as it takes.
    pub(crate) index: Option<u64>,
}

/// Connections take half of what there is, pages that wait a quarter of what is left, and the rest is for the index.
pub(crate) fn at_destination(limit: Option<u64>, streams: u16) -> AtDestination {
    let Some(limit) = limit else { return AtDestination { streams, later: LATER, index: None } };
    let spare = limit.saturating_sub(BASE);
    let streams = streams.clamp(1, u16::try_from(spare / 2 / STREAM).unwrap_or(u16::MAX).max(1));
    let left = spare.saturating_sub(STREAM * u64::from(streams));
    let later = LATER.min(left / 4);
    AtDestination { streams, later, index: Some(left - later) }
}

/// The same for connections that there are, and an index that takes so much already: less may wait where there is little.
pub(crate) fn in_use(limit: Option<u64>, streams: u16, index: u64) -> Result<AtDestination, TooLittle> {
    let Some(limit) = limit else { return Ok(at_destination(None, streams)) };
    let needed = BASE + STREAM * u64::from(streams) + index;
    let spare = limit.checked_sub(needed).ok_or(TooLittle { limit, needed })?;
    let later = LATER.min((spare + index) / 4).min(spare);
    Ok(AtDestination { streams, later, index: Some(spare + index - later) })
}

/// As much as is enough for connections to come beside such an index.
pub(crate) fn enough_at_destination(index: u64) -> u64 {
    // Half of what there is goes to connections at most, and a quarter of the other half to what waits.
    (BASE + STREAM + (index * 8).div_ceil(3)).max(LEAST_AT_DESTINATION)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nothing_is_given_up_without_a_limit() {
        let extent = Extent::of_pages(1 << 20, 3);
        assert_eq!(workers(None, &extent, 8), Ok(8));
        assert_eq!(savings(None, &extent, 8, 77), Ok(Savings { twins: u64::MAX, cache: 77 }));
        assert_eq!(at_destination(None, 4), AtDestination { streams: 4, later: LATER, index: None });
    }

    #[test]
    fn first_the_cache_is_given_up_and_then_workers_and_then_it_is_refused() {
        // 1 GiB: 4.2 MiB of books.
        let extent = Extent::of_pages(1 << 18, 1);
        let cache = 64 * MIB;
        assert_eq!(workers(Some(256 * MIB), &extent, 4), Ok(4));
        assert_eq!(savings(Some(256 * MIB), &extent, 4, cache).map(|savings| savings.cache), Ok(cache));
        assert_eq!(workers(Some(100 * MIB), &extent, 4), Ok(3));
        let small = savings(Some(100 * MIB), &extent, 3, cache).unwrap();
        assert!(small.cache < cache / 2 && small.twins > 0, "{small:?}");
        assert_eq!(workers(Some(40 * MIB), &extent, 4), Ok(1));
        let refused = workers(Some(36 * MIB), &extent, 4).unwrap_err();
        assert_eq!(refused.to_string(), "the engine may take 36 MiB of memory for itself, and needs 39 MiB");
        assert!(
            savings(Some(40 * MIB), &extent, 2, cache).is_err(),
            "there are more workers than it has room for"
        );
        let scattered = Extent { runs: LISTS / RUN, ..extent };
        assert_eq!(needed(&scattered, 1), needed(&extent, 1), "what is written here and there has its room");
        assert!(needed(&Extent { runs: 2 * scattered.runs, ..extent }, 1) > needed(&extent, 1));
        let file = Extent { file: true, ..extent };
        assert!(workers(Some(40 * MIB), &file, 1).is_err() && workers(Some(64 * MIB), &file, 1).is_ok());
        let keeps = Extent { keeps: true, ..extent };
        assert!(workers(Some(60 * MIB), &keeps, 1).is_err() && workers(Some(72 * MIB), &keeps, 1).is_ok());
    }

    proptest! {
        #[test]
        fn what_is_given_is_there(
            limit in 0u64..1 << 34,
            pages in 0u64..1 << 24,
            kept in 0u64..1 << 22,
            wanted in 1usize..64,
            cache in 0u64..1 << 34,
        ) {
            let extent = Extent { kept, ..Extent::of_pages(pages, 5) };
            match workers(Some(limit), &extent, wanted) {
                Err(TooLittle { needed, .. }) => prop_assert!(needed > limit),
                Ok(workers) => {
                    prop_assert!((1..=wanted).contains(&workers));
                    let Savings { twins, cache: given } = savings(Some(limit), &extent, workers, cache).unwrap();
                    prop_assert!(given <= cache && needed(&extent, workers) + twins + given <= limit);
                }
            }
            let there = at_destination(Some(limit), 16);
            let streams = u64::from(there.streams);
            if limit >= LEAST_AT_DESTINATION {
                prop_assert!(BASE + STREAM * streams + there.later + there.index.unwrap() <= limit);
                prop_assert!(streams >= 1 && there.index.unwrap() > 0);
                let index = there.index.unwrap();
                prop_assert_eq!(in_use(Some(limit), there.streams, index / 2), Ok(there));
                let full = in_use(Some(limit), there.streams, limit - BASE - STREAM * streams).unwrap();
                prop_assert_eq!((full.later, full.index), (0, Some(limit - BASE - STREAM * streams)));
                let more = limit - BASE - STREAM * streams + 1;
                prop_assert_eq!(in_use(Some(limit), there.streams, more), Err(TooLittle { limit, needed: limit + 1 }));
                prop_assert!(at_destination(Some(enough_at_destination(index)), 16).index.unwrap() >= index);
            }
        }
    }
}
