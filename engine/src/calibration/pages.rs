//! What a page took in earlier migrations, where the processors and not the link decided it.

use super::KEPT;
use crate::plan::Strategy;
use crate::report::{MigrationReport, RoundReport};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Fewer pages say nothing of what one takes.
const ENOUGH: u64 = 4096;
/// Rounds of fewer are left out where pages went again.
const LARGE_ROUND: u64 = 1024;
/// Nanoseconds of a page, half a GB a second: what was quicker no link has held up that anybody would notice.
const BY_THE_MACHINE: f64 = 8192.0;
/// What was held up for less than this share of its time was not held up by the link: what it took is the processors'.
const HELD_UP: f64 = 0.75;
/// Bytes of a page that are off by this factor are those of another coding, which takes another time.
const ALIKE: f64 = 1.5;
/// The last runs of a program that count.
const LAST: usize = 5;

/// What is done with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PageKind {
    /// It is sent for the first time, while the program runs.
    First,
    /// It was sent before, and was written since.
    Again,
    /// It is sent for the first time, while the program stands still.
    Still,
    /// It is sent while the program runs at the destination.
    Late,
    /// It has arrived before the program runs, and is put in place then.
    Place,
    /// The same behind a freeze from which others follow: hybrid.
    PlaceBeside,
}

/// Pages of one migration.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Seen {
    program: String,
    kind: PageKind,
    /// Nanoseconds of one.
    ns: f64,
    /// Bytes of one on the wire, on average.
    bytes: f64,
    /// It was so quick that no link can have held it up, whoever's pages they were.
    of_all: bool,
}

/// What pages took in the last migrations, oldest first.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Pages(Vec<Seen>);

impl Pages {
    /// Takes in what `report`, of a whole migration, says of pages.
    pub(super) fn learn(&mut self, report: &MigrationReport, strategy: Strategy) {
        let rounds = || report.rounds.iter().filter(|round| !round.frozen);
        // Pages that go for the first time: a sample of them, and the others.
        let first = 1 + rounds().take_while(|round| round.left_pages > 0).count();
        self.learn_rounds(report, PageKind::First, &mut rounds().take(first));
        let large = |round: &&RoundReport| round.dirty_pages > LARGE_ROUND;
        self.learn_rounds(report, PageKind::Again, &mut rounds().skip(first).filter(large));
        let after = report.complete_us.saturating_sub(report.total_us) as f64;
        match (strategy, &report.post_copy) {
            (Strategy::PostCopy, Some(late)) if late.reconnections == 0 => {
                let pages = late.demanded_pages + late.pushed_pages;
                self.add(report, PageKind::Late, (pages, after, late.sent_bytes), late.held_up);
            }
            (Strategy::StopAndCopy | Strategy::PreCopy, None) if report.complete_us > 0 => {
                // No link has a part in it.
                self.add(report, PageKind::Place, (report.memory_bytes / 4096, after, 0), Some(0.0));
            }
            (Strategy::Hybrid, Some(late)) if late.reconnections == 0 && report.complete_us > 0 => {
                let pages = (report.memory_bytes / 4096).saturating_sub(late.owed_pages);
                let after = (after - late.duration_us as f64).max(0.0);
                self.add(report, PageKind::PlaceBeside, (pages, after, 0), Some(0.0));
            }
            _ => {}
        }
        if strategy == Strategy::StopAndCopy
            && let Some(round) = report.rounds.iter().find(|round| round.frozen)
        {
            let took = report.downtime_us.last_pages as f64;
            self.add(
                report,
                PageKind::Still,
                (round.dirty_pages, took, round.codings_bytes()),
                round.held_up,
            );
        }
    }

    fn learn_rounds(
        &mut self,
        report: &MigrationReport,
        kind: PageKind,
        rounds: &mut dyn Iterator<Item = &RoundReport>,
    ) {
        let (mut pages, mut time, mut bytes, mut held_up) = (0, 0.0, 0, Some(0.0));
        for round in rounds {
            pages += round.dirty_pages.saturating_sub(round.held_pages + round.unchanged_pages);
            time += round.duration_us as f64;
            bytes += round.sent_bytes;
            held_up = held_up.zip(round.held_up).map(|(sum, share)| sum + share * round.duration_us as f64);
        }
        self.add(report, kind, (pages, time, bytes), held_up.map(|sum| sum / time.max(1.0)));
    }

