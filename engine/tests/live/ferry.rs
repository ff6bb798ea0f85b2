//! Two hosts, the command in both, and the programs between them.

use anyhow::{Context, bail, ensure};
use pageferry::MigrationReport;
use pageferry::report::TimedPart;
use pageferry_benches::bench::child::wait_for;
use pageferry_benches::bench::hosts::{Host, Hosts};
use pageferry_benches::bench::subject::Subject;
use pageferry_benches::workload::state::realtime_us;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};
use std::time::{Duration, Instant};

/// A test cannot run here.
#[derive(Debug)]
pub struct Ignored(pub String);

impl std::fmt::Display for Ignored {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Ignored {}

/// Far longer than anything takes: a guard against a hang, and not a measure.
pub const LIMIT: Duration = Duration::from_secs(120);
const RECEIVER: &str = "10.77.0.2:7077";

/// The hosts, and what runs in them for a test.
pub struct Ferry {
    pub hosts: Hosts,
    pub scratch: tempfile::TempDir,
    /// What runs in either host for the test of the moment.
    started: RefCell<Vec<i32>>,
    count: RefCell<u32>,
    /// The count when the test of the moment began.
    begun: Cell<u32>,
}

/// A running receiver.
pub struct Receiver {
    child: Child,
    log: PathBuf,
    /// Its pid in the destination.
    pub pid: i32,
}

/// How `pageferry migrate` ended.
pub struct Outcome {
    pub code: i32,
    pub err: String,
    pub report: Option<MigrationReport>,
}

impl Ferry {
    pub fn new() -> anyhow::Result<Self> {
        let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/two-hosts");
        let hosts = Hosts::up_as(&tool, &format!("live-{}", std::process::id()), None)?;
        // Not wherever TMPDIR points to: the hosts have a /run of their own.
        let scratch = tempfile::tempdir_in("/tmp")?;
        Ok(Self {
            hosts,
            scratch,
            started: RefCell::default(),
            count: RefCell::default(),
            begun: Cell::new(0),
        })
    }

    /// A name that no other file of this run has.
    pub fn name(&self, what: &str) -> String {
        let mut count = self.count.borrow_mut();
        *count += 1;
        format!("{what}-{count}")
    }

    /// Starts a workload in the source.
    pub fn subject(&self, arguments: &[&str]) -> anyhow::Result<Subject> {
        let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let name = self.name(&arguments[0]);
        let subject = Subject::start(&self.hosts, self.scratch.path(), &name, &arguments)?;
        self.started.borrow_mut().push(subject.pid);
        Ok(subject)
    }

    /// Starts any program in the source.
    pub fn program(&self, command: &[&str]) -> anyhow::Result<i32> {
        self.start(command).map(|(pid, _)| pid)
    }

    /// Starts a Python program in the source that prints `ready` when it is what the test is about, so many times in all its processes.
    pub fn python(&self, script: &str, ready: usize) -> anyhow::Result<i32> {
        let (pid, log) = self.start(&["python3", "-I", "-c", script])?;
        wait_for("a program that is ready", LIMIT, || {
            let said = std::fs::read_to_string(&log)?;
            ensure!(self.state(Host::Source, pid)?.is_some(), "the program ended: {said}");
            Ok((said.lines().filter(|line| *line == "ready").count() >= ready).then_some(()))
        })?;
        Ok(pid)
    }

    fn start(&self, command: &[&str]) -> anyhow::Result<(i32, PathBuf)> {
        let log = self.scratch.path().join(self.name("program"));
        let pid = self.hosts.start(Host::Source, &log, command.iter().copied())?;
        self.started.borrow_mut().push(pid);
        Ok((pid, log))
    }

