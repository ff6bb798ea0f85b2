//! What the connections of a session share: the store, and the books on how far each connection is.
//!
//! Pages come over any of them, everything else over the first. A round is complete when every connection has said that
//! its part of it is; between two such points no page comes twice, and what is made of pages that are still under way on
//! another connection waits for these.

mod away;

use super::failure::ReceiveError;
use super::store::{CopyOrder, PageStore, StoreError};
use crate::Cancel;
use crate::effort::{CpuMeter, Effort};
use crate::fault::Fault;
use crate::link::{Channel, ChannelError, Incoming, LinkError};
use crate::policy::memory;
use away::Away;
use pageferry_wire_format::{Coding, ControlMessage, PageBatch, PageNo, PageRun, SpaceId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::IoSliceMut;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Connections of a session besides the first, at most.
pub(super) const MOST_STREAMS: u16 = 16;

/// Number of the connection that a session begins with.
const FIRST: u16 = 0;

/// How long the first connection may take to say why another one has ended.
pub(super) const LAST_WORDS: Duration = Duration::from_millis(500);

/// Pages that may be put off beyond those that were announced: a program may grow while it is copied.
const SLACK_PAGES: u64 = 1 << 20;

/// The meeting point of a session's connections.
#[derive(Debug)]
pub(super) struct Hub {
    session: u128,
    stall: Duration,
    effort: Effort,
    books: Mutex<Books>,
    changed: Condvar,
    /// Wakes the thread of the first connection when another one has failed. A new one for each link.
    alarm: Mutex<Cancel>,
}

#[derive(Debug)]
struct Books {
    /// Taken when everything has arrived.
    store: Option<PageStore>,
    /// Announced and not sealed.
    open: BTreeSet<SpaceId>,
    streams: BTreeMap<u16, Stream>,
    /// Pages that are made of others which are not here yet, and the bytes and pages of all these.
    later: VecDeque<Later>,
    later_bytes: usize,
    later_pages: u64,
    /// Bytes of payloads that may wait for what they are on top of: some batches, which are mostly much smaller. A source whose
    /// connections are further apart is asked for the rest again.
    most_later: Arc<AtomicUsize>,
    /// Connections that the session may have.
    most_streams: u16,
    /// Pages whose base or original was not here.
    again: BTreeMap<SpaceId, BTreeSet<PageNo>>,
    /// Most pages that may be put off or asked for again.
    patience: u64,
    stored_pages: u64,
    /// Grows with everything that arrives: who waits for others sees that they live.
    moves: u64,
    failure: Option<ReceiveError>,
    link: Away,
    closed: bool,
}

/// Pages that wait for what they are made of.
#[derive(Debug)]
enum Later {
    /// They are the same.
    Copies(CopyOrder),
    /// They are these bytes on top of it.
    Made(Box<PageBatch>, Vec<u8>),
}

#[derive(Debug)]
struct Stream {
    /// The round that it said was complete, last.
    reached: Option<u32>,
    /// To end it from another thread. The first one ends by itself, unless a new one takes its place.
    handle: Option<TcpStream>,
}

impl Hub {
    pub(super) fn new(session: u128, store: PageStore, stall: Duration) -> Result<Self, ReceiveError> {
        let first = Stream { reached: None, handle: None };
        let books = Books {
            store: Some(store),
            open: BTreeSet::new(),
            streams: BTreeMap::from([(FIRST, first)]),
            later: VecDeque::new(),
            later_bytes: 0,
            later_pages: 0,
            most_later: Arc::new(AtomicUsize::new(memory::LATER as usize)),
            most_streams: MOST_STREAMS + 1,
            again: BTreeMap::new(),
            patience: SLACK_PAGES,
            stored_pages: 0,
            moves: 0,
            failure: None,
            link: Away::default(),
            closed: false,
        };
        let alarm = Mutex::new(Cancel::new().map_err(LinkError::Lost)?);
        Ok(Self {
            session,
            stall,
            effort: Effort::default(),
            books: Mutex::new(books),
            changed: Condvar::new(),
            alarm,
        })
    }

    /// Takes no more of the processors than `effort` says.
    pub(super) fn sparing(self, effort: &Effort) -> Self {
        Self { effort: effort.clone(), ..self }
    }

    /// What those who receive may take of the processors.
    pub(super) fn effort(&self) -> &Effort {
        &self.effort
    }

    /// Takes no more connections than these, and keeps no more bytes of pages that wait for others, which may change.
    pub(super) fn limit(&self, streams: u16, later: Arc<AtomicUsize>) {
        let mut books = self.lock();
        (books.most_streams, books.most_later) = (streams, later);
    }

    pub(super) fn session(&self) -> u128 {
        self.session
    }

    /// Interrupts a wait of the first connection when another one has failed.
    pub(super) fn alarm(&self) -> Cancel {
        self.alarm.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn lock(&self) -> MutexGuard<'_, Books> {
        // A panic elsewhere ends the session; what is read here after it is thrown away with it.
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with the store.
    pub(super) fn with_store<R>(
        &self,
        act: impl FnOnce(&mut PageStore) -> Result<R, StoreError>,
    ) -> Result<R, ReceiveError> {
        let mut books = self.lock();
        let store = books.store.as_mut().ok_or(ReceiveError::Order("pages after the last ones"))?;
        Ok(act(store)?)
    }

    /// A space is announced: its pages may come, over any connection. `pages`: of all spaces so far.
    pub(super) fn open(&self, space: SpaceId, pages: u64) {
        let mut books = self.lock();
        books.open.insert(space);
        books.patience = pages.saturating_add(SLACK_PAGES);
        self.changed.notify_all();
    }

    /// No more pages of a space are to come.
    pub(super) fn shut(&self, space: SpaceId) {
        self.lock().open.remove(&space);
    }

    /// Pages that were stored so far, with repetitions.
    pub(super) fn stored_pages(&self) -> u64 {
        self.lock().stored_pages
    }

    /// Receives a batch whose head has just arrived, with the payload still in the link.
    pub(super) fn pages(
        &self,
        channel: &mut Channel,
        payload: usize,
        stream: u16,
    ) -> Result<(), ReceiveError> {
        crate::fault::point("dest-pages");
        let (batch, link) = channel.batch_and_link();
        let space = batch.space();
        let begun = {
            let mut books = self.lock();
            // A further connection may be ahead of the first one, which announces spaces.
            if stream != FIRST && !books.open.contains(&space) {
                books = self.wait(books, |books| books.open.contains(&space))?;
            }
            if !books.open.contains(&space) {
                return Err(ReceiveError::UnknownSpace(space));
            }
            let lost =
                is_made_of_others(batch.coding()) && crate::fault::point("dest-base") == Some(Fault::Lose);
            if lost {
                let pages: Vec<PageNo> = batch.pages().map(|(page, _)| page).collect();
                link.receive_all(&mut [IoSliceMut::new(&mut vec![0; payload])])?;
                return books.ask_again(space, pages);
            } else if batch.coding() == Coding::Copy {
                let later = Later::Copies(CopyOrder::of(batch));
                return books.make_or_put_off(later).inspect(|()| self.changed.notify_all());
            } else {
                let store = books.store.as_mut().ok_or(ReceiveError::Order("pages after the last ones"))?;
                store.begin_batch(batch, payload)
            }
        };
        let mut landing = match begun {
            Ok(landing) => landing,
            Err(StoreError::Base { .. }) => {
                // What they were made from is not here: it may be under way, and is never guessed.
                let mut bytes = vec![0; payload];
                link.receive_all(&mut [IoSliceMut::new(&mut bytes)])?;
                let later = Later::Made(Box::new(batch.clone()), bytes);
                return self.lock().make_or_put_off(later);
            }
            Err(error) => return Err(error.into()),
        };
        link.receive_all(&mut landing.slices())?;
        landing.check()?;
        let mut books = self.lock();
        let store = books.store.as_mut().ok_or(ReceiveError::Order("pages after the last ones"))?;
        books.stored_pages += store.finish_batch(landing)?.stored;
        books.moves += 1;
        books.make_what_waits()
    }

    /// A connection says that it has brought all of a round.
    fn reached(&self, stream: u16, round: u32) -> Result<(), ReceiveError> {
        let mut books = self.lock();
        if let Some(stream) = books.streams.get_mut(&stream) {
            stream.reached = Some(round);
        }
        books.moves += 1;
        self.changed.notify_all();
        Ok(())
    }

    /// The first connection has brought all of a round, in which `pages` pages came: waits for the others, and makes the copies
    /// that were put off. Gives what is to be asked for again.
    pub(super) fn complete(
        &self,
        round: u32,
        pages: u64,
    ) -> Result<Vec<(SpaceId, Vec<PageRun>)>, ReceiveError> {
        self.reached(FIRST, round)?;
        let mut books = self
            .wait(self.lock(), |books| books.streams.values().all(|stream| stream.reached == Some(round)))?;
        // The same round can come once more, when pages of it were asked for again in the freeze.
        books.streams.values_mut().for_each(|stream| stream.reached = None);
        books.give_up_waiting()?;
        if let Some(store) = &mut books.store
            // The first round may be a sample of what was announced.
            && (round > 0 || pages.saturating_mul(4096) >= store.announced_bytes() / 2)
        {
            store.settle();
        }
        let again = std::mem::take(&mut books.again);
        Ok(again.into_iter().map(|(space, pages)| (space, runs_of(&pages))).collect())
    }

    /// Waits for `done`, as long as anything arrives at all.
    fn wait<'a>(
        &'a self,
        mut books: MutexGuard<'a, Books>,
        done: impl Fn(&Books) -> bool,
    ) -> Result<MutexGuard<'a, Books>, ReceiveError> {
        loop {
            if let Some(error) = books.failure.take() {
                return Err(error);
            }
            if done(&books) {
                return Ok(books);
            }
            if books.closed || books.link.away {
                return Err(LinkError::Closed.into());
            }
            let before = books.moves;
            let (woken, timeout) =
                self.changed.wait_timeout(books, self.stall).unwrap_or_else(PoisonError::into_inner);
            books = woken;
            if timeout.timed_out() && books.moves == before && !done(&books) {
                return Err(LinkError::Stalled(self.stall).into());
            }
        }
    }

    /// Takes a further connection into the session, and receives what comes over it until it ends.
    pub(super) fn serve(&self, mut channel: Channel, stream: u16) {
        match self.join(&mut channel, stream) {
            Ok(()) => {}
            Err(error) => {
                super::refuse(&mut channel, &error);
                return;
            }
        }
        let result = self.receive(&mut channel, stream);
        let mut books = self.lock();
        if result.as_ref().is_err_and(ReceiveError::is_link) {
            // A source that gives up closes all connections, and says why on the first one.
            let unexplained =
                |books: &mut Books| !books.closed && !books.link.away && books.failure.is_none();
            let waited = self.changed.wait_timeout_while(books, LAST_WORDS, unexplained);
            books = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        books.streams.remove(&stream);
        if let Err(error) = result
            && !books.closed
            && !books.link.away
        {
            books.failure.get_or_insert(error);
            self.alarm().cancel();
        }
        self.changed.notify_all();
    }

    fn join(&self, channel: &mut Channel, stream: u16) -> Result<(), ReceiveError> {
        let handle = channel.link().handle().map_err(LinkError::Lost)?;
        {
            let mut books = self.lock();
            if books.closed
                || books.link.away
                || stream == FIRST
                || stream >= books.most_streams
                || books.streams.contains_key(&stream)
            {
                return Err(ReceiveError::Order("a further connection that the session does not take"));
            }
            books.streams.insert(stream, Stream { reached: None, handle: Some(handle) });
        }
        channel.link_mut().set_stall(self.stall);
        channel.control(&ControlMessage::Joined).map_err(|error| {
            self.lock().streams.remove(&stream);
            error.into()
        })
    }

    fn receive(&self, channel: &mut Channel, stream: u16) -> Result<(), ReceiveError> {
        let _entered = self.effort.enter();
        channel.read_ahead(true);
        let mut meter = CpuMeter::new(self.effort.cpu());
        let over = || {
            let books = self.lock();
            books.closed || books.link.away
        };
        loop {
            let before = channel.link().received();
            match channel.receive() {
                Ok(Incoming::Pages(payload)) => {
                    // What the last ones took is paid for here, where nothing but pages has to wait.
                    meter.pay(over);
                    self.pages(channel, payload, stream)?;
                }
                Ok(Incoming::Control(ControlMessage::RoundEnd { round, .. })) => {
                    self.reached(stream, round)?
                }
                Ok(Incoming::Control(ControlMessage::Ping { .. })) => {}
                Ok(other) => {
                    return Err(ReceiveError::Unexpected(format!("{other:?} over a further connection")));
                }
                // It has nothing to carry while the first one is busy with something else.
                Err(ChannelError::Link(LinkError::Stalled(_))) if channel.link().received() == before => {}
                // The source closes it when the program is sealed.
                Err(ChannelError::Link(LinkError::Closed))
                    if channel.link().received() == before && self.lock().open.is_empty() =>
                {
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// What a further connection failed of: the better explanation of why the first one ended.
    pub(super) fn failure(&self) -> Option<ReceiveError> {
        self.lock().failure.take()
    }

    /// Ends the further connections, waits until nobody is at the store any more, and gives it.
    pub(super) fn close(&self) -> Option<PageStore> {
        let mut books = self.lock();
        books.closed = true;
        books.link.close();
        let further = books.streams.iter().filter(|(number, _)| **number != FIRST);
        for handle in further.filter_map(|(_, stream)| stream.handle.as_ref()) {
            let _ = handle.shutdown(Shutdown::Both);
        }
        self.changed.notify_all();
        while books.streams.keys().any(|number| *number != FIRST) {
            books = self.changed.wait(books).unwrap_or_else(PoisonError::into_inner);
        }
        books.store.take()
    }
}

impl Books {
    /// Makes pages of others, if these are here and are those that are meant.
    fn make(&mut self, later: &Later) -> Result<bool, ReceiveError> {
        let store = self.store.as_mut().ok_or(ReceiveError::Order("pages after the last ones"))?;
        let (damaged, made) = match later {
            Later::Copies(order) => match store.copy_pages(order)? {
                Some(damaged) => (damaged, order.pages().count()),
                None => return Ok(false),
            },
            Later::Made(batch, payload) => match store.begin_batch(batch, payload.len()) {
                Err(StoreError::Base { .. }) => return Ok(false),
                Err(error) => return Err(error.into()),
                Ok(mut landing) => {
                    let mut rest = &payload[..];
                    for mut slice in landing.slices() {
                        let (here, behind) = rest.split_at(slice.len());
                        slice.copy_from_slice(here);
                        rest = behind;
                    }
                    store.finish_batch(landing)?;
                    (Vec::new(), batch.len())
                }
            },
        };
        self.stored_pages += (made - damaged.len()) as u64;
        self.moves += 1;
        if !damaged.is_empty() {
            self.ask_again(later.space(), damaged)?;
        }
        Ok(true)
    }

    /// Makes pages of others, or waits for these to come: at most until the round ends, with what a source may send that does
    /// not know better.
    fn make_or_put_off(&mut self, later: Later) -> Result<(), ReceiveError> {
        if self.make(&later)? {
            return Ok(());
        }
        self.moves += 1;
        if self.later_bytes.saturating_add(later.bytes()) > self.most_later.load(Ordering::Relaxed) {
            return self.ask_again(later.space(), later.pages());
        }
        self.later_bytes += later.bytes();
        self.later_pages += later.pages().len() as u64;
        self.later.push_back(later);
        self.check_patience()
    }

    /// Makes what was put off, in its order, as far as its originals are here by now.
    fn make_what_waits(&mut self) -> Result<(), ReceiveError> {
        while let Some(first) = self.later.pop_front() {
            if !self.make(&first)? {
                self.later.push_front(first);
                break;
            }
            self.later_bytes -= first.bytes();
            self.later_pages -= first.pages().len() as u64;
        }
        Ok(())
    }

    /// A round is over: what cannot be made now is asked for again.
    fn give_up_waiting(&mut self) -> Result<(), ReceiveError> {
        (self.later_bytes, self.later_pages) = (0, 0);
        let mut left = std::mem::take(&mut self.later);
        // What is made may be what another one waits for.
        loop {
            let before = left.len();
            let mut still = VecDeque::new();
            for later in left {
                if !self.make(&later)? {
                    still.push_back(later);
                }
            }
            left = still;
            if left.is_empty() || left.len() == before {
                break;
            }
        }
        left.iter().try_for_each(|later| self.ask_again(later.space(), later.pages()))
    }

    fn ask_again(&mut self, space: SpaceId, pages: Vec<PageNo>) -> Result<(), ReceiveError> {
        self.again.entry(space).or_default().extend(pages);
        self.moves += 1;
        self.check_patience()
    }

    fn check_patience(&self) -> Result<(), ReceiveError> {
        let again: u64 = self.again.values().map(|pages| pages.len() as u64).sum();
        if self.later_pages + again > self.patience {
            return Err(ReceiveError::Order(
                "more copies and deltas of pages that are not here than it has pages",
            ));
        }
        Ok(())
    }
}

impl Later {
    fn space(&self) -> SpaceId {
        match self {
            Self::Copies(order) => order.space,
            Self::Made(batch, _) => batch.space(),
        }
    }

    fn pages(&self) -> Vec<PageNo> {
        match self {
            Self::Copies(order) => order.pages().collect(),
            Self::Made(batch, _) => batch.pages().map(|(page, _)| page).collect(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Copies(_) => 0,
            Self::Made(_, payload) => payload.len(),
        }
    }
}

/// Whether pages in this coding need other bytes than those that come with them.
fn is_made_of_others(coding: Coding) -> bool {
    matches!(coding, Coding::Delta | Coding::ZstdOnBase | Coding::Copy)
}

/// Pages as runs.
fn runs_of(pages: &BTreeSet<PageNo>) -> Vec<PageRun> {
    let mut runs: Vec<PageRun> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some(run) if run.end() == page.0 => run.len += 1,
            _ => runs.push(PageRun { start: *page, len: 1 }),
        }
    }
    runs
}

#[cfg(test)]
mod tests;
