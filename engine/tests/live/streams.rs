//! Several connections, and pages that are made of others at the destination.

use super::Test;
use super::ferry::{Ferry, Outcome};
use anyhow::{Context, ensure};
use pageferry::MigrationReport;
use pageferry::report::Codings;
use pageferry_benches::bench::hosts::Host;
use std::time::{Duration, Instant};

pub fn tests() -> Vec<(&'static str, Test)> {
    vec![
        ("pages go over as many connections as are asked for", connections),
        ("equal pages of a forked tree are sent once", equal_pages),
        ("pages of a forked tree that differ in some words are sent as these", alike_pages),
        ("what a delta or a copy is made from is lost, and asked for again", lost),
        ("it is lost in the freeze too", lost_for_good),
        ("one connection of several is lost", one_of_several),
        ("only one coding, when asked for", one_coding),
        ("memory that was made ready while waiting", standby),
    ]
}

fn codings(report: &MigrationReport) -> Codings {
    let mut codings = Codings::default();
    report.rounds.iter().for_each(|round| codings.add(&round.codings));
    codings
}

fn connections(ferry: &Ferry) -> anyhow::Result<()> {
    for streams in [1u32, 2, 4] {
        let subject = ferry.subject(&["writer", "--memory", "96MiB", "--rate", "20MB"])?;
        let receiver = ferry.receiver(None, &["--once"])?;
        let asked = streams.to_string();
        let outcome = ferry.migrate(subject.pid, None, &["--verify", "--streams", &asked])?;
        let report = outcome.moved()?;
        ensure!(report.streams == streams, "{} connections instead of {streams}", report.streams);
        // Every page is in one of the counts, and every byte of pages is in one of the frames.
        for round in &report.rounds {
            let counted: u64 = round.codings.shares().iter().map(|(_, share)| share.pages).sum();
            let counted = counted + round.gone_pages + round.held_pages;
            ensure!(counted == round.dirty_pages, "{round:?} does not add up");
            let bytes: u64 = round.codings.shares().iter().map(|(_, share)| share.bytes).sum();
            ensure!(bytes <= round.sent_bytes, "{round:?}: more bytes in frames than on the wire");
        }
        ferry.lives_only(Host::Destination, &subject).with_context(|| format!("{streams} connections"))?;
        ensure!(receiver.wait()? == 0, "the receiver's exit code");
        ferry.hosts.kill(Host::Destination, subject.pid)?;
    }
    Ok(())
}

/// A parent that fills memory and forks workers, which share it until they write.
fn equal_pages(ferry: &Ferry) -> anyhow::Result<()> {
    let tree = ["forked", "--memory", "64MiB", "--workers", "4", "--rate", "2MB"];
    for streams in ["1", "3"] {
        let subject = ferry.subject(&tree)?;
        let receiver = ferry.receiver(None, &["--once"])?;
        let outcome = ferry.migrate(subject.pid, None, &["--verify", "--streams", streams])?;
        let report = outcome.moved()?;
        ensure!(report.processes == 5 && report.verified, "{} processes", report.processes);
        ensure!(report.memory_bytes > 5 * (60 << 20), "they share nothing: {}", report.memory_bytes);
        let copies = codings(report).copy.pages;
        ensure!(copies > 4 * 15_000, "{copies} pages were copied of {}", 4 * 16_384);
        ensure!(report.bytes_sent < 100 << 20, "{} bytes for 64 MiB, five times", report.bytes_sent);
        ensure!(report.repeated_pages == 0, "{} pages were asked for again", report.repeated_pages);
        ferry.lives_only(Host::Destination, &subject).with_context(|| format!("{streams} connections"))?;
        ensure!(receiver.wait()? == 0, "the receiver's exit code");
        ferry.hosts.kill(Host::Destination, subject.pid)?;
    }
    Ok(())
}

fn sparse(ferry: &Ferry, fault: &str) -> anyhow::Result<Outcome> {
    let subject = ferry.subject(&["writer", "--memory", "8MiB", "--rate", "8MB"])?;
    let receiver = ferry.receiver(Some(fault), &["--once"])?;
    let options = ["--verify", "--bandwidth", "6MB", "--downtime", "60ms", "--delta-cache", "8MiB"];
    let outcome = ferry.migrate(subject.pid, None, &options)?;
    outcome.moved()?;
    ferry.lives_only(Host::Destination, &subject)?;
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    ferry.hosts.kill(Host::Destination, subject.pid)?;
    Ok(outcome)
}

