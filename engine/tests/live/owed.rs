//! The source's engine is killed while pages are owed: `pageferry recover` goes on in its place.

use super::Test;
use super::ferry::{Ferry, LIMIT};
use super::kept::{back, fresh};
use super::late::interface;
use super::recover::{COMMAND, finds, forget, kill_engine, nothing_is_left, recover, refused, writes};
use anyhow::{Context, ensure};
use pageferry_benches::bench::child::wait_for;
use pageferry_benches::bench::hosts::Host;
use pageferry_benches::bench::subject::Subject;
use serde_json::Value;
use std::time::Duration;

pub fn tests() -> Vec<(&'static str, Test)> {
    vec![
        ("recover: the sending engine was killed while pages were owed", killed),
        (
            "recover: the sending engine was killed when nothing was owed, and not all was in place",
            killed_at_last,
        ),
        ("recover: two that would go on in place of an engine, and one that is killed", twice),
        ("recover: the link is lost while owed pages are sent in place of an engine", link_lost),
        ("recover: the link came back after the engine had given up", gave_up),
        ("recover: both engines were killed while pages were owed", receiver_gone),
        ("recover: the engine that owes pages lives", alive),
        ("recover: owed pages that cannot be sent any more", unfit),
        ("recover: the copy is let go and stopped again while its pages are sent", ran_on),
        ("recover: pages are kept where the engine would have kept them", keeps),
    ]
}

/// Slow enough to be struck in the middle; both sides wait for longer than any test takes.
const SLOW: [&str; 6] = ["--strategy", "post-copy", "--bandwidth", "8MB", "--coding", "raw"];

fn writer(ferry: &Ferry) -> anyhow::Result<Subject> {
    ferry.subject(&["writer", "--memory", "48MiB", "--rate", "5MB"])
}

/// Moves a program, and kills the engine when some pages have come late.
fn orphan(ferry: &Ferry, subject: &Subject) -> anyhow::Result<()> {
    let outcome = ferry.migrate(subject.pid, Some("late-push=kill@60"), &SLOW)?;
    ensure!(outcome.code == 137, "exit code {}: {}", outcome.code, outcome.err);
    ensure!(ferry.state(Host::Source, subject.pid)? == Some('T'), "it does not stand at the source");
    Ok(())
}

/// It runs at the destination and nowhere else, and nothing is left to be recovered.
fn moved(ferry: &Ferry, subject: &Subject, found: &Value) -> anyhow::Result<()> {
    let late = &found["served"];
    let sent = |what: &str| late[what].as_u64().unwrap_or_default();
    let all = sent("demanded_pages") + sent("pushed_pages");
    ensure!(found["verdict"] == "end-here" && found["settled"] == true, "{found}");
    ensure!(all > 0 && all < sent("owed_pages"), "some had come before: {late}");
    ferry.lives_only(Host::Destination, subject)?;
    nothing_is_left(ferry, Host::Source)
}

fn killed(ferry: &Ferry) -> anyhow::Result<()> {
    let cases =
        [("writer", "post-copy"), ("forked", "post-copy"), ("churn", "post-copy"), ("writer", "hybrid")];
    for (workload, strategy) in cases {
        (|| {
            forget(ferry)?;
            let subject = match workload {
                "forked" => {
                    ferry.subject(&["forked", "--memory", "16MiB", "--workers", "3", "--rate", "2MB"])?
                }
                // Owed pages are unmapped, moved and dropped before they come, and while nobody sends them.
                "churn" => {
                    let subject = ferry.subject(&["churn", "--memory", "64MiB", "--rate", "20MB"])?;
                    wait_for("a life behind the program", LIMIT, || {
                        Ok(subject.lines()?.last().is_some_and(|line| line.progress > 3000).then_some(()))
                    })?;
                    subject
                }
                _ => ferry.subject(&["writer", "--memory", "48MiB", "--rate", "40MB"])?,
            };
            let receiver = ferry.receiver(None, &["--once"])?;
            let options = ["--strategy", strategy, "--coding", "raw", "--streams", "2"];
            let after = ["--post-copy-after", "1"];
            // What rounds leave is some batches only.
            let (hybrid, fault) = match strategy {
                "hybrid" => (&after[..], "late-push=kill@2"),
                _ => (&[][..], "late-push=kill@20"),
            };
            let outcome = ferry.migrate(subject.pid, Some(fault), &[&options, hybrid].concat())?;
            ensure!(outcome.code == 137, "exit code {}: {}", outcome.code, outcome.err);
            finds(ferry, Host::Source, "--dry-run", 4, "would be sent the pages that it is owed")?;
            ensure!(ferry.state(Host::Source, subject.pid)? == Some('T'), "a dry run has changed something");
            let found = finds(ferry, Host::Source, "", 0, "was sent what it was owed")?;
            moved(ferry, &subject, &found)?;
            ensure!(receiver.wait()? == 0, "the receiver's exit code");
            ferry.hosts.kill(Host::Destination, subject.pid)
        })()
        .with_context(|| format!("{workload}, {strategy}"))?;
    }
    Ok(())
}

