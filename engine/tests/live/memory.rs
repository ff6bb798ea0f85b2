//! The engine's own memory beside what it was allowed, on both sides: measured, and the program is whole however little it is.

use super::Test;
use super::control::{control, sends, wait_for};
use super::ferry::{Ferry, LIMIT, Outcome, Receiver};
use anyhow::{Context, ensure};
use pageferry_benches::bench::hosts::Host;
use std::time::{Duration, Instant};

pub fn tests() -> Vec<(&'static str, Test)> {
    vec![
        ("memory: the sending engine stays below what it may take", source),
        ("memory: the receiving engine stays below what it may take", destination),
        ("memory: the destination gives its own back while it puts pages in place", given_back),
        ("memory: what it may take changes while it runs", changes),
        ("memory: too little for the program is refused", refused),
    ]
}

const MIB: u64 = 1 << 20;
const WRITER: [&str; 5] = ["writer", "--memory", "128MiB", "--rate", "60MB"];
/// A cache as large as all that is written, and many connections: more than it may take.
const GREEDY: [&str; 8] =
    ["--delta-cache", "128MiB", "--streams", "4", "--policy", "fixed:12", "--bandwidth", "150MB"];

fn source(ferry: &Ferry) -> anyhow::Result<()> {
    let moved = |options: &[&str]| -> anyhow::Result<Outcome> {
        let subject = ferry.subject(&WRITER)?;
        let receiver = ferry.receiver(None, &["--once"])?;
        let outcome = ferry.migrate(subject.pid, None, &[&GREEDY[..], options].concat())?;
        outcome.moved()?;
        ensure!(receiver.wait()? == 0, "the receiver's exit code");
        ferry.lives_only(Host::Destination, &subject)?;
        ferry.clear()?;
        Ok(outcome)
    };
    let free = moved(&[])?;
    let free = free.moved()?;
    ensure!(
        free.engine_memory_bytes.is_none() && free.engine_peak_rss_bytes > 64 * MIB,
        "it took {} bytes",
        free.engine_peak_rss_bytes
    );
    for (allowed, verify) in [("64MiB", "--verify"), ("40MiB", "--quiet")] {
        let bound = moved(&["--engine-memory", allowed, verify])?;
        let bound = bound.moved()?;
        let limit = bound.engine_memory_bytes.context("no limit in the report")?;
        ensure!(bound.engine_peak_rss_bytes <= limit, "{} of {limit}", bound.engine_peak_rss_bytes);
        ensure!(
            bound.streams < free.streams && bound.delta_cache_bytes < 48 * MIB,
            "{} connections and a cache of {}",
            bound.streams,
            bound.delta_cache_bytes
        );
    }
    let late = moved(&["--engine-memory", "40MiB", "--strategy", "hybrid", "--post-copy-after", "2"])?;
    let late = late.moved()?;
    ensure!(late.post_copy.is_some() && late.engine_peak_rss_bytes <= 40 * MIB, "{late:?}");
    // The file's other end is in the same engine.
    let subject = ferry.subject(&WRITER)?;
    let file = format!("file:{}", ferry.scratch.path().join(ferry.name("kept")).display());
    let options = [&GREEDY[..], &["--engine-memory", "48MiB"]].concat();
    let kept = ferry.migrate_from(Host::Source, subject.pid, &file, None, &options)?.wait()?;
    let kept = kept.moved()?;
    ensure!(kept.engine_peak_rss_bytes <= 48 * MIB, "{} bytes", kept.engine_peak_rss_bytes);
    Ok(())
}

/// The largest size of something at the destination while its receiver runs.
struct Watch<'a> {
    ferry: &'a Ferry,
    file: String,
}

impl<'a> Watch<'a> {
    /// What is resident of the receiver but for the pages in its store, which are the mappings that no dump of it would have.
    fn own(ferry: &'a Ferry, receiver: &Receiver) -> anyhow::Result<Self> {
        let own = "/^Rss:/ { rss = $2 } /^VmFlags:/ { if (!/ dd/) sum += rss } END { print sum }";
        Self::over(ferry, receiver, own, &format!("/proc/{}/smaps", receiver.pid))
    }

    /// What is resident of all processes there.
    fn all(ferry: &'a Ferry, receiver: &Receiver) -> anyhow::Result<Self> {
        Self::over(ferry, receiver, "/^VmRSS:/ { sum += $2 } END { print sum }", "/proc/[0-9]*/status")
    }

    fn over(ferry: &'a Ferry, receiver: &Receiver, awk: &str, files: &str) -> anyhow::Result<Self> {
        let file = ferry.scratch.path().join(ferry.name("sizes")).display().to_string();
        // A process may end between its name and its file, which is no end of the watch.
        let script = format!(
            "(while kill -0 {} && {{ awk '{awk}' {files} >>{file} || true; }}; do sleep 0.02; done) >/dev/null 2>&1 &",
            receiver.pid
        );
        ferry.sh(Host::Destination, &script)?;
        Ok(Self { ferry, file })
    }

