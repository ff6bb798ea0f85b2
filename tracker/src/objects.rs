//! Memory that processes share: counted once, whoever maps it, and by its own pages.

use crate::attach::{SpaceKey, SpaceScan};
use crate::page_set::{PageSet, Run};
use crate::reclaim::{Reclaim, Taken};
use crate::region::Region;
use crate::scope::{Backing, View};
use crate::target::Target;
use rustix::fs::{SeekFrom, seek};
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

/// Memory that is mapped as shared: a memfd, System V or POSIX shared memory, shared anonymous memory, a file. However
/// many processes of the tree map it, and however often, it is here once.
#[derive(Clone, Debug)]
pub struct ObjectScan {
    /// Device of the file, major and minor.
    pub device: (u32, u32),
    /// Inode of the file.
    pub inode: u64,
    /// The file, or what the kernel calls it.
    pub path: Option<PathBuf>,
    /// Whether it is returned for the first time.
    pub is_new: bool,
    /// Its pages that exist and that somebody in the tree has mapped, by their number in the object (offset / 4096).
    /// Of what lies in memory the kernel says which exist; of a file on a disk these are the pages that
    /// are mapped in.
    pub populated: PageSet,
    /// Of these, the pages that may have been written since the last acknowledged collect. Everything the first time,
    /// and everything in a frozen tree: what is done through a descriptor (write, punching holes, truncation) or by
    /// processes outside of the tree leaves no mark. A comparison of digests takes out what did not change.
    pub dirty: PageSet,
    /// The spaces that map it, each once.
    pub mapped_by: Vec<SpaceKey>,
}

/// Device and inode.
pub(crate) type ObjectKey = ((u32, u32), u64);

/// What a space has of an object through mappings that have its pages at the same distance from their addresses: in each
/// such, a page of the object has one place in the page tables.
#[derive(Clone, Debug, Default)]
pub(crate) struct Part {
    /// A mapping of it.
    region: Region,
    in_memory: bool,
    mapped: PageSet,
    writable: PageSet,
    present: PageSet,
    dirty: PageSet,
}

/// By object, and by that distance in pages (object - address, modulo 2^64).
pub(crate) type Parts = BTreeMap<(ObjectKey, u64), Part>;

/// Sorts what a space was found to have into objects. `populated` and `dirty` are by address.
pub(crate) fn parts(view: &View, populated: &PageSet, dirty: &PageSet) -> Parts {
    let mut parts = Parts::new();
    for (region, care) in view.watched().filter(|(_, care)| care.backing == Backing::Shared) {
        let first = region.offset / 4096;
        let distance = first.wrapping_sub(region.start / 4096);
        let key = ((region.device, region.inode), distance);
        let part = parts.entry(key).or_insert_with(|| Part {
            region: region.clone(),
            in_memory: care.in_memory,
            ..Part::default()
        });
        part.mapped.insert(first, region.pages());
        if region.write {
            part.writable.insert(first, region.pages());
        }
        let here: PageSet = [Run { start: region.start / 4096, len: region.pages() }].into_iter().collect();
        for (from, to) in [(populated, &mut part.present), (dirty, &mut part.dirty)] {
            for run in from.intersect(&here).runs() {
                to.insert(run.start.wrapping_add(distance), run.len);
            }
        }
    }
    parts
}

#[derive(Debug, Default)]
struct Object {
    pending: PageSet,
    populated: PageSet,
    returned: bool,
}

/// The objects of a tree, over time.
#[derive(Debug, Default)]
pub(crate) struct Objects {
    known: BTreeMap<ObjectKey, Object>,
    reclaim: Reclaim,
    /// What the kernel may have taken away since the last look.
    taken: Taken,
    /// Whether a page that is taken away and comes back has lost the mark of a write: soft-dirty's.
    loses_marks: bool,
}

impl Objects {
    pub(crate) fn new(loses_marks: bool) -> Self {
        Self { loses_marks, ..Self::default() }
    }

    /// Before the spaces are looked at. (What is taken between this and the look at a space counts at the next.)
    pub(crate) fn begin(&mut self) {
        self.taken = self.reclaim.since_last();
    }

