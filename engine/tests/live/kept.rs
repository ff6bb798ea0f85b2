//! Programs that go into a file, and come back from it.

use super::Test;
use super::ferry::{Ferry, Outcome};
use anyhow::{Context, ensure};
use pageferry::MigrationReport;
use pageferry_benches::bench::hosts::Host;
use pageferry_benches::bench::subject::Subject;
use std::fs;
use std::path::{Path, PathBuf};

pub fn tests() -> Vec<(&'static str, Test)> {
    vec![
        ("a program is kept in a file, and restored twice", twice),
        ("a forked tree is kept in a file", tree),
        ("a checkpoint of a program that runs on", runs_on),
        ("checkpoints in a directory", directory),
        ("checkpoints that have what is new", incremental),
        ("a disk that is full under a kept stream", full),
        ("a path that exists is not written over", exists),
        ("a kept stream that fails leaves no file behind", rolled_back),
        ("a damaged stream is refused", damaged),
        ("a stream is read by an independent reader", inspected),
        ("a program that comes back finds what was kept of it", there_and_back),
        ("a kept store that is damaged costs bytes and nothing else", damaged_store),
    ]
}

const WRITER: [&str; 5] = ["writer", "--memory", "24MiB", "--rate", "8MB"];

fn keep(ferry: &Ferry, pid: i32, to: &str, fault: Option<&str>, options: &[&str]) -> anyhow::Result<Outcome> {
    ferry.migrate_from(Host::Source, pid, to, fault, options)?.wait()
}

/// `pageferry restore` in the destination: its exit code, and what it says.
fn restore(ferry: &Ferry, path: &Path, options: &str) -> anyhow::Result<(i32, String)> {
    let command = env!("CARGO_BIN_EXE_pageferry");
    let script = format!("{command} restore {options} {} 2>&1; echo code=$?", path.display());
    let text = ferry.sh(Host::Destination, &script)?;
    let (said, code) = text.rsplit_once("code=").context("no exit code")?;
    Ok((code.trim().parse()?, said.to_owned()))
}

fn restored(ferry: &Ferry, path: &Path, subject: &Subject) -> anyhow::Result<()> {
    let (code, said) = restore(ferry, path, "")?;
    ensure!(code == 0, "exit code {code}: {said}");
    ensure!(said.contains(&format!("as process {}", subject.pid)), "{said}");
    ferry.lives_only(Host::Destination, subject)
}

/// Restores a program whose open file has grown meanwhile: that is refused, and works when the file is as it was.
fn restored_in_the_past(ferry: &Ferry, path: &Path, subject: &Subject) -> anyhow::Result<()> {
    let (code, said) = restore(ferry, path, "")?;
    ensure!(code == 1, "an open file has changed: exit code {code}: {said}");
    let told = said.split("File ").nth(1).and_then(|text| text.split_once(" has bad size "));
    let (file, sizes) = told.with_context(|| said.clone())?;
    let size = sizes.split_once("(expect ").and_then(|(_, rest)| rest.split_once(')'));
    let size = size.with_context(|| said.clone())?.0.parse()?;
    fs::File::options().write(true).open(Path::new("/").join(file))?.set_len(size)?;
    restored(ferry, path, subject)
}

pub(super) fn fresh(ferry: &Ferry, name: &str) -> PathBuf {
    ferry.scratch.path().join(ferry.name(name))
}

fn nothing_but(dir: &Path, wanted: &[&str]) -> anyhow::Result<()> {
    let mut names: Vec<String> = Vec::new();
    for entry in fs::read_dir(dir)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    ensure!(names == wanted, "{names:?} instead of {wanted:?} in {}", dir.display());
    Ok(())
}

