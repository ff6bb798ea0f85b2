//! How fast incompressible memory is copied before the freeze, beside a bare loop that does nothing but copy, and what
//! the engine needs for it.

use super::baseline::bare::{self, variant::Variant};
use super::ferry::Ferry;
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
use std::path::Path;
use std::process::ExitCode;

/// Goal: share of the bare loop's speed.
const GOAL_RATIO: f64 = 0.8;
/// Goal: engine's memory at the source over the tracked memory, in percent.
const GOAL_PERCENT: f64 = 1.0;

/// Goal: 10^9 bytes of memory a second on so many streams.
fn goal_gb_s(streams: u16) -> f64 {
    if streams > 1 { 3.5 } else { 2.5 }
}

/// Options of this measurement.
#[derive(Clone, Debug, Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Memory of the program
    #[arg(long, value_delimiter = ',', default_value = "2GiB,4GiB")]
    sizes: Vec<ByteSize>,
    /// Connections, of ours and of the bare loop
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    streams: Vec<u16>,
    /// Sizes and socket options of the bare loop, as `pageferry-bench bare` takes them; by default what the engine takes
    #[arg(long, value_name = "VARIANT", default_value = "congestion=cubic")]
    bare: Variant,
    /// The engine's receiver makes no memory ready before (`receive --standby`), as the bare loop's does
    #[arg(long)]
    no_standby: bool,
    /// Further options for `pageferry migrate`
    #[arg(last = true)]
    migrate: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
struct Row {
    memory_bytes: u64,
    streams: u16,
    /// Bytes of pages of the first round over its time, 10^9 a second.
    gb_s: Runs,
    /// Least that `gb_s` has to be.
    limit_gb_s: f64,
    /// The bare loop, 10^9 bytes a second.
    bare_gb_s: Runs,
    /// The first over the second, run by run.
    ratio: Runs,
    /// Least that `ratio` has to be.
    limit_ratio: f64,
    /// The bare loop with a digest of every page at both ends and nothing else: what is left for an engine that knows what has arrived. 10^9
    /// bytes a second.
    digests_gb_s: Runs,
    /// `gb_s` over that, run by run.
    ratio_to_digests: Runs,
    /// That over the bare loop, run by run: what `ratio` would be for an engine that costs nothing else.
    digests_ratio: Runs,
    /// Largest resident size of the engine at the source (VmHWM, program text included).
    engine_memory_bytes: Runs,
    /// That, in percent of the program's memory.
    engine_memory_percent: f64,
    /// Most that this may be.
    limit_percent: f64,
    pass: bool,
}

/// Measures and prints the table; fails if a goal was missed.
///
/// # Errors
/// What kept it from measuring.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let Options { common, sizes, streams, .. } = options;
    common.medians_need_runs()?;
    ensure_memory(sizes.iter().copied().max().context("no --sizes")?)?;
    let ferry = common.ferry()?;
    let scratch = tempfile::Builder::new().prefix("pageferry-bench-").tempdir()?;
    let mut rows = Vec::new();
    for (&size, &streams) in sizes.iter().flat_map(|size| streams.iter().map(move |streams| (size, streams)))
    {
        let trial = Trial { options, ferry: &ferry, scratch: scratch.path(), size, streams };
        let mut runs = Vec::new();
        for run in 1..=common.runs {
            let ran = trial.run(run)?;
            eprintln!(
                "{size}, streams {streams}, run {run} of {}: {:.2} GB/s, engine {}, bare {:.2} GB/s, with digests {:.2}",
                common.runs, ran.gb_s, ran.engine, ran.bare_gb_s, ran.digests_gb_s
            );
            runs.push(ran);
        }
        let row = trial.row(&runs);
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

struct Trial<'a> {
    options: &'a Options,
    ferry: &'a Ferry,
    scratch: &'a Path,
    size: ByteSize,
    streams: u16,
}

/// Speeds in 10^9 bytes a second, and the memory that the engine needed.
struct Ran {
    bare_gb_s: f64,
    digests_gb_s: f64,
    gb_s: f64,
    engine: ByteSize,
}

