//! `pageferry track` on real programs: what it says is true, and the program never notices.

use super::Test;
use super::ferry::{Ferry, LIMIT};
use anyhow::{Context, ensure};
use pageferry_benches::bench::child::wait_for;
use pageferry_benches::bench::hosts::Host;
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

pub fn tests() -> Vec<(&'static str, Test)> {
    vec![
        ("track: what a writer writes", writer),
        ("track: a command from its first page", command),
        ("track: memory that processes share, once", shared),
        ("track: a recording says the same as the run", recording),
        ("track: pictures of a recording", pictures),
        ("track: interrupted, the recording is whole and the program untouched", interrupted),
        ("track: killed, the recording is readable and the program untouched", killed),
        ("track: a program that ends", ends),
        ("track: a full disk", full_disk),
        ("track: contents that do not change", contents),
        ("track: nobody reads any more", unread),
        ("track: what cannot be tracked", refused),
    ]
}

fn pageferry() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry"));
    command.stdin(Stdio::null());
    command
}

/// The JSON lines of a run that went well.
fn lines(output: &Output) -> anyhow::Result<Vec<Value>> {
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{}: {text}{}", output.status, String::from_utf8_lossy(&output.stderr));
    text.lines().map(|line| serde_json::from_str(line).with_context(|| format!("{line:?}"))).collect()
}

fn number(value: &Value, field: &str) -> anyhow::Result<f64> {
    value[field].as_f64().with_context(|| format!("no number {field} in {value}"))
}

/// Runs `pageferry track` where the subject lives.
fn track_in(ferry: &Ferry, arguments: &[&str]) -> anyhow::Result<Output> {
    let mut all = vec![env!("CARGO_BIN_EXE_pageferry"), "track"];
    all.extend(arguments);
    Ok(ferry.hosts.exec(Host::Source, all).stdin(Stdio::null()).output()?)
}

fn writer(ferry: &Ferry) -> anyhow::Result<()> {
    // 500 pages a second, in turn over 4096: none twice within two seconds.
    let subject = ferry.subject(&["writer", "--memory", "16MiB", "--rate", "2MB"])?;
    let pid = subject.pid.to_string();
    let arguments = ["--pid", &pid, "--interval", "100ms", "--duration", "2100ms", "--json"];
    let lines = lines(&track_in(ferry, &arguments)?)?;
    ensure!(lines[0]["event"] == "tracking" && lines[0]["pid"] == subject.pid, "{}", lines[0]);
    let scans: Vec<&Value> = lines.iter().filter(|line| line["event"] == "scan").collect();
    ensure!(scans.len() >= 15, "{} scans in two seconds", scans.len());
    ensure!(number(scans[0], "dirty_pages")? == 0.0, "the base was counted: {}", scans[0]);
    ensure!(number(scans[0], "populated_pages")? >= 4096.0, "{}", scans[0]);
    ensure!(scans.iter().all(|scan| scan["pause_us"] == 0), "it stood still");
    let summary = lines.last().context("no summary")?;
    let rate = number(summary, "dirty_pages_per_second")?;
    ensure!((350.0..700.0).contains(&rate), "2 MB/s are 488 pages a second, and it says {rate}");
    let curve = summary["working_set"].as_array().context("no curve")?;
    let pages: Vec<f64> = curve.iter().map(|point| number(point, "pages")).collect::<Result<_, _>>()?;
    ensure!(pages.len() >= 3 && pages.windows(2).all(|pair| pair[0] <= pair[1] + 1e-6), "{pages:?}");
    ensure!(summary["regions"][0]["kind"] == "anonymous", "{}", summary["regions"]);
    ferry.lives_only(Host::Source, &subject)
}

fn command(_: &Ferry) -> anyhow::Result<()> {
    let script = "import sys,time\nkept=[]\nfor i in range(10):\n  kept.append(bytearray(1<<20))\n  time.sleep(0.1)\nprint('done')\nsys.exit(7)";
    let output = pageferry()
        .args(["track", "--interval", "50ms", "--csv", "/dev/null", "--", "python3", "-I", "-c", script])
        .output()?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.code() == Some(7), "{}: {err}", output.status);
    ensure!(out == "done\n", "its output is its own: {out:?}");
    ensure!(err.contains("ended with exit code 7") && err.contains("written in all"), "{err}");
    let output = pageferry().args(["track", "--", "no-such-program-anywhere"]).output()?;
    ensure!(output.status.code() == Some(3), "{}", output.status);
    ensure!(String::from_utf8_lossy(&output.stderr).contains("was not found"), "a misspelt command");
    Ok(())
}

