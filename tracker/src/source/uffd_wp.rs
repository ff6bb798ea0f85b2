//! Asynchronous write-protection through userfaultfd (Linux 6.7): a written page loses its protection, and
//! PAGEMAP_SCAN finds and protects again in one step, page by page, while the program runs.

use super::{Answer, DirtySource, WatchError, lazy_spans, matching, still_there, survey};
use crate::inject;
use crate::page_set::{PageSet, Run};
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
    target: Target,
    pagemap: File,
    /// Made when there is something to watch and the process may be stopped for it.
    uffd: Option<OwnedFd>,
    /// Pages that were registered with this descriptor. Protection by somebody else's (a program may track itself) looks
    /// the same to a scan, but its marks are not ours to rely on: somebody else clears them.
    ours: PageSet,
    /// Ranges that were registered since the last collect: all of them counts as written. Their pages may carry
    /// the marks of another place (`mremap`), or be others than those that were there before.
    fresh: PageSet,
    /// A scan broke off after it had cleared some marks: nobody knows which, so everything counts as written.
    spoiled: bool,
}

impl UffdWp {
    pub(crate) fn new(target: &Target) -> io::Result<Self> {
        Ok(Self {
            target: target.clone(),
            pagemap: target.open_file("pagemap")?,
            uffd: None,
            ours: PageSet::default(),
            fresh: PageSet::default(),
            spoiled: false,
        })
    }

    /// From here on the pagemap is that of the memory that the process has now. The file was opened for the memory of
    /// then, which a process that shares it may keep when this one has become another program.
    fn look_again(&mut self) -> io::Result<()> {
        still_there(&self.pagemap, ())?;
        self.pagemap = self.target.open_file("pagemap")?;
        Ok(())
    }

    /// Pages of lazy mappings that this descriptor does not protect: mappings that are new, or that cannot be
    /// registered.
    fn unwatched(&self, spans: &[(u64, u64)]) -> io::Result<PageSet> {
        let query =
            Query { mask: WPALLOWED, inverted: WPALLOWED, returned: WPALLOWED | PRESENT, ..Query::default() };
        Ok(matching(&self.pagemap, spans, query)?.union(&all(spans).subtract(&self.ours)))
    }

    /// The pages that were written, all protected again; and the pages that were asked about. Walks over our own
    /// mappings only: in one that the program tracks itself, protecting would clear marks that it waits for.
    fn written(&self, regions: &[Region]) -> io::Result<(PageSet, PageSet)> {
        // What is not there is not asked for: the kernel would protect that too, and make page tables for it.
        let query = Query {
            flags: WP_MATCHING,
            mask: WRITTEN | PFNZERO,
            inverted: PFNZERO,
            any_of: PRESENT | SWAPPED,
            returned: WRITTEN,
        };
        let (mut written, mut scanned) = (PageSet::default(), PageSet::default());
        let mut walk: Vec<(u64, u64)> = Vec::new();
        for region in regions.iter().map(Some).chain([None]) {
            if let Some(region) = region
                && region.can_be_lazy()
                && self.ours.contains_run(Run { start: region.start / 4096, len: region.pages() })
            {
                scanned.insert(region.start / 4096, region.pages());
                walk.push((region.start, region.end));
                continue;
            }
            if !walk.is_empty() {
                let found = matching(&self.pagemap, &walk, query)?;
                found.runs().iter().for_each(|run| written.insert(run.start, run.len));
                walk.clear();
            }
        }
        Ok((written, scanned))
    }
}

fn all(spans: &[(u64, u64)]) -> PageSet {
    spans.iter().map(|(start, end)| Run { start: start / 4096, len: (end - start) / 4096 }).collect()
}

impl DirtySource for UffdWp {
    fn watch(&mut self, regions: &[Region]) -> Result<(), WatchError> {
        self.look_again()?;
        let unwatched = self.unwatched(&lazy_spans(regions))?;
        let uffd = match self.uffd.take() {
            Some(uffd) => uffd,
            None => {
                let uffd = inject::userfaultfd(&self.target).map_err(WatchError::Inject)?;
                uffd::api(&uffd, FEATURES)?;
                uffd
            }
        };
        let uffd = self.uffd.insert(uffd);
        self.ours = self.ours.subtract(&unwatched);
        let mut at = 0;
        for run in unwatched.runs() {
            let (start, end) = (run.start * 4096, run.end() * 4096);
            at += regions[at..].partition_point(|region| region.end <= start);
            // Mapping by mapping: one that cannot be registered must not take its neighbours with it.
            let within = regions[at..].iter().take_while(|region| region.start < end);
            for region in within.filter(|region| region.can_be_lazy()) {
                let (low, high) = (region.start.max(start), region.end.min(end));
                match uffd::register(uffd, low, high, uffd::MODE_WP) {
                    Ok(()) => {
                        self.ours.insert(low / 4096, (high - low) / 4096);
                        self.fresh.insert(low / 4096, (high - low) / 4096);
                    }
                    Err(error) => match error.raw_os_error() {
                        // It cannot be watched (somebody else's userfaultfd, a special mapping), or is gone.
                        Some(libc::EINVAL | libc::EPERM | libc::EBUSY) => {
                            tracing::debug!(low, high, %error, "a region that cannot be watched");
                        }
                        // The memory that the descriptor belongs to is gone; the pagemap's may be that of the program
                        // that came after it.
                        Some(libc::ENOMEM) => return Err(io::Error::from_raw_os_error(libc::ESRCH).into()),
                        _ => return Err(error.into()),
                    },
                }
            }
        }
        Ok(())
    }

    fn collect(&mut self, regions: &[Region], frozen: bool) -> io::Result<Answer> {
        self.look_again()?;
        let spans = lazy_spans(regions);
        let before = std::mem::replace(&mut self.spoiled, true);
        let (answer, scanned) = match frozen {
            true => (survey(&self.pagemap, &spans, WRITTEN)?, None),
            false => {
                let (dirty, scanned) = self.written(regions)?;
                (Answer { dirty, ..survey(&self.pagemap, &spans, 0)? }, Some(scanned))
            }
        };
        let Answer { populated, dirty: written } = answer;
        // After the scan: a mapping that was born in between is in one of the two.
        let mut unwatched = self.unwatched(&spans)?;
        if let Some(scanned) = scanned {
            unwatched = unwatched.union(&all(&spans).subtract(&scanned));
        }
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

    fn watches(&self) -> bool {
        self.uffd.is_some()
    }
}
