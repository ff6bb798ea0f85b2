//! The sending side of a migration.

mod ahead;
pub(crate) mod books;
mod closing;
mod deltas;
pub(crate) mod failure;
mod handover;
mod images;
mod keep;
pub(crate) mod late;
pub(crate) mod machine;
mod memory;
mod network;
mod pages;
mod precopy;
mod queue;
pub(crate) mod rejoin;
mod relatives;
mod rollback;
pub(crate) mod sent;
mod slowdown;
mod standby;
mod strategy;
mod streams;
mod sys;
mod tally;
mod twins;
mod verify;
mod watchman;

use crate::cancel::Cancel;
use crate::control::{Control, Stage};
use crate::effort::{CpuMeter, Niceness};
use crate::error::{CopyState, FailureKind, MigrationError};
use crate::journal::{self, Journal, Process, Role};
use crate::kept::{Archive, KeptStore};
use crate::layout::{Layout, Place};
use crate::link::{Channel, TcpLink};
use crate::observe::{Event, Observer};
use crate::plan::{SendPlan, SendTo, Strategy, TcpChoice};
use crate::policy::HotPages;
use crate::policy::goals::Choice;
use crate::policy::memory::Extent;
use crate::report::{MigrationReport, SCHEMA};
use books::Books;
use failure::SendError;
use images::Packer;
use late::LateSession;
use machine::{Aftermath, Phase, Stake};
use pageferry_criu_glue::{Criu, Dump, DumpError, DumpRequest, HideKind, ImageDir, TcpPolicy, Wait};
use pageferry_tracker::{self as tracker, PageReader, PageSet, Target, Throttle, Tracker, WriteCheck};
use pageferry_wire_format::{self as wire, ControlMessage, Hello, RestoreChoices};
use pages::Worker;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use watchman::Watchman;

/// Runs in one `Discard` message.
const RUNS_A_MESSAGE: usize = 4096;

/// Moves the process tree of `plan.pid` to the receiver at `plan.to`, and returns when the program runs there
/// and every page of it is in place. Into a file: when that has all of it, and is on the disk.
///
/// # Errors
/// [`MigrationError`] says what failed, in which phase, and where the two copies of the program are. Unless it
/// says otherwise the program runs on at the source, with its memory as it was.
pub fn send(
    plan: &SendPlan,
    observer: &dyn Observer,
    cancel: &Cancel,
) -> Result<MigrationReport, MigrationError> {
    send_controlled(plan, observer, &Control::new(cancel.clone()))
}

/// The same, with a handle by which it can be held up and changed while it runs.
///
/// # Errors
/// As of [`send`].
pub fn send_controlled(
    plan: &SendPlan,
    observer: &dyn Observer,
    control: &Control,
) -> Result<MigrationReport, MigrationError> {
    for text in crate::network::traces::clean() {
        observer.event(&Event::Warning { text });
    }
    let mut session = match Migration::prepare(plan, observer, control) {
        Ok(session) => session,
        Err(error) => return Err(refusal(error)),
    };
    control.begin(plan);
    let started = Instant::now();
    let result = session.run();
    let ended = session.conclude(result, started);
    control.enter(Stage::Ended);
    ended
}

fn refusal(error: SendError) -> MigrationError {
    let kind = match error {
        SendError::Plan(_) => FailureKind::Usage,
        _ => FailureKind::Refused,
    };
    MigrationError {
        kind,
        phase: Phase::Preparing.to_string(),
        source_state: CopyState::Running,
        destination_state: CopyState::None,
        help: error.help(),
        cause: Box::new(error),
        report: None,
    }
}

/// One address space of the tree.
struct Space {
    place: Place,
    reader: PageReader,
    /// Says what has been written since the last look, where the tracker has marks.
    check: Option<WriteCheck>,
    hot: HotPages,
    /// Pages that it had at the last look, as the destination is to make room for them.
    pages: u64,
}

/// Who is at the other end.
enum Peer {
    /// Another machine's engine.
    Receiver(SocketAddr),
    /// A thread of this one, which writes a file.
    Archive(Archive),
}

