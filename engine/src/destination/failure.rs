//! Everything that can go wrong at the destination, and the code by which the source hears of it.

use super::late::LateError;
use super::serve::ServeError;
use super::sessions::{BeginError, GivenUp};
use super::store::StoreError;
use crate::journal::JournalError;
use crate::link::{ChannelError, LinkError};
use crate::network::NetworkError;
use pageferry_criu_glue as criu;
use pageferry_tracker as tracker;
use pageferry_wire_format::{AbortCode, DecodeError, SpaceId};

/// A failure of a session at the receiving side.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReceiveError {
    #[error(transparent)]
    Begin(#[from] BeginError),
    #[error("the sender speaks protocol versions {theirs}, and this receiver {ours}")]
    Version { theirs: String, ours: String },
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("could not keep the pages")]
    Store(#[from] StoreError),
    #[error("the memory of space {} is not what the source sealed", .space.0)]
    Seal {
        space: SpaceId,
        #[source]
        source: Option<StoreError>,
    },
    #[error("{sealed} spaces were sealed and {announced} announced")]
    SealCount { sealed: usize, announced: u32 },
    #[error("{have} image files arrived and {announced} were announced, or their sizes differ")]
    ImageCount { have: usize, announced: u32 },
    #[error("space {} is not known, or was sealed already", .0.0)]
    UnknownSpace(SpaceId),
    #[error("the connection is for a session that is not being received")]
    UnknownSession,
    #[error("the sender sent {0}")]
    Order(&'static str),
    #[error("the sender sent {0} at the wrong time")]
    Unexpected(String),
    #[error("a piece of the image {name} at offset {offset} was damaged on the way")]
    ImageDigest { name: String, offset: u64 },
    #[error("a piece of the image {name} at offset {offset} cannot be unpacked")]
    ImageUnpack {
        name: String,
        offset: u64,
        #[source]
        source: DecodeError,
    },
    #[error("could not keep the image {name}")]
    Image {
        name: String,
        #[source]
        source: std::io::Error,
    },
    #[error("could not make a place for CRIU's images")]
    Images(#[source] criu::ImageDirError),
    #[error("could not read CRIU's images")]
    ReadImages(#[from] criu::ImageError),
    #[error("could not set a guard over the restored tree")]
    Guard(#[source] std::io::Error),
    #[error("could not take over the memory of the restored tree")]
    Lazy(#[from] criu::LazyError),
    #[error("CRIU could not restore the process tree")]
    Restore(#[from] criu::RestoreError),
    #[error(
        "there was too little memory for the restore: meanwhile the kernel has ended {} here for want of it", processes(*.count)
    )]
    Starved {
        count: u64,
        #[source]
        source: Box<ReceiveError>,
    },
    #[error("could not take over the memory of the restored tree")]
    Serve(#[from] ServeError),
    #[error("could not look at the restored process {pid}")]
    Look {
        pid: i32,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("could not read the restored memory of process {pid}")]
    Read {
        pid: i32,
        #[source]
        source: tracker::ReadError,
    },
    #[error("page {page:#x} of process {vpid} differs from the frozen source after the restore")]
    Differs { vpid: i32, page: u64 },
    #[error(
        "page {page:#x} of process {vpid} was to be compared with the source, and the source says nothing of it"
    )]
    NotCompared { vpid: i32, page: u64 },
    #[error("the regions of process {vpid} differ from the frozen source after the restore: {what}")]
    RegionsDiffer { vpid: i32, what: String },
    #[error("process {vpid} was announced and is not in the restored tree")]
    NotRestored { vpid: i32 },
    #[error("the sender gave up ({code}): {detail}")]
    SourceAborted { code: AbortCode, detail: String },
    #[error(transparent)]
    GivenUp(#[from] GivenUp),
    #[error("the source did not come back within {held:?}")]
    NotBack {
        held: std::time::Duration,
        #[source]
        source: Box<ReceiveError>,
    },
    #[error("its source has begun anew while the session waited for it")]
    Replaced,
    #[error("what is here of space {} is not what the source knows to have arrived", .space.0)]
    Stands {
        space: SpaceId,
        #[source]
        source: Option<StoreError>,
    },
    #[error("the network could not be handed over")]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Late(#[from] LateError),
    #[error(
        "the source was not heard for {silence:?} while {left} pages of the program were still there: the program has been ended here, and \
         stands stopped and whole at the source, as it was when it moved"
    )]
    SourceLost { left: u64, silence: std::time::Duration },
}

impl From<LinkError> for ReceiveError {
    fn from(error: LinkError) -> Self {
        Self::Channel(error.into())
    }
}

impl ReceiveError {
    /// What the source is told.
    pub(crate) fn code(&self) -> AbortCode {
        match self {
            ReceiveError::Begin(BeginError::Busy) => AbortCode::Busy,
            ReceiveError::Version { .. } => AbortCode::VersionMismatch,
            ReceiveError::Channel(ChannelError::Frame(error))
                if matches!(error.source, DecodeError::Version(_)) =>
            {
                AbortCode::VersionMismatch
            }
            ReceiveError::Store(StoreError::OutOfMemory { .. }) | ReceiveError::Starved { .. } => {
                AbortCode::OutOfMemory
            }
            ReceiveError::Store(StoreError::DigestMismatch { .. }) | ReceiveError::ImageDigest { .. } => {
                AbortCode::DigestMismatch
            }
            ReceiveError::Seal { .. } | ReceiveError::SealCount { .. } | ReceiveError::Stands { .. } => {
                AbortCode::SealMismatch
            }
            ReceiveError::Late(LateError::Differs(_)) => AbortCode::DigestMismatch,
            ReceiveError::Restore(error) if error.is_cancelled() => AbortCode::Cancelled,
            ReceiveError::Restore(_) | ReceiveError::Serve(_) | ReceiveError::NotRestored { .. } => {
                AbortCode::RestoreFailed
            }
            ReceiveError::Differs { .. }
            | ReceiveError::NotCompared { .. }
            | ReceiveError::RegionsDiffer { .. } => AbortCode::VerifyFailed,
            ReceiveError::Channel(ChannelError::Frame(_))
            | ReceiveError::Late(_)
            | ReceiveError::UnknownSession
            | ReceiveError::ImageUnpack { .. }
            | ReceiveError::Order(_)
            | ReceiveError::Unexpected(_)
            | ReceiveError::UnknownSpace(_)
            | ReceiveError::ImageCount { .. } => AbortCode::BadFrame,
            ReceiveError::Channel(ChannelError::Link(LinkError::Cancelled)) => AbortCode::Cancelled,
            _ => AbortCode::Internal,
        }
    }

    /// Whether the link itself is gone, so that the sender may not know what became of the session.
    pub(crate) fn is_link(&self) -> bool {
        matches!(self, ReceiveError::Channel(ChannelError::Link(_)))
    }

    /// Whether somebody here asked to stop.
    pub(crate) fn is_cancelled(&self) -> bool {
        matches!(self, ReceiveError::Channel(ChannelError::Link(LinkError::Cancelled)))
    }

    /// Whether the program ran here, and was ended because pages of it did not come as they should.
    pub(crate) fn leaves_source_stopped(&self) -> bool {
        matches!(self, ReceiveError::SourceLost { .. } | ReceiveError::Late(_))
    }

    /// Whether a source whose owed pages are on their way may come back after it, and go on.
    pub(crate) fn is_passing(&self) -> bool {
        matches!(
            self,
            ReceiveError::Channel(ChannelError::Link(_) | ChannelError::Frame(_))
                | ReceiveError::Store(StoreError::DigestMismatch { .. } | StoreError::Unpack { .. })
        )
    }

    /// The same, if the kernel has ended so many processes for want of memory while it came about: that says more than what they
    /// leave behind. A link that was lost has its own reasons.
    pub(crate) fn starved(self, count: u64) -> Self {
        match self {
            error if count == 0 || error.is_link() => error,
            error @ (Self::SourceAborted { .. } | Self::GivenUp(_)) => error,
            error => Self::Starved { count, source: Box::new(error) },
        }
    }

    /// The text with its causes.
    pub(crate) fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            let more = error.to_string();
            if !text.ends_with(&more) {
                text = format!("{text}: {more}");
            }
            cause = error.source();
        }
        text
    }
}

fn processes(count: u64) -> String {
    format!("{count} {}", if count == 1 { "process" } else { "processes" })
}
