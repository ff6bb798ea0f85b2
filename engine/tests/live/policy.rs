//! Who decides: pages that are written all the time, programs that outrun the link, fixed rounds.

use super::Test;
use super::ferry::Ferry;
use anyhow::{Context, ensure};
use pageferry_benches::bench::hosts::Host;

pub fn tests() -> Vec<(&'static str, Test)> {
    vec![
        ("a hot set is held back until the freeze", hot_set),
        ("a program that outruns the link runs on, when asked for", give_up),
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
