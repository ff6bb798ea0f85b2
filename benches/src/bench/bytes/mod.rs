//! How many bytes a migration sends and how long its pre-copy takes on slow links, beside raw pages on the same link and
//! beside `zstd -3` over the same pages.

use super::child::output;
use super::ferry::{Ferry, Migration, Share};
use super::hosts::{Host, Hosts};
use super::resident::Resident;
use super::stats::Runs;
use super::table::Table;
use super::{Common, beside_this, ensure_memory, machine};
use anyhow::{Context, ensure};
use bytesize::ByteSize;
use clap::{Args, ValueEnum};
use judge::{Goal, Measured, judge};
use program::{Moving, Part, Program};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

pub mod judge;
pub mod program;

/// Longest time that reading and compressing a program's memory takes.
const LIMIT: Duration = Duration::from_secs(300);
/// Why pre-copy ends when another round is not needed.
const TARGET_MET: &str = "target-met";

/// Options of this measurement.
#[derive(Clone, Debug, Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Programs to move (otherwise all of them)
    #[arg(long, value_enum, value_delimiter = ',')]
    workloads: Vec<Program>,
    /// Memory of each program, for redis of its values (otherwise 64 MiB to 512 MiB)
    #[arg(long)]
    memory: Option<ByteSize>,
    /// Further options for `pageferry migrate`
    #[arg(last = true)]
    migrate: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
struct Row {
    workload: Program,
    link: String,
    /// Bytes of the private pages of all its processes.
    raw_bytes: Runs,
    /// Of these, bytes of pages that differ from all others, zero pages left out.
    distinct_bytes: Runs,
    /// Bytes on the wire altogether: all rounds, frames, CRIU's images.
    sent_bytes: Runs,
    /// Of these, CRIU's images.
    image_bytes: Runs,
    /// What `zstd -3` makes of the same pages as one stream.
    zstd3_bytes: Runs,
    /// Bytes on the wire for the first process of a tree alone.
    alone_bytes: Option<Runs>,
    /// Time of all rounds before the freeze when all codings are off.
    raw_s: Runs,
    /// Time of all rounds before the freeze.
    s: Runs,
    /// Why pre-copy ended, in each run.
    stop_reasons: Vec<String>,
    /// The same of raw pages.
    raw_stop_reasons: Vec<String>,
    /// Pages and bytes by coding, in the last run.
    codings: BTreeMap<String, Share>,
    /// What has to hold.
    goals: Vec<Goal>,
    pass: bool,
}

/// One run of one program.
struct Sample {
    resident: Resident,
    migration: Migration,
    alone: Option<Migration>,
    /// The same with all codings off.
    raw: Migration,
}

/// Measures and prints the table; fails if a goal was missed.
///
/// # Errors
/// What kept it from measuring.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let common = &options.common;
    common.medians_need_runs()?;
    let programs = match &options.workloads[..] {
        [] => Program::value_variants(),
        some => some,
    };
    let memory = |program: Program| options.memory.unwrap_or(program.memory());
    // A tree has its own pages eight times, as if nearly the same memory again; redis needs a fifth more than its values.
    let largest = programs.iter().map(|&program| memory(program).as_u64() * 2).max().unwrap_or(0);
    ensure_memory(ByteSize(largest))?;
    let ferry = common.ferry()?;
    let scratch = tempfile::Builder::new().prefix("pageferry-bench-").tempdir()?;
    let mut rows = Vec::new();
    for &program in programs {
        let link = common.link.clone().unwrap_or_else(|| program.link().to_owned());
        let trial = Trial {
            options,
            ferry: &ferry,
            scratch: scratch.path(),
            program,
            memory: memory(program),
            link: &link,
        };
        let mut samples = Vec::new();
        for run in 1..=common.runs {
            let sample = trial.run()?;
            eprintln!(
                "{}, run {run} of {}: {} of {}, {:.2} s before the freeze ({})",
                program.name(),
                common.runs,
                ByteSize(sample.migration.report.bytes_sent),
                ByteSize(sample.resident.raw_bytes),
                sample.migration.report.precopy_s(),
                sample.migration.report.stop_reason
            );
            samples.push(sample);
        }
        let row = row(program, link.clone(), &samples);
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

struct Trial<'a> {
    options: &'a Options,
    ferry: &'a Ferry,
    scratch: &'a Path,
    program: Program,
    memory: ByteSize,
    link: &'a str,
}

