//! A migration in virtual time: the rules of the engine ([`crate::policy`]) over what a program wrote.

use super::based::Based;
use super::site::{Load, Site};
use super::trace::{Pages, Trace};
use crate::plan::{PolicyChoice, Strategy};
use crate::policy::ahead::Pass;
use crate::policy::estimate::PREFILL;
use crate::policy::goals::{Choice, Late, hoped_pace};
use crate::policy::{self, Goals, HotPages, Means, Measured, Navigator, RoundSample, StopReason};
use pageferry_tracker::{PageSet, Run as PageRun, SpaceKey};
use pageferry_wire_format::{SLOW_LINK, limits::MAX_BATCH_PAGES};
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    /// How.
    pub strategy: Strategy,
    /// Who decides between another round and the freeze.
    pub policy: PolicyChoice,
    /// Downtime to aim for.
    pub downtime: Duration,
    /// Time to aim for until all of it is there.
    pub total_time: Option<Duration>,
    /// Rounds at most.
    pub max_rounds: u32,
}

/// One round. Times are microseconds, pages 4 KiB.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Round {
    /// From 0; the last one runs in the freeze, if it has pages.
    pub round: u32,
    /// Whether the program stands still.
    pub frozen: bool,
    /// Pages that are dirty, or were never sent.
    pub dirty_pages: u64,
    /// Of these, as they were sent: they were written before the round before had read them.
    pub unchanged_pages: u64,
    /// Of the dirty ones, held back until the freeze because they are written all the time.
    pub held_pages: u64,
    /// Of a first pass, left for the next round because they were written again before their turn came
    /// ([`crate::policy::ahead`]).
    pub ahead_pages: u64,
    /// Bytes on the wire.
    pub sent_bytes: u64,
    /// From its scan to its acknowledgement.
    pub duration_us: u64,
    /// Downtime if the program were frozen instead of this round.
    pub predicted_downtime_us: u64,
}

/// What comes of it. Times are microseconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// How it was asked for.
    pub strategy: Strategy,
    /// How it went.
    pub chosen: Strategy,
    /// Why that was chosen; empty where it was asked for.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub because: String,
    /// Every round.
    pub rounds: Vec<Round>,
    /// Why the rounds ended; none without rounds.
    pub stop_reason: Option<&'static str>,
    /// Standing still.
    pub downtime_us: u64,
    /// From the start until it runs at the destination.
    pub total_us: u64,
    /// From the start until all of it is there.
    pub complete_us: u64,
    /// On the wire.
    pub bytes: u64,
    /// Share of its pace that the program loses while it runs and is being moved: first writes after a scan, and pages that
    /// it waits for.
    pub slowdown: f64,
}

/// Moves the program of `trace` as it was at `start`.
pub fn simulate(trace: &Trace, site: &Site, wish: &Wish, start: Duration) -> Outcome {
    let mut virtual_run = Run {
        trace,
        site,
        now: start,
        last: None,
        given: Pages::new(),
        sending: Pages::new(),
        read: (start, start),
        hot: BTreeMap::new(),
        based: Based::default(),
        rounds: Vec::new(),
        bytes: 0.0,
        write_faults: 0,
    };
    let (stop, choice) = match wish.strategy {
        Strategy::StopAndCopy | Strategy::PostCopy => (None, None),
        Strategy::Auto | Strategy::PreCopy | Strategy::Hybrid => {
            let (stop, choice) = virtual_run.pre_copy(wish, start);
            (Some(stop), choice)
        }
    };
    let chosen = choice.map_or(wish.strategy, |choice| choice.strategy);
    let outcome = virtual_run.freeze(chosen, start, stop, wish.strategy == Strategy::StopAndCopy);
    let because = choice.map_or_else(String::new, |choice| choice.reason.to_string());
    Outcome { strategy: wish.strategy, because, ..outcome }
}

struct Run<'a> {
    trace: &'a Trace,
    site: &'a Site,
    now: Duration,
    /// When was looked last.
    last: Option<Duration>,
    /// What the destination has, in whatever version.
    given: Pages,
    /// What the last round sent, and while it was read.
    sending: Pages,
    read: (Duration, Duration),
    hot: BTreeMap<SpaceKey, HotPages>,
    based: Based,
    rounds: Vec<Round>,
    bytes: f64,
    /// Writes to pages that a scan had protected.
    write_faults: u64,
}

