//! What a chooser will come to, where the costs are known before: for who predicts a migration.

use super::mix::{self, Choice};

/// What pages come to on their way: for each byte of content.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prospect {
    /// Seconds of the worker and of the link, whichever takes longer.
    pub seconds: f64,
    /// What is left of the byte.
    pub ratio: f64,
    /// Seconds of the worker that go into compressing it.
    pub coding: f64,
}

/// What [`super::CodingChooser`] makes of whole pages when it has found out everything: `levels` are what compressing a byte takes
/// in seconds and what is left of it, the quicker level first. `work` is what reading and hashing a byte take, `send` what
/// sending one takes a core, `link` what the link takes for one that is this worker's; where several share it, each has its part.
pub fn prospect(levels: &[(f64, f64)], work: f64, send: f64, link: f64) -> Prospect {
    let mut choices = vec![Choice { way: super::RAW, coding: 0.0, ratio: 1.0 }];
    if link >= super::FASTEST_ZSTD {
        choices.extend(levels.iter().enumerate().map(|(at, (coding, ratio))| Choice {
            way: super::RAW + 1 + at,
            coding: *coding,
            ratio: *ratio,
        }));
    }
    let mix = mix::best(&choices, link, send, work, 1.0);
    Prospect { seconds: mix.time, ratio: mix.ratio, coding: mix.coding }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 500 MB/s and 100 MB/s, to a fifth.
    const LEVELS: [(f64, f64); 2] = [(2e-9, 0.2), (10e-9, 0.19)];

    #[test]
    fn a_link_is_filled_whatever_the_core_can_do() {
        // 125 MB/s: a core that compresses fills it four times over.
        let slow = prospect(&LEVELS, 0.1e-9, 0.3e-9, 8e-9);
        assert!((0.18..0.21).contains(&slow.ratio), "{slow:?}");
        // The same core with a quarter of the time: what it cannot compress goes as it is.
        let busy = prospect(&LEVELS.map(|(coding, ratio)| (coding * 4.0, ratio)), 0.4e-9, 1.2e-9, 8e-9);
        assert!(busy.ratio > 1.5 * slow.ratio && busy.seconds < 8e-9, "{busy:?}");
        // Too quick for any compression.
        let fast = prospect(&LEVELS, 0.1e-9, 0.3e-9, 0.1e-9);
        assert_eq!(fast.ratio, 1.0);
        assert!((fast.seconds - 0.4e-9).abs() < 1e-12, "{fast:?}");
    }
}
