//! Pieces of CRIU's image files.
//!
//! `offset u64 | digest 16 bytes | name length u16 | name`; the payload is the piece.
//!
//! Packed: `offset u64 | digest 16 bytes | length u32 | name length u16 | name`; the payload is one zstd frame, which gives
//! a piece of that length. The digest is that of the piece.

use crate::coding::ZstdDecoder;
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
    /// Digest of the piece, as it is in the file.
    pub digest: PageDigest,
    /// Where the payload is the piece in one zstd frame: how long the piece is.
    pub unpacked: Option<u32>,
}

impl ImageChunk {
    /// Describes `bytes`, which belong at `offset` of `name`, and are the payload.
    pub fn new(name: &str, offset: u64, bytes: &[u8]) -> Self {
        Self { name: name.to_owned(), offset, digest: digest::page(bytes), unpacked: None }
    }

    /// The same for a payload that is a zstd frame of `bytes`, for a peer that speaks
    /// [`PACKED_IMAGES`](crate::version::PACKED_IMAGES).
    pub fn packed(name: &str, offset: u64, bytes: &[u8]) -> Self {
        Self { unpacked: Some(bytes.len() as u32), ..Self::new(name, offset, bytes) }
    }

    /// The piece: what is in the payload, or what was packed in it, which is put into `room`. Whether it has the digest that it should
    /// have is not looked at.
    ///
    /// # Errors
    /// A payload that is not exactly one zstd frame of a piece of the announced length.
    pub fn piece<'a>(
        &self,
        payload: &'a [u8],
        decoder: &mut ZstdDecoder,
        room: &'a mut Vec<u8>,
    ) -> Result<&'a [u8], DecodeError> {
        let Some(len) = self.unpacked else { return Ok(payload) };
        limit("an image's piece", len as usize, MAX_IMAGE_CHUNK)?;
        room.resize(len as usize, 0);
        decoder.decode(payload, room)?;
        Ok(room)
    }

    fn kind(&self) -> FrameKind {
        if self.unpacked.is_some() { FrameKind::PackedImage } else { FrameKind::Image }
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
        frame::encode(self.kind(), payload_len, at, out, |out| {
            out.extend_from_slice(&self.offset.to_le_bytes());
            out.extend_from_slice(&self.digest.0);
            if let Some(len) = self.unpacked {
                out.extend_from_slice(&len.to_le_bytes());
            }
            out.extend_from_slice(&(self.name.len() as u16).to_le_bytes());
            out.extend_from_slice(self.name.as_bytes());
            Ok(())
        })
    }

    /// Reads the head of a piece as it is.
    ///
    /// # Errors
    /// Any head that [`ImageChunk::encode`] would not have written; above all a name that leads out of the
    /// images' folder.
    pub fn decode(head: &[u8], payload_len: usize) -> Result<Self, DecodeError> {
        Self::read(head, payload_len, false)
    }

    /// Reads the head of a packed piece.
    ///
    /// # Errors
    /// As [`ImageChunk::decode`].
    pub fn decode_packed(head: &[u8], payload_len: usize) -> Result<Self, DecodeError> {
        Self::read(head, payload_len, true)
    }

    fn read(head: &[u8], payload_len: usize, packed: bool) -> Result<Self, DecodeError> {
        let mut fields = Fields::new(head);
        let offset = fields.u64()?;
        let digest = PageDigest(fields.bytes(16)?.try_into().expect("sixteen bytes"));
        let unpacked = if packed { Some(fields.u32()?) } else { None };
        let len = fields.u16()? as usize;
        limit("an image's name", len, MAX_IMAGE_NAME)?;
        let name = std::str::from_utf8(fields.bytes(len)?)
            .map_err(|_| DecodeError::Invalid("an image's name that is not text"))?
            .to_owned();
        fields.end()?;
        let chunk = Self { name, offset, digest, unpacked };
        chunk.validate(payload_len)?;
        Ok(chunk)
    }

    fn validate(&self, payload_len: usize) -> Result<(), DecodeError> {
        let len = self.unpacked.map_or(payload_len, |len| len as usize);
        limit("an image's piece", len, MAX_IMAGE_CHUNK)?;
        if self.unpacked.is_some() && (payload_len == 0 || payload_len >= len) {
            return Err(DecodeError::Invalid("a packed piece of an image that is not shorter, or empty"));
        }
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
        if self.offset.checked_add(len as u64).is_none() {
            return Err(DecodeError::Invalid("an image beyond the largest file"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coding::ZstdEncoder;

    fn pack(bytes: &[u8]) -> Vec<u8> {
        let mut packed = Vec::new();
        ZstdEncoder::new().unwrap().encode(1, bytes, &mut packed).unwrap();
        packed
    }

    #[test]
    fn a_packed_piece_comes_back_and_gives_no_more_than_it_announced() {
        let bytes: Vec<u8> = (0..100_000u32).map(|n| (n / 50) as u8).collect();
        let packed = pack(&bytes);
        let chunk = ImageChunk::packed("pages-1.img", 4096, &bytes);
        let (mut decoder, mut room) = (ZstdDecoder::new().unwrap(), Vec::new());
        let piece = chunk.piece(&packed, &mut decoder, &mut room).unwrap();
        assert!(piece == bytes && digest::page(piece) == chunk.digest);
        // A plain one is its payload.
        let plain = ImageChunk::new("pages-1.img", 4096, &bytes);
        assert!(plain.piece(&bytes, &mut decoder, &mut room).unwrap() == bytes);
        assert_eq!(plain.digest, chunk.digest);
        for lie in [0, 1, bytes.len() - 1, bytes.len() + 1, MAX_IMAGE_CHUNK] {
            let chunk = ImageChunk { unpacked: Some(lie as u32), ..chunk.clone() };
            assert!(chunk.piece(&packed, &mut decoder, &mut room).is_err(), "{lie}");
        }
        let beyond = ImageChunk { unpacked: Some(u32::MAX), ..chunk.clone() };
        room = Vec::new();
        assert!(matches!(beyond.piece(&packed, &mut decoder, &mut room), Err(DecodeError::Limit { .. })));
        assert_eq!(room.capacity(), 0, "nothing is made room for before it is known to be allowed");
        for len in 0..packed.len() {
            assert!(chunk.piece(&packed[..len], &mut decoder, &mut room).is_err(), "cut at {len}");
        }
    }

    #[test]
    fn zeros_without_end_stop_at_the_room_there_is() {
        let packed = pack(&vec![0; 64 << 20]);
        let (mut decoder, mut room) = (ZstdDecoder::new().unwrap(), Vec::new());
        let chunk = ImageChunk::packed("pages-1.img", 0, &[0; MAX_IMAGE_CHUNK]);
        assert!(chunk.piece(&packed, &mut decoder, &mut room).is_err());
        assert!(room.capacity() <= MAX_IMAGE_CHUNK);
    }

    #[test]
    fn what_packing_does_not_make_shorter_is_not_packed() {
        let mut frame = Vec::new();
        let chunk = ImageChunk::packed("x", 0, &[7; 100]);
        for (payload, is_allowed) in [(0, false), (1, true), (99, true), (100, false), (101, false)] {
            let written = chunk.encode(payload, &mut Sequencer::default(), &mut frame);
            assert_eq!(written.is_ok(), is_allowed, "{payload}");
        }
        let chunk = ImageChunk { unpacked: Some(MAX_IMAGE_CHUNK as u32 + 1), ..chunk };
        let error = chunk.encode(9, &mut Sequencer::default(), &mut frame).unwrap_err();
        assert!(matches!(error, EncodeError::Invalid(DecodeError::Limit { .. })), "{error}");
        // The last byte of the piece counts, not that of the payload.
        let chunk = ImageChunk { unpacked: Some(100), offset: u64::MAX - 50, ..chunk };
        assert!(chunk.encode(9, &mut Sequencer::default(), &mut frame).is_err());
    }
}
