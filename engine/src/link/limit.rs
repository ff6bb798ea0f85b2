//! One bandwidth limit over several connections, which can be changed while they send.

use super::shaper::Shaper;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Instead of a rate: there is no limit.
const NONE: u64 = 0;

/// Frames up to this size go in one piece: what is asked for one page at a time is smaller.
const LEAST_PIECE: usize = 136 << 10;

/// A piece lasts for so long, so that a change of the limit is felt at once.
const PIECES_A_SECOND: u64 = 50;

/// A limit that several connections share, and a count of what they carried under it.
#[derive(Clone, Debug)]
pub struct SharedShaper {
    inner: Arc<Inner>,
    carried: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Inner {
    /// Bytes a second, or [`NONE`]: read without the lock.
    rate: AtomicU64,
    bucket: Mutex<Shaper>,
    changed: Condvar,
    epoch: Instant,
}

impl SharedShaper {
    /// A limit of `bytes_per_second` in all; `None` is no limit.
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        let inner = Inner {
            rate: AtomicU64::new(bytes_per_second.unwrap_or(NONE)),
            bucket: Mutex::new(Shaper::new(bytes_per_second.unwrap_or(u64::MAX))),
            changed: Condvar::new(),
            epoch: Instant::now(),
        };
        Self { inner: Arc::new(inner), carried: Arc::default() }
    }

    /// One without a limit that counts with this one.
    pub fn unlimited(&self) -> Self {
        Self { carried: Arc::clone(&self.carried), ..Self::new(None) }
    }

    /// The limit in bytes a second.
    pub fn rate(&self) -> Option<u64> {
        Some(self.inner.rate.load(Ordering::Relaxed)).filter(|rate| *rate != NONE)
    }

    /// Another limit, from now on: also for those that wait.
    pub fn set_rate(&self, bytes_per_second: Option<u64>) {
        let Inner { rate, epoch, changed, .. } = &*self.inner;
        let mut bucket = self.bucket();
        let before = rate.swap(bytes_per_second.unwrap_or(NONE), Ordering::Relaxed);
        match bytes_per_second {
            // What went without a limit is not made up for.
            Some(rate) if before == NONE => {
                *bucket = Shaper::new(rate);
            }
            Some(rate) => bucket.set_rate(epoch.elapsed(), rate),
            None => {}
        }
        changed.notify_all();
    }

    /// Bytes that may go at once: one takes leave for so many at most.
    pub fn piece(&self) -> usize {
        self.rate().map_or(usize::MAX, piece)
    }

    /// Waits until `bytes` may go, and says for how long.
    pub fn wait(&self, bytes: usize) -> Duration {
        let mut waited = Duration::ZERO;
        if self.rate().is_some() {
            let began = self.inner.epoch.elapsed();
            let mut bucket = self.bucket();
            // Nothing is taken before its time: whoever waits goes by the limit that is there then.
            while self.rate().is_some()
                && let Err(wait) = bucket.take(self.inner.epoch.elapsed(), bytes)
            {
                let woken = self.inner.changed.wait_timeout(bucket, wait);
                bucket = woken.unwrap_or_else(PoisonError::into_inner).0;
            }
            waited = self.inner.epoch.elapsed() - began;
        }
        self.carried.fetch_add(bytes as u64, Ordering::Relaxed);
        waited
    }

    /// Bytes that have gone so far.
    pub fn carried(&self) -> u64 {
        self.carried.load(Ordering::Relaxed)
    }

    fn bucket(&self) -> MutexGuard<'_, Shaper> {
        self.inner.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The piece at a rate.
pub(super) fn piece(bytes_per_second: u64) -> usize {
    usize::try_from(bytes_per_second / PIECES_A_SECOND).unwrap_or(usize::MAX).max(LEAST_PIECE)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Something that must not be waited for takes less.
    const LIMIT: Duration = Duration::from_secs(60);

    #[test]
    fn who_waits_hears_of_a_change() {
        for to in [None, Some(1 << 40)] {
            let shaper = SharedShaper::new(Some(1));
            // Lasts for days.
            shaper.wait(1 << 20);
            let (tell, told) = std::sync::mpsc::channel();
            let its = shaper.clone();
            let waits = std::thread::spawn(move || {
                tell.send(()).unwrap();
                its.wait(10);
                tell.send(()).unwrap();
            });
            told.recv_timeout(LIMIT).unwrap();
            shaper.set_rate(to);
            told.recv_timeout(LIMIT).expect("the new limit is waited for, and not the old one");
            waits.join().unwrap();
            assert_eq!((shaper.rate(), shaper.carried()), (to, (1 << 20) + 10));
        }
    }

    #[test]
    fn a_limit_after_none_does_not_make_up_for_what_went() {
        let shaper = SharedShaper::new(None);
        assert_eq!(shaper.piece(), usize::MAX);
        shaper.wait(usize::MAX >> 2);
        shaper.set_rate(Some(10_000_000));
        assert_eq!(shaper.piece(), 200_000);
        let before = Instant::now();
        shaper.wait(10);
        assert!(before.elapsed() < LIMIT);
        let other = shaper.unlimited();
        other.wait(5);
        assert_eq!(shaper.carried(), (usize::MAX as u64 >> 2) + 15);
        assert_eq!(other.rate(), None);
    }
}
