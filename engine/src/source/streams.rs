//! The connections of a migration and the workers on them: opening, a round over all of them, and its end.

use super::ahead::Ahead;
use super::failure::SendError;
use super::images::Packer;
use super::pages::{Round, SendPagesError, Worker};
use super::precopy::Todo;
use super::queue::{Queue, Task};
use super::standby::Standby;
use super::tally::Tally;
use super::{Migration, Space};
use crate::link::{Channel, ChannelError};
use crate::observe::Event;
use crate::plan::CodingChoice;
use pageferry_tracker::{PageSet, Throttle};
use pageferry_wire_format::{Coding, CodingChooser, ControlMessage, PageRun, SpaceId};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How often the receiver hears of a source that rests.
const SIGN_OF_LIFE: Duration = Duration::from_millis(250);

/// How often progress is told.
const TELL: Duration = Duration::from_millis(100);

/// A worker is woken for so many pages at least: below it a thread costs more than it gains.
const PAGES_A_WORKER: u64 = 1024;

/// Connections that are opened at most, unless a number is asked for.
const MOST_STREAMS: usize = 8;

/// How often pages may be asked for again while the tree stands still.
const SEALS: usize = 3;

/// How long to wait for the peer's reason after a further connection has failed.
const LAST_WORDS: Duration = Duration::from_millis(500);

