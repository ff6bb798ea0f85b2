//! How much the program is slowed down while it is copied, and the pace that keeps it below a ceiling.

use super::Migration;
use super::failure::SendError;
use crate::effort::processor_time;
use crate::observe::Event;
use crate::policy::slowdown::rest;
use crate::policy::slowdown::{Pace, Seen};
use pageferry_tracker::{Collected, RunClock, RunTimesError, Target, Throttle};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// How often the pace is looked at within a round.
const LOOK: Duration = Duration::from_millis(100);
/// The program is watched for so long before it is tracked, where there is a ceiling.
const BEFORE: Duration = Duration::from_millis(250);
/// Of what it did in less than this nothing follows for how long it waits usually.
const ENOUGH: Duration = Duration::from_millis(5);
/// Between two scans cancelling and pausing are heard this often.
const GLANCE: Duration = Duration::from_millis(20);

/// Share of the time that each worker may work, in thousandths.
#[derive(Debug)]
pub(crate) struct WorkShare(AtomicU32);

impl WorkShare {
    /// All of it.
    pub(crate) fn full() -> Self {
        Self(AtomicU32::new(1000))
    }

    pub(crate) fn get(&self) -> f64 {
        f64::from(self.0.load(Ordering::Relaxed)) / 1000.0
    }

    pub(super) fn set(&self, share: f64) {
        self.0.store((share * 1000.0).round() as u32, Ordering::Relaxed);
    }
}

/// What a worker has worked since it has rested.
#[derive(Debug)]
pub(crate) struct Work {
    /// Of its thread, on a processor.
    worked: Duration,
    at: Instant,
}

impl Work {
    pub(crate) fn begin() -> Self {
        Self { worked: processor_time(), at: Instant::now() }
    }

    /// Rests as long as its share asks for. Waiting for the link is no work.
    pub(crate) fn rest(&mut self, share: &WorkShare, stop: &AtomicBool) {
        let share = share.get();
        if share < 1.0 {
            let worked = processor_time().saturating_sub(self.worked);
            let until = self.at + worked + rest(worked, share);
            while !stop.load(Ordering::Relaxed)
                && let Some(left) = until.checked_duration_since(Instant::now())
                && !left.is_zero()
            {
                std::thread::sleep(left.min(GLANCE));
            }
        }
        *self = Self::begin();
    }
}

/// Watches the program from before it is tracked until it is frozen.
#[derive(Debug)]
pub(super) struct Watch {
    clock: RunClock,
    looked: Instant,
    /// Share of the time in which its threads want to run that they wait anyway.
    usual: f64,
    pace: Option<Pace>,
    /// Since the last collect, without the faults, which the next one finds.
    interval: Seen,
    /// Before that.
    before: Seen,
    /// The last whole interval, and the round that it ended with.
    last: Seen,
    round: Option<u32>,
    /// How long the throttle had it stand when it was looked at last.
    throttled: Duration,
}

impl Watch {
    /// Looks at the program for the first time.
    pub(super) fn begin(root: Target, ceiling: Option<f64>) -> Result<Self, RunTimesError> {
        let mut clock = RunClock::new(root);
        let life = clock.look()?;
        let life = Seen { ran: life.ran, waited: life.waited, ..Seen::default() };
        Ok(Self {
            clock,
            looked: Instant::now(),
            usual: life.waiting().unwrap_or(0.0),
            pace: ceiling.map(Pace::new),
            interval: Seen::default(),
            before: Seen::default(),
            last: Seen::default(),
            round: None,
            throttled: Duration::ZERO,
        })
    }

    /// It is about to be tracked: what it waited until now is what it waits usually.
    fn ready(&mut self) -> Result<(), RunTimesError> {
        let seen = self.look(Duration::ZERO)?;
        if seen.ran + seen.waited >= ENOUGH {
            self.usual = seen.waiting().unwrap_or(self.usual);
        }
        self.interval = Seen::default();
        Ok(())
    }

    /// What it did since the last look; the throttle has had it stand for `throttled` so far.
    fn look(&mut self, throttled: Duration) -> Result<Seen, RunTimesError> {
        let times = self.clock.look()?;
        let now = Instant::now();
        let seen = Seen {
            wall: now - self.looked,
            ran: times.ran,
            waited: times.waited,
            faults: 0,
            stood: throttled.saturating_sub(self.throttled),
        };
        (self.looked, self.throttled) = (now, throttled);
        self.interval = self.interval.and(seen);
        Ok(seen)
    }

