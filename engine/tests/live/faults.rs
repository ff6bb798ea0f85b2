//! Engines that die, links that break, users who change their minds: in every phase. Exactly one copy of the program
//! survives, with all of its memory, and nothing else is left.

use super::Test;
use super::ferry::{Ferry, LIMIT, Outcome};
use super::kept::fresh;
use super::recover::writes;
use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use pageferry_benches::bench::child::wait_for;
use pageferry_benches::bench::hosts::Host;
use pageferry_benches::bench::subject::Subject;
use std::time::{Duration, Instant};

pub fn tests() -> Vec<(&'static str, Test)> {
    vec![
        ("the sending engine is killed in every phase before the commit", source_killed),
        ("the receiving engine is killed in every phase before the commit", destination_killed),
        ("the link is cut in every phase before the commit", cut),
        ("a frame ends in the middle, in every phase", truncated),
        ("the link goes down without a word, in every phase", silent),
        ("a damaged frame is noticed in every phase", flipped),
        ("SIGINT and SIGTERM in every phase before the commit", interrupted),
        ("the receiver is interrupted before the commit", receiver_interrupted),
        ("a link that hangs is given up", hanging),
        ("the link is cut after the commit was sent", cut_after_commit),
        ("the receiving engine is killed after the commit was received", destination_killed_after_commit),
        ("the receiving engine is killed when the program runs there", destination_killed_after_resume),
        ("after a failure the next attempt succeeds", next_attempt),
        ("the sending engine is killed while CRIU restores, and waits for owed pages", killed_in_the_restore),
    ]
}

/// Phases of the source in which nothing was committed.
const SOURCE: [&str; 11] = [
    "attach", "precopy", "freeze", "closing", "frozen", "seal", "dump", "images", "restore", "ready", "held",
];
/// The same of the destination.
const DESTINATION: [&str; 6] =
    ["dest-welcome", "dest-pages", "dest-round", "dest-seal", "dest-restore", "dest-ready"];

/// A link that is lost ends the migration, and is not waited for (see `resume.rs`).
const AT_ONCE: [&str; 2] = ["--resume-timeout", "0s"];

fn subject(ferry: &Ferry) -> anyhow::Result<Subject> {
    ferry.subject(&["writer", "--memory", "16MiB", "--rate", "5MB"])
}

/// The source runs on, its memory is whole, the receiver is free again, and the failure was told.
fn rolled_back(ferry: &Ferry, subject: &Subject, outcome: &Outcome) -> anyhow::Result<()> {
    ensure!(outcome.code != 0, "it reports success: {}", outcome.err);
    ensure!(
        outcome.err.contains("running at the source"),
        "it does not say where the program is: {}",
        outcome.err
    );
    ferry.lives_only(Host::Source, subject)
}

fn source_killed(ferry: &Ferry) -> anyhow::Result<()> {
    let (subject, receiver) = (subject(ferry)?, ferry.receiver(None, &[])?);
    for phase in SOURCE {
        (|| {
            let outcome = ferry.migrate(subject.pid, Some(&format!("{phase}=kill")), &[])?;
            ensure!(outcome.code == 137, "exit code {}: {}", outcome.code, outcome.err);
            ferry.lives_only(Host::Source, &subject)
        })()
        .with_context(|| format!("killed at {phase}"))?;
    }
    receiver.stop()
}

fn destination_killed(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = subject(ferry)?;
    for phase in DESTINATION {
        (|| {
            let receiver = ferry.receiver(Some(&format!("{phase}=kill")), &[])?;
            let outcome = ferry.migrate(subject.pid, None, &AT_ONCE)?;
            rolled_back(ferry, &subject, &outcome)?;
            ensure!(receiver.wait()? == 137, "the receiver did not reach the fault");
            Ok(())
        })()
        .with_context(|| format!("killed at {phase}"))?;
    }
    Ok(())
}

fn cut(ferry: &Ferry) -> anyhow::Result<()> {
    let (subject, receiver) = (subject(ferry)?, ferry.receiver(None, &[])?);
    // Frames: hello, spaces, pages, ends of rounds, owned pages, seals, images.
    for frame in [1, 2, 3, 20, 66, 68, 70, 72, 74, 80] {
        (|| {
            let fault = format!("frame=cut@{frame}");
            let outcome = ferry.migrate(subject.pid, Some(&fault), &AT_ONCE)?;
            rolled_back(ferry, &subject, &outcome)
        })()
        .with_context(|| format!("cut at frame {frame}"))?;
    }
    receiver.stop()
}

