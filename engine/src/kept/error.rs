//! How keeping a stream fails, and how reading one does.

use crate::link::{ChannelError, LinkError};
use pageferry_wire_format::{DecodeError, FrameError, SpaceId};
use std::io;
use std::path::PathBuf;

/// Where in a stream something is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spot {
    /// Number of the frame, from 0.
    pub frame: u64,
    /// Bytes before its header.
    pub offset: u64,
}

impl std::fmt::Display for Spot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "frame {}, at byte {}", self.frame, self.offset)
    }
}

/// What is wrong with a frame that is whole and in its place.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Damage {
    /// Bytes of a page are not those that were sent.
    #[error("page {page:#x} of space {} does not have the bytes that were sent", .space.0)]
    Page {
        /// Its space.
        space: SpaceId,
        /// Its number.
        page: u64,
    },
    /// A piece of an image is not what was sent.
    #[error("the piece of the image {name} at {offset} does not have the bytes that were sent")]
    Image {
        /// Name of the image.
        name: String,
        /// Where in it the piece belongs.
        offset: u64,
    },
    /// A packed piece of an image.
    #[error("the piece of the image {name} at {offset} cannot be unpacked")]
    UnpackImage {
        /// Name of the image.
        name: String,
        /// Where in it the piece belongs.
        offset: u64,
        /// Why.
        #[source]
        source: DecodeError,
    },
    /// Compressed pages.
    #[error("pages of space {} cannot be unpacked", .space.0)]
    Unpack {
        /// Their space.
        space: SpaceId,
        /// Why.
        #[source]
        source: DecodeError,
    },
    /// A space that the stream never announced, or that is gone.
    #[error("space {} is not known", .0.0)]
    Space(SpaceId),
    /// The pages are not those that the source had when it was frozen.
    #[error("the pages of space {} are not those that the source sealed", .0.0)]
    Seal(SpaceId),
    /// Something is missing, or at the wrong time.
    #[error("{0}")]
    Order(&'static str),
    /// Pages of an earlier checkpoint that is not known.
    #[error("it is on top of an earlier checkpoint, and no index beside the file says which")]
    NoBase,
}

/// Why a stream cannot be kept, or one that was kept cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeptError {
    /// Nothing that exists is written over.
    #[error("{} exists already", .0.display())]
    Exists(PathBuf),
    /// Another process writes to the same place.
    #[error("{} is being written by somebody else", .0.display())]
    Busy(PathBuf),
    /// The path has no name of a file.
    #[error("{} names no file", .0.display())]
    NoName(PathBuf),
    /// The file cannot be made or written.
    #[error("could not write {}", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file cannot be read.
    #[error("could not read {}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The index of a directory of checkpoints.
    #[error("line {line} of {} is not of an index of checkpoints", .path.display())]
    Index {
        /// The index.
        path: PathBuf,
        /// From 1.
        line: usize,
    },
    /// A checkpoint that others are on top of.
    #[error("the checkpoint {} cannot be used", .path.display())]
    Below {
        /// Its stream.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<KeptError>,
    },
    /// A checkpoint that others are on top of was replaced.
    #[error("{} is on top of another {} than is there", .above.display(), .path.display())]
    OtherBelow {
        /// The stream on top.
        above: PathBuf,
        /// The one below it.
        path: PathBuf,
    },
    /// A directory without checkpoints.
    #[error("there are no checkpoints in {}", .0.display())]
    NoCheckpoints(PathBuf),
    /// A file without a byte.
    #[error("the stream is empty")]
    Empty,
    /// The stream ends too soon.
    #[error("the stream ends after {end} bytes, inside of {spot}: it was cut off")]
    Cut {
        /// The frame.
        spot: Spot,
        /// Length of the stream.
        end: u64,
    },
    /// The stream ends between two frames, before its last one.
    #[error(
        "the stream ends after {end} bytes, where frame {frame} is due: it was cut off before its commit"
    )]
    Unfinished {
        /// Number of the frame that is missing.
        frame: u64,
        /// Length of the stream.
        end: u64,
    },
    /// Bytes after the last frame.
    #[error("the stream goes on after its commit, at byte {0}")]
    Trailing(u64),
    /// Not a frame, or not the next one.
    #[error("the stream is damaged")]
    Frame(#[from] FrameError),
    /// A frame whose contents are wrong.
    #[error("{spot}, is damaged")]
    Damaged {
        /// The frame.
        spot: Spot,
        /// What is wrong.
        #[source]
        source: Damage,
    },
    /// The source gave up before the end.
    #[error("the source gave up: {0}")]
    Abandoned(String),
    /// The thread or link between the two sides of this process.
    #[error("the two sides of this process lost each other")]
    Link(#[from] LinkError),
    /// The receiver in this process said something that cannot be.
    #[error("the receiver gave the stream up: {0}")]
    Refused(String),
}

impl From<ChannelError> for KeptError {
    fn from(error: ChannelError) -> Self {
        match error {
            ChannelError::Link(link) => Self::Link(link),
            ChannelError::Aborted { detail, .. } => Self::Refused(detail),
            other => Self::Refused(other.to_string()),
        }
    }
}

impl KeptError {
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
            Self::Exists(path) => format!("name another file, or remove {} first", path.display()),
            Self::Busy(_) => "wait for the other one, or name another file".to_owned(),
            Self::Below { path, .. } | Self::OtherBelow { path, .. } => format!(
                "a checkpoint needs all that it is on top of as they were; put {} back, or restore one that does not need it",
                path.display()
            ),
            Self::Index { .. } => "name one of the streams in it instead of the directory".to_owned(),
            Self::Frame(_) | Self::Damaged { .. } | Self::Cut { .. } | Self::Unfinished { .. } => {
                "`pageferry inspect` says more of the file; a damaged stream is never restored".to_owned()
            }
            _ => return None,
        })
    }
}
