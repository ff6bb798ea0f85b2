//! The page server's end of late connection 0: asking for owed pages that threads wait for, taking what comes, and saying when
//! nothing is owed any more.

use super::FillStats;
use crate::destination::failure::ReceiveError;
use crate::destination::late::{Arrived, Late, LateSpace};
use crate::link::{Channel, ChannelError, Incoming, LinkError};
use crate::page_bits::PageBits;
use pageferry_tracker::Run;
use pageferry_wire_format::{ControlMessage, OwedBatch, PageNo, PageRun, SpaceId, limits};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often the source hears that this side lives, when there is nothing else to say.
pub(super) const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

/// How long the end of a message may take whose beginning is there.
const REST: Duration = Duration::from_micros(100);

/// Runs in one message.
const RUNS: usize = 4096;

#[derive(Debug)]
pub(super) struct Demand {
    late: Arc<Late>,
    channel: Option<Channel>,
    /// Of a connection that took the place of another: the source has not asked yet what is owed, and must hear that first.
    waits: bool,
    connections: u32,
    /// Asked for over this connection.
    asked: BTreeMap<SpaceId, PageBits>,
    /// To be asked for.
    wanted: BTreeMap<SpaceId, PageBits>,
    unwanted: BTreeMap<SpaceId, Vec<Run>>,
    said: Instant,
    /// The source was told over this connection that nothing is owed.
    told: bool,
    /// The beginning of a message is there, and not its end.
    partial: bool,
}

impl Demand {
    pub(super) fn new(late: Arc<Late>) -> Self {
        Self {
            late,
            channel: None,
            waits: false,
            connections: 0,
            asked: BTreeMap::new(),
            wanted: BTreeMap::new(),
            unwanted: BTreeMap::new(),
            said: Instant::now(),
            told: false,
            partial: false,
        }
    }

    /// Whether the source has to hear first what is owed.
    pub(super) fn waits(&self) -> bool {
        self.waits
    }

    /// What to poll.
    pub(super) fn channel(&self) -> Option<&Channel> {
        self.channel.as_ref().filter(|_| !self.partial)
    }

    /// How long a wait may last.
    pub(super) fn patience(&self) -> Option<Duration> {
        self.channel.as_ref().map(|_| if self.partial { REST } else { SIGN_OF_LIFE })
    }

    pub(super) fn late(&self) -> &Late {
        &self.late
    }

    /// A connection, the first or instead of one that was lost.
    pub(super) fn connected(&mut self, channel: Channel) {
        self.channel = Some(channel);
        self.waits = self.connections > 0;
        self.connections += 1;
        self.asked.clear();
        // The source hears of these in the answer to its question.
        self.unwanted.clear();
        (self.told, self.partial, self.said) = (false, false, Instant::now());
    }

    /// A thread waits for the page.
    pub(super) fn want(&mut self, space: SpaceId, page: u64) {
        if !self.asked.get(&space).is_some_and(|asked| asked.has(page)) {
            self.wanted.entry(space).or_default().insert(page, 1);
        }
    }

    /// The program gave back pages, some of which may be owed.
    pub(super) fn forget(&mut self, space: SpaceId, pages: &[Run]) {
        let gone = self.late.forget(space, pages);
        if !gone.is_empty() {
            self.unwanted.entry(space).or_default().extend(gone);
        }
    }

    /// Says what is to be said.
    pub(super) fn speak(&mut self) {
        if self.channel.is_none() || self.waits {
            return;
        }
        if let Err(error) = self.try_to_speak() {
            self.lose(error.into());
        }
    }

    fn try_to_speak(&mut self) -> Result<(), ChannelError> {
        if self.told {
            // The last pages are in the store, and on their way into place. A thread may begin to wait for one of them
            // just then: the source has said farewell to them, and is waiting for other words.
            self.wanted.clear();
            self.unwanted.clear();
        }
        let Some(channel) = &mut self.channel else { return Ok(()) };
        for (space, pages) in std::mem::take(&mut self.wanted) {
            for runs in wire(&pages.runs()).chunks(RUNS) {
                channel.control(&ControlMessage::Want { space, runs: runs.to_vec() })?;
            }
            let asked = self.asked.entry(space).or_default();
            pages.runs().iter().for_each(|run| asked.insert(run.start, run.len));
            self.said = Instant::now();
        }
        for (space, runs) in std::mem::take(&mut self.unwanted) {
            say_unwanted(channel, space, runs.into_iter().collect())?;
            self.said = Instant::now();
        }
        if self.said.elapsed() >= SIGN_OF_LIFE {
            channel.control(&ControlMessage::Ping { n: 0 })?;
            self.said = Instant::now();
        }
        Ok(())
    }

