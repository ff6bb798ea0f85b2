//! An engine is killed: what is where, and one copy of the program in the end.

use super::Test;
use super::ferry::{Ferry, LIMIT};
use anyhow::{Context, ensure};
use pageferry_benches::bench::child::wait_for;
use pageferry_benches::bench::hosts::Host;
use pageferry_benches::bench::subject::Subject;
use serde_json::Value;

pub fn tests() -> Vec<(&'static str, Test)> {
    vec![
        ("recover: the sending engine was killed before the commit", before_the_commit),
        ("recover: the sending engine was killed while the commit was on its way", commit_on_its_way),
        ("recover: the sending engine was killed when the program ran at the destination", ran_there),
        ("recover: the receiving engine was killed before it let the program run", ready_there),
        ("recover: the receiving CRIU was killed when the commit had been accepted", let_go_there),
        ("recover: both engines were killed when the program ran at the destination", ended_there),
        ("recover: what lives is left alone, and a program is moved once at a time", under_way),
        ("recover: bad input", bad_input),
    ]
}

pub(super) const COMMAND: &str = env!("CARGO_BIN_EXE_pageferry");

fn subject(ferry: &Ferry) -> anyhow::Result<Subject> {
    ferry.subject(&["forked", "--memory", "8MiB", "--workers", "2", "--rate", "1MB"])
}

/// `pageferry recover` in a host: its exit code, and the sessions that it names.
pub(super) fn recover(ferry: &Ferry, host: Host, options: &str) -> anyhow::Result<(i32, Vec<Value>)> {
    let script = format!("{COMMAND} recover --json {options} 2>&1; echo \"exit $?\"");
    let text = ferry.sh(host, &script)?;
    let (lines, code) = text.rsplit_once("exit ").with_context(|| text.clone())?;
    let findings = lines.lines().map(|line| serde_json::from_str(line).with_context(|| text.clone()));
    Ok((code.trim().parse()?, findings.collect::<anyhow::Result<_>>()?))
}

/// The one session of a host, which must be found so.
pub(super) fn finds(
    ferry: &Ferry,
    host: Host,
    options: &str,
    code: i32,
    says: &str,
) -> anyhow::Result<Value> {
    let (got, mut findings) = recover(ferry, host, options)?;
    ensure!(got == code && findings.len() == 1, "{}: exit code {got}, {findings:#?}", host.name());
    let text = findings[0]["text"].as_str().unwrap_or_default().to_owned();
    ensure!(text.contains(says), "{}: {says:?} is not in {text:?}", host.name());
    Ok(findings.remove(0))
}

/// Waits until that is the last line of the host's only journal.
pub(super) fn writes(ferry: &Ferry, host: Host, step: &str) -> anyhow::Result<()> {
    wait_for(&format!("the step {step}"), LIMIT, || {
        let last = ferry.sh(host, "tail -q -n 1 /run/pageferry/journal/*.jsonl 2>/dev/null")?;
        Ok(last.contains(&format!("\"step\":\"{step}\"")).then_some(()))
    })
}

/// Nothing is left to be recovered, nor of the journals.
pub(super) fn nothing_is_left(ferry: &Ferry, host: Host) -> anyhow::Result<()> {
    let (code, findings) = recover(ferry, host, "")?;
    ensure!(code == 0 && findings.is_empty(), "{}: exit code {code}, {findings:#?}", host.name());
    let files = ferry.sh(host, "ls /run/pageferry/journal")?;
    ensure!(files.is_empty(), "left in the {}: {files}", host.name());
    Ok(())
}

/// So that the journals of one test are not those of the next.
pub(super) fn forget(ferry: &Ferry) -> anyhow::Result<()> {
    for host in [Host::Source, Host::Destination] {
        ferry.sh(host, "rm -rf /run/pageferry/journal")?;
    }
    Ok(())
}

fn before_the_commit(ferry: &Ferry) -> anyhow::Result<()> {
    forget(ferry)?;
    for point in ["attach", "freeze", "dump", "ready", "held"] {
        (|| {
            let subject = subject(ferry)?;
            let receiver = ferry.receiver(None, &["--once"])?;
            let outcome = ferry.migrate(subject.pid, Some(&format!("{point}=kill")), &[])?;
            ensure!(outcome.code == 137, "exit code {}: {}", outcome.code, outcome.err);
            ferry.lives_only(Host::Source, &subject)?;
            let says = if point == "held" { "runs here" } else { "it was not stopped" };
            finds(ferry, Host::Source, "", 0, says)?;
            nothing_is_left(ferry, Host::Source)?;
            ferry.lives_only(Host::Source, &subject)?;
            receiver.wait()?;
            match point {
                // It had said that it could run there: so the source may ask, and is answered from the journal.
                "ready" | "held" => drop(finds(ferry, Host::Destination, "", 0, "nothing of it is here")?),
                _ => nothing_is_left(ferry, Host::Destination)?,
            }
            forget(ferry)?;
            ferry.hosts.kill(Host::Source, subject.pid)
        })()
        .with_context(|| point)?;
    }
    Ok(())
}