/// 8 MiB that three processes share; two of them write all of it, ten times a second.
const SHARERS: &str = "
import mmap, os, time
m = mmap.mmap(-1, 8 << 20)
for page in range(2048): m[page * 4096] = 1
for child in range(2):
  if os.fork() == 0:
    turn = 0
    while True:
      turn = (turn + 1) % 256
      for page in range(2048): m[page * 4096 + 8 + child] = turn
      if turn == 1: print('ready', flush=True)
      time.sleep(0.1)
time.sleep(1000)
";

fn shared(ferry: &Ferry) -> anyhow::Result<()> {
    let pid = ferry.python(SHARERS, 2)?.to_string();
    let path = ferry.scratch.path().join(ferry.name("recording"));
    let path = path.to_str().context("text")?;
    let basic = ["--pid", &pid, "--interval", "200ms", "--duration", "1500ms", "--json"];
    let all = lines(&track_in(ferry, &[&basic[..], &["--contents", "--record", path]].concat())?)?;
    ensure!(all[0]["scope"] == "all", "all memory by default: {}", all[0]);
    let scans: Vec<&Value> = all.iter().filter(|line| line["event"] == "scan").collect();
    ensure!(scans.len() >= 3, "{} scans", scans.len());
    ensure!(number(scans[0], "shared_dirty_pages")? == 0.0, "the base was counted: {}", scans[0]);
    for scan in &scans {
        ensure!(number(scan, "processes")? == 3.0, "{scan}");
        // Python itself maps no other shared memory that can be written.
        ensure!(number(scan, "shared_populated_pages")? == 2048.0, "counted once: {scan}");
        ensure!(number(scan, "shared_dirty_pages")? <= number(scan, "dirty_pages")?, "{scan}");
        ensure!(number(scan, "shared_dirty_pages")? <= 2048.0, "{scan}");
    }
    let written: Vec<f64> =
        scans[1..].iter().map(|scan| number(scan, "shared_dirty_pages")).collect::<Result<_, _>>()?;
    ensure!(written.iter().filter(|pages| **pages == 2048.0).count() * 2 > written.len(), "{written:?}");
    let summary = all.last().context("a summary")?;
    let regions = summary["regions"].as_array().context("regions")?;
    let objects: Vec<&Value> = regions.iter().filter(|region| region["pid"].is_null()).collect();
    ensure!(objects.len() == 1 && objects[0]["processes"] == 3, "{objects:?}");
    ensure!(objects[0]["kind"] == "shared" && number(objects[0], "written_pages")? == 2048.0, "{objects:?}");
    let replayed = lines(&pageferry().args(["track", "--json", "--replay", path]).output()?)?;
    let scans_of = |lines: &[Value]| -> Vec<Value> {
        lines.iter().filter(|line| line["event"] == "scan").cloned().collect()
    };
    ensure!(scans_of(&all) == scans_of(&replayed), "the recording says something else");
    ensure!(replayed.last().context("a summary")?["regions"] == summary["regions"], "{replayed:?}");
    let lazy = lines(&track_in(ferry, &[&basic[..], &["--scope", "lazy"]].concat())?)?;
    ensure!(lazy[0]["scope"] == "lazy", "{}", lazy[0]);
    for scan in lazy.iter().filter(|line| line["event"] == "scan") {
        ensure!(number(scan, "shared_populated_pages")? == 0.0, "{scan}");
        ensure!(number(scan, "dirty_pages")? < 1000.0, "what is shared was counted: {scan}");
    }
    Ok(())
}

/// A recording of a writer, and the JSON lines of the run.
fn record(ferry: &Ferry, path: &Path) -> anyhow::Result<Vec<Value>> {
    let subject = ferry.subject(&["writer", "--memory", "8MiB", "--rate", "4MB"])?;
    let (pid, path) = (subject.pid.to_string(), path.to_str().context("text")?);
    let arguments = ["--pid", &pid, "--interval", "50ms", "--duration", "1500ms", "--json", "--record", path];
    lines(&track_in(ferry, &arguments)?)
}

