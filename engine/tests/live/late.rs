//! Memory that comes after the program: in any strategy, and whatever happens meanwhile, a program finds every byte that it had.

use super::Test;
use super::ferry::{Ferry, LIMIT, Outcome};
use anyhow::{Context, ensure};
use pageferry::report::PostCopyReport;
use pageferry_benches::bench::child::wait_for;
use pageferry_benches::bench::hosts::Host;
use pageferry_benches::bench::subject::Subject;
use std::time::{Duration, Instant};

pub fn tests() -> Vec<(&'static str, Test)> {
    vec![
        ("post-copy and hybrid, over one connection and several", strategies),
        ("owed pages of a forked tree, over a slow link", forked),
        ("owed pages are unmapped, moved and dropped while they are owed", churned),
        ("a program that ends while pages are owed to it", ended),
        ("the connections are cut while pages are owed", cut),
        ("the link goes down without a word while pages are owed, and comes back", down_and_up),
        ("the link stays down while pages are owed", down_for_good),
        ("the answer to the commit is lost while pages are owed", answer_lost),
        ("the sending engine is killed while pages are owed", source_killed),
        ("the receiving engine is killed while pages are owed", destination_killed),
        (
            "the receiving engine is killed when nothing is owed, and not all is in place",
            destination_killed_at_last,
        ),
        ("with owed pages too a failure before the commit changes nothing", before_the_commit),
        ("a program that does not converge goes on by post-copy", no_convergence),
    ]
}

/// It moved, and every owed page is accounted for.
fn moved(outcome: &Outcome) -> anyhow::Result<&PostCopyReport> {
    ensure!(outcome.code == 0, "exit code {}: {}", outcome.code, outcome.err);
    let report = outcome.report.as_ref().context("no report")?;
    ensure!(report.outcome == "completed", "outcome {}", report.outcome);
    let late = report.post_copy.as_ref().context("nothing was owed")?;
    let sent = late.demanded_pages + late.pushed_pages;
    ensure!(late.owed_pages > 0 && sent > 0, "{late:?}");
    // Each once; when a connection was lost, what was under way goes again.
    ensure!(sent <= late.owed_pages || late.reconnections > 0, "{late:?}");
    ensure!(report.fill.is_some(), "the destination did not say how it went: {}", outcome.err);
    Ok(late)
}

fn strategies(ferry: &Ferry) -> anyhow::Result<()> {
    for strategy in ["post-copy", "hybrid"] {
        for options in [&["--streams", "1"][..], &["--streams", "3", "--verify"]] {
            (|| {
                let subject = ferry.subject(&["writer", "--memory", "96MiB", "--rate", "40MB"])?;
                let receiver = ferry.receiver(None, &["--once"])?;
                let all = [&["--strategy", strategy], options].concat();
                let outcome = ferry.migrate(subject.pid, None, &all)?;
                let late = moved(&outcome)?;
                let report = outcome.report.as_ref().context("no report")?;
                match strategy {
                    "post-copy" => ensure!(late.owed_pages > 24_000 && report.rounds.len() == 1, "{late:?}"),
                    _ => ensure!(late.owed_pages < 24_000 && report.rounds.len() > 1, "{late:?}"),
                }
                ensure!(late.demanded_pages + late.pushed_pages == late.owed_pages, "{late:?}");
                ensure!(report.verified == options.contains(&"--verify"), "verified: {}", report.verified);
                ferry.lives_only(Host::Destination, &subject)?;
                ensure!(receiver.wait()? == 0, "the receiver's exit code");
                ferry.hosts.kill(Host::Destination, subject.pid)
            })()
            .with_context(|| format!("{strategy} {options:?}"))?;
        }
    }
    Ok(())
}

fn forked(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["forked", "--memory", "32MiB", "--workers", "3", "--rate", "2MB"])?;
    let receiver = ferry.receiver(None, &["--once"])?;
    let options = ["--strategy", "post-copy", "--bandwidth", "60MB", "--streams", "2"];
    let outcome = ferry.migrate(subject.pid, None, &options)?;
    let late = moved(&outcome)?;
    ensure!(late.owed_pages > 4 * 8000 && late.demanded_pages > 0, "{late:?}");
    ensure!(late.duration_us > 500_000, "the limit was not kept: {late:?}");
    ensure!(late.held_up.is_some_and(|share| share > 0.75), "it was the limit that held it up: {late:?}");
    ferry.lives_only(Host::Destination, &subject)?;
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    ferry.hosts.kill(Host::Destination, subject.pid)
}