    /// A space has `now`, where it had `before`.
    ///
    /// The marks of writes lie in the page tables of who wrote, and go with them. So what a space had in its page
    /// tables and has no more (the kernel took it out to swap it, or the program did) may have been written there,
    /// and whatever it could write to before it unmapped it. And while the kernel takes pages away, a page that is not
    /// there now may have come, been written, and gone again; a source that loses marks does not know of those that
    /// are there either.
    pub(crate) fn changed(&mut self, before: &Parts, now: &Parts) {
        let none = Part::default();
        for (key, old) in before {
            let new = now.get(key).unwrap_or(&none);
            let lost = old.present.subtract(&new.present).union(&old.writable.subtract(&new.writable));
            self.add(key.0, &lost);
        }
        for (key, part) in now {
            self.add(key.0, &part.dirty);
            let taken = if part.in_memory { self.taken.memory } else { self.taken.files };
            if taken && self.loses_marks {
                self.add(key.0, &part.writable);
            } else if taken {
                self.add(key.0, &part.writable.subtract(&part.present));
            }
        }
    }

    fn add(&mut self, key: ObjectKey, pages: &PageSet) {
        let object = self.known.entry(key).or_default();
        object.pending = object.pending.union(pages);
    }

    /// After every space was looked at: what each object has, and what of it was written.
    pub(crate) fn finish<'a>(
        &mut self,
        spaces: impl Iterator<Item = (SpaceKey, &'a Target, &'a Parts)>,
        frozen: bool,
    ) -> Vec<ObjectScan> {
        let mut found: BTreeMap<ObjectKey, (ObjectScan, PageSet)> = BTreeMap::new();
        let mut sources: BTreeMap<ObjectKey, Vec<(&Target, &Region)>> = BTreeMap::new();
        for (space, target, parts) in spaces {
            for ((key, _), part) in parts {
                let (scan, mapped) = found.entry(*key).or_insert_with(|| {
                    let path = part.region.path.clone();
                    (ObjectScan::new(*key, path), PageSet::default())
                });
                *mapped = mapped.union(&part.mapped);
                scan.populated = scan.populated.union(&part.present);
                if scan.mapped_by.last() != Some(&space) {
                    scan.mapped_by.push(space);
                }
                if part.in_memory {
                    sources.entry(*key).or_default().push((target, &part.region));
                }
            }
        }
        self.known.retain(|key, _| found.contains_key(key));
        let mut scans = Vec::with_capacity(found.len());
        for (key, (mut scan, mapped)) in found {
            let mappings = sources.remove(&key).unwrap_or_default();
            // The first may be unmapped by now; without any, what is mapped in is what we know of.
            if let Some(data) =
                mappings.iter().find_map(|(target, region)| data(target, region, &mapped).ok())
            {
                scan.populated = scan.populated.union(&data);
            }
            let object = self.known.entry(key).or_default();
            scan.is_new = !object.returned;
            scan.dirty = if scan.is_new || frozen {
                scan.populated.clone()
            } else {
                let come = scan.populated.subtract(&object.populated);
                object.pending.intersect(&scan.populated).union(&come)
            };
            *object =
                Object { pending: scan.dirty.clone(), populated: scan.populated.clone(), returned: true };
            scans.push(scan);
        }
        scans
    }

    /// What was collected last has arrived.
    pub(crate) fn acknowledge(&mut self) {
        self.known.values_mut().for_each(|object| object.pending = PageSet::default());
    }
}

impl ObjectScan {
    /// The page at which `space` has a page of the object mapped, to be read there with a [`crate::PageReader`]; `None` if
    /// it has not.
    pub fn page_in(&self, space: &SpaceScan, page: u64) -> Option<u64> {
        space.regions.iter().filter(|region| self.is_in(region)).find_map(|region| {
            let within = page.checked_sub(region.offset / 4096)?;
            (within < region.pages()).then_some(region.start / 4096 + within)
        })
    }

    /// Where `space` has pages of the object mapped: runs of those of `pages` that it has, each once, and the page at which
    /// each run begins there.
    pub fn runs_in(&self, space: &SpaceScan, pages: &PageSet) -> Vec<(Run, u64)> {
        let mut rest = pages.clone();
        let mut found = Vec::new();
        for region in space.regions.iter().filter(|region| self.is_in(region)) {
            let first = region.offset / 4096;
            let mapped: PageSet = [Run { start: first, len: region.pages() }].into_iter().collect();
            let here = rest.intersect(&mapped);
            found.extend(here.runs().iter().map(|run| (*run, region.start / 4096 + (run.start - first))));
            rest = rest.subtract(&here);
        }
        found
    }