fn truncated(ferry: &Ferry) -> anyhow::Result<()> {
    let (subject, receiver) = (subject(ferry)?, ferry.receiver(None, &[])?);
    for frame in [1, 2, 3, 20, 66, 70, 74] {
        (|| {
            let outcome = ferry.migrate(subject.pid, Some(&format!("frame=truncate@{frame}")), &AT_ONCE)?;
            rolled_back(ferry, &subject, &outcome)
        })()
        .with_context(|| format!("frame {frame} ended in the middle"))?;
    }
    // It is none the worse for it.
    ferry.migrate(subject.pid, None, &["--verify"])?.moved()?;
    receiver.stop()
}

/// No reset and no end of file ever arrives: both sides have to find out by themselves.
fn silent(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = subject(ferry)?;
    let receiver = ferry.receiver(None, &["--stall-timeout", "1s"])?;
    let patience = [&["--stall-timeout", "1s"], &AT_ONCE[..]].concat();
    for phase in ["precopy", "frozen", "dump", "images", "restore", "ready"] {
        (|| {
            let fault = format!("{phase}=delay:900");
            let mut migration = ferry.migrate_start(subject.pid, Some(&fault), &patience)?;
            migration.says("a scripted fault")?;
            let may_run_there = ["restore", "ready"].contains(&phase);
            if may_run_there {
                writes(ferry, Host::Destination, "ready")?;
                // What it then says to the source is on its way.
                std::thread::sleep(Duration::from_millis(50));
            }
            let interface =
                ferry.sh(Host::Source, "ip -o link show up type veth | sed 's/^[0-9]*: //; s/[@:].*//'")?;
            ferry.sh(Host::Source, &format!("ip link set {interface} down"))?;
            let outcome = migration.wait();
            ferry.sh(Host::Source, &format!("ip link set {interface} up"))?;
            let outcome = outcome?;
            if may_run_there {
                // The receiver was ready before. The commit went nowhere, and nobody answers: which copy is the one
                // cannot be known from here.
                return in_doubt(ferry, &subject, &outcome);
            }
            rolled_back(ferry, &subject, &outcome)
        })()
        .with_context(|| format!("down at {phase}"))?;
    }
    ferry.migrate(subject.pid, None, &["--verify"])?.moved()?;
    receiver.stop()
}

fn flipped(ferry: &Ferry) -> anyhow::Result<()> {
    let (subject, receiver) = (subject(ferry)?, ferry.receiver(None, &[])?);
    for frame in [1, 2, 3, 20, 66, 70, 74] {
        (|| {
            let fault = format!("frame=flip@{frame}");
            let outcome = ferry.migrate(subject.pid, Some(&fault), &[])?;
            ensure!(outcome.err.contains("bad frame") || outcome.err.contains("digest"), "{}", outcome.err);
            rolled_back(ferry, &subject, &outcome)
        })()
        .with_context(|| format!("flipped in frame {frame}"))?;
    }
    receiver.stop()
}

fn interrupted(ferry: &Ferry) -> anyhow::Result<()> {
    let (subject, receiver) = (subject(ferry)?, ferry.receiver(None, &[])?);
    for (before, (phase, signal)) in
        SOURCE.iter().zip([Signal::SIGINT, Signal::SIGTERM].into_iter().cycle()).enumerate()
    {
        (|| {
            // It stands at the phase for a moment, in which the signal comes.
            let fault = format!("{phase}=delay:700");
            let mut migration = ferry.migrate_start(subject.pid, Some(&fault), &["--streams", "3"])?;
            migration.says("a scripted fault")?;
            migration.signal(signal)?;
            let outcome = migration.wait()?;
            if outcome.code == 0 {
                // It was too late: it had been committed before.
                anyhow::bail!("the signal at {phase} came after the commit");
            }
            ensure!(outcome.code == 128 + signal as i32, "exit code {}: {}", outcome.code, outcome.err);
            ensure!(outcome.err.contains("interrupted"), "{}", outcome.err);
            // The receiver says why, whichever of the connections it saw ending first.
            let until = Instant::now() + Duration::from_secs(5);
            while receiver.log().matches("discarded, ").count() <= before {
                ensure!(Instant::now() < until, "the receiver says: {}", receiver.log());
                std::thread::sleep(Duration::from_millis(20));
            }
            ensure!(!receiver.log().contains("closed the connection"), "it says: {}", receiver.log());
            rolled_back(ferry, &subject, &outcome)
        })()
        .with_context(|| format!("{signal} at {phase}"))?;
    }
    ensure!(receiver.log().matches("gave up (cancelled)").count() > SOURCE.len() / 2, "{}", receiver.log());
    receiver.stop()
}

