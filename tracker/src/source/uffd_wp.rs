//! Asynchronous write-protection through userfaultfd (Linux 6.7): a written page loses its protection, and
//! PAGEMAP_SCAN finds and protects again in one step, page by page, while the program runs.

use super::{Answer, DirtySource, lazy_spans, matching, survey};
use crate::inject::{self, InjectError};
use crate::page_set::PageSet;
use crate::probe::FEATURES;
use crate::region::Region;
use crate::sys::pagemap::{PFNZERO, PRESENT, Query, SWAPPED, WP_MATCHING, WPALLOWED, WRITTEN};
use crate::sys::uffd;
use crate::target::Target;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

/// The source over one address space. Dropping it undoes everything: the descriptor is its only trace.
#[derive(Debug)]
pub(crate) struct UffdWp {
    pagemap: File,
    uffd: OwnedFd,
    /// Ranges that were registered since the last collect: all of them counts as written. Their pages may carry
    /// the marks of another place (`mremap`), or be others than those that were there before.
    fresh: PageSet,
    /// A scan broke off after it had cleared some marks: nobody knows which, so everything counts as written.
    spoiled: bool,
}

impl UffdWp {
    pub(crate) fn attach(target: &Target) -> Result<Self, InjectError> {
        let pid = target.pid();
        let failed = |step| move |source: io::Error| InjectError::Io { pid, step, source };
        let uffd = inject::userfaultfd(target)?;
        uffd::api(&uffd, FEATURES).map_err(failed("enabling asynchronous write-protection"))?;
        let pagemap = File::open(format!("/proc/{pid}/pagemap")).map_err(failed("opening its pagemap"))?;
        Ok(Self { pagemap, uffd, fresh: PageSet::default(), spoiled: false })
    }

    /// Pages of lazy mappings that are not write-protected by this descriptor: mappings that are new, or that
    /// cannot be registered.
    fn unwatched(&self, spans: &[(u64, u64)]) -> io::Result<PageSet> {
        let query =
            Query { mask: WPALLOWED, inverted: WPALLOWED, returned: WPALLOWED | PRESENT, ..Query::default() };
        matching(&self.pagemap, spans, query)
    }
}

impl DirtySource for UffdWp {
    fn watch(&mut self, regions: &[Region]) -> io::Result<()> {
        for run in self.unwatched(&lazy_spans(regions))?.runs() {
            let (start, end) = (run.start * 4096, run.end() * 4096);
            // Mapping by mapping: one that cannot be registered must not take its neighbours with it.
            for region in regions.iter().filter(|r| r.can_be_lazy() && r.start < end && start < r.end) {
                let (low, high) = (region.start.max(start), region.end.min(end));
                match uffd::register(&self.uffd, low, high, uffd::MODE_WP) {
                    Ok(()) => self.fresh.insert(low / 4096, (high - low) / 4096),
                    Err(error) => match error.raw_os_error() {
                        // It cannot be watched (somebody else's userfaultfd, a special mapping), or is gone.
                        Some(libc::EINVAL | libc::EPERM | libc::EBUSY) => {
                            tracing::debug!(low, high, %error, "a region that cannot be watched");
                        }
                        // The memory that the descriptor belongs to is gone; the pagemap's may be that of the program
                        // that came after it.
                        Some(libc::ENOMEM) => return Err(io::Error::from_raw_os_error(libc::ESRCH)),
                        _ => return Err(error),
                    },
                }
            }
        }
        Ok(())
    }

    fn collect(&mut self, regions: &[Region], frozen: bool) -> io::Result<Answer> {
        let spans = lazy_spans(regions);
        let before = std::mem::replace(&mut self.spoiled, true);
        let Answer { populated, dirty: written } = match frozen {
            true => survey(&self.pagemap, &spans, WRITTEN)?,
            false => {
                // A look of its own: one that protects must not be asked for what is not there, because the kernel
                // would protect that too, and make page tables for it.
                let query = Query {
                    flags: WP_MATCHING,
                    mask: WRITTEN | PFNZERO,
                    inverted: PFNZERO,
                    any_of: PRESENT | SWAPPED,
                    returned: WRITTEN,
                };
                let dirty = matching(&self.pagemap, &spans, query)?;
                Answer { dirty, ..survey(&self.pagemap, &spans, 0)? }
            }
        };
        // After the scan: a mapping that was born in between is in one of the two.
        let unwatched = self.unwatched(&spans)?;
        self.spoiled = false;
        let fresh = std::mem::take(&mut self.fresh);
        let dirty = match before {
            true => populated.clone(),
            false => written.union(&unwatched).union(&fresh).intersect(&populated),
        };
        Ok(Answer { populated, dirty })
    }

    fn clear(&mut self) -> io::Result<()> {
        // Nothing needs these bits but this source itself.
        Ok(())
    }
}