    /// Within a round: sets the pace by what was seen since the last look, from time to time.
    pub(super) fn tick(&mut self, throttled: Duration, work: &WorkShare) {
        let Some(mut pace) = self.pace else {
            work.set(1.0);
            return;
        };
        if self.looked.elapsed() < LOOK {
            return;
        }
        if let Ok(seen) = self.look(throttled) {
            // As many faults as before, until it is known. They come in the beginning of an interval.
            let again = self.interval.wall <= self.last.wall;
            let part = seen.wall.as_secs_f64() / self.last.wall.as_secs_f64().max(1e-6);
            let faults = if again { (self.last.faults as f64 * part) as u64 } else { 0 };
            let now = Seen { faults, ..seen }.slowdown(self.usual);
            // What it has lost above the ceiling it gets back.
            pace.look(now.max(self.before.and(self.interval).slowdown(self.usual)));
            self.pace = Some(pace);
        }
        work.set(pace.share());
    }

    /// A collect has found what was written in this interval; gives how much the program was slowed down in it.
    fn close(&mut self, faults: u64, stood: Duration, throttled: Duration) -> Result<f64, RunTimesError> {
        self.look(throttled)?;
        let seen = Seen { faults, stood: self.interval.stood + stood, ..self.interval };
        (self.interval, self.last) = (Seen::default(), seen);
        self.before = self.before.and(seen);
        Ok(seen.slowdown(self.usual))
    }

    /// The program may lose so much from now on.
    pub(super) fn allow(&mut self, ceiling: Option<f64>) {
        if self.pace.as_ref().map(Pace::ceiling) != ceiling {
            self.pace = ceiling.map(Pace::new);
        }
    }

    /// The share that each worker may work.
    pub(super) fn share(&self) -> f64 {
        self.pace.as_ref().map_or(1.0, Pace::share)
    }

    /// When the next scan may be, counted from the last.
    fn between_scans(&self) -> Duration {
        let Seen { wall, ran, waited, faults, .. } = self.last;
        match &self.pace {
            Some(pace) if faults > 0 => {
                let busy = (ran + waited).as_secs_f64() / wall.as_secs_f64().max(1e-6);
                pace.between_scans(faults, busy)
            }
            _ => Duration::ZERO,
        }
    }
}

