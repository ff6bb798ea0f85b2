//! What the kernel can do, found out by trying: a kernel without soft-dirty accepts every call and says for ever
//! that nothing was written.

use crate::sys::{pagemap, uffd};
use memmap2::MmapMut;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use std::fmt;
use std::fs::{self, File};
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

/// How dirty pages are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TrackerKind {
    /// Bit 55 of pagemap, read entry by entry and cleared through `clear_refs`; the tree stands still while that is
    /// done.
    SoftDirty,
    /// The same bit, read by PAGEMAP_SCAN.
    SoftDirtyScan,
    /// Asynchronous write-protection through userfaultfd, read by PAGEMAP_SCAN; the tree runs on.
    UffdWp,
    /// Digests of the pages' contents, read while the tree runs: needs nothing of the kernel, and reads all of the
    /// memory at every look.
    Compare,
}

impl TrackerKind {
    /// All of them, the one that is preferred first.
    pub const ALL: [TrackerKind; 4] =
        [TrackerKind::UffdWp, TrackerKind::SoftDirtyScan, TrackerKind::SoftDirty, TrackerKind::Compare];

    /// Its name, as it is said and understood.
    pub fn name(self) -> &'static str {
        match self {
            TrackerKind::SoftDirty => "soft-dirty",
            TrackerKind::SoftDirtyScan => "soft-dirty-scan",
            TrackerKind::UffdWp => "userfaultfd",
            TrackerKind::Compare => "compare",
        }
    }

    /// Whether the tree has to stand still for a look: soft-dirty bits are read and cleared in two steps.
    pub fn stops_the_tree(self) -> bool {
        matches!(self, TrackerKind::SoftDirty | TrackerKind::SoftDirtyScan)
    }
}

impl fmt::Display for TrackerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that no tracker has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no tracker {0:?}: it is one of userfaultfd, soft-dirty-scan, soft-dirty and compare")]
pub struct UnknownTracker(pub String);

impl FromStr for TrackerKind {
    type Err = UnknownTracker;

    fn from_str(name: &str) -> Result<Self, UnknownTracker> {
        let known = Self::ALL.into_iter().find(|kind| kind.name() == name);
        known.ok_or_else(|| UnknownTracker(name.to_owned()))
    }
}

/// One thing that a kernel can or cannot do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feature {
    /// Whether it works.
    pub works: bool,
    /// What was seen.
    pub reason: String,
}

impl Feature {
    fn from(result: Result<&str, String>) -> Self {
        match result {
            Ok(reason) => Self { works: true, reason: reason.to_owned() },
            Err(reason) => Self { works: false, reason },
        }
    }
}

/// What this kernel can do.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Soft-dirty bits.
    pub soft_dirty: Feature,
    /// Asynchronous write-protection.
    pub uffd_wp_async: Feature,
    /// PAGEMAP_SCAN.
    pub pagemap_scan: Feature,
    /// PAGEMAP_SCAN that reports soft-dirty.
    pub scan_soft_dirty: Feature,
    /// Reading the pages of another process.
    pub read_pages: Feature,
}

/// No tracker can be used.
#[derive(Debug, thiserror::Error)]
pub enum ChooseError {
    /// What was asked for does not work.
    #[error("the {kind} tracker does not work on this kernel: {reason}")]
    Wanted {
        /// What was asked for.
        kind: TrackerKind,
        /// Why not.
        reason: String,
    },
    /// Nothing works.
    #[error(
        "this kernel can track no dirty pages: userfaultfd: {uffd}; soft-dirty: {soft_dirty}; compare: {compare}"
    )]
    Nothing {
        /// Why userfaultfd does not.
        uffd: String,
        /// Why soft-dirty does not.
        soft_dirty: String,
        /// Why contents cannot be compared.
        compare: String,
    },
}

const PAGE: usize = 4096;

impl Kernel {
    /// Tries everything on a page of our own.
    pub fn probe() -> Self {
        Self {
            soft_dirty: Feature::from(soft_dirty()),
            uffd_wp_async: Feature::from(uffd_wp()),
            pagemap_scan: Feature::from(pagemap_scan(pagemap::PRESENT, "PAGEMAP_SCAN finds a present page")),
            scan_soft_dirty: Feature::from(
                soft_dirty()
                    .and_then(|_| pagemap_scan(pagemap::SOFT_DIRTY, "PAGEMAP_SCAN reports soft-dirty pages")),
            ),
            read_pages: Feature::from(read_pages()),
        }
    }

