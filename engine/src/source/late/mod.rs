//! Owed pages: the program runs at the destination, and what of its memory did not go along is read from the tree that stands
//! still here.
//!
//! One thread answers what is asked for, over a connection of its own, and before all else. The others send what nobody has
//! asked for yet, in the order of [`Bubbling`]; while an answer is under way they wait. Every page is handed out once. What is
//! under way when a connection is lost is neither here nor there: the destination says what it still has to get when
//! the connections are made anew.

mod demand;
mod orphaned;
mod push;
mod serving;
mod session;
mod taking_up;

pub(crate) use orphaned::Orphaned;
pub(super) use session::LateSession;

use super::failure::SendError;
use super::tally::Toil;
use crate::page_bits::PageBits;
use crate::policy::Bubbling;
use pageferry_tracker::{PageReader, PageSet, ReadError, Run, Stillness, Target};
use pageferry_wire_format::digest::{self, SpaceDigest};
use pageferry_wire_format::{PageDigest, PageNo, PageRun, SpaceId};
use rustix::event::{EventfdFlags, eventfd};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const PAGE: usize = 4096;

/// The round that late pages are said to be of: later than any.
const ROUND: u32 = u32::MAX;

/// Owed pages of one space, and how they are read.
#[derive(Debug)]
pub(super) struct DebtSpace {
    pub(super) pid: i32,
    pub(super) reader: PageReader,
    pub(super) owed: PageSet,
}

/// What was sent late of one space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sent {
    pages: u64,
    digest: SpaceDigest,
}

/// How pages went.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    /// That were asked for.
    pub(super) demanded: u64,
    /// That nobody had asked for.
    pub(super) pushed: u64,
    /// That went a second time, because somebody waited for them while they were under way.
    pub(super) repeated: u64,
    /// Of either, those of zeros.
    pub(super) zero: u64,
    pub(super) bytes: u64,
    /// What sending those took that nobody had asked for.
    pub(super) toil: Toil,
}

/// How the connections of a post-copy came to their end.
#[derive(Debug)]
enum End {
    /// The destination has everything.
    Sealed,
    /// They broke, and can be made anew.
    Lost(SendError),
    /// Making them anew would not help.
    Failed(SendError),
}

/// What is to be done about a page that is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    /// It goes now.
    First,
    /// It was handed out before, and goes once more.
    Again,
    /// It went by the quickest way, or was never owed.
    No,
}

/// What the threads share.
#[derive(Debug)]
pub(super) struct Debt {
    spaces: BTreeMap<SpaceId, DebtSpace>,
    total: u64,
    /// Processes that only a signal keeps from running, and how they stood when they were taken up: what is read of them counts as long as
    /// they stand so.
    standing: Vec<(Target, Stillness)>,
    state: Mutex<State>,
    changed: Condvar,
    /// The thread that answers is at it: the others leave it the processor and the link.
    answering: AtomicBool,
    /// Wakes that thread where it waits for the destination.
    alarm: OwnedFd,
}

#[derive(Debug, Default)]
struct State {
    /// What was not handed out yet; made by the thread that answers when it begins.
    order: Option<Bubbling>,
    sent: BTreeMap<SpaceId, Sent>,
    /// What went over the connection over which pages are asked for.
    hurried: BTreeMap<SpaceId, PageBits>,
    counts: Counts,
    /// Batches that were handed out and are not sent.
    in_hand: u32,
    /// What was sent over earlier connections is not counted yet.
    recounting: bool,
    end: Option<End>,
    stop: bool,
}

