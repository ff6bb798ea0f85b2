//! The source's half of `--verify`.

use super::Migration;
use super::failure::SendError;
use crate::verify::{blank_rseq, resident};
use pageferry_criu_glue::image;
use pageferry_tracker::{Collected, Run};
use pageferry_wire_format::{DigestBatch, PageNo, PageRun, digest, limits};

/// Pages that are read at a time.
const STEP: u64 = 256;

impl Migration<'_> {
    /// Reads the frozen tree once more, all of it, and sends what every page should look like.
    pub(super) fn send_digests(&mut self, collected: &Collected) -> Result<(), SendError> {
        let areas = image::tree::rseq_areas(&self.images)?;
        let mut buffer = vec![0; STEP as usize * 4096];
        let last_space = collected.spaces.len();
        for (index, scan) in collected.spaces.iter().enumerate() {
            let pid = scan.target.pid();
            let mut pages = resident(pid, &scan.regions).map_err(|source| SendError::Look { pid, source })?;
            let (id, vpid) = {
                let place = &self.space(scan.key.0).place;
                (place.id, place.vpid)
            };
            // What comes late comes with its digest; looking at it now would fetch it.
            if let Some(owed) = self.debt().as_ref().and_then(|debt| debt.owed_of(id)) {
                pages = pages.subtract(owed);
            }
            let mut batch = DigestBatch { space: id, ..DigestBatch::default() };
            for run in pages.runs() {
                let mut at = run.start;
                while at < run.start + run.len {
                    let len = (run.start + run.len - at)
                        .min(STEP)
                        .min((limits::MAX_DIGESTS_PER_FRAME - batch.digests.len()) as u64);
                    let bytes = &mut buffer[..len as usize * 4096];
                    let missing = self
                        .space(scan.key.0)
                        .reader
                        .read(&[Run { start: at, len }], bytes)
                        .map_err(|source| SendError::Reader { pid, source })?;
                    if let Some(page) = missing.first() {
                        return Err(super::pages::SendPagesError::Vanished { pid, page: *page }.into());
                    }
                    for (offset, page) in bytes.chunks_exact_mut(4096).enumerate() {
                        blank_rseq(&areas, vpid, at + offset as u64, page);
                        batch.digests.push(digest::page(page));
                    }
                    batch.runs.push(PageRun { start: PageNo(at), len });
                    at += len;
                    if batch.digests.len() >= limits::MAX_DIGESTS_PER_FRAME
                        || batch.runs.len() >= limits::MAX_RUNS_PER_FRAME
                    {
                        batch.more = true;
                        self.channel().digests(&batch)?;
                        batch.runs.clear();
                        batch.digests.clear();
                        self.check_cancel()?;
                    }
                }
            }
            batch.more = index + 1 < last_space;
            self.channel().digests(&batch)?;
        }
        Ok(())
    }
}