fn twice(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&WRITER)?;
    let path = fresh(ferry, "stream");
    let to = format!("file:{}", path.display());
    let outcome = keep(ferry, subject.pid, &to, None, &["--verify", "--downtime", "20ms"])?;
    let report = outcome.moved()?;
    ensure!(report.strategy == "checkpoint" && report.to == to, "{} to {}", report.strategy, report.to);
    ensure!(!report.verified, "nothing was compared yet");
    ensure!(report.destination_pid.is_none() && report.fill.is_none(), "nothing runs anywhere");
    ensure!(ferry.state(Host::Source, subject.pid)?.is_none(), "it still runs at the source");
    let bytes = fs::metadata(&path)?.len();
    ensure!(bytes == report.bytes_sent, "{bytes} bytes in the file, and {} were sent", report.bytes_sent);
    // With `--verify` all of its memory is compared with what it was, each time.
    for time in 0..2 {
        let again = if time == 0 { restored } else { restored_in_the_past };
        again(ferry, &path, &subject).with_context(|| format!("restored, time {time}"))?;
        // The pid is taken: a second copy is refused while the first one lives.
        let (code, said) = restore(ferry, &path, "")?;
        ensure!(code == 1, "a second copy at the same time: exit code {code}: {said}");
        ferry.lives_only(Host::Destination, &subject)?;
        ferry.hosts.kill(Host::Destination, subject.pid)?;
    }
    ensure!(fs::metadata(&path)?.len() == bytes, "a restore changes the file");
    Ok(())
}

fn tree(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["forked", "--memory", "32MiB", "--workers", "3", "--rate", "2MB"])?;
    let path = fresh(ferry, "stream");
    let outcome = keep(ferry, subject.pid, &format!("file:{}", path.display()), None, &["--verify"])?;
    let report = outcome.moved()?;
    ensure!(report.processes == 4, "{} processes", report.processes);
    ensure!(report.bytes_sent < 50 << 20, "{} bytes for 32 MiB, four times", report.bytes_sent);
    restored(ferry, &path, &subject)
}

fn runs_on(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&WRITER)?;
    let path = fresh(ferry, "stream");
    let to = format!("file:{}", path.display());
    let outcome = keep(ferry, subject.pid, &to, None, &["--verify", "--keep-running"])?;
    let report = outcome.moved()?;
    ensure!(report.downtime_us.restore == 0, "it waited for the disk: {:?}", report.downtime_us);
    ferry.lives_only(Host::Source, &subject).context("it should run on")?;
    // Whatever ends the engine once the program was let go, the program runs on.
    for (number, point) in ["let-go", "commit"].into_iter().enumerate() {
        let to = format!("{to}-{number}");
        let outcome = keep(ferry, subject.pid, &to, Some(&format!("{point}=kill")), &["--keep-running"])?;
        ensure!(outcome.code != 0, "{point}: it was to be killed");
        ferry.lives_only(Host::Source, &subject).with_context(|| format!("killed at {point}"))?;
        ensure!(!Path::new(&to["file:".len()..]).exists(), "{point}: an unfinished file has its name");
    }
    let outcome = keep(ferry, subject.pid, &format!("{to}-cut"), Some("commit=cut"), &["--keep-running"])?;
    outcome.failed(1, &["running at the source"])?;
    ferry.lives_only(Host::Source, &subject).context("the link was cut at the commit")?;
    ferry.hosts.kill(Host::Source, subject.pid)?;
    restored_in_the_past(ferry, &path, &subject)
}

fn directory(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&WRITER)?;
    let dir = fresh(ferry, "checkpoints");
    let to = format!("dir:{}", dir.display());
    keep(ferry, subject.pid, &to, None, &["--keep-running"])?.moved()?;
    let (command, pid) = (env!("CARGO_BIN_EXE_pageferry"), subject.pid);
    let checkpoint =
        format!("{command} checkpoint --pid {pid} --to {} --keep-running --quiet", dir.display());
    ferry.sh(Host::Source, &checkpoint)?;
    keep(ferry, subject.pid, &to, Some("frame=cut@9"), &["--keep-running"])?;
    keep(ferry, subject.pid, &to, None, &[])?.moved()?;
    let (one, two, three) = ("000001.pageferry", "000002.pageferry", "000003.pageferry");
    let index = fs::read_to_string(dir.join("index"))?;
    for name in [one, two, three] {
        ensure!(index.contains(&format!("\n{name} ")), "no {name} in the index: {index}");
    }
    nothing_but(&dir, &[one, two, three, "index"])?;
    restored(ferry, &dir, &subject).context("the last one")?;
    ferry.hosts.kill(Host::Destination, subject.pid)?;
    restored_in_the_past(ferry, &dir.join(one), &subject).context("the first one")
}

