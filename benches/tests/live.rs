//! The workloads as they run: each says ok as long as nothing is wrong, finds a single wrong word wherever it
//! is, and survives plain CRIU (so that what a migration test finds is the migration's fault).

use clap::ValueEnum;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use pageferry_benches::bench::bytes::program::Program;
use pageferry_benches::bench::hosts::{Host, Hosts};
use pageferry_benches::bench::subject::Subject;
use pageferry_benches::bench::{baseline, beside_this};
use pageferry_benches::workload::state::{RegionEntry, ask, beside, read_lines, realtime_us};
use pageferry_tracker::probe::Kernel;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// Every workload, with memory that is small enough to be checked often.
const WORKLOADS: [&[&str]; 7] = [
    &["count"],
    &["threads", "--threads", "3"],
    &["forked", "--workers", "2"],
    &["mixed"],
    &["churn"],
    &["writer", "--reads", "1", "--words", "8", "--every", "3"],
    &["pattern", "--pattern", "hot-set"],
];

/// Its arguments, with the log that the pattern workload wants.
fn complete(workload: &[&str], folder: &Path) -> Vec<String> {
    let mut arguments: Vec<String> = workload.iter().map(|&word| word.to_owned()).collect();
    if workload[0] == "pattern" {
        arguments.extend(["--log".to_owned(), folder.join("writes").display().to_string()]);
        arguments.extend(["--log-records".to_owned(), (1 << 20).to_string()]);
    }
    arguments
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    for workload in WORKLOADS {
        let name = workload[0];
        trials.push(Trial::test(format!("{name}_finds_a_wrong_word"), move || finds_a_wrong_word(workload)));
        trials.push(Trial::ignorable_test(format!("{name}_survives_plain_criu"), move || {
            if !rustix::process::geteuid().is_root() {
                return Ok(Completion::ignored_with("needs root"));
            }
            survives_plain_criu(workload).map(|()| Completion::Completed)
        }));
    }
    trials.push(Trial::ignorable_test(
        "wws_accuracy_compares_with_what_was_written",
        || match Kernel::probe().choose(None) {
            Err(error) => Ok(Completion::ignored_with(error.to_string())),
            Ok(_) => wws_accuracy_compares().map(|()| Completion::Completed),
        },
    ));
    for (name, bench) in [
        ("bare_copies_all_of_it_in_every_variant", bare_copies as fn() -> Result<(), Failed>),
        ("goodput_stands_beside_the_bare_loop", goodput_compares),
        ("bytes_of_a_migration_stand_beside_raw_and_zstd", bytes_compares),
    ] {
        trials.push(Trial::ignorable_test(name, move || match why_no_migrations(name) {
            Some(why) => Ok(Completion::ignored_with(why)),
            None => bench().map(|()| Completion::Completed),
        }));
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// What migrations need here and is not there.
fn why_no_migrations(test: &str) -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root".to_owned());
    }
    // The bare loop moves no program.
    if test.starts_with("bare") {
        return None;
    }
    let engine = beside_this("pageferry").err().map(|error| format!("needs the engine: {error:#}"));
    engine.or_else(|| Kernel::probe().choose(None).err().map(|error| error.to_string()))
}

