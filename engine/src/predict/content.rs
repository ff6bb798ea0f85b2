//! How small pages become: samples of a program's memory, and of what it writes again.

use crate::effort::processor_time;
use pageferry_tracker::{Collected, PageReader, PageSet, ReadError, Run};
use pageferry_wire_format::{
    DecodeError, EncodeError, PageDigest, ZstdDecoder, ZstdEncoder, delta, digest, prospect,
};
use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

const PAGE: usize = 4096;
/// Pages of a group: neighbours compress together, as in a batch.
const GROUP: u64 = 64;
/// Groups that are looked at.
const GROUPS: u64 = 48;
/// Bytes that are coded together, as in a batch that is compressed.
const BATCH: usize = 256 * PAGE;
/// Pages whose bytes are kept, to see what changes in them.
const KEPT: usize = 1024;
/// Of a sample that is older, the weight halves with each that follows.
const OLDER: f64 = 0.5;
/// Bytes of a page that travels as a mark or as the name of another: its part of a frame's head.
const NAMED: f64 = 32.0;
/// Levels of zstd that the engine uses.
const LEVELS: [i32; 2] = [1, 6];

/// Why contents could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// Pages could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// They could not be coded.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// What was made of them could not be decoded.
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

/// What a page costs on its way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Cost {
    /// Seconds of a worker for a page, reading, hashing and sending included, and decoding it at the other side.
    pub(super) seconds: f64,
    /// Bytes of a page.
    pub(super) bytes: f64,
}

/// Pages that were coded whole.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Coded {
    bytes: f64,
    /// For each level what came out, and the seconds that it took.
    levels: [(f64, f64); LEVELS.len()],
    /// Seconds that decoding what came out took.
    decoding: f64,
    /// Batches, and the squares of what was left of each by the last level: how much they differ.
    batches: f64,
    squares: f64,
}

impl Coded {
    /// For each level the seconds of a byte, and what is left of it.
    fn levels(&self) -> [(f64, f64); LEVELS.len()] {
        let bytes = self.bytes.max(1.0);
        self.levels.map(|(out, seconds)| (seconds / bytes, out / bytes))
    }

    /// How far the mean of these batches may be from that of all pages, in nine of ten cases, as a share of it: 1.65 standard
    /// errors.
    fn doubt(&self) -> f64 {
        let left = self.levels()[LEVELS.len() - 1].1;
        if self.batches < 2.0 || left <= 0.0 {
            return 0.0;
        }
        let variance = (self.squares / self.batches - left * left).max(0.0);
        1.65 * (variance / (self.batches - 1.0)).sqrt() / left
    }
}

/// The link and the processors that pages find on their way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    /// Workers that share the link.
    pub(super) workers: f64,
    /// What the link carries, bytes a second.
    pub(super) bandwidth: f64,
    /// Seconds of a worker to send a byte.
    pub(super) sending: f64,
}

/// What was found out about a program's pages.
#[derive(Debug, Default)]
pub(super) struct Content {
    /// Of all pages that were looked at. Of a program that goes on writing, the later looks say more about what will be sent.
    pages: f64,
    zeros: f64,
    /// Equal to another page that was looked at.
    copies: f64,
    /// Seconds that reading and hashing these took.
    reading: f64,
    whole: Coded,
    /// Pages as they were when they were last seen dirty.
    kept: BTreeMap<(u32, u64), Box<[u8; PAGE]>>,
    /// Pages that were dirty again: how many, and their bytes as deltas.
    again: u64,
    again_bytes: u64,
    /// Of these, the ones that changed so much that they would travel whole; some that wait to be coded, and those that were: what
    /// is written anew may compress otherwise than all the rest.
    again_whole: u64,
    again_waiting: Vec<u8>,
    again_coded: Coded,
}

impl Content {
    /// Looks at a sample of all memory.
    ///
    /// # Errors
    /// When a page cannot be read or coded. A process that ends meanwhile is left out.
    pub(super) fn look(&mut self, collected: &Collected) -> Result<(), ContentError> {
        self.age();
        let mut coder = Coder::new()?;
        let mut seen: HashSet<PageDigest> = HashSet::new();
        let mut all = PageSet::default();
        collected.spaces.iter().for_each(|space| all.absorb(space.populated.clone()));
        let mut whole = Vec::with_capacity(BATCH + GROUP as usize * PAGE);
        let mut bytes = Vec::new();
        for group in groups(&all) {
            for space in &collected.spaces {
                let here = group.intersect(&space.populated);
                let Some(took) = read(space, &here, &mut bytes)? else { continue };
                let start = processor_time();
                for page in bytes.chunks_exact(PAGE) {
                    self.pages += 1.0;
                    let page: &[u8; PAGE] = page.try_into().expect("chunks of a page");
                    if digest::is_zero(page) {
                        self.zeros += 1.0;
                    } else if !seen.insert(digest::page(page)) {
                        self.copies += 1.0;
                    } else {
                        whole.extend_from_slice(page);
                    }
                }
                self.reading += (took + (processor_time() - start)).as_secs_f64();
                if whole.len() >= BATCH {
                    coder.code(&mut whole, &mut self.whole)?;
                }
            }
        }
        coder.code(&mut whole, &mut self.whole)
    }

