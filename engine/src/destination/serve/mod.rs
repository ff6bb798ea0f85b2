//! The page server: memory of a restored tree, from the store, through userfaultfd.
//!
//! 1. From the first moment ([`Server::add_task`]) every page fault is answered.
//! 2. Once everything is mapped and nothing runs yet, [`Server::prefill`] puts the hottest pages in place.
//! 3. Once the program runs, [`Server::start_background`] puts in the rest, faults first.
//!    Pages that are owed are asked for when somebody waits for them, and are put in as they come.
//! 4. When a task misses nothing any more its descriptor is closed; [`Server::wait_filled_for`] says when all are.

mod address_map;
mod demand;
mod error;
mod latency;
mod latest;
mod locality;
mod prefill;
mod stride;
mod view;
mod worker;

pub(crate) use demand::say_filled;
pub use error::ServeError;
pub use latency::Latencies;
pub use prefill::PrefillStats;

use super::late::{Arrived, Late, Taker};
use crate::destination::store::PageStore;
use crate::link::Channel;
use pageferry_tracker::uffd::Uffd;
use pageferry_wire_format::{ControlMessage, SpaceId};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use worker::{Command, Worker};

/// How long putting a page in place may fail before [`Server::wait_filled_for`] says so.
const PATIENCE: Duration = Duration::from_secs(3);

/// How much to put in place before the program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Budget {
    /// As much as can be done in this time.
    Time(Duration),
    /// So many pages.
    #[cfg(test)]
    Pages(u64),
    /// Everything.
    All,
}

/// What it took to fill the memory of all tasks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FillStats {
    /// Pages put in place altogether. Pages that a forked child got of its own count again.
    pub pages: u64,
    /// How many of them were put in place before the program ran.
    pub prefilled_pages: u64,
    /// Page faults answered.
    pub faults: u64,
    /// The longest time from reading a fault's message to waking the thread that waits.
    pub max_fault: Duration,
    /// Pages for which no memory waited any more after the program ran.
    pub vanished: u64,
    /// From the start of the background to its end.
    pub duration: Duration,
    /// How long threads waited for pages that were owed, each from reading the fault's message to waking the thread.
    pub waited: Latencies,
}

impl FillStats {
    /// In the words of the wire.
    pub fn message(&self) -> ControlMessage {
        ControlMessage::Filled {
            pages: self.pages,
            prefilled_pages: self.prefilled_pages,
            faults: self.faults,
            max_fault_us: self.max_fault.as_micros() as u64,
            duration_us: self.duration.as_micros() as u64,
        }
    }
}

/// How other threads reach the server's.
#[derive(Debug)]
struct Post {
    commands: Mutex<Sender<Command>>,
    wake: Arc<OwnedFd>,
}

impl Post {
    /// Whether there is still somebody who reads it.
    fn send(&self, command: Command) -> bool {
        let sent = self.commands.lock().unwrap_or_else(PoisonError::into_inner).send(command).is_ok();
        // The counter cannot overflow, and a full one would wake the thread as well.
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
        sent
    }
}

impl Taker for Post {
    fn connected(&self, channel: Channel) {
        // A server that has ended closes the connection; the source opens another, which finds that out.
        self.send(Command::Demand(Box::new(channel)));
    }

    fn arrived(&self, arrived: Arrived) {
        self.send(Command::Arrived(arrived));
    }
}

/// What the server's thread tells.
#[derive(Debug, Default)]
struct State {
    failing: Option<(Instant, ServeError)>,
    filled: Option<FillStats>,
    /// The connection over which owed pages came, when everything is in place.
    demand: Option<Channel>,
    aborted: bool,
    died: bool,
}

#[derive(Debug, Default)]
struct Status {
    state: Mutex<State>,
    changed: Condvar,
}

impl Status {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// How it goes, after each step: wakes nobody where that is as before.
    fn go_on(&self, failing: Option<(Instant, ServeError)>) {
        let mut state = self.lock();
        let news = failing.is_some() != state.failing.is_some();
        state.failing = failing;
        drop(state);
        if news {
            self.changed.notify_all();
        }
    }
}

/// Serves the pages of one restored tree.
///
/// Dropping a server before the background was started aborts it. After that the program runs, and its missing
/// pages exist nowhere else: dropping then waits until they are in place.
#[derive(Debug)]
pub struct Server {
    #[cfg(test)]
    store: Arc<Mutex<PageStore>>,
    status: Arc<Status>,
    post: Arc<Post>,
    thread: Option<JoinHandle<()>>,
    /// The program runs.
    running: AtomicBool,
}

impl Server {
    /// A server for the spaces of `store`, which are sealed: the pages of a space are what it holds when its task
    /// is added.
    ///
    /// # Errors
    /// When the process may have no more threads or descriptors.
    #[cfg(test)]
    pub fn new(store: PageStore) -> Result<Self, ServeError> {
        Self::with_late(store, Arc::new(Late::new(0, Duration::from_secs(30))))
    }

