//! What `pageferry track` can be asked.

use crate::cli::units::{Rate, Time};
use clap::{Args, ValueEnum};
use pageferry_tracker::{Scope, TrackerKind};
use std::ffi::OsString;
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(in crate::cli) struct TrackVerb {
    /// Root of the process tree.
    #[arg(long, value_name = "PID", conflicts_with_all = ["command", "replay"])]
    pub(in crate::cli) pid: Option<i32>,
    /// Time between two scans.
    #[arg(long, value_name = "TIME", default_value = "1s")]
    pub(in crate::cli) interval: Time,
    /// Stop after so long [default: when the program ends, or q or Ctrl-C is pressed].
    #[arg(long, value_name = "TIME")]
    pub(in crate::cli) duration: Option<Time>,
    /// Write every scan to a file, for --replay and for simulations (docs/RECORDING.md).
    #[arg(long, value_name = "FILE", conflicts_with = "replay")]
    pub(in crate::cli) record: Option<PathBuf>,
    /// Read scans from a recording instead of from a program.
    #[arg(long, value_name = "FILE", conflicts_with = "command")]
    pub(in crate::cli) replay: Option<PathBuf>,
    /// Draw the recording: addresses over time, working set, dirty rate (.svg or .png).
    #[arg(long, value_name = "FILE")]
    pub(in crate::cli) plot: Option<PathBuf>,
    /// Write one line of CSV a scan to a file, or to standard output (-).
    #[arg(long, value_name = "FILE")]
    pub(in crate::cli) csv: Option<PathBuf>,
    /// One JSON object a line: every scan, and a summary.
    #[arg(long)]
    pub(in crate::cli) json: bool,
    /// How dirty pages are found.
    #[arg(long, value_enum, default_value = "auto")]
    pub(in crate::cli) tracker: TrackerName,
    /// Which memory is looked at.
    #[arg(long, value_enum, default_value = "all", conflicts_with = "replay")]
    pub(in crate::cli) scope: ScopeName,
    /// Compare the bytes of written pages with those before, and count the unchanged apart.
    #[arg(long)]
    pub(in crate::cli) contents: bool,
    /// Link for which the hot set is asked: the pages that are dirty again before they could be sent.
    #[arg(long, value_name = "RATE", default_value = "1Gbit")]
    pub(in crate::cli) link: Rate,
    /// Say nothing but errors (and what --json, --csv and --record were asked for).
    #[arg(short, long, conflicts_with = "json")]
    pub(in crate::cli) quiet: bool,
    /// A command to start and track from its first page, after --.
    #[arg(last = true, value_name = "COMMAND")]
    pub(in crate::cli) command: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(in crate::cli) enum TrackerName {
    /// What works here.
    Auto,
    /// Asynchronous userfaultfd write-protection.
    Userfaultfd,
    /// Soft-dirty bits, found by PAGEMAP_SCAN.
    SoftDirtyScan,
    /// Soft-dirty bits, read from pagemap.
    SoftDirty,
    /// Digests of all pages, at every look.
    Compare,
}

impl TrackerName {
    /// The tracker that was asked for; `None`: whichever works.
    pub(in crate::cli) fn kind(self) -> Option<TrackerKind> {
        match self {
            TrackerName::Auto => None,
            TrackerName::Userfaultfd => Some(TrackerKind::UffdWp),
            TrackerName::SoftDirtyScan => Some(TrackerKind::SoftDirtyScan),
            TrackerName::SoftDirty => Some(TrackerKind::SoftDirty),
            TrackerName::Compare => Some(TrackerKind::Compare),
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(in crate::cli) enum ScopeName {
    /// All that the programs can write or have written: also shared memory (each object once), files, locked memory.
    All,
    /// Private anonymous memory that is not locked: what a migration sends by itself, before the programs stop.
    Lazy,
}

impl ScopeName {
    pub(in crate::cli) fn scope(self) -> Scope {
        match self {
            ScopeName::All => Scope::All,
            ScopeName::Lazy => Scope::Lazy,
        }
    }
}
