//! The receiving side of a migration.

mod control;
mod failure;
mod guard;
mod hub;
mod keep;
pub(crate) mod late;
mod network;
mod pieces;
mod receive;
mod rejoin;
mod restore;
pub(crate) mod serve;
pub(crate) mod sessions;
pub(crate) mod store;
pub(crate) mod sys;
mod verify;

pub use control::ReceiverControl;

use crate::control::ReceiverStage;
use crate::effort::Effort;
use crate::error::{CopyState, FailureKind};
use crate::journal::{self, Journal, Role, Step};
use crate::kept::{KeptPages, KeptStore};
use crate::link::{Channel, Incoming, LinkError, TcpLink};
use crate::observe::Event;
use crate::{Cancel, MigrationError, Observer, ReceivePlan};
use failure::ReceiveError;
use hub::Hub;
use keep::Keeper;
use late::Late;
use network::Arrival;
use pageferry_criu_glue::{Criu, ImageDir, Restore, RestoreOptions, TcpPolicy};
use pageferry_wire_format::{self as wire, AbortCode, ControlMessage, HandoverState, Hello, Welcome};
use receive::Reception;
use restore::Rebirth;
use rustix::event::{PollFd, PollFlags, poll};
use serve::Server;
use sessions::{BeginError, GivenUp, Sessions};
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};
use store::PageStore;

/// How long a stranger may take to say what it wants.
const FIRST_WORD: Duration = Duration::from_secs(5);
/// How long a session that is held for its link may take to be gone, when its source has begun anew.
const GIVE_WAY: Duration = Duration::from_secs(4);
/// How long to wait for the outcome of an accepted commit before answering that it is not known yet.
const OUTCOME: Duration = Duration::from_secs(2);

/// A destination that listens for migrations.
#[derive(Debug)]
pub struct Receiver {
    listener: TcpListener,
    address: SocketAddr,
    host: Host,
}

/// What a destination needs to receive a migration over a connection that it has.
#[derive(Debug)]
pub(crate) struct Host {
    plan: ReceivePlan,
    criu: Criu,
    sessions: Sessions,
    control: ReceiverControl,
    /// Why nobody is nice although it was asked for.
    not_nice: Option<std::io::Error>,
    /// Where further connections of the session under way find it.
    hub: Mutex<Option<Arc<Hub>>>,
    /// Where connections for owed pages find it.
    late: Mutex<Option<Arc<Late>>>,
    /// The store of the next session, with its memory made ready, if the plan says so.
    standby: Mutex<Option<PageStore>>,
    /// What is copied from instead of a kept store: pages that sources know without being told.
    base: Option<Arc<KeptPages>>,
}

/// Connections that are talked to at a time: one migrates, the others ask.
const CONNECTIONS: usize = 48;

/// How a session ended.
struct End {
    session: u128,
    /// `None`: the program runs here, and all of it is in place. Otherwise nothing is left.
    failure: Option<ReceiveError>,
    /// The sender may not know, and may come back to ask.
    unclear: bool,
}

impl Receiver {
    /// Takes the address and checks that this machine could restore a program at all.
    ///
    /// # Errors
    /// A plan that makes no sense, missing privileges, a missing CRIU, an address that is taken.
    pub fn bind(plan: ReceivePlan) -> Result<Self, MigrationError> {
        const PHASE: &str = "preparing to receive";
        plan.validate().map_err(|error| {
            let mut refused = MigrationError::refused(PHASE, error)
                .with_help("listen on a loopback address, or say --insecure if everybody who can reach the address is trusted");
            refused.kind = FailureKind::Usage;
            refused
        })?;
        let address = plan.listen;
        let host = Host::new(plan, PHASE)?;
        let listen =
            |error: std::io::Error| MigrationError::refused(format!("listening on {address}"), error);
        let listener = TcpListener::bind(address).map_err(listen)?;
        listener.set_nonblocking(true).map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        host.stand_by().map_err(|error| {
            MigrationError::refused(PHASE, error).with_help("ask for less memory with --standby")
        })?;
        Ok(Self { listener, address, host })
    }

    /// The address that is listened on.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// A handle by which what it may take can be changed while it runs.
    pub fn control(&self) -> ReceiverControl {
        self.host.control.clone()
    }

