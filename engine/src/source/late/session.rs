//! The connections for owed pages: opening them, having threads at work on them, and making them anew.

use super::taking_up::{Taken, recount, take_up};
use super::{Debt, DebtSpace, End, demand, push};
use crate::control::Stage;
use crate::link::{Channel, ChannelError};
use crate::observe::Event;
use crate::plan::CodingChoice;
use crate::report::{FaultReport, FillReport, PostCopyReport};
use crate::source::failure::SendError;
use crate::source::precopy::Todo;
use crate::source::{Migration, Phase};
use pageferry_tracker::{self as tracker, Collected, PageReader, PageSet};
use pageferry_wire_format::{Coding, CodingChooser, ControlMessage};
use std::collections::BTreeMap;
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often progress is told.
const TELL: Duration = Duration::from_millis(100);

/// How long to wait between two tries to make the connections anew.
const TRY_AGAIN: Duration = Duration::from_millis(200);

/// Pages around each stack pointer that go along with the program: every thread touches these at once.
const STACK_PAGES: u64 = 2;

/// The threads on the connections for owed pages. Dropping it ends them.
#[derive(Debug)]
pub(in crate::source) struct LateSession {
    debt: Arc<Debt>,
    answers: Option<JoinHandle<Option<Channel>>>,
    /// Connections on which nothing is sent yet.
    idle: Vec<Channel>,
    pushes: Vec<JoinHandle<Channel>>,
    /// By which the connections are ended from here.
    handles: Vec<TcpStream>,
    /// Bytes that went over connections that are closed.
    closed_bytes: u64,
}

impl LateSession {
    fn start(debt: Arc<Debt>) -> Self {
        Self {
            debt,
            answers: None,
            idle: Vec::new(),
            pushes: Vec::new(),
            handles: Vec::new(),
            closed_bytes: 0,
        }
    }

    /// Begins to answer on the first of the channels, and keeps the others.
    fn answer_on(&mut self, channels: Vec<Channel>) -> Result<(), SendError> {
        self.handles = channels
            .iter()
            .map(|channel| channel.link().handle())
            .collect::<Result<_, _>>()
            .map_err(SendError::LateThread)?;
        let mut channels = channels.into_iter();
        let Some(first) = channels.next() else {
            return Err(SendError::Protocol("no connection for owed pages".to_owned()));
        };
        self.idle = channels.collect();
        self.answers = Some(demand::start(&self.debt, first).map_err(SendError::LateThread)?);
        Ok(())
    }

    /// Begins to send what nobody asks for.
    fn push_on(&mut self, mut chooser: impl FnMut() -> CodingChooser) -> Result<(), SendError> {
        for channel in std::mem::take(&mut self.idle) {
            let thread = push::start(&self.debt, channel, chooser()).map_err(SendError::LateThread)?;
            self.pushes.push(thread);
        }
        Ok(())
    }

    /// Has the threads end, and waits for it. If the destination has everything, gives the connection on which it said so.
    fn stop(&mut self, complete: bool) -> Option<Channel> {
        self.debt.halt();
        if !complete {
            for handle in &self.handles {
                let _ = handle.shutdown(Shutdown::Both);
            }
        }
        let last = self.answers.take().and_then(|answers| answers.join().unwrap_or_default());
        for thread in self.pushes.drain(..) {
            if let Ok(channel) = thread.join() {
                self.closed_bytes += channel.link().sent();
            }
        }
        self.closed_bytes += self.idle.drain(..).map(|channel| channel.link().sent()).sum::<u64>();
        self.handles.clear();
        last
    }
}

impl Drop for LateSession {
    fn drop(&mut self) {
        self.stop(false);
    }
}

