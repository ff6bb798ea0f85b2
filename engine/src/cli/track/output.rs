//! What scans become for programs and for people without a live view: JSON lines, CSV, plain lines, the summary.

use super::super::render::table;
use super::super::units::{Bytes, Rate, Time};
use pageferry_tracker::observation::Observation;
use pageferry_tracker::working_set::{DirtyRate, Estimator, RegionUse};
use pageferry_tracker::{PageSet, Scope};
use serde::Serialize;
use std::fmt::Write;
use std::time::Duration;

/// Windows of the summary, besides the scan interval and the whole run.
const WINDOWS: [Duration; 6] = [
    Duration::from_millis(100),
    Duration::from_secs(1),
    Duration::from_secs(5),
    Duration::from_secs(10),
    Duration::from_secs(60),
    Duration::from_secs(300),
];
/// Regions of the summary.
const REGIONS: usize = 10;

pub(super) fn us(time: Duration) -> u64 {
    time.as_micros() as u64
}

/// A number of pages as bytes.
pub(super) fn bytes(pages: f64) -> Bytes {
    Bytes((pages * 4096.0).round().max(0.0) as u64)
}

/// Pages a second as bytes a second.
pub(super) fn rate(pages: f64) -> Rate {
    Rate((pages * 4096.0).round().max(0.0) as u64)
}

/// The name of a scope, as it is asked for.
pub(super) fn scope(scope: Scope) -> &'static str {
    match scope {
        Scope::All => "all",
        Scope::Lazy => "lazy",
    }
}

/// The same for people.
pub(super) fn scope_words(scope: Scope) -> &'static str {
    match scope {
        Scope::All => "all memory",
        Scope::Lazy => "private memory alone",
    }
}

/// One scan, as a JSON line and as a line of CSV. Its fields are documented in docs/TRACK.md.
#[derive(Clone, Debug, Serialize)]
pub(super) struct ScanLine {
    event: &'static str,
    /// Since tracking began, when the scan returned.
    pub(super) at_us: u64,
    pub(super) took_us: u64,
    pub(super) pause_us: u64,
    pub(super) processes: u64,
    pub(super) populated_pages: u64,
    /// Pages written since the scan before; in the first scan of a process nothing.
    pub(super) dirty_pages: u64,
    pub(super) first_time_pages: u64,
    pub(super) repeated_pages: u64,
    /// With `--contents`: of the dirty pages, those with the bytes that they had before.
    pub(super) unchanged_pages: Option<u64>,
    /// Distinct pages written since tracking began.
    pub(super) written_pages: u64,
    pub(super) dirty_pages_per_second: f64,
    /// Of the populated and of the dirty pages, those of shared memory.
    pub(super) shared_populated_pages: u64,
    pub(super) shared_dirty_pages: u64,
}

/// Makes a line of each scan.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// The middle of the scan before: what rates are counted from.
    before: Option<Duration>,
    written: u64,
}

impl Tally {
    /// The line of an observation that the estimator has just taken in.
    pub(super) fn line(&mut self, observation: &Observation, estimator: &Estimator) -> ScanLine {
        let middle = observation.at.saturating_sub(observation.took / 2);
        let time = self.before.map_or(Duration::ZERO, |before| middle.saturating_sub(before));
        let is_base = self.before.replace(middle).is_none();
        let old = |is_new: bool| !is_new && !is_base;
        let private = observation.spaces.iter().filter(|space| old(space.is_new));
        let shared = observation.objects.iter().filter(|object| old(object.is_new));
        let shared_dirty_pages: u64 = shared.clone().map(|object| object.dirty.len()).sum();
        let dirty_pages = private.clone().map(|space| space.dirty.len()).sum::<u64>() + shared_dirty_pages;
        let unchanged = private.filter_map(|space| space.unchanged.as_ref());
        let unchanged = unchanged.chain(shared.filter_map(|object| object.unchanged.as_ref()));
        let unchanged: u64 = unchanged.map(PageSet::len).sum();
        let looked = observation.spaces.iter().any(|space| space.unchanged.is_some());
        let shared_populated_pages: u64 =
            observation.objects.iter().map(|object| object.populated.len()).sum();
        let private_populated_pages: u64 = observation.spaces.iter().map(|space| space.populated.len()).sum();
        // A rate over exactly this time, so this is a whole number but for rounding.
        let first = (estimator.last_interval().first_time * time.as_secs_f64()).round() as u64;
        let first_time_pages = if is_base { 0 } else { first.min(dirty_pages) };
        self.written += first_time_pages;
        ScanLine {
            event: "scan",
            at_us: us(observation.at),
            took_us: us(observation.took),
            pause_us: us(observation.pause),
            processes: observation.spaces.len() as u64,
            populated_pages: private_populated_pages + shared_populated_pages,
            dirty_pages,
            first_time_pages,
            repeated_pages: dirty_pages - first_time_pages,
            unchanged_pages: looked.then_some(unchanged),
            written_pages: self.written,
            dirty_pages_per_second: match time.is_zero() {
                true => 0.0,
                false => dirty_pages as f64 / time.as_secs_f64(),
            },
            shared_populated_pages,
            shared_dirty_pages,
        }
    }