    /// Receives migrations, one at a time, until cancelled; with `once`, until the first one has ended.
    ///
    /// A cancellation gives up a session that is not committed; one that is committed is brought to its end
    /// first, because the program lives here then and needs its pages.
    ///
    /// # Errors
    /// With `once`: what became of that session, if the program does not run here. Without: only when the
    /// listening socket fails; failures of sessions are told to the observer.
    pub fn serve(&self, once: bool, observer: &dyn Observer, cancel: &Cancel) -> Result<(), MigrationError> {
        for text in crate::network::traces::clean() {
            observer.event(&Event::Warning { text });
        }
        if let Some(error) = &self.host.not_nice {
            let text = format!("the engine keeps its priority, because it could not get it back: {error}");
            observer.event(&Event::Warning { text });
        }
        observer.event(&Event::Listening { on: self.address });
        std::thread::scope(|scope| {
            let (ended, ends) = mpsc::channel::<Option<End>>();
            let mut open = 0usize;
            // With `once`: what is returned, and until when questions about it are still answered.
            let mut last: Option<(End, Instant)> = None;
            loop {
                while let Ok(end) = ends.try_recv() {
                    open -= 1;
                    if !once
                        && end.is_some()
                        && let Err(error) = self.host.stand_by()
                    {
                        let text = format!("no memory is made ready for the next migration: {error}");
                        observer.event(&Event::Warning { text });
                    }
                    if once && let Some(end) = end {
                        let linger = if end.unclear { self.host.plan.stall_timeout } else { Duration::ZERO };
                        last = Some((end, Instant::now() + linger));
                    }
                }
                if let Some((end, until)) = last.take_if(|(end, until)| {
                    open == 0 && (Instant::now() >= *until || self.host.sessions.was_asked(end.session))
                }) {
                    let _ = until;
                    return end.into_result();
                }
                if cancel.is_cancelled() && open == 0 && last.is_none() {
                    return if once { Err(interrupted()) } else { Ok(()) };
                }
                let mut fds = vec![PollFd::new(&self.listener, PollFlags::IN)];
                // Short, because a session's end is not a descriptor.
                let tick = rustix::event::Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
                match poll(&mut fds, Some(&tick)) {
                    Ok(0) | Err(rustix::io::Errno::INTR) => continue,
                    Ok(_) => {}
                    Err(errno) => {
                        return Err(MigrationError::refused("listening", std::io::Error::from(errno)));
                    }
                }
                let Ok((stream, from)) = self.listener.accept() else { continue };
                if open >= CONNECTIONS || cancel.is_cancelled() {
                    continue;
                }
                open += 1;
                let ended = ended.clone();
                scope.spawn(move || {
                    let first = TcpLink::new(stream).ok().and_then(|link| self.host.first_word(link, cancel));
                    let end = first.map(|(channel, hello)| {
                        observer.event(&Event::Accepted { from, program: hello.program.clone() });
                        self.host.session(channel, hello, observer, cancel)
                    });
                    let _ = ended.send(end);
                });
            }
        })
    }
}

impl Host {
    /// Checks that this machine could restore a program at all.
    pub(crate) fn new(plan: ReceivePlan, phase: &str) -> Result<Self, MigrationError> {
        if !nix::unistd::geteuid().is_root() {
            return Err(
                MigrationError::refused(phase, "restoring a program needs root").with_help("run it as root")
            );
        }
        if let Some(dir) = &plan.keep_store {
            // A directory that cannot be used is found out now.
            KeptStore::open(dir).map_err(|error| MigrationError::refused(phase, error))?;
        }
        let criu = Criu::find(plan.criu.as_deref()).map_err(|error| {
            MigrationError::refused(phase, error).with_help("`pageferry check` shows what is missing here")
        })?;
        let effort = Effort::new(plan.cpu, plan.nice);
        let not_nice = effort.check().err();
        let control = ReceiverControl::new(&plan, effort);
        Ok(Self {
            plan,
            criu,
            sessions: Sessions::default(),
            control,
            not_nice,
            hub: Mutex::default(),
            late: Mutex::default(),
            standby: Mutex::default(),
            base: None,
        })
    }

    /// Sessions bring what is on top of these pages, which their sources know already.
    pub(crate) fn on_top_of(self, base: Arc<KeptPages>) -> Self {
        Self { base: Some(base), ..self }
    }

    /// Begins to make memory ready for the next session.
    fn stand_by(&self) -> Result<(), store::StoreError> {
        if self.plan.standby == 0 {
            return Ok(());
        }
        let store = self.control.new_store()?;
        store.reserve(self.plan.standby)?;
        *self.standby.lock().unwrap_or_else(PoisonError::into_inner) = Some(store);
        Ok(())
    }

    /// Receives the one migration that comes over `link`. `None` when none began.
    pub(crate) fn receive_over(
        &self,
        link: TcpLink,
        observer: &dyn Observer,
        cancel: &Cancel,
    ) -> Option<Result<(), MigrationError>> {
        let (channel, hello) = self.first_word(link, cancel)?;
        Some(self.session(channel, hello, observer, cancel).into_result())
    }

