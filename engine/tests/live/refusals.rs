//! What cannot be done is refused with a reason, and leaves the program alone.

use super::Test;
use super::ferry::{Ferry, LIMIT};
use anyhow::{Context, ensure};
use pageferry_benches::bench::{child::wait_for, hosts::Host};
use pageferry_wire_format::version;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

pub fn tests() -> Vec<(&'static str, Test)> {
    vec![
        ("an unreachable receiver", unreachable),
        ("a congestion control that is not there", congestion),
        ("a busy receiver", busy),
        ("a receiver without memory", no_memory),
        ("a port that is taken", taken),
        ("a process that ends while it is copied", ends),
        ("a user without privileges", unprivileged),
        ("an old CRIU", old_criu),
        ("a program that CRIU refuses", refused_by_criu),
        ("a stranger who sends nonsense", nonsense),
        ("a receiver that speaks another version", other_version),
    ]
}

const WRITER: [&str; 5] = ["writer", "--memory", "16MiB", "--rate", "5MB"];

fn unreachable(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&WRITER)?;
    let outcome = ferry.migrate(subject.pid, None, &[])?;
    outcome.failed(
        3,
        &["could not connect to 10.77.0.2:7077", "running at the source", "is `pageferry receive"],
    )?;
    ferry.lives_only(Host::Source, &subject)
}

fn congestion(ferry: &Ferry) -> anyhow::Result<()> {
    let (subject, receiver) = (ferry.subject(&WRITER)?, ferry.receiver(None, &[])?);
    let outcome = ferry.migrate(subject.pid, None, &["--congestion", "carrier-pigeon"])?;
    outcome.failed(3, &["congestion control carrier-pigeon", "this machine has", "running at the source"])?;
    ferry.lives_only(Host::Source, &subject)?;
    ferry.migrate(subject.pid, None, &["--congestion", "reno"])?.moved()?;
    ferry.lives_only(Host::Destination, &subject)?;
    receiver.stop()
}

fn busy(ferry: &Ferry) -> anyhow::Result<()> {
    let (slow, other) = (ferry.subject(&WRITER)?, ferry.subject(&WRITER)?);
    let receiver = ferry.receiver(None, &[])?;
    let mut first = ferry.migrate_start(slow.pid, None, &["--bandwidth", "1MB"])?;
    first.says("tracking")?;
    ferry.migrate(other.pid, None, &[])?.failed(3, &["busy", "another migration"])?;
    first.signal(nix::sys::signal::Signal::SIGINT)?;
    first.wait()?.failed(130, &["interrupted"])?;
    ferry.lives_only(Host::Source, &slow)?;
    ferry.lives_only(Host::Source, &other)?;
    // It is free again.
    ferry.migrate(other.pid, None, &[])?.moved()?;
    ferry.lives_only(Host::Destination, &other)?;
    receiver.stop()
}

fn no_memory(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "64MiB"])?;
    let receiver = ferry.receiver(None, &["--memory-limit", "16MiB"])?;
    let outcome = ferry.migrate(subject.pid, None, &[])?;
    outcome.failed(1, &["memory free", "running at the source"])?;
    ferry.lives_only(Host::Source, &subject)?;
    receiver.stop()
}

fn taken(ferry: &Ferry) -> anyhow::Result<()> {
    let receiver = ferry.receiver(None, &[])?;
    let second = ferry.receiver(None, &[]).err().context("two receivers on one port")?;
    ensure!(format!("{second:#}").contains("listening on 10.77.0.2:7077"), "{second:#}");
    receiver.stop()
}

fn ends(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "64MiB"])?;
    let receiver = ferry.receiver(None, &[])?;
    let mut migration = ferry.migrate_start(subject.pid, None, &["--bandwidth", "10MB"])?;
    migration.says("tracking")?;
    ferry.hosts.kill(Host::Source, subject.pid)?;
    let outcome = migration.wait()?;
    ensure!(outcome.code == 1, "exit code {}: {}", outcome.code, outcome.err);
    ensure!(outcome.err.contains("ended") || outcome.err.contains("has ended"), "{}", outcome.err);
    receiver.stop()
}

