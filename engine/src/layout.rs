//! The one place that knows which process is which space on the wire: the tracker speaks of keys and targets,
//! CRIU of pids, the wire of spaces.

use pageferry_tracker::{Region, SpaceKey, Target};
use pageferry_wire_format::SpaceId;
use std::collections::BTreeMap;

/// One address space of the tree that moves.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// Its name on the wire.
    pub(crate) id: SpaceId,
    /// The process.
    pub(crate) target: Target,
    /// Pid in the innermost pid namespace: how CRIU's images call the process.
    pub(crate) vpid: i32,
}

/// All spaces that ever were part of the tree in this session. Numbers are never used again: pages of a
/// process that is gone can not be taken for those of another.
#[derive(Debug, Default)]
pub(crate) struct Layout {
    places: BTreeMap<u32, Place>,
    next: u32,
}

impl Layout {
    /// The place of the tracker's `key`; a new one gets the next number. Says whether it is new.
    ///
    /// # Errors
    /// When `/proc/PID/status` of a new process cannot be read (it has just exited).
    pub(crate) fn place(&mut self, key: SpaceKey, target: &Target) -> std::io::Result<(Place, bool)> {
        if let Some(place) = self.places.get(&key.0) {
            return Ok((place.clone(), false));
        }
        let place = Place { id: SpaceId(self.next), target: target.clone(), vpid: innermost_pid(target)? };
        self.next += 1;
        self.places.insert(key.0, place.clone());
        Ok((place, true))
    }

    /// The tracker's space is gone; says which it was.
    pub(crate) fn remove(&mut self, key: SpaceKey) -> Option<Place> {
        self.places.remove(&key.0)
    }
}

/// The pid by which the process knows itself: the last number of the `NSpid` line.
pub(crate) fn innermost_pid(target: &Target) -> std::io::Result<i32> {
    let path = format!("/proc/{}/status", target.pid());
    let status = std::fs::read_to_string(&path)?;
    status
        .lines()
        .find_map(|line| line.strip_prefix("NSpid:"))
        .and_then(|pids| pids.split_whitespace().next_back()?.parse().ok())
        .ok_or_else(|| std::io::Error::other(format!("{path} has no NSpid line")))
}

/// Splits page runs at the borders of regions: an index entry must not span two mappings.
pub(crate) fn split_at_regions(runs: &[(u64, u64)], regions: &[Region]) -> Vec<(u64, u64)> {
    let mut split = Vec::with_capacity(runs.len() + 8);
    let mut at_region = 0;
    for &(start, pages) in runs {
        let (mut at, end) = (start, start + pages);
        while at_region < regions.len() && regions[at_region].end / 4096 <= at {
            at_region += 1;
        }
        let mut region = at_region;
        while at < end {
            let stop = match regions.get(region) {
                Some(r) if r.start / 4096 > at => end.min(r.start / 4096),
                Some(r) => end.min(r.end / 4096),
                None => end,
            };
            split.push((at, stop - at));
            at = stop;
            region += usize::from(regions.get(region).is_some_and(|r| r.end / 4096 <= at));
        }
    }
    split
}
