//! What can be asked for, and how it is explained.

use super::control::ControlVerb;
use super::predict::PredictVerb;
use super::recover::RecoverVerb;
use super::simulate::SimulateVerb;
use super::units::{Bytes, Percent, Rate, Share, Time};
use clap::{Args, Parser, Subcommand, ValueEnum};
use pageferry::journal;
use pageferry::{CodingChoice, Hooks, MovedAddress, NoConvergence, PolicyChoice, Strategy, TcpChoice};
use pageferry_tracker::{Scope, TrackerKind};
use std::ffi::OsString;
use std::path::PathBuf;

/// What follows the long help: an example, and the exit codes.
macro_rules! with_exit_codes {
    ($example:literal) => {
        concat!(
            "Example:\n",
            $example,
            "\n
Exit codes:
  0    the program runs at the destination, and every page of it is there
  1    something failed on the way; the program runs on at the source
  2    the command line makes no sense
  3    refused before anything was touched
  4    in doubt: the link was lost around the commit, or for good while pages were owed; the source
       is stopped and whole, and the message says how to go on
  5    the program runs at the destination, but something failed afterwards
  130  interrupted (143 by SIGTERM); the program runs on at the source"
        )
    };
}

/// Moves running programs between Linux hosts.
///
/// pageferry copies a process tree's memory while it runs, sends what it writes again in rounds, stops it once for
/// a moment, and lets it go on at the other side. Memory is tracked with soft-dirty bits or userfaultfd; CRIU is
/// used for the final freeze and the restore only.
#[derive(Debug, Parser)]
#[command(
    name = "pageferry",
    version,
    max_term_width = 100,
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = "Example:\n  dest# pageferry receive --listen 10.0.0.2:7077 --insecure\n  \
                  src#  pageferry migrate --pid $(pidof redis-server) --to 10.0.0.2:7077",
    after_long_help = with_exit_codes!(
        "  dest# pageferry receive --listen 10.0.0.2:7077 --insecure\n  src#  pageferry migrate --pid $(pidof redis-server) --to 10.0.0.2:7077"
    )
)]
pub(super) struct Arguments {
    /// Tell more of what the libraries do, on standard error (-vv and -vvv: still more).
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub(super) verbose: u8,
    #[command(subcommand)]
    pub(super) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Says what this machine can do, by trying it.
    ///
    /// Tracks a page, dumps and restores a small process with a listening socket, hides memory from CRIU and
    /// restores it late. Takes a second or two and leaves nothing behind. Exit code 0 when a migration can work, 3
    /// when not.
    #[command(after_help = "Example:\n  # pageferry check --json | jq .ok")]
    Check(CheckVerb),
    /// Waits for programs and lets them run here.
    ///
    /// Receives one migration at a time, until it is interrupted. An interruption gives up a migration that is not
    /// committed; one that is committed is brought to its end first.
    ///
    /// Nobody is authenticated: whoever reaches the address can start programs here as root. So any address but
    /// loopback needs --insecure.
    #[command(after_help = "Example:\n  # pageferry receive --listen 10.0.0.2:7077 --insecure")]
    Receive(ReceiveVerb),
    /// Moves a running process and its children to a receiver.
    ///
    /// Until the receiver has everything and says that it is ready, any failure leaves the program running here as
    /// if nothing had happened; an interruption (Ctrl-C) does the same. After that it never runs here again.
    ///
    /// Established TCP connections move with their address (--move-address), or are closed by the move (--tcp close); a program that
    /// has any is refused otherwise.
    ///
    /// Instead of to a receiver it can go into a file, from which `pageferry restore` brings it back. The file holds the
    /// memory of the program: it is readable for root only.
    #[command(
        after_help = "Example:\n  # pageferry migrate --pid 4711 --to 10.0.0.2:7077 --downtime 50ms --verify",
        after_long_help = with_exit_codes!(
            "  # pageferry migrate --pid 4711 --to 10.0.0.2:7077 --downtime 50ms --verify\n  # pageferry migrate --pid 4711 --to 10.0.0.2:7077 --bandwidth 500Mbit --cpu 50%\n  # pageferry migrate --pid 4711 --to 10.0.0.2:7077 --move-address 10.0.0.9/24@eth0\n  # pageferry migrate --pid 4711 --to dir:/srv/checkpoints --keep-running --incremental"
        )
    )]
    Migrate(Box<MigrateVerb>),
    /// Holds a migration up that runs, changes it, or asks how far it is.
    ///
    /// `pageferry migrate` answers root, and its own user, on a socket for as long as it runs. What cannot be done any more is
    /// refused with the reason, and a yes is kept: one that was paused in time does not freeze the program.
    #[command(
        after_help = "Example:\n  # pageferry control --pid 4711 pause",
        after_long_help = "Example:
  # pageferry control --pid 4711 status --json | jq .status.round
  # pageferry control --pid 4711 bandwidth 100Mbit
  # pageferry control --pid 4711 post-copy

