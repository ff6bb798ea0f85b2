//! Rounds: the program runs, and what it writes is sent again until little enough is left.

use super::failure::SendError;
use super::tally::Tally;
use super::{Migration, Phase, Space};
use crate::control::Stage;
use crate::observe::Event;
use crate::plan::{NoConvergence, Strategy};
use crate::policy::memory::DELTA_CACHE_SHARE;
use crate::policy::throttle::next_share;
use crate::policy::{self, Closing, Decision, HotPages, Measured, Navigator, RoundSample, StopReason};
use crate::report::RoundReport;
use pageferry_tracker::{
    Collected, PageReader, PageSet, ReadError, SpaceScan, Throttle, TreeState, WriteCheck,
};
use pageferry_wire_format::{ControlMessage, RegionInfo, SpaceInfo};
use std::collections::btree_map::Entry;
use std::time::{Duration, Instant};

/// What is to be sent of one space.
pub(super) struct Todo {
    pub(super) key: u32,
    pub(super) pages: PageSet,
}

/// What the rounds so far say about the next.
pub(super) struct Course {
    navigator: Navigator,
    /// It was decided to freeze: these are the last rounds.
    pub(super) closing: Option<Closing>,
    measured: Option<Measured>,
    /// Pages that the last round left for this one.
    left_pages: u64,
    /// Everything before was a sample: most pages are still to be sent for the first time.
    first_pass: bool,
    /// When the last acknowledged look was taken.
    last_collect: Option<Instant>,
    /// As of [`Migration::changes`].
    changes: (Duration, u32, u32),
}

