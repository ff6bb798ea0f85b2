//! The least that copying a program's memory to another host can be: a loop that reads the other process and writes to
//! a connection, and one that reads from it into memory. No hashing, no frames, no zero pages, no second round.
//!
//! As many threads and connections as wanted, each with its own part of the memory, on the same link as a migration.

use super::super::child::{Running, output};
use super::super::hosts::{Host, Hosts};
use super::super::subject::Subject;
use crate::sys::memory::PAGE;
use anyhow::{Context, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use pageferry_wire_format::digest;
use serde::{Deserialize, Serialize};
use std::hint::black_box;
use std::time::Duration;
use variant::Variant;

pub mod destination;
pub mod source;
pub mod variant;

/// Longest time that a copy takes here.
const LIMIT: Duration = Duration::from_secs(600);
/// Port of the destination.
const PORT: u16 = 7079;

/// What the source measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copied {
    /// Bytes of memory that arrived.
    pub bytes: u64,
    /// From before the first read of memory until the last connection's receipt, in microseconds.
    pub duration_us: u64,
    /// Processor time of the source and the destination meanwhile, in microseconds. Where the kernel works for the link
    /// in an interrupt, it is whoever's was interrupted.
    pub processor_us: u64,
}

impl Copied {
    /// 10^9 bytes a second.
    pub fn gb_s(&self) -> f64 {
        self.bytes as f64 / 1e3 / self.duration_us as f64
    }

    /// Seconds of processor time for 10^9 bytes.
    pub fn processor_s_gb(&self) -> f64 {
        self.processor_us as f64 * 1e3 / self.bytes as f64
    }
}

/// Makes a digest of every page, as an engine does: here nobody wants it.
fn digest_pages(bytes: &[u8]) {
    for page in bytes.chunks_exact(PAGE) {
        black_box(digest::page(page));
    }
}

/// Copies the region that a workload in the source host has, over so many connections.
///
/// # Errors
/// What failed, with the last words of both sides.
pub fn copy(hosts: &Hosts, subject: &Subject, connections: u16, variant: &Variant) -> anyhow::Result<Copied> {
    let regions = subject.regions()?;
    let region = regions.iter().max_by_key(|region| region.bytes).context("a program without a region")?;
    let program = super::beside_this("pageferry-bench")?.to_string_lossy().into_owned();
    let address = format!("{}:{PORT}", Host::Destination.address());
    let (start, bytes) = (region.start.to_string(), region.bytes.to_string());
    let (pid, connections, variant) = (subject.pid.to_string(), connections.to_string(), variant.to_string());
    let both = ["--bytes", &bytes, "--connections", &connections, "--variant", &variant];
    let receive = [program.as_str(), "bare-destination", "--listen", &address];
    let mut receiver = Running::start(
        "the destination of the bare loop",
        &mut hosts.exec(Host::Destination, receive.iter().chain(&both)),
    )?;
    receiver.wait_line("listening", Duration::from_secs(120))?;
    let send = [program.as_str(), "bare-source", "--to", &address, "--pid", &pid, "--start", &start];
    let said =
        output("the source of the bare loop", &mut hosts.exec(Host::Source, send.iter().chain(&both)), LIMIT)
            .with_context(|| format!("the destination's last words:\n{}", receiver.last_words()))?;
    receiver.finish(LIMIT)?;
    let mut copied: Copied = serde_json::from_str(&said).context("reading what the bare loop measured")?;
    let lines = receiver.lines();
    let last = lines.last().context("the destination of the bare loop said nothing")?;
    copied.processor_us += last.text.parse::<u64>().context("reading what the bare loop took")?;
    ensure!(copied.bytes == region.bytes, "the bare loop copied {} bytes of {}", copied.bytes, region.bytes);
    Ok(copied)
}

/// Processor time of this process so far, in microseconds.
fn processor_us() -> anyhow::Result<u64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).context("asking for processor time")?;
    Ok([usage.user_time(), usage.system_time()].iter().map(|time| time.num_microseconds() as u64).sum())
}

/// Where the part of a connection begins and ends: whole pages, as equal as they can be.
fn part(bytes: u64, connections: u16, index: u16) -> (u64, u64) {
    let page = PAGE as u64;
    let at = |index: u16| bytes / page * u64::from(index) / u64::from(connections) * page;
    (at(index), at(index + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_follow_each_other_and_are_all_there_is() {
        for (bytes, connections) in [(4096, 1), (4096, 2), (40_960, 3), (1 << 20, 7)] {
            let parts: Vec<_> = (0..connections).map(|index| part(bytes, connections, index)).collect();
            assert_eq!(parts[0].0, 0);
            assert_eq!(parts[parts.len() - 1].1, bytes);
            assert!(parts.windows(2).all(|pair| pair[0].1 == pair[1].0), "{parts:?}");
        }
    }
}
