//! Who decides: pages that are written all the time, programs that outrun the link, fixed rounds.

use super::Test;
use super::ferry::Ferry;
use anyhow::{Context, ensure};
use pageferry_benches::bench::hosts::Host;

pub fn tests() -> Vec<(&'static str, Test)> {
    vec![
        ("a hot set is held back until the freeze", hot_set),
        ("what is written all the time is not sent in the first round", ahead),
        ("a program that outruns the link runs on, when asked for", give_up),
        ("a program that outruns the link is slowed down, when asked for", throttle),
        ("what is written while the freeze is made ready goes before it", closing),
        ("a fixed number of rounds", fixed),
        ("all of it while the program stands still", stop_and_copy),
    ]
}

/// A twentieth of the memory is written faster than the link carries.
fn hot_set(ferry: &Ferry) -> anyhow::Result<()> {
    let log = ferry.scratch.path().join(ferry.name("log"));
    let log = log.to_str().context("a path of text")?;
    let mut bytes = Vec::new();
    for policy in ["adaptive", "fixed:12"] {
        let writer = ["pattern", "--log", log, "--memory", "64MiB", "--rate", "80MB", "--pattern", "hot-set"];
        let subject = ferry.subject(&writer)?;
        let receiver = ferry.receiver(None, &["--once"])?;
        // Whole pages, so that what is compared is when they are sent and not how.
        let options = ["--verify", "--bandwidth", "20MB", "--delta-cache", "0", "--policy", policy];
        let outcome = ferry.migrate(subject.pid, None, &options)?;
        let report = outcome.moved()?;
        ensure!(report.verified, "it was not compared");
        let held: u64 = report.rounds.iter().map(|round| round.held_pages).sum();
        ensure!((held > 0) == (policy == "adaptive"), "{policy}: {held} pages were held back");
        let frozen = report.rounds.last().context("rounds")?;
        bytes.push((report.bytes_sent, frozen.sent_pages));
        ferry.lives_only(Host::Destination, &subject).context(policy)?;
        ensure!(receiver.wait()? == 0, "the receiver's exit code");
        ferry.hosts.kill(Host::Destination, subject.pid)?;
    }
    let [ours, fixed] = bytes[..] else { unreachable!("two policies") };
    ensure!(ours.0 < fixed.0, "bytes of holding back and of fixed rounds: {} and {}", ours.0, fixed.0);
    // Both send the hot set in the freeze, and little else.
    ensure!(ours.1 < 2 * fixed.1.max(500), "pages in the freeze: {} and {}", ours.1, fixed.1);
    Ok(())
}

/// One page in twenty, again and again: a first round that sends them sends them in vain.
fn ahead(ferry: &Ferry) -> anyhow::Result<()> {
    const PAGES: u64 = (64 << 20) / 4096;
    let mut bytes = Vec::new();
    for policy in ["adaptive", "fixed:6"] {
        let subject = ferry.subject(&["writer", "--memory", "64MiB", "--every", "20", "--rate", "80MB"])?;
        let receiver = ferry.receiver(None, &["--once"])?;
        let options = ["--verify", "--bandwidth", "20MB", "--policy", policy];
        let outcome = ferry.migrate(subject.pid, None, &options)?;
        let report = outcome.moved()?;
        ensure!(report.verified, "it was not compared");
        let (first, second) = (&report.rounds[0], &report.rounds[1]);
        // The others are written before it is known that they will be again.
        let left = if policy == "adaptive" { PAGES / 80..PAGES / 20 + 10 } else { 0..1 };
        ensure!(left.contains(&first.ahead_pages), "{policy}: {first:?}");
        ensure!(second.dirty_pages >= first.ahead_pages, "{policy}: {second:?}");
        bytes.push(report.bytes_sent);
        ferry.lives_only(Host::Destination, &subject).context(policy)?;
        ensure!(receiver.wait()? == 0, "the receiver's exit code");
        ferry.hosts.kill(Host::Destination, subject.pid)?;
    }
    let [ours, fixed] = bytes[..] else { unreachable!("two policies") };
    ensure!(ours + PAGES / 80 * 4096 / 2 < fixed, "bytes of leaving and of fixed rounds: {ours} and {fixed}");
    Ok(())
}

fn give_up(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "32MiB", "--rate", "60MB", "--full-page"])?;
    let receiver = ferry.receiver(None, &[])?;
    let options = ["--bandwidth", "10MB", "--downtime", "80ms", "--on-no-convergence", "give-up"];
    let outcome = ferry.migrate(subject.pid, None, &options)?;
    outcome.failed(1, &["writes faster than the link", "running at the source", "--downtime"])?;
    ferry.lives_only(Host::Source, &subject)?;
    // The same, with a freeze however long it takes.
    let outcome =
        ferry.migrate(subject.pid, None, &["--bandwidth", "10MB", "--downtime", "80ms", "--verify"])?;
    ensure!(outcome.moved()?.stop_reason == "no-progress", "{}", outcome.moved()?.stop_reason);
    ferry.lives_only(Host::Destination, &subject)?;
    receiver.stop()
}

