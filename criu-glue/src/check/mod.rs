//! What this machine's criu can really do: found out by doing it.
//!
//! `criu check` says "looks good" where a dump of a simple server fails, so nothing is asked here and everything is
//! tried: a small process with a listening TCP socket and memory that it can verify is dumped, restored, and asked.

mod serve;
mod subject;

use std::os::unix::fs::FileExt;
use std::process::{Command, ExitCode};
use std::time::Duration;

use crate::dump::{Dump, DumpRequest};
use crate::find::Criu;
use crate::hide::{HideKind, Owned};
use crate::image_dir::ImageDir;
use crate::process::Member;
use crate::restore::{Restore, RestoreOptions, Stage};
use serve::{Memory, Served};
use subject::Subject;

const PATIENCE: Duration = Duration::from_secs(10);

/// One thing that was tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What: `criu`, `dump-restore`, `shim`, `synthetic-parent`, `flags`.
    pub name: &'static str,
    /// Whether it works.
    pub ok: bool,
    /// How it went, or why it does not work.
    pub detail: String,
}

/// The `main` of the process that [`by_trying`] dumps and restores. It ends when it is killed.
pub fn subject_main() -> ExitCode {
    match subject::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Tries what a migration needs, on processes of its own, in about a second:
///
/// - `dump-restore`: a dump and a restore of a process with a listening socket;
/// - `shim`: the same with the process's memory hidden by [`HideKind::Shim`] and restored late;
/// - `synthetic-parent`: the same with [`HideKind::SyntheticParent`], which needs soft-dirty;
/// - `flags`: whether the kernel says that no memory has changed its flags before a freeze; otherwise they are read again
///   after it, 10 ms for each GiB, which nothing else needs.
///
/// `subject` makes a command that runs [`subject_main`] in a process of its own: as a rule the program itself
/// with a hidden argument. While it runs, this process is a subreaper, so that nothing is left to be reaped.
pub fn by_trying(criu: &Criu, subject: impl Fn() -> Command) -> Vec<Check> {
    let path = criu.path().display();
    let mut checks = vec![Check { name: "criu", ok: true, detail: format!("{} at {path}", criu.version()) }];
    let was_subreaper = rustix::process::child_subreaper().ok().flatten();
    let own = rustix::process::getpid();
    let _ = rustix::process::set_child_subreaper(Some(own));
    let mut tried = |name, outcome: Result<String, String>| {
        let (ok, detail) = match outcome {
            Ok(detail) => (true, detail),
            Err(detail) => (false, detail),
        };
        checks.push(Check { name, ok, detail });
    };
    for (name, hide) in [
        ("dump-restore", None),
        ("shim", Some(HideKind::Shim)),
        ("synthetic-parent", Some(HideKind::SyntheticParent)),
    ] {
        tried(name, try_one(criu, subject(), hide));
    }
    tried("flags", try_witness(criu, subject()));
    if was_subreaper.is_none() {
        let _ = rustix::process::set_child_subreaper(None);
    }
    checks
}

/// An error and its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

fn try_one(criu: &Criu, command: Command, hide: Option<HideKind>) -> Result<String, String> {
    let mut subject = Subject::start(command)?;
    subject.ask(1)?;
    let pid = subject.pid();
    let images = ImageDir::new().map_err(|e| chain(&e))?;
    let mut memory = Memory::at(subject.address);

    let mut dump = Dump::start(criu, DumpRequest::new(pid, &images, hide.unwrap_or(HideKind::Shim)))
        .map_err(|e| chain(&e))?;
    dump.freeze(PATIENCE).map_err(|e| chain(&e))?;
    let mut owned = Vec::new();
    if hide.is_some() {
        memory.bytes = vec![0; (subject.pages * crate::PAGE_SIZE) as usize];
        std::fs::File::open(format!("/proc/{pid}/mem"))
            .and_then(|mem| mem.read_exact_at(&mut memory.bytes, memory.address))
            .map_err(|e| format!("the subject's memory could not be read: {e}"))?;
        let runs = vec![(subject.address / crate::PAGE_SIZE, subject.pages)];
        owned.push(Owned { pid, vpid: pid, runs: runs.clone(), populated: runs });
    }
    dump.dump(&owned, PATIENCE).map_err(|e| chain(&e))?;
    dump.commit(PATIENCE).map_err(|e| chain(&e))?;
    subject.reap()?;
    let image_bytes: u64 = images.list().map_err(|e| e.to_string())?.iter().map(|(_, size)| size).sum();

    let options = RestoreOptions { lazy: hide.is_some(), ..RestoreOptions::default() };
    let mut restore = Restore::prepare(criu, &images, options).map_err(|e| chain(&e))?;
    let served = if hide.is_some() {
        memory.add_images(&images, pid).map_err(|e| chain(&e))?;
        restore_lazily(&mut restore, &memory, &subject)?
    } else {
        restore.start().map_err(|e| chain(&e))?;
        restore.wait(Stage::PostResume, PATIENCE).map_err(|e| chain(&e))?;
        subject.ask(2)?;
        Served::default()
    };
    // Dropping the restore before it is finished is what ends the restored subject.
    restore.abort().map_err(|e| chain(&e))?;
    reap(pid);
    Ok(match hide {
        None => format!("a process with a listening socket; {} KiB of images", image_bytes >> 10),
        Some(_) => format!(
            "{} KiB of memory hidden, {} KiB of images, {} pages brought in by {} faults, memory intact",
            memory.bytes.len() >> 10,
            image_bytes >> 10,
            served.pages,
            served.pages + served.zeroes
        ),
    })
}

fn try_witness(criu: &Criu, command: Command) -> Result<String, String> {
    let subject = Subject::start(command)?;
    subject.ask(1)?;
    let pid = subject.pid();
    let images = ImageDir::new().map_err(|e| chain(&e))?;
    let mut dump =
        Dump::start(criu, DumpRequest::new(pid, &images, HideKind::Shim)).map_err(|e| chain(&e))?;
    dump.look_ahead(&[pid]);
    dump.freeze(PATIENCE).map_err(|e| chain(&e))?;
    let doubt = dump.doubt().map(|doubt| format!("{doubt}; memory is counted again in the downtime"));
    dump.abort().map_err(|e| chain(&e))?;
    let known =
        "calls that change flags of memory are counted; without any, memory is not counted in the downtime";
    doubt.map_or_else(|| Ok(known.to_owned()), Err)
}

fn restore_lazily(restore: &mut Restore, memory: &Memory, subject: &Subject) -> Result<Served, String> {
    let listener = restore.lazy().map_err(|e| chain(&e))?;
    let (stop, stopper) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|e| e.to_string())?;
    std::thread::scope(|scope| {
        let server = scope.spawn(|| serve::serve(listener, memory, &stop));
        let mut run = || {
            restore.start().map_err(|e| chain(&e))?;
            restore.wait(Stage::PostResume, PATIENCE).map_err(|e| chain(&e))?;
            subject.ask(2)
        };
        let outcome = run();
        drop(stopper);
        let served = server.join().map_err(|_| "the page server panicked".to_owned())?;
        outcome?;
        served
    })
}

/// Reaps the restored subject, which came to us as it was killed. Others' children are not touched.
fn reap(pid: i32) {
    let Ok(Some(member)) = Member::open(pid) else { return };
    let ended = member.ended_by(std::time::Instant::now() + PATIENCE).unwrap_or(false);
    if let (true, Some(pid)) = (ended, rustix::process::Pid::from_raw(pid)) {
        let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::NOHANG);
    }
}
