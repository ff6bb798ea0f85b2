//! How long it takes to find the dirty pages of a program and to watch them again, beside a bare loop over the same
//! system call.

use super::puppet::Puppet;
use super::stats::Runs;
use super::table::Table;
use super::{child, machine};
use crate::sys::scan;
use anyhow::{Context, ensure};
use bytesize::ByteSize;
use clap::Args;
use pageferry_tracker::probe::Kernel;
use pageferry_tracker::{Collected, Target, Tracker, TrackerKind, TreeState};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::time::Duration;

/// Every how many pages one is dirty; 0 for none.
const EVERY: [u64; 4] = [0, 100, 10, 1];
/// A scan takes at most this many times as long as the bare loop.
const BESIDE_BARE: f64 = 1.15;
/// Limits for a page, in ns: clean, and when all are dirty.
const CLEAN_NS: f64 = 1.5;
const DIRTY_NS: f64 = 15.0;
/// Mappings among which new ones are found, how many are new, and in what time.
const MAPPINGS: usize = 40_000;
const NEW_MAPPINGS: usize = 16;
const FIND_NEW: Duration = Duration::from_millis(20);
/// Reading pagemap is this many times quicker than the procfs crate.
const QUICKER_THAN_PROCFS: f64 = 3.0;
/// A soft-dirty scan is this many times quicker than reading entries, when 1 % is dirty.
const QUICKER_THAN_READING: f64 = 5.0;

/// Options of this measurement.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Memory of the program
    #[arg(long, default_value = "4GiB")]
    memory: ByteSize,
    /// Runs of everything; the table shows medians
    #[arg(long, default_value_t = 11)]
    runs: usize,
    /// One JSON object a row instead of the table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Row {
    /// What was scanned with.
    source: &'static str,
    /// Share of the pages that were written since the last scan.
    dirty_share: f64,
    /// A scan of the tracker with everything that it does around it, by the pages of the program.
    #[serde(skip_serializing_if = "Option::is_none")]
    ns_per_page: Option<Runs>,
    /// What it is compared with.
    bare: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    bare_ns_per_page: Option<Runs>,
    /// What must hold.
    limit: String,
    /// Whether it does; nothing where it could not be measured.
    pass: Option<bool>,
    /// Why it could not.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// Measures and prints the table. The exit status is a failure if a limit was missed.