/// What is to be sent.
#[derive(Default)]
struct Due {
    load: Load,
    held: u64,
    /// The program is ahead of them.
    ahead: u64,
    /// Written since the last look, whatever becomes of it.
    dirty: u64,
    pages: Pages,
}

/// Parts of a round in which pages are taken as read at the same time.
const PARTS: u32 = 8;
/// ... and of a first pass, from which what is written until then is left out.
const FIRST_PARTS: u32 = 32;

impl Run<'_> {
    fn pre_copy(&mut self, wish: &Wish, began: Duration) -> (StopReason, Option<Choice>) {
        let goals = Goals { downtime: wish.downtime, total_time: wish.total_time };
        let mut navigator = Navigator::new(
            goals,
            Means {
                strategy: wish.strategy,
                policy: wish.policy,
                max_rounds: wish.max_rounds,
                cost: self.site.freeze,
                late: Late::WhereItHelps,
                hoped_pace: hoped_pace(self.site.first.time, self.site.bandwidth),
            },
        );
        // Deltas that are small are sent and not held back (`source/precopy`).
        let hold = navigator.policy().holds_back() && self.site.again.bytes * 2.0 > 4096.0;
        let leaves = navigator.policy().holds_back() && self.site.carry(1.0) >= SLOW_LINK;
        let mut first_pass = true;
        let mut measured = None;
        for round in 0.. {
            let start = self.now;
            let mut due = self.look(hold);
            let existing = self.trace.existing(start);
            let sample = RoundSample {
                round,
                todo_pages: due.load.pages() + due.held,
                hot_pages: due.held,
                dirty_pages: due.dirty,
                since_last: self.last.map_or(Duration::ZERO, |last| start - last),
                processes: existing.len() as u32,
                resident_pages: count(&existing),
                measured,
            };
            let course = navigator.decide(&sample, self.site.setup + (start - began));
            let decision = course.decision;
            if let Some(stop) = decision.stop {
                for (key, pages) in &due.pages {
                    self.hot.entry(*key).or_default().put_back(pages);
                }
                return (stop, course.choice);
            }
            if let Some(most) = course.most {
                due = self.part(due, most);
            }
            if round == 0 && leaves {
                due = self.ahead(due);
            }
            if self.site.carry(1.0) >= SLOW_LINK || !first_pass {
                self.based.sent(&due.pages, first_pass, count(&existing));
            }
            first_pass &= course.most.is_some();
            let sendable = due.load.pages();
            self.last = Some(start);
            let (time, bytes) = self.site.send(due.load);
            let acknowledged = time + self.site.round_trip;
            self.now = start + acknowledged + self.site.round_overhead;
            self.bytes += bytes;
            for (key, pages) in &due.pages {
                self.given.entry(*key).or_default().absorb(pages.clone());
            }
            (self.sending, self.read) =
                (due.pages, (start + self.site.round_overhead, start + self.site.round_overhead + time));
            if policy::says_the_pace(sendable) || measured.is_none() {
                measured = Some(Measured {
                    pages_per_second: sendable.max(1) as f64 / acknowledged.as_secs_f64().max(1e-6),
                    bytes_per_second: bytes / acknowledged.as_secs_f64().max(1e-6),
                    round_overhead: self.site.round_overhead + self.site.round_trip,
                });
            }
            self.rounds.push(Round {
                round,
                frozen: false,
                dirty_pages: sendable + due.held,
                unchanged_pages: due.load.unchanged,
                held_pages: due.held,
                ahead_pages: due.ahead,
                sent_bytes: bytes as u64,
                duration_us: (self.now - start).as_micros() as u64,
                predicted_downtime_us: decision.predicted_downtime.as_micros() as u64,
            });
        }
        unreachable!("the policy ends the rounds at the limit")
    }

    /// What a scan finds now, and what of it is to be sent.
    fn look(&mut self, hold: bool) -> Due {
        let existing = self.trace.existing(self.now);
        let written = match self.last {
            Some(last) => self.trace.written(last, self.now),
            None => Pages::new(),
        };
        let kept = self.kept();
        self.given.retain(|key, _| existing.contains_key(key));
        let mut due = Due::default();
        for (key, populated) in existing.iter() {
            let given = self.given.entry(*key).or_default();
            let missing = populated.subtract(given);
            let dirty = written.get(key).map_or_else(PageSet::default, |pages| pages.intersect(populated));
            self.write_faults += dirty.len();
            due.dirty += dirty.len();
            let hot = self.hot.entry(*key).or_default();
            let pages = hot.look(&dirty.union(&missing), &dirty, populated, hold);
            due.held += hot.held().len();
            let first = pages.subtract(given).len();
            due.load.first += first;
            // As the destination has it: dirty again is what is not, and is not new to it.
            let unchanged = kept.get(key).map_or_else(PageSet::default, |kept| kept.intersect(&pages));
            due.load.unchanged += unchanged.len();
            let again = pages.intersect(given).subtract(&unchanged);
            let based = self.based.among(*key, &again);
            due.load.again += based;
            due.load.anew += again.len() - based;
            due.pages.insert(*key, pages);
        }
        due
    }

    /// So many pages of a first round, in which all pages are new; the others are found at the next look.
    fn part(&mut self, due: Due, most: u64) -> Due {
        let mut part = Due { held: due.held, dirty: due.dirty, ..Due::default() };
        for (key, pages) in due.pages {
            let (now, later) = pages.split(most - part.load.first);
            part.load.first += now.len();
            part.pages.insert(key, now);
            self.hot.entry(key).or_default().put_back(&later);
        }
        part
    }

    /// What is left to send of a first pass without the pages that the program is ahead of ([`crate::policy::ahead`]); those are
    /// found at the next look.
    fn ahead(&self, due: Due) -> Due {
        let mut sent = Due { held: due.held, dirty: due.dirty, ..Due::default() };
        let mut pass = Pass::new(due.load.first);
        let mut at = self.now + self.site.round_overhead;
        for part in 0..FIRST_PARTS {
            let mut parts: Vec<_> =
                due.pages.iter().map(|(key, pages)| (*key, share_of(pages, (part, FIRST_PARTS)))).collect();
            let whole: u64 = parts.iter().map(|(_, mine)| mine.len()).sum();
            // In the middle of the part.
            let middle = at + self.site.send(Load { first: whole, ..Load::default() }).0 / 2;
            let written = self.trace.written(self.now, middle);
            for (key, mine) in &mut parts {
                let written =
                    written.get(key).map_or_else(PageSet::default, |written| mine.intersect(written));
                *mine = mine.subtract(&left_of(mine, &written, (&mut pass, middle - self.now)));
            }
            let rest = parts.iter().map(|(_, mine)| mine.len()).sum();
            at += self.site.send(Load { first: rest, ..Load::default() }).0;
            sent.load.first += rest;
            sent.ahead += whole - rest;
            parts.into_iter().for_each(|(key, mine)| sent.pages.entry(key).or_default().absorb(mine));
        }
        sent
    }

    /// Pages that the last round sent and that were not written since they were read.
    fn kept(&self) -> Pages {
        let mut kept = Pages::new();
        let (from, to) = self.read;
        for part in 0..PARTS {
            // In the middle of the part.
            let at = from + (to - from) * (2 * part + 1) / (2 * PARTS);
            let written = self.trace.written(at, self.now);
            for (key, sent) in &self.sending {
                let mine = share_of(sent, (part, PARTS));
                let rest = match written.get(key) {
                    Some(written) => mine.subtract(written),
                    None => mine,
                };
                kept.entry(*key).or_default().absorb(rest);
            }
        }
        kept
    }

    /// The program stands still, and goes on at the other side. `waits`: for memory there, before it does.
    fn freeze(
        mut self,
        strategy: Strategy,
        start: Duration,
        stop: Option<StopReason>,
        waits: bool,
    ) -> Outcome {
        let ran = self.now - start;
        let existing = self.trace.existing(self.now);
        // Nothing is held back any more: everything that the destination does not have as it is now.
        let due = self.look(false);
        let resident = count(&existing);
        let (mut downtime, bytes) =
            self.site.stand(existing.len() as u32, resident, self.trace.in_images(self.now));
        self.bytes += bytes;
        let pages = due.load.pages();
        let late = matches!(strategy, Strategy::PostCopy | Strategy::Hybrid);
        let (time, bytes) = match (late, waits) {
            (true, _) => self.site.fill(due.load),
            (false, true) => self.site.send_still(due.load),
            (false, false) => self.site.send(due.load),
        };
        self.bytes += bytes;
        let mut fill = Duration::ZERO;
        let mut waited = Duration::ZERO;
        let mut to_place = resident;
        match strategy {
            Strategy::Auto | Strategy::StopAndCopy | Strategy::PreCopy => {
                downtime += time;
                self.rounds.push(Round {
                    round: self.rounds.len() as u32,
                    frozen: true,
                    dirty_pages: pages,
                    unchanged_pages: due.load.unchanged,
                    held_pages: 0,
                    ahead_pages: 0,
                    sent_bytes: bytes as u64,
                    duration_us: time.as_micros() as u64,
                    predicted_downtime_us: downtime.as_micros() as u64,
                });
            }
            Strategy::PostCopy | Strategy::Hybrid => {
                if self.rounds.is_empty() {
                    // Nothing has come that could be put in place.
                    downtime = downtime.saturating_sub(PREFILL);
                }
                fill = time;
                to_place = resident.saturating_sub(pages);
                // Half of the pages that it writes meanwhile have come by themselves, on average, when it gets to them.
                let wanted = self.trace.written(self.now, self.now + fill);
                let wanted: u64 = wanted
                    .iter()
                    .filter_map(|(key, pages)| Some(pages.intersect(due.pages.get(key)?).len()))
                    .sum();
                let one = self.site.round_trip
                    + self.site.read_fault
                    + Duration::from_secs_f64(self.site.carry(self.site.first.bytes));
                waited = (one * (wanted / 2).min(u64::from(u32::MAX)) as u32).min(fill);
            }
        }
        let one = if late { self.site.place_beside } else { self.site.place };
        let placing = one.mul_f64(to_place as f64);
        let prepared = if waits { self.site.prepare.mul_f64(resident as f64) } else { Duration::ZERO };
        let began = self.site.setup + prepared + ran;
        let lost = self.site.write_fault.mul_f64(self.write_faults as f64) + waited;
        let running = (ran + fill).as_secs_f64();
        Outcome {
            strategy,
            chosen: strategy,
            because: String::new(),
            rounds: self.rounds,
            stop_reason: stop.map(StopReason::name),
            downtime_us: downtime.as_micros() as u64,
            total_us: (began + downtime).as_micros() as u64,
            complete_us: (began + downtime + fill + placing).as_micros() as u64,
            bytes: self.bytes as u64,
            slowdown: if running > 0.0 { (lost.as_secs_f64() / running).min(1.0) } else { 0.0 },
        }
    }
}

