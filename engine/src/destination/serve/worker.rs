//! The thread that answers page faults and puts pages in place.
//!
//! Whatever else it does, it does in small steps, and looks at the events between them: a program waits in the
//! kernel for each of them to be read. Events come before faults, because a fault that was read together with a
//! move of its memory would otherwise be answered from where the memory was before. (The kernel keeps the rest of
//! that promise: it takes no page while an event is unread.)

mod background;

use super::demand::Demand;
use super::error::ServeError;
use super::latest::Latest;
use super::prefill::{Prefill, PrefillStats};
use super::stride::Stride;
use super::view::{Fault, Pending, View};
use super::{Budget, FillStats, Status};
use crate::destination::late::{Arrived, Late};
use crate::destination::store::PageStore;
use crate::effort::CpuMeter;
use crate::link::Channel;
use crate::urgency::{self, Turns, Urgent};
use pageferry_tracker::Run;
use pageferry_tracker::uffd::{Event, Uffd, UffdError};
use pageferry_wire_format::{PageNo, SpaceId};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;
/// Blocks of unused memory that are given back in one step.
const DRAIN_BLOCKS: usize = 4;
/// How often it is looked whether a task that is owed pages still lives.
const PROBE: Duration = Duration::from_millis(200);
/// The lowest pages that a program could have (vm.mmap_min_addr is 64 KiB).
const LOWEST: u64 = 16;
/// How long a thread that leaves nobody else its processor waits for somebody else's step.
const YIELD: Duration = Duration::from_micros(50);
/// After a failure: how long until the next try, doubling up to the second value.
const RETRY: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(500));

pub(super) enum Command {
    Add {
        space: SpaceId,
        uffd: Uffd,
    },
    Prefill {
        budget: Budget,
        reply: Sender<Result<PrefillStats, ServeError>>,
    },
    Background,
    /// A connection over which owed pages can be asked for.
    Demand(Box<Channel>),
    /// Owed pages are in the store.
    Arrived(Arrived),
    Abort,
}

/// What became of an attempt to put pages in place.
pub(super) enum Put {
    /// So many pages are there now.
    Done(u64),
    /// Events have to be read first.
    Events,
    /// The task is gone.
    Gone,
    /// No region waits for this page.
    NotRegistered,
    /// The page is owed, and has been asked for.
    Waits,
    /// The kernel would not, or the store could not.
    Failed(ServeError),
}

struct Failure {
    error: ServeError,
    since: Instant,
    pause: Duration,
    next: Instant,
}

pub(super) struct Worker {
    store: Arc<Mutex<PageStore>>,
    status: Arc<Status>,
    commands: Receiver<Command>,
    wake: Arc<OwnedFd>,
    views: Vec<View>,
    demand: Demand,
    /// When it was looked last whether tasks that are owed pages still live.
    probed: Instant,
    prefill: Option<Prefill>,
    /// Since when the background runs.
    background: Option<Instant>,
    /// Where the background is among what was sent again.
    latest: Option<Latest>,
    draining: bool,
    /// Memory is given back, or was.
    drained: bool,
    failure: Option<Failure>,
    stats: FillStats,
    stride: Stride,
    events: Vec<Event>,
    /// What the thread was before threads of the program waited for it.
    urgent: Option<Urgent>,
    /// Of a thread that leaves nobody else its processor, when it has to.
    turns: Option<Turns>,
    /// What it works on that nobody waits for.
    meter: CpuMeter,
}

/// Whether the thread goes on.
enum Next {
    Again,
    End,
}

impl Worker {
    pub(super) fn new(
        store: Arc<Mutex<PageStore>>,
        status: Arc<Status>,
        commands: Receiver<Command>,
        wake: Arc<OwnedFd>,
        late: Arc<Late>,
    ) -> Self {
        let meter = CpuMeter::new(late.cpu());
        Self {
            store,
            status,
            commands,
            wake,
            views: Vec::new(),
            demand: Demand::new(late),
            probed: Instant::now(),
            prefill: None,
            background: None,
            latest: Some(Latest::down_to(1)),
            draining: false,
            drained: false,
            failure: None,
            stats: FillStats::default(),
            stride: Stride::default(),
            events: Vec::new(),
            urgent: None,
            turns: None,
            meter,
        }
    }

    /// Threads of the program wait for pages that are far away.
    pub(super) fn hurry(&mut self) {
        let urgent = urgency::hurry();
        self.turns = urgent.is_real_time().then(Turns::default);
        self.urgent = Some(urgent);
    }

