//! Which pages are owed, beside the journal: what the source's engine knows of them and nobody else on its machine does.
//!
//! It is written before the commit, while the destination restores, and is gone with the journal. Whoever goes on in place of an
//! engine that was killed reads it, and compares it with what the destination says that it still has to get.

use super::{Journal, JournalError, Process};
use crate::plan::CodingChoice;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What the first line says of the rest.
const VERSION: u32 = 1;
/// More than the pages of any program take: ten million runs.
const MAX_BYTES: u64 = 256 << 20;

/// How owed pages are sent: the first line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Terms {
    /// Version of the format.
    owed: u32,
    /// Connections beside the one over which pages are asked for.
    pub(crate) streams: u16,
    /// Bytes a second at most.
    pub(crate) bandwidth: Option<u64>,
    /// Per cent of one processor at most.
    #[serde(default)]
    pub(crate) cpu: Option<u32>,
    pub(crate) coding: CodingChoice,
    pub(crate) congestion: Option<String>,
    connect_timeout_us: u64,
    stall_timeout_us: u64,
    post_copy_timeout_us: u64,
}

/// Owed pages of one process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OwedSpace {
    /// Its number on the wire.
    pub(crate) space: u32,
    #[serde(flatten)]
    pub(crate) process: Process,
    /// First page and number of pages of each run.
    pub(crate) runs: Vec<(u64, u64)>,
}

/// The last line: that the lines before it are all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Sum {
    spaces: u64,
    pages: u64,
}

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Owed {
    pub(crate) terms: Terms,
    pub(crate) spaces: Vec<OwedSpace>,
}

/// As microseconds.
fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl Terms {
    /// The terms of a plan, over so many connections and with these limits.
    pub(crate) fn of(plan: &crate::SendPlan, streams: u16, bandwidth: Option<u64>, cpu: Option<u32>) -> Self {
        Self {
            owed: VERSION,
            streams,
            bandwidth,
            cpu,
            coding: plan.coding,
            congestion: plan.congestion.clone(),
            connect_timeout_us: us(plan.connect_timeout),
            stall_timeout_us: us(plan.stall_timeout),
            post_copy_timeout_us: us(plan.post_copy_timeout),
        }
    }

    /// How long to wait for an answer of the receiver to a new connection.
    pub(crate) fn connect_timeout(&self) -> Duration {
        Duration::from_micros(self.connect_timeout_us)
    }

    /// How long a connection may be silent.
    pub(crate) fn stall_timeout(&self) -> Duration {
        Duration::from_micros(self.stall_timeout_us)
    }

    /// How long to try to make connections anew.
    pub(crate) fn post_copy_timeout(&self) -> Duration {
        Duration::from_micros(self.post_copy_timeout_us)
    }
}

/// Where it stands, by where the journal does.
pub(super) fn path_of(journal: &Path) -> PathBuf {
    journal.with_extension("owed")
}

