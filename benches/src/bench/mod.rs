//! Measurements of live migrations between two hosts on this machine, and of what tracking costs.

use anyhow::Context;
use bytesize::ByteSize;
use clap::{Args, Parser, Subcommand};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

pub mod attach;
pub mod bare;
pub mod baseline;
pub mod bytes;
pub mod chaos;
pub mod child;
pub mod codings;
pub mod convergence;
pub mod downtime;
pub mod ferry;
pub mod goodput;
pub mod hosts;
pub mod machine;
pub mod moved_redis;
pub mod post_copy_faults;
pub mod prediction;
pub mod puppet;
pub mod redis;
pub mod redis_handover;
pub mod resident;
mod rss;
pub mod scan;
pub mod slowdown;
pub mod stats;
pub mod subject;
pub mod table;
pub mod tracking_cost;
pub mod wws_accuracy;

/// Moves programs between two hosts on this machine and measures.
#[derive(Debug, Parser)]
#[command(name = "pageferry-bench", version)]
pub struct Command {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// How long a program stands still, by the size of its memory, beside plain CRIU
    Downtime(downtime::Options),
    /// How fast memory is copied before the freeze, and what the engine needs for it
    Goodput(goodput::Options),
    /// How long a program waits for pages that are still at the source, and its downtime by strategy
    PostCopyFaults(post_copy_faults::Options),
    /// How many bytes a migration sends, and how long that takes on slow links, beside raw pages and zstd
    Bytes(bytes::Options),
    /// The loop that `goodput` compares with, alone: which sizes and socket options are the fastest
    Bare(bare::Options),
    /// What a program feels while its memory is copied
    Slowdown(slowdown::Options),
    /// How long a scan for dirty pages takes, beside a bare loop over the same system call
    Scan(scan::Options),
    /// How long one thread stands still while its process begins to be tracked
    Attach(attach::Options),
    /// What a program loses while it is tracked
    TrackingCost(tracking_cost::Options),
    /// A program whose memory a measurement controls, a line of input at a time
    #[command(hide = true)]
    Puppet(puppet::Options),
    /// How near the estimated working set is to the true one
    WwsAccuracy(wws_accuracy::Options),
    /// Programs that write about as fast as the link carries, and faster: what each way of moving them brings
    Convergence(convergence::Options),
    /// What the clients of a redis see of its move, with their connections, beside plain CRIU
    RedisHandover(redis_handover::Options),
    /// What becomes of a program when something that takes part in its migration is killed
    Chaos(chaos::Options),
    /// How near predictions and simulations are to the migrations that follow
    Prediction(prediction::Options),
    /// How fast pages are digested and coded, and into how many bytes
    Codings(codings::Options),
    /// The coding of pages that were sent before, beside QEMU's XBZRLE
    Xbzrle(codings::Options),
    /// What the memory of a process tree would be to compressors
    #[command(hide = true)]
    Resident(resident::Options),
    /// The bare loop, source side: read a process, send
    #[command(hide = true)]
    BareSource(baseline::bare::source::Options),
    /// The bare loop, destination side: receive into memory
    #[command(hide = true)]
    BareDestination(baseline::bare::destination::Options),
    /// Plain CRIU, source side: dump, send the images, wait for the restore
    CriuSource(baseline::source::Options),
    /// Plain CRIU, destination side: receive images, restore
    CriuDestination(baseline::destination::Options),
}

/// What all measurements have in common.
#[derive(Clone, Debug, Args)]
pub struct Common {
    /// Runs of everything; the table shows medians
    #[arg(long, default_value_t = 3)]
    pub runs: usize,
    /// One JSON object a row instead of the table
    #[arg(long)]
    pub json: bool,
    /// Shape the link (as `tc` says it: 1gbit); without it, it is as fast as the machine goes
    #[arg(long, value_name = "RATE")]
    pub link: Option<String>,
    /// The pageferry to measure (otherwise the one built beside this program)
    #[arg(long, value_name = "FILE")]
    pub pageferry: Option<PathBuf>,
    /// The tool that makes the two hosts
    #[arg(long, value_name = "FILE", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../tools/two-hosts"))]
    pub two_hosts: PathBuf,
    /// CRIU for the comparison (otherwise the one that pageferry would find)
    #[arg(long, value_name = "FILE", env = "PAGEFERRY_CRIU")]
    pub criu: Option<PathBuf>,
}

