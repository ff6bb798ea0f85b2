//! What became of the pages of a round.

use crate::report::{Codings, Share};

/// Counts of one round, or of one worker's part of it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    /// By how they travelled. The bytes are those of whole frames.
    pub(crate) codings: Codings,
    /// Pages that were unmapped before they could be read.
    pub(crate) gone: u64,
    /// Pages that were written again before their turn came, and are left for the next round.
    pub(crate) left: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, other: &Tally) {
        self.codings.add(&other.codings);
        self.gone += other.gone;
        self.left += other.left;
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