/// The destination has compared everything, and the engine there is the only one that has what is not in place.
fn killed_at_last(ferry: &Ferry) -> anyhow::Result<()> {
    forget(ferry)?;
    let subject = ferry.subject(&["writer", "--memory", "16MiB", "--rate", "5MB"])?;
    let receiver = ferry.receiver(Some("dest-late-sealed=delay:8000"), &["--once"])?;
    let mut migration = ferry.migrate_start(subject.pid, None, &["--strategy", "post-copy"])?;
    migration.says("running at the destination")?;
    std::thread::sleep(Duration::from_secs(3));
    kill_engine(ferry, Host::Source)?;
    ensure!(migration.wait()?.code == 137, "the engine was not killed");
    let found = finds(ferry, Host::Source, "--timeout 60s", 0, "was sent what it was owed (0 of")?;
    ensure!(found["served"]["owed_pages"].as_u64() > Some(0), "{found}");
    ferry.lives_only(Host::Destination, &subject)?;
    nothing_is_left(ferry, Host::Source)?;
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    ferry.hosts.kill(Host::Destination, subject.pid)
}

/// Starts one that takes its time.
fn recover_in_the_background(ferry: &Ferry) -> anyhow::Result<()> {
    ferry.sh(Host::Source, &format!("{COMMAND} recover > /dev/null 2>&1 &"))?;
    wait_for("somebody who goes on", LIMIT, || {
        let (_, found) = recover(ferry, Host::Source, "--dry-run")?;
        Ok(found.first().is_some_and(|found| found["verdict"] == "under-way").then_some(()))
    })
}

fn twice(ferry: &Ferry) -> anyhow::Result<()> {
    forget(ferry)?;
    let subject = writer(ferry)?;
    let receiver = ferry.receiver(None, &["--once"])?;
    orphan(ferry, &subject)?;
    recover_in_the_background(ferry)?;
    let found = finds(ferry, Host::Source, "", 0, "goes on")?;
    let session = found["session"].as_str().context("a session")?[..8].to_owned();
    let (code, text) = refused(ferry, Host::Source, &format!("--session {session} --run-here"))?;
    ensure!(code == 3 && text.contains("it decides alone"), "exit code {code}: {text}");
    ferry.migrate(subject.pid, None, &[])?.failed(3, &["is being moved"])?;
    // It has said who it is.
    kill_engine(ferry, Host::Source)?;
    let found = finds(ferry, Host::Source, "", 0, "was sent what it was owed")?;
    moved(ferry, &subject, &found)?;
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    ferry.hosts.kill(Host::Destination, subject.pid)
}

