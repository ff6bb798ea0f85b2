//! Which way a batch of whole pages travels.

use pageferry_wire_format::{Coding, CodingChooser};
use std::time::Duration;

/// How whole pages travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// As they are.
    Raw,
    /// By zstd at this level.
    Zstd(i32),
    /// The same, on top of what was sent of them before.
    ZstdOnBase(i32),
}

/// Chooses, or always says the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ways {
    chooser: CodingChooser,
    only: Option<Coding>,
}

impl Ways {
    /// Always this coding.
    pub(crate) fn only(coding: Coding) -> Self {
        Self { only: Some(coding), ..Self::default() }
    }

    /// The way of the next batch.
    pub(crate) fn choose(&mut self, has_base: bool) -> Way {
        let compress = match self.only {
            Some(coding) => coding != Coding::Raw,
            None => self.chooser.compress(),
        };
        match (compress, has_base) {
            (false, _) => Way::Raw,
            (true, true) => Way::ZstdOnBase(1),
            (true, false) => Way::Zstd(1),
        }
    }

    /// Pages of a batch.
    pub(crate) fn batch_pages(&self) -> usize {
        64
    }

    /// `bytes` took `time` to send.
    pub(crate) fn observe_link(&mut self, bytes: usize, time: Duration) {
        self.chooser.observe_link(bytes, time);
    }

    /// `out` bytes were made of `bytes` in `time`.
    pub(crate) fn observe(&mut self, _way: Way, bytes: usize, out: usize, time: Duration) {
        self.chooser.observe_zstd(bytes, out, time);
    }
}
