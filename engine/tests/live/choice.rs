//! What is chosen where no strategy is asked for: by the goals, and by what is measured on the way.

use super::Test;
use super::ferry::{Ferry, Outcome};
use anyhow::{Context, bail, ensure};
use pageferry::MigrationReport;
use pageferry_benches::bench::hosts::Host;

pub fn tests() -> Vec<(&'static str, Test)> {
    vec![
        ("choice: a small program goes in the freeze, where the downtime may be long", small),
        ("choice: one that converges goes by rounds", converges),
        ("choice: what is left of one that outruns the link comes after it", outruns),
        ("choice: a goal for the whole that only post-copy meets", whole),
        ("choice: what was said of rounds that do not help holds", said),
        ("choice: into a file all goes before", file),
    ]
}

/// What was chosen for a program, which lives at the destination and is right.
fn chosen(
    ferry: &Ferry,
    program: &[&str],
    options: &[&str],
    more: &[&str],
) -> anyhow::Result<MigrationReport> {
    let subject = ferry.subject(program)?;
    let receiver = ferry.receiver(None, &["--once"])?;
    let outcome = ferry.migrate(subject.pid, None, &[&["--strategy", "auto"], options, more].concat())?;
    let report = outcome.moved()?;
    ensure!(report.strategy_asked == "auto", "{} was asked for", report.strategy_asked);
    ensure!(!report.strategy_reason.is_empty() && !report.strategy_because.is_empty(), "no reason");
    let says = format!("chose {}: {}", report.strategy, report.strategy_because);
    ensure!(outcome.err.matches(&says).count() >= 1, "it should say {says:?}: {}", outcome.err);
    goals(&outcome, report)?;
    ferry.lives_only(Host::Destination, &subject)?;
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    ferry.hosts.kill(Host::Destination, subject.pid)?;
    Ok(report.clone())
}

/// The report says which goals were met, and a goal that was missed is told.
fn goals(outcome: &Outcome, report: &MigrationReport) -> anyhow::Result<()> {
    let met = report.downtime_us.total <= report.downtime_goal_us;
    ensure!(report.downtime_goal_us > 0 && report.downtime_goal_met == Some(met), "{report:?}");
    ensure!(outcome.err.contains("aimed for (--downtime)") != met, "met {met}: {}", outcome.err);
    ensure!(report.complete_us >= report.total_us && report.total_us > 0, "{report:?}");
    let met = report.total_time_goal_us.map(|goal| report.complete_us <= goal);
    ensure!(report.total_time_goal_met == met, "{met:?}: {report:?}");
    ensure!(outcome.err.contains("aimed for (--total-time)") == (met == Some(false)), "{}", outcome.err);
    Ok(())
}

fn small(ferry: &Ferry) -> anyhow::Result<()> {
    let writer = ["writer", "--memory", "16MiB", "--rate", "1MB"];
    let long = chosen(ferry, &writer, &["--downtime", "3s"], &["--verify"])?;
    ensure!(long.strategy == "stop-and-copy" && long.strategy_reason == "fits-freeze", "{}", long.strategy);
    ensure!(long.verified && long.downtime_goal_met == Some(true), "{:?}", long.downtime_us);
    // A sample, and the others, which were sent once.
    let [sample, freeze] = &long.rounds[..] else { anyhow::bail!("{:?}", long.rounds) };
    ensure!(sample.left_pages > 2 * sample.dirty_pages && freeze.frozen, "{sample:?}");
    ensure!(freeze.dirty_pages >= sample.left_pages, "{freeze:?}");
    // Of 40 ms the freeze itself takes most.
    let short = chosen(ferry, &writer, &["--downtime", "40ms"], &[])?;
    ensure!(short.strategy == "pre-copy", "{}: {}", short.strategy, short.strategy_because);
    ensure!(short.rounds[0].left_pages == 0 && short.rounds[0].dirty_pages > 4000, "{:?}", short.rounds[0]);
    let (most, least) = (freeze.dirty_pages, short.rounds.last().context("rounds")?.dirty_pages);
    ensure!(least < most / 4, "{least} and {most} pages in the freeze");
    Ok(())
}

fn converges(ferry: &Ferry) -> anyhow::Result<()> {
    let writer = ["writer", "--memory", "64MiB", "--rate", "5MB"];
    let report = chosen(ferry, &writer, &["--bandwidth", "60MB"], &["--verify"])?;
    ensure!(report.strategy == "pre-copy" && report.strategy_reason == "converged", "{}", report.strategy);
    ensure!(report.stop_reason == "target-met" && report.post_copy.is_none(), "{}", report.stop_reason);
    Ok(())
}

