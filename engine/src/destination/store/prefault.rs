//! Memory made ready ahead of use. Fresh memory costs more than the copying into it, so a thread populates it
//! while the source is still scanning, or at least a little ahead of what arrives.

use super::budget::Budget;
use super::error::{Bound, StoreError};
use super::index::{TABLE_BYTES, TABLE_PAGES};
use super::limits::{Limits, Taken};
use crate::destination::sys::arena::{BLOCK_BYTES, Populator, REGION_BYTES, Region, SLOT_BYTES};
use crate::effort::{CpuMeter, Effort, processor_time};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How far ahead of use memory is made ready when nothing was announced.
const AHEAD: u64 = 16 << 20;
/// Bytes populated in one call: others that map memory wait for it to end.
const STEP: u64 = BLOCK_BYTES as u64;
const _: () = assert!((REGION_BYTES as u64).is_multiple_of(STEP));
/// Bytes allowed at a time: what is asked of `/proc/meminfo` once in a while, and not for each batch.
const GRANT: u64 = 32 << 20;

/// What a page of memory that is made ready takes of a processor on this machine now: the median of sixteen steps, in memory that is given
/// back. `None` if there is none to be had.
pub(crate) fn populating() -> Option<Duration> {
    const STEPS: usize = 16;
    const _: () = assert!(STEPS * STEP as usize <= REGION_BYTES);
    let populator = Region::map().ok()?.populator();
    let mut steps = Vec::with_capacity(STEPS);
    for step in 0..STEPS {
        let before = processor_time();
        populator.populate(step * STEP as usize, STEP as usize).ok()?;
        steps.push(processor_time() - before);
    }
    steps.sort_unstable();
    Some(steps[STEPS / 2] / (STEP / SLOT_BYTES as u64) as u32)
}

/// All positions are bytes from the start of the arena.
#[derive(Debug, Default)]
struct State {
    /// Regions that are mapped, and that the arena has not taken yet.
    ready: VecDeque<Region>,
    /// Populates the regions from `populated` on, oldest first.
    populators: VecDeque<Populator>,
    mapped: u64,
    /// Everything before was made ready, or has been used.
    populated: u64,
    /// Everything before has been handed out.
    used: u64,
    /// Everything before may be touched: there was memory for it when it was asked for.
    granted: u64,
    /// Bytes that were announced.
    reserved: u64,
    /// Bytes that the index takes: they count too.
    index: u64,
    /// Bytes that others keep of lists of pages.
    lists: u64,
    /// How long making memory ready has taken.
    spent: Duration,
    /// There is no more to be made ready now, or none to be had.
    rests: bool,
    stop: bool,
    limits: Limits,
}

/// What the store and the thread that makes its memory ready have in common.
#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    budget: Budget,
    effort: Effort,
}

