//! The header of every frame: 32 bytes, little-endian, laid by hand.
//!
//! ```text
//!  0  magic        u32   "PGFY"
//!  4  version      u16   the oldest that has this frame; readable without knowing it
//!  6  kind         u16
//!  8  head_len     u32   bytes of the head that follows
//! 12  payload_len  u32   bytes of the payload after the head
//! 16  sequence     u64   number of the frame in its direction, from 0
//! 24  check        u64   xxh3-64 of the 24 bytes before, then of the head; the seed is the check of the
//!                        frame before in the same direction of the connection, 0 for the first
//! ```
//!
//! So each check is the running digest of the whole stream of heads up to it: a frame that was lost, came twice, or
//! belongs to another stream is found even where its number fits.
//!
//! The head is small and structured; the payload is bulk (page bytes, pieces of files) that the codec never
//! touches: it has digests of its own in the head.

use crate::digest;
use crate::error::{DecodeError, EncodeError};
use crate::limits::{
    MAX_BATCH_HEAD, MAX_CONTROL_BYTES, MAX_DIGESTS_HEAD, MAX_IMAGE_CHUNK, MAX_IMAGE_HEAD, MAX_OWNED_HEAD,
    MAX_PACKED_IMAGE_HEAD, MAX_PAYLOAD_BYTES,
};
use crate::version;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 32;

/// "PGFY".
pub const MAGIC: u32 = u32::from_le_bytes(*b"PGFY");

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum FrameKind {
    /// Pages of a space.
    PageBatch = 1,
    /// A piece of one of CRIU's image files.
    Image = 2,
    /// A control message.
    Control = 3,
    /// Digests of pages: for the verification, or of what the destination kept.
    Digests = 4,
    /// Pages that the engine owns in the end.
    Owned = 5,
    /// Those of them that come after the program runs.
    Owed = 6,
    /// A piece of an image file, compressed.
    PackedImage = 7,
}

impl FrameKind {
    fn from_number(number: u16) -> Option<Self> {
        [
            Self::PageBatch,
            Self::Image,
            Self::Control,
            Self::Digests,
            Self::Owned,
            Self::Owed,
            Self::PackedImage,
        ]
        .into_iter()
        .find(|kind| *kind as u16 == number)
    }

    /// The oldest version that has frames of this kind. Of control messages some are newer.
    pub(crate) fn version(self) -> u16 {
        match self {
            Self::PackedImage => version::PACKED_IMAGES,
            _ => version::FRAMES,
        }
    }

    /// The longest head of a frame of this kind.
    fn max_head(self) -> usize {
        match self {
            Self::PageBatch => MAX_BATCH_HEAD,
            Self::Image => MAX_IMAGE_HEAD,
            Self::PackedImage => MAX_PACKED_IMAGE_HEAD,
            Self::Control => MAX_CONTROL_BYTES,
            Self::Digests => MAX_DIGESTS_HEAD,
            Self::Owned | Self::Owed => MAX_OWNED_HEAD,
        }
    }

    /// The longest payload of a frame of this kind.
    fn max_payload(self) -> usize {
        match self {
            Self::PageBatch => MAX_PAYLOAD_BYTES,
            Self::Image | Self::PackedImage => MAX_IMAGE_CHUNK,
            Self::Control | Self::Digests | Self::Owned | Self::Owed => 0,
        }
    }
}

impl std::fmt::Display for FrameKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::PageBatch => "page batch",
            Self::Image => "image",
            Self::Control => "control",
            Self::Digests => "digests",
            Self::Owned => "owned pages",
            Self::Owed => "owed pages",
            Self::PackedImage => "packed image",
        })
    }
}

/// A header whose fields are within their limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The version in which the frame was written: the oldest that has it.
    pub version: u16,
    /// What follows.
    pub kind: FrameKind,
    /// Bytes of the head.
    pub head_len: u32,
    /// Bytes of the payload.
    pub payload_len: u32,
    /// Number of the frame in its direction.
    pub sequence: u64,
    check: u64,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// Something else than a frame, another version, an unknown kind, a length beyond its limit.
    pub fn parse(raw: &[u8; HEADER_BYTES]) -> Result<Self, DecodeError> {
        let u16_at = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes(raw[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(raw[at..at + 8].try_into().expect("eight bytes"));
        let magic = u32_at(0);
        if magic != MAGIC {
            return Err(DecodeError::Magic(magic));
        }
        let spoken = u16_at(4);
        if !version::is_spoken(spoken) {
            return Err(DecodeError::Version(spoken));
        }
        let kind = FrameKind::from_number(u16_at(6)).ok_or(DecodeError::Kind(u16_at(6)))?;
        let (head_len, payload_len) = (u32_at(8), u32_at(12));
        limit("a head", head_len as usize, kind.max_head())?;
        limit("a payload", payload_len as usize, kind.max_payload())?;
        Ok(Self { version: spoken, kind, head_len, payload_len, sequence: u64_at(16), check: u64_at(24) })
    }

    /// Checks the header and the head: they have to be the next ones of the direction that `at` has come so far.
    /// Gives where it is after them.
    ///
    /// # Errors
    /// [`DecodeError::Sequence`], [`DecodeError::Checksum`].
    pub fn verify(
        &self,
        raw: &[u8; HEADER_BYTES],
        head: &[u8],
        at: &Sequencer,
    ) -> Result<Sequencer, DecodeError> {
        // The number says more than the check, which fails for every frame that is not the next one.
        if self.sequence != at.next {
            return Err(DecodeError::Sequence { got: self.sequence, wanted: at.next });
        }
        if head.len() != self.head_len as usize || digest::check(at.chain, &raw[..24], head) != self.check {
            return Err(DecodeError::Checksum { sequence: self.sequence });
        }
        Ok(at.after(self.check))
    }
}

/// How far one direction of a connection has come: the number of its next frame, and the check of the last one, which is
/// the running digest of all heads up to it. Both sides of a direction have one, and these agree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sequencer {
    next: u64,
    chain: u64,
}