impl Migration<'_> {
    /// Begins to watch how the program gets on. Where the kernel does not tell, a ceiling cannot be kept.
    pub(super) fn watch_pace(&mut self) -> Result<(), SendError> {
        match Watch::begin(self.root.clone(), self.control.max_slowdown()) {
            Ok(watch) => self.watch = Some(watch),
            Err(error) if self.control.max_slowdown().is_some() => return Err(SendError::Slowdown(error)),
            Err(error) => tracing::debug!(%error, "it is not known how much the program is slowed down"),
        }
        Ok(())
    }

    /// The program is about to be tracked.
    pub(super) fn note_usual_pace(&mut self) -> Result<(), SendError> {
        let Some(watch) = &mut self.watch else { return Ok(()) };
        if self.control.max_slowdown().is_some() {
            std::thread::sleep(BEFORE.saturating_sub(watch.looked.elapsed()));
        }
        self.note_slowdown_of(Watch::ready);
        Ok(())
    }

    /// A collect ends the interval that began with the one before it: notes how much the program was slowed down.
    pub(super) fn note_slowdown(&mut self, collected: &Collected, round: u32) {
        let Some(watch) = &mut self.watch else { return };
        // The first collect names everything, whether it was written or not; one after a round that was lost with its link, what
        // was counted already.
        let again = watch.round.replace(round) == Some(round);
        let faults = match round == 0 || again {
            true => 0,
            false => collected.spaces.iter().map(|space| space.dirty.len()).sum(),
        };
        let first = if round == 0 { self.tracker_mut().attach_stop() } else { Duration::ZERO };
        let (stood, throttled) = (collected.pause + first, self.throttled());
        let slowdown = self.note_slowdown_of(|watch| watch.close(faults, stood, throttled));
        if let Some(slowdown) = slowdown
            && !again
            && let Some(last) = self.report.rounds.last_mut()
        {
            last.slowdown = Some(slowdown);
        }
        self.report.slowdown = self.watch.as_ref().map(|watch| watch.before.slowdown(watch.usual));
    }

    /// A program that ends meanwhile is found out by the next collect.
    fn note_slowdown_of<T>(
        &mut self,
        note: impl FnOnce(&mut Watch) -> Result<T, RunTimesError>,
    ) -> Option<T> {
        match self.watch.as_mut().map(note) {
            Some(Ok(noted)) => return Some(noted),
            Some(Err(error)) => {
                self.watch = None;
                if let Some(ceiling) = self.control.max_slowdown()
                    && self.root.is_alive()
                {
                    let text = format!(
                        "it is not known any more how much the program is slowed down ({error}), and {:.0} % are not watched over",
                        ceiling * 100.0
                    );
                    self.observer.event(&Event::Warning { text });
                }
            }
            None => {}
        }
        None
    }

    /// How long the throttle has had it stand so far.
    fn throttled(&self) -> Duration {
        self.throttle.as_ref().map_or(Duration::ZERO, Throttle::stood)
    }

    /// Waits until the next scan costs the program no more than it may lose.
    pub(super) fn space_scans(&mut self, last: Option<Instant>) {
        let (Some(watch), Some(last)) = (&mut self.watch, last) else { return };
        watch.allow(self.control.max_slowdown());
        let until = watch.between_scans();
        while !self.cancel.is_cancelled()
            && !self.control.is_paused()
            && !self.control.wants_post_copy()
            && let Some(left) = until.checked_sub(last.elapsed())
            && !left.is_zero()
        {
            std::thread::sleep(left.min(GLANCE));
        }
    }

    /// It is completed: says whether the ceiling was kept.
    pub(super) fn judge_slowdown(&mut self) {
        self.report.max_slowdown = self.control.max_slowdown();
        let (Some(ceiling), Some(slowdown)) = (self.report.max_slowdown, self.report.slowdown) else {
            return;
        };
        self.report.max_slowdown_met = Some(slowdown <= ceiling);
        if slowdown > ceiling {
            let text = format!(
                "the program was slowed down by {:.1} % while it ran here, and {:.1} % were allowed (--max-slowdown)",
                slowdown * 100.0,
                ceiling * 100.0
            );
            self.observer.event(&Event::Warning { text });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_rests_for_as_long_as_its_share_asks_for_unless_it_is_to_stop() {
        let (share, stop) = (WorkShare::full(), AtomicBool::new(false));
        let busy = || {
            let work = Work::begin();
            while processor_time() - work.worked < Duration::from_millis(10) {}
            work
        };
        let mut work = busy();
        let start = Instant::now();
        work.rest(&share, &stop);
        assert!(start.elapsed() < Duration::from_millis(9), "a full share has no rest");
        share.set(0.2);
        let mut work = busy();
        let began = work.at;
        work.rest(&share, &stop);
        assert!(began.elapsed() >= Duration::from_millis(49), "10 ms are a fifth of {:?}", began.elapsed());
        stop.store(true, Ordering::Relaxed);
        share.set(0.0);
        let mut work = busy();
        let start = Instant::now();
        work.rest(&share, &stop);
        assert!(start.elapsed() < Duration::from_millis(100), "it goes on at once");
    }

    #[test]
    fn a_program_is_watched_from_interval_to_interval() {
        let mut child =
            std::process::Command::new("sh").args(["-c", "while :; do :; done"]).spawn().expect("a shell");
        let mut watch =
            Watch::begin(Target::open(child.id() as i32).expect("a target"), Some(0.05)).expect("a watch");
        std::thread::sleep(Duration::from_millis(50));
        watch.ready().expect("a look");
        let work = WorkShare::full();
        std::thread::sleep(LOOK);
        watch.tick(Duration::ZERO, &work);
        assert!(work.get() < 1.0, "a ceiling begins with a small share");
        // Half of the time it stood still.
        std::thread::sleep(LOOK);
        let slowdown = watch.close(0, LOOK, Duration::ZERO).expect("a look");
        assert!(slowdown > 0.2, "{slowdown}");
        assert_eq!(watch.between_scans(), Duration::ZERO, "there were no faults");
        std::thread::sleep(LOOK);
        watch.close(100_000, Duration::ZERO, Duration::ZERO).expect("a look");
        assert!(watch.between_scans() > Duration::from_millis(500), "{:?}", watch.between_scans());
        child.kill().and_then(|()| child.wait()).expect("its end");
        assert!(watch.look(Duration::ZERO).is_err());
    }
}