Exit codes:
  0    it was done
  1    the migration did not answer: it may have ended meanwhile
  2    the command line makes no sense
  3    refused: there is no such migration, it is not yours, or it cannot be done now"
    )]
    Control(ControlVerb),
    /// Says what moving a program would bring, without moving it.
    ///
    /// Watches for a while what it writes and looks at some of its pages; then it is moved in virtual time, from many moments
    /// of that while, by each strategy: rounds, downtime, total time, bytes, and how much slower it runs meanwhile. Each
    /// with the interval in which nine of ten such migrations lie. What a freeze and a page cost on this machine is learned from
    /// earlier migrations. The program never notices.
    #[command(after_help = "Example:\n  # pageferry predict --pid $(pidof redis-server) --bandwidth 1Gbit")]
    Predict(PredictVerb),
    /// Moves the program of a recording in virtual time.
    ///
    /// Runs the engine's policy over what `pageferry track --record` has seen, thousands of times faster than real time: for
    /// comparing policies and links on one trace. Behind its end a recording begins anew. With --strategy the rounds of one
    /// migration are shown, otherwise every strategy, from many moments.
    #[command(
        after_help = "Example:\n  # pageferry track --pid 4711 --interval 50ms --duration 30s --record redis.pft\n  $ pageferry simulate --trace redis.pft --bandwidth 1Gbit --policy fixed:5 --strategy pre-copy"
    )]
    Simulate(SimulateVerb),
    /// Brings a program back from a file that `migrate --to file:PATH` has written.
    ///
    /// The program gets its old process ids, so these must be free, and the files that it has open must be there as they
    /// were. The file stays as it is, and can be restored again when the program has ended.
    ///
    /// A file that is damaged, cut off or of another version is refused, with the frame and the place in the file, and nothing
    /// of it runs.
    #[command(
        after_help = "Example:\n  # pageferry migrate --pid 4711 --to file:/srv/redis.pageferry\n  # pageferry restore /srv/redis.pageferry",
        after_long_help = "Example:
  # pageferry migrate --pid 4711 --to file:/srv/redis.pageferry
  # pageferry restore /srv/redis.pageferry