/// The pages of a part of a round: it reads them in order.
fn share_of(pages: &PageSet, (part, parts): (u32, u32)) -> PageSet {
    let edge = |part: u32| pages.len() * u64::from(part) / u64::from(parts);
    let (from, to) = (edge(part), edge(part + 1));
    let (mut mine, mut rank) = (PageSet::default(), 0);
    for run in pages.runs() {
        let (low, high) = (from.max(rank), to.min(rank + run.len));
        if low < high {
            mine.insert(run.start + (low - rank), high - low);
        }
        rank += run.len;
    }
    mine
}

/// Of the written ones among some pages, those that are left for the next round, batch by batch.
fn left_of(pages: &PageSet, written: &PageSet, (pass, since): (&mut Pass, Duration)) -> PageSet {
    let mut left = PageSet::default();
    let mut rest = written.runs();
    let mut batch: (u64, Vec<PageRun>) = (0, Vec::new());
    let mut close = |(pages, written): &mut (u64, Vec<PageRun>)| {
        let count = written.iter().map(|run| run.len).sum();
        if *pages > 0 && pass.leaves(since, count, *pages) {
            written.iter().for_each(|run| left.insert(run.start, run.len));
        }
        (*pages, *written) = (0, Vec::new());
    };
    for run in pages.runs() {
        let mut start = run.start;
        while start < run.end() {
            let end = run.end().min(start + (MAX_BATCH_PAGES as u64 - batch.0));
            while let Some(first) = rest.first().filter(|first| first.start < end) {
                let low = first.start.max(start);
                batch.1.push(PageRun { start: low, len: first.end().min(end) - low });
                if first.end() > end {
                    break;
                }
                rest = &rest[1..];
            }
            batch.0 += end - start;
            start = end;
            if batch.0 == MAX_BATCH_PAGES as u64 {
                close(&mut batch);
            }
        }
    }
    close(&mut batch);
    left
}

