//! The one freeze: last pages, everything else, and the two-phase commit.

use super::failure::SendError;
use super::machine::Stake;
use super::precopy::wire_regions;
use super::sent::wire_runs;
use super::tally::Tally;
use super::watchman::Watchman;
use super::{Migration, Peer, Phase};
use crate::fault::Fault;
use crate::journal::{Process, Step};
use crate::layout::split_at_regions;
use crate::observe::Event;
use crate::policy::Decision;
use crate::report::{FillReport, RoundReport, TimedPart};
use pageferry_criu_glue::{HideKind, Owned, Wait};
use pageferry_tracker::{self as tracker, Collected, PageSet, TreeState};
use pageferry_wire_format::{ControlMessage, HandoverState, OwedBatch, OwnedBatch, limits};
use std::time::{Duration, Instant};

/// Splits the downtime: each lap begins where the one before it ended.
struct Laps {
    last: Instant,
}

impl Laps {
    fn lap(&mut self, observer: &dyn crate::Observer, name: &str) -> u64 {
        let now = Instant::now();
        let us = (now - self.last).as_micros() as u64;
        self.last = now;
        observer.event(&Event::Step { name: name.to_owned(), duration_us: us });
        us
    }
}

impl Migration<'_> {
    /// From the decision to freeze until the program runs at the destination.
    pub(super) fn hand_over(&mut self, mut decision: Decision) -> Result<(), SendError> {
        let stop = decision.stop.expect("handed over only after a decision to stop");
        self.report.stop_reason = stop.name().to_owned();
        self.check_cancel()?;
        self.hold_no_longer()?;
        let patience = self.plan.stall_timeout;
        self.niceness = None;
        self.control.cpu().lift(true);
        self.tell_workers_of_the_limits();

        // At its full pace again: CRIU stops it with ptrace too.
        self.note_throttle();
        self.throttle = None;
        self.control.throttled(0.0);

        self.phase = Phase::Freezing;
        crate::fault::point("freeze");
        let pids: Vec<i32> = tracker::tree::discover(&self.root)?.iter().map(tracker::Target::pid).collect();
        let ahead = self.dump_mut().look_ahead(&pids);
        self.prepared("counters", ahead.counters);
        self.prepared("areas", ahead.areas);
        let began = Instant::now();
        self.watchman = Some(Watchman::start().map_err(SendError::Watchman)?);
        self.prepared("watchman", began.elapsed());
        self.close_in(&mut decision)?;
        self.report.predicted_downtime_us = decision.predicted_downtime.as_micros() as u64;
        self.observer.event(&Event::Freezing {
            stop_reason: self.report.stop_reason.clone(),
            predicted_downtime_us: self.report.predicted_downtime_us,
        });
        self.lift_bandwidth();
        let began = Instant::now();
        self.look_at_connections()?;
        self.announce_network()?;
        if self.network.is_some() {
            self.prepared("announcement", began.elapsed());
        }
        let mut laps = Laps { last: Instant::now() };
        let wait = Wait { cancel: Some(self.cancel.fd()), ..Wait::from(patience) };
        self.write_down(Step::Frozen, &[])?;
        self.dump_mut().freeze(wait)?;
        self.report.downtime_us.freeze = laps.lap(self.observer, "freeze");

        self.phase = Phase::LastPages;
        crate::fault::point("frozen");
        let started = laps.last;
        let round = self.report.rounds.len() as u32;
        let before = self.sent_bytes();
        let collected = self.tracker_mut().collect(TreeState::Frozen)?;
        if collected.spaces.is_empty() {
            return Err(SendError::Exited);
        }
        let todo = self.take_in(&collected, round, true)?;
        let todo_pages: u64 = todo.iter().map(|todo| todo.pages.len()).sum();
        let todo = if self.owes { self.owe(todo, &collected)? } else { todo };
        self.report.downtime_us.collect = laps.lap(self.observer, "collect");
        let mut tally = self.send_todo(&todo, round, true)?;
        self.end_round(round, &tally)?;
        self.report.downtime_us.last_pages = laps.lap(self.observer, "last pages");

        self.phase = Phase::Sealing;
        crate::fault::point("seal");
        self.block_network()?;
        self.seal(&collected, round, &mut tally)?;
        // What is left to say goes over the first connection, and what is owed over others.
        self.close_streams();
        self.answer_late()?;
        self.report.downtime_us.seal = laps.lap(self.observer, "seal");
        let sent_bytes = self.sent_bytes() - before;
        self.report.rounds.push(RoundReport {
            round,
            frozen: true,
            dirty_pages: todo_pages,
            sent_pages: tally.sent(),
            unchanged_pages: tally.codings.unchanged.pages,
            zero_pages: tally.codings.zero.pages,
            gone_pages: tally.gone,
            held_pages: 0,
            left_pages: 0,
            ahead_pages: 0,
            slowdown: None,
            held_up: tally.toil.held_up(),
            codings: tally.codings,
            sent_bytes,
            duration_us: (laps.last - started).as_micros() as u64,
            pause_us: 0,
            dirty_rate: 0.0,
            link_rate: 0.0,
            predicted_downtime_us: self.report.predicted_downtime_us,
        });

        self.phase = Phase::Dumping;
        crate::fault::point("dump");
        if self.hide == HideKind::SyntheticParent {
            self.tracker_mut().clear_frozen()?;
        }
        self.note_what_to_keep(&collected);
        let table = self.hidden_table(&collected)?;
        self.dump_mut().dump(&table, wait)?;
        self.report.downtime_us.dump = laps.lap(self.observer, "dump");

        self.phase = Phase::Images;
        crate::fault::point("images");
        self.send_images()?;
        self.report.downtime_us.images = laps.lap(self.observer, "images");

        self.phase = Phase::Restoring;
        crate::fault::point("restore");
        if self.plan.verify {
            self.send_digests(&collected)?;
        }
        self.write_down_debt()?;
        let stake = self.stake();
        if stake == Stake::Image {
            self.let_go(&mut laps)?;
        }
        self.hear_ready()?;
        if stake != Stake::Image {
            self.report.downtime_us.restore = laps.lap(self.observer, "restore");
            crate::fault::point("ready");
            self.dump_mut().confirm()?;
            self.report.downtime_us.confirm = laps.lap(self.observer, "confirm");
            self.hold_tree()?;
            crate::fault::point("held");
        }
        // The last moment at which anybody can change their mind.
        if !self.control.commit() {
            return Err(SendError::Cancelled);
        }
        self.channel().link_mut().set_cancel(None);
        if stake != Stake::Image {
            self.watchman().leave().map_err(SendError::Watchman)?;
        }
        let owes = stake == Stake::Part;
        if stake != Stake::Image {
            let addresses = self.plan.move_addresses.iter().map(ToString::to_string).collect();
            let keep_store = self.plan.keep_store.as_deref();
            let journal = self.journal.as_mut();
            journal.map_or(Ok(()), |journal| journal.committing(owes, addresses, keep_store))?;
        }
        self.phase = Phase::Committing;
        if crate::fault::point("commit") == Some(Fault::Cut) {
            self.channel().link().shutdown();
        }
        self.control(&ControlMessage::Commit)?;
        crate::fault::point("commit-sent");
        self.remove_addresses();
        self.hear_delivered()?;
        match self.answer("the destination to let the program run")? {
            ControlMessage::Resumed { pid, timings } => {
                self.phase = Phase::Committed;
                if stake != Stake::Image {
                    self.note_down(Step::Resumed);
                }
                self.report.destination_pid = Some(pid).filter(|pid| *pid > 0);
                self.add_parts(timings);
            }
            other => return Err(SendError::Protocol(format!("{other:?} instead of resumed"))),
        }
        if stake != Stake::Image {
            self.report.downtime_us.commit = laps.lap(self.observer, "commit");
        }
        self.report.downtime_us.add_up();
        Ok(())
    }

    /// The image is complete, and the program is not in it any more: it runs on here while that is put on the disk.
    fn let_go(&mut self, laps: &mut Laps) -> Result<(), SendError> {
        crate::fault::point("let-go");
        self.dump_mut().confirm()?;
        self.report.downtime_us.confirm = laps.lap(self.observer, "confirm");
        self.watchman = None;
        if let Some(dump) = self.dump.take() {
            dump.abort()?;
        }
        self.report.downtime_us.commit = laps.lap(self.observer, "commit");
        if let Some(tracker) = self.tracker.take()
            && let Err(error) = tracker.detach()
        {
            tracing::warn!(%error, "the tracker could not be detached cleanly");
        }
        Ok(())
    }

    /// The restored program could run, and the destination says what it did.
    fn hear_ready(&mut self) -> Result<(), SendError> {
        let mut prepared = false;
        loop {
            match self.answer("the destination to be ready")? {
                ControlMessage::Prepared { timings } if !prepared => {
                    prepared = true;
                    self.report.prepared_us.destination = timed_parts(timings).collect();
                    self.report.prepared_us.add_up();
                }
                ControlMessage::Ready { timings, verified_pages } => {
                    // A file has the digests for it; the comparison is made at each restore.
                    self.report.verified = self.plan.verify && matches!(self.peer, Peer::Receiver(_));
                    self.report.verified_pages = verified_pages;
                    self.add_parts(timings);
                    return Ok(());
                }
                other => return Err(SendError::Protocol(format!("{other:?} instead of ready"))),
            }
        }
    }

    fn add_parts(&mut self, timings: Vec<(pageferry_wire_format::Part, u64)>) {
        self.report.downtime_us.destination.extend(timed_parts(timings));
    }

    /// Something for the freeze was done before it, and took so long.
    pub(super) fn prepared(&mut self, name: &str, took: Duration) {
        if took.is_zero() {
            return;
        }
        let part = TimedPart { name: name.to_owned(), us: took.as_micros() as u64 };
        self.report.prepared_us.source.push(part);
        self.report.prepared_us.add_up();
    }

    /// Both sides agree on the memory: the destination confirms that it holds exactly the owned pages, with
    /// the content that the source read.
    ///
    /// These are all pages of all mappings that CRIU's restorer leaves to userfaultfd, in every process: of such
    /// mappings it takes nothing from its images, not even what is in them.
    ///
    /// What the destination could not make of deltas and copies it asks for again, and the seal is repeated.
    fn seal(&mut self, collected: &Collected, round: u32, tally: &mut Tally) -> Result<(), SendError> {
        self.report.processes = collected.spaces.len() as u32;
        for _ in 0..Self::SEALS {
            let memory_pages = self.say_seal(collected)?;
            // Sent before the seal, and answered before it.
            let again = self.acknowledged(round)?;
            match self.answer("the seal")? {
                ControlMessage::Sealed { pages } if pages == memory_pages => return Ok(()),
                ControlMessage::Unsealed if !again.is_empty() => tally.add(&self.send_again(again, round)?),
                other => {
                    return Err(SendError::Protocol(format!(
                        "{other:?} instead of a seal over {memory_pages} pages"
                    )));
                }
            }
        }
        Err(SendError::Protocol("the same pages again and again".to_owned()))
    }

    /// Says what every space consists of; gives the number of pages that the destination holds.
    fn say_seal(&mut self, collected: &Collected) -> Result<u64, SendError> {
        let (mut memory_pages, mut owed_pages) = (0, 0);
        let debt = self.debt();
        for scan in &collected.spaces {
            let (id, vpid) = {
                let place = &self.space(scan.key.0).place;
                (place.id, place.vpid)
            };
            let sent = self.books().space(id);
            let (pages, digest) = (sent.len(), sent.digest());
            memory_pages += pages;
            let runs = wire_runs(&scan.populated);
            let count = runs.chunks(limits::MAX_RUNS_PER_FRAME).count();
            for (index, runs) in runs.chunks(limits::MAX_RUNS_PER_FRAME).enumerate() {
                let batch = OwnedBatch { space: id, runs: runs.to_vec(), more: index + 1 < count };
                self.channel().owned(&batch)?;
            }
            if let Some(debt) = &debt
                && let Some(owed) = debt.owed_of(id)
            {
                owed_pages += owed.len();
                let runs = wire_runs(owed);
                let count = runs.chunks(limits::MAX_RUNS_PER_FRAME).count();
                for (index, runs) in runs.chunks(limits::MAX_RUNS_PER_FRAME).enumerate() {
                    let batch = OwedBatch { space: id, runs: runs.to_vec(), more: index + 1 < count };
                    self.channel().owed(&batch)?;
                }
            }
            self.control(&ControlMessage::SpaceSeal {
                space: id,
                vpid,
                pages,
                digest,
                regions: wire_regions(scan),
            })?;
        }
        self.control(&ControlMessage::SealEnd { spaces: collected.spaces.len() as u32 })?;
        self.report.memory_bytes = (memory_pages + owed_pages) * 4096;
        Ok(memory_pages)
    }

    /// What CRIU is kept from dumping: what the engine carries, but for the pages under the threads' stack
    /// pointers, without which CRIU does not dump.
    fn hidden_table(&self, collected: &Collected) -> Result<Vec<Owned>, SendError> {
        let mut table = Vec::with_capacity(collected.spaces.len());
        for scan in &collected.spaces {
            let pid = scan.target.pid();
            let mut under = PageSet::default();
            for pointer in
                tracker::stack_pointers(&scan.target).map_err(|source| SendError::Stack { pid, source })?
            {
                under.insert(pointer / 4096, 1);
            }
            let pairs = |set: &PageSet| set.runs().iter().map(|run| (run.start, run.len)).collect::<Vec<_>>();
            table.push(Owned {
                pid,
                vpid: self.spaces[&scan.key.0].place.vpid,
                runs: split_at_regions(&pairs(&scan.populated.subtract(&under)), &scan.regions),
                populated: pairs(&scan.populated),
            });
        }
        Ok(table)
    }

    /// A SIGSTOP waits in every task from here on: whatever ends now, this engine, CRIU or the link, no task of
    /// the source runs another instruction of the program unless it is told to.
    fn hold_tree(&mut self) -> Result<(), SendError> {
        let tree = tracker::tree::discover(&self.root)?;
        self.write_down(Step::Held, &Process::of(&tree))?;
        self.watchman().hold(tree.iter().map(tracker::Target::pid)).map_err(SendError::Watchman)?;
        for target in tree {
            let pid = target.pid();
            rustix::process::pidfd_send_signal(target.pidfd(), rustix::process::Signal::STOP)
                .map_err(|errno| SendError::Hold { pid, source: errno.into() })?;
            self.held.push(target);
        }
        Ok(())
    }

    fn watchman(&mut self) -> &mut Watchman {
        self.watchman.as_mut().expect("the watchman was started before the freeze")
    }

    /// After the commit: ends the frozen tree here, and waits until the destination has every page in place.
    pub(super) fn after_commit(&mut self) -> Result<(), SendError> {
        self.let_network_go(true);
        let owing = self.late.is_some();
        self.post_copy()?;
        if owing {
            // Everything is there, and the engine there is the only one that has what is not in place yet: should it end now, the program
            // ends with it, and what is here is the only copy.
            let heard = match self.late_last.take() {
                Some(channel) => self.hear_filled(channel),
                None => Err(SendError::Protocol("nothing more of what it had".to_owned())),
            };
            if let Err(error) = heard {
                if !matches!(self.ask_what_became(), Some(HandoverState::Filled { .. })) {
                    return Err(error);
                }
                let text = format!("the destination has everything, and did not say how it went: {error}");
                self.observer.event(&Event::Warning { text });
            }
        } else {
            // Until then the engine there is the only one that has the rest of its pages, and what is here the only other copy.
            match self.answer("the destination to have every page in place")? {
                ControlMessage::Filled { .. } if matches!(self.peer, Peer::Archive(_)) => {}
                ControlMessage::Filled { pages, prefilled_pages, faults, max_fault_us, duration_us } => {
                    self.observer.event(&Event::Filled { pages, faults, max_fault_us });
                    self.report.fill =
                        Some(FillReport { pages, prefilled_pages, faults, max_fault_us, duration_us });
                }
                other => return Err(SendError::Protocol(format!("{other:?} instead of filled"))),
            }
        }
        self.phase = Phase::Filled;
        self.report.complete_us = self.began.elapsed().as_micros() as u64;
        if self.stake() != Stake::Image {
            self.note_down(Step::Filled);
        }
        crate::fault::point("filled");
        self.keep_pages();
        self.end_tree()
    }

    /// Ends the frozen tree. Of a program that runs on here there is none any more.
    fn end_tree(&mut self) -> Result<(), SendError> {
        let patience = self.plan.stall_timeout;
        match self.dump.take() {
            Some(dump) => Ok(dump.commit(patience)?),
            None => Ok(()),
        }
    }
}

fn timed_parts(timings: Vec<(impl std::fmt::Display, u64)>) -> impl Iterator<Item = TimedPart> {
    timings.into_iter().map(|(what, us)| TimedPart { name: what.to_string(), us })
}

/// How long the source waits between two questions about a commit in doubt.
pub(super) const ASK_AGAIN: Duration = Duration::from_millis(200);
