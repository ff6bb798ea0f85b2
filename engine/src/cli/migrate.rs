//! `pageferry migrate`.

use super::arguments::{HideName, MigrateVerb, NoConvergenceName, TcpName};
use super::control::open_socket;
use super::failure::{REFUSED, USAGE, describe, exit_code};
use super::progress::{Bars, JsonLines, Plain};
use super::{calibration, render, signals};
use pageferry::control;
use pageferry::model::Site;
use pageferry::{Control, MigrationReport, Observer, SendPlan, SendTo, Silent};
use pageferry_criu_glue::HideKind;
use pageferry_tracker::Target;
use serde::Serialize;
use std::fs::{self, File, OpenOptions};
use std::io::{IsTerminal, Write};
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};

/// The port of a receiver that is named without one.
const PORT: u16 = 7077;

/// Runs the verb.
pub(super) fn run(verb: &MigrateVerb) -> anyhow::Result<u8> {
    let to = match destination(&verb.to) {
        Ok(to) => to,
        Err(text) => {
            eprintln!("error: {text}");
            return Ok(USAGE);
        }
    };
    // Before anything is touched: a report that cannot be written is found out now.
    let file = match verb.report.as_deref().map(ReportFile::open).transpose() {
        Ok(file) => file,
        Err(error) => {
            let path = verb.report.as_deref().unwrap_or(Path::new("")).display();
            eprintln!("error: the report {path} cannot be written\n  because: {error}");
            return Ok(REFUSED);
        }
    };
    let mut plan = plan(verb, to);
    let known = calibration::read(&verb.calibration);
    // A process that is not there is the engine's to tell of.
    let program = Target::open(verb.pid).map(|target| target.name()).unwrap_or_default();
    plan.freeze_cost = known.freeze_cost_by(&program, plan.strategy);
    plan.page_time = known.site(Site::default(), &program).first.time;
    let cancel = signals::token()?;
    let bars;
    let observer: &dyn Observer = if verb.json {
        &JsonLines
    } else if verb.quiet {
        &Silent
    } else if std::io::stderr().is_terminal() {
        bars = Bars::new();
        &bars
    } else {
        &Plain
    };
    let control = Control::new(cancel.clone());
    let usual = control::path_of(verb.pid);
    let socket = open_socket(verb.control.as_deref(), usual, control.clone(), observer);
    let result = pageferry::send_controlled(&plan, observer, &control);
    // Before anybody hears how it ended: who reads that finds no socket.
    drop(socket);
    let (report, code) = match &result {
        Ok(report) => (Some(report), 0),
        Err(error) => (error.report.as_deref(), exit_code(error, cancel.signal())),
    };
    if let Some(report) = report {
        if let Some(file) = file
            && let Err(error) = file.write(report)
        {
            // The migration is what it is; that must not look like its failure.
            eprintln!("warning: the report could not be written: {error}");
        }
        if verb.json {
            super::print(&line(report)?)?;
        } else if result.is_ok() && !verb.quiet {
            super::print(render::report(report).as_bytes())?;
        }
    }
    if let Ok(report) = &result {
        calibration::learn(&verb.calibration, report);
    }
    if let Err(error) = &result {
        eprint!("{}", describe(error));
    }
    Ok(code)
}

fn plan(verb: &MigrateVerb, to: SendTo) -> SendPlan {
    let mut plan = SendPlan::new(verb.pid, to);
    plan.keep_running = verb.keep_running;
    plan.incremental = verb.incremental;
    plan.keep_store.clone_from(&verb.keep_store);
    plan.journal.clone_from(&verb.journal.0);
    plan.strategy = verb.strategy.choice();
    plan.post_copy_after = verb.post_copy_after.0;
    plan.post_copy_timeout = verb.post_copy_timeout.0;
    plan.resume_timeout = verb.resume_timeout.0;
    plan.downtime = verb.downtime.0;
    plan.total_time = verb.total_time.map(|time| time.0);
    plan.max_rounds = verb.max_rounds;
    plan.bandwidth = verb.bandwidth.map(|rate| rate.0);
    plan.engine_memory = verb.engine_memory.map(|size| size.0);
    plan.delta_cache = verb.delta_cache.map(|size| size.0);
    plan.policy = verb.policy;
    plan.on_no_convergence = verb.on_no_convergence.map(NoConvergenceName::choice);
    plan.max_throttle = verb.max_throttle.0;
    plan.max_slowdown = verb.max_slowdown.map(|share| share.0);
    plan.streams = verb.streams;
    plan.congestion = verb.congestion.clone();
    plan.coding = verb.coding.choice();
    plan.cpu = verb.cpu.map(|percent| percent.0);
    plan.tracker = verb.tracker.kind();
    plan.hide = match verb.hide {
        HideName::Auto => None,
        HideName::SyntheticParent => Some(HideKind::SyntheticParent),
        HideName::Shim => Some(HideKind::Shim),
    };
    plan.nice = verb.nice;
    plan.move_addresses.clone_from(&verb.move_address);
    plan.tcp = verb.tcp.map(TcpName::choice);
    plan.hooks = verb.hooks.hooks();
    plan.verify = verb.verify;
    plan.criu = verb.criu.clone();
    plan.shell_job = verb.shell_job;
    plan.connect_timeout = verb.connect_timeout.0;
    plan.stall_timeout = verb.stall_timeout.0;
    plan.resolve_timeout = verb.resolve_timeout.0;
    plan
}

