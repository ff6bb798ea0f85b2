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
    /// Of outcomes, each of which may be off by `spread`, and by this share of itself.
    fn of(mut values: Vec<f64>, spread: f64, share: f64) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |share: f64| match values.len() {
            0 => 0.0,
            count => values[((count - 1) as f64 * share).round() as usize],
        };
        Self {
            median: at(0.5),
            low: (at(0.05) * (1.0 - share) - spread).max(0.0),
            high: at(0.95) * (1.0 + share) + spread,
        }
    }
}

/// How far what is known beforehand may be off, in nine of ten cases.
#[derive(Clone, Copy, Debug)]
pub struct Doubt {
    /// The fixed cost of a freeze.
    pub freeze: Duration,
    /// Bytes of pages, as a share of them; and with them what they take on the link.
    pub bytes: f64,
}

impl Doubt {
    /// What is left where bytes of pages are known: heads of frames and of packets, images, what is sent twice.
    pub const LEAST: f64 = 0.01;
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

/// Begins at `starts` moments that are spread over the trace.
pub fn forecast(trace: &Trace, site: &Site, wish: &Wish, starts: u32, doubt: Doubt) -> Forecast {
    let starts = starts.max(1);
    let outcomes: Vec<Outcome> =
        (0..starts).map(|at| simulate(trace, site, wish, trace.duration() * at / starts)).collect();
    let of = |what: fn(&Outcome) -> f64, spread: f64, share: f64| {
        Estimate::of(outcomes.iter().map(what).collect(), spread, share)
    };
    let time = |what: fn(&Outcome) -> f64| of(what, doubt.freeze.as_micros() as f64, doubt.bytes);
    let reason =
        |outcome: &Outcome| outcomes.iter().filter(|other| other.stop_reason == outcome.stop_reason).count();
    let alike = |outcome: &Outcome| outcomes.iter().filter(|other| other.chosen == outcome.chosen).count();
    let usual = outcomes.iter().max_by_key(|outcome| alike(outcome));
    Forecast {
        strategy: wish.strategy,
        chosen: usual.map_or(wish.strategy, |outcome| outcome.chosen),
        because: usual.map_or_else(String::new, |outcome| outcome.because.clone()),
        rounds: of(|outcome| outcome.rounds.len() as f64, 0.0, 0.0),
        downtime_us: time(|outcome| outcome.downtime_us as f64),
        total_us: time(|outcome| outcome.total_us as f64),
        complete_us: time(|outcome| outcome.complete_us as f64),
        bytes: of(|outcome| outcome.bytes as f64, 0.0, doubt.bytes),
        slowdown: of(|outcome| outcome.slowdown, 0.0, 0.0),
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
        let doubt = Doubt { freeze: Duration::from_millis(5), bytes: 0.1 };
        let forecast = forecast(&trace, &site, &wish, 9, doubt);
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
        let Estimate { median, low, high } = forecast.bytes;
        assert!(low <= 0.9 * median && high >= 1.1 * median, "so is the doubt about bytes");
        assert_eq!(forecast.stop_reason, Some("target-met"));
    }
}
