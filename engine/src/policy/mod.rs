//! When to send another round, and when to freeze. Pure: time comes in as durations, nothing is waited for.

pub mod adaptive;
pub mod ahead;
pub(crate) mod bubbling;
pub mod closing;
pub mod estimate;
pub mod fixed;
pub mod goals;
pub(crate) mod headroom;
pub mod hot;
pub(crate) mod images;
pub mod memory;
pub mod reasons;
pub mod slowdown;
pub mod throttle;

pub use adaptive::Adaptive;
pub(crate) use bubbling::Bubbling;
pub use closing::Closing;
pub use fixed::Fixed;
pub use goals::{Goals, Means, Navigator};
pub use hot::HotPages;

use estimate::FreezeCost;
use std::time::Duration;

/// What is known when a round's dirty pages were just collected and nothing of them was sent yet.
#[derive(Clone, Copy, Debug)]
pub struct RoundSample {
    /// The round that these pages would be sent in, from 0.
    pub round: u32,
    /// Pages to look at: dirty since the last collect, held back, or never given to the destination.
    pub todo_pages: u64,
    /// Of these, those that are held back until the freeze because they are written all the time.
    pub hot_pages: u64,
    /// Pages that were written since the last collect, also those that are still to be sent for the first time.
    pub dirty_pages: u64,
    /// Time since the collect before this one (zero in round 0).
    pub since_last: Duration,
    /// Processes of the tree.
    pub processes: u32,
    /// Pages that the tree has in memory.
    pub resident_pages: u64,
    /// What the rounds before measured; `None` before the first.
    pub measured: Option<Measured>,
}

/// The pace of the rounds so far.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// Pages that were looked at a second: scanned, read, hashed and, if they had changed, sent.
    pub pages_per_second: f64,
    /// Bytes that went over the link a second meanwhile.
    pub bytes_per_second: f64,
    /// Fixed time of a round, whatever its size: scan and acknowledgement.
    pub round_overhead: Duration,
}

/// Why pre-copy ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The predicted downtime is under the target.
    TargetMet,
    /// Another round would not make the predicted downtime shorter: the program dirties pages about as fast
    /// as they can be sent.
    NoProgress,
    /// The limit of rounds was reached.
    MaxRounds,
    /// What is left is to come after the program runs at the destination.
    PostCopy,
    /// No rounds were asked for, or none are needed.
    StopAndCopy,
    /// Another round would take longer than the whole is allowed to.
    TotalTime,
}

impl StopReason {
    /// The word in reports.
    pub fn name(self) -> &'static str {
        match self {
            StopReason::TargetMet => "target-met",
            StopReason::NoProgress => "no-progress",
            StopReason::MaxRounds => "max-rounds",
            StopReason::PostCopy => "post-copy",
            StopReason::StopAndCopy => "stop-and-copy",
            StopReason::TotalTime => "total-time",
        }
    }
}

/// What to do with the pages that were just collected.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision {
    /// `None`: send them and collect again. Otherwise: freeze now, and send them in the freeze.
    pub stop: Option<StopReason>,
    /// Downtime to be expected if the tree were frozen now.
    pub predicted_downtime: Duration,
}

/// Rounds smaller than this say nothing about the pace: they are all overhead.
const PACE_PAGES: u64 = 256;

/// Whether a round of so many pages says how fast pages are sent.
pub fn says_the_pace(pages: u64) -> bool {
    pages >= PACE_PAGES
}

/// Decides between another round and the freeze.
pub trait RoundPolicy {
    /// Called after every collect, in order.
    fn decide(&mut self, sample: &RoundSample) -> Decision;

    /// The program is slower from now on: what earlier rounds brought says nothing about the next.
    fn program_slowed_down(&mut self) {}

    /// The migration was held up, or was given another bandwidth: rounds before and after that cannot be compared.
    fn begin_anew(&mut self) {}

    /// Whether pages that are written all the time are held back until the freeze.
    fn holds_back(&self) -> bool {
        true
    }
}