impl Common {
    /// The pageferry to measure.
    ///
    /// # Errors
    /// That there is none.
    pub fn ferry(&self) -> anyhow::Result<ferry::Ferry> {
        let program = match &self.pageferry {
            Some(path) => path.clone(),
            None => beside_this("pageferry").context(
                "no `pageferry` beside this program: build it (cargo build --release -p pageferry), or name one \
                 with --pageferry",
            )?,
        };
        let program = program.canonicalize().with_context(|| format!("looking for {}", program.display()))?;
        Ok(ferry::Ferry::new(program))
    }

    fn medians_need_runs(&self) -> anyhow::Result<()> {
        anyhow::ensure!(self.runs > 0, "--runs must be at least 1");
        Ok(())
    }
}

impl Command {
    /// Runs a measurement. The exit status is a failure if a goal was missed.
    ///
    /// # Errors
    /// What kept it from measuring.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        child::watch_signals()?;
        match self.bench {
            Bench::Downtime(options) => downtime::run(&options),
            Bench::Goodput(options) => goodput::run(&options),
            Bench::PostCopyFaults(options) => post_copy_faults::run(&options),
            Bench::Bytes(options) => bytes::run(&options),
            Bench::Resident(options) => resident::run(&options),
            Bench::Bare(options) => bare::run(&options),
            Bench::Slowdown(options) => slowdown::run(&options),
            Bench::Scan(options) => scan::run(&options),
            Bench::Attach(options) => attach::run(&options),
            Bench::TrackingCost(options) => tracking_cost::run(&options),
            Bench::Puppet(options) => puppet::run(&options),
            Bench::WwsAccuracy(options) => wws_accuracy::run(&options),
            Bench::Convergence(options) => convergence::run(&options),
            Bench::RedisHandover(options) => redis_handover::run(&options),
            Bench::Chaos(options) => chaos::run(&options),
            Bench::Prediction(options) => prediction::run(&options),
            Bench::Codings(options) => codings::run(&options),
            Bench::Xbzrle(options) => codings::run_xbzrle(&options),
            Bench::BareSource(options) => baseline::bare::source::run(&options),
            Bench::BareDestination(options) => baseline::bare::destination::run(&options),
            Bench::CriuSource(options) => baseline::source::run(&options),
            Bench::CriuDestination(options) => baseline::destination::run(&options),
        }
    }
}

/// A program that was built into the same directory (or, for a test program, the one above its own).
///
/// # Errors
/// That it is not there.
pub fn beside_this(name: &str) -> anyhow::Result<PathBuf> {
    let this = std::env::current_exe().context("asking for the path of this program")?;
    let folder = this.parent().unwrap_or(Path::new("/"));
    let folder = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    let path = folder.join(name);
    anyhow::ensure!(path.is_file(), "{} does not exist", path.display());
    Ok(path)
}

/// Refuses sizes whose measurement would not fit: the program, what the destination holds, and the restored
/// program are in memory side by side.
fn ensure_memory(largest: ByteSize) -> anyhow::Result<()> {
    ensure_times(largest, SIDE_BY_SIDE)
}

/// Copies of a program that are in memory at the same time, with what belongs to them.
const SIDE_BY_SIDE: f64 = 3.2;
/// The same where pages leave the destination's store as they are put in place, and the source's copy is ended before.
const IN_TURN: f64 = 2.4;

/// Refuses a size of which so many copies do not fit.
fn ensure_times(largest: ByteSize, copies: f64) -> anyhow::Result<()> {
    let needed = (largest.as_u64() as f64 * copies) as u64;
    let available = machine::available_memory()?;
    anyhow::ensure!(
        available >= needed,
        "moving {largest} needs about {} of memory, and {} is available: choose other --sizes",
        ByteSize(needed),
        ByteSize(available)
    );
    Ok(())
}

/// The program whose subcommands are the workloads.
///
/// # Errors
/// When it was not built.
pub fn workload() -> anyhow::Result<PathBuf> {
    beside_this("pageferry-workload").context("pageferry-workload is built together with this program")
}
