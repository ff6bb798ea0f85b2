//! Everything that can go wrong at the source, in one place; the phase is added where it is known.

use super::pages::SendPagesError;
use crate::journal::{Entry, JournalError};
use crate::kept::KeptError;
use crate::link::{ChannelError, LinkError};
use crate::network::NetworkError;
use crate::network::established::Connection;
use crate::plan::PlanError;
use crate::policy::memory::TooLittle;
use pageferry_criu_glue as criu;
use pageferry_tracker as tracker;
use pageferry_wire_format::{AbortCode, EncodeError};

/// A failure of the sending side.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error("live migration needs root: reading another program's memory and starting CRIU are privileged")]
    NotRoot,
    #[error("could not open the process")]
    Open(#[from] tracker::OpenError),
    #[error("could not list the process tree")]
    Tree(#[from] tracker::TreeError),
    #[error("no dirty tracker works here")]
    Tracker(#[from] tracker::ChooseError),
    #[error("could not attach the dirty tracker")]
    Attach(#[from] tracker::AttachError),
    #[error("could not collect the dirty pages")]
    Collect(#[from] tracker::CollectError),
    #[error("could not prepare to read the memory of process {pid}")]
    Reader {
        pid: i32,
        #[source]
        source: tracker::ReadError,
    },
    #[error("could not look at process {pid}")]
    Look {
        pid: i32,
        #[source]
        source: std::io::Error,
    },
    #[error("could not find the stack pointers of process {pid}")]
    Stack {
        pid: i32,
        #[source]
        source: std::io::Error,
    },
    #[error("the process ended while it was being copied")]
    Exited,
    #[error("no usable CRIU")]
    FindCriu(#[from] criu::FindError),
    #[error("could not make up an identity for the session")]
    Identity(#[source] std::io::Error),
    #[error("no place for CRIU's images")]
    ImageDir(#[from] criu::ImageDirError),
    #[error("could not read CRIU's images")]
    Images(#[source] std::io::Error),
    #[error("could not make sense of CRIU's images")]
    ParseImages(#[from] criu::ImageError),
    #[error("CRIU could not dump the process tree")]
    Dump(#[from] criu::DumpError),
    #[error(transparent)]
    Kept(#[from] KeptError),
    #[error(transparent)]
    Pages(#[from] SendPagesError),
    #[error("could not prepare the page encoder")]
    Encode(#[from] EncodeError),
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("the congestion control {name} cannot be used")]
    Congestion {
        name: String,
        #[source]
        source: std::io::Error,
    },
    #[error(
        "the program writes faster than the link carries: freezing now would take {predicted:?}, and {wanted:?} is aimed for"
    )]
    NoConvergence { predicted: std::time::Duration, wanted: std::time::Duration },
    #[error("the receiver has {available} bytes of memory free, and the program takes {needed}")]
    NoRoom { available: u64, needed: u64 },
    #[error(transparent)]
    Memory(#[from] TooLittle),
    #[error("could not hold process {pid} for the commit")]
    Hold {
        pid: i32,
        #[source]
        source: std::io::Error,
    },
    #[error("could not have somebody watch over the held process tree (a shell, /bin/sh)")]
    Watchman(#[source] std::io::Error),
    #[error("could not start a thread that slows the program down")]
    Throttle(#[source] std::io::Error),
    #[error("it cannot be known how much the program is slowed down")]
    Slowdown(#[source] tracker::RunTimesError),
    #[error("the receiver asked about something else than it was told: {0}")]
    Protocol(String),
    #[error("the network could not be handed over")]
    Network(#[from] NetworkError),
    #[error("could not list the program's connections")]
    Connections(#[source] std::io::Error),
    #[error("the program has {count} established TCP connection{}, such as {example}", if *.count == 1 { "" } else { "s" })]
    Connected { count: usize, example: Connection },
    #[error("{count} of the program's TCP connections are not from an address that moves, such as {example}")]
    NotMoving { count: usize, example: Connection },
    #[error("the connection to the receiver comes from {0}, which is to move")]
    LinkMoves(std::net::IpAddr),
    #[error("the receiver is too old: it does not know that addresses can move")]
    TooOld,
    #[error("cancelled")]
    Cancelled,
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("{}", left_behind(.0))]
    LeftBehind(Box<Entry>),
    #[error("the link was lost ({lost}), and did not come back within {waited:?}")]
    LinkLost {
        waited: std::time::Duration,
        lost: String,
        #[source]
        source: Box<SendError>,
    },
    #[error("the link was lost ({lost}), and the session could not be taken up again")]
    NotTakenUp {
        lost: String,
        #[source]
        source: Box<SendError>,
    },
    #[error("could not prepare to send owed pages")]
    LateThread(#[source] std::io::Error),
    #[error("of process {pid}, {pages} pages came late at the receiver, and they are not what is here")]
    LateDiffers { pid: i32, pages: u64 },
    #[error(
        "process {pid} does not stand still here any more: its pages may not be those that the program is owed"
    )]
    NotStanding { pid: i32 },
    #[error("process {pid} has run here since its pages were taken up to be sent")]
    HasRun { pid: i32 },
    #[error("which pages the program is owed was not written down here")]
    NothingOwed,
    #[error("{left} of {total} pages that the program is owed could not be sent")]
    Owing {
        left: u64,
        total: u64,
        #[source]
        source: Box<SendError>,
    },
}

impl SendError {
    /// Whether it is the consequence of the user's wish.
    pub(crate) fn is_cancel(&self) -> bool {
        match self {
            SendError::Cancelled => true,
            SendError::Dump(error) => error.is_cancelled(),
            SendError::Channel(error) | SendError::Pages(SendPagesError::Channel(error)) => {
                matches!(error, ChannelError::Link(LinkError::Cancelled))
            }
            _ => false,
        }
    }

    /// Whether the receiver itself has said that it gave the migration up: it has no copy then.
    pub(crate) fn is_peers_abort(&self) -> bool {
        self.peers_abort().is_some()
    }

    /// Why it has, if it has said so.
    pub(crate) fn peers_abort(&self) -> Option<AbortCode> {
        match self {
            SendError::Channel(ChannelError::Aborted { code, .. })
            | SendError::Pages(SendPagesError::Channel(ChannelError::Aborted { code, .. })) => Some(*code),
            SendError::NotTakenUp { source, .. } => source.peers_abort(),
            _ => None,
        }
    }

    /// Whether the link itself has failed, and nobody has said anything.
    pub(crate) fn is_lost_link(&self) -> bool {
        match self {
            SendError::Channel(error) | SendError::Pages(SendPagesError::Channel(error)) => {
                matches!(error, ChannelError::Link(link) if !matches!(link, LinkError::Cancelled))
            }
            _ => false,
        }
    }

    /// The text with its causes.
    pub(crate) fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        text
    }

    /// What a person can do.
    pub(crate) fn help(&self) -> Option<String> {
        Some(match self {
            SendError::NotRoot => "run it as root".to_owned(),
            SendError::Tracker(_) | SendError::FindCriu(_) => {
                "`pageferry check` shows what is missing here".to_owned()
            }
            SendError::Journal(_) => {
                "name a directory that can be written (--journal DIR), or go without (--journal none): then nothing tells what is where after a crash"
                    .to_owned()
            }
            SendError::LeftBehind(entry) if entry.live => {
                format!("wait for it, or end it: its engine is process {}", entry.begin.engine)
            }
            SendError::LeftBehind(entry) => {
                format!("`pageferry recover --session {}` says what is where, and brings it to an end", &entry.begin.session[..8])
            }
            SendError::NoConvergence { .. } => {
                "allow a longer --downtime, give it more --bandwidth, or let it freeze all the same (--on-no-convergence freeze)"
                    .to_owned()
            }
            SendError::Memory(_) => "allow it more (--engine-memory), or as much as it takes".to_owned(),
            SendError::Slowdown(_) => "go without --max-slowdown, and limit it with --bandwidth, --cpu and --nice".to_owned(),
            SendError::Congestion { .. } => {
                let file = "/proc/sys/net/ipv4/tcp_available_congestion_control";
                let have = std::fs::read_to_string(file).unwrap_or_default();
                format!("this machine has {} (more with modprobe, if the kernel has it)", have.trim())
            }
            SendError::Kept(error) => return error.help(),
            SendError::Connected { .. } => {
                "they move with their address (--move-address ADDR/LEN@DEV), or are closed at the destination (--tcp close)"
                    .to_owned()
            }
            SendError::NotMoving { .. } => {
                "move their addresses too (--move-address, more than once), or close all connections (--tcp close)"
                    .to_owned()
            }
            SendError::LinkMoves(_) => {
                "reach the receiver by a route that prefers another address of this machine".to_owned()
            }
            SendError::LinkLost { .. } => {
                "begin anew when there is a link; --resume-timeout says how long to wait for one".to_owned()
            }
            SendError::NotTakenUp { .. } => {
                "the receiver does not have the session any more: begin anew, and look at its messages for why".to_owned()
            }
            _ if self.peers_abort() == Some(AbortCode::OutOfMemory) => {
                "give the receiver more memory: its machine, its control group, or `pageferry receive --memory-limit`".to_owned()
            }
            SendError::TooOld => "use the same version of pageferry on both sides".to_owned(),
            SendError::Channel(ChannelError::Link(LinkError::Connect { to, .. })) => {
                format!("is `pageferry receive --listen {to}` running there?")
            }
            _ => return None,
        })
    }
}

fn left_behind(entry: &Entry) -> String {
    let what = if entry.live {
        "is being moved"
    } else {
        "was left here, stopped, by an engine that ended while it was moving it"
    };
    format!("the program {what} to {} (session {})", entry.begin.peer, &entry.begin.session[..8])
}
