//! What a program loses while it is tracked: its throughput with scans at an interval, beside its throughput without, in
//! turns in one run.

use super::puppet::Puppet;
use super::redis::{Server, throughput};
use super::stats::Runs;
use super::table::Table;
use super::{child, machine};
use crate::sys::scan;
use anyhow::{Context, ensure};
use bytesize::ByteSize;
use clap::Args;
use nix::time::{ClockId, clock_gettime};
use pageferry_tracker::probe::Kernel;
use pageferry_tracker::{Run, Target, Tracker, TrackerKind, TreeState};
use serde::Serialize;
use std::fs::File;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// What is kept with one scan a second, of redis.
const KEPT: f64 = 0.9;
/// What a dirty page may cost at each scan: the fault of its first write.
const PAGE: Duration = Duration::from_micros(1);

/// Options of this measurement.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Times between two scans, in milliseconds
    #[arg(long, value_delimiter = ',', default_value = "1000,100")]
    intervals_ms: Vec<u64>,
    /// How long each throughput is measured
    #[arg(long, default_value_t = 4)]
    seconds: u64,
    /// Runs of everything; the table shows medians
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Memory of the programs whose pauses are measured
    #[arg(long, value_delimiter = ',', default_value = "256MiB,1GiB,4GiB")]
    sizes: Vec<ByteSize>,
    /// Programs whose throughput is measured
    #[arg(long, value_enum, value_delimiter = ',', default_value = "redis,writer,pauses")]
    parts: Vec<Part>,
    /// One JSON object a row instead of the tables
    #[arg(long)]
    json: bool,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// The requests a second of redis under `redis-benchmark -P 16`
    Redis,
    /// The pages a second of a program that writes as fast as it can
    Writer,
    /// How long the whole tree stands still for a scan
    Pauses,
}

#[derive(Debug, Serialize)]
struct Row {
    workload: &'static str,
    /// What it is tracked by.
    source: TrackerName,
    interval_ms: u64,
    /// Throughput while it is tracked, as a part of that without.
    kept_throughput: Runs,
    /// The same with a bare loop over `ioctl(PAGEMAP_SCAN)` in the tracker's place: what no tracker by this call can better.
    #[serde(skip_serializing_if = "Option::is_none")]
    bare_kept_throughput: Option<Runs>,
    /// What a scan takes of a processor, in microseconds.
    scan_us: Runs,
    /// ... by the bare loop.
    #[serde(skip_serializing_if = "Option::is_none")]
    bare_scan_us: Option<Runs>,
    /// Operations a second without.
    without: Runs,
    /// Dirty pages of a scan.
    dirty_pages: Runs,
    /// What must be kept at least.
    limit: f64,
    pass: bool,
}

#[derive(Debug, Serialize)]
struct PauseRow {
    source: TrackerName,
    memory_bytes: u64,
    /// How long the tree stood still for a collect with 1 % dirty pages.
    pause_us: Option<Runs>,
    /// Why it was not measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// Serializes as its name.
#[derive(Clone, Copy, Debug)]
struct TrackerName(TrackerKind);

impl Serialize for TrackerName {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.0.name())
    }
}

