//! How small pages become: samples of a program's memory, and of what it writes again.

use pageferry_tracker::{Collected, PageReader, PageSet, ReadError, Run};
use pageferry_wire_format::{EncodeError, PageDigest, ZstdEncoder, delta, digest};
use rustix::time::{ClockId, clock_gettime};
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
}

/// What one way of coding costs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cost {
    /// Seconds for a page, reading and hashing included.
    pub(super) seconds: f64,
    /// Bytes of a page.
    pub(super) bytes: f64,
}

/// What was found out about a program's pages.
#[derive(Debug, Default)]
pub(super) struct Content {
    /// Of all pages that were looked at.
    pages: u64,
    zeros: u64,
    /// Equal to another page that was looked at.
    copies: u64,
    /// What reading and hashing these took.
    reading: Duration,
    /// Bytes that were coded, and for each level what came out and how long it took.
    whole_bytes: u64,
    levels: [(u64, Duration); LEVELS.len()],
    /// Pages as they were when they were last seen dirty.
    kept: BTreeMap<(u32, u64), Box<[u8; PAGE]>>,
    /// Pages that were dirty again: how many, and their bytes as deltas.
    again: u64,
    again_bytes: u64,
    /// Of these, the ones that changed so much that they would travel whole.
    again_whole: u64,
}

impl Content {
    /// Looks at a sample of all memory.
    ///
    /// # Errors
    /// When a page cannot be read or coded. A process that ends meanwhile is left out.
    pub(super) fn look(&mut self, collected: &Collected) -> Result<(), ContentError> {
        let mut encoder = ZstdEncoder::new()?;
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
                    self.pages += 1;
                    let page: &[u8; PAGE] = page.try_into().expect("chunks of a page");
                    if digest::is_zero(page) {
                        self.zeros += 1;
                    } else if !seen.insert(digest::page(page)) {
                        self.copies += 1;
                    } else {
                        whole.extend_from_slice(page);
                    }
                }
                self.reading += took + (processor_time() - start);
                if whole.len() >= BATCH {
                    self.code(&mut encoder, &mut whole)?;
                }
            }
        }
        self.code(&mut encoder, &mut whole)?;
        Ok(())
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

    /// Codes a batch by every level.
    fn code(&mut self, encoder: &mut ZstdEncoder, whole: &mut Vec<u8>) -> Result<(), ContentError> {
        if whole.is_empty() {
            return Ok(());
        }
        let mut out = Vec::with_capacity(whole.len());
        self.whole_bytes += whole.len() as u64;
        for (level, (bytes, time)) in LEVELS.iter().zip(&mut self.levels) {
            // Once before: what a level needs beforehand is there when the engine codes batch after batch.
            for is_counted in [false, true] {
                out.clear();
                let start = processor_time();
                encoder.encode(*level, whole, &mut out)?;
                if is_counted {
                    *time += processor_time() - start;
                    *bytes += out.len().min(whole.len()) as u64;
                }
            }
        }
        whole.clear();
        Ok(())
    }

    /// What each way costs for a page that was never sent: as it is, and by each level.
    pub(super) fn costs(&self) -> Vec<Cost> {
        let pages = self.pages.max(1) as f64;
        let named = (self.zeros + self.copies) as f64 / pages * NAMED;
        let reading = self.reading.as_secs_f64() / pages;
        let cost = |bytes: u64, time: Duration| Cost {
            seconds: reading + time.as_secs_f64() / pages,
            bytes: named + bytes as f64 / pages,
        };
        let raw = cost(self.whole_bytes, Duration::ZERO);
        std::iter::once(raw).chain(self.levels.iter().map(|(bytes, time)| cost(*bytes, *time))).collect()
    }

    /// Bytes of a page that was sent before and is dirty again, where a page that is sent whole takes `whole`; `None` if
    /// there were none.
    pub(super) fn again(&self, whole: f64) -> Option<f64> {
        let bytes = self.again_bytes as f64 + self.again_whole as f64 * whole;
        (self.again > 0).then(|| bytes / self.again as f64)
    }
}

/// Puts the pages into `bytes`, whatever was in it, and says what it took of a processor; `None` if there is nothing to be read.
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

/// What this thread has had of a processor: what else runs meanwhile does not make coding more work.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
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

    #[test]
    fn what_is_dirty_again_costs_what_differs() {
        let content = Content { again: 10, again_bytes: 300, again_whole: 2, ..Content::default() };
        assert_eq!(content.again(1000.0), Some(230.0));
        assert_eq!(Content::default().again(1000.0), None);
        let raw = Content { pages: 100, zeros: 50, whole_bytes: 50 * 4096, ..Content::default() };
        assert_eq!(raw.costs()[0].bytes, 2048.0 + 16.0);
    }
}