/// Takes it away, if it is there.
pub(super) fn remove(journal: &Path) -> io::Result<()> {
    match std::fs::remove_file(path_of(journal)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

pub(super) fn write(journal: &Path, owed: &Owed) -> Result<(), JournalError> {
    let path = path_of(journal);
    let pages = owed.spaces.iter().flat_map(|space| &space.runs).map(|(_, len)| len).sum();
    let sum = Sum { spaces: owed.spaces.len() as u64, pages };
    let mut text = Vec::new();
    let line = |line: serde_json::Result<()>, text: &mut Vec<u8>| {
        line.expect("numbers and texts become JSON");
        text.push(b'\n');
    };
    line(serde_json::to_writer(&mut text, &owed.terms), &mut text);
    for space in &owed.spaces {
        line(serde_json::to_writer(&mut text, space), &mut text);
    }
    line(serde_json::to_writer(&mut text, &sum), &mut text);
    if text.len() as u64 > MAX_BYTES {
        let source = io::Error::other(format!("it would take {} bytes", text.len()));
        return Err(Journal::failed(&path, "written")(source));
    }
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
    let mut file = file.map_err(Journal::failed(&path, "made"))?;
    file.write_all(&text).map_err(Journal::failed(&path, "written"))
}

/// Reads it; `None` if there is none.
pub(super) fn read(journal: &Path) -> Result<Option<Owed>, JournalError> {
    let path = path_of(journal);
    let file = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(Journal::failed(&path, "read"))?,
    };
    let mut text = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(Journal::failed(&path, "read"))?;
    parse(&text).map(Some).map_err(|why| JournalError::Format { path, why })
}

fn parse(text: &[u8]) -> Result<Owed, String> {
    if text.len() as u64 > MAX_BYTES {
        return Err("it is too long".to_owned());
    }
    let said = |error: serde_json::Error| error.to_string();
    let mut lines = text.strip_suffix(b"\n").ok_or("its end is missing")?.split(|byte| *byte == b'\n');
    let terms: Terms = serde_json::from_slice(lines.next().unwrap_or_default()).map_err(said)?;
    if terms.owed != VERSION {
        return Err(format!("it is of version {}", terms.owed));
    }
    let mut lines: Vec<&[u8]> = lines.collect();
    let sum: Sum = match lines.pop() {
        Some(line) => serde_json::from_slice(line).map_err(|_| "its end is missing")?,
        None => return Err("its end is missing".to_owned()),
    };
    let spaces: Vec<OwedSpace> =
        lines.into_iter().map(serde_json::from_slice).collect::<Result<_, _>>().map_err(said)?;
    let mut pages = 0u64;
    for space in &spaces {
        let mut end = 0;
        for (start, len) in &space.runs {
            let next = start.checked_add(*len).filter(|next| *next > *start && *start >= end);
            end = next.ok_or_else(|| format!("the pages of space {} are in no order", space.space))?;
            pages += len;
        }
    }
    match sum == (Sum { spaces: spaces.len() as u64, pages }) {
        true => Ok(Owed { terms, spaces }),
        false => Err("it is not whole".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owed() -> Owed {
        let plan = crate::SendPlan::new(7, "10.0.0.2:7077".parse::<std::net::SocketAddr>().unwrap());
        let space = |space, pid, runs: &[(u64, u64)]| OwedSpace {
            space,
            process: Process { pid, start: 99 },
            runs: runs.to_vec(),
        };
        Owed {
            terms: Terms::of(&plan, 2, Some(1 << 20), Some(50)),
            spaces: vec![space(0, 7, &[(16, 2), (18, 1), (4096, 512)]), space(3, 8, &[(1, 1)])],
        }
    }

    #[test]
    fn it_is_read_as_it_was_written_and_only_for_root() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let journal = dir.path().join("7.source.jsonl");
        assert_eq!(read(&journal).unwrap(), None);
        write(&journal, &owed()).unwrap();
        assert_eq!(read(&journal).unwrap(), Some(owed()));
        assert_eq!(owed().terms.stall_timeout(), Duration::from_secs(30));
        let mode = std::fs::metadata(path_of(&journal)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(write(&journal, &owed()).is_err(), "it is written once");
        remove(&journal).unwrap();
        remove(&journal).unwrap();
        assert_eq!(read(&journal).unwrap(), None);
    }

    #[test]
    fn what_is_not_whole_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let journal = dir.path().join("7.source.jsonl");
        write(&journal, &owed()).unwrap();
        let whole = std::fs::read(path_of(&journal)).unwrap();
        for end in 0..whole.len() {
            assert!(parse(&whole[..end]).is_err(), "{end} bytes of {}", whole.len());
        }
        let text = String::from_utf8(whole).unwrap();
        for (before, after) in [
            ("\"owed\":1", "\"owed\":2"),
            ("[16,2]", "[16,3]"),
            ("[16,2],[18,1]", "[18,1],[16,2]"),
            ("[16,2]", "[16,0]"),
            ("[4096,512]", "[18446744073709551615,512]"),
            ("\"pages\":516", "\"pages\":515"),
        ] {
            assert!(text.contains(before), "{before} is not in {text}");
            assert!(parse(text.replacen(before, after, 1).as_bytes()).is_err(), "{after}");
        }
    }
}