    /// Hears what a new connection wants. Questions about sessions are answered here; a migration that cannot
    /// begin is refused here.
    fn first_word(&self, mut link: TcpLink, cancel: &Cancel) -> Option<(Channel, Hello)> {
        link.set_stall(FIRST_WORD);
        link.set_cancel(Some(cancel.clone()));
        let mut channel = Channel::new(link);
        match channel.receive() {
            Ok(Incoming::Control(ControlMessage::Hello(hello))) => {
                let refused = match wire::version::negotiate(&hello.versions) {
                    None => Err(ReceiveError::Version {
                        theirs: format!("{:?}", hello.versions),
                        ours: format!("{:?}", wire::version::supported()),
                    }),
                    Some(_) => self.begin(&hello, channel.link()),
                };
                match refused {
                    Ok(()) => return Some((channel, hello)),
                    Err(error) => refuse(&mut channel, &error),
                }
            }
            Ok(Incoming::Control(ControlMessage::Join { session, stream })) => {
                let hub = self.hub.lock().unwrap_or_else(PoisonError::into_inner).clone();
                match hub.filter(|hub| hub.session() == session) {
                    Some(hub) => hub.serve(channel, stream),
                    None => refuse(&mut channel, &ReceiveError::UnknownSession),
                }
            }
            Ok(Incoming::Control(ControlMessage::Rejoin { session })) => {
                let hub = self.hub.lock().unwrap_or_else(PoisonError::into_inner).clone();
                let taken = match hub.filter(|hub| hub.session() == session) {
                    Some(hub) => hub.rejoin(channel),
                    None => Err(Box::new(channel)),
                };
                if let Err(mut channel) = taken {
                    refuse(&mut channel, &ReceiveError::UnknownSession);
                }
            }
            Ok(Incoming::Control(ControlMessage::Late { session, stream })) => {
                let late = self.late.lock().unwrap_or_else(PoisonError::into_inner).clone();
                match late.filter(|late| late.session() == session) {
                    Some(late) => late.serve(channel, stream),
                    None => refuse(&mut channel, &ReceiveError::UnknownSession),
                }
            }
            Ok(Incoming::Control(ControlMessage::Query { session })) => {
                let end = Instant::now() + OUTCOME;
                let state = loop {
                    match self.what_became(session) {
                        HandoverState::ReadyToRun if Instant::now() < end => {
                            std::thread::sleep(Duration::from_millis(10));
                        }
                        state => break state,
                    }
                };
                let _ = channel.control(&ControlMessage::State(state));
                channel.link_mut().close_gently(Duration::from_millis(200));
            }
            Ok(other) => refuse(&mut channel, &ReceiveError::Unexpected(format!("{other:?}"))),
            Err(error) => refuse(&mut channel, &error.into()),
        }
        None
    }

