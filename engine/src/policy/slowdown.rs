//! How much a migration slows a program down that still runs here, and how it is kept below a ceiling. Pure.
//!
//! Three things cost the program time: the faults of its first writes to pages that a scan has protected, waiting for a processor
//! that the migration has, and standing still. The first two are shares of the time in which its threads run or want to run (a
//! program that sleeps most of the time loses little of a processor, and as much of its pace as any other), the third is one of
//! the whole time. Waiting counts as far as it is more than it was before the migration.

use std::time::Duration;

/// The fault of a first write to a page after a scan: userfaultfd's asynchronous write-protection and soft-dirty take 0.5 to 1 us here
/// (docs/BENCHMARKS.md, tracking).
pub const FAULT: Duration = Duration::from_nanos(700);

/// The pace is not lowered below this: a migration that does not end slows a program down for longest.
const LEAST: f64 = 0.02;
/// At least this part of the pace is left by one look.
const LOWER: f64 = 0.25;
/// So much more of the full pace at each look at which there is room.
const RAISE: f64 = 0.02;
/// There is room below this part of the ceiling, and the pace is lowered to it.
const ROOM: f64 = 0.7;
/// Faults may take this part of the ceiling.
const FAULTS: f64 = 0.5;
/// Scans are not held off for longer: the receiver hears nothing meanwhile.
const LONGEST: Duration = Duration::from_secs(2);

/// What was seen of a program for a while.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Seen {
    /// The while.
    pub wall: Duration,
    /// Its threads ran, added up.
    pub ran: Duration,
    /// They waited for a processor.
    pub waited: Duration,
    /// Pages that were written for the first time after a scan.
    pub faults: u64,
    /// It was made to stand still.
    pub stood: Duration,
}

impl Seen {
    /// This and what came after it.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            wall: self.wall + other.wall,
            ran: self.ran + other.ran,
            waited: self.waited + other.waited,
            faults: self.faults + other.faults,
            stood: self.stood + other.stood,
        }
    }

    /// Share of the time in which its threads wanted to run and waited; `None` if they did not want to.
    pub fn waiting(&self) -> Option<f64> {
        let busy = self.ran + self.waited;
        (!busy.is_zero()).then(|| self.waited.as_secs_f64() / busy.as_secs_f64())
    }

    /// Share of its running time that it has lost, from 0 to 1; `usual` is the share that it waits anyway.
    pub fn slowdown(&self, usual: f64) -> f64 {
        let busy = (self.ran + self.waited).as_secs_f64();
        let faults = if busy > 0.0 { FAULT.as_secs_f64() * self.faults as f64 / busy } else { 0.0 };
        let waiting = self.waiting().map_or(0.0, |waiting| (waiting - usual).max(0.0));
        let stood = match self.wall.as_secs_f64() {
            wall if wall > 0.0 => self.stood.as_secs_f64() / wall,
            _ => 0.0,
        };
        (faults + waiting + stood).clamp(0.0, 1.0)
    }
}

/// How fast the migration may work, so that the program is not slowed down by more than a share: more by a little while there is room, and
/// less by a part as soon as there is none (AIMD: Chiu and Jain, 1989).
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    ceiling: f64,
    share: f64,
}

impl Pace {
    /// For a program that may lose `ceiling` of its running time. The migration begins with as much of each processor as the program may lose
    /// of one.
    pub fn new(ceiling: f64) -> Self {
        Self { ceiling, share: ceiling.clamp(LEAST, 1.0) }
    }

    /// What the program may lose.
    pub fn ceiling(&self) -> f64 {
        self.ceiling
    }

    /// Share of its time that each thread of the migration may work.
    pub fn share(&self) -> f64 {
        self.share
    }

    /// So much it was slowed down since the last look.
    pub fn look(&mut self, slowdown: f64) {
        if slowdown > self.ceiling {
            self.share = (self.share * (self.ceiling * ROOM / slowdown).max(LOWER)).max(LEAST);
        } else if slowdown < self.ceiling * ROOM {
            self.share = (self.share + RAISE).min(1.0);
        }
    }

