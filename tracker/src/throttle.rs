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
    // Since when it runs after it has stood.
    let mut released: Option<Instant> = None;
    loop {
        let share = shared.state().share;
        if share <= 0.0 {
            released = None;
            if !shared.wait(Duration::from_secs(3600)) {
                return;
            }
            continue;
        }
        let gate = shared.gate.lock().unwrap_or_else(PoisonError::into_inner);
        let asked = Instant::now();
        let stopped = Frozen::new(root, &[], PATIENCE);
        let stands = Instant::now();
        // Until the last thread stood the program ran, and before for longer than it was meant to, where this thread had to
        // wait for a processor.
        let (stopping, ran) = (stands - asked, stands - released.unwrap_or(asked));
        let (goes_on, failed) = match stopped {
            Ok(frozen) => {
                let least = PERIOD.mul_f64(share).max(ran.mul_f64(share / (1.0 - share)));
                let goes_on = shared.wait(least.clamp(STAND.0, STAND.1));
                drop(frozen);
                (goes_on, None)
            }
            Err(error) => (true, Some(error)),
        };
        released = failed.is_none().then(Instant::now);
        let stood = if failed.is_none() { stands.elapsed() } else { Duration::ZERO };
        drop(gate);
        let mut state = shared.state();
        state.stood += stood;
        if let Some(error) = failed {
            state.share = 0.0;
            state.failed = Some(error);
        }
        drop(state);
        let run = stood.mul_f64((1.0 - share) / share).saturating_sub(stopping);
        if !goes_on || !shared.wait(run) {
            return;
        }
    }
}
