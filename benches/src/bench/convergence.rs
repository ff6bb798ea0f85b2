//! Programs that write about as fast as the link carries, and faster: what holding back, fixed rounds, slowing down and post-copy
//! bring.

use super::ferry::{Ferry, Migration};
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

/// Rate of the link.
const LINK: &str = "1gbit";
/// Downtimes differ from run to run: one is no longer than another if it is no longer than so many times that.
const NO_LONGER: f64 = 1.1;
/// Standing still in post-copy and hybrid, in milliseconds: nothing of the memory is sent in it.
const LATE_MS: f64 = 100.0;
/// What a program that is slowed down is aimed to stand still for.
const AIM: &str = "300ms";
const AIM_MS: f64 = 300.0;

/// Options of this measurement.
#[derive(Clone, Debug, Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Memory of the programs with a hot set
    #[arg(long, default_value = "1GiB")]
    memory: ByteSize,
    /// Memory of the program that outruns the link
    #[arg(long, default_value = "256MiB")]
    outrunning_memory: ByteSize,
}

/// A program, and the ways in which it is moved.
struct Case {
    workload: &'static str,
    /// What it is told.
    words: Vec<String>,
    /// Name and options for `pageferry migrate`; the first is judged by the others.
    ways: Vec<(&'static str, Vec<&'static str>)>,
}

#[derive(Clone, Debug, Serialize)]
struct Row {
    workload: &'static str,
    way: &'static str,
    stop_reasons: Vec<String>,
    rounds: Runs,
    sent_mb: Runs,
    precopy_s: Runs,
    downtime_ms: Runs,
    /// Share of the time for which it was made to stand still before the freeze, in the end.
    throttle_share: Runs,
    limit: String,
    /// Nothing where it is only there to be compared with.
    pass: Option<bool>,
}