    /// The least time between two scans, after one that found `faults` pages, of a program whose threads want to run for `busy` of each
    /// second.
    pub fn between_scans(&self, faults: u64, busy: f64) -> Duration {
        let lost = FAULT.as_secs_f64() * faults as f64;
        let allowed = self.ceiling * FAULTS * busy;
        Duration::try_from_secs_f64(lost / allowed).map_or(LONGEST, |time| time.min(LONGEST))
    }
}

/// How long to rest after `worked`, so that work is `share` of the time.
pub fn rest(worked: Duration, share: f64) -> Duration {
    if share >= 1.0 { Duration::ZERO } else { worked.mul_f64(1.0 / share.max(LEAST) - 1.0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn each_cost_is_a_share_of_the_running_time() {
        let quiet = Seen { wall: MS(1000), ran: MS(900), waited: MS(100), ..Seen::default() };
        assert_eq!(quiet.slowdown(0.1), 0.0, "it waited as always");
        assert!((quiet.slowdown(0.0) - 0.1).abs() < 1e-9);
        assert!((Seen { stood: MS(50), ..quiet }.slowdown(0.1) - 0.05).abs() < 1e-9);
        let writes = Seen { faults: 10_000, ..quiet };
        assert!((writes.slowdown(0.1) - 0.007).abs() < 1e-9, "7 ms of a second");
        // The same faults of a program that sleeps for nine tenths of the time.
        let sleeps = Seen { ran: MS(90), waited: MS(10), ..writes };
        assert!((sleeps.slowdown(0.1) - 0.07).abs() < 1e-9);
        assert_eq!(Seen { wall: MS(1000), ..Seen::default() }.slowdown(0.0), 0.0, "it did not want to run");
        assert_eq!(quiet.and(writes).faults, 10_000);
        assert_eq!(quiet.and(writes).wall, MS(2000));
    }

    #[test]
    fn work_is_a_share_of_the_time() {
        assert_eq!(rest(MS(10), 1.0), Duration::ZERO);
        assert_eq!(rest(MS(10), 0.5), MS(10));
        assert_eq!(rest(MS(10), 0.1), MS(90));
    }

    #[test]
    fn scans_are_as_far_apart_as_their_faults_ask_for() {
        let pace = Pace::new(0.05);
        // 0.7 ms of faults are half of 5 % of 28 ms.
        let apart = pace.between_scans(1000, 1.0);
        assert!((27..=29).contains(&apart.as_millis()), "{apart:?}");
        assert!(pace.between_scans(1000, 2.0) < apart && pace.between_scans(2000, 1.0) > apart);
        assert_eq!(pace.between_scans(1000, 0.0), LONGEST);
        assert_eq!(pace.between_scans(0, 0.0), LONGEST, "nothing is known of one that does not run");
        assert_eq!(pace.between_scans(0, 1.0), Duration::ZERO);
    }

    proptest! {
        /// Whatever share of the migration's work the program feels: it is slowed down by no more than the ceiling, but for what is
        /// so at the least pace, and the room that there is is used.
        #[test]
        fn the_pace_settles_below_the_ceiling(felt in 0.0f64..2.0, ceiling in 0.01f64..0.5, other in 0.0f64..0.005) {
            let mut pace = Pace::new(ceiling);
            let mut seen = Vec::new();
            for _ in 0..200 {
                let slowdown = (pace.share() * felt + other).min(1.0);
                seen.push(slowdown);
                pace.look(slowdown);
            }
            let late = &seen[100..];
            let mean = late.iter().sum::<f64>() / late.len() as f64;
            prop_assert!(mean <= ceiling.max(LEAST * felt + other) * 1.05 + RAISE * felt / 2.0, "{mean} of {ceiling}");
            prop_assert!(pace.share() >= 1.0 || mean >= ceiling * ROOM / 2.0 - other, "{mean} of {ceiling}");
        }
    }
}
