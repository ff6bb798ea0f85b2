//! A token bucket: how long to wait before the next bytes may go. Pure; time is a parameter.

use std::time::Duration;

/// Bytes that may go at once after a pause, as time at the full rate: long enough that a late wake-up costs
/// no bandwidth, short enough that a second's count stays within a few per cent.
const BURST: Duration = Duration::from_millis(20);

/// Limits bytes to a rate.
#[derive(Clone, Debug)]
pub struct Shaper {
    bytes_per_second: u64,
    /// Point on the caller's clock up to which the bytes that were already let through last.
    paid_until: Duration,
}

impl Shaper {
    /// A bucket for `bytes_per_second` (more than zero), full at time zero.
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), paid_until: Duration::ZERO }
    }

    /// Takes `bytes` out of the bucket at `now` (time since any fixed point) and says how long to wait
    /// before sending them.
    pub fn take(&mut self, now: Duration, bytes: usize) -> Duration {
        // Idle time beyond the burst is not saved up.
        self.paid_until = self.paid_until.max(now.saturating_sub(BURST));
        let wait = self.paid_until.saturating_sub(now);
        self.paid_until += Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_second_carries_the_rate(rate in 10_000u64..1_000_000_000, size in 100usize..300_000) {
            let mut shaper = Shaper::new(rate);
            let (mut now, mut sent) = (Duration::ZERO, 0u64);
            let span = Duration::from_secs_f64((size as f64 * 200.0 / rate as f64).max(1.0));
            while now < span {
                let wait = shaper.take(now, size);
                now += wait;
                if now < span {
                    sent += size as u64;
                }
            }
            let allowed = rate as f64 * (span + BURST).as_secs_f64() + size as f64;
            prop_assert!(sent as f64 <= allowed * 1.001, "{} of {}", sent, allowed);
            prop_assert!(sent as f64 >= rate as f64 * span.as_secs_f64() * 0.95 - size as f64);
        }
    }
}