    fn add(
        &mut self,
        report: &MigrationReport,
        kind: PageKind,
        (pages, us, bytes): (u64, f64, u64),
        held_up: Option<f64>,
    ) {
        let ns = us * 1e3 / pages.max(1) as f64;
        let of_all = ns <= BY_THE_MACHINE;
        if pages < ENOUGH || !(of_all || held_up.is_some_and(|share| share < HELD_UP)) {
            return;
        }
        let bytes = bytes as f64 / pages as f64;
        self.0.push(Seen { program: report.program.clone(), kind, ns, bytes, of_all });
        let mut more = self.of(kind).count().saturating_sub(KEPT);
        self.0.retain(|seen| {
            let goes = seen.kind == kind && more > 0;
            more -= usize::from(goes);
            !goes
        });
    }

    fn of(&self, kind: PageKind) -> impl DoubleEndedIterator<Item = &Seen> {
        self.0.iter().filter(move |seen| seen.kind == kind)
    }

    /// What a page of this program took in its own last migrations, in those where pages became about as small: the median.
    pub(super) fn own(&self, kind: PageKind, program: &str, bytes: f64) -> Option<Duration> {
        let alike = |seen: &&Seen| {
            seen.program == program && seen.bytes <= bytes * ALIKE && bytes <= seen.bytes * ALIKE
        };
        share(self.of(kind).rev().filter(alike).take(LAST), 0.5)
    }

    /// ... and of any program: that of the quickest fifth of the migrations, because the others were held up by their links or had
    /// pages that are hard to compress.
    pub(super) fn quickest(&self, kind: PageKind) -> Option<Duration> {
        share(self.of(kind).filter(|seen| seen.of_all), 0.2)
    }

    /// ... in half of the migrations, where no link has a part in it.
    pub(super) fn usual(&self, kind: PageKind) -> Option<Duration> {
        share(self.of(kind).rev().take(LAST), 0.5)
    }
}

