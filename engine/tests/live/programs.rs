//! Programs that must survive the move with every byte of their memory.

use super::Test;
use super::ferry::{Ferry, Ignored, LIMIT, succeed};
use anyhow::{Context, ensure};
use pageferry_benches::bench::hosts::Host;
use pageferry_tracker::probe::Kernel;
use std::time::{Duration, Instant};

pub fn tests() -> Vec<(&'static str, Test)> {
    vec![
        ("a process that counts to a file", |ferry| moves(ferry, &["count"])),
        ("a writer", |ferry| moves(ferry, &["writer", "--memory", "64MiB", "--rate", "20MB"])),
        ("a multi-threaded writer", |ferry| {
            moves(ferry, &["threads", "--memory", "32MiB", "--threads", "4"])
        }),
        ("a forked tree that shares memory", |ferry| {
            moves(ferry, &["forked", "--memory", "32MiB", "--workers", "3"])
        }),
        ("every kind of memory", |ferry| moves(ferry, &["mixed", "--memory", "32MiB"])),
        ("a program that maps and unmaps all the time", |ferry| {
            moves(ferry, &["churn", "--memory", "32MiB"])
        }),
        ("compressible memory", |ferry| moves(ferry, &["writer", "--memory", "64MiB", "--compressible"])),
        ("a few words of many pages, over a slow link", sparse),
        ("there and back again", there_and_back),
        ("a tree whose children come and go", children),
        ("redis under writes", redis),
        ("python with a large heap", python),
        ("soft_dirty_vm: the soft-dirty tracker", soft_dirty),
        ("soft_dirty_vm: the soft-dirty tracker by PAGEMAP_SCAN", soft_dirty_scan),
        ("contents that are compared", compare),
        ("a CRIU into which nothing can be preloaded", no_shim),
        ("soft_dirty_vm: a synthetic parent hides the memory", synthetic_parent),
    ]
}

fn moves(ferry: &Ferry, workload: &[&str]) -> anyhow::Result<()> {
    moves_with(ferry, workload, &["--verify"])
}

fn moves_with(ferry: &Ferry, workload: &[&str], options: &[&str]) -> anyhow::Result<()> {
    let subject = ferry.subject(workload)?;
    subject.check().context("before the move")?;
    let receiver = ferry.receiver(None, &["--once"])?;
    let outcome = ferry.migrate(subject.pid, None, options)?;
    let report = outcome.moved()?;
    ensure!(report.verified && report.verified_pages > 0, "it was not verified");
    ferry.lives_only(Host::Destination, &subject).context("after the move")?;
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    Ok(())
}

/// 2000 pages a second, a word of each: 8 MB/s raw over a link of 6.
fn sparse(ferry: &Ferry) -> anyhow::Result<()> {
    let writer = ["writer", "--memory", "8MiB", "--rate", "8MB"];
    let options = ["--verify", "--bandwidth", "6MB", "--downtime", "60ms"];
    let mut bytes = Vec::new();
    for cache in ["8MiB", "0"] {
        let subject = ferry.subject(&writer)?;
        let receiver = ferry.receiver(None, &["--once"])?;
        let outcome =
            ferry.migrate(subject.pid, None, &[&options[..], &["--delta-cache", cache]].concat())?;
        let report = outcome.moved()?;
        let deltas: u64 = report.rounds.iter().map(|round| round.codings.delta.pages).sum();
        ensure!((deltas > 0) == (cache != "0"), "{deltas} deltas with a cache of {cache}");
        let last = report.rounds.last().context("rounds")?;
        bytes.push(last.sent_bytes as f64 / last.sent_pages.max(1) as f64);
        ferry.lives_only(Host::Destination, &subject).with_context(|| format!("cache {cache}"))?;
        ensure!(receiver.wait()? == 0, "the receiver's exit code");
        ferry.hosts.kill(Host::Destination, subject.pid)?;
    }
    ensure!(bytes[0] * 4.0 < bytes[1], "bytes a page of the last round, with deltas and without: {bytes:?}");
    Ok(())
}

fn there_and_back(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "32MiB"])?;
    let receiver = ferry.receiver(None, &["--once"])?;
    ferry.migrate(subject.pid, None, &[])?.moved()?;
    receiver.wait()?;
    ferry.lives_only(Host::Destination, &subject)?;
    let receiver = ferry.receiver_in(Host::Source, "10.77.0.1:7077", None, &["--once"])?;
    let back = ferry.migrate_from(Host::Destination, subject.pid, "10.77.0.1:7077", None, &["--verify"])?;
    back.wait()?.moved()?;
    receiver.wait()?;
    ferry.lives_only(Host::Source, &subject)
}