    /// All pages are here: those that are still to be put in place are not worth taking the program's processor for.
    fn calm_down(&mut self) {
        self.turns = None;
        if let Some(urgent) = self.urgent.take() {
            urgent.calm_down();
        }
    }

    pub(super) fn run(&mut self) {
        loop {
            self.wait();
            if matches!(self.obey(), Next::End) {
                return;
            }
            self.read_events();
            self.hear();
            self.serve_faults();
            self.demand.speak();
            self.probe();
            self.step_in_turn();
            if self.finish() {
                return;
            }
        }
    }

    /// Waits for something to happen, as long as there is nothing to do.
    fn wait(&mut self) {
        let busy = self.prefill.is_some()
            || self.draining
            || self
                .views
                .iter()
                .any(|v| !v.faults.is_empty() || (self.background.is_some() && v.pending.pages() > 0));
        let faults = self.views.iter().any(|view| !view.faults.is_empty());
        let unreadable = self.views.iter().any(|view| view.unreadable.is_some());
        let timeout = match &self.failure {
            Some(failure) if busy || unreadable => {
                Some(failure.next.saturating_duration_since(Instant::now()))
            }
            // What keeps it from answering is that a thread of the program has to run first.
            _ if (faults || unreadable) && self.turns.is_some() => Some(YIELD),
            _ if faults || unreadable => Some(Duration::ZERO),
            _ if busy => Some(self.rest()),
            _ => None,
        };
        let owing = self.views.iter().any(|view| !view.owed.is_empty()).then_some(PROBE);
        let timeout = [timeout, owing, self.demand.patience()].into_iter().flatten().min();
        let timeout = timeout.and_then(|t| Timespec::try_from(t).ok());
        let wake = PollFd::new(&*self.wake, PollFlags::IN);
        let tasks = self.views.iter().filter(|view| view.unreadable.is_none());
        let tasks = tasks.map(|view| PollFd::from_borrowed_fd(view.uffd.as_fd(), PollFlags::IN));
        let link = self.demand.channel().map(|channel| PollFd::new(channel.link(), PollFlags::IN));
        let mut fds: Vec<PollFd<'_>> = std::iter::once(wake).chain(link).chain(tasks).collect();
        // An interrupted or failing poll changes nothing: every descriptor is looked at anyway.
        let _ = poll(&mut fds, timeout.as_ref());
        let mut count = [0; 8];
        let _ = rustix::io::read(&*self.wake, &mut count);
    }

    fn obey(&mut self) -> Next {
        loop {
            match self.commands.try_recv() {
                Ok(Command::Add { space, uffd }) => {
                    // What comes between these two is in both, until its arrival is told of.
                    let owed = self.demand.late().owed(space);
                    let pending = Pending::of(&self.lock(), space);
                    self.views.push(View::new(uffd, space, pending, owed));
                }
                Ok(Command::Demand(channel)) => {
                    self.demand.connected(*channel);
                    if !self.demand.waits() {
                        self.ask_anew();
                    }
                }
                Ok(Command::Arrived(arrived)) => self.arrived(&arrived),
                Ok(Command::Prefill { budget, reply }) => {
                    // A short prefill is part of the downtime: giving memory back can wait. A long one must not
                    // need the memory twice.
                    self.draining |= !matches!(budget, Budget::Time(_));
                    self.prefill = Some(Prefill::new(budget, reply, Instant::now()));
                }
                Ok(Command::Background) => {
                    if self.background.is_none() {
                        self.background = Some(Instant::now());
                    }
                }
                Ok(Command::Abort) => {
                    self.views.clear();
                    self.status.set(|state| state.aborted = true);
                    return Next::End;
                }
                // A server that goes away says `Abort` first, or wants everything to be put in place.
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return Next::Again,
            }
        }
    }

    /// Reads what the tasks tell, until there is nothing more. Moves and removals take effect at once, faults are
    /// put in line.
    fn read_events(&mut self) {
        let mut events = std::mem::take(&mut self.events);
        let mut at = 0;
        // Forks add views behind, which are looked at in the same pass.
        while at < self.views.len() {
            if self.views[at].unreadable.is_some_and(|until| Instant::now() < until) {
                at += 1;
                continue;
            }
            self.views[at].unreadable = None;
            loop {
                let outcome = self.views[at].uffd.read_events(&mut events);
                let read = Instant::now();
                // Also what was read before a failure: it is not told twice.
                for event in events.drain(..) {
                    self.apply(at, event, read);
                }
                match outcome {
                    Ok(0) => break,
                    Ok(_) => {}
                    Err(cause) => {
                        // Without a free descriptor, say, a fork cannot be read; later perhaps it can.
                        let space = self.views[at].space;
                        self.fail(ServeError::Events { space, cause: Arc::new(cause) });
                        self.views[at].unreadable = self.failure.as_ref().map(|failure| failure.next);
                        break;
                    }
                }
            }
            at += 1;
        }
        self.events = events;
    }