impl Peer {
    fn is_receiver(&self) -> bool {
        matches!(self, Peer::Receiver(_))
    }
}

/// A migration under way. Dropping it undoes everything: the dump is aborted (the tree runs on), the tracker
/// is detached, and the images are gone.
struct Migration<'a> {
    plan: &'a SendPlan,
    observer: &'a dyn Observer,
    control: &'a Control,
    cancel: &'a Cancel,
    report: MigrationReport,
    phase: Phase,
    session: u128,
    root: Target,
    criu: Criu,
    hide: HideKind,
    /// Whether the kernel has it: what the synthetic parent needs.
    soft_dirty: bool,
    tracker_choice: tracker::TrackerKind,
    peer_memory: u64,
    /// Version of the protocol that the receiver has chosen.
    spoken: u16,
    layout: Layout,
    spaces: BTreeMap<u32, Space>,
    /// What the destination holds.
    books: Mutex<Books>,
    /// One for each connection.
    workers: Vec<Worker>,
    /// From the connection on, until the images are sent.
    packer: Option<Packer>,
    /// Slows the program down when it outruns the link.
    throttle: Option<Throttle>,
    /// Tasks in which a SIGSTOP waits.
    held: Vec<Target>,
    /// Lets them go if this engine dies before the commit.
    watchman: Option<Watchman>,
    /// What is found of this migration if this engine dies.
    journal: Option<journal::Writer>,
    // The order of the fields is the order of undoing: the tree is let go before its tracker is taken away.
    dump: Option<Dump>,
    /// Addresses that leave with the program, once the receiver is ready for them.
    network: Option<network::Departure>,
    images: ImageDir,
    tracker: Option<Tracker>,
    channel: Option<Channel>,
    /// Further connections, for pages only.
    further: Vec<Channel>,
    /// Connections for pages that the program is owed, until it is known which these are.
    late_channels: Vec<Channel>,
    /// What is owed, and who sends it.
    late: Option<LateSession>,
    /// The connection on which the destination has said that nothing is owed any more.
    late_last: Option<Channel>,
    /// Connections of either kind that the receiver takes.
    peer_streams: u16,
    /// How long it was held up.
    paused: Duration,
    /// Before the freeze.
    niceness: Option<Niceness>,
    /// Of the thread that looks for pages, and sends over the first connection.
    meter: CpuMeter,
    /// Whether what is left when the tree is frozen comes after it runs at the destination.
    owes: bool,
    /// Of the strategy, where none was asked for.
    choice: Option<Choice>,
    began: Instant,
    /// How the program gets on meanwhile.
    watch: Option<slowdown::Watch>,
    peer: Peer,
    /// Whether pages that are written all the time wait for the freeze.
    holds_back: bool,
    /// The rounds so far, from when they were ended until the freeze.
    rounds: Option<precopy::Course>,
    /// Whether most pages of the last round travelled as deltas.
    deltas_help: bool,
    /// While most pages are sent for the first time: how many there are, of which some may be left because they were written
    /// again already; 0 if none may be.
    leave: Option<u64>,
    /// Where the pages of the program are kept when it has moved.
    store: Option<KeptStore>,
    /// Which ones these are, by address space.
    to_keep: Vec<(u32, PageSet)>,
    /// Bytes that went over connections that are closed.
    closed_bytes: u64,
    /// The receiver holds the session when the link is lost, and for so long it is tried to make it anew.
    held_for: Option<Duration>,
    /// What is known of how much memory the books over the program take.
    extent: Extent,
}