impl Debt {
    pub(super) fn new(spaces: BTreeMap<SpaceId, DebtSpace>) -> std::io::Result<Self> {
        let total = spaces.values().map(|space| space.owed.len()).sum();
        Ok(Self {
            spaces,
            total,
            standing: Vec::new(),
            state: Mutex::default(),
            changed: Condvar::new(),
            answering: AtomicBool::new(false),
            alarm: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// No CRIU holds the tree: these are to be looked at.
    fn standing(self, tree: Vec<(Target, Stillness)>) -> Self {
        Self { standing: tree, ..self }
    }

    /// Looks whether the tree still stands, and has stood all the time.
    fn look(&self) -> Result<(), SendError> {
        self.standing.iter().try_for_each(|(target, noted)| {
            let pid = target.pid();
            match target.stillness() {
                None => Err(SendError::NotStanding { pid }),
                Some(now) if now != *noted => Err(SendError::HasRun { pid }),
                Some(_) => Ok(()),
            }
        })
    }

    /// All pages that were owed in the beginning.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// Pages that were not handed out yet.
    pub(super) fn left(&self) -> u64 {
        self.lock().order.as_ref().map_or(self.total, Bubbling::left)
    }

    pub(super) fn counts(&self) -> Counts {
        self.lock().counts
    }

    /// What is owed of a space.
    pub(super) fn owed_of(&self, space: SpaceId) -> Option<&PageSet> {
        self.spaces.get(&space).map(|space| &space.owed)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is one step that leaves the counts whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of it is to be sent, unless it is known already what of it.
    fn prepare(&self) {
        if self.lock().order.is_some() {
            return;
        }
        let all = self
            .spaces
            .iter()
            .map(|(id, space)| (*id, space.owed.runs().iter().copied().collect::<PageBits>()));
        let order = Bubbling::new(all.collect());
        let mut state = self.lock();
        state.order = Some(order);
        state.sent = self.spaces.keys().map(|id| (*id, Sent::default())).collect();
        self.changed.notify_all();
    }

    /// New connections were made, and the destination has said what of the debt is left.
    fn begin_anew(&self, order: Bubbling) {
        let mut state = self.lock();
        state.order = Some(order);
        state.sent = self.spaces.keys().map(|id| (*id, Sent::default())).collect();
        state.hurried.clear();
        state.recounting = true;
        (state.in_hand, state.end, state.stop) = (0, None, false);
    }

    /// What was sent over earlier connections counts as well.
    fn recounted(&self, earlier: &BTreeMap<SpaceId, (u64, SpaceDigest)>) {
        let mut state = self.lock();
        for (space, (pages, digest)) in earlier {
            let sent = state.sent.entry(*space).or_default();
            sent.pages += pages;
            sent.digest.merge(digest);
        }
        state.recounting = false;
        drop(state);
        self.alarm();
    }

    /// The threads on the connections are to end, for this reason if it is the first.
    fn finish(&self, end: End) {
        let mut state = self.lock();
        if state.end.is_none() {
            state.end = Some(end);
        }
        state.stop = true;
        drop(state);
        self.alarm();
    }

    /// The threads are to end, whatever the reason.
    fn halt(&self) {
        self.lock().stop = true;
        self.alarm();
    }

    fn stopped(&self) -> bool {
        self.lock().stop
    }

    /// Has the thread that answers look whether all was sent.
    fn alarm(&self) {
        self.changed.notify_all();
        // The counter cannot overflow, and a full one would wake as well.
        let _ = rustix::io::write(&self.alarm, &1u64.to_ne_bytes());
    }

    /// Waits for the end of the connections, at most for `patience`.
    fn wait_end(&self, patience: Duration) -> Option<End> {
        let state = self.lock();
        let waited = self.changed.wait_timeout_while(state, patience, |state| state.end.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.end.take()
    }

    /// What was sent, if that is everything.
    fn all_sent(&self) -> Option<Vec<(SpaceId, u64, SpaceDigest)>> {
        let state = self.lock();
        let all = state.order.as_ref().is_some_and(|order| order.left() == 0);
        (all && state.in_hand == 0 && !state.recounting)
            .then(|| state.sent.iter().map(|(id, sent)| (*id, sent.pages, sent.digest)).collect())
    }

    /// The destination waits for a page: hands it out. One that another thread has handed out is in its hands, or in
    /// the queue of its connection, behind many that nobody waits for: it goes a second time.
    fn take_wanted(&self, space: SpaceId, page: u64) -> Wanted {
        let mut state = self.lock();
        let State { order: Some(order), hurried, .. } = &mut *state else { return Wanted::No };
        let here = order.want(space, page);
        if !here && !self.spaces.get(&space).is_some_and(|space| space.owed.contains(page)) {
            return Wanted::No;
        }
        let hurried = hurried.entry(space).or_default();
        if hurried.has(page) {
            return Wanted::No;
        }
        hurried.insert(page, 1);
        if here { Wanted::First } else { Wanted::Again }
    }

    /// A batch of wanted pages was handed out.
    fn hold_one(&self) {
        self.lock().in_hand += 1;
    }

    /// These need not go any more.
    fn forget(&self, space: SpaceId, runs: &[PageRun]) {
        if let Some(order) = &mut self.lock().order {
            runs.iter().for_each(|run| order.forget(space, Run { start: run.start.0, len: run.len }));
        }
    }

    /// Hands out the next batch that nobody waits for, when nobody is being answered. `None` when there is nothing left to send.
    fn next(&self, most: u64, runs: &mut Vec<Run>) -> Option<SpaceId> {
        let busy = |state: &mut State| {
            !state.stop && (state.order.is_none() || self.answering.load(Ordering::SeqCst))
        };
        let state = self.changed.wait_while(self.lock(), busy);
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        if state.stop {
            return None;
        }
        let space = state.order.as_mut()?.next(most, runs)?;
        state.in_hand += 1;
        Some(space)
    }

    /// What a thread took for what nobody had asked for.
    fn note_toil(&self, toil: Toil) {
        self.lock().counts.toil.add(&toil);
    }

    /// A batch of pages that another thread counts has gone out.
    fn note_repeated(&self, pages: &[(u64, bool, PageDigest)], bytes: usize) {
        let counts = &mut self.lock().counts;
        counts.repeated += pages.len() as u64;
        counts.bytes += bytes as u64;
    }

    /// A batch has gone out.
    fn note_sent(&self, space: SpaceId, pages: &[(u64, bool, PageDigest)], bytes: usize, demanded: bool) {
        let mut state = self.lock();
        let sent = state.sent.entry(space).or_default();
        for (page, _, content) in pages {
            sent.pages += 1;
            sent.digest.insert(PageNo(*page), content);
        }
        let counts = &mut state.counts;
        *(if demanded { &mut counts.demanded } else { &mut counts.pushed }) += pages.len() as u64;
        counts.zero += pages.iter().filter(|(_, zero, _)| *zero).count() as u64;
        counts.bytes += bytes as u64;
        state.in_hand -= 1;
    }

    /// Reads pages of the tree that stands still, and says of each its number, whether it is zeros, and its digest.
    fn read(
        &self,
        space: SpaceId,
        runs: &[Run],
        bytes: &mut Vec<u8>,
        pages: &mut Vec<(u64, bool, PageDigest)>,
    ) -> Result<(), SendError> {
        let DebtSpace { pid, reader, .. } = &self.spaces[&space];
        let len = runs.iter().map(|run| run.len).sum::<u64>() as usize * PAGE;
        if bytes.len() < len {
            bytes.resize(len, 0);
        }
        let failed = |source: ReadError| SendError::Reader { pid: *pid, source };
        let vanished = reader.read(runs, &mut bytes[..len]).map_err(failed)?;
        if let Some(page) = vanished.first() {
            return Err(super::pages::SendPagesError::Vanished { pid: *pid, page: *page }.into());
        }
        pages.clear();
        let numbers = runs.iter().flat_map(|run| run.start..run.end());
        for (number, page) in numbers.zip(bytes[..len].as_chunks::<PAGE>().0) {
            pages.push(match digest::is_zero(page) {
                true => (number, true, digest::ZERO_PAGE),
                false => (number, false, digest::page(page)),
            });
        }
        Ok(())
    }

    fn set_answering(&self, answering: bool) {
        self.answering.store(answering, Ordering::SeqCst);
        if !answering {
            self.changed.notify_all();
        }
    }
}

/// Whether new connections could help.
fn end_of(error: SendError) -> End {
    use crate::link::ChannelError;
    match error {
        SendError::Channel(ChannelError::Link(_) | ChannelError::Frame(_)) => End::Lost(error),
        error => End::Failed(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: SpaceId = SpaceId(1);

    #[test]
    fn what_is_in_other_hands_goes_once_more_when_somebody_waits_for_it() {
        let mut program = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let me = Target::open(program.id() as i32).unwrap();
        let owed = [Run { start: 100, len: 64 }].into_iter().collect();
        let space = DebtSpace { pid: me.pid(), reader: PageReader::new(&me).unwrap(), owed };
        let debt = Debt::new(BTreeMap::from([(A, space)])).unwrap();
        debt.prepare();
        let mut runs = Vec::new();
        assert_eq!(debt.next(32, &mut runs), Some(A));
        let in_hand = runs[0].start;
        let other =
            (100..164).find(|page| !runs.iter().any(|run| (run.start..run.end()).contains(page))).unwrap();
        assert_eq!(debt.take_wanted(A, other), Wanted::First);
        assert_eq!(debt.take_wanted(A, other), Wanted::No, "it goes by this way already");
        assert_eq!(debt.take_wanted(A, in_hand), Wanted::Again);
        assert_eq!(debt.take_wanted(A, in_hand), Wanted::No);
        assert_eq!(debt.take_wanted(A, 99), Wanted::No, "it is not owed");
        assert_eq!(debt.take_wanted(SpaceId(2), 100), Wanted::No);
        assert_eq!(debt.left(), 64 - 32 - 1, "what goes twice is handed out once");
        debt.begin_anew(Bubbling::new(BTreeMap::from([(
            A,
            [Run { start: in_hand, len: 1 }].into_iter().collect(),
        )])));
        assert_eq!(
            debt.take_wanted(A, in_hand),
            Wanted::First,
            "over new connections everything begins anew"
        );
        program.kill().unwrap();
        program.wait().unwrap();
    }
}
