//! One worker of the pipeline: it takes a batch off the queue, reads, hashes, codes and sends it, so that a page's bytes
//! stay in the core's cache from the first step to the last. Each worker has its own connection and its own buffers.

use super::ahead::Ahead;
use super::books::{Base, Books, Fate, Look, Output};
use super::queue::{Queue, Task};
use super::slowdown::{Work, WorkShare};
use super::tally::{Tally, Toil};
use crate::control::Control;
use crate::effort::CpuMeter;
use crate::link::{Channel, ChannelError};
use crate::report::Share;
use pageferry_tracker::{PageReader, ReadError, Run};
use pageferry_wire_format::delta::Page;
use pageferry_wire_format::{
    Coding, CodingChooser, EncodeError, PageBatch, PageDigest, PageNo, SpaceId, Way, ZstdEncoder, digest,
    limits,
};
use std::collections::BTreeMap;
use std::io::IoSlice;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const PAGE: usize = size_of::<Page>();

/// How sending pages fails.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendPagesError {
    /// The target's memory cannot be read.
    #[error("could not read {pages} pages of process {pid}")]
    Read {
        pid: i32,
        pages: u64,
        #[source]
        source: ReadError,
    },
    /// A page of a frozen process is not there although the scan found it.
    #[error("page {page:#x} of the frozen process {pid} vanished between the scan and the read")]
    Vanished { pid: i32, page: u64 },
    /// The compressor failed.
    #[error("could not encode a batch of pages")]
    Encode(#[from] EncodeError),
    /// The peer or the link.
    #[error(transparent)]
    Channel(#[from] ChannelError),
}

/// What the workers of a round share.
pub(crate) struct Round<'a> {
    pub(crate) queue: Queue<'a>,
    pub(crate) control: &'a Control,
    pub(crate) books: &'a Mutex<Books>,
    /// The memory of every process of the tree.
    pub(crate) readers: BTreeMap<SpaceId, &'a PageReader>,
    pub(crate) number: u32,
    /// Nothing was sent before it.
    pub(crate) first: bool,
    /// Most pages are sent for the first time.
    pub(crate) passes: bool,
    /// What the program is ahead of.
    pub(crate) ahead: Ahead,
    /// The tree stands still, so a page that cannot be read is a bug and not a change.
    pub(crate) frozen: bool,
    /// Somebody failed or was told to stop: the others need not go on.
    pub(crate) stop: AtomicBool,
    /// How much of the time each worker may work.
    pub(crate) work: WorkShare,
    pub(crate) done_pages: AtomicU64,
    pub(crate) sent_bytes: AtomicU64,
}

impl<'a> Round<'a> {
    pub(crate) fn new(
        queue: Queue<'a>,
        control: &'a Control,
        books: &'a Mutex<Books>,
        readers: BTreeMap<SpaceId, &'a PageReader>,
        number: u32,
        frozen: bool,
    ) -> Self {
        Self {
            queue,
            control,
            books,
            readers,
            number,
            first: number == 0,
            passes: number == 0,
            ahead: Ahead::new(0),
            frozen,
            stop: AtomicBool::new(false),
            work: WorkShare::full(),
            done_pages: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
        }
    }
}

/// Pages of a batch that travel in one frame: where they are in the buffer, as (from, to).
#[derive(Default)]
struct Group {
    batch: PageBatch,
    pieces: Vec<(usize, usize)>,
}

impl Group {
    fn clear(&mut self, space: SpaceId, round: u32, coding: Coding) {
        self.batch.clear(space, round, coding);
        self.pieces.clear();
    }

    fn piece(&mut self, from: usize) {
        match self.pieces.last_mut() {
            Some(last) if last.1 == from => last.1 = from + PAGE,
            _ => self.pieces.push((from, from + PAGE)),
        }
    }

    fn bytes(&self) -> usize {
        self.pieces.iter().map(|(from, to)| to - from).sum()
    }
}

/// What a link has done meanwhile is asked for after so long at the earliest: asking takes two system calls.
const LOOK_AGAIN: Duration = Duration::from_micros(20);

/// A receiver that gives up is heard after so long at the latest, while there is something to send.
const HEAR_AGAIN: Duration = Duration::from_millis(1);

/// The time by which the chooser goes.
struct Clock {
    epoch: Instant,
    /// When the link was looked at last.
    looked: Duration,
}

