//! One process that counts into the state file.

use super::state::{Verdict, read_lines};
use super::{Common, entry, field::Field, pace::Pace};
use crate::sys::memory::{Backing, Mapping};
use std::process::ExitCode;

/// Counts up by one every 10 ms and writes each number; nothing may be missing or twice.
///
/// # Errors
/// What kept it from running.
pub fn run(common: &Common) -> anyhow::Result<ExitCode> {
    let mut state = common.begin()?;
    let field = Field::new(common.seed, common.pages(), common.style());
    let mut memory = Mapping::new(Backing::Private, common.pages())?;
    field.fill(memory.words_mut());
    state.describe(&[entry("memory", &memory)])?;
    let mut pace = Pace::new(Some(100.0));
    let mut count = 0u64;
    loop {
        for _ in 0..pace.due() {
            count += 1;
            state.line(count)?;
        }
        if let Some(check) = state.check_wanted()? {
            let verdict = check_all(&mut state, &field, &memory, count);
            state.answer(check, &verdict)?;
        }
    }
}

fn check_all(state: &mut super::State, field: &Field, memory: &Mapping, count: u64) -> Verdict {
    field.check(memory.words()).map_err(|bad| format!("memory {bad}"))?;
    state.agrees_with(count)?;
    let lines = read_lines(state.path()).map_err(|error| format!("the state file: {error}"))?;
    for (at, line) in lines.iter().enumerate() {
        if line.progress != at as u64 + 1 {
            return Err(format!("line {} of the state file says {}", at + 1, line.progress));
        }
    }
    match lines.len() as u64 == count {
        true => Ok(format!("count {count}, memory {} pages", field.pages())),
        false => Err(format!("{} lines in the state file, counted to {count}", lines.len())),
    }
}