    fn apply(&mut self, at: usize, event: Event, read: Instant) {
        let view = &mut self.views[at];
        let gone = match event {
            Event::PageFault { addr, .. } => {
                view.faults.push_back(Fault { page: addr / PAGE, read, late: false });
                return;
            }
            Event::Fork { uffd } => {
                let child = view.forked(Uffd::from_fd(uffd));
                self.views.push(child);
                return;
            }
            Event::Remap { from, to, len } => view.map.shift(from / PAGE, to / PAGE, len.div_ceil(PAGE)),
            Event::Remove { start, end } | Event::Unmap { start, end } => {
                view.map.cut(start / PAGE, end.div_ceil(PAGE))
            }
        };
        for (first, count) in gone {
            let pages = self.views[at].pending.remove_range(first, count);
            self.release(self.views[at].space, &pages);
            let owed = self.views[at].owed.remove_run(first, count);
            self.forget(self.views[at].space, owed);
        }
        // Who waits for a page may wait at a place that is no more.
        self.views[at].recall();
    }

    /// Owed pages that a view has no use for: those that no other one waits for need not come.
    fn forget(&mut self, space: SpaceId, pages: Vec<Run>) {
        if pages.is_empty() {
            return;
        }
        let mut others = self.views.iter().filter(|view| view.space == space).peekable();
        let gone: Vec<Run> = match others.peek() {
            None => pages,
            Some(_) => {
                let others: Vec<&View> = others.collect();
                let each = pages.iter().flat_map(|run| run.start..run.end());
                let gone = each.filter(|page| !others.iter().any(|view| view.owed.has(*page)));
                gone.map(|start| Run { start, len: 1 }).collect()
            }
        };
        self.demand.forget(space, &gone);
    }

    /// Takes what the source says, and what it sends of what was asked for.
    fn hear(&mut self) {
        let mut arrived = Vec::new();
        let anew = self.demand.hear(&mut arrived);
        arrived.iter().for_each(|arrived| self.arrived(arrived));
        if anew {
            self.ask_anew();
        }
    }

    /// Asks for everything that threads wait for.
    fn ask_anew(&mut self) {
        for view in &self.views {
            for piece in view.waiting.iter().filter_map(|fault| view.map.at(fault.page)) {
                if view.owed.has(piece.origin) {
                    self.demand.want(view.space, piece.origin);
                }
            }
        }
    }

    /// Owed pages are in the store now: they are put in place as all others are, first those that are waited for.
    fn arrived(&mut self, arrived: &Arrived) {
        for view in self.views.iter_mut().filter(|view| view.space == arrived.space) {
            for &page in &arrived.pages {
                if view.owed.remove(page) {
                    view.pending.insert(page);
                }
            }
            for &page in &arrived.zeros {
                view.owed.remove(page);
            }
            view.recall();
        }
        let nobody = |page: &&u64| {
            !self.views.iter().any(|view| view.space == arrived.space && view.pending.has(**page))
        };
        let lost: Vec<u64> = arrived.pages.iter().filter(nobody).copied().collect();
        self.release(arrived.space, &lost);
    }

    /// Notices tasks that have ended while pages were owed to them: nothing is put in place there that would tell.
    fn probe(&mut self) {
        if self.background.is_none() || self.probed.elapsed() < PROBE {
            return;
        }
        self.probed = Instant::now();
        let gone = |view: &View| {
            // A page that nothing belongs to may be zero, if there is memory at all.
            let free = (LOWEST..LOWEST + 512).find(|page| {
                view.map.at(*page).is_none_or(|at| !view.pending.has(at.origin) && !view.owed.has(at.origin))
            });
            free.is_some_and(|page| matches!(view.uffd.zeropage(page * PAGE, PAGE), Err(UffdError::Gone)))
        };
        while let Some(at) = self.views.iter().position(|view| view.pending.pages() == 0 && gone(view)) {
            self.drop_view(at);
        }
    }

