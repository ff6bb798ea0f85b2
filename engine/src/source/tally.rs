//! What became of the pages of a round.

use crate::report::{Codings, Share};
use std::time::Duration;

/// Counts of one round, or of one worker's part of it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    /// By how they travelled. The bytes are those of whole frames.
    pub(crate) codings: Codings,
    /// Pages that were unmapped before they could be read.
    pub(crate) gone: u64,
    /// Pages that were written again before their turn came, and are left for the next round.
    pub(crate) left: u64,
    /// What the workers took.
    pub(crate) toil: Toil,
}

/// Time of threads that send, and what of it they were held up by others than processors: the link, the limit on it, and the share of a
/// processor that they may take.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Toil {
    time: Duration,
    held_up: Duration,
}

impl Toil {
    /// Of a thread that took `time`, where it is known how long it was held up.
    pub(crate) fn of(time: Duration, held_up: Option<Duration>) -> Self {
        // A link may be busy while it is waited for a share of the processor.
        held_up.map_or_else(Self::default, |held_up| Self { time, held_up: held_up.min(time) })
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.time += other.time;
        self.held_up += other.held_up;
    }

    /// As a share of the time; `None` if that is not known.
    pub(crate) fn held_up(&self) -> Option<f64> {
        (!self.time.is_zero()).then(|| self.held_up.as_secs_f64() / self.time.as_secs_f64())
    }
}

impl Tally {
    pub(crate) fn add(&mut self, other: &Tally) {
        self.codings.add(&other.codings);
        self.gone += other.gone;
        self.left += other.left;
        self.toil.add(&other.toil);
    }

    /// Pages that were looked at.
    pub(crate) fn pages(&self) -> u64 {
        let of = |share: Share| share.pages;
        self.codings.shares().iter().map(|(_, share)| of(*share)).sum::<u64>() + self.gone + self.left
    }

    /// Bytes on the wire.
    pub(crate) fn bytes(&self) -> u64 {
        self.codings.shares().iter().map(|(_, share)| share.bytes).sum()
    }

    /// Pages of which the destination was told something that is not zero.
    pub(crate) fn sent(&self) -> u64 {
        self.pages() - self.gone - self.left - self.codings.unchanged.pages - self.codings.zero.pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_held_up_together_and_none_for_longer_than_it_took() {
        let ms = Duration::from_millis;
        let mut toil = Toil::default();
        assert_eq!(toil.held_up(), None);
        toil.add(&Toil::of(ms(100), None));
        assert_eq!(toil.held_up(), None, "the system did not say");
        toil.add(&Toil::of(ms(100), Some(ms(250))));
        assert_eq!(toil.held_up(), Some(1.0));
        toil.add(&Toil::of(ms(300), Some(ms(0))));
        assert_eq!(toil.held_up(), Some(0.25));
    }
}
