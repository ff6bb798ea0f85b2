//! What a migration is asked to do: every knob explicit, validated once.

use crate::model::Site;
use crate::network::{Hooks, MovedAddress};
use crate::policy::estimate::FreezeCost;
use crate::policy::goals::Late;
use crate::policy::memory;
use pageferry_criu_glue::HideKind;
use pageferry_tracker::TrackerKind;
use pageferry_wire_format::limits;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// Who decides between another round and the freeze.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PolicyChoice {
    /// The predicted downtime, round by round; pages that are written all the time are held back.
    #[default]
    Adaptive,
    /// A fixed number of rounds. For comparisons.
    Fixed(u32),
}

/// What to do when rounds do not bring the downtime under its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoConvergence {
    /// Freeze all the same: the downtime is longer than what was aimed for.
    Freeze,
    /// Give up: the program runs on at the source.
    GiveUp,
    /// Slow the program down step by step, up to [`SendPlan::max_throttle`], until it writes less than the link carries.
    Throttle,
    /// Freeze, and send what is left after the program runs at the destination.
    PostCopy,
}

/// When memory moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// Whichever of the others serves the goals, from what is measured on the way ([`crate::policy::goals`]).
    #[default]
    Auto,
    /// All of it while the program stands still.
    StopAndCopy,
    /// In rounds while the program runs, and the rest while it stands still.
    PreCopy,
    /// All of it after the program runs at the destination: what that touches is fetched.
    PostCopy,
    /// In rounds while the program runs, and what is left after it runs at the destination.
    Hybrid,
}

impl Strategy {
    /// All of them.
    pub const ALL: [Strategy; 5] =
        [Strategy::Auto, Strategy::StopAndCopy, Strategy::PreCopy, Strategy::PostCopy, Strategy::Hybrid];

    /// Whether pages follow when the program runs at the destination, whatever is measured on the way.
    pub fn owes(self) -> bool {
        matches!(self, Strategy::PostCopy | Strategy::Hybrid)
    }

    /// The word in reports.
    pub fn name(self) -> &'static str {
        match self {
            Strategy::Auto => "auto",
            Strategy::StopAndCopy => "stop-and-copy",
            Strategy::PreCopy => "pre-copy",
            Strategy::PostCopy => "post-copy",
            Strategy::Hybrid => "hybrid",
        }
    }
}

/// How pages may be coded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CodingChoice {
    /// By what is measured of the link, the processor and the data: whatever is quickest.
    #[default]
    Auto,
    /// As they are; only zero pages are marks. For comparisons.
    Raw,
    /// All by zstd; no deltas and no copies of other pages. For comparisons.
    Zstd,
}

/// What becomes of the program's established TCP connections. Listening sockets are always kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcpChoice {
    /// A program that has any is refused.
    Refuse,
    /// They are closed at the destination: the program reads their end, and clients have to connect again.
    Close,
    /// They are kept. That what clients send reaches the destination is up to [`SendPlan::move_addresses`], or to hooks.
    Keep,
}

/// Where a program is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SendTo {
    /// To a receiver, where it runs on.
    Receiver(SocketAddr),
    /// Into a file that does not exist, from which it can be restored.
    File(PathBuf),
    /// Into a file of its own in a directory of checkpoints, which is made if there is none.
    Directory(PathBuf),
}

impl From<SocketAddr> for SendTo {
    fn from(address: SocketAddr) -> Self {
        Self::Receiver(address)
    }
}

impl std::fmt::Display for SendTo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Receiver(address) => address.fmt(f),
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Directory(path) => write!(f, "dir:{}", path.display()),
        }
    }
}

/// A program must run for some of the time.
const MOST_THROTTLE: f64 = 0.99;

