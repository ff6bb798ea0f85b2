//! How the store fails.

use pageferry_wire_format::delta::DeltaError;
use pageferry_wire_format::{Coding, DecodeError, PageNo, SpaceId};
use std::io;

/// A failure of the page store. Whatever failed, the pages that were there before are still there.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no memory for the pages.
    #[error("taking {wanted} bytes of memory for received pages: {left} bytes are left {of}")]
    OutOfMemory {
        /// Bytes that were needed.
        wanted: u64,
        /// Bytes that may still be taken.
        left: u64,
        /// What sets the bound: the plan's limit, the machine, the control group.
        of: Bound,
    },
    /// The kernel refused an operation on the store's memory.
    #[error("{doing}")]
    Memory {
        /// What was tried.
        doing: &'static str,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
    /// The bytes that arrived for a batch are not those that were announced.
    #[error("checking the pages of space {} that were received with page {page:#x}: their digest differs from the announced one", space.0, page = page.0)]
    DigestMismatch {
        /// The address space.
        space: SpaceId,
        /// The first page of the batch, or where each has a digest, the first that differs.
        page: PageNo,
    },
    /// A compressed payload is not what it should be.
    #[error("unpacking a batch of {pages} pages of space {}", space.0)]
    Unpack {
        /// The address space.
        space: SpaceId,
        /// Pages that should have come out.
        pages: usize,
        /// What the decoder said.
        #[source]
        cause: DecodeError,
    },
    /// A batch in a coding that has no bytes to receive (copies are carried out by `copy_pages`).
    #[error("a batch of space {} came in the coding {coding:?}, which brings no bytes", space.0)]
    Coding {
        /// The address space.
        space: SpaceId,
        /// How the batch is coded.
        coding: Coding,
    },
    /// What pages were made from is not what is here.
    #[error("page {page:#x} of space {}, and those that came with it, are on top of other bytes than are here", space.0, page = page.0)]
    Base {
        /// The address space.
        space: SpaceId,
        /// The first page.
        page: PageNo,
    },
    /// A delta is none.
    #[error("applying the delta of page {page:#x} of space {}", space.0, page = page.0)]
    Delta {
        /// The address space.
        space: SpaceId,
        /// The page.
        page: PageNo,
        /// What is wrong with it.
        #[source]
        cause: DeltaError,
    },
    /// There are more bytes than the deltas of a batch have.
    #[error("{rest} bytes are left behind the deltas of a batch of space {}", space.0)]
    DeltasLeft {
        /// The address space.
        space: SpaceId,
        /// How many.
        rest: usize,
    },
    /// A page that belongs to the program never arrived.
    #[error("sealing space {}: page {page:#x} was never received", space.0, page = page.0)]
    Missing {
        /// The address space.
        space: SpaceId,
        /// The first page that is missing.
        page: PageNo,
    },
    /// The runs to seal overlap or are not in order, so that it is unclear what belongs to the program.
    #[error("sealing space {}: the run at page {page:#x} does not lie behind the one before it", space.0, page = page.0)]
    Disorder {
        /// The address space.
        space: SpaceId,
        /// Start of the run.
        page: PageNo,
    },
    /// A batch that was begun with another store.
    #[error("finishing a batch of space {} that was not begun with this store", space.0)]
    Foreign {
        /// The address space.
        space: SpaceId,
    },
}

/// What bounds the store's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// The limit that the plan sets.
    Limit,
    /// The limit that the plan sets for everything but the pages.
    Engine,
    /// The memory that the machine has available, less a margin.
    Machine,
    /// The memory limit of the control group, less a margin.
    ControlGroup,
    /// Slot numbers: no machine has that much memory.
    Numbers,
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Bound::Limit => "of the limit",
            Bound::Engine => "for their index and lists of what the engine may take for itself",
            Bound::Machine => "on this machine",
            Bound::ControlGroup => "in the control group",
            Bound::Numbers => "that can be numbered",
        })
    }
}