    /// Begins a session, unless another one is under way. One that is held only for its link gives way to its own source: an engine that
    /// was started anew does not know it.
    fn begin(&self, hello: &Hello, link: &TcpLink) -> Result<(), ReceiveError> {
        let begin = || self.sessions.begin(hello.session, Instant::now(), self.plan.remember);
        let begun = begin();
        let hub = self.hub.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if begun != Err(BeginError::Busy)
            || !matches!((hub, link.peer()), (Some(hub), Ok(peer)) if hub.give_way(peer.ip(), &hello.program))
        {
            return Ok(begun?);
        }
        let end = Instant::now() + GIVE_WAY;
        loop {
            match begin() {
                Err(BeginError::Busy) if Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(10))
                }
                begun => return Ok(begun?),
            }
        }
    }

    /// What became of a session, of this receiver or of one before it.
    fn what_became(&self, session: u128) -> HandoverState {
        match (self.sessions.ask(session, Instant::now()), &self.plan.journal) {
            (HandoverState::Unknown, Some(dir)) => journal::recover::remembered(&Journal::new(dir), session),
            (state, _) => state,
        }
    }

    fn session(&self, mut channel: Channel, hello: Hello, observer: &dyn Observer, cancel: &Cancel) -> End {
        let id = hello.session;
        let mut journal = None;
        let result = self.receive_one(&mut channel, &hello, &mut journal, observer, cancel);
        self.control.end();
        let end = match result {
            Ok(told) => End { session: id, failure: None, unclear: !told },
            Err(error) => {
                // Everything is gone by now, so this is true when the source hears it.
                let ran = self.sessions.discarded(id, Instant::now());
                if let Some(journal) = &mut journal {
                    note(journal.step(if ran { Step::Ended } else { Step::Discarded }, &[]), observer);
                }
                observer.event(&Event::Discarded { reason: error.chain() });
                let code = if ran { AbortCode::Ended } else { error.code() };
                refuse_as(&mut channel, code, &error);
                let unclear = self.sessions.was_ready(id) && error.is_link();
                End { session: id, failure: Some(error), unclear }
            }
        };
        self.sessions.end(id);
        if let Some(journal) = journal.take()
            && !end.unclear
        {
            journal.close();
        }
        end
    }

    fn receive_one(
        &self,
        channel: &mut Channel,
        hello: &Hello,
        journal: &mut Option<journal::Writer>,
        observer: &dyn Observer,
        cancel: &Cancel,
    ) -> Result<bool, ReceiveError> {
        if let Some(dir) = &self.plan.journal {
            let written = Journal::new(dir);
            journal::recover::sweep(&written);
            let peer = channel.link().peer().map_or_else(|_| "unknown".to_owned(), |peer| peer.to_string());
            *journal = Some(written.begin(Role::Destination, hello.session, &peer, &hello.program, None)?);
        }
        channel.link_mut().set_stall(self.plan.stall_timeout);
        let images = ImageDir::new().map_err(ReceiveError::Images)?;
        let own = self.control.begin(&hello.program);
        let effort = self.control.effort();
        let standby = self.standby.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut store = match standby {
            Some(store) => store,
            None => self.control.new_store()?,
        };
        let memory = free_memory(store.ready_bytes(), self.control.memory_limit());
        let mut keeper = Keeper::take(self.plan.keep_store.as_deref(), own.index);
        let kept = keeper.pages();
        store.set_kept(self.base.clone().unwrap_or_else(|| Arc::clone(&kept)));
        let hub = Arc::new(Hub::new(hello.session, store, self.plan.stall_timeout)?.sparing(effort));
        hub.limit(own.streams, self.control.later());
        let late = Arc::new(Late::new(hello.session, self.plan.stall_timeout).sparing(effort.cpu()));
        let _door = Door::open(self, Arc::clone(&hub), Arc::clone(&late));
        hub.begin(channel.link(), &hello.program)?;
        channel.link_mut().set_alarm(Some(hub.alarm()));
        crate::fault::point("dest-welcome");
        let spoken = wire::version::negotiate(&hello.versions).unwrap_or(wire::version::OLDEST);
        channel.control(&ControlMessage::Welcome(Welcome {
            version: spoken,
            engine: env!("CARGO_PKG_VERSION").to_owned(),
            memory,
            streams: own.streams,
            kept: kept.digests().len() as u64,
        }))?;
        keeper.offer(channel)?;
        // CRIU starts while the rounds run: its start is no part of the downtime.
        let choices = hello.choices;
        let options = RestoreOptions {
            tcp: if choices.tcp_close { TcpPolicy::Close } else { TcpPolicy::Refuse },
            shell_job: choices.shell_job,
            file_locks: choices.file_locks,
            ext_unix_sk: choices.ext_unix_sk,
            ..RestoreOptions::default()
        };
        let mut restore = Restore::prepare(&self.criu, &images, options)?;
        // It outlives what is restored: where that is ended, nobody may be told by the kernel that it is.
        let peer = channel.link().peer().map_or_else(|_| String::new(), |peer| peer.to_string());
        let mut network = Arrival::new(&self.plan, observer, hello.session, &hello.program, peer);
        let still = || match (cancel.is_cancelled(), self.sessions.is_given_up(hello.session)) {
            (true, _) => Err(LinkError::Cancelled.into()),
            (_, true) => Err(GivenUp.into()),
            _ => Ok(()),
        };
        let ready = restore.getting_ready();
        let criu = || ready.took();
        let cargo = Reception::new(channel, &hub, &images, observer, &still, &mut network, &criu)
            .beside(keeper.lists())
            .run()?;
        if network.keeps_tcp() {
            restore.set_tcp(TcpPolicy::Established);
        }
        keeper.note(&cargo);
        self.control.enter(ReceiverStage::Freezing);
        let store = hub.close().ok_or(ReceiveError::Order("an end twice"))?;
        channel.link_mut().set_alarm(None);
        late.with_books(|books| {
            for (space, incomer) in &cargo.spaces {
                let owed = receive::page_set(&incomer.owed);
                books.owe(*space, incomer.vpid, owed.runs().iter().copied());
            }
        });
        let server = Server::with_late(store, Arc::clone(&late))?;
        let alive = Rebirth {
            plan: &self.plan,
            observer,
            cancel,
            sessions: &self.sessions,
            session: hello.session,
            verify: hello.verify,
            spoken,
            channel,
            cargo,
            images: &images,
            network: &mut network,
            journal: journal.as_mut(),
        }
        .run(restore, server)?;
        channel.link_mut().set_cancel(None);
        let pid = alive.pid;
        self.control.enter(ReceiverStage::Filling);
        let told = match alive.settle(channel, &late, &self.plan) {
            Ok((stats, told)) => {
                self.sessions.filled(hello.session, pid, Instant::now());
                observer.event(&Event::Filled {
                    pages: stats.pages,
                    faults: stats.faults,
                    max_fault_us: stats.max_fault.as_micros() as u64,
                });
                told
            }
            // Without all of its pages it was ended.
            Err(error) => return Err(error),
        };
        if let Err(error) = keeper.fill(pid, effort.cpu(), || cancel.is_cancelled()) {
            let text = format!("the pages could not be kept: {error}");
            observer.event(&Event::Warning { text });
        }
        Ok(told)
    }
}

