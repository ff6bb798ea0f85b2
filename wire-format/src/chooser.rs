//! When compression pays.

use crate::limits::PAGE_SIZE;
use std::time::Duration;

/// Weight of a new measurement in the average.
const WEIGHT: f64 = 0.15;
/// Weight of a batch that was sent raw to see what the link does: there is only one in many.
const GLIMPSE_WEIGHT: f64 = 0.5;
/// What must be gained to change over, so that noise does not toggle.
const MARGIN: f64 = 0.1;
/// Every so many raw batches one is compressed, where that could win.
const PROBE: u32 = 64;
/// ... and where it could win only if the compressor were faster than it was last seen. A first sample is often
/// slow (cold memory), and without another look it would be believed for ever.
const RARE_PROBE: u32 = 1024;
/// Every so many compressed batches one is sent raw, where that could win.
const GLIMPSE: u32 = 256;
/// Above this link rate (bytes a second) it is not even tried: only pages that are one repetition are compressed
/// faster than this, and the peer has to unpack them.
const FASTEST_ZSTD: f64 = 2.5e9;
/// A measurement of the link is made of at least so many bytes.
const SAMPLE: usize = 64 << 10;

/// Decides batch by batch whether to compress, from what the link and the compressor are seen to do.
///
/// One worker reads, compresses and sends, so the times add up: a byte costs `1/link` raw, and
/// `1/zstd + ratio/link` compressed. Compression is chosen while the second is less. The way that is not used is
/// tried again from time to time, if its best case could win: data changes along a program's memory, and links
/// change their pace.
///
/// What a send takes is not what the link takes: the system buffers, and drains the buffer while the worker
/// compresses. So a send that took `s` after compressing for `c` says only that the link takes between `s` and
/// `s + c` for these bytes. An estimate within these bounds is left alone, one outside is moved to the nearer one.
/// Taking `s` alone would make the link look faster as soon as compression is on, which would turn it off again.
#[derive(Clone, Debug, Default)]
pub struct CodingChooser {
    /// Seconds a byte takes on the link.
    link: Option<f64>,
    /// Seconds a byte takes in the compressor.
    zstd: Option<f64>,
    /// Compressed size over size.
    ratio: f64,
    compressing: bool,
    /// Batches since the way that is not used was tried last.
    since: u32,
    /// The batch under way is sent raw only to see what the link does.
    glimpse: bool,
    /// The best that the last measurement allows the link to be.
    link_at_best: f64,
    sample: Sample,
}

/// A measurement of the link under way.
#[derive(Clone, Debug, Default)]
struct Sample {
    bytes: usize,
    sending: f64,
    packing: f64,
}

impl CodingChooser {
    /// `bytes` (of a frame with its payload) took `time` to send.
    pub fn observe_link(&mut self, bytes: usize, time: Duration) {
        // Frames without page bytes are all overhead and say nothing about the link.
        if bytes < PAGE_SIZE {
            return;
        }
        self.sample.bytes += bytes;
        self.sample.sending += time.as_secs_f64();
        if self.sample.bytes < SAMPLE {
            return;
        }
        let Sample { bytes, sending, packing } = std::mem::take(&mut self.sample);
        let least = sending / bytes as f64;
        let most = (sending + packing) / bytes as f64;
        self.link_at_best = least;
        let weight = if std::mem::take(&mut self.glimpse) { GLIMPSE_WEIGHT } else { WEIGHT };
        let link = self.link.get_or_insert(least);
        *link += weight * (link.clamp(least, most) - *link);
    }

    /// The compressor made `out` bytes of `bytes` in `time`; what it made is sent next.
    pub fn observe_zstd(&mut self, bytes: usize, out: usize, time: Duration) {
        let bytes = bytes.max(1) as f64;
        let (cost, ratio) = (time.as_secs_f64() / bytes, out as f64 / bytes);
        match &mut self.zstd {
            None => (self.zstd, self.ratio) = (Some(cost), ratio),
            Some(zstd) => {
                *zstd += WEIGHT * (cost - *zstd);
                self.ratio += WEIGHT * (ratio - self.ratio);
            }
        }
        self.sample.packing += time.as_secs_f64();
    }

