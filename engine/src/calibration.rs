//! What earlier migrations of this machine took, kept in a file, so that the next can be predicted.
//!
//! A freeze costs `base + per_process * (processes - 1) + per_million_pages * pages / 10^6` beside the pages that are sent in
//! it. The constants are those of a least-squares fit over the last runs, in which the engine's own constants
//! ([`FreezeCost::default`]) count as one run of each kind: with no runs they are the answer, and with many they do not matter.
//! A run that is far off (a machine that was busy) counts less (Huber's weights).

use crate::model::{PageCost, Site};
use crate::policy::estimate::FreezeCost;
use crate::report::MigrationReport;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Version of the file.
const SCHEMA: u32 = 2;
/// Runs that are kept.
const KEPT: usize = 64;
/// Off by more than this, a run counts less, in milliseconds.
const FAR: f64 = 5.0;
/// So far a prediction of a freeze may be off when there are too few runs to know.
const UNKNOWN: Duration = Duration::from_millis(10);
/// Nanoseconds of a page, half a GB a second: one that took longer was held up by the link, as far as can be told, and says
/// nothing about the machine.
const BY_THE_MACHINE: f64 = 8192.0;
/// Runs from which on their own spread counts.
const ENOUGH: usize = 5;

/// What earlier runs took.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Calibration {
    schema: u32,
    runs: Vec<Run>,
}

