//! How near `pageferry predict` and `pageferry simulate` come to the migrations that follow.

use super::child::{Running, output};
use super::ferry::{CALIBRATION, Ferry, Migration, Round};
use super::hosts::{Host, Hosts};
use super::moved_redis::MovedRedis;
use super::stats::Runs;
use super::subject::Subject;
use super::table::Table;
use super::{Common, ensure_memory, machine};
use crate::workload::state::realtime_us;
use anyhow::Context;
use bytesize::ByteSize;
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// A prediction may be off by this share, and a simulated round by that.
const WITHIN: f64 = 0.20;
const ROUNDS_WITHIN: f64 = 0.10;
/// Rounds of fewer pages are made of chance.
const LARGE_ROUND: u64 = 2048;
/// Rate of the link, as `tc` and as pageferry say it.
const LINK: &str = "1gbit";
const BANDWIDTH: &str = "1Gbit";
/// How long a program is watched for a prediction, and recorded for a simulation.
const WATCHED: &str = "5s";
/// Operations a second of the client of redis.
const LOAD: &str = "5000";
/// By then the load has made nearly all of its keys, and redis has moved all of them into the larger table that these ask for, which writes
/// three times as much as the load does (seen in a recording: for six seconds).
const STEADY: Duration = Duration::from_secs(15);
/// Longest time that this takes.
const LIMIT: Duration = Duration::from_secs(120);

/// Options of this measurement.
#[derive(Clone, Debug, Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Programs to move (otherwise all of them)
    #[arg(long, value_enum, value_delimiter = ',')]
    workloads: Vec<Program>,
    /// Strategies (otherwise all of them)
    #[arg(long, value_delimiter = ',', default_value = "stop-and-copy,pre-copy,post-copy,hybrid")]
    strategies: Vec<String>,
    /// Memory of each
    #[arg(long, default_value = "256MiB")]
    memory: ByteSize,
    /// What the patterns dirty a second
    #[arg(long, default_value = "20MB")]
    rate: String,
}

/// A program to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
enum Program {
    /// Every page is as likely as every other
    Uniform,
    /// 90 % of the writes go to 5 % of the pages
    HotSet,
    /// Page k is written 1/k times as often as page 1
    Zipf,
    /// One half of the pages for a while, then the other
    Phased,
    /// A redis-server under a steady load of writes
    Redis,
}

#[derive(Clone, Debug, Serialize)]
struct Row {
    workload: Program,
    strategy: String,
    quantity: &'static str,
    predicted: Runs,
    measured: Runs,
    /// How far the prediction is off, as a share of what was measured: the median of the runs.
    error: f64,
    /// How far the other runs are off each of them ([`Runs::apart`]): nothing that is said before one could be nearer.
    apart: Option<f64>,
    /// From where to where the first run's prediction said that it would be.
    interval: Option<(f64, f64)>,
    pass: bool,
}

/// What `pageferry predict` says.
#[derive(Debug, Deserialize)]
struct Prediction {
    strategies: Vec<Forecast>,
}

