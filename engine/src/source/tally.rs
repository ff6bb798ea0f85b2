//! What became of the pages of a round.

use crate::report::{Codings, Share};

/// Counts of one round, or of one worker's part of it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    /// By how they travelled. The bytes are those of whole frames.
    pub(crate) codings: Codings,
    /// Pages that were unmapped before they could be read.
    pub(crate) gone: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, other: &Tally) {
        self.codings.add(&other.codings);
        self.gone += other.gone;
    }

    /// Pages that were looked at.
    pub(crate) fn pages(&self) -> u64 {
        let of = |share: Share| share.pages;
        self.codings.shares().iter().map(|(_, share)| of(*share)).sum::<u64>() + self.gone
    }

    /// Bytes on the wire.
    pub(crate) fn bytes(&self) -> u64 {
        self.codings.shares().iter().map(|(_, share)| share.bytes).sum()
    }

    /// Pages of which the destination was told something that is not zero.
    pub(crate) fn sent(&self) -> u64 {
        self.pages() - self.gone - self.codings.unchanged.pages - self.codings.zero.pages
    }
}
