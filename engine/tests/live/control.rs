//! A migration that runs and is told what to do: it does that, and the program is whole wherever it ends up.

use super::Test;
use super::ferry::{Ferry, LIMIT, Migration};
use anyhow::{Context, bail, ensure};
use pageferry::control::{Answer, ReceiverStage, ReceiverStatus, Stage, Status};
use pageferry_benches::bench::hosts::Host;
use pageferry_benches::bench::subject::Subject;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

pub fn tests() -> Vec<(&'static str, Test)> {
    vec![
        ("control: a pause that is longer than the stall time-outs", pause),
        ("control: a program that is slowed down runs at its full pace in a pause", unthrottled),
        ("control: the receiver is lost in a pause", lost),
        ("control: another bandwidth while it runs, and an end by hand", bandwidth),
        ("control: post-copy now, after an engine that was killed", post_copy),
        ("control: what is refused, and to whom", refused),
        ("control: a receiver that may take more, and less", of_receiver),
    ]
}

/// It goes on until it is told to end: the program writes all the time, and the rounds are many.
const ENDLESS: [&str; 6] = ["--policy", "fixed:1000000", "--coding", "raw", "--delta-cache", "0"];
const WRITER: [&str; 6] = ["writer", "--memory", "64MiB", "--rate", "30MB", "--full-page"];

/// What the command said and wrote.
pub struct Said {
    code: i32,
    out: String,
    err: String,
}

impl Said {
    pub fn status(&self) -> anyhow::Result<Status> {
        ensure!(self.code == 0, "exit code {}: {}", self.code, self.err);
        let answer: Answer = serde_json::from_str(&self.out).with_context(|| self.out.clone())?;
        answer.status.context("no status")
    }

    fn receiver(&self) -> anyhow::Result<ReceiverStatus> {
        ensure!(self.code == 0, "exit code {}: {}", self.code, self.err);
        let answer: Answer = serde_json::from_str(&self.out).with_context(|| self.out.clone())?;
        answer.receiver.context("no status of a receiver")
    }

    pub fn refused(&self, because: &str) -> anyhow::Result<()> {
        ensure!(self.code == 3 && self.err.contains(because), "{}: {}", self.code, self.err);
        Ok(())
    }
}

fn run(ferry: &Ferry, command: &[&str]) -> anyhow::Result<Said> {
    run_in(ferry, Host::Source, command)
}

fn run_in(ferry: &Ferry, host: Host, command: &[&str]) -> anyhow::Result<Said> {
    let output = ferry.hosts.exec(host, command).stdin(Stdio::null()).output()?;
    Ok(Said {
        code: output.status.code().context("ended by a signal")?,
        out: String::from_utf8(output.stdout)?,
        err: String::from_utf8(output.stderr)?,
    })
}

pub fn control(ferry: &Ferry, subject: &Subject, what: &[&str]) -> anyhow::Result<Said> {
    let pid = subject.pid.to_string();
    run(ferry, &[&[env!("CARGO_BIN_EXE_pageferry"), "control", "--json", "--pid", &pid], what].concat())
}