impl Sequencer {
    /// Number of the next frame, from 0.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// The running digest: the check of the last frame, 0 before the first.
    pub fn digest(&self) -> u64 {
        self.chain
    }

    fn after(&self, check: u64) -> Self {
        Self { next: self.next.wrapping_add(1), chain: check }
    }
}

/// Appends a frame, in the oldest version that has its kind, to `out`, without its payload; `fill` writes the head. After an error
/// `out` and `at` are as they were.
pub(crate) fn encode(
    kind: FrameKind,
    payload_len: usize,
    at: &mut Sequencer,
    out: &mut Vec<u8>,
    fill: impl FnOnce(&mut Vec<u8>) -> Result<(), EncodeError>,
) -> Result<(), EncodeError> {
    encode_in(kind.version(), kind, payload_len, at, out, fill)
}

/// The same, of a message that is in `version` and later ones.
pub(crate) fn encode_in(
    version: u16,
    kind: FrameKind,
    payload_len: usize,
    at: &mut Sequencer,
    out: &mut Vec<u8>,
    fill: impl FnOnce(&mut Vec<u8>) -> Result<(), EncodeError>,
) -> Result<(), EncodeError> {
    let start = out.len();
    let written = write(version, kind, payload_len, at, out, fill);
    match written {
        Ok(check) => *at = at.after(check),
        Err(_) => out.truncate(start),
    }
    written.map(|_| ())
}

/// Gives the frame's check.
fn write(
    version: u16,
    kind: FrameKind,
    payload_len: usize,
    at: &Sequencer,
    out: &mut Vec<u8>,
    fill: impl FnOnce(&mut Vec<u8>) -> Result<(), EncodeError>,
) -> Result<u64, EncodeError> {
    let start = out.len();
    out.extend_from_slice(&MAGIC.to_le_bytes());
    out.extend_from_slice(&version.to_le_bytes());
    out.extend_from_slice(&(kind as u16).to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    limit("a payload", payload_len, kind.max_payload())?;
    out.extend_from_slice(&(payload_len as u32).to_le_bytes());
    out.extend_from_slice(&at.next.to_le_bytes());
    out.extend_from_slice(&[0; 8]);
    fill(out)?;
    let head_len = out.len() - start - HEADER_BYTES;
    limit("a head", head_len, kind.max_head())?;
    out[start + 8..start + 12].copy_from_slice(&(head_len as u32).to_le_bytes());
    let check = digest::check(at.chain, &out[start..start + 24], &out[start + HEADER_BYTES..]);
    out[start + 24..start + 32].copy_from_slice(&check.to_le_bytes());
    Ok(check)
}

pub(crate) fn limit(what: &'static str, got: usize, limit: usize) -> Result<(), DecodeError> {
    if got > limit {
        return Err(DecodeError::Limit { what, got: got as u64, limit: limit as u64 });
    }
    Ok(())
}

/// Reads the fields of a head, one after the other.
pub(crate) struct Fields<'a> {
    head: &'a [u8],
    at: usize,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(head: &'a [u8]) -> Self {
        Self { head, at: 0 }
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.head.len());
        let end = end.ok_or(DecodeError::Truncated { at: self.head.len() })?;
        let bytes = &self.head[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, DecodeError> {
        Ok(u16::from_le_bytes(self.bytes(2)?.try_into().expect("two bytes")))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, DecodeError> {
        Ok(u32::from_le_bytes(self.bytes(4)?.try_into().expect("four bytes")))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.bytes(8)?.try_into().expect("eight bytes")))
    }

    pub(crate) fn end(self) -> Result<(), DecodeError> {
        match self.head.len() - self.at {
            0 => Ok(()),
            more => Err(DecodeError::Trailing(more)),
        }
    }
}
