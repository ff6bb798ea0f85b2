//! One address space: its written pages, and its mappings as they were last seen.

use super::RegionUse;
use super::pages::WrittenPages;
use crate::attach::SpaceKey;
use crate::observation::{ObservedRegion, ObservedSpace};
use crate::page_set::{PageSet, Run};

#[derive(Clone, Debug)]
pub(super) struct Space {
    pid: i32,
    pub(super) pages: WrittenPages,
    regions: Vec<ObservedRegion>,
    /// For each region: populated pages, dirty pages.
    counts: Vec<(u64, u64)>,
}

impl Space {
    /// The first time that it is seen: the base.
    pub(super) fn new(seen: &ObservedSpace) -> Self {
        let counts = counts(&seen.regions, &seen.populated, &PageSet::default());
        Self { pid: seen.pid, pages: WrittenPages::default(), regions: seen.regions.clone(), counts }
    }

    /// What is unmapped is forgotten: what comes in its place are other pages.
    pub(super) fn refresh(&mut self, seen: &ObservedSpace) {
        self.pid = seen.pid;
        if self.regions != seen.regions {
            let gone = mapped(&self.regions).subtract(&mapped(&seen.regions));
            for run in gone.runs() {
                self.pages.forget(*run);
            }
            self.regions.clone_from(&seen.regions);
        }
        self.counts = counts(&self.regions, &seen.populated, &seen.dirty);
    }

    pub(super) fn uses(&self, key: SpaceKey, now: Option<u32>, seconds: f64) -> Vec<RegionUse> {
        let uses = self.regions.iter().zip(&self.counts).map(|(region, (populated, dirty))| {
            let (mut recent, mut distinct) = (0u64, 0);
            if let Some(now) = now {
                for written in self.pages.range(run(region), now) {
                    recent += u64::from(written.recent);
                    distinct += 1;
                }
            }
            RegionUse {
                key,
                pid: self.pid,
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
