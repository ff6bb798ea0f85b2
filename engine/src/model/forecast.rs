//! What may come of a migration: outcomes from many moments of a trace, as a median and an interval.

use super::migration::{Outcome, Wish, simulate};
use super::site::Site;
use super::trace::Trace;
use crate::plan::Strategy;
use serde::Serialize;
use std::time::Duration;

/// A quantity: what half of the outcomes are below, and from where to where nine of ten are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Estimate {
    /// The median.
    pub median: f64,
    /// One of twenty is below.
    pub low: f64,
    /// One of twenty is above.
    pub high: f64,
}

impl Estimate {
    /// Of outcomes, each of which may be off by `spread`.
    fn of(mut values: Vec<f64>, spread: f64) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |share: f64| match values.len() {
            0 => 0.0,
            count => values[((count - 1) as f64 * share).round() as usize],
        };
        Self { median: at(0.5), low: (at(0.05) - spread).max(0.0), high: at(0.95) + spread }
    }
}

/// What one strategy of moving a program would bring. Times are microseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Forecast {
    /// How it is asked for.
    pub strategy: Strategy,
    /// How it would go, from most of the moments.
    pub chosen: Strategy,
    /// Why that would be chosen, from one of these moments; empty where it is asked for.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub because: String,
    /// Rounds, the one in the freeze included.
    pub rounds: Estimate,
    /// Standing still.
    pub downtime_us: Estimate,
    /// From the start until it runs at the destination.
    pub total_us: Estimate,
    /// From the start until all of it is there.
    pub complete_us: Estimate,
    /// On the wire.
    pub bytes: Estimate,
    /// Share of its pace that the program loses meanwhile.
    pub slowdown: Estimate,
    /// Why the rounds ended, from most of the moments.
    pub stop_reason: Option<&'static str>,
}

/// Begins at `starts` moments that are spread over the trace. `spread` is how far the fixed cost of a freeze was off in
/// earlier runs.
pub fn forecast(trace: &Trace, site: &Site, wish: &Wish, starts: u32, spread: Duration) -> Forecast {
    let starts = starts.max(1);
    let outcomes: Vec<Outcome> =
        (0..starts).map(|at| simulate(trace, site, wish, trace.duration() * at / starts)).collect();
    let estimate =
        |what: fn(&Outcome) -> f64, spread: f64| Estimate::of(outcomes.iter().map(what).collect(), spread);
    let spread = spread.as_micros() as f64;
    let reason =
        |outcome: &Outcome| outcomes.iter().filter(|other| other.stop_reason == outcome.stop_reason).count();
    let alike = |outcome: &Outcome| outcomes.iter().filter(|other| other.chosen == outcome.chosen).count();
    let usual = outcomes.iter().max_by_key(|outcome| alike(outcome));
    Forecast {
        strategy: wish.strategy,
        chosen: usual.map_or(wish.strategy, |outcome| outcome.chosen),
        because: usual.map_or_else(String::new, |outcome| outcome.because.clone()),
        rounds: estimate(|outcome| outcome.rounds.len() as f64, 0.0),
        downtime_us: estimate(|outcome| outcome.downtime_us as f64, spread),
        total_us: estimate(|outcome| outcome.total_us as f64, spread),
        complete_us: estimate(|outcome| outcome.complete_us as f64, spread),
        bytes: estimate(|outcome| outcome.bytes as f64, 0.0),
        slowdown: estimate(|outcome| outcome.slowdown, 0.0),
        stop_reason: outcomes.iter().max_by_key(|outcome| reason(outcome)).and_then(|best| best.stop_reason),
    }
}

#[cfg(test)]
mod tests {
    use super::super::trace::tests::uniform_writer;
    use super::*;
    use crate::plan::PolicyChoice;

    #[test]
    fn a_forecast_holds_what_single_runs_bring() {
        let trace = uniform_writer(1 << 14, 5_000.0, 5);
        let site = Site { bandwidth: 125e6, ..Site::default() };
        let wish = Wish {
            strategy: Strategy::PreCopy,
            policy: PolicyChoice::Adaptive,
            downtime: Duration::from_millis(100),
            total_time: None,
            max_rounds: 30,
        };
        let spread = Duration::from_millis(5);
        let forecast = forecast(&trace, &site, &wish, 9, spread);
        let one = simulate(&trace, &site, &wish, trace.duration() / 3);
        for (estimate, value) in [
            (forecast.downtime_us, one.downtime_us as f64),
            (forecast.bytes, one.bytes as f64),
            (forecast.total_us, one.total_us as f64),
        ] {
            assert!(estimate.low <= estimate.median && estimate.median <= estimate.high);
            assert!((value / estimate.median - 1.0).abs() < 0.3, "{value} and {estimate:?}");
        }
        assert!(forecast.downtime_us.high - forecast.downtime_us.low >= 10_000.0, "the spread is in it");
        assert_eq!(forecast.stop_reason, Some("target-met"));
    }
}
