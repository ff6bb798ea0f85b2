//! The connections for owed pages: opening them, and having threads at work on them.

use super::serving::{self, Sender, count, serve};
use super::{Debt, DebtSpace, demand, push};
use crate::control::Stage;
use crate::effort::CpuShare;
use crate::journal::{Owed, OwedSpace, Process, Terms};
use crate::link::Channel;
use crate::observe::Observer;
use crate::report::PostCopyReport;
use crate::source::failure::SendError;
use crate::source::precopy::Todo;
use crate::source::{Migration, Phase};
use pageferry_tracker::{self as tracker, Collected, PageReader, PageSet};
use pageferry_wire_format::CodingChooser;
use std::collections::BTreeMap;
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

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
    pub(super) fn start(debt: Arc<Debt>) -> Self {
        Self {
            debt,
            answers: None,
            idle: Vec::new(),
            pushes: Vec::new(),
            handles: Vec::new(),
            closed_bytes: 0,
        }
    }

    pub(super) fn debt(&self) -> &Arc<Debt> {
        &self.debt
    }

    /// Begins to answer on the first of the channels, and keeps the others.
    pub(super) fn answer_on(&mut self, channels: Vec<Channel>) -> Result<(), SendError> {
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
    pub(super) fn push_on(
        &mut self,
        mut chooser: impl FnMut() -> CodingChooser,
        cpu: &CpuShare,
    ) -> Result<(), SendError> {
        let share = cpu.each(self.idle.len());
        for channel in std::mem::take(&mut self.idle) {
            let mut chooser = chooser();
            chooser.set_share(share);
            let thread =
                push::start(&self.debt, channel, chooser, cpu.clone()).map_err(SendError::LateThread)?;
            self.pushes.push(thread);
        }
        Ok(())
    }

    /// Has the threads end, and waits for it. If the destination has everything, gives the connection on which it said so.
    pub(super) fn stop(&mut self, complete: bool) -> Option<Channel> {
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
        serving::join(&mut channel, self.session, stream)?;
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

    /// Writes down what is owed, for whoever goes on if this engine is killed. The destination restores meanwhile, so it takes nothing of
    /// the downtime.
    pub(in crate::source) fn write_down_debt(&mut self) -> Result<(), SendError> {
        let (Some(late), Some(journal)) = (&self.late, &mut self.journal) else { return Ok(()) };
        let streams = self.workers.len().max(1) as u16;
        let terms = Terms::of(self.plan, streams, self.control.limit().rate(), self.control.cpu().percent());
        let spaces = late.debt.spaces.iter().map(|(id, space)| OwedSpace {
            space: id.0,
            process: Process { pid: space.pid, start: space.reader.target().start_time() },
            runs: space.owed.runs().iter().map(|run| (run.start, run.len)).collect(),
        });
        Ok(journal.owe(&Owed { terms, spaces: spaces.collect() })?)
    }

    /// The program runs at the destination: sends what is owed, until the destination has everything.
    pub(in crate::source) fn post_copy(&mut self) -> Result<(), SendError> {
        let Some(mut late) = self.late.take() else { return Ok(()) };
        self.phase = Phase::PostCopy;
        crate::fault::point("post-copy");
        let started = Instant::now();
        self.control.enter(Stage::PostCopy);
        let served = serve(self, &mut late, None);
        let last = late.stop(served.is_ok());
        self.closed_bytes += late.closed_bytes + last.as_ref().map_or(0, |channel| channel.link().sent());
        let counts = late.debt.counts();
        if let Some(report) = &mut self.report.post_copy {
            count(report, counts, started.elapsed());
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

    /// How it went at the destination, over the connection on which it said that it has everything.
    pub(in crate::source) fn hear_filled(&mut self, mut channel: Channel) -> Result<(), SendError> {
        let filled = serving::hear_filled(&mut channel, self.report.post_copy.as_mut(), self.observer)?;
        self.report.fill = Some(filled);
        Ok(())
    }
}

impl Sender for Migration<'_> {
    fn open(&mut self, stream: u16) -> Result<Channel, SendError> {
        self.open_late_one(stream)
    }

    fn streams(&self) -> u16 {
        self.workers.len() as u16
    }

    fn chooser(&self) -> CodingChooser {
        serving::chooser(self.plan.coding, self.control.limit().rate(), self.streams())
    }

    fn cpu(&self) -> &CpuShare {
        self.control.cpu()
    }

    fn patience(&self) -> Duration {
        self.plan.post_copy_timeout
    }

    fn observer(&self) -> &dyn Observer {
        self.observer
    }

    fn progress(&mut self, debt: &Debt) {
        self.control.owed(debt.total(), debt.left());
    }

    fn reconnected(&mut self) {
        if let Some(report) = &mut self.report.post_copy {
            report.reconnections += 1;
        }
    }
}