/// The worker and its buffers.
pub(crate) struct Worker {
    bytes: Vec<u8>,
    /// Of every page whether it is zeros, and its digest.
    contents: Vec<(bool, PageDigest)>,
    /// Of every page its number, and how it travels.
    fates: Vec<(u64, Fate)>,
    runs: Vec<Run>,
    whole: Group,
    on_base: Group,
    deltas: PageBatch,
    copies: PageBatch,
    out: Output,
    /// Deltas and bases in the order of their pages.
    delta_bytes: Vec<u8>,
    base_bytes: Vec<u8>,
    /// Pages of another process.
    beside: Vec<u8>,
    /// Pages in one piece, for the compressor.
    gathered: Vec<u8>,
    packed: Vec<u8>,
    chooser: CodingChooser,
    zstd: ZstdEncoder,
    clock: Clock,
}

impl Worker {
    pub(crate) fn new(chooser: CodingChooser) -> Result<Self, EncodeError> {
        Ok(Self {
            bytes: Vec::new(),
            contents: Vec::new(),
            fates: Vec::new(),
            runs: Vec::new(),
            whole: Group::default(),
            on_base: Group::default(),
            deltas: PageBatch::default(),
            copies: PageBatch::default(),
            out: Output::default(),
            delta_bytes: Vec::new(),
            base_bytes: Vec::new(),
            beside: Vec::new(),
            gathered: Vec::new(),
            packed: Vec::new(),
            chooser,
            zstd: ZstdEncoder::new()?,
            clock: Clock { epoch: Instant::now(), looked: Duration::ZERO },
        })
    }

    /// The pace of the link is known from elsewhere (a bandwidth limit).
    pub(crate) fn limit_link(&mut self, bytes_per_second: u64) {
        self.chooser.observe_link(bytes_per_second as usize, Duration::from_secs(1));
    }

    /// It may work for this share of the time.
    pub(crate) fn limit_work(&mut self, share: f64) {
        self.chooser.set_share(share);
    }

    /// Seconds that a byte takes the connection, as far as is known; `None` as long as it was never waited for.
    pub(crate) fn link(&self) -> Option<f64> {
        self.chooser.link()
    }

    /// Sends batches until the queue is empty or somebody says stop. `before` is called before each of them, and once more after
    /// the last; it may take its time, and ends the round early with `false`.
    pub(crate) fn run(
        &mut self,
        channel: &mut Channel,
        round: &Round<'_>,
        before: &mut dyn FnMut(&mut Channel) -> Result<bool, ChannelError>,
    ) -> Result<Tally, SendPagesError> {
        // While the tree was scanned the link was idle.
        self.chooser.pause();
        let mut tally = Tally::default();
        let mut work = Work::begin();
        let mut meter = CpuMeter::new(round.control.cpu());
        let hand = round.queue.hand();
        let mut heard = Instant::now();
        let (began, before_it, mut rested) = (heard, channel.held_up(), Duration::ZERO);
        let result = loop {
            match before(channel) {
                Ok(true) => {}
                Ok(false) => round.stop.store(true, Ordering::Relaxed),
                Err(error) => break Err(error.into()),
            }
            if round.stop.load(Ordering::Relaxed) {
                break Ok(());
            }
            let most = self.chooser.batch_pages().min(limits::MAX_BATCH_PAGES) as u64;
            let Some(task) = round.queue.next(hand, most, &mut self.runs) else { break Ok(()) };
            let had = (tally.pages(), tally.bytes());
            if self.chooser.link_is_slow()
                && let Some(check) = task.check
            {
                tally.left += round.ahead.leave(check, &mut self.runs);
            }
            let sent = match self.runs.is_empty() {
                true => Ok(()),
                false => self.send_batch(channel, round, task, &mut tally),
            };
            let hears = heard.elapsed() >= HEAR_AGAIN;
            let sent = sent.and_then(|()| if hears { Ok(channel.hear_abort()?) } else { Ok(()) });
            if let Err(error) = sent {
                break Err(error);
            }
            if hears {
                heard = Instant::now();
            }
            let done = tally.pages() - had.0;
            round.done_pages.fetch_add(done, Ordering::Relaxed);
            round.sent_bytes.fetch_add(tally.bytes() - had.1, Ordering::Relaxed);
            round.control.done(done);
            let rests = Instant::now();
            work.rest(&round.work, &round.stop);
            meter.pay(|| round.stop.load(Ordering::Relaxed) || round.control.token().is_cancelled());
            let rests = rests.elapsed();
            rested += rests;
            self.chooser.observe_rest(rests);
        };
        if result.is_err() {
            round.stop.store(true, Ordering::Relaxed);
        }
        let held_up =
            before_it.zip(channel.held_up()).map(|(before, now)| now.saturating_sub(before) + rested);
        tally.toil = Toil::of(began.elapsed(), held_up);
        result.map(|()| tally)
    }