#[derive(Debug, Deserialize)]
struct Forecast {
    strategy: String,
    downtime_us: Estimate,
    total_us: Estimate,
    complete_us: Estimate,
    bytes: Estimate,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Estimate {
    median: f64,
    low: f64,
    high: f64,
}

/// What `pageferry simulate` says.
#[derive(Debug, Deserialize)]
struct Simulation {
    rounds: Vec<SimulatedRound>,
}

#[derive(Debug, Deserialize)]
struct SimulatedRound {
    dirty_pages: u64,
    frozen: bool,
}

/// One run.
struct Sample {
    forecast: Forecast,
    migration: Migration,
    simulated: Vec<SimulatedRound>,
}

/// Measures and prints the table; fails if a goal was missed.
///
/// # Errors
/// What kept it from measuring.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let common = &options.common;
    common.medians_need_runs()?;
    ensure_memory(options.memory)?;
    // Fresh memory costs whatever the machine's host has to do for it, which nobody can foresee from inside of it.
    let ferry = common.ferry()?.with_standby(options.memory.as_u64() * 2);
    let scratch = tempfile::Builder::new().prefix("pageferry-bench-").tempdir()?;
    let programs = match &options.workloads[..] {
        [] => Program::value_variants(),
        some => some,
    };
    let mut rows = Vec::new();
    let trial = Trial { options, ferry: &ferry, scratch: scratch.path() };
    // What a freeze costs on this machine, and of a kind of program, is learned, as it is by whoever migrates; and what pages take where
    // the processors decide that.
    for kind in [Program::Uniform, Program::Redis] {
        if kind == Program::Redis && !programs.contains(&kind) {
            continue;
        }
        for strategy in ["pre-copy", "post-copy", "hybrid"] {
            trial.run(kind, strategy).context("a migration to learn from")?;
        }
    }
    for &program in programs {
        for strategy in &options.strategies {
            let mut samples = Vec::new();
            for run in 1..=common.runs {
                let sample = trial.run(program, strategy)?;
                eprintln!(
                    "{}, {strategy}, run {run} of {}: stood still for {:.1} ms, {:.1} ms were predicted",
                    program.name(),
                    common.runs,
                    sample.migration.report.downtime_us.total as f64 / 1e3,
                    sample.forecast.downtime_us.median / 1e3
                );
                samples.push(sample);
            }
            for row in judge(program, strategy, &samples) {
                if common.json {
                    println!("{}", serde_json::to_string(&row)?);
                }
                rows.push(row);
            }
        }
    }
    if !common.json {
        print!("{}", render(&rows, options));
    }
    Ok(if rows.iter().all(|row| row.pass) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Program {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// A program that runs.
enum Moving {
    Pattern(Subject),
    Redis(MovedRedis, Box<Running>),
}

struct Trial<'a> {
    options: &'a Options,
    ferry: &'a Ferry,
    scratch: &'a Path,
}

impl Trial<'_> {
    /// Predicts, records, and moves.
    fn run(&self, program: Program, strategy: &str) -> anyhow::Result<Sample> {
        let link = self.options.common.link.as_deref().unwrap_or(LINK);
        let hosts = Hosts::up(&self.options.common.two_hosts, Some(link))?;
        let mut moving = self.start(&hosts, program)?;
        let pid = match &moving {
            Moving::Pattern(subject) => subject.pid,
            Moving::Redis(redis, _) => redis.pid,
        };
        let calibration = self.path("calibration.json");
        let (pid_text, trace) = (pid.to_string(), self.path("trace.pft"));
        let known = [CALIBRATION, &calibration];
        // Of the run before.
        match std::fs::remove_file(&trace) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).context("removing a recording");
            }
            _ => {}
        }
        let record = [
            "track",
            "--pid",
            &pid_text,
            "--interval",
            "50ms",
            "--duration",
            WATCHED,
            "--record",
            &trace,
            "--scope",
            "lazy",
            "--quiet",
        ];
        self.ask(&hosts, &record)?;
        // Just before the migration, as whoever decides about one would.
        let predict = [
            "predict",
            "--pid",
            &pid_text,
            "--bandwidth",
            BANDWIDTH,
            "--duration",
            WATCHED,
            "--standby",
            "--json",
        ];
        let said = self.ask(&hosts, &[&predict[..], &known].concat())?;
        let prediction: Prediction = serde_json::from_str(&said).context("reading what was predicted")?;
        let forecast = prediction.strategies.into_iter().find(|forecast| forecast.strategy == strategy);
        let forecast = forecast.with_context(|| format!("nothing was predicted for {strategy}"))?;
        let migration = self.ferry.migrate(
            &hosts,
            self.scratch,
            pid,
            &[&known[..], &["--strategy", strategy]].concat(),
        )?;
        self.verify(&hosts, &mut moving)?;
        let known = [&known[..], &["--bandwidth", BANDWIDTH, "--strategy", strategy]].concat();
        let conditions = conditions(&migration);
        let conditions: Vec<&str> = conditions.iter().map(String::as_str).collect();
        let simulate = ["simulate", "--trace", &trace, "--json"];
        let said = self.ask(&hosts, &[&simulate[..], &known, &conditions].concat())?;
        let simulation: Simulation = serde_json::from_str(&said).context("reading what was simulated")?;
        Ok(Sample { forecast, migration, simulated: simulation.rounds })
    }

    fn path(&self, name: &str) -> String {
        self.scratch.join(name).to_string_lossy().into_owned()
    }

    fn ask(&self, hosts: &Hosts, words: &[&str]) -> anyhow::Result<String> {
        let program = self.ferry.program().to_string_lossy().into_owned();
        let command = [&[program.as_str()][..], words].concat();
        output(words[0], &mut hosts.exec(Host::Source, command), LIMIT)
    }

    fn start(&self, hosts: &Hosts, program: Program) -> anyhow::Result<Moving> {
        let memory = self.options.memory.as_u64().to_string();
        if program == Program::Redis {
            let family = ["--sessions", "--fill-value-size", "1024", "--bytes", &memory];
            let redis = MovedRedis::start(hosts, self.scratch, &family)?;
            let program = super::workload()?.to_string_lossy().into_owned();
            let (source, destination) =
                (MovedRedis::address(Host::Source), MovedRedis::address(Host::Destination));
            let journal = self.path("journal");
            let load = [
                program.as_str(),
                "redis-load",
                "--address",
                &source,
                "--address",
                &destination,
                "--rate",
                LOAD,
                "--journal",
                &journal,
            ];
            let client = Running::start("redis-load", &mut hosts.exec(Host::Client, load))?;
            // What is recorded has to be what is moved: at first the load makes its keys, and redis grows.
            std::thread::sleep(STEADY);
            return Ok(Moving::Redis(redis, Box::new(client)));
        }
        let words: Vec<String> =
            ["pattern", "--memory", &memory, "--rate", &self.options.rate, "--pattern", &program.name()]
                .into_iter()
                .map(str::to_owned)
                .chain(["--log".to_owned(), self.path("writes")])
                .collect();
        Ok(Moving::Pattern(Subject::start(hosts, self.scratch, "program", &words)?))
    }

    /// Looks whether it is whole at the destination, and ends it.
    fn verify(&self, hosts: &Hosts, moving: &mut Moving) -> anyhow::Result<()> {
        match moving {
            Moving::Pattern(subject) => {
                subject.wait_alive_after(realtime_us())?;
                subject.check()?;
                hosts.kill(Host::Destination, subject.pid)
            }
            Moving::Redis(redis, client) => {
                client.terminate();
                client.finish(LIMIT)?;
                redis.verify(hosts, &["--journal", &self.path("journal")])?;
                hosts.kill(Host::Destination, redis.pid)
            }
        }
    }
}

