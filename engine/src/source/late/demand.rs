//! The thread that answers what the destination asks for.

use super::{Debt, End, Wanted, end_of};
use crate::link::{Channel, ChannelError, Incoming, LinkError};
use crate::source::failure::SendError;
use pageferry_tracker::Run;
use pageferry_wire_format::{Coding, ControlMessage, PageBatch, PageDigest, PageNo, PageRun, SpaceId};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::IoSlice;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Pages of an answer at most: what a receiver's socket takes without being read.
const ANSWER: usize = 8;

/// How often the destination hears that this side lives.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

/// Starts it. It gives the connection back when the destination has everything.
pub(super) fn start(debt: &Arc<Debt>, channel: Channel) -> std::io::Result<JoinHandle<Option<Channel>>> {
    let debt = Arc::clone(debt);
    std::thread::Builder::new().name("owed-pages".into()).spawn(move || {
        crate::urgency::hurry();
        channel.link().set_urgent();
        debt.prepare();
        let mut answers = Answers::new(&debt, channel);
        match answers.run() {
            Ok(true) => {
                debt.finish(End::Sealed);
                return Some(answers.channel);
            }
            Ok(false) => {}
            Err(error) => debt.finish(end_of(error)),
        }
        None
    })
}

struct Answers<'a> {
    debt: &'a Debt,
    channel: Channel,
    said: Instant,
    heard: Instant,
    /// The destination was told that this is all.
    sealed: bool,
    bytes: Vec<u8>,
    pages: Vec<(u64, bool, PageDigest)>,
    batch: PageBatch,
}

impl<'a> Answers<'a> {
    fn new(debt: &'a Debt, channel: Channel) -> Self {
        let now = Instant::now();
        Self {
            debt,
            channel,
            said: now,
            heard: now,
            sealed: false,
            bytes: Vec::new(),
            pages: Vec::new(),
            batch: PageBatch::default(),
        }
    }

    /// Answers until the destination has everything, or it is told to end.
    fn run(&mut self) -> Result<bool, SendError> {
        loop {
            if self.debt.stopped() {
                return Ok(false);
            }
            if self.wait()? {
                self.heard = Instant::now();
                if self.hear()? {
                    return Ok(true);
                }
                continue;
            }
            if self.heard.elapsed() > self.channel.link().stall() {
                return Err(ChannelError::from(LinkError::Stalled(self.channel.link().stall())).into());
            }
            if !self.sealed
                && let Some(spaces) = self.debt.all_sent()
            {
                // What was read of a tree that was let go meanwhile is not what the program is owed.
                self.debt.look()?;
                for (space, pages, digest) in &spaces {
                    let message = ControlMessage::LateSeal { space: *space, pages: *pages, digest: *digest };
                    self.channel.control(&message)?;
                }
                self.channel.control(&ControlMessage::LateSealEnd { spaces: spaces.len() as u32 })?;
                self.sealed = true;
            }
            if self.said.elapsed() >= SIGN_OF_LIFE {
                self.said = Instant::now();
                self.channel.control(&ControlMessage::Ping { n: 0 })?;
            }
        }
    }

    /// Waits for a message; false when there is something else to look at.
    fn wait(&self) -> Result<bool, SendError> {
        let second = Timespec { tv_sec: 1, tv_nsec: 0 };
        let mut fds =
            [PollFd::new(self.channel.link(), PollFlags::IN), PollFd::new(&self.debt.alarm, PollFlags::IN)];
        match poll(&mut fds, Some(&second)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(ChannelError::from(LinkError::Lost(errno.into())).into()),
        }
        let message = !fds[0].revents().is_empty();
        if !fds[1].revents().is_empty() {
            let mut count = [0; 8];
            let _ = rustix::io::read(&self.debt.alarm, &mut count);
            return Ok(false);
        }
        Ok(message)
    }

    /// Takes one message. Whether it was the last.
    fn hear(&mut self) -> Result<bool, SendError> {
        match self.channel.receive()? {
            Incoming::Control(ControlMessage::Want { space, runs }) => {
                self.debt.set_answering(true);
                let answered = self.answer(space, &runs);
                self.debt.set_answering(false);
                answered?;
            }
            Incoming::Control(ControlMessage::Unwanted { space, runs }) => {
                self.debt.forget(space, &runs);
                self.debt.alarm();
            }
            Incoming::Control(ControlMessage::Ping { .. }) => {}
            Incoming::Control(ControlMessage::LateSealed { .. }) if self.sealed => return Ok(true),
            Incoming::Control(ControlMessage::Abort { code, detail }) => {
                return Err(ChannelError::Aborted { code, detail }.into());
            }
            other => return Err(SendError::Protocol(format!("{other:?} while pages are owed"))),
        }
        Ok(false)
    }

    /// Sends those of the pages that did not go by this way yet.
    fn answer(&mut self, space: SpaceId, runs: &[PageRun]) -> Result<(), SendError> {
        let wanted: Vec<u64> = runs.iter().flat_map(PageRun::pages).collect();
        for pages in wanted.chunks(ANSWER) {
            let (mut first, mut again) = (Vec::with_capacity(pages.len()), Vec::new());
            for page in pages {
                let runs: &mut Vec<Run> = match self.debt.take_wanted(space, *page) {
                    Wanted::First => &mut first,
                    Wanted::Again => &mut again,
                    Wanted::No => continue,
                };
                match runs.last_mut() {
                    Some(run) if run.end() == *page => run.len += 1,
                    _ => runs.push(Run { start: *page, len: 1 }),
                }
            }
            if !first.is_empty() {
                self.debt.hold_one();
                let sent = self.send(space, &first)?;
                self.debt.note_sent(space, &self.pages, sent, true);
            }
            if !again.is_empty() {
                let sent = self.send(space, &again)?;
                self.debt.note_repeated(&self.pages, sent);
            }
        }
        // Perhaps these were the last.
        self.debt.alarm();
        Ok(())
    }

    fn send(&mut self, space: SpaceId, runs: &[Run]) -> Result<usize, SendError> {
        self.debt.read(space, runs, &mut self.bytes, &mut self.pages)?;
        self.batch.clear(space, super::ROUND, Coding::Raw);
        let mut slices = Vec::with_capacity(self.pages.len());
        for ((page, zero, content), bytes) in self.pages.iter().zip(self.bytes.chunks_exact(super::PAGE)) {
            self.batch.push(PageNo(*page), *zero, *content);
            if !zero {
                slices.push(IoSlice::new(bytes));
            }
        }
        if crate::fault::point("late-demand") == Some(crate::fault::Fault::Cut) {
            self.channel.link().shutdown();
        }
        let sent = self.channel.pages(&self.batch, &slices)?;
        self.said = Instant::now();
        Ok(sent)
    }
}