fn throttle(ferry: &Ferry) -> anyhow::Result<()> {
    // As fast as it goes, which is not very fast: one that keeps a pace would catch up whenever it runs.
    let writer = ["writer", "--memory", "16MiB", "--rate", "max", "--full-page", "--reads", "10"];
    // A fifth of the time is not enough, and nearly all of it is.
    for (most, stop_reason) in [("20%", "no-progress"), ("98%", "target-met")] {
        let subject = ferry.subject(&writer)?;
        let receiver = ferry.receiver(None, &["--once"])?;
        let options = ["--bandwidth", "20MB", "--downtime", "250ms", "--max-throttle", most, "--verify"];
        let more = ["--on-no-convergence", "throttle", "--delta-cache", "0", "--max-rounds", "60"];
        let outcome = ferry.migrate(subject.pid, None, &[&options[..], &more].concat())?;
        let report = outcome.moved()?;
        ensure!(report.stop_reason == stop_reason, "{most}: {}", report.stop_reason);
        let share = report.throttle_share;
        ensure!(share > 0.0 && share <= most.trim_end_matches('%').parse::<f64>()? / 100.0, "{share}");
        ensure!(report.throttled_us > 0, "and nothing stood still");
        ferry.lives_only(Host::Destination, &subject).context(most)?;
        ensure!(receiver.wait()? == 0, "the receiver's exit code");
        ferry.hosts.kill(Host::Destination, subject.pid)?;
    }
    // An engine that is killed while it holds the program lets it run.
    let subject = ferry.subject(&writer)?;
    let receiver = ferry.receiver(None, &[])?;
    let options = ["--bandwidth", "20MB", "--on-no-convergence", "throttle", "--max-throttle", "90%"];
    let outcome = ferry.migrate(subject.pid, Some("precopy=kill@8"), &options)?;
    ensure!(
        outcome.code != 0 && outcome.err.contains("stands still for"),
        "{}: {}",
        outcome.code,
        outcome.err
    );
    ferry.lives_only(Host::Source, &subject)?;
    ferry.hosts.kill(Host::Source, subject.pid)?;
    receiver.stop()
}

/// A writer whose freeze takes long to be made ready.
fn closing(ferry: &Ferry) -> anyhow::Result<()> {
    let mut left = Vec::new();
    for policy in ["adaptive", "fixed:3"] {
        let subject = ferry.subject(&["writer", "--memory", "64MiB", "--rate", "40MB"])?;
        let receiver = ferry.receiver(None, &["--once"])?;
        let outcome =
            ferry.migrate(subject.pid, Some("closing=delay:300"), &["--policy", policy, "--verify"])?;
        let report = outcome.moved()?;
        let frozen = report.rounds.last().context("rounds")?;
        ensure!(report.verified && frozen.frozen, "{policy}: {:?}", report.rounds);
        left.push(frozen.dirty_pages);
        ferry.lives_only(Host::Destination, &subject).context(policy)?;
        ensure!(receiver.wait()? == 0, "the receiver's exit code");
        ferry.hosts.kill(Host::Destination, subject.pid)?;
    }
    let [ours, fixed] = left[..] else { unreachable!("two policies") };
    ensure!(fixed > 2000, "{fixed} pages were left after rounds that end before it is made ready");
    ensure!(ours * 2 < fixed, "{ours} pages were left, and {fixed} with fixed rounds");
    Ok(())
}

fn fixed(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "16MiB", "--rate", "5MB"])?;
    let receiver = ferry.receiver(None, &["--once"])?;
    let outcome = ferry.migrate(subject.pid, None, &["--policy", "fixed:3", "--verify"])?;
    let report = outcome.moved()?;
    ensure!(report.rounds.len() == 4 && report.stop_reason == "max-rounds", "{:?}", report.rounds);
    ferry.lives_only(Host::Destination, &subject)?;
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    Ok(())
}

fn stop_and_copy(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["forked", "--memory", "16MiB", "--workers", "2", "--rate", "2MB"])?;
    let receiver = ferry.receiver(None, &["--once"])?;
    let outcome = ferry.migrate(subject.pid, None, &["--strategy", "stop-and-copy", "--verify"])?;
    let report = outcome.moved()?;
    ensure!(report.verified && report.rounds.len() == 1 && report.rounds[0].frozen, "{:?}", report.rounds);
    ensure!(
        report.stop_reason == "stop-and-copy" && report.strategy == "stop-and-copy",
        "{}",
        report.stop_reason
    );
    ferry.lives_only(Host::Destination, &subject)?;
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    ferry.hosts.kill(Host::Destination, subject.pid)
}
