//! `pageferry simulate`.

use super::arguments::{CALIBRATION, StrategyName, policy};
use super::predict::forecasts;
use super::render::{printable, table};
use super::units::{Bytes, Rate, Time, micros};
use super::{calibration, failure};
use anyhow::{Context, bail};
use clap::Args;
use pageferry::PolicyChoice;
use pageferry::Strategy;
use pageferry::model::{Doubt, HEAD, Outcome, PageCost, Site, Trace, Wish, forecast, simulate};
use pageferry_tracker::recording::{Ending, Reader};
use serde::Serialize;
use std::fmt::Write;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Moments of the recording at which migrations begin, where many are asked for.
const STARTS: u32 = 15;

#[derive(Debug, Args)]
pub(super) struct SimulateVerb {
    /// A recording of `pageferry track --record`.
    #[arg(long, value_name = "FILE")]
    trace: PathBuf,
    /// What the link carries, such as 1Gbit or 100MB (a second), the heads of packets included [default: no limit].
    #[arg(long, value_name = "RATE")]
    bandwidth: Option<Rate>,
    /// From one host to the other and back.
    #[arg(long, value_name = "TIME", default_value = "200us")]
    round_trip: Time,
    /// Show the rounds of one migration by this strategy, instead of all strategies.
    #[arg(long, value_enum, value_name = "STRATEGY")]
    strategy: Option<StrategyName>,
    /// Moment of the recording at which that migration begins.
    #[arg(long, value_name = "TIME", default_value = "0s", requires = "strategy")]
    start: Time,
    /// Who decides between another round and the freeze: `adaptive`, or `fixed:N`.
    #[arg(long, value_name = "POLICY", default_value = "adaptive", value_parser = policy)]
    policy: PolicyChoice,
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
    /// Bytes on the wire of a page that is sent for the first time, as a share of its size.
    #[arg(long, value_name = "SHARE", default_value_t = 1.0)]
    ratio: f64,
    /// The same of a page that was sent before and is dirty again [default: as --ratio; where the recording has contents,
    /// unchanged pages take nothing].
    #[arg(long, value_name = "SHARE")]
    again_ratio: Option<f64>,
    /// What a page that is sent for the first time takes all processors to read, code and store, if the link does not hold them
    /// up: of a migration's report, the time of its first round by that round's pages [default: what earlier migrations took].
    #[arg(long, value_name = "TIME")]
    page_time: Option<Time>,
    /// The same of a page that was sent before and is dirty again [default: what earlier migrations took].
    #[arg(long, value_name = "TIME")]
    again_page_time: Option<Time>,
    /// What earlier migrations took; `none` uses what the engine was built with.
    #[arg(long, value_name = "FILE", default_value = CALIBRATION)]
    calibration: PathBuf,
    /// One JSON object instead of the table: times in microseconds, shares of 1.
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
pub(super) fn run(verb: &SimulateVerb) -> anyhow::Result<u8> {
    for (name, ratio) in [("--ratio", Some(verb.ratio)), ("--again-ratio", verb.again_ratio)] {
        if ratio.is_some_and(|ratio| !(0.0..=1.0).contains(&ratio)) {
            eprintln!("error: {name} is a share of a page, from 0 to 1");
            return Ok(failure::USAGE);
        }
    }
    let (trace, program, interrupted) = read(&verb.trace)?;
    if trace.intervals() == 0 {
        bail!("the recording {} has fewer than two scans in it", verb.trace.display());
    }
    if interrupted {
        eprintln!("warning: the recording was cut off; everything up to its last whole scan counts");
    }
    let calibration = calibration::read(&verb.calibration);
    let again =
        verb.again_ratio.unwrap_or_else(|| verb.ratio * (1.0 - trace.unchanged_share().unwrap_or(0.0)));
    let own = Site::default();
    let bytes = |cost: PageCost, ratio: f64| PageCost { bytes: 4096.0 * ratio + HEAD, ..cost };
    let own = Site {
        bandwidth: verb.bandwidth.map_or(f64::INFINITY, |rate| Site::payload(rate.0)),
        round_trip: verb.round_trip.0,
        first: bytes(own.first, verb.ratio),
        again: bytes(own.again, again),
        // What is said of them is of all of them, whether bytes were kept or not.
        anew: bytes(own.anew, again),
        ..own
    };
    let site = with_times(verb, calibration.site(own, &program));
    let site = |strategy| Site { freeze: calibration.freeze_cost_by(&program, strategy), ..site };
    let wish = |strategy| Wish {
        strategy,
        policy: verb.policy,
        downtime: verb.downtime.0,
        total_time: verb.total_time.map(|time| time.0),
        max_rounds: verb.max_rounds,
    };
    match verb.strategy {
        Some(name) => {
            let strategy = name.choice();
            let outcome = simulate(&trace, &site(strategy), &wish(strategy), verb.start.0);
            print(verb, &outcome, || one(&outcome))
        }
        None => {
            let doubt = Doubt { freeze: calibration.spread(), bytes: Doubt::LEAST };
            let strategies = Strategy::ALL
                .map(|strategy| forecast(&trace, &site(strategy), &wish(strategy), STARTS, doubt))
                .to_vec();
            print(verb, &strategies, || forecasts(&strategies))
        }
    }
}

/// With the times of pages that were given, instead of those that were learned.
fn with_times(verb: &SimulateVerb, site: Site) -> Site {
    let takes = |cost: PageCost, given: Option<Time>| PageCost {
        time: given.map_or(cost.time, |time| time.0),
        ..cost
    };
    Site {
        first: takes(site.first, verb.page_time),
        again: takes(site.again, verb.again_page_time),
        anew: takes(site.anew, verb.again_page_time),
        still: if verb.page_time.is_some() { None } else { site.still },
        prepare: if verb.page_time.is_some() { Duration::ZERO } else { site.prepare },
        late: site.late.max(verb.page_time.map_or(Duration::ZERO, |time| time.0)),
        ..site
    }
}

fn print(verb: &SimulateVerb, value: &impl Serialize, table: impl Fn() -> String) -> anyhow::Result<u8> {
    if !verb.json {
        return super::print(table().as_bytes());
    }
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    super::print(&line)
}

/// All of a recording, the name of its program, and whether it was cut off.
fn read(path: &Path) -> anyhow::Result<(Trace, String, bool)> {
    let about = || format!("the recording {}", printable(&path.display().to_string()));
    let file = File::open(path).with_context(about)?;
    let mut reader = Reader::new(BufReader::new(file)).with_context(about)?;
    let mut trace = Trace::new();
    for observation in reader.by_ref() {
        trace.add(&observation.with_context(about)?);
    }
    let program = reader.header().root_name.clone();
    Ok((trace, program, matches!(reader.ending(), Ending::Interrupted { .. })))
}

/// One migration, round by round.
fn one(outcome: &Outcome) -> String {
    let rows = outcome.rounds.iter().map(|round| {
        vec![
            if round.frozen { "frozen".to_owned() } else { round.round.to_string() },
            round.dirty_pages.to_string(),
            round.unchanged_pages.to_string(),
            round.held_pages.to_string(),
            round.ahead_pages.to_string(),
            Bytes(round.sent_bytes).to_string(),
            micros(round.duration_us).to_string(),
            micros(round.predicted_downtime_us).to_string(),
        ]
    });
    let columns = ["round", "dirty", "unchanged", "held back", "left", "bytes", "time", "downtime if frozen"];
    let mut text = table(&columns, &[0, 1, 2, 3, 4, 5, 6, 7], rows);
    let _ = writeln!(
        text,
        "\n{}: stands still for {}, runs there after {}, all of it there after {}, {} on the wire, {:.1} % slower meanwhile{}",
        match outcome.strategy == outcome.chosen {
            true => outcome.strategy.name().to_owned(),
            false => format!("{}: {}", outcome.strategy.name(), outcome.chosen.name()),
        },
        micros(outcome.downtime_us),
        micros(outcome.total_us),
        micros(outcome.complete_us),
        Bytes(outcome.bytes),
        outcome.slowdown * 100.0,
        outcome.stop_reason.map_or_else(String::new, |reason| format!("; rounds end: {reason}"))
    );
    if !outcome.because.is_empty() {
        let _ = writeln!(text, "{} was chosen: {}", outcome.chosen.name(), outcome.because);
    }
    text
}
