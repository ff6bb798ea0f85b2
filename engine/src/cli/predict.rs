//! `pageferry predict`, and the table of forecasts.

use super::arguments::{CALIBRATION, TrackerName, policy};
use super::render::{printable, table};
use super::units::{Bytes, Rate, Time, micros};
use super::{calibration, failure, signals};
use clap::Args;
use pageferry::PolicyChoice;
use pageferry::model::{Estimate, Forecast};
use pageferry::predict::{PredictError, PredictPlan, Prediction, predict};
use std::error::Error;
use std::fmt::Write;
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(super) struct PredictVerb {
    /// Root of the process tree.
    #[arg(long, value_name = "PID", allow_negative_numbers = true)]
    pid: i32,
    /// What the link carries, such as 1Gbit or 100MB (a second), the heads of packets included [default: no limit].
    #[arg(long, value_name = "RATE")]
    bandwidth: Option<Rate>,
    /// From one host to the other and back.
    #[arg(long, value_name = "TIME", default_value = "200us")]
    round_trip: Time,
    /// How long to watch the program.
    #[arg(long, value_name = "TIME", default_value = "5s")]
    duration: Time,
    /// Time between two scans [default: as short as takes a twentieth of the time, from 20ms to 500ms].
    #[arg(long, value_name = "TIME")]
    interval: Option<Time>,
    /// Downtime to aim for.
    #[arg(long, value_name = "TIME", default_value = "100ms")]
    downtime: Time,
    /// Time to aim for from the start until it runs there with all of its pages, for the strategy auto [default: as long as it
    /// takes].
    #[arg(long, value_name = "TIME")]
    total_time: Option<Time>,
    /// Pre-copy rounds at most.
    #[arg(long, value_name = "N", default_value_t = 30)]
    max_rounds: u32,
    /// Who decides between another round and the freeze: `adaptive`, or `fixed:N`.
    #[arg(long, value_name = "POLICY", default_value = "adaptive", value_parser = policy)]
    policy: PolicyChoice,
    /// Connections, each with a worker of its own [default: one a processor, 8 at most].
    #[arg(long, value_name = "N")]
    streams: Option<u16>,
    /// The receiver has memory for the program ready (`receive --standby`): none has to be made ready on the way.
    #[arg(long)]
    standby: bool,
    /// How dirty pages are found.
    #[arg(long, value_enum, default_value = "auto")]
    tracker: TrackerName,
    /// What earlier migrations took; `none` uses what the engine was built with.
    #[arg(long, value_name = "FILE", default_value = CALIBRATION)]
    calibration: PathBuf,
    /// One JSON object instead of the table: times in microseconds, shares of 1.
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
pub(super) fn run(verb: &PredictVerb) -> anyhow::Result<u8> {
    let plan = PredictPlan {
        pid: verb.pid,
        tracker: verb.tracker.kind(),
        duration: verb.duration.0,
        interval: verb.interval.map(|time| time.0),
        bandwidth: verb.bandwidth.map(|rate| rate.0),
        round_trip: verb.round_trip.0,
        streams: verb.streams,
        downtime: verb.downtime.0,
        total_time: verb.total_time.map(|time| time.0),
        max_rounds: verb.max_rounds,
        policy: verb.policy,
        standby: verb.standby,
    };
    let cancel = signals::token()?;
    match predict(&plan, &calibration::read(&verb.calibration), &cancel) {
        Ok(prediction) if verb.json => {
            let mut line = serde_json::to_vec(&prediction)?;
            line.push(b'\n');
            super::print(&line)
        }
        Ok(prediction) => super::print(report(&prediction, verb).as_bytes()),
        Err(error) => {
            eprintln!("error: {}", printable(&error.to_string()));
            let mut cause = error.source();
            while let Some(error) = cause {
                eprintln!("  because: {}", printable(&error.to_string()));
                cause = error.source();
            }
            Ok(match error {
                PredictError::Cancelled => cancel.signal().map_or(130, |signal| 128 + signal as u8),
                _ => failure::REFUSED,
            })
        }
    }
}

fn report(prediction: &Prediction, verb: &PredictVerb) -> String {
    let mut text = String::new();
    let processes = if prediction.processes == 1 { "process" } else { "processes" };
    let _ = writeln!(
        text,
        "{} ({} {processes}, {}) writes {:.0} pages a second; seen in {} scans",
        printable(&prediction.program),
        prediction.processes,
        Bytes(prediction.memory_bytes),
        prediction.dirty_rate,
        prediction.scans
    );
    if prediction.image_memory_bytes > 0 {
        let _ = writeln!(
            text,
            "{} more are shared memory or pages of files, and are sent while it stands still",
            Bytes(prediction.image_memory_bytes)
        );
    }
    let _ = writeln!(
        text,
        "a page takes {:.0} bytes the first time and {:.0} again; {}, downtime to aim for {}; {}\n",
        prediction.first_page_bytes,
        prediction.again_page_bytes,
        verb.bandwidth.map_or_else(|| "no limit on the link".to_owned(), |rate| rate.to_string()),
        verb.downtime,
        match prediction.learned_from {
            0 => "no earlier migrations to learn from".to_owned(),
            1 => "learned from one earlier migration".to_owned(),
            runs => format!("learned from {runs} earlier migrations"),
        }
    );
    text + &forecasts(&prediction.strategies)
}

/// The table of what each strategy would bring.
pub(super) fn forecasts(strategies: &[Forecast]) -> String {
    let time = |value: f64| micros(value as u64).to_string();
    let size = |value: f64| Bytes(value as u64).to_string();
    let share = |value: f64| format!("{:.1} %", value * 100.0);
    let cell = |estimate: &Estimate, show: &dyn Fn(f64) -> String| {
        let (median, low, high) = (show(estimate.median), show(estimate.low), show(estimate.high));
        if low == high { median } else { format!("{median} ({low}..{high})") }
    };
    let rows = strategies.iter().map(|forecast| {
        vec![
            match forecast.strategy == forecast.chosen {
                true => forecast.strategy.name().to_owned(),
                false => format!("{}: {}", forecast.strategy.name(), forecast.chosen.name()),
            },
            cell(&forecast.rounds, &|value| format!("{value:.0}")),
            cell(&forecast.downtime_us, &time),
            cell(&forecast.total_us, &time),
            cell(&forecast.complete_us, &time),
            cell(&forecast.bytes, &size),
            cell(&forecast.slowdown, &share),
            forecast.stop_reason.unwrap_or("-").to_owned(),
        ]
    });
    let mut text = table(
        &[
            "strategy",
            "rounds",
            "downtime",
            "runs there after",
            "all there after",
            "bytes",
            "slower by",
            "rounds end",
        ],
        &[1, 2, 3, 4, 5, 6],
        rows,
    );
    for forecast in strategies.iter().filter(|forecast| !forecast.because.is_empty()) {
        let (asked, chosen) = (forecast.strategy.name(), forecast.chosen.name());
        let _ = writeln!(text, "\n{asked} would choose {chosen}: {}", forecast.because);
    }
    text
}
