//! Owed pages on their way: the meeting point of the connections over which they come, the store that they go into, and the
//! page server, which puts them in place and asks for those that are waited for.
//!
//! The server's thread speaks on connection 0, because the thread that reads faults can ask without waking another, and can
//! put in place what comes without being woken by another. The other connections have threads of their own, which check
//! what comes and leave it in the store.

mod books;

pub(crate) use books::{LateBooks, LateError, LateSpace, Needless};

use super::failure::ReceiveError;
use super::hub::MOST_STREAMS;
use super::store::{PageState, PageStore};
use crate::effort::{CpuMeter, CpuShare};
use crate::link::{Channel, ChannelError, Incoming, LinkError};
use crate::page_bits::PageBits;
use pageferry_tracker::Run;
use pageferry_wire_format::{Coding, ControlMessage, PageNo, PageRun, SpaceId, digest};
use std::collections::BTreeMap;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Number of the connection over which pages are asked for.
const DEMAND: u16 = 0;

/// Pages that have come and are in the store: to be put in place.
#[derive(Debug, Default)]
pub(crate) struct Arrived {
    pub(crate) space: SpaceId,
    /// Those with bytes.
    pub(crate) pages: Vec<u64>,
    /// Those that are zeros.
    pub(crate) zeros: Vec<u64>,
}

/// Who is told of what comes: the page server.
pub(crate) trait Taker: Send + Sync + std::fmt::Debug {
    /// A connection over which pages can be asked for.
    fn connected(&self, channel: Channel);
    /// Pages that nobody had asked for have come.
    fn arrived(&self, arrived: Arrived);
}

/// The meeting point.
#[derive(Debug)]
pub(crate) struct Late {
    session: u128,
    stall: Duration,
    cpu: CpuShare,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    books: LateBooks,
    store: Option<Arc<Mutex<PageStore>>>,
    taker: Option<Arc<dyn Taker>>,
    /// A connection for which there is no server, not yet or not any more.
    demand: Option<Channel>,
    /// By connection: to end it from another thread.
    streams: BTreeMap<u16, TcpStream>,
    failure: Option<ReceiveError>,
    /// When the source was heard last on any connection.
    heard: Instant,
    closed: bool,
}

