//! How long the threads of a tree ran, and how long they waited for a processor (`schedstat`).

use crate::target::Target;
use crate::tree::{TreeError, discover_with};
use std::collections::BTreeMap;
use std::io;
use std::ops::{Add, AddAssign};
use std::time::Duration;

/// Threads that are looked at: of a tree with more of them, these stand for all.
const MOST_THREADS: usize = 512;

/// Times of threads, added up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunTimes {
    /// On a processor.
    pub ran: Duration,
    /// Ready to run, while others had the processors.
    pub waited: Duration,
}

impl Add for RunTimes {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { ran: self.ran + other.ran, waited: self.waited + other.waited }
    }
}

impl AddAssign for RunTimes {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl RunTimes {
    fn since(self, before: Self) -> Self {
        Self { ran: self.ran.saturating_sub(before.ran), waited: self.waited.saturating_sub(before.waited) }
    }
}

/// Why these times are not known.
#[derive(Debug, thiserror::Error)]
pub enum RunTimesError {
    /// The tree could not be listed.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// A process could not be looked at.
    #[error("could not read how long the threads of process {pid} ran")]
    Read {
        /// Which.
        pid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel keeps no such counts.
    #[error("the kernel does not count how long threads wait (it is built without CONFIG_SCHED_INFO)")]
    NotCounted,
}

/// Looks at the threads of a tree from time to time.
#[derive(Debug)]
pub struct RunClock {
    root: Target,
    processes: Vec<Target>,
    threads: BTreeMap<i32, RunTimes>,
}

impl RunClock {
    /// One for the tree of `root`.
    pub fn new(root: Target) -> Self {
        Self { root, processes: Vec::new(), threads: BTreeMap::new() }
    }

    /// What its threads have run and waited since the last look; at the first one, since they began. What a thread that has
    /// ended did after the last look is not in it.
    ///
    /// # Errors
    /// [`RunTimesError`]; the next look has what was missed.
    pub fn look(&mut self) -> Result<RunTimes, RunTimesError> {
        self.processes = discover_with(&self.root, &self.processes)?;
        let mut now = BTreeMap::new();
        let mut sum = RunTimes::default();
        'tree: for target in &self.processes {
            let threads = match target.threads() {
                Ok(threads) => threads,
                Err(source) if is_gone(&source) => continue,
                Err(source) => return Err(RunTimesError::Read { pid: target.pid(), source }),
            };
            for tid in threads {
                if now.len() == MOST_THREADS {
                    break 'tree;
                }
                let text = match target.read_file(&format!("task/{tid}/schedstat")) {
                    Ok(text) => text,
                    Err(source) if is_gone(&source) => continue,
                    Err(source) => return Err(RunTimesError::Read { pid: target.pid(), source }),
                };
                let times = parse(&text).ok_or(RunTimesError::NotCounted)?;
                sum += times.since(self.threads.get(&tid).copied().unwrap_or_default());
                now.insert(tid, times);
            }
        }
        if now.is_empty() {
            // A process that lives has a thread.
            return Err(RunTimesError::NotCounted);
        }
        self.threads = now;
        Ok(sum)
    }
}

fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ESRCH)
}

/// Nanoseconds on a processor, nanoseconds of waiting, and turns.
fn parse(text: &[u8]) -> Option<RunTimes> {
    let text = std::str::from_utf8(text).ok()?;
    let mut fields = text.split_whitespace().map(str::parse::<u64>);
    let (ran, waited) = (fields.next()?.ok()?, fields.next()?.ok()?);
    Some(RunTimes { ran: Duration::from_nanos(ran), waited: Duration::from_nanos(waited) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};
    use std::thread::sleep;

    #[test]
    fn the_kernel_s_line_is_read() {
        let times = parse(b"483551 78548 2\n").unwrap();
        assert_eq!(
            times,
            RunTimes { ran: Duration::from_nanos(483_551), waited: Duration::from_nanos(78_548) }
        );
        assert!(parse(b"").is_none() && parse(b"x 1 2").is_none());
    }

    #[test]
    fn one_that_is_busy_runs_or_waits_all_the_time_and_one_that_sleeps_does_neither() {
        let look = |script: &str| {
            let mut child =
                Command::new("sh").args(["-c", script]).stdout(Stdio::null()).spawn().expect("a shell");
            let mut clock = RunClock::new(Target::open(child.id() as i32).expect("a target"));
            sleep(Duration::from_millis(100));
            clock.look().expect("a first look");
            let start = std::time::Instant::now();
            sleep(Duration::from_millis(300));
            let times = clock.look().expect("a look");
            let wall = start.elapsed();
            child.kill().expect("a kill");
            child.wait().expect("its end");
            ((times.ran + times.waited).as_secs_f64() / wall.as_secs_f64(), clock.look().is_err())
        };
        let (busy, over) = look("while :; do :; done");
        // The times of a thread on a processor are brought up to date at every tick.
        assert!((0.8..1.2).contains(&busy) && over, "{busy}");
        let (idle, _) = look("sleep 10");
        assert!(idle < 0.1, "{idle}");
    }
}
