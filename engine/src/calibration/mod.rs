//! What earlier migrations of this machine took, kept in a file, so that the next can be predicted.
//!
//! A freeze costs `base + per_process * (processes - 1) + per_million_pages * pages / 10^6` beside the pages that are sent in
//! it, and what is peculiar to a program (its threads, files and connections), which goes by its name. The constants are those of
//! a least-squares fit over the last runs, in which the engine's own constants ([`FreezeCost::default`]) count as a part of a run
//! of each kind: with no runs they are the answer, and with a few they do not matter. A program's own part is the mean of what
//! its runs are off by, drawn towards nothing while they are few (a ridge); so is what it has by one strategy. A run that is far
//! off counts less (Huber's weights), one that took longer sooner than one that was quicker: a machine that is busy makes freezes
//! longer, and nothing makes one shorter than it is. So does one of long ago.

mod pages;

pub use pages::PageKind;

use crate::model::{PageCost, Site};
use crate::plan::Strategy;
use crate::policy::estimate::{FreezeCost, PREFILL};
use crate::report::MigrationReport;
use pages::Pages;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Version of the file, and the oldest that can be read: its runs have no names. Before 4 nothing that is kept now was said of pages.
const SCHEMA: u32 = 4;
const OLDEST: u32 = 2;
/// Runs that are kept.
const KEPT: usize = 64;
/// Off by more than this, a run counts less, in milliseconds: one that was quicker than the others, and one that took longer.
const FAR: f64 = 5.0;
const FAR_LONGER: f64 = FAR / 2.0;
/// Runs as which the engine's own constants count, of each kind.
const OWN: f64 = 0.1;
/// Runs without anything peculiar that each program is thought to have had: right where a program differs from run to run by half as
/// much as programs do, which is a guess.
const LIKE_OTHERS: f64 = 0.25;
/// The same of a program by one strategy: strategies differ by less than runs do.
const LIKE_OTHER_WAYS: f64 = 1.0;
/// Runs after which one counts half: machines have neighbours, and their pace changes.
const HALF_LIFE: f64 = 16.0;
/// Times that the fit is made better: weights, constants and programs depend on each other.
const PASSES: u32 = 64;
/// So far a prediction of a freeze may be off when there are too few runs to know.
const UNKNOWN: Duration = Duration::from_millis(10);
/// Images of which more was left on the wire were not packed, or not all of them.
const WAS_PACKED: f64 = 0.5;
/// Runs from which on their own spread counts.
const ENOUGH: usize = 5;

/// What earlier runs took.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Calibration {
    schema: u32,
    runs: Vec<Run>,
    #[serde(default)]
    pages: Pages,
}

/// One migration that was completed.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Run {
    /// Name of the program; empty in runs of before it was written down.
    #[serde(default)]
    program: String,
    /// ... and of the strategy; empty too.
    #[serde(default)]
    strategy: String,
    processes: u32,
    resident_pages: u64,
    /// Standing still beside the last pages and the images, as if pages had come before the program went on.
    fixed_us: u64,
    /// Before the first round.
    setup_us: u64,
    /// What was left of CRIU's images on the wire, where they were packed.
    #[serde(default)]
    image_ratio: Option<f64>,
}

/// Why the file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CalibrationError {
    /// The system refused.
    #[error("could not {what} what earlier migrations took, {path}")]
    Io {
        /// Read or write.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is something else, or of a newer version.
    #[error("{path} does not hold what earlier migrations took: remove it, and it begins anew")]
    Shape {
        /// The file.
        path: PathBuf,
    },
}

