//! What can be asked for, and how it is explained.

mod choices;
mod migrate;
mod receive;
mod track;

pub(in crate::cli) use choices::{CALIBRATION, StrategyName, policy};
pub(in crate::cli) use migrate::{HideName, MigrateVerb, NoConvergenceName, TcpName};
pub(in crate::cli) use receive::ReceiveVerb;
pub(in crate::cli) use track::{TrackVerb, TrackerName};

use super::control::ControlVerb;
use super::predict::PredictVerb;
use super::recover::RecoverVerb;
use super::simulate::SimulateVerb;
use super::units::{Bytes, Time};
use clap::{Args, Parser, Subcommand};
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
pub(in crate::cli) struct Arguments {
    /// Tell more of what the libraries do, on standard error (-vv and -vvv: still more).
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub(in crate::cli) verbose: u8,
    #[command(subcommand)]
    pub(in crate::cli) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum Verb {
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
    /// You state goals: --downtime, --total-time, --bandwidth, --max-slowdown. Whether all of the memory goes while the program stands still, in rounds
    /// before that, or in part after it, follows from them and from what is measured on the way, unless --strategy says it.
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
    /// Holds up, changes, or asks after a migration that runs, and changes what a receiver may take.
    ///
    /// `pageferry migrate` and `pageferry receive` answer root, and their own user, on a socket for as long as they run. What cannot be
    /// done any more is refused with the reason, and a yes is kept: a migration that was paused in time does not freeze the
    /// program, and one that was let in by a receiver keeps the memory that it was promised.
    #[command(
        after_help = "Example:\n  # pageferry control --pid 4711 pause",
        after_long_help = "Example:
  # pageferry control --pid 4711 status --json | jq .status.round
  # pageferry control --pid 4711 bandwidth 100Mbit
  # pageferry control --pid 4711 post-copy
  # pageferry control --receiver 7077 cpu 50%
  # pageferry control --receiver 7077 memory-limit 4GiB

Exit codes:
  0    it was done
  1    the engine did not answer: it may have ended meanwhile
  2    the command line makes no sense
  3    refused: there is no such engine, it is not yours, or it cannot be done now"
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
    /// Puts a program into a directory, from which `pageferry restore` brings it back, here or on a machine that sees the directory too.
    ///
    /// A program that moves by way of a disk: its memory is read in rounds while it runs, as in a migration, and the rest while it stands still.
    /// Then it ends here, or goes on with --keep-running. The directory gets a file for each checkpoint, readable for root only. The same
    /// as `migrate --to dir:DIR`, which has more options.
    ///
    /// Until all of it is on the disk, any failure leaves the program running here as if nothing had happened.
    #[command(
        after_help = "Example:\n  # pageferry checkpoint --pid 4711 --to /srv/checkpoints --keep-running --incremental\n  # pageferry restore /srv/checkpoints"
    )]
    Checkpoint(CheckpointVerb),
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
    /// A program there that is owed pages which are only here is sent them first, in place of the engine; that takes its time, and can be
    /// interrupted and called again. Where only the other side can know it is asked, so a receiver should listen there: any `pageferry receive` at the same address can
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
pub(in crate::cli) struct CheckVerb {
    /// One JSON object instead of a table.
    #[arg(long)]
    pub(in crate::cli) json: bool,
    /// CRIU to try [default: $PAGEFERRY_CRIU, the one that tools/setup installs, the system's].
    #[arg(long, value_name = "PATH")]
    pub(in crate::cli) criu: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct InspectVerb {
    /// The file; or a directory of checkpoints, for the last one in it.
    #[arg(value_name = "FILE")]
    pub(in crate::cli) path: PathBuf,
    /// One JSON object instead of tables, with every region and every image.
    #[arg(long)]
    pub(in crate::cli) json: bool,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct CheckpointVerb {
    /// Root of the process tree.
    #[arg(long, value_name = "PID")]
    pub(in crate::cli) pid: i32,
    /// The directory; it is made if it does not exist.
    #[arg(long, value_name = "DIR")]
    pub(in crate::cli) to: PathBuf,
    /// Let the program run on here, instead of ending it.
    #[arg(long)]
    pub(in crate::cli) keep_running: bool,
    /// Store only what the last checkpoint of the same program there does not have. It needs that one to be restored, and all
    /// that it is on top of.
    #[arg(long)]
    pub(in crate::cli) incremental: bool,
    /// Downtime to aim for [default: 100ms].
    #[arg(long, value_name = "TIME")]
    pub(in crate::cli) downtime: Option<String>,
    /// What may be written a second, such as 100MB [default: all].
    #[arg(long, value_name = "RATE")]
    pub(in crate::cli) bandwidth: Option<String>,
    /// Share of one processor that the engine may take until the freeze, such as 50% [default: as much as makes it quicker].
    #[arg(long, value_name = "PERCENT")]
    pub(in crate::cli) cpu: Option<String>,
    /// Read and write at this nice value until the freeze: 0 to 19, the least.
    #[arg(long, value_name = "N")]
    pub(in crate::cli) nice: Option<u8>,
    /// What becomes of established TCP connections in what is restored [default: close].
    #[arg(long, value_name = "HOW", value_parser = ["refuse", "close"])]
    pub(in crate::cli) tcp: Option<String>,
    /// Write digests of the whole memory too, to be compared at each restore.
    #[arg(long)]
    pub(in crate::cli) verify: bool,
    /// Write the report to a file, as JSON; also when it fails.
    #[arg(long, value_name = "FILE")]
    pub(in crate::cli) report: Option<PathBuf>,
    /// CRIU to use [default: $PAGEFERRY_CRIU, the one that tools/setup installs, the system's].
    #[arg(long, value_name = "PATH")]
    pub(in crate::cli) criu: Option<PathBuf>,
    /// The program was started from a shell, and shares its session or terminal.
    #[arg(long)]
    pub(in crate::cli) shell_job: bool,
    /// One JSON object a line for every event; the last is the report.
    #[arg(long)]
    pub(in crate::cli) json: bool,
    /// Say nothing but errors.
    #[arg(short, long, conflicts_with = "json")]
    pub(in crate::cli) quiet: bool,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct RestoreVerb {
    /// The file; or a directory of checkpoints, for the last one in it.
    #[arg(value_name = "FILE")]
    pub(in crate::cli) path: PathBuf,
    /// Memory that its pages may take at most [default: what the machine has free].
    #[arg(long, value_name = "SIZE")]
    pub(in crate::cli) memory_limit: Option<Bytes>,
    /// CRIU to use [default: $PAGEFERRY_CRIU, the one that tools/setup installs, the system's].
    #[arg(long, value_name = "PATH")]
    pub(in crate::cli) criu: Option<PathBuf>,
    /// Give up when CRIU makes no progress for so long.
    #[arg(long, value_name = "TIME", default_value = "30s")]
    pub(in crate::cli) stall_timeout: Time,
    /// One JSON object a line for every event.
    #[arg(long)]
    pub(in crate::cli) json: bool,
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
