//! CRIU's images on their way: packed where that is quicker and the peer can read it.

use super::Test;
use super::ferry::{Ferry, Ignored};
use anyhow::{Context, ensure};
use pageferry::MigrationReport;
use pageferry_benches::bench::hosts::Host;
use pageferry_wire_format::version::Versions;
use pageferry_wire_format::{ControlMessage, Decoder, HEADER_BYTES, Head, PageBatch, Sequencer, version};
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Child, Stdio};

pub fn tests() -> Vec<(&'static str, Test)> {
    vec![
        ("images: those of redis are packed over a slow link, known or not", slow_link),
        ("images: memory that only they can carry comes whole, packed and not", shared_memory),
        ("images: a peer of version 4 gets them as they are", older_peers),
        ("images: as they are, or packed, into a file", in_a_file),
    ]
}

/// What the files shrink to on the wire.
fn ratio(report: &MigrationReport) -> f64 {
    report.image_bytes as f64 / report.image_file_bytes as f64
}

/// A slower link for what the source sends, until it is dropped.
struct Slow<'a> {
    ferry: &'a Ferry,
    device: String,
}

impl<'a> Slow<'a> {
    fn take(ferry: &'a Ferry, rate: &str) -> anyhow::Result<Self> {
        let list = "ip -o link show type veth | sed 's/^[0-9]*: //; s/[@:].*//'";
        let device = ferry.sh(Host::Source, list)?;
        let add = format!("tc qdisc add dev {device} root tbf rate {rate} burst 64kb latency 50ms; echo $?");
        let code = ferry.sh(Host::Source, &add)?;
        ensure!(code == "0", "tc ends with {code}");
        Ok(Self { ferry, device })
    }
}

impl Drop for Slow<'_> {
    fn drop(&mut self) {
        let _ = self.ferry.sh(Host::Source, &format!("tc qdisc del dev {} root", self.device));
    }
}

/// A server with a megabyte of pages that the dynamic linker has changed.
fn slow_link(ferry: &Ferry) -> anyhow::Result<()> {
    if !Path::new("/usr/bin/redis-server").exists() {
        return Err(Ignored("no redis-server here".to_owned()).into());
    }
    let workload = pageferry_benches::bench::workload()?;
    let workload = workload.to_str().context("a path of text")?;
    for (strategy, options, most) in [
        ("pre-copy", &[][..], 0.4),
        ("post-copy", &[], 0.4),
        ("pre-copy", &["--coding", "raw"], f64::INFINITY),
    ] {
        let server = ["redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", ""];
        let server = ferry.program(&server)?;
        let keys = |what: &str, host: &str| {
            let address = format!("{host}:6379");
            let command = [workload, what, "--address", &address, "--bytes", "8MiB"];
            let output = ferry.hosts.exec(Host::Client, command).output()?;
            ensure!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
            Ok(())
        };
        keys("redis-fill", "10.77.0.1")?;
        let receiver = ferry.receiver(None, &["--once"])?;
        let slow = Slow::take(ferry, "100mbit")?;
        let usual = ["--verify", "--tcp", "close", "--strategy", strategy];
        let outcome = ferry.migrate(server, None, &[&usual[..], options].concat())?;
        let report = outcome.moved()?;
        drop(slow);
        let ratio = ratio(report);
        ensure!(report.image_file_bytes > 500_000, "{} bytes of images", report.image_file_bytes);
        ensure!(ratio < most, "{ratio} of the images' bytes, {strategy} {options:?}");
        ensure!(options.is_empty() || ratio >= 1.0, "{ratio} of the images' bytes, as they are");
        keys("redis-verify", "10.77.0.2").with_context(|| format!("{strategy} {options:?}"))?;
        ensure!(receiver.wait()? == 0, "the receiver's exit code");
        ferry.hosts.kill(Host::Destination, server)?;
    }
    Ok(())
}

/// Half of it is the same page again and again, and half of it noise; it says a digest of it when it is told to.
const SHARED: &str = r"
import hashlib, mmap, os, signal
memory = mmap.mmap(-1, 48 << 20)
for at in range(0, 24 << 20, 4096): memory[at:at + 4096] = b'page' * 1024
for at in range(24 << 20, 48 << 20, 1 << 20): memory[at:at + (1 << 20)] = os.urandom(1 << 20)
def say(*_):
    open('/dev/shm/digest.new', 'w').write(hashlib.sha256(memory).hexdigest())
    os.rename('/dev/shm/digest.new', '/dev/shm/digest')