fn link_lost(ferry: &Ferry) -> anyhow::Result<()> {
    forget(ferry)?;
    let subject = writer(ferry)?;
    let stall = ["--stall-timeout", "2s"];
    let receiver = ferry.receiver(None, &[&["--once"], &stall[..]].concat())?;
    let outcome = ferry.migrate(subject.pid, Some("late-push=kill@60"), &[&SLOW[..], &stall].concat())?;
    ensure!(outcome.code == 137, "exit code {}: {}", outcome.code, outcome.err);
    let out = ferry.scratch.path().join(ferry.name("recovered"));
    let command = format!("{COMMAND} recover --json > {} 2>/dev/null &", out.display());
    ferry.sh(Host::Source, &command)?;
    wait_for("somebody who goes on", LIMIT, || {
        let (_, found) = recover(ferry, Host::Source, "--dry-run")?;
        Ok(found.first().is_some_and(|found| found["verdict"] == "under-way").then_some(()))
    })?;
    std::thread::sleep(Duration::from_millis(500));
    let interface = interface(ferry)?;
    ferry.sh(Host::Source, &format!("ip link set {interface} down"))?;
    std::thread::sleep(Duration::from_secs(5));
    ferry.sh(Host::Source, &format!("ip link set {interface} up"))?;
    let found: Value = wait_for("the end of it", LIMIT, || {
        let text = std::fs::read_to_string(&out)?;
        Ok(text.ends_with('\n').then(|| serde_json::from_str(&text)))
    })??;
    ensure!(found["served"]["reconnections"].as_u64() > Some(0), "{found}");
    moved(ferry, &subject, &found)?;
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    ferry.hosts.kill(Host::Destination, subject.pid)
}

/// The engine was not killed: it has ended, in doubt, and the receiver waits for longer.
fn gave_up(ferry: &Ferry) -> anyhow::Result<()> {
    forget(ferry)?;
    let subject = writer(ferry)?;
    let stall = ["--stall-timeout", "2s"];
    let receiver = ferry.receiver(None, &[&["--once"], &stall[..]].concat())?;
    let options = [&SLOW[..], &stall, &["--post-copy-timeout", "2s"]].concat();
    let mut migration = ferry.migrate_start(subject.pid, None, &options)?;
    migration.says("running at the destination")?;
    let interface = interface(ferry)?;
    ferry.sh(Host::Source, &format!("ip link set {interface} down"))?;
    let outcome = migration.wait();
    ferry.sh(Host::Source, &format!("ip link set {interface} up"))?;
    outcome?.failed(4, &["pages that the program is owed", "`pageferry recover` sends these pages"])?;
    let found = finds(ferry, Host::Source, "--timeout 60s", 0, "was sent what it was owed")?;
    moved(ferry, &subject, &found)?;
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    ferry.hosts.kill(Host::Destination, subject.pid)
}

fn receiver_gone(ferry: &Ferry) -> anyhow::Result<()> {
    forget(ferry)?;
    let subject = writer(ferry)?;
    let receiver = ferry.receiver(None, &[])?;
    orphan(ferry, &subject)?;
    kill_engine(ferry, Host::Destination)?;
    receiver.wait()?;
    let found = finds(ferry, Host::Source, "--timeout 1s", 4, "does not answer")?;
    ensure!(found["tree"] == "stopped", "{found}");
    let receiver = ferry.receiver(None, &[])?;
    let found = finds(ferry, Host::Source, "", 4, "was ended there with its engine")?;
    let session = found["session"].as_str().context("a session")?[..8].to_owned();
    ensure!(ferry.state(Host::Destination, subject.pid)?.is_none(), "it is left at the destination");
    finds(ferry, Host::Source, &format!("--session {session} --run-here"), 0, "let go")?;
    ferry.lives_only(Host::Source, &subject)?;
    nothing_is_left(ferry, Host::Source)?;
    receiver.stop()
}

fn alive(ferry: &Ferry) -> anyhow::Result<()> {
    forget(ferry)?;
    let subject = writer(ferry)?;
    let receiver = ferry.receiver(None, &["--once"])?;
    let mut migration = ferry.migrate_start(subject.pid, None, &SLOW)?;
    migration.says("running at the destination")?;
    writes(ferry, Host::Source, "resumed")?;
    let found = finds(ferry, Host::Source, "", 0, "goes on")?;
    ensure!(found["verdict"] == "under-way", "{found}");
    let outcome = migration.wait()?;
    ensure!(outcome.code == 0, "exit code {}: {}", outcome.code, outcome.err);
    ferry.lives_only(Host::Destination, &subject)?;
    nothing_is_left(ferry, Host::Source)?;
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    ferry.hosts.kill(Host::Destination, subject.pid)
}