/// A step that has been taken already could perhaps not be written down.
fn note(written: Result<(), journal::JournalError>, observer: &dyn Observer) {
    if let Err(error) = written {
        observer.event(&Event::Warning { text: error.to_string() });
    }
}

/// Further connections find the session as long as this lives.
struct Door<'a> {
    host: &'a Host,
    hub: Arc<Hub>,
    late: Arc<Late>,
}

impl<'a> Door<'a> {
    fn open(host: &'a Host, hub: Arc<Hub>, late: Arc<Late>) -> Self {
        *host.hub.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&hub));
        *host.late.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&late));
        Self { host, hub, late }
    }
}

impl Drop for Door<'_> {
    fn drop(&mut self) {
        *self.host.hub.lock().unwrap_or_else(PoisonError::into_inner) = None;
        *self.host.late.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.late.close();
        // Whatever was received and not taken goes with it.
        drop(self.hub.close());
    }
}

/// Bytes that the store could take, by the plan and by what the machine has beside what is `ready`.
fn free_memory(ready: u64, limit: Option<u64>) -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = info
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|value| value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .map_or(u64::MAX, |kib| kib * 1024);
    available.saturating_add(ready).min(limit.unwrap_or(u64::MAX))
}

/// Tells the peer why, as long as it can still hear it.
fn refuse(channel: &mut Channel, error: &ReceiveError) {
    refuse_as(channel, error.code(), error);
}

fn refuse_as(channel: &mut Channel, code: AbortCode, error: &ReceiveError) {
    if matches!(error, ReceiveError::SourceAborted { .. }) {
        return;
    }
    channel.link_mut().set_cancel(None);
    channel.link_mut().set_alarm(None);
    channel.link_mut().set_stall(Duration::from_millis(500));
    let _ = channel.control(&ControlMessage::abort(code, &error.chain()));
    channel.link_mut().close_gently(Duration::from_secs(1));
}

pub(crate) fn interrupted() -> MigrationError {
    MigrationError {
        kind: FailureKind::Interrupted,
        phase: "waiting for a migration".to_owned(),
        source_state: CopyState::Unknown,
        destination_state: CopyState::None,
        help: None,
        cause: "asked to stop".into(),
        report: None,
    }
}

impl End {
    fn into_result(self) -> Result<(), MigrationError> {
        match self.failure {
            None => Ok(()),
            Some(error) if error.leaves_source_stopped() => Err(MigrationError {
                kind: FailureKind::InDoubt,
                phase: "post-copy".to_owned(),
                source_state: CopyState::Stopped,
                destination_state: CopyState::None,
                help: Some(
                    "look at the source: its message, or `kill -CONT` of the stopped processes, lets the program run on there from where it was when it moved"
                        .to_owned(),
                ),
                cause: Box::new(error),
                report: None,
            }),
            Some(error) => Err(MigrationError {
                kind: if error.code() == AbortCode::Cancelled {
                    FailureKind::Interrupted
                } else {
                    FailureKind::RolledBack
                },
                phase: "receiving".to_owned(),
                source_state: CopyState::Unknown,
                destination_state: CopyState::None,
                help: None,
                cause: Box::new(error),
                report: None,
            }),
        }
    }
}

/// Listens as `plan` says and receives migrations until cancelled.
///
/// # Errors
/// As [`Receiver::bind`].
pub fn receive(plan: ReceivePlan, observer: &dyn Observer, cancel: &Cancel) -> Result<(), MigrationError> {
    Receiver::bind(plan)?.serve(false, observer, cancel)
}