/// Measures and prints the tables. The exit status is a failure if a limit was missed.
///
/// # Errors
/// What kept it from measuring.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    ensure!(options.runs > 0, "--runs must be at least 1");
    ensure!(options.seconds > 0 && !options.intervals_ms.contains(&0), "times must be positive");
    let kernel = Kernel::probe();
    let (kind, _) = kernel.choose(None)?;
    let (mut rows, mut pauses) = (Vec::new(), Vec::new());
    for part in &options.parts {
        match part {
            Part::Redis => redis(options, kind, &mut rows)?,
            Part::Writer => writer(options, kind, &mut rows)?,
            Part::Pauses => measure_pauses(options, &kernel, &mut pauses)?,
        }
    }
    if !options.json {
        print!("{}", render(&rows, &pauses, options));
    }
    let missed = rows.iter().any(|row| !row.pass);
    Ok(if missed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Redis. The same server all the time; each load is a redis-benchmark of its own.
fn redis(options: &Options, kind: TrackerKind, rows: &mut Vec<Row>) -> anyhow::Result<()> {
    // An idle virtual processor answers late, and a scan that keeps it awake would make redis faster.
    let _awake = machine::Awake::new()?;
    let server = Server::start()?;
    let mut rate = {
        let mut trial = server.load(200_000)?;
        trial.finish(Duration::from_secs(60))?;
        throughput(&trial)?
    };
    let mut load = || {
        let mut load = server.load((rate * options.seconds as f64) as u64)?;
        load.finish(Duration::from_secs(options.seconds * 20))?;
        rate = throughput(&load)?;
        Ok(rate)
    };
    for &interval_ms in &options.intervals_ms {
        let measured = compare(options, kind, server.pid(), interval_ms, &mut load)?;
        let limit = match interval_ms {
            1000.. => |_: &Measured| KEPT,
            _ => pages_alone,
        };
        report(options, rows, "redis, SET -P 16", kind, interval_ms, measured, limit)?;
    }
    Ok(())
}

/// A writer that goes over its memory as fast as it can: every scan finds all of it dirty.
fn writer(options: &Options, kind: TrackerKind, rows: &mut Vec<Row>) -> anyhow::Result<()> {
    let memory = ByteSize::mib(64);
    machine::touch(memory.as_u64())?;
    let mut puppet = Puppet::start(memory, 0, 0)?;
    let pid = puppet.pid();
    let mut load = || puppet.write_for(Duration::from_secs(options.seconds));
    for &interval_ms in &options.intervals_ms {
        let measured = compare(options, kind, pid, interval_ms, &mut load)?;
        report(options, rows, "writer, 64 MiB", kind, interval_ms, measured, pages_alone)?;
    }
    Ok(())
}

/// What is left when every dirty page of a scan costs [`PAGE`].
fn pages_alone(measured: &Measured) -> f64 {
    1.0 - measured.pages_a_second.median * PAGE.as_secs_f64()
}

struct Measured {
    kept: Runs,
    /// Kept with the bare loop, where there is one.
    bare: Option<Runs>,
    scan_us: Runs,
    bare_scan_us: Option<Runs>,
    without: Runs,
    dirty: Runs,
    pages_a_second: Runs,
}

/// A load without tracking, with it, and without again, so that a machine that drifts favours nobody.
fn compare(
    options: &Options,
    kind: TrackerKind,
    pid: i32,
    interval_ms: u64,
    load: &mut dyn FnMut() -> anyhow::Result<f64>,
) -> anyhow::Result<Measured> {
    let (mut kept, mut without, mut dirty, mut rates) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut bare, mut scan_us, mut bare_scan_us) = (Vec::new(), Vec::new(), Vec::new());
    let interval = Duration::from_millis(interval_ms);
    let mut before = load()?;
    for _ in 0..options.runs {
        let (tracked, scans) = tracked(kind, pid, interval, Way::Tracker, load)?;
        let mut after = load()?;
        let alone = f64::midpoint(before, after);
        before = after;
        if kind == TrackerKind::UffdWp {
            let (scanned, its) = self::tracked(kind, pid, interval, Way::Bare, load)?;
            bare_scan_us.push(its.us_each());
            after = load()?;
            bare.push(scanned / f64::midpoint(before, after));
            before = after;
        }
        kept.push(tracked / alone);
        scan_us.push(scans.us_each());
        without.push(alone);
        dirty.push(scans.pages as f64 / scans.count as f64);
        rates.push(scans.pages as f64 / scans.time.as_secs_f64());
    }
    let [kept, without, dirty, pages_a_second] = [kept, without, dirty, rates].map(Runs::new);
    let [bare, bare_scan_us] = [bare, bare_scan_us].map(|runs| (!runs.is_empty()).then(|| Runs::new(runs)));
    let scan_us = Runs::new(scan_us);
    Ok(Measured { kept, bare, scan_us, bare_scan_us, without, dirty, pages_a_second })
}

