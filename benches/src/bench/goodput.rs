//! How fast incompressible memory is copied before the freeze, and what the engine needs for it.

use super::hosts::{Host, Hosts};
use super::stats::Runs;
use super::subject::Subject;
use super::table::Table;
use super::{Common, ensure_memory, machine};
use crate::workload::state::realtime_us;
use anyhow::Context;
use bytesize::ByteSize;
use clap::Args;
use serde::Serialize;
use std::process::ExitCode;

/// Goal: 10^9 bytes of memory a second on one stream.
const GOAL_GB_S: f64 = 1.5;
/// Goal: engine's memory at the source over the tracked memory, in percent.
const GOAL_PERCENT: f64 = 1.5;

/// Options of this measurement.
#[derive(Clone, Debug, Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Memory of the program
    #[arg(long, value_delimiter = ',', default_value = "2GiB,4GiB")]
    sizes: Vec<ByteSize>,
    /// Further options for `pageferry migrate`
    #[arg(last = true)]
    migrate: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
struct Row {
    memory_bytes: u64,
    /// Bytes of pages of the first round over its time, 10^9 a second.
    goodput_gb_s: Runs,
    /// Largest resident size of the engine at the source (VmHWM, program text included).
    engine_memory_bytes: Runs,
    /// That, in percent of the program's memory.
    engine_memory_percent: f64,
    pass: bool,
}

/// Measures and prints the table; fails if a goal was missed.
///
/// # Errors
/// What kept it from measuring.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let Options { common, sizes, .. } = options;
    common.medians_need_runs()?;
    ensure_memory(sizes.iter().copied().max().context("no --sizes")?)?;
    let ferry = common.ferry()?;
    let scratch = tempfile::Builder::new().prefix("pageferry-bench-").tempdir()?;
    let extra: Vec<&str> = options.migrate.iter().map(String::as_str).collect();
    let mut rows = Vec::new();
    for &size in sizes {
        let (mut goodput, mut memory) = (Vec::new(), Vec::new());
        for run in 1..=common.runs {
            let hosts = Hosts::up(&common.two_hosts, common.link.as_deref())?;
            // Nothing is written meanwhile: the first round is then all that is measured.
            let arguments =
                ["writer", "--memory", &size.as_u64().to_string(), "--rate", "0"].map(str::to_owned);
            let subject = Subject::start(&hosts, scratch.path(), "writer", &arguments)?;
            // Room for what arrives, as a machine has it that waits for a migration.
            machine::touch(size.as_u64() / 4 * 5)?;
            let migration = ferry.migrate(&hosts, scratch.path(), subject.pid, &extra)?;
            subject.wait_alive_after(realtime_us())?;
            subject.check()?;
            hosts.kill(Host::Destination, subject.pid)?;
            let first = migration.report.rounds.first().context("the report has no rounds")?;
            anyhow::ensure!(
                first.sent_pages * 4096 >= size.as_u64(),
                "the first round sent {} pages, less than the program's memory",
                first.sent_pages
            );
            goodput.push((first.sent_pages * 4096) as f64 / 1e3 / first.duration_us as f64);
            memory.push(migration.engine_peak_bytes as f64);
            eprintln!(
                "{size}, run {run} of {}: {:.2} GB/s, engine {}",
                common.runs,
                goodput[run - 1],
                ByteSize(migration.engine_peak_bytes)
            );
        }
        let (goodput_gb_s, engine_memory_bytes) = (Runs::new(goodput), Runs::new(memory));
        let percent = engine_memory_bytes.median / size.as_u64() as f64 * 100.0;
        let pass = goodput_gb_s.median >= GOAL_GB_S && percent <= GOAL_PERCENT;
        let row = Row {
            memory_bytes: size.as_u64(),
            goodput_gb_s,
            engine_memory_bytes,
            engine_memory_percent: percent,
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

fn render(rows: &[Row], common: &Common) -> String {
    let mut table = Table::new(&["memory", "goodput GB/s", "engine memory", "of the program's", "goal"]);
    for row in rows {
        table.row(vec![
            ByteSize(row.memory_bytes).to_string(),
            row.goodput_gb_s.display(2),
            ByteSize(row.engine_memory_bytes.median as u64).to_string(),
            format!("{:.2} %", row.engine_memory_percent),
            if row.pass { "met" } else { "missed" }.to_owned(),
        ]);
    }
    format!(
        "{}\nincompressible memory, one stream, the receiver's memory at hand; link: {}; median (smallest..largest) of {} runs; goal: at least \
         {GOAL_GB_S} GB/s with at most {GOAL_PERCENT} % of the memory\n\n{}",
        machine::describe(),
        common.link.as_deref().unwrap_or("not shaped"),
        common.runs,
        table.render()
    )
}
