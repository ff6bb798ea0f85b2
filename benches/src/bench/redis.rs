//! A redis-server of this measurement's own, and the load that redis-benchmark puts on it.

use super::child::{Running, wait_for};
use anyhow::{Context, ensure};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

/// Keys that the load writes, and the size of a value: some 60 MB, of which a scan a second finds most dirty.
pub const KEYS: u32 = 500_000;
/// Bytes of a value.
pub const VALUE: u32 = 64;

/// A redis-server on a free port of the loopback, without persistence. It ends with this value.
#[derive(Debug)]
pub struct Server {
    running: Running,
    port: u16,
}

impl Server {
    /// Starts it, and fills it with the keys that [`Server::load`] writes.
    ///
    /// # Errors
    /// That it, or redis-benchmark, is not installed or does not start.
    pub fn start() -> anyhow::Result<Self> {
        // Free now; nobody else on this machine is expected to want it within a millisecond.
        let port = TcpListener::bind(("127.0.0.1", 0)).and_then(|free| free.local_addr())?.port();
        let mut command = Command::new("redis-server");
        command.args([
            "--port",
            &port.to_string(),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
        ]);
        let mut running = Running::start("redis-server", &mut command).context("is redis installed?")?;
        wait_for("redis-server", Duration::from_secs(10), || {
            let ended = running.ended()?;
            ensure!(ended.is_none(), "redis-server ended:\n{}", running.last_words());
            Ok(TcpStream::connect(("127.0.0.1", port)).ok())
        })?;
        let server = Self { running, port };
        let mut fill = server.load(u64::from(KEYS) * 4)?;
        fill.finish(Duration::from_secs(120))?;
        Ok(server)
    }

    /// Its pid.
    pub fn pid(&self) -> i32 {
        self.running.pid()
    }

    /// Puts `requests` SETs of random keys on it, 16 in flight on each of 50 connections: `redis-benchmark -P 16`.
    ///
    /// # Errors
    /// That redis-benchmark does not start.
    pub fn load(&self, requests: u64) -> anyhow::Result<Running> {
        let mut command = Command::new("redis-benchmark");
        let [port, requests, keys, value] =
            [u64::from(self.port), requests, u64::from(KEYS), u64::from(VALUE)]
                .map(|number| number.to_string());
        command.args([
            "-p", &port, "-P", "16", "-n", &requests, "-r", &keys, "-d", &value, "-t", "set", "--csv",
        ]);
        Running::start("redis-benchmark", &mut command).context("is redis-benchmark (redis-tools) installed?")
    }
}

/// Requests a second, from what `redis-benchmark --csv` printed.
///
/// # Errors
/// That it is not there.
pub fn throughput(load: &Running) -> anyhow::Result<f64> {
    let lines = load.lines();
    let line = lines.iter().map(|line| line.text.as_str()).find(|line| line.starts_with("\"SET\""));
    let rate = line.and_then(|line| line.split(',').nth(1)).map(|rate| rate.trim_matches('"').parse());
    rate.with_context(|| format!("redis-benchmark said no rate:\n{}", load.last_words()))?
        .context("reading the rate of redis-benchmark")
}
