//! Which mappings of a process are watched, and what they are made of.

use crate::page_set::PageSet;
use crate::region::Region;
use crate::target::{Counts, Target};
use rustix::fs::{FileType, fstat, fstatfs};
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// Which mappings a tracker watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Those whose pages a migration can send by itself ([`Region::can_be_lazy`]).
    Lazy,
    /// Every mapping that the program can write or has written: also shared memory, files, and locked memory.
    All,
}

/// A mapping whose writes cannot be seen, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Untracked {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// Why.
    pub reason: String,
    /// Whether its pages are named dirty at every collect. If not they are not named at all: they are no memory of the
    /// program's.
    pub named: bool,
}

/// Where the pages of a mapping come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// Private memory.
    Anonymous,
    /// A private mapping of a file: its own are the pages that were changed.
    File,
    /// Pages that others may have too.
    Shared,
}

/// What is known of a mapping that is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Care {
    pub(crate) backing: Backing,
    /// Of hugetlbfs.
    pub(crate) huge: bool,
    /// Its pages outlive it: memory of a file system that has no disk, of which the kernel can tell what exists.
    pub(crate) in_memory: bool,
}

/// A stretch of watched mappings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) shared: bool,
}

/// The mappings of a process at one moment, and which of them are watched.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) regions: Arc<Vec<Region>>,
    /// What the kernel counted just after it told the mappings: [`Counts::own`].
    pub(crate) counted: u64,
    care: Vec<Option<Care>>,
    spans: Vec<Span>,
    /// What no source can watch.
    pub(crate) untracked: Vec<Untracked>,
}

impl View {
    /// Judges `regions` of `target`.
    pub(crate) fn new(
        target: &Target,
        (regions, counts): (Arc<Vec<Region>>, Counts),
        scope: Scope,
        files: &mut Files,
    ) -> Self {
        let mut untracked = Vec::new();
        let care: Vec<Option<Care>> = regions
            .iter()
            .map(|region| match scope {
                Scope::Lazy => region.can_be_lazy().then_some(PRIVATE),
                Scope::All => match judge(region, || files.kind(target, region)) {
                    Ok(care) => care,
                    Err(reason) => {
                        let (start, end, reason) = (region.start, region.end, reason.to_owned());
                        untracked.push(Untracked { start, end, reason, named: false });
                        None
                    }
                },
            })
            .collect();
        let mut view = Self { regions, counted: counts.own, care, spans: Vec::new(), untracked };
        view.spans = view.spans_of(|_| true);
        view
    }

    /// The mappings that are watched.
    pub(crate) fn watched(&self) -> impl Iterator<Item = (&Region, Care)> {
        self.every().filter_map(|(region, care)| care.map(|care| (region, care)))
    }

    /// All mappings.
    pub(crate) fn every(&self) -> impl Iterator<Item = (&Region, Option<Care>)> {
        self.regions.iter().zip(self.care.iter().copied())
    }

    /// Watched mappings, merged where they lie next to each other: fewer, longer scans.
    pub(crate) fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// The same of those that are as wanted.
    pub(crate) fn spans_of(&self, wanted: impl Fn(Care) -> bool) -> Vec<Span> {
        let mut spans: Vec<Span> = Vec::new();
        for (region, care) in self.watched().filter(|(_, care)| wanted(*care)) {
            let shared = care.backing == Backing::Shared;
            match spans.last_mut() {
                Some(last) if last.end == region.start && last.shared == shared => last.end = region.end,
                _ => spans.push(Span { start: region.start, end: region.end, shared }),
            }
        }
        spans
    }

    /// The pages of the watched mappings that are as wanted, whether they exist or not.
    pub(crate) fn pages(&self, wanted: impl Fn(&Region, Care) -> bool) -> PageSet {
        let mut pages = PageSet::default();
        for (region, _) in self.watched().filter(|(region, care)| wanted(region, *care)) {
            pages.insert(region.start / 4096, region.pages());
        }
        pages
    }

    /// Whether there are pages of files among the watched ones.
    pub(crate) fn has_files(&self) -> bool {
        self.watched().any(|(_, care)| care.backing != Backing::Anonymous)
    }
}

const PRIVATE: Care = Care { backing: Backing::Anonymous, huge: false, in_memory: false };