/// Faster than the 60 MB/s that it may send.
const OUTRUNS: [&str; 6] = ["writer", "--memory", "64MiB", "--rate", "max", "--full-page"];
const SLOW: [&str; 6] = ["--bandwidth", "60MB", "--downtime", "250ms", "--coding", "raw"];

fn outruns(ferry: &Ferry) -> anyhow::Result<()> {
    let report = chosen(ferry, &OUTRUNS, &SLOW, &["--verify"])?;
    ensure!(report.strategy == "hybrid" && report.strategy_reason == "diverges", "{}", report.strategy);
    ensure!(report.stop_reason == "no-progress" && report.verified, "{}", report.stop_reason);
    let first = &report.rounds[0];
    ensure!(first.held_up.is_some_and(|share| share > 0.75), "the limit held it up: {first:?}");
    let late = report.post_copy.as_ref().context("nothing was owed")?;
    // What was owed takes longer than the program may stand still.
    ensure!(late.duration_us > report.downtime_goal_us, "{late:?}");
    ensure!(report.downtime_us.total < late.duration_us, "{:?}", report.downtime_us);
    Ok(())
}

fn whole(ferry: &Ferry) -> anyhow::Result<()> {
    const LINK: f64 = 15e6;
    let writer = ["writer", "--memory", "32MiB", "--rate", "10MB", "--full-page"];
    let options = ["--bandwidth", "15MB", "--downtime", "300ms", "--coding", "raw"];
    // The two rates are near each other, and a machine that stands still for a tenth of a second now and then carries less than
    // it is allowed to: what is chosen then is right, and is another question.
    let as_fast = |report: &MigrationReport| {
        let long = report.rounds.iter().filter(|round| round.sent_pages >= 1000);
        long.map(|round| round.link_rate).fold(f64::INFINITY, f64::min) > 0.9 * LINK
    };
    for _ in 0..6 {
        let rounds = chosen(ferry, &writer, &options, &["--total-time", "5min"])?;
        // Rounds send it nearly three times, and post-copy less than twice.
        let goal = format!("{}us", rounds.complete_us * 4 / 5);
        let report = chosen(ferry, &writer, &options, &["--total-time", &goal])?;
        if !as_fast(&rounds) || !as_fast(&report) {
            continue;
        }
        ensure!(rounds.strategy == "pre-copy", "{}: {}", rounds.strategy, rounds.strategy_because);
        ensure!(rounds.total_time_goal_met == Some(true), "5 minutes were not enough");
        ensure!(report.strategy == "hybrid" && report.strategy_reason == "too-long", "{}", report.strategy);
        ensure!(report.stop_reason == "total-time", "{}", report.stop_reason);
        ensure!(report.complete_us < rounds.complete_us, "{} and {}", report.complete_us, rounds.complete_us);
        return Ok(());
    }
    bail!("this machine never carried nine tenths of 15 MB/s in every long round")
}

fn said(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&OUTRUNS)?;
    let receiver = ferry.receiver(None, &[])?;
    let auto = |more: &[&str]| {
        ferry.migrate(subject.pid, None, &[&["--strategy", "auto"], &SLOW[..], more].concat())
    };
    auto(&["--on-no-convergence", "give-up"])?.failed(1, &["writes faster than the link"])?;
    ferry.lives_only(Host::Source, &subject)?;
    let outcome = auto(&["--on-no-convergence", "freeze", "--verify"])?;
    let report = outcome.moved()?;
    ensure!(report.strategy == "pre-copy" && report.strategy_reason == "nothing-late", "{}", report.strategy);
    ensure!(report.post_copy.is_none() && report.stop_reason == "no-progress", "{}", report.stop_reason);
    goals(&outcome, report)?;
    ferry.lives_only(Host::Destination, &subject)?;
    receiver.stop()
}

fn file(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&OUTRUNS)?;
    let to = format!("file:{}", ferry.scratch.path().join(ferry.name("chosen")).display());
    let options = ["--strategy", "auto", "--keep-running", "--downtime", "1ms", "--bandwidth", "200MB"];
    let outcome = ferry.migrate_from(Host::Source, subject.pid, &to, None, &options)?.wait()?;
    let report = outcome.moved()?;
    ensure!(report.strategy == "checkpoint" && report.strategy_asked == "auto", "{}", report.strategy);
    ensure!(report.strategy_reason == "nothing-late" && report.post_copy.is_none(), "{report:?}");
    goals(&outcome, report)?;
    ferry.lives_only(Host::Source, &subject)
}
