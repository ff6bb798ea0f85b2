//! Where and when a program writes, as a grid: time across, addresses upwards, without the gaps between regions.

use pageferry_tracker::PageSet;
use pageferry_tracker::observation::{Observation, ObservedRegion, Owner, RegionKind};
use std::collections::BTreeMap;
use std::time::Duration;

/// A stretch of address space that is shown: neighbouring regions of one process, or a shared object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Span {
    owner: Owner,
    start: u64,
    end: u64,
    name: String,
}

/// All addresses that any observation had, one after the other.
#[derive(Debug, Default)]
pub(super) struct Axis {
    spans: Vec<Span>,
    /// Pages before each span.
    before: Vec<u64>,
    pages: u64,
}

/// Collects the regions of a recording, to lay them out.
#[derive(Debug, Default)]
pub(super) struct Regions {
    /// By owner and first page: end and name.
    seen: BTreeMap<(Owner, u64), (u64, String)>,
    processes: BTreeMap<Owner, i32>,
}

impl Regions {
    /// Takes in the regions of one observation: those with pages in them.
    pub(super) fn observe(&mut self, observation: &Observation) {
        for space in &observation.spaces {
            self.processes.insert(space.key.into(), space.pid);
            for region in &space.regions {
                self.show(space.key.into(), region, &space.populated);
            }
        }
        for object in &observation.objects {
            self.show(object.id.into(), &object.region(), &object.populated);
        }
    }

    fn show(&mut self, owner: Owner, region: &ObservedRegion, populated: &PageSet) {
        let here = (owner, region.start);
        let known = self.seen.get(&here).is_some_and(|(end, _)| *end >= region.end);
        if !known && holds_any(populated, region.start, region.end) {
            self.seen.insert(here, (region.end, label(region)));
        }
    }

    /// The axis.
    pub(super) fn axis(self) -> Axis {
        let several = self.processes.len() > 1;
        let mut spans: Vec<Span> = Vec::new();
        for ((owner, start), (end, name)) in self.seen {
            match spans.last_mut() {
                // What overlaps or touches is one stretch; it is called by its largest part.
                Some(last) if last.owner == owner && start <= last.end => {
                    if end.saturating_sub(start) > last.end - last.start {
                        last.name = name;
                    }
                    last.end = last.end.max(end);
                }
                _ => spans.push(Span { owner, start, end, name }),
            }
        }
        for span in &mut spans {
            if let Some(pid) = self.processes.get(&span.owner).filter(|_| several) {
                span.name = format!("{} ({pid})", span.name);
            }
        }
        let mut pages = 0;
        let mut before = Vec::with_capacity(spans.len());
        for span in &spans {
            before.push(pages);
            pages += span.end - span.start;
        }
        Axis { spans, before, pages }
    }
}

/// Whether a set has a page of `start..end`.
fn holds_any(set: &PageSet, start: u64, end: u64) -> bool {
    let runs = set.runs();
    runs.get(runs.partition_point(|run| run.end() <= start)).is_some_and(|run| run.start < end)
}

fn label(region: &ObservedRegion) -> String {
    let file = |name: &str| name.rsplit('/').next().unwrap_or(name).to_owned();
    match region.kind {
        RegionKind::Heap => "heap".to_owned(),
        RegionKind::Stack => "stack".to_owned(),
        _ if !region.name.is_empty() => file(&region.name),
        RegionKind::Shared => "shared".to_owned(),
        _ => format!("{:#x}", region.start << 12),
    }
}

impl Axis {
    /// Pages that are shown.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    /// Place of a page; `None` if nothing is shown there.
    fn place(&self, owner: Owner, page: u64) -> Option<u64> {
        let next = self.spans.partition_point(|span| (span.owner, span.start) <= (owner, page));
        let at = next.checked_sub(1)?;
        let span = &self.spans[at];
        (span.owner == owner && page < span.end).then(|| self.before[at] + (page - span.start))
    }

    /// Name, first place and pages of each stretch, in order.
    pub(super) fn stretches(&self) -> impl Iterator<Item = (&str, u64, u64)> {
        self.spans
            .iter()
            .zip(&self.before)
            .map(|(span, before)| (span.name.as_str(), *before, span.end - span.start))
    }
}

/// Dirty pages counted in cells.
#[derive(Debug)]
pub(super) struct Heat {
    columns: usize,
    rows: usize,
    duration: Duration,
    /// Dirty pages summed over the scans of a cell.
    dirty: Vec<f64>,
    /// Scans in each column.
    scans: Vec<u32>,
}

impl Heat {
    /// An empty grid over `duration`.
    pub(super) fn new(columns: usize, rows: usize, duration: Duration) -> Self {
        Self { columns, rows, duration, dirty: vec![0.0; columns * rows], scans: vec![0; columns] }
    }

