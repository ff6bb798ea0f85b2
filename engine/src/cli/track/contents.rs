//! Which of the pages that were written have the bytes that they had before.

use pageferry_tracker::observation::{Observation, Owner};
use pageferry_tracker::{Collected, PageReader, PageSet, ReadError, Run, SpaceScan};
use std::collections::{BTreeMap, BTreeSet};
use xxhash_rust::xxh3::xxh3_128;

const PAGE: usize = 4096;
/// Pages that are read at a time: what a core's cache holds.
const BATCH: u64 = 64;

/// Digests (xxh3, 128 bits) of all pages, as they were last seen dirty: 16 bytes and some for each page of 4096.
#[derive(Debug, Default)]
pub(super) struct Contents {
    pages: BTreeMap<Owner, BTreeMap<u64, u128>>,
}

impl Contents {
    /// Reads the dirty pages of a scan and says which are unchanged. The first of a space is the base.
    ///
    /// The program runs meanwhile: a write that lands between the scan and the read is compared here, one scan before
    /// its page is found dirty. Each change is counted once.
    pub(super) fn compare(
        &mut self,
        collected: &Collected,
        observation: &mut Observation,
    ) -> Result<(), ReadError> {
        for key in &collected.exited {
            self.pages.remove(&(*key).into());
        }
        let objects: BTreeSet<Owner> = observation.objects.iter().map(|object| object.id.into()).collect();
        self.pages.retain(|owner, _| matches!(owner, Owner::Space(_)) || objects.contains(owner));
        for (scan, observed) in collected.spaces.iter().zip(&mut observation.spaces) {
            let places = scan.dirty.runs().iter().map(|run| (*run, run.start));
            observed.unchanged = self.look(scan.key.into(), scan, places)?;
        }
        for (object, observed) in collected.objects.iter().zip(&mut observation.objects) {
            if observed.is_new {
                self.pages.remove(&observed.id.into());
            }
            let mut unchanged = PageSet::default();
            let mut rest = object.dirty.clone();
            // A page is read where the first process has it.
            for scan in &collected.spaces {
                if rest.is_empty() {
                    break;
                }
                let places = object.runs_in(scan, &rest);
                let here: PageSet = places.iter().map(|(run, _)| *run).collect();
                if let Some(same) = self.look(observed.id.into(), scan, places.into_iter())? {
                    unchanged.absorb(same);
                    rest = rest.subtract(&here);
                }
            }
            observed.unchanged = Some(unchanged);
        }
        Ok(())
    }

    /// Reads pages of `owner` where a space has them: runs of them, and the page at which each begins there. `None` if
    /// the process has ended since the scan.
    fn look(
        &mut self,
        owner: Owner,
        scan: &SpaceScan,
        places: impl Iterator<Item = (Run, u64)>,
    ) -> Result<Option<PageSet>, ReadError> {
        let known = self.pages.entry(owner).or_default();
        let mut unchanged = PageSet::default();
        let mut buffer = vec![0; BATCH as usize * PAGE];
        let reader = match PageReader::new(&scan.target) {
            Ok(reader) => reader,
            Err(_) if !scan.target.is_alive() => return Ok(None),
            Err(error) => return Err(error),
        };
        for (run, place) in places {
            let mut done = 0;
            while done < run.len {
                let piece = Run { start: place + done, len: (run.len - done).min(BATCH) };
                let bytes = &mut buffer[..piece.len as usize * PAGE];
                match reader.read(&[piece], bytes) {
                    Ok(_) => {}
                    Err(_) if !scan.target.is_alive() => return Ok(Some(unchanged)),
                    Err(error) => return Err(error),
                }
                for (page, bytes) in (run.start + done..).zip(bytes.chunks_exact(PAGE)) {
                    let digest = xxh3_128(bytes);
                    if known.insert(page, digest) == Some(digest) {
                        unchanged.insert(page, 1);
                    }
                }
                done += piece.len;
            }
        }
        Ok(Some(unchanged))
    }
}