/// The memory that slots are cut from, in the order of their numbers.
#[derive(Debug)]
pub(super) struct Prefault {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Prefault {
    pub(super) fn new(limits: Limits, effort: Effort) -> Result<Self, StoreError> {
        let state = Mutex::new(State { limits, ..State::default() });
        let shared = Arc::new(Shared { state, wake: Condvar::new(), budget: Budget::new(), effort });
        let worker = Arc::clone(&shared);
        let thread =
            std::thread::Builder::new().name("prefault".into()).spawn(move || worker.run()).map_err(
                |cause| StoreError::Memory { doing: "starting the thread that prepares memory", cause },
            )?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// `bytes` will be used altogether.
    pub(super) fn reserve(&self, bytes: u64) -> Result<(), StoreError> {
        let mut state = self.shared.lock();
        let wanted = bytes.saturating_sub(state.granted);
        state.check_own(index_of(bytes), state.lists)?;
        self.shared.check(&state, wanted)?;
        state.reserved = state.reserved.max(bytes);
        state.rests = false;
        self.shared.wake.notify_one();
        Ok(())
    }

    /// Everything before `used` is about to be handed out, and the index takes `index` bytes.
    pub(super) fn advance(&self, used: u64, index: u64) -> Result<(), StoreError> {
        let mut state = self.shared.lock();
        state.check_own(index, state.lists)?;
        state.index = index;
        if used > state.granted {
            // A whole step when it can be had, so that this is rare; what is needed when it is tight.
            let wanted = (used - state.granted).max(GRANT);
            let granted = match self.shared.check(&state, wanted) {
                Ok(()) => wanted,
                Err(_) => {
                    let least = used - state.granted;
                    self.shared.check(&state, least).map(|()| least)?
                }
            };
            state.granted += granted;
        } else {
            state.check_limit(used.saturating_add(index), 0)?;
        }
        state.used = state.used.max(used);
        self.shared.wake.notify_one();
        Ok(())
    }

    /// Bytes that were announced.
    pub(super) fn announced(&self) -> u64 {
        self.shared.lock().reserved
    }

    /// Whether the machine has so much for something else than pages.
    ///
    /// # Errors
    /// [`StoreError::OutOfMemory`].
    pub(super) fn check_beside(&self, bytes: u64) -> Result<(), StoreError> {
        self.shared.check_machine(&self.shared.lock(), bytes)
    }

    /// Others keep lists of pages that take so many bytes.
    ///
    /// # Errors
    /// [`StoreError::OutOfMemory`], if they have no room beside the index.
    pub(super) fn keep_lists(&self, bytes: u64) -> Result<(), StoreError> {
        let mut state = self.shared.lock();
        state.check_own(state.index, bytes)?;
        state.lists = bytes;
        Ok(())
    }

    /// Bytes that are ready, and not handed out.
    pub(super) fn ready(&self) -> u64 {
        let state = self.shared.lock();
        state.populated.saturating_sub(state.used)
    }

    /// What its limits can be changed by.
    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Whether everything is ready that was announced, or as much as there is.
    pub(super) fn is_done(&self) -> bool {
        let state = self.shared.lock();
        state.rests || state.stop
    }

    /// How long that has taken so far.
    pub(super) fn spent(&self) -> Duration {
        self.shared.lock().spent
    }

    /// The next region, in order.
    pub(super) fn region(&self) -> Result<Region, StoreError> {
        let mut state = self.shared.lock();
        if state.ready.is_empty() {
            state.map()?;
        }
        state.ready.pop_front().ok_or_else(|| StoreError::Memory {
            doing: "mapping memory for received pages",
            cause: std::io::ErrorKind::OutOfMemory.into(),
        })
    }

    /// Nothing more will be used. The thread gives regions that were not taken back to the system, beside whatever follows: a step that it is in
    /// the middle of may take milliseconds, and a program may stand still.
    pub(super) fn stop(&self) {
        self.shared.lock().stop = true;
        self.shared.wake.notify_one();
    }
}

impl Drop for Prefault {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            // It has nothing to say: when it panicked, memory is merely not made ready.
            let _ = thread.join();
        }
    }
}

impl State {
    fn map(&mut self) -> Result<(), StoreError> {
        let region = Region::map()
            .map_err(|cause| StoreError::Memory { doing: "mapping memory for received pages", cause })?;
        self.populators.push_back(region.populator());
        self.ready.push_back(region);
        self.mapped += REGION_BYTES as u64;
        Ok(())
    }

    /// Whether `taken` bytes and `more` are within the limit.
    fn check_limit(&self, taken: u64, more: u64) -> Result<(), StoreError> {
        let Some(limit) = self.limits.pages else { return Ok(()) };
        let left = limit.saturating_sub(taken);
        if taken > limit || more > left {
            return Err(StoreError::OutOfMemory { wanted: more, left, of: Bound::Limit });
        }
        Ok(())
    }

    /// Whether the index and lists are within what the engine may take for itself.
    fn check_own(&self, index: u64, lists: u64) -> Result<(), StoreError> {
        let wanted = index.saturating_add(lists);
        match self.limits.index {
            Some(left) if wanted > left => Err(StoreError::OutOfMemory { wanted, left, of: Bound::Engine }),
            _ => Ok(()),
        }
    }

    /// What is taken, or was promised to what has been announced.
    fn taken(&self) -> Taken {
        let index = self.index.max(index_of(self.reserved));
        Taken {
            used: self.used,
            announced: self.reserved,
            pages: self.granted.max(self.reserved).saturating_add(index),
            index: index.saturating_add(self.lists),
        }
    }
}

