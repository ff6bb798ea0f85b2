//! The link is lost while the program still runs at the source: it is waited for, and what has arrived is not sent again.

use super::Test;
use super::ferry::{Ferry, LIMIT, Migration, Outcome, Receiver};
use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use pageferry_benches::bench::child::wait_for;
use pageferry_benches::bench::hosts::Host;
use pageferry_benches::bench::subject::Subject;
use pageferry_wire_format::version::Versions;
use pageferry_wire_format::{
    ControlMessage, HEADER_BYTES, Hello, RestoreChoices, Sequencer, Welcome, version,
};
use std::time::{Duration, Instant};

pub fn tests() -> Vec<(&'static str, Test)> {
    vec![
        ("resume: the link goes down without a word in the first round and in a later one", down_and_up),
        ("resume: connections are cut in every round, the first and others", cut),
        ("resume: the link is lost again and again", flapping),
        ("resume: a tree whose processes come and go, and its memory with them", changing),
        ("resume: the link does not come back", gone_for_good),
        ("resume: the receiver is killed meanwhile", receiver_killed),
        ("resume: the receiver does not have the session any more", receiver_anew),
        ("resume: cancelled, paused and asked meanwhile", meanwhile),
        ("resume: an engine that is started anew is taken at once", begun_anew),
        ("resume: a link that is lost in the freeze rolls back at once", in_the_freeze),
        ("resume: pages that were to come late, and did not have to wait for it", hybrid),
        ("resume: a receiver of version 2 hears nothing newer, and nobody waits for it", older_receiver),
        ("resume: a source of version 2 is answered in it", older_source),
    ]
}

const MEMORY: u64 = 64 << 20;
/// About two seconds for a round over all of it, raw: so what was sent twice would be seen.
const SLOW: [&str; 6] = ["--coding", "raw", "--bandwidth", "32MB", "--stall-timeout", "1s"];

fn writer(ferry: &Ferry) -> anyhow::Result<Subject> {
    ferry.subject(&["writer", "--memory", "64MiB", "--rate", "1MB"])
}

/// The source's end of the link.
fn interface(ferry: &Ferry) -> anyhow::Result<String> {
    ferry.sh(Host::Source, "ip -o link show type veth | sed 's/^[0-9]*: //; s/[@:].*//'")
}

/// A link that is down until it is dropped.
struct Down<'a> {
    ferry: &'a Ferry,
    interface: String,
}

impl<'a> Down<'a> {
    fn take(ferry: &'a Ferry) -> anyhow::Result<Self> {
        let interface = interface(ferry)?;
        ferry.sh(Host::Source, &format!("ip link set {interface} down"))?;
        Ok(Self { ferry, interface })
    }
}

impl Drop for Down<'_> {
    fn drop(&mut self) {
        let _ = self.ferry.sh(Host::Source, &format!("ip link set {} up", self.interface));
    }
}

/// It ended well, the link was lost so often, and hardly anything went twice.
fn went_on(outcome: &Outcome, interruptions: u32) -> anyhow::Result<()> {
    let report = outcome.moved()?;
    ensure!(report.interruptions >= interruptions, "{} times: {}", report.interruptions, outcome.err);
    ensure!(report.interrupted_us > 0, "no time");
    ensure!(outcome.err.contains("the link is back after"), "{}", outcome.err);
    ensure!(
        report.bytes_sent < MEMORY * 14 / 10,
        "{} bytes for {} of memory: {}",
        report.bytes_sent,
        report.memory_bytes,
        outcome.err
    );
    Ok(())
}

fn whole(ferry: &Ferry, subject: &Subject, receiver: Receiver) -> anyhow::Result<()> {
    ferry.lives_only(Host::Destination, subject)?;
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    ferry.hosts.kill(Host::Destination, subject.pid)
}

/// The program runs on at the source with all of its memory, and the receiver says why it has nothing.
fn rolled_back(ferry: &Ferry, subject: &Subject, outcome: &Outcome, says: &[&str]) -> anyhow::Result<()> {
    outcome.failed(1, says)?;
    ensure!(outcome.err.contains("running at the source"), "{}", outcome.err);
    ferry.lives_only(Host::Source, subject)
}