impl Migration<'_> {
    /// Opens the connections for owed pages, while the program still runs.
    pub(in crate::source) fn open_late(&mut self, most: u16) -> Result<(), SendError> {
        let wanted = (self.workers.len() as u16).min(most).max(1);
        for stream in 0..=wanted {
            let channel = self.open_late_one(stream)?;
            self.late_channels.push(channel);
        }
        Ok(())
    }

    fn open_late_one(&mut self, stream: u16) -> Result<Channel, SendError> {
        let mut channel = self.open_channel()?;
        if self.phase >= Phase::PostCopy {
            channel.link_mut().set_cancel(None);
        }
        channel.control(&ControlMessage::Late { session: self.session, stream })?;
        match channel.answer("a connection for owed pages to be taken")? {
            ControlMessage::Joined => {}
            other => return Err(SendError::Protocol(format!("{other:?} instead of taking a connection"))),
        }
        channel.link_mut().set_stall(self.plan.stall_timeout);
        // The threads on it are ended otherwise.
        channel.link_mut().set_cancel(None);
        if stream > 0 {
            channel.set_shaper(Some(self.control.limit().clone()));
        }
        Ok(channel)
    }

    /// Splits what is due in the freeze: gives what goes along with the program, and owes the rest.
    pub(in crate::source) fn owe(
        &mut self,
        todo: Vec<Todo>,
        collected: &Collected,
    ) -> Result<Vec<Todo>, SendError> {
        let mut spaces = BTreeMap::new();
        let mut now = Vec::with_capacity(todo.len());
        for Todo { key, pages } in todo {
            let Some(scan) = collected.spaces.iter().find(|scan| scan.key.0 == key) else { continue };
            let pid = scan.target.pid();
            let pointers =
                tracker::stack_pointers(&scan.target).map_err(|source| SendError::Stack { pid, source })?;
            let mut near = PageSet::default();
            for page in pointers.into_iter().map(|pointer| pointer / 4096) {
                near.insert(page.saturating_sub(STACK_PAGES), 2 * STACK_PAGES + 1);
            }
            let along = pages.intersect(&near);
            let owed = pages.subtract(&along);
            if !owed.is_empty() {
                let id = self.space(key).place.id;
                // What it has of these is of no use: it drops that when it hears of them.
                let held = scan.populated.subtract(&owed);
                self.books().space(id).retain(&held);
                let reader =
                    PageReader::new(&scan.target).map_err(|source| SendError::Reader { pid, source })?;
                spaces.insert(id, DebtSpace { pid, reader, owed });
            }
            now.push(Todo { key, pages: along });
        }
        let debt = Debt::new(spaces).map_err(SendError::LateThread)?;
        if debt.total() > 0 {
            self.report.post_copy =
                Some(PostCopyReport { owed_pages: debt.total(), ..PostCopyReport::default() });
            self.late = Some(LateSession::start(Arc::new(debt)));
        } else {
            self.late_channels.clear();
        }
        Ok(now)
    }

    /// What is owed, for the seal.
    pub(in crate::source) fn debt(&self) -> Option<Arc<Debt>> {
        self.late.as_ref().map(|late| Arc::clone(&late.debt))
    }

    /// Begins to answer what the destination asks for, which it may do as soon as it restores.
    pub(in crate::source) fn answer_late(&mut self) -> Result<(), SendError> {
        let channels = std::mem::take(&mut self.late_channels);
        match &mut self.late {
            Some(late) => late.answer_on(channels),
            None => Ok(()),
        }
    }

    fn late_chooser(&self) -> impl FnMut() -> CodingChooser + use<> {
        let (coding, bandwidth) = (self.plan.coding, self.control.limit().rate());
        let streams = self.workers.len().max(1) as u64;
        move || {
            let mut chooser = match coding {
                CodingChoice::Auto => CodingChooser::default(),
                CodingChoice::Raw => CodingChooser::only(Coding::Raw),
                CodingChoice::Zstd => CodingChooser::only(Coding::Zstd),
            };
            if let Some(bandwidth) = bandwidth {
                chooser.observe_link((bandwidth / streams) as usize, Duration::from_secs(1));
            }
            chooser
        }
    }

    /// The program runs at the destination: sends what is owed, until the destination has everything.
    pub(in crate::source) fn post_copy(&mut self) -> Result<(), SendError> {
        let Some(mut late) = self.late.take() else { return Ok(()) };
        self.phase = Phase::PostCopy;
        crate::fault::point("post-copy");
        let started = Instant::now();
        self.control.enter(Stage::PostCopy);
        let served = self.serve(&mut late);
        let last = late.stop(served.is_ok());
        self.closed_bytes += late.closed_bytes + last.as_ref().map_or(0, |channel| channel.link().sent());
        let counts = late.debt.counts();
        if let Some(report) = &mut self.report.post_copy {
            report.demanded_pages = counts.demanded;
            report.pushed_pages = counts.pushed;
            report.repeated_pages = counts.repeated;
            report.zero_pages = counts.zero;
            report.sent_bytes = counts.bytes;
            report.duration_us = started.elapsed().as_micros() as u64;
        }
        if let Err(error) = served {
            let (total, left) = (late.debt.total(), late.debt.left());
            self.late = Some(late);
            return Err(SendError::Owing { left, total, source: Box::new(error) });
        }
        self.phase = Phase::Committed;
        self.control.enter(Stage::Committed);
        self.late_last = last;
        Ok(())
    }

    fn serve(&mut self, late: &mut LateSession) -> Result<(), SendError> {
        let debt = Arc::clone(&late.debt);
        let mut taken: Option<Taken> = None;
        loop {
            late.push_on(self.late_chooser())?;
            let recounted = taken.take().map_or(Ok(()), |taken| recount(&debt, &taken));
            let end = match recounted {
                Err(error) => End::Failed(error),
                Ok(()) => loop {
                    if let Some(end) = debt.wait_end(TELL) {
                        break end;
                    }
                    let (left_pages, counts) = (debt.left(), debt.counts());
                    self.control.owed(debt.total(), left_pages);
                    self.observer.event(&Event::Owed {
                        left_pages,
                        total_pages: debt.total(),
                        demanded_pages: counts.demanded,
                        sent_bytes: counts.bytes,
                    });
                },
            };
            match end {
                End::Sealed => return Ok(()),
                End::Failed(error) => return Err(error),
                End::Lost(error) => {
                    late.stop(false);
                    let text = format!("the connections for owed pages were lost: {}", error.chain());
                    self.observer.event(&Event::Warning { text });
                    taken = Some(self.take_up(late)?);
                }
            }
        }
    }

    /// Makes the connections anew, as soon as it can be done.
    fn take_up(&mut self, late: &mut LateSession) -> Result<Taken, SendError> {
        let end = Instant::now() + self.plan.post_copy_timeout;
        loop {
            let failed = match self.try_to_take_up(late) {
                Ok(taken) => {
                    if let Some(report) = &mut self.report.post_copy {
                        report.reconnections += 1;
                    }
                    return Ok(taken);
                }
                Err(SendError::Channel(error @ (ChannelError::Link(_) | ChannelError::Frame(_)))) => {
                    error.into()
                }
                Err(error) => return Err(error),
            };
            if Instant::now() >= end {
                return Err(failed);
            }
            std::thread::sleep(TRY_AGAIN);
        }
    }

    fn try_to_take_up(&mut self, late: &mut LateSession) -> Result<Taken, SendError> {
        let mut first = self.open_late_one(0)?;
        let taken = take_up(&late.debt, &mut first)?;
        let mut channels = vec![first];
        for stream in 1..=self.workers.len() as u16 {
            channels.push(self.open_late_one(stream)?);
        }
        late.answer_on(channels)?;
        Ok(taken)
    }

    /// How it went at the destination, over the connection on which it said that it has everything.
    pub(in crate::source) fn hear_filled(&mut self, mut channel: Channel) -> Result<(), SendError> {
        loop {
            match channel.answer("the times of page faults")? {
                ControlMessage::FaultTimes { count, p50_us, p99_us, max_us } => {
                    if let Some(report) = &mut self.report.post_copy {
                        report.faults = FaultReport { count, p50_us, p99_us, max_us };
                    }
                    break;
                }
                // It has confirmed that it has everything. Some receivers ask once more for a page that a thread begins to wait
                // for before it is in place: it comes there without our doing.
                ControlMessage::Want { .. } | ControlMessage::Unwanted { .. } => {}
                other => {
                    let text = format!("{other:?} instead of times of page faults");
                    return Err(SendError::Protocol(text));
                }
            }
        }
        match channel.answer("the destination to have every page in place")? {
            ControlMessage::Filled { pages, prefilled_pages, faults, max_fault_us, duration_us } => {
                self.observer.event(&Event::Filled { pages, faults, max_fault_us });
                self.report.fill =
                    Some(FillReport { pages, prefilled_pages, faults, max_fault_us, duration_us });
                Ok(())
            }
            other => Err(SendError::Protocol(format!("{other:?} instead of filled"))),
        }
    }
}
