//! How turning bytes into meaning fails, and the other way round.

use crate::frame::FrameKind;

/// What came is not a frame of this protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The first four bytes are something else.
    #[error("these bytes are not a pageferry frame (they begin with {0:#010x})")]
    Magic(u32),
    /// A version that is not understood.
    #[error("the frame is of protocol version {0}, and version {ours} is spoken here", ours = crate::version::CURRENT)]
    Version(u16),
    /// A kind that does not exist.
    #[error("the frame is of the unknown kind {0}")]
    Kind(u16),
    /// A length beyond its limit.
    #[error("{what} of {got} is beyond the limit of {limit}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// As announced.
        got: u64,
        /// The limit.
        limit: u64,
    },
    /// The header or the head was damaged, or the frame does not follow the one that came before it.
    #[error(
        "the checksum of frame {sequence} does not match: it was damaged on the way, or is of another stream"
    )]
    Checksum {
        /// Number of the frame.
        sequence: u64,
    },
    /// A frame is missing, or came twice.
    #[error("frame {got} came where frame {wanted} was due: one was lost or repeated, or its number damaged")]
    Sequence {
        /// What came.
        got: u64,
        /// What was due.
        wanted: u64,
    },
    /// The head ends too early.
    #[error("the head of the frame ends at byte {at}, in the middle of a field")]
    Truncated {
        /// Offset into the head.
        at: usize,
    },
    /// The head goes on after its end.
    #[error("{0} bytes follow the end of the frame's head")]
    Trailing(usize),
    /// A combination of values that makes no sense.
    #[error("the frame contains {0}")]
    Invalid(&'static str),
    /// A control message that is none.
    #[error("the control message cannot be read: {0}")]
    Control(String),
    /// Compressed pages that do not decompress to what was announced.
    #[error("the compressed pages cannot be read: {0}")]
    Zstd(String),
}

/// Which frame of a direction cannot be read, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("frame {sequence}{}, at byte {offset} of what was received, is not valid", named(*kind))]
pub struct FrameError {
    /// Number of the frame, as counted by the receiver.
    pub sequence: u64,
    /// What it is; `None` when its header says nothing that is understood.
    pub kind: Option<FrameKind>,
    /// Bytes that came before its header.
    pub offset: u64,
    /// What is wrong with it.
    pub source: DecodeError,
}

fn named(kind: Option<FrameKind>) -> String {
    kind.map_or_else(String::new, |kind| format!(" ({kind})"))
}

/// A value that the protocol cannot carry: a bug of the sender, never of the peer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The value breaks a rule of the protocol.
    #[error("the frame is not valid")]
    Invalid(#[from] DecodeError),
    /// The control message could not be written.
    #[error("the control message cannot be written: {0}")]
    Control(String),
    /// The compressor failed.
    #[error("the pages cannot be compressed: {0}")]
    Zstd(String),
}