/// A shell that starts a short-lived child for every line that it counts.
fn children(ferry: &Ferry) -> anyhow::Result<()> {
    let out = ferry.scratch.path().join(ferry.name("children"));
    let path = out.to_str().context("a path of text")?;
    let script = "i=0; while :; do i=$((i+1)); echo $i >> \"$0\"; sleep 0.004; done";
    let pid = ferry.program(&["sh", "-c", script, path])?;
    let count = || std::fs::read_to_string(&out).unwrap_or_default().lines().count();
    let wait_for = |at_least: usize| -> anyhow::Result<()> {
        let until = Instant::now() + LIMIT;
        while count() < at_least {
            ensure!(Instant::now() < until, "it does not go on: {} lines", count());
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    };
    wait_for(20)?;
    let receiver = ferry.receiver(None, &["--once"])?;
    // Slow enough that children end in the middle of rounds.
    ferry.migrate(pid, None, &["--verify", "--bandwidth", "2MB"])?.moved()?;
    receiver.wait()?;
    ensure!(ferry.state(Host::Source, pid)?.is_none(), "it still runs at the source");
    wait_for(count() + 20)?;
    let text = std::fs::read_to_string(&out)?;
    for (index, line) in text.lines().enumerate() {
        ensure!(line == (index + 1).to_string(), "line {index} is {line:?}: it lost or repeated one");
    }
    Ok(())
}

fn needs_soft_dirty() -> anyhow::Result<()> {
    let feature = Kernel::probe().soft_dirty;
    match feature.works {
        true => Ok(()),
        false => Err(Ignored(format!("needs soft-dirty: {}", feature.reason)).into()),
    }
}

fn synthetic_parent(ferry: &Ferry) -> anyhow::Result<()> {
    needs_soft_dirty()?;
    for workload in [&["mixed", "--memory", "8MiB"][..], &["forked", "--memory", "4MiB", "--workers", "2"]] {
        moves_with(ferry, workload, &["--verify", "--hide", "synthetic-parent"])
            .with_context(|| format!("{workload:?}"))?;
    }
    // It takes over by itself where the shim cannot be loaded.
    let clean = shimless_criu(ferry)?;
    let subject = ferry.subject(&["writer", "--memory", "4MiB"])?;
    let receiver = ferry.receiver(None, &["--once"])?;
    let outcome = ferry.migrate(subject.pid, None, &["--verify", "--criu", &clean])?;
    ensure!(outcome.moved()?.hide == "synthetic-parent", "hidden by something else");
    ferry.lives_only(Host::Destination, &subject)?;
    receiver.wait().map(drop)
}

/// A CRIU into which nothing can be preloaded.
fn shimless_criu(ferry: &Ferry) -> anyhow::Result<String> {
    let criu = pageferry_criu_glue::Criu::find(None)?;
    let path = ferry.scratch.path().join("shimless-criu");
    let script = format!("#!/bin/sh\nunset LD_PRELOAD\nexec '{}' \"$@\"\n", criu.path().display());
    std::fs::write(&path, script)?;
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    Ok(path.to_str().context("a path of text")?.to_owned())
}

/// Without soft-dirty there is no other way then.
fn no_shim(ferry: &Ferry) -> anyhow::Result<()> {
    if Kernel::probe().soft_dirty.works {
        return Err(Ignored("needs a kernel without soft-dirty".to_owned()).into());
    }
    let subject = ferry.subject(&["writer", "--memory", "4MiB"])?;
    let receiver = ferry.receiver(None, &[])?;
    let outcome = ferry.migrate(subject.pid, None, &["--criu", &shimless_criu(ferry)?])?;
    outcome.failed(3, &["running at the source", "shim"])?;
    ferry.lives_only(Host::Source, &subject)?;
    receiver.stop()
}

fn soft_dirty(ferry: &Ferry) -> anyhow::Result<()> {
    needs_soft_dirty()?;
    let options = ["--verify", "--tracker", "soft-dirty"];
    moves_with(ferry, &["writer", "--memory", "32MiB", "--rate", "2MB"], &options)?;
    moves_with(ferry, &["forked", "--memory", "8MiB", "--workers", "2"], &options)
}

fn soft_dirty_scan(ferry: &Ferry) -> anyhow::Result<()> {
    needs_soft_dirty()?;
    let feature = Kernel::probe().scan_soft_dirty;
    if !feature.works {
        return Err(Ignored(format!("needs soft-dirty by PAGEMAP_SCAN: {}", feature.reason)).into());
    }
    let options = ["--verify", "--tracker", "soft-dirty-scan"];
    moves_with(ferry, &["writer", "--memory", "32MiB", "--rate", "2MB"], &options)
}

fn compare(ferry: &Ferry) -> anyhow::Result<()> {
    let options = ["--verify", "--tracker", "compare"];
    moves_with(ferry, &["writer", "--memory", "64MiB"], &options)?;
    moves_with(ferry, &["forked", "--memory", "16MiB", "--workers", "2"], &options)
}

fn redis(ferry: &Ferry) -> anyhow::Result<()> {
    let workload = pageferry_benches::bench::workload()?;
    let workload = workload.to_str().context("a path of text")?;
    let scratch = ferry.scratch.path().to_str().context("a path of text")?;
    let server = ferry.program(&[
        "redis-server",
        "--bind",
        "0.0.0.0",
        "--protected-mode",
        "no",
        "--save",
        "",
        "--appendonly",
        "no",
        "--dir",
        scratch,
    ])?;
    let fill = [workload, "redis-fill", "--address", "10.77.0.1:6379", "--bytes", "48MiB"];
    succeed(ferry.hosts.exec(Host::Client, fill).output()?).context("filling redis")?;
    let journal = format!("{scratch}/{}", ferry.name("journal"));
    let mut load = ferry
        .hosts
        .exec(
            Host::Client,
            [
                workload,
                "redis-load",
                "--address",
                "10.77.0.1:6379",
                "--address",
                "10.77.0.2:6379",
                "--duration",
                "6",
                "--rate",
                "2000",
                "--journal",
                &journal,
            ],
        )
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()?;
    std::thread::sleep(Duration::from_secs(1));
    let receiver = ferry.receiver(None, &["--once"])?;
    let outcome = ferry
        .migrate(server, None, &["--verify", "--tcp", "close"])
        .and_then(|outcome| outcome.moved().map(drop));
    if outcome.is_err() {
        load.kill()?;
    }
    let loaded = load.wait_with_output()?;
    outcome?;
    receiver.wait()?;
    succeed(loaded).context("the client")?;
    let verify =
        [workload, "redis-verify", "--address", "10.77.0.2:6379", "--bytes", "48MiB", "--journal", &journal];
    succeed(ferry.hosts.exec(Host::Client, verify).output()?).context("looking for every key")?;
    ensure!(ferry.state(Host::Source, server)?.is_none(), "redis still runs at the source");
    Ok(())
}

/// Keeps a heap of objects, changes some of it, and writes a digest of the rest again and again.
const PYTHON: &str = r"
import hashlib, sys, time
heap = {i: (str(i) * 3, [i, i + 1], {'k': i}) for i in range(200000)}
turn = 0
while True:
    for i in range(turn % 1000, 200000, 1000):
        heap[i] = (str(i) * 3, [i, i + 1], {'k': i})
    turn += 1
    digest = hashlib.sha256(repr(sorted(heap.items())[:: 97]).encode()).hexdigest()
    with open(sys.argv[1], 'a') as out:
        out.write(f'{turn} {digest}\n')
    time.sleep(0.01)
";

fn python(ferry: &Ferry) -> anyhow::Result<()> {
    let out = ferry.scratch.path().join(ferry.name("python"));
    let pid = ferry.program(&["python3", "-I", "-c", PYTHON, out.to_str().context("a path of text")?])?;
    let turns = |at_least: usize| -> anyhow::Result<Vec<(u64, String)>> {
        let until = Instant::now() + LIMIT;
        loop {
            let text = std::fs::read_to_string(&out).unwrap_or_default();
            let lines: Vec<_> = text
                .lines()
                .filter_map(|line| {
                    let (turn, digest) = line.split_once(' ')?;
                    Some((turn.parse().ok()?, digest.to_owned()))
                })
                .collect();
            if lines.len() >= at_least {
                return Ok(lines);
            }
            ensure!(Instant::now() < until, "python does not go on: {} turns", lines.len());
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    turns(3)?;
    let receiver = ferry.receiver(None, &["--once"])?;
    ferry.migrate(pid, None, &["--verify"])?.moved()?;
    receiver.wait()?;
    let before = turns(1)?.len();
    let lines = turns(before + 5)?;
    for (index, (turn, digest)) in lines.iter().enumerate() {
        ensure!(*turn == index as u64 + 1, "turn {turn} stands at line {index}: it lost or repeated one");
        ensure!(*digest == lines[0].1, "turn {turn} has another digest: its heap has changed");
    }
    Ok(())
}