    /// Whether to compress the next batch.
    pub fn compress(&mut self) -> bool {
        let Some(link) = self.link else { return false };
        let worth_a_try = link > 1.0 / FASTEST_ZSTD;
        // Never measured: once, where it could pay at all.
        let Some(zstd) = self.zstd else { return worth_a_try };

        let packed_on = |link: f64| zstd + self.ratio * link;
        let wanted = if self.compressing { link } else { link * (1.0 - MARGIN) };
        let compressing = packed_on(link) < wanted;
        self.since = if compressing == self.compressing { self.since.saturating_add(1) } else { 0 };
        self.compressing = compressing;

        let other_way_from = if compressing {
            (self.link_at_best < packed_on(self.link_at_best)).then_some(GLIMPSE)
        } else if zstd < link {
            Some(PROBE)
        } else {
            worth_a_try.then_some(RARE_PROBE)
        };
        let try_the_other = other_way_from.is_some_and(|from| self.since >= from);
        if try_the_other {
            self.since = 0;
            if compressing {
                self.glimpse = true;
                self.sample = Sample::default();
            }
        }
        compressing != try_the_other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BATCH: f64 = 1048576.0;

    /// One worker, a link, and the system's buffer between them, in virtual time.
    struct World {
        /// Bytes a second.
        link: f64,
        zstd: f64,
        ratio: f64,
        /// Bytes that the system takes before a send has to wait.
        buffer: f64,
        now: f64,
        queued: f64,
    }

    impl World {
        fn new(link: f64, zstd: f64, ratio: f64) -> Self {
            Self { link, zstd, ratio, buffer: 4.0 * BATCH, now: 0.0, queued: 0.0 }
        }

        fn pass(&mut self, seconds: f64) {
            self.now += seconds;
            self.queued = (self.queued - seconds * self.link).max(0.0);
        }

        /// Sends into the buffer and says how long that took.
        fn send(&mut self, bytes: f64) -> f64 {
            let begin = self.now;
            self.pass(5e-6 + bytes / 6e9);
            let surplus = (self.queued + bytes - self.buffer).max(0.0);
            self.pass(surplus / self.link);
            self.queued += bytes;
            self.now - begin
        }

        /// Sends batches, compressed if `choose` says so; gives how many were, and the bytes a second.
        fn run(&mut self, batches: usize, chooser: &mut CodingChooser, fixed: Option<bool>) -> (usize, f64) {
            let begin = self.now;
            let mut packed = 0;
            for _ in 0..batches {
                self.pass(BATCH / 4e9);
                let mut wire = BATCH;
                if fixed.unwrap_or_else(|| chooser.compress()) {
                    packed += 1;
                    wire *= self.ratio;
                    let time = BATCH / self.zstd;
                    self.pass(time);
                    chooser.observe_zstd(BATCH as usize, wire as usize, Duration::from_secs_f64(time));
                }
                let time = self.send(wire);
                chooser.observe_link(wire as usize, Duration::from_secs_f64(time));
            }
            self.pass(self.queued / self.link);
            (packed, batches as f64 * BATCH / (self.now - begin))
        }
    }

    /// After some batches that fill the system's buffer for the first time, and that no choice can know about.
    fn run(link: f64, zstd: f64, ratio: f64, fixed: Option<bool>) -> (usize, f64) {
        let (mut world, mut chooser) = (World::new(link, zstd, ratio), CodingChooser::default());
        world.run(20, &mut chooser, fixed);
        world.run(1000, &mut chooser, fixed)
    }

    #[test]
    fn a_slow_link_compresses_and_a_fast_one_does_not() {
        for link in [1.25e6, 12.5e6, 125e6] {
            let (packed, _) = run(link, 600e6, 0.25, None);
            assert!(packed > 970, "{link} bytes a second and a heap: {packed}");
        }
        assert_eq!(run(4e9, 600e6, 0.25, None).0, 0, "32 Gbit/s: not even tried");
        assert!(run(1e9, 600e6, 0.25, None).0 <= 3, "8 Gbit/s: tried, and left");
        assert!(run(125e6, 600e6, 1.0, None).0 <= 17, "incompressible: only looked at from time to time");
    }

    #[test]
    fn the_choice_is_never_slower_than_no_compression() {
        for link in [1e6, 12.5e6, 60e6, 125e6, 250e6, 400e6, 800e6, 1.25e9, 3e9, 6e9] {
            for zstd in [80e6, 300e6, 600e6, 1.2e9, 2.2e9] {
                for ratio in [0.01, 0.1, 0.25, 0.5, 0.8, 0.99, 1.0] {
                    let (_, raw) = run(link, zstd, ratio, Some(false));
                    let (packed, chosen) = run(link, zstd, ratio, None);
                    assert!(
                        chosen > 0.97 * raw,
                        "link {link:e}, zstd {zstd:e}, ratio {ratio}: {chosen:e} instead of {raw:e}, {packed} packed"
                    );
                    if link <= 125e6 && zstd >= 300e6 && ratio <= 0.25 {
                        let (_, all) = run(link, zstd, ratio, Some(true));
                        assert!(
                            chosen > 0.9 * all,
                            "link {link:e}, zstd {zstd:e}, ratio {ratio}: {chosen:e} of {all:e}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_slow_first_look_at_the_compressor_is_not_believed_for_ever() {
        let mut chooser = CodingChooser::default();
        let mut world = World::new(125e6, 50e6, 0.2);
        world.run(60, &mut chooser, None);
        world.zstd = 700e6;
        world.run(16_000, &mut chooser, None);
        let (packed, _) = world.run(1000, &mut chooser, None);
        assert!(packed > 950, "{packed}");
    }

    #[test]
    fn a_link_that_becomes_fast_is_noticed() {
        let mut chooser = CodingChooser::default();
        let mut world = World::new(125e6, 600e6, 0.25);
        let (packed, _) = world.run(1000, &mut chooser, None);
        assert!(packed > 950, "{packed}");
        world.link = 5e9;
        world.run(2000, &mut chooser, None);
        let (packed, _) = world.run(1000, &mut chooser, None);
        assert!(packed < 20, "{packed}");
    }

    #[test]
    fn frames_without_pages_do_not_make_the_link_look_slow() {
        let mut chooser = CodingChooser::default();
        let mut world = World::new(5e9, 600e6, 0.25);
        world.run(100, &mut chooser, None);
        for _ in 0..10_000 {
            chooser.observe_link(90, Duration::from_micros(8));
        }
        assert_eq!(world.run(100, &mut chooser, None).0, 0);
    }
}
