//! Maps, unmaps, moves, drops and grows memory all the time.
//!
//! What must be where is a pure model ([`Model`]) that decides every operation from a seed. At a check the model
//! is computed again from the start, so that a stale model and equally stale memory cannot vouch for each other.

use super::content::{self, Entropy, Random, WORDS, mix};
use super::state::Verdict;
use super::{Common, entry, field::Field, field::Style, pace::Pace};
use crate::sys::memory::{Backing, Mapping};
use std::io;
use std::process::ExitCode;

/// Pages of a block on the heap: below malloc's threshold for mappings, so that it grows the program break.
const BLOCK: usize = 16;
/// Mappings at most: far below the kernel's limit, with holes splitting them.
const SLOTS: usize = 96;

/// A change of the address space. Slots and blocks are indices at the time of the operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    /// A new mapping, last of all.
    Map { pages: usize },
    /// Unmaps a slot; the last one takes its index.
    Unmap { slot: usize },
    /// Unmaps the middle; what is behind it becomes the last slot.
    Hole { slot: usize, start: usize, pages: usize },
    /// mremap, which may move it.
    Resize { slot: usize, pages: usize },
    /// MADV_DONTNEED: reads as zeros.
    Forget { slot: usize, start: usize, pages: usize },
    /// Writes pages with keys that follow from `key`.
    Write { slot: usize, start: usize, pages: usize, key: u64 },
    /// A new block on the heap.
    Grow { key: u64 },
    /// Frees the last block of the heap.
    Shrink,
}

/// What must be where: the key of every page, 0 for one that must be zero.
#[derive(Debug, PartialEq)]
struct Model {
    slots: Vec<Vec<u64>>,
    heap: Vec<u64>,
    pages: usize,
}

/// Decides what comes next; the same for the same seed and limit.
#[derive(Debug)]
struct Planner {
    random: Random,
    limit: usize,
}

fn key_of(key: u64, page: usize) -> u64 {
    mix(key, page as u64) | 1
}

impl Model {
    fn empty() -> Self {
        Self { slots: Vec::new(), heap: Vec::new(), pages: 0 }
    }

    fn apply(&mut self, operation: Operation) {
        match operation {
            Operation::Map { pages } => {
                self.slots.push(vec![0; pages]);
                self.pages += pages;
            }
            Operation::Unmap { slot } => self.pages -= self.slots.swap_remove(slot).len(),
            Operation::Hole { slot, start, pages } => {
                let behind = self.slots[slot].split_off(start + pages);
                self.slots[slot].truncate(start);
                self.slots.push(behind);
                self.pages -= pages;
            }
            Operation::Resize { slot, pages } => {
                self.pages = self.pages - self.slots[slot].len() + pages;
                self.slots[slot].resize(pages, 0);
            }
            Operation::Forget { slot, start, pages } => self.slots[slot][start..start + pages].fill(0),
            Operation::Write { slot, start, pages, key } => {
                for page in start..start + pages {
                    self.slots[slot][page] = key_of(key, page);
                }
            }
            Operation::Grow { key } => {
                self.heap.push(key);
                self.pages += BLOCK;
            }
            Operation::Shrink => {
                self.heap.pop();
                self.pages -= BLOCK;
            }
        }
    }
}

impl Planner {
    fn new(seed: u64, limit: usize) -> Self {
        Self { random: Random::new(seed), limit: limit.max(512) }
    }

    fn next(&mut self, model: &Model) -> Operation {
        let room = self.limit.saturating_sub(model.pages);
        let largest = (self.limit / 16).min(room);
        let dice = self.random.below(100);
        let key = self.random.draw();
        if model.slots.is_empty() {
            return Operation::Map { pages: 8 };
        }
        let slot = self.random.below(model.slots.len());
        let len = model.slots[slot].len();
        let start = self.random.below(len);
        let pages = 1 + self.random.below((len - start).min(32));
        match dice {
            0..8 if largest > 0 && model.slots.len() < SLOTS => {
                Operation::Map { pages: 1 + self.random.below(largest) }
            }
            8..12 => Operation::Unmap { slot },
            12..16 if start > 0 && start + pages < len && model.slots.len() < SLOTS => {
                Operation::Hole { slot, start, pages }
            }
            16..24 if largest > 0 => Operation::Resize { slot, pages: 1 + self.random.below(largest) },
            24..32 => Operation::Forget { slot, start, pages },
            32..38 if room > BLOCK => Operation::Grow { key },
            38..42 if !model.heap.is_empty() => Operation::Shrink,
            _ => Operation::Write { slot, start, pages, key },
        }
    }
}

/// The memory itself.
#[derive(Default)]
struct Memory {
    slots: Vec<Mapping>,
    heap: Vec<Vec<u64>>,
}

impl Memory {
    fn apply(&mut self, operation: Operation, entropy: Entropy) -> io::Result<()> {
        match operation {
            Operation::Map { pages } => self.slots.push(Mapping::new(Backing::Private, pages)?),
            Operation::Unmap { slot } => drop(self.slots.swap_remove(slot)),
            Operation::Hole { slot, start, pages } => {
                let whole = self.slots.swap_remove(slot);
                let (front, rest) = whole.split(start);
                let (hole, behind) = rest.split(pages);
                drop(hole);
                // The front keeps the index, as in the model.
                self.slots.push(front);
                let last = self.slots.len() - 1;
                self.slots.swap(slot, last);
                self.slots.push(behind);
            }
            Operation::Resize { slot, pages } => self.slots[slot].resize(pages)?,
            Operation::Forget { slot, start, pages } => self.slots[slot].forget(start, pages)?,
            Operation::Write { slot, start, pages, key } => {
                let words = &mut self.slots[slot].words_mut()[start * WORDS..(start + pages) * WORDS];
                for (at, words) in words.chunks_exact_mut(WORDS).enumerate() {
                    content::fill(words, key_of(key, start + at), entropy);
                }
            }
            Operation::Grow { key } => {
                let mut block = vec![0u64; BLOCK * WORDS];
                content::fill(&mut block, key, entropy);
                self.heap.push(block);
            }
            Operation::Shrink => drop(self.heap.pop()),
        }
        Ok(())
    }

