//! Compression of a batch's pages: one zstd frame that says how long its content is, with or without a prefix.

use crate::error::{DecodeError, EncodeError};
use crate::limits::MAX_ZSTD_WINDOW_LOG;
use zstd::zstd_safe::{self, CCtx, CParameter, DCtx};

/// On top of a prefix the table of the fast levels is at least so large (as a logarithm). zstd looks up no more of a prefix
/// than eight bytes for each entry; level 1 has 2^14 entries by itself, and would see an eighth of a batch's bases.
const LEAST_HASH_LOG: u32 = 17;
/// From this level on zstd's own tables are larger than that.
const OWN_TABLES_FROM: i32 = 3;

/// Compresses batches; keeps its memory.
pub struct ZstdEncoder {
    context: CCtx<'static>,
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
        Ok(Self { context: CCtx::try_create().ok_or_else(|| EncodeError::Zstd(NO_MEMORY.to_owned()))? })
    }

    /// Compresses `bytes` with zstd's `level` (1 is fast, 6 takes about a fifth of its speed and makes less) into `out`,
    /// which is emptied first.
    ///
    /// # Errors
    /// When zstd fails, or does not know the level.
    pub fn encode(&mut self, level: i32, bytes: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeError> {
        compress(&mut self.context, level, bytes, out)
    }

    /// Compresses `bytes` as [`ZstdEncoder::encode`] does, on top of `prefix`: what is in there already, best at the same
    /// distance, costs next to nothing. Both are at most a batch's pages.
    ///
    /// # Errors
    /// As [`ZstdEncoder::encode`].
    pub fn encode_on(
        &mut self,
        level: i32,
        prefix: &[u8],
        bytes: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        // A context borrows its prefix for as long as it lives, so it lives for this batch only. zstd sets its tables up
        // anew for each prefix anyway.
        let mut context = CCtx::try_create().ok_or_else(|| EncodeError::Zstd(NO_MEMORY.to_owned()))?;
        let window = CParameter::WindowLog(MAX_ZSTD_WINDOW_LOG);
        context.set_parameter(window).map_err(encode_error)?;
        if level < OWN_TABLES_FROM {
            context.set_parameter(CParameter::HashLog(LEAST_HASH_LOG)).map_err(encode_error)?;
        }
        context.ref_prefix(prefix).map_err(encode_error)?;
        compress(&mut context, level, bytes, out)
    }
}

const NO_MEMORY: &str = "there is no memory for its tables";

fn compress(context: &mut CCtx<'_>, level: i32, bytes: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeError> {
    out.clear();
    out.reserve(zstd_safe::compress_bound(bytes.len()));
    context.set_parameter(CParameter::CompressionLevel(level)).map_err(encode_error)?;
    context.compress2(out, bytes).map_err(encode_error)?;
    Ok(())
}

fn encode_error(code: zstd_safe::ErrorCode) -> EncodeError {
    EncodeError::Zstd(zstd_safe::get_error_name(code).to_owned())
}

/// Decompresses batches; keeps its memory, and never gives more than was announced.
pub struct ZstdDecoder {
    context: DCtx<'static>,
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
        Ok(Self { context: DCtx::try_create().ok_or_else(|| DecodeError::Zstd(NO_MEMORY.to_owned()))? })
    }

    /// Decompresses `bytes` into exactly `out`.
    ///
    /// # Errors
    /// Bytes that are not exactly one zstd frame, or one of another length.
    pub fn decode(&mut self, bytes: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
        decompress(&mut self.context, bytes, out)
    }

    /// Decompresses `bytes` into exactly `out`, on top of the same prefix that they were compressed on.
    ///
    /// # Errors
    /// As [`ZstdDecoder::decode`]. Another prefix gives other bytes, or an error.
    pub fn decode_on(&mut self, prefix: &[u8], bytes: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
        // As in the encoder: the context does not outlive its prefix.
        let mut context = DCtx::try_create().ok_or_else(|| DecodeError::Zstd(NO_MEMORY.to_owned()))?;
        context.ref_prefix(prefix).map_err(decode_error)?;
        decompress(&mut context, bytes, out)
    }
}

