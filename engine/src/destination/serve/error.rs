//! How serving pages fails.

use pageferry_tracker::uffd::UffdError;
use pageferry_wire_format::{PageNo, SpaceId};
use std::io;

/// A failure of the page server. No page is ever dropped because of one: it stays where it is, and is tried again
/// as long as the server lives.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ServeError {
    /// The kernel would not take a page.
    #[error("putting page {page:#x} of space {} in place", space.0, page = page.0)]
    Copy {
        /// The address space.
        space: SpaceId,
        /// Its page number in the store.
        page: PageNo,
        /// What the kernel said.
        #[source]
        cause: std::sync::Arc<UffdError>,
    },
    /// A page that belongs to the program is in no region that waits for pages.
    #[error("putting page {page:#x} of space {} in place: no restored region waits for it", space.0, page = page.0)]
    NotRegistered {
        /// The address space.
        space: SpaceId,
        /// Its page number in the store.
        page: PageNo,
    },
    /// The store does not have the bytes of a page that is to be put in place.
    #[error("putting page {page:#x} of space {} in place: its bytes are not in the store", space.0, page = page.0)]
    Lost {
        /// The address space.
        space: SpaceId,
        /// Its page number in the store.
        page: PageNo,
    },
    /// The task that had a space has gone before its memory was complete.
    #[error("putting the pages of space {} in place: its task is gone", space.0)]
    TaskGone {
        /// The address space.
        space: SpaceId,
    },
    /// The events of a task could not be read.
    #[error("reading page faults of space {}", space.0)]
    Events {
        /// The address space.
        space: SpaceId,
        /// What the kernel said.
        #[source]
        cause: std::sync::Arc<io::Error>,
    },
    /// The server's thread, or what it waits on, could not be set up.
    #[error("{doing}")]
    Setup {
        /// What was tried.
        doing: &'static str,
        /// What the kernel said.
        #[source]
        cause: std::sync::Arc<io::Error>,
    },
    /// Serving was aborted.
    #[error("serving pages was aborted")]
    Aborted,
    /// The server's thread panicked. The tasks that still wait for pages keep waiting.
    #[error("the page server has died")]
    Died,
}

impl ServeError {
    pub(super) fn setup(doing: &'static str, cause: io::Error) -> Self {
        Self::Setup { doing, cause: std::sync::Arc::new(cause) }
    }
}