signal.signal(signal.SIGUSR1, say)
print('ready', flush=True)
while True: signal.pause()
";

fn shared_memory(ferry: &Ferry) -> anyhow::Result<()> {
    let digest = |host, pid: i32| {
        let script = format!(
            "rm -f /dev/shm/digest; kill -s USR1 {pid}; for n in $(seq 400); do \
             cat /dev/shm/digest 2>/dev/null && break; sleep 0.05; done; rm -f /dev/shm/digest"
        );
        let digest = ferry.sh(host, &script)?;
        ensure!(digest.len() == 64, "{digest:?} is no digest");
        Ok(digest)
    };
    for (rate, coding) in [(Some("1gbit"), "auto"), (None, "auto"), (None, "zstd")] {
        let pid = ferry.python(SHARED, 1)?;
        let before = digest(Host::Source, pid)?;
        let receiver = ferry.receiver(None, &["--once"])?;
        let slow = rate.map(|rate| Slow::take(ferry, rate)).transpose()?;
        let outcome = ferry.migrate(pid, None, &["--verify", "--coding", coding])?;
        let report = outcome.moved()?;
        drop(slow);
        ensure!(report.image_file_bytes > 48 << 20, "{} bytes of images", report.image_file_bytes);
        let ratio = ratio(report);
        // Half of it is noise, which goes as it is. How quick an unshaped link is nobody knows.
        let packs = rate.is_some() || coding == "zstd";
        ensure!(ratio < if packs { 0.6 } else { 1.01 }, "{ratio} of the images' bytes, {rate:?} {coding}");
        ensure!(digest(Host::Destination, pid)? == before, "its memory is another one, {rate:?} {coding}");
        ensure!(receiver.wait()? == 0, "the receiver's exit code");
        ferry.hosts.kill(Host::Destination, pid)?;
    }
    Ok(())
}

/// One end of a relay: a connection, to `listen` for or to `connect`, over its standard input and output.
const RELAY: &str = r"
import os, socket, sys, threading
what, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
if what == 'listen':
    server = socket.create_server((host, port))
    server.settimeout(60)
    link = server.accept()[0]
else:
    link = socket.create_connection((host, port), 60)
link.settimeout(None)
def hear():
    with os.fdopen(1, 'wb', 0) as out:
        while data := link.recv(65536): out.write(data)
    os._exit(0)
threading.Thread(target=hear).start()
while data := os.read(0, 65536): link.sendall(data)
link.shutdown(socket.SHUT_WR)
";

fn relay(ferry: &Ferry, host: Host, arguments: [&str; 3]) -> anyhow::Result<Child> {
    let command = [&["timeout", "90", "python3", "-I", "-u", "-c", RELAY][..], &arguments].concat();
    let mut command = ferry.hosts.exec(host, command);
    Ok(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?)
}

/// Says what a source says as one would that speaks no more than `newest`. Gives the number of packed pieces, and of others.
fn translate(from: &mut impl Read, to: &mut impl Write, newest: u16) -> anyhow::Result<(u32, u32)> {
    let (mut decoder, mut batch, mut at) = (Decoder::default(), PageBatch::default(), Sequencer::default());
    let mut pieces = (0, 0);
    loop {
        let mut raw = [0; HEADER_BYTES];
        match from.read_exact(&mut raw) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(pieces),
            read => read?,
        }
        let announced = decoder.header(&raw)?;
        let mut head = vec![0; announced.head_len()];
        from.read_exact(&mut head)?;
        let (mut frame, mut payload) = (Vec::new(), 0);
        match decoder.head(&announced, &head, &mut batch)? {
            Head::Pages { payload_len } => {
                payload = payload_len;
                batch.encode(payload, &mut at, &mut frame)
            }
            Head::Image { chunk, payload_len } => {
                payload = payload_len;
                *(if chunk.unpacked.is_some() { &mut pieces.0 } else { &mut pieces.1 }) += 1;
                chunk.encode(payload, &mut at, &mut frame)
            }
            Head::Digests(list) => list.encode(&mut at, &mut frame),
            Head::Owned(list) => list.encode(&mut at, &mut frame),
            Head::Owed(list) => list.encode(&mut at, &mut frame),
            Head::Control(ControlMessage::Hello(mut hello)) => {
                hello.versions = Versions { newest, ..hello.versions };
                ControlMessage::Hello(hello).encode(&mut at, &mut frame)
            }
            Head::Control(message) => message.encode(&mut at, &mut frame),
        }?;
        let written = u16::from_le_bytes([frame[4], frame[5]]);
        ensure!(written <= newest, "a frame of version {written} to a peer of version {newest}");
        to.write_all(&frame)?;
        io::copy(&mut from.take(payload as u64), to)?;
        to.flush()?;
    }
}

