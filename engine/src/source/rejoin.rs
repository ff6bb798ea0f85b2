//! A link that is lost while the program runs: what may not have arrived is forgotten, the receiver is tried again for a while, and
//! asked what it has of it. The rounds go on from there.

use super::books::Books;
use super::failure::SendError;
use super::sent::wire_runs;
use super::{Migration, Peer, Space};
use crate::journal::ask;
use crate::link::{Channel, ChannelError, Incoming, TcpLink};
use crate::observe::Event;
use pageferry_tracker::{PageSet, Run, Throttle};
use pageferry_wire_format::{
    ControlMessage, DigestBatch, OwedBatch, OwnedBatch, PageRun, SpaceId, SpaceInfo, limits, version,
};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

/// How long to wait between two tries.
const TRY_AGAIN: Duration = Duration::from_millis(200);

/// How long one try may take until the receiver has answered: who cancels the migration waits for its end.
const TRY: Duration = Duration::from_secs(1);

/// How long the farewell of a migration that is given up may take.
const FAREWELL: Duration = Duration::from_secs(1);

impl Migration<'_> {
    /// Has the receiver hold the session when the link is lost from now on, if both sides are for it.
    pub(super) fn ask_to_hold(&mut self) -> Result<(), SendError> {
        let wait = self.plan.resume_timeout;
        if !self.peer.is_receiver() || self.spoken < version::HOLDS || wait.is_zero() {
            return Ok(());
        }
        // It may notice a loss earlier than this side by a stall time-out, and the last try takes its time.
        let hold = wait + self.plan.stall_timeout + TRY + self.plan.connect_timeout;
        let ms = u64::try_from(hold.as_millis()).unwrap_or(u64::MAX).min(limits::MAX_HOLD_MS);
        self.control(&ControlMessage::Hold { ms })?;
        self.held_for = Some(wait);
        Ok(())
    }

    /// The program is about to stand still: from here on a lost link ends the migration, on both sides at once. A newer receiver hears of
    /// it by this, and so in any case.
    pub(super) fn hold_no_longer(&mut self) -> Result<(), SendError> {
        let held = self.held_for.take().is_some();
        match held || self.peer.is_receiver() && self.spoken >= version::PREPARED {
            true => self.control(&ControlMessage::Hold { ms: 0 }),
            false => Ok(()),
        }
    }

    /// Goes on after a failure, if the link was all that failed, as soon as there is one again. The program runs meanwhile.
    ///
    /// # Errors
    /// The failure itself, if it is of another kind or the session is not held; what else went wrong meanwhile; a link that did not
    /// come back in time.
    pub(super) fn go_on_after(&mut self, error: SendError) -> Result<(), SendError> {
        let (Some(limit), Peer::Receiver(to), true) = (self.held_for, &self.peer, error.is_lost_link())
        else {
            return Err(error);
        };
        let to = *to;
        let lost = Instant::now();
        self.observer.event(&Event::LinkLost { reason: error.chain(), limit_us: limit.as_micros() as u64 });
        self.control.link_is_away(true);
        // Nothing is gained by a program that is slow while nothing is sent.
        let share = self.throttle.as_ref().map_or(0.0, Throttle::share);
        self.set_throttle(0.0);
        let back = self.wait_for_link(to, lost + limit, &error);
        self.set_throttle(share);
        self.control.link_is_away(false);
        let away = lost.elapsed();
        self.report.interruptions += 1;
        self.report.interrupted_us += away.as_micros() as u64;
        let found_pages = back?;
        self.observer.event(&Event::LinkBack { away_us: away.as_micros() as u64, found_pages });
        Ok(())
    }

    fn set_throttle(&self, share: f64) {
        // One that has failed is at its full pace for good.
        if let Some(throttle) = &self.throttle
            && (throttle.share() > 0.0 || share > 0.0)
        {
            throttle.set(share);
            self.control.throttled(share);
        }
    }

    /// Tries until the session goes on; says how many pages were found to have arrived after all.
    fn wait_for_link(&mut self, to: SocketAddr, end: Instant, lost: &SendError) -> Result<u64, SendError> {
        let late = !self.late_channels.is_empty();
        let mut doubted = self.books().forget_doubted();
        let mut found = 0;
        loop {
            self.drop_channels();
            self.check_cancel()?;
            let failed = match self.try_to_rejoin(to, &mut doubted, &mut found, late) {
                Ok(()) => return Ok(found),
                Err(error) if error.is_lost_link() => error,
                Err(error) if error.is_cancel() => return Err(error),
                Err(error) => {
                    self.drop_channels();
                    return Err(SendError::NotTakenUp { lost: lost.chain(), source: Box::new(error) });
                }
            };
            tracing::debug!(error = %failed.chain(), "the session cannot be taken up yet");
            if Instant::now() >= end {
                self.drop_channels();
                let waited = self.held_for.unwrap_or_default();
                return Err(SendError::LinkLost { waited, lost: lost.chain(), source: Box::new(failed) });
            }
            self.cancel.sleep(TRY_AGAIN);
        }
    }

    /// The connections that there were are of no use any more.
    fn drop_channels(&mut self) {
        self.close_streams();
        self.late_channels.clear();
        if let Some(channel) = self.channel.take() {
            self.closed_bytes += channel.link().sent();
            channel.link().shutdown();
        }
    }

    fn try_to_rejoin(
        &mut self,
        to: SocketAddr,
        doubted: &mut BTreeMap<SpaceId, PageSet>,
        found: &mut u64,
        late: bool,
    ) -> Result<(), SendError> {
        let mut link =
            TcpLink::connect(to, TRY.min(self.plan.connect_timeout)).map_err(ChannelError::from)?;
        if let Some(name) = &self.plan.congestion {
            link.set_congestion(name)
                .map_err(|source| SendError::Congestion { name: name.clone(), source })?;
        }
        link.set_stall(self.plan.connect_timeout);
        link.set_cancel(Some(self.cancel.clone()));
        let mut channel = Channel::new(link);
        channel.control(&ControlMessage::Rejoin { session: self.session })?;
        match channel.answer("the session to be taken up")? {
            ControlMessage::Rejoined => {}
            other => return Err(SendError::Protocol(format!("{other:?} instead of taking the session up"))),
        }
        channel.link_mut().set_stall(self.plan.stall_timeout);
        let spaces: Vec<SpaceInfo> = self
            .spaces
            .values()
            .map(|Space { place, pages, .. }| SpaceInfo {
                space: place.id,
                vpid: place.vpid,
                name: place.target.name(),
                pages: *pages,
            })
            .collect();
        let books = self.books.get_mut().unwrap_or_else(PoisonError::into_inner);
        let channel = self.channel.insert(channel);
        say_what_stands(channel, books, &spaces, doubted)?;
        *found += hear_what_stands(channel, books, doubted)?;
        doubted.clear();
        self.join_streams()?;
        if late {
            self.open_late(self.peer_streams)?;
        }
        Ok(())
    }

    /// A migration is given up whose link is lost: if the receiver can be reached all the same, it need not hold the session to the end.
    pub(super) fn say_farewell(&self) {
        let Peer::Receiver(to) = &self.peer else { return };
        if self.held_for.is_none() || self.channel.is_some() {
            return;
        }
        // One that is asked about a session before its commit gives it up.
        let asked = TcpLink::connect(*to, FAREWELL).map_err(ChannelError::from).and_then(|mut link| {
            link.set_stall(FAREWELL);
            ask(&mut Channel::new(link), self.session)
        });
        if let Err(error) = asked {
            tracing::debug!(%error, "the receiver does not know yet that the migration was given up");
        }
    }
}