/// What pages turned out to take in a migration, which is not the policy's: options of `simulate`.
fn conditions(migration: &Migration) -> Vec<String> {
    let rounds = &migration.report.rounds[..];
    let (first, again) = rounds.split_at(rounds.len().min(1));
    let kinds = [("--ratio", "--page-time", first), ("--again-ratio", "--again-page-time", again)];
    let mut options = Vec::new();
    for (ratio, time, rounds) in kinds {
        let mean = |of: fn(&Round) -> u64, counts: fn(&&Round) -> bool| {
            let pages: u64 = rounds.iter().filter(counts).map(|round| round.sent_pages).sum();
            let sum: u64 = rounds.iter().filter(counts).map(of).sum();
            (pages > 0).then(|| sum as f64 / pages as f64)
        };
        if let Some(bytes) = mean(|round| round.sent_bytes, |_| true) {
            options.extend([ratio.to_owned(), (bytes / 4096.0).min(1.0).to_string()]);
        }
        // In the freeze nothing else runs, and in small rounds it is not the pages that take the time.
        let large = |round: &&Round| !round.frozen && round.sent_pages >= LARGE_ROUND;
        if let Some(us) = mean(|round| round.duration_us, large) {
            options.extend([time.to_owned(), format!("{us:.3}us")]);
        }
    }
    options
}