fn churned(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["churn", "--memory", "64MiB", "--rate", "20MB"])?;
    // At first it has only what it never touches; after so many operations, as much as it may have.
    wait_for("a life behind the program", LIMIT, || {
        Ok(subject.lines()?.last().is_some_and(|line| line.progress > 3000).then_some(()))
    })?;
    let receiver = ferry.receiver(None, &["--once"])?;
    let outcome = ferry.migrate(subject.pid, None, &["--strategy", "post-copy", "--bandwidth", "15MB"])?;
    let late = moved(&outcome)?;
    ensure!(late.demanded_pages + late.pushed_pages < late.owed_pages, "nothing was given back: {late:?}");
    ferry.lives_only(Host::Destination, &subject)?;
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    ferry.hosts.kill(Host::Destination, subject.pid)
}

fn ended(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "64MiB", "--rate", "1MB"])?;
    let receiver = ferry.receiver(None, &["--once"])?;
    let mut migration =
        ferry.migrate_start(subject.pid, None, &["--strategy", "post-copy", "--bandwidth", "4MB"])?;
    migration.says("running at the destination")?;
    ferry.hosts.kill(Host::Destination, subject.pid)?;
    let started = Instant::now();
    let outcome = migration.wait()?;
    let late = moved(&outcome)?;
    ensure!(late.demanded_pages + late.pushed_pages < late.owed_pages, "{late:?}");
    ensure!(started.elapsed() < Duration::from_secs(8), "it went on for {:?}", started.elapsed());
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    ensure!(ferry.state(Host::Source, subject.pid)?.is_none(), "it is still at the source");
    Ok(())
}

fn cut(ferry: &Ferry) -> anyhow::Result<()> {
    for fault in ["late-push=cut@40", "late-demand=cut@3", "frame=flip@200"] {
        (|| {
            let subject = ferry.subject(&["writer", "--memory", "48MiB", "--rate", "40MB"])?;
            let receiver = ferry.receiver(None, &["--once"])?;
            let options = ["--strategy", "post-copy", "--streams", "2", "--coding", "raw"];
            let outcome = ferry.migrate(subject.pid, Some(fault), &options)?;
            let late = moved(&outcome)?;
            ensure!(late.reconnections == 1, "{late:?}");
            ferry.lives_only(Host::Destination, &subject)?;
            ensure!(receiver.wait()? == 0, "the receiver's exit code");
            ferry.hosts.kill(Host::Destination, subject.pid)
        })()
        .with_context(|| fault.to_owned())?;
    }
    Ok(())
}

/// The source's end of the link.
pub(super) fn interface(ferry: &Ferry) -> anyhow::Result<String> {
    ferry.sh(Host::Source, "ip -o link show up type veth | sed 's/^[0-9]*: //; s/[@:].*//'")
}

const SLOW: [&str; 6] = ["--strategy", "post-copy", "--bandwidth", "16MB", "--stall-timeout", "3s"];

fn down_and_up(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "64MiB", "--rate", "5MB"])?;
    let receiver = ferry.receiver(None, &["--once", "--stall-timeout", "3s"])?;
    let mut migration = ferry.migrate_start(subject.pid, None, &SLOW)?;
    migration.says("running at the destination")?;
    let interface = interface(ferry)?;
    ferry.sh(Host::Source, &format!("ip link set {interface} down"))?;
    std::thread::sleep(Duration::from_secs(6));
    ferry.sh(Host::Source, &format!("ip link set {interface} up"))?;
    let outcome = migration.wait()?;
    let late = moved(&outcome)?;
    ensure!(late.reconnections > 0, "{late:?}");
    ferry.lives_only(Host::Destination, &subject)?;
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    ferry.hosts.kill(Host::Destination, subject.pid)
}

/// The source's copy stands still and is whole, there is none at the destination, and a person may let it go on.
fn whole_at_the_source(ferry: &Ferry, subject: &Subject) -> anyhow::Result<()> {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let states = (ferry.state(Host::Source, subject.pid)?, ferry.state(Host::Destination, subject.pid)?);
        if states == (Some('T'), None) {
            break;
        }
        ensure!(Instant::now() < until, "source and destination have {states:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    ferry.sh(Host::Source, &format!("kill -CONT {}", subject.pid))?;
    ferry.lives_only(Host::Source, subject)
}

fn down_for_good(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "64MiB", "--rate", "5MB"])?;
    let patience = ["--post-copy-timeout", "4s"];
    let receiver = ferry.receiver(None, &[&["--once", "--stall-timeout", "2s"], &patience[..]].concat())?;
    let mut migration = ferry.migrate_start(subject.pid, None, &[&SLOW[..], &patience].concat())?;
    migration.says("running at the destination")?;
    let interface = interface(ferry)?;
    ferry.sh(Host::Source, &format!("ip link set {interface} down"))?;
    let outcome = migration.wait();
    let code = receiver.wait();
    ferry.sh(Host::Source, &format!("ip link set {interface} up"))?;
    outcome?.failed(4, &["pages that the program is owed", "stopped at the source", "kill -CONT"])?;
    ensure!(code? == 4, "the receiver's exit code");
    whole_at_the_source(ferry, &subject)
}

