//! Going on in place of an engine that was killed while pages were owed.
//!
//! What it knew is written down ([`crate::journal::Owed`]): which pages were owed in the beginning, and of which processes. These stand here, stopped
//! since the freeze. What has come of it the destination knows; it says so as it does after a lost link, and that is compared with
//! what is read here.

use super::serving::{self, Sender, connect_anew, count, hear_filled, serve};
use super::session::LateSession;
use super::{Debt, DebtSpace};
use crate::effort::CpuShare;
use crate::journal::{Owed, Terms};
use crate::link::{Channel, ChannelError, SharedShaper, TcpLink};
use crate::observe::{Event, Observer};
use crate::report::PostCopyReport;
use crate::source::failure::SendError;
use pageferry_tracker::{PageReader, Run, Stillness, Target};
use pageferry_wire_format::{CodingChooser, SpaceId};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What an engine has left that owed pages.
pub(crate) struct Orphaned<'a> {
    pub(crate) session: u128,
    pub(crate) program: &'a str,
    /// The receiver.
    pub(crate) to: SocketAddr,
    pub(crate) owed: Owed,
    /// The processes that are still there, and how they stood when they were taken up.
    pub(crate) tree: Vec<(Target, Stillness)>,
    /// How long to try to reach the receiver at first.
    pub(crate) patience: Duration,
    pub(crate) observer: &'a dyn Observer,
}

struct Successor<'a> {
    session: u128,
    to: SocketAddr,
    terms: Terms,
    limit: SharedShaper,
    cpu: CpuShare,
    patience: Duration,
    observer: &'a dyn Observer,
    reconnections: u32,
}

impl Orphaned<'_> {
    /// Sends what is owed until every page is in place at the destination.
    ///
    /// # Errors
    /// [`SendError`]; the copy here is as it was.
    pub(crate) fn serve(self) -> Result<PostCopyReport, SendError> {
        let Self { session, program, to, owed: Owed { terms, spaces }, tree, patience, observer } = self;
        let mut debts = BTreeMap::new();
        for space in spaces {
            let is_it = |(target, _): &&(Target, Stillness)| {
                (target.pid(), target.start_time()) == (space.process.pid, space.process.start)
            };
            let pid = space.process.pid;
            let (target, _) = tree.iter().find(is_it).ok_or(SendError::NotStanding { pid })?;
            let reader = PageReader::new(target).map_err(|source| SendError::Reader { pid, source })?;
            let owed = space.runs.into_iter().map(|(start, len)| Run { start, len }).collect();
            debts.insert(SpaceId(space.space), DebtSpace { pid, reader, owed });
        }
        let debt = Debt::new(debts).map_err(SendError::LateThread)?.standing(tree);
        debt.look()?;
        let started = Instant::now();
        let mut late = LateSession::start(Arc::new(debt));
        let (limit, cpu) = (SharedShaper::new(terms.bandwidth), CpuShare::new(terms.cpu));
        let mut successor =
            Successor { session, to, terms, limit, cpu, patience, observer, reconnections: 0 };
        let taken = connect_anew(&mut successor, &mut late)?;
        successor.patience = successor.terms.post_copy_timeout();
        observer.event(&Event::GoesOn {
            program: program.to_owned(),
            to,
            left_pages: late.debt().left(),
            total_pages: late.debt().total(),
        });
        let served = serve(&mut successor, &mut late, Some(taken));
        let last = late.stop(served.is_ok());
        let (total, left) = (late.debt().total(), late.debt().left());
        served.map_err(|error| SendError::Owing { left, total, source: Box::new(error) })?;
        let mut report = PostCopyReport {
            owed_pages: total,
            reconnections: successor.reconnections,
            ..PostCopyReport::default()
        };
        count(&mut report, late.debt().counts(), started.elapsed());
        let mut last = last.ok_or_else(|| SendError::Protocol("nothing more of what it had".to_owned()))?;
        hear_filled(&mut last, Some(&mut report), observer)?;
        Ok(report)
    }
}

impl Sender for Successor<'_> {
    fn open(&mut self, stream: u16) -> Result<Channel, SendError> {
        let mut link = TcpLink::connect(self.to, self.terms.connect_timeout()).map_err(ChannelError::from)?;
        if let Some(name) = &self.terms.congestion {
            link.set_congestion(name)
                .map_err(|source| SendError::Congestion { name: name.clone(), source })?;
        }
        link.set_stall(self.terms.connect_timeout());
        let mut channel = Channel::new(link);
        serving::join(&mut channel, self.session, stream)?;
        channel.link_mut().set_stall(self.terms.stall_timeout());
        if stream > 0 {
            channel.set_shaper(Some(self.limit.clone()));
        }
        Ok(channel)
    }

    fn streams(&self) -> u16 {
        self.terms.streams
    }

    fn chooser(&self) -> CodingChooser {
        serving::chooser(self.terms.coding, self.terms.bandwidth, self.terms.streams)
    }

    fn cpu(&self) -> &CpuShare {
        &self.cpu
    }

    fn patience(&self) -> Duration {
        self.patience
    }

    fn observer(&self) -> &dyn Observer {
        self.observer
    }

    fn progress(&mut self, _debt: &Debt) {}

    fn reconnected(&mut self) {
        self.reconnections += 1;
    }
}
