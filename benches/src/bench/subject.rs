//! The program that is moved, seen from outside.

use super::child::{still_wanted, wait_for};
use super::hosts::{Host, Hosts};
use crate::workload::state::{Line, RegionEntry, ask, beside, read_lines};
use anyhow::{Context, bail};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A workload that runs in the source host.
#[derive(Debug)]
pub struct Subject {
    /// Its pid, the same in both hosts.
    pub pid: i32,
    state: PathBuf,
}

impl Subject {
    /// Starts a workload and waits until its memory is filled.
    ///
    /// # Errors
    /// What kept it from starting.
    pub fn start(hosts: &Hosts, scratch: &Path, name: &str, arguments: &[String]) -> anyhow::Result<Self> {
        let program = super::workload()?;
        let state = scratch.join(name);
        let log = scratch.join(format!("{name}.log"));
        let mut command = vec![program.into_os_string()];
        command.extend(arguments.iter().map(Into::into));
        command.extend(["--state".into(), state.clone().into_os_string()]);
        // What an earlier one of this name left is no sign of life of this one.
        for path in [&state, &beside(&state, "map"), &log] {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("removing {}", path.display()));
                }
                _ => {}
            }
        }
        let pid = hosts.start(Host::Source, &log, command)?;
        let subject = Self { pid, state };
        wait_for(&format!("the first sign of life of {name}"), Duration::from_secs(180), || {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            if !text.trim().is_empty() {
                bail!("{name}: {}", text.trim());
            }
            Ok(subject.lines().is_ok_and(|lines| !lines.is_empty()).then_some(()))
        })?;
        Ok(subject)
    }

    /// Its state file so far.
    ///
    /// # Errors
    /// What the file system says.
    pub fn lines(&self) -> anyhow::Result<Vec<Line>> {
        read_lines(&self.state).with_context(|| format!("reading {}", self.state.display()))
    }

    /// Where its memory is.
    ///
    /// # Errors
    /// What the file system says.
    pub fn regions(&self) -> anyhow::Result<Vec<RegionEntry>> {
        let path = beside(&self.state, "map");
        let text = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("understanding {}", path.display()))
    }

    /// Longest time that it stood still since then, and when that ended (microseconds).
    ///
    /// # Errors
    /// What the file system says.
    pub fn longest_gap_since(&self, since_us: u64) -> anyhow::Result<(u64, u64)> {
        let lines = self.lines()?;
        let gaps = lines.iter().filter(|line| line.gap_end_us > since_us);
        Ok(gaps.map(|line| (line.gap_us, line.gap_end_us)).max().unwrap_or((0, 0)))
    }

    /// How long it stood still after that moment in all, counting pauses of more than `least_us` only, and of those between two lines the
    /// longest (microseconds).
    ///
    /// # Errors
    /// What the file system says.
    pub fn pauses_after(&self, moment_us: u64, least_us: u64) -> anyhow::Result<u64> {
        Ok(pauses(&self.lines()?, moment_us, least_us))
    }

    /// Waits until it wrote a line after that moment: it runs.
    ///
    /// # Errors
    /// That it did not.
    pub fn wait_alive_after(&self, moment_us: u64) -> anyhow::Result<()> {
        wait_for("a sign of life of the moved program", Duration::from_secs(60), || {
            Ok(self.lines()?.last().is_some_and(|line| line.at_us > moment_us).then_some(()))
        })
    }

    /// Lets it compare its whole memory with what it must be.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self) -> anyhow::Result<String> {
        still_wanted()?;
        let verdict = beside(&self.state, "verdict");
        if verdict.exists() {
            std::fs::remove_file(&verdict)?;
        }
        ask(&self.state, "")?;
        let text =
            wait_for("a verdict", Duration::from_secs(180), || match std::fs::read_to_string(&verdict) {
                Ok(text) => Ok(Some(text)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error).with_context(|| format!("reading {}", verdict.display())),
            })?;
        match text.strip_prefix("ok ") {
            Some(details) => Ok(details.trim().to_owned()),
            None => bail!("the moved program lost memory: {}", text.trim()),
        }
    }
}

/// Operations a second between two moments, from the lines in between; `None` when there are not two.
pub fn throughput(lines: &[Line], from_us: u64, to_us: u64) -> Option<f64> {
    let mut inside = lines.iter().filter(|line| (from_us..=to_us).contains(&line.at_us));
    let first = inside.next()?;
    let last = inside.next_back()?;
    let seconds = (last.at_us - first.at_us) as f64 / 1e6;
    (seconds > 0.0).then(|| (last.progress - first.progress) as f64 / seconds)
}

/// Of all pauses that began after that moment and took longer than that, how long they took.
fn pauses(lines: &[Line], moment_us: u64, least_us: u64) -> u64 {
    let later =
        lines.iter().filter(|line| line.gap_us > least_us && line.gap_end_us > moment_us + line.gap_us);
    later.map(|line| line.gap_us).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_counts_when_it_began_later_and_was_long() {
        let line = |gap_us, gap_end_us| Line { at_us: gap_end_us, progress: 0, gap_us, gap_end_us };
        let lines = [
            line(9000, 5000),
            line(30_000, 40_000),
            line(7000, 60_000),
            line(4000, 80_000),
            line(6000, 90_000),
        ];
        assert_eq!(pauses(&lines, 20_000, 5000), 13_000, "one began before, and one was short");
        assert_eq!(pauses(&lines, 0, 5000), 43_000);
    }

    #[test]
    fn throughput_counts_only_what_is_inside() {
        let line = |at_us, progress| Line { at_us, progress, gap_us: 0, gap_end_us: 0 };
        let lines = [line(0, 0), line(1_000_000, 50), line(2_000_000, 150), line(3_000_000, 1000)];
        assert_eq!(throughput(&lines, 1_000_000, 2_500_000), Some(100.0));
        assert_eq!(throughput(&lines, 1_500_000, 2_500_000), None);
        assert_eq!(throughput(&lines, 5_000_000, 6_000_000), None);
    }
}
