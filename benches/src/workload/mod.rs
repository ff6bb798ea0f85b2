//! Programs that are made to be migrated: each knows what every byte of its memory must be.

use bytesize::ByteSize;
use clap::{Args, Parser, Subcommand};
use content::Entropy;
use field::{Change, Style};
use pace::Rate;
use state::{RegionEntry, State};
use std::path::PathBuf;
use std::process::ExitCode;

use crate::sys::memory::{Mapping, PAGE};

pub mod churn;
pub mod content;
pub mod count;
pub mod field;
pub mod forked;
pub mod mixed;
pub mod pace;
pub mod pattern;
pub mod state;
pub mod threads;
pub mod writer;

/// Programs to migrate, and a redis client to watch one move.
#[derive(Debug, Parser)]
#[command(name = "pageferry-workload", version)]
pub struct Command {
    #[command(subcommand)]
    workload: Workload,
}

#[derive(Debug, Subcommand)]
enum Workload {
    /// One process that counts into the state file
    Count(Common),
    /// Threads with a region each, and one that they share under a lock
    Threads {
        #[command(flatten)]
        common: Common,
        /// Number of threads
        #[arg(long, default_value_t = 4)]
        threads: usize,
    },
    /// A parent and workers that share its memory copy-on-write
    Forked {
        #[command(flatten)]
        common: Common,
        /// Number of workers
        #[arg(long, default_value_t = 3)]
        workers: usize,
        /// A process writes only every N-th page, each its own (otherwise all of them share all pages among them)
        #[arg(long, value_name = "N")]
        every: Option<usize>,
        /// Stop writing after so many writes of each of these pages
        #[arg(long, value_name = "N")]
        passes: Option<u64>,
    },
    /// PROT_NONE, read-only, file-private, locked, shared, memfd and huge memory, pipes and sockets
    Mixed(Common),
    /// Maps, unmaps, moves, drops and grows memory all the time
    Churn(Common),
    /// One region, dirtied at a rate; the program that benchmarks move
    Writer {
        #[command(flatten)]
        common: Common,
        /// Pages to read at random places for every page written
        #[arg(long, default_value_t = 0)]
        reads: u32,
        /// Write only every N-th page
        #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
        every: u32,
    },
    /// One region, written in a known pattern, with a log of every write; the truth for working-set estimates
    Pattern(pattern::Options),
    /// Serves connections of every kind: busy, idle, bulk, uploads, half-closed
    Serve(crate::connections::server::Options),
    /// Uses them, and notices what is lost, repeated, damaged or late
    Use(crate::connections::client::Options),
    /// Writes numbered keys to redis, and remembers what was acknowledged
    RedisLoad(crate::redis::load::Options),
    /// Fills redis with values that can be computed again
    RedisFill(crate::redis::fill::Options),
    /// Looks whether everything that was filled or acknowledged is there
    RedisVerify(crate::redis::verify::Options),
}

/// What all workloads have in common.
#[derive(Clone, Debug, Args)]
pub struct Common {
    /// State file: progress goes there, and FILE.check is answered in FILE.verdict
    #[arg(long, value_name = "FILE")]
    pub state: PathBuf,
    /// Memory to use
    #[arg(long, default_value = "64MiB")]
    pub memory: ByteSize,
    /// Bytes of pages to dirty a second, or `max`
    #[arg(long, default_value = "10MB")]
    pub rate: Rate,
    /// Seed of the content
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Content that compresses well
    #[arg(long, conflicts_with = "incompressible")]
    pub compressible: bool,
    /// Content that does not compress (the default)
    #[arg(long)]
    pub incompressible: bool,
    /// Rewrite whole pages instead of some words in each
    #[arg(long)]
    pub full_page: bool,
    /// With --full-page: to content that compresses well, whatever was there before
    #[arg(long, requires = "full_page")]
    pub rewrite_compressible: bool,
    /// Words that a write changes in a page, 1 to 512
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=512),
        conflicts_with = "full_page")]
    pub words: u16,
    /// Become the leader of a session of its own (as a daemon is), if possible
    #[arg(long)]
    pub own_session: bool,
}

impl Common {
    /// Pages that `--memory` means.
    pub fn pages(&self) -> usize {
        (self.memory.as_u64() as usize / PAGE).max(1)
    }

    /// How pages are written.
    pub fn style(&self) -> Style {
        let entropy = if self.compressible { Entropy::Compressible } else { Entropy::Incompressible };
        let rewritten = if self.rewrite_compressible { Entropy::Compressible } else { entropy };
        let change =
            if self.full_page { Change::Page(rewritten) } else { Change::Words(usize::from(self.words)) };
        Style { entropy, change }
    }

    fn begin(&self) -> anyhow::Result<State> {
        if self.own_session {
            // Fails for the leader of a process group, which a shell's job is; then it stays in that session.
            let _ = rustix::process::setsid();
        }
        State::create(&self.state)
            .map_err(|error| anyhow::anyhow!("making the state file {}: {error}", self.state.display()))
    }
}

impl Command {
    /// Runs until killed, or, for the redis programs, until done.
    ///
    /// # Errors
    /// What kept it from running.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        match self.workload {
            Workload::Count(common) => count::run(&common),
            Workload::Threads { common, threads } => threads::run(&common, threads),
            Workload::Forked { common, workers, every, passes } => {
                forked::run(&common, workers, every, passes)
            }
            Workload::Mixed(common) => mixed::run(&common),
            Workload::Churn(common) => churn::run(&common),
            Workload::Writer { common, reads, every } => writer::run(&common, reads, every as usize),
            Workload::Pattern(options) => pattern::run(&options),
            Workload::Serve(options) => crate::connections::server::run(&options),
            Workload::Use(options) => crate::connections::client::run(&options),
            Workload::RedisLoad(options) => crate::redis::load::run(&options),
            Workload::RedisFill(options) => crate::redis::fill::run(&options),
            Workload::RedisVerify(options) => crate::redis::verify::run(&options),
        }
    }
}

/// How a mapping is called in `FILE.map`.
fn entry(name: &str, mapping: &Mapping) -> RegionEntry {
    RegionEntry { name: name.to_owned(), start: mapping.address(), bytes: mapping.bytes() as u64 }
}
