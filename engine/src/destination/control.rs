//! A handle on a receiver that runs: what it may take of memory and of the processors, and how far it is.
//!
//! What is taken away from a receiver never costs a migration that was let in: less than was promised to it is refused, and from the freeze
//! on a change holds for the next one.

use super::hub::MOST_STREAMS;
use super::store::{Bounds, Limits, PageStore, StoreError, Taken};
use crate::ReceivePlan;
use crate::control::{ReceiverStage, ReceiverStatus, Refused};
use crate::effort::Effort;
use crate::policy::memory::{self, AtDestination};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Characters of a program's name in an answer.
const MOST_NAME: usize = 255;

/// A handle on a [`super::Receiver`], shared between the one who runs it and those who watch over it ([`super::Receiver::control`]).
#[derive(Clone, Debug)]
pub struct ReceiverControl {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    effort: Effort,
    nice: u8,
    /// Bytes of pages that may wait for others; read under the lock of who keeps these.
    later: Arc<AtomicUsize>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    memory_limit: Option<u64>,
    engine_memory: Option<u64>,
    /// Of the store that there is: the session's, or one whose memory is made ready for the next.
    store: Option<Bounds>,
    session: Option<Session>,
}

#[derive(Debug)]
struct Session {
    program: String,
    began: Instant,
    stage: ReceiverStage,
    /// Connections that its source was told that it may have.
    streams: u16,
}

impl State {
    /// Whether nothing is to be changed for the program under way any more.
    fn is_frozen(&self) -> bool {
        self.session.as_ref().is_some_and(|session| session.stage != ReceiverStage::Receiving)
    }
}

impl ReceiverControl {
    pub(super) fn new(plan: &ReceivePlan, effort: Effort) -> Self {
        let (memory_limit, engine_memory) = (plan.memory_limit, plan.engine_memory);
        let state = State { memory_limit, engine_memory, store: None, session: None };
        let inner = Inner { effort, nice: plan.nice, later: Arc::default(), state: Mutex::new(state) };
        Self { inner: Arc::new(inner) }
    }

    /// Lets the engine take so much of one processor from now on, in per cent, as [`ReceivePlan::cpu`] does from the start; `None` is as
    /// much as it takes. While a program stands still it takes what it needs all the same.
    ///
    /// # Errors
    /// [`Refused`] for zero.
    pub fn set_cpu(&self, percent: Option<u32>) -> Result<(), Refused> {
        if percent == Some(0) {
            return Err(Refused::NoProcessor);
        }
        self.inner.effort.cpu().set(percent);
        Ok(())
    }

    /// Lets received pages and their index take so many bytes from now on, as [`ReceivePlan::memory_limit`] does from the start; `None` is
    /// what the machine has. From a program's freeze on that is for the next one.
    ///
    /// # Errors
    /// [`Refused`] for less than is taken, or was promised to a program that is being received.
    pub fn set_memory_limit(&self, bytes: Option<u64>) -> Result<(), Refused> {
        let mut state = self.lock();
        if !state.is_frozen()
            && let Some(store) = &state.store
        {
            store.change(|taken, now| match bytes {
                Some(bytes) if bytes < taken.pages && now.pages.is_none_or(|now| bytes < now) => {
                    Err(Refused::Pages { needed: taken.pages })
                }
                pages => Ok(Limits { pages, ..now }),
            })?;
        }
        state.memory_limit = bytes;
        Ok(())
    }

    /// Lets the engine take so many bytes of memory for itself from now on, as [`ReceivePlan::engine_memory`] does from the start; `None`
    /// is as much as it takes. The connections that there are stay, and what waits for other pages already. From a program's freeze on
    /// that is for the next one.
    ///
    /// # Errors
    /// [`Refused`] for less than it needs.
    pub fn set_engine_memory(&self, bytes: Option<u64>) -> Result<(), Refused> {
        let least = memory::LEAST_AT_DESTINATION;
        if bytes.is_some_and(|bytes| bytes < least) {
            return Err(Refused::OwnMemory { needed: least });
        }
        let mut state = self.lock();
        if !state.is_frozen() {
            let streams = state.session.as_ref().map(|session| session.streams);
            let mut own = None;
            if let Some(store) = &state.store {
                store.change(|taken, now| {
                    let shared = share_out(bytes, streams, taken)?;
                    own = Some(shared);
                    Ok::<_, Refused>(Limits { index: shared.index, ..now })
                })?;
            }
            // Of a store that is to be made yet nothing is known.
            let own = own.map_or_else(|| share_out(bytes, streams, &Taken::default()), Ok)?;
            self.set_later(&own);
        }
        state.engine_memory = bytes;
        Ok(())
    }

