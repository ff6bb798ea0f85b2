//! Pieces of CRIU's images, off the link: as they are, or packed.

use super::failure::ReceiveError;
use crate::link::TcpLink;
use pageferry_wire_format::{ImageChunk, ZstdDecoder, digest, limits};
use std::io::IoSliceMut;

/// Bytes of a packed piece that there is room for before one comes: no source of this version packs more in one.
const ROOM: usize = 64 << 10;

/// Takes pieces from a link, and keeps its memory. The program stands still while they come, so the memory is got before.
#[derive(Debug)]
pub(super) struct Pieces {
    decoder: Option<ZstdDecoder>,
    payload: Vec<u8>,
    room: Vec<u8>,
}

impl Pieces {
    pub(super) fn new() -> Self {
        // Written to, so that the system has given all of it. Where there is no memory for a decoder, that is said when one is needed.
        Self {
            decoder: ZstdDecoder::new().ok(),
            payload: vec![0xff; limits::MAX_IMAGE_CHUNK],
            room: vec![0xff; ROOM],
        }
    }

    /// Receives the payload of `chunk`, `len` bytes; gives the piece, which has its digest.
    pub(super) fn receive(
        &mut self,
        link: &mut TcpLink,
        chunk: &ImageChunk,
        len: usize,
    ) -> Result<&[u8], ReceiveError> {
        let Self { decoder, payload, room } = self;
        // Never shorter than it was, and not written over with zeros each time.
        if payload.len() < len {
            payload.resize(len, 0);
        }
        let payload = &mut payload[..len];
        link.receive_all(&mut [IoSliceMut::new(payload)])?;
        let failed =
            |source| ReceiveError::ImageUnpack { name: chunk.name.clone(), offset: chunk.offset, source };
        let decoder = match decoder {
            Some(decoder) => decoder,
            none => none.insert(ZstdDecoder::new().map_err(failed)?),
        };
        let piece = chunk.piece(payload, decoder, room).map_err(failed)?;
        if digest::page(piece) != chunk.digest {
            return Err(ReceiveError::ImageDigest { name: chunk.name.clone(), offset: chunk.offset });
        }
        Ok(piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_wire_format::ZstdEncoder;
    use std::io::IoSlice;

    #[test]
    fn packed_and_plain_pieces_come_in_turn_and_damage_is_found() {
        let (mut ours, mut theirs) = TcpLink::pair().unwrap();
        let mut pieces = Pieces::new();
        let bytes: Vec<u8> = (0..60_000u32).map(|n| (n / 100) as u8).collect();
        let mut packed = Vec::new();
        ZstdEncoder::new().unwrap().encode(1, &bytes, &mut packed).unwrap();
        let mut take = |chunk: &ImageChunk, payload: &[u8]| {
            ours.send_all(&mut [IoSlice::new(payload)]).unwrap();
            pieces.receive(&mut theirs, chunk, payload.len()).map(<[u8]>::to_vec)
        };
        let (small, chunk) = (ImageChunk::new("core-1.img", 0, b"x"), ImageChunk::packed("a", 0, &bytes));
        for _ in 0..2 {
            assert!(take(&chunk, &packed).unwrap() == bytes);
            assert!(take(&small, b"x").unwrap() == b"x");
            assert!(take(&ImageChunk::new("a", 0, &bytes), &bytes).unwrap() == bytes);
        }
        assert!(matches!(take(&small, b"y"), Err(ReceiveError::ImageDigest { .. })));
        let other = ImageChunk { digest: small.digest, ..chunk.clone() };
        assert!(matches!(take(&other, &packed), Err(ReceiveError::ImageDigest { .. })));
        let longer = ImageChunk { unpacked: Some(60_001), ..chunk.clone() };
        assert!(matches!(take(&longer, &packed), Err(ReceiveError::ImageUnpack { .. })));
        assert!(take(&chunk, &packed).unwrap() == bytes, "it goes on after an error");
    }
}