fn commit_on_its_way(ferry: &Ferry) -> anyhow::Result<()> {
    forget(ferry)?;
    let subject = subject(ferry)?;
    let receiver = ferry.receiver(Some("dest-commit=delay:8000"), &[])?;
    let migration = ferry.migrate_start(subject.pid, None, &[])?;
    writes(ferry, Host::Source, "committing")?;
    kill_engine(ferry, Host::Source)?;
    ensure!(migration.wait()?.code == 137, "the engine was not killed");
    // Whoever asks before the commit is accepted decides that it will not be.
    finds(ferry, Host::Source, "--timeout 30s", 0, "let go")?;
    ferry.lives_only(Host::Source, &subject)?;
    nothing_is_left(ferry, Host::Source)?;
    receiver.stop()?;
    ferry.lives_only(Host::Source, &subject)
}

fn ran_there(ferry: &Ferry) -> anyhow::Result<()> {
    forget(ferry)?;
    let subject = subject(ferry)?;
    // Before the source hears of it.
    let receiver = ferry.receiver(Some("dest-resumed=delay:3000"), &[])?;
    let migration = ferry.migrate_start(subject.pid, None, &[])?;
    writes(ferry, Host::Destination, "resumed")?;
    kill_engine(ferry, Host::Source)?;
    ensure!(migration.wait()?.code == 137, "the engine was not killed");
    let found = finds(ferry, Host::Source, "--dry-run --timeout 30s", 0, "would be ended here")?;
    ensure!(found["verdict"] == "end-here" && found["step"] == "committing", "{found}");
    finds(ferry, Host::Source, "--timeout 30s", 0, "ended here: it runs at")?;
    nothing_is_left(ferry, Host::Source)?;
    ferry.lives_only(Host::Destination, &subject)?;
    receiver.stop()?;
    ferry.lives_only(Host::Destination, &subject)
}

fn ready_there(ferry: &Ferry) -> anyhow::Result<()> {
    forget(ferry)?;
    let subject = subject(ferry)?;
    let receiver = ferry.receiver(Some("dest-commit=kill"), &[])?;
    let outcome = ferry.migrate(subject.pid, None, &[])?;
    ensure!(receiver.wait()? == 137, "the receiver did not reach the fault");
    outcome.failed(4, &["in doubt", "pageferry recover"])?;
    // Nobody answers, and nothing is done.
    finds(ferry, Host::Source, "--timeout 1s", 4, "does not answer")?;
    ensure!(ferry.state(Host::Source, subject.pid)? == Some('T'), "it was let go");
    // Nor is it moved as if nothing had happened.
    let again = ferry.migrate(subject.pid, None, &[])?;
    again.failed(3, &["was left here, stopped", "pageferry recover"])?;
    finds(ferry, Host::Destination, "", 0, "nothing of it is here")?;
    // Another receiver knows from the journal of the first.
    let receiver = ferry.receiver(None, &[])?;
    finds(ferry, Host::Source, "--timeout 30s", 0, "let go")?;
    ferry.lives_only(Host::Source, &subject)?;
    // And now it moves.
    ferry.migrate(subject.pid, None, &[])?.moved()?;
    ferry.lives_only(Host::Destination, &subject)?;
    receiver.stop()
}

/// It may have run there for a moment: nobody but a person lets it run here.
fn let_go_there(ferry: &Ferry) -> anyhow::Result<()> {
    forget(ferry)?;
    let subject = subject(ferry)?;
    let receiver = ferry.receiver(Some("dest-committed=delay:3000"), &[])?;
    let migration = ferry.migrate_start(subject.pid, None, &[])?;
    writes(ferry, Host::Destination, "committing")?;
    let (_, findings) = recover(ferry, Host::Destination, "--dry-run")?;
    let engine = findings.first().and_then(|found| found["engine"].as_i64()).context("an engine")?;
    let criu = ferry.sh(
        Host::Destination,
        &format!("for pid in $(cat /proc/{engine}/task/*/children); do grep -q criu /proc/$pid/cmdline && echo $pid; done"),
    )?;
    ferry.hosts.kill(Host::Destination, criu.lines().next().context("no CRIU")?.trim().parse()?)?;
    migration.wait()?.failed(4, &["in doubt", "ended after the commit", "pageferry recover"])?;
    ensure!(ferry.state(Host::Destination, subject.pid)?.is_none(), "it is left at the destination");
    ensure!(ferry.state(Host::Source, subject.pid)? == Some('T'), "it was let go");
    let found = finds(ferry, Host::Source, "--timeout 30s", 4, "was ended there")?;
    let session = found["session"].as_str().context("no session")?;
    finds(ferry, Host::Source, &format!("--session {session} --run-here"), 0, "let go")?;
    ferry.lives_only(Host::Source, &subject)?;
    nothing_is_left(ferry, Host::Source)?;
    receiver.stop()
}

