//! How long a program waits for a page that is still at the source, and what that buys it: downtime by strategy.

use super::hosts::{Host, Hosts};
use super::stats::Runs;
use super::subject::Subject;
use super::table::Table;
use super::{Common, child, ensure_memory, machine};
use crate::workload::state::realtime_us;
use anyhow::Context;
use bytesize::ByteSize;
use clap::Args;
use serde::Serialize;
use std::process::ExitCode;
use std::time::Duration;

/// Goals on a link that is not shaped: what half of all waits, and 99 of 100, do not exceed, in microseconds.
const GOAL_P50_US: f64 = 150.0;
const GOAL_P99_US: f64 = 1000.0;

/// Of fewer waits than this there is no hundredth to speak of.
const FEWEST: f64 = 100.0;

const STRATEGIES: [&str; 3] = ["pre-copy", "hybrid", "post-copy"];

/// Options of this measurement.
#[derive(Clone, Debug, Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Memory of the program
    #[arg(long, default_value = "1GiB")]
    memory: ByteSize,
    /// Bytes a second that it dirties, at random places
    #[arg(long, default_value = "100MB")]
    write_rate: String,
    /// Pages that it reads at random places for every page that it writes
    #[arg(long, default_value_t = 4)]
    reads: u32,
    /// Further options for `pageferry migrate`
    #[arg(last = true)]
    migrate: Vec<String>,
}

/// One strategy.
#[derive(Clone, Debug, Serialize)]
struct Row {
    strategy: &'static str,
    memory_bytes: u64,
    /// As the engine reports it.
    downtime_ms: Runs,
    /// Longest pause between two iterations of the program around the migration, on CLOCK_REALTIME.
    program_gap_ms: Runs,
    /// Pages that were at the source when the program ran at the destination.
    owed_pages: Runs,
    /// Until none was.
    owing_ms: Runs,
    /// Waits for owed pages.
    faults: Runs,
    /// From reading a fault to waking the thread: what half of them do not exceed.
    p50_us: Option<Runs>,
    /// ... and 99 of 100.
    p99_us: Option<Runs>,
    /// The longest.
    max_us: Option<Runs>,
    /// Within the goals for waits, where there were a hundred.
    pass: bool,
}

/// Measures and prints the table; fails if a goal was missed.
///
/// # Errors
/// What kept it from measuring.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let Options { common, memory, .. } = options;
    common.medians_need_runs()?;
    ensure_memory(*memory)?;
    let ferry = common.ferry()?;
    let scratch = tempfile::Builder::new().prefix("pageferry-bench-").tempdir()?;
    let mut rows = Vec::new();
    for strategy in STRATEGIES {
        let mut extra = vec!["--strategy", strategy];
        extra.extend(options.migrate.iter().map(String::as_str));
        let (mut downtimes, mut gaps, mut owed, mut owing) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut counts, mut p50, mut p99, mut max) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for run in 1..=common.runs {
            let name = format!("{strategy}, run {run} of {}", common.runs);
            let moved = || -> anyhow::Result<_> {
                let hosts = Hosts::up(&common.two_hosts, common.link.as_deref())?;
                let arguments = [
                    "writer",
                    "--memory",
                    &memory.as_u64().to_string(),
                    "--rate",
                    &options.write_rate,
                    "--reads",
                    &options.reads.to_string(),
                ];
                let subject =
                    Subject::start(&hosts, scratch.path(), "writer", &arguments.map(str::to_owned))?;
                child::sleep(Duration::from_secs(1))?;
                let since = realtime_us();
                let migration = ferry.migrate(&hosts, scratch.path(), subject.pid, &extra)?;
                subject.wait_alive_after(realtime_us())?;
                let (gap_us, _) = subject.longest_gap_since(since)?;
                subject.check()?;
                hosts.kill(Host::Destination, subject.pid)?;
                Ok((migration.report, gap_us as f64 / 1e3))
            };
            let (report, gap) = moved().with_context(|| name.clone())?;
            let late = report.post_copy.unwrap_or_default();
            let faults = late.faults;
            let downtime = report.downtime_us.total as f64 / 1e3;
            eprintln!(
                "{name}: {downtime:.1} ms of downtime; {} waits, median {} us, 99 % {} us, longest {} us",
                faults.count, faults.p50_us, faults.p99_us, faults.max_us
            );
            downtimes.push(downtime);
            gaps.push(gap);
            owed.push(late.owed_pages as f64);
            owing.push(late.duration_us as f64 / 1e3);
            counts.push(faults.count as f64);
            if faults.count > 0 {
                p50.push(faults.p50_us as f64);
                p99.push(faults.p99_us as f64);
                max.push(faults.max_us as f64);
            }
        }
        let waits = |values: Vec<f64>| (!values.is_empty()).then(|| Runs::new(values));
        let (p50_us, p99_us) = (waits(p50), waits(p99));
        let faults = Runs::new(counts);
        let judged = faults.median >= FEWEST;
        let within =
            |runs: &Option<Runs>, goal| !judged || runs.as_ref().is_none_or(|runs| runs.median <= goal);
        let row = Row {
            strategy,
            memory_bytes: memory.as_u64(),
            downtime_ms: Runs::new(downtimes),
            program_gap_ms: Runs::new(gaps),
            owed_pages: Runs::new(owed),
            owing_ms: Runs::new(owing),
            faults,
            pass: within(&p50_us, GOAL_P50_US) && within(&p99_us, GOAL_P99_US),
            p50_us,
            p99_us,
            max_us: waits(max),
        };
        // A post-copy in which nobody waited would show nothing.
        anyhow::ensure!(
            strategy != "post-copy" || judged,
            "the program waited for fewer pages than tell anything"
        );
        if common.json {
            println!("{}", serde_json::to_string(&row)?);
        }
        rows.push(row);
    }
    if !common.json {
        print!("{}", render(&rows, options));
    }
    Ok(if rows.iter().all(|row| row.pass) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn render(rows: &[Row], options: &Options) -> String {
    let common = &options.common;
    let mut table = Table::new(&[
        "strategy",
        "downtime ms",
        "program saw ms",
        "owed pages",
        "owed for ms",
        "waits",
        "median us",
        "99 % us",
        "longest us",
        "goal",
    ]);
    for row in rows {
        let waits = |runs: &Option<Runs>| runs.as_ref().map_or("-".to_owned(), |runs| runs.display(0));
        table.row(vec![
            row.strategy.to_owned(),
            row.downtime_ms.display(1),
            row.program_gap_ms.display(1),
            row.owed_pages.display(0),
            row.owing_ms.display(0),
            row.faults.display(0),
            waits(&row.p50_us),
            waits(&row.p99_us),
            waits(&row.max_us),
            if row.pass { "met" } else { "missed" }.to_owned(),
        ]);
    }
    format!(
        "{}\n{} of memory, {} of pages dirtied a second and {} pages read for each; link: {}; median (smallest..largest) of {} runs; \
         goal: half of the waits at most {GOAL_P50_US} us, 99 of 100 at most {GOAL_P99_US} us, where there are {FEWEST}\n\n{}",
        machine::describe(),
        options.memory,
        options.write_rate,
        options.reads,
        common.link.as_deref().unwrap_or("not shaped"),
        common.runs,
        table.render()
    )
}
