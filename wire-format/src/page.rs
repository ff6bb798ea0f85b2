//! Names of spaces and pages.

use crate::error::DecodeError;
use crate::limits::{MAX_KEPT_PAGES, MAX_PAGE_NO};

/// One address space of the migrated tree, numbered by the source; a number is never used twice in a session.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, bincode::Encode, bincode::Decode,
)]
pub struct SpaceId(pub u32);

impl SpaceId {
    /// No address space: the pages of a store that the destination kept from before, numbered by it from 0.
    pub const KEPT: SpaceId = SpaceId(u32::MAX);

    /// For what is said of a space of the source, which [`SpaceId::KEPT`] never is.
    pub(crate) fn check_of_source(self) -> Result<(), DecodeError> {
        match self {
            Self::KEPT => Err(DecodeError::Invalid("the number of no space, which stands for a kept store")),
            _ => Ok(()),
        }
    }

    /// Page numbers of this space are below this.
    pub(crate) fn end(self) -> u64 {
        if self == Self::KEPT { MAX_KEPT_PAGES } else { MAX_PAGE_NO }
    }
}

/// A virtual address divided by the page size.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, bincode::Encode, bincode::Decode,
)]
pub struct PageNo(pub u64);

/// Neighbouring pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, bincode::Encode, bincode::Decode)]
pub struct PageRun {
    /// The first.
    pub start: PageNo,
    /// How many.
    pub len: u64,
}

/// A page of some space: where the receiver has bytes already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRef {
    /// The space; [`SpaceId::KEPT`] for a page that the destination kept.
    pub space: SpaceId,
    /// The page in it.
    pub page: PageNo,
}

impl PageRef {
    pub(crate) fn validate(&self) -> Result<(), DecodeError> {
        if self.page.0 >= self.space.end() {
            return Err(DecodeError::Invalid("a copy of a page beyond the end of its space"));
        }
        Ok(())
    }
}

impl PageRun {
    /// One past the last page.
    pub fn end(&self) -> u64 {
        self.start.0 + self.len
    }

    /// The page numbers.
    pub fn pages(&self) -> std::ops::Range<u64> {
        self.start.0..self.end()
    }
}

/// The content of a page, as 128 bits (see [`crate::digest`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageDigest(pub [u8; 16]);

impl std::fmt::Display for PageDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", u128::from_le_bytes(self.0))
    }
}

/// Runs must be non-empty, ascending, apart from or next to each other, and below the highest page number.
/// Returns the number of pages.
pub(crate) fn check_runs(runs: &[PageRun]) -> Result<u64, DecodeError> {
    let (mut end, mut pages) = (0u64, 0u64);
    for run in runs {
        if run.len == 0 {
            return Err(DecodeError::Invalid("an empty page run"));
        }
        if run.start.0 >= MAX_PAGE_NO || run.len > MAX_PAGE_NO - run.start.0 {
            return Err(DecodeError::Invalid("a page run beyond the address space"));
        }
        if run.start.0 < end {
            return Err(DecodeError::Invalid("page runs that overlap or are not in order"));
        }
        end = run.end();
        // Runs do not overlap below 2^52, so their sum stays there too.
        pages += run.len;
    }
    Ok(pages)
}