fn recording(ferry: &Ferry) -> anyhow::Result<()> {
    let path = ferry.scratch.path().join(ferry.name("recording"));
    let told = record(ferry, &path)?;
    let output = pageferry().args(["track", "--json", "--replay"]).arg(&path).output()?;
    let replayed = lines(&output)?;
    let scans =
        |lines: &[Value]| lines.iter().filter(|line| line["event"] == "scan").cloned().collect::<Vec<_>>();
    ensure!(scans(&told) == scans(&replayed), "the scans differ");
    let (summary, again) = (told.last().context("a summary")?, replayed.last().context("a summary")?);
    for field in ["scans", "duration_us", "dirty_pages_per_second", "written_pages", "working_set", "regions"]
    {
        ensure!(summary[field] == again[field], "{field}: {} and {}", summary[field], again[field]);
    }
    // A recording is never written over.
    let output = pageferry().args(["track", "--pid", "1", "--record"]).arg(&path).output()?;
    ensure!(output.status.code() == Some(3), "{}", output.status);
    // Cut in the middle it is readable to its last whole scan; damaged it is refused.
    let bytes = std::fs::read(&path)?;
    let cut = ferry.scratch.path().join(ferry.name("cut"));
    std::fs::write(&cut, &bytes[..bytes.len() / 2])?;
    let output = pageferry().args(["track", "--json", "--replay"]).arg(&cut).output()?;
    let part = lines(&output)?;
    ensure!(part.len() > 3 && part.len() < replayed.len(), "{} of {} lines", part.len(), replayed.len());
    ensure!(
        part.last().is_some_and(|last| last["end"].as_str().unwrap_or("").contains("cut off")),
        "{part:?}"
    );
    let mut damaged = bytes.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 0x20;
    std::fs::write(&cut, &damaged)?;
    let output = pageferry().args(["track", "--replay"]).arg(&cut).output()?;
    ensure!(output.status.code() == Some(3), "{}: a damaged recording", output.status);
    Ok(())
}

fn pictures(ferry: &Ferry) -> anyhow::Result<()> {
    let path = ferry.scratch.path().join(ferry.name("recording"));
    record(ferry, &path)?;
    for (name, head) in [("out.svg", &b"<svg "[..]), ("out.png", b"\x89PNG\r\n\x1a\n")] {
        let picture = ferry.scratch.path().join(name);
        let output =
            pageferry().args(["track", "-q", "--replay"]).arg(&path).arg("--plot").arg(&picture).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let bytes = std::fs::read(&picture)?;
        ensure!(bytes.starts_with(head) && bytes.len() > 5_000, "{name} is no picture");
        if name == "out.svg" {
            let text = String::from_utf8(bytes)?;
            ensure!(
                text.contains("WWS") && text.trim_end().ends_with("</svg>"),
                "the picture is not complete"
            );
        }
    }
    let output = pageferry().args(["track", "--replay"]).arg(&path).args(["--plot", "out.gif"]).output()?;
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(3) && err.contains(".svg or .png"), "{err}");
    Ok(())
}

fn interrupted(ferry: &Ferry) -> anyhow::Result<()> {
    for (signal, code) in [(nix::sys::signal::Signal::SIGINT, 130), (nix::sys::signal::Signal::SIGTERM, 143)]
    {
        let (output, path, subject) = stopped_by(ferry, signal)?;
        ensure!(output.status.code() == Some(code), "{}", output.status);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(text.contains("interrupted") && text.contains("dirty rate"), "{text}");
        let replayed = lines(&pageferry().args(["track", "--json", "--replay"]).arg(&path).output()?)?;
        let end = replayed.last().context("a summary")?["end"].to_string();
        ensure!(!end.contains("cut off"), "{end}");
        ferry.lives_only(Host::Source, &subject)?;
    }
    Ok(())
}

fn killed(ferry: &Ferry) -> anyhow::Result<()> {
    let (_, path, subject) = stopped_by(ferry, nix::sys::signal::Signal::SIGKILL)?;
    let replayed = lines(&pageferry().args(["track", "--json", "--replay"]).arg(&path).output()?)?;
    ensure!(replayed.len() > 5, "{} lines were recorded", replayed.len());
    // Nothing of the tracker is left in it: no descriptor, no registration.
    let pid = subject.pid;
    let left = ferry.sh(
        Host::Source,
        &format!("ls -l /proc/{pid}/fd | grep -c userfaultfd; grep -c ' uw' /proc/{pid}/smaps"),
    )?;
    ensure!(left == "0\n0", "left behind (descriptors, registrations): {left:?}");
    ferry.lives_only(Host::Source, &subject)
}

/// Runs `track --record`, and sends it a signal in the middle.
fn stopped_by(
    ferry: &Ferry,
    signal: nix::sys::signal::Signal,
) -> anyhow::Result<(Output, std::path::PathBuf, pageferry_benches::bench::subject::Subject)> {
    let subject = ferry.subject(&["writer", "--memory", "8MiB", "--rate", "4MB"])?;
    let path = ferry.scratch.path().join(ferry.name("recording"));
    let child = ferry
        .hosts
        .exec(
            Host::Source,
            [
                env!("CARGO_BIN_EXE_pageferry"),
                "track",
                "--pid",
                &subject.pid.to_string(),
                "--interval",
                "20ms",
                "--record",
                path.to_str().context("text")?,
            ],
        )
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    wait_for("a recording of ten scans", LIMIT, || {
        let replayed = pageferry().args(["track", "--json", "--replay"]).arg(&path).output()?;
        Ok((replayed.stdout.iter().filter(|byte| **byte == b'\n').count() > 10).then_some(()))
    })?;
    let tracker = ferry.sh(Host::Source, "pidof -s pageferry")?;
    ferry.sh(Host::Source, &format!("kill -{} {tracker}", signal as i32))?;
    Ok((child.wait_with_output()?, path, subject))
}