/// Asks until the answer is as it should be.
pub fn wait_for(
    ferry: &Ferry,
    subject: &Subject,
    migration: &Migration,
    is: impl Fn(&Status) -> bool,
) -> anyhow::Result<Status> {
    let until = Instant::now() + LIMIT;
    loop {
        let said = control(ferry, subject, &["status"])?;
        // It may not have begun to listen.
        if said.code == 0 {
            let status = said.status()?;
            if is(&status) {
                return Ok(status);
            }
        }
        ensure!(Instant::now() < until, "{}{}: {}", said.out, said.err, migration.log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub fn sends(status: &Status) -> bool {
    status.stage == Stage::PreCopy && status.done_pages > 0
}

/// Nothing of any socket is left.
fn no_socket(ferry: &Ferry, subject: &Subject) -> anyhow::Result<()> {
    control(ferry, subject, &["status"])?.refused("no engine answers")?;
    let left = ferry.sh(Host::Source, "ls -A /run/pageferry | grep -v '^journal$'")?;
    ensure!(left.is_empty(), "left behind: {left}");
    Ok(())
}

fn pause(ferry: &Ferry) -> anyhow::Result<()> {
    // Longer than any single step takes on a busy machine.
    const STALL: Duration = Duration::from_secs(5);
    let subject = ferry.subject(&WRITER)?;
    let receiver = ferry.receiver(None, &["--once", "--stall-timeout", "5s"])?;
    let options = ["--stall-timeout", "5s", "--bandwidth", "8MB", "--streams", "2", "--verify"];
    let mut migration = ferry.migrate_start(subject.pid, None, &[&options[..], &ENDLESS].concat())?;
    wait_for(ferry, &subject, &migration, sends)?;
    ensure!(control(ferry, &subject, &["pause"])?.status()?.paused, "not paused");
    migration.says("paused, as was asked for")?;
    // What is under way comes to its end.
    let until = Instant::now() + LIMIT;
    let mut before = control(ferry, &subject, &["status"])?.status()?;
    let before = loop {
        std::thread::sleep(Duration::from_millis(500));
        let now = control(ferry, &subject, &["status"])?.status()?;
        if now.sent_bytes == before.sent_bytes {
            break now;
        }
        ensure!(Instant::now() < until, "it sends on: {now:?}");
        before = now;
    };
    std::thread::sleep(STALL * 2 + Duration::from_secs(1));
    let after = control(ferry, &subject, &["status"])?.status()?;
    let (sent, done) = (after.sent_bytes - before.sent_bytes, after.done_pages - before.done_pages);
    ensure!((sent, done) == (0, 0), "{sent} bytes and {done} pages while it was paused");
    ensure!(after.paused && after.stage == Stage::PreCopy, "{after:?}");
    // What was written meanwhile is found: all of it is compared.
    for what in [&["bandwidth", "none"][..], &["resume"], &["post-copy"]] {
        control(ferry, &subject, what)?.status()?;
    }
    let outcome = migration.wait()?;
    let report = outcome.moved()?;
    ensure!(report.verified && report.paused_us >= 2 * STALL.as_micros() as u64, "{}", report.paused_us);
    ferry.lives_only(Host::Destination, &subject)?;
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    no_socket(ferry, &subject)?;
    ferry.hosts.kill(Host::Destination, subject.pid)
}

fn unthrottled(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "16MiB", "--rate", "max", "--full-page"])?;
    let receiver = ferry.receiver(None, &[])?;
    // However slow it is, that is more downtime than is aimed for.
    let options = ["--bandwidth", "8MB", "--downtime", "1us", "--on-no-convergence", "throttle"];
    let more = ["--max-throttle", "98%", "--max-rounds", "100000", "--delta-cache", "0"];
    let mut migration = ferry.migrate_start(subject.pid, None, &[&options[..], &more].concat())?;
    wait_for(ferry, &subject, &migration, |status| status.throttle_share > 0.0)?;
    ensure!(control(ferry, &subject, &["pause"])?.status()?.paused, "not paused");
    migration.says("paused, as was asked for")?;
    let paused = wait_for(ferry, &subject, &migration, |status| status.throttle_share == 0.0)?;
    ensure!(paused.paused && paused.stage == Stage::PreCopy, "{paused:?}");
    for what in [&["bandwidth", "none"][..], &["post-copy"], &["resume"]] {
        control(ferry, &subject, what)?.status()?;
    }
    let outcome = migration.wait()?;
    let report = outcome.moved()?;
    ensure!(report.paused_us > 0 && report.throttle_share > 0.0, "{}", report.throttle_share);
    ferry.lives_only(Host::Destination, &subject)?;
    receiver.stop()?;
    ferry.hosts.kill(Host::Destination, subject.pid)
}

fn lost(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&WRITER)?;
    let receiver = ferry.receiver(None, &[])?;
    let options = [&["--bandwidth", "5MB", "--resume-timeout", "0s"][..], &ENDLESS].concat();
    let mut migration = ferry.migrate_start(subject.pid, None, &options)?;
    wait_for(ferry, &subject, &migration, sends)?;
    control(ferry, &subject, &["pause"])?.status()?;
    migration.says("paused, as was asked for")?;
    ferry.hosts.kill(Host::Destination, receiver.pid)?;
    migration.wait()?.failed(1, &["running at the source"])?;
    ferry.lives_only(Host::Source, &subject)?;
    no_socket(ferry, &subject)?;
    ferry.hosts.kill(Host::Source, subject.pid)
}