    /// How far bytes of pages that go whole may be off, as a share of them, because only a sample was looked at.
    pub(super) fn doubt(&self) -> f64 {
        self.whole.doubt()
    }

    /// What was seen counts less from now on.
    fn age(&mut self) {
        let Coded { bytes, levels, decoding, batches, squares } = &mut self.whole;
        let levels = levels.iter_mut().flat_map(|(out, seconds)| [out, seconds]);
        let of_whole = [bytes, decoding, batches, squares].into_iter().chain(levels);
        let others = [&mut self.pages, &mut self.zeros, &mut self.copies, &mut self.reading];
        of_whole.chain(others).for_each(|sum| *sum *= OLDER);
    }

    /// Codes the pages that were written anew and wait for it: at the end of what is watched.
    ///
    /// # Errors
    /// When they cannot be coded.
    pub(super) fn look_closely(&mut self) -> Result<(), ContentError> {
        Coder::new()?.code(&mut self.again_waiting, &mut self.again_coded)
    }

    /// Looks at pages that were dirty before and are again.
    ///
    /// # Errors
    /// As [`Content::look`].
    pub(super) fn look_again(&mut self, collected: &Collected) -> Result<(), ContentError> {
        let (mut out, mut buffer) = (Vec::new(), Vec::new());
        for space in &collected.spaces {
            let key = space.key.0;
            let known: PageSet = self
                .kept
                .range((key, 0)..=(key, u64::MAX))
                .map(|((_, page), _)| Run { start: *page, len: 1 })
                .collect();
            let mut wanted = known.intersect(&space.dirty);
            // New ones from all over what is dirty.
            let room = KEPT.saturating_sub(self.kept.len()) as u64;
            let step = (space.dirty.len() / (KEPT as u64 / 8)).max(1);
            for page in space.dirty.iter().step_by(step as usize).take(room.min(KEPT as u64 / 8) as usize) {
                wanted.insert(page, 1);
            }
            if read(space, &wanted, &mut buffer)?.is_none() {
                continue;
            }
            for (page, bytes) in wanted.iter().zip(buffer.chunks_exact(PAGE)) {
                let bytes: &[u8; PAGE] = bytes.try_into().expect("chunks of a page");
                if let Some(before) = self.kept.get(&(key, page)) {
                    self.again += 1;
                    out.clear();
                    if **before != *bytes {
                        let length = delta::encode(before, bytes, &mut out);
                        if length > PAGE / 2 {
                            self.again_whole += 1;
                            if self.again_waiting.len() < BATCH {
                                self.again_waiting.extend_from_slice(bytes);
                            }
                        } else {
                            self.again_bytes += length as u64;
                        }
                    }
                }
                self.kept.insert((key, page), Box::new(*bytes));
            }
        }
        Ok(())
    }

    /// A page that was never sent, coded as the engine's workers would after a while.
    pub(super) fn first(&self, way: Way) -> Cost {
        let pages = self.pages.max(1.0);
        let whole = whole(&self.whole, self.reading / pages, way);
        // What travels whole, of all pages.
        let share = self.whole.bytes / PAGE as f64 / pages;
        Cost {
            seconds: self.reading / pages * (1.0 - share) + whole.seconds * share,
            bytes: (self.zeros + self.copies) / pages * NAMED + whole.bytes * share,
        }
    }

    /// One that was sent before, is dirty again, and goes whole.
    pub(super) fn anew(&self, way: Way) -> Cost {
        match self.again_coded.bytes > 0.0 {
            true => whole(&self.again_coded, self.reading / self.pages.max(1.0), way),
            false => self.first(way),
        }
    }

    /// One that was sent before and is dirty again; `None` if there were none.
    pub(super) fn again(&self, way: Way) -> Option<Cost> {
        let whole = self.anew(way);
        let bytes = self.again_bytes as f64 + self.again_whole as f64 * whole.bytes;
        let share = self.again_whole as f64 / self.again as f64;
        (self.again > 0).then(|| Cost {
            seconds: self.reading / self.pages.max(1.0) * (1.0 - share) + whole.seconds * share,
            bytes: bytes / self.again as f64,
        })
    }
}