fn count(pages: &Pages) -> u64 {
    pages.values().map(PageSet::len).sum()
}

#[cfg(test)]
mod tests {
    use super::super::site::PageCost;
    use super::super::trace::tests::{scan, uniform_writer};
    use super::*;

    fn wish(strategy: Strategy) -> Wish {
        Wish {
            strategy,
            policy: PolicyChoice::Adaptive,
            downtime: Duration::from_millis(100),
            total_time: None,
            max_rounds: 30,
        }
    }

    fn gigabit() -> Site {
        Site { bandwidth: 125e6, ..Site::default() }
    }

    #[test]
    fn what_the_program_is_ahead_of_is_left_where_many_are_written() {
        let set = |runs: &[(u64, u64)]| -> PageSet {
            runs.iter().map(|&(start, len)| PageRun { start, len }).collect()
        };
        // Batches of 256 pages: those of 0 to 255, of 300 to 555, and the last one of 556 to 599.
        let pages = set(&[(0, 256), (300, 300)]);
        let of =
            |written: &PageSet| left_of(&pages, written, (&mut Pass::new(4000), Duration::from_millis(500)));
        assert_eq!(of(&set(&[(10, 127), (400, 200)])), set(&[(400, 200)]), "127 of 256 are too few");
        assert_eq!(of(&set(&[(0, 128)])), set(&[(0, 128)]));
        assert_eq!(of(&set(&[(255, 1), (300, 128), (590, 10)])), set(&[(300, 128)]));
        assert!(of(&PageSet::default()).is_empty());
    }

