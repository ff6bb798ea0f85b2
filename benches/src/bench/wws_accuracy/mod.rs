//! How near the estimated working set and dirty rate are to the true ones.

mod truth;

use super::child::{self, Running};
use super::machine;
use super::stats::Runs;
use super::table::Table;
use crate::sys::memory::PAGE;
use crate::workload::pattern::choice::Pattern;
use crate::workload::pattern::log::{Log, monotonic_ns};
use anyhow::{Context, ensure};
use bytesize::ByteSize;
use clap::{Args, ValueEnum};
use pageferry_tracker::observation::Observation;
use pageferry_tracker::probe::Kernel;
use pageferry_tracker::working_set::{DirtyRate, Estimator};
use pageferry_tracker::{PageSet, Run, Target, Tracker, TreeState};
use serde::Serialize;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::Duration;
use truth::Truth;

/// Goal: the largest relative error.
const GOAL: f64 = 0.02;

/// Options of this measurement.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// How the programs write
    #[arg(
        long = "patterns",
        value_enum,
        value_delimiter = ',',
        default_value = "uniform,hot-set,zipf,sequential,phased"
    )]
    patterns: Vec<Pattern>,
    /// Memory of the program
    #[arg(long, default_value = "64MiB")]
    memory: ByteSize,
    /// Bytes of pages a second that it writes
    #[arg(long, default_value = "40MB")]
    rate: ByteSize,
    /// Milliseconds from one scan to the next
    #[arg(long, value_name = "MS", default_value_t = 100)]
    interval: u64,
    /// Seconds that each program is tracked
    #[arg(long, value_name = "SECONDS", default_value_t = 20)]
    duration: u64,
    /// Runs of everything; the table shows medians
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// One JSON object a row instead of the table
    #[arg(long)]
    json: bool,
}

/// One quantity of one pattern.
#[derive(Clone, Debug, Serialize)]
struct Row {
    pattern: String,
    /// `wws` in pages, or `dirty-rate` and `first-time-rate` in pages/s.
    quantity: &'static str,
    /// Window, in milliseconds; of the rates, the scan interval and the whole run.
    tau_ms: f64,
    true_pages: f64,
    estimated_pages: f64,
    /// How far the estimator says that it may be off, in pages; none for the rates.
    stated_error: Option<f64>,
    /// Relative: the median of the runs.
    error: f64,
    /// Of every run.
    error_of_runs: Vec<f64>,
    /// The median is at most 2 %.
    pass: bool,
}

/// One quantity in one run.
#[derive(Clone, Copy, Debug)]
struct Sample {
    quantity: &'static str,
    tau_ms: f64,
    truth: f64,
    estimate: f64,
    stated: Option<f64>,
}