impl Migration<'_> {
    /// No rounds: only looks at what there is, and whether it fits.
    pub(super) fn look_once(&mut self) -> Result<Decision, SendError> {
        self.phase = Phase::PreCopy(0);
        self.control.enter(Stage::PreCopy);
        loop {
            match self.look_when_asked() {
                Ok(Some(decision)) => return Ok(decision),
                Ok(None) => {}
                Err(error) => self.go_on_after(error)?,
            }
        }
    }

    /// `None`: it was held up meanwhile.
    fn look_when_asked(&mut self) -> Result<Option<Decision>, SendError> {
        self.stand_by()?;
        self.note_post_copy()?;
        let decision = self.look()?;
        Ok(self.control.freeze(self.owes).then_some(decision))
    }

    fn look(&mut self) -> Result<Decision, SendError> {
        let collected = self.tracker_mut().collect(TreeState::Running)?;
        if collected.spaces.is_empty() {
            return Err(SendError::Exited);
        }
        self.take_in(&collected, 0, false)?;
        let resident_pages: u64 = collected.spaces.iter().map(|space| space.populated.len()).sum();
        self.check_room(resident_pages)?;
        self.share_out(&collected, 0)?;
        if self.plan.strategy == Strategy::StopAndCopy && !self.owes && self.peer.is_receiver() {
            // A round of nothing: the destination acknowledges it when it has memory ready for what comes in the freeze.
            self.end_round(0, &Tally::default())?;
            self.acknowledged(0)?;
        }
        let predicted_downtime = self.plan.freeze_cost.of(collected.spaces.len() as u32, resident_pages);
        let stop = if self.owes { StopReason::PostCopy } else { StopReason::StopAndCopy };
        Ok(Decision { stop: Some(stop), predicted_downtime })
    }

    /// Sends rounds until the policy says stop. The pages that were collected last are not sent: the tracker
    /// gives them again in the freeze.
    pub(super) fn pre_copy(&mut self) -> Result<Decision, SendError> {
        let mut navigator = self.navigator();
        self.holds_back = navigator.policy().holds_back();
        let changes = self.changes();
        let mut course = Course {
            navigator,
            closing: None,
            measured: None,
            left_pages: 0,
            first_pass: true,
            last_collect: None,
            changes,
        };
        self.control.enter(Stage::PreCopy);
        let mut round = 0;
        loop {
            match self.round(round, &mut course) {
                Ok(Some(decision)) => {
                    self.rounds = Some(course);
                    return Ok(decision);
                }
                Ok(None) => round += 1,
                // What is known to have arrived of this round is not sent again when it begins anew.
                Err(error) => self.go_on_after(error)?,
            }
        }
    }

    /// What the pace of the rounds depends on besides the program.
    fn changes(&self) -> (Duration, u32, u32) {
        (self.paused, self.control.paces(), self.report.interruptions)
    }

    /// One round, or the decision that it is not worth one.
    pub(super) fn round(&mut self, round: u32, course: &mut Course) -> Result<Option<Decision>, SendError> {
        if course.closing.is_none() {
            self.phase = Phase::PreCopy(round);
            crate::fault::point("precopy");
        }
        self.stand_by()?;
        let ends = course.closing.is_none() && self.note_post_copy()?;
        let now = self.changes();
        if std::mem::replace(&mut course.changes, now) != now {
            course.navigator.policy().begin_anew();
            self.tell_workers_of_the_limits();
        }
        self.space_scans(course.last_collect);
        let start = Instant::now();
        let collected = self.collect_running()?;
        let since_last = course.last_collect.map_or(Duration::ZERO, |last| start - last);
        let scan = start.elapsed();
        if collected.spaces.is_empty() {
            return Err(SendError::Exited);
        }
        self.note_slowdown(&collected, round);
        let mut todo = self.take_in(&collected, round, false)?;
        let held_pages: u64 = self.spaces.values().map(|space| space.hot.held().len()).sum();
        let dirty_pages: u64 = collected.spaces.iter().map(|space| space.dirty.len()).sum();
        let todo_pages = todo.iter().map(|todo| todo.pages.len()).sum::<u64>() + held_pages;
        let resident_pages: u64 = collected.spaces.iter().map(|space| space.populated.len()).sum();
        self.check_room(resident_pages)?;
        let share = resident_pages * 4096 / DELTA_CACHE_SHARE;
        let cache = self.plan.delta_cache.unwrap_or(share);
        self.make_room(&collected, cache)?;
        let sample = RoundSample {
            round,
            todo_pages,
            hot_pages: held_pages,
            dirty_pages,
            since_last,
            processes: collected.spaces.len() as u32,
            resident_pages,
            measured: course.measured,
        };
        let chosen = match &mut course.closing {
            Some(closing) => closing.decide(&sample).into(),
            None => course.navigator.decide(&sample, self.began.elapsed()),
        };
        let mut decision = chosen.decision;
        self.control.predicted(decision.predicted_downtime);
        if course.closing.is_some() && (decision.stop.is_some() || round >= self.plan.max_rounds) {
            self.put_back(&todo);
            return Ok(Some(decision));
        }
        if ends {
            decision.stop = Some(StopReason::PostCopy);
        }
        if self.plan.strategy == Strategy::Hybrid
            && course.closing.is_none()
            && decision.stop.is_none()
            && self.plan.post_copy_after.is_some_and(|rounds| round >= rounds)
        {
            decision.stop = Some(StopReason::PostCopy);
        }
        if decision.stop == Some(StopReason::NoProgress) && decision.predicted_downtime > self.plan.downtime {
            match self.plan.on_no_convergence {
                None | Some(NoConvergence::Freeze) => {}
                Some(NoConvergence::PostCopy) => self.owes = true,
                Some(NoConvergence::Throttle) => {
                    if self.slow_down()? {
                        course.navigator.policy().program_slowed_down();
                        self.spaces.values_mut().for_each(|space| space.hot.begin_anew());
                        decision.stop = None;
                    }
                }
                Some(NoConvergence::GiveUp) if self.owes => {}
                Some(NoConvergence::GiveUp) => {
                    return Err(SendError::NoConvergence {
                        predicted: decision.predicted_downtime,
                        wanted: self.plan.downtime,
                    });
                }
            }
        }
        if decision.stop.is_some() {
            self.note_choice(chosen.choice, ends)?;
        }
        // Who holds it up in this moment has it send another round when it goes on.
        if decision.stop.is_some() && self.control.freeze(self.owes) {
            self.put_back(&todo);
            self.tell_choice();
            return Ok(Some(decision));
        }
        let left_pages = chosen.most.map_or(0, |most| self.leave(&mut todo, most));
        let sendable: u64 = todo.iter().map(|todo| todo.pages.len()).sum();
        // Of pages that the destination has none is left, whatever their marks say: those that it never had are due until
        // they are given.
        let none_given = round == 0 && self.report.interruptions == 0;
        let leaves = none_given && self.holds_back && course.closing.is_none();
        self.leave = course.first_pass.then_some(if leaves { sendable } else { 0 });
        self.observer.event(&Event::RoundStarted { round, dirty_pages: sendable });
        let sending = Instant::now();
        let before = (self.sent_bytes(), self.paused);
        let (tally, sent) = match self.carry(&todo, round) {
            Ok(carried) => carried,
            Err(error) => {
                self.put_back(&todo);
                return Err(error);
            }
        };
        // One that is lost begins anew.
        course.first_pass &= left_pages > 0;
        let paused = self.paused - before.1;
        let sent = sent - paused;
        self.deltas_help = tally.codings.delta.pages * 2 > tally.sent();
        let acked = sending.elapsed() - paused;
        self.tracker_mut().acknowledge(collected.ticket);
        // Of a round that is lost the pages come again: they were written since the one before.
        course.last_collect = Some(start);

        let sendable = sendable - tally.left;
        if policy::says_the_pace(sendable) || course.measured.is_none() {
            course.measured = Some(Measured {
                pages_per_second: sendable.max(1) as f64 / acked.as_secs_f64().max(1e-6),
                bytes_per_second: tally.bytes() as f64 / acked.as_secs_f64().max(1e-6),
                round_overhead: scan + acked.saturating_sub(sent),
            });
        }
        // What was left of a sample is to be sent, and was not written.
        let written = if course.left_pages > 0 { dirty_pages } else { todo_pages };
        course.left_pages = left_pages + tally.left;
        let report = RoundReport {
            round,
            frozen: false,
            dirty_pages: todo_pages - left_pages - tally.left,
            left_pages,
            ahead_pages: tally.left,
            sent_pages: tally.sent(),
            unchanged_pages: tally.codings.unchanged.pages,
            zero_pages: tally.codings.zero.pages,
            gone_pages: tally.gone,
            held_pages,
            slowdown: None,
            held_up: tally.toil.held_up(),
            codings: tally.codings,
            sent_bytes: self.sent_bytes() - before.0,
            duration_us: start.elapsed().as_micros() as u64,
            pause_us: collected.pause.as_micros() as u64,
            dirty_rate: rate(written, since_last),
            link_rate: rate(tally.bytes(), acked),
            predicted_downtime_us: decision.predicted_downtime.as_micros() as u64,
        };
        self.observer.event(&Event::RoundEnded(report.clone()));
        self.report.rounds.push(report);
        self.note_throttle();
        Ok(None)
    }

    /// Sends what is due and waits until the destination has it; says how long the sending took.
    fn carry(&mut self, todo: &[Todo], round: u32) -> Result<(Tally, Duration), SendError> {
        let sending = Instant::now();
        let tally = self.send_todo(todo, round, false)?;
        let sent = sending.elapsed();
        self.end_round(round, &tally)?;
        self.acknowledged(round)?;
        Ok((tally, sent))
    }

    /// These were given out to be sent, and it is not known that they have arrived. What was dirty of it is collected again, as it was not
    /// acknowledged; what was held back and has cooled the tracker does not know of.
    fn put_back(&mut self, todo: &[Todo]) {
        for Todo { key, pages } in todo {
            if let Some(space) = self.spaces.get_mut(key) {
                space.hot.put_back(pages);
            }
        }
    }

    /// Whether the rest is to come late because that was asked for: makes ready for it then.
    fn note_post_copy(&mut self) -> Result<bool, SendError> {
        if !self.control.wants_post_copy() {
            return Ok(false);
        }
        self.get_ready_to_owe()?;
        Ok(true)
    }

    /// Leaves all but the first `most` pages for the next round; says how many.
    fn leave(&mut self, todo: &mut [Todo], most: u64) -> u64 {
        let (mut room, mut left) = (most, 0);
        for Todo { key, pages } in todo {
            let (now, later) = pages.split(room);
            room -= now.len();
            left += later.len();
            *pages = now;
            if let Some(space) = self.spaces.get_mut(key) {
                space.hot.put_back(&later);
            }
        }
        left
    }

    /// Collects while the program runs: one that is slowed down is not stopped meanwhile, because a new process is stopped
    /// for a moment to be tracked.
    fn collect_running(&mut self) -> Result<Collected, SendError> {
        let _undisturbed = self.throttle.as_ref().map(Throttle::undisturbed);
        let tracker = self.tracker.as_mut().expect("attached before anything is collected");
        Ok(tracker.collect(TreeState::Running)?)
    }

    /// Slows the program down by one more step; false when that is not allowed, or does not work.
    fn slow_down(&mut self) -> Result<bool, SendError> {
        let root = self.root.clone();
        let throttle = match &mut self.throttle {
            Some(throttle) => throttle,
            None => {
                // A thread that lets the program go must not wait for the processor.
                let throttle = match &self.niceness {
                    Some(niceness) => niceness.lifted(|| Throttle::new(root)),
                    None => Throttle::new(root),
                };
                self.throttle.insert(throttle.map_err(SendError::Throttle)?)
            }
        };
        if let Some(error) = throttle.failure() {
            self.observer
                .event(&Event::Warning { text: format!("the program cannot be slowed down: {error}") });
            return Ok(false);
        }
        let Some(share) = next_share(throttle.share(), self.plan.max_throttle) else { return Ok(false) };
        throttle.set(share);
        self.report.throttle_share = share;
        self.control.throttled(share);
        self.observer.event(&Event::Throttled { share });
        Ok(true)
    }

    /// How long the throttle has made the program stand still so far.
    pub(super) fn note_throttle(&mut self) {
        if let Some(throttle) = &self.throttle {
            self.report.throttled_us = throttle.stood().as_micros() as u64;
        }
    }

    /// Brings the spaces in line with what was collected: tells the destination of new ones and of what went
    /// away, and works out which pages have to be sent: dirty ones, and those it was never given.
    pub(super) fn take_in(
        &mut self,
        collected: &Collected,
        round: u32,
        frozen: bool,
    ) -> Result<Vec<Todo>, SendError> {
        // The books first, as a whole: if the link is lost on the way, what is here is what holds.
        let mut said = Vec::new();
        for key in &collected.exited {
            // Only of those that it heard of: one may have ended before it was announced.
            if let (Some(place), Some(_)) = (self.layout.remove(*key), self.spaces.remove(&key.0)) {
                self.books().forget(place.id);
                said.push(ControlMessage::SpaceGone { space: place.id });
            }
        }
        let mut fresh = Vec::new();
        let mut todo = Vec::new();
        for scan in &collected.spaces {
            match self.adopt(scan) {
                Ok(info) => fresh.extend(info),
                // It has ended since the scan, or is about to, which is no failure of a tree that runs.
                Err(SendError::Reader { source: ReadError::Gone(_), .. }) if !frozen => continue,
                Err(_) if !frozen && !scan.target.is_alive() => continue,
                Err(error) => return Err(error),
            }
            todo.push(Todo { key: scan.key.0, pages: self.due(scan, frozen) });
        }
        if !fresh.is_empty() {
            said.push(ControlMessage::Spaces { round, spaces: fresh });
        }
        for scan in &collected.spaces {
            let Some(space) = self.spaces.get(&scan.key.0) else { continue };
            let id = space.place.id;
            let gone = self.books().space(id).retain(&scan.populated);
            let runs = super::sent::wire_runs(&gone);
            said.extend(
                runs.chunks(super::RUNS_A_MESSAGE)
                    .map(|runs| ControlMessage::Discard { space: id, runs: runs.to_vec() }),
            );
        }
        for message in &said {
            if let Err(error) = self.control(message) {
                self.put_back(&todo);
                return Err(error);
            }
        }
        Ok(todo)
    }

    /// Makes a place for what is kept of a space; returns what the destination is to be told if it is new.
    fn adopt(&mut self, scan: &SpaceScan) -> Result<Option<SpaceInfo>, SendError> {
        let pid = scan.target.pid();
        let (place, _) =
            self.layout.place(scan.key, &scan.target).map_err(|source| SendError::Look { pid, source })?;
        // The destination makes memory ready for these. What comes late passes through little of it.
        let pages = if self.plan.strategy == Strategy::PostCopy { 0 } else { scan.populated.len() };
        let kind = self.tracker_mut().kind();
        let vacant = match self.spaces.entry(scan.key.0) {
            Entry::Occupied(mut space) => {
                space.get_mut().pages = pages;
                return Ok(None);
            }
            Entry::Vacant(vacant) => vacant,
        };
        let reader = PageReader::new(&scan.target).map_err(|source| SendError::Reader { pid, source })?;
        // Only guesses are made of it: who ends now is found to have ended where that matters.
        let check = WriteCheck::new(&scan.target, kind).ok().flatten();
        let info = SpaceInfo { space: place.id, vpid: place.vpid, name: scan.target.name(), pages };
        vacant.insert(Space { place, reader, check, hot: HotPages::default(), pages });
        Ok(Some(info))
    }

    /// A page is due when it is there and was written, or is there and was never given: what the kernel says
    /// about writes is not believed for pages that the destination does not have. What is written all the time is held
    /// back until the freeze.
    fn due(&mut self, scan: &SpaceScan, frozen: bool) -> PageSet {
        let id = self.space(scan.key.0).place.id;
        let missing = self.books().space(id).missing(&scan.populated);
        let dirty = scan.dirty.intersect(&scan.populated);
        let due = dirty.union(&missing);
        // Deltas of it that are small are better sent: they would only grow.
        let hold = self.holds_back && !self.deltas_help;
        let Some(space) = self.spaces.get_mut(&scan.key.0) else { return due };
        match frozen {
            false => space.hot.look(&due, &dirty, &scan.populated, hold),
            true => due.union(&space.hot.release().intersect(&scan.populated)),
        }
    }
}

fn rate(count: u64, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { count as f64 / time.as_secs_f64() }
}

/// The tracker's regions in the words of the wire.
pub(super) fn wire_regions(scan: &SpaceScan) -> Vec<RegionInfo> {
    scan.regions
        .iter()
        .map(|region| RegionInfo {
            start: region.start,
            end: region.end,
            comparable: crate::verify::is_comparable(region),
        })
        .collect()
}
