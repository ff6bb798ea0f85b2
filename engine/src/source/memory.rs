//! The engine's own memory under a limit: what the program needs of it, what is left for the rest, and what is given back.

use super::failure::SendError;
use super::{Migration, sys};
use crate::policy::memory::{self, Extent, Savings};
use pageferry_tracker::{self as tracker, Collected, PageSet, Target};
use std::fs;

impl Migration<'_> {
    /// What is expected of the program before it was looked at; refused if there is no room for it.
    ///
    /// # Errors
    /// [`SendError::Memory`], or a tree that cannot be listed.
    pub(super) fn expect_room(&mut self) -> Result<(), SendError> {
        let Some(limit) = self.plan.engine_memory else { return Ok(()) };
        let tree = tracker::tree::discover(&self.root)?;
        let pages = tree.iter().filter_map(private_pages).sum();
        let (file, keeps) = (!self.peer.is_receiver(), self.store.is_some());
        self.extent = Extent { file, keeps, ..Extent::of_pages(pages, tree.len() as u64) };
        memory::workers(Some(limit), &self.extent, 1)?;
        Ok(())
    }

    /// How many of the connections that are wanted there is memory for.
    pub(super) fn workers_within(&self, wanted: usize) -> Result<usize, SendError> {
        let extent = Extent { kept: self.report.kept_pages, ..self.extent };
        Ok(memory::workers(self.control.engine_memory(), &extent, wanted)?)
    }

    /// Counts what was found of the program, and says what is left for caches, of which the delta cache may take `cache` bytes.
    ///
    /// # Errors
    /// [`SendError::Memory`]: the books alone are too large by now.
    pub(super) fn share_out(&mut self, collected: &Collected, cache: u64) -> Result<Savings, SendError> {
        let pages = collected.spaces.iter().map(|space| space.populated.len()).sum();
        let runs = |set: &PageSet| set.runs().len() as u64;
        self.extent = Extent {
            pages,
            tables: collected.spaces.iter().map(|space| tables(&space.populated)).sum(),
            runs: collected.spaces.iter().map(|space| runs(&space.populated) + runs(&space.dirty)).sum(),
            kept: self.report.kept_pages,
            file: !self.peer.is_receiver(),
            keeps: self.store.is_some(),
        };
        let workers = self.workers.len().max(1);
        let limit = self.control.needs_memory(memory::needed(&self.extent, workers));
        self.report.engine_memory_bytes = limit;
        let savings = memory::savings(limit, &self.extent, workers, cache)?;
        self.report.delta_cache_bytes = savings.cache;
        Ok(savings)
    }

    /// Lets the caches have what they may, and the system what they had beyond that.
    pub(super) fn make_room(&mut self, collected: &Collected, cache: u64) -> Result<(), SendError> {
        let savings = self.share_out(collected, cache)?;
        let pages = self.extent.pages;
        if self.books().make_room(pages, collected.spaces.len(), savings) {
            sys::give_back();
        }
        Ok(())
    }
}

/// Stretches of 2 MiB in which there are pages.
fn tables(pages: &PageSet) -> u64 {
    let (mut tables, mut next) = (0, 0);
    for run in pages.runs() {
        let (first, end) = (run.start / 512, (run.start + run.len).div_ceil(512));
        tables += end.saturating_sub(first.max(next));
        next = end;
    }
    tables
}

/// Pages that a process has in memory and that are of no file; `None` when it has ended.
fn private_pages(target: &Target) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{}/statm", target.pid())).ok()?;
    let mut fields = text.split_whitespace().skip(1).map_while(|field| field.parse::<u64>().ok());
    let (resident, shared) = (fields.next()?, fields.next()?);
    Some(resident.saturating_sub(shared))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_are_counted_once() {
        let set = |runs: &[(u64, u64)]| {
            let mut set = PageSet::default();
            runs.iter().for_each(|(start, len)| set.insert(*start, *len));
            set
        };
        assert_eq!(tables(&set(&[])), 0);
        assert_eq!(tables(&set(&[(0, 1), (2, 1), (511, 1)])), 1);
        assert_eq!(tables(&set(&[(511, 2), (1023, 1), (5000, 512)])), 4);
    }
}