/// Says of every space which pages are surely there, with their digest, and which of them perhaps.
pub(crate) fn say_what_stands(
    channel: &mut Channel,
    books: &mut Books,
    spaces: &[SpaceInfo],
    doubted: &BTreeMap<SpaceId, PageSet>,
) -> Result<(), SendError> {
    for info in spaces {
        let space = info.space;
        let sent = books.space(space);
        let (sure, pages, digest) = (wire_runs(&sent.pages()), sent.len(), sent.digest());
        let chunks = sure.chunks(limits::MAX_RUNS_PER_FRAME);
        let last = chunks.len();
        for (n, runs) in chunks.enumerate() {
            channel.owned(&OwnedBatch { space, runs: runs.to_vec(), more: n + 1 < last })?;
        }
        let doubted = doubted.get(&space).map(wire_runs).unwrap_or_default();
        let chunks = doubted.chunks(limits::MAX_RUNS_PER_FRAME);
        let last = chunks.len();
        for (n, runs) in chunks.enumerate() {
            channel.owed(&OwedBatch { space, runs: runs.to_vec(), more: n + 1 < last })?;
        }
        channel.control(&ControlMessage::Standing { info: info.clone(), pages, digest })?;
    }
    Ok(channel.control(&ControlMessage::StandingEnd { spaces: spaces.len() as u32 })?)
}

/// Hears what the destination holds of the pages in doubt, and enters it in the books; says how many these are. Nothing of it counts
/// before it has said all.
pub(crate) fn hear_what_stands(
    channel: &mut Channel,
    books: &mut Books,
    doubted: &BTreeMap<SpaceId, PageSet>,
) -> Result<u64, SendError> {
    let mut told = Vec::new();
    let mut heard: BTreeMap<SpaceId, PageSet> = BTreeMap::new();
    let mut count = 0;
    loop {
        match channel.receive()? {
            Incoming::Digests(DigestBatch { space, runs, digests, .. }) => {
                let asked = doubted.get(&space);
                let heard = heard.entry(space).or_default();
                for run in runs.iter().map(|run| Run { start: run.start.0, len: run.len }) {
                    let fresh = heard.intersect(&[run].into_iter().collect()).is_empty();
                    if !fresh || !asked.is_some_and(|asked| asked.contains_run(run)) {
                        return Err(SendError::Protocol(format!(
                            "digests of pages of space {} that were not asked for",
                            space.0
                        )));
                    }
                    heard.insert(run.start, run.len);
                    count += run.len;
                }
                told.push((space, runs, digests));
            }
            Incoming::Control(ControlMessage::Stands { pages }) if pages == count => break,
            Incoming::Control(ControlMessage::Ping { .. }) => {}
            Incoming::Control(ControlMessage::Abort { code, detail }) => {
                return Err(ChannelError::Aborted { code, detail }.into());
            }
            other => return Err(SendError::Protocol(format!("{other:?} instead of what it holds"))),
        }
    }
    for (space, runs, digests) in told {
        let sent = books.space(space);
        for (page, content) in runs.iter().flat_map(PageRun::pages).zip(digests) {
            sent.insert(page, content);
        }
    }
    books.settle();
    Ok(count)
}
