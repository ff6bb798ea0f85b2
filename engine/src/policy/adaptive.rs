//! The default policy: predict the downtime of freezing now, and the one of freezing after another round.

use super::estimate::FreezeCost;
use super::{Decision, Measured, RoundPolicy, RoundSample, StopReason};
use std::time::Duration;

/// Goes on while another round is expected to shorten the downtime noticeably.
///
/// With `n` pages collected, `r` pages a second that can be looked at and sent, `o` the fixed time of a round
/// and `d` pages a second that the program dirties, freezing now takes `F + n / r`. Another round takes
/// `o + n / r`, in which `d * (o + n / r)` pages become dirty, so that freezing after it takes
/// `F + d * (o + n / r) / r` (the fluid model of pre-copy: Clark et al., "Live Migration of Virtual
/// Machines", NSDI 2005). The dirty rate is that of the last interval, so pages that are written again and
/// again are counted once a round, as they should be. Pages that are held back ([`super::HotPages`]) are sent in the
/// freeze whatever is decided: they count for the downtime and not for what a round could gain.
#[derive(Clone, Debug)]
pub struct Adaptive {
    target: Duration,
    max_rounds: u32,
    cost: FreezeCost,
    fruitless: u32,
    /// So many rounds in a row may be fruitless.
    patience: u32,
    best: Option<Duration>,
}

/// A round must shorten the predicted downtime by this share of what the pages cost, or it is fruitless.
const WORTH: f64 = 0.1;
/// ... or by this much: below it the noise of a freeze is larger than the gain.
const WORTH_AT_LEAST: Duration = Duration::from_millis(1);
/// So many rounds in a row may be fruitless before pre-copy is given up: one bad round is often a burst.
const FRUITLESS_ROUNDS: u32 = 3;

impl Adaptive {
    /// A policy that aims for `target` and freezes after `max_rounds` rounds at the latest. `cost` is what a freeze costs
    /// beside the pages.
    pub fn new(target: Duration, max_rounds: u32, cost: FreezeCost) -> Self {
        Self { target, max_rounds, cost, fruitless: 0, patience: FRUITLESS_ROUNDS, best: None }
    }
}

/// What the fluid model makes of the pages that were just collected.
pub(super) struct Fluid {
    /// Sending those that are held back, and the others, in the freeze.
    pub(super) held: Duration,
    pub(super) copy: Duration,
    /// By so much a freeze after another round is shorter.
    pub(super) gain: Duration,
}

/// As [`Adaptive`] says.
pub(super) fn fluid(sample: &RoundSample, measured: &Measured) -> Fluid {
    let rate = measured.pages_per_second.max(1.0);
    let pages = sample.todo_pages.saturating_sub(sample.hot_pages) as f64;
    let copy = Duration::from_secs_f64(pages / rate);
    let dirty_rate = match sample.since_last.as_secs_f64() {
        seconds if seconds > 0.0 => pages / seconds,
        _ => 0.0,
    };
    let after = (measured.round_overhead + copy).as_secs_f64() * dirty_rate / rate;
    let gain = copy.saturating_sub(Duration::from_secs_f64(after));
    Fluid { held: Duration::from_secs_f64(sample.hot_pages as f64 / rate), copy, gain }
}

impl RoundPolicy for Adaptive {
    fn decide(&mut self, sample: &RoundSample) -> Decision {
        let fixed = self.cost.of(sample.processes, sample.resident_pages);
        let Some(measured) = sample.measured else {
            // Round 0 copies everything; what it will cost is not known before it ran.
            return Decision { stop: None, predicted_downtime: fixed };
        };
        let Fluid { held, copy, gain } = fluid(sample, &measured);
        let now = fixed + held + copy;
        let helps = gain >= WORTH_AT_LEAST.max(copy.mul_f64(WORTH));

        // The prediction may be too rosy again and again (bursts): what counts in the end is whether the
        // pages that are left really become fewer.
        let improved = self.best.is_none_or(|best| copy < best.mul_f64(1.0 - WORTH));
        if improved {
            self.best = Some(copy);
            self.fruitless = 0;
        } else {
            self.fruitless += 1;
        }

        let stop = if sample.round >= self.max_rounds {
            Some(StopReason::MaxRounds)
        } else if now <= self.target && (!helps || self.fruitless > 0) {
            Some(StopReason::TargetMet)
        } else if now > self.target && self.fruitless >= self.patience {
            Some(StopReason::NoProgress)
        } else if now > self.target && copy < WORTH_AT_LEAST {
            // Nothing is left that sending could make shorter: the target is below the fixed cost.
            Some(StopReason::NoProgress)
        } else {
            None
        };
        Decision { stop, predicted_downtime: now }
    }

    fn program_slowed_down(&mut self) {
        // It is known to outrun the link: fewer rounds say that it is still not slow enough.
        (self.fruitless, self.patience, self.best) = (0, FRUITLESS_ROUNDS - 1, None);
    }

