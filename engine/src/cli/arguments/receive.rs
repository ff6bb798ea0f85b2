//! What `pageferry receive` can be asked, and what it has in common with `migrate`.

use crate::cli::units::{Bytes, Percent, Time};
use clap::Args;
use pageferry::{Hooks, journal};
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(in crate::cli) struct ReceiveVerb {
    /// Address and port to listen on.
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:7077")]
    pub(in crate::cli) listen: String,
    /// Listen on an address that others can reach, although nobody is authenticated.
    #[arg(long)]
    pub(in crate::cli) insecure: bool,
    /// End after one migration; the exit code tells what became of it.
    #[arg(long)]
    pub(in crate::cli) once: bool,
    /// Memory that received pages and their index may take at most [default: what the machine has free].
    #[arg(long, value_name = "SIZE")]
    pub(in crate::cli) memory_limit: Option<Bytes>,
    /// Memory that the engine may take for itself, such as 64MiB: everything but the received pages, so also their index, 0.6 % of
    /// them. Where it is little it takes fewer connections, and refuses a program whose index does not fit [default: as
    /// much as it takes].
    #[arg(long, value_name = "SIZE")]
    pub(in crate::cli) engine_memory: Option<Bytes>,
    /// Share of one processor that the engine may take until the program stands still, such as 50%; 150% is one and a half. When the
    /// program runs, what nobody waits for keeps to it too [default: as much as it takes].
    #[arg(long, value_name = "PERCENT")]
    pub(in crate::cli) cpu: Option<Percent>,
    /// Receive, check and store at this nice value until the program stands still, which has the engine's own priority: 0 to 19, the
    /// least.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(in crate::cli) nice: u8,
    /// Memory to make ready for pages while waiting, so that the copying does not have to: about the size of what will
    /// come. It is taken from the machine until then.
    #[arg(long, value_name = "SIZE", default_value = "0")]
    pub(in crate::cli) standby: Bytes,
    /// Keep the pages of what has come in this directory, on disk; what is there from before is copied from it instead of
    /// being sent, above all when a program comes back.
    #[arg(long, value_name = "DIR")]
    pub(in crate::cli) keep_store: Option<PathBuf>,
    /// CRIU to use [default: $PAGEFERRY_CRIU, the one that tools/setup installs, the system's].
    #[arg(long, value_name = "PATH")]
    pub(in crate::cli) criu: Option<PathBuf>,
    /// Give a migration up when nothing moves for so long.
    #[arg(long, value_name = "TIME", default_value = "30s")]
    pub(in crate::cli) stall_timeout: Time,
    /// Write down here how far each migration is, for `pageferry recover`, and answer sources for receivers that were killed; or `none`.
    #[arg(long, value_name = "DIR", default_value = journal::DIRECTORY)]
    pub(in crate::cli) journal: MaybeDir,
    /// When the source of a program that runs here is not heard of, and pages of the program are still there: wait so long, then
    /// end it.
    #[arg(long, value_name = "TIME", default_value = "5min")]
    pub(in crate::cli) post_copy_timeout: Time,
    /// Socket for `pageferry control` while it runs, or `none` [default: /run/pageferry/receive-PORT.sock].
    #[arg(long, value_name = "PATH")]
    pub(in crate::cli) control: Option<PathBuf>,
    #[command(flatten)]
    pub(in crate::cli) hooks: HookArguments,
    /// One JSON object a line for every event.
    #[arg(long)]
    pub(in crate::cli) json: bool,
}

/// Commands at the stages of the handover, on either side.
#[derive(Debug, Args)]
#[command(next_help_heading = "Commands for networks whose addresses somebody else moves (docs/NETWORK.md)")]
pub(in crate::cli) struct HookArguments {
    /// Run when both sides have been reached and nothing was sent yet; at the destination the address has to be there, silently,
    /// when it is over.
    #[arg(long, value_name = "COMMAND")]
    pub(in crate::cli) hook_prepare: Option<String>,
    /// Run when the program is about to stop: clients have to be sent to the destination from now on.
    #[arg(long, value_name = "COMMAND")]
    pub(in crate::cli) hook_before_freeze: Option<String>,
    /// Run when the program runs at the destination.
    #[arg(long, value_name = "COMMAND")]
    pub(in crate::cli) hook_after_resume: Option<String>,
    /// Run when it does not, and never will: everything has to be as before.
    #[arg(long, value_name = "COMMAND")]
    pub(in crate::cli) hook_rollback: Option<String>,
}

impl HookArguments {
    /// In the words of the library.
    pub(in crate::cli) fn hooks(&self) -> Hooks {
        Hooks {
            prepare: self.hook_prepare.clone(),
            before_freeze: self.hook_before_freeze.clone(),
            after_resume: self.hook_after_resume.clone(),
            rollback: self.hook_rollback.clone(),
        }
    }
}

/// A directory, or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::cli) struct MaybeDir(pub(in crate::cli) Option<PathBuf>);

impl std::str::FromStr for MaybeDir {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self((text != "none").then(|| PathBuf::from(text))))
    }
}