    /// A server that has `store`, and whose program is owed what `late` says.
    ///
    /// # Errors
    /// As [`Server::new`].
    pub(crate) fn with_late(store: PageStore, late: Arc<Late>) -> Result<Self, ServeError> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|cause| {
            ServeError::setup("making an event descriptor for the page server", cause.into())
        })?;
        let (store, status, wake) =
            (Arc::new(Mutex::new(store)), Arc::new(Status::default()), Arc::new(wake));
        let (commands, receiver) = channel();
        let post = Arc::new(Post { commands: Mutex::new(commands), wake: Arc::clone(&wake) });
        late.begin(Arc::clone(&store), Arc::<Post>::clone(&post));
        let owing = late.owing();
        let mut worker = Worker::new(Arc::clone(&store), Arc::clone(&status), receiver, wake, late);
        let watched = Arc::clone(&status);
        let run = move || {
            if owing {
                worker.hurry();
            }
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| worker.run()));
            if ended.is_err() {
                // The descriptors have to stay open: closed, missing pages would read as zero.
                std::mem::forget(worker);
                watched.set(|state| state.died = true);
            }
        };
        let thread = std::thread::Builder::new()
            .name("page-server".into())
            .spawn(run)
            .map_err(|cause| ServeError::setup("starting the thread of the page server", cause))?;
        Ok(Self {
            #[cfg(test)]
            store,
            status,
            post,
            thread: Some(thread),
            running: AtomicBool::new(false),
        })
    }

    /// Serves the pages of `space` to the task whose userfaultfd this is, from now on.
    ///
    /// # Errors
    /// When the descriptor cannot be used, or the server has ended.
    pub fn add_task(&self, space: SpaceId, uffd: Uffd) -> Result<(), ServeError> {
        // A descriptor that blocks can neither be polled nor read to its end.
        fcntl_getfl(uffd.as_fd())
            .and_then(|flags| fcntl_setfl(uffd.as_fd(), flags | OFlags::NONBLOCK))
            .map_err(|cause| ServeError::setup("making a userfaultfd non-blocking", cause.into()))?;
        self.command(Command::Add { space, uffd })
    }

    /// Puts pages in place, those of the last rounds first, until the budget is used up. To be called when all
    /// memory is mapped, and nothing runs.
    ///
    /// # Errors
    /// The first page that could not be put in place, and why; the server goes on answering faults.
    pub fn prefill(&self, budget: Budget) -> Result<PrefillStats, ServeError> {
        let (reply, answer) = channel();
        self.command(Command::Prefill { budget, reply })?;
        answer.recv().unwrap_or_else(|_| Err(self.ended()))
    }

    /// Puts all pages in place, before anything runs: for comparing the whole memory.
    ///
    /// # Errors
    /// As [`Server::prefill`].
    pub fn prefill_all(&self) -> Result<PrefillStats, ServeError> {
        self.prefill(Budget::All)
    }

    /// The program runs: puts the rest in place in the background. Failures are no longer the end of anything: a
    /// page is tried again until it is in place.
    ///
    /// # Errors
    /// When the server has ended.
    pub fn start_background(&self) -> Result<(), ServeError> {
        self.running.store(true, Ordering::SeqCst);
        self.command(Command::Background)
    }

    /// Waits until every page is in place, at most for `timeout`; `None` when it is not done by then.
    ///
    /// # Errors
    /// A page that could not be put in place for some seconds: the server goes on trying, and this can be
    /// called again. [`ServeError::Aborted`] and [`ServeError::Died`] are for good.
    pub fn wait_filled_for(&self, timeout: Duration) -> Result<Option<FillStats>, ServeError> {
        let started = Instant::now();
        let mut state = self.status.lock();
        loop {
            if let Some(stats) = &state.filled {
                return Ok(Some(stats.clone()));
            }
            if state.aborted || state.died {
                drop(state);
                return Err(self.ended());
            }
            if let Some((since, error)) = &state.failing {
                // The failure may be older than this call: who calls again wants to wait again.
                if since.elapsed() >= PATIENCE && started.elapsed() >= PATIENCE.min(timeout) {
                    return Err(error.clone());
                }
            }
            let left = timeout.saturating_sub(started.elapsed());
            if left.is_zero() {
                return Ok(None);
            }
            let pause = left.min(PATIENCE);
            let waited = self.status.changed.wait_timeout(state, pause);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The connection over which owed pages came, once everything is in place.
    pub(crate) fn take_demand(&self) -> Option<Channel> {
        self.status.lock().demand.take()
    }

    /// Looks at the store, e.g. at the digests of pages. Faults wait meanwhile.
    #[cfg(test)]
    pub fn with_store<T>(&self, look: impl FnOnce(&PageStore) -> T) -> T {
        look(&self.store.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Stops serving and closes all descriptors. For a tree that will be killed: were it to run, its missing
    /// pages would read as zero.
    pub fn abort(mut self) {
        // When the thread has ended there is nothing to stop.
        let _ = self.command(Command::Abort);
        self.join();
    }

    fn command(&self, command: Command) -> Result<(), ServeError> {
        if self.post.send(command) { Ok(()) } else { Err(self.ended()) }
    }

    fn ended(&self) -> ServeError {
        if self.status.lock().died { ServeError::Died } else { ServeError::Aborted }
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic was caught inside and is known by `died`.
            let _ = thread.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !self.running.load(Ordering::SeqCst) {
            // When the thread has ended there is nothing to stop.
            let _ = self.command(Command::Abort);
        }
        self.join();
    }
}

#[cfg(test)]
mod late_tests;
#[cfg(test)]
mod tests;