fn answer_lost(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "32MiB", "--rate", "5MB"])?;
    let receiver = ferry.receiver(Some("dest-resumed=cut"), &["--once"])?;
    let outcome = ferry.migrate(subject.pid, None, &["--strategy", "post-copy"])?;
    moved(&outcome)?;
    ferry.lives_only(Host::Destination, &subject)?;
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    ferry.hosts.kill(Host::Destination, subject.pid)
}

fn source_killed(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "32MiB", "--rate", "5MB"])?;
    for fault in ["post-copy=kill", "late-push=kill@60"] {
        (|| {
            let receiver = ferry.receiver(None, &["--once", "--post-copy-timeout", "2s"])?;
            let options = ["--strategy", "post-copy", "--coding", "raw"];
            let outcome = ferry.migrate(subject.pid, Some(fault), &options)?;
            ensure!(outcome.code == 137, "exit code {}: {}", outcome.code, outcome.err);
            let log = receiver.log();
            ensure!(receiver.wait()? == 4, "the receiver's exit code: {log}");
            whole_at_the_source(ferry, &subject)
        })()
        .with_context(|| fault.to_owned())?;
    }
    Ok(())
}

fn destination_killed(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "64MiB", "--rate", "5MB"])?;
    let receiver = ferry.receiver(None, &["--once"])?;
    let options = [&SLOW[..], &["--post-copy-timeout", "2s"]].concat();
    let mut migration = ferry.migrate_start(subject.pid, None, &options)?;
    migration.says("running at the destination")?;
    ferry.hosts.kill(Host::Destination, receiver.pid)?;
    let outcome = migration.wait()?;
    outcome.failed(4, &["pages that the program is owed", "stopped at the source", "kill -CONT"])?;
    receiver.wait()?;
    whole_at_the_source(ferry, &subject)
}

/// Nothing is owed any more, and the engine there is the only one that has what is not in place yet.
fn destination_killed_at_last(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "32MiB", "--rate", "5MB"])?;
    for strategy in ["post-copy", "hybrid"] {
        (|| {
            let receiver = ferry.receiver(Some("dest-late-sealed=kill"), &["--once"])?;
            let outcome = ferry.migrate(subject.pid, None, &["--strategy", strategy])?;
            ensure!(receiver.wait()? == 137, "the receiver did not reach the fault");
            outcome.failed(4, &["in doubt", "stopped at the source", "kill -CONT"])?;
            whole_at_the_source(ferry, &subject)
        })()
        .with_context(|| strategy.to_owned())?;
    }
    Ok(())
}

fn before_the_commit(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "16MiB", "--rate", "5MB"])?;
    let receiver = ferry.receiver(None, &[])?;
    for strategy in ["post-copy", "hybrid"] {
        for fault in ["frozen=kill", "seal=kill", "restore=kill", "held=kill", "commit=cut", "frame=cut@25"] {
            (|| {
                let options = ["--strategy", strategy, "--resume-timeout", "0s"];
                let outcome = ferry.migrate(subject.pid, Some(fault), &options)?;
                ensure!(
                    outcome.code == 1 || outcome.code == 137,
                    "exit code {}: {}",
                    outcome.code,
                    outcome.err
                );
                ferry.lives_only(Host::Source, &subject)
            })()
            .with_context(|| format!("{strategy}, {fault}"))?;
        }
    }
    moved(&ferry.migrate(subject.pid, None, &["--strategy", "hybrid", "--post-copy-after", "1"])?)?;
    ferry.lives_only(Host::Destination, &subject)?;
    receiver.stop()
}

fn no_convergence(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "64MiB", "--rate", "max", "--full-page"])?;
    let receiver = ferry.receiver(None, &["--once"])?;
    let options =
        ["--bandwidth", "100MB", "--downtime", "30ms", "--on-no-convergence", "post-copy", "--coding", "raw"];
    let outcome = ferry.migrate(subject.pid, None, &options)?;
    moved(&outcome)?;
    let report = outcome.report.as_ref().context("no report")?;
    ensure!(report.stop_reason == "no-progress" && report.strategy == "pre-copy", "{}", report.stop_reason);
    ferry.lives_only(Host::Destination, &subject)?;
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    ferry.hosts.kill(Host::Destination, subject.pid)
}
