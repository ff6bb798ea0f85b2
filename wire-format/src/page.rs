//! Names of spaces and pages.

use crate::error::DecodeError;
use crate::limits::MAX_PAGE_NO;

/// One address space of the migrated tree, numbered by the source; a number is never used twice in a session.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, bincode::Encode, bincode::Decode,
)]
pub struct SpaceId(pub u32);

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