fn down_and_up(ferry: &Ferry) -> anyhow::Result<()> {
    for (round, wait) in [(0, "tracking"), (2, "round 1: ")] {
        (|| {
            let subject = writer(ferry)?;
            let receiver = ferry.receiver(None, &["--once", "--stall-timeout", "1s"])?;
            let rounds = ["--policy", "fixed:5", "--verify"];
            // The rounds after the first are short: one is made longer, so that the link goes down in it.
            let fault = (round > 0).then_some("precopy=delay:900@3");
            let mut migration = ferry.migrate_start(subject.pid, fault, &[&SLOW[..], &rounds].concat())?;
            migration.says(wait)?;
            if round == 0 {
                std::thread::sleep(Duration::from_millis(1000));
            }
            let down = Down::take(ferry)?;
            migration.says("the link was lost")?;
            std::thread::sleep(Duration::from_millis(1500));
            drop(down);
            let outcome = migration.wait()?;
            went_on(&outcome, 1)?;
            ensure!(outcome.moved()?.verified, "it was not verified");
            whole(ferry, &subject, receiver)
        })()
        .with_context(|| format!("down in round {round}"))?;
    }
    Ok(())
}

fn cut(ferry: &Ferry) -> anyhow::Result<()> {
    // Frames: what is held, spaces, pages over any connection, ends of rounds; one of them ends in the middle.
    for fault in ["cut@8", "cut@30", "truncate@45", "cut@69", "cut@72", "truncate@90"] {
        for streams in ["1", "3"] {
            (|| {
                let subject = writer(ferry)?;
                let receiver = ferry.receiver(None, &["--once"])?;
                let options = ["--policy", "fixed:6", "--coding", "raw", "--verify", "--streams", streams];
                let fault = format!("frame={fault}");
                let outcome = ferry.migrate(subject.pid, Some(&fault), &options)?;
                went_on(&outcome, 1)?;
                whole(ferry, &subject, receiver)
            })()
            .with_context(|| format!("{fault} of {streams} connections"))?;
        }
    }
    Ok(())
}

