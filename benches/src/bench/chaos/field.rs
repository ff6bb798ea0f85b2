//! Two hosts, a program between them, and what is left when something was killed.

use super::super::child::{Running, sleep, wait_for};
use super::super::hosts::{Host, Hosts};
use super::super::subject::Subject;
use super::super::{Common, workload};
use super::strike::{Marks, link, strike};
use super::{Case, Fault, Moment};
use crate::workload::state::realtime_us;
use anyhow::{Context, bail};
use serde::Serialize;
use serde_json::Value;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Far longer than anything here takes.
const LIMIT: Duration = Duration::from_secs(120);
/// How long the engines believe in a link that is silent.
const STALL: &str = "3s";
/// How long the link is down.
const DOWN: Duration = Duration::from_secs(5);
/// How long both sides wait for one another while pages are owed.
const OWED: &str = "4s";
/// How long the source tries to reach a receiver again while the program runs there: longer than the link is down.
const BACK: &str = "8s";

/// When a program that waits for what does not come has been ended for sure.
const GIVEN_UP: Duration = Duration::from_secs(12);

/// Who brought a migration to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Decided {
    /// The engines alone.
    Engine,
    /// `pageferry recover`.
    Recover,
    /// Whoever reads what `pageferry recover` prints.
    Person,
}

/// The program's memory, by its own account.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Memory {
    /// All of it is what the program's history makes of it.
    Right,
    /// As it was when it moved: a person took the older copy, because the younger was lost with its pages.
    AsItMoved,
    /// It is not.
    Wrong,
    /// There is no program.
    None,
}

/// What became of a case.
pub(super) struct End {
    pub(super) struck: bool,
    pub(super) exit_code: i32,
    pub(super) decided: Decided,
    pub(super) survivors: Vec<&'static str>,
    pub(super) memory: Memory,
    pub(super) left_over: Vec<String>,
    /// Last words of both engines, and what was found afterwards.
    pub(super) words: String,
}

/// What is the same for all cases.
#[derive(Debug)]
pub(super) struct Field {
    hosts: Hosts,
    scratch: tempfile::TempDir,
    pageferry: String,
    workload: String,
}

const LISTEN: &str = "10.77.0.2:7077";
const BOTH: [Host; 2] = [Host::Source, Host::Destination];

impl Field {
    pub(super) fn new(common: &Common) -> anyhow::Result<Self> {
        let hosts = Hosts::up(&common.two_hosts, common.link.as_deref())?;
        let scratch = tempfile::tempdir_in("/tmp").context("making a directory")?;
        let pageferry = common.ferry()?.program().to_string_lossy().into_owned();
        let workload = workload()?.to_string_lossy().into_owned();
        Ok(Self { hosts, scratch, pageferry, workload })
    }

    /// Plays a case to its end, and tidies up after it.
    pub(super) fn play(&self, index: usize, case: Case) -> anyhow::Result<End> {
        let name = format!("subject-{index}");
        let arguments = ["writer", "--memory", "48MiB", "--rate", "20MB"].map(str::to_owned);
        let subject = Subject::start(&self.hosts, self.scratch.path(), &name, &arguments)?;
        let end = self.with(index, case, &subject, &self.scratch.path().join(&name));
        let cleared = self.clear(&subject);
        let end = end.with_context(|| format!("run {index}, {case:?}"))?;
        cleared?;
        Ok(end)
    }

