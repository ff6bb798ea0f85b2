//! What the clients of a redis see of its move: with their connections by pageferry, and beside it by plain CRIU, over the
//! same link in the same run.

use super::baseline::{self, find_criu};
use super::child::{self, Running};
use super::hosts::{Host, Hosts};
use super::moved_redis::MovedRedis;
use super::stats::Runs;
use super::table::Table;
use super::{Common, IN_TURN, SIDE_BY_SIDE, ensure_times, machine, workload};
use crate::redis::load::LoadReport;
use anyhow::{Context, ensure};
use bytesize::ByteSize;
use clap::Args;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// The address that moves, and where it is.
const ADDRESS: &str = "10.77.0.9";
const MOVED: &str = "10.77.0.9/24@eth0";
const REDIS: u16 = 6379;
/// Longest time that the client needs to end.
const LIMIT: Duration = Duration::from_secs(60);
/// How long the client goes on before and after the move.
const AROUND: Duration = Duration::from_secs(2);

/// Goal: the client's longest wait with pre-copy, in milliseconds.
const GOAL_GAP_MS: f64 = 150.0;
/// Goal: how many times shorter than with plain CRIU it is, at least.
const GOAL_GAP_TIMES: f64 = 5.0;
/// Goal: how many times quicker than plain CRIU's the restore is, at least.
const GOAL_RESTORE_TIMES: f64 = 40.0;

/// Options of this measurement.
#[derive(Clone, Debug, Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Values that redis holds
    #[arg(long, default_value = "1GiB")]
    size: ByteSize,
    /// Strategies to move it by
    #[arg(long, value_delimiter = ',', default_value = "pre-copy,hybrid,post-copy")]
    strategies: Vec<String>,
    /// Operations a second of the client: writes, and a read that is checked for each eight
    #[arg(long, default_value_t = 5000)]
    operations: u32,
    /// Keys that it writes (of 1 KiB each)
    #[arg(long, default_value_t = 2000)]
    keys: u32,
}

/// One strategy.
#[derive(Clone, Debug, Serialize)]
struct Row {
    strategy: String,
    bytes: u64,
    /// Longest time between two answers that the client got.
    client_gap_ms: Runs,
    /// The same with plain CRIU, whose client looks for redis at the other host when nothing answers.
    criu_client_gap_ms: Runs,
    /// The downtime that the engine reports.
    downtime_ms: Runs,
    /// From the last byte of the images until the program could run.
    restore_ms: Runs,
    /// `criu restore`.
    criu_restore_ms: Runs,
    /// Whether the client's connection was the same one before and after, in every run.
    connection_kept: bool,
    /// Acknowledged writes, and filled values, that were not there afterwards, in all runs.
    lost_writes: u64,
    /// Every connection kept, nothing lost, and the goals met.
    pass: bool,
}

/// What one move brought.
#[derive(Clone, Copy, Debug)]
struct Moved {
    gap_ms: f64,
    restore_ms: f64,
    downtime_ms: f64,
    /// From the announcement of the address until what had waited was delivered.
    away_ms: f64,
    kept: bool,
    lost: u64,
}

