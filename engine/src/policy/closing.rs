//! The last rounds: what the program wrote while its freeze was made ready.

use super::adaptive::{Fluid, fluid};
use super::estimate::FreezeCost;
use super::{Decision, RoundSample, StopReason};
use std::time::Duration;

/// Between the decision to freeze and the freeze both sides get ready, which takes the longer the more memory there is (`prepared_us` of a
/// report: the source's counters, areas and watchman). What a program writes in that time it would stand still for. Rounds of the milliseconds that are left cost next to nothing, and leave what is
/// written in the last of them.
///
/// As [`super::Adaptive`] it goes by the fluid model. A round is worth it if it is expected to shorten the freeze noticeably, and each must
/// have half of what the one before had: a program that writes as fast as is sent is not followed.
#[derive(Clone, Debug)]
pub struct Closing {
    cost: FreezeCost,
    rounds: u32,
    last: Option<Duration>,
}

/// Rounds at most.
const MOST: u32 = 4;
/// A round must shorten the freeze by so much.
const WORTH: Duration = Duration::from_millis(1);
/// ... and by this share of what the pages cost.
const WORTH_SHARE: f64 = 0.3;
/// A round has at most so much of what the one before had.
const SHRINKS: f64 = 0.5;

impl Closing {
    /// For a freeze that costs `cost` beside the pages.
    pub fn new(cost: FreezeCost) -> Self {
        Self { cost, rounds: 0, last: None }
    }

    /// Called after every collect from when everything else is ready: whether another round goes before the freeze.
    pub fn decide(&mut self, sample: &RoundSample) -> Decision {
        let fixed = self.cost.of(sample.processes, sample.resident_pages);
        let stop = Some(StopReason::TargetMet);
        let Some(measured) = sample.measured else { return Decision { stop, predicted_downtime: fixed } };
        let Fluid { held, copy, gain } = fluid(sample, &measured);
        let predicted_downtime = fixed + held + copy;
        let helps = gain >= WORTH.max(copy.mul_f64(WORTH_SHARE));
        let shrinks = self.last.is_none_or(|last| copy <= last.mul_f64(SHRINKS));
        if !helps || !shrinks || self.rounds == MOST {
            return Decision { stop, predicted_downtime };
        }
        self.rounds += 1;
        self.last = Some(copy);
        Decision { stop: None, predicted_downtime }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Measured;
    use super::*;

    fn sample(todo_pages: u64, since_last: Duration) -> RoundSample {
        RoundSample {
            round: 7,
            todo_pages,
            hot_pages: 0,
            dirty_pages: todo_pages,
            since_last,
            processes: 1,
            resident_pages: 1 << 18,
            measured: Some(Measured {
                pages_per_second: 200_000.0,
                bytes_per_second: 100e6,
                round_overhead: Duration::from_millis(1),
            }),
        }
    }

    /// Rounds until it is content, for a program that dirties `rate` pages a second, and the pages that are left.
    fn rounds(rate: f64, getting_ready: Duration) -> (u32, u64) {
        let mut closing = Closing::new(FreezeCost::default());
        let (mut since, mut rounds) = (getting_ready, 0);
        loop {
            let pages = (rate * since.as_secs_f64()) as u64;
            if closing.decide(&sample(pages, since)).stop.is_some() {
                return (rounds, pages);
            }
            rounds += 1;
            since = Duration::from_millis(1) + Duration::from_secs_f64(pages as f64 / 200_000.0);
        }
    }

    #[test]
    fn what_was_written_meanwhile_goes_before_the_freeze() {
        let (count, left) = rounds(50_000.0, Duration::from_millis(40));
        assert!((1..=3).contains(&count) && left < 400, "{left} of 2000 pages after {count} rounds");
    }

    #[test]
    fn a_slow_writer_is_frozen_at_once() {
        assert_eq!(rounds(2560.0, Duration::from_millis(40)).0, 0);
    }

    #[test]
    fn a_program_that_outruns_the_link_is_not_followed() {
        assert_eq!(rounds(400_000.0, Duration::from_millis(40)).0, 0);
        assert!(rounds(180_000.0, Duration::from_millis(40)).0 <= 1);
    }

    #[test]
    fn it_ends_and_nothing_is_known_without_a_round_before() {
        let mut closing = Closing::new(FreezeCost::default());
        let unknown = RoundSample { measured: None, ..sample(5000, Duration::from_millis(10)) };
        assert!(closing.decide(&unknown).stop.is_some());
        // Each time half, and the program seems to write nothing at all.
        let idle = Duration::from_secs(1000);
        let stops = (0..10u32).map(|step| closing.decide(&sample(1 << (20 - step), idle)).stop.is_some());
        assert_eq!(stops.filter(|stop| !stop).count() as u32, MOST);
    }
}