fn ends(ferry: &Ferry) -> anyhow::Result<()> {
    let pid = ferry.program(&["sleep", "1"])?.to_string();
    let output = track_in(ferry, &["--pid", &pid, "--interval", "100ms"])?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success() && text.contains("the program has ended"), "{}: {text}", output.status);
    Ok(())
}

fn full_disk(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "16MiB", "--rate", "40MB"])?;
    let folder = ferry.scratch.path().join(ferry.name("small"));
    std::fs::create_dir(&folder)?;
    let folder = folder.to_str().context("text")?;
    let pid = subject.pid;
    let command = env!("CARGO_BIN_EXE_pageferry");
    let text = ferry.sh(
        Host::Source,
        &format!(
            "mount -t tmpfs -o size=16k none {folder} && \
             {{ {command} track --pid {pid} --interval 10ms --duration 20s --record {folder}/full -q 2>&1; echo code=$?; \
             {command} track --json --replay {folder}/full | tail -1; umount {folder}; }}"
        ),
    )?;
    ensure!(text.contains("code=3") && text.contains("No space left"), "{text}");
    ensure!(text.contains("cut off"), "what had fitted is not readable: {text}");
    ferry.lives_only(Host::Source, &subject)
}

fn unread(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "4MiB", "--rate", "2MB"])?;
    let (pid, command) = (subject.pid, env!("CARGO_BIN_EXE_pageferry"));
    let path = ferry.scratch.path().join(ferry.name("recording"));
    for form in ["--json", "--csv -", ""] {
        let _ = std::fs::remove_file(&path);
        let start = Instant::now();
        let track = format!("{command} track --pid {pid} --interval 20ms {form} --record {}", path.display());
        let text = ferry.sh(Host::Source, &format!("timeout 20 {track} 2>/dev/null | head -n 3"))?;
        ensure!(start.elapsed() < Duration::from_secs(15), "{form:?}: it ran on for nobody");
        ensure!(text.lines().count() == 3, "{form:?}: {text}");
        let replayed = lines(&pageferry().args(["track", "--json", "--replay"]).arg(&path).output()?)?;
        let end = replayed.last().context("a summary")?["end"].to_string();
        ensure!(!end.contains("cut off"), "{form:?}: {end}");
    }
    ferry.lives_only(Host::Source, &subject)
}

fn contents(ferry: &Ferry) -> anyhow::Result<()> {
    let script = "import mmap,time\nm=mmap.mmap(-1,4<<20,flags=mmap.MAP_PRIVATE|mmap.MAP_ANONYMOUS)\nfor i in range(0,4<<20,4096): m[i]=1\nprint('ready',flush=True)\nwhile True:\n  for i in range(0,2<<20,4096): m[i]=1\n  time.sleep(0.02)";
    let pid = ferry.python(script, 1)?.to_string();
    let arguments = ["--pid", &pid, "--interval", "100ms", "--duration", "1s", "--contents", "--json"];
    let lines = lines(&track_in(ferry, &arguments)?)?;
    let scans: Vec<&Value> = lines.iter().filter(|line| line["event"] == "scan").skip(1).collect();
    for scan in &scans {
        let (dirty, unchanged) = (number(scan, "dirty_pages")?, number(scan, "unchanged_pages")?);
        // The interpreter's own few pages do change.
        ensure!(dirty >= 512.0 && unchanged >= 512.0 && unchanged <= dirty, "{scan}");
    }
    ensure!(scans.len() >= 5, "{} scans", scans.len());
    Ok(())
}

fn refused(ferry: &Ferry) -> anyhow::Result<()> {
    for (arguments, code, says) in [
        (&["--pid", "2147480000"][..], 3, "2147480000"),
        (&["--pid", "1", "--interval", "1us"], 2, "interval"),
        (&["--interval", "1s"], 2, "--pid PID"),
        (&["--pid", "1", "--plot", "x.svg"], 2, "--replay"),
        (&["--replay", "/dev/null"], 3, "/dev/null"),
        (&["--replay", "/no/such/file"], 3, "/no/such/file"),
    ] {
        let output = track_in(ferry, arguments)?;
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            output.status.code() == Some(code) && err.contains(says),
            "{arguments:?}: {}: {err}",
            output.status
        );
    }
    // A kernel thread, outside of the hosts' namespaces: kthreadd is 2 where it can be seen at all.
    let is_kernel = std::fs::read_to_string("/proc/2/comm").is_ok_and(|name| name.trim() == "kthreadd");
    if is_kernel {
        let output = pageferry().args(["track", "--pid", "2"]).output()?;
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(3) && err.contains("kernel"), "{err}");
    }
    Ok(())
}