impl Calibration {
    /// Reads the file; without one there were no runs.
    ///
    /// # Errors
    /// [`CalibrationError`].
    pub fn read(path: &Path) -> Result<Self, CalibrationError> {
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(source) => {
                return Err(CalibrationError::Io { what: "read", path: path.to_owned(), source });
            }
        };
        match serde_json::from_slice::<Self>(&text) {
            Ok(calibration) if (OLDEST..=SCHEMA).contains(&calibration.schema) => Ok(calibration),
            _ => Err(CalibrationError::Shape { path: path.to_owned() }),
        }
    }

    /// Writes the file whole: it is the old one or the new one at any moment.
    ///
    /// # Errors
    /// [`CalibrationError`].
    pub fn write(&self, path: &Path) -> Result<(), CalibrationError> {
        let failed = |source| CalibrationError::Io { what: "write", path: path.to_owned(), source };
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(failed)?;
        }
        let draft = path.with_extension(format!("{}.tmp", std::process::id()));
        let written = fs::File::create(&draft)
            .and_then(|mut file| file.write_all(&serde_json::to_vec(self)?))
            .and_then(|()| fs::rename(&draft, path));
        written.map_err(|source| {
            let _ = fs::remove_file(&draft);
            failed(source)
        })
    }

    /// Takes in a migration, if it was completed into another machine's memory and says something.
    pub fn learn(&mut self, report: &MigrationReport) {
        let down = &report.downtime_us;
        let Some(strategy) = Strategy::ALL.into_iter().find(|strategy| strategy.name() == report.strategy)
        else {
            return;
        };
        if report.outcome != "completed"
            || report.verified
            || report.paused_us > 0
            // Slower than it could be.
            || report.max_slowdown.is_some()
            || report.interruptions > 0
            // By hand: a round was cut short.
            || (report.stop_reason == "post-copy" && strategy != Strategy::PostCopy)
            || down.total == 0
        {
            return;
        }
        self.schema = SCHEMA;
        self.pages.learn(report, strategy);
        // Its freeze has all of the memory in it: what it costs besides is not to be told from that.
        if strategy == Strategy::StopAndCopy {
            return;
        }
        let rounds = || report.rounds.iter().filter(|round| !round.frozen);
        let not_filled = match strategy.owes() && rounds().next().is_none() {
            true => PREFILL.as_micros() as u64,
            false => 0,
        };
        let image_ratio = report.image_bytes as f64 / report.image_file_bytes.max(1) as f64;
        self.runs.push(Run {
            image_ratio: Some(image_ratio).filter(|ratio| *ratio < WAS_PACKED),
            program: report.program.clone(),
            strategy: report.strategy.clone(),
            processes: report.processes,
            resident_pages: report.memory_bytes / 4096,
            fixed_us: not_filled + down.total.saturating_sub(down.last_pages + down.images),
            setup_us: report
                .total_us
                .saturating_sub(down.total + rounds().map(|round| round.duration_us).sum::<u64>()),
        });
        let more = self.runs.len().saturating_sub(KEPT);
        self.runs.drain(..more);
    }

    /// Runs that it knows of.
    pub fn runs(&self) -> usize {
        self.runs.len()
    }

    /// What a freeze of `program` costs beside the pages.
    pub fn freeze_cost(&self, program: &str) -> FreezeCost {
        self.fit().of(program, "")
    }

    /// The same by one strategy.
    pub fn freeze_cost_by(&self, program: &str, strategy: Strategy) -> FreezeCost {
        self.fit().of(program, strategy.name())
    }

    /// The constants, and what is peculiar to each program.
    fn fit(&self) -> Fit {
        let own = FreezeCost::default();
        let constants = [ms(own.base), ms(own.per_process), ms(own.per_million_pages)];
        let mut fit = Fit { constants, peculiar: BTreeMap::new(), ways: BTreeMap::new() };
        // One process without memory, ten of them, and one with a million pages.
        let owns = [(1, 0), (10, 0), (1, 1_000_000)];
        for _ in 0..PASSES {
            let runs = self.runs.iter().rev().enumerate().map(|(age, run)| {
                let off = fit.off(run);
                let far = if off > 0.0 { FAR_LONGER } else { FAR };
                (run, (-(age as f64) / HALF_LIFE).exp2() * (far / off.abs()).min(1.0))
            });
            let runs: Vec<(&Run, f64)> = runs.collect();
            let points = owns
                .map(|(processes, pages)| {
                    let x = terms(processes, pages);
                    (x, dot(&x, &constants), OWN)
                })
                .into_iter()
                .chain(runs.iter().map(|(run, weight)| {
                    (run.terms(), run.fixed_us as f64 / 1e3 - fit.peculiar_to(run), *weight)
                }));
            let Some(better) = least_squares(points) else { break };
            fit.constants = better.map(|value| value.max(0.0));
            let named: Vec<&(&Run, f64)> = runs.iter().filter(|(run, _)| !run.program.is_empty()).collect();
            let off = |run: &Run| run.fixed_us as f64 / 1e3 - dot(&run.terms(), &fit.constants);
            let programs = || named.iter().map(|(run, weight)| (run.program.clone(), off(run), *weight));
            let peculiar = means(programs(), LIKE_OTHERS);
            // What its strategies differ by, and nothing that it has by all of them.
            let usual = means(programs(), 0.0);
            let ways = means(
                named.iter().map(|(run, weight)| (run.way(), off(run) - usual[&run.program], *weight)),
                LIKE_OTHER_WAYS,
            );
            (fit.peculiar, fit.ways) = (peculiar, ways);
        }
        fit
    }

    /// How far that is off in four of five runs.
    pub fn spread(&self) -> Duration {
        if self.runs.len() < ENOUGH {
            return UNKNOWN;
        }
        let fit = self.fit();
        let mut off: Vec<f64> = self.runs.iter().map(|run| fit.off(run).abs()).collect();
        off.sort_by(f64::total_cmp);
        Duration::from_secs_f64(off[off.len() * 4 / 5] / 1e3)
    }

    /// Whether it is known what a page of `program` takes, where `bytes` of it are left on the wire.
    pub fn knows(&self, kind: PageKind, program: &str, bytes: f64) -> bool {
        self.pages.own(kind, program, bytes).is_some()
    }

    /// `site` with what is known of this machine, and of `program`. What a page takes is what it took in the program's own
    /// migrations, where the processors decided it and as much was left of a page; otherwise it is the pace of the quickest fifth of
    /// all migrations.
    pub fn site(&self, site: Site, program: &str) -> Site {
        let Site { first, again, anew, .. } = site;
        let own = |kind, cost: PageCost| self.pages.own(kind, program, cost.bytes);
        let of = |kind, cost| own(kind, cost).or_else(|| self.pages.quickest(kind));
        let takes =
            |cost: PageCost, seen: Option<Duration>| PageCost { time: seen.unwrap_or(cost.time), ..cost };
        let first_takes = takes(first, of(PageKind::First, first));
        let late = self.pages.quickest(PageKind::Late).unwrap_or(site.late).max(first_takes.time);
        let mut setups: Vec<u64> = self.runs.iter().map(|run| run.setup_us).collect();
        setups.sort_unstable();
        let mut own_runs = self.runs.iter().rev().filter(|run| run.program == program);
        let image_ratio = own_runs.find_map(|run| run.image_ratio);
        Site {
            image_ratio: image_ratio.unwrap_or(site.image_ratio),
            freeze: self.freeze_cost(program),
            setup: setups.get(setups.len() / 2).map_or(site.setup, |us| Duration::from_micros(*us)),
            first: first_takes,
            again: takes(again, of(PageKind::Again, again)),
            anew: takes(anew, of(PageKind::Again, again)),
            still: own(PageKind::Still, first).or(site.still),
            late: own(PageKind::Late, first).unwrap_or(late),
            place: self.pages.usual(PageKind::Place).unwrap_or(site.place),
            place_beside: self.pages.usual(PageKind::PlaceBeside).unwrap_or(site.place_beside),
            ..site
        }
    }
}

