//! One conformance suite over every source of dirty pages, on real processes.

mod content;
mod extremes;
mod hugetlb;
mod lifecycle;
mod neighbours;
mod program;
mod refusals;
mod scope;
mod subject;
mod swap;
mod swap_device;
mod sys;
mod throttle;
mod transparency;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use pageferry_tracker::TrackerKind;
use pageferry_tracker::probe::Kernel;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

/// A test of a source.
pub type Case = (&'static str, fn(TrackerKind));

/// Ends what hangs: a tracer that waits for a stop that never comes cannot be told to give up.
const HANG: Duration = Duration::from_secs(300);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments.get(1).map(String::as_str) == Some(program::ARGUMENT) {
        program::run();
    }
    if let [_, first, pid, kind] = &arguments[..]
        && let Some(attach) = transparency::how(first)
    {
        transparency::track(pid.parse().expect("a pid"), kind.parse().expect("a kind"), attach);
    }
    let kernel = Kernel::probe();
    let root = rustix::process::geteuid().is_root();
    let no_huge_pages = hugetlb::obstacle();
    let no_swap = swap::obstacle();
    let mut trials = Vec::new();
    for (kind, prefix, needs) in [
        (TrackerKind::SoftDirty, "soft_dirty", "needs soft-dirty"),
        (TrackerKind::SoftDirtyScan, "soft_dirty_scan", "needs soft-dirty by PAGEMAP_SCAN"),
        (TrackerKind::UffdWp, "userfaultfd", "needs userfaultfd"),
        (TrackerKind::Compare, "compare", "needs readable memory"),
    ] {
        let feature = kernel.feature(kind);
        let obstacle = match (root, feature.works) {
            (false, _) => Some("needs root".to_owned()),
            (_, false) => Some(format!("{needs}: {}", feature.reason)),
            _ => None,
        };
        let rooms = [
            content::CASES,
            lifecycle::CASES,
            throttle::CASES,
            transparency::CASES,
            refusals::CASES,
            neighbours::CASES,
            scope::CASES,
            extremes::CASES,
        ];
        let mut add = |cases: &[Case], obstacle: Option<&String>| {
            for (name, case) in cases.iter().copied() {
                let obstacle = obstacle.cloned();
                trials.push(Trial::ignorable_test(format!("{prefix}::{name}"), move || match obstacle {
                    Some(reason) => Ok(Completion::ignored_with(reason)),
                    None => guarded(name, move || case(kind)),
                }));
            }
        };
        add(&rooms.concat(), obstacle.as_ref());
        add(hugetlb::CASES, obstacle.as_ref().or(no_huge_pages.as_ref()));
        add(swap::CASES, obstacle.as_ref().or(no_swap.as_ref()));
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// Runs a test; a panic is its failure, and a hang the end of everything.
fn guarded(name: &'static str, case: impl FnOnce()) -> Result<Completion, Failed> {
    let (done, wait) = mpsc::channel::<()>();
    std::thread::spawn(move || {
        if wait.recv_timeout(HANG) == Err(RecvTimeoutError::Timeout) {
            eprintln!("{name} hangs");
            std::process::abort();
        }
    });
    let result = catch_unwind(AssertUnwindSafe(case));
    drop(done);
    match result {
        Ok(()) => Ok(Completion::Completed),
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Err(text.unwrap_or_else(|| "it panicked".to_owned()).into())
        }
    }
}