fn judge(program: Program, strategy: &str, samples: &[Sample]) -> Vec<Row> {
    let rows = [
        (
            "downtime ms",
            1e3,
            (|s| s.migration.report.downtime_us.total as f64) as fn(&Sample) -> f64,
            (|f| f.downtime_us) as fn(&Forecast) -> Estimate,
        ),
        ("bytes MB", 1e6, |s| s.migration.report.bytes_sent as f64, |f| f.bytes),
        ("runs there s", 1e6, |s| s.migration.report.total_us as f64, |f| f.total_us),
        ("total s", 1e6, |s| s.migration.report.complete_us as f64, |f| f.complete_us),
    ];
    let mut rows: Vec<Row> = rows
        .into_iter()
        .map(|(quantity, unit, measured, predicted)| {
            let interval = samples.first().map(|sample| predicted(&sample.forecast));
            row(
                program,
                strategy,
                quantity,
                WITHIN,
                interval.map(|i| (i.low / unit, i.high / unit)),
                samples
                    .iter()
                    .map(|sample| (predicted(&sample.forecast).median / unit, measured(sample) / unit))
                    .collect(),
            )
        })
        .collect();
    if !matches!(strategy, "pre-copy" | "hybrid") {
        return rows;
    }
    // Round by round: the one that is the farthest off.
    let worst = samples.iter().map(|sample| {
        let live = sample.migration.report.rounds.iter().filter(|round| !round.frozen);
        let simulated = sample.simulated.iter().filter(|round| !round.frozen);
        live.zip(simulated)
            .map(|(live, simulated)| (simulated.dirty_pages, live.dirty_pages))
            .filter(|(_, live)| *live >= LARGE_ROUND)
            .map(|(simulated, live)| (simulated as f64, live as f64))
            .max_by(|a, b| off(*a).total_cmp(&off(*b)))
            .unwrap_or((0.0, 0.0))
    });
    rows.push(row(
        program,
        strategy,
        "pages of the worst simulated round",
        ROUNDS_WITHIN,
        None,
        worst.collect(),
    ));
    rows
}

/// How far a prediction is off.
fn off((predicted, measured): (f64, f64)) -> f64 {
    if measured == 0.0 {
        if predicted == 0.0 { 0.0 } else { 1.0 }
    } else {
        (predicted / measured - 1.0).abs()
    }
}

fn row(
    workload: Program,
    strategy: &str,
    quantity: &'static str,
    limit: f64,
    interval: Option<(f64, f64)>,
    pairs: Vec<(f64, f64)>,
) -> Row {
    let error = Runs::new(pairs.iter().map(|pair| off(*pair)).collect()).median;
    let (predicted, measured) = pairs.into_iter().unzip();
    let (predicted, measured) = (Runs::new(predicted), Runs::new(measured));
    Row {
        workload,
        strategy: strategy.to_owned(),
        quantity,
        apart: measured.apart(),
        predicted,
        measured,
        error,
        interval,
        pass: error <= limit,
    }
}

fn render(rows: &[Row], options: &Options) -> String {
    let mut table = Table::new(&[
        "workload",
        "strategy",
        "quantity",
        "predicted",
        "said to lie in",
        "measured",
        "off by",
        "runs apart",
        "goal",
    ]);
    for row in rows {
        table.row(vec![
            row.workload.name(),
            row.strategy.clone(),
            row.quantity.to_owned(),
            row.predicted.display(1),
            row.interval.map_or_else(|| "-".to_owned(), |(low, high)| format!("{low:.1}..{high:.1}")),
            row.measured.display(1),
            format!("{:.1} %", row.error * 100.0),
            row.apart.map_or_else(|| "-".to_owned(), |apart| format!("{:.1} %", apart * 100.0)),
            if row.pass { "met" } else { "missed" }.to_owned(),
        ]);
    }
    format!(
        "{}\n{} each, patterns dirty {} a second; the receiver's memory ready (--standby); link {}; median (smallest..largest) of {} runs; off by: the median of the runs' own; runs apart: what the \
         median of the other runs would have been off by\n\n{}",
        machine::describe(),
        options.memory,
        options.rate,
        options.common.link.as_deref().unwrap_or(LINK),
        options.common.runs,
        table.render()
    )
}