fn receiver_interrupted(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = subject(ferry)?;
    for phase in ["dest-round", "dest-restore"] {
        let receiver = ferry.receiver(Some(&format!("{phase}=delay:1500")), &[])?;
        let migration = ferry.migrate_start(subject.pid, None, &AT_ONCE)?;
        wait_for("the receiver at the fault", LIMIT, || {
            Ok(receiver.log().contains("a scripted fault").then_some(()))
        })?;
        receiver.stop()?;
        let outcome = migration.wait()?;
        rolled_back(ferry, &subject, &outcome).with_context(|| format!("interrupted at {phase}"))?;
        ensure!(outcome.err.contains("cancelled") || outcome.err.contains("closed"), "{}", outcome.err);
    }
    Ok(())
}

fn hanging(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = subject(ferry)?;
    let receiver = ferry.receiver(Some("dest-seal=hang"), &[])?;
    let outcome = ferry.migrate(subject.pid, None, &["--stall-timeout", "1s"])?;
    rolled_back(ferry, &subject, &outcome)?;
    ensure!(outcome.err.contains("no progress"), "{}", outcome.err);
    ferry.hosts.kill(Host::Destination, receiver.pid)?;
    receiver.wait()?;
    Ok(())
}

/// Nobody knows at once which copy is the one: the receiver is asked, and decides.
fn cut_after_commit(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = subject(ferry)?;
    let receiver = ferry.receiver(None, &[])?;
    // The commit never arrives: the receiver has given the session up, or does when it is asked.
    let outcome = ferry.migrate(subject.pid, Some("commit=cut"), &[])?;
    outcome.failed(1, &["committing", "running at the source"])?;
    ferry.lives_only(Host::Source, &subject).context("the commit was lost")?;
    receiver.stop()?;
    // It arrives, and the answer does not: the program runs there, and must not run here.
    let receiver = ferry.receiver(Some("dest-resumed=cut"), &["--once"])?;
    let store = fresh(ferry, "store");
    let outcome = ferry.migrate(subject.pid, None, &["--keep-store", &store.display().to_string()])?;
    outcome.failed(5, &["running at the destination"])?;
    ensure!(store.join("index").is_file(), "nothing was kept of it");
    ferry.lives_only(Host::Destination, &subject).context("the answer was lost")?;
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    Ok(())
}

fn destination_killed_after_commit(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = subject(ferry)?;
    let receiver = ferry.receiver(Some("dest-commit=kill"), &[])?;
    let outcome = ferry.migrate(subject.pid, None, &[])?;
    ensure!(receiver.wait()? == 137, "the receiver did not reach the fault");
    in_doubt(ferry, &subject, &outcome)
}

fn destination_killed_after_resume(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = subject(ferry)?;
    let receiver = ferry.receiver(Some("dest-resumed=kill"), &[])?;
    let outcome = ferry.migrate(subject.pid, None, &[])?;
    ensure!(receiver.wait()? == 137, "the receiver did not reach the fault");
    in_doubt(ferry, &subject, &outcome)
}

/// The source stands still, whole, and can be let go as the message says; the destination has no copy that runs.
fn in_doubt(ferry: &Ferry, subject: &Subject, outcome: &Outcome) -> anyhow::Result<()> {
    outcome.failed(4, &["in doubt", "stopped at the source", "kill -CONT"])?;
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

fn next_attempt(ferry: &Ferry) -> anyhow::Result<()> {
    let (subject, receiver) = (subject(ferry)?, ferry.receiver(None, &[])?);
    for phase in ["precopy", "frozen", "images"] {
        ferry.migrate(subject.pid, Some(&format!("{phase}=kill")), &[])?;
    }
    ferry.migrate(subject.pid, None, &["--verify"])?.moved()?;
    ferry.lives_only(Host::Destination, &subject)?;
    receiver.stop()
}

/// The restore itself needs pages that are owed, and nobody sends them any more. The receiver notices that the connection was closed, and
/// does not wait as it would for a silent one.
fn killed_in_the_restore(ferry: &Ferry) -> anyhow::Result<()> {
    for workload in [
        &["writer", "--memory", "16MiB", "--rate", "5MB"][..],
        &["forked", "--memory", "8MiB", "--workers", "2", "--rate", "1MB"],
    ] {
        let subject = ferry.subject(workload)?;
        let receiver = ferry.receiver(None, &["--once", "--stall-timeout", "20s"])?;
        let outcome = ferry.migrate(subject.pid, Some("restore=kill"), &["--strategy", "post-copy"])?;
        let killed = Instant::now();
        ensure!(outcome.code == 137, "exit code {}: {}", outcome.code, outcome.err);
        ensure!(receiver.wait()? == 1, "the receiver's exit code");
        let took = killed.elapsed();
        ensure!(took < Duration::from_secs(5), "{}: it took {took:?}", workload[0]);
        ferry.lives_only(Host::Source, &subject)?;
    }
    Ok(())
}