    fn begin_anew(&mut self) {
        (self.fruitless, self.best) = (0, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program that dirties `dirty` distinct pages a second out of `working_set`, copied at `rate`.
    fn simulate(memory: u64, dirty: f64, working_set: u64, rate: f64, max_rounds: u32) -> (u32, Decision) {
        let mut policy = Adaptive::new(Duration::from_millis(100), max_rounds, FreezeCost::default());
        let overhead = Duration::from_micros(500);
        let mut todo = memory;
        let mut since = Duration::ZERO;
        let mut measured = None;
        for round in 0.. {
            let decision = policy.decide(&RoundSample {
                round,
                todo_pages: todo,
                hot_pages: 0,
                dirty_pages: 0,
                since_last: since,
                processes: 1,
                resident_pages: memory,
                measured,
            });
            if decision.stop.is_some() {
                return (round, decision);
            }
            since = overhead + Duration::from_secs_f64(todo as f64 / rate);
            measured = Some(Measured {
                pages_per_second: rate,
                bytes_per_second: rate * 4096.0,
                round_overhead: overhead,
            });
            todo = ((since.as_secs_f64() * dirty) as u64).min(working_set);
        }
        unreachable!("the loop ends by returning")
    }

    #[test]
    fn a_slow_writer_converges_whatever_the_memory() {
        for memory in [1 << 14, 1 << 17, 1 << 20] {
            let (rounds, decision) = simulate(memory, 2560.0, memory, 400_000.0, 30);
            assert_eq!(decision.stop, Some(StopReason::TargetMet), "{memory} pages");
            assert!(rounds <= 4, "{memory} pages took {rounds} rounds");
        }
    }

    #[test]
    fn a_writer_that_outruns_the_link_is_given_up_soon() {
        let (rounds, decision) = simulate(1 << 18, 60_000.0, 1 << 18, 30_000.0, 30);
        assert_eq!(decision.stop, Some(StopReason::NoProgress));
        assert!(rounds <= 6, "{rounds} rounds of sending the same pages");
    }

    #[test]
    fn the_limit_of_rounds_holds() {
        let (rounds, decision) = simulate(1 << 20, 20_000.0, 1 << 20, 30_000.0, 2);
        assert_eq!(decision.stop, Some(StopReason::MaxRounds));
        assert_eq!(rounds, 2);
    }

    #[test]
    fn a_target_below_the_fixed_cost_ends_too() {
        let mut policy = Adaptive::new(Duration::from_millis(1), 30, FreezeCost::default());
        let sample = |round, todo_pages| RoundSample {
            round,
            todo_pages,
            hot_pages: 0,
            dirty_pages: 0,
            since_last: Duration::from_millis(10),
            processes: 1,
            resident_pages: 1000,
            measured: Some(Measured {
                pages_per_second: 1e5,
                bytes_per_second: 1e5 * 4096.0,
                round_overhead: Duration::from_micros(300),
            }),
        };
        assert_eq!(policy.decide(&sample(1, 1000)).stop, None);
        assert_eq!(policy.decide(&sample(2, 10)).stop, Some(StopReason::NoProgress));
    }

    #[test]
    fn what_is_held_back_is_no_reason_for_another_round() {
        let mut policy = Adaptive::new(Duration::from_millis(60), 30, FreezeCost::default());
        let sample = |round, todo_pages, hot_pages| RoundSample {
            round,
            todo_pages,
            hot_pages,
            dirty_pages: 0,
            since_last: Duration::from_millis(100),
            processes: 1,
            resident_pages: 100_000,
            measured: Some(Measured {
                pages_per_second: 3e4,
                bytes_per_second: 3e4 * 4096.0,
                round_overhead: Duration::from_micros(500),
            }),
        };
        assert_eq!(policy.decide(&sample(3, 13_000, 5_000)).stop, None, "most of it can still be sent");
        let decision = policy.decide(&sample(4, 13_010, 13_000));
        assert_eq!(decision.stop, Some(StopReason::NoProgress));
        assert!(decision.predicted_downtime > Duration::from_millis(400), "and it is not forgotten");
    }

    #[test]
    fn a_program_that_was_slowed_down_has_two_rounds_to_show_it() {
        let mut policy = Adaptive::new(Duration::from_millis(60), 30, FreezeCost::default());
        let mut decide = |round, pages, slower: bool| {
            if slower {
                policy.program_slowed_down();
            }
            let measured = Some(Measured {
                pages_per_second: 3e4,
                bytes_per_second: 3e4 * 4096.0,
                round_overhead: Duration::from_micros(500),
            });
            let sample = RoundSample {
                round,
                todo_pages: pages,
                hot_pages: 0,
                dirty_pages: 0,
                since_last: Duration::from_secs(1),
                processes: 1,
                resident_pages: 40_000,
                measured,
            };
            policy.decide(&sample).stop
        };
        let given_up = Some(StopReason::NoProgress);
        let stops: Vec<_> = (1..5).map(|round| decide(round, 40_000, false)).collect();
        assert_eq!(stops, [None, None, None, given_up]);
        let stops = [decide(5, 40_000, true), decide(6, 40_000, false), decide(7, 40_000, false)];
        assert_eq!(stops, [None, None, given_up], "not enough");
        let stops = [decide(8, 30_000, true), decide(9, 20_000, false), decide(10, 10_000, false)];
        assert_eq!(stops, [None, None, None], "enough");
    }

    #[test]
    fn the_first_round_is_always_sent() {
        let mut policy = Adaptive::new(Duration::from_secs(100), 1, FreezeCost::default());
        let sample = RoundSample {
            round: 0,
            todo_pages: 1,
            hot_pages: 0,
            dirty_pages: 0,
            since_last: Duration::ZERO,
            processes: 1,
            resident_pages: 1,
            measured: None,
        };
        assert_eq!(policy.decide(&sample).stop, None);
    }
}