/// One migration that was completed.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Run {
    processes: u32,
    resident_pages: u64,
    /// Standing still beside the last pages and the images.
    fixed_us: u64,
    image_bytes: u64,
    /// Before the first round.
    setup_us: u64,
    /// Of the first round, and of later ones with many pages: nanoseconds of a page.
    first_ns: Option<f64>,
    again_ns: Option<f64>,
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
            Ok(calibration) if calibration.schema == SCHEMA => Ok(calibration),
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
        if report.outcome != "completed"
            || report.strategy != "pre-copy"
            || report.verified
            || report.paused_us > 0
            // Slower than it could be.
            || report.max_slowdown.is_some()
            || report.interruptions > 0
            // By hand: a round was cut short.
            || report.stop_reason == "post-copy"
            || down.total == 0
        {
            return;
        }
        let page_ns = |rounds: &mut dyn Iterator<Item = &crate::report::RoundReport>| {
            let (mut time, mut pages) = (0, 0);
            for round in rounds {
                time += round.duration_us;
                pages += round.dirty_pages - round.held_pages.min(round.dirty_pages);
            }
            (pages >= 4096).then(|| time as f64 * 1e3 / pages as f64).filter(|ns| *ns <= BY_THE_MACHINE)
        };
        let rounds = || report.rounds.iter().filter(|round| !round.frozen);
        // Pages that go for the first time: a sample of them, and the others.
        let first = 1 + rounds().take_while(|round| round.left_pages > 0).count();
        self.runs.push(Run {
            processes: report.processes,
            resident_pages: report.memory_bytes / 4096,
            fixed_us: down.total.saturating_sub(down.last_pages + down.images),
            image_bytes: report.image_bytes,
            setup_us: report
                .total_us
                .saturating_sub(down.total + rounds().map(|round| round.duration_us).sum::<u64>()),
            first_ns: page_ns(&mut rounds().take(first)),
            again_ns: page_ns(&mut rounds().skip(first).filter(|round| round.dirty_pages > 1024)),
        });
        let more = self.runs.len().saturating_sub(KEPT);
        self.runs.drain(..more);
        self.schema = SCHEMA;
    }

    /// Runs that it knows of.
    pub fn runs(&self) -> usize {
        self.runs.len()
    }

    /// What a freeze costs beside the pages.
    pub fn freeze_cost(&self) -> FreezeCost {
        let own = FreezeCost::default();
        // One process without memory, ten of them, and one with a million pages.
        let mut points: Vec<([f64; 3], f64)> = [(1, 0), (10, 0), (1, 1_000_000)]
            .map(|(processes, pages)| (terms(processes, pages), ms(own.of(processes, pages))))
            .to_vec();
        points.extend(
            self.runs.iter().map(|run| (terms(run.processes, run.resident_pages), run.fixed_us as f64 / 1e3)),
        );
        let mut fit = [ms(own.base), ms(own.per_process), ms(own.per_million_pages)];
        for _ in 0..8 {
            let weighted = points.iter().map(|(x, y)| {
                let off = (y - dot(x, &fit)).abs();
                (*x, *y, if off > FAR { FAR / off } else { 1.0 })
            });
            match least_squares(weighted) {
                Some(better) => fit = better.map(|value| value.max(0.0)),
                None => break,
            }
        }
        let time = |ms: f64| Duration::from_secs_f64(ms / 1e3);
        FreezeCost { base: time(fit[0]), per_process: time(fit[1]), per_million_pages: time(fit[2]) }
    }

    /// How far that is off in four of five runs.
    pub fn spread(&self) -> Duration {
        if self.runs.len() < ENOUGH {
            return UNKNOWN;
        }
        let cost = self.freeze_cost();
        let mut off: Vec<u64> = self
            .runs
            .iter()
            .map(|run| (cost.of(run.processes, run.resident_pages).as_micros() as u64).abs_diff(run.fixed_us))
            .collect();
        off.sort_unstable();
        Duration::from_micros(off[off.len() * 4 / 5])
    }

    /// `site` with what is known of this machine. The pace of pages is that of the quickest fifth of the runs: the others
    /// were held up by their links.
    pub fn site(&self, site: Site) -> Site {
        let quick = |what: fn(&Run) -> Option<f64>| {
            let mut values: Vec<f64> = self.runs.iter().filter_map(what).collect();
            values.sort_by(f64::total_cmp);
            values.get(values.len() / 5).map(|ns| Duration::from_nanos(*ns as u64))
        };
        let cost = |own: PageCost, seen: Option<Duration>| PageCost { time: seen.unwrap_or(own.time), ..own };
        let mut setups: Vec<u64> = self.runs.iter().map(|run| run.setup_us).collect();
        setups.sort_unstable();
        let images: u64 = self.runs.iter().map(|run| run.image_bytes).sum();
        let processes: u64 = self.runs.iter().map(|run| u64::from(run.processes)).sum();
        Site {
            freeze: self.freeze_cost(),
            setup: setups.get(setups.len() / 2).map_or(site.setup, |us| Duration::from_micros(*us)),
            first: cost(site.first, quick(|run| run.first_ns)),
            again: cost(site.again, quick(|run| run.again_ns)),
            image_bytes: if processes == 0 { site.image_bytes } else { images as f64 / processes as f64 },
            ..site
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
            image_bytes: 200_000,
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
            let fitted = none.freeze_cost().of(processes, pages).as_secs_f64();
            assert!((fitted / own.of(processes, pages).as_secs_f64() - 1.0).abs() < 1e-6);
        }
        assert_eq!(none.spread(), UNKNOWN);
        assert_eq!(none.site(Site::default()).first, Site::default().first);
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
        let learned = calibration.freeze_cost();
        for (processes, pages) in [(1, 0), (2, 800_000), (4, 200_000)] {
            let (got, wanted) = (ms(learned.of(processes, pages)), truth(processes, pages) as f64 / 1e3);
            assert!(
                (got - wanted).abs() < 4.0,
                "{processes} processes, {pages} pages: {got} ms, not {wanted}"
            );
        }
        assert!(calibration.spread() < Duration::from_millis(5), "{:?}", calibration.spread());
        let site = calibration.site(Site::default());
        assert_eq!((site.first.time, site.image_bytes > 50_000.0), (Duration::from_nanos(2000), true));
        assert_eq!(site.setup, Duration::from_millis(30));
    }

    #[test]
    fn the_pace_of_a_slow_link_is_not_taken_for_the_machine_s() {
        let mut calibration = Calibration::default();
        let mut slow = report(1, 1000, 40_000);
        slow.rounds[0].duration_us = 3_500_000;
        (0..10).for_each(|_| calibration.learn(&slow));
        assert_eq!(calibration.site(Site::default()).first, Site::default().first);
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
        assert_eq!((again.runs(), again.freeze_cost().base), (1, calibration.freeze_cost().base));
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no draft is left");
        for wrong in ["", "{}", "{\"schema\":9,\"runs\":[]}"] {
            fs::write(&path, wrong).unwrap();
            let error = Calibration::read(&path).unwrap_err().to_string();
            assert!(error.contains("calibration.json") && error.contains("remove it"), "{error}");
        }
        let folder = Calibration::read(dir.path()).unwrap_err().to_string();
        assert!(folder.contains("could not read"), "{folder}");
    }
}