/// The plan of the sending side.
#[derive(Clone, Debug)]
pub struct SendPlan {
    /// Root of the process tree that is to move.
    pub pid: i32,
    /// Where to.
    pub to: SendTo,
    /// Directory of a store in which the program's pages are kept when it has moved, for a migration back.
    pub keep_store: Option<PathBuf>,
    /// Into a file only: the program runs on when the file has all of it, instead of being ended (a checkpoint).
    pub keep_running: bool,
    /// When memory moves.
    pub strategy: Strategy,
    /// Hybrid only: so many rounds at most before the rest comes late (at least 1); `None` is as many as the policy finds useful.
    pub post_copy_after: Option<u32>,
    /// How long to try to reach the receiver again when the link is lost while pages are owed.
    pub post_copy_timeout: Duration,
    /// How long to try to reach the receiver again when the link is lost while the program still runs here: the migration then goes on
    /// from what has arrived. Zero: a lost link ends it at once. At most an hour.
    pub resume_timeout: Duration,
    /// Into a directory only: what the last checkpoint of the same program there has, and those that it is on top of, is not
    /// stored again.
    pub incremental: bool,
    /// Downtime to aim for: pre-copy goes on until the predicted downtime is at most this.
    pub downtime: Duration,
    /// Time to aim for from the start until the program runs at the destination with all of its pages; `None` is as long as it takes.
    /// [`Strategy::Auto`] chooses by it, the others only say whether it was kept.
    pub total_time: Option<Duration>,
    /// Pre-copy rounds before the freeze at most, whatever the prediction says (at least 1).
    pub max_rounds: u32,
    /// Who decides between another round and the freeze.
    pub policy: PolicyChoice,
    /// What a freeze costs beside the pages, for predictions.
    pub freeze_cost: FreezeCost,
    /// What a page takes that is sent for the first time over a link without limits, for predictions.
    pub page_time: Duration,
    /// What to do when the program writes faster than the link carries, and the downtime that was aimed for cannot be had. `None`:
    /// with [`Strategy::Auto`] what is left comes by post-copy, and with the others it is frozen all the same.
    pub on_no_convergence: Option<NoConvergence>,
    /// With [`NoConvergence::Throttle`]: share of the time for which the program stands still at most, from 0 to 0.99.
    pub max_throttle: f64,
    /// Share of its running time that the program may lose to the migration while it runs here, more than 0 and at most 1
    /// ([`crate::policy::slowdown`]); `None` is as much as it takes.
    pub max_slowdown: Option<f64>,
    /// Bytes a second to send at most before the freeze; `None` is as fast as the link goes.
    pub bandwidth: Option<u64>,
    /// Bytes that the delta cache may take: what was last sent of pages that are likely to be sent again, so that they
    /// travel as what differs. 0 turns it off; `None` is a sixteenth of the program's memory.
    pub delta_cache: Option<u64>,
    /// Bytes of memory that the engine may take for itself: books, buffers and caches. Where it is little, the delta cache and the table
    /// of equal pages are made smaller, and there are fewer connections; `None` is as much as it takes.
    pub engine_memory: Option<u64>,
    /// Connections, each with a worker of its own that reads, hashes, codes and sends; `None` is one for each
    /// processor, eight at most, and never more than the receiver takes.
    pub streams: Option<u16>,
    /// Congestion control of the connections, such as `bbr`; `None` is cubic where the system has it.
    pub congestion: Option<String>,
    /// How pages may be coded.
    pub coding: CodingChoice,
    /// Per cent of one processor that the engine may take before the freeze, and for owed pages that nobody waits for (200: two of them):
    /// all of its threads together, and not CRIU. How pages are coded follows from it. `None` is as much as makes the migration quicker.
    pub cpu: Option<u32>,
    /// Nice value, up to 19, of the threads that read, code and send pages before the freeze, where it is lower than this one's
    /// own; CRIU, and everything from the freeze on, has the priority of the caller.
    pub nice: u8,
    /// Dirty tracker to use; `None` lets the probe choose.
    pub tracker: Option<TrackerKind>,
    /// How CRIU is kept from dumping the engine's pages; `None` chooses by what works here.
    pub hide: Option<HideKind>,
    /// Addresses that move with the program.
    pub move_addresses: Vec<MovedAddress>,
    /// What becomes of established TCP connections; `None`: kept if addresses move, closed in a file, and refused otherwise.
    pub tcp: Option<TcpChoice>,
    /// Commands to run at the stages of the handover.
    pub hooks: Hooks,
    /// Compare the whole restored memory with the frozen source before the commit (inside the downtime).
    pub verify: bool,
    /// CRIU to use; `None` searches for one.
    pub criu: Option<PathBuf>,
    /// The tree belongs to a shell's session (it was started from a terminal that stays here).
    pub shell_job: bool,
    /// How long to wait for the first answer of the receiver.
    pub connect_timeout: Duration,
    /// How long the link, CRIU or the receiver may make no progress before the migration is given up.
    pub stall_timeout: Duration,
    /// After a link that was lost around the commit: how long to try to ask the receiver what became of it.
    pub resolve_timeout: Duration,
    /// Directory in which each step is written down, so that after the end of this engine it can be said what is where
    /// ([`crate::journal`]); `None` writes nothing.
    pub journal: Option<PathBuf>,
}

