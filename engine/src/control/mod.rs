//! A handle on a migration that runs: holding it up, the bandwidth, post-copy, how far it is.
//!
//! What is asked for here is answered at once, and done by the migration's own threads at their next step. What cannot be done
//! any more is refused, so an answer of yes is kept: a migration that was paused in time does not freeze the program.

mod client;
mod protocol;
mod receiver;
mod socket;

pub use client::{AskError, ask};
pub use protocol::{Answer, Controlled, ErrorKind, MAX_LINE, PROTOCOL, Request, Told};
pub use receiver::{ReceiverStage, ReceiverStatus};
pub use socket::{ControlSocket, DIRECTORY, SocketError, path_of, receiver_path_of, sweep};

use crate::cancel::Cancel;
use crate::effort::CpuShare;
use crate::link::SharedShaper;
use crate::plan::{SendPlan, SendTo};
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How far a migration is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Stage {
    /// The receiver is being talked to, and the program is made ready to be copied; it runs.
    #[default]
    Preparing,
    /// Memory is sent in rounds; the program runs.
    PreCopy,
    /// The program stands still and is handed over.
    Freezing,
    /// The program runs at the destination, and the last things are put in order.
    Committed,
    /// The program runs at the destination, and pages of it are still here.
    PostCopy,
    /// Over, one way or the other.
    Ended,
}

impl Stage {
    /// The word in reports.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Preparing => "preparing",
            Stage::PreCopy => "pre-copy",
            Stage::Freezing => "freezing",
            Stage::Committed => "committed",
            Stage::PostCopy => "post-copy",
            Stage::Ended => "ended",
        }
    }
}

/// What a migration is doing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Status {
    /// How far it is.
    pub stage: Stage,
    /// Since it began, by the engine's clock, in microseconds.
    pub elapsed_us: u64,
    /// Whether it is held up.
    pub paused: bool,
    /// The round, from 0.
    pub round: u32,
    /// Pages of this round that are done. In post-copy: owed pages that were sent.
    pub done_pages: u64,
    /// Pages of this round altogether. In post-copy: pages that were owed in the beginning.
    pub total_pages: u64,
    /// Bytes of frames with pages that were sent so far, over all rounds.
    pub sent_bytes: u64,
    /// Bytes a second to send at most before the freeze, and of owed pages that nobody waits for.
    pub bandwidth: Option<u64>,
    /// Share of its running time that the program may lose before the freeze; none if nobody cares.
    #[serde(default)]
    pub max_slowdown: Option<f64>,
    /// Bytes of memory that the engine may take for itself; none if nobody cares.
    #[serde(default)]
    pub engine_memory: Option<u64>,
    /// Per cent of one processor that the engine may take before the freeze, and for owed pages that nobody waits for; none if nobody cares.
    #[serde(default)]
    pub cpu: Option<u32>,
    /// Share of the time for which the program is made to stand still because it outruns the link; 0 while it is paused.
    pub throttle_share: f64,
    /// Downtime in microseconds, if the program had been frozen at the last look; none before the first.
    pub predicted_downtime_us: Option<u64>,
    /// Whether the rest comes after the program runs at the destination.
    pub post_copy: bool,
    /// Whether it was asked to stop.
    pub cancelled: bool,
    /// Whether the link is lost, and waited for.
    #[serde(default)]
    pub link_away: bool,
}

/// Why something was not done. Nothing has changed then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// From the freeze on there is nothing to hold up or to change.
    #[error("the program stands still and is being handed over, which takes a moment and is not held up")]
    Freezing,
    /// The program is not here any more.
    #[error("the program runs at the destination already")]
    Moved,
    /// There is no migration any more.
    #[error("the migration is over")]
    Ended,
    /// A file cannot ask for pages.
    #[error("into a file all memory goes before the program is ended: post-copy needs a receiver")]
    OwedToFile,
    /// Without a processor nothing is done.
    #[error("the share of a processor must be more than zero (a pause does nothing at all)")]
    NoProcessor,
    /// A bandwidth of zero never ends.
    #[error("the bandwidth must be more than zero (a pause sends nothing at all)")]
    NoBandwidth,
    /// Whatever is tracked is slowed down a little, and nothing by more than all of its time.
    #[error("the share that the program may lose must be more than zero, and at most the whole")]
    NoSlowdown,
    /// The books over the program, and the connections that there are, take more.
    #[error("the engine needs {} MiB of memory for this program over its connections", needed.div_ceil(1 << 20))]
    Memory {
        /// Bytes that it needs.
        needed: u64,
    },
    /// The index over the pages, and the connections that there are, take more.
    #[error("the receiver needs {} MiB of memory for itself", needed.div_ceil(1 << 20))]
    OwnMemory {
        /// Bytes that it needs.
        needed: u64,
    },
    /// Memory was made ready for pages, or a program was let in.
    #[error("{} MiB for pages and their index are taken, or were promised to a program that is being received", needed.div_ceil(1 << 20))]
    Pages {
        /// Bytes that are taken or promised.
        needed: u64,
    },
    /// It has no say in that.
    #[error("a receiver has no say in that: ask the migration, where the program began")]
    AtSource,
    /// Nor has a migration in this.
    #[error("received pages are limited where they are received: ask the receiver")]
    AtReceiver,
}