fn incremental(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "48MiB", "--rate", "2MB", "--every", "16"])?;
    let dir = fresh(ferry, "checkpoints");
    let to = format!("dir:{}", dir.display());
    for _ in 0..2 {
        keep(ferry, subject.pid, &to, None, &["--keep-running", "--incremental"])?.moved()?;
    }
    keep(ferry, subject.pid, &to, None, &["--incremental", "--verify"])?.moved()?;
    let path = |n: u8| dir.join(format!("00000{n}.pageferry"));
    let size = |n: u8| fs::metadata(path(n)).map(|about| about.len());
    ensure!(size(1)? > 48 << 20, "the first one has {} bytes", size(1)?);
    for n in [2, 3] {
        ensure!(size(n)? < 16 << 20, "checkpoint {n} has {} bytes", size(n)?);
    }
    // With `--verify` all of its memory is compared with what it was.
    restored(ferry, &dir, &subject).context("the last one")?;
    ferry.hosts.kill(Host::Destination, subject.pid)?;
    restored_in_the_past(ferry, &path(2), &subject).context("the second one")?;
    ferry.hosts.kill(Host::Destination, subject.pid)?;
    let whole = fs::read(path(1))?;
    let mut damaged = whole.clone();
    damaged[24 << 20] ^= 1;
    for (bytes, says) in [(&damaged[..], "cannot be used"), (&whole[..whole.len() / 2], "cut off")] {
        fs::write(path(1), bytes)?;
        let (code, said) = restore(ferry, &path(3), "")?;
        ensure!(code == 3 && said.contains("000001.pageferry") && said.contains(says), "{code}: {said}");
        ensure!(ferry.state(Host::Destination, subject.pid)?.is_none(), "something of it runs");
    }
    fs::remove_file(path(1))?;
    let (code, said) = restore(ferry, &path(3), "")?;
    ensure!(code == 3 && said.contains("000001.pageferry"), "{code}: {said}");
    fs::write(path(1), &whole)?;
    let script =
        format!("{} inspect {} 2>&1; echo code=$?", env!("CARGO_BIN_EXE_pageferry"), path(3).display());
    let said = ferry.sh(Host::Destination, &script)?;
    ensure!(said.ends_with("code=0"), "when it is there again: {said}");
    Ok(())
}

fn full(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "64MiB", "--rate", "1MB"])?;
    // The command runs in a mount namespace of its own, with a small disk.
    let script = format!(
        "mkdir -p /run/small && mount -t tmpfs -o size=16m none /run/small && \
         {} migrate --pid {} --to file:/run/small/stream 2>&1; echo code=$?; ls -A /run/small; umount /run/small",
        env!("CARGO_BIN_EXE_pageferry"),
        subject.pid
    );
    let text = ferry.sh(Host::Source, &script)?;
    ensure!(text.contains("No space left") && text.contains("running at the source"), "{text}");
    ensure!(text.ends_with("code=1"), "something is left in the directory: {text}");
    ferry.lives_only(Host::Source, &subject)
}

fn exists(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&WRITER)?;
    let path = fresh(ferry, "stream");
    fs::write(&path, "mine")?;
    let outcome = keep(ferry, subject.pid, &format!("file:{}", path.display()), None, &[])?;
    outcome.failed(3, &["exists already", "running at the source", "name another file"])?;
    ensure!(fs::read(&path)? == b"mine", "it was written over");
    let outcome = keep(ferry, subject.pid, "file:/no/such/folder/stream", None, &[])?;
    outcome.failed(3, &["could not write /no/such/folder", "running at the source"])?;
    ferry.lives_only(Host::Source, &subject)
}