/// Measures and prints the table; fails if a goal was missed.
///
/// # Errors
/// What kept it from measuring.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    ensure!(options.runs > 0, "--runs must be at least 1");
    ensure!(options.interval > 0, "--interval must be at least 1");
    ensure!(
        options.duration * 1000 >= 4 * options.interval,
        "--duration must be at least four times --interval: shorter runs have no curve"
    );
    let (kind, reason) = Kernel::probe().choose(None)?;
    eprintln!("tracking by {kind}: {reason}");
    let scratch = tempfile::Builder::new().prefix("pageferry-bench-").tempdir()?;
    let mut rows: Vec<Row> = Vec::new();
    for &pattern in &options.patterns {
        let name = pattern.to_possible_value().context("a pattern without a name")?.get_name().to_owned();
        let mut runs = Vec::new();
        for run in 1..=options.runs {
            let samples = measure(options, &name, scratch.path(), run)
                .with_context(|| format!("{name}, run {run} of {}", options.runs))?;
            let worst = samples.iter().map(Sample::error).fold(0.0, f64::max);
            eprintln!("{name}, run {run} of {}: at most {:.2} % off", options.runs, worst * 100.0);
            runs.push(samples);
        }
        let of_pattern = rows_of(&name, &runs);
        if options.json {
            for row in &of_pattern {
                println!("{}", serde_json::to_string(row)?);
            }
        }
        rows.extend(of_pattern);
    }
    if !options.json {
        print!("{}", render(&rows));
    }
    Ok(if rows.iter().all(|row| row.pass) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Sample {
    fn error(&self) -> f64 {
        match self.truth {
            // What is not there must not be estimated.
            0.0 => f64::from(u8::from(self.estimate > 0.0)),
            truth => (self.estimate / truth - 1.0).abs(),
        }
    }
}

/// Tracks one program for a while, and compares.
fn measure(options: &Options, pattern: &str, scratch: &Path, run: usize) -> anyhow::Result<Vec<Sample>> {
    let file = |name: &str| scratch.join(format!("{pattern}-{run}.{name}"));
    let (log, state) = (file("log"), file("state"));
    let writes = options.rate.as_u64() / PAGE as u64 * (options.duration + 10) * 2;
    let mut command = Command::new(super::workload()?);
    command.args(["pattern", "--pattern", pattern, "--seed", &run.to_string()]);
    command.args(["--memory", &options.memory.as_u64().to_string()]);
    command.args(["--rate", &options.rate.as_u64().to_string()]);
    command.args(["--log-records", &writes.to_string()]);
    command.arg("--log").arg(&log).arg("--state").arg(&state);
    let mut program = Running::start("pageferry-workload pattern", &mut command)?;
    let log = child::wait_for("the first write", Duration::from_secs(60), || {
        if let Some(status) = program.ended()? {
            anyhow::bail!("the program ended ({status}):\n{}", program.last_words());
        }
        Ok(Log::open(&log).ok().filter(|log| !log.is_empty()))
    })?;
    let pages = options.memory.as_u64() / PAGE as u64;
    let field = PageSet::from_iter([Run { start: log.base() / PAGE as u64, len: pages }]);
    let (estimator, from, to) = track(options, &program, &field)?;
    ensure!(program.ended()?.is_none(), "the program ended while it was tracked:\n{}", program.last_words());
    let truth = Truth::new(log.writes(0), from, to);
    ensure!(truth.pages() > 0, "the program wrote nothing");
    compare(&estimator, &truth, from, to)
}

/// The estimator after the run, and the middle of the first and of the last scan (CLOCK_MONOTONIC, nanoseconds).
fn track(options: &Options, program: &Running, field: &PageSet) -> anyhow::Result<(Estimator, u64, u64)> {
    let (kind, _) = Kernel::probe().choose(None)?;
    let mut tracker = Tracker::attach(Target::open(program.pid())?, kind)?;
    let mut estimator = Estimator::new();
    let interval = Duration::from_millis(options.interval);
    let scans = options.duration * 1000 / options.interval;
    let begin = monotonic_ns();
    let (mut first, mut last) = (0, 0);
    for scan in 0..=scans {
        let due = interval * u32::try_from(scan)?;
        child::still_wanted()?;
        thread::sleep(due.saturating_sub(Duration::from_nanos(monotonic_ns() - begin)));
        let before = monotonic_ns();
        let collected = tracker.collect(TreeState::Running)?;
        let after = monotonic_ns();
        tracker.acknowledge(collected.ticket);
        let at = Duration::from_nanos(after - begin);
        let mut observation = Observation::of(&collected, at, Duration::from_nanos(after - before));
        // The log knows of the field only: not of the program's own bookkeeping.
        for space in &mut observation.spaces {
            space.dirty = space.dirty.intersect(field);
            space.populated = space.populated.intersect(field);
        }
        estimator.observe(&observation);
        last = before.midpoint(after);
        if scan == 0 {
            first = last;
        }
    }
    tracker.detach()?;
    Ok((estimator, first, last))
}

fn compare(estimator: &Estimator, truth: &Truth, from: u64, to: u64) -> anyhow::Result<Vec<Sample>> {
    let curve = estimator.curve();
    let interval = curve.first().context("a curve without points")?.tau;
    let seconds = (to - from) as f64 / 1e9;
    let mut samples: Vec<Sample> = curve
        .iter()
        .skip(1)
        .map(|point| Sample {
            quantity: "wws",
            tau_ms: point.tau.as_secs_f64() * 1e3,
            truth: truth.wws(point.tau.as_nanos() as u64),
            estimate: point.pages,
            stated: Some(point.error),
        })
        .collect();
    let DirtyRate { total, first_time, .. } = estimator.dirty_rate();
    // A page counts once an interval: the rate is that of different pages in windows as long as one.
    let true_rate = truth.wws(interval.as_nanos() as u64) / interval.as_secs_f64();
    let rate = |quantity, tau_ms, truth, estimate| Sample { quantity, tau_ms, truth, estimate, stated: None };
    samples.push(rate("dirty-rate", interval.as_secs_f64() * 1e3, true_rate, total));
    samples.push(rate("first-time-rate", seconds * 1e3, truth.pages() as f64 / seconds, first_time));
    Ok(samples)
}

/// All runs have as many scans, so as many points.
fn rows_of(pattern: &str, runs: &[Vec<Sample>]) -> Vec<Row> {
    let points = runs.iter().map(Vec::len).min().unwrap_or(0);
    let row = |at: usize| {
        let of = |value: fn(&Sample) -> f64| Runs::new(runs.iter().map(|run| value(&run[at])).collect());
        let error = of(Sample::error);
        let stated = runs[0][at].stated.map(|_| of(|sample| sample.stated.unwrap_or(0.0)).median);
        Row {
            pattern: pattern.to_owned(),
            quantity: runs[0][at].quantity,
            tau_ms: of(|sample| sample.tau_ms).median,
            true_pages: of(|sample| sample.truth).median,
            estimated_pages: of(|sample| sample.estimate).median,
            stated_error: stated,
            pass: error.median <= GOAL,
            error: error.median,
            error_of_runs: error.runs,
        }
    };
    (0..points).map(row).collect()
}

/// For people, windows that are each at least half as long again as the one before; and every one that missed the goal.
fn render(rows: &[Row]) -> String {
    let head = ["pattern", "quantity", "tau ms", "true", "estimated", "stated +-", "error %", "goal"];
    let mut table = Table::new(&head);
    let mut shown = 0.0;
    let mut pattern = "";
    for (at, row) in rows.iter().enumerate() {
        if row.pattern != pattern {
            (pattern, shown) = (&row.pattern, 0.0);
        }
        let is_last = rows.get(at + 1).is_none_or(|next| next.quantity != "wws");
        if row.quantity == "wws" && row.tau_ms < shown * 1.5 && row.pass && !is_last {
            continue;
        }
        shown = row.tau_ms;
        let percent = Runs::new(row.error_of_runs.iter().map(|error| error * 100.0).collect());
        table.row(vec![
            row.pattern.clone(),
            row.quantity.to_owned(),
            format!("{:.0}", row.tau_ms),
            format!("{:.0}", row.true_pages),
            format!("{:.0}", row.estimated_pages),
            row.stated_error.map_or("-".to_owned(), |pages| format!("{pages:.0}")),
            percent.display(2),
            if row.pass { "met" } else { "MISSED" }.to_owned(),
        ]);
    }
    let all = rows.len();
    let worst = rows.iter().map(|row| row.error).fold(0.0, f64::max) * 100.0;
    let runs = rows.first().map_or(0, |row| row.error_of_runs.len());
    let machine = machine::describe();
    format!(
        "{machine}\nmedian (smallest..largest) of {runs} runs; rates in pages/s; goal: at most 2 % off\n\n{}{all} points in all; the worst median is {worst:.2} % off\n",
        table.render()
    )
}
