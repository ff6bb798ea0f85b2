//! The programs whose bytes are counted, and what has to hold for each.

use super::super::hosts::{Host, Hosts};
use super::super::moved_redis::MovedRedis;
use super::super::subject::Subject;
use crate::sys::memory::PAGE;
use crate::workload::state::realtime_us;
use bytesize::ByteSize;
use clap::ValueEnum;
use serde::Serialize;
use std::path::Path;

/// Pages that a sparse writer dirties a second.
const SPARSE_PAGES: u64 = 20_000;
/// Words that it changes in each.
const SPARSE_WORDS: &str = "8";
/// Workers of a tree, beside their parent.
const WORKERS: &str = "7";
/// Every so many-th page of a forked process is its own.
const OWN: &str = "10";

/// A program to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Program {
    /// A redis-server with values as of web sessions: JSON
    Redis,
    /// Changes 8 words in each of 20 000 pages a second, always in the same sixteenth of its pages
    SparseHot,
    /// The same in all of its pages, which the delta cache may all keep
    SparseAll,
    /// Eight processes that share 90 % of incompressible memory; in the rest each changed 8 words a page
    ForkedWords,
    /// The same, with their own tenth rewritten to something that compresses well
    ForkedCompressible,
    /// The same, with their own tenth rewritten to noise
    ForkedNoise,
    /// Incompressible memory that nobody writes
    Noise,
}

/// How it is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// As it is.
    Whole,
    /// The first process of a tree without the others.
    Alone,
}

/// A program that runs in the source host.
#[derive(Debug)]
pub enum Moving {
    /// Redis.
    Redis(MovedRedis),
    /// A workload of ours.
    Own(Subject),
}

impl Program {
    /// Its name, as the command line has it.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Rate of the link that it is measured on.
    pub fn link(self) -> &'static str {
        if self.is_sparse() { "100mbit" } else { "1gbit" }
    }

    /// Its memory (for redis: of the values alone).
    pub fn memory(self) -> ByteSize {
        ByteSize::mib(match self {
            Self::Redis => 512,
            Self::SparseHot | Self::ForkedWords | Self::ForkedCompressible | Self::ForkedNoise => 128,
            Self::SparseAll => 64,
            Self::Noise => 256,
        })
    }

    /// Whether it never stops writing.
    pub fn is_sparse(self) -> bool {
        matches!(self, Self::SparseHot | Self::SparseAll)
    }

    /// Whether it is a tree.
    pub fn is_forked(self) -> bool {
        matches!(self, Self::ForkedWords | Self::ForkedCompressible | Self::ForkedNoise)
    }

    /// What `pageferry migrate` is told for it.
    pub fn options(self, memory: ByteSize) -> Vec<String> {
        match self {
            Self::SparseAll => vec!["--delta-cache".to_owned(), memory.as_u64().to_string()],
            _ => Vec::new(),
        }
    }

    /// Starts it in the source host, and waits until its memory is filled.
    ///
    /// # Errors
    /// What kept it from starting.
    pub fn start(
        self,
        hosts: &Hosts,
        scratch: &Path,
        memory: ByteSize,
        part: Part,
    ) -> anyhow::Result<Moving> {
        let memory = memory.as_u64().to_string();
        let sparse_rate = (SPARSE_PAGES * PAGE as u64).to_string();
        let writer = ["writer", "--memory", &memory];
        let sparse = ["--words", SPARSE_WORDS, "--rate", &sparse_rate];
        let workers = if part == Part::Alone { "0" } else { WORKERS };
        // Fast enough to be over at once, and not as fast as it goes, which would never pause.
        let forked = ["--workers", workers, "--every", OWN, "--passes", "1", "--rate", "1GB"];
        let forked = [&["forked", "--memory", &memory][..], &forked].concat();
        let words = match self {
            Self::Redis => {
                let family = ["--sessions", "--fill-value-size", "1024", "--bytes", &memory];
                return Ok(Moving::Redis(MovedRedis::start(hosts, scratch, &family)?));
            }
            Self::SparseHot => [&writer[..], &sparse, &["--every", "16"]].concat(),
            Self::SparseAll => [&writer[..], &sparse].concat(),
            Self::ForkedWords => [&forked[..], &["--words", SPARSE_WORDS]].concat(),
            Self::ForkedCompressible => [&forked[..], &["--full-page", "--rewrite-compressible"]].concat(),
            Self::ForkedNoise => [&forked[..], &["--full-page"]].concat(),
            Self::Noise => [&writer[..], &["--rate", "0"]].concat(),
        };
        let words: Vec<String> = words.into_iter().map(str::to_owned).collect();
        Ok(Moving::Own(Subject::start(hosts, scratch, "program", &words)?))
    }
}

impl Moving {
    /// Its pid, the same in both hosts.
    pub fn pid(&self) -> i32 {
        match self {
            Self::Redis(redis) => redis.pid,
            Self::Own(subject) => subject.pid,
        }
    }

    /// At the destination: that it runs, and that nothing of its memory is wrong. Then it is ended.
    ///
    /// # Errors
    /// What was lost.
    pub fn verify(&self, hosts: &Hosts) -> anyhow::Result<()> {
        match self {
            Self::Redis(redis) => redis.verify(hosts, &[])?,
            Self::Own(subject) => {
                subject.wait_alive_after(realtime_us())?;
                subject.check()?;
            }
        }
        hosts.kill(Host::Destination, self.pid())
    }
}
