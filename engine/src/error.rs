//! How a migration fails: what failed, where both copies of the program are now, and what to do.

use crate::report::MigrationReport;
use std::error::Error;
use std::fmt;

/// What kind of end a failed migration came to. Each has an exit code of its own in the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// The plan made no sense (a bad address, a rate of zero).
    Usage,
    /// Refused before anything was done: no such process, a missing tool, a kernel that cannot track.
    Refused,
    /// Something failed on the way; the source runs on as if nothing had happened.
    RolledBack,
    /// The link was lost around the commit, and the destination cannot be asked: the source stays stopped
    /// (never two copies), and the help text says how to go on.
    InDoubt,
    /// The user asked for it to stop; the source runs on.
    Interrupted,
    /// The program runs at the destination, but something failed afterwards.
    AfterCommit,
}

/// The state of one side's copy of the program after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyState {
    /// It runs.
    Running,
    /// It is stopped and complete: it can be made to run again.
    Stopped,
    /// There is none (never was, or it was discarded).
    None,
    /// It cannot be told from here.
    Unknown,
}

impl fmt::Display for CopyState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CopyState::Running => "running",
            CopyState::Stopped => "stopped",
            CopyState::None => "none",
            CopyState::Unknown => "unknown",
        })
    }
}

/// The failure of a whole migration. The text is what was tried; the causes are chained in `source()`.
#[derive(Debug)]
pub struct MigrationError {
    /// How it ended.
    pub kind: FailureKind,
    /// What was being done, e.g. "pre-copy round 3".
    pub phase: String,
    /// Where the source's copy is now.
    pub source_state: CopyState,
    /// Where the destination's copy is now, as far as this side knows.
    pub destination_state: CopyState,
    /// What a person can do about it.
    pub help: Option<String>,
    /// What failed.
    pub cause: Box<dyn Error + Send + Sync>,
    /// What was measured until then.
    pub report: Option<Box<MigrationReport>>,
}

impl MigrationError {
    /// A refusal before anything was touched.
    pub fn refused(phase: impl Into<String>, cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self {
            kind: FailureKind::Refused,
            phase: phase.into(),
            source_state: CopyState::Running,
            destination_state: CopyState::None,
            help: None,
            cause: cause.into(),
            report: None,
        }
    }

    /// The same with a hint for the person who reads it.
    #[must_use]
    pub fn with_help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

impl fmt::Display for MigrationError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            FailureKind::Usage => write!(f, "{}: invalid request", self.phase),
            FailureKind::Refused => write!(f, "{}: refused", self.phase),
            FailureKind::RolledBack => write!(f, "{} failed, and the migration was rolled back", self.phase),
            FailureKind::InDoubt => write!(f, "{} was cut off, and the outcome is in doubt", self.phase),
            FailureKind::Interrupted => write!(f, "interrupted during {}", self.phase),
            FailureKind::AfterCommit => {
                write!(f, "{} failed after the program had moved to the destination", self.phase)
            }
        }
    }
}

impl Error for MigrationError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&*self.cause)
    }
}
