//! One address space, or one shared object: its written pages, and its mappings as they were last seen.

use super::RegionUse;
use super::pages::WrittenPages;
use crate::observation::{ObservedObject, ObservedRegion, ObservedSpace, Owner};
use crate::page_set::{PageSet, Run};
use std::borrow::Cow;

/// What a scan saw of one.
#[derive(Debug)]
pub(super) struct Seen<'a> {
    pub(super) owner: Owner,
    pub(super) is_new: bool,
    pub(super) dirty: &'a PageSet,
    pub(super) unchanged: Option<&'a PageSet>,
    pid: Option<i32>,
    processes: u32,
    regions: Cow<'a, [ObservedRegion]>,
    populated: &'a PageSet,
}

impl<'a> From<&'a ObservedSpace> for Seen<'a> {
    fn from(seen: &'a ObservedSpace) -> Self {
        Self {
            owner: seen.key.into(),
            is_new: seen.is_new,
            dirty: &seen.dirty,
            unchanged: seen.unchanged.as_ref(),
            pid: Some(seen.pid),
            processes: 1,
            regions: Cow::Borrowed(&seen.regions),
            populated: &seen.populated,
        }
    }
}

impl<'a> From<&'a ObservedObject> for Seen<'a> {
    fn from(seen: &'a ObservedObject) -> Self {
        Self {
            owner: seen.id.into(),
            is_new: seen.is_new,
            dirty: &seen.dirty,
            unchanged: seen.unchanged.as_ref(),
            pid: None,
            processes: u32::try_from(seen.mapped_by.len()).unwrap_or(u32::MAX),
            regions: Cow::Owned(vec![seen.region()]),
            populated: &seen.populated,
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Space {
    pid: Option<i32>,
    processes: u32,
    pub(super) pages: WrittenPages,
    regions: Vec<ObservedRegion>,
    /// For each region: populated pages, dirty pages.
    counts: Vec<(u64, u64)>,
}

impl Space {
    /// The first time that it is seen: the base.
    pub(super) fn new(seen: Seen<'_>) -> Self {
        let counts = counts(&seen.regions, seen.populated, &PageSet::default());
        Self {
            pid: seen.pid,
            processes: seen.processes,
            pages: WrittenPages::default(),
            regions: seen.regions.into_owned(),
            counts,
        }
    }

    /// What is unmapped is forgotten: what comes in its place are other pages.
    pub(super) fn refresh(&mut self, seen: &Seen<'_>) {
        (self.pid, self.processes) = (seen.pid, seen.processes);
        if self.regions != *seen.regions {
            let gone = mapped(&self.regions).subtract(&mapped(&seen.regions));
            for run in gone.runs() {
                self.pages.forget(*run);
            }
            self.regions = seen.regions.to_vec();
        }
        self.counts = counts(&self.regions, seen.populated, seen.dirty);
    }

    pub(super) fn uses(&self, owner: Owner, now: Option<u32>, seconds: f64) -> Vec<RegionUse> {
        let uses = self.regions.iter().zip(&self.counts).map(|(region, (populated, dirty))| {
            let (mut recent, mut distinct) = (0u64, 0);
            if let Some(now) = now {
                for written in self.pages.range(run(region), now) {
                    recent += u64::from(written.recent);
                    distinct += 1;
                }
            }
            RegionUse {
                owner,
                pid: self.pid,
                processes: self.processes,
                start: region.start,
                end: region.end,
                kind: region.kind,
                name: region.name.clone(),
                populated: *populated,
                dirty: *dirty,
                pages_per_second: if seconds > 0.0 { recent as f64 / seconds } else { 0.0 },
                distinct,
            }
        });
        uses.collect()
    }
}

fn run(region: &ObservedRegion) -> Run {
    Run { start: region.start, len: region.end.saturating_sub(region.start) }
}

fn mapped(regions: &[ObservedRegion]) -> PageSet {
    regions.iter().map(run).collect()
}

fn counts(regions: &[ObservedRegion], populated: &PageSet, dirty: &PageSet) -> Vec<(u64, u64)> {
    let populated = within(regions, populated);
    populated.into_iter().zip(within(regions, dirty)).collect()
}

/// How many of the pages each region has; the regions are in order, and apart.
fn within(regions: &[ObservedRegion], pages: &PageSet) -> Vec<u64> {
    let runs = pages.runs();
    let mut at = 0;
    let count = |region: &ObservedRegion| {
        while at < runs.len() && runs[at].end() <= region.start {
            at += 1;
        }
        let mut pages = 0;
        let mut next = at;
        while next < runs.len() && runs[next].start < region.end {
            pages += runs[next].end().min(region.end) - runs[next].start.max(region.start);
            next += 1;
        }
        // The last may go on in the next region.
        at = next.saturating_sub(1).max(at);
        pages
    };
    regions.iter().map(count).collect()
}