    /// Answers the faults in line, each with its one page: a program waits for it.
    fn serve_faults(&mut self) {
        if self.backing_off() {
            return;
        }
        for at in 0..self.views.len() {
            while let Some(&fault) = self.views[at].faults.front() {
                match self.serve(at, fault.page) {
                    Put::Done(_) | Put::NotRegistered => {}
                    Put::Waits => {
                        self.views[at].faults.pop_front();
                        self.views[at].waiting.push(Fault { late: true, ..fault });
                        continue;
                    }
                    Put::Events => break,
                    Put::Gone => {
                        self.drop_view(at);
                        // The views have moved: the rest has its turn in the next pass, which comes at once.
                        return;
                    }
                    Put::Failed(error) => {
                        self.fail(error);
                        return;
                    }
                }
                self.views[at].faults.pop_front();
                self.views[at].locality.waited(fault.page);
                self.stats.faults += 1;
                let waited = fault.read.elapsed();
                self.stats.max_fault = self.stats.max_fault.max(waited);
                if fault.late {
                    self.stats.waited.record(waited);
                }
            }
        }
    }

    fn serve(&mut self, at: usize, page: u64) -> Put {
        let view = &self.views[at];
        let piece = view.map.at(page);
        if let Some(piece) = piece.filter(|piece| view.owed.has(piece.origin)) {
            self.demand.want(view.space, piece.origin);
            return Put::Waits;
        }
        if let Some(piece) = piece.filter(|piece| view.pending.has(piece.origin)) {
            let put = self.put(at, piece.origin, page, 1);
            return match put {
                // Not registered any more: the program unmapped it meanwhile, and finds out itself when woken.
                Put::NotRegistered => self.wake(at, page),
                other => other,
            };
        }
        match view.uffd.zeropage(page * PAGE, PAGE) {
            Ok(_) => {
                self.failure = None;
                Put::Done(1)
            }
            Err(UffdError::Exists | UffdError::NotRegistered) => self.wake(at, page),
            Err(UffdError::Again { .. }) => Put::Events,
            Err(UffdError::Gone) => Put::Gone,
            Err(cause) => {
                let page = PageNo(page);
                Put::Failed(ServeError::Copy { space: view.space, page, cause: Arc::new(cause) })
            }
        }
    }

    fn wake(&self, at: usize, page: u64) -> Put {
        let view = &self.views[at];
        match view.uffd.wake(page * PAGE, PAGE) {
            Ok(_) => Put::Done(0),
            Err(UffdError::Gone) => Put::Gone,
            Err(cause) => {
                let page = PageNo(page);
                Put::Failed(ServeError::Copy { space: view.space, page, cause: Arc::new(cause) })
            }
        }
    }

    /// Puts up to `most` pages, from `origin` in the store on, at `page` in the program; as many as lie together
    /// and are missing.
    pub(super) fn put(&mut self, at: usize, origin: u64, page: u64, most: u64) -> Put {
        let view = &self.views[at];
        let space = view.space;
        let mut most = view.pending.run(origin, most);
        loop {
            let store = self.lock();
            let Some(bytes) = store.stretch(space, PageNo(origin), most) else {
                return Put::Failed(ServeError::Lost { space, page: PageNo(origin) });
            };
            let pages = bytes.len() as u64 / PAGE;
            let outcome = self.views[at].uffd.copy(page * PAGE, bytes, true);
            drop(store);
            let copied = match outcome {
                Ok(copied) => copied as u64 / PAGE,
                Err(UffdError::Again { copied }) if (copied as u64) < PAGE => return Put::Events,
                Err(UffdError::Again { copied }) => copied as u64 / PAGE,
                // Somebody put it there before; who waits for it may not know.
                Err(UffdError::Exists) => match self.wake(at, page) {
                    Put::Done(_) => 1,
                    other => return other,
                },
                Err(UffdError::NotRegistered) if pages > 1 => {
                    // A copy has to stay within one mapping, and the program may have split its own.
                    most = pages / 2;
                    continue;
                }
                Err(UffdError::NotRegistered) => return Put::NotRegistered,
                Err(UffdError::Gone) => return Put::Gone,
                Err(cause) => {
                    let page = PageNo(origin);
                    return Put::Failed(ServeError::Copy { space, page, cause: Arc::new(cause) });
                }
            };
            self.placed(at, origin, copied);
            return Put::Done(copied);
        }
    }