    fn with(&self, index: usize, case: Case, subject: &Subject, state: &Path) -> anyhow::Result<End> {
        let journal = |host: Host| {
            self.scratch
                .path()
                .join(format!("journal-{}-{index}", host.name()))
                .to_string_lossy()
                .into_owned()
        };
        let (source, destination) = (journal(Host::Source), journal(Host::Destination));
        let mut receiver = self.receiver(&destination)?;
        let mut sender = self.sender(&source, subject.pid, case)?;
        let marks = Marks {
            pageferry: &self.pageferry,
            workload: &self.workload,
            source: &source,
            destination: &destination,
            state: &state.to_string_lossy(),
        };
        let struck =
            self.reach(case.moment, &marks, &mut sender)? && strike(case.fault, &marks, &self.hosts)?;
        if case.fault == Fault::Link && struck {
            sleep(DOWN)?;
            link(&self.hosts, "up")?;
        }
        let status = wait_for("the end of pageferry migrate", LIMIT, || sender.ended())?;
        let exit_code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
        let mut words =
            format!("source:\n{}\ndestination:\n{}\n", sender.last_words(), receiver.last_words());
        for dir in [&source, &destination] {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                words += &format!(
                    "{}\n{}",
                    entry.path().display(),
                    fs::read_to_string(entry.path()).unwrap_or_default()
                );
            }
        }
        // A receiver that was killed, or that gave up by itself.
        if receiver.ended()?.is_some() {
            receiver = self.receiver(&destination)?;
        }
        // What is left of a program that was killed there waits in vain for the pages that it had there.
        if case.fault == Fault::Target && exit_code != 0 {
            self.given_up(subject)?;
        }
        let decided = self.recover(&source, &destination, subject)?;
        let survivors = self.settle(subject, Path::new(&destination))?;
        let memory = match survivors.is_empty() {
            true => Memory::None,
            false => Self::judge(subject, decided),
        };
        receiver.terminate();
        wait_for("the end of pageferry receive", LIMIT, || receiver.ended())
            .with_context(|| format!("{words}\nat last:\n{}", receiver.last_words()))?;
        words += &format!("destination, in the end:\n{}\n", receiver.last_words());
        let left_over = self.left_over(&source)?;
        let survivors = survivors.into_iter().map(Host::name).collect();
        Ok(End { struck, exit_code, decided, survivors, memory, left_over, words })
    }

    fn receiver(&self, journal: &str) -> anyhow::Result<Running> {
        let receive = [
            self.pageferry.as_str(),
            "receive",
            "--listen",
            LISTEN,
            "--insecure",
            "--journal",
            journal,
            "--stall-timeout",
            STALL,
            "--post-copy-timeout",
            OWED,
        ];
        // What the one before had may not be free at once.
        let end = Instant::now() + LIMIT;
        loop {
            let mut receiver =
                Running::start("pageferry receive", &mut self.hosts.exec(Host::Destination, receive))?;
            match receiver.wait_line("listening on", Duration::from_secs(30)) {
                Ok(()) if receiver.ended()?.is_none() => return Ok(receiver),
                _ if Instant::now() < end => sleep(Duration::from_millis(200))?,
                result => return result.map(|()| receiver),
            }
        }
    }

    fn sender(&self, journal: &str, pid: i32, case: Case) -> anyhow::Result<Running> {
        let pid = pid.to_string();
        let mut migrate = vec![
            self.pageferry.as_str(),
            "migrate",
            "--pid",
            &pid,
            "--to",
            LISTEN,
            "--journal",
            journal,
            "--strategy",
            case.strategy,
            "--bandwidth",
            "80MB",
            "--stall-timeout",
            STALL,
            "--post-copy-timeout",
            OWED,
            "--resume-timeout",
            BACK,
            "--resolve-timeout",
            "3s",
            "--calibration",
            "none",
        ];
        if case.verify {
            migrate.push("--verify");
        }
        Running::start("pageferry migrate", &mut self.hosts.exec(Host::Source, &migrate))
    }

    /// Waits for the moment; false if the migration was over before.
    fn reach(&self, moment: Moment, marks: &Marks<'_>, sender: &mut Running) -> anyhow::Result<bool> {
        let began = Instant::now();
        let end = began + LIMIT;
        while Instant::now() < end {
            let reached = match moment {
                Moment::After(_) => true,
                Moment::Step(host, step, _) => {
                    let dir = if host == Host::Source { marks.source } else { marks.destination };
                    has_written(Path::new(dir), step)
                }
            };
            if reached {
                // Not by sleeping alone: that is a tenth of a millisecond late.
                let until = Instant::now() + moment.delay();
                while Instant::now() < until {
                    match until - Instant::now() {
                        left if left > Duration::from_millis(1) => {
                            std::thread::sleep(left - Duration::from_micros(500));
                        }
                        _ => std::hint::spin_loop(),
                    }
                }
                return Ok(true);
            }
            if sender.ended()?.is_some() {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        bail!("the migration did not come to {moment:?}: {}", sender.last_words())
    }

    /// What an operator does afterwards, at the destination first.
    fn recover(&self, source: &str, destination: &str, subject: &Subject) -> anyhow::Result<Decided> {
        self.ask(Host::Destination, destination, &[])?;
        let mut decided = Decided::Engine;
        for finding in self.ask(Host::Source, source, &[])? {
            // What was over was decided before.
            let over = matches!(finding["verdict"].as_str(), Some("over" | "under-way"));
            let untouched = finding["text"].as_str().is_some_and(|text| text.contains("not stopped"));
            if !over && !untouched {
                decided = Decided::Recover;
            }
            if finding["settled"] == false {
                decided = Decided::Person;
                let session = finding["session"].as_str().unwrap_or_default();
                // One that cannot go on there is ended there; one that can is the program.
                self.given_up(subject)?;
                let there = self.state(Host::Destination, subject.pid)?.is_some();
                let choice = if there { "--end-here" } else { "--run-here" };
                self.ask(Host::Source, source, &["--session", session, choice])?;
            }
        }
        Ok(decided)
    }

    /// Waits until there is no copy at the destination, or until one that cannot go on would have been ended.
    fn given_up(&self, subject: &Subject) -> anyhow::Result<()> {
        let end = Instant::now() + GIVEN_UP;
        while self.state(Host::Destination, subject.pid)?.is_some() && Instant::now() < end {
            sleep(Duration::from_millis(200))?;
        }
        Ok(())
    }

    /// `pageferry recover --json` there.
    fn ask(&self, host: Host, journal: &str, options: &[&str]) -> anyhow::Result<Vec<Value>> {
        let mut command =
            vec![self.pageferry.as_str(), "recover", "--json", "--journal", journal, "--timeout", "20s"];
        command.extend(options);
        let output = self.hosts.exec(host, &command).stdin(Stdio::null()).output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        if !matches!(output.status.code(), Some(0 | 4)) {
            bail!("pageferry recover: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
        }
        said.lines()
            .map(|line| {
                serde_json::from_str(line).with_context(|| format!("pageferry recover said {line:?}"))
            })
            .collect()
    }

    /// Where copies are when nothing changes any more: what is still being restored is no copy.
    fn settle(&self, subject: &Subject, journal: &Path) -> anyhow::Result<Vec<Host>> {
        let end = Instant::now() + Duration::from_secs(20);
        let mut before = None;
        loop {
            let states = [self.state(BOTH[0], subject.pid)?, self.state(BOTH[1], subject.pid)?];
            let runs = |state: &Option<char>| matches!(state, Some('R' | 'S' | 'D'));
            let quiet = is_over(journal) && states.iter().all(|state| state.is_none() || runs(state));
            let here = [0, 1].map(|at| runs(&states[at]));
            if (quiet && before == Some(here)) || Instant::now() > end {
                // One that stands still is a copy too.
                return Ok(BOTH
                    .into_iter()
                    .zip(states)
                    .filter_map(|(host, state)| state.map(|_| host))
                    .collect());
            }
            before = quiet.then_some(here);
            sleep(Duration::from_millis(100))?;
        }
    }

    fn judge(subject: &Subject, decided: Decided) -> Memory {
        let checked = subject.wait_alive_after(realtime_us()).and_then(|()| subject.check());
        match checked {
            Ok(_) => Memory::Right,
            // The outside has seen more than this copy knows of; the copy itself is whole.
            Err(error) if decided == Decided::Person && error.to_string().contains("the state file") => {
                Memory::AsItMoved
            }
            Err(error) => {
                eprintln!("{error:#}");
                Memory::Wrong
            }
        }
    }

    fn state(&self, host: Host, pid: i32) -> anyhow::Result<Option<char>> {
        let stat = self.sh(host, &format!("cat /proc/{pid}/stat 2>/dev/null"))?;
        let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
        Ok(state.filter(|state| !matches!(state, 'Z' | 'X')))
    }

    fn sh(&self, host: Host, script: &str) -> anyhow::Result<String> {
        let output = self.hosts.exec(host, ["sh", "-c", script]).stdin(Stdio::null()).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    fn left_over(&self, journal: &str) -> anyhow::Result<Vec<String>> {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let mut left = Vec::new();
            for host in BOTH {
                let list = self.sh(host, "ps -e -o stat=,args=")?;
                let bad = list.lines().filter(|line| {
                    let ours = ["criu", "pageferry ", "kill -"].iter().any(|word| line.contains(word));
                    (ours && !line.contains("ps -e")) || line.starts_with(['T', 't', 'Z'])
                });
                left.extend(bad.map(|line| format!("{}: {line}", host.name())));
                let mounts = self.sh(host, "grep -c pageferry /proc/mounts")?;
                let rules = self.sh(host, "nft list tables 2>/dev/null | grep -ciE 'criu|pageferry'")?;
                for (what, count) in [("mounts", mounts), ("firewall tables", rules)] {
                    if !matches!(count.as_str(), "" | "0") {
                        left.push(format!("{}: {count} {what}", host.name()));
                    }
                }
            }
            let journals = fs::read_dir(journal).map_or(0, Iterator::count);
            if journals > 0 {
                left.push(format!("{journals} journals at the source"));
            }
            if left.is_empty() || Instant::now() > end {
                return Ok(left);
            }
            sleep(Duration::from_millis(100))?;
        }
    }

    fn clear(&self, subject: &Subject) -> anyhow::Result<()> {
        for host in BOTH {
            let pid = subject.pid;
            self.sh(host, &format!("kill -s KILL -- -{pid} {pid}"))?;
            wait_for("the end of the program", LIMIT, || Ok(self.state(host, pid)?.is_none().then_some(())))?;
        }
        Ok(())
    }
}

/// Whether the journal in a directory has come to a step.
fn has_written(dir: &Path, step: &str) -> bool {
    let wanted = format!("\"step\":\"{step}\"");
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .any(|entry| fs::read_to_string(entry.path()).is_ok_and(|text| text.contains(&wanted)))
}

/// Whether nothing is under way by the journals in a directory.
fn is_over(dir: &Path) -> bool {
    const LAST: [&str; 3] = ["filled", "discarded", "ended"];
    fs::read_dir(dir).into_iter().flatten().flatten().all(|entry| {
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        // Where an engine was killed its last line is any: the receiver that came after it has nothing to do with it.
        let last = text.lines().next_back().unwrap_or_default();
        let over = LAST.iter().any(|step| last.contains(&format!("\"step\":\"{step}\"")));
        over || !is_locked(&entry.path())
    })
}

/// Whether an engine that lives writes to it.
fn is_locked(path: &Path) -> bool {
    let Ok(file) = fs::File::open(path) else { return false };
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockShared).is_err()
}
