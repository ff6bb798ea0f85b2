//! The connections of a session were lost in the rounds, and there is a new one: both sides bring together what is here.
//!
//! The source tells which pages are surely here, with their digest, and which of them perhaps. What is neither is dropped: the
//! source may have dropped it, and what it said of that may not have arrived. Of the pages in doubt it hears what they are, because
//! each was checked when it came. So whatever was said and not heard before the loss, on either side, is of no consequence.

use super::ReceiveError;
use super::receive::{Reception, page_set};
use crate::link::Incoming;
use crate::observe::Event;
use pageferry_tracker::PageSet;
use pageferry_wire_format::{
    ControlMessage, DigestBatch, PageDigest, PageNo, PageRun, SpaceDigest, SpaceId, SpaceInfo, limits,
};
use std::collections::BTreeMap;
use std::time::Instant;

/// What the source says of one space.
#[derive(Debug, Default)]
struct Account {
    sure: Vec<PageRun>,
    doubted: Vec<PageRun>,
    said: Option<(SpaceInfo, u64, SpaceDigest)>,
}

impl Account {
    fn add(&mut self, runs: Vec<PageRun>, sure: bool) -> Result<(), ReceiveError> {
        let list = if sure { &mut self.sure } else { &mut self.doubted };
        if self.said.is_some() || list.len() + runs.len() > limits::MAX_OWNED_RUNS {
            return Err(ReceiveError::Order("more runs of pages that stand than a space may have"));
        }
        list.extend(runs);
        Ok(())
    }
}

impl Reception<'_, '_> {
    /// Whether the session goes on after this when there is a link again.
    pub(super) fn is_held_after(&self, error: &ReceiveError) -> bool {
        error.is_link() && !error.is_cancelled() && !self.hub.hold().is_zero() && !self.is_sealing()
    }

    /// The link is lost: waits for it, and goes on over it.
    ///
    /// # Errors
    /// It did not come back in time, or is lost again; why the session is not wanted any more; a source that has another account of what
    /// is here.
    pub(super) fn go_on_after(&mut self, lost: ReceiveError) -> Result<(), ReceiveError> {
        let hold = self.hub.hold();
        let noticed = Instant::now();
        self.observer.event(&Event::LinkLost { reason: lost.chain(), limit_us: hold.as_micros() as u64 });
        let stall = self.channel.link().stall();
        self.channel.link().shutdown();
        let channel = self.hub.wait_for_link(lost, self.still)?;
        *self.channel = channel;
        self.channel.link_mut().set_stall(stall);
        self.channel.link_mut().set_alarm(Some(self.hub.alarm()));
        crate::fault::point("dest-rejoin");
        self.channel.control(&ControlMessage::Rejoined)?;
        let found_pages = self.settle_accounts()?;
        let away_us = noticed.elapsed().as_micros() as u64;
        self.observer.event(&Event::LinkBack { away_us, found_pages });
        Ok(())
    }

    /// Hears what the source is sure of, and tells what it is not; gives the number of pages that it was told of.
    fn settle_accounts(&mut self) -> Result<u64, ReceiveError> {
        let mut accounts: BTreeMap<SpaceId, Account> = BTreeMap::new();
        loop {
            match self.channel.receive()? {
                Incoming::Owned(batch) => accounts.entry(batch.space).or_default().add(batch.runs, true)?,
                Incoming::Owed(batch) => accounts.entry(batch.space).or_default().add(batch.runs, false)?,
                Incoming::Control(ControlMessage::Standing { info, pages, digest }) => {
                    let account = accounts.entry(info.space).or_default();
                    if account.said.replace((info, pages, digest)).is_some() {
                        return Err(ReceiveError::Order("two accounts of one space"));
                    }
                }
                Incoming::Control(ControlMessage::StandingEnd { spaces }) => {
                    let whole = accounts.values().all(|account| account.said.is_some());
                    if !whole || accounts.len() != spaces as usize {
                        return Err(ReceiveError::Order("another number of accounts than it says"));
                    }
                    break;
                }
                Incoming::Control(ControlMessage::Ping { .. }) => {}
                Incoming::Control(ControlMessage::Abort { code, detail }) => {
                    return Err(ReceiveError::SourceAborted { code, detail });
                }
                other => return Err(ReceiveError::Unexpected(format!("{other:?}"))),
            }
        }
        let gone: Vec<SpaceId> =
            self.spaces.keys().filter(|space| !accounts.contains_key(space)).copied().collect();
        gone.into_iter().try_for_each(|space| self.close_space(space))?;
        let mut told = 0;
        for (space, Account { sure, doubted, said }) in accounts {
            let Some((info, pages, digest)) = said else { continue };
            if !self.spaces.contains_key(&space) {
                self.open_space(info)?;
            }
            told += self.settle_account(space, &sure, &doubted, pages, digest)?;
        }
        self.asked_again = false;
        self.channel.control(&ControlMessage::Stands { pages: told })?;
        Ok(told)
    }

    fn settle_account(
        &mut self,
        space: SpaceId,
        sure: &[PageRun],
        doubted: &[PageRun],
        pages: u64,
        digest: SpaceDigest,
    ) -> Result<u64, ReceiveError> {
        let (sure, doubted) = (ordered(sure)?, ordered(doubted)?);
        if !sure.intersect(&doubted).is_empty() {
            return Err(ReceiveError::Order("pages that stand and are in doubt"));
        }
        let found = self.hub.with_store(|store| {
            let found = store.held_of(space, doubted.runs().iter().map(|run| (run.start, run.len)));
            let mut keep = sure;
            found.iter().for_each(|(page, _)| keep.insert(page.0, 1));
            let held = store.seal(space, &crate::source::sent::wire_runs(&keep))?;
            Ok((found, held))
        });
        let (found, held) = found.map_err(|error| match error {
            ReceiveError::Store(source) => ReceiveError::Stands { space, source: Some(source) },
            other => other,
        })?;
        let mut here = held.digest;
        found.iter().for_each(|(page, content)| here.remove(*page, content));
        if held.pages != pages + found.len() as u64 || here != digest {
            return Err(ReceiveError::Stands { space, source: None });
        }
        for found in found.chunks(limits::MAX_DIGESTS_PER_FRAME) {
            self.channel.digests(&digests_of(space, found))?;
        }
        Ok(found.len() as u64)
    }
}

/// Runs that came in several frames: each was in order by itself.
fn ordered(runs: &[PageRun]) -> Result<PageSet, ReceiveError> {
    if !runs.is_sorted_by(|before, after| before.end() <= after.start.0) {
        return Err(ReceiveError::Order("pages that stand, out of order"));
    }
    Ok(page_set(runs))
}

fn digests_of(space: SpaceId, found: &[(PageNo, PageDigest)]) -> DigestBatch {
    let mut runs: Vec<PageRun> = Vec::new();
    for (page, _) in found {
        match runs.last_mut() {
            Some(run) if run.end() == page.0 => run.len += 1,
            _ => runs.push(PageRun { start: *page, len: 1 }),
        }
    }
    DigestBatch { space, runs, digests: found.iter().map(|(_, content)| *content).collect(), more: false }
}

#[cfg(test)]
mod tests;