/// Whatever does not fit: nothing is sent, nothing is ended, and it is said what is where.
fn unfit(ferry: &Ferry) -> anyhow::Result<()> {
    forget(ferry)?;
    let subject = writer(ferry)?;
    let receiver = ferry.receiver(None, &["--post-copy-timeout", "20s"])?;
    orphan(ferry, &subject)?;
    let stands = || -> anyhow::Result<()> {
        ensure!(ferry.state(Host::Source, subject.pid)? == Some('T'), "it does not stand at the source");
        ensure!(ferry.state(Host::Destination, subject.pid)?.is_some(), "it was ended at the destination");
        Ok(())
    };
    // It was not written down.
    ferry.sh(Host::Source, "cd /run/pageferry/journal && mv *.owed /run/aside")?;
    let found = finds(ferry, Host::Source, "", 4, "was not written down here")?;
    let session = found["session"].as_str().context("a session")?.to_owned();
    stands()?;
    // ... or not all of it.
    let back = format!("/run/pageferry/journal/{session}.source.owed");
    ferry.sh(Host::Source, &format!("head -c -9 /run/aside > {back}"))?;
    finds(ferry, Host::Source, "", 4, "its end is missing")?;
    stands()?;
    // ... or other pages than those of which the destination speaks.
    ferry.sh(Host::Source, &format!("sed 's/\"space\":[0-9]*/\"space\":77/' /run/aside > {back}"))?;
    finds(ferry, Host::Source, "", 4, "they cannot be sent")?;
    stands()?;
    // ... or of a process that is another one by now.
    ferry.sh(Host::Source, &format!("sed 's/\"start\":/\"start\":1/' /run/aside > {back}"))?;
    finds(ferry, Host::Source, "", 4, "does not stand still here any more")?;
    stands()?;
    ferry.sh(Host::Source, &format!("cp /run/aside {back}; rm /run/aside"))?;
    for choice in ["--run-here", "--end-here"] {
        let (code, text) = refused(ferry, Host::Source, &format!("--session {session} {choice}"))?;
        ensure!(code == 3 && text.contains("not all of its pages are in place"), "exit code {code}: {text}");
        stands()?;
    }
    // Somebody has let it go: its pages are others.
    ferry.sh(Host::Source, &format!("kill -CONT {}", subject.pid))?;
    finds(ferry, Host::Source, "", 4, "somebody has let it go")?;
    ensure!(ferry.state(Host::Destination, subject.pid)?.is_some(), "it was ended at the destination");
    wait_for("the end of it at the destination", LIMIT, || {
        Ok(ferry.state(Host::Destination, subject.pid)?.is_none().then_some(()))
    })?;
    finds(ferry, Host::Source, "", 0, "somebody has let it go")?;
    ferry.lives_only(Host::Source, &subject)?;
    nothing_is_left(ferry, Host::Source)?;
    receiver.stop()
}

