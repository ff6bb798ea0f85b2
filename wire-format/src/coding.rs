//! Compression, and when it pays.

use crate::error::{DecodeError, EncodeError};
use std::time::Duration;
use zstd::bulk::{Compressor, Decompressor};

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
        out.reserve(zstd::zstd_safe::compress_bound(bytes.len()));
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
    /// Bytes that are no zstd frame, or one of another length.
    pub fn decode(&mut self, bytes: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
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

/// Decides batch by batch whether to compress, from what the link and the compressor are seen to do.
///
/// One worker reads, compresses and sends, so the times add up: a byte costs `1/link` raw, and
/// `1/zstd + ratio/link` compressed. Compression is chosen while the second is less. The compressor is measured
/// again from time to time, when its best case could still win: data changes along a program's memory.
#[derive(Clone, Debug, Default)]
pub struct CodingChooser {
    /// Seconds a byte takes.
    link: Option<f64>,
    zstd: Option<f64>,
    /// Compressed size over size.
    ratio: f64,
    compressing: bool,
    batches: u32,
}

/// Weight of a new measurement in the average.
const WEIGHT: f64 = 0.15;
/// What must be gained to change over, so that noise does not toggle.
const MARGIN: f64 = 0.1;
/// Every so many batches the way that is not used is tried again.
const PROBE: u32 = 64;
/// No core compresses faster: above this link rate (bytes a second) it is not even tried.
const FASTEST_ZSTD: f64 = 1.2e9;

impl CodingChooser {
    /// `bytes` took `time` on the link.
    pub fn observe_link(&mut self, bytes: usize, time: Duration) {
        average(&mut self.link, time.as_secs_f64() / bytes.max(1) as f64);
    }

    /// The compressor made `out` bytes of `bytes` in `time`.
    pub fn observe_zstd(&mut self, bytes: usize, out: usize, time: Duration) {
        let first = self.zstd.is_none();
        average(&mut self.zstd, time.as_secs_f64() / bytes.max(1) as f64);
        let ratio = out as f64 / bytes.max(1) as f64;
        self.ratio = if first { ratio } else { self.ratio + WEIGHT * (ratio - self.ratio) };
    }

    /// Whether to compress the next batch.
    pub fn compress(&mut self) -> bool {
        self.batches = self.batches.wrapping_add(1);
        let Some(link) = self.link else { return false };
        let Some(zstd) = self.zstd else {
            // Never measured: once, where it could pay at all.
            return link > 1.0 / FASTEST_ZSTD;
        };
        let (raw, packed) = (link, zstd + self.ratio * link);
        self.compressing = if self.compressing { packed < raw } else { packed < raw * (1.0 - MARGIN) };
        let could_pay = zstd < link;
        self.compressing || (could_pay && self.batches.is_multiple_of(PROBE))
    }
}

fn average(value: &mut Option<f64>, sample: f64) {
    *value = Some(value.map_or(sample, |old| old + WEIGHT * (sample - old)));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(link: f64, zstd: f64, ratio: f64) -> usize {
        let mut chooser = CodingChooser::default();
        let mut packed = 0;
        for _ in 0..1000 {
            let bytes = 262_144;
            let mut wire = bytes as f64;
            if chooser.compress() {
                packed += 1;
                wire *= ratio;
                let out = (bytes as f64 * ratio) as usize;
                chooser.observe_zstd(bytes, out, Duration::from_secs_f64(bytes as f64 / zstd));
            }
            chooser.observe_link(wire as usize, Duration::from_secs_f64(wire / link));
        }
        packed
    }

    #[test]
    fn a_slow_link_compresses_and_a_fast_one_does_not() {
        assert!(feed(125e6, 600e6, 0.25) > 990, "1 Gbit/s and a heap");
        assert_eq!(feed(4e9, 600e6, 0.25), 0, "32 Gbit/s: not even tried");
        assert!(feed(1e9, 600e6, 0.25) <= 3, "8 Gbit/s: tried, and left");
        assert!(feed(125e6, 600e6, 1.0) <= 17, "incompressible: only looked at from time to time");
    }

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
        packed.truncate(packed.len() / 2);
        assert!(decoder.decode(&packed, &mut back).is_err());
    }
}