    /// What a tracker needs.
    pub fn feature(&self, kind: TrackerKind) -> &Feature {
        match kind {
            TrackerKind::SoftDirty => &self.soft_dirty,
            TrackerKind::SoftDirtyScan => &self.scan_soft_dirty,
            TrackerKind::UffdWp if self.pagemap_scan.works => &self.uffd_wp_async,
            TrackerKind::UffdWp => &self.pagemap_scan,
            TrackerKind::Compare => &self.read_pages,
        }
    }

    /// The tracker to use, and why. Without a wish the first that works: userfaultfd, because the program runs on while
    /// it is scanned; soft-dirty, the quicker way first; and if the kernel tells nothing, the comparison of contents,
    /// which costs the reading of all memory at every look.
    ///
    /// # Errors
    /// [`ChooseError`].
    pub fn choose(&self, wanted: Option<TrackerKind>) -> Result<(TrackerKind, String), ChooseError> {
        if let Some(kind) = wanted {
            let feature = self.feature(kind);
            return match feature.works {
                true => Ok((kind, format!("asked for; {}", feature.reason))),
                false => Err(ChooseError::Wanted { kind, reason: feature.reason.clone() }),
            };
        }
        let why = |kind| self.feature(kind).reason.clone();
        let (uffd, soft_dirty) = (why(TrackerKind::UffdWp), why(TrackerKind::SoftDirty));
        let Some(kind) = TrackerKind::ALL.into_iter().find(|kind| self.feature(*kind).works) else {
            return Err(ChooseError::Nothing { uffd, soft_dirty, compare: why(TrackerKind::Compare) });
        };
        let reason = match kind {
            TrackerKind::UffdWp => format!("{uffd}, and nothing has to stand still for it"),
            TrackerKind::SoftDirtyScan | TrackerKind::SoftDirty => {
                format!("{}; userfaultfd: {uffd}", why(kind))
            }
            TrackerKind::Compare => format!(
                "the last resort, for which all memory is read at every look; userfaultfd: {uffd}; soft-dirty: \
                 {soft_dirty}"
            ),
        };
        Ok((kind, reason))
    }
}

fn our_page() -> Result<(MmapMut, u64), String> {
    let mut page = MmapMut::map_anon(PAGE).map_err(|e| format!("no page to try it on: {e}"))?;
    page[0] = 1;
    let address = page.as_ptr() as u64;
    Ok((page, address))
}

/// Our bits are those of the whole process: two probes at a time would clear each other's.
static OUR_BITS: Mutex<()> = Mutex::new(());

fn soft_dirty() -> Result<&'static str, String> {
    let _alone = OUR_BITS.lock().unwrap_or_else(PoisonError::into_inner);
    let (mut page, address) = our_page()?;
    let bit = || -> io::Result<bool> {
        let mut entry = [0; 8];
        File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, address / PAGE as u64 * 8)?;
        Ok(u64::from_ne_bytes(entry) >> 55 & 1 == 1)
    };
    let read = |e: io::Error| format!("/proc/self/pagemap cannot be read: {e}");
    fs::write("/proc/self/clear_refs", "4").map_err(|e| format!("clear_refs cannot be written: {e}"))?;
    if bit().map_err(read)? {
        return Err("the bit stays set after it was cleared".to_owned());
    }
    page[1] = 1;
    match bit().map_err(read)? {
        true => Ok("a written page shows its soft-dirty bit"),
        false => Err("a written page does not show (the kernel is built without it)".to_owned()),
    }
}

fn read_pages() -> Result<&'static str, String> {
    let (page, address) = our_page()?;
    let mut copy = vec![0; PAGE];
    let failed = |e: &dyn fmt::Display| format!("memory cannot be read: {e}");
    let us = nix::unistd::Pid::this();
    let remote = [RemoteIoVec { base: address as usize, len: PAGE }];
    let got = process_vm_readv(us, &mut [IoSliceMut::new(&mut copy)], &remote).map_err(|e| failed(&e))?;
    File::open("/proc/self/mem").map_err(|e| failed(&e))?;
    match got == PAGE && copy[..] == page[..] {
        true => Ok("memory can be read, and compared"),
        false => Err(format!("of a page {got} bytes were read")),
    }
}