impl<'a> Migration<'a> {
    /// Everything that can be refused before anybody is touched.
    fn prepare(
        plan: &'a SendPlan,
        observer: &'a dyn Observer,
        control: &'a Control,
    ) -> Result<Self, SendError> {
        plan.validate()?;
        if !nix::unistd::geteuid().is_root() {
            return Err(SendError::NotRoot);
        }
        let root = Target::open(plan.pid)?;
        if let Some(dir) = &plan.journal
            && let Some(entry) = journal::recover::left_behind(&Journal::new(dir), &root)?
        {
            return Err(SendError::LeftBehind(Box::new(entry)));
        }
        let criu = Criu::find(plan.criu.as_deref())?;
        let kernel = tracker::probe::Kernel::probe();
        let (tracker_choice, tracker_reason) = kernel.choose(plan.tracker)?;
        let (hide, hide_reason) = match plan.hide {
            Some(hide) => (hide, "asked for"),
            None => (
                HideKind::Shim,
                "it works on every kernel, and leaves every page that is not the engine's to CRIU",
            ),
        };
        let session = session_id().map_err(SendError::Identity)?;
        let report = MigrationReport {
            schema: SCHEMA,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            session: format!("{session:032x}"),
            pid: plan.pid,
            program: root.name(),
            to: plan.to.to_string(),
            strategy: match plan.to {
                SendTo::Receiver(_) => plan.strategy.name(),
                SendTo::File(_) | SendTo::Directory(_) => "checkpoint",
            }
            .to_owned(),
            strategy_asked: plan.strategy.name().to_owned(),
            downtime_goal_us: plan.downtime.as_micros() as u64,
            max_slowdown: plan.max_slowdown,
            total_time_goal_us: plan.total_time.map(|time| time.as_micros() as u64),
            tracker: tracker_choice.to_string(),
            tracker_reason,
            hide: hide.to_string(),
            hide_reason: hide_reason.to_owned(),
            criu: criu.version().to_string(),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            tcp: match plan.tcp() {
                TcpChoice::Refuse => "none",
                TcpChoice::Close => "closed",
                TcpChoice::Keep => "kept",
            }
            .to_owned(),
            ..MigrationReport::default()
        };
        let peer = match &plan.to {
            SendTo::Receiver(address) => Peer::Receiver(*address),
            SendTo::File(path) => Peer::Archive(Archive::in_file(path)?),
            SendTo::Directory(dir) => {
                Peer::Archive(Archive::in_directory(dir, plan.incremental.then(|| root.name()).as_deref())?)
            }
        };
        let mut migration = Self {
            plan,
            observer,
            control,
            cancel: control.token(),
            report,
            phase: Phase::Preparing,
            session,
            root,
            criu,
            hide,
            soft_dirty: kernel.soft_dirty.works,
            tracker_choice,
            peer_memory: u64::MAX,
            spoken: wire::version::OLDEST,
            layout: Layout::default(),
            spaces: BTreeMap::new(),
            books: Mutex::default(),
            workers: Vec::new(),
            packer: None,
            throttle: None,
            held: Vec::new(),
            watchman: None,
            journal: None,
            dump: None,
            network: None,
            images: ImageDir::new()?,
            tracker: None,
            channel: None,
            further: Vec::new(),
            late_channels: Vec::new(),
            late: None,
            late_last: None,
            peer_streams: 1,
            paused: Duration::ZERO,
            niceness: None,
            meter: CpuMeter::new(control.cpu()),
            owes: plan.strategy.owes(),
            choice: None,
            began: Instant::now(),
            watch: None,
            peer,
            rounds: None,
            holds_back: false,
            deltas_help: false,
            leave: None,
            store: plan.keep_store.as_deref().map(KeptStore::open).transpose()?,
            to_keep: Vec::new(),
            closed_bytes: 0,
            held_for: None,
            extent: Extent::default(),
        };
        migration.expect_room()?;
        Ok(migration)
    }

    /// The happy path, step by step.
    fn run(&mut self) -> Result<(), SendError> {
        self.began = Instant::now();
        self.watch_pace()?;
        self.connect()?;
        self.note_usual_pace()?;
        self.attach()?;
        // Not earlier: CRIU was started by now, and keeps the priority of its own.
        self.be_nice();
        self.meter.begin();
        self.ask_to_hold()?;
        let decision = match self.plan.strategy {
            Strategy::PostCopy | Strategy::StopAndCopy => self.look_once()?,
            Strategy::Auto | Strategy::PreCopy | Strategy::Hybrid => self.pre_copy()?,
        };
        self.hand_over(decision)?;
        self.report.total_us = self.began.elapsed().as_micros() as u64;
        self.observer.event(&Event::Committed);
        if let Some(pid) = self.report.destination_pid {
            self.observer.event(&Event::Resumed { pid });
        }
        self.after_commit()
    }

