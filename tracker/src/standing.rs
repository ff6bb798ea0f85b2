//! Processes that stand still, and are looked at without being tracked.

use crate::page_set::PageSet;
use crate::region::{Mappings, RegionError};
use crate::scope::{Files, Scope, View};
use crate::source;
use crate::target::Target;
use std::io;

/// Why it cannot be said which pages a process has.
#[derive(Debug, thiserror::Error)]
pub enum PopulatedError {
    /// Its mappings could not be read.
    #[error(transparent)]
    Regions(#[from] RegionError),
    /// The kernel refused.
    #[error("could not read which pages process {pid} has")]
    Io {
        /// Whose.
        pid: i32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// The pages that a process has of its own in mappings of [`Scope::Lazy`]: what a [`crate::Tracker`] reports as
/// [`crate::SpaceScan::populated`]. It is true for as long as the process stands still.
///
/// # Errors
/// [`PopulatedError`].
pub fn populated(target: &Target) -> Result<PageSet, PopulatedError> {
    let pid = target.pid();
    let failed = |source| PopulatedError::Io { pid, source };
    let view = View::new(target, Mappings::default().read(target)?, Scope::Lazy, &mut Files::default());
    let pagemap = target.open_file("pagemap").map_err(failed)?;
    source::existing(&pagemap, &view).map_err(failed)
}
