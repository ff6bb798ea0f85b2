//! The header of every frame: 32 bytes, little-endian, laid by hand.
//!
//! ```text
//!  0  magic        u32   "PGFY"
//!  4  version      u16   readable without knowing the version
//!  6  kind         u16
//!  8  head_len     u32   bytes of the head that follows
//! 12  payload_len  u32   bytes of the payload after the head
//! 16  sequence     u64   number of the frame in its direction, from 0
//! 24  check        u64   xxh3-64 of the 24 bytes before, then of the head
//! ```
//!
//! The head is small and structured; the payload is bulk (page bytes, pieces of files) that the codec never
//! touches: it has digests of its own in the head.

use crate::digest;
use crate::error::{DecodeError, EncodeError};
use crate::limits::{
    MAX_BATCH_HEAD, MAX_CONTROL_BYTES, MAX_DIGESTS_HEAD, MAX_IMAGE_CHUNK, MAX_IMAGE_HEAD, MAX_OWNED_HEAD,
    MAX_PAYLOAD_BYTES,
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
    /// Digests of pages, for the verification.
    Digests = 4,
    /// Pages that the engine owns in the end.
    Owned = 5,
}

impl FrameKind {
    fn from_number(number: u16) -> Option<Self> {
        [Self::PageBatch, Self::Image, Self::Control, Self::Digests, Self::Owned]
            .into_iter()
            .find(|kind| *kind as u16 == number)
    }

    /// The longest head of a frame of this kind.
    fn max_head(self) -> usize {
        match self {
            Self::PageBatch => MAX_BATCH_HEAD,
            Self::Image => MAX_IMAGE_HEAD,
            Self::Control => MAX_CONTROL_BYTES,
            Self::Digests => MAX_DIGESTS_HEAD,
            Self::Owned => MAX_OWNED_HEAD,
        }
    }

    /// The longest payload of a frame of this kind.
    fn max_payload(self) -> usize {
        match self {
            Self::PageBatch => MAX_PAYLOAD_BYTES,
            Self::Image => MAX_IMAGE_CHUNK,
            Self::Control | Self::Digests | Self::Owned => 0,
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
        })
    }
}

/// A header whose fields are within their limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
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
        Ok(Self { kind, head_len, payload_len, sequence: u64_at(16), check: u64_at(24) })
    }

    /// Checks the header and the head against the checksum.
    ///
    /// # Errors
    /// [`DecodeError::Checksum`].
    pub fn verify(&self, raw: &[u8; HEADER_BYTES], head: &[u8]) -> Result<(), DecodeError> {
        if head.len() != self.head_len as usize || digest::check(&raw[..24], head) != self.check {
            return Err(DecodeError::Checksum { sequence: self.sequence });
        }
        Ok(())
    }
}

/// Appends a frame without its payload to `out`; `fill` writes the head.
pub(crate) fn encode(
    kind: FrameKind,
    payload_len: usize,
    sequence: u64,
    out: &mut Vec<u8>,
    fill: impl FnOnce(&mut Vec<u8>) -> Result<(), EncodeError>,
) -> Result<(), EncodeError> {
    let start = out.len();
    out.extend_from_slice(&MAGIC.to_le_bytes());
    out.extend_from_slice(&version::CURRENT.to_le_bytes());
    out.extend_from_slice(&(kind as u16).to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    limit("a payload", payload_len, kind.max_payload())?;
    out.extend_from_slice(&(payload_len as u32).to_le_bytes());
    out.extend_from_slice(&sequence.to_le_bytes());
    out.extend_from_slice(&[0; 8]);
    fill(out)?;
    let head_len = out.len() - start - HEADER_BYTES;
    limit("a head", head_len, kind.max_head())?;
    out[start + 8..start + 12].copy_from_slice(&(head_len as u32).to_le_bytes());
    let check = digest::check(&out[start..start + 24], &out[start + HEADER_BYTES..]);
    out[start + 24..start + 32].copy_from_slice(&check.to_le_bytes());
    Ok(())
}

pub(crate) fn limit(what: &'static str, got: usize, limit: usize) -> Result<(), DecodeError> {
    if got > limit {
        return Err(DecodeError::Limit { what, got: got as u64, limit: limit as u64 });
    }
    Ok(())
}

/// Sees that the frames of one direction are complete and in order.
#[derive(Clone, Debug, Default)]
pub struct SequenceCheck {
    next: u64,
}

impl SequenceCheck {
    /// The number that the next frame has to have.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Takes the next frame.
    ///
    /// # Errors
    /// [`DecodeError::Sequence`] when it is not the next one.
    pub fn check(&mut self, header: &Header) -> Result<(), DecodeError> {
        if header.sequence != self.next {
            return Err(DecodeError::Sequence { got: header.sequence, wanted: self.next });
        }
        self.next += 1;
        Ok(())
    }
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