fn decompress(context: &mut DCtx<'_>, bytes: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
    check_frame(bytes, out.len())?;
    let wanted = out.len();
    let got = context.decompress(out, bytes).map_err(decode_error)?;
    if got != wanted {
        return Err(DecodeError::Zstd(format!("{got} bytes came out where {wanted} were announced")));
    }
    Ok(())
}

fn decode_error(code: zstd_safe::ErrorCode) -> DecodeError {
    DecodeError::Zstd(zstd_safe::get_error_name(code).to_owned())
}

/// Looks at a frame before anything is done for it. Its header (RFC 8878, 3.1.1.1) is magic, descriptor, and, unless the
/// window is as long as the content, the window's size.
fn check_frame(bytes: &[u8], content: usize) -> Result<(), DecodeError> {
    let refused = |why: String| Err(DecodeError::Zstd(why));
    let is_frame = bytes.starts_with(&zstd_safe::MAGICNUMBER.to_le_bytes());
    let single = bytes.get(4).is_some_and(|descriptor| descriptor & 0x20 != 0);
    let log = bytes.get(5).map_or(0, |window| 10 + u32::from(window >> 3));
    // The three lowest bits add eighths of the power of two.
    let more = bytes.get(5).is_some_and(|window| window & 7 != 0);
    if is_frame && !single && (log > MAX_ZSTD_WINDOW_LOG || (log == MAX_ZSTD_WINDOW_LOG && more)) {
        return refused(format!("it wants a window of more than {} bytes", 1u32 << MAX_ZSTD_WINDOW_LOG));
    }
    // zstd itself takes several frames in a row, and frames that it skips.
    if !matches!(zstd_safe::find_frame_compressed_size(bytes), Ok(len) if len == bytes.len()) {
        return refused("it is not exactly one frame".to_owned());
    }
    match zstd_safe::get_frame_content_size(bytes) {
        Ok(Some(announced)) if announced == content as u64 => {}
        Ok(Some(announced)) => {
            return refused(format!("it announces {announced} bytes where {content} are due"));
        }
        _ => return refused("it does not announce the length of its content".to_owned()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{MAX_BATCH_PAGES, PAGE_SIZE};

    const LEVELS: [i32; 4] = [1, 2, 3, 6];

    /// Bytes that do not compress.
    fn noise(seed: u64, len: usize) -> Vec<u8> {
        let mut state = seed.wrapping_mul(2) + 1;
        let mut next = || {
            // Xorshift (Marsaglia 2003).
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        (0..len.div_ceil(8)).flat_map(|_| next().to_le_bytes()).take(len).collect()
    }

    #[test]
    fn pages_survive_and_a_bomb_does_not() {
        let (mut encoder, mut decoder) = (ZstdEncoder::new().unwrap(), ZstdDecoder::new().unwrap());
        let bytes: Vec<u8> = (0..65536u32).map(|i| (i / 300) as u8).collect();
        for level in LEVELS {
            let mut packed = Vec::new();
            encoder.encode(level, &bytes, &mut packed).unwrap();
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
    }

    /// Half of each page is as it was, in a whole batch of noise: without the prefix nothing can be gained.
    #[test]
    fn the_whole_prefix_is_used() {
        let (mut encoder, mut decoder) = (ZstdEncoder::new().unwrap(), ZstdDecoder::new().unwrap());
        let before = noise(1, MAX_BATCH_PAGES * PAGE_SIZE);
        let mut after = before.clone();
        for (number, page) in after.chunks_exact_mut(PAGE_SIZE).enumerate() {
            page[..PAGE_SIZE / 2].copy_from_slice(&noise(number as u64 + 2, PAGE_SIZE / 2));
        }
        let (mut alone, mut packed) = (Vec::new(), Vec::new());
        let mut back = vec![0; after.len()];
        for level in LEVELS {
            encoder.encode(level, &after, &mut alone).unwrap();
            encoder.encode_on(level, &before, &after, &mut packed).unwrap();
            assert!(alone.len() >= after.len(), "level {level}");
            // The slower levels look less often into what does not compress.
            let limit = after.len() * if level < 5 { 52 } else { 58 } / 100;
            assert!(packed.len() < limit, "level {level}: {} of {}", packed.len(), after.len());
            decoder.decode_on(&before, &packed, &mut back).unwrap();
            assert!(back == after, "level {level}");
        }
        assert!(decoder.decode(&packed, &mut back).is_err() || back != after, "the prefix is needed");
        let other = noise(9, before.len());
        assert!(decoder.decode_on(&other, &packed, &mut back).is_err() || back != after);
    }

    #[test]
    fn a_prefix_is_bytes_and_never_a_dictionary() {
        let (mut encoder, mut decoder) = (ZstdEncoder::new().unwrap(), ZstdDecoder::new().unwrap());
        // What begins with this is read as a dictionary where a dictionary may come.
        let mut before = noise(3, PAGE_SIZE);
        before[..4].copy_from_slice(&0xec30_a437_u32.to_le_bytes());
        let mut after = before.clone();
        after[100] ^= 1;
        let (mut packed, mut back) = (Vec::new(), vec![0; PAGE_SIZE]);
        encoder.encode_on(1, &before, &after, &mut packed).unwrap();
        decoder.decode_on(&before, &packed, &mut back).unwrap();
        assert!(back == after && packed.len() < 100, "{}", packed.len());
    }

    #[test]
    fn many_zeros_in_few_bytes_stop_at_the_room_there_is() {
        let mut packed = Vec::new();
        ZstdEncoder::new().unwrap().encode(1, &vec![0; 64 << 20], &mut packed).unwrap();
        assert!(packed.len() < 16 << 10);
        let mut room = vec![0xee; 8192];
        let mut decoder = ZstdDecoder::new().unwrap();
        assert!(decoder.decode(&packed, &mut room[..4096]).is_err());
        assert!(decoder.decode_on(&[1; 4096], &packed, &mut room[..4096]).is_err());
        assert!(room[4096..].iter().all(|byte| *byte == 0xee));
    }

    #[test]
    fn a_frame_that_wants_a_large_window_is_refused() {
        let content = vec![7; 4096];
        // Magic; a content size of two bytes and no single segment; the window; the size less 256; one last block of
        // 4096 times the same byte.
        let frame = |window: u8| {
            let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0x40, window];
            frame.extend(3840u16.to_le_bytes());
            frame.extend(&(4096u32 << 3 | 1 << 1 | 1).to_le_bytes()[..3]);
            frame.push(7);
            frame
        };
        let (mut decoder, mut back) = (ZstdDecoder::new().unwrap(), vec![0; 4096]);
        for log in 10..=MAX_ZSTD_WINDOW_LOG {
            decoder.decode(&frame(((log - 10) << 3) as u8), &mut back).unwrap();
            assert_eq!(back, content, "a window of 2^{log}");
        }
        for window in [(11 << 3) + 1, 12 << 3, 17 << 3, 0xff] {
            let error = decoder.decode(&frame(window), &mut back).unwrap_err();
            assert!(error.to_string().contains("window"), "{window:#x}: {error}");
        }
    }

    #[test]
    fn a_payload_is_one_frame_that_says_its_length() {
        let (mut encoder, mut decoder) = (ZstdEncoder::new().unwrap(), ZstdDecoder::new().unwrap());
        let (mut packed, mut back) = (Vec::new(), vec![0; 8192]);
        encoder.encode(1, &[7; 4096], &mut packed).unwrap();
        let twice = [&packed[..], &packed[..]].concat();
        assert!(decoder.decode(&twice, &mut back).is_err(), "two frames");
        // A frame that decoders skip: its magic, the length of its content, and that.
        let skipped = [&packed[..], &[0x50, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 9]].concat();
        assert!(decoder.decode(&skipped, &mut back[..4096]).is_err(), "bytes after the frame");
        decoder.decode(&packed, &mut back[..4096]).unwrap();
        assert_eq!(back[..4096], [7; 4096]);
        assert!(decoder.decode(&[], &mut []).is_err(), "no frame");
        // The same content in a frame with a window, and without a size.
        let mut silent = vec![0x28, 0xb5, 0x2f, 0xfd, 0, 0x10];
        silent.extend(&(4096u32 << 3 | 1 << 1 | 1).to_le_bytes()[..3]);
        silent.push(7);
        let error = decoder.decode(&silent, &mut back[..4096]).unwrap_err();
        assert!(error.to_string().contains("does not announce"), "{error}");
    }
}
