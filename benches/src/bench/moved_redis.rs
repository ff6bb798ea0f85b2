//! A redis-server that is moved from one host to the other, filled with values that can be computed again.

use super::child;
use super::hosts::{Host, Hosts};
use super::workload;
use crate::redis::verify::VerifyReport;
use anyhow::{Context, ensure};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Port of redis.
const REDIS: u16 = 6379;
/// Longest time that filling and verifying take.
const LIMIT: Duration = Duration::from_secs(300);

/// A redis-server in the source host, until it is moved.
#[derive(Debug)]
pub struct MovedRedis {
    /// Its pid, the same in both hosts.
    pub pid: i32,
    /// What its values are, as options of `redis-fill`.
    family: Vec<String>,
    /// Where reports of clients go.
    scratch: PathBuf,
}

impl MovedRedis {
    /// Starts it without persistence, and fills it as `family` says (options of `redis-fill`).
    ///
    /// # Errors
    /// What kept it from starting or from being filled.
    pub fn start(hosts: &Hosts, scratch: &Path, family: &[&str]) -> anyhow::Result<Self> {
        let (port, folder) = (REDIS.to_string(), scratch.to_string_lossy().into_owned());
        // No save points: an empty list of them is an empty argument.
        let server = ["redis-server", "--port", &port, "--bind", "0.0.0.0", "--protected-mode", "no"];
        let quiet = ["--save", "", "--appendonly", "no", "--dir", &folder];
        let words = server.iter().chain(&quiet);
        let pid = hosts.start(Host::Source, &scratch.join("redis.log"), words)?;
        let program = workload()?.to_string_lossy().into_owned();
        let address = Self::address(Host::Source);
        let fill = [program.as_str(), "redis-fill", "--address", &address];
        child::output("redis-fill", &mut hosts.exec(Host::Client, fill.iter().chain(family)), LIMIT)?;
        let family = family.iter().map(|&word| word.to_owned()).collect();
        Ok(Self { pid, family, scratch: scratch.to_owned() })
    }

    /// Where it listens while it is in that host.
    pub fn address(host: Host) -> String {
        format!("{}:{REDIS}", host.address())
    }

    /// Has the client look, at the destination, whether every value is there; `more` are further options of `redis-verify`.
    ///
    /// # Errors
    /// What was lost, or what kept it from looking.
    pub fn verify(&self, hosts: &Hosts, more: &[&str]) -> anyhow::Result<()> {
        let verified = self.look(hosts, more)?;
        ensure!(verified.lost == 0, "the moved redis lost data: {:?}", verified.first_lost);
        Ok(())
    }

    /// The same, and says what was found.
    ///
    /// # Errors
    /// What kept it from looking.
    pub fn look(&self, hosts: &Hosts, more: &[&str]) -> anyhow::Result<VerifyReport> {
        let report = self.scratch.join("redis-verify.json");
        let _ = std::fs::remove_file(&report);
        let path = report.to_string_lossy().into_owned();
        let program = workload()?.to_string_lossy().into_owned();
        let address = Self::address(Host::Destination);
        let mut verify = vec![program.as_str(), "redis-verify", "--address", &address];
        verify.extend(self.family.iter().map(String::as_str));
        verify.extend(more);
        verify.extend(["--report", &path]);
        let said = child::output("redis-verify", &mut hosts.exec(Host::Client, verify), LIMIT);
        // With something lost its exit status says so, and its report how much.
        let text = match std::fs::read_to_string(&report) {
            Ok(text) => text,
            Err(_) => said?,
        };
        let verified: VerifyReport = serde_json::from_str(&text).context("reading what redis-verify said")?;
        ensure!(verified.filled > 0, "redis-verify looked at nothing");
        Ok(verified)
    }
}