/// Between two engines of this version, so that each has a peer of version 4: the whole of it, to the program that runs.
fn older_peers(ferry: &Ferry) -> anyhow::Result<()> {
    for newest in [4, version::CURRENT] {
        let subject = ferry.subject(&["writer", "--memory", "16MiB", "--rate", "2MB"])?;
        let receiver = ferry.receiver(None, &["--once"])?;
        let mut source = relay(ferry, Host::Source, ["listen", "10.77.0.1", "7079"])?;
        let mut destination = relay(ferry, Host::Destination, ["connect", "10.77.0.2", "7077"])?;
        let listens =
            "for n in $(seq 400); do ss -ltn | grep -q :7079 && echo yes && break; sleep 0.05; done";
        ensure!(ferry.sh(Host::Source, listens)? == "yes", "the relay does not listen");
        let options = ["--verify", "--coding", "zstd", "--streams", "1"];
        let migration = ferry.migrate_from(Host::Source, subject.pid, "10.77.0.1:7079", None, &options)?;
        let mut said = source.stdout.take().context("a pipe")?;
        let mut to = destination.stdin.take().context("a pipe")?;
        let mut answered = destination.stdout.take().context("a pipe")?;
        let mut back = source.stdin.take().context("a pipe")?;
        let answers = std::thread::spawn(move || io::copy(&mut answered, &mut back).map(drop));
        let sayings = std::thread::spawn(move || translate(&mut said, &mut to, newest));
        let outcome = migration.wait()?;
        let report = outcome.moved()?;
        ferry.lives_only(Host::Destination, &subject)?;
        ensure!(receiver.wait()? == 0, "the receiver's exit code");
        let (packed, plain) = sayings.join().map_err(|_| anyhow::anyhow!("the relay panicked"))??;
        // Its source may be gone before the last answers.
        drop(answers.join());
        source.wait()?;
        destination.wait()?;
        let ratio = ratio(report);
        match newest {
            version::CURRENT => ensure!(packed > 0 && ratio < 0.9, "{packed} packed, {plain} not, {ratio}"),
            _ => ensure!(packed == 0 && plain > 5 && ratio > 1.0, "{packed} packed, {plain} not, {ratio}"),
        }
        ferry.hosts.kill(Host::Destination, subject.pid)?;
    }
    Ok(())
}

fn in_a_file(ferry: &Ferry) -> anyhow::Result<()> {
    for coding in ["raw", "zstd"] {
        let subject = ferry.subject(&["writer", "--memory", "16MiB", "--rate", "2MB"])?;
        let path = ferry.scratch.path().join(ferry.name("stream"));
        let to = format!("file:{}", path.display());
        let options = ["--verify", "--coding", coding];
        let outcome = ferry.migrate_from(Host::Source, subject.pid, &to, None, &options)?.wait()?;
        let ratio = ratio(outcome.moved()?);
        ensure!(if coding == "raw" { ratio > 1.0 } else { ratio < 0.9 }, "{ratio} by {coding}");
        let command = env!("CARGO_BIN_EXE_pageferry");
        let run = |what: &str| -> anyhow::Result<()> {
            let script = format!("{command} {what} {} 2>&1; echo code=$?", path.display());
            let said = ferry.sh(Host::Destination, &script)?;
            ensure!(said.ends_with("code=0"), "{what}, {coding}: {said}");
            Ok(())
        };
        run("inspect")?;
        run("restore")?;
        ferry.lives_only(Host::Destination, &subject).context(coding)?;
        ferry.hosts.kill(Host::Destination, subject.pid)?;
    }
    Ok(())
}
