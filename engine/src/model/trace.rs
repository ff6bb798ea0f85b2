//! What a program wrote, and when: the observations of a tracking run, asked for any stretch of time.

use pageferry_tracker::observation::{Observation, RegionKind};
use pageferry_tracker::{PageSet, Run, SpaceKey};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Pages by address space.
pub type Pages = BTreeMap<SpaceKey, PageSet>;

/// Scans before and after one, itself included, that tell how often a page is written.
const NEIGHBOURS: usize = 16;

/// What a program wrote, by intervals between scans.
///
/// What was written in a part of an interval is not in an observation. It is taken from how often the page was dirty in
/// the scans around: a page that was dirty in `c` of `n` other intervals of length `d` is written at random times, `-ln(1 - c/n) / d`
/// times a second on average (a Poisson process, given that it was dirty in this interval); one that was dirty in all of
/// them, all the time. The random times are drawn from the page's number and the interval's, so the same question has the
/// same answer.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    steps: Vec<Step>,
    /// When the first scan was over, on the clock of the observations.
    origin: Duration,
}

/// One scan.
#[derive(Clone, Debug)]
struct Step {
    /// When it was over, since the first scan.
    at: Duration,
    /// Pages that exist and that a migration can send while the program runs.
    existing: Arc<Pages>,
    /// Of these, the ones that were written since the scan before.
    dirty: Pages,
    /// Of the dirty ones, those that had the same bytes as before; `None` if nobody looked.
    unchanged: Option<u64>,
    /// Pages that travel inside the freeze, in CRIU's images: shared memory, changed pages of files.
    in_images: u64,
}

impl Trace {
    /// A trace without scans.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the next scan. The first one is where it begins: what that calls dirty was written before.
    pub fn add(&mut self, observation: &Observation) {
        let (mut existing, mut dirty) = (Pages::new(), Pages::new());
        let (mut unchanged, mut in_images) = (None, 0);
        let last = self.steps.last();
        for space in &observation.spaces {
            let carried: PageSet = space
                .regions
                .iter()
                .filter(|region| {
                    matches!(region.kind, RegionKind::Heap | RegionKind::Stack | RegionKind::Anonymous)
                })
                .map(|region| Run { start: region.start, len: region.end - region.start })
                .collect();
            let mine = space.populated.intersect(&carried);
            in_images += space.populated.len() - mine.len();
            let written = space.dirty.intersect(&mine);
            if let Some(pages) = &space.unchanged {
                *unchanged.get_or_insert(0) += pages.intersect(&written).len();
            }
            // The first look at a space calls everything dirty: one that is forked later really is new to a destination.
            dirty.insert(space.key, written);
            existing.insert(space.key, mine);
        }
        in_images += observation.objects.iter().map(|object| object.populated.len()).sum::<u64>();
        let existing = match last {
            Some(last) if *last.existing == existing => Arc::clone(&last.existing),
            _ => Arc::new(existing),
        };
        if self.steps.is_empty() {
            self.origin = observation.at;
        }
        let at = observation.at.saturating_sub(self.origin);
        self.steps.push(Step { at, existing, dirty, unchanged, in_images });
    }

    /// As many pages more would travel in CRIU's images, at any time: of mappings that were not watched.
    pub fn add_in_images(&mut self, pages: u64) {
        self.steps.iter_mut().for_each(|step| step.in_images += pages);
    }

    /// From the first scan to the last.
    pub fn duration(&self) -> Duration {
        self.steps.last().map_or(Duration::ZERO, |step| step.at)
    }

    /// Number of intervals.
    pub fn intervals(&self) -> usize {
        self.steps.len().saturating_sub(1)
    }

    /// Processes with memory of their own at `at`.
    pub fn processes(&self, at: Duration) -> u32 {
        self.existing(at).len() as u32
    }

    /// Pages that exist at `at`, and that a migration can send while the program runs. Behind its end a trace begins anew.
    pub fn existing(&self, at: Duration) -> Arc<Pages> {
        match self.steps.get(self.step_at(self.wrap(at))) {
            Some(step) => Arc::clone(&step.existing),
            None => Arc::default(),
        }
    }

    /// Pages that would travel in CRIU's images at `at`.
    pub fn in_images(&self, at: Duration) -> u64 {
        self.steps.get(self.step_at(self.wrap(at))).map_or(0, |step| step.in_images)
    }

    /// Share of the dirty pages that were written with the bytes that they had before; `None` if nobody looked.
    pub fn unchanged_share(&self) -> Option<f64> {
        let (mut unchanged, mut all) = (None, 0);
        for step in self.steps.iter().skip(1) {
            if let Some(pages) = step.unchanged {
                *unchanged.get_or_insert(0) += pages;
                all += step.dirty.values().map(PageSet::len).sum::<u64>();
            }
        }
        unchanged.map(|pages: u64| if all == 0 { 0.0 } else { pages as f64 / all as f64 })
    }