/// What a mapping is in [`Scope::All`]: watched, left out (nobody can write to it), or out of reach.
fn judge(region: &Region, kind: impl FnOnce() -> Kind) -> Result<Option<Care>, &'static str> {
    let name = region.path.as_deref().map_or(&b""[..], |path| path.as_os_str().as_encoded_bytes());
    // System V shared memory has its number for an inode, and the first is 0.
    if region.inode == 0 && !name.starts_with(b"/") {
        let program = matches!(name, b"" | b"[heap]" | b"[stack]") || name.starts_with(b"[anon:");
        // The rest are the kernel's own pages: the vDSO, its clock, uprobes.
        return Ok(program.then_some(PRIVATE));
    }
    if name.starts_with(b"anon_inode:") {
        return Err("memory of the kernel, such as a ring of io_uring or perf");
    }
    let kind = if region.path.as_deref() == Some(Path::new("/dev/zero")) { Kind::Disk } else { kind() };
    let (huge, in_memory) = (kind == Kind::Huge, kind == Kind::Memory);
    match (kind, region.shared) {
        (Kind::Device, _) => Err("memory of a device"),
        (_, false) => Ok(Some(Care { backing: Backing::File, huge, in_memory: false })),
        // What cannot be written now could before, if it is memory and no file of a disk.
        (_, true) if region.write || huge || in_memory => {
            Ok(Some(Care { backing: Backing::Shared, huge, in_memory }))
        }
        (_, true) => Ok(None),
    }
}

/// What kind of file a mapping is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// tmpfs: memfd, POSIX and System V shared memory, shared anonymous memory.
    Memory,
    /// hugetlbfs.
    Huge,
    /// Any other file system, or one that we may not look at.
    Disk,
    /// No regular file.
    Device,
}

/// Remembers what kind of file each is, which takes three system calls to find out.
#[derive(Debug, Default)]
pub(crate) struct Files {
    known: BTreeMap<((u32, u32), u64), Kind>,
}

/// More files than programs map. Who goes through so many has most of them closed.
const REMEMBERED: usize = 1 << 16;

impl Files {
    fn kind(&mut self, target: &Target, region: &Region) -> Kind {
        if self.known.len() > REMEMBERED {
            self.known.clear();
        }
        let key = (region.device, region.inode);
        *self.known.entry(key).or_insert_with(|| look_up(target, region).unwrap_or(Kind::Disk))
    }
}

fn look_up(target: &Target, region: &Region) -> io::Result<Kind> {
    /// `TMPFS_MAGIC` and `HUGETLBFS_MAGIC` (include/uapi/linux/magic.h).
    const TMPFS: u64 = 0x0102_1994;
    const HUGETLBFS: u64 = 0x9584_58f6;
    // Not opened, only named: opening a device does something.
    let file = target.name_mapped_file(region.start, region.end)?;
    if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::RegularFile {
        return Ok(Kind::Device);
    }
    Ok(match fstatfs(&file)?.f_type as u64 {
        TMPFS => Kind::Memory,
        HUGETLBFS => Kind::Huge,
        _ => Kind::Disk,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(path: &str, inode: u64, flags: &str) -> Region {
        Region {
            start: 0x1000,
            end: 0x3000,
            read: flags.contains('r'),
            write: flags.contains('w'),
            shared: flags.contains('s'),
            inode,
            path: (!path.is_empty()).then(|| path.into()),
            ..Region::default()
        }
    }

    #[test]
    fn what_is_watched() {
        let backing =
            |region: Region, kind| judge(&region, || kind).map(|care| care.map(|care| care.backing));
        for path in ["", "[heap]", "[stack]", "[anon:glibc]"] {
            assert_eq!(backing(region(path, 0, "rw"), Kind::Disk), Ok(Some(Backing::Anonymous)), "{path}");
        }
        for path in ["[vdso]", "[vvar]", "[vsyscall]", "[uprobes]"] {
            assert_eq!(backing(region(path, 0, "r"), Kind::Disk), Ok(None), "{path}");
        }
        assert_eq!(backing(region("/lib/a.so", 7, "r"), Kind::Disk), Ok(Some(Backing::File)), "relocations");
        assert_eq!(backing(region("/data", 7, "rws"), Kind::Disk), Ok(Some(Backing::Shared)));
        assert_eq!(backing(region("/locale", 7, "rs"), Kind::Disk), Ok(None), "nobody writes there");
        assert_eq!(backing(region("/memfd:a (deleted)", 7, "rs"), Kind::Memory), Ok(Some(Backing::Shared)));
        assert_eq!(
            backing(region("/SYSV00000000 (deleted)", 0, "rws"), Kind::Memory),
            Ok(Some(Backing::Shared))
        );
        assert_eq!(backing(region("/dev/zero", 7, "rw"), Kind::Device), Ok(Some(Backing::File)));
        backing(region("/dev/card0", 7, "rws"), Kind::Device).unwrap_err();
        backing(region("anon_inode:[io_uring]", 7, "rws"), Kind::Disk).unwrap_err();
    }
}