/// The mean of each name's values `(name, value, weight)`, with `none` more of zero.
fn means<K: Ord>(values: impl Iterator<Item = (K, f64, f64)>, none: f64) -> BTreeMap<K, f64> {
    let mut sums: BTreeMap<K, (f64, f64)> = BTreeMap::new();
    for (name, value, weight) in values {
        let (sum, weights) = sums.entry(name).or_default();
        *sum += weight * value;
        *weights += weight;
    }
    sums.into_iter().map(|(name, (sum, weights))| (name, sum / (weights + none))).collect()
}

impl Run {
    /// Its program, and how it was moved.
    fn way(&self) -> (String, String) {
        (self.program.clone(), self.strategy.clone())
    }

    fn terms(&self) -> [f64; 3] {
        terms(self.processes, self.resident_pages)
    }
}

/// What was made of the runs, in milliseconds.
struct Fit {
    /// As in [`terms`].
    constants: [f64; 3],
    /// By the names of programs.
    peculiar: BTreeMap<String, f64>,
    /// What is left of that, by programs and strategies.
    ways: BTreeMap<(String, String), f64>,
}

impl Fit {
    fn peculiar_to(&self, run: &Run) -> f64 {
        self.peculiar(&run.program, &run.strategy)
    }

    fn peculiar(&self, program: &str, strategy: &str) -> f64 {
        let way = self.ways.get(&(program.to_owned(), strategy.to_owned()));
        self.peculiar.get(program).copied().unwrap_or(0.0) + way.copied().unwrap_or(0.0)
    }