    #[test]
    fn a_hot_set_is_not_sent_in_the_first_round() {
        const PAGES: u64 = 1 << 16;
        const HOT: u64 = PAGES / 20;
        let hot: PageSet = (0..HOT).map(|page| PageRun { start: page * 20, len: 1 }).collect();
        let mut trace = Trace::new();
        trace.add(&scan(0, PAGES, PageSet::default(), true));
        (1..100).for_each(|step| trace.add(&scan(step * 100, PAGES, hot.clone(), false)));
        let of = |policy, site: &Site| {
            let wish = Wish { policy, ..wish(Strategy::PreCopy) };
            simulate(&trace, site, &wish, Duration::ZERO)
        };
        let (ours, fixed) = (of(PolicyChoice::Adaptive, &gigabit()), of(PolicyChoice::Fixed(1), &gigabit()));
        let left = ours.rounds[0].ahead_pages;
        assert_eq!(ours.rounds[0].dirty_pages + left, PAGES);
        assert!(left * 10 > HOT * 7 && left <= HOT, "{left} of {HOT}: all but those of the first moment");
        assert_eq!(fixed.rounds[0].dirty_pages, PAGES);
        assert_eq!(ours.rounds[1].dirty_pages, HOT);
        let quick = of(PolicyChoice::Adaptive, &Site::default());
        assert_eq!(quick.rounds[0].dirty_pages, PAGES, "a quick link");
    }

    #[test]
    fn what_differs_is_little_only_where_bytes_were_kept() {
        let small = PageCost { bytes: 60.0, ..gigabit().again };
        let site = Site { bandwidth: 12.5e6, again: small, ..Site::default() };
        let of = |pages| {
            let trace = uniform_writer(pages, 5120.0, 10);
            simulate(&trace, &site, &wish(Strategy::PreCopy), Duration::ZERO).stop_reason
        };
        assert_eq!(of(1 << 14), Some("no-progress"), "a sixteenth of what it writes to");
        let hot: PageSet = [PageRun { start: 0, len: 500 }].into_iter().collect();
        let mut trace = Trace::new();
        trace.add(&scan(0, 1 << 14, PageSet::default(), true));
        (1..100).for_each(|step| trace.add(&scan(step * 100, 1 << 14, hot.clone(), false)));
        let moved = simulate(&trace, &site, &wish(Strategy::PreCopy), Duration::ZERO);
        assert_eq!(moved.stop_reason, Some("target-met"), "all of it");
    }