    /// Takes everything that has come whole. Says what pages there are now; whether everything that is waited for is to be asked for anew.
    pub(super) fn hear(&mut self, arrived: &mut Vec<Arrived>) -> bool {
        let mut anew = false;
        self.partial = false;
        while let Some(channel) = &mut self.channel {
            let heard = match channel.whole_frame_waits() {
                Ok(true) => hear_one(&self.late, channel),
                Ok(false) => {
                    self.partial = channel.link().readable();
                    break;
                }
                Err(error) => Err(error.into()),
            };
            match heard {
                Ok(Heard::Nothing) => {}
                Ok(Heard::Pages(pages)) => arrived.push(pages),
                Ok(Heard::TakenUp) => (self.waits, anew) = (false, true),
                Err(error) => self.lose(error),
            }
        }
        if self.channel.is_some()
            && self.late.silence() > self.channel.as_ref().map_or(Duration::MAX, |c| c.link().stall())
        {
            self.lose(LinkError::Stalled(self.late.silence()).into());
        }
        anew
    }

    /// Whether nothing is owed any more, and the source has been told so, if it could be.
    pub(super) fn settled(&mut self) -> bool {
        if self.told {
            return true;
        }
        let complete = match self
            .late
            .with_books(|books| (books.is_complete(), books.spaces().count() > 0, books.came()))
        {
            (Ok(complete), owing, came) => complete.then_some((owing, came)),
            (Err(error), ..) => {
                self.lose(error.into());
                None
            }
        };
        match complete {
            None => false,
            Some((false, _)) => true,
            Some((true, pages)) => {
                if let Some(channel) = &mut self.channel
                    && let Err(error) = channel.control(&ControlMessage::LateSealed { pages })
                {
                    self.lose(error.into());
                }
                self.told = true;
                crate::fault::point("dest-late-sealed");
                true
            }
        }
    }

    /// The connection is of no use any more. The source comes back over another, unless something else than a link has failed.
    fn lose(&mut self, error: ReceiveError) {
        tracing::warn!(error = %error.chain(), "the connection over which pages are asked for has ended");
        let Some(mut channel) = self.channel.take() else { return };
        if error.is_passing() {
            channel.link().shutdown();
            return;
        }
        let abort = (!matches!(error, ReceiveError::SourceAborted { .. }))
            .then(|| ControlMessage::abort(error.code(), &error.chain()));
        // It is true here before the source hears of it.
        self.late.fail(error);
        if let Some(abort) = abort {
            channel.link_mut().set_stall(Duration::from_millis(200));
            let _ = channel.control(&abort);
        }
    }

    /// Everything is in place: gives the connection to those who say so.
    pub(super) fn take_channel(&mut self) -> Option<Channel> {
        self.channel.take()
    }
}

/// What one message came to.
pub(super) enum Heard {
    Nothing,
    Pages(Arrived),
    /// The source knows what is owed.
    TakenUp,
}

/// Takes one message.
pub(super) fn hear_one(late: &Late, channel: &mut Channel) -> Result<Heard, ReceiveError> {
    late.hear();
    match channel.receive()? {
        Incoming::Pages(payload) => Ok(Heard::Pages(late.pages(channel, payload)?)),
        Incoming::Control(ControlMessage::TakeUp) => {
            say_owed(late, channel)?;
            Ok(Heard::TakenUp)
        }
        Incoming::Control(ControlMessage::LateSeal { space, pages, digest }) => {
            late.with_books(|books| books.seal(space, pages, digest))?;
            Ok(Heard::Nothing)
        }
        Incoming::Control(ControlMessage::LateSealEnd { spaces }) => {
            late.with_books(|books| books.end_seals(spaces))?;
            Ok(Heard::Nothing)
        }
        Incoming::Control(ControlMessage::Ping { .. }) => Ok(Heard::Nothing),
        Incoming::Control(ControlMessage::Abort { code, detail }) => {
            Err(ReceiveError::SourceAborted { code, detail })
        }
        other => Err(ReceiveError::Unexpected(format!("{other:?} over the connection for owed pages"))),
    }
}

/// Answers a source that takes the post-copy up again.
fn say_owed(late: &Late, channel: &mut Channel) -> Result<(), ReceiveError> {
    late.with_books(|books| {
        let mut spaces = 0;
        for (space, LateSpace { vpid, owed, unwanted, pages, digest, .. }) in books.spaces() {
            let runs = wire(&owed.runs());
            let count = runs.chunks(limits::MAX_RUNS_PER_FRAME).count();
            for (index, runs) in runs.chunks(limits::MAX_RUNS_PER_FRAME).enumerate() {
                channel.owed(&OwedBatch { space, runs: runs.to_vec(), more: index + 1 < count })?;
            }
            say_unwanted(channel, space, unwanted.runs())?;
            channel.control(&ControlMessage::Taken { space, vpid: *vpid, pages: *pages, digest: *digest })?;
            spaces += 1;
        }
        Ok(channel.control(&ControlMessage::TakenUp { spaces })?)
    })
}

