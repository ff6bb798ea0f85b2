//! Watches a process tree and says what it writes, a line a second:
//!
//!     track PID [ROUNDS [userfaultfd|soft-dirty-scan|soft-dirty|compare]]
//!
//! The last round stops the process itself (SIGSTOP) and asks as if somebody else had frozen the tree.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_tracker::{Target, Tracker, TrackerKind, TreeState, probe::Kernel};
use std::error::Error;
use std::time::{Duration, Instant};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some(pid) = arguments.first() else { return Err("usage: track PID [ROUNDS [KIND]]".into()) };
    let target = Target::open(pid.parse()?)?;
    let rounds: u32 = arguments.get(1).map_or(Ok(5), |rounds| rounds.parse())?;
    let wanted: Option<TrackerKind> = arguments.get(2).map(|name| name.parse()).transpose()?;
    let (kind, reason) = Kernel::probe().choose(wanted)?;
    println!("{} ({}) by {kind}: {reason}", target.name(), target.pid());
    let root = Pid::from_raw(target.pid());
    let mut tracker = timed("attach", || Tracker::attach(target, kind))?;
    for _ in 0..rounds {
        round(&mut tracker, TreeState::Running)?;
        std::thread::sleep(Duration::from_secs(1));
    }
    kill(root, Signal::SIGSTOP)?;
    std::thread::sleep(Duration::from_millis(100));
    let last = round(&mut tracker, TreeState::Frozen);
    kill(root, Signal::SIGCONT)?;
    last?;
    timed("detach", || tracker.detach())?;
    Ok(())
}

fn round(tracker: &mut Tracker, state: TreeState) -> Result<(), Box<dyn Error>> {
    let collected = timed(&format!("{state:?}"), || tracker.collect(state))?;
    println!("  stopped for {:.2?}", collected.pause);
    for space in &collected.spaces {
        println!(
            "  {} ({}): {} mappings, {} pages, {} written{}",
            space.target.name(),
            space.target.pid(),
            space.regions.len(),
            space.populated.len(),
            space.dirty.len(),
            if space.is_new { ", new" } else { "" },
        );
    }
    tracker.acknowledge(collected.ticket);
    Ok(())
}

fn timed<T>(what: &str, action: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = action();
    println!("{what}: {:.2?}", start.elapsed());
    result
}