/// Bytes a second over a while, by the engine's own clock.
fn pace(ferry: &Ferry, subject: &Subject) -> anyhow::Result<f64> {
    // Before the change more may have been handed to the system than is under way now.
    let from = control(ferry, subject, &["status"])?.status()?;
    std::thread::sleep(Duration::from_millis(1500));
    let to = control(ferry, subject, &["status"])?.status()?;
    Ok((to.sent_bytes - from.sent_bytes) as f64 * 1e6 / (to.elapsed_us - from.elapsed_us) as f64)
}

fn bandwidth(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&WRITER)?;
    let receiver = ferry.receiver(None, &[])?;
    let options = ["--bandwidth", "5MB", "--streams", "2", "--nice", "10"];
    let migration = ferry.migrate_start(subject.pid, None, &[&options[..], &ENDLESS].concat())?;
    wait_for(ferry, &subject, &migration, sends)?;
    for (rate, bytes) in [(None, 5e6), (Some("20MB"), 20e6), (Some("24Mbit"), 3e6)] {
        if let Some(rate) = rate {
            let status = control(ferry, &subject, &["bandwidth", rate])?.status()?;
            ensure!(status.bandwidth == Some(bytes as u64), "{status:?}");
        }
        let pace = pace(ferry, &subject)?;
        // Never more; how much less is the machine's doing, but for the scan between two rounds.
        ensure!(pace < bytes * 1.1 && pace > bytes * 0.4, "{pace} bytes a second instead of {bytes}");
    }
    // The priority is that of the threads that copy, and not CRIU's.
    let list = ferry.sh(Host::Source, "ps -ww -e -o ni=,args=")?;
    let nice = |which: &str| -> Vec<&str> {
        let lines = list.lines().filter(|line| line.contains(which));
        lines.filter_map(|line| line.split_whitespace().next()).collect()
    };
    let (engine, criu) = (nice("/pageferry migrate "), nice("criu: "));
    ensure!(engine.contains(&"10"), "the engine's priority: {engine:?} in {list}");
    ensure!(!criu.is_empty() && criu.iter().all(|nice| *nice == "0"), "CRIU's priority: {criu:?} in {list}");

    ensure!(control(ferry, &subject, &["cancel"])?.status()?.cancelled, "not given up");
    let outcome = migration.wait()?;
    outcome.failed(130, &["running at the source"])?;
    ferry.lives_only(Host::Source, &subject)?;
    no_socket(ferry, &subject)?;
    receiver.stop()
}