fn rolled_back(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&WRITER)?;
    let dir = fresh(ferry, "streams");
    fs::create_dir(&dir)?;
    let to = format!("file:{}", dir.join("stream").display());
    for fault in ["frame=flip@9", "frame=truncate@9", "frame=cut@20", "commit=cut"] {
        let outcome = keep(ferry, subject.pid, &to, Some(fault), &[])?;
        outcome.failed(1, &["running at the source"]).context(fault)?;
        ferry.lives_only(Host::Source, &subject).context(fault)?;
        nothing_but(&dir, &[]).context(fault)?;
    }
    Ok(())
}

/// A stream with pages in many codings, in which a few pages are written again and again.
fn sparse(ferry: &Ferry) -> anyhow::Result<(Subject, PathBuf)> {
    let subject = ferry.subject(&["writer", "--memory", "8MiB", "--rate", "8MB"])?;
    let path = fresh(ferry, "stream");
    let options = ["--verify", "--bandwidth", "6MB", "--downtime", "60ms", "--delta-cache", "8MiB"];
    keep(ferry, subject.pid, &format!("file:{}", path.display()), None, &options)?.moved()?;
    Ok((subject, path))
}

/// `pageferry inspect --json`: its exit code, and what it found.
fn inspect(ferry: &Ferry, path: &Path) -> anyhow::Result<(i32, serde_json::Value)> {
    let script = format!(
        "{} inspect --json {} 2>/dev/null; echo code=$?",
        env!("CARGO_BIN_EXE_pageferry"),
        path.display()
    );
    let text = ferry.sh(Host::Destination, &script)?;
    let (said, code) = text.rsplit_once("code=").context("no exit code")?;
    Ok((code.trim().parse()?, serde_json::from_str(said).context(said.to_owned())?))
}

fn inspected(ferry: &Ferry) -> anyhow::Result<()> {
    let (subject, path) = sparse(ferry)?;
    let whole = fs::read(&path)?;
    let (code, found) = inspect(ferry, &path)?;
    ensure!(code == 0 && found["fault"].is_null(), "{found}");
    let sum = |rows: &serde_json::Value, field: &str| -> u64 {
        rows.as_array().into_iter().flatten().filter_map(|row| row[field].as_u64()).sum()
    };
    // Every byte of the file is in each of the tables that is about it.
    ensure!(found["bytes"].as_u64() == Some(whole.len() as u64), "{found}");
    ensure!(sum(&found["kinds"], "bytes") == whole.len() as u64, "{found}");
    let pages = sum(&found["rounds"], "bytes");
    ensure!(pages > 8 << 20 && sum(&found["codings"], "bytes") == pages, "{found}");
    let spaces = &found["spaces"];
    ensure!(sum(spaces, "bytes") + sum(spaces, "gone_bytes") == pages, "{found}");
    ensure!(sum(&spaces[0]["regions"], "bytes") == sum(spaces, "bytes"), "{found}");
    ensure!(sum(&found["images"], "count") > 5, "{found}");
    // What only a receiver unpacks is found too, by both.
    let frames = frames(&whole);
    let deltas = frames.iter().find(|(at, kind, ..)| *kind == 1 && whole[at + 40] == 2);
    let &(at, _, head, payload) = deltas.context("no frame with deltas")?;
    let mut bytes = whole.clone();
    bytes[at + 32 + head + payload - 1] ^= 1;
    let damaged = fresh(ferry, "damaged");
    fs::write(&damaged, bytes)?;
    let number = frames.iter().position(|frame| frame.0 == at).unwrap_or(0);
    let place = format!("frame {number}, at byte {at}");
    let (code, found) = inspect(ferry, &damaged)?;
    ensure!(code == 1 && found["fault"].as_str().is_some_and(|fault| fault.contains(&place)), "{found}");
    ensure!(found["frames"].as_u64() == Some(number as u64), "{found}");
    let (code, said) = restore(ferry, &damaged, "")?;
    ensure!(code == 1 && said.contains(&place), "{place}: exit code {code}: {said}");
    restored(ferry, &path, &subject)
}