/// Measures and prints the table; fails if a goal was missed.
///
/// # Errors
/// What kept it from measuring.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let common = &options.common;
    common.medians_need_runs()?;
    ensure_memory(options.memory.max(options.outrunning_memory))?;
    let ferry = common.ferry()?;
    let scratch = tempfile::Builder::new().prefix("pageferry-bench-").tempdir()?;
    let mut rows = Vec::new();
    for case in cases(options) {
        let mut migrations: Vec<Vec<Migration>> = vec![Vec::new(); case.ways.len()];
        // Side by side: what the machine does otherwise meets all ways alike.
        for run in 1..=common.runs {
            for ((name, words), migrations) in case.ways.iter().zip(&mut migrations) {
                let migration = migrate(options, &ferry, scratch.path(), &case.words, words)
                    .with_context(|| format!("{}, {name}, run {run}", case.workload))?;
                eprintln!(
                    "{}, {name}, run {run} of {}: {} in {:.2} s, then {:.1} ms ({})",
                    case.workload,
                    common.runs,
                    ByteSize(migration.report.bytes_sent),
                    migration.report.precopy_s(),
                    migration.report.downtime_us.total as f64 / 1e3,
                    migration.report.stop_reason
                );
                migrations.push(migration);
            }
        }
        for row in judge(&case, &migrations) {
            if common.json {
                println!("{}", serde_json::to_string(&row)?);
            }
            rows.push(row);
        }
    }
    if !common.json {
        print!("{}", render(&rows, options));
    }
    let missed = rows.iter().any(|row| row.pass == Some(false));
    Ok(if missed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn cases(options: &Options) -> Vec<Case> {
    let words = |text: &str, memory: ByteSize| {
        let memory = ["--memory".to_owned(), memory.as_u64().to_string()];
        text.split(' ').map(str::to_owned).chain(memory).collect::<Vec<_>>()
    };
    let by_policy = || {
        vec![
            ("adaptive", vec![]),
            ("5 rounds", vec!["--policy", "fixed:5"]),
            ("10 rounds", vec!["--policy", "fixed:10"]),
        ]
    };
    vec![
        Case {
            workload: "hot set, some words",
            words: words("writer --every 20 --rate 400MB", options.memory),
            ways: by_policy(),
        },
        Case {
            workload: "hot set, whole pages",
            words: words("writer --every 20 --rate 400MB --full-page", options.memory),
            ways: by_policy(),
        },
        Case {
            workload: "outruns the link",
            words: words("writer --rate max --full-page --reads 5", options.outrunning_memory),
            ways: vec![
                (FREEZE, vec!["--downtime", AIM]),
                (
                    THROTTLE,
                    vec![
                        "--downtime",
                        AIM,
                        "--on-no-convergence",
                        "throttle",
                        "--max-throttle",
                        "98%",
                        "--max-rounds",
                        "60",
                    ],
                ),
                (POST_COPY, vec!["--strategy", "post-copy"]),
                (HYBRID, vec!["--strategy", "hybrid"]),
            ],
        },
    ]
}

const FREEZE: &str = "freeze";
const THROTTLE: &str = "throttle";
const POST_COPY: &str = "post-copy";
const HYBRID: &str = "hybrid";

fn migrate(
    options: &Options,
    ferry: &Ferry,
    scratch: &Path,
    words: &[String],
    more: &[&str],
) -> anyhow::Result<Migration> {
    let link = options.common.link.as_deref().unwrap_or(LINK);
    let hosts = Hosts::up(&options.common.two_hosts, Some(link))?;
    let subject = Subject::start(&hosts, scratch, "program", words)?;
    machine::touch(options.memory.max(options.outrunning_memory).as_u64() / 4 * 5)?;
    let migration = ferry.migrate(&hosts, scratch, subject.pid, more)?;
    subject.wait_alive_after(realtime_us())?;
    subject.check()?;
    hosts.kill(Host::Destination, subject.pid)?;
    Ok(migration)
}

fn judge(case: &Case, migrations: &[Vec<Migration>]) -> Vec<Row> {
    let runs = |migrations: &[Migration], of: &dyn Fn(&Migration) -> f64| {
        Runs::new(migrations.iter().map(of).collect())
    };
    let mut rows: Vec<Row> = case
        .ways
        .iter()
        .zip(migrations)
        .map(|((way, _), migrations)| Row {
            workload: case.workload,
            way,
            stop_reasons: migrations.iter().map(|m| m.report.stop_reason.clone()).collect(),
            rounds: runs(migrations, &|m| m.report.rounds.len() as f64),
            sent_mb: runs(migrations, &|m| m.report.bytes_sent as f64 / 1e6),
            precopy_s: runs(migrations, &|m| m.report.precopy_s()),
            downtime_ms: runs(migrations, &|m| m.report.downtime_us.total as f64 / 1e3),
            throttle_share: runs(migrations, &|m| m.report.throttle_share),
            limit: "-".to_owned(),
            pass: None,
        })
        .collect();
    let others: Vec<(f64, f64)> =
        rows.iter().skip(1).map(|row| (row.sent_mb.median, row.downtime_ms.median)).collect();
    for row in &mut rows {
        let (limit, pass) = match row.way {
            "adaptive" => (
                format!("fewer bytes, at most {NO_LONGER}x the downtime"),
                others.iter().all(|(bytes, downtime)| {
                    row.sent_mb.median < *bytes && row.downtime_ms.median <= NO_LONGER * downtime
                }),
            ),
            THROTTLE => (
                format!("target met, at most {AIM_MS} ms"),
                row.stop_reasons.iter().all(|reason| reason == "target-met")
                    && row.downtime_ms.median <= AIM_MS,
            ),
            POST_COPY | HYBRID => (format!("at most {LATE_MS} ms"), row.downtime_ms.median <= LATE_MS),
            _ => continue,
        };
        (row.limit, row.pass) = (limit, Some(pass));
    }
    rows
}

fn render(rows: &[Row], options: &Options) -> String {
    let mut table = Table::new(&[
        "program",
        "by",
        "rounds",
        "sent MB",
        "before the freeze s",
        "downtime ms",
        "slowed down",
        "rounds end",
        "limit",
        "goal",
    ]);
    for row in rows {
        let mut reasons = row.stop_reasons.clone();
        reasons.dedup();
        table.row(vec![
            row.workload.to_owned(),
            row.way.to_owned(),
            row.rounds.display(0),
            row.sent_mb.display(0),
            row.precopy_s.display(2),
            row.downtime_ms.display(0),
            format!("{:.0} %", row.throttle_share.median * 100.0),
            reasons.join(", "),
            row.limit.clone(),
            match row.pass {
                Some(true) => "met",
                Some(false) => "missed",
                None => "-",
            }
            .to_owned(),
        ]);
    }
    format!(
        "{}\nhot sets of 5 % of {} at 400 MB/s; {} written as fast as it goes; link {}; median (smallest..largest) of {} runs\n\n{}",
        machine::describe(),
        options.memory,
        options.outrunning_memory,
        options.common.link.as_deref().unwrap_or(LINK),
        options.common.runs,
        table.render()
    )
}