    #[test]
    fn a_slow_writer_is_moved_in_a_few_rounds_and_stands_still_for_little_more_than_the_fixed_cost() {
        let (trace, site) = (uniform_writer(1 << 16, 2560.0, 10), gigabit());
        let moved = simulate(&trace, &site, &wish(Strategy::PreCopy), Duration::ZERO);
        assert_eq!(moved.stop_reason, Some("target-met"));
        assert!((2..=7).contains(&moved.rounds.len()), "{:?}", moved.rounds);
        // Once all of it, and what was written meanwhile: 2.15 s for the first round, and 5000 pages in it.
        assert_eq!(moved.rounds[0].dirty_pages, 1 << 16);
        let first = moved.rounds[0].duration_us as f64 / 1e6;
        assert!((first / (65536.0 * 4114.0 / 125e6) - 1.0).abs() < 0.01, "{first} s");
        let second = moved.rounds[1].dirty_pages as f64;
        let expected = 65536.0 * (1.0 - (-2560.0 * first / 65536.0_f64).exp());
        assert!((second / expected - 1.0).abs() < 0.05, "{second} pages, expected {expected}");
        let fixed = site.stand(1, 1 << 16, 0).0.as_micros() as u64;
        assert!((fixed..fixed + 30_000).contains(&moved.downtime_us), "{} us", moved.downtime_us);
        assert!(moved.slowdown < 0.01, "{}", moved.slowdown);
    }

    #[test]
    fn memory_is_waited_for_before_a_stop_and_copy_and_not_in_it() {
        let trace = uniform_writer(1 << 16, 2560.0, 10);
        let of = |strategy, ready| {
            let prepare = if ready { Duration::ZERO } else { Duration::from_micros(10) };
            simulate(&trace, &Site { prepare, ..Site::default() }, &wish(strategy), Duration::ZERO)
        };
        let (ready, fresh) = (of(Strategy::StopAndCopy, true), of(Strategy::StopAndCopy, false));
        assert_eq!(fresh.downtime_us, ready.downtime_us);
        assert_eq!(fresh.total_us - ready.total_us, 655_360, "of 65 536 pages");
        assert_eq!(of(Strategy::PreCopy, false), of(Strategy::PreCopy, true), "made ready while it sends");
    }

    #[test]
    fn each_way_has_its_price() {
        let (trace, site) = (uniform_writer(1 << 16, 2560.0, 10), gigabit());
        let [auto, stop, pre, post, hybrid] =
            Strategy::ALL.map(|strategy| simulate(&trace, &site, &wish(strategy), Duration::ZERO));
        assert_eq!((auto.chosen, auto.rounds.as_slice()), (Strategy::PreCopy, pre.rounds.as_slice()));
        let copy = (65536.0 * 4114.0 / 125e6 * 1e6) as u64;
        assert!(stop.downtime_us > copy && stop.rounds.len() == 1);
        assert!(pre.downtime_us < copy / 10 && pre.bytes > stop.bytes);
        assert!(post.downtime_us <= hybrid.downtime_us && hybrid.downtime_us <= pre.downtime_us);
        assert!(post.total_us < pre.total_us && post.complete_us > copy);
        assert!(post.slowdown > hybrid.slowdown, "{} and {}", post.slowdown, hybrid.slowdown);
        assert!(post.rounds.is_empty() && post.bytes <= stop.bytes);
    }