    /// Opens the session with the receiver.
    fn connect(&mut self) -> Result<(), SendError> {
        self.phase = Phase::Connecting;
        self.check_cancel()?;
        let places = self.look_at_network()?;
        if let Some(dir) = &self.plan.journal {
            let journal = Journal::new(dir);
            journal::recover::sweep(&journal);
            let root = Process::of(std::slice::from_ref(&self.root)).pop();
            let (to, program) = (self.plan.to.to_string(), self.root.name());
            self.journal = Some(journal.begin(Role::Source, self.session, &to, &program, root)?);
        }
        let began = Instant::now();
        let channel = self.open_channel()?;
        self.channel = Some(channel);
        self.control(&ControlMessage::Hello(Hello {
            versions: wire::version::supported(),
            session: self.session,
            engine: env!("CARGO_PKG_VERSION").to_owned(),
            program: self.root.name(),
            verify: self.plan.verify,
            choices: RestoreChoices {
                shell_job: self.plan.shell_job,
                tcp_close: self.plan.tcp() == TcpChoice::Close,
                file_locks: true,
                ext_unix_sk: false,
            },
        }))?;
        let welcome = match self.answer("a welcome")? {
            ControlMessage::Welcome(welcome) => welcome,
            other => return Err(SendError::Protocol(format!("{other:?} instead of a welcome"))),
        };
        self.peer_memory = welcome.memory;
        self.spoken = welcome.version;
        self.hear_of_kept(welcome.kept)?;
        let plan = self.plan;
        self.channel().link_mut().set_stall(plan.stall_timeout);
        let session = began.elapsed();
        let began = Instant::now();
        self.prepare_network(places)?;
        let addresses = began.elapsed();
        let began = Instant::now();
        self.open_streams(welcome.streams)?;
        if plan.may_owe() {
            self.open_late(welcome.streams)?;
        }
        self.prepared("connections", session + began.elapsed());
        if self.network.is_some() {
            self.prepared("addresses", addresses);
        }
        if let Peer::Receiver(to) = self.peer {
            self.observer.event(&Event::Connected { to, version: welcome.engine });
        }
        Ok(())
    }

    fn open_channel(&mut self) -> Result<Channel, SendError> {
        let mut link = match &mut self.peer {
            Peer::Receiver(address) => {
                let link = TcpLink::connect(*address, self.plan.connect_timeout)
                    .map_err(crate::link::ChannelError::from)?;
                if let Some(name) = &self.plan.congestion {
                    link.set_congestion(name)
                        .map_err(|source| SendError::Congestion { name: name.clone(), source })?;
                }
                link
            }
            Peer::Archive(archive) => archive.connect(self.control.cpu())?,
        };
        link.set_stall(self.plan.connect_timeout);
        link.set_cancel(Some(self.cancel.clone()));
        Ok(Channel::new(link))
    }

    /// Begins to track the tree, and has CRIU ready and waiting at the edge of the freeze.
    fn attach(&mut self) -> Result<(), SendError> {
        self.phase = Phase::Attaching;
        crate::fault::point("attach");
        self.check_cancel()?;
        let tracker = Tracker::attach(self.root.clone(), self.tracker_choice)?;
        self.tracker = Some(tracker);
        let began = Instant::now();
        let dump = match self.start_dump() {
            // A CRIU that is linked statically, or started by something that cleans its environment.
            Err(DumpError::ShimNotLoaded { .. }) if self.plan.hide.is_none() && self.soft_dirty => {
                self.hide = HideKind::SyntheticParent;
                self.report.hide = self.hide.to_string();
                self.report.hide_reason = "the shim could not be loaded into this CRIU".to_owned();
                self.start_dump()
            }
            started => started,
        };
        self.dump = Some(dump?);
        self.prepared("criu", began.elapsed());
        let processes = tracker::tree::discover(&self.root)?.len() as u32;
        self.report.processes = processes;
        self.observer.event(&Event::Attached {
            tracker: self.report.tracker.clone(),
            reason: self.report.tracker_reason.clone(),
            processes,
        });
        Ok(())
    }

