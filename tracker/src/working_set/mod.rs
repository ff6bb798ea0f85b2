//! The writable working set, from one run of tracking.
//!
//! WWS(tau) is the number of pages that are written in a window of length tau, in the mean over all such windows of a
//! run. [`Estimator`] takes one [`Observation`] after another, in time that grows with the pages that were written,
//! and answers at any moment. docs/WORKING-SET.md defines every quantity and says where its formula is from.
//!
//! Nothing here asks a clock or a kernel: a recording gives the same answers as the run did.
//!
//! ```
//! use pageferry_tracker::observation::{Observation, ObservedSpace};
//! use pageferry_tracker::working_set::Estimator;
//! use pageferry_tracker::{PageSet, Run, SpaceKey};
//! use std::time::Duration;
//!
//! // Of 100 pages the first ten are written in every tenth of a second.
//! let pages = |len| PageSet::from_iter([Run { start: 0, len }]);
//! let mut estimator = Estimator::new();
//! for scan in 0..=50 {
//!     let space = ObservedSpace {
//!         key: SpaceKey(0), pid: 4711, name: "program".into(), is_new: scan == 0, regions: Vec::new(),
//!         populated: pages(100), dirty: pages(if scan == 0 { 100 } else { 10 }), unchanged: None,
//!     };
//!     let at = Duration::from_millis(100) * scan;
//!     estimator.observe(&Observation { at, spaces: vec![space], ..Observation::default() });
//! }
//! assert_eq!(estimator.wws(Duration::from_secs(1)).unwrap().pages, 10.0);
//! assert_eq!(estimator.dirty_rate().total, 100.0);
//! // At 1 MB/s (244 pages/s) the ten pages could be sent in time, at a tenth of that they could not.
//! assert_eq!(estimator.hot_set(1e6).total, 0);
//! assert_eq!(estimator.hot_set(1e5).total, 10);
//! ```

mod curve;
mod gaps;
mod hot;
mod pages;
mod space;

use crate::observation::{Observation, Owner, RegionKind};
use crate::page_set::{PageSet, Run};
use gaps::Gaps;
use pages::REMEMBERED;
use space::{Seen, Space};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// A point of the curve WWS(tau).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CurvePoint {
    /// The length of the window: the mean one of the windows that this many scan intervals make.
    pub tau: Duration,
    /// How many pages are written in such a window, in the mean.
    pub pages: f64,
    /// How far from that the truth may be, in pages, as scans take time and do not come quite evenly. Not what chance
    /// adds: another run of the same program has another curve.
    pub error: f64,
}

/// A number of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Estimate {
    /// The pages.
    pub pages: f64,
    /// How far from that the truth may be, in pages.
    pub error: f64,
}

/// Pages written per second. A page counts once a scan interval, however often it is written in it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DirtyRate {
    /// All, pages/s.
    pub total: f64,
    /// Of these, the ones that were not written before since tracking began, pages/s.
    pub first_time: f64,
    /// Of these, the others, pages/s.
    pub repeated: f64,
    /// Of all, those that were written with the bytes that they had, pages/s; `None` when nobody looked.
    pub unchanged: Option<f64>,
}

/// What cannot be sent before it is written again.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HotSet {
    /// The pages, by space and by shared object. Those that have none are left out.
    pub pages: Vec<(Owner, PageSet)>,
    /// How many these are.
    pub total: u64,
    /// How long the link takes for what is written meanwhile: the shortest round that copying in rounds gets to. Zero
    /// when the link keeps up with all writes.
    pub round: Duration,
}

/// How one mapping is used, or one shared object by all that map it.
#[derive(Clone, Debug, PartialEq)]
pub struct RegionUse {
    /// Its space, or the object that it is.
    pub owner: Owner,
    /// Its process; `None` for an object.
    pub pid: Option<i32>,
    /// How many processes of the tree have it mapped.
    pub processes: u32,
    /// The first page, by number: address / 4096, and of an object offset / 4096.
    pub start: u64,
    /// One past the last page.
    pub end: u64,
    /// What it is for.
    pub kind: RegionKind,
    /// The file or the kernel's name for it; empty for none.
    pub name: String,
    /// Pages that exist.
    pub populated: u64,
    /// Pages that were written between the last two scans.
    pub dirty: u64,
    /// Pages written per second, over the last eight intervals (or as many as there were).
    pub pages_per_second: f64,
    /// Different pages written since tracking began.
    pub distinct: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Writes {
    total: u64,
    first_time: u64,
    unchanged: u64,
    /// How long contents were looked at.
    looked: Duration,
    /// How long writes were counted.
    time: Duration,
}

/// Takes observations, answers questions about the working set.
#[derive(Clone, Debug, Default)]
pub struct Estimator {
    gaps: Gaps,
    spaces: BTreeMap<Owner, Space>,
    /// The middle of each scan.
    scans: Vec<Duration>,
    /// Sum of what the scans took.
    took: Duration,
    all: Writes,
    latest: Writes,
}

impl Estimator {
    /// One that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in the next scan. The first one is the base: writes count from there.
    pub fn observe(&mut self, o: &Observation) {
        let middle = o.at.saturating_sub(o.took / 2);
        let before = self.scans.last().copied();
        self.scans.push(middle.max(before.unwrap_or_default()));
        self.took += o.took;
        for key in &o.exited {
            self.spaces.remove(&Owner::Space(*key));
        }
        let objects: BTreeSet<Owner> = o.objects.iter().map(|object| object.id.into()).collect();
        self.spaces.retain(|owner, _| matches!(owner, Owner::Space(_)) || objects.contains(owner));
        let all = o.spaces.iter().map(Seen::from).chain(o.objects.iter().map(Seen::from));
        let Some(before) = before else {
            self.spaces.extend(all.map(|seen| (seen.owner, Space::new(seen))));
            return;
        };
        self.gaps.advance();
        let now = self.now();
        let time = middle.saturating_sub(before);
        let mut writes = Writes { time, ..Writes::default() };
        let mut looked = false;
        for seen in all {
            let space = match self.spaces.get_mut(&seen.owner) {
                Some(space) if !seen.is_new => space,
                _ => {
                    self.spaces.insert(seen.owner, Space::new(seen));
                    continue;
                }
            };
            space.refresh(&seen);
            writes.first_time += space.pages.write(seen.dirty, now, &mut self.gaps);
            writes.total += seen.dirty.len();
            if let Some(unchanged) = seen.unchanged {
                looked = true;
                writes.unchanged += unchanged.len();
            }
        }
        writes.looked = if looked { time } else { Duration::ZERO };
        self.latest = writes;
        self.all.add(&writes);
    }

