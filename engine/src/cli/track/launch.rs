//! A command that is tracked from its first page.

use anyhow::{Context, bail};
use pageferry_tracker::Target;
use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

/// Stops itself, and becomes the command when it is let go.
const SCRIPT: &str = "kill -STOP $$; exec \"$@\"";
/// How long a shell may take to stop itself.
const START: Duration = Duration::from_secs(10);

/// A command that was started for this.
#[derive(Debug)]
pub(super) struct Launched {
    child: Child,
    released: bool,
}

impl Launched {
    /// Starts the command, up to the moment before it begins.
    pub(super) fn start(command: &[OsString]) -> anyhow::Result<Self> {
        let name = command.first().context("no command was given")?;
        let program = find(name)?;
        let child = Command::new("/bin/sh")
            .args(["-c", SCRIPT, "sh"])
            .arg(&program)
            .args(&command[1..])
            .spawn()
            .context("starting a shell for the command")?;
        let mut launched = Self { child, released: false };
        let until = Instant::now() + START;
        while launched.state() != Some('T') {
            if Instant::now() > until || launched.child.try_wait()?.is_some() {
                bail!("the shell that starts the command did not come up");
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(launched)
    }

    /// Its process.
    pub(super) fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Lets it begin, and waits until it is the command and no shell any more.
    pub(super) fn release(&mut self) -> anyhow::Result<()> {
        self.released = true;
        let target = Target::open(self.pid())?;
        let shell = std::fs::read_link(format!("/proc/{}/exe", self.pid())).ok();
        rustix::process::pidfd_send_signal(target.pidfd(), rustix::process::Signal::CONT)?;
        let until = Instant::now() + START;
        while std::fs::read_link(format!("/proc/{}/exe", self.pid())).ok() == shell
            && target.is_alive()
            && Instant::now() < until
        {
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }

    /// Waits for its end.
    pub(super) fn wait(&mut self) -> anyhow::Result<ExitStatus> {
        Ok(self.child.wait()?)
    }

    fn state(&self) -> Option<char> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).ok()?;
        stat.rsplit(") ").next()?.chars().next()
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        // Nobody has seen it run: it must not stand there for good.
        if !self.released {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// The exit code by which a command's end is passed on, as shells do it.
pub(super) fn code(status: ExitStatus) -> u8 {
    let code = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}

/// A command in words.
pub(super) fn ended(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("the command ended with exit code {code}"),
        (_, Some(signal)) => format!("the command was ended by signal {signal}"),
        _ => "the command ended".to_owned(),
    }
}

/// Finds a program as a shell does, so that a name that is misspelt is an error of ours and not of a shell's.
fn find(name: &OsString) -> anyhow::Result<std::path::PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let runs = |path: &std::path::Path| {
        path.metadata().is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
    };
    let path = std::path::PathBuf::from(name);
    if path.components().count() > 1 {
        return match runs(&path) {
            true => Ok(path),
            false => bail!("{} is no program that can be run", path.display()),
        };
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&folders).map(|folder| folder.join(&path)).find(|path| runs(path));
    found.with_context(|| format!("the command {} was not found", path.display()))
}
