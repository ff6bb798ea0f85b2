//! What is remembered of each page: when it was last written, and in which of the last scans.

use super::gaps::Gaps;
use crate::page_set::{PageSet, Run};
use std::collections::BTreeMap;

/// Pages of a block: what lies next to each other is mostly written together.
const BLOCK: u64 = 64;
/// How many intervals back single writes are known.
pub(super) const REMEMBERED: u32 = 8;

/// The pages of an address space that were ever written. A full block takes 5.4 bytes a page; one with a
/// single page takes 344 bytes, which it shares with the 63 next to it when these are written, too.
#[derive(Clone, Debug, Default)]
pub(super) struct WrittenPages {
    blocks: BTreeMap<u64, Box<Block>>,
}

#[derive(Clone, Debug)]
struct Block {
    /// The interval of the last write; `NEVER` before the first.
    last: [u32; BLOCK as usize],
    /// Bit i: written i intervals before the last write (bit 0 is the last write itself).
    history: [u8; BLOCK as usize],
    /// One bit a page: written in more than one interval.
    repeated: u64,
}

const NEVER: u32 = u32::MAX;

/// One page that was written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Written {
    pub(super) page: u64,
    /// Intervals since the last write: 0 for a write in the latest.
    pub(super) age: u32,
    /// In how many of the latest `REMEMBERED` intervals it was written.
    pub(super) recent: u8,
    /// Whether it was written in more than one interval.
    pub(super) repeated: bool,
}

impl WrittenPages {
    /// These pages were written in interval `now`, the latest of `gaps`. Returns how many for the first time.
    pub(super) fn write(&mut self, pages: &PageSet, now: u32, gaps: &mut Gaps) -> u64 {
        let mut first_time = 0;
        for run in pages.runs() {
            let mut page = run.start;
            while page < run.end() {
                let number = page / BLOCK;
                let end = run.end().min((number + 1) * BLOCK);
                let block = self.blocks.entry(number).or_insert_with(Block::new);
                for at in (page % BLOCK) as usize..(end - number * BLOCK) as usize {
                    first_time += block.write(at, now, gaps);
                }
                page = end;
            }
        }
        first_time
    }

    /// Forgets pages, as they are no longer there. Their gaps stay counted.
    pub(super) fn forget(&mut self, run: Run) {
        let numbers = run.start / BLOCK..run.end().div_ceil(BLOCK);
        let touched: Vec<u64> = self.blocks.range(numbers).map(|(number, _)| *number).collect();
        for number in touched {
            let first = number * BLOCK;
            if run.start <= first && first + BLOCK <= run.end() {
                self.blocks.remove(&number);
            } else if let Some(block) = self.blocks.get_mut(&number) {
                for page in run.start.max(first)..run.end().min(first + BLOCK) {
                    let at = (page - first) as usize;
                    (block.last[at], block.history[at]) = (NEVER, 0);
                    block.repeated &= !(1 << at);
                }
            }
        }
    }

    /// The pages of `pages` that were ever written, in order, as interval `now` sees them.
    pub(super) fn range(&self, pages: Run, now: u32) -> impl Iterator<Item = Written> + '_ {
        let numbers = pages.start / BLOCK..pages.end().div_ceil(BLOCK);
        self.blocks.range(numbers).flat_map(move |(number, block)| {
            (0..BLOCK).filter_map(move |at| {
                let page = number * BLOCK + at;
                let last = block.last[at as usize];
                if last == NEVER || page < pages.start || pages.end() <= page {
                    return None;
                }
                let age = now - last;
                let seen = if age < REMEMBERED { block.history[at as usize] << age } else { 0 };
                let recent = seen.count_ones() as u8;
                Some(Written { page, age, recent, repeated: block.repeated >> at & 1 == 1 })
            })
        })
    }

    /// All that were ever written.
    pub(super) fn iter(&self, now: u32) -> impl Iterator<Item = Written> + '_ {
        self.range(Run { start: 0, len: u64::MAX / 2 }, now)
    }
}

impl Block {
    fn new() -> Box<Self> {
        Box::new(Self { last: [NEVER; BLOCK as usize], history: [0; BLOCK as usize], repeated: 0 })
    }

    fn write(&mut self, at: usize, now: u32, gaps: &mut Gaps) -> u64 {
        let last = std::mem::replace(&mut self.last[at], now);
        if last == now {
            return 0;
        }
        if last == NEVER {
            self.history[at] = 1;
            gaps.first();
            return 1;
        }
        let since = now - last;
        let before = if since < REMEMBERED { self.history[at] << since } else { 0 };
        self.history[at] = before | 1;
        self.repeated |= 1 << at;
        gaps.again(last as usize);
        0
    }
}

/// Bytes that a block takes.
#[cfg(test)]
pub(super) fn block_size() -> usize {
    size_of::<Block>()
}
