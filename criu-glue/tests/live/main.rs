//! With a real CRIU: what `by_trying` tries, each as a test; and that a tree outlives whoever held it.

#[path = "sys/calls.rs"]
mod calls;
mod memory;
mod restores;
mod server;
#[path = "../../src/sys/uffd.rs"]
mod uffd;
mod witness;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use pageferry_criu_glue::{
    Criu, Dump, DumpRequest, HideKind, ImageDir, Restore, RestoreOptions, Stage, check,
};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// The argument by which this program is the process that is dumped.
const SUBJECT: &str = "__check-subject";
/// The argument by which this program holds a dump at a step until it is killed.
const HOLDER: &str = "__hold";
const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some(SUBJECT) => return check::subject_main(),
        Some(HOLDER) => {
            let step = arguments.next().expect("a step");
            let pid = arguments.next().and_then(|pid| pid.parse().ok()).expect("a pid");
            hold(&step, pid);
        }
        Some(memory::ARGUMENT) => {
            let mut number = || arguments.next().and_then(|n| n.parse().ok()).expect("a number");
            return memory::run(number(), number()).map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
        }
        Some(restores::HOLDER) => restores::hold(),
        Some(restores::CHANGER) => {
            return restores::change().map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
        }
        Some(witness::CALLER) => return witness::run().map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS),
        _ => {}
    }
    restores::adopt();
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    let mut add = |name: &str, test: fn() -> Result<(), Failed>| {
        trials.push(Trial::ignorable_test(name.to_owned(), move || {
            match rustix::process::geteuid().is_root() {
                true => test().map(|()| Completion::Completed),
                false => Ok(Completion::ignored_with("needs root")),
            }
        }));
    };
    add("the shim hides memory, and it comes back", || tried("shim"));
    add("a process with a listening socket is dumped and restored", || tried("dump-restore"));
    add("the kernel tells whether flags of memory have changed", || tried("flags"));
    add("a tree outlives its holder at every step", outlives);
    add("an aborted dump leaves the tree running", aborted);
    add("a committed dump ends the tree", committed);
    add("what CRIU cannot dump is refused with its log", refused);
    add("the shim hides every second page, and no other", restores::exact);
    add("areas that were read ahead are those of the freeze", restores::looks_ahead);
    add("areas that changed are found before the commit", restores::areas_changed);
    add("what changes no flags is not taken for it", witness::harmless);
    add("every call that can change flags is seen", witness::seen);
    add("a call that is under way is seen at its end", witness::under_way);
    add("a program with an io_uring is not relied on", witness::io_uring);
    add("runs that cannot be hidden are refused", restores::lies);
    add("a wait is cancelled, and has an end", restores::cancelled);
    add("a restored process treats signals as before", signals);
    add("a tree moves, and its memory comes from elsewhere", restores::moves);
    add("a restore is undone at every stage", restores::undone);
    add("a restored tree dies with its holder before it runs", restores::holder_dies);
    let arguments = Arguments { test_threads: Some(1), ..arguments };
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// An error with its causes, which libtest-mimic leaves out.
fn explain(error: impl std::error::Error) -> Failed {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text.into()
}

fn tried(name: &str) -> Result<(), Failed> {
    let criu = Criu::find(None)?;
    let checks = check::by_trying(&criu, || {
        let mut command = Command::new("/proc/self/exe");
        command.arg(SUBJECT);
        command
    });
    let check = checks.into_iter().find(|check| check.name == name).ok_or("it was not tried")?;
    if check.ok { Ok(()) } else { Err(check.detail.into()) }
}

/// A process to dump: in a session of its own, without open files that lead elsewhere.
struct Sleeper(Child);

