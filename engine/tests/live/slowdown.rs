//! How much a program loses of its running time while it is copied, and a ceiling for it.

use super::Test;
use super::ferry::{Ferry, succeed};
use anyhow::{Context, ensure};
use pageferry::MigrationReport;
use pageferry_benches::bench::hosts::Host;
use std::process::Command;

pub fn tests() -> Vec<(&'static str, Test)> {
    vec![("slowdown: a program that may lose little of its running time is copied slowly", ceiling)]
}

/// As fast as it goes, with a processor of its own if it gets one.
const BUSY: [&str; 8] = ["writer", "--memory", "192MiB", "--rate", "max", "--full-page", "--reads", "10"];

fn moved(ferry: &Ferry, more: &[&str]) -> anyhow::Result<MigrationReport> {
    let subject = ferry.subject(&BUSY)?;
    let receiver = ferry.receiver(None, &["--once"])?;
    // It never comes to an end by itself.
    let options = ["--max-rounds", "4", "--coding", "raw", "--delta-cache", "0"];
    let outcome = ferry.migrate(subject.pid, None, &[&options[..], more].concat())?;
    let report = outcome.moved()?;
    let slowdown = report.slowdown.context("it is not known how much it was slowed down")?;
    ensure!((0.0..=1.0).contains(&slowdown), "{slowdown}");
    let met = report.max_slowdown.map(|most| slowdown <= most);
    ensure!(report.max_slowdown_met == met, "{met:?}: {:?}", report.max_slowdown_met);
    ensure!(outcome.err.contains("(--max-slowdown)") == (met == Some(false)), "{met:?}: {}", outcome.err);
    for round in &report.rounds {
        ensure!(round.slowdown.is_some() != round.frozen, "{round:?}");
    }
    ferry.lives_only(Host::Destination, &subject)?;
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    ferry.hosts.kill(Host::Destination, subject.pid)?;
    Ok(report.clone())
}

/// What is started meanwhile comes before everything else that this machine does: it is about these programs and no others.
fn undisturbed<T>(act: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let thread = std::fs::read_link("/proc/thread-self")?;
    let thread = thread.file_name().and_then(|name| name.to_str()).context("the name of this thread")?;
    let renice = |nice: &str| {
        let mut renice = Command::new("renice");
        succeed(renice.args(["-n", nice, "-p", thread]).output()?)
    };
    renice("-19")?;
    let done = act();
    renice("0")?;
    done
}

/// What else the machine does is in the measure, whatever comes first: a ceiling that is kept is kept in one of three runs.
fn ceiling(ferry: &Ferry) -> anyhow::Result<()> {
    let mut last = Ok(());
    for _ in 0..3 {
        last = undisturbed(|| compare(ferry));
        if last.is_ok() {
            break;
        }
    }
    last
}

fn compare(ferry: &Ferry) -> anyhow::Result<()> {
    let free = moved(ferry, &[])?;
    ensure!(free.max_slowdown.is_none(), "{:?}", free.max_slowdown);
    let kept = moved(ferry, &["--max-slowdown", "5%", "--verify"])?;
    let figures = |report: &MigrationReport| -> Vec<(u64, Option<f64>)> {
        report.rounds.iter().map(|round| (round.duration_us, round.slowdown)).collect()
    };
    let figures = format!("without a ceiling {:?}, with one {:?}", figures(&free), figures(&kept));
    let (before, after) = (free.slowdown.context("how much")?, kept.slowdown.context("how much")?);
    ensure!(after <= 0.1, "{after}: {figures}");
    // Where there are processors for all of them it is slowed down by little either way.
    ensure!(before <= 0.2 || after < before / 2.0, "{before} and {after}: {figures}");
    for round in kept.rounds.iter().skip(1).filter(|round| !round.frozen) {
        ensure!(round.slowdown <= Some(0.15), "round {}: {figures}", round.round);
    }
    ensure!(kept.total_us > free.total_us, "{} and {} us: {figures}", free.total_us, kept.total_us);
    Ok(())
}
