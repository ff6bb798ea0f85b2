//! Fills redis with values that can be computed again.

use super::resp::{Connection, Reply};
use super::{Look, SHORTEST, Values};
use crate::workload::content::Entropy;
use anyhow::Context;
use bytesize::ByteSize;
use clap::Args;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

/// Bytes of commands under way at most.
const WINDOW: usize = 1 << 20;
/// Time for one answer: 5000 ticks of [`TICK`].
const PATIENCE: u32 = 5000;
const TICK: Duration = Duration::from_millis(2);

/// Which keys, and what they hold: `redis-verify` needs the same.
#[derive(Clone, Debug, Args)]
pub struct Family {
    /// Bytes of values altogether
    #[arg(long, default_value = "512MiB")]
    pub bytes: ByteSize,
    /// Bytes of a value
    #[arg(long = "fill-value-size", default_value_t = 4096)]
    pub value_size: usize,
    /// Seed of the values
    #[arg(long = "fill-seed", default_value_t = 11)]
    pub seed: u64,
    /// Values that compress well
    #[arg(long)]
    pub compressible: bool,
    /// Values as of web sessions: JSON with ids, names, times and random tokens
    #[arg(long, conflicts_with = "compressible")]
    pub sessions: bool,
}

impl Family {
    /// Number of keys, `fill:0` and following.
    pub fn keys(&self) -> u64 {
        self.bytes.as_u64().div_ceil(self.value_size.max(SHORTEST) as u64)
    }

    /// How values are made.
    pub fn values(&self) -> Values {
        let look = match (self.sessions, self.compressible) {
            (true, _) => Look::Session,
            (false, true) => Look::Words(Entropy::Compressible),
            (false, false) => Look::Words(Entropy::Incompressible),
        };
        Values { seed: self.seed, size: self.value_size.max(SHORTEST), look }
    }

    /// Name of a key.
    pub fn name(key: u64) -> String {
        format!("fill:{key}")
    }
}

/// Options of the filler.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Where redis is
    #[arg(long)]
    pub address: SocketAddr,
    #[command(flatten)]
    family: Family,
}

/// Connects, for a while if need be: redis may be starting.
///
/// # Errors
/// The last attempt's.
pub fn connect(address: SocketAddr) -> anyhow::Result<Connection> {
    let mut attempt = 0;
    loop {
        match Connection::open(address, Duration::from_secs(1), TICK) {
            Ok(connection) => return Ok(connection),
            Err(error) if attempt == 50 => {
                return Err(error).with_context(|| format!("connecting to redis at {address}"));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
        attempt += 1;
    }
}

/// The next answer, within ten seconds.
///
/// # Errors
/// That none came.
pub fn answer(connection: &mut Connection) -> anyhow::Result<Reply> {
    connection.wait_reply(PATIENCE).context("waiting for an answer of redis")
}

/// Writes all keys.
///
/// # Errors
/// What kept it from doing so.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let (family, values) = (&options.family, options.family.values());
    let mut connection = connect(options.address)?;
    let window = (WINDOW / values.size).max(1) as u64;
    let accept = |connection: &mut Connection| match answer(connection)? {
        Reply::Simple(text) if text == "OK" => Ok(()),
        other => Err(anyhow::anyhow!("redis answered a write with {other:?}")),
    };
    for key in 0..family.keys() {
        connection.push(&[b"SET", Family::name(key).as_bytes(), &values.value(key, 0)]);
        connection.flush()?;
        if key >= window {
            accept(&mut connection)?;
        }
    }
    for _ in 0..window.min(family.keys()) {
        accept(&mut connection)?;
    }
    println!("{} keys with {} of values", family.keys(), family.bytes);
    Ok(ExitCode::SUCCESS)
}