Exit codes:
  0    the program runs, and every page of it is there
  1    something failed on the way; nothing of it runs
  2    the command line makes no sense
  3    refused before anything was touched: above all a damaged file
  130  interrupted (143 by SIGTERM); nothing of it runs"
    )]
    Restore(RestoreVerb),
    /// Reads a file of `migrate --to file:PATH` to the end: whether all of it is right, and what takes how much.
    ///
    /// Makes every page as a restore would, compares each with its digest, and every address space with what the source
    /// sealed, by code of its own. It needs as much memory as the program had, and changes nothing.
    ///
    /// Exit code 0 when all of it is right, 1 when not: then the message names the first frame that is wrong and its place, and the tables
    /// show what comes before it.
    #[command(
        after_help = "Example:\n  $ pageferry inspect /srv/redis.pageferry\n  $ pageferry inspect --json /srv/redis.pageferry | jq .fault"
    )]
    Inspect(InspectVerb),
    /// Shows what a program writes: dirty pages, rates, the writable working set.
    ///
    /// Nothing is moved, and the program never notices: its pages are write-protected asynchronously (userfaultfd) or
    /// their soft-dirty bits are read, once an interval. On a terminal this is a live view; q leaves it. Otherwise there is one
    /// line a scan, and a summary at the end.
    ///
    /// The writable working set WWS(t) is the number of distinct pages written in a window of length t, averaged
    /// over all windows of the run.
    #[command(after_help = "Example:\n  # pageferry track --pid $(pidof redis-server)\n  \
                      # pageferry track --interval 100ms --record build.pft -- make -j2\n  \
                      $ pageferry track --replay build.pft --plot build.svg")]
    Track(TrackVerb),
    /// Says what is where after an engine was killed, and brings it to an end.
    ///
    /// Both `migrate` and `receive` write down how far they are (--journal). Of what an engine has left behind, this says where the program
    /// is: a copy that was stopped for a move which did not come to its commit is let go; one whose program runs at the other side is ended.
    /// Where only the other side can know it is asked, so a receiver should listen there: any `pageferry receive` at the same address can
    /// answer for one that was killed. Where nobody knows, nothing is done until you say which copy is the program.
    ///
    /// Migrations whose engines live are shown and left alone.
    #[command(
        after_help = "Example:\n  # pageferry recover\n  # pageferry recover --session 3fa4c1d2 --run-here",
        after_long_help = "Example:
  # pageferry recover
  # pageferry recover --session 3fa4c1d2 --run-here

