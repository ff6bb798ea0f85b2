//! Pieces of CRIU's image files.
//!
//! `offset u64 | digest 16 bytes | name length u16 | name`; the payload is the piece.

use crate::digest;
use crate::error::{DecodeError, EncodeError};
use crate::frame::{self, Fields, FrameKind, Sequencer, limit};
use crate::limits::{MAX_IMAGE_CHUNK, MAX_IMAGE_NAME};
use crate::page::PageDigest;

/// A piece of an image file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageChunk {
    /// Name of the file, relative to the images' folder; may contain folders (`p0/pagemap-1.img`).
    pub name: String,
    /// Where in the file the piece belongs.
    pub offset: u64,
    /// Digest of the piece.
    pub digest: PageDigest,
}

impl ImageChunk {
    /// Describes `bytes`, which belong at `offset` of `name`.
    pub fn new(name: &str, offset: u64, bytes: &[u8]) -> Self {
        Self { name: name.to_owned(), offset, digest: digest::page(bytes) }
    }

    /// Appends the next frame of a direction to `out`, without its payload.
    ///
    /// # Errors
    /// A name or a length that the protocol does not allow.
    pub fn encode(
        &self,
        payload_len: usize,
        at: &mut Sequencer,
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        self.validate(payload_len)?;
        frame::encode(FrameKind::Image, payload_len, at, out, |out| {
            out.extend_from_slice(&self.offset.to_le_bytes());
            out.extend_from_slice(&self.digest.0);
            out.extend_from_slice(&(self.name.len() as u16).to_le_bytes());
            out.extend_from_slice(self.name.as_bytes());
            Ok(())
        })
    }

    /// Reads a head.
    ///
    /// # Errors
    /// Any head that [`ImageChunk::encode`] would not have written; above all a name that leads out of the
    /// images' folder.
    pub fn decode(head: &[u8], payload_len: usize) -> Result<Self, DecodeError> {
        let mut fields = Fields::new(head);
        let offset = fields.u64()?;
        let digest = PageDigest(fields.bytes(16)?.try_into().expect("sixteen bytes"));
        let len = fields.u16()? as usize;
        limit("an image's name", len, MAX_IMAGE_NAME)?;
        let name = std::str::from_utf8(fields.bytes(len)?)
            .map_err(|_| DecodeError::Invalid("an image's name that is not text"))?
            .to_owned();
        fields.end()?;
        let chunk = Self { name, offset, digest };
        chunk.validate(payload_len)?;
        Ok(chunk)
    }

    fn validate(&self, payload_len: usize) -> Result<(), DecodeError> {
        limit("an image's piece", payload_len, MAX_IMAGE_CHUNK)?;
        limit("an image's name", self.name.len(), MAX_IMAGE_NAME)?;
        let part = |part: &str| {
            !part.is_empty()
                && part != "."
                && part != ".."
                && !part.bytes().any(|byte| byte < 0x20 || byte == 0x7f)
        };
        if !self.name.split('/').all(part) {
            return Err(DecodeError::Invalid("an image's name that leads elsewhere"));
        }
        if self.offset.checked_add(payload_len as u64).is_none() {
            return Err(DecodeError::Invalid("an image beyond the largest file"));
        }
        Ok(())
    }
}
