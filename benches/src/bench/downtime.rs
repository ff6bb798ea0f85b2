//! How long a program stands still, by the size of its memory, beside plain CRIU.

use super::baseline::{self, find_criu};
use super::hosts::{Host, Hosts};
use super::stats::Runs;
use super::subject::Subject;
use super::table::Table;
use super::{Common, IN_TURN, SIDE_BY_SIDE, child, ensure_times, machine};
use crate::workload::pace::Rate;
use crate::workload::state::realtime_us;
use anyhow::Context;
use bytesize::ByteSize;
use clap::Args;
use serde::Serialize;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// Goal: downtime at every size, in milliseconds.
const GOAL_MS: f64 = 60.0;
/// Pauses of the program after the downtime count from so long on, in microseconds: what a loaded machine does to any program is shorter.
const PAUSE_US: u64 = 5000;
/// Goal: how much longer it becomes for a GiB more, in milliseconds.
const GOAL_SLOPE: f64 = 5.0;

/// Options of this measurement.
#[derive(Clone, Debug, Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Memory of the program
    #[arg(long, value_delimiter = ',', default_value = "64MiB,512MiB,2GiB,4GiB,8GiB")]
    sizes: Vec<ByteSize>,
    /// Bytes a second that it dirties
    #[arg(long, default_value = "10MB")]
    write_rate: String,
    /// Leave plain CRIU out
    #[arg(long)]
    no_criu: bool,
    /// Further options for `pageferry migrate`
    #[arg(last = true)]
    migrate: Vec<String>,
}

/// One size.
#[derive(Clone, Debug, Serialize)]
struct Row {
    memory_bytes: u64,
    write_rate: u64,
    /// As the engine reports it.
    downtime_ms: Runs,
    /// Longest pause between two iterations of the program around the migration, on CLOCK_REALTIME.
    program_gap_ms: Runs,
    /// How long it stood still after the downtime, in all pauses of more than 5 ms (by its own log: the longest in each 50 ms).
    later_pauses_ms: Runs,
    /// Most that everything at the destination had in memory at a time (received pages, and the program that they become), as a
    /// share of the program's memory.
    destination_memory: Runs,
    /// Longest pause with plain CRIU: it stands still for as long as the program does. Nothing where its images and both copies
    /// do not fit into memory.
    criu_downtime_ms: Option<Runs>,
    /// How much longer than the first size's, for each GiB more.
    slope_ms_per_gib: f64,
    /// At most 60 ms, and at most 5 ms more for a GiB.
    pass: bool,
}