    #[test]
    fn the_strategy_follows_from_the_goals() {
        let site = gigabit();
        let auto = |trace: &Trace, downtime: u64, total_time: Option<u64>| {
            let total_time = total_time.map(Duration::from_millis);
            let wish = Wish { downtime: Duration::from_millis(downtime), total_time, ..wish(Strategy::Auto) };
            simulate(trace, &site, &wish, Duration::ZERO)
        };
        let ms = |us: u64| us / 1000;
        // 32 MiB take 270 ms.
        let idle = uniform_writer(1 << 13, 10.0, 5);
        let moved = auto(&idle, 1000, None);
        assert_eq!((moved.chosen, moved.rounds.len()), (Strategy::StopAndCopy, 2), "{}", moved.because);
        assert!(moved.rounds[1].frozen && ms(moved.downtime_us) < 500, "{moved:?}");
        let moved = auto(&idle, 100, None);
        assert_eq!(moved.chosen, Strategy::PreCopy, "{}", moved.because);
        assert!(ms(moved.downtime_us) < 100 && moved.because.contains("allowed"), "{moved:?}");
        // It writes faster than the link carries.
        let quick = uniform_writer(1 << 15, 60_000.0, 10);
        let moved = auto(&quick, 50, None);
        assert_eq!((moved.chosen, moved.stop_reason), (Strategy::Hybrid, Some("no-progress")));
        assert!(ms(moved.downtime_us) < 50 && moved.complete_us > moved.total_us, "{moved:?}");
        let frozen = simulate(&quick, &site, &wish(Strategy::PreCopy), Duration::ZERO);
        assert!(frozen.downtime_us > 10 * moved.downtime_us, "{frozen:?}");
        // Rounds would come to their end, in 5 s.
        let busy = uniform_writer(1 << 16, 23_000.0, 20);
        let rounds = simulate(&busy, &site, &wish(Strategy::PreCopy), Duration::ZERO);
        let goal = ms(rounds.complete_us) - 1000;
        let moved = auto(&busy, 100, Some(goal));
        assert_eq!((moved.chosen, moved.stop_reason), (Strategy::Hybrid, Some("total-time")));
        assert!(ms(moved.complete_us) <= goal, "{} ms of {goal}: {moved:?}", ms(moved.complete_us));
        let moved = auto(&busy, 100, Some(goal + 60_000));
        assert_ne!(moved.stop_reason, Some("total-time"), "{}", moved.because);
    }

    /// A hot set that is written all the time, and `others` more pages a scan, in turn.
    fn hot_set(pages: u64, hot: u64, others: u64) -> Trace {
        let mut trace = Trace::new();
        trace.add(&scan(0, pages, PageSet::default(), true));
        for step in 1..=200 {
            let other = PageRun { start: 20_000 + step * others % 100_000, len: others };
            let dirty = [PageRun { start: 500, len: hot }, other].into_iter().collect();
            trace.add(&scan(step * 100, pages, dirty, false));
        }
        trace
    }

    #[test]
    fn a_hot_set_is_held_back_and_costs_fewer_bytes_than_fixed_rounds() {
        let site = gigabit();
        for others in [0, 500] {
            let trace = hot_set(1 << 18, 13_107, others);
            let adaptive = simulate(&trace, &site, &wish(Strategy::PreCopy), Duration::ZERO);
            let fixed = Wish { policy: PolicyChoice::Fixed(10), ..wish(Strategy::PreCopy) };
            let fixed = simulate(&trace, &site, &fixed, Duration::ZERO);
            assert!(adaptive.bytes < fixed.bytes, "{} and {}", adaptive.bytes, fixed.bytes);
            assert!(adaptive.downtime_us <= fixed.downtime_us);
            let last = adaptive.rounds.last().expect("the freeze");
            assert!(
                last.frozen && last.dirty_pages >= 13_107,
                "what was held back is not forgotten: {last:?}"
            );
            if others > 0 {
                assert!(
                    adaptive.rounds.iter().any(|round| round.held_pages == 13_107),
                    "{:?}",
                    adaptive.rounds
                );
            }
        }
    }

    #[test]
    fn the_same_question_has_the_same_answer() {
        let (trace, site) = (uniform_writer(1 << 14, 20_000.0, 3), gigabit());
        let start = Duration::from_millis(730);
        let answer = simulate(&trace, &site, &wish(Strategy::PreCopy), start);
        assert_eq!(answer, simulate(&trace, &site, &wish(Strategy::PreCopy), start));
    }
}