/// What the index over so many bytes of pages takes at least.
fn index_of(bytes: u64) -> u64 {
    bytes.div_ceil(TABLE_PAGES * SLOT_BYTES as u64) * TABLE_BYTES
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change of the state is a plain assignment: there is nothing half done to find after a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is taken now.
    pub(super) fn taken(&self) -> Taken {
        self.lock().taken()
    }

    /// Holds to other limits from now on, which `choose` makes of what is taken and held to; nothing is taken meanwhile.
    pub(super) fn change<E>(
        &self,
        choose: impl FnOnce(&Taken, Limits) -> Result<Limits, E>,
    ) -> Result<(), E> {
        let mut state = self.lock();
        state.limits = choose(&state.taken(), state.limits)?;
        // There may be room for more to be made ready.
        state.rests = false;
        self.wake.notify_one();
        Ok(())
    }

    /// Whether `more` bytes behind what is granted may be touched.
    fn check(&self, state: &State, more: u64) -> Result<(), StoreError> {
        state.check_limit(state.granted.saturating_add(state.index), more)?;
        self.check_machine(state, more)
    }

    /// The same without the limit of pages.
    fn check_machine(&self, state: &State, more: u64) -> Result<(), StoreError> {
        let (left, of) = self
            .budget
            .left()
            .map_err(|cause| StoreError::Memory { doing: "asking how much memory is available", cause })?;
        // What is granted and not touched yet still counts as available there.
        let untouched = state.granted.saturating_sub(state.populated.max(state.used));
        let left = left.saturating_sub(untouched);
        if more > left { Err(StoreError::OutOfMemory { wanted: more, left, of }) } else { Ok(()) }
    }

    fn run(&self) {
        let _entered = self.effort.enter();
        let mut meter = CpuMeter::new(self.effort.cpu());
        let mut state = self.lock();
        while !state.stop {
            // What has been used was populated by its use.
            let used = state.used / STEP * STEP;
            state.skip_to(used);
            let goal = self.goal(&state);
            if !self.step(&mut state, goal) {
                state.rests = true;
                state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let at = state.populated;
            let offset = (at % REGION_BYTES as u64) as usize;
            let Some(populator) = state.populators.front().cloned() else { continue };
            drop(state);
            let began = Instant::now();
            let done = populator.populate(offset, STEP as usize);
            let spent = began.elapsed();
            meter.pay(|| self.lock().stop);
            state = self.lock();
            state.spent += spent;
            let next = if done.is_ok() { at + STEP } else { state.mapped };
            state.skip_to(next);
        }
        let unused = (std::mem::take(&mut state.ready), std::mem::take(&mut state.populators));
        drop(state);
        // With nobody waiting for the lock.
        drop(unused);
    }

    /// How far memory is to be made ready now. While a program stands still that is for what arrives next, and less than is ready already
    /// where little arrives: the work would hold up all that the program waits for. When it runs, whoever takes memory wakes this thread.
    fn goal(&self, state: &State) -> u64 {
        match self.effort.cpu().is_lifted() {
            true => state.used + AHEAD / 2,
            false => state.reserved.max(state.used + AHEAD),
        }
    }

    /// Whether one more step is wanted and allowed; maps and grants what it needs.
    fn step(&self, state: &mut State, goal: u64) -> bool {
        if state.populated >= goal {
            return false;
        }
        if state.populated >= state.mapped && state.map().is_err() {
            return false;
        }
        let end = state.populated + STEP;
        if end > state.granted {
            let least = end - state.granted;
            let wanted = least.max(GRANT.min(goal.saturating_sub(state.granted)));
            let Some(more) = [wanted, least].into_iter().find(|&more| self.check(state, more).is_ok()) else {
                return false;
            };
            state.granted += more;
        }
        true
    }
}

impl State {
    fn skip_to(&mut self, position: u64) {
        let before = self.populated / REGION_BYTES as u64;
        self.populated = self.populated.max(position.min(self.mapped));
        for _ in before..self.populated / REGION_BYTES as u64 {
            self.populators.pop_front();
        }
    }
}