impl Migration<'_> {
    /// Opens the connections beside the first, as many as the plan or the processors and the receiver say, and prepares a worker for each.
    pub(super) fn open_streams(&mut self, most: u16) -> Result<(), SendError> {
        let wanted =
            self.plan.streams.map_or_else(default_streams, usize::from).min(usize::from(most)).max(1);
        let wanted = self.workers_within(wanted)?;
        for _ in 0..wanted {
            let chooser = match self.plan.coding {
                CodingChoice::Auto => CodingChooser::default(),
                CodingChoice::Raw => CodingChooser::only(Coding::Raw),
                CodingChoice::Zstd => CodingChooser::only(Coding::Zstd),
            };
            self.workers.push(Worker::new(chooser)?);
        }
        self.packer = Some(Packer::new(self.plan.coding, self.spoken)?);
        self.join_streams()?;
        if self.plan.coding != CodingChoice::Auto {
            self.books().set_plain();
        }
        self.report.streams = wanted as u32;
        self.peer_streams = most;
        self.tell_workers_of_the_limits();
        Ok(())
    }

    /// Opens a connection for each worker but the first, which has the one that the session began with.
    pub(super) fn join_streams(&mut self) -> Result<(), SendError> {
        let limit = self.control.limit();
        self.channel().set_shaper(Some(limit.clone()));
        for stream in 1..self.workers.len() {
            let mut channel = self.open_channel()?;
            channel.control(&ControlMessage::Join { session: self.session, stream: stream as u16 })?;
            match channel.answer("a further connection to be taken")? {
                ControlMessage::Joined => {}
                other => {
                    return Err(SendError::Protocol(format!("{other:?} instead of taking a connection")));
                }
            }
            channel.link_mut().set_stall(self.plan.stall_timeout);
            channel.set_shaper(Some(limit.clone()));
            self.further.push(channel);
        }
        Ok(())
    }

    /// How fast the link is for each of them, where that is known, and how much of the time each may work.
    pub(super) fn tell_workers_of_the_limits(&mut self) {
        let each = self.control.cpu().each(self.workers.len());
        self.workers.iter_mut().for_each(|worker| worker.limit_work(each));
        if let Some(bandwidth) = self.control.limit().rate() {
            let each = bandwidth / self.workers.len().max(1) as u64;
            self.workers.iter_mut().for_each(|worker| worker.limit_link(each));
        }
    }

    /// From here on the program waits: the links may be used as they are.
    pub(super) fn lift_bandwidth(&mut self) {
        let open = self.control.limit().unlimited();
        self.channel().set_shaper(Some(open.clone()));
        self.further.iter_mut().for_each(|channel| channel.set_shaper(Some(open.clone())));
    }

    /// Bytes that went out, over all connections.
    pub(super) fn sent_bytes(&self) -> u64 {
        let first = self.channel.as_ref().map_or(0, |channel| channel.link().sent());
        first + self.closed_bytes + self.further.iter().map(|channel| channel.link().sent()).sum::<u64>()
    }

    /// Closes the connections beside the first.
    pub(super) fn close_streams(&mut self) {
        self.closed_bytes += self.further.drain(..).map(|channel| channel.link().sent()).sum::<u64>();
    }

    /// Rests for the scan, and what was made of it. With a small share that can take longer than a silent link is believed in: the
    /// receiver hears that this side is still there.
    fn rest_after_look(&mut self) -> Result<(), SendError> {
        let mut left = self.meter.owe();
        while !left.is_zero() && !self.cancel.is_cancelled() {
            let began = Instant::now();
            let cancel = self.cancel;
            self.control.cpu().wait(|| cancel.is_cancelled() || began.elapsed() >= SIGN_OF_LIFE);
            left = self.control.cpu().owe(Duration::ZERO);
            if !left.is_zero() && self.peer.is_receiver() {
                self.control(&ControlMessage::Ping { n: 0 })?;
            }
        }
        Ok(())
    }

    /// Sends what is due, with a worker on each connection. Where the round is cut short, because the rest is to come late, what was
    /// not sent of it is held back until then.
    pub(super) fn send_todo(&mut self, todo: &[Todo], round: u32, frozen: bool) -> Result<Tally, SendError> {
        let (observer, cancel, control) = (self.observer, self.cancel, self.control);
        self.rest_after_look()?;
        let Self { spaces, books, workers, further, channel, throttle, peer, report, watch, leave, .. } =
            self;
        let channel = channel.as_mut().expect("connected before the first round");
        let tasks = todo.iter().map(|Todo { key, pages }| {
            let Space { place, reader, check, .. } = &spaces[key];
            Task { place, reader, check: check.as_ref(), pages }
        });
        let readers = spaces.values().map(|space| (space.place.id, &space.reader)).collect();
        let mut round = Round::new(Queue::new(tasks.collect()), control, books, readers, round, frozen);
        round.first &= report.interruptions == 0;
        round.passes = leave.is_some();
        if !frozen {
            round.ahead = Ahead::new(leave.unwrap_or(0));
        }
        let mut watch = watch.as_mut().filter(|_| !frozen);
        if let Some(watch) = &watch {
            round.work.set(watch.share());
        }
        let total_pages = round.queue.pages();
        control.round(round.number, total_pages);
        let standby = Standby {
            control,
            observer,
            throttle: throttle.as_ref(),
            beats: peer.is_receiver(),
            stop: Some(&round.stop),
        };
        let mut paused = Duration::ZERO;
        let goes_on = || !cancel.is_cancelled() && (frozen || !control.wants_post_copy());
        let helpers = (total_pages / PAGES_A_WORKER).min(further.len() as u64) as usize;
        let (first, others) = workers.split_first_mut().expect("a worker for the first connection");
        let mut told = Instant::now();
        let mut before = |channel: &mut Channel| {
            if told.elapsed() >= TELL {
                told = Instant::now();
                observer.event(&Event::Progress {
                    round: round.number,
                    done_pages: round.done_pages.load(Ordering::Relaxed),
                    total_pages,
                    sent_bytes: round.sent_bytes.load(Ordering::Relaxed),
                });
            }
            if control.is_paused() {
                paused += standby.wait(channel)?;
            }
            if let Some(watch) = &mut watch {
                let throttled = throttle.as_ref().map_or(Duration::ZERO, Throttle::stood);
                watch.allow(control.max_slowdown());
                watch.tick(throttled, &round.work);
            }
            Ok(goes_on())
        };
        // One that finds nothing left to do ends, paused or not: the first waits for it, and then nobody would be heard of.
        let others_before = || {
            let over =
                || cancel.is_cancelled() || round.stop.load(Ordering::Relaxed) || round.queue.is_empty();
            while control.is_paused() && !over() {
                control.wait(TELL);
            }
            goes_on()
        };
        let results = std::thread::scope(|scope| {
            let threads: Vec<_> = others
                .iter_mut()
                .zip(further.iter_mut())
                .take(helpers)
                .map(|(worker, channel)| {
                    let round = &round;
                    let others_before = &others_before;
                    scope.spawn(move || worker.run(channel, round, &mut |_| Ok(others_before())))
                })
                .collect();
            let mut results = vec![first.run(channel, &round, &mut before)];
            results.extend(threads.into_iter().map(|thread| match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }));
            results
        });
        // The worker has paid.
        self.meter.begin();
        let mut tally = Tally::default();
        let mut failed = None;
        for result in results {
            match result {
                Ok(part) => tally.add(&part),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        let rest = round.queue.rest();
        self.paused += paused;
        self.report.paused_us = self.paused.as_micros() as u64;
        match failed {
            None => {
                self.check_cancel()?;
                for (Todo { key, .. }, rest) in todo.iter().zip(&rest) {
                    if let Some(space) = self.spaces.get_mut(key) {
                        space.hot.put_back(rest);
                    }
                }
                Ok(tally)
            }
            Some(error) => Err(self.explain(error)),
        }
    }

    /// A connection that broke says nothing; the receiver may have said why on the first one.
    fn explain(&mut self, error: SendPagesError) -> SendError {
        let SendPagesError::Channel(ChannelError::Link(link)) = error else { return error.into() };
        match self.channel().last_words(LAST_WORDS) {
            Some(reason) => reason.into(),
            None => ChannelError::Link(link).into(),
        }
    }

    /// Says on every connection that a round is all sent.
    pub(super) fn end_round(&mut self, round: u32, tally: &Tally) -> Result<(), SendError> {
        let end = ControlMessage::RoundEnd {
            round,
            pages: tally.sent() + tally.codings.zero.pages,
            bytes: tally.bytes(),
        };
        for stream in 0..self.further.len() {
            if let Err(error) = self.further[stream].control(&end) {
                return Err(self.explain(error.into()));
            }
        }
        self.control(&end)
    }

    /// Waits until the destination holds a round; what it could not make of what it was sent counts as not sent.
    pub(super) fn acknowledged(&mut self, round: u32) -> Result<Vec<(SpaceId, Vec<PageRun>)>, SendError> {
        let mut again = Vec::new();
        loop {
            match self.answer("the acknowledgement of a round")? {
                ControlMessage::RoundAck { round: acknowledged } if acknowledged == round => {
                    self.books().settle();
                    return Ok(again);
                }
                ControlMessage::Again { spaces } => {
                    for (space, runs) in &spaces {
                        let Some(pages) = self.books().take_back(*space, runs) else {
                            return Err(SendError::Protocol(format!(
                                "more pages of space {} again than it was given",
                                space.0
                            )));
                        };
                        tracing::warn!(space = space.0, pages, "the destination asks for pages again");
                        self.report.repeated_pages += pages;
                    }
                    again.extend(spaces);
                }
                other => return Err(SendError::Protocol(format!("{other:?} instead of an acknowledgement"))),
            }
        }
    }

    /// Sends pages that were asked for in the freeze, as they are.
    pub(super) fn send_again(
        &mut self,
        again: Vec<(SpaceId, Vec<PageRun>)>,
        round: u32,
    ) -> Result<Tally, SendError> {
        self.books().set_plain();
        let mut todo = Vec::new();
        for (id, runs) in again {
            let Some(key) = self.spaces.iter().find(|(_, space)| space.place.id == id).map(|(key, _)| *key)
            else {
                return Err(SendError::Protocol(format!(
                    "pages of an unknown space {} were asked for",
                    id.0
                )));
            };
            let mut pages = PageSet::default();
            runs.iter().for_each(|run| pages.insert(run.start.0, run.len));
            todo.push(Todo { key, pages });
        }
        let tally = self.send_todo(&todo, round, true)?;
        self.end_round(round, &tally)?;
        Ok(tally)
    }

    /// How often the seal may be tried.
    pub(super) const SEALS: usize = SEALS;
}

/// A worker for each processor that this process may use.
fn default_streams() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(MOST_STREAMS)
}