    /// Pages a second that become dirty between scans, over the whole trace.
    pub fn dirty_rate(&self) -> f64 {
        let pages: u64 =
            self.steps.iter().skip(1).flat_map(|step| step.dirty.values()).map(PageSet::len).sum();
        match self.duration().as_secs_f64() {
            seconds if seconds > 0.0 => pages as f64 / seconds,
            _ => 0.0,
        }
    }

    /// What is written from `from` (inclusive) up to `to`. Behind its end a trace begins anew.
    pub fn written(&self, from: Duration, to: Duration) -> Pages {
        let mut pages = Pages::new();
        let whole = self.duration();
        if whole.is_zero() || to <= from {
            return pages;
        }
        if to - from >= whole {
            // Once around: everything that is ever written.
            self.within(Duration::ZERO, whole, &mut pages);
            return pages;
        }
        let (from, to) = (self.wrap(from), self.wrap(to));
        if from < to {
            self.within(from, to, &mut pages);
        } else {
            self.within(from, whole, &mut pages);
            self.within(Duration::ZERO, to, &mut pages);
        }
        pages
    }

    /// What is written in a stretch of the trace that lies in it.
    fn within(&self, from: Duration, to: Duration, pages: &mut Pages) {
        let first = self.steps.partition_point(|step| step.at <= from).max(1);
        for index in first..self.steps.len() {
            let (start, end) = (self.steps[index - 1].at, self.steps[index].at);
            if start >= to {
                break;
            }
            for (key, dirty) in &self.steps[index].dirty {
                let part = match from <= start && end <= to {
                    true => dirty.clone(),
                    false => self.part(index, *key, dirty, from.max(start), to.min(end)),
                };
                pages.entry(*key).or_default().absorb(part);
            }
        }
    }

    /// Of the pages that interval `index` has as dirty, those that are written from `from` up to `to`.
    fn part(&self, index: usize, key: SpaceKey, dirty: &PageSet, from: Duration, to: Duration) -> PageSet {
        let (start, end) = (self.steps[index - 1].at, self.steps[index].at);
        let length = (end - start).as_secs_f64();
        let (from, to) = ((from - start).as_secs_f64() / length, (to - start).as_secs_f64() / length);
        let (counts, of) = self.frequency(index, key, dirty);
        let mut part = PageSet::default();
        for (page, count) in dirty.iter().zip(counts) {
            let is_written = match usize::from(count) >= of {
                true => true,
                false => {
                    // Writes in an interval, on average. Without this interval, in which it is known to be dirty.
                    let others = f64::from(count.saturating_sub(1)) / (of as f64 - 1.0).max(1.0);
                    happens(-(1.0 - others).ln(), from, to, seed(key, page, index))
                }
            };
            if is_written {
                part.insert(page, 1);
            }
        }
        part
    }

    /// In how many of the intervals around `index` each page of `dirty` was dirty, and how many intervals these are.
    fn frequency(&self, index: usize, key: SpaceKey, dirty: &PageSet) -> (Vec<u8>, usize) {
        let first = index.saturating_sub(NEIGHBOURS / 2).max(1);
        let last = (first + NEIGHBOURS).min(self.steps.len());
        let first = last.saturating_sub(NEIGHBOURS).max(1);
        let mut counts = vec![0u8; dirty.len() as usize];
        for step in &self.steps[first..last] {
            let Some(other) = step.dirty.get(&key) else { continue };
            // Both are sorted: the rank of a page in `dirty` is known on the way.
            let (mut rank, mut at) = (0usize, 0);
            for run in dirty.runs() {
                while other.runs().get(at).is_some_and(|other| other.end() <= run.start) {
                    at += 1;
                }
                let mut cut = at;
                while let Some(other) = other.runs().get(cut).filter(|other| other.start < run.end()) {
                    let (low, high) = (other.start.max(run.start), other.end().min(run.end()));
                    let low = rank + (low - run.start) as usize;
                    let high = rank + (high - run.start) as usize;
                    counts[low..high].iter_mut().for_each(|count| *count += 1);
                    cut += 1;
                }
                rank += run.len as usize;
            }
        }
        (counts, last - first)
    }

    fn wrap(&self, at: Duration) -> Duration {
        let whole = self.duration().as_nanos();
        match whole {
            0 => Duration::ZERO,
            whole => {
                let rest = at.as_nanos() % whole;
                // The end of the trace is its end, and not its beginning.
                let rest = if rest == 0 && !at.is_zero() { whole } else { rest };
                Duration::from_nanos(rest as u64)
            }
        }
    }

    /// The last scan that was over at `at`.
    fn step_at(&self, at: Duration) -> usize {
        self.steps.partition_point(|step| step.at <= at).saturating_sub(1)
    }
}

/// Whether a Poisson process of `rate` in `[0, 1)`, of which it is known that something happens there, has something
/// happen in `[from, to)`.
fn happens(rate: f64, from: f64, to: f64, seed: u64) -> bool {
    let mut state = seed;
    if rate <= 0.0 {
        // Once, at any time.
        return (from..to).contains(&uniform(&mut state));
    }
    // The time of the first, given that there is one; then gaps.
    let mut at = -(1.0 - uniform(&mut state) * (1.0 - (-rate).exp())).ln() / rate;
    while at < to {
        if at >= from {
            return true;
        }
        at -= (1.0 - uniform(&mut state)).ln() / rate;
    }
    false
}