    /// The curve WWS(tau), from one interval to the whole run: every number of intervals up to 16, then ever fewer
    /// (16 for each doubling), and the last. Empty before the second scan.
    pub fn curve(&self) -> Vec<CurvePoint> {
        let curve = self.all_points();
        curve::thinned(self.gaps.intervals()).into_iter().map(|k| curve.point(k)).collect()
    }

    /// WWS(tau), between two points of the curve by a straight line, with the distance to the neighbours in the error.
    /// `None` when tau is longer than the run, and before the second scan.
    ///
    /// Below one interval nothing was seen: the line is the one to "no time, no pages", the error all of it.
    pub fn wws(&self, tau: Duration) -> Option<Estimate> {
        self.all_points().at(tau)
    }

    /// Pages written per second over the whole run. All zero before the second scan.
    pub fn dirty_rate(&self) -> DirtyRate {
        self.all.rate()
    }

    /// Pages written per second between the last two scans.
    pub fn last_interval(&self) -> DirtyRate {
        self.latest.rate()
    }

    /// In how many of the last eight intervals pages of a space or of a shared object were written: runs of pages with the
    /// same number, in order, without those of none.
    pub fn frequency(&self, of: impl Into<Owner>) -> Vec<(Run, u8)> {
        let mut runs: Vec<(Run, u8)> = Vec::new();
        let Some(space) = self.spaces.get(&of.into()).filter(|_| self.gaps.intervals() > 0) else {
            return runs;
        };
        for written in space.pages.iter(self.now()).filter(|written| written.recent > 0) {
            match runs.last_mut() {
                Some((run, count)) if run.end() == written.page && *count == written.recent => run.len += 1,
                _ => runs.push((Run { start: written.page, len: 1 }, written.recent)),
            }
        }
        runs
    }

    /// The pages that will be written again before they could be sent, with all else that is written meanwhile, over
    /// a link of so many bytes per second. Only a page that was written in two intervals can be foreseen.
    pub fn hot_set(&self, link_bytes_per_second: f64) -> HotSet {
        if self.gaps.intervals() == 0 {
            return HotSet::default();
        }
        hot::set(&self.spaces, self.now(), self.recent(), link_bytes_per_second)
    }

    /// Every mapping of every space, and every shared object, as the last scan saw it. A mapping of a shared object has no
    /// pages of its own.
    pub fn regions(&self) -> Vec<RegionUse> {
        let now = (self.gaps.intervals() > 0).then(|| self.now());
        let (intervals, time) = self.recent();
        let seconds = time * f64::from(intervals);
        self.spaces.iter().flat_map(|(key, space)| space.uses(*key, now, seconds)).collect()
    }

    /// The latest interval, counted from 0.
    fn now(&self) -> u32 {
        // At a thousand scans a second it takes seven weeks to get there.
        u32::try_from(self.gaps.intervals() - 1).unwrap_or(u32::MAX - 1)
    }

    /// How many intervals the history of pages goes back, and how long they are in the mean, in seconds.
    fn recent(&self) -> (u32, f64) {
        let intervals = self.gaps.intervals().min(REMEMBERED as usize);
        if intervals == 0 {
            return (0, 0.0);
        }
        let last = self.scans.len() - 1;
        let time = self.scans[last] - self.scans[last - intervals];
        (intervals as u32, time.as_secs_f64() / intervals as f64)
    }

    fn all_points(&self) -> curve::Curve<'_> {
        let took =
            if self.scans.is_empty() { 0.0 } else { self.took.as_secs_f64() / self.scans.len() as f64 };
        curve::Curve::new(&self.scans, self.gaps.curve(), took)
    }
}

impl Writes {
    fn add(&mut self, other: &Writes) {
        self.total += other.total;
        self.first_time += other.first_time;
        self.unchanged += other.unchanged;
        self.looked += other.looked;
        self.time += other.time;
    }

    fn rate(&self) -> DirtyRate {
        let over = |pages: u64, time: Duration| {
            if time.is_zero() { 0.0 } else { pages as f64 / time.as_secs_f64() }
        };
        let per_second = |pages| over(pages, self.time);
        DirtyRate {
            total: per_second(self.total),
            first_time: per_second(self.first_time),
            repeated: per_second(self.total - self.first_time),
            unchanged: (!self.looked.is_zero()).then(|| over(self.unchanged, self.looked)),
        }
    }
}

#[cfg(test)]
mod tests;