/// Measures and prints the table; fails if a goal was missed.
///
/// # Errors
/// What kept it from measuring.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let Options { common, sizes, .. } = options;
    common.medians_need_runs()?;
    let rate: Rate = options.write_rate.parse().map_err(anyhow::Error::msg)?;
    let Rate::Bytes(write_rate) = rate else { anyhow::bail!("--write-rate must be a number of bytes") };
    ensure_times(sizes.iter().copied().max().context("no --sizes")?, IN_TURN)?;
    let available = machine::available_memory()?;
    let ferry = common.ferry()?;
    let criu = if options.no_criu { None } else { Some(find_criu(common.criu.as_deref())?) };
    let scratch = tempfile::Builder::new().prefix("pageferry-bench-").tempdir()?;
    let extra: Vec<&str> = options.migrate.iter().map(String::as_str).collect();
    let mut rows: Vec<Row> = Vec::new();
    for &size in sizes {
        let (mut engine, mut gaps, mut plain) = (Vec::new(), Vec::new(), Vec::new());
        let (mut later, mut memory) = (Vec::new(), Vec::new());
        let criu = criu.as_ref().filter(|_| available as f64 >= size.as_u64() as f64 * SIDE_BY_SIDE);
        for run in 1..=common.runs {
            let hosts = Hosts::up(&common.two_hosts, common.link.as_deref())?;
            let name = format!("{size}, run {run} of {}", common.runs);
            let moved = || -> anyhow::Result<_> {
                let (subject, since) = start(&hosts, scratch.path(), size, &options.write_rate)?;
                let migration = ferry.migrate(&hosts, scratch.path(), subject.pid, &extra)?;
                let committed =
                    migration.event_us("committed").context("the source did not print its commit")?;
                let ended = end(&hosts, &subject, since, committed)?;
                Ok((migration, ended))
            };
            let (migration, Ended { gap, later_pauses }) =
                moved().with_context(|| format!("{name}, by pageferry"))?;
            let downtime = migration.report.downtime_us.total as f64 / 1e3;
            engine.push(downtime);
            gaps.push(gap);
            later.push(later_pauses);
            memory.push(migration.destination_peak_bytes as f64 / size.as_u64() as f64);
            let mut note = format!("{name}: {downtime:.1} ms (the program saw {gap:.1} ms)");
            if let Some(criu) = criu {
                let moved = || -> anyhow::Result<_> {
                    let (subject, since) = start(&hosts, scratch.path(), size, &options.write_rate)?;
                    baseline::migrate(&hosts, criu, subject.pid)?;
                    Ok(end(&hosts, &subject, since, since)?.gap)
                };
                let gap = moved().with_context(|| format!("{name}, by plain CRIU"))?;
                plain.push(gap);
                note.push_str(&format!("; plain CRIU {gap:.1} ms"));
            }
            eprintln!("{note}");
        }
        let downtime_ms = Runs::new(engine);
        let slope_ms_per_gib = rows.first().map_or(0.0, |first| {
            let more = (size.as_u64() as f64 - first.memory_bytes as f64) / (1u64 << 30) as f64;
            (downtime_ms.median - first.downtime_ms.median) / more
        });
        let pass = downtime_ms.median <= GOAL_MS && slope_ms_per_gib <= GOAL_SLOPE;
        let row = Row {
            memory_bytes: size.as_u64(),
            write_rate,
            downtime_ms,
            program_gap_ms: Runs::new(gaps),
            later_pauses_ms: Runs::new(later),
            destination_memory: Runs::new(memory),
            criu_downtime_ms: criu.as_ref().map(|_| Runs::new(plain)),
            slope_ms_per_gib,
            pass,
        };
        if common.json {
            println!("{}", serde_json::to_string(&row)?);
        }
        rows.push(row);
    }
    if !common.json {
        print!("{}", render(&rows, common));
    }
    Ok(if rows.iter().all(|row| row.pass) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Starts a writer; returns it and the moment from which on gaps count.
fn start(hosts: &Hosts, scratch: &Path, size: ByteSize, rate: &str) -> anyhow::Result<(Subject, u64)> {
    let arguments = ["writer", "--memory", &size.as_u64().to_string(), "--rate", rate].map(str::to_owned);
    let subject = Subject::start(hosts, scratch, "writer", &arguments)?;
    child::sleep(Duration::from_secs(1))?;
    Ok((subject, realtime_us()))
}

/// What the program itself noticed, in milliseconds.
struct Ended {
    gap: f64,
    later_pauses: f64,
}

/// Waits until the moved program runs, takes its longest gap and its pauses after the commit, lets it check its memory, ends it.
fn end(hosts: &Hosts, subject: &Subject, since: u64, committed: u64) -> anyhow::Result<Ended> {
    subject.wait_alive_after(realtime_us())?;
    let (gap_us, _) = subject.longest_gap_since(since)?;
    let later_us = subject.pauses_after(committed, PAUSE_US)?;
    subject.check()?;
    hosts.kill(Host::Destination, subject.pid)?;
    Ok(Ended { gap: gap_us as f64 / 1e3, later_pauses: later_us as f64 / 1e3 })
}

fn render(rows: &[Row], common: &Common) -> String {
    let mut table = Table::new(&[
        "memory",
        "downtime ms",
        "program saw ms",
        "later pauses ms",
        "memory there",
        "plain CRIU ms",
        "ms a GiB more",
        "goal",
    ]);
    for row in rows {
        table.row(vec![
            ByteSize(row.memory_bytes).to_string(),
            row.downtime_ms.display(1),
            row.program_gap_ms.display(1),
            row.later_pauses_ms.display(0),
            row.destination_memory.display(2),
            row.criu_downtime_ms.as_ref().map_or("-".to_owned(), |runs| runs.display(0)),
            format!("{:.1}", row.slope_ms_per_gib),
            if row.pass { "met" } else { "missed" }.to_owned(),
        ]);
    }
    let rate = rows.first().map_or(0, |row| row.write_rate);
    format!(
        "{}\n{} of pages dirtied a second; link: {}; median (smallest..largest) of {} runs; goal: at most {GOAL_MS} ms, \
         and at most {GOAL_SLOPE} ms more than the first row for each GiB more\n\n{}",
        machine::describe(),
        ByteSize(rate).display().si(),
        common.link.as_deref().unwrap_or("not shaped"),
        common.runs,
        table.render()
    )
}