fn post_copy(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&WRITER)?;
    let receiver = ferry.receiver(None, &[])?;
    let options = [&["--bandwidth", "5MB", "--verify"][..], &ENDLESS].concat();
    // One that is killed leaves its socket behind.
    let outcome = ferry.migrate(subject.pid, Some("precopy=kill"), &options)?;
    ensure!(outcome.code != 0, "it was not killed");
    let stale = ferry.sh(Host::Source, "ls -A /run/pageferry | grep -v '^journal$'")?;
    ensure!(stale == format!("migrate-{}.sock", subject.pid), "{stale}");
    control(ferry, &subject, &["status"])?.refused("no engine answers")?;
    ferry.lives_only(Host::Source, &subject)?;

    let options = [&options[..], &["--strategy", "auto"]].concat();
    let migration = ferry.migrate_start(subject.pid, None, &options)?;
    wait_for(ferry, &subject, &migration, sends)?;
    control(ferry, &subject, &["bandwidth", "64MB"])?.status()?;
    ensure!(control(ferry, &subject, &["max-slowdown", "50%"])?.status()?.max_slowdown == Some(0.5), "50 %");
    ensure!(control(ferry, &subject, &["post-copy"])?.status()?.post_copy, "it did not hear");
    let outcome = migration.wait()?;
    let report = outcome.moved()?;
    let late = report.post_copy.as_ref().context("nothing was owed")?;
    ensure!(report.verified && report.stop_reason == "post-copy", "{}", report.stop_reason);
    ensure!(report.strategy_reason == "by-hand" && report.strategy != "pre-copy", "{}", report.strategy);
    ensure!(report.max_slowdown == Some(0.5), "{:?}", report.max_slowdown);
    // The round was cut short: what it did not send came late.
    ensure!(late.owed_pages > 0 && late.demanded_pages + late.pushed_pages == late.owed_pages, "{late:?}");
    ferry.lives_only(Host::Destination, &subject)?;
    no_socket(ferry, &subject)?;
    receiver.stop()?;
    ferry.hosts.kill(Host::Destination, subject.pid)
}

