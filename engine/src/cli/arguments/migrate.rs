//! What `pageferry migrate` can be asked.

use super::choices::{CALIBRATION, StrategyName, policy};
use super::receive::{HookArguments, MaybeDir};
use super::track::TrackerName;
use crate::cli::units::{Bytes, Percent, Rate, Share, Time};
use clap::{Args, ValueEnum};
use pageferry::journal;
use pageferry::{CodingChoice, MovedAddress, NoConvergence, PolicyChoice, TcpChoice};
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(in crate::cli) struct MigrateVerb {
    /// Root of the process tree.
    #[arg(long, value_name = "PID", allow_negative_numbers = true)]
    pub(in crate::cli) pid: i32,
    /// The receiver (port 7077 if none is given); or file:PATH, a file that does not exist yet; or dir:PATH, a directory
    /// that gets a file for each checkpoint.
    #[arg(long, value_name = "HOST:PORT")]
    pub(in crate::cli) to: String,
    /// When the program has moved, keep its pages in this directory, on disk: `receive --keep-store` takes them from there when
    /// it comes back.
    #[arg(long, value_name = "DIR")]
    pub(in crate::cli) keep_store: Option<PathBuf>,
    /// Into a file: let the program run on here when the file has all of it, instead of ending it.
    #[arg(long)]
    pub(in crate::cli) keep_running: bool,
    /// Whether memory moves before the program, after it, or both.
    #[arg(long, value_enum, default_value = "auto")]
    pub(in crate::cli) strategy: StrategyName,
    /// Hybrid: how many rounds go before the program: a number at most, or no-progress, as long as they help.
    #[arg(long, value_name = "N|no-progress", default_value = "no-progress", value_parser = post_copy_after)]
    pub(in crate::cli) post_copy_after: PostCopyAfter,
    /// When the link is lost while the program runs there and pages of it are here: try so long to reach the receiver again.
    #[arg(long, value_name = "TIME", default_value = "5min")]
    pub(in crate::cli) post_copy_timeout: Time,
    /// When the link is lost while the program still runs here: try so long to reach the receiver again, which holds what it has, and
    /// go on from there. With 0s it is rolled back at once.
    #[arg(long, value_name = "TIME", default_value = "1min")]
    pub(in crate::cli) resume_timeout: Time,
    /// Into a directory (dir:PATH): store only what the last checkpoint of the same program there does not have. It needs that
    /// one to be restored, and all that it is on top of.
    #[arg(long)]
    pub(in crate::cli) incremental: bool,
    /// Downtime to aim for.
    #[arg(long, value_name = "TIME", default_value = "100ms")]
    pub(in crate::cli) downtime: Time,
    /// Time to aim for from the start until the program runs there with all of its pages; the strategy auto chooses by it
    /// [default: as long as it takes].
    #[arg(long, value_name = "TIME")]
    pub(in crate::cli) total_time: Option<Time>,
    /// Pre-copy rounds at most.
    #[arg(long, value_name = "N", default_value_t = 30)]
    pub(in crate::cli) max_rounds: u32,
    /// Who decides between another round and the freeze: `adaptive`, or `fixed:N` for a fixed number of rounds, for
    /// comparisons.
    #[arg(long, value_name = "POLICY", default_value = "adaptive", value_parser = policy)]
    pub(in crate::cli) policy: PolicyChoice,
    /// What earlier migrations took, for predictions; this one is added. `none` uses what the engine was built with.
    #[arg(long, value_name = "FILE", default_value = CALIBRATION)]
    pub(in crate::cli) calibration: PathBuf,
    /// Write down here how far the migration is, for `pageferry recover`; or `none`.
    #[arg(long, value_name = "DIR", default_value = journal::DIRECTORY)]
    pub(in crate::cli) journal: MaybeDir,
    /// What to do when the program writes faster than the link carries [default: post-copy where the strategy is auto and there is a
    /// receiver, freeze otherwise].
    #[arg(long, value_enum)]
    pub(in crate::cli) on_no_convergence: Option<NoConvergenceName>,
    /// With --on-no-convergence throttle: how much of the time the program may be made to stand still.
    #[arg(long, value_name = "SHARE", default_value = "90%")]
    pub(in crate::cli) max_throttle: Share,
    /// How much of its running time the program may lose to the migration while it runs here, such as 5%: what is read, sent and scanned
    /// is slowed down for it [default: as much as it takes].
    #[arg(long, value_name = "SHARE")]
    pub(in crate::cli) max_slowdown: Option<Share>,
    /// Socket on which `pageferry control` is answered, or none [default: /run/pageferry/migrate-PID.sock].
    #[arg(long, value_name = "PATH|none")]
    pub(in crate::cli) control: Option<PathBuf>,
    /// Read, code and send at this nice value until the freeze, which has the engine's own priority: 0 to 19, the least.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(in crate::cli) nice: u8,
    /// What pre-copy, and owed pages that nobody waits for, may take of the link, such as 1Gbit or 100MB (a second) [default: all].
    #[arg(long, value_name = "RATE")]
    pub(in crate::cli) bandwidth: Option<Rate>,
    /// Memory for what was last sent of pages that are written again and again: they travel as what differs; 0 turns
    /// it off [default: a sixteenth of the program's memory].
    #[arg(long, value_name = "SIZE")]
    pub(in crate::cli) delta_cache: Option<Bytes>,
    /// Memory that the engine may take for itself, such as 64MiB: books (0.4 % of the program's memory), buffers and caches. Where it is
    /// little the delta cache and the table of equal pages are smaller, and there are fewer connections; with less than it needs
    /// nothing is begun. `pageferry control` changes it [default: as much as it takes].
    #[arg(long, value_name = "SIZE")]
    pub(in crate::cli) engine_memory: Option<Bytes>,
    /// Connections, each with a worker of its own [default: one a processor, 8 at most].
    #[arg(long, value_name = "N")]
    pub(in crate::cli) streams: Option<u16>,
    /// Congestion control of the connections, such as bbr [default: cubic, where the system has it].
    #[arg(long, value_name = "NAME")]
    pub(in crate::cli) congestion: Option<String>,
    /// How pages may be coded: by what is measured, or one way only, for comparisons.
    #[arg(long, value_enum, default_value = "auto")]
    pub(in crate::cli) coding: CodingName,
    /// Share of one processor that the engine may take until the freeze, such as 50%; 150% is one and a half. Owed pages that nobody waits
    /// for keep to it too. How pages are coded follows from it. `pageferry control` changes it [default: as much as makes the migration
    /// quicker].
    #[arg(long, value_name = "PERCENT")]
    pub(in crate::cli) cpu: Option<Percent>,
    /// How dirty pages are found.
    #[arg(long, value_enum, default_value = "auto")]
    pub(in crate::cli) tracker: TrackerName,
    /// How CRIU is kept from dumping memory that is there already.
    #[arg(long, value_enum, default_value = "auto")]
    pub(in crate::cli) hide: HideName,
    /// An address that moves with the program, and with it the program's established TCP connections; more than once for several.
    /// DEV has it here; the receiver puts it on its device of the same name, or on DEVB.
    #[arg(long, value_name = "ADDR/LEN@DEV[:DEVB]")]
    pub(in crate::cli) move_address: Vec<MovedAddress>,
    /// What becomes of established TCP connections [default: keep with --move-address, close in a file, refuse otherwise].
    #[arg(long, value_enum)]
    pub(in crate::cli) tcp: Option<TcpName>,
    #[command(flatten)]
    pub(in crate::cli) hooks: HookArguments,
    /// Compare the whole restored memory with the frozen source before the commit (inside the downtime). What comes after
    /// it is compared page by page as it comes, with or without this.
    #[arg(long)]
    pub(in crate::cli) verify: bool,
    /// Write the report to a file, as JSON; also when the migration fails.
    #[arg(long, value_name = "FILE")]
    pub(in crate::cli) report: Option<PathBuf>,
    /// CRIU to use [default: $PAGEFERRY_CRIU, the one that tools/setup installs, the system's].
    #[arg(long, value_name = "PATH")]
    pub(in crate::cli) criu: Option<PathBuf>,
    /// The program was started from a shell, and shares its session or terminal.
    #[arg(long)]
    pub(in crate::cli) shell_job: bool,
    /// Wait so long for the receiver's first answer.
    #[arg(long, value_name = "TIME", default_value = "5s")]
    pub(in crate::cli) connect_timeout: Time,
    /// Give up when nothing moves for so long.
    #[arg(long, value_name = "TIME", default_value = "30s")]
    pub(in crate::cli) stall_timeout: Time,
    /// When the link is lost around the commit: ask the receiver for so long what became of it.
    #[arg(long, value_name = "TIME", default_value = "20s")]
    pub(in crate::cli) resolve_timeout: Time,
    /// One JSON object a line for every event; the last is the report.
    #[arg(long)]
    pub(in crate::cli) json: bool,
    /// Say nothing but errors.
    #[arg(short, long, conflicts_with = "json")]
    pub(in crate::cli) quiet: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(in crate::cli) enum NoConvergenceName {
    /// Freeze it: the downtime is longer than what was aimed for.
    Freeze,
    /// Slow it down step by step until it writes less than the link carries (see --max-throttle).
    Throttle,
    /// Leave it running here, and say so.
    GiveUp,
    /// Freeze it, and send what is left when it runs there.
    PostCopy,
}

impl NoConvergenceName {
    /// The choice in the words of the library.
    pub(in crate::cli) fn choice(self) -> NoConvergence {
        match self {
            NoConvergenceName::Freeze => NoConvergence::Freeze,
            NoConvergenceName::Throttle => NoConvergence::Throttle,
            NoConvergenceName::GiveUp => NoConvergence::GiveUp,
            NoConvergenceName::PostCopy => NoConvergence::PostCopy,
        }
    }
}

/// Reads `no-progress` and a number of rounds.
fn post_copy_after(text: &str) -> Result<PostCopyAfter, String> {
    match (text, text.parse()) {
        ("no-progress", _) => Ok(PostCopyAfter(None)),
        (_, Ok(rounds)) if rounds > 0 => Ok(PostCopyAfter(Some(rounds))),
        _ => Err("a number of rounds, and no-progress, are known".to_owned()),
    }
}

/// When the rounds of a hybrid migration end.
#[derive(Clone, Copy, Debug)]
pub(in crate::cli) struct PostCopyAfter(pub(in crate::cli) Option<u32>);

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(in crate::cli) enum CodingName {
    /// Whatever is quickest on this link, processor and data.
    Auto,
    /// As they are.
    Raw,
    /// All by zstd, without deltas and without copies of equal pages.
    Zstd,
}

impl CodingName {
    /// The choice in the words of the library.
    pub(in crate::cli) fn choice(self) -> CodingChoice {
        match self {
            CodingName::Auto => CodingChoice::Auto,
            CodingName::Raw => CodingChoice::Raw,
            CodingName::Zstd => CodingChoice::Zstd,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(in crate::cli) enum TcpName {
    /// A program that has any does not move.
    Refuse,
    /// They are closed by the move: clients have to connect again, to the other host.
    Close,
    /// They are kept. Their addresses are moved by --move-address, or by hooks.
    Keep,
}

impl TcpName {
    /// The choice in the words of the library.
    pub(in crate::cli) fn choice(self) -> TcpChoice {
        match self {
            TcpName::Refuse => TcpChoice::Refuse,
            TcpName::Close => TcpChoice::Close,
            TcpName::Keep => TcpChoice::Keep,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(in crate::cli) enum HideName {
    /// The shim, and the synthetic parent for a CRIU into which nothing can be preloaded.
    Auto,
    /// CRIU's incremental dump on top of a parent made for it (soft-dirty kernels).
    SyntheticParent,
    /// A preloaded shim that cuts the pages out of the kernel's answers.
    Shim,
}