/// A page that travels whole, where reading and hashing one take `reading` seconds.
fn whole(coded: &Coded, reading: f64, way: Way) -> Cost {
    let page = PAGE as f64;
    let levels = coded.levels();
    let mix = prospect(&levels, reading / page, way.sending, way.workers / way.bandwidth);
    // As much of it is compressed as says what is left.
    let compressed = (1.0 - mix.ratio) / (1.0 - levels[0].1).max(f64::EPSILON);
    let decoding = coded.decoding / coded.bytes.max(1.0) * compressed.clamp(0.0, 1.0);
    let seconds = reading + (mix.coding + way.sending * mix.ratio + decoding) * page;
    Cost { seconds, bytes: mix.ratio * page }
}

/// Codes batches as a worker does, and as the other side undoes it.
struct Coder {
    encoder: ZstdEncoder,
    decoder: ZstdDecoder,
    out: Vec<u8>,
    back: Vec<u8>,
}

impl Coder {
    fn new() -> Result<Self, ContentError> {
        Ok(Self {
            encoder: ZstdEncoder::new()?,
            decoder: ZstdDecoder::new()?,
            out: Vec::new(),
            back: Vec::new(),
        })
    }

    /// Codes a batch by every level.
    fn code(&mut self, whole: &mut Vec<u8>, coded: &mut Coded) -> Result<(), ContentError> {
        let Self { encoder, decoder, out, back } = self;
        if whole.is_empty() {
            return Ok(());
        }
        coded.bytes += whole.len() as f64;
        coded.batches += 1.0;
        // Each once before: what it needs beforehand is there when the engine codes batch after batch.
        for (level, (bytes, seconds)) in LEVELS.iter().zip(&mut coded.levels) {
            for is_counted in [false, true] {
                out.clear();
                let start = processor_time();
                encoder.encode(*level, whole, out)?;
                if is_counted {
                    *seconds += (processor_time() - start).as_secs_f64();
                    *bytes += out.len().min(whole.len()) as f64;
                }
            }
        }
        back.resize(whole.len(), 0);
        for is_counted in [false, true] {
            let start = processor_time();
            decoder.decode(out, back)?;
            if is_counted {
                coded.decoding += (processor_time() - start).as_secs_f64();
            }
        }
        let left = out.len().min(whole.len()) as f64 / whole.len() as f64;
        coded.squares += left * left;
        whole.clear();
        Ok(())
    }
}