fn seed(key: SpaceKey, page: u64, index: usize) -> u64 {
    (page << 24) ^ (u64::from(key.0) << 12) ^ index as u64
}

/// SplitMix64 (Steele, Lea, Flood 2014), as a number from 0 up to 1.
fn uniform(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use pageferry_tracker::observation::{ObservedRegion, ObservedSpace};

    const KEY: SpaceKey = SpaceKey(0);

    /// A scan of one space of `pages` pages.
    pub(crate) fn scan(at_ms: u64, pages: u64, dirty: PageSet, is_new: bool) -> Observation {
        let all: PageSet = [Run { start: 0, len: pages }].into_iter().collect();
        let region =
            ObservedRegion { start: 0, end: pages, kind: RegionKind::Anonymous, name: String::new() };
        let space = ObservedSpace {
            key: KEY,
            pid: 1,
            name: "writer".to_owned(),
            is_new,
            regions: vec![region],
            populated: all.clone(),
            dirty: if is_new { all } else { dirty },
            unchanged: None,
        };
        Observation { at: Duration::from_millis(at_ms), spaces: vec![space], ..Observation::default() }
    }

    fn set(runs: &[(u64, u64)]) -> PageSet {
        runs.iter().map(|&(start, len)| Run { start, len }).collect()
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A writer of `rate` uniformly random pages a second out of `pages`, for `seconds`, scanned every 100 ms.
    pub(crate) fn uniform_writer(pages: u64, rate: f64, seconds: u64) -> Trace {
        let mut trace = Trace::new();
        let mut state = 7;
        trace.add(&scan(0, pages, PageSet::default(), true));
        for step in 1..=seconds * 10 {
            let mut dirty: Vec<u64> =
                (0..(rate / 10.0) as u64).map(|_| (uniform(&mut state) * pages as f64) as u64).collect();
            dirty.sort_unstable();
            dirty.dedup();
            let dirty = dirty.into_iter().map(|page| Run { start: page, len: 1 }).collect();
            trace.add(&scan(step * 100, pages, dirty, false));
        }
        trace
    }

    #[test]
    fn whole_intervals_are_what_was_seen_and_a_trace_begins_anew_at_its_end() {
        let mut trace = Trace::new();
        trace.add(&scan(500, 100, PageSet::default(), true));
        trace.add(&scan(600, 100, set(&[(0, 5)]), false));
        trace.add(&scan(700, 100, set(&[(50, 5)]), false));
        assert_eq!((trace.duration(), trace.intervals()), (ms(200), 2));
        assert_eq!(trace.written(ms(0), ms(100))[&KEY], set(&[(0, 5)]));
        assert_eq!(trace.written(ms(100), ms(200))[&KEY], set(&[(50, 5)]));
        assert_eq!(trace.written(ms(100), ms(300))[&KEY], set(&[(0, 5), (50, 5)]));
        assert_eq!(trace.written(ms(200), ms(300))[&KEY], set(&[(0, 5)]), "the second time around");
        assert_eq!(trace.written(ms(0), ms(5000))[&KEY], set(&[(0, 5), (50, 5)]));
        assert!(trace.written(ms(50), ms(50)).is_empty());
        assert_eq!(trace.existing(ms(150))[&KEY], set(&[(0, 100)]));
        assert_eq!(trace.dirty_rate(), 50.0);
    }

    #[test]
    fn pages_that_are_always_written_are_written_in_every_moment() {
        let mut trace = Trace::new();
        trace.add(&scan(0, 100, PageSet::default(), true));
        for step in 1..=20 {
            trace.add(&scan(step * 100, 100, set(&[(10, 20)]), false));
        }
        assert_eq!(trace.written(ms(510), ms(512))[&KEY], set(&[(10, 20)]));
    }

    #[test]
    fn a_part_of_an_interval_has_its_part_of_the_writes() {
        let trace = uniform_writer(100_000, 20_000.0, 4);
        let rate: f64 = 20_000.0;
        for (from, to) in [(0, 50), (30, 40), (20, 130), (0, 100)] {
            // Over twenty intervals: one has noise.
            let starts = (1000..3000).step_by(100);
            let pages: u64 = starts.map(|at| trace.written(ms(at + from), ms(at + to))[&KEY].len()).sum();
            let wanted = 20.0 * 1e5 * (1.0 - (-rate * (to - from) as f64 / 1000.0 / 1e5).exp());
            let pages = pages as f64;
            assert!((pages / wanted - 1.0).abs() < 0.03, "{from}..{to}: {pages} pages, expected {wanted}");
        }
        // Two parts are the whole.
        let parts: u64 = [(1000, 1040), (1040, 1100)]
            .map(|(from, to)| trace.written(ms(from), ms(to))[&KEY].clone())
            .into_iter()
            .reduce(|a, b| a.union(&b))
            .map_or(0, |pages| pages.len());
        assert_eq!(parts, trace.written(ms(1000), ms(1100))[&KEY].len());
    }
}
