//! How a workload tells the outside what it does, through files that survive its migration.
//!
//! For `--state FILE`:
//! - `FILE`: one JSON line about every 50 ms ([`Line`]), appended. The first line means: the memory is filled
//!   and being written. `progress` never goes back.
//! - `FILE.map`: JSON, where the regions are ([`RegionEntry`]); written before the first line.
//! - `FILE.check`: made by whoever wants to know (its content, if any, is a token). The workload removes it,
//!   compares its whole memory with what it must be, and answers in
//! - `FILE.verdict`: `ok <details>` or `corrupt <what>`, with ` #<token>` if one was given; put in place whole.
//!   Then the workload goes on.

use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// How often a line is written and a check looked for, in microseconds.
const LINE_EVERY_US: u64 = 50_000;

/// One line of the state file.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// CLOCK_REALTIME, microseconds since 1970. (CLOCK_MONOTONIC does not show how long a restored program
    /// stood still: CRIU gives it a time namespace in which nothing happened.)
    pub at_us: u64,
    /// Operations since the start.
    pub progress: u64,
    /// Longest time between two iterations since the line before, in microseconds.
    pub gap_us: u64,
    /// When that gap ended.
    pub gap_end_us: u64,
}

/// A region that a workload checks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RegionEntry {
    /// Name, as verdicts call it.
    pub name: String,
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// A check that was asked for and not answered yet.
#[derive(Debug)]
#[must_use = "whoever asked waits for the verdict"]
pub struct Check {
    token: String,
}

/// Result of a check: details of what was compared, or what is wrong.
pub type Verdict = Result<String, String>;

/// The state file of a running workload.
#[derive(Debug)]
pub struct State {
    path: PathBuf,
    file: File,
    line_due_us: u64,
    last_beat_us: u64,
    gap_us: u64,
    gap_end_us: u64,
}

/// CLOCK_REALTIME in microseconds.
pub fn realtime_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

/// `path` with an ending of the protocol: `map`, `check`, `verdict`.
pub fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(ending);
    name.into()
}

