//! Predictions: of a program that runs, and of a recording.

use super::Test;
use super::ferry::Ferry;
use anyhow::{Context, ensure};
use pageferry_benches::bench::hosts::Host;
use serde_json::Value;
use std::process::Output;

pub fn tests() -> Vec<(&'static str, Test)> {
    vec![
        ("what is predicted of a writer is what it does, and it never notices", writer),
        ("a recording is moved in virtual time", recording),
        ("what migrations took is remembered", remembered),
        ("a program that ends while it is watched", ends),
    ]
}

fn pageferry(ferry: &Ferry, words: &[&str]) -> anyhow::Result<Output> {
    let command = [&[env!("CARGO_BIN_EXE_pageferry")][..], words].concat();
    Ok(ferry.hosts.exec(Host::Source, command).output()?)
}

fn json(output: &Output) -> anyhow::Result<Value> {
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn median(forecast: &Value, quantity: &str) -> anyhow::Result<f64> {
    let estimate = &forecast[quantity];
    let value = |name: &str| estimate[name].as_f64().with_context(|| format!("{name} of {quantity}"));
    let (low, median, high) = (value("low")?, value("median")?, value("high")?);
    ensure!(low <= median && median <= high, "{quantity}: {low}, {median}, {high}");
    Ok(median)
}

fn writer(ferry: &Ferry) -> anyhow::Result<()> {
    // 1280 pages a second out of 16384, of which the link carries 2900: most go whole the second time, too, because the sender
    // keeps the bytes of a sixteenth.
    let subject = ferry.subject(&["writer", "--memory", "64MiB", "--rate", "5MiB"])?;
    let pid = subject.pid.to_string();
    let words =
        ["predict", "--pid", &pid, "--bandwidth", "100Mbit", "--duration", "3s", "--calibration", "none"];
    let table = pageferry(ferry, &words)?;
    let said = String::from_utf8(table.stdout)?;
    for word in ["stop-and-copy", "pre-copy", "post-copy", "hybrid", "downtime", "no earlier migrations"] {
        ensure!(said.contains(word), "{word:?} is missing in:\n{said}");
    }
    let prediction = json(&pageferry(ferry, &[&words[..], &["--json"]].concat())?)?;
    let rate = prediction["dirty_rate"].as_f64().context("a rate")?;
    // Each scan also finds pages of its stack and heap.
    let own = prediction["scans"].as_f64().context("scans")? / 3.0 * 10.0;
    ensure!(rate > 1000.0 && rate < 1500.0 + own, "{rate} pages a second, of 1280 and {own} of its own");
    let ways = prediction["strategies"].as_array().context("strategies")?;
    let [auto, stop, pre, post, hybrid] = &ways[..] else { anyhow::bail!("{} ways", ways.len()) };
    // 64 MiB of noise over 100 Mbit/s, of which TCP leaves 95.6.
    let copy = 64.0 * 1_048_576.0 / (100e6 / 8.0 * 0.956) * 1e6;
    let downtime = |way| median(way, "downtime_us");
    ensure!(auto["chosen"] == "pre-copy" && auto["because"].is_string(), "{auto}");
    ensure!(downtime(auto)? == downtime(pre)?, "{auto} {pre}");
    ensure!((downtime(stop)? / copy - 1.0).abs() < 0.1, "{} us, not {copy}", downtime(stop)?);
    ensure!(downtime(pre)? < copy / 5.0 && downtime(hybrid)? <= downtime(pre)?, "{pre} {hybrid}");
    ensure!(median(post, "total_us")? < copy / 5.0 && median(post, "complete_us")? > copy * 0.9, "{post}");
    ensure!(median(pre, "bytes")? > median(stop, "bytes")?, "{pre} {stop}");
    ferry.lives_only(Host::Source, &subject)?;
    ferry.hosts.kill(Host::Source, subject.pid)
}

fn recording(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "32MiB", "--rate", "10MiB"])?;
    let (pid, file) = (subject.pid.to_string(), ferry.scratch.path().join(ferry.name("trace")));
    let trace = file.to_str().context("a path of text")?;
    let record =
        ["track", "--pid", &pid, "--interval", "50ms", "--duration", "2s", "--record", trace, "--quiet"];
    ensure!(pageferry(ferry, &record)?.status.success());
    ferry.hosts.kill(Host::Source, subject.pid)?;
    let simulate = ["simulate", "--trace", trace, "--bandwidth", "100Mbit", "--calibration", "none"];
    let with = |more: &[&str]| pageferry(ferry, &[&simulate[..], more].concat());
    let ways = json(&with(&["--json"])?)?;
    ensure!(ways.as_array().is_some_and(|ways| ways.len() == 5), "{ways}");
    let adaptive = json(&with(&["--strategy", "pre-copy", "--json"])?)?;
    let fixed = json(&with(&["--strategy", "pre-copy", "--policy", "fixed:9", "--json"])?)?;
    let rounds = |outcome: &Value| outcome["rounds"].as_array().map_or(0, Vec::len);
    ensure!(rounds(&fixed) == 10, "nine rounds and the freeze: {fixed}");
    ensure!((3..9).contains(&rounds(&adaptive)), "{adaptive}");
    let of_first = |what: &str| adaptive["rounds"][0][what].as_u64().context("pages");
    let pages = of_first("dirty_pages")? + of_first("ahead_pages")?;
    ensure!((8192..9000).contains(&pages), "the first round has all of it: {pages}");
    // Half the bytes, half the time.
    let half = json(&with(&["--strategy", "stop-and-copy", "--ratio", "0.5", "--json"])?)?;
    let whole = json(&with(&["--strategy", "stop-and-copy", "--json"])?)?;
    let share = half["bytes"].as_f64().context("bytes")? / whole["bytes"].as_f64().context("bytes")?;
    ensure!((0.48..0.54).contains(&share), "{share}");
    // A millisecond a page is more than the link takes, also for pages that go again.
    let slow = ["--strategy", "pre-copy", "--policy", "fixed:2", "--json"];
    let times = |more: &[&str]| {
        let rounds = json(&with(&[&slow[..], more].concat())?)?["rounds"].take();
        let of = |round: usize, what: &str| rounds[round][what].as_f64().context("a round");
        let sent = of(1, "dirty_pages")? - of(1, "unchanged_pages")?;
        anyhow::Ok((of(0, "duration_us")? / of(0, "dirty_pages")?, of(1, "duration_us")? / sent))
    };
    let (link, made) = (times(&[])?, times(&["--page-time", "1ms"])?);
    ensure!((250.0..400.0).contains(&link.0) && (990.0..1050.0).contains(&made.0), "{link:?} {made:?}");
    let again = times(&["--again-page-time", "2ms"])?;
    ensure!(again.0 == link.0 && (1950.0..2100.0).contains(&again.1), "{link:?} {again:?}");
    // What is wrong is said, with the file.
    let bytes = std::fs::read(&file)?;
    std::fs::write(&file, &bytes[..bytes.len() - 20])?;
    let cut = with(&[])?;
    ensure!(cut.status.success() && String::from_utf8_lossy(&cut.stderr).contains("cut off"), "{cut:?}");
    let mut damaged = bytes.clone();
    damaged[bytes.len() / 2] ^= 1;
    std::fs::write(&file, &damaged)?;
    for (output, says) in [
        (with(&[])?, "damaged in frame"),
        (pageferry(ferry, &["simulate", "--trace", "/nowhere/x.pft"])?, "/nowhere/x.pft"),
    ] {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(3) && said.contains(says), "{says:?} is missing in: {said}");
    }
    let wrong = pageferry(ferry, &["simulate", "--trace", trace, "--ratio", "2"])?;
    ensure!(wrong.status.code() == Some(2), "{wrong:?}");
    Ok(())
}