/// A program that has moved to the destination, and the stores that both sides have kept of it: here and there.
fn moved_with_stores(ferry: &Ferry) -> anyhow::Result<(Subject, MigrationReport, [PathBuf; 2])> {
    let subject = ferry.subject(&["writer", "--memory", "48MiB", "--rate", "50KB"])?;
    let stores = [fresh(ferry, "store"), fresh(ferry, "store")];
    let [here, there] = stores.each_ref().map(|store| store.display().to_string());
    let receiver = ferry.receiver(None, &["--once", "--keep-store", &there])?;
    let outcome = ferry.migrate(subject.pid, None, &["--verify", "--keep-store", &here])?;
    let report = outcome.moved()?.clone();
    ensure!(report.kept_pages == 0 && report.bytes_sent > 48 << 20, "{} bytes", report.bytes_sent);
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    ferry.lives_only(Host::Destination, &subject)?;
    Ok((subject, report, stores))
}

/// Moves the program back to the source, whose store is `here`.
pub(super) fn back(
    ferry: &Ferry,
    subject: &Subject,
    here: &Path,
    options: &[&str],
) -> anyhow::Result<MigrationReport> {
    const HERE: &str = "10.77.0.1:7077";
    let store = here.display().to_string();
    let receiver = ferry.receiver_in(Host::Source, HERE, None, &["--once", "--keep-store", &store])?;
    let options = [&["--verify"], options].concat();
    let outcome = ferry.migrate_from(Host::Destination, subject.pid, HERE, None, &options)?.wait()?;
    let report = outcome.moved()?.clone();
    ensure!(report.verified, "not verified");
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    ferry.lives_only(Host::Source, subject)?;
    Ok(report)
}

fn there_and_back(ferry: &Ferry) -> anyhow::Result<()> {
    let (subject, first, [here, there]) = moved_with_stores(ferry)?;
    let store = there.display().to_string();
    let second = back(ferry, &subject, &here, &["--keep-store", &store])?;
    ensure!(second.kept_pages > 12_000, "{} pages were offered", second.kept_pages);
    ensure!(second.repeated_pages == 0, "{} pages were asked for again", second.repeated_pages);
    let (there_bytes, back_bytes) = (first.bytes_sent, second.bytes_sent);
    ensure!(back_bytes * 10 < there_bytes, "{back_bytes} bytes back after {there_bytes} there");
    // And there again, from what was kept when it left.
    let receiver = ferry.receiver(None, &["--once", "--keep-store", &store])?;
    let outcome = ferry.migrate(subject.pid, None, &["--verify"])?;
    let third = outcome.moved()?;
    ensure!(third.bytes_sent * 10 < there_bytes, "{} bytes there again", third.bytes_sent);
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    ferry.lives_only(Host::Destination, &subject)
}

fn damaged_store(ferry: &Ferry) -> anyhow::Result<()> {
    let (subject, first, [here, _]) = moved_with_stores(ferry)?;
    // A byte of every second page.
    let pages = here.join("pages-1");
    let mut bytes = fs::read(&pages)?;
    bytes.chunks_mut(8192).for_each(|two| two[77] ^= 1);
    fs::write(&pages, &bytes)?;
    let second = back(ferry, &subject, &here, &[])?;
    ensure!(second.kept_pages > 12_000, "{} pages were offered", second.kept_pages);
    ensure!(second.repeated_pages > 5_000, "{} pages were asked for again", second.repeated_pages);
    let half = first.bytes_sent / 2;
    ensure!((half / 2..half * 3 / 2).contains(&second.bytes_sent), "{} bytes", second.bytes_sent);
    ferry.hosts.kill(Host::Source, subject.pid)?;
    // An index that is damaged offers nothing.
    let (subject, first, [here, _]) = moved_with_stores(ferry)?;
    let mut bytes = fs::read(here.join("index"))?;
    bytes[1000] ^= 1;
    fs::write(here.join("index"), &bytes)?;
    let second = back(ferry, &subject, &here, &[])?;
    ensure!(second.kept_pages == 0, "{} pages were offered", second.kept_pages);
    ensure!(second.bytes_sent * 2 > first.bytes_sent, "{} bytes", second.bytes_sent);
    // It was written anew.
    ensure!(fs::read(here.join("index"))?.len() > 16 * 12_000, "the store was not made anew");
    Ok(())
}

