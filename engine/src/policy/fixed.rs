//! A fixed number of rounds, as tools do that know nothing of the program. For comparisons.

use super::estimate::FreezeCost;
use super::{Decision, RoundPolicy, RoundSample, StopReason};
use std::time::Duration;

/// Sends so many rounds, whatever they bring, and freezes.
#[derive(Clone, Debug)]
pub struct Fixed {
    rounds: u32,
    cost: FreezeCost,
}

impl Fixed {
    /// A policy that sends `rounds` rounds (at least one). `cost` is what a freeze costs beside the pages.
    pub fn new(rounds: u32, cost: FreezeCost) -> Self {
        Self { rounds: rounds.max(1), cost }
    }
}

impl RoundPolicy for Fixed {
    fn decide(&mut self, sample: &RoundSample) -> Decision {
        let fixed = self.cost.of(sample.processes, sample.resident_pages);
        let copy = sample.measured.map_or(Duration::ZERO, |measured| {
            Duration::from_secs_f64(sample.todo_pages as f64 / measured.pages_per_second.max(1.0))
        });
        Decision {
            stop: (sample.round >= self.rounds).then_some(StopReason::MaxRounds),
            predicted_downtime: fixed + copy,
        }
    }

    fn holds_back(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_rounds_and_no_more() {
        let mut policy = Fixed::new(3, FreezeCost::default());
        let stops: Vec<bool> = (0..5)
            .map(|round| {
                let sample = RoundSample {
                    round,
                    todo_pages: 10,
                    hot_pages: 0,
                    dirty_pages: 0,
                    since_last: Duration::from_secs(1),
                    processes: 1,
                    resident_pages: 100,
                    measured: None,
                };
                policy.decide(&sample).stop.is_some()
            })
            .collect();
        assert_eq!(stops, [false, false, false, true, true]);
    }
}