    fn check(&self, model: &Model, entropy: Entropy) -> Result<(), String> {
        if self.slots.len() != model.slots.len() || self.heap.len() != model.heap.len() {
            return Err(format!("{} mappings instead of {}", self.slots.len(), model.slots.len()));
        }
        for (slot, (mapping, keys)) in self.slots.iter().zip(&model.slots).enumerate() {
            if mapping.pages() != keys.len() {
                return Err(format!("mapping {slot}: {} pages instead of {}", mapping.pages(), keys.len()));
            }
            for (page, (words, &key)) in mapping.words().chunks_exact(WORDS).zip(keys).enumerate() {
                let expected = |at| if key == 0 { 0 } else { content::word(key, at, entropy) };
                content::compare(page, words, expected)
                    .map_err(|bad| format!("mapping {slot} at {:#x} {bad}", mapping.address()))?;
            }
        }
        for (block, (words, &key)) in self.heap.iter().zip(&model.heap).enumerate() {
            content::compare(0, words, |at| content::word(key, at, entropy))
                .map_err(|bad| format!("heap block {block} {bad}"))?;
        }
        Ok(())
    }
}

/// Runs the operations at a rate of about `--rate`.
///
/// # Errors
/// What kept it from running.
pub fn run(common: &Common) -> anyhow::Result<ExitCode> {
    let mut state = common.begin()?;
    let entropy = common.style().entropy;
    // A quarter stays where it is, for who wants to know a place.
    let anchored =
        Field::new(mix(common.seed, 9), (common.pages() / 4).max(1), Style { entropy, ..Style::default() });
    let mut anchor = Mapping::new(Backing::Private, anchored.pages())?;
    anchored.fill(anchor.words_mut());
    state.describe(&[entry("anchor", &anchor)])?;
    let limit = common.pages() - anchored.pages();
    let (mut model, mut planner) = (Model::empty(), Planner::new(common.seed, limit));
    let mut memory = Memory::default();
    // Six operations in ten write, 8 pages on average.
    let mut pace = Pace::share(common.rate, 5);
    let mut done = 0u64;
    loop {
        for _ in 0..pace.due() {
            let operation = planner.next(&model);
            model.apply(operation);
            memory.apply(operation, entropy)?;
            done += 1;
        }
        if let Some(check) = state.beat(done)? {
            let verdict = check_all(common.seed, limit, &model, &memory, done, entropy).and_then(|details| {
                anchored.check(anchor.words()).map_err(|bad| format!("anchor {bad}"))?;
                state.agrees_with(done).map(|()| details)
            });
            state.answer(check, &verdict)?;
        }
    }
}

fn check_all(
    seed: u64,
    limit: usize,
    model: &Model,
    memory: &Memory,
    done: u64,
    entropy: Entropy,
) -> Verdict {
    let (mut again, mut planner) = (Model::empty(), Planner::new(seed, limit));
    for _ in 0..done {
        let operation = planner.next(&again);
        again.apply(operation);
    }
    if again != *model {
        return Err(format!("the model is not what {done} operations make of it"));
    }
    memory.check(&again, entropy)?;
    let (slots, heap, pages) = (model.slots.len(), model.heap.len(), model.pages);
    Ok(format!("{done} operations, {slots} mappings and {heap} heap blocks, {pages} pages"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn play(seed: u64, operations: u64) -> (Model, Memory) {
        let (mut model, mut planner) = (Model::empty(), Planner::new(seed, 600));
        let mut memory = Memory::default();
        for _ in 0..operations {
            let operation = planner.next(&model);
            model.apply(operation);
            memory.apply(operation, Entropy::Incompressible).expect("apply");
        }
        (model, memory)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn memory_follows_the_model(seed: u64, operations in 0u64..600) {
            let (model, memory) = play(seed, operations);
            prop_assert!(model.pages <= 600 + 8);
            let pages: usize = model.slots.iter().map(Vec::len).sum::<usize>() + model.heap.len() * BLOCK;
            prop_assert_eq!(pages, model.pages);
            let verdict = check_all(seed, 600, &model, &memory, operations, Entropy::Incompressible);
            prop_assert!(verdict.is_ok(), "{:?}", verdict);
        }
    }

    #[test]
    fn every_kind_of_operation_comes_up() {
        let (mut model, mut planner) = (Model::empty(), Planner::new(1, 4096));
        let mut seen = std::collections::HashSet::new();
        for _ in 0..2000 {
            let operation = planner.next(&model);
            model.apply(operation);
            seen.insert(std::mem::discriminant(&operation));
        }
        assert_eq!(seen.len(), 8);
    }

    #[test]
    fn a_wrong_word_a_page_that_should_be_zero_and_a_stale_model_are_found() {
        let (model, mut memory) = play(3, 400);
        memory.slots[0].words_mut()[5] ^= 4;
        assert!(memory.check(&model, Entropy::Incompressible).is_err());
        memory.slots[0].words_mut()[5] ^= 4;
        memory.heap[0][9] ^= 1;
        assert!(memory.check(&model, Entropy::Incompressible).is_err());
        memory.heap[0][9] ^= 1;
        assert!(memory.check(&model, Entropy::Incompressible).is_ok());
        let (old_model, old_memory) = play(3, 390);
        assert!(check_all(3, 600, &old_model, &old_memory, 400, Entropy::Incompressible).is_err());
    }
}