impl SendPlan {
    /// A plan with the defaults of the command line.
    pub fn new(pid: i32, to: impl Into<SendTo>) -> Self {
        Self {
            pid,
            to: to.into(),
            keep_store: None,
            keep_running: false,
            strategy: Strategy::Auto,
            post_copy_after: None,
            post_copy_timeout: Duration::from_secs(300),
            resume_timeout: Duration::from_secs(60),
            incremental: false,
            downtime: Duration::from_millis(100),
            total_time: None,
            max_rounds: 30,
            policy: PolicyChoice::Adaptive,
            freeze_cost: FreezeCost::default(),
            page_time: Site::default().first.time,
            on_no_convergence: None,
            max_throttle: 0.9,
            max_slowdown: None,
            bandwidth: None,
            delta_cache: None,
            engine_memory: None,
            streams: None,
            congestion: None,
            coding: CodingChoice::Auto,
            cpu: None,
            nice: 0,
            tracker: None,
            hide: None,
            move_addresses: Vec::new(),
            tcp: None,
            hooks: Hooks::default(),
            verify: false,
            criu: None,
            shell_job: false,
            connect_timeout: Duration::from_secs(5),
            stall_timeout: Duration::from_secs(30),
            resolve_timeout: Duration::from_secs(20),
            journal: None,
        }
    }

    /// Whether it was said that pages may be left for after the program runs at the destination.
    pub(crate) fn may_owe(&self) -> bool {
        self.strategy.owes() || self.on_no_convergence == Some(NoConvergence::PostCopy)
    }

    /// Whether [`Strategy::Auto`] may do that: what was said of rounds that do not help holds.
    pub(crate) fn late(&self) -> Late {
        match (&self.to, self.on_no_convergence) {
            (SendTo::Receiver(_), None) => Late::WhereItHelps,
            (SendTo::Receiver(_), Some(NoConvergence::PostCopy)) => Late::Always,
            _ => Late::Never,
        }
    }

    /// What becomes of established TCP connections.
    pub fn tcp(&self) -> TcpChoice {
        self.tcp.unwrap_or(match self.to {
            SendTo::Receiver(_) if self.move_addresses.is_empty() => TcpChoice::Refuse,
            SendTo::Receiver(_) => TcpChoice::Keep,
            SendTo::File(_) | SendTo::Directory(_) => TcpChoice::Close,
        })
    }

