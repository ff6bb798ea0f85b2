//! A command that is tracked from its first page.

use anyhow::{Context, bail};
use std::ffi::OsString;
use std::io::{PipeReader, PipeWriter, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

/// Waits for a word on a pipe of ours, and becomes the command. When the pipe ends without one (whoever holds its other
/// end has died), nothing is started and nothing stays behind.
const SCRIPT: &str = "read -r go < \"$0\" && exec \"$@\"";
/// How long a shell may take to become the command.
const START: Duration = Duration::from_secs(10);

/// A command that was started for this.
#[derive(Debug)]
pub(super) struct Launched {
    child: Child,
    /// Until it is let go. The reading end stays open for the shell to find it.
    pipe: Option<(PipeReader, PipeWriter)>,
}

impl Launched {
    /// Starts the command, up to the moment before it begins.
    pub(super) fn start(command: &[OsString]) -> anyhow::Result<Self> {
        let name = command.first().context("no command was given")?;
        let program = find(name)?;
        let (reader, writer) = std::io::pipe().context("making a pipe")?;
        let child = Command::new("/bin/sh")
            .args(["-c", SCRIPT])
            .arg(format!("/proc/{}/fd/{}", std::process::id(), reader.as_raw_fd()))
            .arg(&program)
            .args(&command[1..])
            .spawn()
            .context("starting a shell for the command")?;
        Ok(Self { child, pipe: Some((reader, writer)) })
    }

    /// Its process.
    pub(super) fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Lets it begin, and waits until it is the command and no shell any more.
    pub(super) fn release(&mut self) -> anyhow::Result<()> {
        let exe = format!("/proc/{}/exe", self.pid());
        let Some((_reader, mut writer)) = self.pipe.take() else { return Ok(()) };
        let shell = std::fs::read_link(&exe).ok();
        writer.write_all(b"go\n").context("letting the command begin")?;
        let until = Instant::now() + START;
        while std::fs::read_link(&exe).ok() == shell
            && self.child.try_wait()?.is_none()
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
}

impl Drop for Launched {
    fn drop(&mut self) {
        // It never began: the shell goes as soon as the pipe does.
        if self.pipe.take().is_some() {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn touching(path: &std::path::Path) -> Launched {
        let command = ["touch".into(), path.as_os_str().to_owned()];
        Launched::start(&command).expect("a shell")
    }

    #[test]
    fn it_begins_when_it_is_let_go() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("touched");
        let mut launched = touching(&file);
        std::thread::sleep(Duration::from_millis(50));
        assert!(!file.exists(), "it has begun by itself");
        launched.release().expect("it listens");
        assert!(launched.wait().expect("its end").success() && file.exists());
    }

    #[test]
    fn it_never_begins_without_whoever_started_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("touched");
        let mut launched = touching(&file);
        std::thread::sleep(Duration::from_millis(50));
        // As the kernel closes it when this program is killed.
        drop(launched.pipe.take());
        assert!(!launched.wait().expect("its end").success() && !file.exists());
    }
}