fn destination(text: &str) -> Result<SendTo, String> {
    let path = |path: &str| match path {
        "" => Err(format!("{text:?} names no path (write it like file:/srv/redis.pageferry)")),
        path => Ok(PathBuf::from(path)),
    };
    match text.split_once(':') {
        Some(("file", file)) => path(file).map(SendTo::File),
        Some(("dir", dir)) => path(dir).map(SendTo::Directory),
        _ => resolve(text).map(SendTo::Receiver),
    }
}

fn resolve(text: &str) -> Result<SocketAddr, String> {
    let failed =
        |why: String| format!("{text:?} is no receiver ({why}; write it like 10.0.0.2:7077 or host:7077)");
    let addresses = match text.to_socket_addrs() {
        Ok(addresses) => Ok(addresses.collect::<Vec<_>>()),
        // Perhaps only the port is missing.
        Err(error) => match (text.trim_matches(['[', ']']), PORT).to_socket_addrs() {
            Ok(addresses) if !text.is_empty() => Ok(addresses.collect()),
            _ => Err(error),
        },
    };
    let addresses = addresses.map_err(|error| failed(error.to_string()))?;
    addresses.first().copied().ok_or_else(|| failed("the name has no address".to_owned()))
}

/// The report as an event.
fn line(report: &MigrationReport) -> anyhow::Result<Vec<u8>> {
    #[derive(Serialize)]
    struct Line<'a> {
        event: &'static str,
        #[serde(flatten)]
        report: &'a MigrationReport,
    }
    let mut line = serde_json::to_vec(&Line { event: "report", report })?;
    line.push(b'\n');
    Ok(line)
}

/// A report that appears under its name when it is complete, and not before.
struct ReportFile {
    path: PathBuf,
    draft: PathBuf,
    file: File,
    kept: bool,
}

impl ReportFile {
    fn open(path: &Path) -> std::io::Result<Self> {
        if path.is_dir() {
            return Err(std::io::Error::from(std::io::ErrorKind::IsADirectory));
        }
        let mut name = path.file_name().ok_or(std::io::ErrorKind::InvalidFilename)?.to_owned();
        name.push(format!(".{}.part", std::process::id()));
        let draft = path.with_file_name(name);
        let file = OpenOptions::new().write(true).create_new(true).open(&draft)?;
        Ok(Self { path: path.to_owned(), draft, file, kept: false })
    }

    fn write(mut self, report: &MigrationReport) -> std::io::Result<()> {
        let mut text = serde_json::to_vec_pretty(report)?;
        text.push(b'\n');
        self.file.write_all(&text)?;
        self.file.sync_all()?;
        fs::rename(&self.draft, &self.path)?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for ReportFile {
    fn drop(&mut self) {
        if !self.kept {
            let _ = fs::remove_file(&self.draft);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn receivers_are_found_with_and_without_a_port() {
        assert_eq!(resolve("127.0.0.1:99").unwrap().to_string(), "127.0.0.1:99");
        assert_eq!(resolve("127.0.0.1").unwrap().to_string(), "127.0.0.1:7077");
        assert_eq!(resolve("[::1]").unwrap().to_string(), "[::1]:7077");
        assert!(resolve("").is_err());
        assert!(resolve("127.0.0.1:99999").is_err());
    }

    #[test]
    fn files_and_directories_are_told_from_hosts() {
        assert_eq!(destination("file:/a/b:c").unwrap(), SendTo::File("/a/b:c".into()));
        assert_eq!(destination("dir:here").unwrap(), SendTo::Directory("here".into()));
        assert_eq!(destination("127.0.0.1:99").unwrap().to_string(), "127.0.0.1:99");
        assert!(destination("file:").unwrap_err().contains("names no path"));
    }

    #[test]
    fn a_report_is_there_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report.json");
        drop(ReportFile::open(&path).unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        ReportFile::open(&path).unwrap().write(&MigrationReport::default()).unwrap();
        let back: MigrationReport = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(back.rounds.len(), 0);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(ReportFile::open(&dir.path().join("no/such/dir.json")).is_err());
        assert!(ReportFile::open(dir.path()).is_err());
    }
}
