//! Reads pages of the target, leaves out what the destination has, and sends the rest: one worker that reads,
//! hashes and sends, so that a page's bytes stay in the cache from the first step to the last.

use super::deltas::DeltaCache;
use super::sent::SentPages;
use crate::layout::Place;
use crate::link::{Channel, ChannelError};
use pageferry_tracker::{PageReader, PageSet, ReadError, Run};
use pageferry_wire_format::{
    Coding, CodingChooser, EncodeError, PageBatch, PageNo, ZstdEncoder, delta, digest,
};
use std::io::IoSlice;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
/// Pages of a batch: 256 KiB is one call to read them, and stays in a core's second-level cache while they
/// are hashed and sent.
const BATCH: u64 = 64;

/// A delta that is longer than this is not worth one: half a page, after which zstd or the link itself is as good.
const LONGEST_DELTA: usize = PAGE / 2;

/// What became of the pages of a round.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) sent: u64,
    pub(crate) unchanged: u64,
    pub(crate) zero: u64,
    pub(crate) gone: u64,
    pub(crate) compressed: u64,
    pub(crate) delta: u64,
    pub(crate) bytes: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, other: &Tally) {
        self.sent += other.sent;
        self.unchanged += other.unchanged;
        self.zero += other.zero;
        self.gone += other.gone;
        self.compressed += other.compressed;
        self.delta += other.delta;
        self.bytes += other.bytes;
    }

    /// Pages that were looked at.
    pub(crate) fn pages(&self) -> u64 {
        self.sent + self.unchanged + self.zero + self.gone
    }
}

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

/// The worker and its buffers.
pub(crate) struct PageSender {
    bytes: Vec<u8>,
    packed: Vec<u8>,
    batch: PageBatch,
    runs: Vec<Run>,
    chooser: CodingChooser,
    zstd: ZstdEncoder,
    cache: DeltaCache,
    /// Pages that travel as what differs, and their deltas.
    delta_batch: PageBatch,
    deltas: Vec<u8>,
}

impl PageSender {
    pub(crate) fn new() -> Result<Self, EncodeError> {
        Ok(Self {
            bytes: vec![0; BATCH as usize * PAGE],
            packed: Vec::new(),
            batch: PageBatch::default(),
            runs: Vec::new(),
            chooser: CodingChooser::default(),
            zstd: ZstdEncoder::new()?,
            cache: DeltaCache::default(),
            delta_batch: PageBatch::default(),
            deltas: Vec::new(),
        })
    }

    /// The pace of the link is known from elsewhere (a bandwidth limit).
    pub(crate) fn limit_link(&mut self, bytes_per_second: u64) {
        self.chooser.observe_link(bytes_per_second as usize, Duration::from_secs(1));
    }

    /// What was sent of pages that are likely to be sent again.
    pub(crate) fn cache(&mut self) -> &mut DeltaCache {
        &mut self.cache
    }

