//! Whether a dump is exactly what was asked for: nothing twice, nothing missing.

use super::{ImageError, areas, pagemap::Pagemap};
use crate::hide::Owned;
use crate::image_dir::ImageDir;
use crate::ranges::{self, Range, RunError};

/// Why a dump's images must not be used.
#[derive(Debug, thiserror::Error)]
pub enum HiddenError {
    /// The runs themselves are unusable.
    #[error("the owned or populated runs of process {pid} are unusable")]
    Runs {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: RunError,
    },
    /// The images cannot be read.
    #[error("the images of process {pid} cannot be checked")]
    Image {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: ImageError,
    },
    /// A hidden page would not be brought in by the restore.
    #[error(
        "process {pid}: the pages at {:#x}-{:#x} are owned by the engine, but not in memory that can be restored late \
         (anonymous, private, not locked, not huge); they would be zero after the restore", .range.0, .range.1
    )]
    NotLazy {
        /// The process.
        pid: i32,
        /// The first such range of addresses.
        range: Range,
    },
    /// A page is with both.
    #[error(
        "process {pid}: the pages at {:#x}-{:#x} are owned by the engine and were dumped by criu as well", .range.0, .range.1
    )]
    Twice {
        /// The process.
        pid: i32,
        /// The first such range of addresses.
        range: Range,
    },
    /// A page is with nobody.
    #[error(
        "process {pid}: the pages at {:#x}-{:#x} are neither owned by the engine nor in criu's images", .range.0, .range.1
    )]
    Missing {
        /// The process.
        pid: i32,
        /// The first such range of addresses.
        range: Range,
    },
}

/// Checks a finished dump: every owned page lies in memory that criu itself counts as restorable late, none of
/// them is in criu's images, and every populated page that is not owned is there.
pub fn check_hidden(images: &ImageDir, owned: &[Owned]) -> Result<(), HiddenError> {
    for process in owned {
        let pid = process.pid;
        let of_image = |source| HiddenError::Image { pid, source };
        let of_runs = |source| HiddenError::Runs { pid, source };
        let owned = ranges::from_runs(&process.runs).map_err(of_runs)?;
        let populated = ranges::from_runs(&process.populated).map_err(of_runs)?;
        let pagemap = Pagemap::read(images, process.vpid).map_err(of_image)?;
        let lazy: Vec<Range> = areas(images, process.vpid)
            .map_err(of_image)?
            .iter()
            .filter(|a| a.can_be_lazy())
            .map(|a| (a.start, a.end))
            .collect();
        let dumped: Vec<Range> =
            pagemap.entries.iter().filter(|e| e.is_present()).map(|e| (e.address, e.end())).collect();
        if let Some(range) = ranges::first_outside(&owned, &lazy) {
            return Err(HiddenError::NotLazy { pid, range });
        }
        if let Some(range) = ranges::first_common(&owned, &dumped) {
            return Err(HiddenError::Twice { pid, range });
        }
        if let Some(range) = ranges::first_outside(&ranges::subtract(&populated, &owned), &dumped) {
            return Err(HiddenError::Missing { pid, range });
        }
    }
    Ok(())
}