    /// Distinct pages written so far.
    pub(super) fn written(&self) -> u64 {
        self.written
    }
}

impl ScanLine {
    /// Heads of the CSV's columns.
    pub(super) const CSV_HEAD: &'static str = "at_us,took_us,pause_us,processes,populated_pages,dirty_pages,\
         first_time_pages,repeated_pages,unchanged_pages,written_pages,dirty_pages_per_second,\
         shared_populated_pages,shared_dirty_pages\n";

    /// The line of CSV.
    pub(super) fn csv(&self) -> String {
        let unchanged = self.unchanged_pages.map_or(String::new(), |pages| pages.to_string());
        format!(
            "{},{},{},{},{},{},{},{},{unchanged},{},{:.1},{},{}\n",
            self.at_us,
            self.took_us,
            self.pause_us,
            self.processes,
            self.populated_pages,
            self.dirty_pages,
            self.first_time_pages,
            self.repeated_pages,
            self.written_pages,
            self.dirty_pages_per_second,
            self.shared_populated_pages,
            self.shared_dirty_pages
        )
    }

    /// The line for people.
    pub(super) fn plain(&self) -> String {
        let mut parts = String::new();
        if self.shared_dirty_pages > 0 {
            let _ = write!(parts, ", {} shared", bytes(self.shared_dirty_pages as f64));
        }
        if let Some(pages) = self.unchanged_pages {
            let _ = write!(parts, ", {} unchanged", bytes(pages as f64));
        }
        format!(
            "{:>9}  {:>9} of {:>9} written ({} for the first time{parts}), {}, scan {}\n",
            Time(Duration::from_micros(self.at_us)).to_string(),
            bytes(self.dirty_pages as f64).to_string(),
            bytes(self.populated_pages as f64).to_string(),
            bytes(self.first_time_pages as f64),
            rate(self.dirty_pages_per_second),
            Time(Duration::from_micros(self.took_us)),
        )
    }
}

/// One window of the curve.
#[derive(Clone, Debug, Serialize)]
pub(super) struct WindowLine {
    tau_us: u64,
    pages: f64,
    error_pages: f64,
}

/// One region.
#[derive(Clone, Debug, Serialize)]
pub(super) struct RegionLine {
    /// None of one: memory that processes share.
    pid: Option<i32>,
    processes: u32,
    name: String,
    kind: String,
    start: String,
    end: String,
    populated_pages: u64,
    written_pages: u64,
    dirty_pages_per_second: f64,
}

/// How much was looked at.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Extent {
    pub(super) scans: u64,
    pub(super) duration: Duration,
    /// Distinct pages written.
    pub(super) written: u64,
}

/// All of a run.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Summary {
    event: &'static str,
    /// Why it ended.
    pub(super) end: String,
    pub(super) scans: u64,
    pub(super) duration_us: u64,
    dirty_pages_per_second: f64,
    first_time_pages_per_second: f64,
    repeated_pages_per_second: f64,
    unchanged_pages_per_second: Option<f64>,
    written_pages: u64,
    /// Rate for which the hot set was asked.
    link_bytes_per_second: u64,
    hot_set_pages: u64,
    working_set: Vec<WindowLine>,
    regions: Vec<RegionLine>,
}

impl Summary {
    /// Of everything that the estimator has seen.
    pub(super) fn of(estimator: &Estimator, link: Rate, run: Extent, end: String) -> Self {
        let DirtyRate { total, first_time, repeated, unchanged } = estimator.dirty_rate();
        let curve = estimator.curve();
        Self {
            event: "summary",
            end,
            scans: run.scans,
            duration_us: us(run.duration),
            dirty_pages_per_second: total,
            first_time_pages_per_second: first_time,
            repeated_pages_per_second: repeated,
            unchanged_pages_per_second: unchanged,
            written_pages: run.written,
            link_bytes_per_second: link.0,
            hot_set_pages: estimator.hot_set(link.0 as f64).total,
            working_set: curve
                .iter()
                .map(|point| WindowLine {
                    tau_us: us(point.tau),
                    pages: point.pages,
                    error_pages: point.error,
                })
                .collect(),
            regions: hottest(estimator).into_iter().map(region_line).collect(),
        }
    }