impl Trial<'_> {
    fn run(&self) -> anyhow::Result<Sample> {
        let usual = self.program.options(self.memory);
        let (resident, migration) = self.migrate(Part::Whole, &usual)?;
        let alone = match self.program.is_forked() {
            true => Some(self.migrate(Part::Alone, &usual)?.1),
            false => None,
        };
        let raw = ["--coding", "raw", "--delta-cache", "0"].map(str::to_owned);
        let raw = self.migrate(Part::Whole, &raw)?.1;
        Ok(Sample { resident, migration, alone, raw })
    }

    /// Starts the program, looks at its memory, and moves it.
    fn migrate(&self, part: Part, options: &[String]) -> anyhow::Result<(Resident, Migration)> {
        let hosts = Hosts::up(&self.options.common.two_hosts, Some(self.link))?;
        let moving = self.program.start(&hosts, self.scratch, self.memory, part)?;
        let resident = self.look(&hosts, &moving)?;
        machine::touch(resident.raw_bytes / 4 * 5)?;
        let options: Vec<&str> = options.iter().chain(&self.options.migrate).map(String::as_str).collect();
        let migration = self.ferry.migrate(&hosts, self.scratch, moving.pid(), &options)?;
        moving.verify(&hosts).with_context(|| format!("after moving {}", self.program.name()))?;
        Ok((resident, migration))
    }

    fn look(&self, hosts: &Hosts, moving: &Moving) -> anyhow::Result<Resident> {
        let this = beside_this("pageferry-bench")?.to_string_lossy().into_owned();
        let pid = moving.pid().to_string();
        let mut command = hosts.exec(Host::Source, [&this, "resident", "--pid", &pid]);
        let said = output("the reader of the program's memory", &mut command, LIMIT)?;
        let resident: Resident =
            serde_json::from_str(&said).context("reading what the program's memory is")?;
        ensure!(
            resident.raw_bytes >= self.memory.as_u64(),
            "{} has {} in memory, less than it was filled with",
            self.program.name(),
            ByteSize(resident.raw_bytes)
        );
        Ok(resident)
    }
}

fn row(program: Program, link: String, samples: &[Sample]) -> Row {
    let runs = |of: &dyn Fn(&Sample) -> f64| Runs::new(samples.iter().map(of).collect());
    let raw_bytes = runs(&|sample| sample.resident.raw_bytes as f64);
    let distinct_bytes = runs(&|sample| sample.resident.distinct_bytes as f64);
    let zstd3_bytes = runs(&|sample| sample.resident.zstd3_bytes as f64);
    let sent_bytes = runs(&|sample| sample.migration.report.bytes_sent as f64);
    let image_bytes = runs(&|sample| sample.migration.report.image_bytes as f64);
    let s = runs(&|sample| sample.migration.report.precopy_s());
    let raw_s = runs(&|sample| sample.raw.report.precopy_s());
    let alone = samples.iter().filter_map(|sample| Some(sample.alone.as_ref()?.report.bytes_sent as f64));
    let alone: Vec<f64> = alone.collect();
    let alone_bytes = (!alone.is_empty()).then(|| Runs::new(alone));
    let reasons = |of: &dyn Fn(&Sample) -> &Migration| -> Vec<String> {
        samples.iter().map(|sample| of(sample).report.stop_reason.clone()).collect()
    };
    let stop_reasons = reasons(&|sample| &sample.migration);
    let raw_stop_reasons = reasons(&|sample| &sample.raw);
    let share = |reasons: &[String]| {
        reasons.iter().filter(|reason| *reason == TARGET_MET).count() as f64 / reasons.len() as f64
    };
    let measured = Measured {
        raw_bytes: raw_bytes.median,
        distinct_bytes: distinct_bytes.median,
        sent_bytes: sent_bytes.median,
        zstd3_bytes: zstd3_bytes.median,
        alone_bytes: alone_bytes.as_ref().map(|alone| alone.median),
        raw_s: raw_s.median,
        s: s.median,
        converged: share(&stop_reasons),
        raw_converged: share(&raw_stop_reasons),
    };
    let goals = judge(program, &measured);
    let pass = goals.iter().all(|goal| goal.pass);
    Row {
        workload: program,
        link,
        raw_bytes,
        distinct_bytes,
        sent_bytes,
        image_bytes,
        zstd3_bytes,
        alone_bytes,
        raw_s,
        s,
        stop_reasons,
        raw_stop_reasons,
        codings: samples.last().map(|sample| sample.migration.report.codings()).unwrap_or_default(),
        goals,
        pass,
    }
}