fn ended_there(ferry: &Ferry) -> anyhow::Result<()> {
    forget(ferry)?;
    let subject = subject(ferry)?;
    let receiver = ferry.receiver(Some("dest-resumed=kill"), &[])?;
    let migration = ferry.migrate_start(subject.pid, None, &["--resolve-timeout", "60s"])?;
    ensure!(receiver.wait()? == 137, "the receiver did not reach the fault");
    kill_engine(ferry, Host::Source)?;
    ensure!(migration.wait()?.code == 137, "the engine was not killed");
    finds(ferry, Host::Destination, "", 0, "ended")?;
    ensure!(ferry.state(Host::Destination, subject.pid)?.is_none(), "it is left at the destination");
    let receiver = ferry.receiver(None, &[])?;
    let found = finds(ferry, Host::Source, "--timeout 30s", 4, "was ended there with its engine")?;
    ensure!(found["settled"] == false && found["tree"] == "stopped", "{found}");
    let session = found["session"].as_str().context("a session")?[..8].to_owned();
    finds(ferry, Host::Source, &format!("--session {session} --run-here"), 0, "let go")?;
    ferry.lives_only(Host::Source, &subject)?;
    nothing_is_left(ferry, Host::Source)?;
    receiver.stop()
}

fn under_way(ferry: &Ferry) -> anyhow::Result<()> {
    forget(ferry)?;
    let subject = ferry.subject(&["writer", "--memory", "32MiB", "--rate", "1MB"])?;
    let receiver = ferry.receiver(None, &["--once"])?;
    let migration = ferry.migrate_start(subject.pid, None, &["--bandwidth", "8MB"])?;
    writes(ferry, Host::Source, "pre-copy")?;
    for host in [Host::Source, Host::Destination] {
        writes(ferry, host, "pre-copy")?;
        let found = finds(ferry, host, "", 0, "goes on")?;
        let session = found["session"].as_str().context("a session")?[..8].to_owned();
        let (code, _) = refused(ferry, host, &format!("--session {session} --end-here"))?;
        ensure!(code == 3, "exit code {code}");
    }
    ferry.migrate(subject.pid, None, &[])?.failed(3, &["is being moved"])?;
    migration.wait()?.moved()?;
    ferry.lives_only(Host::Destination, &subject)?;
    receiver.wait()?;
    nothing_is_left(ferry, Host::Source)?;
    nothing_is_left(ferry, Host::Destination)
}

fn bad_input(ferry: &Ferry) -> anyhow::Result<()> {
    forget(ferry)?;
    for (options, code, says) in [
        ("--session 0123", 3, "there is no session 0123"),
        ("--run-here", 2, "--session"),
        ("--session 01 --run-here --end-here", 2, "cannot be used with"),
    ] {
        let (got, text) = refused(ferry, Host::Source, options)?;
        ensure!(got == code && text.contains(says), "{options}: exit code {got}, {text}");
    }
    ferry.sh(
        Host::Source,
        "mkdir -p /run/pageferry/journal && echo '{\"journal\":7}' > /run/pageferry/journal/a.jsonl",
    )?;
    let (got, text) = refused(ferry, Host::Source, "")?;
    ensure!(got == 3 && text.contains("version 7"), "exit code {got}, {text}");
    forget(ferry)
}

pub(super) fn refused(ferry: &Ferry, host: Host, options: &str) -> anyhow::Result<(i32, String)> {
    let text = ferry.sh(host, &format!("{COMMAND} recover {options} 2>&1; echo \"exit $?\""))?;
    let (said, code) = text.rsplit_once("exit ").with_context(|| text.clone())?;
    Ok((code.trim().parse()?, said.to_owned()))
}

/// By SIGKILL, and by the process id that its journal names.
pub(super) fn kill_engine(ferry: &Ferry, host: Host) -> anyhow::Result<()> {
    let (_, findings) = recover(ferry, host, "--dry-run")?;
    let engine = findings.first().and_then(|found| found["engine"].as_i64()).context("an engine")?;
    ferry.hosts.kill(host, engine as i32)
}