    /// Runs a command in a host to its end.
    pub fn sh(&self, host: Host, script: &str) -> anyhow::Result<String> {
        let output = self.hosts.exec(host, ["sh", "-c", script]).stdin(Stdio::null()).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    pub fn receiver(&self, fault: Option<&str>, options: &[&str]) -> anyhow::Result<Receiver> {
        self.receiver_in(Host::Destination, RECEIVER, fault, options)
    }

    pub fn receiver_in(
        &self,
        host: Host,
        listen: &str,
        fault: Option<&str>,
        options: &[&str],
    ) -> anyhow::Result<Receiver> {
        let log = self.scratch.path().join(self.name("receiver"));
        let fault = format!("PAGEFERRY_FAULT={}", fault.unwrap_or("none=delay:0"));
        // `exec` hands its signals on to the command, so the child stands for it; the pid is for SIGKILL.
        let script = "echo $$; exec \"$@\"";
        let mut command: Vec<&str> = vec!["sh", "-c", script, "sh", "env", &fault];
        command.extend([env!("CARGO_BIN_EXE_pageferry"), "receive", "--listen", listen, "--insecure"]);
        command.extend(options);
        let file = std::fs::File::create(&log)?;
        let child = self
            .hosts
            .exec(host, command)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()?;
        let mut receiver = Receiver { child, log, pid: 0 };
        let until = Instant::now() + LIMIT;
        loop {
            let text = receiver.log();
            if text.lines().any(|line| line.starts_with("listening on")) {
                receiver.pid = text.lines().next().unwrap_or("").parse().context("the receiver's pid")?;
                return Ok(receiver);
            }
            if Instant::now() > until || receiver.child.try_wait()?.is_some() {
                bail!("the receiver does not listen: {text}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// `pageferry migrate` in the source, not waited for.
    pub fn migrate_start(
        &self,
        pid: i32,
        fault: Option<&str>,
        options: &[&str],
    ) -> anyhow::Result<Migration> {
        self.migrate_from(Host::Source, pid, RECEIVER, fault, options)
    }

    pub fn migrate_from(
        &self,
        host: Host,
        pid: i32,
        to: &str,
        fault: Option<&str>,
        options: &[&str],
    ) -> anyhow::Result<Migration> {
        let report = self.scratch.path().join(self.name("report"));
        let log = self.scratch.path().join(self.name("migrate"));
        let fault = format!("PAGEFERRY_FAULT={}", fault.unwrap_or("none=delay:0"));
        let pid = pid.to_string();
        let report_text = report.display().to_string();
        let script = "echo $$; exec \"$@\"";
        let mut command: Vec<&str> = vec!["sh", "-c", script, "sh", "env", &fault];
        command.extend([env!("CARGO_BIN_EXE_pageferry"), "migrate", "--pid", &pid, "--to", to]);
        command.extend(["--report", &report_text]);
        command.extend(options);
        if !options.contains(&"--resolve-timeout") {
            command.extend(["--resolve-timeout", "2s"]);
        }
        // A test is about what it names; the tests of `choice` are about what is chosen.
        if !options.contains(&"--strategy") {
            command.extend(["--strategy", "pre-copy"]);
        }
        if !options.contains(&"--calibration") {
            command.extend(["--calibration", "none"]);
        }
        let file = std::fs::File::create(&log)?;
        let child = self
            .hosts
            .exec(host, command)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()?;
        Ok(Migration { child, log, report })
    }

    pub fn migrate(&self, pid: i32, fault: Option<&str>, options: &[&str]) -> anyhow::Result<Outcome> {
        self.migrate_start(pid, fault, options)?.wait()
    }

    /// The state letter of a process of a host.
    pub fn state(&self, host: Host, pid: i32) -> anyhow::Result<Option<char>> {
        let stat = self.sh(host, &format!("cat /proc/{pid}/stat 2>/dev/null"))?;
        let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
        Ok(state.filter(|state| !matches!(state, 'Z' | 'X')))
    }

    /// Waits until the program lives in `here` only, and that its memory is what it should be.
    pub fn lives_only(&self, here: Host, subject: &Subject) -> anyhow::Result<()> {
        let there = if here == Host::Source { Host::Destination } else { Host::Source };
        let until = Instant::now() + LIMIT;
        loop {
            let states = (self.state(here, subject.pid)?, self.state(there, subject.pid)?);
            if matches!(states, (Some('R' | 'S' | 'D'), None)) {
                break;
            }
            if Instant::now() > until {
                bail!("{} has {:?} and {} has {:?}", here.name(), states.0, there.name(), states.1);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        subject.wait_alive_after(realtime_us())?;
        subject.check().map(drop)
    }

    /// Nothing of pageferry or CRIU is left in either host, nor anything that stands still.
    pub fn nothing_is_left(&self) -> anyhow::Result<()> {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            let mut left = Vec::new();
            for host in [Host::Source, Host::Destination] {
                let list = self.sh(host, "ps -e -o pid=,stat=,args=")?;
                let bad = list.lines().filter(|line| {
                    let state = line.split_whitespace().nth(1).unwrap_or("");
                    let ours = ["criu", "/pageferry ", "kill -KILL"].iter().any(|word| line.contains(word));
                    (ours && !line.contains("ps -e")) || state.starts_with(['T', 't', 'Z'])
                });
                left.extend(bad.map(|line| format!("{}: {line}", host.name())));
                for (what, script) in [
                    ("mounts", "grep -c pageferry /proc/mounts"),
                    ("traces of a network", "ls /run/pageferry-network 2>/dev/null | wc -l"),
                    ("rules", "nft list tables 2>/dev/null | grep -c pageferry-"),
                    (
                        "firewall rules",
                        "iptables -S 2>/dev/null | grep -c CRIU; nft list tables 2>/dev/null | grep -c CRIU",
                    ),
                ] {
                    let counts = self.sh(host, script)?;
                    if counts.lines().any(|count| count != "0") {
                        left.push(format!("{}: {what}: {counts}", host.name()));
                    }
                }
            }
            if left.is_empty() {
                return Ok(());
            }
            ensure!(Instant::now() < until, "left behind:\n{}", left.join("\n"));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What the programs of the test of the moment printed, and which of them have ended: a failure seen once in a hundred runs
    /// has to explain itself.
    pub fn told(&self) -> String {
        let mut told = String::new();
        for pid in self.started.borrow().iter() {
            for host in [Host::Source, Host::Destination] {
                let state = self.state(host, *pid).ok().flatten();
                let _ = write!(told, "\n{}, process {pid}: {}", host.name(), state.unwrap_or('-'));
            }
        }
        let begun = self.begun.get();
        for entry in std::fs::read_dir(self.scratch.path()).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let number = name.trim_end_matches(".log").rsplit('-').next().and_then(|n| n.parse().ok());
            let log = name.ends_with(".log") || name.starts_with("receiver") || name.starts_with("program");
            let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
            if log && number.is_some_and(|number: u32| number > begun) && !text.trim().is_empty() {
                let _ = write!(told, "\n--- {name}\n{}", text.trim());
            }
        }
        told
    }

    /// Ends what the test has started, and looks that it has ended: what runs on takes the processors away from the next test.
    pub fn clear(&self) -> anyhow::Result<()> {
        self.begun.set(*self.count.borrow());
        let started = self.started.take();
        if started.is_empty() {
            return Ok(());
        }
        let pids: Vec<String> = started.iter().map(i32::to_string).collect();
        // `-s` and `--`, so that every shell takes a process group for what it is.
        let script = format!(
            "for pid in {pids}; do kill -s CONT -- -$pid; kill -s KILL -- -$pid $pid; done 2>/dev/null\n\
             state() {{ sed 's/.*) //' /proc/$1/stat 2>/dev/null | cut -c1 | tr -d ZX; }}\n\
             turns=0\n\
             for pid in {pids}; do\n\
             while [ -n \"$(state $pid)\" ] && [ $turns -lt 3000 ]; do sleep 0.01; turns=$((turns + 1)); done\n\
             [ -z \"$(state $pid)\" ] || echo \"process $pid, state $(state $pid)\"\n\
             done",
            pids = pids.join(" ")
        );
        for host in [Host::Source, Host::Destination] {
            let left = self.sh(host, &script)?;
            ensure!(left.is_empty(), "left in the {}: {left}", host.name());
        }
        Ok(())
    }
}

impl Receiver {
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits for its end by itself (`--once`).
    pub fn wait(mut self) -> anyhow::Result<i32> {
        let code = wait(&mut self.child);
        code.with_context(|| format!("the receiver: {}", self.log()))
    }

    /// Stops it like a person would.
    pub fn stop(mut self) -> anyhow::Result<()> {
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(self.child.id() as i32),
            nix::sys::signal::Signal::SIGTERM,
        );
        let code = wait(&mut self.child);
        code.with_context(|| format!("the receiver: {}", self.log())).map(drop)
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

impl Drop for Migration {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// Ends what a failed test left running, so that the next one does not fail for it.
fn end(child: &mut Child) {
    if matches!(child.try_wait(), Ok(None)) {
        let pid = nix::unistd::Pid::from_raw(child.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let until = Instant::now() + Duration::from_secs(10);
        while matches!(child.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// A migration under way.
pub struct Migration {
    child: Child,
    log: PathBuf,
    report: PathBuf,
}

impl Migration {
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until it says `text`.
    pub fn says(&mut self, text: &str) -> anyhow::Result<()> {
        let until = Instant::now() + LIMIT;
        while !self.log().contains(text) {
            ensure!(
                Instant::now() < until && self.child.try_wait()?.is_none(),
                "no {text:?}: {}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: nix::sys::signal::Signal) -> anyhow::Result<()> {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.child.id() as i32), signal)?;
        Ok(())
    }

    pub fn wait(mut self) -> anyhow::Result<Outcome> {
        let code = wait(&mut self.child);
        let code = code.with_context(|| self.log())?;
        let report = match std::fs::read(&self.report) {
            Ok(text) => Some(serde_json::from_slice(&text).context("the report")?),
            Err(_) => None,
        };
        let log = self.log();
        let err = log.split_once('\n').map_or("", |(_, rest)| rest).to_owned();
        Ok(Outcome { code, err, report })
    }
}

fn wait(child: &mut Child) -> anyhow::Result<i32> {
    let until = Instant::now() + LIMIT;
    loop {
        if let Some(status) = child.try_wait()? {
            use std::os::unix::process::ExitStatusExt;
            return Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)));
        }
        if Instant::now() > until {
            child.kill()?;
            child.wait()?;
            bail!("it did not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Outcome {
    /// It moved, and the report says what a report must.
    pub fn moved(&self) -> anyhow::Result<&MigrationReport> {
        ensure!(self.code == 0, "exit code {}: {}", self.code, self.err);
        let report = self.report.as_ref().context("no report")?;
        ensure!(report.outcome == "completed", "outcome {}", report.outcome);
        let parts: u64 = report.downtime_us.parts().iter().map(|(_, us)| us).sum();
        ensure!(parts == report.downtime_us.total && parts > 0, "the downtime's parts do not sum to it");
        taken_out_of_the_downtime(report)?;
        // Rounds before the freeze, where the strategy has any.
        let least = if matches!(report.strategy.as_str(), "stop-and-copy" | "post-copy") { 1 } else { 2 };
        ensure!(
            report.rounds.len() >= least && report.rounds.last().is_some_and(|round| round.frozen),
            "rounds"
        );
        ensure!(report.rounds[0].sent_pages > 0 && report.bytes_sent > 0, "nothing was sent");
        Ok(report)
    }

    /// It failed with `code`, and says `says`.
    pub fn failed(&self, code: i32, says: &[&str]) -> anyhow::Result<()> {
        ensure!(self.code == code, "exit code {} instead of {code}: {}", self.code, self.err);
        for text in says {
            ensure!(self.err.contains(text), "it should say {text:?}: {}", self.err);
        }
        Ok(())
    }
}

/// What was done before the freeze is told, nothing of it twice, and it adds up.
fn taken_out_of_the_downtime(report: &MigrationReport) -> anyhow::Result<()> {
    let prepared = &report.prepared_us;
    let names = |parts: &[TimedPart]| parts.iter().map(|part| part.name.clone()).collect::<Vec<_>>();
    let sum = |parts: &[TimedPart]| parts.iter().map(|part| part.us).sum::<u64>();
    let (source, destination) = (names(&prepared.source), names(&prepared.destination));
    for names in [&source, &destination] {
        let each: BTreeSet<&String> = names.iter().collect();
        ensure!(each.len() == names.len(), "something was prepared twice: {names:?}");
    }
    let needed =
        |names: &[String], needed: &[&str]| needed.iter().all(|n| names.iter().any(|name| name == n));
    ensure!(needed(&source, &["connections", "criu", "watchman"]), "at the source: {source:?}");
    let into_file = report.to.starts_with("file:") || report.to.starts_with("dir:");
    let there: &[&str] = if into_file { &[] } else { &["criu", "memory"] };
    ensure!(
        needed(&destination, there) && into_file == destination.is_empty(),
        "at the destination: {destination:?}"
    );
    let total = sum(&prepared.source) + sum(&prepared.destination);
    ensure!(total == prepared.total && total > 0, "what was prepared does not sum to it");
    let before = report.total_us - report.downtime_us.total;
    ensure!(
        sum(&prepared.source) <= before,
        "{prepared:?} in {before} us: not all of it was before the freeze"
    );
    let criu = prepared.destination.iter().find(|part| part.name == "criu");
    ensure!(criu.is_none_or(|criu| criu.us > 0 && criu.us <= before), "{criu:?} in {before} us");
    Ok(())
}

/// Output of a command that must succeed.
pub fn succeed(output: Output) -> anyhow::Result<String> {
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{}: {text}", output.status);
    Ok(text)
}
