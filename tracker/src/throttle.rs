//! Slows a process tree down: a duty cycle in which all of it stands still.
//!
//! It is stopped as soft-dirty tracking stops it, with ptrace: neither its parent nor its cgroup notices, and whatever becomes of us, the
//! kernel lets it go. A system call that waits is interrupted and goes on by itself, but for those few that return `EINTR` after
//! any stop (`epoll_wait` and others: signal(7), "Interruption of system calls and library functions by stop signals").

use crate::freeze::{FreezeError, Frozen};
use crate::target::Target;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Standing and running together, as far as stopping does not take too long for it.
const PERIOD: Duration = Duration::from_millis(50);
/// It stands in one go for so long: stopping a thread takes a tenth of a millisecond, and what waits for the program should
/// see hiccups and no outages.
const STAND: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(100));

/// More than this is not made up for, on either side: the machine was asleep, or so busy that the program did not run either.
const MOST_DUE: Duration = Duration::from_secs(1);

/// A thread that does not stop within this (it waits in the kernel, for a disk) must not keep the others standing: the tree is
/// not slowed down any more then.
const PATIENCE: Duration = Duration::from_millis(500);

/// A tree that is slowed down. Dropping it lets the tree run as before.
#[derive(Debug)]
pub struct Throttle {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Held while the tree stands.
    gate: Mutex<()>,
}

#[derive(Debug, Default)]
struct State {
    share: f64,
    over: bool,
    stood: Duration,
    failed: Option<FreezeError>,
}

/// While it is there, the tree is not stopped by its throttle.
#[derive(Debug)]
pub struct Undisturbed<'a>(#[expect(dead_code, reason = "held, not read")] MutexGuard<'a, ()>);

impl Throttle {
    /// Makes ready to slow down the tree of `root`. It runs at its full pace until [`Throttle::set`].
    ///
    /// # Errors
    /// When there is no thread to do it on.
    pub fn new(root: Target) -> io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let its = Arc::clone(&shared);
        let thread = thread::Builder::new().name("throttle".to_owned()).spawn(move || cycle(&root, &its))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// From now on the tree stands still for this share of the time: 0 is its full pace, and 0.99 the most.
    pub fn set(&self, share: f64) {
        self.shared.state().share = share.clamp(0.0, 0.99);
        self.shared.changed.notify_all();
    }

    /// The share that was set; 0 after a failure.
    pub fn share(&self) -> f64 {
        self.shared.state().share
    }

    /// How long it has stood still altogether.
    pub fn stood(&self) -> Duration {
        self.shared.state().stood
    }

    /// Why it was not slowed down any more: told once. The tree runs at its full pace then.
    pub fn failure(&self) -> Option<FreezeError> {
        self.shared.state().failed.take()
    }

    /// Waits until the tree runs, and keeps it from being stopped: whoever else uses ptrace on it (a
    /// [`crate::Tracker`] that meets a new process, CRIU) needs this.
    pub fn undisturbed(&self) -> Undisturbed<'_> {
        Undisturbed(self.shared.gate.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.shared.state().over = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic there has let go of everything as well.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `time` is over or something has changed; says whether it is to go on.
    fn wait(&self, time: Duration) -> bool {
        let state = self.state();
        if state.over {
            return false;
        }
        let (state, _) = self.changed.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner);
        !state.over
    }
}

fn cycle(root: &Target, shared: &Shared) {
    let mut ledger = Ledger::default();
    // Since when it runs after it has stood.
    let mut released: Option<Instant> = None;
    loop {
        let share = shared.state().share;
        if share <= 0.0 {
            (ledger, released) = (Ledger::default(), None);
            if !shared.wait(Duration::from_secs(3600)) {
                return;
            }
            continue;
        }
        let gate = shared.gate.lock().unwrap_or_else(PoisonError::into_inner);
        let stopped = Frozen::new(root, &[], PATIENCE);
        let stands = Instant::now();
        // Until the last thread stood the program ran, and before for longer than it was meant to, where this thread had to
        // wait for a processor.
        ledger.ran(released.map_or(Duration::ZERO, |released| stands - released), share);
        let (goes_on, failed) = match stopped {
            Ok(frozen) => {
                let goes_on = shared.wait(ledger.stand(share));
                drop(frozen);
                (goes_on, None)
            }
            Err(error) => (true, Some(error)),
        };
        released = failed.is_none().then(Instant::now);
        let stood = if failed.is_none() { stands.elapsed() } else { Duration::ZERO };
        drop(gate);
        ledger.stood(stood);
        let mut state = shared.state();
        state.stood += stood;
        if let Some(error) = failed {
            state.share = 0.0;
            state.failed = Some(error);
        }
        drop(state);
        if !goes_on || !shared.wait(ledger.run(share)) {
            return;
        }
    }
}