    /// Counts one observation. The first of a space is its base and no write.
    pub(super) fn observe(&mut self, axis: &Axis, observation: &Observation) {
        if axis.pages == 0 || self.duration.is_zero() {
            return;
        }
        let at = observation.at.as_secs_f64() / self.duration.as_secs_f64();
        let column = ((at * self.columns as f64).ceil() as usize).clamp(1, self.columns) - 1;
        self.scans[column] += 1;
        let rows = self.rows as u64;
        let spaces = observation.spaces.iter().filter(|space| !space.is_new);
        let objects = observation.objects.iter().filter(|object| !object.is_new);
        let written = spaces.map(|space| (Owner::from(space.key), &space.dirty));
        for (owner, dirty) in written.chain(objects.map(|object| (object.id.into(), &object.dirty))) {
            for run in dirty.runs() {
                let mut page = run.start;
                let end = run.start + run.len;
                while page < end {
                    let Some(place) = axis.place(owner, page) else {
                        page += 1;
                        continue;
                    };
                    let row = (u128::from(place) * u128::from(rows) / u128::from(axis.pages)) as u64;
                    // To the end of the cell, of the run or of the stretch.
                    let cell_end = ((row + 1) * axis.pages).div_ceil(rows);
                    let len = (end - page).min(cell_end - place).min(axis.left(owner, page)).max(1);
                    self.dirty[column * self.rows + row as usize] += len as f64;
                    page += len;
                }
            }
        }
    }

    /// Cells with something in them: column, row, and the share of the cell's pages that a scan found dirty (0..=1).
    pub(super) fn cells(&self, axis: &Axis) -> impl Iterator<Item = (usize, usize, f64)> {
        let pages = axis.pages as f64 / self.rows as f64;
        self.dirty.iter().enumerate().filter(|(_, dirty)| **dirty > 0.0).map(move |(index, dirty)| {
            let (column, row) = (index / self.rows, index % self.rows);
            let scans = f64::from(self.scans[column].max(1));
            (column, row, (dirty / scans / pages).min(1.0))
        })
    }

    /// Columns and rows.
    pub(super) fn size(&self) -> (usize, usize) {
        (self.columns, self.rows)
    }
}

impl Axis {
    /// Pages from `page` to the end of its stretch.
    fn left(&self, owner: Owner, page: u64) -> u64 {
        let next = self.spans.partition_point(|span| (span.owner, span.start) <= (owner, page));
        next.checked_sub(1).map_or(1, |at| self.spans[at].end.saturating_sub(page))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_tracker::observation::{ObjectId, ObservedObject, ObservedSpace};
    use pageferry_tracker::{PageSet, SpaceKey};

    const OBJECT: ObjectId = ObjectId { device: (0, 1), inode: 7 };
    const FIRST: Owner = Owner::Space(SpaceKey(0));

    fn set(runs: &[(u64, u64)]) -> PageSet {
        let mut set = PageSet::default();
        for &(start, len) in runs {
            set.insert(start, len);
        }
        set
    }

    fn observation(seconds: u64, dirty: &[(u64, u64)]) -> Observation {
        let region = |start, end, kind| ObservedRegion { start, end, kind, name: String::new() };
        Observation {
            at: Duration::from_secs(seconds),
            took: Duration::ZERO,
            pause: Duration::ZERO,
            spaces: vec![ObservedSpace {
                key: SpaceKey(0),
                pid: 9,
                name: "subject".to_owned(),
                is_new: seconds == 0,
                regions: vec![
                    region(100, 200, RegionKind::Heap),
                    region(1000, 1100, RegionKind::Anonymous),
                    region(5000, 6000, RegionKind::Other),
                ],
                populated: set(&[(100, 100), (1000, 100)]),
                dirty: set(dirty),
                unchanged: None,
            }],
            objects: vec![ObservedObject {
                id: OBJECT,
                name: "/dev/shm/queue".to_owned(),
                is_new: seconds == 0,
                mapped_by: vec![SpaceKey(0)],
                populated: set(&[(0, 50)]),
                dirty: set(&[]),
                unchanged: None,
            }],
            exited: Vec::new(),
        }
    }

    #[test]
    fn gaps_and_empty_regions_take_no_room() {
        let mut regions = Regions::default();
        regions.observe(&observation(0, &[]));
        let axis = regions.axis();
        assert_eq!(axis.pages(), 250);
        let stretches: Vec<_> = axis.stretches().collect();
        assert_eq!(stretches, [("heap", 0, 100), ("0x3e8000", 100, 100), ("queue", 200, 50)]);
        assert_eq!(
            (axis.place(FIRST, 150), axis.place(FIRST, 1001), axis.place(FIRST, 500)),
            (Some(50), Some(101), None)
        );
        assert_eq!(axis.place(Owner::Space(SpaceKey(1)), 150), None);
        assert_eq!((axis.place(OBJECT.into(), 49), axis.place(OBJECT.into(), 50)), (Some(249), None));
    }

    #[test]
    fn a_cell_is_the_share_of_its_pages_that_a_scan_found_dirty() {
        let mut observations =
            [observation(0, &[(100, 100)]), observation(1, &[(100, 20)]), observation(2, &[(1050, 50)])];
        observations.iter_mut().for_each(|observation| observation.objects.clear());
        let mut regions = Regions::default();
        observations.iter().for_each(|o| regions.observe(o));
        let axis = regions.axis();
        let mut heat = Heat::new(2, 4, Duration::from_secs(2));
        observations.iter().for_each(|o| heat.observe(&axis, o));
        let cells: Vec<_> = heat.cells(&axis).collect();
        // The base counts as a scan without writes.
        assert_eq!(cells, [(0, 0, 20.0 / 2.0 / 50.0), (1, 3, 1.0)]);
    }
}