fn remembered(ferry: &Ferry) -> anyhow::Result<()> {
    let file = ferry.scratch.path().join("remembered/calibration.json");
    let known = ["--calibration", file.to_str().context("a path of text")?];
    for _ in 0..2 {
        let subject = ferry.subject(&["writer", "--memory", "32MiB", "--rate", "1MiB"])?;
        let receiver = ferry.receiver(None, &["--once"])?;
        ferry.migrate(subject.pid, None, &known)?.moved()?;
        ensure!(receiver.wait()? == 0, "the receiver's exit code");
        ferry.hosts.kill(Host::Destination, subject.pid)?;
    }
    let subject = ferry.subject(&["writer", "--memory", "32MiB", "--rate", "1MiB"])?;
    let pid = subject.pid.to_string();
    let predict = ["predict", "--pid", &pid, "--duration", "1s", "--json"];
    let prediction = json(&pageferry(ferry, &[&predict[..], &known].concat())?)?;
    ensure!(prediction["learned_from"] == 2, "{prediction}");
    // What cannot be read is said, and no reason to fail.
    std::fs::write(&file, "what")?;
    let output = pageferry(ferry, &[&predict[..], &known].concat())?;
    ensure!(json(&output)?["learned_from"] == 0);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(said.contains("calibration.json") && said.contains("remove it"), "{said}");
    ferry.hosts.kill(Host::Source, subject.pid)
}

fn ends(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "8MiB", "--rate", "1MiB"])?;
    let pid = subject.pid.to_string();
    let command = [env!("CARGO_BIN_EXE_pageferry"), "predict", "--pid", &pid, "--duration", "60s"];
    let mut command = ferry.hosts.exec(Host::Source, command);
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let watching = command.spawn()?;
    std::thread::sleep(std::time::Duration::from_secs(2));
    ferry.hosts.kill(Host::Source, subject.pid)?;
    let output = watching.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(3) && said.contains("ended"), "{said}");
    let none = pageferry(ferry, &["predict", "--pid", "2147483647"])?;
    ensure!(none.status.code() == Some(3), "{none:?}");
    Ok(())
}
