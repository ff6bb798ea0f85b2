//! Threads with a region each, and one region that they share under a lock.

use super::content::{self, Entropy, WORDS, mix};
use super::state::Verdict;
use super::{Common, entry, field::Field, pace::Pace};
use crate::sys::memory::{Backing, Mapping};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

/// Pages of every thread's stack that hold content.
const STACK_PAGES: usize = 4;

struct Region {
    field: Field,
    memory: Mapping,
}

struct Hall {
    shared: Mutex<Region>,
    progress: AtomicU64,
    /// Number of the check that is wanted, and the answers that came so far.
    wanted: AtomicU64,
    answers: Mutex<Vec<Verdict>>,
    answered: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A poisoned lock means that a thread panicked, which the missing answer of that thread will show.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `threads` writers. Half of the memory is shared.
///
/// # Errors
/// What kept it from running.
pub fn run(common: &Common, threads: usize) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(threads > 0, "at least one thread is needed");
    let mut state = common.begin()?;
    let region = |name: &str, seed, pages| -> anyhow::Result<_> {
        let field = Field::new(mix(common.seed, seed), pages, common.style());
        let mut memory = Mapping::new(Backing::Private, pages)?;
        field.fill(memory.words_mut());
        let entry = entry(name, &memory);
        Ok((Region { field, memory }, entry))
    };
    let (shared, shared_entry) = region("shared", 0, (common.pages() / 2).max(1))?;
    let mut entries = vec![shared_entry];
    let mut regions = Vec::new();
    for thread in 0..threads {
        let pages = (common.pages() / 2 / threads).max(1);
        let (own, entry) = region(&format!("thread-{thread}"), thread as u64 + 1, pages)?;
        entries.push(entry);
        regions.push(own);
    }
    state.describe(&entries)?;
    let hall = Arc::new(Hall {
        shared: Mutex::new(shared),
        progress: AtomicU64::new(0),
        wanted: AtomicU64::new(0),
        answers: Mutex::new(Vec::new()),
        answered: Condvar::new(),
    });
    for (index, own) in regions.into_iter().enumerate() {
        let hall = Arc::clone(&hall);
        // Every write goes to the own region and to the shared one.
        let pace = Pace::share(common.rate, 2 * threads);
        thread::Builder::new()
            .name(format!("writer-{index}"))
            .spawn(move || write_for_ever(&hall, index, own, pace))?;
    }
    let mut beat = Pace::new(Some(0.0));
    loop {
        beat.due();
        if let Some(check) = state.beat(hall.progress.load(Ordering::SeqCst))? {
            let verdict = check_all(&hall, threads).and_then(|details| {
                state.agrees_with(hall.progress.load(Ordering::SeqCst)).map(|()| details)
            });
            state.answer(check, &verdict)?;
        }
    }
}

fn write_for_ever(hall: &Hall, index: usize, mut own: Region, mut pace: Pace) {
    let key = mix(index as u64, own.field.pages() as u64);
    let mut stack = [0u64; STACK_PAGES * WORDS];
    for (page, words) in stack.chunks_exact_mut(WORDS).enumerate() {
        content::fill(words, mix(key, page as u64), Entropy::Incompressible);
    }
    let mut answered = 0;
    loop {
        for _ in 0..pace.due() {
            own.field.write(own.memory.words_mut());
            {
                let mut shared = lock(&hall.shared);
                let Region { field, memory } = &mut *shared;
                field.write(memory.words_mut());
            }
            hall.progress.fetch_add(2, Ordering::SeqCst);
        }
        let wanted = hall.wanted.load(Ordering::SeqCst);
        if wanted != answered {
            answered = wanted;
            let verdict = check_thread(index, &own, std::hint::black_box(&stack), key);
            lock(&hall.answers).push(verdict);
            hall.answered.notify_all();
        }
    }
}

fn check_thread(index: usize, own: &Region, stack: &[u64], key: u64) -> Verdict {
    own.field.check(own.memory.words()).map_err(|bad| format!("region of thread {index}: {bad}"))?;
    for (page, words) in stack.chunks_exact(WORDS).enumerate() {
        let key = mix(key, page as u64);
        content::compare(page, words, |at| content::word(key, at, Entropy::Incompressible))
            .map_err(|bad| format!("stack of thread {index}: {bad}"))?;
    }
    Ok(format!("thread {index}: {} writes", own.field.done()))
}

fn check_all(hall: &Hall, threads: usize) -> Verdict {
    let mut answers = lock(&hall.answers);
    answers.clear();
    hall.wanted.fetch_add(1, Ordering::SeqCst);
    while answers.len() < threads {
        answers = hall.answered.wait(answers).unwrap_or_else(PoisonError::into_inner);
    }
    let mut details = answers.drain(..).collect::<Result<Vec<_>, _>>()?;
    details.sort();
    let shared = lock(&hall.shared);
    shared.field.check(shared.memory.words()).map_err(|bad| format!("shared region: {bad}"))?;
    details.push(format!("shared: {} writes", shared.field.done()));
    Ok(details.join(", "))
}