fn refused(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&WRITER)?;
    let dir = ferry.scratch.path().join(ferry.name("checkpoints"));
    let to = format!("dir:{}", dir.display());
    let open = tempfile::tempdir_in("/tmp")?;
    fs::set_permissions(open.path(), Permissions::from_mode(0o755))?;
    let socket = open.path().join("socket").display().to_string();
    let options = [&["--bandwidth", "5MB", "--control", &socket][..], &ENDLESS].concat();
    let migration = ferry.migrate_from(Host::Source, subject.pid, &to, None, &options)?;
    let command = env!("CARGO_BIN_EXE_pageferry");
    let ask =
        |what: &[&str]| run(ferry, &[&[command, "control", "--json", "--socket", &socket], what].concat());
    let until = Instant::now() + LIMIT;
    while !ask(&["status"])?.status().is_ok_and(|status| sends(&status)) {
        ensure!(Instant::now() < until, "it does not begin: {}", migration.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    ask(&["post-copy"])?.refused("refused because into a file")?;
    control(ferry, &subject, &["status"])?.refused("no engine answers")?;

    // A user who has the command and reaches the socket: only who it is keeps them away.
    let theirs = open.path().join("pageferry").display().to_string();
    fs::copy(command, &theirs)?;
    fs::set_permissions(&theirs, Permissions::from_mode(0o755))?;
    let nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"];
    let as_nobody =
        || run(ferry, &[&nobody[..], &[&theirs, "control", "--socket", &socket, "cancel"]].concat());
    as_nobody()?.refused("not allowed")?;
    fs::set_permissions(&socket, Permissions::from_mode(0o666))?;
    as_nobody()?.refused("only root and the user of the engine may ask")?;
    ensure!(!ask(&["status"])?.status()?.cancelled, "somebody was heard who may not be");

    // A pause is no way around an interruption.
    ensure!(ask(&["pause"])?.status()?.paused, "not paused");
    migration.signal(nix::sys::signal::Signal::SIGTERM)?;
    migration.wait()?.failed(143, &["running at the source"])?;
    ensure!(!fs::exists(&socket)?, "the socket is left behind");
    if fs::exists(&dir)? && fs::read_dir(&dir)?.any(|entry| entry.is_ok_and(|e| e.file_name() != "index")) {
        bail!("a checkpoint is left behind");
    }
    ferry.lives_only(Host::Source, &subject)?;
    ferry.hosts.kill(Host::Source, subject.pid)
}

/// What the receiver may take changes while it waits and while a program comes; what the program was promised stays.
fn of_receiver(ferry: &Ferry) -> anyhow::Result<()> {
    const MIB: u64 = 1 << 20;
    let subject = ferry.subject(&WRITER)?;
    let receiver = ferry.receiver(None, &["--memory-limit", "32MiB"])?;
    let command = env!("CARGO_BIN_EXE_pageferry");
    let tell = |what: &[&str]| {
        run_in(
            ferry,
            Host::Destination,
            &[&[command, "control", "--json", "--receiver", "7077"], what].concat(),
        )
    };
    let status = tell(&["status"])?.receiver()?;
    ensure!(status.stage == ReceiverStage::Waiting && status.memory_limit == Some(32 * MIB), "{status:?}");
    tell(&["pause"])?.refused("refused because a receiver has no say in that")?;

    // The program is larger.
    let options = [&["--bandwidth", "40MB", "--streams", "1"][..], &ENDLESS].concat();
    ferry.migrate(subject.pid, None, &options)?.failed(1, &["running at the source", "memory"])?;
    ferry.lives_only(Host::Source, &subject)?;
    ensure!(tell(&["memory-limit", "256MiB"])?.receiver()?.memory_limit == Some(256 * MIB), "256 MiB");

    let migration = ferry.migrate_start(subject.pid, None, &options)?;
    wait_for(ferry, &subject, &migration, |status| sends(status) && status.round > 0)?;
    control(ferry, &subject, &["memory-limit", "1GiB"])?.refused("ask the receiver")?;
    let status = tell(&["status"])?.receiver()?;
    ensure!(status.stage == ReceiverStage::Receiving && status.announced_bytes >= 64 * MIB, "{status:?}");
    ensure!(status.program.is_some() && status.page_bytes > 0 && status.elapsed_us > 0, "{status:?}");
    tell(&["memory-limit", "32MiB"])?.refused("promised to a program that is being received")?;
    tell(&["engine-memory", "20MiB"])?.refused("the receiver needs")?;
    let memory = tell(&["engine-memory", "64MiB"])?.receiver()?;
    ensure!(memory.engine_memory == Some(64 * MIB), "{memory:?}");

    // A share that takes less than is sent holds the source up, and it goes on when that is over.
    let free = pace(ferry, &subject)?;
    ensure!(tell(&["cpu", "1%"])?.receiver()?.cpu == Some(1), "1 %");
    // What is under way is received first.
    std::thread::sleep(Duration::from_secs(1));
    let held = pace(ferry, &subject)?;
    ensure!(held < free / 2.0, "{free} bytes a second, and {held} with 1 % of a processor");
    ensure!(tell(&["cpu", "none"])?.receiver()?.cpu.is_none(), "no limit");
    std::thread::sleep(Duration::from_secs(1));
    let again = pace(ferry, &subject)?;
    ensure!(again > 2.0 * held, "{held} bytes a second with 1 % of a processor, and {again} without");

    for what in [&["bandwidth", "none"][..], &["post-copy"]] {
        control(ferry, &subject, what)?.status()?;
    }
    let outcome = migration.wait()?;
    outcome.moved()?;
    ferry.lives_only(Host::Destination, &subject)?;
    let until = Instant::now() + LIMIT;
    while tell(&["status"])?.receiver()?.stage != ReceiverStage::Waiting {
        ensure!(Instant::now() < until, "it does not wait for the next program: {}", receiver.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    ensure!(tell(&["memory-limit", "16MiB"])?.receiver()?.memory_limit == Some(16 * MIB), "16 MiB");
    receiver.stop()?;
    tell(&["status"])?.refused("no engine answers")?;
    let left = ferry.sh(Host::Destination, "ls -A /run/pageferry | grep -v '^journal$'")?;
    ensure!(left.is_empty(), "left behind: {left}");
    ferry.hosts.kill(Host::Destination, subject.pid)
}