    /// Sends the pages of `todo`. `frozen`: the tree stands still, so a page that cannot be read is a bug
    /// and not a change. `tick` is called after every batch with what was done so far, and ends the round early with `false`.
    #[expect(
        clippy::too_many_arguments,
        reason = "one call site a phase, and every argument is a different thing"
    )]
    pub(crate) fn send(
        &mut self,
        channel: &mut Channel,
        place: &Place,
        reader: &mut PageReader,
        sent: &mut SentPages,
        todo: &PageSet,
        round: u32,
        frozen: bool,
        tick: &mut dyn FnMut(&Tally) -> bool,
    ) -> Result<Tally, SendPagesError> {
        let mut tally = Tally::default();
        let mut rest = todo.runs().iter().copied();
        let mut next = rest.next();
        while next.is_some() {
            self.runs.clear();
            let mut room = BATCH;
            while let Some(run) = next
                && room > 0
            {
                let take = run.len.min(room);
                self.runs.push(Run { start: run.start, len: take });
                room -= take;
                next = if take < run.len {
                    Some(Run { start: run.start + take, len: run.len - take })
                } else {
                    rest.next()
                };
            }
            self.send_batch(channel, place, reader, sent, round, frozen, &mut tally)?;
            if !tick(&tally) {
                break;
            }
        }
        Ok(tally)
    }

    #[expect(clippy::too_many_arguments, reason = "as send")]
    fn send_batch(
        &mut self,
        channel: &mut Channel,
        place: &Place,
        reader: &mut PageReader,
        sent: &mut SentPages,
        round: u32,
        frozen: bool,
        tally: &mut Tally,
    ) -> Result<(), SendPagesError> {
        let pid = place.target.pid();
        let pages: u64 = self.runs.iter().map(|run| run.len).sum();
        let bytes = &mut self.bytes[..pages as usize * PAGE];
        let vanished = match reader.read(&self.runs, bytes) {
            Ok(vanished) => vanished,
            // A process of a running tree may end at any time: the next scan does not find it any more. If it was
            // the root, that scan says so.
            Err(ReadError::Gone(_)) if !frozen => {
                tally.gone += pages;
                return Ok(());
            }
            Err(source) => return Err(SendPagesError::Read { pid, pages, source }),
        };
        if frozen && let Some(page) = vanished.first() {
            return Err(SendPagesError::Vanished { pid, page: *page });
        }

        self.batch.clear(place.id, round, Coding::Raw);
        self.delta_batch.clear(place.id, round, Coding::Delta);
        self.deltas.clear();
        // Runs of neighbouring bytes in the buffer that travel: (from, to).
        let mut pieces: Vec<(usize, usize)> = Vec::with_capacity(8);
        let numbers = self.runs.iter().flat_map(|run| run.start..run.start + run.len);
        for (index, number) in numbers.enumerate() {
            if !vanished.is_empty() && vanished.contains(&number) {
                // It was unmapped after the scan: the next scan does not find it, and it is forgotten then.
                tally.gone += 1;
                continue;
            }
            let from = index * PAGE;
            let page = &bytes[from..from + PAGE];
            let zero = digest::is_zero(page);
            let content = if zero { digest::ZERO_PAGE } else { digest::page(page) };
            let before = sent.get(number).copied();
            if before == Some(content) {
                tally.unchanged += 1;
                continue;
            }
            sent.insert(number, content);
            if let Some(before) = before.filter(|_| !zero) {
                let page: &delta::Page = page.try_into().expect("a page");
                let base = self.cache.base(place.id, number, &before);
                let start = self.deltas.len();
                let small =
                    base.is_some_and(|base| delta::encode(base, page, &mut self.deltas) <= LONGEST_DELTA);
                // In the freeze nothing is sent again.
                if !frozen {
                    self.cache.keep(place.id, number, page, content, round);
                }
                if small {
                    self.delta_batch.push_on_base(PageNo(number), content, before);
                    tally.delta += 1;
                    tally.sent += 1;
                    continue;
                }
                self.deltas.truncate(start);
            }
            self.batch.push(PageNo(number), zero, content);
            if zero {
                tally.zero += 1;
                continue;
            }
            tally.sent += 1;
            match pieces.last_mut() {
                Some(last) if last.1 == from => last.1 = from + PAGE,
                _ => pieces.push((from, from + PAGE)),
            }
        }
        if !self.delta_batch.is_empty() {
            let start = Instant::now();
            let wire = channel.pages(&self.delta_batch, &[IoSlice::new(&self.deltas)])?;
            self.chooser.observe_link(wire, start.elapsed());
            tally.bytes += wire as u64;
        }
        if self.batch.is_empty() {
            channel.hear_abort()?;
            return Ok(());
        }

        let raw: usize = pieces.iter().map(|(from, to)| to - from).sum();
        let mut packed = false;
        if raw > 0 && self.chooser.compress() {
            // The codec wants its input in one piece.
            let mut at = 0;
            for (from, to) in &mut pieces {
                bytes.copy_within(*from..*to, at);
                at += *to - *from;
            }
            let start = Instant::now();
            self.zstd.encode(1, &bytes[..raw], &mut self.packed)?;
            self.chooser.observe_zstd(raw, self.packed.len(), start.elapsed());
            pieces.clear();
            pieces.push((0, raw));
            if self.packed.len() < raw {
                packed = true;
                self.batch.set_coding(Coding::Zstd);
                tally.compressed += (raw / PAGE) as u64;
            }
        }
        let start = Instant::now();
        let wire = if packed {
            channel.pages(&self.batch, &[IoSlice::new(&self.packed)])?
        } else {
            let slices: Vec<IoSlice<'_>> =
                pieces.iter().map(|(from, to)| IoSlice::new(&bytes[*from..*to])).collect();
            channel.pages(&self.batch, &slices)?
        };
        self.chooser.observe_link(wire, start.elapsed());
        tally.bytes += wire as u64;
        channel.hear_abort()?;
        Ok(())
    }
}