    fn is_in(&self, region: &Region) -> bool {
        region.shared && (region.device, region.inode) == (self.device, self.inode)
    }

    fn new((device, inode): ObjectKey, path: Option<PathBuf>) -> Self {
        let (populated, dirty, mapped_by) = Default::default();
        Self { device, inode, path, is_new: false, populated, dirty, mapped_by }
    }
}

/// The pages of the object of a mapping that exist in the file system, and lie in `mapped`: also those that nobody
/// has mapped in, because they are swapped, or were written through a descriptor.
fn data(target: &Target, region: &Region, mapped: &PageSet) -> io::Result<PageSet> {
    let file = target.open_mapped_file(region.start, region.end)?;
    let mut pages = PageSet::default();
    for run in mapped.runs() {
        let (mut at, end) = (run.start * 4096, run.end() * 4096);
        while at < end {
            // ENXIO: nothing behind it.
            let from = match seek(&file, SeekFrom::Data(at)) {
                Err(rustix::io::Errno::NXIO) => break,
                found => found?.min(end),
            };
            let to = match seek(&file, SeekFrom::Hole(from)) {
                // It was cut off in between.
                Err(rustix::io::Errno::NXIO) => break,
                found => found?.min(end),
            };
            let (first, last) = (from / 4096, to.div_ceil(4096));
            pages.insert(first, last.saturating_sub(first));
            if to <= at {
                break;
            }
            at = to;
        }
    }
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: ObjectKey = ((0, 1), 7);

    fn set(pages: &[u64]) -> PageSet {
        pages.iter().map(|page| Run { start: *page, len: 1 }).collect()
    }

    fn part(mapped: &[u64], present: &[u64], dirty: &[u64]) -> Parts {
        let (mapped, present, dirty) = (set(mapped), set(present), set(dirty));
        Parts::from([(
            (KEY, 0),
            Part { writable: mapped.clone(), mapped, present, dirty, ..Part::default() },
        )])
    }

    struct Tree {
        objects: Objects,
        target: Target,
        spaces: Vec<Parts>,
    }

    impl Tree {
        fn new(child: &std::process::Child) -> Self {
            let target = Target::open(child.id() as i32).unwrap();
            Self { objects: Objects::default(), target, spaces: Vec::new() }
        }

        fn look(&mut self, now: Vec<Parts>, frozen: bool) -> Vec<u64> {
            let none = Parts::new();
            for at in 0..self.spaces.len().max(now.len()) {
                let (old, new) = (self.spaces.get(at).unwrap_or(&none), now.get(at).unwrap_or(&none));
                self.objects.changed(old, new);
            }
            self.spaces = now;
            let spaces = self.spaces.iter().enumerate();
            let spaces = spaces.map(|(at, parts)| (SpaceKey(at as u32), &self.target, parts));
            let scans = self.objects.finish(spaces, frozen);
            assert!(scans.len() <= 1, "one object is listed once: {scans:?}");
            scans.first().map_or(Vec::new(), |scan| scan.dirty.iter().collect())
        }
    }

    #[test]
    fn an_object_is_one_whoever_maps_it() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let mut tree = Tree::new(&child);
        let all = [0, 1, 2, 3];
        let quiet = || part(&all, &all, &[]);
        assert_eq!(tree.look(vec![quiet(), part(&all, &[1], &[])], false), all, "new");
        tree.objects.acknowledge();
        assert_eq!(tree.look(vec![part(&all, &all, &[0]), part(&all, &[1], &[1])], false), [0, 1]);
        assert_eq!(tree.look(vec![quiet(), part(&all, &[1], &[])], false), [0, 1], "not acknowledged");
        tree.objects.acknowledge();
        assert_eq!(tree.look(vec![quiet(), part(&all, &[], &[])], false), [1], "its mark may be gone");
        tree.objects.acknowledge();
        assert_eq!(tree.look(vec![quiet()], false), all, "what the other may have written before it went");
        tree.objects.acknowledge();
        assert_eq!(tree.look(vec![quiet()], false), [0; 0]);
        assert_eq!(tree.look(vec![quiet()], true), all, "frozen");
        tree.objects.acknowledge();
        assert_eq!(tree.look(Vec::new(), false), [0; 0], "nobody has it any more");
        assert_eq!(tree.look(vec![quiet()], false), all, "and it is new when it comes back");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