/// Puts the pages into `bytes`, whatever was in it, and says what it took of a processor, whatever else ran meanwhile; `None` if there is nothing to be read.
fn read(
    space: &pageferry_tracker::SpaceScan,
    pages: &PageSet,
    bytes: &mut Vec<u8>,
) -> Result<Option<Duration>, ReadError> {
    if pages.is_empty() {
        return Ok(None);
    }
    let reader = match PageReader::new(&space.target) {
        Ok(reader) => reader,
        Err(_) if !space.target.is_alive() => return Ok(None),
        Err(error) => return Err(error),
    };
    // Written to beforehand: a worker's buffer is old, and memory that is new costs more than all the rest.
    bytes.clear();
    bytes.resize(pages.len() as usize * PAGE, 0);
    let start = processor_time();
    match reader.read(pages.runs(), bytes) {
        Ok(_) => Ok(Some(processor_time() - start)),
        Err(_) if !space.target.is_alive() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Groups of neighbours, spread over the pages.
fn groups(pages: &PageSet) -> Vec<PageSet> {
    let total = pages.len();
    let count = GROUPS.min(total.div_ceil(GROUP));
    let (mut groups, mut rank) = (Vec::new(), 0);
    for run in pages.runs() {
        // Every group begins at its share of all pages.
        while let Some(start) =
            Some(groups.len() as u64 * total / count.max(1)).filter(|start| *start < rank + run.len)
        {
            if groups.len() as u64 == count {
                return groups;
            }
            let from = run.start + (start - rank.min(start));
            let group = Run { start: from, len: GROUP.min(run.end() - from) };
            groups.push([group].into_iter().collect());
        }
        rank += run.len;
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_spread_over_all_pages_and_lie_in_them() {
        for runs in [&[(100u64, 10u64)][..], &[(0, 5000), (9000, 1), (10_000, 20_000)], &[(7, 64)]] {
            let pages: PageSet = runs.iter().map(|&(start, len)| Run { start, len }).collect();
            let groups = groups(&pages);
            assert_eq!(groups.len() as u64, GROUPS.min(pages.len().div_ceil(GROUP)));
            assert!(groups.iter().all(|group| !group.is_empty() && group.subtract(&pages).is_empty()));
            assert!(groups.windows(2).all(|pair| pair[0].runs()[0].start < pair[1].runs()[0].start));
        }
        assert!(groups(&PageSet::default()).is_empty());
    }

    fn gigabit() -> Way {
        Way { workers: 2.0, bandwidth: 125e6, sending: 0.3e-9 }
    }

    /// Compressed at 500 and 100 MB/s.
    fn coded(pages: u64, ratio: f64) -> Coded {
        let bytes = pages as f64 * 4096.0;
        let levels = [(ratio * bytes, 2e-9 * bytes), (0.95 * ratio * bytes, 10e-9 * bytes)];
        Coded { bytes, levels, ..Coded::default() }
    }

    #[test]
    fn a_sample_of_what_differs_says_less_than_one_of_what_does_not() {
        let of = |left: &[f64]| {
            let mut coded = Coded { bytes: left.len() as f64, ..Coded::default() };
            coded.batches = left.len() as f64;
            coded.squares = left.iter().map(|left| left * left).sum();
            coded.levels[LEVELS.len() - 1].0 = left.iter().sum();
            coded.doubt()
        };
        assert!(of(&[0.3; 12]) < 1e-6, "but for rounding");
        assert_eq!((of(&[]), of(&[0.4])), (0.0, 0.0));
        let halves: Vec<f64> = (0..12).map(|batch| if batch % 2 == 0 { 0.1 } else { 0.5 }).collect();
        let doubt = of(&halves);
        assert!((0.3..0.4).contains(&doubt), "two thirds of the mean either way, in twelve batches: {doubt}");
    }

    #[test]
    fn what_is_dirty_again_costs_what_differs() {
        let content = Content {
            pages: 100.0,
            whole: coded(100, 1.0),
            again: 10,
            again_bytes: 300,
            again_whole: 2,
            ..Content::default()
        };
        assert_eq!(content.again(gigabit()).unwrap().bytes, (300.0 + 2.0 * 4096.0) / 10.0);
        let compressible = Content { again_coded: coded(2, 0.2), ..content };
        let cost = compressible.again(gigabit()).unwrap();
        assert!((180.0..200.0).contains(&cost.bytes), "by its own content: {cost:?}");
        assert_eq!(Content::default().again(gigabit()), None);
    }

    #[test]
    fn whole_pages_cost_what_the_engine_would_make_of_them() {
        let raw = Content { pages: 100.0, zeros: 50.0, whole: coded(50, 1.0), ..Content::default() };
        let cost = raw.first(gigabit());
        assert_eq!(cost.bytes, 2048.0 + 16.0);
        let heap = Content { pages: 100.0, whole: coded(100, 0.2), ..Content::default() };
        assert!(heap.first(gigabit()).bytes < 0.21 * 4096.0);
        let fast = Way { bandwidth: f64::INFINITY, ..gigabit() };
        assert_eq!(heap.first(fast).bytes, 4096.0, "as it is, where the link is no limit");
        assert!(heap.first(fast).seconds < heap.first(gigabit()).seconds);
    }

    #[test]
    fn what_is_compressed_is_decoded_too() {
        let coded = Coded { decoding: 100.0 * 4096.0 * 1e-9, ..coded(100, 0.2) };
        let heap = |whole| Content { pages: 100.0, whole, ..Content::default() };
        let seconds = |whole: Coded, way| heap(whole).first(way).seconds;
        let more = seconds(coded, gigabit()) - seconds(Coded { decoding: 0.0, ..coded }, gigabit());
        assert!((more / 4.096e-6 - 1.0).abs() < 0.01, "all of it: {more}");
        let fast = Way { bandwidth: f64::INFINITY, ..gigabit() };
        assert_eq!(seconds(coded, fast), seconds(Coded { decoding: 0.0, ..coded }, fast), "it goes as it is");
    }

    #[test]
    fn a_later_look_says_more() {
        let mut content = Content { pages: 100.0, whole: coded(100, 0.2), ..Content::default() };
        content.age();
        let later = coded(100, 1.0);
        content.pages += 100.0;
        content.whole.bytes += later.bytes;
        content.whole.levels[0].0 += later.levels[0].0;
        let (_, ratio) = content.whole.levels()[0];
        assert!((ratio - (0.2 + 2.0) / 3.0).abs() < 1e-9, "{ratio}");
    }
}
