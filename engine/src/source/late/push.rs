//! A thread that sends what nobody has asked for yet.
//!
//! It has no less of the processor than others: a page that it has in hand may be waited for by now.

use super::{Debt, end_of};
use crate::effort::{CpuMeter, CpuShare};
use crate::link::Channel;
use crate::policy::headroom::{Carried, Headroom, Pace};
use crate::source::failure::SendError;
use crate::source::tally::Toil;
use pageferry_tracker::Run;
use pageferry_wire_format::{
    Coding, CodingChooser, PageBatch, PageDigest, PageNo, SpaceId, Way, ZstdEncoder,
};
use std::io::IoSlice;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Pages of a batch that goes raw: 128 KiB, a millisecond of a gigabit link, is how long a page that is asked for may have to
/// wait on a link that they share.
const BATCH: u64 = 32;
/// Those of one that is compressed are as many as make these bytes, and so many at most: what is compressed together becomes
/// smaller. Who waits for a page that is being compressed gets it before.
const PACKED_BATCH: u64 = 128;

/// Starts it. It gives the connection back when there is nothing left to send, or it was told to end.
pub(super) fn start(
    debt: &Arc<Debt>,
    channel: Channel,
    chooser: CodingChooser,
    cpu: CpuShare,
) -> std::io::Result<JoinHandle<Channel>> {
    let debt = Arc::clone(debt);
    std::thread::Builder::new().name("owed-bulk".into()).spawn(move || {
        channel.link().set_shallow();
        let zstd = match ZstdEncoder::new() {
            Ok(zstd) => zstd,
            Err(error) => {
                debt.finish(end_of(error.into()));
                return channel;
            }
        };
        let mut push = Push::new(channel, chooser, zstd);
        if let Err(error) = push.run(&debt, CpuMeter::new(&cpu)) {
            debt.finish(end_of(error));
        }
        // Perhaps these were the last.
        debt.alarm();
        push.channel
    })
}

struct Push {
    channel: Channel,
    chooser: CodingChooser,
    zstd: ZstdEncoder,
    bytes: Vec<u8>,
    packed: Vec<u8>,
    plain: Vec<u8>,
    pages: Vec<(u64, bool, PageDigest)>,
    runs: Vec<Run>,
    batch: PageBatch,
    /// What was left of the last batch.
    ratio: f64,
    headroom: Headroom,
    began: Instant,
}

impl Push {
    fn new(channel: Channel, chooser: CodingChooser, zstd: ZstdEncoder) -> Self {
        Self {
            channel,
            chooser,
            zstd,
            bytes: Vec::new(),
            packed: Vec::new(),
            plain: Vec::new(),
            pages: Vec::new(),
            runs: Vec::new(),
            batch: PageBatch::default(),
            ratio: 1.0,
            headroom: Headroom::default(),
            began: Instant::now(),
        }
    }

    fn run(&mut self, debt: &Debt, meter: CpuMeter) -> Result<(), SendError> {
        let (began, before) = (Instant::now(), self.channel.held_up());
        let mut rested = Duration::ZERO;
        let result = self.push(debt, meter, &mut rested);
        let held_up =
            before.zip(self.channel.held_up()).map(|(before, now)| now.saturating_sub(before) + rested);
        debt.note_toil(Toil::of(began.elapsed(), held_up));
        result
    }

    fn push(&mut self, debt: &Debt, mut meter: CpuMeter, rested: &mut Duration) -> Result<(), SendError> {
        while let Some(space) = debt.next(batch_pages(self.ratio), &mut self.runs) {
            self.keep_headroom();
            self.send(debt, space)?;
            let rests = Instant::now();
            meter.pay(|| debt.stopped());
            let rests = rests.elapsed();
            *rested += rests;
            self.chooser.observe_rest(rests);
        }
        // The end of a message that says what was sent must not wait for its turn.
        self.channel.link().set_pace(None);
        Ok(())
    }

    /// Leaves room on the link for what is waited for.
    fn keep_headroom(&mut self) {
        let link = self.channel.link();
        let Some((_, unacknowledged)) = link.left() else { return };
        let acknowledged = link.sent().saturating_sub(unacknowledged);
        match self.headroom.look(self.began.elapsed(), Carried { acknowledged, queued: unacknowledged }) {
            Some(Pace::Free) => link.set_pace(None),
            Some(Pace::Limit(rate)) => link.set_pace(Some(rate)),
            None => {}
        }
    }

    fn send(&mut self, debt: &Debt, space: SpaceId) -> Result<(), SendError> {
        let start = Instant::now();
        debt.read(space, &self.runs, &mut self.bytes, &mut self.pages)?;
        self.batch.clear(space, super::ROUND, Coding::Raw);
        let mut slices = Vec::with_capacity(self.pages.len());
        for ((page, zero, content), bytes) in self.pages.iter().zip(self.bytes.chunks_exact(super::PAGE)) {
            self.batch.push(PageNo(*page), *zero, *content);
            if !zero {
                slices.push(IoSlice::new(bytes));
            }
        }
        self.chooser.observe_work(self.pages.len() * super::PAGE, start.elapsed());
        let raw = slices.len() * super::PAGE;
        self.ratio = 1.0;
        if raw > 0
            && let way @ Way::Zstd(level) = self.chooser.choose(false)
        {
            let start = Instant::now();
            self.plain.clear();
            slices.iter().for_each(|bytes| self.plain.extend_from_slice(bytes));
            self.zstd.encode(level, &self.plain, &mut self.packed)?;
            self.chooser.observe(way, raw, self.packed.len(), start.elapsed());
            if self.packed.len() < raw {
                self.ratio = self.packed.len() as f64 / raw as f64;
                self.batch.set_coding(Coding::Zstd);
                slices = vec![IoSlice::new(&self.packed)];
            }
        }
        if crate::fault::point("late-push") == Some(crate::fault::Fault::Cut) {
            self.channel.link().shutdown();
        }
        let start = Instant::now();
        let sent = self.channel.pages(&self.batch, &slices)?;
        self.chooser.observe_link(sent, start.elapsed());
        debt.note_sent(space, &self.pages, sent, false);
        Ok(())
    }
}

/// How many pages to send together, of which `ratio` is left on the wire.
fn batch_pages(ratio: f64) -> u64 {
    ((BATCH as f64 / ratio) as u64).clamp(BATCH, PACKED_BATCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_takes_the_link_for_as_long_whatever_is_left_of_it() {
        assert_eq!(batch_pages(1.0), BATCH);
        assert_eq!(batch_pages(0.5), 2 * BATCH);
        assert_eq!(batch_pages(0.01), PACKED_BATCH);
        assert_eq!(batch_pages(0.0), PACKED_BATCH);
    }
}