fn pagemap_scan(category: u64, success: &'static str) -> Result<&'static str, String> {
    let (_page, address) = our_page()?;
    let file = File::open("/proc/self/pagemap").map_err(|e| format!("pagemap cannot be opened: {e}"))?;
    let mut seen = false;
    let query = pagemap::Query { mask: category, returned: category, ..Default::default() };
    pagemap::scan(&file, address, address + PAGE as u64, query, |found| {
        seen |= found.categories & category != 0
    })
    .map_err(|e| format!("PAGEMAP_SCAN: {e}"))?;
    if seen { Ok(success) } else { Err("PAGEMAP_SCAN does not see the page".to_owned()) }
}

fn uffd_wp() -> Result<&'static str, String> {
    let (mut page, address) = our_page()?;
    let fd = uffd::open_own().map_err(|e| format!("userfaultfd: {e}"))?;
    uffd::api(&fd, FEATURES).map_err(|e| format!("asynchronous write-protection: {e}"))?;
    let end = address + PAGE as u64;
    uffd::register(&fd, address, end, uffd::MODE_WP).map_err(|e| format!("registering a page: {e}"))?;
    let file = File::open("/proc/self/pagemap").map_err(|e| format!("pagemap cannot be opened: {e}"))?;
    let written = || -> Result<bool, String> {
        let mut seen = false;
        let query = pagemap::Query {
            flags: pagemap::WP_MATCHING,
            mask: pagemap::WRITTEN,
            returned: pagemap::WRITTEN,
            ..Default::default()
        };
        pagemap::scan(&file, address, end, query, |_| seen = true)
            .map_err(|e| format!("PAGEMAP_SCAN: {e}"))?;
        Ok(seen)
    };
    written()?;
    if written()? {
        return Err("a protected page shows as written".to_owned());
    }
    page[1] = 1;
    match written()? {
        true => Ok("a written page shows its write-protection gone"),
        false => Err("a written page does not show".to_owned()),
    }
}

/// What a tracker asks userfaultfd for.
pub(crate) const FEATURES: u64 =
    uffd::FEATURE_WP_ASYNC | uffd::FEATURE_WP_UNPOPULATED | uffd::FEATURE_PAGEFAULT_FLAG_WP;

#[cfg(test)]
mod tests {
    use super::*;

    fn feature(works: bool) -> Feature {
        Feature { works, reason: format!("works: {works}") }
    }

    fn kernel(soft_dirty: bool, uffd: bool) -> Kernel {
        Kernel {
            soft_dirty: feature(soft_dirty),
            uffd_wp_async: feature(uffd),
            pagemap_scan: feature(uffd),
            scan_soft_dirty: feature(soft_dirty && uffd),
            read_pages: feature(true),
        }
    }

    #[test]
    fn the_choice_follows_what_works() {
        let chosen = |kernel: &Kernel| kernel.choose(None).map(|(kind, _)| kind);
        assert_eq!(chosen(&kernel(true, true)).unwrap(), TrackerKind::UffdWp);
        assert_eq!(chosen(&kernel(true, false)).unwrap(), TrackerKind::SoftDirty);
        assert_eq!(chosen(&kernel(false, true)).unwrap(), TrackerKind::UffdWp);
        let no_uffd = Kernel { uffd_wp_async: feature(false), ..kernel(true, true) };
        assert_eq!(chosen(&no_uffd).unwrap(), TrackerKind::SoftDirtyScan);
        let (kind, reason) = kernel(false, false).choose(None).unwrap();
        assert_eq!(kind, TrackerKind::Compare);
        assert!(reason.contains("all memory is read at every look"), "{reason}");
        let blind = Kernel { read_pages: feature(false), ..kernel(false, false) };
        assert!(matches!(blind.choose(None), Err(ChooseError::Nothing { .. })));
    }

    #[test]
    fn a_wish_is_granted_or_refused_with_its_reason() {
        for kind in TrackerKind::ALL {
            let (chosen, reason) = kernel(true, true).choose(Some(kind)).unwrap();
            assert_eq!((chosen, reason.as_str()), (kind, "asked for; works: true"));
        }
        let refused = kernel(true, false).choose(Some(TrackerKind::UffdWp)).unwrap_err().to_string();
        assert_eq!(refused, "the userfaultfd tracker does not work on this kernel: works: false");
    }

    #[test]
    fn names_are_understood() {
        for kind in TrackerKind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        let error = "softdirty".parse::<TrackerKind>().unwrap_err().to_string();
        assert!(TrackerKind::ALL.iter().all(|kind| error.contains(kind.name())), "{error}");
    }

    #[test]
    fn this_kernel_gives_reasons() {
        let kernel = Kernel::probe();
        for kind in TrackerKind::ALL {
            assert!(!kernel.feature(kind).reason.is_empty());
        }
        assert!(kernel.read_pages.works, "{}", kernel.read_pages.reason);
    }
}