impl Late {
    pub(crate) fn new(session: u128, stall: Duration) -> Self {
        let state = State {
            books: LateBooks::default(),
            store: None,
            taker: None,
            demand: None,
            streams: BTreeMap::new(),
            failure: None,
            heard: Instant::now(),
            closed: false,
        };
        Self { session, stall, cpu: CpuShare::new(None), state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Takes no more of a processor than this for what nobody waits for.
    pub(crate) fn sparing(self, cpu: &CpuShare) -> Self {
        Self { cpu: cpu.clone(), ..self }
    }

    /// What may be taken of a processor for what nobody waits for.
    pub(crate) fn cpu(&self) -> &CpuShare {
        &self.cpu
    }

    pub(crate) fn session(&self) -> u128 {
        self.session
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is one call that leaves the books whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the books.
    pub(crate) fn with_books<R>(&self, look: impl FnOnce(&mut LateBooks) -> R) -> R {
        look(&mut self.lock().books)
    }

    /// The memory is sealed: pages go into `store` from now on, and `taker` is told of them.
    pub(crate) fn begin(&self, store: Arc<Mutex<PageStore>>, taker: Arc<dyn Taker>) {
        let mut state = self.lock();
        state.heard = Instant::now();
        state.store = Some(store);
        if let Some(channel) = state.demand.take() {
            taker.connected(channel);
        }
        state.taker = Some(taker);
    }

    /// The page server has ended: what connects from now on waits to be taken by [`Late::next_demand`].
    pub(crate) fn end_taker(&self) {
        self.lock().taker = None;
    }

    /// What is still to come of a space.
    pub(crate) fn owed(&self, space: SpaceId) -> PageBits {
        self.lock().books.owed(space)
    }

    /// Whether anything is or was owed.
    pub(crate) fn owing(&self) -> bool {
        self.lock().books.spaces().next().is_some()
    }

    /// Pages that are still to come.
    pub(crate) fn left(&self) -> u64 {
        self.lock().books.left()
    }

    /// The program gave memory back. Gives what was owed of it.
    pub(crate) fn forget(&self, space: SpaceId, pages: &[Run]) -> Vec<Run> {
        self.lock().books.forget(space, pages)
    }

    /// Something was heard of the source.
    pub(crate) fn hear(&self) {
        self.lock().heard = Instant::now();
    }

    /// How long nothing was heard of the source.
    pub(crate) fn silence(&self) -> Duration {
        self.lock().heard.elapsed()
    }

    /// Something that ends the post-copy for good has happened.
    pub(crate) fn fail(&self, error: ReceiveError) {
        self.lock().failure.get_or_insert(error);
        self.changed.notify_all();
    }

    /// What that was, once.
    pub(crate) fn failure(&self) -> Option<ReceiveError> {
        self.lock().failure.take()
    }

    /// Takes a late connection into the session, and receives what comes over it until it ends; connection 0 is handed on.
    pub(crate) fn serve(&self, mut channel: Channel, stream: u16) {
        let ended = match stream {
            DEMAND => self.join_demand(&mut channel),
            _ => self.join(&mut channel, stream).and_then(|()| {
                let ended = self.receive(&mut channel);
                self.leave(stream);
                ended
            }),
        };
        match ended {
            Ok(()) if stream == DEMAND => self.hand_on(channel),
            Ok(()) => {}
            // A source whose link broke comes back; one that does what it must not hears of it.
            Err(error) => {
                tracing::warn!(error = %error.chain(), stream, "a late connection has ended");
                if error.is_passing() {
                    channel.link().shutdown();
                    return;
                }
                super::refuse(&mut channel, &error);
                if matches!(error, ReceiveError::Late(_)) {
                    self.fail(error);
                }
            }
        }
    }

    fn join(&self, channel: &mut Channel, stream: u16) -> Result<(), ReceiveError> {
        let handle = channel.link().handle().map_err(LinkError::Lost)?;
        {
            let mut state = self.lock();
            if state.closed || stream > MOST_STREAMS || state.streams.contains_key(&stream) {
                return Err(ReceiveError::Order("a late connection that the session does not take"));
            }
            state.streams.insert(stream, handle);
            state.heard = Instant::now();
        }
        channel.link_mut().set_stall(self.stall);
        channel.link_mut().set_cancel(None);
        channel.control(&ControlMessage::Joined).map_err(|error| {
            self.leave(stream);
            error.into()
        })
    }

    fn leave(&self, stream: u16) {
        self.lock().streams.remove(&stream);
        self.changed.notify_all();
    }

    /// A new connection 0 ends all that there were: the source lost one of them.
    fn join_demand(&self, channel: &mut Channel) -> Result<(), ReceiveError> {
        let mut state = self.lock();
        if state.closed {
            return Err(ReceiveError::UnknownSession);
        }
        for handle in state.streams.values() {
            let _ = handle.shutdown(Shutdown::Both);
        }
        while !state.streams.is_empty() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.heard = Instant::now();
        state.books.reopen();
        drop(state);
        channel.link_mut().set_stall(self.stall);
        channel.link_mut().set_cancel(None);
        Ok(channel.control(&ControlMessage::Joined)?)
    }

    fn hand_on(&self, channel: Channel) {
        let mut state = self.lock();
        match &state.taker {
            Some(taker) => taker.connected(channel),
            None => state.demand = Some(channel),
        }
        self.changed.notify_all();
    }

    fn receive(&self, channel: &mut Channel) -> Result<(), ReceiveError> {
        let mut meter = CpuMeter::new(&self.cpu);
        loop {
            let before = channel.link().received();
            match channel.receive() {
                Ok(Incoming::Pages(payload)) => {
                    meter.pay(|| self.lock().closed);
                    let arrived = self.pages(channel, payload)?;
                    let taker = self.lock().taker.clone();
                    if let Some(taker) = taker {
                        taker.arrived(arrived);
                    }
                }
                Ok(Incoming::Control(ControlMessage::Ping { .. })) => self.hear(),
                Ok(other) => {
                    return Err(ReceiveError::Unexpected(format!("{other:?} over a late connection")));
                }
                // It has nothing to carry until the program runs, and when all was sent.
                Err(ChannelError::Link(LinkError::Stalled(_))) if channel.link().received() == before => {}
                Err(ChannelError::Link(LinkError::Closed)) if channel.link().received() == before => {
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Receives a late batch whose head has just arrived, checks it, and leaves it in the store.
    pub(crate) fn pages(&self, channel: &mut Channel, payload: usize) -> Result<Arrived, ReceiveError> {
        let store = {
            let state = self.lock();
            match (&state.store, state.closed) {
                (Some(store), _) => Arc::clone(store),
                // A second copy of a page whose first was the last that was owed.
                (None, true) => return Err(LinkError::Closed.into()),
                (None, false) => return Err(ReceiveError::Order("late pages before the seal")),
            }
        };
        let lock = || store.lock().unwrap_or_else(PoisonError::into_inner);
        let (batch, link) = channel.batch_and_link();
        let space = batch.space();
        if !matches!(batch.coding(), Coding::Raw | Coding::Zstd) {
            return Err(ReceiveError::Order("late pages that lean on others"));
        }
        let mut landing = lock().begin_batch(batch, payload)?;
        link.receive_all(&mut landing.slices())?;
        landing.check()?;
        let mut arrived = Arrived { space, ..Arrived::default() };
        for (page, zero) in batch.pages() {
            if zero { &mut arrived.zeros } else { &mut arrived.pages }.push(page.0);
        }
        let contents = landing.digests().iter().copied();
        let zeros = arrived.zeros.iter().map(|page| (*page, digest::ZERO_PAGE));
        let all: Vec<_> = arrived.pages.iter().copied().zip(contents).chain(zeros).collect();
        let Needless { unwanted, repeated } = {
            let mut state = self.lock();
            state.heard = Instant::now();
            state.books.arrive(space, &all)?
        };
        let mut store = lock();
        // Read under the lock under which the first copy is put away: it is either there whole, or comes after this.
        let before: Vec<_> = repeated.iter().map(|page| store.state_of(space, PageNo(*page))).collect();
        store.finish_batch(landing)?;
        for page in &unwanted {
            store.discard(space, &[PageRun { start: PageNo(*page), len: 1 }]);
        }
        for (page, before) in repeated.iter().zip(before) {
            match before {
                Some(PageState::Held) => {}
                Some(PageState::Delivered) => store.deliver(space, PageNo(*page)),
                None => store.discard(space, &[PageRun { start: PageNo(*page), len: 1 }]),
            }
        }
        drop(store);
        let needless = |page: &u64| unwanted.contains(page) || repeated.contains(page);
        arrived.pages.retain(|page| !needless(page));
        arrived.zeros.retain(|page| !needless(page));
        Ok(arrived)
    }

    /// Waits for a source that comes back when the page server has ended.
    pub(crate) fn next_demand(&self, patience: Duration) -> Option<Channel> {
        let end = Instant::now() + patience;
        let mut state = self.lock();
        loop {
            if let Some(channel) = state.demand.take() {
                return Some(channel);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Takes no connections any more, and ends those that there are.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.taker = None;
        state.demand = None;
        for handle in state.streams.values() {
            let _ = handle.shutdown(Shutdown::Both);
        }
        while !state.streams.is_empty() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.store = None;
    }
}
