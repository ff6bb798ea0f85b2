//! How long threads waited: counts by length, to a 16th of an octave (4 % of the value).

use std::time::Duration;

/// Classes of an octave.
const CLASSES: u32 = 16;
/// Nanoseconds from 1 to 2^40, some 18 minutes: what takes longer counts as that.
const OCTAVES: u32 = 40;

/// Lengths of many waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Latencies {
    counts: Vec<u64>,
    count: u64,
    max: Duration,
}

impl Default for Latencies {
    fn default() -> Self {
        Self { counts: vec![0; (CLASSES * OCTAVES) as usize], count: 0, max: Duration::ZERO }
    }
}

impl Latencies {
    /// One wait.
    pub fn record(&mut self, wait: Duration) {
        let ns = wait.as_nanos().clamp(1, (1 << OCTAVES) - 1) as u64;
        let octave = ns.ilog2();
        // The bits below the highest say where in the octave it is.
        let within = if octave >= 4 { (ns >> (octave - 4)) & 15 } else { (ns << (4 - octave)) & 15 };
        self.counts[(octave * CLASSES) as usize + within as usize] += 1;
        self.count += 1;
        self.max = self.max.max(wait);
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The longest.
    pub fn max(&self) -> Duration {
        self.max
    }

    /// The length that this share of all waits does not exceed, rounded up to a class; zero when there were none.
    pub fn quantile(&self, share: f64) -> Duration {
        let rank = ((self.count as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        for (class, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                let (octave, within) = (class as u32 / CLASSES, class as u64 % u64::from(CLASSES));
                let end = ((17 + within) << octave) >> 4;
                return Duration::from_nanos(end).min(self.max);
            }
        }
        Duration::ZERO
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_found_to_a_class() {
        let mut waits = Latencies::default();
        assert_eq!((waits.quantile(0.5), waits.count()), (Duration::ZERO, 0));
        (1..=1000).for_each(|us| waits.record(Duration::from_micros(us)));
        for (share, us) in [(0.5, 500.0), (0.99, 990.0), (0.1, 100.0)] {
            let found = waits.quantile(share).as_secs_f64() * 1e6;
            assert!((us..us * 1.07).contains(&found), "{share}: {found} us");
        }
        assert_eq!((waits.quantile(1.0), waits.max()), (Duration::from_millis(1), Duration::from_millis(1)));
        waits.record(Duration::ZERO);
        waits.record(Duration::from_secs(1 << 20));
        assert_eq!(waits.count(), 1002);
        assert_eq!(waits.quantile(0.0), Duration::from_nanos(1));
    }
}