/// A handle that is shared between the one who runs a migration ([`crate::send_controlled`]) and those who watch over it. Each is
/// for one migration at a time; what is asked for before that begins holds from its start.
#[derive(Clone, Debug)]
pub struct Control {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    cancel: Cancel,
    limit: SharedShaper,
    cpu: CpuShare,
    /// Changed by every worker after every batch.
    done_pages: AtomicU64,
    /// Read by every worker before every batch; written with the state locked.
    holds: AtomicBool,
    /// The bits of the share that the program may lose; of no number, if nobody cares. Read and written as `holds`.
    max_slowdown: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    stage: Stage,
    began: Option<Instant>,
    paused: bool,
    /// It was asked for.
    post_copy: bool,
    /// What is left comes late, whoever wanted it.
    owes: bool,
    into_file: bool,
    link_away: bool,
    round: u32,
    total_pages: u64,
    throttle_share: f64,
    predicted_downtime: Option<Duration>,
    /// The limit is not the plan's any more.
    own_bandwidth: bool,
    /// Nor is what the program may lose.
    own_slowdown: bool,
    /// Nor what the engine may take.
    own_memory: bool,
    own_cpu: bool,
    /// Bytes of memory that the engine may take for itself, and as many as it needs.
    memory: Option<u64>,
    needed: u64,
    /// Grows when the limit changes, or the share of a processor.
    paces: u32,
    /// Bytes that an earlier migration sent.
    carried_before: u64,
}