fn unprivileged(ferry: &Ferry) -> anyhow::Result<()> {
    let command = env!("CARGO_BIN_EXE_pageferry");
    // A copy where everybody may reach it.
    let copy = format!("/tmp/{}-{}", ferry.name("pageferry"), std::process::id());
    std::fs::copy(command, &copy)?;
    std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755))?;
    let text = ferry.sh(
        Host::Source,
        &format!("setpriv --reuid 65534 --regid 65534 --clear-groups {copy} migrate --pid 1 --to 10.77.0.2:7077 2>&1; echo code=$?"),
    );
    std::fs::remove_file(&copy)?;
    let text = text?;
    ensure!(text.contains("needs root") && text.contains("code=3"), "{text}");
    Ok(())
}

fn old_criu(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&WRITER)?;
    let fake = ferry.scratch.path().join("old-criu");
    std::fs::write(&fake, "#!/bin/sh\necho 'Version: 3.17.1'\n")?;
    std::fs::set_permissions(&fake, std::fs::Permissions::from_mode(0o755))?;
    let outcome = ferry.migrate(subject.pid, None, &["--criu", fake.to_str().context("text")?])?;
    outcome.failed(3, &["3.17.1", "4.0"])?;
    ferry.lives_only(Host::Source, &subject)
}

fn refused_by_criu(ferry: &Ferry) -> anyhow::Result<()> {
    // Its output goes to a socket whose other end is another program's.
    let script = "import os, socket, sys, time
a, b = socket.socketpair()
if os.fork() == 0:
    os.setsid()
    a.close()
    time.sleep(1000)
b.close()
time.sleep(1000)";
    let parent = ferry.program(&["python3", "-I", "-c", script])?;
    // As soon as each has closed its end of the other's.
    let child: i32 = wait_for("a child with one end of the pair", LIMIT, || {
        let children = ferry.sh(Host::Source, &format!("cat /proc/{parent}/task/{parent}/children"))?;
        let Ok(child) = children.parse::<i32>() else { return Ok(None) };
        let ends =
            format!("for p in {parent} {child}; do ls -l /proc/$p/fd | grep -c socket:; done 2>/dev/null");
        Ok((ferry.sh(Host::Source, &ends)? == "1\n1").then_some(child))
    })?;
    let receiver = ferry.receiver(None, &[])?;
    let outcome = ferry.migrate(child, None, &[])?;
    outcome.failed(1, &["CRIU could not dump", "end of its log", "running at the source"])?;
    ensure!(matches!(ferry.state(Host::Source, child)?, Some('S')), "the child does not run on");
    ferry.sh(Host::Source, &format!("kill -KILL {child} {parent}"))?;
    receiver.stop()
}

fn nonsense(ferry: &Ferry) -> anyhow::Result<()> {
    let receiver = ferry.receiver(None, &[])?;
    for bytes in ["GET / HTTP/1.0\\r\\n\\r\\n", "PGFY", "\\000\\001\\002\\003"] {
        ferry.sh(
            Host::Source,
            &format!(
                "printf '{bytes}%0100d' 0 | timeout 3 python3 -I -c 'import socket,sys\ns=socket.create_connection((\"10.77.0.2\",7077))\ns.sendall(sys.stdin.buffer.read())\ns.shutdown(1)\ns.settimeout(3)\nwhile s.recv(4096): pass'"
            ),
        )?;
    }
    let subject = ferry.subject(&WRITER)?;
    ferry.migrate(subject.pid, None, &[])?.moved()?;
    ferry.lives_only(Host::Destination, &subject)?;
    receiver.stop()
}

/// A peer that answers with a frame of version 900.
const LATER: &str = r#"
import socket, struct
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("10.77.0.2", 7077))
s.listen(1)
print("listening", flush=True)
c, _ = s.accept()
c.recv(65536)
c.sendall(b"PGFY" + struct.pack("<HHIIQQ", 900, 3, 0, 0, 0, 0))
c.recv(65536)
"#;

fn other_version(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&WRITER)?;
    let mut peer = ferry
        .hosts
        .exec(Host::Destination, ["timeout", "120", "python3", "-I", "-c", LATER])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut said = String::new();
    BufReader::new(peer.stdout.take().context("its output")?).read_line(&mut said)?;
    ensure!(said == "listening\n", "the peer does not listen");
    let outcome = ferry.migrate(subject.pid, None, &[])?;
    peer.wait()?;
    let ours = format!("version {} is spoken here", version::CURRENT);
    outcome.failed(3, &["version 900", &ours])?;
    ferry.lives_only(Host::Source, &subject)
}