///
/// # Errors
/// What kept it from measuring.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    ensure!(options.runs > 0, "--runs must be at least 1");
    // Beside the program's pages: page tables and the tracker's own.
    let needed = options.memory.as_u64() + options.memory.as_u64() / 8;
    let available = machine::available_memory()?;
    ensure!(
        available >= needed,
        "this needs {} of memory, and {} is available: choose less --memory",
        ByteSize(needed),
        ByteSize(available)
    );
    machine::touch(options.memory.as_u64())?;
    let kernel = Kernel::probe();
    let mut puppet = Puppet::start(options.memory, 0, 0)?;
    let mut bench = Bench { runs: options.runs, rows: Vec::new(), json: options.json };
    bench.userfaultfd(&kernel, &mut puppet)?;
    bench.entries(&mut puppet)?;
    bench.soft_dirty(&kernel, &mut puppet)?;
    drop(puppet);
    bench.new_regions(&kernel)?;
    if !options.json {
        print!("{}", render(&bench.rows, options));
    }
    let missed = bench.rows.iter().any(|row| row.pass == Some(false));
    Ok(if missed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

struct Bench {
    runs: usize,
    rows: Vec<Row>,
    json: bool,
}

/// What is measured in a row, apart from the figures.
struct Case {
    source: &'static str,
    dirty_share: f64,
    bare: &'static str,
    limit: String,
}

impl Bench {
    fn add(&mut self, case: Case, figures: Result<(Runs, Runs, bool), String>) -> anyhow::Result<()> {
        let Case { source, dirty_share, bare, limit } = case;
        let (ns_per_page, bare_ns_per_page, pass, reason) = match figures {
            Ok((own, bare, pass)) => (Some(own), Some(bare), Some(pass), None),
            Err(reason) => (None, None, None, Some(reason)),
        };
        let row = Row { source, dirty_share, ns_per_page, bare, bare_ns_per_page, limit, pass, reason };
        if self.json {
            println!("{}", serde_json::to_string(&row)?);
        }
        self.rows.push(row);
        Ok(())
    }

    /// Scans of the tracker and bare ones in turns, over the same pages under the same protection.
    fn userfaultfd(&mut self, kernel: &Kernel, puppet: &mut Puppet) -> anyhow::Result<()> {
        let case = |every: u64| Case {
            source: "userfaultfd",
            dirty_share: share(every),
            bare: "the ioctl alone",
            limit: match every {
                0 => format!("{CLEAN_NS} ns, {BESIDE_BARE}x"),
                1 => format!("{DIRTY_NS} ns, {BESIDE_BARE}x"),
                _ => format!("{BESIDE_BARE}x"),
            },
        };
        if let Err(reason) = kernel.choose(Some(TrackerKind::UffdWp)) {
            return EVERY.into_iter().try_for_each(|every| self.add(case(every), Err(reason.to_string())));
        }
        let mut tracker = Tracker::attach(Target::open(puppet.pid())?, TrackerKind::UffdWp)?;
        let pagemap = File::open(format!("/proc/{}/pagemap", puppet.pid())).context("opening a pagemap")?;
        let mut answers = vec![scan::Found::default(); 2048];
        let end = puppet.address + puppet.pages * 4096;
        // The first returns everything, and the second is the first of the usual kind.
        (0..2).try_for_each(|_| collect(&mut tracker).map(drop))?;
        for every in EVERY {
            let (mut own, mut bare) = (Vec::new(), Vec::new());
            let dirty = match every {
                0 => 0,
                every => puppet.pages.div_ceil(every),
            };
            for _ in 0..self.runs {
                child::still_wanted()?;
                puppet.tell(&format!("touch {every}"))?;
                let start = processor_time();
                let found = scan::written(&pagemap, puppet.address, end, &mut answers)
                    .context("scanning without the tracker")?;
                bare.push(per_page(processor_time() - start, puppet.pages));
                ensure!(found == dirty, "the bare loop found {found} of {dirty} dirty pages");
                puppet.tell(&format!("touch {every}"))?;
                let (collected, took) = collect(&mut tracker)?;
                own.push(per_page(took, puppet.pages));
                expect(&collected, puppet, dirty)?;
            }
            let (own, bare) = (Runs::new(own), Runs::new(bare));
            let limit = match every {
                0 => CLEAN_NS,
                1 => DIRTY_NS,
                _ => f64::INFINITY,
            };
            let pass = own.median <= limit && own.median <= BESIDE_BARE * bare.median;
            self.add(case(every), Ok((own, bare, pass)))?;
        }
        tracker.detach()?;
        Ok(())
    }

    /// Reading entries of pagemap one by one, as where there is nothing better, beside the procfs crate. The program is
    /// taken as frozen: this is the reading alone, and works on kernels without soft-dirty too.
    fn entries(&mut self, puppet: &mut Puppet) -> anyhow::Result<()> {
        let mut tracker = Tracker::attach(Target::open(puppet.pid())?, TrackerKind::SoftDirty)?;
        let process =
            procfs::process::Process::new(puppet.pid()).context("opening the process with procfs")?;
        let mut pagemap = process.pagemap().context("opening the pagemap with procfs")?;
        let first = (puppet.address / 4096) as usize;
        let (mut own, mut bare) = (Vec::new(), Vec::new());
        for _ in 0..self.runs {
            child::still_wanted()?;
            let start = processor_time();
            let collected = tracker.collect(TreeState::Frozen)?;
            own.push(per_page(processor_time() - start, puppet.pages));
            let populated: u64 = collected.spaces.iter().map(|space| space.populated.len()).sum();
            ensure!(populated >= puppet.pages, "{populated} pages were found, of {}", puppet.pages);
            let start = processor_time();
            // A buffer's worth at a time, as a tracker with bounded memory would.
            let mut dirty = 0;
            for from in (0..puppet.pages as usize).step_by(8192) {
                let to = (from + 8192).min(puppet.pages as usize);
                let entries =
                    pagemap.get_range_info(first + from..first + to).context("reading with procfs")?;
                dirty += entries.iter().filter(|entry| is_dirty(entry)).count();
            }
            std::hint::black_box(dirty);
            bare.push(per_page(processor_time() - start, puppet.pages));
        }
        let (own, bare) = (Runs::new(own), Runs::new(bare));
        let pass = QUICKER_THAN_PROCFS * own.median <= bare.median;
        let case = Case {
            source: "pagemap entries",
            dirty_share: 0.0,
            bare: "the procfs crate",
            limit: format!("1/{QUICKER_THAN_PROCFS}x"),
        };
        self.add(case, Ok((own, bare, pass)))
    }

    /// PAGEMAP_SCAN for soft-dirty beside reading entries, by the tracker and by bare loops: the reading alone, in a program
    /// that is taken as frozen. Clearing costs both the same. On a kernel that is built without soft-dirty nothing shows as
    /// dirty, and the walk is the same.
    fn soft_dirty(&mut self, kernel: &Kernel, puppet: &mut Puppet) -> anyhow::Result<()> {
        let is_there = kernel.choose(Some(TrackerKind::SoftDirtyScan)).is_ok();
        let every = if is_there { 100 } else { 0 };
        let case = |source: &'static str, bare: &'static str| Case {
            source,
            dirty_share: share(every),
            bare,
            limit: format!("1/{QUICKER_THAN_READING}x"),
        };
        let pagemap = File::open(format!("/proc/{}/pagemap", puppet.pid())).context("opening a pagemap")?;
        let mut answers = vec![scan::Found::default(); 2048];
        let end = puppet.address + puppet.pages * 4096;
        let asked = scan::soft_dirty(&pagemap, puppet.address, puppet.address + 4096, &mut answers);
        if let Err(error) = asked {
            let reason = format!("PAGEMAP_SCAN, which came with Linux 6.7: {error}");
            return self.add(case("soft-dirty by PAGEMAP_SCAN", "pagemap entries"), Err(reason));
        }
        let [mut own, mut entries, mut bare, mut bare_entries] = [const { Vec::new() }; 4];
        let dirty = if every == 0 { 0 } else { puppet.pages.div_ceil(every) };
        for _ in 0..self.runs {
            for (kind, figures) in
                [(TrackerKind::SoftDirtyScan, &mut own), (TrackerKind::SoftDirty, &mut entries)]
            {
                child::still_wanted()?;
                let mut tracker = Tracker::attach(Target::open(puppet.pid())?, kind)?;
                let state = if is_there { TreeState::Running } else { TreeState::Frozen };
                for _ in 0..2 {
                    let collected = tracker.collect(state)?;
                    tracker.acknowledge(collected.ticket);
                }
                puppet.tell(&format!("touch {every}"))?;
                let start = processor_time();
                let collected = tracker.collect(TreeState::Frozen)?;
                figures.push(per_page(processor_time() - start, puppet.pages));
                if is_there {
                    expect(&collected, puppet, dirty)?;
                }
            }
            // What the last collect left is still there: it was of a frozen program, and cleared nothing.
            let start = processor_time();
            let found = scan::soft_dirty(&pagemap, puppet.address, end, &mut answers)
                .context("scanning without the tracker")?;
            bare.push(per_page(processor_time() - start, puppet.pages));
            ensure!(found == dirty, "the bare loop found {found} of {dirty} soft-dirty pages");
            let start = processor_time();
            let found = soft_dirty_entries(&pagemap, puppet.address, end)?;
            bare_entries.push(per_page(processor_time() - start, puppet.pages));
            ensure!(found == dirty, "the bare reads found {found} of {dirty} soft-dirty pages");
        }
        for (own, bare, case) in [
            (own, entries, case("soft-dirty by PAGEMAP_SCAN", "pagemap entries")),
            (bare, bare_entries, case("that ioctl alone", "pread alone")),
        ] {
            let (own, bare) = (Runs::new(own), Runs::new(bare));
            let pass = QUICKER_THAN_READING * own.median <= bare.median;
            self.add(case, Ok((own, bare, pass)))?;
        }
        Ok(())
    }

    /// A few new mappings among very many.
    fn new_regions(&mut self, kernel: &Kernel) -> anyhow::Result<()> {
        let limit = format!("{} ms", FIND_NEW.as_millis());
        let case =
            Case { source: "new among 40 000 mappings", dirty_share: 0.0, bare: "reading maps alone", limit };
        if let Err(reason) = kernel.choose(Some(TrackerKind::UffdWp)) {
            return self.add(case, Err(reason.to_string()));
        }
        let mut puppet = Puppet::start(ByteSize::mib(1), MAPPINGS, 0)?;
        let mut tracker = Tracker::attach(Target::open(puppet.pid())?, TrackerKind::UffdWp)?;
        (0..2).try_for_each(|_| collect(&mut tracker).map(drop))?;
        let (mut times, mut bare) = (Vec::new(), Vec::new());
        let maps = format!("/proc/{}/maps", puppet.pid());
        for _ in 0..self.runs {
            child::still_wanted()?;
            puppet.tell(&format!("map {NEW_MAPPINGS}"))?;
            let start = processor_time();
            let text = std::fs::read(&maps).with_context(|| format!("reading {maps}"))?;
            bare.push(per_page(processor_time() - start, MAPPINGS as u64));
            ensure!(text.len() > MAPPINGS, "{maps} is too short");
            let (collected, took) = collect(&mut tracker)?;
            times.push(per_page(took, MAPPINGS as u64));
            let dirty: u64 = collected.spaces.iter().map(|space| space.dirty.len()).sum();
            ensure!(dirty >= NEW_MAPPINGS as u64, "{dirty} dirty pages in {NEW_MAPPINGS} new mappings");
        }
        let times = Runs::new(times);
        let pass = times.median * MAPPINGS as f64 <= FIND_NEW.as_nanos() as f64;
        self.add(case, Ok((times, Runs::new(bare), pass)))
    }
}

/// A collect of the running tree, and how long it took. What it found is acknowledged.
fn collect(tracker: &mut Tracker) -> anyhow::Result<(Collected, Duration)> {
    let start = processor_time();
    let collected = tracker.collect(TreeState::Running)?;
    let took = processor_time() - start;
    tracker.acknowledge(collected.ticket);
    Ok((collected, took))
}

/// The pages that were written are found, and few others: the stack, and what the puppet listens with.
fn expect(collected: &Collected, puppet: &Puppet, dirty: u64) -> anyhow::Result<()> {
    let found: u64 = collected.spaces.iter().map(|space| space.dirty.len()).sum();
    ensure!(
        (dirty..dirty + 100).contains(&found),
        "{found} dirty pages of {}, and {dirty} were written",
        puppet.pages
    );
    Ok(())
}

/// How many entries of pagemap have their soft-dirty bit, and nothing else of them.
fn soft_dirty_entries(pagemap: &File, start: u64, end: u64) -> anyhow::Result<u64> {
    let mut buffer = vec![0; 64 << 10];
    let (mut at, end, mut dirty) = (start / 4096 * 8, end / 4096 * 8, 0);
    while at < end {
        let piece = (end - at).min(buffer.len() as u64) as usize;
        pagemap.read_exact_at(&mut buffer[..piece], at).context("reading a pagemap")?;
        let entries = buffer[..piece].chunks_exact(8);
        dirty += entries.filter(|entry| entry[6] >> 7 == 1).count() as u64;
        at += piece as u64;
    }
    Ok(dirty)
}

fn is_dirty(entry: &procfs::process::PageInfo) -> bool {
    use procfs::process::{MemoryPageFlags, PageInfo, SwapPageFlags};
    match entry {
        PageInfo::MemoryPage(flags) => flags.contains(MemoryPageFlags::SOFT_DIRTY),
        PageInfo::SwapPage(flags) => flags.contains(SwapPageFlags::SOFT_DIRTY),
    }
}

/// What this thread has had of a processor: whatever else runs on the machine takes none of it.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn share(every: u64) -> f64 {
    if every == 0 { 0.0 } else { 1.0 / every as f64 }
}