    /// A run took so much more.
    fn off(&self, run: &Run) -> f64 {
        run.fixed_us as f64 / 1e3 - dot(&run.terms(), &self.constants) - self.peculiar_to(run)
    }

    fn of(&self, program: &str, strategy: &str) -> FreezeCost {
        let time = |ms: f64| Duration::from_secs_f64(ms.max(0.0) / 1e3);
        let [base, per_process, per_million_pages] = self.constants;
        FreezeCost {
            base: time(base + self.peculiar(program, strategy)),
            per_process: time(per_process),
            per_million_pages: time(per_million_pages),
        }
    }
}

fn terms(processes: u32, pages: u64) -> [f64; 3] {
    [1.0, f64::from(processes.saturating_sub(1)), pages as f64 / 1e6]
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn dot(a: &[f64; 3], b: &[f64; 3]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The normal equations of weighted points `(x, y, weight)`, by Gauss's elimination with pivots.
fn least_squares(points: impl Iterator<Item = ([f64; 3], f64, f64)>) -> Option<[f64; 3]> {
    let mut matrix = [[0.0; 4]; 3];
    for (x, y, weight) in points {
        for row in 0..3 {
            for column in 0..3 {
                matrix[row][column] += weight * x[row] * x[column];
            }
            matrix[row][3] += weight * x[row] * y;
        }
    }
    for column in 0..3 {
        let pivot =
            (column..3).max_by(|a, b| matrix[*a][column].abs().total_cmp(&matrix[*b][column].abs()))?;
        if matrix[pivot][column].abs() < 1e-9 {
            return None;
        }
        matrix.swap(column, pivot);
        let head = matrix[column];
        for (_, row) in matrix.iter_mut().enumerate().filter(|(row, _)| *row != column) {
            let factor = row[column] / head[column];
            row.iter_mut().zip(head).for_each(|(value, of_head)| *value -= factor * of_head);
        }
    }
    Some([0, 1, 2].map(|row| matrix[row][3] / matrix[row][row]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Downtime, RoundReport};

    fn report(processes: u32, pages: u64, fixed_us: u64) -> MigrationReport {
        MigrationReport {
            outcome: "completed".to_owned(),
            strategy: "pre-copy".to_owned(),
            processes,
            memory_bytes: pages * 4096,
            total_us: fixed_us + 7_000 + 200_000 + 30_000,
            downtime_us: Downtime {
                total: fixed_us + 7_000,
                last_pages: 5_000,
                images: 2_000,
                ..Downtime::default()
            },
            rounds: vec![RoundReport {
                dirty_pages: 100_000,
                duration_us: 200_000,
                ..RoundReport::default()
            }],
            ..MigrationReport::default()
        }
    }

    fn cost(base: u64, per_process: u64, per_million: u64) -> impl Fn(u32, u64) -> u64 {
        move |processes, pages| {
            base + per_process * u64::from(processes - 1) + per_million * pages / 1_000_000
        }
    }

    #[test]
    fn without_runs_the_constants_of_the_engine_hold() {
        let (none, own) = (Calibration::default(), FreezeCost::default());
        for (processes, pages) in [(1, 0), (3, 500_000), (200, 10_000_000)] {
            let fitted = none.freeze_cost("any").of(processes, pages).as_secs_f64();
            assert!((fitted / own.of(processes, pages).as_secs_f64() - 1.0).abs() < 1e-6);
        }
        assert_eq!(none.spread(), UNKNOWN);
        assert_eq!(none.site(Site::default(), "any").first, Site::default().first);
    }

    #[test]
    fn a_machine_that_differs_is_learned_also_when_one_run_is_far_off() {
        let truth = cost(90_000, 2_000, 10_000);
        let mut calibration = Calibration::default();
        for run in 0..40u64 {
            let (processes, pages) = (1 + (run % 4) as u32, (run % 5) * 200_000);
            let busy = if run == 17 { 900_000 } else { 0 };
            calibration.learn(&report(processes, pages, truth(processes, pages) + busy));
        }
        let learned = calibration.freeze_cost("any");
        for (processes, pages) in [(1, 0), (2, 800_000), (4, 200_000)] {
            let (got, wanted) = (ms(learned.of(processes, pages)), truth(processes, pages) as f64 / 1e3);
            assert!(
                (got - wanted).abs() < 4.0,
                "{processes} processes, {pages} pages: {got} ms, not {wanted}"
            );
        }
        assert!(calibration.spread() < Duration::from_millis(5), "{:?}", calibration.spread());
        let site = calibration.site(Site::default(), "any");
        assert_eq!(site.first.time, Duration::from_nanos(2000));
        assert_eq!(site.setup, Duration::from_millis(30));
    }

    #[test]
    fn a_freeze_that_took_twice_as_long_says_less_than_the_one_before() {
        let named =
            |fixed_us| MigrationReport { program: "pattern".to_owned(), ..report(1, 60_000, fixed_us) };
        for order in [[24_000, 61_000], [61_000, 24_000]] {
            let mut calibration = Calibration::default();
            order.iter().for_each(|fixed_us| calibration.learn(&named(*fixed_us)));
            let learned = ms(calibration.freeze_cost("pattern").of(1, 60_000));
            assert!((22.0..29.0).contains(&learned), "{order:?}: {learned} ms");
            (0..3).for_each(|_| calibration.learn(&named(61_000)));
            let learned = ms(calibration.freeze_cost("pattern").of(1, 60_000));
            assert!(learned > 52.0, "it is slower now: {learned} ms");
        }
    }

    #[test]
    fn a_program_has_its_own_part_and_the_first_runs_of_another_do_not_have_it() {
        let named = |program: &str, fixed_us| MigrationReport {
            program: program.to_owned(),
            ..report(1, 60_000, fixed_us)
        };
        let mut calibration = Calibration::default();
        let cost =
            |calibration: &Calibration, program: &str| ms(calibration.freeze_cost(program).of(1, 60_000));
        for run in 0..8 {
            calibration.learn(&named("plain", 11_000 + run % 3 * 1000));
        }
        let others = cost(&calibration, "threads");
        assert!((others - 12.0).abs() < 1.0, "{others} ms: that of programs in general");
        calibration.learn(&named("threads", 26_000));
        let once = cost(&calibration, "threads");
        assert!(once > 20.0, "{once} ms after one run");
        (0..3).for_each(|_| calibration.learn(&named("threads", 26_000)));
        let (threads, plain) = (cost(&calibration, "threads"), cost(&calibration, "plain"));
        assert!((threads - 26.0).abs() < 2.0 && (plain - 12.0).abs() < 1.0, "{threads} and {plain} ms");
        assert!(calibration.spread() < Duration::from_millis(3), "{:?}", calibration.spread());
    }

    #[test]
    fn a_program_that_stands_still_for_longer_by_one_strategy_is_expected_to() {
        let by = |strategy: Strategy, fixed_us| MigrationReport {
            program: "server".to_owned(),
            strategy: strategy.name().to_owned(),
            ..report(1, 60_000, fixed_us)
        };
        let mut calibration = Calibration::default();
        let cost = |calibration: &Calibration, strategy| {
            ms(calibration.freeze_cost_by("server", strategy).of(1, 60_000))
        };
        for run in 0..6 {
            calibration.learn(&by(Strategy::PreCopy, 30_000 + run % 3 * 500));
            calibration.learn(&by(Strategy::Hybrid, 24_000 + run % 3 * 500));
        }
        let (rounds, late) = (cost(&calibration, Strategy::PreCopy), cost(&calibration, Strategy::Hybrid));
        assert!((29.5..31.5).contains(&rounds) && (24.0..26.0).contains(&late), "{rounds} and {late} ms");
        let not_known = cost(&calibration, Strategy::PostCopy);
        assert!(
            late + 1.0 < not_known && not_known + 1.0 < rounds,
            "{not_known} ms: as the program in general"
        );
    }

    #[test]
    fn every_strategy_says_what_a_freeze_costs_but_one_that_copies_all_in_it() {
        let mut calibration = Calibration::default();
        for (strategy, rounds, fixed_us) in [
            ("pre-copy", 1, 30_000),
            ("hybrid", 1, 30_000),
            ("post-copy", 0, 25_000),
            ("stop-and-copy", 1, 30_000),
        ] {
            let report = report(1, 1000, fixed_us);
            let rounds = report.rounds.iter().take(rounds).cloned().collect();
            let stop_reason = strategy.to_owned();
            calibration.learn(&MigrationReport {
                strategy: strategy.to_owned(),
                rounds,
                stop_reason,
                ..report
            });
        }
        assert_eq!(calibration.runs.iter().map(|run| run.fixed_us).collect::<Vec<_>>(), [30_000; 3]);
    }

    #[test]
    fn the_pace_of_a_slow_link_is_not_taken_for_the_machine_s() {
        let mut calibration = Calibration::default();
        let mut slow = report(1, 1000, 40_000);
        slow.rounds[0].duration_us = 3_500_000;
        (0..10).for_each(|_| calibration.learn(&slow));
        assert_eq!(calibration.site(Site::default(), "any").first, Site::default().first);
    }

    #[test]
    fn only_whole_migrations_are_learned_from_and_only_so_many_kept() {
        let mut calibration = Calibration::default();
        for other in [
            MigrationReport { outcome: "rolled-back".to_owned(), ..report(1, 1, 1) },
            MigrationReport { strategy: "checkpoint".to_owned(), ..report(1, 1, 1) },
            MigrationReport { verified: true, ..report(1, 1, 1) },
            MigrationReport { paused_us: 1, ..report(1, 1, 1) },
            MigrationReport { interruptions: 1, ..report(1, 1, 1) },
            MigrationReport { stop_reason: "post-copy".to_owned(), ..report(1, 1, 1) },
        ] {
            calibration.learn(&other);
        }
        assert_eq!(calibration.runs(), 0);
        (0..100).for_each(|run| calibration.learn(&report(1, run, 40_000)));
        assert_eq!(calibration.runs(), KEPT);
    }

    #[test]
    fn it_is_kept_in_a_file_and_another_file_is_not_taken_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/calibration.json");
        assert_eq!(Calibration::read(&path).unwrap().runs(), 0, "there is none yet");
        let mut calibration = Calibration::default();
        calibration.learn(&report(2, 300, 50_000));
        calibration.write(&path).unwrap();
        let again = Calibration::read(&path).unwrap();
        assert_eq!((again.runs(), again.freeze_cost("any").base), (1, calibration.freeze_cost("any").base));
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no draft is left");
        let older = r#"{"schema":2,"runs":[{"processes":1,"resident_pages":9,"fixed_us":7,"image_bytes":1,"setup_us":1,"first_ns":null,"again_ns":null}]}"#;
        fs::write(&path, older).unwrap();
        assert_eq!(Calibration::read(&path).unwrap().runs(), 1, "of the version before");
        for wrong in ["", "{}", "{\"schema\":9,\"runs\":[]}"] {
            fs::write(&path, wrong).unwrap();
            let error = Calibration::read(&path).unwrap_err().to_string();
            assert!(error.contains("calibration.json") && error.contains("remove it"), "{error}");
        }
        let folder = Calibration::read(dir.path()).unwrap_err().to_string();
        assert!(folder.contains("could not read"), "{folder}");
    }
}