impl Sleeper {
    fn start() -> Result<Self, Failed> {
        let child = Command::new("setsid")
            .args(["sleep", "1000"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let sleeper = Self(child);
        let until = Instant::now() + PATIENCE;
        while std::fs::read_to_string(format!("/proc/{}/comm", sleeper.pid()))?.trim() != "sleep" {
            if Instant::now() > until {
                return Err("it never began to sleep".into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(sleeper)
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }

    /// Waits until it is neither traced nor stopped.
    fn runs(&self) -> Result<(), Failed> {
        let until = Instant::now() + PATIENCE;
        loop {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid()))?;
            let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
            let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
            if matches!(state, Some('S' | 'R')) && status.contains("TracerPid:\t0") {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(format!("it does not run on: state {state:?}").into());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn begin(images: &ImageDir, pid: i32) -> Result<Dump, Failed> {
    Dump::start(&Criu::find(None)?, DumpRequest::new(pid, images, HideKind::Shim)).map_err(explain)
}

fn aborted() -> Result<(), Failed> {
    let sleeper = Sleeper::start()?;
    for step in 0..3 {
        let images = ImageDir::new()?;
        let mut dump = begin(&images, sleeper.pid())?;
        if step > 0 {
            dump.freeze(PATIENCE)?;
        }
        if step > 1 {
            dump.dump(&[], PATIENCE)?;
        }
        dump.abort()?;
        sleeper.runs()?;
    }
    Ok(())
}

fn committed() -> Result<(), Failed> {
    let mut sleeper = Sleeper::start()?;
    let images = ImageDir::new()?;
    let mut dump = begin(&images, sleeper.pid())?;
    dump.freeze(PATIENCE)?;
    dump.dump(&[], PATIENCE)?;
    dump.commit(PATIENCE)?;
    let until = Instant::now() + PATIENCE;
    while sleeper.0.try_wait()?.is_none() {
        if Instant::now() > until {
            return Err("it lives on after the commit".into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// CRIU ignores SIGPIPE itself, and what it restores must not have that from it.
fn signals() -> Result<(), Failed> {
    let of = |pid: i32| -> Result<Vec<String>, Failed> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        Ok(status
            .lines()
            .filter(|l| l.starts_with("Sig") && !l.starts_with("SigQ"))
            .map(str::to_owned)
            .collect())
    };
    let mut sleeper = Sleeper::start()?;
    let pid = sleeper.pid();
    let before = of(pid)?;
    let images = ImageDir::new()?;
    let mut dump = begin(&images, pid)?;
    dump.freeze(PATIENCE)?;
    dump.dump(&[], PATIENCE).map_err(explain)?;
    dump.commit(PATIENCE).map_err(explain)?;
    sleeper.0.wait()?;
    let options = RestoreOptions { lazy: false, ..RestoreOptions::default() };
    let mut restore = Restore::prepare(&Criu::find(None)?, &images, options)?;
    restore.start()?;
    restore.wait(Stage::PostResume, PATIENCE).map_err(explain)?;
    let after = of(pid)?;
    restore.abort().map_err(explain)?;
    if before != after { Err(format!("{before:?} became {after:?}").into()) } else { Ok(()) }
}

/// Holds a dump of `pid` at a step, says so, and waits for its end.
fn hold(step: &str, pid: i32) -> ! {
    let images = ImageDir::new().expect("a place for images");
    let mut dump = begin(&images, pid).unwrap_or_else(|error| panic!("{error:?}"));
    if step != "started" {
        dump.freeze(PATIENCE).expect("frozen");
    }
    if step == "dumped" {
        dump.dump(&[], PATIENCE).expect("dumped");
    }
    println!("holding");
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

fn outlives() -> Result<(), Failed> {
    use std::io::{BufRead, BufReader};
    for step in ["started", "frozen", "dumped"] {
        let sleeper = Sleeper::start()?;
        let mut holder = Command::new("/proc/self/exe")
            .args([HOLDER, step, &sleeper.pid().to_string()])
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        let out = holder.stdout.take().ok_or("no output")?;
        BufReader::new(out).read_line(&mut line)?;
        let held = line.trim() == "holding";
        holder.kill()?;
        holder.wait()?;
        if !held {
            return Err(format!("the holder at {step} said {line:?}").into());
        }
        sleeper.runs().map_err(|error| format!("{step}: {error:?}"))?;
    }
    Ok(())
}

fn refused() -> Result<(), Failed> {
    // A socket whose other end is outside of the tree.
    let (_ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    let mut child = Command::new("setsid")
        .args(["sleep", "1000"])
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let images = ImageDir::new()?;
    let result = (|| -> Result<String, Failed> {
        let mut dump = begin(&images, child.id() as i32)?;
        dump.freeze(PATIENCE)?;
        match dump.dump(&[], PATIENCE) {
            Ok(()) => Err("a dangling socket was dumped".into()),
            Err(error) => Ok(explain(error).message().unwrap_or_default().to_owned()),
        }
    })();
    let alive = child.try_wait()?.is_none();
    child.kill()?;
    child.wait()?;
    let text = result?;
    if !alive {
        return Err("the process did not survive the failed dump".into());
    }
    if !text.contains("end of its log") || !text.contains("Error") {
        return Err(format!("the log is not in the error: {text}").into());
    }
    Ok(())
}