fn per_page(time: Duration, pages: u64) -> f64 {
    time.as_nanos() as f64 / pages as f64
}

fn render(rows: &[Row], options: &Options) -> String {
    let mut table =
        Table::new(&["source", "dirty", "ns a page", "compared with", "its ns a page", "limit", "goal"]);
    let mut reasons = String::new();
    for row in rows {
        let figure =
            |runs: &Option<Runs>| runs.as_ref().map_or_else(|| "-".to_owned(), |runs| runs.display(2));
        table.row(vec![
            row.source.to_owned(),
            format!("{:.0} %", row.dirty_share * 100.0),
            figure(&row.ns_per_page),
            row.bare.to_owned(),
            figure(&row.bare_ns_per_page),
            row.limit.clone(),
            match row.pass {
                Some(true) => "met",
                Some(false) => "missed",
                None => "not measured",
            }
            .to_owned(),
        ]);
        if let Some(reason) = &row.reason {
            reasons.push_str(&format!("{}, {:.0} %: {reason}\n", row.source, row.dirty_share * 100.0));
        }
    }
    format!(
        "{}\n{} of 4 KiB pages; time of the processor, median (smallest..largest) of {} runs; the mappings' times are by mapping\n\n{}{reasons}",
        machine::describe(),
        options.memory,
        options.runs,
        table.render()
    )
}
