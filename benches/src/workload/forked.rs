//! A parent that fills memory and forks workers, which share it copy-on-write; each then dirties its own part.

use super::state::{State, Verdict};
use super::{Common, entry, field::Field, pace::Pace};
use crate::sys::{memory::Backing, memory::Mapping, process};
use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Write, pipe};
use std::process::ExitCode;
use std::sync::atomic::Ordering;

/// Word of the shared control page with the number of the check that is wanted. Word 1 is the progress of the
/// parent, word 1 + i that of worker i.
const WANTED: usize = 0;

/// Runs `workers` workers beside the parent, which writes too: each of them every `every`-th page of its own, `passes`
/// times (for ever, if not given).
///
/// # Errors
/// What kept it from running.
pub fn run(
    common: &Common,
    workers: usize,
    every: Option<usize>,
    passes: Option<u64>,
) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(workers < 500, "0 to 499 workers are possible");
    let every = every.unwrap_or(workers + 1);
    anyhow::ensure!(
        every > workers,
        "each of {} processes needs pages of its own: --every {}",
        workers + 1,
        workers + 1
    );
    let mut state = common.begin()?;
    let pages = common.pages().max(every);
    let field = |index| Field::lattice(common.seed, pages, index, every, common.style());
    let most = |index: usize| passes.map(|passes| passes * (pages - index).div_ceil(every) as u64);
    let pace = |index| Pace::share(common.rate, workers + 1).at_most(most(index));
    let mut memory = Mapping::new(Backing::Private, pages)?;
    field(0).fill(memory.words_mut());
    let control = Mapping::new(Backing::Shared, 1)?;
    let (answers, answer) = pipe()?;
    let parent = std::process::id();
    for index in 1..=workers {
        process::fork(|| {
            match work(parent, index, &mut memory, field(index), pace(index), &control, &answer) {
                Ok(()) => 0,
                Err(error) => {
                    eprintln!("worker {index}: {error}");
                    1
                }
            }
        })?;
    }
    drop(answer);
    state.describe(&[entry("memory", &memory)])?;
    lead(&mut state, workers, memory, field(0), pace(0), &control, answers)
}

/// What a worker does until its parent is gone.
fn work(
    parent: u32,
    index: usize,
    memory: &mut Mapping,
    mut field: Field,
    mut pace: Pace,
    control: &Mapping,
    mut answer: &PipeWriter,
) -> std::io::Result<()> {
    let control = control.atomics();
    let mut answered = 0;
    while std::os::unix::process::parent_id() == parent {
        for _ in 0..pace.due() {
            field.write(memory.words_mut());
        }
        control[1 + index].store(field.done(), Ordering::SeqCst);
        let wanted = control[WANTED].load(Ordering::SeqCst);
        if wanted != answered {
            answered = wanted;
            let line = match field.check(memory.words()) {
                Ok(()) => format!("{wanted} ok worker {index}: {} writes\n", field.done()),
                Err(bad) => format!("{wanted} corrupt worker {index}: {bad}\n"),
            };
            // One write of less than PIPE_BUF bytes: lines of several workers do not mix.
            answer.write_all(line.as_bytes())?;
        }
    }
    Ok(())
}

fn lead(
    state: &mut State,
    workers: usize,
    mut memory: Mapping,
    mut field: Field,
    mut pace: Pace,
    control: &Mapping,
    answers: PipeReader,
) -> anyhow::Result<ExitCode> {
    let mut answers = BufReader::new(answers);
    loop {
        for _ in 0..pace.due() {
            field.write(memory.words_mut());
        }
        control.atomics()[1].store(field.done(), Ordering::SeqCst);
        let progress = |control: &Mapping| {
            control.atomics()[1..=workers + 1].iter().map(|done| done.load(Ordering::SeqCst)).sum::<u64>()
        };
        if let Some(check) = state.beat(progress(control))? {
            let verdict = check_all(workers, &memory, &field, control, &mut answers)
                .and_then(|details| state.agrees_with(progress(control)).map(|()| details));
            state.answer(check, &verdict)?;
        }
    }
}

fn check_all(
    workers: usize,
    memory: &Mapping,
    field: &Field,
    control: &Mapping,
    answers: &mut impl BufRead,
) -> Verdict {
    let wanted = control.atomics()[WANTED].fetch_add(1, Ordering::SeqCst) + 1;
    let mut details = vec![format!("parent: {} writes", field.done())];
    let own = field.check(memory.words()).map_err(|bad| format!("parent: {bad}"));
    let mut bad = own.err();
    while details.len() <= workers {
        let mut line = String::new();
        match answers.read_line(&mut line) {
            Err(error) => return Err(format!("the workers' pipe: {error}")),
            Ok(0) => return Err("all workers are gone".to_owned()),
            Ok(_) => {}
        }
        let prefix = format!("{wanted} ");
        match line.trim_end().strip_prefix(&prefix).and_then(|rest| rest.split_once(' ')) {
            Some(("ok", text)) => details.push(text.to_owned()),
            Some(("corrupt", text)) => {
                details.push(String::new());
                bad.get_or_insert(text.to_owned());
            }
            _ => return Err(format!("the workers' pipe holds {line:?} in check {wanted}")),
        }
    }
    match bad {
        Some(bad) => Err(bad),
        None => {
            details.sort();
            Ok(details.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::field::Style;

    #[test]
    fn answers_of_all_workers_are_needed_and_one_bad_one_is_enough() {
        let control = Mapping::new(Backing::Shared, 1).expect("map");
        let mut memory = Mapping::new(Backing::Private, 4).expect("map");
        let field = Field::lattice(1, 4, 0, 3, Style::default());
        field.fill(memory.words_mut());
        let check = |control: &Mapping, mut lines: &[u8]| check_all(2, &memory, &field, control, &mut lines);
        let good = check(&control, b"1 ok worker 2: 5 writes\n1 ok worker 1: 5 writes\n");
        assert_eq!(good, Ok("parent: 0 writes, worker 1: 5 writes, worker 2: 5 writes".to_owned()));
        let bad = check(&control, b"2 corrupt worker 2: page 7\n2 ok worker 1: 5 writes\n");
        assert_eq!(bad, Err("worker 2: page 7".to_owned()));
        assert!(check(&control, b"3 ok worker 1: 5 writes\n").is_err(), "one is missing");
        assert!(check(&control, b"3 ok worker 1: 5 writes\n3 ok worker 2: x\n").is_err(), "an old answer");
    }
}
