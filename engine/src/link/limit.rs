//! One bandwidth limit over several connections.

use super::shaper::Shaper;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A limit that several connections share.
#[derive(Clone, Debug)]
pub struct SharedShaper {
    bucket: Arc<Mutex<Shaper>>,
    epoch: Instant,
}

impl SharedShaper {
    /// A limit of `bytes_per_second` in all.
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bucket: Arc::new(Mutex::new(Shaper::new(bytes_per_second))), epoch: Instant::now() }
    }

    /// Takes `bytes` and says how long to wait before sending them.
    pub fn take(&self, bytes: usize) -> Duration {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner).take(self.epoch.elapsed(), bytes)
    }
}
