//! What earlier migrations took, read and written for the verbs. That it cannot be is no reason to fail: the engine's own
//! constants hold then, and it is said.

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

/// Remembers it.
pub(super) fn write(path: &Path, calibration: &Calibration) {
    if path.as_os_str() != NONE
        && let Err(error) = calibration.write(path)
    {
        warn(&error);
    }
}

fn warn(error: &CalibrationError) {
    match error.source() {
        Some(cause) => eprintln!("warning: {error}: {cause}"),
        None => eprintln!("warning: {error}"),
    }
}
