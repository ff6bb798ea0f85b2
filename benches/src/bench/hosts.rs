//! The two hosts (and the client) that migrations go between; taken down on drop.

use super::child;
use anyhow::{Context, ensure};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Longest time that one of the tool's own actions takes.
const LIMIT: Duration = Duration::from_secs(60);

/// A place to run a program in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// Where programs start.
    Source,
    /// Where they go.
    Destination,
    /// Who uses them.
    Client,
}

impl Host {
    /// As the tool calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
            Self::Client => "client",
        }
    }

    /// Its address.
    pub fn address(self) -> &'static str {
        match self {
            Self::Source => "10.77.0.1",
            Self::Destination => "10.77.0.2",
            Self::Client => "10.77.0.3",
        }
    }
}

/// Hosts that are up.
#[derive(Debug)]
pub struct Hosts {
    tool: PathBuf,
    name: String,
}

impl Hosts {
    /// Builds them; `rate` limits the link.
    ///
    /// # Errors
    /// What the tool says.
    pub fn up(tool: &Path, rate: Option<&str>) -> anyhow::Result<Self> {
        Self::up_as(tool, &format!("bench-{}", std::process::id()), rate)
    }

    /// The same under a name of one's own, for who needs several at a time.
    ///
    /// # Errors
    /// What the tool says.
    pub fn up_as(tool: &Path, name: &str, rate: Option<&str>) -> anyhow::Result<Self> {
        let tool = tool.canonicalize().with_context(|| format!("looking for {}", tool.display()))?;
        let hosts = Self { tool, name: name.to_owned() };
        let mut command = hosts.command("up");
        if let Some(rate) = rate {
            command.args(["--rate", rate]);
        }
        // Not with pipes: the hosts live on after it, and may keep hold of what it was given.
        let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status();
        let status = status.with_context(|| format!("starting {}", hosts.tool.display()))?;
        ensure!(status.success(), "two-hosts up failed ({status})");
        Ok(hosts)
    }

    fn command(&self, action: &str) -> Command {
        let mut command = Command::new(&self.tool);
        command.arg(action).args(["--name", &self.name]);
        command
    }

    /// A command that runs a program there and ends with it.
    pub fn exec<S: AsRef<OsStr>>(&self, host: Host, program: impl IntoIterator<Item = S>) -> Command {
        let mut command = self.command("exec");
        command.arg(host.name()).arg("--").args(program);
        command
    }

    /// Starts a program there on its own and returns its pid there.
    ///
    /// # Errors
    /// What the tool says.
    pub fn start<S: AsRef<OsStr>>(
        &self,
        host: Host,
        log: &Path,
        program: impl IntoIterator<Item = S>,
    ) -> anyhow::Result<i32> {
        let mut command = self.command("exec");
        command.arg("--detach").arg("--log").arg(log).arg(host.name()).arg("--").args(program);
        let pid = child::output("two-hosts exec --detach", &mut command, LIMIT)?;
        pid.trim().parse().with_context(|| format!("two-hosts printed {pid:?} instead of a pid"))
    }

    /// Ends a program there by SIGKILL.
    ///
    /// # Errors
    /// What kill says.
    pub fn kill(&self, host: Host, pid: i32) -> anyhow::Result<()> {
        let mut command = self.exec(host, ["kill", "-KILL", &pid.to_string()]);
        child::output("kill", &mut command, LIMIT).map(drop)
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        // Not through `child`, whose waits end at once after a Ctrl-C.
        match self.command("down").status() {
            Ok(status) if status.success() => {}
            other => eprintln!("taking the hosts {} down failed: {other:?}", self.name),
        }
    }
}
