//! Processes that stand still, and are looked at without being tracked.

use crate::page_set::PageSet;
use crate::region::{Mappings, RegionError};
use crate::scope::{Files, Scope, View};
use crate::source;
use crate::target::{Target, find_field};
use std::io;

/// Why it cannot be said which pages a process has.
#[derive(Debug, thiserror::Error)]
pub enum PopulatedError {
    /// Its mappings could not be read.
    #[error(transparent)]
    Regions(#[from] RegionError),
    /// The kernel refused.
    #[error("could not read which pages process {pid} has")]
    Io {
        /// Whose.
        pid: i32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// The pages that a process has of its own in mappings of [`Scope::Lazy`]: what a [`crate::Tracker`] reports as
/// [`crate::SpaceScan::populated`]. It is true for as long as the process stands still.
///
/// # Errors
/// [`PopulatedError`].
pub fn populated(target: &Target) -> Result<PageSet, PopulatedError> {
    let pid = target.pid();
    let failed = |source| PopulatedError::Io { pid, source };
    let view = View::new(target, Mappings::default().read(target)?, Scope::Lazy, &mut Files::default());
    let pagemap = target.open_file("pagemap").map_err(failed)?;
    source::existing(&pagemap, &view).map_err(failed)
}

/// How a process stands still. Two of these that are equal say that it has stood from the one to the other: a thread that runs
/// is taken off its processor once more before it stands again, and the kernel counts that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stillness {
    /// Its threads.
    pub threads: u64,
    /// How often they have been taken off a processor, all together.
    pub switches: u64,
}

impl Target {
    /// How it stands still; `None` unless every thread of it is stopped, by a signal or by a tracer.
    pub fn stillness(&self) -> Option<Stillness> {
        let mut still = Stillness { threads: 0, switches: 0 };
        for tid in self.threads().ok()? {
            if !self.thread_stands(tid) {
                return None;
            }
            // It is said to be stopped a moment before it has left its processor, and before that is counted. This question waits for it.
            let call = self.read_file(&format!("task/{tid}/syscall")).ok()?;
            if call.starts_with(b"running") {
                return None;
            }
            let status = self.read_file(&format!("task/{tid}/status")).ok()?;
            still.threads += 1;
            still.switches += switches(&status)?;
        }
        (self.is_alive() && still.threads > 0).then_some(still)
    }

    /// Whether a tracer has one of its threads.
    pub fn is_traced(&self) -> bool {
        self.threads().is_ok_and(|threads| threads.iter().any(|tid| self.tracer(*tid).is_some()))
    }
}

/// How often a thread was taken off a processor, because it waited or because others were to run.
fn switches(status: &[u8]) -> Option<u64> {
    let count = |field| find_field(status, field)?.parse::<u64>().ok();
    Some(count("voluntary_ctxt_switches")? + count("nonvoluntary_ctxt_switches")?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Signal, pidfd_send_signal};
    use std::process::Command;
    use std::time::{Duration, Instant};

    #[test]
    fn switches_are_counted() {
        let status = b"Threads:\t1\nvoluntary_ctxt_switches:\t150\nnonvoluntary_ctxt_switches:\t545\n";
        assert_eq!(switches(status), Some(695));
        assert_eq!(switches(b"voluntary_ctxt_switches:\t150\n"), None);
    }

    #[test]
    fn who_runs_between_two_looks_is_found_out() {
        let mut program = Command::new("sleep").arg("60").spawn().unwrap();
        let target = Target::open(program.id() as i32).unwrap();
        let signal = |signal| pidfd_send_signal(target.pidfd(), signal).unwrap();
        let stops = || {
            signal(Signal::STOP);
            let until = Instant::now() + Duration::from_secs(20);
            loop {
                if let Some(still) = target.stillness() {
                    return still;
                }
                assert!(Instant::now() < until, "it does not stop");
            }
        };
        assert_eq!(target.stillness(), None, "it sleeps, and does not stand");
        let mut before = stops();
        for _ in 0..100 {
            assert_eq!((before.threads, target.is_traced()), (1, false));
            // Stopped again, asked for once more, and read: nothing of that has it run.
            assert_eq!(stops(), before);
            drop(std::fs::read(format!("/proc/{}/cmdline", target.pid())).unwrap());
            assert_eq!(target.stillness(), Some(before));
            signal(Signal::CONT);
            let after = stops();
            assert!(after.switches > before.switches, "{before:?}, {after:?}");
            before = after;
        }
        program.kill().unwrap();
        program.wait().unwrap();
        assert_eq!(target.stillness(), None, "it has ended");
    }
}
