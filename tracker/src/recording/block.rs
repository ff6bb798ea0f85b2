//! The frames of a recording: a head with its own checksum, and a payload that may be compressed.
//!
//! The head is checked by itself: a length that a flipped bit has made larger would else look like a file that ends
//! too early, and an interrupted recording is no error. Checksums are seeded with the number of the frame: one that
//! is lost, doubled or moved does not fit.

use super::ReadError;
use std::io::{self, Read};
use xxhash_rust::xxh3::xxh3_64_with_seed;

pub(super) const HEADER: u8 = 0;
pub(super) const OBSERVATION: u8 = 1;
pub(super) const END: u8 = 2;

const PLAIN: u8 = 0;
const ZSTD: u8 = 1;

/// Bytes of a head.
pub(super) const HEAD: usize = 24;
/// The largest payload before compression.
pub(super) const LIMIT: usize = 256 << 20;
/// A payload is at most so many times larger than what is stored of it: who reads a file reserves no more memory
/// than that for what a frame promises.
const RATIO: usize = 256;

/// What stands in the file for a payload.
pub(super) fn encode(
    kind: u8,
    number: u64,
    payload: &[u8],
    compressor: &mut zstd::bulk::Compressor<'_>,
) -> io::Result<Vec<u8>> {
    let compressed = if kind == OBSERVATION { Some(compressor.compress(payload)?) } else { None };
    let compressed =
        compressed.filter(|bytes| bytes.len() < payload.len() && payload.len() <= bytes.len() * RATIO);
    let (coding, stored) = match &compressed {
        Some(bytes) => (ZSTD, &bytes[..]),
        None => (PLAIN, payload),
    };
    let mut out = Vec::with_capacity(HEAD + stored.len());
    out.extend_from_slice(&[kind, coding, 0, 0]);
    // Both are at most `LIMIT`.
    out.extend_from_slice(&(stored.len() as u32).to_le_bytes());
    out.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    out.extend_from_slice(&head_sum(&out, number).to_le_bytes());
    out.extend_from_slice(&xxh3_64_with_seed(stored, number).to_le_bytes());
    out.extend_from_slice(stored);
    Ok(out)
}

fn head_sum(head: &[u8], number: u64) -> u32 {
    xxh3_64_with_seed(head, number) as u32
}

/// What was read of a frame.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) kind: u8,
    pub(super) payload: Vec<u8>,
    /// Bytes of it in the file.
    pub(super) size: u64,
}

/// Reads the frame of this number, which begins at this offset; `None` when the file ends before it does.
pub(super) fn read(input: &mut impl Read, frame: u64, offset: u64) -> Result<Option<Block>, ReadError> {
    let damaged = |what| ReadError::Damaged { frame, offset, what };
    let head = read_up_to(input, HEAD)?;
    if head.len() < HEAD {
        return Ok(None);
    }
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    if word(12) != head_sum(&head[..12], frame) {
        return Err(damaged("the checksum of its head does not fit"));
    }
    let (kind, coding) = (head[0], head[1]);
    let (stored_len, len) = (word(4) as usize, word(8) as usize);
    let sizes_fit = match coding {
        PLAIN => stored_len == len,
        ZSTD => stored_len < len && len / RATIO <= stored_len,
        _ => return Err(damaged("its coding is unknown")),
    };
    if !sizes_fit || len > LIMIT || head[2..4] != [0, 0] {
        return Err(damaged("its head makes no sense"));
    }
    let stored = read_up_to(input, stored_len)?;
    if stored.len() < stored_len {
        return Ok(None);
    }
    let sum = u64::from(word(16)) | u64::from(word(20)) << 32;
    if xxh3_64_with_seed(&stored, frame) != sum {
        return Err(damaged("the checksum of its payload does not fit"));
    }
    let size = (HEAD + stored_len) as u64;
    let payload = match coding {
        PLAIN => stored,
        _ => {
            let payload =
                zstd::bulk::decompress(&stored, len).map_err(|_| damaged("it cannot be decompressed"))?;
            if payload.len() != len {
                return Err(damaged("it is shorter than it says"));
            }
            payload
        }
    };
    Ok(Some(Block { kind, payload, size }))
}

/// Reads so many bytes, or what there is. Memory grows with what is read, not with what was asked for.
pub(super) fn read_up_to(input: &mut impl Read, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    input.take(len as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}