    fn send_batch(
        &mut self,
        channel: &mut Channel,
        round: &Round<'_>,
        task: &Task<'_>,
        tally: &mut Tally,
    ) -> Result<(), SendPagesError> {
        let start = Instant::now();
        let pid = task.place.target.pid();
        let pages: u64 = self.runs.iter().map(|run| run.len).sum();
        let len = pages as usize * PAGE;
        if self.bytes.len() < len {
            self.bytes.resize(len, 0);
        }
        let vanished = match task.reader.read(&self.runs, &mut self.bytes[..len]) {
            Ok(vanished) => vanished,
            // A process of a running tree may end at any time: the next scan does not find it any more. If it was
            // the root, that scan says so.
            Err(ReadError::Gone(_)) if !round.frozen => {
                tally.gone += pages;
                return Ok(());
            }
            Err(source) => return Err(SendPagesError::Read { pid, pages, source }),
        };
        if round.frozen
            && let Some(page) = vanished.first()
        {
            return Err(SendPagesError::Vanished { pid, page: *page });
        }
        self.look(round, task.place.id, len, &vanished, tally);
        self.compare(round, task.place.id, len);
        self.sort(round, task.place.id, tally);
        self.chooser.observe_work(len, start.elapsed());
        observe_backlog(&mut self.chooser, channel, &mut self.clock);
        self.send_whole(channel, tally)?;
        self.send_on_base(channel, tally)?;
        if !self.deltas.is_empty() {
            let share = &mut tally.codings.delta;
            send(
                channel,
                (&mut self.chooser, &mut self.clock),
                &self.deltas,
                &[IoSlice::new(&self.delta_bytes)],
                share,
            )?;
        }
        if !self.copies.is_empty() {
            send(channel, (&mut self.chooser, &mut self.clock), &self.copies, &[], &mut tally.codings.copy)?;
        }
        Ok(())
    }

    /// Hashes the pages of the batch, and looks up how each of them travels.
    fn look(&mut self, round: &Round<'_>, space: SpaceId, len: usize, vanished: &[u64], tally: &mut Tally) {
        let Self { bytes, contents, fates, runs, out, chooser, .. } = self;
        let pages = bytes[..len].as_chunks::<PAGE>().0;
        contents.clear();
        contents.extend(pages.iter().map(|page| match digest::is_zero(page) {
            true => (true, digest::ZERO_PAGE),
            false => (false, digest::page(page)),
        }));
        fates.clear();
        let idle = chooser.core_is_idle();
        out.deltas.clear();
        out.bases.clear();
        // Every change of the books is one call that leaves them whole.
        let mut books = round.books.lock().unwrap_or_else(PoisonError::into_inner);
        let numbers = runs.iter().flat_map(|run| run.start..run.start + run.len);
        for (index, number) in numbers.enumerate() {
            let (zero, content) = contents[index];
            if !vanished.is_empty() && vanished.contains(&number) {
                // It was unmapped after the scan: the next scan does not find it, and it is forgotten then.
                tally.gone += 1;
                fates.push((number, Fate::Unchanged));
                continue;
            }
            let look = Look {
                space,
                page: number,
                bytes: &pages[index],
                content,
                zero,
                round: round.number,
                last: round.frozen,
                passes: round.passes,
                idle,
            };
            let in_hand = |of: SpaceId, at: u64| {
                let place = (of == space).then(|| place_of(runs, at)).flatten()?;
                (place < index).then(|| &pages[place])
            };
            // In the first round a page that is on the books was sent in this round, and is not sent again in it.
            let stays = |of: SpaceId, at: u64| round.first || !round.queue.contains(of, at);
            let fate = books.enter(&look, out, in_hand, stays);
            tally.codings.unchanged.pages += u64::from(fate == Fate::Unchanged);
            fates.push((number, fate));
        }
    }

