//! One region, dirtied at a rate: the program that benchmarks move.

use super::content::{Random, WORDS};
use super::{Common, entry, field::Field, pace::Pace};
use crate::sys::memory::{Backing, Mapping};
use std::process::ExitCode;

/// Writes every `every`-th page at the rate of `common`, and reads (and compares) `reads` pages at random places for each write.
///
/// # Errors
/// What kept it from running, or a page that was wrong when it was read.
pub fn run(common: &Common, reads: u32, every: usize) -> anyhow::Result<ExitCode> {
    let mut state = common.begin()?;
    let mut field = Field::lattice(common.seed, common.pages(), 0, every, common.style());
    let mut memory = Mapping::new(Backing::Private, common.pages())?;
    field.fill(memory.words_mut());
    state.describe(&[entry("memory", &memory)])?;
    let mut pace = Pace::pages(common.rate);
    let mut random = Random::new(common.seed);
    let mut misread = None;
    loop {
        for _ in 0..pace.due() {
            field.write(memory.words_mut());
            for _ in 0..reads {
                let page = random.below(field.pages());
                let words = &memory.words()[page * WORDS..(page + 1) * WORDS];
                // Remembered rather than fatal: the check must still be able to say it.
                if let Err(bad) = field.check_page(page, words) {
                    misread.get_or_insert(bad);
                }
            }
        }
        if let Some(check) = state.beat(field.done())? {
            let verdict = match (misread, field.check(memory.words())) {
                (Some(bad), _) => Err(format!("memory, when it was read: {bad}")),
                (None, Err(bad)) => Err(format!("memory {bad}")),
                (None, Ok(())) => state
                    .agrees_with(field.done())
                    .map(|()| format!("memory {} pages, {} writes", field.pages(), field.done())),
            };
            state.answer(check, &verdict)?;
        }
    }
}
