//! What a freeze costs besides the pages: CRIU's part of the downtime.

use std::time::Duration;

/// Time that putting hot pages in may take of the downtime, where pages have come before the program runs. It is part of a freeze's cost.
pub const PREFILL: Duration = Duration::from_millis(5);

/// A model of the time that a handover takes when no page has to be sent: constants that were measured with
/// CRIU 4.2 (docs/BENCHMARKS.md, downtime), until a machine's own are known ([`crate::calibration`]).
#[derive(Clone, Copy, Debug)]
pub struct FreezeCost {
    /// Seize, parasite, images, restore, commit of one small process.
    pub base: Duration,
    /// Every further process of the tree.
    pub per_process: Duration,
    /// Every resident page is looked at in the last collect, and its page tables by CRIU: time for a million pages (4 GiB).
    pub per_million_pages: Duration,
}

impl Default for FreezeCost {
    fn default() -> Self {
        Self {
            base: Duration::from_millis(14),
            per_process: Duration::from_millis(6),
            per_million_pages: Duration::from_millis(10),
        }
    }
}

impl FreezeCost {
    /// The cost for a tree of `processes` with `resident_pages` in memory.
    pub fn of(&self, processes: u32, resident_pages: u64) -> Duration {
        let more = self.per_process * processes.saturating_sub(1);
        let walk = self.per_million_pages.mul_f64(resident_pages as f64 / 1e6);
        self.base + more + walk
    }
}