/// Scans that were made under a load.
struct Scans {
    count: u64,
    pages: u64,
    /// Time of a processor that all of them took.
    spent: Duration,
    time: Duration,
}

impl Scans {
    fn us_each(&self) -> f64 {
        self.spent.as_secs_f64() * 1e6 / self.count as f64
    }
}

/// What the calling thread has had of processors.
fn processor_time() -> anyhow::Result<Duration> {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).context("reading the thread's clock")?;
    Ok(time.into())
}

/// Who scans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// The tracker.
    Tracker,
    /// A loop over the system call, on the pages that existed at first; the tracker only holds them registered.
    Bare,
}

/// A load while its process is scanned every `interval`. Attaching, and the first look at everything, come before.
fn tracked(
    kind: TrackerKind,
    pid: i32,
    interval: Duration,
    way: Way,
    load: &mut dyn FnMut() -> anyhow::Result<f64>,
) -> anyhow::Result<(f64, Scans)> {
    let mut tracker = Tracker::attach(Target::open(pid)?, kind)?;
    let first = tracker.collect(TreeState::Running)?;
    tracker.acknowledge(first.ticket);
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).context("opening a pagemap")?;
    let existing: Vec<Run> = first.spaces.iter().flat_map(|space| space.populated.runs()).copied().collect();
    let mut answers = vec![scan::Found::default(); 2048];
    let mut look = || -> anyhow::Result<u64> {
        if way == Way::Tracker {
            let collected = tracker.collect(TreeState::Running)?;
            tracker.acknowledge(collected.ticket);
            return Ok(collected.spaces.iter().map(|space| space.dirty.len()).sum());
        }
        let mut pages = 0;
        for run in &existing {
            let found = scan::written(&pagemap, run.start * 4096, run.end() * 4096, &mut answers);
            pages += found.context("scanning without the tracker")?;
        }
        Ok(pages)
    };
    let ended = AtomicBool::new(false);
    let measured = thread::scope(|scope| {
        let scanner = scope.spawn(|| -> anyhow::Result<Scans> {
            let start = Instant::now();
            let (mut count, mut pages, mut due) = (0u64, 0u64, start + interval);
            let mut spent = Duration::ZERO;
            while !ended.load(Ordering::Acquire) {
                let left = due.saturating_duration_since(Instant::now());
                if left > Duration::ZERO {
                    thread::sleep(left.min(Duration::from_millis(20)));
                    continue;
                }
                due += interval;
                let before = processor_time()?;
                pages += look()?;
                spent += processor_time()?.saturating_sub(before);
                count += 1;
            }
            Ok(Scans { count, pages, spent, time: start.elapsed() })
        });
        let throughput = load();
        ended.store(true, Ordering::Release);
        let scans = scanner.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        ensure!(scans.count > 0, "not one scan was made: choose more --seconds");
        Ok((throughput?, scans))
    });
    tracker.detach()?;
    measured
}

fn report(
    options: &Options,
    rows: &mut Vec<Row>,
    workload: &'static str,
    kind: TrackerKind,
    interval_ms: u64,
    measured: Measured,
    limit: impl FnOnce(&Measured) -> f64,
) -> anyhow::Result<()> {
    let limit = limit(&measured);
    let Measured { kept, bare, scan_us, bare_scan_us, without, dirty, .. } = measured;
    let pass = kept.median >= limit;
    let source = TrackerName(kind);
    let row = Row {
        workload,
        source,
        interval_ms,
        kept_throughput: kept,
        bare_kept_throughput: bare,
        scan_us,
        bare_scan_us,
        without,
        dirty_pages: dirty,
        limit,
        pass,
    };
    if options.json {
        println!("{}", serde_json::to_string(&row)?);
    }
    rows.push(row);
    Ok(())
}