fn render(rows: &[Row], common: &Common) -> String {
    let head = [
        "workload",
        "link",
        "raw MB",
        "distinct MB",
        "zstd -3 MB",
        "sent MB",
        "images MB",
        "raw s",
        "s",
        "judged by",
        "is",
        "limit",
        "goal",
    ];
    let mut table = Table::new(&head);
    let mb = |runs: &Runs| Runs::new(runs.runs.iter().map(|bytes| bytes / 1e6).collect()).display(1);
    for row in rows {
        for (at, goal) in row.goals.iter().enumerate() {
            let limit = match (goal.at_least, goal.at_most) {
                (Some(least), _) => format!("at least {least}"),
                (None, Some(most)) => format!("at most {most}"),
                (None, None) => "-".to_owned(),
            };
            let mut cells = match at {
                0 => vec![
                    row.workload.name(),
                    row.link.clone(),
                    format!("{:.1}", row.raw_bytes.median / 1e6),
                    format!("{:.1}", row.distinct_bytes.median / 1e6),
                    format!("{:.1}", row.zstd3_bytes.median / 1e6),
                    mb(&row.sent_bytes),
                    format!("{:.1}", row.image_bytes.median / 1e6),
                    row.raw_s.display(2),
                    row.s.display(2),
                ],
                _ => vec![String::new(); 9],
            };
            cells.extend([
                goal.what.to_owned(),
                goal.value.map_or("not measured".to_owned(), |value| format!("{value:.2}")),
                limit,
                if goal.pass { "met" } else { "missed" }.to_owned(),
            ]);
            table.row(cells);
        }
    }
    format!(
        "{}\nmedian (smallest..largest) of {} runs; 10^6 bytes; sent: everything on the wire; s: all rounds before the freeze, raw s: the same with --coding raw\n\n{}\n\
         pages by coding in the last run, 10^6 bytes of pages (and of these on the wire)\n\n{}",
        machine::describe(),
        common.runs,
        table.render(),
        ways(rows)
    )
}

/// How pages travelled.
fn ways(rows: &[Row]) -> String {
    const WAYS: [&str; 7] = ["unchanged", "zero", "copy", "delta", "zstd_on_base", "zstd", "raw"];
    let mut table = Table::new(&[&["workload"][..], &WAYS].concat());
    for row in rows {
        let cell = |way: &&str| match row.codings.get(*way) {
            Some(share) if share.pages > 0 => {
                format!("{:.1} ({:.1})", (share.pages * 4096) as f64 / 1e6, share.bytes as f64 / 1e6)
            }
            _ => "-".to_owned(),
        };
        table.row([row.workload.name()].into_iter().chain(WAYS.iter().map(cell)).collect());
    }
    table.render()
}
