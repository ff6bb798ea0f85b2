//! What the kernel can do, found out by trying: a kernel without soft-dirty accepts every call and says for ever
//! that nothing was written.

use crate::sys::{pagemap, uffd};
use memmap2::MmapMut;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

/// How dirty pages are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrackerKind {
    /// Bit 55 of pagemap, cleared through `clear_refs`; the tree stands still while that is done.
    SoftDirty,
    /// Asynchronous write-protection through userfaultfd, read by PAGEMAP_SCAN; the tree runs on.
    UffdWp,
}

impl fmt::Display for TrackerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TrackerKind::SoftDirty => "soft-dirty",
            TrackerKind::UffdWp => "userfaultfd",
        })
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
    #[error("this kernel can track no dirty pages: soft-dirty: {soft_dirty}; userfaultfd: {uffd}")]
    Neither {
        /// Why soft-dirty does not.
        soft_dirty: String,
        /// Why userfaultfd does not.
        uffd: String,
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
        }
    }

    /// The tracker to use, and why. Without a wish: userfaultfd where it works, because the program runs on while it
    /// is scanned; soft-dirty elsewhere.
    ///
    /// # Errors
    /// [`ChooseError`].
    pub fn choose(&self, wanted: Option<TrackerKind>) -> Result<(TrackerKind, String), ChooseError> {
        let uffd = if self.pagemap_scan.works { &self.uffd_wp_async } else { &self.pagemap_scan };
        match wanted {
            Some(kind) => {
                let feature = match kind {
                    TrackerKind::SoftDirty => &self.soft_dirty,
                    TrackerKind::UffdWp => uffd,
                };
                match feature.works {
                    true => Ok((kind, format!("asked for; {}", feature.reason))),
                    false => Err(ChooseError::Wanted { kind, reason: feature.reason.clone() }),
                }
            }
            None if uffd.works => {
                Ok((TrackerKind::UffdWp, format!("{}, and nothing has to stand still for it", uffd.reason)))
            }
            None if self.soft_dirty.works => Ok((
                TrackerKind::SoftDirty,
                format!("{}; userfaultfd: {}", self.soft_dirty.reason, uffd.reason),
            )),
            None => Err(ChooseError::Neither {
                soft_dirty: self.soft_dirty.reason.clone(),
                uffd: uffd.reason.clone(),
            }),
        }
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
            scan_soft_dirty: feature(false),
        }
    }

    #[test]
    fn the_choice_follows_what_works() {
        assert_eq!(kernel(true, true).choose(None).unwrap().0, TrackerKind::UffdWp);
        assert_eq!(kernel(true, false).choose(None).unwrap().0, TrackerKind::SoftDirty);
        assert_eq!(kernel(false, true).choose(None).unwrap().0, TrackerKind::UffdWp);
        assert!(matches!(kernel(false, false).choose(None), Err(ChooseError::Neither { .. })));
        assert!(kernel(true, false).choose(Some(TrackerKind::UffdWp)).is_err());
        assert_eq!(kernel(true, true).choose(Some(TrackerKind::UffdWp)).unwrap().0, TrackerKind::UffdWp);
    }

    #[test]
    fn this_kernel_gives_reasons() {
        let kernel = Kernel::probe();
        for feature in
            [&kernel.soft_dirty, &kernel.uffd_wp_async, &kernel.pagemap_scan, &kernel.scan_soft_dirty]
        {
            assert!(!feature.reason.is_empty());
        }
    }
}
