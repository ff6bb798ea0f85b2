//! Asynchronous write-protection through userfaultfd (Linux 6.7): a written page loses its protection, and
//! PAGEMAP_SCAN finds and protects again in one step, page by page, while the program runs.

use super::entries::notes;
use super::known::Known;
use super::reach::{self, Place};
use super::{
    Answer, DirtySource, WatchError, all, guard_category, matching, still_there, survey, survey_spans,
};
use crate::inject;
use crate::page_set::{PageSet, Run};
use crate::probe::FEATURES;
use crate::region::Region;
use crate::scope::{Backing, Care, Scope, Span, Untracked, View};
use crate::sys::pagemap::{self, FILE, PFNZERO, PRESENT, Query, SWAPPED, WP_MATCHING, WPALLOWED, WRITTEN};
use crate::sys::uffd;
use crate::target::Target;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// The source over one address space. Dropping it undoes everything: the descriptor is its only trace.
#[derive(Debug)]
pub(crate) struct UffdWp {
    target: Target,
    pagemap: File,
    /// Made when there is something to watch and the process may be stopped for it.
    uffd: Option<OwnedFd>,
    /// How long one thread stood still while it was made.
    stop: Duration,
    /// Pages that were registered with this descriptor. Protection by somebody else's (a program may track itself) looks
    /// the same to a scan, but its marks are not ours to rely on: somebody else clears them.
    ours: PageSet,
    /// Ranges that were registered since the last collect: all of them counts as written. Their pages may carry
    /// the marks of another place (`mremap`), or be others than those that were there before.
    fresh: PageSet,
    /// Registration was refused, and why; their pages are all dirty.
    refused: Vec<Untracked>,
    /// Shared mappings that can never be written, which are not registered either.
    sealed: PageSet,
    /// Shared memory and hugetlbfs need a feature of their own.
    features: u64,
    /// What exists, as far as the last scan of the running program tells.
    known: Option<Known>,
    /// What the walk for new mappings saw of the pages, where it looked at them too.
    glance: Option<Glance>,
    /// A scan broke off after it had cleared some marks: nobody knows which, so everything counts as written.
    spoiled: bool,
}

/// What one walk over everything saw, before anything was protected again.
#[derive(Debug)]
struct Glance {
    populated: PageSet,
    /// Pages without protection.
    written: PageSet,
}

/// What the kernel takes for a mapping that it walks over, in pages that it passes by: 200 ns and 2 ns.
const MAPPING: u64 = 100;
/// From so many stretches of pages on, one walk over everything is quicker than one for each.
const STRETCHES: usize = 4096;