/// The rows of one run of a bench. At these sizes it may well miss its goals, unless it `must_meet` them; it must not
/// fail to measure.
fn rows(arguments: &[&str], must_meet: bool) -> Result<Vec<serde_json::Value>, Failed> {
    let output = Command::new(env!("CARGO_BIN_EXE_pageferry-bench"))
        .args(arguments)
        .args(["--json", "--runs", "1"])
        .output()?;
    let text = String::from_utf8(output.stdout)?;
    let rows = text.lines().map(serde_json::from_str).collect::<Result<Vec<serde_json::Value>, _>>()?;
    let missed = !must_meet && rows.iter().any(|row| row["pass"] == false);
    if !output.status.success() && !missed {
        return Err(format!("{text}{}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(rows)
}

fn number(row: &serde_json::Value, name: &str) -> f64 {
    row[name].as_f64().or_else(|| row[name]["median"].as_f64()).unwrap_or(f64::NAN)
}

/// Sizes that divide nothing, so that the ends of parts, batches and buffers are met.
fn bare_copies() -> Result<(), Failed> {
    let variants = [
        "plain",
        "batch=7,send-buffer=64KiB,congestion=reno,write=vectored",
        "receive-buffer=128KiB,receive=5000,wait-all=yes,into=buffer",
        "into=huge",
        "into=fresh",
    ];
    let text = variants.join(" ");
    let rows = rows(&["bare", "--memory", "9MiB", "--streams", "1,3", "--variants", &text], true)?;
    let names: Vec<_> = rows.iter().filter_map(|row| row["variant"].as_str()).collect();
    assert_eq!(names, [variants, variants].concat());
    for row in &rows {
        // It fails by itself unless all bytes came.
        assert!(number(row, "bare_gb_s") > 0.0 && number(row, "processor_s_gb") > 0.0, "{row}");
    }
    Ok(())
}

fn goodput_compares() -> Result<(), Failed> {
    let rows = rows(&["goodput", "--sizes", "24MiB", "--streams", "1"], false)?;
    let [row] = &rows[..] else { return Err(format!("one row was asked for: {rows:?}").into()) };
    let (ours, bare, ratio) = (number(row, "gb_s"), number(row, "bare_gb_s"), number(row, "ratio"));
    assert!(ours > 0.0 && bare > 0.0, "{row}");
    assert!((ratio - ours / bare).abs() < 1e-9, "{row}");
    let met = ours >= number(row, "limit_gb_s")
        && ratio >= number(row, "limit_ratio")
        && number(row, "engine_memory_percent") <= number(row, "limit_percent");
    assert_eq!(row["pass"], met, "{row}");
    Ok(())
}

/// Every program, with memory that takes a slow link a second.
fn bytes_compares() -> Result<(), Failed> {
    let mut arguments = vec!["bytes", "--memory", "6MiB", "--link", "200mbit"];
    let mut expected: Vec<_> = Program::value_variants().iter().map(|program| program.name()).collect();
    if Command::new("redis-server").arg("--version").output().is_err() {
        // It says what it leaves out.
        eprintln!("redis-server is not installed: without redis");
        expected.retain(|name| name != "redis");
    }
    let names = expected.join(",");
    arguments.extend(["--workloads", &names]);
    let rows = rows(&arguments, false)?;
    let names: Vec<_> = rows.iter().filter_map(|row| row["workload"].as_str()).collect();
    assert_eq!(names, expected);
    for row in &rows {
        let [raw, distinct, zstd3, sent] =
            ["raw_bytes", "distinct_bytes", "zstd3_bytes", "sent_bytes"].map(|name| number(row, name));
        let forked = row["workload"].as_str().is_some_and(|name| name.starts_with("forked"));
        let times = if forked { 8.0 } else { 1.0 };
        assert!(raw >= times * f64::from(6 << 20) && raw < times * f64::from(32 << 20), "{row}");
        assert!(distinct > 0.0 && distinct <= raw && zstd3 > 0.0 && sent > 0.0, "{row}");
        assert!(number(row, "s") > 0.0 && number(row, "raw_s") > 0.0, "{row}");
        // Raw pages cannot be quicker than their link.
        assert!(number(row, "raw_s") > 0.5 * f64::from(6 << 20) / 25e6, "{row}");
        if row["workload"] == "noise" {
            assert!(zstd3 > f64::from(6 << 20), "noise that is compressed: {row}");
            assert!(sent > f64::from(6 << 20), "noise that is compressed: {row}");
        }
        if row["workload"] == "forked-noise" {
            // What one has, and a tenth of it eight times.
            let (least, most) = (1.7 * f64::from(6 << 20), 2.5 * f64::from(6 << 20));
            assert!((least..most).contains(&distinct), "{row}");
        }
        let codings = row["codings"].as_object().ok_or("no codings")?;
        let pages: f64 = codings.values().map(|share| number(share, "pages")).sum();
        assert!(pages >= times * f64::from(6 << 20) / 4096.0, "{row}");
        let goals = row["goals"].as_array().ok_or("no goals")?;
        assert_eq!(row["pass"], goals.iter().all(|goal| goal["pass"] == true), "{row}");
    }
    Ok(())
}

/// A program that goes through its memory once in two seconds: a window of t has t / 2 s of it.
fn wws_accuracy_compares() -> Result<(), Failed> {
    let rows = rows(
        &[
            "wws-accuracy",
            "--duration",
            "3",
            "--patterns",
            "sequential",
            "--memory",
            "16MiB",
            "--rate",
            "8MiB",
        ],
        true,
    )?;
    let text = format!("{rows:?}");
    let windows: Vec<_> = rows.iter().filter(|row| row["quantity"] == "wws").collect();
    assert!(windows.len() >= 15, "{text}");
    for row in windows {
        // How fast it really wrote depends on the machine, so the truth is known only roughly in advance.
        let expected = (number(row, "tau_ms") / 2000.0).min(1.0) * 4096.0;
        for name in ["true_pages", "estimated_pages"] {
            let found = number(row, name);
            assert!((found / expected - 1.0).abs() < 0.5, "{name} is {found} instead of {expected}: {row}");
        }
    }
    assert!(rows.iter().any(|row| row["quantity"] == "dirty-rate" && row["pass"] == true), "{text}");
    Ok(())
}

/// A workload that ends with the test.
struct Workload {
    child: Child,
    state: PathBuf,
}

impl Workload {
    fn start(folder: &Path, arguments: &[&str]) -> Result<Self, Failed> {
        let state = folder.join("state");
        let child = Command::new(env!("CARGO_BIN_EXE_pageferry-workload"))
            .args(complete(arguments, folder))
            .args(["--memory", "8MiB", "--rate", "200KB", "--state"])
            .arg(&state)
            .stdin(Stdio::null())
            .spawn()?;
        let workload = Self { child, state };
        workload.wait("a first line", || read_lines(&workload.state).is_ok_and(|lines| !lines.is_empty()))?;
        Ok(workload)
    }

    fn wait(&self, what: &str, mut done: impl FnMut() -> bool) -> Result<(), Failed> {
        let end = Instant::now() + Duration::from_secs(60);
        while !done() {
            if Instant::now() > end {
                return Err(format!("{what} did not come within a minute").into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    fn regions(&self) -> Result<Vec<RegionEntry>, Failed> {
        Ok(serde_json::from_slice(&fs::read(beside(&self.state, "map"))?)?)
    }

    /// The processes that have the regions: itself and its children.
    fn processes(&self) -> Result<Vec<u32>, Failed> {
        let pid = self.child.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        let children = children.split_whitespace().map(str::parse).collect::<Result<Vec<_>, _>>()?;
        Ok([vec![pid], children].concat())
    }

    fn check(&self, token: &str) -> Result<String, Failed> {
        let verdict = beside(&self.state, "verdict");
        ask(&self.state, token)?;
        let ending = format!("#{token}\n");
        let answered = || fs::read_to_string(&verdict).is_ok_and(|text| text.ends_with(&ending));
        self.wait("a verdict", answered)?;
        Ok(fs::read_to_string(verdict)?)
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        // Workers of a forked tree end when they see that their parent is gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Changes two neighbouring words behind the program's back (two, because it may be about to write one itself).
fn flip(process: u32, address: u64) -> Result<(), Failed> {
    let memory = OpenOptions::new().read(true).write(true).open(format!("/proc/{process}/mem"))?;
    let mut words = [0u8; 16];
    memory.read_exact_at(&mut words, address)?;
    words.iter_mut().for_each(|byte| *byte ^= 0x10);
    memory.write_all_at(&words, address)?;
    Ok(())
}

fn finds_a_wrong_word(workload: &[&str]) -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let workload = Workload::start(folder.path(), workload)?;
    let mut checks = 0;
    let mut expect = |what: &str, verdict: &str| -> Result<(), Failed> {
        checks += 1;
        let text = workload.check(&checks.to_string())?;
        match text.starts_with(verdict) {
            true => Ok(()),
            false => Err(format!("{what}: {text}").into()),
        }
    };
    expect("before anything", "ok ")?;
    for process in workload.processes()? {
        for region in workload.regions()? {
            for address in
                [region.start, region.start + region.bytes / 2 + 808, region.start + region.bytes - 16]
            {
                let what = format!("{} at {address:#x} of process {process}", region.name);
                flip(process, address)?;
                expect(&format!("after a change of {what}"), "corrupt ")?;
                flip(process, address)?;
                expect(&format!("after {what} was put right"), "ok ")?;
            }
        }
    }
    // It never stopped counting for all that.
    let lines = read_lines(&workload.state)?;
    let back = lines.windows(2).find(|pair| pair[1].progress < pair[0].progress);
    match back {
        None => Ok(()),
        Some(pair) => Err(format!("progress went back: {pair:?}").into()),
    }
}

fn survives_plain_criu(workload: &[&str]) -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/two-hosts");
    let told = |error: anyhow::Error| Failed::from(format!("{error:#}"));
    let criu =
        baseline::find_criu(std::env::var_os("PAGEFERRY_CRIU").as_deref().map(Path::new)).map_err(told)?;
    let hosts = Hosts::up_as(&tool, &format!("benches-{}-{}", std::process::id(), workload[0]), None)
        .map_err(told)?;
    let mut arguments = complete(workload, folder.path());
    arguments.extend(["--memory".to_owned(), "16MiB".to_owned()]);
    let subject = Subject::start(&hosts, folder.path(), workload[0], &arguments).map_err(told)?;
    subject.check().map_err(told)?;
    baseline::migrate(&hosts, &criu, subject.pid).map_err(told)?;
    subject.wait_alive_after(realtime_us()).map_err(told)?;
    subject.check().map_err(told)?;
    hosts.kill(Host::Destination, subject.pid).map_err(told)?;
    // The source has really let go of it: the pid is free there.
    let gone = hosts.kill(Host::Source, subject.pid).is_err();
    if gone { Ok(()) } else { Err("the source still has the process".into()) }
}
