//! A token bucket: whether the next bytes may go, and when they may. Pure; time is a parameter.

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

    /// Takes `bytes` out of the bucket at `now` (time since any fixed point), if nothing has to be waited for.
    ///
    /// # Errors
    /// How long to wait before asking again. Nothing was taken then.
    pub fn take(&mut self, now: Duration, bytes: usize) -> Result<(), Duration> {
        if self.paid_until > now {
            return Err(self.paid_until - now);
        }
        // Idle time beyond the burst is not saved up.
        self.owe(now, bytes as u64);
        Ok(())
    }

    /// Takes `bytes` out of the bucket at `now`, whatever is in it: for what has gone already. Says how long it is empty.
    pub fn owe(&mut self, now: Duration, bytes: u64) -> Duration {
        let from = self.paid_until.max(now.saturating_sub(BURST));
        self.paid_until = from + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        self.paid_until.saturating_sub(now)
    }

    /// Another rate from `now` on. What was let through before lasts no longer than it did at the old rate: it is gone, and must
    /// not be made up for at a lower one.
    pub fn set_rate(&mut self, now: Duration, bytes_per_second: u64) {
        let faster = bytes_per_second.max(1) as f64 / self.bytes_per_second as f64;
        if self.paid_until > now && faster > 1.0 {
            self.paid_until = now + (self.paid_until - now).div_f64(faster);
        }
        self.bytes_per_second = bytes_per_second.max(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bytes that go from `from` to `to`, in pieces of `size`, by somebody who is always ready.
    fn carried(shaper: &mut Shaper, from: Duration, to: Duration, size: usize) -> u64 {
        let (mut now, mut sent) = (from, 0);
        while now < to {
            match shaper.take(now, size) {
                Ok(()) => sent += size as u64,
                Err(wait) => now += wait,
            }
        }
        sent
    }

    proptest! {
        #[test]
        fn a_second_carries_the_rate(rate in 10_000u64..1_000_000_000, size in 100usize..300_000) {
            let mut shaper = Shaper::new(rate);
            let span = Duration::from_secs_f64((size as f64 * 200.0 / rate as f64).max(1.0));
            let sent = carried(&mut shaper, Duration::ZERO, span, size);
            let allowed = rate as f64 * (span + BURST).as_secs_f64() + size as f64;
            prop_assert!(sent as f64 <= allowed * 1.001, "{} of {}", sent, allowed);
            prop_assert!(sent as f64 >= rate as f64 * span.as_secs_f64() * 0.95 - size as f64);
        }

        #[test]
        fn the_second_after_a_change_carries_the_new_rate(
            rate in 3_000_000u64..1_000_000_000,
            to in 3_000_000u64..1_000_000_000,
            at in 0u64..500_000,
        ) {
            let mut shaper = Shaper::new(rate);
            let change = Duration::from_micros(700_000 + at);
            carried(&mut shaper, Duration::ZERO, change, super::super::limit::piece(rate));
            shaper.set_rate(change, to);
            let second = change + Duration::from_secs(1);
            let sent = carried(&mut shaper, change, second, super::super::limit::piece(to)) as f64;
            let off = (sent / to as f64 - 1.0).abs();
            prop_assert!(off <= 0.05, "{} bytes at a rate of {}", sent, to);
        }
    }
}
