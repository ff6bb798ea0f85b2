//! How long one thread of a program stands still while the tracker attaches to it: the time from the moment in which the
//! thread is asked to stop until it is let go. Where the program itself can watch the clock, also what it saw.

use super::puppet::Puppet;
use super::redis::Server;
use super::stats::Runs;
use super::table::Table;
use super::{child, machine};
use anyhow::{Context, ensure};
use bytesize::ByteSize;
use clap::Args;
use pageferry_tracker::probe::Kernel;
use pageferry_tracker::{Target, Tracker, TrackerKind};
use serde::Serialize;
use std::process::ExitCode;
use std::time::Duration;

/// The median of a pause, in microseconds.
const LIMIT_US: f64 = 100.0;
/// Threads of the program with many.
const THREADS: usize = 200;
/// SETs that keep redis busy for longer than the measurement lasts; the load ends with it.
const ENDLESS: u64 = 1_000_000_000;

/// Options of this measurement.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Times that the tracker attaches to each target; the table shows medians
    #[arg(long, default_value_t = 51)]
    runs: usize,
    /// One JSON object a row instead of the table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Row {
    target: &'static str,
    /// From the request to stop until the thread was let go, in microseconds.
    pause_us: Runs,
    /// Longest time between two looks at the clock of the thread itself, with what the machine did to it besides.
    #[serde(skip_serializing_if = "Option::is_none")]
    seen_us: Option<Runs>,
    /// The same without a tracker.
    #[serde(skip_serializing_if = "Option::is_none")]
    seen_without_us: Option<Runs>,
    pass: bool,
}

/// Measures and prints the table. The exit status is a failure if a limit was missed.
///
/// # Errors
/// What kept it from measuring.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    ensure!(options.runs > 0, "--runs must be at least 1");
    Kernel::probe()
        .choose(Some(TrackerKind::UffdWp))
        .context("only this tracker stops a thread to attach")?;
    let runs = options.runs;
    let mut rows = Vec::new();
    let mut add = |target, Measured { pause, seen }: Measured| -> anyhow::Result<()> {
        let pause_us = Runs::new(pause);
        let pass = pause_us.median <= LIMIT_US;
        let (seen_us, seen_without_us) =
            seen.map(|seen| seen.map(Runs::new)).map(<(Runs, Runs)>::from).unzip();
        let row = Row { target, pause_us, seen_us, seen_without_us, pass };
        if options.json {
            println!("{}", serde_json::to_string(&row)?);
        }
        rows.push(row);
        Ok(())
    };
    let server = Server::start()?;
    add("redis, idle", attached(server.pid(), runs)?.into())?;
    let load = server.load(ENDLESS)?;
    child::sleep(Duration::from_millis(500))?;
    add("redis, 16 in flight", attached(server.pid(), runs)?.into())?;
    drop((load, server));
    let puppet = Puppet::start(ByteSize::mib(16), 0, THREADS)?;
    add("200 sleeping threads", attached(puppet.pid(), runs)?.into())?;
    drop(puppet);
    add("thread that watches the clock", busy(runs, 0)?)?;
    add("busy writer", busy(runs, 1)?)?;
    if !options.json {
        print!("{}", render(&rows, options));
    }
    let missed = rows.iter().any(|row| !row.pass);
    Ok(if missed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Attaches to a process again and again: the pause of each time in microseconds.
fn attached(pid: i32, runs: usize) -> anyhow::Result<Vec<f64>> {
    (0..runs)
        .map(|_| {
            let tracker = Tracker::attach(Target::open(pid)?, TrackerKind::UffdWp)?;
            let pause = tracker.attach_stop();
            ensure!(
                pause > Duration::ZERO,
                "the tracker attached to process {pid} without stopping anything"
            );
            tracker.detach()?;
            // Not in step with anything that the program does.
            child::sleep(Duration::from_millis(23))?;
            Ok(pause.as_secs_f64() * 1e6)
        })
        .collect()
}

/// One figure of each run, in microseconds.
struct Measured {
    pause: Vec<f64>,
    /// What the thread saw with the tracker, and without.
    seen: Option<[Vec<f64>; 2]>,
}

impl From<Vec<f64>> for Measured {
    fn from(pause: Vec<f64>) -> Self {
        Self { pause, seen: None }
    }
}

/// The same with a thread that is busy and watches the clock.
fn busy(runs: usize, every: u64) -> anyhow::Result<Measured> {
    let mut puppet = Puppet::start(ByteSize::mib(64), 0, 0)?;
    let (mut pauses, mut seen, mut without) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs {
        puppet.watch(every)?;
        child::sleep(Duration::from_millis(20))?;
        pauses.extend(attached(puppet.pid(), 1)?);
        seen.push(puppet.watched()?.as_secs_f64() * 1e6);
        puppet.watch(every)?;
        without.push(puppet.watched()?.as_secs_f64() * 1e6);
    }
    Ok(Measured { pause: pauses, seen: Some([seen, without]) })
}

fn render(rows: &[Row], options: &Options) -> String {
    let mut table = Table::new(&[
        "target",
        "thread stood still us",
        "longest gap it saw us",
        "and without tracker us",
        "goal",
    ]);
    for row in rows {
        let seen = |seen: &Option<Runs>| seen.as_ref().map_or_else(|| "-".to_owned(), |runs| runs.display(0));
        table.row(vec![
            row.target.to_owned(),
            row.pause_us.display(0),
            seen(&row.seen_us),
            seen(&row.seen_without_us),
            if row.pass { "met" } else { "missed" }.to_owned(),
        ]);
    }
    format!(
        "{}\nuserfaultfd; median (smallest..largest) of {} times; goal: a median of at most {LIMIT_US} us\n\n{}",
        machine::describe(),
        options.runs,
        table.render()
    )
}