/// What is left to stand still for what ran: nobody is punctual on a busy machine, and what ran too long in one turn has to
/// be made up for in the next ones.
#[derive(Debug, Default)]
struct Ledger {
    /// Seconds; below zero it has stood for longer than it had to.
    due: f64,
}

impl Ledger {
    /// How long it stands in a turn in which everybody is punctual.
    fn turn(share: f64) -> f64 {
        (PERIOD.as_secs_f64() * share).clamp(STAND.0.as_secs_f64(), STAND.1.as_secs_f64())
    }

    fn ran(&mut self, time: Duration, share: f64) {
        self.due = (self.due + time.as_secs_f64() * share / (1.0 - share)).min(MOST_DUE.as_secs_f64());
    }

    fn stood(&mut self, time: Duration) {
        self.due = (self.due - time.as_secs_f64()).max(-MOST_DUE.as_secs_f64());
    }

    /// How long it is to stand now.
    fn stand(&self, share: f64) -> Duration {
        Duration::from_secs_f64(self.due.clamp(Self::turn(share), STAND.1.as_secs_f64()))
    }

    /// How long it is to run now: until a whole turn is due, and not much shorter even with more than that due.
    fn run(&self, share: f64) -> Duration {
        let turn = Self::turn(share);
        Duration::from_secs_f64((turn - self.due).max(turn / 2.0) * (1.0 - share) / share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The share of its time that a tree stands, whose throttle wakes late by what `late` says of each turn.
    fn share_of(share: f64, turns: usize, late: impl Fn(usize) -> Duration) -> f64 {
        let (mut ledger, mut ran, mut stood) = (Ledger::default(), Duration::ZERO, Duration::ZERO);
        for turn in 0..turns {
            let stand = ledger.stand(share);
            ledger.stood(stand);
            stood += stand;
            let run = ledger.run(share) + late(turn);
            ledger.ran(run, share);
            ran += run;
        }
        stood.as_secs_f64() / (stood + ran).as_secs_f64()
    }

    #[test]
    fn a_punctual_throttle_keeps_its_share() {
        for share in [0.01, 0.25, 0.5, 0.75, 0.99] {
            let found = share_of(share, 100, |_| Duration::ZERO);
            assert!((found - share).abs() < 0.01, "{found} instead of {share}");
        }
    }

    #[test]
    fn what_ran_too_long_is_made_up_for() {
        for share in [0.25, 0.5, 0.75] {
            let always = share_of(share, 200, |_| Duration::from_millis(10));
            let seldom =
                share_of(share, 200, |turn| Duration::from_millis(if turn % 20 == 3 { 150 } else { 0 }));
            assert!(
                (always - share).abs() < 0.02 && (seldom - share).abs() < 0.02,
                "{always} and {seldom} instead of {share}"
            );
        }
    }

    /// A machine that was asleep for an hour does not make the program stand for hours.
    #[test]
    fn what_is_due_has_an_end() {
        let mut ledger = Ledger::default();
        ledger.ran(Duration::from_secs(3600), 0.9);
        let mut turns = 0;
        while ledger.due > Ledger::turn(0.9) {
            ledger.stood(ledger.stand(0.9));
            ledger.ran(ledger.run(0.9), 0.9);
            turns += 1;
            assert!(turns < 20, "it stands for nearly all of two seconds");
        }
    }

    /// Nor does one that slept while the program stood let it run at its full pace for hours.
    #[test]
    fn what_it_stood_too_long_has_an_end() {
        let mut ledger = Ledger::default();
        ledger.stood(Duration::from_secs(3600));
        assert!(ledger.run(0.5) <= MOST_DUE + PERIOD, "{:?}", ledger.run(0.5));
    }

    #[test]
    fn it_never_stands_for_longer_than_a_hiccup() {
        let mut ledger = Ledger::default();
        ledger.ran(Duration::from_secs(1), 0.99);
        assert_eq!(ledger.stand(0.99), STAND.1);
        assert!(ledger.run(0.99) > Duration::ZERO);
    }
}
