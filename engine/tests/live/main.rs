//! Live migrations between two hosts on this machine: real programs, a real CRIU, real faults.
//!
//! `cargo build -p pageferry-benches --bins` has to come first: the programs that move are built there. One test:
//! `cargo test -p pageferry --test live -- NAME`.

mod choice;
mod control;
mod effort;
mod faults;
mod ferry;
mod full;
mod images;
mod kept;
mod late;
mod memory;
mod network;
mod owed;
mod policy;
mod predict;
mod programs;
mod recover;
mod refusals;
mod resume;
mod slowdown;
mod streams;
mod swap;
#[path = "../../../tracker/tests/live/swap_device.rs"]
mod swap_device;
mod tracking;

use ferry::Ferry;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

/// A test, given the hosts.
type Test = fn(&Ferry) -> anyhow::Result<()>;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let ferry: Arc<Mutex<Option<Ferry>>> = Arc::default();
    let mut trials = Vec::new();
    let tests = [
        programs::tests(),
        refusals::tests(),
        streams::tests(),
        policy::tests(),
        choice::tests(),
        slowdown::tests(),
        predict::tests(),
        control::tests(),
        effort::tests(),
        faults::tests(),
        resume::tests(),
        full::tests(),
        images::tests(),
        memory::tests(),
        recover::tests(),
        owed::tests(),
        kept::tests(),
        late::tests(),
        network::tests(),
        swap::tests(),
        tracking::tests(),
    ];
    for (name, test) in tests.into_iter().flatten() {
        let ferry = Arc::clone(&ferry);
        trials.push(Trial::ignorable_test(name, move || run(&ferry, test)));
    }
    // One after the other: they share two cores, and a migration is about time.
    let conclusion = libtest_mimic::run(&Arguments { test_threads: Some(1), ..arguments }, trials);
    drop(ferry.lock().unwrap_or_else(PoisonError::into_inner).take());
    conclusion.exit_code()
}

fn run(slot: &Mutex<Option<Ferry>>, test: Test) -> Result<Completion, Failed> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(Completion::ignored_with("needs root"));
    }
    let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
    let ferry = match &mut *slot {
        Some(ferry) => ferry,
        None => slot.insert(Ferry::new().map_err(|error| format!("{error:#}"))?),
    };
    let result = test(ferry).and_then(|()| ferry.nothing_is_left());
    let told = if result.is_err() { ferry.told() } else { String::new() };
    match result.and(ferry.clear()) {
        Ok(()) => Ok(Completion::Completed),
        Err(error) => match error.downcast_ref::<ferry::Ignored>() {
            Some(ignored) => Ok(Completion::ignored_with(ignored.0.clone())),
            None => Err(format!("{error:#}{told}").into()),
        },
    }
}