    /// The same with no more pages than a thread that waits for another one may wait for.
    pub(super) fn put_briefly(&mut self, at: usize, origin: u64, page: u64, most: u64) -> Put {
        let started = Instant::now();
        let put = self.put(at, origin, page, most.min(self.stride.pages()));
        if let Put::Done(pages) = put {
            self.stride.took(pages, started.elapsed());
        }
        put
    }

    fn placed(&mut self, at: usize, origin: u64, count: u64) {
        let pages = self.views[at].pending.remove_range(origin, count);
        self.stats.pages += pages.len() as u64;
        self.release(self.views[at].space, &pages);
        self.failure = None;
    }

    /// Lets the store forget the bytes of pages that no view of the space misses any more.
    fn release(&self, space: SpaceId, pages: &[u64]) {
        let mut store = self.lock();
        for &page in pages {
            if !self.views.iter().any(|view| view.space == space && view.pending.has(page)) {
                store.deliver(space, PageNo(page));
            }
        }
    }

    /// How long work for which nobody waits has to rest yet.
    fn rest(&mut self) -> Duration {
        let turn = self.turns.as_mut().and_then(|turns| turns.rest(Instant::now())).unwrap_or_default();
        // A prefill is waited for, and what comes before the program runs.
        match self.background.is_some() && self.prefill.is_none() {
            true => turn.max(self.demand.late().cpu().owe(Duration::ZERO)),
            false => turn,
        }
    }

    /// One piece of work beside the faults, if it is not to rest.
    fn step_in_turn(&mut self) {
        if !self.rest().is_zero() {
            return;
        }
        let start = self.turns.is_some().then(Instant::now);
        self.meter.begin();
        self.step();
        self.meter.owe();
        if let (Some(start), Some(turns)) = (start, &mut self.turns) {
            let now = Instant::now();
            turns.worked(now - start, now);
        }
    }

    /// One piece of work beside the faults.
    fn step(&mut self) {
        if self.backing_off() {
            return;
        }
        if self.draining {
            let more = self.lock().drain(DRAIN_BLOCKS);
            self.draining = more;
        }
        if let Some(prefill) = self.prefill.take() {
            self.prefill = prefill.step(self);
        } else if self.background.is_some() {
            self.fill();
        }
    }

    /// The task is gone, and its memory with it.
    fn drop_view(&mut self, at: usize) {
        let view = self.views.remove(at);
        tracing::debug!(space = view.space.0, missing = view.pending.pages(), "a task is gone");
        let pages: Vec<u64> = view.pending.all().collect();
        self.release(view.space, &pages);
        self.forget(view.space, view.owed.runs());
        if self.background.is_none() {
            // Nothing runs yet: it cannot have ended by itself.
            self.fail(ServeError::TaskGone { space: view.space });
        }
    }

    /// Notes a failure: everything is tried again after a pause.
    pub(super) fn fail(&mut self, error: ServeError) {
        let now = Instant::now();
        let (since, pause) = match &self.failure {
            Some(before) => (before.since, (before.pause * 2).min(RETRY.1)),
            None => (now, RETRY.0),
        };
        tracing::warn!(%error, "serving pages");
        self.status.set(|state| state.failing = Some((since, error.clone())));
        if let Some(prefill) = self.prefill.take() {
            prefill.fail(error.clone());
        }
        self.failure = Some(Failure { error, since, pause, next: now + pause });
    }

    fn backing_off(&self) -> bool {
        self.failure.as_ref().is_some_and(|failure| Instant::now() < failure.next)
    }

    pub(super) fn views(&self) -> &[View] {
        &self.views
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, PageStore> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets go of the views that have everything. Whether all are done.
    fn finish(&mut self) -> bool {
        let Some(started) = self.background else { return false };
        // Closing lets every waiting thread go on, with zeros where nothing is: right where nothing is missing.
        self.views.retain(View::misses);
        let settled = self.demand.late().left() == 0 && self.demand.settled();
        if settled && !self.drained {
            // From here on nothing comes that could use the memory again.
            (self.drained, self.draining) = (true, true);
            self.calm_down();
        }
        let failing = self.failure.as_ref().map(|failure| (failure.since, failure.error.clone()));
        let done = self.views.is_empty() && settled && !self.draining;
        self.status.go_on(failing);
        if done {
            let stats = FillStats { duration: started.elapsed(), ..self.stats.clone() };
            self.status.set(|state| {
                state.filled = Some(stats);
                state.demand = self.demand.take_channel();
            });
        }
        done
    }

    pub(super) fn prefilled(&mut self, pages: u64) {
        self.stats.prefilled_pages += pages;
    }
}