impl UffdWp {
    pub(crate) fn new(target: &Target, scope: Scope) -> io::Result<Self> {
        let features = match scope {
            Scope::Lazy => FEATURES,
            Scope::All => FEATURES | uffd::FEATURE_WP_HUGETLBFS_SHMEM,
        };
        Ok(Self {
            target: target.clone(),
            pagemap: target.open_file("pagemap")?,
            uffd: None,
            stop: Duration::ZERO,
            ours: PageSet::default(),
            fresh: PageSet::default(),
            refused: Vec::new(),
            sealed: PageSet::default(),
            features,
            known: None,
            glance: None,
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

    /// Pages of watched mappings that this descriptor does not protect: mappings that are new, or that cannot be
    /// registered.
    fn unwatched(&self, spans: &[Span]) -> io::Result<PageSet> {
        let query =
            Query { mask: WPALLOWED, inverted: WPALLOWED, returned: WPALLOWED | PRESENT, ..Query::default() };
        let mut unwatched = matching(&self.pagemap, spans, query)?;
        unwatched.absorb(all(spans).subtract(&self.ours));
        still_there(&self.pagemap, unwatched)
    }

    /// As [`UffdWp::unwatched`]; where there are very many mappings with few pages, the same walk also looks for what
    /// exists and what was written: the mappings are what it takes its time for.
    fn look_for_new(&self, view: &View) -> io::Result<(PageSet, Option<Glance>)> {
        let mappings = view.regions.len() as u64 * MAPPING;
        if view.has_files() || mappings < view.counted {
            return Ok((self.unwatched(view.spans())?, None));
        }
        let guard = guard_category();
        let query = Query {
            inverted: WPALLOWED | PRESENT,
            any_of: WPALLOWED | PRESENT | PFNZERO | WRITTEN,
            returned: WPALLOWED | PRESENT | SWAPPED | PFNZERO | WRITTEN | guard,
            ..Query::default()
        };
        let spans = view.spans();
        let (Some(first), Some(last)) = (spans.first(), spans.last()) else {
            return Ok((PageSet::default(), None));
        };
        let (mut new, mut others, mut written, mut swapped) =
            <(PageSet, PageSet, PageSet, PageSet)>::default();
        pagemap::scan(&self.pagemap, first.start, last.end, query, |found| {
            let has = |category| found.categories & category != 0;
            let (start, len) = (found.start / 4096, (found.end - found.start) / 4096);
            if !has(WPALLOWED) {
                new.insert(start, len);
            }
            if !has(PRESENT | SWAPPED) || has(PFNZERO | guard) {
                others.insert(start, len);
            } else if has(WRITTEN) {
                written.insert(start, len);
            }
            if has(SWAPPED) {
                swapped.insert(start, len);
            }
        })?;
        let all = all(spans);
        let mut populated = all.subtract(&others);
        let doubtful = swapped.intersect(&populated);
        populated = populated.subtract(&notes(&self.pagemap, &doubtful)?);
        let written = written.intersect(&populated);
        let mut unwatched = new.intersect(&all);
        unwatched.absorb(all.subtract(&self.ours));
        still_there(&self.pagemap, (unwatched, Some(Glance { populated, written })))
    }

    /// Protects what a glance has seen without protection, and what is new; what is found without it now was written. `None`
    /// if that is too much in too many places.
    fn protect(&self, glance: &Glance) -> io::Result<Option<PageSet>> {
        let mut open = glance.written.clone();
        open.absorb(self.fresh.intersect(&glance.populated));
        let open = open.intersect(&self.ours);
        if open.runs().len() > STRETCHES {
            return Ok(None);
        }
        let (mut written, query) = (PageSet::default(), Self::written_query(Backing::Anonymous));
        for run in open.runs() {
            pagemap::scan(&self.pagemap, run.start * 4096, run.end() * 4096, query, |found| {
                written.insert(found.start / 4096, (found.end - found.start) / 4096);
            })?;
        }
        still_there(&self.pagemap, Some(written))
    }

    /// The pages that were written, all protected again; and the pages that were asked about. Walks over our own
    /// mappings only: in one that the program tracks itself, protecting would clear marks that it waits for. `existing`:
    /// stretches in which every page exists, as far as is known.
    fn written(&self, view: &View, existing: &PageSet) -> io::Result<(PageSet, PageSet)> {
        let (mut written, mut scanned) = (PageSet::default(), PageSet::default());
        let mut walk: Vec<Span> = Vec::new();
        let mut kind = Backing::Anonymous;
        for (region, care) in view.every().map(|(region, care)| (Some(region), care)).chain([(None, None)]) {
            let ours = region.filter(|region| {
                self.ours.contains_run(Run { start: region.start / 4096, len: region.pages() })
            });
            let next = care.filter(|_| ours.is_some()).map(|care| care.backing);
            if !walk.is_empty() && next != Some(kind) {
                self.walk(&walk, kind, existing, &mut written)?;
                walk.clear();
            }
            if let (Some(backing), Some(region)) = (next, ours) {
                kind = backing;
                scanned.insert(region.start / 4096, region.pages());
                let shared = backing == Backing::Shared;
                walk.push(Span { start: region.start, end: region.end, shared });
            }
        }
        still_there(&self.pagemap, (written, scanned))
    }

    /// Adds what was written in `spans`, and protects it again.
    fn walk(
        &self,
        spans: &[Span],
        kind: Backing,
        existing: &PageSet,
        written: &mut PageSet,
    ) -> io::Result<()> {
        let ask = |spans: &[Span], written: &mut PageSet| -> io::Result<()> {
            if !spans.is_empty() {
                let found = matching(&self.pagemap, spans, Self::written_query(kind))?;
                written.absorb(found);
            }
            Ok(())
        };
        let whole = match kind {
            Backing::Anonymous => all(spans).intersect(existing),
            Backing::File | Backing::Shared => PageSet::default(),
        };
        if whole.is_empty() {
            return ask(spans, written);
        }
        let rest = all(spans).subtract(&whole);
        let mut rest = rest.runs();
        for run in whole.runs() {
            let before = rest.partition_point(|other| other.start < run.start);
            ask(&spans_of(&rest[..before]), written)?;
            rest = &rest[before..];
            pagemap::scan(&self.pagemap, run.start * 4096, run.end() * 4096, WRITTEN_ALONE, |found| {
                written.insert(found.start / 4096, (found.end - found.start) / 4096);
            })?;
        }
        ask(&spans_of(rest), written)
    }

    /// What exists, what of it was written, and what was asked about; all is protected again.
    fn protect_all(&mut self, view: &View, known: Option<Known>) -> io::Result<(PageSet, PageSet, PageSet)> {
        // What is not counted may go unnoticed: it is looked at every time.
        let is_counted = |care: Care| care.backing != Backing::Shared && !care.huge;
        let (spans, counted) = (view.spans_of(is_counted), view.counted);
        let known = known.filter(|known| self.fresh.is_empty() && known.may_hold(&spans, counted));
        let existing = known.as_ref().map(Known::long_runs).unwrap_or_default();
        let (written, scanned) = self.written(view, &existing)?;
        let others = view.spans_of(|care| !is_counted(care));
        let others = match others.is_empty() {
            true => PageSet::default(),
            false => survey_spans(&self.pagemap, &others, true, 0)?.populated,
        };
        let grown = known.and_then(|known| match others.is_empty() {
            true => known.grown(&written, counted),
            false => known.grown(&written.intersect(&all(&spans)), counted),
        });
        let (known, written) = match grown {
            Some(known) => (known, written),
            None => {
                let populated = survey_spans(&self.pagemap, &spans, view.has_files(), 0)?.populated;
                let written = written.intersect(&populated.union(&others));
                (Known::new(spans, populated, counted), written)
            }
        };
        let mut populated = known.populated().clone();
        populated.absorb(others);
        self.known = Some(known);
        Ok((populated, written, scanned))
    }

    /// What is not there is not asked for: the kernel would protect that too, and make page tables for it. Nor are pages
    /// of a file that is mapped privately: a write makes them others, which are not protected; and where the kernel drops a
    /// protected one of the file's it leaves a note, which looks like a page in swap.
    fn written_query(kind: Backing) -> Query {
        let not = if kind == Backing::File { PFNZERO | FILE } else { PFNZERO };
        Query {
            flags: WP_MATCHING,
            mask: WRITTEN | not,
            inverted: not,
            any_of: PRESENT | SWAPPED,
            returned: WRITTEN,
        }
    }
}

/// The one question for which the kernel has a walk without detours: less than half of the time of any other, for a page
/// that was not written. It is for pages that exist: where there is none, the kernel says "written", and leaves a note
/// that the page which comes there is protected.
const WRITTEN_ALONE: Query =
    Query { flags: WP_MATCHING, mask: WRITTEN, inverted: 0, any_of: 0, returned: WRITTEN };

fn spans_of(runs: &[Run]) -> Vec<Span> {
    let span = |run: &Run| Span { start: run.start * 4096, end: run.end() * 4096, shared: false };
    runs.iter().map(span).collect()
}

impl DirtySource for UffdWp {
    fn watch(&mut self, view: &View) -> Result<(), WatchError> {
        self.look_again()?;
        let (unwatched, glance) = self.look_for_new(view)?;
        self.glance = glance;
        let uffd = match self.uffd.take() {
            Some(uffd) => uffd,
            None => {
                let (uffd, stop) = inject::userfaultfd(&self.target).map_err(WatchError::Inject)?;
                self.stop = stop;
                uffd::api(&uffd, self.features)?;
                uffd
            }
        };
        let uffd = self.uffd.insert(uffd);
        self.ours = self.ours.subtract(&unwatched);
        self.refused.clear();
        self.sealed = PageSet::default();
        if unwatched.is_empty() {
            return Ok(());
        }
        let place = |(region, care): (&Region, Option<Care>)| Place {
            start: region.start,
            end: region.end,
            watched: care.is_some(),
        };
        let places: Vec<Place> = view.every().map(place).collect();
        let (mut registered, mut sealed) = (PageSet::default(), PageSet::default());
        for reach in reach::reaches(&places, &unwatched) {
            let together = uffd::register(uffd, reach.low, reach.high, uffd::MODE_WP).is_ok();
            for index in reach.places {
                let place = places[index];
                if !reach::is_new(place, &unwatched) {
                    continue;
                }
                // One that cannot be registered must not take its neighbours with it.
                let alone = || {
                    let around = reach::with_holes(&places, index..index + 1);
                    uffd::register(uffd, around.low, around.high, uffd::MODE_WP)
                        .or_else(|_| uffd::register(uffd, place.start, place.end, uffd::MODE_WP))
                };
                match if together { Ok(()) } else { alone() } {
                    Ok(()) => registered.insert(place.start / 4096, view.regions[index].pages()),
                    Err(error) => match error.raw_os_error() {
                        // A shared mapping of a file that was opened to be read: it can never be written.
                        Some(libc::EPERM) if view.regions[index].shared && !view.regions[index].write => {
                            sealed.insert(place.start / 4096, view.regions[index].pages());
                        }
                        // It cannot be watched (somebody else's userfaultfd, a special mapping), or is gone.
                        Some(libc::EINVAL | libc::EPERM | libc::EBUSY) => {
                            let Place { start, end, .. } = place;
                            tracing::debug!(start, end, %error, "a region that cannot be watched");
                            let reason = format!("userfaultfd cannot protect it: {error}");
                            self.refused.push(Untracked { start, end, reason, named: true });
                        }
                        // The memory that the descriptor belongs to is gone; the pagemap's may be that of the program
                        // that came after it.
                        Some(libc::ENOMEM) => return Err(io::Error::from_raw_os_error(libc::ESRCH).into()),
                        _ => return Err(error.into()),
                    },
                }
            }
        }
        // What had been registered before keeps its marks.
        let new = unwatched.intersect(&registered);
        self.ours.absorb(new.clone());
        self.fresh.absorb(new);
        self.sealed = unwatched.intersect(&sealed);
        Ok(())
    }

    /// A running program was just looked at by `watch`: mappings that came since are found by the next look, and are dirty
    /// as a whole then.
    fn collect(&mut self, view: &View, frozen: bool) -> io::Result<Answer> {
        let spans = view.spans();
        let (known, glance) = (self.known.take(), self.glance.take());
        if frozen {
            self.look_again()?;
        }
        let before = std::mem::replace(&mut self.spoiled, true);
        let (populated, mut dirty, unwatched) = match glance {
            _ if frozen => {
                let Answer { populated, dirty, .. } = survey(&self.pagemap, view, WRITTEN)?;
                (populated, dirty, self.unwatched(spans)?)
            }
            Some(glance) if let Some(written) = self.protect(&glance)? => {
                let written = written.intersect(&glance.populated);
                (glance.populated, written, all(spans).subtract(&self.ours))
            }
            _ => {
                let (populated, written, scanned) = self.protect_all(view, known)?;
                (populated, written, all(spans).subtract(&scanned))
            }
        };
        self.spoiled = false;
        let mut unwatched = unwatched.subtract(&self.sealed);
        unwatched.absorb(std::mem::take(&mut self.fresh));
        match before {
            true => dirty = populated.clone(),
            false => dirty.absorb(unwatched.intersect(&populated)),
        }
        Ok(Answer { populated, dirty, untracked: self.refused.clone() })
    }

    fn clear(&mut self) -> io::Result<()> {
        // Nothing needs these bits but this source itself.
        Ok(())
    }

    fn watches(&self) -> bool {
        self.uffd.is_some()
    }

    fn attach_stop(&self) -> Duration {
        self.stop
    }
}