    /// Reads the pages of other processes that pages of this batch may differ little from, and compares.
    fn compare(&mut self, round: &Round<'_>, space: SpaceId, len: usize) {
        let Self { bytes, fates, out, beside, .. } = self;
        let pages = bytes[..len].as_chunks::<PAGE>().0;
        loop {
            let base_of = |fate: &Fate| if let Fate::Beside(base) = fate { Some(*base) } else { None };
            // One process after the other; mostly there is one.
            let Some(of) = fates.iter().find_map(|(_, fate)| base_of(fate)).map(|base| base.at.space) else {
                return;
            };
            let places: Vec<(usize, Base)> = fates
                .iter()
                .enumerate()
                .filter_map(|(index, (_, fate))| Some((index, base_of(fate)?)))
                .filter(|(_, base)| base.at.space == of)
                .collect();
            let mut runs: Vec<Run> = Vec::new();
            for (_, base) in &places {
                match runs.last_mut() {
                    Some(run) if run.start + run.len == base.at.page.0 => run.len += 1,
                    _ => runs.push(Run { start: base.at.page.0, len: 1 }),
                }
            }
            let room = places.len() * PAGE;
            if beside.len() < room {
                beside.resize(room, 0);
            }
            // A process that is gone by now has no pages to compare with: those of this one are sent whole.
            let read =
                round.readers.get(&of).is_some_and(|reader| reader.read(&runs, &mut beside[..room]).is_ok());
            let mut worth = 0;
            for ((index, base), base_bytes) in places.iter().zip(beside.as_chunks::<PAGE>().0) {
                // It may have been written since it was sent.
                let same = read && digest::page(base_bytes) == base.content;
                let fate =
                    if same { out.code_beside(*base, base_bytes, &pages[*index]) } else { Fate::Whole };
                worth += u64::from(fate != Fate::Whole);
                fates[*index].1 = fate;
            }
            let mut books = round.books.lock().unwrap_or_else(PoisonError::into_inner);
            books.compared(space, of, places.len() as u64, worth);
        }
    }

    /// Puts the pages of the batch into the frames in which they travel.
    fn sort(&mut self, round: &Round<'_>, space: SpaceId, tally: &mut Tally) {
        let Self { contents, fates, whole, on_base, deltas, copies, out, delta_bytes, base_bytes, .. } = self;
        whole.clear(space, round.number, Coding::Raw);
        on_base.clear(space, round.number, Coding::ZstdOnBase);
        deltas.clear(space, round.number, Coding::Delta);
        copies.clear(space, round.number, Coding::Copy);
        delta_bytes.clear();
        base_bytes.clear();
        for (index, ((number, fate), (_, content))) in fates.iter().zip(contents.iter()).enumerate() {
            let (page, content) = (PageNo(*number), *content);
            match *fate {
                Fate::Unchanged => {}
                Fate::Zero => {
                    whole.batch.push(page, true, content);
                    tally.codings.zero.pages += 1;
                }
                Fate::Copy(from) => copies.push_copy(page, content, from),
                Fate::Delta(base, from, to) => {
                    deltas.push_on_base(page, content, base.at, base.content);
                    delta_bytes.extend_from_slice(&out.deltas[from..to]);
                }
                Fate::OnBase(base, from) => {
                    on_base.batch.push_on_base(page, content, base.at, base.content);
                    on_base.piece(index * PAGE);
                    base_bytes.extend_from_slice(&out.bases[from..from + PAGE]);
                }
                Fate::Beside(_) | Fate::Whole => {
                    whole.batch.push(page, false, content);
                    whole.piece(index * PAGE);
                }
            }
        }
    }