    /// What it is doing now.
    pub fn status(&self) -> ReceiverStatus {
        let state = self.lock();
        let taken = state.store.as_ref().map(Bounds::taken).unwrap_or_default();
        let cpu = self.inner.effort.cpu();
        let session = state.session.as_ref();
        let stage = session.map_or(ReceiverStage::Waiting, |session| match session.stage {
            ReceiverStage::Receiving if cpu.is_lifted() => ReceiverStage::Freezing,
            stage => stage,
        });
        ReceiverStatus {
            stage,
            program: session.map(|session| session.program.clone()),
            elapsed_us: session.map_or(0, |session| session.began.elapsed().as_micros() as u64),
            announced_bytes: taken.announced,
            page_bytes: taken.used,
            index_bytes: taken.index,
            memory_limit: state.memory_limit,
            engine_memory: state.engine_memory,
            cpu: cpu.percent(),
            nice: self.inner.nice,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is one step.
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_later(&self, own: &AtDestination) {
        let later = usize::try_from(own.later).unwrap_or(usize::MAX);
        self.inner.later.store(later, Ordering::Relaxed);
    }
}

/// The receiver's side.
impl ReceiverControl {
    /// Of a receiver that waits, with no limits.
    #[cfg(test)]
    pub(crate) fn for_tests() -> Self {
        Self::new(&ReceivePlan::new(([127, 0, 0, 1], 7077).into()), Effort::default())
    }

    pub(super) fn effort(&self) -> &Effort {
        &self.inner.effort
    }

    /// Bytes of pages that may wait for others.
    pub(super) fn later(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.inner.later)
    }

    pub(super) fn memory_limit(&self) -> Option<u64> {
        self.lock().memory_limit
    }

    /// A session begins. Says what the engine's own memory goes to.
    pub(crate) fn begin(&self, program: &str) -> AtDestination {
        let mut state = self.lock();
        let own = memory::at_destination(state.engine_memory, most_streams());
        // As much as goes into an answer, whatever it says that it is called.
        let (program, began) = (program.chars().take(MOST_NAME).collect(), Instant::now());
        let stage = ReceiverStage::Receiving;
        state.session = Some(Session { program, began, stage, streams: own.streams });
        self.set_later(&own);
        self.inner.effort.lift(false);
        own
    }

    /// A store that holds to what is allowed, now and later.
    pub(super) fn new_store(&self) -> Result<PageStore, StoreError> {
        let mut state = self.lock();
        let streams = state.session.as_ref().map(|session| session.streams);
        // What it may take was looked at when that was said.
        let own = share_out(state.engine_memory, streams, &Taken::default());
        let limits = Limits { pages: state.memory_limit, index: own.map_or(Some(0), |own| own.index) };
        let store = PageStore::sparing(limits, &self.inner.effort)?;
        state.store = Some(store.bounds());
        Ok(store)
    }

    /// How far the session is.
    pub(super) fn enter(&self, stage: ReceiverStage) {
        if let Some(session) = &mut self.lock().session {
            session.stage = stage;
        }
        if stage == ReceiverStage::Filling {
            // Nobody is nice any more, but what nobody waits for is paid for.
            self.inner.effort.cpu().lift(false);
        }
    }

    /// The session is over.
    pub(super) fn end(&self) {
        let mut state = self.lock();
        (state.session, state.store) = (None, None);
        self.inner.effort.lift(false);
    }
}

/// What the engine's own memory goes to beside an index that is there: over so many connections, or those that are to come.
fn share_out(limit: Option<u64>, streams: Option<u16>, taken: &Taken) -> Result<AtDestination, Refused> {
    match streams {
        Some(streams) => memory::in_use(limit, streams, taken.index)
            .map_err(|little| Refused::OwnMemory { needed: little.needed }),
        None => Some(memory::at_destination(limit, most_streams()))
            .filter(|own| own.index.is_none_or(|index| index >= taken.index))
            .ok_or(Refused::OwnMemory { needed: memory::enough_at_destination(taken.index) }),
    }
}

/// Connections that a session may have: more than two for each processor only wait for each other.
fn most_streams() -> u16 {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    (2 * processors).clamp(1, usize::from(MOST_STREAMS)) as u16
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