impl Control {
    /// A handle for a migration that `cancel` stops.
    pub fn new(cancel: Cancel) -> Self {
        let inner = Inner {
            cancel,
            limit: SharedShaper::new(None),
            cpu: CpuShare::new(None),
            done_pages: AtomicU64::new(0),
            holds: AtomicBool::new(false),
            max_slowdown: AtomicU64::new(f64::NAN.to_bits()),
            state: Mutex::default(),
            changed: Condvar::new(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Holds the migration up: after the batches under way nothing is read from the program and nothing sent, and a program that
    /// was slowed down runs at its full pace. What it writes meanwhile is found when the migration goes on. The receiver hears
    /// that this side is still there.
    ///
    /// # Errors
    /// [`Refused`] from the freeze on.
    pub fn pause(&self) -> Result<(), Refused> {
        let mut state = self.state();
        state.stage.before_freeze()?;
        state.paused = true;
        self.hold(&state);
        Ok(())
    }

    /// Lets it go on. One that is not paused goes on as it was.
    ///
    /// # Errors
    /// [`Refused::Ended`].
    pub fn resume(&self) -> Result<(), Refused> {
        let mut state = self.state();
        if state.stage == Stage::Ended {
            return Err(Refused::Ended);
        }
        state.paused = false;
        self.hold(&state);
        Ok(())
    }

    /// Limits what it sends to so many bytes a second from now on, as [`SendPlan::bandwidth`] does from the start; `None` is as
    /// fast as the link goes.
    ///
    /// # Errors
    /// [`Refused`] for zero, and from the freeze on, but for the pages that are owed after it.
    pub fn set_bandwidth(&self, bytes_per_second: Option<u64>) -> Result<(), Refused> {
        if bytes_per_second == Some(0) {
            return Err(Refused::NoBandwidth);
        }
        let mut state = self.state();
        if state.stage != Stage::PostCopy {
            state.stage.before_freeze()?;
        }
        state.own_bandwidth = true;
        state.paces += 1;
        self.inner.limit.set_rate(bytes_per_second);
        Ok(())
    }

    /// Lets the engine take so much of one processor from now on, in per cent, as [`SendPlan::cpu`] does from the start; `None` is as much
    /// as it takes.
    ///
    /// # Errors
    /// [`Refused`] for zero, and from the freeze on, but for the pages that are owed after it.
    pub fn set_cpu(&self, percent: Option<u32>) -> Result<(), Refused> {
        if percent == Some(0) {
            return Err(Refused::NoProcessor);
        }
        let mut state = self.state();
        if state.stage != Stage::PostCopy {
            state.stage.before_freeze()?;
        }
        state.own_cpu = true;
        state.paces += 1;
        self.inner.cpu.set(percent);
        Ok(())
    }

    /// Lets the program lose so much of its running time from now on, as [`SendPlan::max_slowdown`] does from the start; `None` is as much
    /// as it takes.
    ///
    /// # Errors
    /// [`Refused`] for a share that is none, and from the freeze on.
    pub fn set_max_slowdown(&self, share: Option<f64>) -> Result<(), Refused> {
        if share.is_some_and(|share| !(share > 0.0 && share <= 1.0)) {
            return Err(Refused::NoSlowdown);
        }
        let mut state = self.state();
        state.stage.before_freeze()?;
        state.own_slowdown = true;
        self.inner.max_slowdown.store(share.unwrap_or(f64::NAN).to_bits(), Ordering::Relaxed);
        Ok(())
    }

    /// Lets the engine take so many bytes of memory for itself from the next look on, as [`SendPlan::engine_memory`] does from the start:
    /// caches are made smaller or larger. The connections stay as they are. `None` is as much as it takes.
    ///
    /// # Errors
    /// [`Refused`] for less than it needs, and from the freeze on.
    pub fn set_engine_memory(&self, bytes: Option<u64>) -> Result<(), Refused> {
        let mut state = self.state();
        state.stage.before_freeze()?;
        let needed = state.needed.max(crate::policy::memory::LEAST_AT_SOURCE);
        if bytes.is_some_and(|bytes| bytes < needed) {
            return Err(Refused::Memory { needed });
        }
        state.own_memory = true;
        state.memory = bytes;
        Ok(())
    }

    /// Ends the rounds: the program is frozen and goes on at the destination, and the rest of its memory follows. The round under way
    /// is not brought to its end. While it is paused that waits.
    ///
    /// # Errors
    /// [`Refused`] into a file, and from the freeze on.
    pub fn post_copy_now(&self) -> Result<(), Refused> {
        let mut state = self.state();
        state.stage.before_freeze()?;
        if state.into_file {
            return Err(Refused::OwedToFile);
        }
        state.post_copy = true;
        self.hold(&state);
        Ok(())
    }

    /// Gives the migration up: the program runs on at the source. The same as [`Cancel::cancel`], but for the answer.
    ///
    /// # Errors
    /// [`Refused`] when the program is given away already.
    pub fn cancel(&self) -> Result<(), Refused> {
        let state = self.state();
        match state.stage {
            Stage::Preparing | Stage::PreCopy | Stage::Freezing => {}
            Stage::Committed | Stage::PostCopy => return Err(Refused::Moved),
            Stage::Ended => return Err(Refused::Ended),
        }
        self.inner.cancel.cancel();
        self.inner.changed.notify_all();
        Ok(())
    }

    /// What it is doing now.
    pub fn status(&self) -> Status {
        let state = self.state();
        Status {
            stage: state.stage,
            elapsed_us: state.began.map_or(0, |began| began.elapsed().as_micros() as u64),
            paused: state.paused,
            round: state.round,
            done_pages: self.inner.done_pages.load(Ordering::Relaxed),
            total_pages: state.total_pages,
            sent_bytes: self.inner.limit.carried() - state.carried_before,
            bandwidth: self.inner.limit.rate(),
            max_slowdown: self.max_slowdown(),
            engine_memory: state.memory,
            cpu: self.inner.cpu.percent(),
            throttle_share: state.throttle_share,
            predicted_downtime_us: state.predicted_downtime.map(|time| time.as_micros() as u64),
            post_copy: state.post_copy || state.owes,
            cancelled: self.inner.cancel.is_cancelled(),
            link_away: state.link_away,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is one step.
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what changed to whoever waits, and to those that only glance.
    fn hold(&self, state: &State) {
        self.inner.holds.store(state.paused || state.post_copy, Ordering::Relaxed);
        self.inner.changed.notify_all();
    }
}

/// The migration's side.
impl Control {
    pub(crate) fn token(&self) -> &Cancel {
        &self.inner.cancel
    }

    /// The limit of what is sent before the freeze, and late.
    pub(crate) fn limit(&self) -> &SharedShaper {
        &self.inner.limit
    }

    /// A migration begins. What was asked for of an earlier one is over.
    pub(crate) fn begin(&self, plan: &SendPlan) {
        let mut state = self.state();
        if state.stage == Stage::Ended {
            *state = State { carried_before: self.inner.limit.carried(), ..State::default() };
        }
        state.began = Some(Instant::now());
        state.into_file = !matches!(plan.to, SendTo::Receiver(_));
        // Asked for before it was known where it goes.
        state.post_copy &= !state.into_file;
        state.owes = plan.strategy.owes();
        if !state.own_bandwidth {
            self.inner.limit.set_rate(plan.bandwidth);
        }
        if !state.own_slowdown {
            let share = plan.max_slowdown.unwrap_or(f64::NAN);
            self.inner.max_slowdown.store(share.to_bits(), Ordering::Relaxed);
        }
        if !state.own_memory {
            state.memory = plan.engine_memory;
        }
        if !state.own_cpu {
            self.inner.cpu.set(plan.cpu);
        }
        self.inner.cpu.lift(false);
        self.inner.done_pages.store(0, Ordering::Relaxed);
        self.hold(&state);
    }

    /// What the engine may take of one processor for what nobody waits for.
    pub(crate) fn cpu(&self) -> &CpuShare {
        &self.inner.cpu
    }

    /// Bytes of memory that the engine may take for itself.
    pub(crate) fn engine_memory(&self) -> Option<u64> {
        self.state().memory
    }

    /// The engine needs so much; says what it may take.
    pub(crate) fn needs_memory(&self, needed: u64) -> Option<u64> {
        let mut state = self.state();
        state.needed = needed;
        state.memory
    }

    /// Share of its running time that the program may lose.
    pub(crate) fn max_slowdown(&self) -> Option<f64> {
        Some(f64::from_bits(self.inner.max_slowdown.load(Ordering::Relaxed))).filter(|share| !share.is_nan())
    }

    pub(crate) fn enter(&self, stage: Stage) {
        self.state().stage = stage;
    }

    /// The stage before which the program can still stay; false if it is to stay.
    pub(crate) fn commit(&self) -> bool {
        let mut state = self.state();
        let goes = !self.inner.cancel.is_cancelled();
        if goes {
            state.stage = Stage::Committed;
        }
        goes
    }

    /// The freeze begins, unless it is to wait, or something else was asked for, which `owes` says whether it is done.
    pub(crate) fn freeze(&self, owes: bool) -> bool {
        let mut state = self.state();
        let goes = !state.paused && (owes || !state.post_copy);
        if goes {
            state.stage = Stage::Freezing;
            state.owes = owes;
        }
        goes
    }

    pub(crate) fn round(&self, round: u32, total_pages: u64) {
        let mut state = self.state();
        (state.round, state.total_pages) = (round, total_pages);
        self.inner.done_pages.store(0, Ordering::Relaxed);
    }

    pub(crate) fn done(&self, pages: u64) {
        self.inner.done_pages.fetch_add(pages, Ordering::Relaxed);
    }

    pub(crate) fn owed(&self, total_pages: u64, left_pages: u64) {
        self.state().total_pages = total_pages;
        self.inner.done_pages.store(total_pages.saturating_sub(left_pages), Ordering::Relaxed);
    }

    pub(crate) fn throttled(&self, share: f64) {
        self.state().throttle_share = share;
    }

    pub(crate) fn predicted(&self, downtime: Duration) {
        self.state().predicted_downtime = Some(downtime);
    }

    pub(crate) fn link_is_away(&self, away: bool) {
        self.state().link_away = away;
    }

    /// Grows when the limit is changed by hand.
    pub(crate) fn paces(&self) -> u32 {
        self.state().paces
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.inner.holds.load(Ordering::Relaxed) && self.state().paused
    }

    /// The rounds are to end, with what is left coming late.
    pub(crate) fn wants_post_copy(&self) -> bool {
        self.inner.holds.load(Ordering::Relaxed) && {
            let state = self.state();
            state.post_copy && !state.paused
        }
    }

    /// Waits while it is paused, so long at most; says whether it still is.
    pub(crate) fn wait(&self, most: Duration) -> bool {
        let state = self.state();
        let paused = |state: &mut State| state.paused && !self.inner.cancel.is_cancelled();
        let waited = self.inner.changed.wait_timeout_while(state, most, paused);
        waited.unwrap_or_else(PoisonError::into_inner).0.paused
    }
}

impl Stage {
    fn before_freeze(self) -> Result<(), Refused> {
        match self {
            Stage::Preparing | Stage::PreCopy => Ok(()),
            Stage::Freezing => Err(Refused::Freezing),
            Stage::Committed | Stage::PostCopy => Err(Refused::Moved),
            Stage::Ended => Err(Refused::Ended),
        }
    }
}

#[cfg(test)]
mod tests;
