//! What one scan saw, free of kernel handles: what recordings, the estimator and views share.

use crate::attach::{Collected, SpaceKey};
use crate::objects::ObjectScan;
use crate::page_set::PageSet;
use crate::region::Region;
use std::time::Duration;

/// One scan of a whole tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observation {
    /// When the scan was over, since tracking began.
    pub at: Duration,
    /// How long the scan took.
    pub took: Duration,
    /// How long the tree stood still for it.
    pub pause: Duration,
    /// Every address space, the root's first.
    pub spaces: Vec<ObservedSpace>,
    /// All memory that is mapped as shared, each object once, whoever maps it; an object that is not here any more is gone.
    /// Empty where a tracker does not watch it ([`crate::Scope::Lazy`]).
    pub objects: Vec<ObservedObject>,
    /// Spaces that were seen before and are gone.
    pub exited: Vec<SpaceKey>,
}

/// One address space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObservedSpace {
    /// Its key.
    pub key: SpaceKey,
    /// Its process.
    pub pid: i32,
    /// The name of its process.
    pub name: String,
    /// Whether it is seen for the first time.
    pub is_new: bool,
    /// Its mappings, by address.
    pub regions: Vec<ObservedRegion>,
    /// Pages that exist, of the mappings that are tracked.
    pub populated: PageSet,
    /// Of these, the pages that were written since the scan before. In the first observation of a space that is
    /// every page: the base on which writes are counted, and no write itself.
    pub dirty: PageSet,
    /// Of the dirty pages, those that were written with the bytes that they had before; `None` when nobody looked
    /// at contents.
    pub unchanged: Option<PageSet>,
}

/// One object of shared memory. Its pages have numbers of their own (offset in the object / 4096), and belong to no
/// space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObservedObject {
    /// Which it is.
    pub id: ObjectId,
    /// The file, or what the kernel calls it; empty for none.
    pub name: String,
    /// Whether it is seen for the first time.
    pub is_new: bool,
    /// The spaces that map it, each once.
    pub mapped_by: Vec<SpaceKey>,
    /// Pages that exist.
    pub populated: PageSet,
    /// Of these, the pages that were written since the scan before: as [`ObservedSpace::dirty`].
    pub dirty: PageSet,
    /// As [`ObservedSpace::unchanged`].
    pub unchanged: Option<PageSet>,
}

/// Which object it is, for as long as it is there. The kernel may give the same numbers to another when it is gone; that
/// is new then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId {
    /// Device of the file, major and minor.
    pub device: (u32, u32),
    /// Inode of the file.
    pub inode: u64,
}

/// Whose pages they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Owner {
    /// Of one address space.
    Space(SpaceKey),
    /// Of a shared object.
    Object(ObjectId),
}

impl From<SpaceKey> for Owner {
    fn from(key: SpaceKey) -> Self {
        Owner::Space(key)
    }
}

impl From<ObjectId> for Owner {
    fn from(id: ObjectId) -> Self {
        Owner::Object(id)
    }
}

/// One mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObservedRegion {
    /// The first page, by number (address / 4096).
    pub start: u64,
    /// One past the last page.
    pub end: u64,
    /// What it is for.
    pub kind: RegionKind,
    /// The file or the kernel's name for it; empty for none.
    pub name: String,
}

/// What a mapping is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RegionKind {
    /// What `brk` moves.
    Heap,
    /// The stack of the first thread. (Those of others are anonymous mappings.)
    Stack,
    /// Private memory without a file.
    Anonymous,
    /// A file's pages, changed pages being the process's own.
    FilePrivate,
    /// Memory or a file that others may see.
    Shared,
    /// The kernel's own: vdso, vvar.
    Other,
}

impl Observation {
    /// Takes down what a collect found. `at` is when it was over, since tracking began, and `took` how long it took.
    pub fn of(collected: &Collected, at: Duration, took: Duration) -> Self {
        let spaces = collected.spaces.iter().map(|space| ObservedSpace {
            key: space.key,
            pid: space.target.pid(),
            name: space.target.name(),
            is_new: space.is_new,
            regions: space.regions.iter().map(ObservedRegion::from).collect(),
            populated: space.populated.clone(),
            dirty: space.dirty.clone(),
            unchanged: None,
        });
        let objects = collected.objects.iter().map(ObservedObject::from);
        Self {
            at,
            took,
            pause: collected.pause,
            spaces: spaces.collect(),
            objects: objects.collect(),
            exited: collected.exited.clone(),
        }
    }
}

impl From<&ObjectScan> for ObservedObject {
    fn from(scan: &ObjectScan) -> Self {
        let name = scan.path.as_ref().map(|path| path.to_string_lossy().into_owned());
        Self {
            id: ObjectId { device: scan.device, inode: scan.inode },
            name: name.unwrap_or_default(),
            is_new: scan.is_new,
            mapped_by: scan.mapped_by.clone(),
            populated: scan.populated.clone(),
            dirty: scan.dirty.clone(),
            unchanged: None,
        }
    }
}

impl ObservedObject {
    /// One region: all of it, up to its last page.
    pub fn region(&self) -> ObservedRegion {
        let end = self.populated.runs().last().map_or(0, crate::page_set::Run::end);
        ObservedRegion { start: 0, end, kind: RegionKind::Shared, name: self.name.clone() }
    }
}

impl From<&Region> for ObservedRegion {
    fn from(region: &Region) -> Self {
        let name = region.path.as_ref().map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
        let kind = match name.as_str() {
            _ if region.shared => RegionKind::Shared,
            _ if region.inode != 0 => RegionKind::FilePrivate,
            "[heap]" => RegionKind::Heap,
            "[stack]" => RegionKind::Stack,
            "" => RegionKind::Anonymous,
            name if name.starts_with("[anon:") => RegionKind::Anonymous,
            // Private pages of /dev/zero and the like have a file; what is left is the kernel's.
            _ => RegionKind::Other,
        };
        Self { start: region.start / 4096, end: region.end / 4096, kind, name }
    }
}

impl RegionKind {
    /// Its name, for people and for JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            RegionKind::Heap => "heap",
            RegionKind::Stack => "stack",
            RegionKind::Anonymous => "anonymous",
            RegionKind::FilePrivate => "file-private",
            RegionKind::Shared => "shared",
            RegionKind::Other => "other",
        }
    }
}

impl std::fmt::Display for RegionKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_is_named_for_what_it_is_for() {
        let kind = |shared, inode, path: Option<&str>| {
            let path = path.map(Into::into);
            let region = Region { start: 0x3000, end: 0x5000, shared, inode, path, ..Region::default() };
            let seen = ObservedRegion::from(&region);
            assert_eq!((seen.start, seen.end), (3, 5));
            seen.kind
        };
        assert_eq!(kind(false, 0, Some("[heap]")), RegionKind::Heap);
        assert_eq!(kind(false, 0, Some("[stack]")), RegionKind::Stack);
        assert_eq!(kind(false, 0, None), RegionKind::Anonymous);
        assert_eq!(kind(false, 0, Some("[anon:arena]")), RegionKind::Anonymous);
        assert_eq!(kind(false, 7, Some("/usr/lib/libc.so.6")), RegionKind::FilePrivate);
        assert_eq!(kind(false, 7, Some("[heap]")), RegionKind::FilePrivate);
        assert_eq!(kind(true, 7, Some("/dev/shm/x")), RegionKind::Shared);
        assert_eq!(kind(true, 0, None), RegionKind::Shared);
        assert_eq!(kind(false, 0, Some("[vdso]")), RegionKind::Other);
    }
}
