//! Which of the pages that were written have the bytes that they had before.

use pageferry_tracker::observation::Observation;
use pageferry_tracker::{Collected, PageReader, PageSet, ReadError, Run};
use std::collections::BTreeMap;
use xxhash_rust::xxh3::xxh3_128;

const PAGE: usize = 4096;
/// Pages that are read at a time: what a core's cache holds.
const BATCH: u64 = 64;

/// Digests (xxh3, 128 bits) of all pages, as they were last seen dirty: 16 bytes and some for each page of 4096.
#[derive(Debug, Default)]
pub(super) struct Contents {
    spaces: BTreeMap<u32, BTreeMap<u64, u128>>,
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
            self.spaces.remove(&key.0);
        }
        for (scan, observed) in collected.spaces.iter().zip(&mut observation.spaces) {
            let known = self.spaces.entry(scan.key.0).or_default();
            let mut unchanged = PageSet::default();
            let mut buffer = vec![0; BATCH as usize * PAGE];
            let mut reader = match PageReader::new(&scan.target) {
                Ok(reader) => reader,
                // It has ended since the scan.
                Err(_) if !scan.target.is_alive() => continue,
                Err(error) => return Err(error),
            };
            for run in scan.dirty.runs() {
                let mut at = run.start;
                while at < run.end() {
                    let piece = Run { start: at, len: (run.end() - at).min(BATCH) };
                    let bytes = &mut buffer[..piece.len as usize * PAGE];
                    match reader.read(&[piece], bytes) {
                        Ok(_) => {}
                        Err(_) if !scan.target.is_alive() => break,
                        Err(error) => return Err(error),
                    }
                    for (page, bytes) in (piece.start..).zip(bytes.chunks_exact(PAGE)) {
                        let digest = xxh3_128(bytes);
                        if known.insert(page, digest) == Some(digest) {
                            unchanged.insert(page, 1);
                        }
                    }
                    at = piece.end();
                }
            }
            observed.unchanged = Some(unchanged);
        }
        Ok(())
    }
}