    fn start_dump(&self) -> Result<Dump, DumpError> {
        let mut request = DumpRequest::new(self.plan.pid, &self.images, self.hide);
        request.tcp = match self.plan.tcp() {
            TcpChoice::Refuse => TcpPolicy::Refuse,
            TcpChoice::Close => TcpPolicy::Close,
            TcpChoice::Keep => TcpPolicy::Established,
        };
        request.shell_job = self.plan.shell_job;
        request.start = Wait { cancel: Some(self.cancel.fd()), ..Wait::from(self.plan.stall_timeout) };
        Dump::start(&self.criu, request)
    }

    /// Has this thread, and those that it starts, at a lower priority until the freeze.
    fn be_nice(&mut self) {
        if self.plan.nice == 0 {
            return;
        }
        match Niceness::lower(i32::from(self.plan.nice)) {
            Ok(niceness) => self.niceness = Some(niceness),
            Err(error) => {
                let text =
                    format!("the engine keeps its priority, because it could not get it back: {error}");
                self.observer.event(&Event::Warning { text });
            }
        }
    }

    fn check_room(&self, resident_pages: u64) -> Result<(), SendError> {
        let needed = resident_pages * 4096;
        if needed > self.peer_memory {
            return Err(SendError::NoRoom { available: self.peer_memory, needed });
        }
        Ok(())
    }

    /// What is given away with the commit.
    fn stake(&self) -> Stake {
        match (self.plan.keep_running, &self.late) {
            (true, _) => Stake::Image,
            (false, Some(_)) => Stake::Part,
            (false, None) => Stake::Program,
        }
    }

    /// Writes down how far this side is.
    fn write_down(&mut self, step: journal::Step, processes: &[Process]) -> Result<(), SendError> {
        Ok(self.journal.as_mut().map_or(Ok(()), |journal| journal.step(step, processes))?)
    }

    fn check_cancel(&self) -> Result<(), SendError> {
        if self.cancel.is_cancelled() { Err(SendError::Cancelled) } else { Ok(()) }
    }

    fn channel(&mut self) -> &mut Channel {
        self.channel.as_mut().expect("connected before anything is said")
    }

    fn tracker_mut(&mut self) -> &mut Tracker {
        self.tracker.as_mut().expect("attached before anything is collected")
    }

    fn dump_mut(&mut self) -> &mut Dump {
        self.dump.as_mut().expect("CRIU was started before the freeze")
    }

    fn space(&self, key: u32) -> &Space {
        self.spaces.get(&key).expect("a space was made for every key that was taken in")
    }

    /// The books, while no worker is at them. Each change of theirs is one call that leaves them whole.
    fn books(&mut self) -> &mut Books {
        self.books.get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    fn control(&mut self, message: &ControlMessage) -> Result<(), SendError> {
        Ok(self.channel().control(message)?)
    }

    fn answer(&mut self, wanted: &'static str) -> Result<ControlMessage, SendError> {
        Ok(self.channel().answer(wanted)?)
    }
}

/// A random identity, so that two sessions are never taken for one another.
fn session_id() -> std::io::Result<u128> {
    let mut bytes = [0u8; 16];
    let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    if got < bytes.len() {
        return Err(std::io::Error::other("the kernel gave too few random bytes"));
    }
    Ok(u128::from_le_bytes(bytes))
}

/// The largest resident size that this process ever had.
fn peak_resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .and_then(|value| value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .map_or(0, |kib| kib * 1024)
}

/// Words for the states of the two copies after each aftermath.
fn states(aftermath: Aftermath) -> (CopyState, CopyState) {
    match aftermath {
        Aftermath::RunOn => (CopyState::Running, CopyState::None),
        Aftermath::End => (CopyState::None, CopyState::Running),
        Aftermath::Ask | Aftermath::Hold | Aftermath::Serve => (CopyState::Stopped, CopyState::Unknown),
    }
}
