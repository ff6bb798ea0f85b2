//! The frames that two pageferry engines exchange: bytes to meaning, and back.
//!
//! No I/O, no clock, and no panic on what a peer sends: every length is checked against
//! [`limits`] before anything is allocated, and the same rules hold before sending and after receiving.
//! docs/PROTOCOL.md has the byte tables and the order of a session.
#![deny(unsafe_code)]

mod batch;
mod chooser;
mod coding;
pub mod control;
mod decode;
pub mod delta;
pub mod digest;
mod error;
mod frame;
mod image;
pub mod limits;
mod lists;
mod page;
mod sources;
#[allow(unsafe_code)]
mod sys;
mod varint;
pub mod version;

pub use batch::{Coding, PageBatch};
pub use chooser::{CodingChooser, Prospect, SLOW_LINK, Way, prospect};
pub use coding::{ZstdDecoder, ZstdEncoder};
pub use control::{
    AbortCode, ControlMessage, HandoverState, Hello, MovingAddress, Part, Preparation, RegionInfo,
    RestoreChoices, SpaceInfo, Welcome,
};
pub use decode::{Announced, Decoder, Head};
pub use digest::{Chain, SpaceDigest};
pub use error::{DecodeError, EncodeError, FrameError};
pub use frame::{FrameKind, HEADER_BYTES, Header, MAGIC, Sequencer};
pub use image::ImageChunk;
pub use limits::PAGE_SIZE;
pub use lists::{DigestBatch, OwedBatch, OwnedBatch};
pub use page::{PageDigest, PageNo, PageRef, PageRun, SpaceId};