/// What leaves with `--keep-store`, and whose engine is killed, comes back as what has changed since.
fn keeps(ferry: &Ferry) -> anyhow::Result<()> {
    forget(ferry)?;
    let subject = ferry.subject(&["writer", "--memory", "48MiB", "--rate", "50KB"])?;
    let stores = [fresh(ferry, "store"), fresh(ferry, "store"), fresh(ferry, "store")];
    let [here, there, other] = stores.each_ref().map(|store| store.display().to_string());
    // While pages are owed: both sides keep.
    let receiver = ferry.receiver(None, &["--once", "--keep-store", &there])?;
    let options = [&SLOW[..], &["--keep-store", &here]].concat();
    let outcome = ferry.migrate(subject.pid, Some("late-push=kill@60"), &options)?;
    ensure!(outcome.code == 137, "exit code {}: {}", outcome.code, outcome.err);
    let found = finds(ferry, Host::Source, "", 0, &format!("its pages are kept in {here}"))?;
    ensure!(found["kept_pages"].as_u64() > Some(12_000) && found["keep_store"] == here.as_str(), "{found}");
    moved(ferry, &subject, &found)?;
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    ensure!(stores[1].join("index").is_file(), "nothing was kept at the destination");
    let report = back(ferry, &subject, &stores[0], &["--keep-store", &there])?;
    ensure!(report.kept_pages > 12_000 && report.repeated_pages == 0, "{report:?}");
    ensure!(report.bytes_sent < 48 << 20 >> 3, "{} bytes back", report.bytes_sent);
    // When all was in place, and the copy here was to be ended; and when the commit had been sent.
    for (point, store, says) in
        [("filled", &here, "its pages are kept in"), ("commit-sent", &other, "nothing is kept of it in")]
    {
        (|| {
            let receiver = ferry.receiver(None, &[])?;
            let options = ["--keep-store", store];
            let outcome = ferry.migrate(subject.pid, Some(&format!("{point}=kill")), &options)?;
            ensure!(outcome.code == 137, "exit code {}: {}", outcome.code, outcome.err);
            finds(ferry, Host::Source, "--dry-run --timeout 30s", 0, "its pages would be kept in")?;
            // Somebody else uses the store.
            let holder = (point != "filled").then(|| {
                let script = format!("exec 9> {store}/lock; flock 9; sleep 600 > /dev/null 2>&1 & echo $!");
                ferry.sh(Host::Source, &script)
            });
            let holder = holder.transpose()?;
            let found = finds(ferry, Host::Source, "--timeout 30s", 0, says)?;
            let kept = found["kept_pages"].as_u64();
            ensure!(kept.is_some_and(|pages| pages > 12_000) == holder.is_none(), "{found}");
            ensure!(found["verdict"] == "end-here" && found["settled"] == true, "{found}");
            nothing_is_left(ferry, Host::Source)?;
            ferry.lives_only(Host::Destination, &subject)?;
            receiver.stop()?;
            if let Some(holder) = holder {
                ferry.hosts.kill(Host::Source, holder.trim().parse()?)?;
                ensure!(!stores[2].join("index").exists(), "something was kept");
            } else {
                back(ferry, &subject, &stores[0], &[])?;
            }
            Ok(())
        })()
        .with_context(|| point)?;
    }
    ferry.hosts.kill(Host::Destination, subject.pid)
}

/// Nobody sees it run: it was let go for less than a moment. What was read of it may be something else than the program is owed.
fn ran_on(ferry: &Ferry) -> anyhow::Result<()> {
    forget(ferry)?;
    let subject = writer(ferry)?;
    let receiver = ferry.receiver(None, &["--post-copy-timeout", "20s"])?;
    orphan(ferry, &subject)?;
    let out = ferry.scratch.path().join(ferry.name("recovered"));
    let command = format!("{COMMAND} recover --json > {} 2>/dev/null &", out.display());
    ferry.sh(Host::Source, &command)?;
    wait_for("somebody who goes on", LIMIT, || {
        let (_, found) = recover(ferry, Host::Source, "--dry-run")?;
        Ok(found.first().is_some_and(|found| found["verdict"] == "under-way").then_some(()))
    })?;
    std::thread::sleep(Duration::from_millis(300));
    ferry.sh(Host::Source, &format!("kill -CONT {pid}; kill -STOP {pid}", pid = subject.pid))?;
    let found: Value = wait_for("the end of it", LIMIT, || {
        let text = std::fs::read_to_string(&out)?;
        Ok(text.ends_with('\n').then(|| serde_json::from_str(&text)))
    })??;
    ensure!(found["verdict"] == "unclear" && found["tree"] == "ran-on", "{found}");
    let text = found["text"].as_str().unwrap_or_default();
    ensure!(text.contains("has run here") && text.contains("nothing is sent"), "{text}");
    ensure!(ferry.state(Host::Destination, subject.pid)?.is_some(), "it was ended at the destination");
    // Nor by the next, who was not there.
    let found = finds(ferry, Host::Source, "", 4, "somebody had let it go since")?;
    ensure!(
        found["tree"] == "ran-on" && found["answer"].as_str().is_some_and(|it| it.starts_with("Resumed")),
        "{found}"
    );
    ensure!(ferry.state(Host::Source, subject.pid)? == Some('T'), "it was let go");
    wait_for("the end of it at the destination", LIMIT, || {
        Ok(ferry.state(Host::Destination, subject.pid)?.is_none().then_some(()))
    })?;
    let found = finds(ferry, Host::Source, "", 4, "was ended there with its engine")?;
    let session = found["session"].as_str().context("a session")?[..8].to_owned();
    finds(ferry, Host::Source, &format!("--session {session} --run-here"), 0, "let go")?;
    ferry.lives_only(Host::Source, &subject)?;
    nothing_is_left(ferry, Host::Source)?;
    receiver.stop()
}