/// How long the tree stands still for a collect, by the size of its memory: soft-dirty has to freeze, read, clear, thaw.
fn measure_pauses(options: &Options, kernel: &Kernel, rows: &mut Vec<PauseRow>) -> anyhow::Result<()> {
    for &memory in &options.sizes {
        let available = machine::available_memory()?;
        let needed = memory.as_u64() + memory.as_u64() / 8;
        ensure!(
            available >= needed,
            "{memory} needs {} of memory, and {} is available: choose other --sizes",
            ByteSize(needed),
            ByteSize(available)
        );
        machine::touch(memory.as_u64())?;
        let mut puppet = Puppet::start(memory, 0, 0)?;
        for kind in [TrackerKind::UffdWp, TrackerKind::SoftDirtyScan, TrackerKind::SoftDirty] {
            let (pause_us, reason) = match kernel.choose(Some(kind)) {
                Err(reason) => (None, Some(reason.to_string())),
                Ok(_) => (Some(pause(options, kind, &mut puppet)?), None),
            };
            let row = PauseRow { source: TrackerName(kind), memory_bytes: memory.as_u64(), pause_us, reason };
            if options.json {
                println!("{}", serde_json::to_string(&row)?);
            }
            rows.push(row);
        }
    }
    Ok(())
}

fn pause(options: &Options, kind: TrackerKind, puppet: &mut Puppet) -> anyhow::Result<Runs> {
    let mut tracker = Tracker::attach(Target::open(puppet.pid())?, kind)?;
    for _ in 0..2 {
        let collected = tracker.collect(TreeState::Running)?;
        tracker.acknowledge(collected.ticket);
    }
    let mut pauses = Vec::new();
    for _ in 0..options.runs {
        child::still_wanted()?;
        puppet.tell("touch 100")?;
        let collected = tracker.collect(TreeState::Running)?;
        tracker.acknowledge(collected.ticket);
        pauses.push(collected.pause.as_secs_f64() * 1e6);
    }
    tracker.detach().context("letting go of the program")?;
    Ok(Runs::new(pauses))
}

fn render(rows: &[Row], pauses: &[PauseRow], options: &Options) -> String {
    let mut text = format!(
        "{}\nmedian (smallest..largest) of {} runs of {} s, each between two without tracking\n",
        machine::describe(),
        options.runs,
        options.seconds
    );
    if !rows.is_empty() {
        let head = [
            "program",
            "scan every",
            "operations/s without",
            "dirty pages",
            "kept %",
            "ioctl alone keeps %",
            "a scan us",
            "ioctl alone us",
            "limit",
            "goal",
        ];
        let mut table = Table::new(&head);
        for row in rows {
            let percent =
                |kept: &Runs| Runs::new(kept.runs.iter().map(|kept| kept * 100.0).collect()).display(1);
            table.row(vec![
                row.workload.to_owned(),
                format!("{} ms", row.interval_ms),
                row.without.display(0),
                row.dirty_pages.display(0),
                percent(&row.kept_throughput),
                row.bare_kept_throughput.as_ref().map_or_else(|| "-".to_owned(), percent),
                row.scan_us.display(0),
                row.bare_scan_us.as_ref().map_or_else(|| "-".to_owned(), |us| us.display(0)),
                format!("{:.1}", row.limit * 100.0),
                if row.pass { "met" } else { "missed" }.to_owned(),
            ]);
        }
        text.push_str(&format!("\n{}", table.render()));
    }
    if !pauses.is_empty() {
        let mut table = Table::new(&["source", "memory", "the tree stood still us"]);
        let mut reasons: Vec<String> = Vec::new();
        for row in pauses {
            let pause =
                row.pause_us.as_ref().map_or_else(|| "not measured".to_owned(), |pause| pause.display(0));
            table.row(vec![row.source.0.to_string(), ByteSize(row.memory_bytes).to_string(), pause]);
            reasons.extend(row.reason.clone());
        }
        reasons.sort();
        reasons.dedup();
        text.push_str(&format!("\n{}", table.render()));
        reasons.iter().for_each(|reason| text.push_str(&format!("{reason}\n")));
    }
    text
}
