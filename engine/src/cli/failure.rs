//! Failures, as people read them.

use super::render::printable;
use pageferry::error::CopyState;
use pageferry::{FailureKind, MigrationError};
use std::error::Error;
use std::fmt::Write;

/// The command line makes no sense.
pub(super) const USAGE: u8 = 2;
/// Refused before anything was touched.
pub(super) const REFUSED: u8 = 3;

/// The exit code of a failure; `signal` is what interrupted it.
pub(super) fn exit_code(error: &MigrationError, signal: Option<i32>) -> u8 {
    match error.kind {
        FailureKind::RolledBack => 1,
        FailureKind::Usage => USAGE,
        FailureKind::Refused => REFUSED,
        FailureKind::InDoubt => 4,
        FailureKind::AfterCommit => 5,
        FailureKind::Interrupted => signal.and_then(|signal| u8::try_from(128 + signal).ok()).unwrap_or(130),
    }
}

/// What failed, why, where the program is now, and what to do.
pub(super) fn describe(error: &MigrationError) -> String {
    let mut text = format!("error: {error}\n");
    let mut said = String::new();
    let mut cause: Option<&dyn Error> = error.source();
    while let Some(error) = cause {
        let line = printable(&error.to_string());
        // Transparent errors say the same twice.
        if line != said {
            let _ = writeln!(text, "  because: {}", line.trim_end().replace('\n', "\n           "));
        }
        said = line;
        cause = error.source();
    }
    if error.kind != FailureKind::Usage
        && (error.source_state, error.destination_state) != (CopyState::Unknown, CopyState::None)
    {
        let _ = writeln!(
            text,
            "  the program: {} at the source, {} at the destination",
            error.source_state, error.destination_state
        );
    }
    if let Some(help) = &error.help {
        let _ = writeln!(text, "  try: {help}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_tells_everything_once() {
        let cause = std::io::Error::other("no route to host");
        let error = MigrationError::refused("connecting", cause).with_help("start the receiver");
        assert_eq!(
            describe(&error),
            "error: connecting: refused\n  because: no route to host\n  the program: running at the source, none \
             at the destination\n  try: start the receiver\n"
        );
        assert_eq!(exit_code(&error, None), 3);
    }

    #[test]
    fn what_a_peer_says_does_not_steer_the_terminal() {
        let error = MigrationError::refused("connecting", "gone\x1b[2J\r\nagain");
        let text = describe(&error);
        assert!(!text.contains(['\x1b', '\r']), "{text:?}");
        assert!(text.contains("again"));
    }

    #[test]
    fn an_interruption_exits_like_its_signal() {
        let mut error = MigrationError::refused("round 1", "stop");
        error.kind = FailureKind::Interrupted;
        assert_eq!(exit_code(&error, Some(15)), 143);
        assert_eq!(exit_code(&error, None), 130);
    }
}
