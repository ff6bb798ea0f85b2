//! A run of tracking in a file: every [`Observation`](crate::observation::Observation), compact, and readable up to
//! the last whole frame when the recorder was killed. docs/RECORDING.md has every byte.
//!
//! ```
//! use pageferry_tracker::observation::Observation;
//! use pageferry_tracker::Scope;
//! use pageferry_tracker::recording::{Ending, Header, Reader, VERSION, Writer};
//! use std::time::Duration;
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let header = Header {
//!     version: VERSION,
//!     started_unix_ms: 1_700_000_000_000,
//!     interval: Duration::from_millis(100),
//!     source: "userfaultfd".into(),
//!     scope: Scope::All,
//!     root_pid: 4711,
//!     root_name: "redis-server".into(),
//! };
//! let mut writer = Writer::new(Vec::new(), &header)?;
//! writer.write(&Observation { at: Duration::from_millis(100), ..Observation::default() })?;
//! let file = writer.finish()?;
//!
//! let mut reader = Reader::new(&file[..])?;
//! assert_eq!(reader.header().root_name, "redis-server");
//! for observation in &mut reader {
//!     println!("{:?}", observation?.at);
//! }
//! assert_eq!(reader.ending(), Ending::Finished);
//! # Ok(())
//! # }
//! ```

mod block;
mod content;
mod fields;
mod page_runs;
mod reader;
mod writer;

pub use reader::Reader;
pub use writer::Writer;

use crate::scope::Scope;
use std::io;
use std::time::Duration;

/// The version of the format that is written, and the newest that is read.
///
/// The ledger, newest first:
/// - 2: shared objects in every observation, and in the header the scope. For a tree that shares memory, version 1 had only what each process
///   had of its own.
/// - 1: the first.
pub const VERSION: u32 = 2;

/// What a recording is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The version of the format: [`VERSION`] to write one.
    pub version: u32,
    /// When tracking began: milliseconds since 1970, UTC.
    pub started_unix_ms: u64,
    /// The time between scans that was asked for.
    pub interval: Duration,
    /// Where the dirty pages came from, for people.
    pub source: String,
    /// Which mappings were watched. Recordings of version 1 do not say it; they have no shared memory, and count as
    /// [`Scope::Lazy`].
    pub scope: Scope,
    /// The process whose tree was tracked.
    pub root_pid: i32,
    /// Its name.
    pub root_name: String,
}

/// How a recording ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// As its recorder wanted.
    Finished,
    /// In the middle (or not read to its end yet): its recorder was killed, or its disk was full.
    Interrupted {
        /// Observations that are whole.
        whole_frames: u64,
    },
}

/// Why an observation was not recorded.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The file could not be written: its disk is full, perhaps.
    #[error(
        "could not write the recording; it can be read up to the {whole_frames} observations that it has"
    )]
    Io {
        /// Observations that were written whole.
        whole_frames: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A write before this one failed; what would follow could not be read.
    #[error("nothing can be added to a recording after a failed write")]
    Broken,
    /// Another version than this one was asked for.
    #[error("recordings are written in version {VERSION}, not in version {0}")]
    Version(u32),
    /// One observation has more than the format allows.
    #[error("an observation of {size} bytes does not fit into a recording: {limit} is the most")]
    TooLarge {
        /// Its size.
        size: usize,
        /// The limit.
        limit: usize,
    },
}

/// Why a recording cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file could not be read.
    #[error("could not read the recording")]
    Io(#[from] io::Error),
    /// It is something else.
    #[error("this is not a recording of pageferry")]
    NotARecording,
    /// It was made by a newer pageferry.
    #[error(
        "the recording has version {version}, and this pageferry reads up to version {VERSION}: use a newer one"
    )]
    Newer {
        /// Its version.
        version: u32,
    },
    /// It ends before it says what it is of.
    #[error("the recording was interrupted before its first observation: it has not even a whole header")]
    NoHeader,
    /// Its bytes are not what was written.
    #[error("the recording is damaged in frame {frame}, at byte {offset}: {what}")]
    Damaged {
        /// Which frame: 0 is the header, 1 the first observation.
        frame: u64,
        /// Where this frame begins in the file.
        offset: u64,
        /// What is wrong with it.
        what: &'static str,
    },
}

#[cfg(test)]
mod size_tests;
#[cfg(test)]
mod tests;