fn say_unwanted(channel: &mut Channel, space: SpaceId, runs: Vec<Run>) -> Result<(), ChannelError> {
    // In order, and apart: as a message has to be.
    let runs = runs.into_iter().collect::<PageBits>().runs();
    for runs in wire(&runs).chunks(RUNS) {
        channel.control(&ControlMessage::Unwanted { space, runs: runs.to_vec() })?;
    }
    Ok(())
}

fn wire(runs: &[Run]) -> Vec<PageRun> {
    runs.iter().map(|run| PageRun { start: PageNo(run.start), len: run.len }).collect()
}

/// Says that everything is in place, until the source has heard it or does not come back. Whether it has.
pub(crate) fn say_filled(
    late: &Late,
    mut channel: Option<Channel>,
    stats: &FillStats,
    patience: Duration,
) -> bool {
    let end = Instant::now() + patience;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let Some(mut open) = channel.take().or_else(|| late.next_demand(left)) else { return false };
        if say_to(late, &mut open, stats).is_ok() && open.link_mut().close_gently(Duration::from_secs(2)) {
            return true;
        }
        open.link().shutdown();
    }
}

fn say_to(late: &Late, channel: &mut Channel, stats: &FillStats) -> Result<(), ReceiveError> {
    // A source that came back wants to compare first.
    if !late.with_books(|books| books.is_complete())? {
        while !late.with_books(|books| books.is_complete())? {
            hear_one(late, channel)?;
        }
        let pages = late.with_books(|books| books.came());
        channel.control(&ControlMessage::LateSealed { pages })?;
    }
    let us = |time: Duration| time.as_micros() as u64;
    let waited = &stats.waited;
    channel.control(&ControlMessage::FaultTimes {
        count: waited.count(),
        p50_us: us(waited.quantile(0.5)),
        p99_us: us(waited.quantile(0.99)),
        max_us: us(waited.max()),
    })?;
    Ok(channel.control(&stats.message())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::TcpLink;
    use pageferry_wire_format::SpaceDigest;

    const SPACE: SpaceId = SpaceId(3);

    /// All that is owed has come, or is not wanted.
    fn complete() -> Arc<Late> {
        let late = Arc::new(Late::new(7, Duration::from_secs(60)));
        let owed = Run { start: 10, len: 5 };
        late.with_books(|books| books.owe(SPACE, 1, std::iter::once(owed)));
        late.forget(SPACE, &[owed]);
        late.with_books(|books| {
            books.seal(SPACE, 0, SpaceDigest::default())?;
            books.end_seals(1)
        })
        .unwrap();
        late
    }

    #[test]
    fn after_the_word_that_nothing_is_owed_nothing_is_asked_for() {
        let (here, there) = TcpLink::pair().unwrap();
        let mut source = Channel::new(there);
        let mut demand = Demand::new(complete());
        demand.connected(Channel::new(here));
        // A thread waits for a page that has come and that the page server has not heard of.
        assert!(demand.settled());
        demand.want(SPACE, 12);
        demand.forget(SPACE, &[Run { start: 13, len: 1 }]);
        demand.speak();
        demand.take_channel().unwrap().control(&ControlMessage::Ping { n: 1 }).unwrap();
        let heard: Vec<_> =
            std::iter::from_fn(|| source.receive().ok()).map(|said| format!("{said:?}")).collect();
        assert_eq!(heard, ["Control(LateSealed { pages: 0 })", "Control(Ping { n: 1 })"]);
    }

    #[test]
    fn before_it_what_a_thread_waits_for_is_asked_for() {
        let (here, there) = TcpLink::pair().unwrap();
        let mut source = Channel::new(there);
        let late = Arc::new(Late::new(7, Duration::from_secs(60)));
        late.with_books(|books| books.owe(SPACE, 1, std::iter::once(Run { start: 10, len: 5 })));
        let mut demand = Demand::new(late);
        demand.connected(Channel::new(here));
        assert!(!demand.settled());
        demand.want(SPACE, 12);
        demand.speak();
        let wanted = vec![PageRun { start: PageNo(12), len: 1 }];
        assert_eq!(source.answer("a wish").unwrap(), ControlMessage::Want { space: SPACE, runs: wanted });
    }
}