    /// Checks what can be checked without touching anything.
    ///
    /// # Errors
    /// The first knob that makes no sense, and what it may be.
    pub fn validate(&self) -> Result<(), PlanError> {
        if self.pid <= 0 {
            return Err(PlanError::Pid(self.pid));
        }
        if self.max_rounds == 0 {
            return Err(PlanError::NoRounds);
        }
        if self.post_copy_after == Some(0) {
            return Err(PlanError::NoRounds);
        }
        if self.post_copy_after.is_some() && self.strategy != Strategy::Hybrid {
            return Err(PlanError::NotHybrid);
        }
        if self.may_owe() && !matches!(self.to, SendTo::Receiver(_)) {
            return Err(PlanError::OwedToFile);
        }
        if !(0.0..=MOST_THROTTLE).contains(&self.max_throttle) {
            return Err(PlanError::Throttle);
        }
        if self.max_slowdown.is_some_and(|share| !(share > 0.0 && share <= 1.0)) {
            return Err(PlanError::NoSlowdown);
        }
        check_memory(self.engine_memory, memory::LEAST_AT_SOURCE)?;
        if self.streams == Some(0) {
            return Err(PlanError::NoStreams);
        }
        if self.resume_timeout.as_millis() > u128::from(limits::MAX_HOLD_MS) {
            return Err(PlanError::ResumeTimeout);
        }
        check_effort(self.cpu, self.nice)?;
        if self.bandwidth == Some(0) {
            return Err(PlanError::NoBandwidth);
        }
        if self.incremental && !matches!(self.to, SendTo::Directory(_)) {
            return Err(PlanError::NoEarlier);
        }
        let network =
            !self.move_addresses.is_empty() || self.hooks.any() || self.tcp == Some(TcpChoice::Keep);
        if network && !matches!(self.to, SendTo::Receiver(_)) {
            return Err(PlanError::NetworkIntoFile);
        }
        for (n, moved) in self.move_addresses.iter().enumerate() {
            if self.move_addresses[..n].iter().any(|other| other.address == moved.address) {
                return Err(PlanError::MovesTwice(moved.address));
            }
        }
        if let SendTo::Receiver(to) = self.to {
            if to.port() == 0 {
                return Err(PlanError::NoPort(to));
            }
            if self.keep_running {
                return Err(PlanError::TwoCopies);
            }
        }
        Ok(())
    }
}

/// The plan of the receiving side.
#[derive(Clone, Debug)]
pub struct ReceivePlan {
    /// Address to listen on (port 0 takes a free one).
    pub listen: SocketAddr,
    /// Whether an address other than loopback is wanted although nothing authenticates the sender.
    pub insecure: bool,
    /// Bytes of memory that the page store may take at most, with its index; `None` is what the machine has free.
    pub memory_limit: Option<u64>,
    /// Bytes of memory that the engine may take for itself: everything but the pages in the store. Where it is little there are fewer
    /// connections, and a program whose index does not fit is refused; `None` is as much as it takes.
    pub engine_memory: Option<u64>,
    /// Per cent of one processor that the engine may take until the program stands still, and when it runs for pages that nobody waits for (200:
    /// two of them): all of its threads together, and not CRIU; `None` is as much as it takes.
    pub cpu: Option<u32>,
    /// Nice value, up to 19, of the threads that receive pages and make memory ready for them, until the program stands still.
    pub nice: u8,
    /// Bytes of memory that are made ready while nobody is migrating: fresh memory costs more than the copying into it.
    pub standby: u64,
    /// Directory of a store in which the pages of a program are kept when it has come, and from which the next one is
    /// offered what it has already.
    pub keep_store: Option<PathBuf>,
    /// CRIU to use; `None` searches for one.
    pub criu: Option<PathBuf>,
    /// How long the link or CRIU may make no progress before the migration is given up.
    pub stall_timeout: Duration,
    /// Commands to run at the stages of the handover of a migration that moves something of the network.
    pub hooks: Hooks,
    /// How long an ended session can still be asked about by a sender that lost its link.
    pub remember: Duration,
    /// A program that runs here while pages of it are still at the source waits for these so long at most when the source is not heard of.
    pub post_copy_timeout: Duration,
    /// Directory in which each step is written down, and in which the sessions of earlier engines are looked up when their source asks
    /// ([`crate::journal`]); `None` does neither.
    pub journal: Option<PathBuf>,
}

impl ReceivePlan {
    /// A plan with the defaults of the command line.
    pub fn new(listen: SocketAddr) -> Self {
        Self {
            listen,
            insecure: false,
            memory_limit: None,
            engine_memory: None,
            cpu: None,
            nice: 0,
            standby: 0,
            keep_store: None,
            criu: None,
            stall_timeout: Duration::from_secs(30),
            hooks: Hooks::default(),
            remember: Duration::from_secs(600),
            post_copy_timeout: Duration::from_secs(300),
            journal: None,
        }
    }