    /// Pages that nothing is known of, and marks of zero pages.
    fn send_whole(&mut self, channel: &mut Channel, tally: &mut Tally) -> Result<(), SendPagesError> {
        let group = &mut self.whole;
        if group.batch.is_empty() {
            return Ok(());
        }
        let raw = group.bytes();
        if raw > 0
            && let way @ Way::Zstd(level) = self.chooser.choose(false)
        {
            let plain = gather(&self.bytes, &group.pieces, &mut self.gathered);
            let start = Instant::now();
            self.zstd.encode(level, plain, &mut self.packed)?;
            self.chooser.observe(way, raw, self.packed.len(), start.elapsed());
            if self.packed.len() < raw {
                group.batch.set_coding(Coding::Zstd);
                let payload = [IoSlice::new(&self.packed)];
                return send(
                    channel,
                    (&mut self.chooser, &mut self.clock),
                    &group.batch,
                    &payload,
                    &mut tally.codings.zstd,
                );
            }
        }
        let payload: Vec<_> =
            group.pieces.iter().map(|(from, to)| IoSlice::new(&self.bytes[*from..*to])).collect();
        send(channel, (&mut self.chooser, &mut self.clock), &group.batch, &payload, &mut tally.codings.raw)
    }

    /// Pages of which the destination has other bytes, of which little is left.
    fn send_on_base(&mut self, channel: &mut Channel, tally: &mut Tally) -> Result<(), SendPagesError> {
        let group = &mut self.on_base;
        if group.batch.is_empty() {
            return Ok(());
        }
        let raw = group.bytes();
        let way = self.chooser.choose(true);
        if let Way::Zstd(level) | Way::ZstdOnBase(level) = way {
            let plain = gather(&self.bytes, &group.pieces, &mut self.gathered);
            let start = Instant::now();
            match way {
                Way::ZstdOnBase(_) => {
                    self.zstd.encode_on(level, &self.base_bytes, plain, &mut self.packed)?;
                }
                _ => self.zstd.encode(level, plain, &mut self.packed)?,
            }
            self.chooser.observe(way, raw, self.packed.len(), start.elapsed());
            if self.packed.len() < raw {
                let payload = [IoSlice::new(&self.packed)];
                let (coding, share) = match way {
                    Way::ZstdOnBase(_) => (Coding::ZstdOnBase, &mut tally.codings.zstd_on_base),
                    _ => (Coding::Zstd, &mut tally.codings.zstd),
                };
                group.batch.set_coding(coding);
                return send(channel, (&mut self.chooser, &mut self.clock), &group.batch, &payload, share);
            }
        }
        group.batch.set_coding(Coding::Raw);
        let payload: Vec<_> =
            group.pieces.iter().map(|(from, to)| IoSlice::new(&self.bytes[*from..*to])).collect();
        send(channel, (&mut self.chooser, &mut self.clock), &group.batch, &payload, &mut tally.codings.raw)
    }
}

/// Looks how far the link is with what was sent before, unless that was just looked at.
fn observe_backlog(chooser: &mut CodingChooser, channel: &Channel, clock: &mut Clock) {
    let now = clock.epoch.elapsed();
    if now.saturating_sub(clock.looked) < LOOK_AGAIN {
        return;
    }
    clock.looked = now;
    if let Some((unsent, unacknowledged)) = channel.link().left() {
        let carried = channel.link().sent().saturating_sub(unacknowledged);
        chooser.observe_backlog(now, carried, unsent);
    }
}

/// Sends one frame, and counts it.
fn send(
    channel: &mut Channel,
    (chooser, clock): (&mut CodingChooser, &mut Clock),
    batch: &PageBatch,
    payload: &[IoSlice<'_>],
    share: &mut Share,
) -> Result<(), SendPagesError> {
    observe_backlog(chooser, channel, clock);
    let start = Instant::now();
    let wire = channel.pages(batch, payload)?;
    chooser.observe_link(wire, start.elapsed());
    share.pages += batch.nonzero() as u64;
    share.bytes += wire as u64;
    Ok(())
}

/// The pages of `pieces`, in one piece: where they are if they are in a row, else in `room`.
fn gather<'a>(bytes: &'a [u8], pieces: &[(usize, usize)], room: &'a mut Vec<u8>) -> &'a [u8] {
    if let [(from, to)] = pieces {
        return &bytes[*from..*to];
    }
    room.clear();
    for (from, to) in pieces {
        room.extend_from_slice(&bytes[*from..*to]);
    }
    room
}

/// Where in a batch a page is, counted from its first.
fn place_of(runs: &[Run], page: u64) -> Option<usize> {
    let mut before = 0;
    for run in runs {
        if (run.start..run.start + run.len).contains(&page) {
            return Some((before + page - run.start) as usize);
        }
        before += run.len;
    }
    None
}
