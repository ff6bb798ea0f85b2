//! Looks whether everything that was filled, and every acknowledged write, is there.

use super::fill::{Family, answer, connect};
use super::journal::Journal;
use super::resp::{Connection, Reply};
use anyhow::Context;
use clap::Args;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

/// Commands under way at most.
const WINDOW: u64 = 128;

/// Options of the verification.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Where redis is
    #[arg(long)]
    pub address: SocketAddr,
    #[command(flatten)]
    family: Family,
    /// What redis-load was told
    #[arg(long, value_name = "FILE")]
    pub journal: Option<PathBuf>,
    /// Write the result there too
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
}

/// The result.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// Filled keys that were looked at.
    pub filled: u64,
    /// Keys with acknowledged writes that were looked at.
    pub written: u64,
    /// Acknowledged writes, of which these hold the last ones.
    pub acknowledged: u64,
    /// Keys that are missing, old or damaged.
    pub lost: u64,
    /// The first of them.
    pub first_lost: Option<String>,
}

impl VerifyReport {
    fn lose(&mut self, what: impl FnOnce() -> String) {
        self.lost += 1;
        if self.first_lost.is_none() {
            self.first_lost = Some(what());
        }
    }
}

/// Reads and compares everything; exit status 1 if anything is lost.
///
/// # Errors
/// What kept it from looking.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let journal = match &options.journal {
        None => None,
        Some(path) => {
            Some(Journal::read(path).with_context(|| format!("reading the journal {}", path.display()))?)
        }
    };
    let mut connection = connect(options.address)?;
    let mut report = VerifyReport::default();
    let values = options.family.values();
    read_all(&mut connection, options.family.keys(), Family::name, |key, value| {
        report.filled += 1;
        if value.and_then(|value| values.version_of(key, value)) != Some(0) {
            report.lose(|| format!("{} is {}", Family::name(key), describe(value)));
        }
    })?;
    if let Some(journal) = journal {
        report.acknowledged = journal.acknowledged;
        let values = journal.values();
        let name = |key| Journal::name(key as usize);
        read_all(&mut connection, journal.keys.len() as u64, name, |key, value| {
            let versions = journal.keys[key as usize];
            report.written += u64::from(versions.acknowledged > 0);
            let right = match value {
                None => versions.allow(None),
                Some(value) => {
                    values.version_of(key, value).is_some_and(|version| versions.allow(Some(version)))
                }
            };
            if !right {
                report.lose(|| format!("{} is {}, acknowledged {versions:?}", name(key), describe(value)));
            }
        })?;
    }
    let text = serde_json::to_string(&report)?;
    println!("{text}");
    if let Some(path) = &options.report {
        std::fs::write(path, text + "\n")?;
    }
    Ok(if report.lost == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn describe(value: Option<&[u8]>) -> String {
    match value {
        None => "missing".to_owned(),
        Some(value) => {
            let version = value.get(8..16).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
            format!("{} bytes that say version {version:?}", value.len())
        }
    }
}

fn read_all(
    connection: &mut Connection,
    keys: u64,
    name: impl Fn(u64) -> String,
    mut look: impl FnMut(u64, Option<&[u8]>),
) -> anyhow::Result<()> {
    let ahead = |connection: &mut Connection, key: u64| {
        if key < keys {
            connection.push(&[b"GET", name(key).as_bytes()]);
        }
    };
    for key in 0..WINDOW {
        ahead(connection, key);
    }
    for key in 0..keys {
        match answer(connection)? {
            Reply::Bulk(value) => look(key, Some(&value)),
            Reply::Nil => look(key, None),
            other => anyhow::bail!("redis answered a read of {} with {other:?}", name(key)),
        }
        ahead(connection, key + WINDOW);
        connection.flush()?;
    }
    Ok(())
}