fn flapping(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = writer(ferry)?;
    let receiver = ferry.receiver(None, &["--once", "--stall-timeout", "1s"])?;
    let options = ["--policy", "fixed:4", "--verify", "--streams", "2"];
    let mut migration = ferry.migrate_start(subject.pid, None, &[&SLOW[..], &options].concat())?;
    migration.says("tracking")?;
    for time in 1..=3 {
        std::thread::sleep(Duration::from_millis(500));
        let down = Down::take(ferry)?;
        let lost = |migration: &Migration| migration.log().matches("the link was lost").count();
        let until = Instant::now() + Duration::from_secs(20);
        while lost(&migration) < time {
            ensure!(Instant::now() < until, "{time}: {}", migration.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        drop(down);
        let back = |migration: &Migration| migration.log().matches("the link is back").count();
        while back(&migration) < time {
            ensure!(Instant::now() < until, "{time}: {}", migration.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    went_on(&migration.wait()?, 3)?;
    whole(ferry, &subject, receiver)
}

fn changing(ferry: &Ferry) -> anyhow::Result<()> {
    for workload in [
        &["forked", "--memory", "24MiB", "--workers", "3", "--rate", "2MB"][..],
        &["churn", "--memory", "48MiB", "--rate", "20MB"],
    ] {
        for fault in ["frame=cut@25", "frame=truncate@60"] {
            (|| {
                let subject = ferry.subject(workload)?;
                let receiver = ferry.receiver(None, &["--once"])?;
                let options = ["--policy", "fixed:6", "--streams", "2", "--verify"];
                let outcome = ferry.migrate(subject.pid, Some(fault), &options)?;
                let report = outcome.moved()?;
                ensure!(report.interruptions == 1, "{}: {}", report.interruptions, outcome.err);
                whole(ferry, &subject, receiver)
            })()
            .with_context(|| format!("{} {fault}", workload[0]))?;
        }
    }
    Ok(())
}

fn gone_for_good(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = writer(ferry)?;
    let receiver = ferry.receiver(None, &["--once", "--stall-timeout", "1s"])?;
    let options = [&SLOW[..], &["--resume-timeout", "2s", "--connect-timeout", "1s"]].concat();
    let mut migration = ferry.migrate_start(subject.pid, None, &options)?;
    migration.says("tracking")?;
    std::thread::sleep(Duration::from_millis(600));
    let down = Down::take(ferry)?;
    migration.says("the link was lost")?;
    let lost = Instant::now();
    let outcome = migration.wait()?;
    ensure!(lost.elapsed() < Duration::from_secs(8), "it took {:?}", lost.elapsed());
    // The receiver holds it for as long as it was told, and then has nothing either.
    let log = receiver.log();
    ensure!(receiver.wait()? != 0, "the receiver's exit code: {log}");
    drop(down);
    rolled_back(ferry, &subject, &outcome, &["the link was lost", "did not come back within 2s"])
}

fn receiver_killed(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = writer(ferry)?;
    let receiver = ferry.receiver(None, &["--once"])?;
    let options = [&SLOW[..], &["--resume-timeout", "2s"]].concat();
    let mut migration = ferry.migrate_start(subject.pid, None, &options)?;
    migration.says("tracking")?;
    std::thread::sleep(Duration::from_millis(600));
    ferry.hosts.kill(Host::Destination, receiver.pid)?;
    receiver.wait()?;
    let outcome = migration.wait()?;
    rolled_back(ferry, &subject, &outcome, &["the link was lost", "did not come back", "could not connect"])
}

fn receiver_anew(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = writer(ferry)?;
    let receiver = ferry.receiver(None, &["--once"])?;
    let mut migration = ferry.migrate_start(subject.pid, None, &SLOW)?;
    migration.says("tracking")?;
    std::thread::sleep(Duration::from_millis(600));
    ferry.hosts.kill(Host::Destination, receiver.pid)?;
    receiver.wait()?;
    let receiver = ferry.receiver(None, &[])?;
    let started = Instant::now();
    let outcome = migration.wait()?;
    ensure!(started.elapsed() < Duration::from_secs(10), "it took {:?}", started.elapsed());
    rolled_back(ferry, &subject, &outcome, &["could not be taken up again", "not being received"])?;
    receiver.stop()
}

fn meanwhile(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = writer(ferry)?;
    let receiver = ferry.receiver(None, &["--stall-timeout", "1s"])?;
    let mut migration = ferry.migrate_start(subject.pid, None, &SLOW)?;
    migration.says("tracking")?;
    std::thread::sleep(Duration::from_millis(600));
    let down = Down::take(ferry)?;
    migration.says("the link was lost")?;
    let pageferry = env!("CARGO_BIN_EXE_pageferry");
    let control = |what: &str| {
        ferry.sh(Host::Source, &format!("{pageferry} control --pid {} {what} 2>&1", subject.pid))
    };
    let status = control("status")?;
    ensure!(status.contains("pre-copy, waiting for the link"), "{status}");
    // The journal knows the engine that waits, and nobody takes its program away.
    let recovered = ferry.sh(Host::Source, &format!("{pageferry} recover 2>&1"))?;
    ensure!(!recovered.contains("rolled back"), "{recovered}");
    control("pause")?;
    let status = control("status")?;
    ensure!(status.contains("pre-copy, paused, waiting for the link"), "{status}");
    drop(down);
    migration.says("the link is back")?;
    migration.says("paused, as was asked for")?;
    // It is noticed in a pause too.
    let down = Down::take(ferry)?;
    let until = Instant::now() + Duration::from_secs(10);
    while !control("status")?.contains("paused, waiting for the link") {
        ensure!(Instant::now() < until, "{}", migration.log());
    }
    let asked = Instant::now();
    migration.signal(Signal::SIGINT)?;
    let outcome = migration.wait()?;
    ensure!(asked.elapsed() < Duration::from_secs(5), "it took {:?}", asked.elapsed());
    drop(down);
    outcome.failed(130, &["interrupted", "running at the source"])?;
    ferry.lives_only(Host::Source, &subject)?;
    receiver.stop()
}

/// Its session is held, and the new engine knows nothing of it: it need not wait for the old one's ghost.
fn begun_anew(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = writer(ferry)?;
    let receiver = ferry.receiver(None, &[])?;
    let killed = ferry.migrate(subject.pid, Some("precopy=kill@2"), &["--policy", "fixed:4"])?;
    ensure!(killed.code == 137, "exit code {}: {}", killed.code, killed.err);
    let until = Instant::now() + Duration::from_secs(10);
    while !receiver.log().contains("the link was lost, and is waited for") {
        ensure!(Instant::now() < until, "{}", receiver.log());
        std::thread::sleep(Duration::from_millis(10));
    }
    ferry.lives_only(Host::Source, &subject)?;
    // Another program is not let in its place.
    let other = ferry.program(&["sleep", "600"])?;
    ferry.migrate(other, None, &[])?.failed(3, &["another migration is being received"])?;
    ferry.migrate(subject.pid, None, &["--verify"])?.moved()?;
    ferry.lives_only(Host::Destination, &subject)?;
    ensure!(receiver.log().contains("its source has begun anew"), "{}", receiver.log());
    receiver.stop()
}

fn in_the_freeze(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = writer(ferry)?;
    let receiver = ferry.receiver(None, &[])?;
    for fault in ["frozen=kill", "images=kill"] {
        let outcome = ferry.migrate(subject.pid, Some(fault), &[])?;
        ensure!(outcome.code == 137, "exit code {}: {}", outcome.code, outcome.err);
        ferry.lives_only(Host::Source, &subject)?;
        let until = Instant::now() + Duration::from_secs(5);
        while !receiver.log().trim_end().lines().last().is_some_and(|line| line.contains("discarded")) {
            ensure!(Instant::now() < until, "{fault}: {}", receiver.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    ensure!(!receiver.log().contains("is waited for"), "{}", receiver.log());
    receiver.stop()
}

fn hybrid(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "64MiB", "--rate", "20MB"])?;
    let receiver = ferry.receiver(None, &["--once"])?;
    let options = ["--strategy", "hybrid", "--post-copy-after", "2", "--coding", "raw", "--streams", "2"];
    let outcome = ferry.migrate(subject.pid, Some("frame=cut@30"), &options)?;
    let report = outcome.moved()?;
    ensure!(report.interruptions == 1 && report.post_copy.is_some(), "{}", outcome.err);
    whole(ferry, &subject, receiver)
}

/// The first frame of a direction, in hexadecimal digits.
fn frame(message: &ControlMessage) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    message.encode(&mut Sequencer::default(), &mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// It says `FRAME`, hears a megabyte, and is gone.
const PEER: &str = r"
import socket, sys
server = socket.create_server(('10.77.0.2', 7077))
server.settimeout(30)
link = server.accept()[0]
server.close()
link.settimeout(10)
heard = link.recv(65536)
link.sendall(bytes.fromhex(sys.argv[1]))
while len(heard) < 1 << 20:
    more = link.recv(65536)
    if not more:
        break
    heard += more
open(sys.argv[2], 'wb').write(heard)
";

fn older_receiver(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = writer(ferry)?;
    let engine = "0.0.9".to_owned();
    let welcome = Welcome { version: version::FRAMES, engine, memory: 1 << 30, streams: 1, kept: 0 };
    let welcome = frame(&ControlMessage::Welcome(welcome))?;
    let heard = ferry.scratch.path().join(ferry.name("heard"));
    let path = heard.display().to_string();
    let command = ["timeout", "40", "python3", "-I", "-c", PEER, &welcome, &path];
    let mut peer = ferry.hosts.exec(Host::Destination, command).spawn()?;
    wait_for("a peer that listens", LIMIT, || {
        let listening = ferry.sh(Host::Destination, "ss -Hltn 'sport = :7077'")?;
        Ok((!listening.is_empty()).then_some(()))
    })?;
    let outcome = ferry.migrate(subject.pid, None, &["--coding", "raw", "--journal", "none"])?;
    ensure!(peer.wait()?.success(), "the peer failed");
    rolled_back(ferry, &subject, &outcome, &["the link to the peer failed"])?;
    ensure!(!outcome.err.contains("is waited for"), "{}", outcome.err);
    let heard = std::fs::read(heard)?;
    let (mut at, mut frames) = (0, 0);
    while let Some(header) = heard.get(at..at + HEADER_BYTES) {
        let number =
            |from: usize| u32::from_le_bytes(std::array::from_fn(|byte| header[from + byte])) as usize;
        let written = u16::from_le_bytes([header[4], header[5]]);
        ensure!(written == version::FRAMES, "frame {frames} is of version {written}");
        at += HEADER_BYTES + number(8) + number(12);
        frames += 1;
    }
    ensure!(frames > 3, "{frames} frames");
    Ok(())
}

fn older_source(ferry: &Ferry) -> anyhow::Result<()> {
    let receiver = ferry.receiver(None, &[])?;
    let hello = frame(&ControlMessage::Hello(Hello {
        versions: Versions { oldest: version::FRAMES, newest: version::FRAMES },
        session: 77,
        engine: "0.0.9".to_owned(),
        program: "program".to_owned(),
        verify: false,
        choices: RestoreChoices::default(),
    }))?;
    // A header, the number of the message, and the version that is spoken.
    let script = format!(
        "python3 -I -c \"import socket; s = socket.create_connection(('10.77.0.2', 7077)); s.settimeout(10); \
         s.sendall(bytes.fromhex('{hello}')); print(s.recv(4096)[:38].hex())\""
    );
    let said = ferry.sh(Host::Source, &script)?;
    let byte = |at: usize| u8::from_str_radix(said.get(2 * at..2 * at + 2).unwrap_or("ff"), 16);
    let fields = [byte(4)?, byte(32)?, byte(36)?, byte(37)?];
    ensure!(fields == [2, 1, 2, 0], "version of the frame, message, version: {fields:?} of {said}");
    let until = Instant::now() + Duration::from_secs(5);
    while !receiver.log().contains("discarded") {
        ensure!(Instant::now() < until, "{}", receiver.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    ensure!(!receiver.log().contains("is waited for"), "{}", receiver.log());
    receiver.stop()
}
