//! Threads for which a program waits: they run before all others of the machine, as long as it may.
//!
//! A thread that waits for a page at the destination waits for two of the engine's, one at each side, to be woken and given a
//! processor. Niceness alone does not do: the scheduler lets whoever runs end its slice, milliseconds, before one that has just been
//! woken has its turn. A real-time policy takes the processor at once (sched(7)).

mod sys;

use std::time::{Duration, Instant};

/// Where a real-time policy is refused: before the threads of the program, and after nothing.
const NICE: i32 = -10;

/// After so much work in a row others have their turn.
const TURN: Duration = Duration::from_micros(400);

/// Of the time of its work, what a thread then leaves to others.
const REST: u32 = 4;

/// What a thread was before it became urgent.
#[derive(Debug)]
pub(crate) struct Urgent {
    /// Its niceness, where it has a lower one instead of a real-time policy.
    nice: Option<i32>,
}

/// Makes the calling thread urgent, for its life or until [`Urgent::calm_down`]; threads that it starts are not.
///
/// It has to be one that mostly waits, or that rests as [`Turns`] says: nobody else has its processor while it runs. Not being
/// allowed to is no failure.
pub(crate) fn hurry() -> Urgent {
    let Err(error) = sys::real_time() else { return Urgent { nice: None } };
    tracing::debug!(%error, "no real-time policy: a lower niceness instead");
    // Of this thread alone, as the system counts.
    let nice = rustix::process::getpriority_process(None).unwrap_or(0);
    let _ = rustix::process::setpriority_process(None, NICE);
    Urgent { nice: Some(nice) }
}

impl Urgent {
    /// Whether nobody else has the processor while the thread runs.
    pub(crate) fn is_real_time(&self) -> bool {
        self.nice.is_none()
    }

    /// Nobody waits for the thread any more, which has to be the calling one: it is as it was.
    pub(crate) fn calm_down(self) {
        let calm = match self.nice {
            None => sys::ordinary(),
            Some(nice) => rustix::process::setpriority_process(None, nice).map_err(Into::into),
        };
        if let Err(error) = calm {
            tracing::debug!(%error, "a thread stays urgent");
        }
    }
}

/// Work of an urgent thread for which nobody waits: after each turn of it the thread has to leave the processor to others for a while, which
/// those who wait for it may cut short. Pure.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    worked: Duration,
    rest: Option<Instant>,
}

impl Turns {
    /// Such work took so long, and has just ended.
    pub(crate) fn worked(&mut self, time: Duration, now: Instant) {
        self.worked += time;
        if self.worked >= TURN {
            self.rest = Some(now + self.worked / REST);
            self.worked = Duration::ZERO;
        }
    }

    /// How long such work has to wait yet.
    pub(crate) fn rest(&mut self, now: Instant) -> Option<Duration> {
        let left = self.rest?.saturating_duration_since(now);
        if left.is_zero() {
            self.rest = None;
            return None;
        }
        Some(left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_works_all_the_time_leaves_a_fifth_of_it_to_others() {
        let start = Instant::now();
        let (mut now, mut turns, mut worked) = (start, Turns::default(), Duration::ZERO);
        let step = Duration::from_micros(60);
        while now - start < Duration::from_secs(1) {
            if let Some(left) = turns.rest(now) {
                now += left;
                continue;
            }
            now += step;
            worked += step;
            turns.worked(step, now);
        }
        let share = worked.as_secs_f64() / (now - start).as_secs_f64();
        assert!((0.79..0.81).contains(&share), "{share}");
    }

    #[test]
    fn little_work_needs_no_rest() {
        let now = Instant::now();
        let mut turns = Turns::default();
        turns.worked(Duration::from_micros(300), now);
        assert_eq!(turns.rest(now), None);
    }

    #[test]
    fn what_an_urgent_thread_starts_is_not_urgent_and_neither_is_it_when_it_has_calmed_down() {
        std::thread::spawn(|| {
            let nice = rustix::process::getpriority_process(None).unwrap();
            let urgent = hurry();
            assert_eq!(sys::is_real_time(), urgent.is_real_time());
            let started = std::thread::spawn(sys::is_real_time).join().unwrap();
            assert!(!started);
            urgent.calm_down();
            assert!(!sys::is_real_time());
            assert_eq!(rustix::process::getpriority_process(None).unwrap(), nice);
        })
        .join()
        .unwrap();
    }
}
