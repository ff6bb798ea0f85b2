//! One region that is written in a known pattern, and a log of every write: what estimates of a working set are
//! measured with.

pub mod choice;
pub mod log;

use super::content::{self, Entropy, WORDS, mix};
use super::pace::{Pace, Rate};
use super::{Common, entry};
use crate::sys::memory::{Backing, Mapping};
use anyhow::Context;
use choice::{Chooser, Pattern};
use clap::Args;
use log::Log;
use std::path::PathBuf;
use std::process::ExitCode;

/// What the pattern workload is told.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// How writes spread over the pages
    #[arg(long, value_enum, default_value = "uniform")]
    pattern: Pattern,
    /// Log of all writes, as shared memory (best on a tmpfs): u64 count, u64 address of the first page, then a record
    /// for each write: u64 CLOCK_MONOTONIC after it (ns), u64 page
    #[arg(long, value_name = "FILE")]
    log: PathBuf,
    /// Writes for which the log has space
    #[arg(long, default_value_t = 8 << 20)]
    log_records: usize,
}

/// Writes one word of a page at a time, at the rate and in the pattern that `options` give.
///
/// # Errors
/// What kept it from running, or a full log.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let common = &options.common;
    anyhow::ensure!(
        !common.full_page && common.words == 1,
        "the pattern workload writes one word of a page at a time: no --full-page or --words"
    );
    let per_phase = match (options.pattern, common.rate) {
        (Pattern::Phased, Rate::Max) => {
            anyhow::bail!("a phase is a second's worth of writes: the phased pattern needs a --rate")
        }
        (_, Rate::Bytes(bytes)) => bytes / (WORDS * 8) as u64,
        (_, Rate::Max) => u64::MAX,
    };
    let mut state = common.begin()?;
    let mut memory = Mapping::new(Backing::Private, common.pages())?;
    let history = History::new(common, options.pattern, per_phase);
    history.fill(memory.words_mut());
    let log = Log::create(&options.log, options.log_records, memory.address())
        .with_context(|| format!("making the log {}", options.log.display()))?;
    state.describe(&[entry("memory", &memory)])?;
    let mut chooser = history.chooser.clone();
    let mut pace = Pace::pages(common.rate);
    let mut done = 0;
    loop {
        for _ in 0..pace.due() {
            let page = chooser.next_page();
            let word = &mut memory.words_mut()[page * WORDS + history.marked(page)];
            *word = word.wrapping_add(1);
            log.append(page)?;
            done += 1;
        }
        if let Some(check) = state.beat(done)? {
            let verdict = match history.check(memory.words(), done) {
                Err(bad) => Err(format!("memory {bad}")),
                Ok(()) => state
                    .agrees_with(done)
                    .map(|()| format!("memory {} pages, {done} writes", common.pages())),
            };
            state.answer(check, &verdict)?;
        }
    }
}

/// What the memory must hold after any number of writes: each adds one to one word of a page.
#[derive(Debug)]
struct History {
    seed: u64,
    pages: usize,
    entropy: Entropy,
    /// As it was before the first write.
    chooser: Chooser,
}

impl History {
    fn new(common: &Common, pattern: Pattern, per_phase: u64) -> Self {
        let (seed, pages) = (common.seed, common.pages());
        let chooser = Chooser::new(pattern, pages, per_phase, seed);
        Self { seed, pages, entropy: common.style().entropy, chooser }
    }

    fn key(&self, page: usize) -> u64 {
        mix(self.seed, page as u64)
    }

    /// The word of a page that counts its writes.
    fn marked(&self, page: usize) -> usize {
        self.key(page) as usize % WORDS
    }

    fn fill(&self, words: &mut [u64]) {
        for (page, words) in words.chunks_exact_mut(WORDS).enumerate() {
            content::fill(words, self.key(page), self.entropy);
        }
    }

    /// Makes all choices again: a table of counts that was kept in the same memory could be lost with it.
    fn check(&self, words: &[u64], done: u64) -> Result<(), content::Corruption> {
        let mut counts = vec![0u64; self.pages];
        let mut chooser = self.chooser.clone();
        (0..done).for_each(|_| counts[chooser.next_page()] += 1);
        words.chunks_exact(WORDS).enumerate().try_for_each(|(page, words)| {
            let (key, marked) = (self.key(page), self.marked(page));
            content::compare(page, words, |at| {
                let filled = content::word(key, at, self.entropy);
                if at == marked { filled.wrapping_add(counts[page]) } else { filled }
            })
        })
    }
}