/// The time below which this share of them lies.
fn share<'a>(seen: impl Iterator<Item = &'a Seen>, share: f64) -> Option<Duration> {
    let mut times: Vec<f64> = seen.map(|seen| seen.ns).collect();
    times.sort_by(f64::total_cmp);
    let at = (times.len() as f64 * share) as usize;
    times.get(at).map(|ns| Duration::from_nanos(*ns as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Codings, Downtime, PostCopyReport, Share};

    const PAGES: u64 = 100_000;

    /// A round in which each of many pages took so many microseconds and bytes.
    fn round(us: u64, bytes: u64, held_up: Option<f64>) -> RoundReport {
        let raw = Share { pages: PAGES, bytes: PAGES * bytes };
        RoundReport {
            dirty_pages: PAGES,
            duration_us: PAGES * us,
            sent_bytes: PAGES * bytes,
            codings: Codings { raw, ..Codings::default() },
            held_up,
            ..RoundReport::default()
        }
    }

    fn of(program: &str, rounds: Vec<RoundReport>) -> MigrationReport {
        MigrationReport { program: program.to_owned(), rounds, ..MigrationReport::default() }
    }

    fn us(time: Option<Duration>) -> Option<u64> {
        time.map(|time| time.as_micros() as u64)
    }

    #[test]
    fn what_the_processors_decided_is_known_of_the_program_and_what_the_link_did_is_not() {
        let mut pages = Pages::default();
        pages.learn(&of("redis", vec![round(13, 1400, Some(0.4))]), Strategy::PreCopy);
        for held_up in [Some(0.98), None] {
            pages.learn(&of("redis", vec![round(40, 1400, held_up)]), Strategy::PreCopy);
        }
        assert_eq!(us(pages.own(PageKind::First, "redis", 1500.0)), Some(13));
        assert_eq!(pages.own(PageKind::First, "redis", 4100.0), None, "pages that are not compressed");
        assert_eq!(pages.own(PageKind::First, "other", 1500.0), None);
        assert_eq!(pages.quickest(PageKind::First), None, "another program's pages may be quicker");
        pages.learn(&of("other", vec![round(2, 4100, Some(0.98))]), Strategy::PreCopy);
        assert_eq!(us(pages.quickest(PageKind::First)), Some(2), "no link is as quick");
    }

    #[test]
    fn one_slow_run_among_the_last_does_not_count_and_old_ones_go() {
        let mut pages = Pages::default();
        for us in [30, 30, 30, 10, 12, 40, 11, 13] {
            pages.learn(&of("redis", vec![round(us, 1400, Some(0.4))]), Strategy::PreCopy);
        }
        assert_eq!(us(pages.own(PageKind::First, "redis", 1400.0)), Some(12));
        let again = || vec![round(1, 1400, Some(0.4)); 2];
        (0..2 * KEPT).for_each(|_| pages.learn(&of("redis", again()), Strategy::PreCopy));
        assert_eq!(pages.of(PageKind::First).count(), KEPT);
        assert_eq!(pages.of(PageKind::Again).count(), KEPT, "each kind for itself");
    }

    #[test]
    fn pages_of_a_freeze_and_late_ones_are_their_own_kinds() {
        let mut pages = Pages::default();
        let frozen = RoundReport { frozen: true, ..round(99, 1400, Some(0.3)) };
        let downtime_us = Downtime { last_pages: 9 * PAGES, ..Downtime::default() };
        let still = MigrationReport {
            downtime_us,
            memory_bytes: PAGES * 4096,
            total_us: 1_000_000,
            complete_us: 1_000_000 + 3 * PAGES,
            ..of("redis", vec![frozen])
        };
        pages.learn(&still, Strategy::StopAndCopy);
        assert_eq!(us(pages.own(PageKind::Still, "redis", 1400.0)), Some(9), "what the pages took");
        assert_eq!(us(pages.usual(PageKind::Place)), Some(3));
        assert_eq!(pages.own(PageKind::First, "redis", 1400.0), None);
        let post_copy = |reconnections| {
            Some(PostCopyReport {
                demanded_pages: 1000,
                pushed_pages: PAGES - 1000,
                sent_bytes: PAGES * 1500,
                held_up: Some(0.2),
                reconnections,
                ..PostCopyReport::default()
            })
        };
        let late = |reconnections| MigrationReport {
            post_copy: post_copy(reconnections),
            total_us: 1_000_000,
            complete_us: 1_000_000 + 18 * PAGES,
            ..of("redis", Vec::new())
        };
        pages.learn(&late(1), Strategy::PostCopy);
        assert_eq!(pages.own(PageKind::Late, "redis", 1400.0), None, "the link was away");
        pages.learn(&late(0), Strategy::PostCopy);
        assert_eq!(us(pages.own(PageKind::Late, "redis", 1400.0)), Some(18));
        let hybrid = MigrationReport {
            post_copy: Some(PostCopyReport {
                owed_pages: 2000,
                duration_us: 20_000,
                ..PostCopyReport::default()
            }),
            complete_us: 1_020_000 + 4 * (PAGES - 2000),
            memory_bytes: PAGES * 4096,
            ..late(0)
        };
        pages.learn(&hybrid, Strategy::Hybrid);
        assert_eq!(
            us(pages.usual(PageKind::PlaceBeside)),
            Some(4),
            "without the time in which the others came"
        );
        assert_eq!(us(pages.usual(PageKind::Place)), Some(3));
    }

    #[test]
    fn pages_that_are_few_say_nothing() {
        let mut pages = Pages::default();
        let few = RoundReport { dirty_pages: 1000, ..round(2, 4100, Some(0.1)) };
        pages.learn(&of("small", vec![few]), Strategy::PreCopy);
        assert_eq!(pages.of(PageKind::First).count(), 0);
    }
}