    /// Bytes, when the receiver has ended.
    fn most(self) -> anyhow::Result<(u64, usize)> {
        let sizes = self.ferry.sh(Host::Destination, &format!("cat {}", self.file))?;
        let sizes: Vec<u64> = sizes.lines().filter_map(|line| line.parse().ok()).collect();
        let most = sizes.iter().max().context("it was never looked at")?;
        Ok((most * 1024, sizes.len()))
    }
}

fn destination(ferry: &Ferry) -> anyhow::Result<()> {
    for strategy in ["pre-copy", "post-copy"] {
        let subject = ferry.subject(&WRITER)?;
        let receiver = ferry.receiver(None, &["--once", "--engine-memory", "36MiB"])?;
        let watch = Watch::own(ferry, &receiver)?;
        let options = [&GREEDY[..], &["--coding", "auto", "--verify", "--strategy", strategy]].concat();
        let outcome = ferry.migrate(subject.pid, None, &options)?;
        let report = outcome.moved().with_context(|| receiver.log())?;
        ensure!(report.streams == 1, "{} connections", report.streams);
        ensure!(receiver.wait()? == 0, "the receiver's exit code");
        let (most, looks) = watch.most()?;
        ensure!(looks > 5 && most > 4 * MIB, "{looks} looks, {most} bytes: that is not all");
        ensure!(most <= 36 * MIB, "{most} bytes in {looks} looks");
        ferry.lives_only(Host::Destination, &subject)?;
        ferry.clear()?;
    }
    Ok(())
}

/// What was received is not there twice: a program with much memory, whose pages are touched everywhere while they are put in place, needs
/// little more than itself.
fn given_back(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "768MiB", "--rate", "60MB"])?;
    let receiver = ferry.receiver(None, &["--once"])?;
    let watch = Watch::all(ferry, &receiver)?;
    let outcome = ferry.migrate(subject.pid, None, &["--downtime", "100ms"])?;
    let report = outcome.moved()?;
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    let (most, looks) = watch.most()?;
    let waits = report.fill.as_ref().context("no fill in the report")?.faults;
    ensure!(waits > 100, "{waits} waits: nothing was touched meanwhile");
    ensure!(most > 768 * MIB, "{most} bytes in {looks} looks: that is not all");
    ensure!(most < 960 * MIB, "{most} bytes at the destination in {looks} looks, {waits} waits");
    ferry.lives_only(Host::Destination, &subject)?;
    ferry.clear()
}

/// Resident bytes of the sending engine.
fn resident(ferry: &Ferry) -> anyhow::Result<u64> {
    let script = "awk '/^VmRSS:/ { print $2 }' /proc/$(pgrep -of 'pageferry migrate')/status";
    Ok(ferry.sh(Host::Source, script)?.parse::<u64>()? * 1024)
}

fn until(what: &str, mut is: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let end = Instant::now() + LIMIT;
    while !is()? {
        ensure!(Instant::now() < end, "not in {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn changes(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&WRITER)?;
    let receiver = ferry.receiver(None, &["--once"])?;
    let options = ["--policy", "fixed:1000000", "--delta-cache", "128MiB", "--streams", "1"];
    let migration =
        ferry.migrate_start(subject.pid, None, &[&options[..], &["--bandwidth", "150MB"]].concat())?;
    wait_for(ferry, &subject, &migration, sends)?;
    until("a large cache", || Ok(resident(ferry)? > 80 * MIB))?;
    let status = control(ferry, &subject, &["engine-memory", "48MiB"])?.status()?;
    ensure!(status.engine_memory == Some(48 * MIB), "{status:?}");
    until("it is given back", || Ok(resident(ferry)? <= 48 * MIB))?;
    control(ferry, &subject, &["engine-memory", "24MiB"])?.refused("MiB of memory for this program")?;
    let status = control(ferry, &subject, &["engine-memory", "none"])?.status()?;
    ensure!(status.engine_memory.is_none(), "{status:?}");
    until("a large cache again", || Ok(resident(ferry)? > 80 * MIB))?;
    control(ferry, &subject, &["post-copy"])?.status()?;
    migration.wait()?.moved()?;
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    ferry.lives_only(Host::Destination, &subject)
}

fn refused(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "384MiB", "--rate", "1MB"])?;
    let receiver = ferry.receiver(None, &["--engine-memory", "27MiB"])?;
    // Nothing is begun on either side.
    let outcome = ferry.migrate(subject.pid, None, &["--engine-memory", "35MiB"])?;
    outcome.failed(3, &["may take 35 MiB of memory for itself, and needs 36 MiB", "--engine-memory"])?;
    ensure!(!receiver.log().contains("session"), "{}", receiver.log());
    let outcome = ferry.migrate(subject.pid, None, &[])?;
    outcome.failed(1, &["out of memory", "for their index", "running at the source"])?;
    ferry.lives_only(Host::Source, &subject)?;
    receiver.stop()
}