Exit codes:
  0    nothing is left to decide here
  2    the command line makes no sense
  3    refused: not root, no such session, a journal that cannot be read
  4    of some program it is not known which copy is the one: it stays stopped, and whole"
    )]
    Recover(RecoverVerb),
    /// Prints a completion script for a shell.
    #[command(after_help = "Example:\n  $ pageferry completions bash > /etc/bash_completion.d/pageferry")]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Prints the manual page, or writes the pages of all verbs.
    #[command(after_help = "Example:\n  $ pageferry man --dir /usr/local/share/man/man1")]
    Man {
        /// Folder to write them to.
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub(super) struct CheckVerb {
    /// One JSON object instead of a table.
    #[arg(long)]
    pub(super) json: bool,
    /// CRIU to try [default: $PAGEFERRY_CRIU, the one that tools/setup installs, the system's].
    #[arg(long, value_name = "PATH")]
    pub(super) criu: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct ReceiveVerb {
    /// Address and port to listen on.
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:7077")]
    pub(super) listen: String,
    /// Listen on an address that others can reach, although nobody is authenticated.
    #[arg(long)]
    pub(super) insecure: bool,
    /// End after one migration; the exit code tells what became of it.
    #[arg(long)]
    pub(super) once: bool,
    /// Memory that received pages may take at most [default: what the machine has free].
    #[arg(long, value_name = "SIZE")]
    pub(super) memory_limit: Option<Bytes>,
    /// Memory to make ready for pages while waiting, so that the copying does not have to: about the size of what will
    /// come. It is taken from the machine until then.
    #[arg(long, value_name = "SIZE", default_value = "0")]
    pub(super) standby: Bytes,
    /// Keep the pages of what has come in this directory, on disk; what is there from before is copied from it instead of
    /// being sent, above all when a program comes back.
    #[arg(long, value_name = "DIR")]
    pub(super) keep_store: Option<PathBuf>,
    /// CRIU to use [default: $PAGEFERRY_CRIU, the one that tools/setup installs, the system's].
    #[arg(long, value_name = "PATH")]
    pub(super) criu: Option<PathBuf>,
    /// Give a migration up when nothing moves for so long.
    #[arg(long, value_name = "TIME", default_value = "30s")]
    pub(super) stall_timeout: Time,
    /// Write down here how far each migration is, for `pageferry recover`, and answer sources for receivers that were killed; or `none`.
    #[arg(long, value_name = "DIR", default_value = journal::DIRECTORY)]
    pub(super) journal: MaybeDir,
    /// When the source of a program that runs here is not heard of, and pages of the program are still there: wait so long, then
    /// end it.
    #[arg(long, value_name = "TIME", default_value = "5min")]
    pub(super) post_copy_timeout: Time,
    #[command(flatten)]
    pub(super) hooks: HookArguments,
    /// One JSON object a line for every event.
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum TrackerName {
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

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum ScopeName {
    /// All that the programs can write or have written: also shared memory (each object once), files, locked memory.
    All,
    /// Private anonymous memory that is not locked: what a migration sends by itself, before the programs stop.
    Lazy,
}

impl ScopeName {
    pub(super) fn scope(self) -> Scope {
        match self {
            ScopeName::All => Scope::All,
            ScopeName::Lazy => Scope::Lazy,
        }
    }
}

/// A directory, or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MaybeDir(pub(super) Option<PathBuf>);

impl std::str::FromStr for MaybeDir {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self((text != "none").then(|| PathBuf::from(text))))
    }
}

/// Where earlier migrations of this machine are remembered.
pub(super) const CALIBRATION: &str = "/var/lib/pageferry/calibration.json";

/// Reads `adaptive` and `fixed:N`.
pub(super) fn policy(text: &str) -> Result<PolicyChoice, String> {
    match text.split_once(':') {
        None if text == "adaptive" => Ok(PolicyChoice::Adaptive),
        Some(("fixed", rounds)) => match rounds.parse() {
            Ok(rounds) if rounds > 0 => Ok(PolicyChoice::Fixed(rounds)),
            _ => Err(format!("{rounds} is not a number of rounds")),
        },
        _ => Err("adaptive and fixed:N are known".to_owned()),
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum NoConvergenceName {
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
    pub(super) fn choice(self) -> NoConvergence {
        match self {
            NoConvergenceName::Freeze => NoConvergence::Freeze,
            NoConvergenceName::Throttle => NoConvergence::Throttle,
            NoConvergenceName::GiveUp => NoConvergence::GiveUp,
            NoConvergenceName::PostCopy => NoConvergence::PostCopy,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum StrategyName {
    /// All of it while the program stands still: for comparisons, and for links that are faster than its memory is large.
    StopAndCopy,
    /// Memory first: a failure at any time costs nothing.
    PreCopy,
    /// The program first: it stands still shortest, and waits for what it touches; if either machine is lost before all has come, it is.
    PostCopy,
    /// Memory in rounds, then the program, then what it had written last.
    Hybrid,
}

impl StrategyName {
    /// The choice in the words of the library.
    pub(super) fn choice(self) -> Strategy {
        match self {
            StrategyName::StopAndCopy => Strategy::StopAndCopy,
            StrategyName::PreCopy => Strategy::PreCopy,
            StrategyName::PostCopy => Strategy::PostCopy,
            StrategyName::Hybrid => Strategy::Hybrid,
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
pub(super) struct PostCopyAfter(pub(super) Option<u32>);

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum CodingName {
    /// Whatever is quickest on this link, processor and data.
    Auto,
    /// As they are.
    Raw,
    /// All by zstd, without deltas and without copies of equal pages.
    Zstd,
}

impl CodingName {
    /// The choice in the words of the library.
    pub(super) fn choice(self) -> CodingChoice {
        match self {
            CodingName::Auto => CodingChoice::Auto,
            CodingName::Raw => CodingChoice::Raw,
            CodingName::Zstd => CodingChoice::Zstd,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum TcpName {
    /// A program that has any does not move.
    Refuse,
    /// They are closed by the move: clients have to connect again, to the other host.
    Close,
    /// They are kept. Their addresses are moved by --move-address, or by hooks.
    Keep,
}

impl TcpName {
    /// The choice in the words of the library.
    pub(super) fn choice(self) -> TcpChoice {
        match self {
            TcpName::Refuse => TcpChoice::Refuse,
            TcpName::Close => TcpChoice::Close,
            TcpName::Keep => TcpChoice::Keep,
        }
    }
}

/// Commands at the stages of the handover, on either side.
#[derive(Debug, Args)]
#[command(next_help_heading = "Commands for networks whose addresses somebody else moves (docs/NETWORK.md)")]
pub(super) struct HookArguments {
    /// Run when both sides have been reached and nothing was sent yet; at the destination the address has to be there, silently,
    /// when it is over.
    #[arg(long, value_name = "COMMAND")]
    pub(super) hook_prepare: Option<String>,
    /// Run when the program is about to stop: clients have to be sent to the destination from now on.
    #[arg(long, value_name = "COMMAND")]
    pub(super) hook_before_freeze: Option<String>,
    /// Run when the program runs at the destination.
    #[arg(long, value_name = "COMMAND")]
    pub(super) hook_after_resume: Option<String>,
    /// Run when it does not, and never will: everything has to be as before.
    #[arg(long, value_name = "COMMAND")]
    pub(super) hook_rollback: Option<String>,
}

impl HookArguments {
    /// In the words of the library.
    pub(super) fn hooks(&self) -> Hooks {
        Hooks {
            prepare: self.hook_prepare.clone(),
            before_freeze: self.hook_before_freeze.clone(),
            after_resume: self.hook_after_resume.clone(),
            rollback: self.hook_rollback.clone(),
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum HideName {
    /// The shim, and the synthetic parent for a CRIU into which nothing can be preloaded.
    Auto,
    /// CRIU's incremental dump on top of a parent made for it (soft-dirty kernels).
    SyntheticParent,
    /// A preloaded shim that cuts the pages out of the kernel's answers.
    Shim,
}

impl TrackerName {
    /// The tracker that was asked for; `None`: whichever works.
    pub(super) fn kind(self) -> Option<TrackerKind> {
        match self {
            TrackerName::Auto => None,
            TrackerName::Userfaultfd => Some(TrackerKind::UffdWp),
            TrackerName::SoftDirtyScan => Some(TrackerKind::SoftDirtyScan),
            TrackerName::SoftDirty => Some(TrackerKind::SoftDirty),
            TrackerName::Compare => Some(TrackerKind::Compare),
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct TrackVerb {
    /// Root of the process tree.
    #[arg(long, value_name = "PID", conflicts_with_all = ["command", "replay"])]
    pub(super) pid: Option<i32>,
    /// Time between two scans.
    #[arg(long, value_name = "TIME", default_value = "1s")]
    pub(super) interval: Time,
    /// Stop after so long [default: when the program ends, or q or Ctrl-C is pressed].
    #[arg(long, value_name = "TIME")]
    pub(super) duration: Option<Time>,
    /// Write every scan to a file, for --replay and for simulations (docs/RECORDING.md).
    #[arg(long, value_name = "FILE", conflicts_with = "replay")]
    pub(super) record: Option<PathBuf>,
    /// Read scans from a recording instead of from a program.
    #[arg(long, value_name = "FILE", conflicts_with = "command")]
    pub(super) replay: Option<PathBuf>,
    /// Draw the recording: addresses over time, working set, dirty rate (.svg or .png).
    #[arg(long, value_name = "FILE")]
    pub(super) plot: Option<PathBuf>,
    /// Write one line of CSV a scan to a file, or to standard output (-).
    #[arg(long, value_name = "FILE")]
    pub(super) csv: Option<PathBuf>,
    /// One JSON object a line: every scan, and a summary.
    #[arg(long)]
    pub(super) json: bool,
    /// How dirty pages are found.
    #[arg(long, value_enum, default_value = "auto")]
    pub(super) tracker: TrackerName,
    /// Which memory is looked at.
    #[arg(long, value_enum, default_value = "all", conflicts_with = "replay")]
    pub(super) scope: ScopeName,
    /// Compare the bytes of written pages with those before, and count the unchanged apart.
    #[arg(long)]
    pub(super) contents: bool,
    /// Link for which the hot set is asked: the pages that are dirty again before they could be sent.
    #[arg(long, value_name = "RATE", default_value = "1Gbit")]
    pub(super) link: Rate,
    /// Say nothing but errors (and what --json, --csv and --record were asked for).
    #[arg(short, long, conflicts_with = "json")]
    pub(super) quiet: bool,
    /// A command to start and track from its first page, after --.
    #[arg(last = true, value_name = "COMMAND")]
    pub(super) command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(super) struct MigrateVerb {
    /// Root of the process tree.
    #[arg(long, value_name = "PID", allow_negative_numbers = true)]
    pub(super) pid: i32,
    /// The receiver (port 7077 if none is given); or file:PATH, a file that does not exist yet; or dir:PATH, a directory
    /// that gets a file for each checkpoint.
    #[arg(long, value_name = "HOST:PORT")]
    pub(super) to: String,
    /// When the program has moved, keep its pages in this directory, on disk: `receive --keep-store` takes them from there when
    /// it comes back.
    #[arg(long, value_name = "DIR")]
    pub(super) keep_store: Option<PathBuf>,
    /// Into a file: let the program run on here when the file has all of it, instead of ending it.
    #[arg(long)]
    pub(super) keep_running: bool,
    /// Whether memory moves before the program, after it, or both.
    #[arg(long, value_enum, default_value = "pre-copy")]
    pub(super) strategy: StrategyName,
    /// Hybrid: how many rounds go before the program: a number at most, or no-progress, as long as they help.
    #[arg(long, value_name = "N|no-progress", default_value = "no-progress", value_parser = post_copy_after)]
    pub(super) post_copy_after: PostCopyAfter,
    /// When the link is lost while the program runs there and pages of it are here: try so long to reach the receiver again.
    #[arg(long, value_name = "TIME", default_value = "5min")]
    pub(super) post_copy_timeout: Time,
    /// Into a directory (dir:PATH): store only what the last checkpoint of the same program there does not have. It needs that
    /// one to be restored, and all that it is on top of.
    #[arg(long)]
    pub(super) incremental: bool,
    /// Downtime to aim for.
    #[arg(long, value_name = "TIME", default_value = "100ms")]
    pub(super) downtime: Time,
    /// Pre-copy rounds at most.
    #[arg(long, value_name = "N", default_value_t = 30)]
    pub(super) max_rounds: u32,
    /// Who decides between another round and the freeze: `adaptive`, or `fixed:N` for a fixed number of rounds, for
    /// comparisons.
    #[arg(long, value_name = "POLICY", default_value = "adaptive", value_parser = policy)]
    pub(super) policy: PolicyChoice,
    /// What earlier migrations took, for predictions; this one is added. `none` uses what the engine was built with.
    #[arg(long, value_name = "FILE", default_value = CALIBRATION)]
    pub(super) calibration: PathBuf,
    /// Write down here how far the migration is, for `pageferry recover`; or `none`.
    #[arg(long, value_name = "DIR", default_value = journal::DIRECTORY)]
    pub(super) journal: MaybeDir,
    /// What to do when the program writes faster than the link carries.
    #[arg(long, value_enum, default_value = "freeze")]
    pub(super) on_no_convergence: NoConvergenceName,
    /// With --on-no-convergence throttle: how much of the time the program may be made to stand still.
    #[arg(long, value_name = "SHARE", default_value = "90%")]
    pub(super) max_throttle: Share,
    /// Socket on which `pageferry control` is answered, or none [default: /run/pageferry/migrate-PID.sock].
    #[arg(long, value_name = "PATH|none")]
    pub(super) control: Option<PathBuf>,
    /// Read, code and send at this nice value until the freeze, which has the engine's own priority: 0 to 19, the least.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(super) nice: u8,
    /// What pre-copy, and owed pages that nobody waits for, may take of the link, such as 1Gbit or 100MB (a second) [default: all].
    #[arg(long, value_name = "RATE")]
    pub(super) bandwidth: Option<Rate>,
    /// Memory for what was last sent of pages that are written again and again: they travel as what differs; 0 turns
    /// it off [default: a sixteenth of the program's memory].
    #[arg(long, value_name = "SIZE")]
    pub(super) delta_cache: Option<Bytes>,
    /// Connections, each with a worker of its own [default: one a processor, 8 at most].
    #[arg(long, value_name = "N")]
    pub(super) streams: Option<u16>,
    /// Congestion control of the connections, such as bbr [default: cubic, where the system has it].
    #[arg(long, value_name = "NAME")]
    pub(super) congestion: Option<String>,
    /// How pages may be coded: by what is measured, or one way only, for comparisons.
    #[arg(long, value_enum, default_value = "auto")]
    pub(super) coding: CodingName,
    /// Share of one processor that compression may take over all connections, such as 50%; 150% is one and a half [default: as
    /// much as makes the migration quicker].
    #[arg(long, value_name = "PERCENT")]
    pub(super) cpu: Option<Percent>,
    /// How dirty pages are found.
    #[arg(long, value_enum, default_value = "auto")]
    pub(super) tracker: TrackerName,
    /// How CRIU is kept from dumping memory that is there already.
    #[arg(long, value_enum, default_value = "auto")]
    pub(super) hide: HideName,
    /// An address that moves with the program, and with it the program's established TCP connections; more than once for several.
    /// DEV has it here; the receiver puts it on its device of the same name, or on DEVB.
    #[arg(long, value_name = "ADDR/LEN@DEV[:DEVB]")]
    pub(super) move_address: Vec<MovedAddress>,
    /// What becomes of established TCP connections [default: keep with --move-address, close in a file, refuse otherwise].
    #[arg(long, value_enum)]
    pub(super) tcp: Option<TcpName>,
    #[command(flatten)]
    pub(super) hooks: HookArguments,
    /// Compare the whole restored memory with the frozen source before the commit (inside the downtime). What comes after
    /// it is compared page by page as it comes, with or without this.
    #[arg(long)]
    pub(super) verify: bool,
    /// Write the report to a file, as JSON; also when the migration fails.
    #[arg(long, value_name = "FILE")]
    pub(super) report: Option<PathBuf>,
    /// CRIU to use [default: $PAGEFERRY_CRIU, the one that tools/setup installs, the system's].
    #[arg(long, value_name = "PATH")]
    pub(super) criu: Option<PathBuf>,
    /// The program was started from a shell, and shares its session or terminal.
    #[arg(long)]
    pub(super) shell_job: bool,
    /// Wait so long for the receiver's first answer.
    #[arg(long, value_name = "TIME", default_value = "5s")]
    pub(super) connect_timeout: Time,
    /// Give up when nothing moves for so long.
    #[arg(long, value_name = "TIME", default_value = "30s")]
    pub(super) stall_timeout: Time,
    /// When the link is lost around the commit: ask the receiver for so long what became of it.
    #[arg(long, value_name = "TIME", default_value = "20s")]
    pub(super) resolve_timeout: Time,
    /// One JSON object a line for every event; the last is the report.
    #[arg(long)]
    pub(super) json: bool,
    /// Say nothing but errors.
    #[arg(short, long, conflicts_with = "json")]
    pub(super) quiet: bool,
}

#[derive(Debug, Args)]
pub(super) struct InspectVerb {
    /// The file; or a directory of checkpoints, for the last one in it.
    #[arg(value_name = "FILE")]
    pub(super) path: PathBuf,
    /// One JSON object instead of tables, with every region and every image.
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Args)]
pub(super) struct RestoreVerb {
    /// The file; or a directory of checkpoints, for the last one in it.
    #[arg(value_name = "FILE")]
    pub(super) path: PathBuf,
    /// Memory that its pages may take at most [default: what the machine has free].
    #[arg(long, value_name = "SIZE")]
    pub(super) memory_limit: Option<Bytes>,
    /// CRIU to use [default: $PAGEFERRY_CRIU, the one that tools/setup installs, the system's].
    #[arg(long, value_name = "PATH")]
    pub(super) criu: Option<PathBuf>,
    /// Give up when CRIU makes no progress for so long.
    #[arg(long, value_name = "TIME", default_value = "30s")]
    pub(super) stall_timeout: Time,
    /// One JSON object a line for every event.
    #[arg(long)]
    pub(super) json: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }
}