    /// Checks what can be checked without touching anything.
    ///
    /// # Errors
    /// [`PlanError::NotLoopback`] for an address that others can reach, unless `insecure` says that this is
    /// meant; [`PlanError::EngineMemory`], [`PlanError::NoProcessor`], [`PlanError::Nice`].
    pub fn validate(&self) -> Result<(), PlanError> {
        check_memory(self.engine_memory, memory::LEAST_AT_DESTINATION)?;
        check_effort(self.cpu, self.nice)?;
        if !self.insecure && !self.listen.ip().is_loopback() {
            return Err(PlanError::NotLoopback(self.listen));
        }
        Ok(())
    }
}

fn check_effort(cpu: Option<u32>, nice: u8) -> Result<(), PlanError> {
    match (cpu, nice) {
        (_, 20..) => Err(PlanError::Nice(nice)),
        (Some(0), _) => Err(PlanError::NoProcessor),
        _ => Ok(()),
    }
}

fn check_memory(limit: Option<u64>, least: u64) -> Result<(), PlanError> {
    match limit {
        Some(limit) if limit < least => Err(PlanError::EngineMemory { limit, least: least >> 20 }),
        _ => Ok(()),
    }
}

/// A plan that makes no sense.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    /// Not a process id.
    #[error("{0} is not a process id")]
    Pid(i32),
    /// At least one round is needed to copy the memory.
    #[error("the maximal number of rounds must be at least 1")]
    NoRounds,
    /// Only a hybrid migration has rounds and owed pages.
    #[error("a number of rounds before post-copy is for the hybrid strategy")]
    NotHybrid,
    /// A file cannot ask for pages.
    #[error("into a file all memory goes before the program is ended: post-copy needs a receiver")]
    OwedToFile,
    /// A program that always stands still never writes, and never does anything else.
    #[error("a program can be made to stand still for 0 to 99 % of the time")]
    Throttle,
    /// Whatever is tracked is slowed down a little.
    #[error(
        "a program that is copied is slowed down a little: the share that is allowed must be more than zero"
    )]
    NoSlowdown,
    /// The system knows no lower priority.
    #[error("{0} is no nice value to copy at: 0 to 19 (the least) are")]
    Nice(u8),
    /// The receiver takes no other migration meanwhile.
    #[error("a lost link can be waited for an hour at most")]
    ResumeTimeout,
    /// Code, buffers and stacks take some.
    #[error(
        "{limit} bytes of memory are too few for the engine: it needs {least} MiB, and more for the books over a large program"
    )]
    EngineMemory {
        /// Bytes that were stated.
        limit: u64,
        /// MiB that it needs for the smallest program.
        least: u64,
    },
    /// Pages need a connection.
    #[error("the number of connections must be at least 1")]
    NoStreams,
    /// A bandwidth of zero never ends.
    #[error("the bandwidth must be more than zero")]
    NoBandwidth,
    /// Without compression there is nothing to limit.
    #[error(
        "the share of a processor for compression must be more than zero; pages are left as they are by the coding `raw`"
    )]
    NoProcessor,
    /// The receiver's port is missing.
    #[error("the address {0} has no port")]
    NoPort(SocketAddr),
    /// What a receiver is given runs there.
    #[error("a program can only be kept running here when it goes into a file (file:PATH or dir:PATH)")]
    TwoCopies,
    /// What is in a file is nowhere on a network.
    #[error(
        "addresses, connections and hooks are for a receiver: a file (file:PATH or dir:PATH) takes none of the network"
    )]
    NetworkIntoFile,
    /// An address goes to one place.
    #[error("the address {0} is to move twice")]
    MovesTwice(IpAddr),
    /// Only a directory has earlier checkpoints.
    #[error("only a checkpoint in a directory (dir:PATH) can be on top of an earlier one")]
    NoEarlier,
    /// The sender is not authenticated, so the outside is refused unless asked for.
    #[error("listening on {0} would let anybody who can reach it start programs here as root")]
    NotLoopback(SocketAddr),
}