    /// For people.
    pub(super) fn text(&self, estimator: &Estimator) -> String {
        let mut text = String::new();
        let _ = writeln!(
            text,
            "\n{}: {} scans in {}\n",
            self.end,
            self.scans,
            Time(Duration::from_micros(self.duration_us))
        );
        let mut rows = vec![
            vec!["dirty rate".to_owned(), rate(self.dirty_pages_per_second).to_string()],
            vec!["  for the first time".to_owned(), rate(self.first_time_pages_per_second).to_string()],
            vec!["  again".to_owned(), rate(self.repeated_pages_per_second).to_string()],
        ];
        if let Some(unchanged) = self.unchanged_pages_per_second {
            rows.push(vec!["  with the same bytes".to_owned(), rate(unchanged).to_string()]);
        }
        rows.push(vec!["written in all".to_owned(), bytes(self.written_pages as f64).to_string()]);
        rows.push(vec![
            format!("hot set at {}", Rate(self.link_bytes_per_second)),
            bytes(self.hot_set_pages as f64).to_string(),
        ]);
        text.push_str(&table(&["", "amount"], &[1], rows));
        text.push('\n');
        text.push_str(&table(&["window", "writable working set", "error"], &[0, 1, 2], windows(estimator)));
        let regions = self.regions.iter().take(REGIONS).filter(|region| region.written_pages > 0);
        let regions: Vec<Vec<String>> = regions
            .map(|region| {
                vec![
                    whose(region.pid, region.processes),
                    region.kind.clone(),
                    region.name.clone(),
                    format!("{}-{}", region.start, region.end),
                    bytes(region.populated_pages as f64).to_string(),
                    bytes(region.written_pages as f64).to_string(),
                    rate(region.dirty_pages_per_second).to_string(),
                ]
            })
            .collect();
        if !regions.is_empty() {
            text.push('\n');
            let head = ["pid", "kind", "name", "addresses", "in memory", "written", "dirty rate"];
            text.push_str(&table(&head, &[0, 4, 5, 6], regions));
        }
        text
    }
}

/// Rows of the working set at the windows that people ask for.
fn windows(estimator: &Estimator) -> Vec<Vec<String>> {
    let curve = estimator.curve();
    // Shorter windows than the scans were apart were not seen.
    let shortest = curve.first().map_or(Duration::ZERO, |point| point.tau);
    let ends = [curve.first(), curve.last()].into_iter().flatten().map(|point| point.tau);
    let mut taus: Vec<Duration> = ends.chain(WINDOWS).collect();
    taus.sort();
    taus.dedup_by(|a, b| a.as_secs_f64() < b.as_secs_f64() * 1.1);
    taus.into_iter()
        .filter(|tau| *tau >= shortest)
        .filter_map(|tau| {
            let estimate = estimator.wws(tau)?;
            Some(vec![
                Time(tau).to_string(),
                bytes(estimate.pages).to_string(),
                format!("± {}", bytes(estimate.error)),
            ])
        })
        .collect()
}

/// Regions, the one with the highest dirty rate first.
pub(super) fn hottest(estimator: &Estimator) -> Vec<RegionUse> {
    let mut regions = estimator.regions();
    regions.sort_by(|a, b| b.pages_per_second.total_cmp(&a.pages_per_second));
    regions
}

/// The process of a region, or how many share it.
pub(super) fn whose(pid: Option<i32>, processes: u32) -> String {
    match pid {
        Some(pid) => pid.to_string(),
        None => format!("{processes} share"),
    }
}

fn region_line(region: RegionUse) -> RegionLine {
    RegionLine {
        pid: region.pid,
        processes: region.processes,
        name: region.name,
        kind: region.kind.to_string(),
        start: format!("{:#x}", region.start << 12),
        end: format!("{:#x}", region.end << 12),
        populated_pages: region.populated,
        written_pages: region.distinct,
        dirty_pages_per_second: region.pages_per_second,
    }
}

/// Rows of the working set, for the live view.
pub(super) fn working_set_rows(estimator: &Estimator) -> Vec<Vec<String>> {
    windows(estimator)
}