fn alike_pages(ferry: &Ferry) -> anyhow::Result<()> {
    let memory = 32 << 20;
    // Every process changes 8 words in a tenth of the pages, once, and before it is moved.
    let forked = ["forked", "--memory", "32MiB", "--workers", "3", "--every", "10", "--passes", "1"];
    for streams in ["1", "3"] {
        let subject = ferry.subject(&[&forked[..], &["--words", "8", "--rate", "1GB"]].concat())?;
        let receiver = ferry.receiver(None, &["--once"])?;
        std::thread::sleep(Duration::from_millis(500));
        let outcome = ferry.migrate(subject.pid, None, &["--verify", "--streams", streams])?;
        let report = outcome.moved()?;
        let codings = codings(report);
        ensure!(codings.delta.pages > memory / 4096 / 5, "{streams} connections: {codings:?}");
        let bytes: u64 = codings.shares().iter().map(|(_, share)| share.bytes).sum();
        ensure!(bytes < memory * 115 / 100, "{bytes} bytes of pages over {streams} connections: {codings:?}");
        ensure!(report.repeated_pages == 0, "{} pages were asked for again", report.repeated_pages);
        ferry.lives_only(Host::Destination, &subject)?;
        ensure!(receiver.wait()? == 0, "the receiver's exit code");
        ferry.hosts.kill(Host::Destination, subject.pid)?;
    }
    Ok(())
}

fn lost(ferry: &Ferry) -> anyhow::Result<()> {
    let outcome = sparse(ferry, "dest-base=lose@3")?;
    let report = outcome.moved()?;
    ensure!(report.repeated_pages > 0, "nothing was asked for again");
    ensure!(codings(report).delta.pages > report.repeated_pages, "and deltas went on after it");
    Ok(())
}

fn lost_for_good(ferry: &Ferry) -> anyhow::Result<()> {
    let outcome = sparse(ferry, "dest-base=lose-all")?;
    let report = outcome.moved()?;
    let frozen = report.rounds.last().context("rounds")?;
    ensure!(frozen.frozen && frozen.codings.delta.pages > 0, "no delta in the freeze: {:?}", frozen.codings);
    // What came as a delta was asked for, and came whole.
    let whole = frozen.codings.raw.pages + frozen.codings.zstd.pages;
    ensure!(whole >= frozen.codings.delta.pages, "{:?}", frozen.codings);
    Ok(())
}

fn one_of_several(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "96MiB", "--rate", "5MB"])?;
    let receiver = ferry.receiver(None, &[])?;
    // Which connection the frame is on depends on the workers: several numbers meet all of them.
    for action in ["cut", "truncate", "flip"] {
        for frame in [60, 61, 62, 63] {
            let fault = format!("frame={action}@{frame}");
            let options = ["--streams", "3", "--resume-timeout", "0s"];
            let outcome = ferry.migrate(subject.pid, Some(&fault), &options)?;
            ensure!(outcome.code != 0, "{fault}: it reports success: {}", outcome.err);
            ensure!(outcome.err.contains("running at the source"), "{fault}: {}", outcome.err);
            ferry.lives_only(Host::Source, &subject).context(fault)?;
        }
    }
    ferry.migrate(subject.pid, None, &["--streams", "3", "--verify"])?.moved()?;
    ferry.lives_only(Host::Destination, &subject).context("after all of them")?;
    receiver.stop()
}

fn one_coding(ferry: &Ferry) -> anyhow::Result<()> {
    for coding in ["raw", "zstd"] {
        let subject = ferry.subject(&["writer", "--memory", "16MiB", "--rate", "5MB"])?;
        let receiver = ferry.receiver(None, &["--once"])?;
        let outcome = ferry.migrate(subject.pid, None, &["--verify", "--coding", coding])?;
        let codings = codings(outcome.moved()?);
        let other = if coding == "raw" { codings.zstd } else { codings.raw };
        let none = codings.copy.pages + codings.delta.pages + codings.zstd_on_base.pages;
        ensure!(none == 0, "{coding}: {codings:?}");
        ensure!(coding == "zstd" || other.pages == 0, "{coding}: {codings:?}");
        ferry.lives_only(Host::Destination, &subject).context(coding)?;
        ensure!(receiver.wait()? == 0, "the receiver's exit code");
        ferry.hosts.kill(Host::Destination, subject.pid)?;
    }
    Ok(())
}

fn standby(ferry: &Ferry) -> anyhow::Result<()> {
    let receiver = ferry.receiver(None, &["--standby", "48MiB"])?;
    let resident = || -> anyhow::Result<u64> {
        let status = ferry.sh(Host::Destination, &format!("cat /proc/{}/status", receiver.pid))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("a resident size")?;
        Ok(line.trim().trim_end_matches("kB").trim().parse::<u64>()? << 10)
    };
    // For more than was made ready, and again after it was used.
    for memory in ["32MiB", "96MiB"] {
        let until = Instant::now() + Duration::from_secs(20);
        while resident()? < 48 << 20 {
            ensure!(Instant::now() < until, "{} bytes are ready", resident()?);
            std::thread::sleep(Duration::from_millis(20));
        }
        let subject = ferry.subject(&["writer", "--memory", memory, "--rate", "5MB"])?;
        ferry.migrate(subject.pid, None, &["--verify"])?.moved()?;
        ferry.lives_only(Host::Destination, &subject).context(memory)?;
        ferry.hosts.kill(Host::Destination, subject.pid)?;
    }
    receiver.stop()
}
