//! The destination's half of `--verify`: reads the restored tree and compares it, page by page, with what the
//! source says of its frozen one.

use super::failure::ReceiveError;
use super::receive::Cargo;
use crate::link::{Channel, Incoming};
use crate::verify::{blank_rseq, is_comparable};
use pageferry_criu_glue::{ImageDir, image};
use pageferry_tracker::{self as tracker, PageReader, PageSet, Run, Target};
use pageferry_wire_format::{ControlMessage, SpaceId, digest};
use std::collections::BTreeMap;

/// Pages that are read at a time.
const STEP: u64 = 256;

struct Restored {
    vpid: i32,
    pid: i32,
    reader: PageReader,
    /// Pages that were found equal.
    compared: PageSet,
}

/// Compares until the source has sent the last digest; says how many pages were compared.
pub(super) fn compare(
    channel: &mut Channel,
    root: i32,
    cargo: &Cargo,
    images: &ImageDir,
) -> Result<u64, ReceiveError> {
    let areas = image::tree::rseq_areas(images)?;
    let mut tree = restored_tree(root, cargo)?;
    let mut buffer = vec![0; STEP as usize * 4096];
    loop {
        let batch = match channel.receive()? {
            Incoming::Digests(batch) => batch,
            Incoming::Control(ControlMessage::Abort { code, detail }) => {
                return Err(ReceiveError::SourceAborted { code, detail });
            }
            other => return Err(ReceiveError::Unexpected(format!("{other:?}"))),
        };
        let restored = tree.get_mut(&batch.space).ok_or(ReceiveError::UnknownSpace(batch.space))?;
        let mut digests = batch.digests.iter();
        let (vpid, pid) = (restored.vpid, restored.pid);
        let differs = |page| ReceiveError::Differs { vpid, page };
        for run in &batch.runs {
            let mut at = run.start.0;
            while at < run.end() {
                let len = (run.end() - at).min(STEP);
                let bytes = &mut buffer[..len as usize * 4096];
                let missing = restored
                    .reader
                    .read(&[Run { start: at, len }], bytes)
                    .map_err(|source| ReceiveError::Read { pid, source })?;
                if let Some(page) = missing.first() {
                    return Err(differs(*page));
                }
                for (page, bytes) in (at..).zip(bytes.chunks_exact_mut(4096)) {
                    blank_rseq(&areas, vpid, page, bytes);
                    if Some(&digest::page(bytes)) != digests.next() {
                        return Err(differs(page));
                    }
                }
                at += len;
            }
            restored.compared.insert(run.start.0, run.len);
        }
        if !batch.more {
            break;
        }
    }
    complete(&tree, cargo)
}

/// A comparison counts only if nothing that the engine carried was left out of it. Says how many pages it covered.
fn complete(tree: &BTreeMap<SpaceId, Restored>, cargo: &Cargo) -> Result<u64, ReceiveError> {
    let mut pages = 0;
    for (space, restored) in tree {
        // What is owed comes with a digest of its own.
        let held =
            cargo.spaces.get(space).map(super::receive::Incomer::held).transpose()?.unwrap_or_default();
        let owned = super::receive::page_set(&held);
        if let Some(run) = owned.subtract(&restored.compared).runs().first() {
            return Err(ReceiveError::NotCompared { vpid: restored.vpid, page: run.start });
        }
        pages += restored.compared.len();
    }
    Ok(pages)
}

/// Finds every announced process in the restored tree, and checks that its regions are where they were.
fn restored_tree(root: i32, cargo: &Cargo) -> Result<BTreeMap<SpaceId, Restored>, ReceiveError> {
    let look = |pid, source: Box<dyn std::error::Error + Send + Sync>| ReceiveError::Look { pid, source };
    let root_target = Target::open(root).map_err(|e| look(root, e.into()))?;
    let tree = tracker::tree::discover(&root_target).map_err(|e| look(root, e.into()))?;
    let mut by_vpid = BTreeMap::new();
    for target in tree {
        let vpid = crate::layout::innermost_pid(&target).map_err(|e| look(target.pid(), e.into()))?;
        by_vpid.insert(vpid, target);
    }
    let mut restored = BTreeMap::new();
    for (space, incomer) in &cargo.spaces {
        let vpid = incomer.vpid;
        let target = by_vpid.get(&vpid).ok_or(ReceiveError::NotRestored { vpid })?;
        let pid = target.pid();
        let regions = tracker::region::read(target).map_err(|e| look(pid, e.into()))?;
        let here = merged(regions.iter().filter(|r| is_comparable(r)).map(|r| (r.start, r.end)));
        let there = merged(incomer.regions.iter().filter(|r| r.comparable).map(|r| (r.start, r.end)));
        if let Some((start, end)) = there.iter().find(|range| !covered(&here, **range)) {
            let what = format!("{start:#x}-{end:#x} of the source is not mapped");
            return Err(ReceiveError::RegionsDiffer { vpid, what });
        }
        let reader = PageReader::new(target).map_err(|source| ReceiveError::Read { pid, source })?;
        restored.insert(*space, Restored { vpid, pid, reader, compared: PageSet::default() });
    }
    Ok(restored)
}

/// Neighbouring regions as one: the kernel may merge or split them differently.
fn merged(ranges: impl Iterator<Item = (u64, u64)>) -> Vec<(u64, u64)> {
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for (start, end) in ranges {
        match merged.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => merged.push((start, end)),
        }
    }
    merged
}

fn covered(ranges: &[(u64, u64)], (start, end): (u64, u64)) -> bool {
    ranges.iter().any(|range| range.0 <= start && end <= range.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_compared_as_covered_space() {
        let here = merged([(0, 10), (10, 20), (30, 40)].into_iter());
        assert_eq!(here, [(0, 20), (30, 40)]);
        assert!(covered(&here, (5, 20)));
        assert!(!covered(&here, (15, 31)));
    }
}
