//! Compression of a batch's pages: one zstd frame that says how long its content is.

use crate::error::{DecodeError, EncodeError};
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe;

/// zstd's level: the fastest that still takes most heaps to a quarter.
const LEVEL: i32 = 1;

/// Compresses batches; keeps its memory.
pub struct ZstdEncoder {
    context: Compressor<'static>,
}

impl std::fmt::Debug for ZstdEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ZstdEncoder")
    }
}

impl ZstdEncoder {
    /// An encoder.
    ///
    /// # Errors
    /// When zstd has no memory.
    pub fn new() -> Result<Self, EncodeError> {
        let context = Compressor::new(LEVEL).map_err(|e| EncodeError::Zstd(e.to_string()))?;
        Ok(Self { context })
    }

    /// Compresses `bytes` into `out`, which is emptied first.
    ///
    /// # Errors
    /// When zstd fails.
    pub fn encode(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeError> {
        out.clear();
        out.reserve(zstd_safe::compress_bound(bytes.len()));
        self.context.compress_to_buffer(bytes, out).map_err(|e| EncodeError::Zstd(e.to_string()))?;
        Ok(())
    }
}

/// Decompresses batches; keeps its memory, and never gives more than was announced.
pub struct ZstdDecoder {
    context: Decompressor<'static>,
}

impl std::fmt::Debug for ZstdDecoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ZstdDecoder")
    }
}

impl ZstdDecoder {
    /// A decoder.
    ///
    /// # Errors
    /// When zstd has no memory.
    pub fn new() -> Result<Self, DecodeError> {
        let context = Decompressor::new().map_err(|e| DecodeError::Zstd(e.to_string()))?;
        Ok(Self { context })
    }

    /// Decompresses `bytes` into exactly `out`.
    ///
    /// # Errors
    /// Bytes that are not exactly one zstd frame, or one of another length.
    pub fn decode(&mut self, bytes: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
        // zstd itself takes several frames in a row, and frames that it skips.
        if !matches!(zstd_safe::find_frame_compressed_size(bytes), Ok(len) if len == bytes.len()) {
            return Err(DecodeError::Zstd("it is not exactly one frame".to_owned()));
        }
        let got =
            self.context.decompress_to_buffer(bytes, out).map_err(|e| DecodeError::Zstd(e.to_string()))?;
        if got != out.len() {
            return Err(DecodeError::Zstd(format!(
                "{got} bytes came out where {} were announced",
                out.len()
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_survive_and_a_bomb_does_not() {
        let (mut encoder, mut decoder) = (ZstdEncoder::new().unwrap(), ZstdDecoder::new().unwrap());
        let bytes: Vec<u8> = (0..65536u32).map(|i| (i / 300) as u8).collect();
        let mut packed = Vec::new();
        encoder.encode(&bytes, &mut packed).unwrap();
        let mut back = vec![0; bytes.len()];
        decoder.decode(&packed, &mut back).unwrap();
        assert!(back == bytes && packed.len() < bytes.len() / 4);
        assert!(decoder.decode(&packed, &mut back[..4096]).is_err(), "more than announced");
        assert!(decoder.decode(&packed, &mut vec![0; bytes.len() + 1]).is_err(), "less than announced");
        for len in 0..packed.len() {
            assert!(decoder.decode(&packed[..len], &mut back).is_err(), "cut at {len}");
        }
        decoder.decode(&packed, &mut back).unwrap();
        assert!(back == bytes, "a decoder goes on after an error");
    }

    #[test]
    fn many_zeros_in_few_bytes_stop_at_the_room_there_is() {
        let mut packed = Vec::new();
        ZstdEncoder::new().unwrap().encode(&vec![0; 64 << 20], &mut packed).unwrap();
        assert!(packed.len() < 16 << 10);
        let mut room = vec![0xee; 8192];
        assert!(ZstdDecoder::new().unwrap().decode(&packed, &mut room[..4096]).is_err());
        assert!(room[4096..].iter().all(|byte| *byte == 0xee));
    }

    #[test]
    fn a_payload_is_one_frame() {
        let (mut encoder, mut decoder) = (ZstdEncoder::new().unwrap(), ZstdDecoder::new().unwrap());
        let (mut packed, mut back) = (Vec::new(), vec![0; 8192]);
        encoder.encode(&[7; 4096], &mut packed).unwrap();
        let twice = [&packed[..], &packed[..]].concat();
        assert!(decoder.decode(&twice, &mut back).is_err(), "two frames");
        // A frame that decoders skip: its magic, the length of its content, and that.
        let skipped = [&packed[..], &[0x50, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 9]].concat();
        assert!(decoder.decode(&skipped, &mut back[..4096]).is_err(), "bytes after the frame");
        decoder.decode(&packed, &mut back[..4096]).unwrap();
        assert_eq!(back[..4096], [7; 4096]);
        assert!(decoder.decode(&[], &mut []).is_err(), "no frame");
    }
}