/// Measures and prints the table; fails if a goal was missed.
///
/// # Errors
/// What kept it from measuring.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let common = &options.common;
    common.medians_need_runs()?;
    ensure_times(options.size, IN_TURN.max(SIDE_BY_SIDE))?;
    let criu = find_criu(common.criu.as_deref())?;
    let scratch = tempfile::Builder::new().prefix("pageferry-bench-").tempdir_in("/tmp")?;
    let mut plain = Vec::new();
    let mut moved: Vec<Vec<Moved>> = vec![Vec::new(); options.strategies.len()];
    for run in 1..=common.runs {
        let one =
            by_criu(options, scratch.path(), &criu).with_context(|| format!("run {run}, by plain CRIU"))?;
        eprintln!("run {run}, plain CRIU: gap {:.0} ms, restore {:.0} ms", one.gap_ms, one.restore_ms);
        plain.push(one);
        for (strategy, moved) in options.strategies.iter().zip(&mut moved) {
            let one = by_pageferry(options, scratch.path(), strategy)
                .with_context(|| format!("run {run}, {strategy}"))?;
            eprintln!(
                "run {run}, {strategy}: gap {:.1} ms, away {:.1} ms, downtime {:.1} ms, restore {:.1} ms",
                one.gap_ms, one.away_ms, one.downtime_ms, one.restore_ms
            );
            moved.push(one);
        }
    }
    let of = |runs: &[Moved], what: fn(&Moved) -> f64| Runs::new(runs.iter().map(what).collect());
    let mut rows = Vec::new();
    for (strategy, moved) in options.strategies.iter().zip(&moved) {
        let mut row = Row {
            strategy: strategy.clone(),
            bytes: options.size.as_u64(),
            client_gap_ms: of(moved, |one| one.gap_ms),
            criu_client_gap_ms: of(&plain, |one| one.gap_ms),
            downtime_ms: of(moved, |one| one.downtime_ms),
            restore_ms: of(moved, |one| one.restore_ms),
            criu_restore_ms: of(&plain, |one| one.restore_ms),
            connection_kept: moved.iter().all(|one| one.kept),
            lost_writes: moved.iter().map(|one| one.lost).sum(),
            pass: false,
        };
        row.pass = passes(&row);
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

fn passes(row: &Row) -> bool {
    let gap = row.client_gap_ms.median;
    row.connection_kept
        && row.lost_writes == 0
        && (row.strategy != "pre-copy" || gap <= GOAL_GAP_MS)
        && gap * GOAL_GAP_TIMES <= row.criu_client_gap_ms.median
        && row.restore_ms.median * GOAL_RESTORE_TIMES <= row.criu_restore_ms.median
}

/// A client that uses redis at these addresses.
struct Load {
    running: Running,
    report: PathBuf,
    journal: PathBuf,
}

impl Load {
    fn start(options: &Options, hosts: &Hosts, scratch: &Path, addresses: &[String]) -> anyhow::Result<Self> {
        let program = workload()?.to_string_lossy().into_owned();
        let (report, journal) = (scratch.join("load.json"), scratch.join("journal"));
        let (report_text, journal_text) = (report.to_string_lossy(), journal.to_string_lossy());
        let (keys, rate) = (options.keys.to_string(), options.operations.to_string());
        let mut words = vec![program.as_str(), "redis-load", "--keys", &keys, "--rate", &rate];
        words.extend(["--report", &report_text, "--journal", &journal_text]);
        addresses.iter().for_each(|address| words.extend(["--address", address]));
        let running = Running::start("redis-load", &mut hosts.exec(Host::Client, words))?;
        child::sleep(AROUND)?;
        Ok(Self { running, report, journal })
    }

    /// Lets it go on for a while, and has it say what it saw; then looks for what was acknowledged.
    fn end(mut self, hosts: &Hosts, redis: &MovedRedis) -> anyhow::Result<(LoadReport, u64)> {
        child::sleep(AROUND)?;
        self.running.terminate();
        self.running.finish(LIMIT)?;
        let text = std::fs::read_to_string(&self.report).context("reading the client's report")?;
        let seen: LoadReport = serde_json::from_str(&text).context("understanding the client's report")?;
        ensure!(seen.acknowledged > 0, "the client wrote nothing");
        let journal = self.journal.to_string_lossy().into_owned();
        let found = redis.look(hosts, &["--journal", &journal])?;
        Ok((seen.clone(), found.lost + seen.bad_reads))
    }
}

fn start(options: &Options, scratch: &Path) -> anyhow::Result<(Hosts, MovedRedis)> {
    let hosts =
        Hosts::up(&options.common.two_hosts, Some(options.common.link.as_deref().unwrap_or("1gbit")))?;
    let redis = MovedRedis::start(&hosts, scratch, &["--bytes", &options.size.as_u64().to_string()])?;
    Ok((hosts, redis))
}

fn by_criu(options: &Options, scratch: &Path, criu: &Path) -> anyhow::Result<Moved> {
    let (hosts, redis) = start(options, scratch)?;
    let addresses = [Host::Source, Host::Destination].map(MovedRedis::address);
    let load = Load::start(options, &hosts, scratch, &addresses)?;
    let steps = baseline::migrate(&hosts, criu, redis.pid)?;
    let (seen, lost) = load.end(&hosts, &redis)?;
    ensure!(lost == 0, "plain CRIU lost {lost} values: there is nothing to compare with");
    let gap_ms = seen.longest_gap_us as f64 / 1e3;
    let restore_ms = steps.restore_us as f64 / 1e3;
    Ok(Moved { gap_ms, restore_ms, downtime_ms: gap_ms, away_ms: gap_ms, kept: seen.reconnects == 0, lost })
}

fn by_pageferry(options: &Options, scratch: &Path, strategy: &str) -> anyhow::Result<Moved> {
    let ferry = options.common.ferry()?.with_standby(options.size.as_u64());
    let (hosts, redis) = start(options, scratch)?;
    let mut put = hosts.exec(Host::Source, ["ip", "address", "add", &format!("{ADDRESS}/24"), "dev", "eth0"]);
    child::output("ip address add", &mut put, LIMIT)?;
    let load = Load::start(options, &hosts, scratch, &[format!("{ADDRESS}:{REDIS}")])?;
    let migrate = ["--strategy", strategy, "--move-address", MOVED];
    let report = ferry.migrate(&hosts, scratch, redis.pid, &migrate)?.report;
    let (seen, lost) = load.end(&hosts, &redis)?;
    let ms = |us: u64| us as f64 / 1e3;
    let network = report.network.unwrap_or_default();
    let kept = report.tcp == "kept" && network.connections > 0;
    Ok(Moved {
        gap_ms: ms(seen.longest_gap_us),
        restore_ms: ms(report.downtime_us.restore),
        downtime_ms: ms(report.downtime_us.total),
        away_ms: ms(network.away_us),
        kept: kept && seen.reconnects == 0,
        lost,
    })
}

fn render(rows: &[Row], options: &Options) -> String {
    let mut table = Table::new(&[
        "strategy",
        "client waits ms",
        "plain CRIU ms",
        "downtime ms",
        "restore ms",
        "plain CRIU's ms",
        "connection",
        "lost",
        "goal",
    ]);
    for row in rows {
        table.row(vec![
            row.strategy.clone(),
            row.client_gap_ms.display(1),
            row.criu_client_gap_ms.display(0),
            row.downtime_ms.display(1),
            row.restore_ms.display(1),
            row.criu_restore_ms.display(0),
            if row.connection_kept { "kept" } else { "lost" }.to_owned(),
            row.lost_writes.to_string(),
            if row.pass { "met" } else { "missed" }.to_owned(),
        ]);
    }
    format!(
        "{}\nredis with {} of values, {} operations a second on {} keys; link: {}; median (smallest..largest) of {} runs; goals: the \
         connection kept, nothing lost, with pre-copy at most {GOAL_GAP_MS} ms, at least {GOAL_GAP_TIMES} times shorter than plain CRIU, \
         restored at least {GOAL_RESTORE_TIMES} times quicker\n\n{}",
        machine::describe(),
        options.size,
        options.operations,
        options.keys,
        options.common.link.as_deref().unwrap_or("1gbit"),
        options.common.runs,
        table.render()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_passes_with_all_of_it_and_not_with_less() {
        let runs = |value: f64| Runs::new(vec![value]);
        let good = Row {
            strategy: "pre-copy".to_owned(),
            bytes: 1 << 30,
            client_gap_ms: runs(60.0),
            criu_client_gap_ms: runs(12_000.0),
            downtime_ms: runs(55.0),
            restore_ms: runs(20.0),
            criu_restore_ms: runs(900.0),
            connection_kept: true,
            lost_writes: 0,
            pass: false,
        };
        assert!(passes(&good));
        assert!(!passes(&Row { client_gap_ms: runs(151.0), ..good.clone() }));
        assert!(passes(&Row { client_gap_ms: runs(151.0), strategy: "hybrid".to_owned(), ..good.clone() }));
        assert!(!passes(&Row { criu_client_gap_ms: runs(299.0), ..good.clone() }));
        assert!(!passes(&Row { criu_restore_ms: runs(799.0), ..good.clone() }));
        assert!(!passes(&Row { connection_kept: false, ..good.clone() }));
        assert!(!passes(&Row { lost_writes: 1, ..good }));
    }
}
