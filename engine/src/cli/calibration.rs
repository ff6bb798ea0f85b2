//! What earlier migrations took, read and written for the verbs. That it cannot be is no reason to fail: the engine's own
//! constants hold then, and it is said.

use pageferry::MigrationReport;
use pageferry::calibration::{Calibration, CalibrationError};
use std::error::Error;
use std::path::Path;

/// Instead of a file: nothing is remembered.
const NONE: &str = "none";

/// What is remembered in the file.
pub(super) fn read(path: &Path) -> Calibration {
    if path.as_os_str() == NONE {
        return Calibration::default();
    }
    Calibration::read(path).unwrap_or_else(|error| {
        warn(&error);
        Calibration::default()
    })
}

/// Adds a migration to what is in the file now: others may have ended since it was read. A file that is no such file begins
/// anew, as was said when it was read.
pub(super) fn learn(path: &Path, report: &MigrationReport) {
    if path.as_os_str() == NONE {
        return;
    }
    let mut calibration = Calibration::read(path).unwrap_or_default();
    calibration.learn(report);
    if let Err(error) = calibration.write(path) {
        warn(&error);
    }
}

fn warn(error: &CalibrationError) {
    match error.source() {
        Some(cause) => eprintln!("warning: {error}: {cause}"),
        None => eprintln!("warning: {error}"),
    }
}