impl State {
    /// Starts a new state file and removes what an earlier workload left beside it.
    ///
    /// # Errors
    /// What the file system says.
    pub fn create(path: &Path) -> io::Result<Self> {
        for ending in ["map", "check", "verdict", "verdict.new"] {
            match fs::remove_file(beside(path, ending)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        File::create(path)?;
        // Appending, so that a position that was lost or kept does not matter.
        let file = OpenOptions::new().read(true).append(true).open(path)?;
        let path = fs::canonicalize(path)?;
        Ok(Self { path, file, line_due_us: 0, last_beat_us: 0, gap_us: 0, gap_end_us: 0 })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Says where the regions are.
    ///
    /// # Errors
    /// What the file system says.
    pub fn describe(&self, regions: &[RegionEntry]) -> io::Result<()> {
        fs::write(beside(&self.path, "map"), serde_json::to_vec(regions)?)
    }

    /// To be called in every iteration: measures the gap since the last call, and every 50 ms writes a line and
    /// looks whether a check is wanted.
    ///
    /// # Errors
    /// What the file system says.
    pub fn beat(&mut self, progress: u64) -> io::Result<Option<Check>> {
        let now = self.measure();
        if now < self.line_due_us {
            return Ok(None);
        }
        self.line_due_us = now + LINE_EVERY_US;
        self.append(now, progress)?;
        self.check_wanted()
    }

    /// Writes a line now, whatever the time.
    ///
    /// # Errors
    /// What the file system says.
    pub fn line(&mut self, progress: u64) -> io::Result<()> {
        let now = self.measure();
        self.append(now, progress)
    }

    /// Takes the time and the gap since the last time that this was done.
    fn measure(&mut self) -> u64 {
        let now = realtime_us();
        if self.last_beat_us != 0 {
            let gap = now.saturating_sub(self.last_beat_us);
            if gap >= self.gap_us {
                (self.gap_us, self.gap_end_us) = (gap, now);
            }
        }
        self.last_beat_us = now;
        now
    }

    fn append(&mut self, now: u64, progress: u64) -> io::Result<()> {
        let line = Line { at_us: now, progress, gap_us: self.gap_us, gap_end_us: self.gap_end_us };
        let mut text = serde_json::to_string(&line)?;
        text.push('\n');
        self.file.write_all(text.as_bytes())?;
        (self.gap_us, self.gap_end_us) = (0, now);
        Ok(())
    }

    /// Looks whether a check is wanted, and takes it.
    ///
    /// # Errors
    /// What the file system says.
    pub fn check_wanted(&self) -> io::Result<Option<Check>> {
        let asked = beside(&self.path, "check");
        match fs::read_to_string(&asked) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
            Ok(token) => {
                fs::remove_file(asked)?;
                Ok(Some(Check { token: token.trim().to_owned() }))
            }
        }
    }

    /// Checks what the program counted against what it told the outside before: memory that went back in time as
    /// a whole looks right to itself.
    ///
    /// # Errors
    /// What does not fit, or why the file could not be read.
    pub fn agrees_with(&mut self, progress: u64) -> Result<(), String> {
        match last_line(&mut self.file) {
            Err(error) => Err(format!("the state file cannot be read: {error}")),
            Ok(None) => Err("the state file is empty".to_owned()),
            Ok(Some(line)) if line.progress > progress => {
                Err(format!("memory says {progress} operations, the state file {}", line.progress))
            }
            Ok(Some(_)) => Ok(()),
        }
    }

    /// Answers a check. The time that it took does not count as a gap.
    ///
    /// # Errors
    /// What the file system says.
    pub fn answer(&mut self, check: Check, verdict: &Verdict) -> io::Result<()> {
        let mut text = match verdict {
            Ok(details) => format!("ok {details}"),
            Err(what) => format!("corrupt {what}"),
        };
        if !check.token.is_empty() {
            text.push_str(" #");
            text.push_str(&check.token);
        }
        text.push('\n');
        let new = beside(&self.path, "verdict.new");
        fs::write(&new, text)?;
        fs::rename(new, beside(&self.path, "verdict"))?;
        self.last_beat_us = realtime_us();
        Ok(())
    }
}

/// Asks the workload that writes this state file to check its memory; the verdict ends with the token, if it is not empty. It looks for the
/// file all the time, and must not find one that is only half written.
///
/// # Errors
/// What the file system says.
pub fn ask(state: &Path, token: &str) -> io::Result<()> {
    let new = beside(state, "check.new");
    fs::write(&new, token)?;
    fs::rename(new, beside(state, "check"))
}

/// The last complete line of a state file.
fn last_line(file: &mut File) -> io::Result<Option<Line>> {
    let end = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(end.saturating_sub(1024)))?;
    let mut tail = String::new();
    file.read_to_string(&mut tail)?;
    Ok(tail.lines().rev().find_map(|line| serde_json::from_str(line).ok()))
}

/// All complete lines of a state file, for who watches a workload. An unfinished last line is left out.
///
/// # Errors
/// What the file system says; `InvalidData` for a line that is none.
pub fn read_lines(path: &Path) -> io::Result<Vec<Line>> {
    let text = fs::read_to_string(path)?;
    let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
    whole.lines().map(|line| serde_json::from_str(line).map_err(io::Error::from)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_is_answered_once_with_its_token() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("state");
        let mut state = State::create(&path).expect("create");
        assert!(state.beat(1).expect("beat").is_none());
        ask(&path, "7\n").expect("ask");
        state.line_due_us = 0;
        let check = state.beat(2).expect("beat").expect("seen");
        assert!(!beside(&path, "check").exists());
        state.answer(check, &Err("page 3".to_owned())).expect("answer");
        assert_eq!(fs::read_to_string(beside(&path, "verdict")).expect("verdict"), "corrupt page 3 #7\n");
        let lines = read_lines(&path).expect("lines");
        assert_eq!(lines.iter().map(|line| line.progress).collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn progress_that_went_back_is_found() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut state = State::create(&dir.path().join("state")).expect("create");
        assert!(state.agrees_with(5).is_err(), "an empty file proves nothing");
        state.line(10).expect("line");
        assert!(state.agrees_with(10).is_ok());
        assert!(state.agrees_with(9).is_err());
    }
}