/// Where each frame of a stream begins, with its kind and the lengths of head and payload.
fn frames(stream: &[u8]) -> Vec<(usize, u16, usize, usize)> {
    let (mut frames, mut at) = (Vec::new(), 0);
    while at + 32 <= stream.len() {
        let number = |from: usize| u32::from_le_bytes(stream[from..from + 4].try_into().expect("four"));
        let kind = u16::from_le_bytes([stream[at + 6], stream[at + 7]]);
        let (head, payload) = (number(at + 8) as usize, number(at + 12) as usize);
        frames.push((at, kind, head, payload));
        at += 32 + head + payload;
    }
    frames
}

fn damaged(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&WRITER)?;
    let path = fresh(ferry, "stream");
    keep(ferry, subject.pid, &format!("file:{}", path.display()), None, &[])?.moved()?;
    let whole = fs::read(&path)?;
    let frames = frames(&whole);
    let last = frames.last().context("frames")?.0;
    let (pages, _, pages_head, _) =
        *frames.iter().skip(4).find(|frame| frame.1 == 1 && frame.3 > 0).context("a frame with pages")?;
    let (image, _, image_head, _) =
        *frames.iter().find(|frame| frame.1 == 2 && frame.3 > 0).context("an image")?;
    let number = |at: usize| frames.iter().position(|frame| frame.0 == at).unwrap_or(0);
    let at = |offset: usize| format!("frame {}, at byte {offset}", number(offset));
    let of = |offset: usize| format!("frame {} (page batch), at byte {offset}", number(offset));
    let flipped = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x20;
        bytes
    };
    let swapped = {
        let (one, two) = (frames[5], frames[6]);
        let end = two.0 + 32 + two.2 + two.3;
        [&whole[..one.0], &whole[two.0..end], &whole[one.0..two.0], &whole[end..]].concat()
    };
    let newer = {
        let mut bytes = whole.clone();
        bytes[4] = 77;
        bytes
    };
    let cases: Vec<(&str, Vec<u8>, i32, String)> = vec![
        ("empty", Vec::new(), 3, "the stream is empty".to_owned()),
        (
            "something else",
            b"#!/bin/sh\necho this is not a stream\n".to_vec(),
            3,
            "frame 0, at byte 0".to_owned(),
        ),
        ("a newer version", newer, 3, "protocol version 77".to_owned()),
        ("cut in a frame", whole[..pages + 40].to_vec(), 3, at(pages)),
        ("cut between frames", whole[..last].to_vec(), 3, format!("ends after {last} bytes")),
        ("cut in the last frame", whole[..whole.len() - 1].to_vec(), 3, at(last)),
        ("something after the end", [&whole[..], b"x"].concat(), 3, format!("at byte {}", whole.len())),
        ("a head", flipped(pages + 40), 3, of(pages)),
        ("two frames swapped", swapped, 3, "one was lost or repeated".to_owned()),
        (
            "a frame lost",
            [&whole[..frames[5].0], &whole[frames[6].0..]].concat(),
            3,
            "one was lost".to_owned(),
        ),
        ("a page", flipped(pages + 32 + pages_head + 100), 1, at(pages)),
        ("an image", flipped(image + 32 + image_head), 1, at(image)),
    ];
    for (what, bytes, code, says) in cases {
        let path = fresh(ferry, "damaged");
        fs::write(&path, bytes)?;
        let (got, said) = restore(ferry, &path, "")?;
        ensure!(got == code && said.contains(&says), "{what}: {code} and {says:?} instead of {got}: {said}");
        ensure!(ferry.state(Host::Destination, subject.pid)?.is_none(), "{what}: something runs");
        ferry.nothing_is_left().context(what)?;
    }
    restored(ferry, &path, &subject).context("the file that was not damaged")
}
