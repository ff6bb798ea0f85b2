//! What a program feels while its memory is copied, before it is frozen: its throughput then and before.

use super::ferry::{Ferry, Migration};
use super::hosts::{Host, Hosts};
use super::moved_redis::MovedRedis;
use super::stats::Runs;
use super::subject::{Subject, throughput};
use super::table::Table;
use super::{Common, child, ensure_memory, machine, workload};
use crate::workload::state::{Line, read_lines, realtime_us};
use anyhow::Context;
use bytesize::ByteSize;
use clap::{Args, ValueEnum};
use serde::Serialize;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// How long the program is watched before the migration begins.
const BEFORE: Duration = Duration::from_secs(3);

/// Options of this measurement.
#[derive(Clone, Debug, Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Memory of the program
    #[arg(long, default_value = "1GiB")]
    memory: ByteSize,
    /// Programs to watch
    #[arg(long, value_enum, value_delimiter = ',', default_value = "writer,random,redis")]
    programs: Vec<Program>,
    /// Further options for `pageferry migrate`
    #[arg(last = true)]
    migrate: Vec<String>,
}

/// A program to watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
enum Program {
    /// Dirties 10 MB/s
    Writer,
    /// Reads a page and writes a word, all over its memory, as fast as it can
    Random,
    /// A redis-server under writes, 16 commands under way at a time
    Redis,
}

#[derive(Clone, Debug, Serialize)]
struct Row {
    program: Program,
    memory_bytes: u64,
    /// Operations a second before the migration.
    before: Runs,
    /// And while its memory is copied, until the freeze.
    during: Runs,
    /// Throughput that is lost meanwhile, in percent of before.
    loss_percent: Runs,
}

/// Measures and prints the table.
///
/// # Errors
/// What kept it from measuring.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let common = &options.common;
    common.medians_need_runs()?;
    ensure_memory(options.memory)?;
    let _awake = machine::Awake::new()?;
    let ferry = common.ferry()?;
    let scratch = tempfile::Builder::new().prefix("pageferry-bench-").tempdir()?;
    let extra: Vec<&str> = options.migrate.iter().map(String::as_str).collect();
    let mut rows = Vec::new();
    for &program in &options.programs {
        let (mut before, mut during, mut loss) = (Vec::new(), Vec::new(), Vec::new());
        for run in 1..=common.runs {
            let hosts = Hosts::up(&common.two_hosts, common.link.as_deref())?;
            let trial = Trial { hosts: &hosts, scratch: scratch.path(), ferry: &ferry, extra: &extra };
            let (calm, busy) = match program {
                Program::Writer => trial.own_program(options.memory, &["--rate", "10MB"])?,
                Program::Random => trial.own_program(options.memory, &["--rate", "max", "--reads", "1"])?,
                Program::Redis => trial.redis(options.memory)?,
            };
            before.push(calm);
            during.push(busy);
            loss.push((1.0 - busy / calm) * 100.0);
            eprintln!(
                "{program:?}, run {run} of {}: {calm:.0} operations/s before, {busy:.0} during",
                common.runs
            );
        }
        let row = Row {
            program,
            memory_bytes: options.memory.as_u64(),
            before: Runs::new(before),
            during: Runs::new(during),
            loss_percent: Runs::new(loss),
        };
        if common.json {
            println!("{}", serde_json::to_string(&row)?);
        }
        rows.push(row);
    }
    if !common.json {
        print!("{}", render(&rows, options));
    }
    Ok(ExitCode::SUCCESS)
}

struct Trial<'a> {
    hosts: &'a Hosts,
    scratch: &'a Path,
    ferry: &'a Ferry,
    extra: &'a [&'a str],
}

impl Trial<'_> {
    /// Throughput of our own writer before and during.
    fn own_program(&self, memory: ByteSize, how: &[&str]) -> anyhow::Result<(f64, f64)> {
        let memory = memory.as_u64().to_string();
        let arguments: Vec<String> =
            ["writer", "--memory", &memory].iter().chain(how).map(|&word| word.to_owned()).collect();
        let subject = Subject::start(self.hosts, self.scratch, "program", &arguments)?;
        let from = realtime_us();
        child::sleep(BEFORE)?;
        let migration = self.ferry.migrate(self.hosts, self.scratch, subject.pid, self.extra)?;
        subject.wait_alive_after(realtime_us())?;
        let lines = subject.lines()?;
        subject.check()?;
        self.hosts.kill(Host::Destination, subject.pid)?;
        compare(&lines, from, &migration)
    }

    /// Throughput of redis, as its client sees it, before and during.
    fn redis(&self, memory: ByteSize) -> anyhow::Result<(f64, f64)> {
        let path = |name: &str| self.scratch.join(name).to_string_lossy().into_owned();
        let program = workload()?.to_string_lossy().into_owned();
        let bytes = memory.as_u64().to_string();
        let redis = MovedRedis::start(self.hosts, self.scratch, &["--bytes", &bytes])?;
        let [source, destination] = [Host::Source, Host::Destination].map(MovedRedis::address);
        let (state, journal, report) = (path("load"), path("journal"), path("load-report"));
        let load = [
            program.as_str(),
            "redis-load",
            "--address",
            &source,
            "--address",
            &destination,
            "--pipeline",
            "16",
            "--state",
            &state,
            "--journal",
            &journal,
            "--report",
            &report,
        ];
        let mut load = child::Running::start("redis-load", &mut self.hosts.exec(Host::Client, load))?;
        // Every key is there and connections are warm before anything counts.
        child::sleep(Duration::from_secs(1))?;
        let from = realtime_us();
        child::sleep(BEFORE)?;
        let migration = self.ferry.migrate(self.hosts, self.scratch, redis.pid, self.extra)?;
        child::sleep(Duration::from_millis(500))?;
        load.terminate();
        load.finish(Duration::from_secs(30))?;
        redis.verify(self.hosts, &["--journal", &journal])?;
        self.hosts.kill(Host::Destination, redis.pid)?;
        compare(&read_lines(Path::new(&state))?, from, &migration)
    }
}

/// Throughput from then to the first round, and from there to the freeze.
fn compare(lines: &[Line], from: u64, migration: &Migration) -> anyhow::Result<(f64, f64)> {
    let attached = migration.event_us("attached").context("the source did not print when it attached")?;
    let started = migration.event_us("round_started").context("the source did not print its first round")?;
    let freezing = migration.event_us("freezing").context("the source did not print the freeze")?;
    let before =
        throughput(lines, from, attached.min(started)).context("the program wrote too little before")?;
    let during = throughput(lines, started, freezing)
        .context("pre-copy was over before the program could be measured: choose more --memory")?;
    Ok((before, during))
}

fn render(rows: &[Row], options: &Options) -> String {
    let mut table = Table::new(&["program", "operations/s before", "during pre-copy", "loss %"]);
    for row in rows {
        let name = match row.program {
            Program::Writer => "writer, 10 MB/s",
            Program::Random => "random reader and writer",
            Program::Redis => "redis, 16 in flight",
        };
        table.row(vec![
            name.to_owned(),
            row.before.display(0),
            row.during.display(0),
            row.loss_percent.display(1),
        ]);
    }
    let common = &options.common;
    format!(
        "{}\n{} of memory; link: {}; median (smallest..largest) of {} runs\n\n{}",
        machine::describe(),
        options.memory,
        common.link.as_deref().unwrap_or("not shaped"),
        common.runs,
        table.render()
    )
}