impl Trial<'_> {
    /// A program that is moved, and two that the bare loop copies, the second with digests. A program each: the kernel counts
    /// who reads a page, and moves it between its lists at the second time.
    fn run(&self, number: usize) -> anyhow::Result<Ran> {
        let hosts = Hosts::up(&self.options.common.two_hosts, self.options.common.link.as_deref())?;
        let mut ran = Ran { bare_gb_s: 0.0, digests_gb_s: 0.0, gb_s: 0.0, engine: ByteSize(0) };
        // Each is first in one run of three: a machine that has had work to do may be slower than one that comes from a rest.
        for part in 0..3 {
            match (number + part) % 3 {
                0 => ran.bare_gb_s = self.copy(&hosts, &self.options.bare)?,
                1 => {
                    ran.digests_gb_s =
                        self.copy(&hosts, &Variant { digests: true, ..self.options.bare.clone() })?
                }
                _ => (ran.gb_s, ran.engine) = self.migrate(&hosts)?,
            }
        }
        Ok(ran)
    }

    /// A program whose memory nothing writes: the first round is then all that is measured.
    fn subject(&self, hosts: &Hosts) -> anyhow::Result<Subject> {
        let arguments =
            ["writer", "--memory", &self.size.as_u64().to_string(), "--rate", "0"].map(str::to_owned);
        let subject = Subject::start(hosts, self.scratch, "writer", &arguments)?;
        // Room for what arrives, as a machine has it that waits for a migration.
        machine::touch(self.size.as_u64() / 4 * 5)?;
        Ok(subject)
    }

    /// Speed of the bare loop.
    fn copy(&self, hosts: &Hosts, variant: &Variant) -> anyhow::Result<f64> {
        let subject = self.subject(hosts)?;
        let speed = bare::copy(hosts, &subject, self.streams, variant)?.gb_s();
        hosts.kill(Host::Source, subject.pid)?;
        Ok(speed)
    }

    /// Speed of the engine's first round, and its memory.
    fn migrate(&self, hosts: &Hosts) -> anyhow::Result<(f64, ByteSize)> {
        let (subject, bytes) = (self.subject(hosts)?, self.size.as_u64());
        let streams = self.streams.to_string();
        let mut extra = vec!["--streams", &streams];
        extra.extend(self.options.migrate.iter().map(String::as_str));
        let standby = if self.options.no_standby { 0 } else { bytes };
        let migration = self.ferry.with_standby(standby).migrate(hosts, self.scratch, subject.pid, &extra)?;
        subject.wait_alive_after(realtime_us())?;
        subject.check()?;
        hosts.kill(Host::Destination, subject.pid)?;
        let first = migration.report.rounds.first().context("the report has no rounds")?;
        anyhow::ensure!(
            first.sent_pages * 4096 >= bytes,
            "the first round sent {} pages, less than the program's memory",
            first.sent_pages
        );
        let gb_s = (first.sent_pages * 4096) as f64 / 1e3 / first.duration_us as f64;
        Ok((gb_s, ByteSize(migration.engine_peak_bytes)))
    }

    fn row(&self, runs: &[Ran]) -> Row {
        let each = |of: fn(&Ran) -> f64| Runs::new(runs.iter().map(of).collect());
        let (gb_s, ratio) = (each(|ran| ran.gb_s), each(|ran| ran.gb_s / ran.bare_gb_s));
        let memory = each(|ran| ran.engine.as_u64() as f64);
        let percent = memory.median / self.size.as_u64() as f64 * 100.0;
        let limit_gb_s = goal_gb_s(self.streams);
        let pass = gb_s.median >= limit_gb_s && ratio.median >= GOAL_RATIO && percent <= GOAL_PERCENT;
        Row {
            memory_bytes: self.size.as_u64(),
            streams: self.streams,
            gb_s,
            limit_gb_s,
            bare_gb_s: each(|ran| ran.bare_gb_s),
            ratio,
            limit_ratio: GOAL_RATIO,
            digests_gb_s: each(|ran| ran.digests_gb_s),
            ratio_to_digests: each(|ran| ran.gb_s / ran.digests_gb_s),
            digests_ratio: each(|ran| ran.digests_gb_s / ran.bare_gb_s),
            engine_memory_bytes: memory,
            engine_memory_percent: percent,
            limit_percent: GOAL_PERCENT,
            pass,
        }
    }
}

fn render(rows: &[Row], options: &Options) -> String {
    let mut table = Table::new(&[
        "memory",
        "streams",
        "goodput GB/s",
        "bare GB/s",
        "ratio",
        "digests GB/s",
        "to them",
        "they to bare",
        "engine memory",
        "of the program's",
        "at least",
        "goal",
    ]);
    for row in rows {
        table.row(vec![
            ByteSize(row.memory_bytes).to_string(),
            row.streams.to_string(),
            row.gb_s.display(2),
            row.bare_gb_s.display(2),
            row.ratio.display(2),
            row.digests_gb_s.display(2),
            row.ratio_to_digests.display(2),
            row.digests_ratio.display(2),
            ByteSize(row.engine_memory_bytes.median as u64).to_string(),
            format!("{:.2} %", row.engine_memory_percent),
            format!("{} GB/s", row.limit_gb_s),
            if row.pass { "met" } else { "missed" }.to_owned(),
        ]);
    }
    let common = &options.common;
    format!(
        "{}\nincompressible memory, the receiver's memory {}; link: {}; bare loop: {}; median (smallest..largest) of {} runs \
         in turn; goal besides: at least {GOAL_RATIO} of the bare loop with at most {GOAL_PERCENT} % of the memory\n\n{}",
        machine::describe(),
        if options.no_standby { "at hand" } else { "ready (--standby)" },
        common.link.as_deref().unwrap_or("not shaped"),
        options.bare,
        common.runs,
        table.render()
    )
}
