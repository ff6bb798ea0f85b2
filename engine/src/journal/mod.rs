//! What each side of a migration writes down while it goes, so that after the end of an engine it can be said what is where.
//!
//! Each side keeps a file for each session: one JSON object a line, one line for each step, appended before the step's effect
//! can be seen by anybody. The engine holds a lock on the file (`flock`), which the kernel takes away with the engine: a file
//! without a lock is what an engine left behind. At an end that leaves nothing open the file is removed.
//!
//! The directory is on `/run`: it is gone after a restart of the machine, as are the processes that it speaks of.
//!
//! [`recover`] reads what was left behind and brings it to an end.

mod ask;
mod copy;
mod owed;
pub mod recover;
#[cfg(test)]
mod simulated;
mod verdict;

pub(crate) use ask::ask;
pub(crate) use owed::{Owed, OwedSpace, Terms};

use pageferry_tracker::{Stillness, Target};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Where the journals are unless something else is asked for.
pub const DIRECTORY: &str = "/run/pageferry/journal";
/// What the first line says of the rest.
const VERSION: u32 = 1;
/// The line of the step `filled`, for who cannot tell the time.
pub(crate) const FILLED_LINE: &str = r#"{"step":"filled","at_us":0}"#;
/// How long others may have the lock of a journal only to read it.
const GLANCE: Duration = Duration::from_secs(1);
/// More than any journal has: two lines for each step, and the processes of a large tree.
const MAX_BYTES: u64 = 16 << 20;

/// Which side wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The one that the program leaves.
    Source,
    /// The one that it comes to.
    Destination,
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Role::Source => "source",
            Role::Destination => "destination",
        })
    }
}

/// How far a side has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Memory travels; the program runs at the source.
    PreCopy,
    /// Source: the tree is frozen by CRIU.
    Frozen,
    /// Source: a SIGSTOP waits in every process.
    Held,
    /// Destination: the tree is restored, and does not run yet.
    Ready,
    /// Source: the commit may have been sent. Destination: it has come, and the tree is let go.
    Committing,
    /// The program runs at the destination, and pages of it may be on their way.
    Resumed,
    /// Every page is in place at the destination: the program needs nobody any more.
    Filled,
    /// Source: it could not be found out what became of the commit.
    InDoubt,
    /// Destination: there is no copy here, and there will be none.
    Discarded,
    /// Destination: it ran here, and was ended because its pages did not come.
    Ended,
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Step::PreCopy => "pre-copy",
            Step::Frozen => "frozen",
            Step::Held => "held",
            Step::Ready => "ready",
            Step::Committing => "committing",
            Step::Resumed => "resumed",
            Step::Filled => "filled",
            Step::InDoubt => "in doubt",
            Step::Discarded => "discarded",
            Step::Ended => "ended",
        })
    }
}

/// A process, such that another one of the same number is not taken for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Process id, as the engine saw it.
    pub pid: i32,
    /// When it started, in clock ticks after the machine: field 22 of `/proc/PID/stat`.
    pub start: u64,
}

impl Process {
    /// The processes that targets stand for.
    pub(crate) fn of(targets: &[Target]) -> Vec<Self> {
        targets.iter().map(|target| Self { pid: target.pid(), start: target.start_time() }).collect()
    }
}

/// How a process stood when somebody went on in place of its engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stood {
    /// Which.
    #[serde(flatten)]
    pub process: Process,
    /// Its threads.
    pub threads: u64,
    /// How often these had been taken off a processor: as often, and they have not run since.
    pub switches: u64,
}

impl Stood {
    /// Whether it is of this process.
    fn is_of(&self, target: &Target) -> bool {
        (self.process.pid, self.process.start) == (target.pid(), target.start_time())
    }

    fn stillness(&self) -> Stillness {
        Stillness { threads: self.threads, switches: self.switches }
    }
}

/// The first line of a journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begin {
    /// Version of the format.
    pub journal: u32,
    /// Who writes.
    pub role: Role,
    /// Identity of the session: 32 hexadecimal digits.
    pub session: String,
    /// Process id of the engine, or of who went on in its place last.
    pub engine: i32,
    /// The other side: at the source where the program goes to, at the destination who connected.
    pub peer: String,
    /// Name of the program.
    pub program: String,
    /// Source: the root of the tree.
    pub root: Option<Process>,
    /// When it began, in microseconds of Unix time.
    pub began_us: u64,
}

/// A further line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Line {
    step: Step,
    at_us: u64,
    /// Microseconds after the machine's start: what is old is told by a clock that nobody sets.
    #[serde(default)]
    up_us: u64,
    /// The tree, where the step made it known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    processes: Vec<Process>,
    /// Source, with the commit: pages of the program stay here for a while after it runs there.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    owes: bool,
    /// Source, with the commit: addresses that are taken away here with it, as `--move-address` names them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    addresses: Vec<String>,
    /// Source, with the commit: where the pages of the program are kept when it has moved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    keep_store: Option<String>,
    /// Source: this process goes on in place of an engine that has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    engine: Option<i32>,
    /// ... and this is how the tree stands.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    stood: Vec<Stood>,
}

/// A journal as it was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Its file.
    pub path: PathBuf,
    /// The first line.
    #[serde(flatten)]
    pub begin: Begin,
    /// The last step that was written down.
    pub step: Step,
    /// When, in microseconds of Unix time.
    pub at_us: u64,
    /// ... and how long after the machine's start that was, in microseconds.
    pub up_us: u64,
    /// The processes of the tree, as far as they were written down.
    pub processes: Vec<Process>,
    /// Whether the program at the destination needs pages that are at the source.
    pub owes: bool,
    /// Addresses that may have been taken away at the source, as `--move-address` names them.
    pub addresses: Vec<String>,
    /// Directory in which the source keeps the pages of the program when it has moved.
    pub keep_store: Option<PathBuf>,
    /// How the tree stood when somebody first went on in place of the engine.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stood: Vec<Stood>,
    /// Whether its engine lives.
    pub live: bool,
}

/// Why a journal cannot be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file system said no.
    #[error("the journal {path} cannot be {what}")]
    Io {
        /// Which file or directory.
        path: PathBuf,
        /// Done what to.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is not what this version writes.
    #[error("{path} is no journal that this version can read: {why}")]
    Format {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// A directory of journals.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Journal {
    dir: PathBuf,
}

/// A journal that is being written. Dropping it leaves the file as it is.
#[derive(Debug)]
pub(crate) struct Writer {
    file: File,
    path: PathBuf,
}

fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

/// Time since the machine was started, also while it slept.
fn up_us() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1000
}

impl Journal {
    /// The journals in a directory, which need not exist.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    fn failed(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> JournalError {
        let path = path.to_owned();
        move |source| JournalError::Io { path, what, source }
    }

    /// Begins one. Makes the directory, for root alone.
    ///
    /// # Errors
    /// [`JournalError::Io`].
    pub(crate) fn begin(
        &self,
        role: Role,
        session: u128,
        peer: &str,
        program: &str,
        root: Option<Process>,
    ) -> Result<Writer, JournalError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .map_err(Self::failed(&self.dir, "made"))?;
        let path = self.path(role, session);
        let file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(&path);
        let file = file.map_err(Self::failed(&path, "made"))?;
        let mut writer = Writer { file, path };
        // Nobody else knows the file yet, but whoever lists the directory may try the lock just now.
        flock(&writer.file, FlockOperation::LockExclusive)
            .map_err(|errno| Self::failed(&writer.path, "locked")(errno.into()))?;
        writer.line(&Begin {
            journal: VERSION,
            role,
            session: format!("{session:032x}"),
            engine: std::process::id() as i32,
            peer: peer.to_owned(),
            program: program.to_owned(),
            root,
            began_us: now_us(),
        })?;
        writer.step(Step::PreCopy, &[])?;
        Ok(writer)
    }

    fn path(&self, role: Role, session: u128) -> PathBuf {
        self.dir.join(format!("{session:032x}.{role}.jsonl"))
    }

    /// All of them, oldest first, and those that cannot be read.
    ///
    /// # Errors
    /// When the directory cannot be read. That there is none is no error: nothing was left behind.
    pub fn entries(&self) -> Result<(Vec<Entry>, Vec<JournalError>), JournalError> {
        let (mut entries, mut broken) = (Vec::new(), Vec::new());
        let listing = match std::fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((entries, broken)),
            listing => listing.map_err(Self::failed(&self.dir, "read"))?,
        };
        for file in listing {
            let path = file.map_err(Self::failed(&self.dir, "read"))?.path();
            if path.extension().is_none_or(|extension| extension != "jsonl") {
                continue;
            }
            match read(&path) {
                Ok(Some(entry)) => entries.push(entry),
                Ok(None) => {}
                Err(error) => broken.push(error),
            }
        }
        entries.sort_by_key(|entry| entry.begin.began_us);
        Ok((entries, broken))
    }

    /// What a side wrote of a session.
    ///
    /// # Errors
    /// [`JournalError`].
    pub(crate) fn find(&self, role: Role, session: u128) -> Result<Option<Entry>, JournalError> {
        read(&self.path(role, session))
    }

    /// Removes what destinations' engines left behind and nobody will ask about any more.
    pub(crate) fn forget_older_than(&self, age: Duration) {
        let (entries, _) = self.entries().unwrap_or_default();
        let now = up_us();
        for entry in entries {
            if entry.begin.role == Role::Destination
                && !entry.live
                && now.saturating_sub(entry.up_us) > age.as_micros() as u64
            {
                let _ = std::fs::remove_file(&entry.path);
            }
        }
    }
}

impl Line {
    fn new(step: Step) -> Self {
        Self {
            step,
            at_us: now_us(),
            up_us: up_us(),
            processes: Vec::new(),
            owes: false,
            addresses: Vec::new(),
            keep_store: None,
            engine: None,
            stood: Vec::new(),
        }
    }
}

impl Writer {
    fn line(&mut self, line: &impl Serialize) -> Result<(), JournalError> {
        let mut text = serde_json::to_vec(line).expect("numbers and texts become JSON");
        text.push(b'\n');
        // One call: what an engine that is killed in it leaves is the whole line, or none of it.
        self.file.write_all(&text).map_err(Journal::failed(&self.path, "written"))
    }

    /// Writes a step down. `processes`: the tree, where it is known from now on.
    pub(crate) fn step(&mut self, step: Step, processes: &[Process]) -> Result<(), JournalError> {
        self.line(&Line { processes: processes.to_vec(), ..Line::new(step) })
    }

    /// Writes down which pages will be owed, and how they are sent: for whoever goes on when this engine is killed.
    pub(crate) fn owe(&mut self, owed: &Owed) -> Result<(), JournalError> {
        owed::write(&self.path, owed)
    }

    /// The commit is about to be sent: pages may be owed from then on, these addresses not be here any more, and the pages of what is left
    /// here are to be kept in this directory.
    pub(crate) fn committing(
        &mut self,
        owes: bool,
        addresses: Vec<String>,
        keep_store: Option<&Path>,
    ) -> Result<(), JournalError> {
        // Whoever goes on may have another directory of work. One without a name in UTF-8 cannot be said in JSON.
        let absolute = keep_store.and_then(|dir| std::path::absolute(dir).ok());
        let keep_store = absolute.and_then(|dir| dir.to_str().map(str::to_owned));
        self.line(&Line { owes, addresses, keep_store, ..Line::new(Step::Committing) })
    }

    /// The file, for a process that writes to it and holds its lock when the engine has ended.
    pub(crate) fn file(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Nothing is open any more: both sides know what became of the program.
    pub(crate) fn close(self) {
        if let Err(error) = remove(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a journal that is over could not be removed");
        }
    }
}

impl Entry {
    /// Which pages were owed when the commit was sent; `None` where the engine did not write it down.
    pub(crate) fn owed(&self) -> Result<Option<Owed>, JournalError> {
        owed::read(&self.path)
    }

    /// Takes the place of the engine, which has ended: from now on the session is under way for everybody else. `None` if somebody else
    /// has done so, or has brought it to its end, since this was read. `step` is how far it is by then, and `stood` how the tree stands, if nobody has looked before.
    pub(crate) fn take_over(&self, step: Step, stood: &[Stood]) -> Result<Option<Writer>, JournalError> {
        let file = match OpenOptions::new().read(true).append(true).open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file.map_err(Journal::failed(&self.path, "opened"))?,
        };
        let until = Instant::now() + GLANCE;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                // Whoever reads a journal has its lock for that long.
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                Err(errno) => return Err(Journal::failed(&self.path, "locked")(errno.into())),
            }
        }
        let mut text = Vec::new();
        (&file).take(MAX_BYTES).read_to_end(&mut text).map_err(Journal::failed(&self.path, "read"))?;
        let unchanged = parse(&self.path, &text, self.live)?.is_some_and(|entry| entry == *self);
        // One that was removed can still be locked.
        let listed = std::fs::metadata(&self.path).map(|metadata| (metadata.dev(), metadata.ino())).ok();
        let ours = file.metadata().map(|metadata| (metadata.dev(), metadata.ino())).ok();
        if !unchanged || listed != ours {
            return Ok(None);
        }
        let mut writer = Writer { file, path: self.path.clone() };
        let engine = Some(std::process::id() as i32);
        writer.line(&Line { engine, stood: stood.to_vec(), ..Line::new(step) })?;
        Ok(Some(writer))
    }

    /// Takes it away: nobody will ask about the session any more.
    pub(crate) fn remove(&self) -> Result<(), JournalError> {
        match remove(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Journal::failed(&self.path, "removed")(error))
            }
            _ => Ok(()),
        }
    }
}

/// Takes a journal away, and what stands beside it before it: alone nobody would find that.
fn remove(path: &Path) -> io::Result<()> {
    owed::remove(path)?;
    std::fs::remove_file(path)
}

/// Reads a journal; `None` if it is not there, or was being begun when its engine ended.
fn read(path: &Path) -> Result<Option<Entry>, JournalError> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(Journal::failed(path, "read"))?,
    };
    let live = match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => false,
        Err(rustix::io::Errno::WOULDBLOCK) => true,
        Err(errno) => return Err(Journal::failed(path, "locked")(errno.into())),
    };
    let mut text = Vec::new();
    // The lock goes with the file, which is closed at the end of this function.
    (&file).take(MAX_BYTES).read_to_end(&mut text).map_err(Journal::failed(path, "read"))?;
    parse(path, &text, live)
}

fn parse(path: &Path, text: &[u8], live: bool) -> Result<Option<Entry>, JournalError> {
    let wrong = |why: String| JournalError::Format { path: path.to_owned(), why };
    // What has no end was being written.
    let Some(end) = text.iter().rposition(|byte| *byte == b'\n') else { return Ok(None) };
    let mut lines = text[..end].split(|byte| *byte == b'\n');
    let first = lines.next().unwrap_or_default();
    let version = serde_json::from_slice::<serde_json::Value>(first).ok();
    match version.as_ref().and_then(|line| line.get("journal")).and_then(serde_json::Value::as_u64) {
        Some(version) if version == u64::from(VERSION) => {}
        Some(version) => return Err(wrong(format!("it is of version {version}"))),
        None => return Err(wrong("its first line is another".to_owned())),
    }
    let begin: Begin = serde_json::from_slice(first).map_err(|error| wrong(error.to_string()))?;
    let mut entry = Entry {
        path: path.to_owned(),
        step: Step::PreCopy,
        at_us: begin.began_us,
        up_us: 0,
        begin,
        processes: Vec::new(),
        owes: false,
        addresses: Vec::new(),
        keep_store: None,
        stood: Vec::new(),
        live,
    };
    for line in lines {
        let line: Line = serde_json::from_slice(line).map_err(|error| wrong(error.to_string()))?;
        (entry.step, entry.at_us) = (line.step, line.at_us.max(entry.at_us));
        entry.up_us = line.up_us.max(entry.up_us);
        entry.owes |= line.owes;
        entry.begin.engine = line.engine.unwrap_or(entry.begin.engine);
        entry.addresses.extend(line.addresses);
        if entry.stood.is_empty() {
            entry.stood = line.stood;
        }
        entry.keep_store = line.keep_store.map(PathBuf::from).or(entry.keep_store);
        if !line.processes.is_empty() {
            entry.processes = line.processes;
        }
    }
    Ok(Some(entry))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: Process = Process { pid: 7, start: 99 };

    /// Waits until nobody holds the lock. A process that another test is just starting has a copy of the descriptor until its exec.
    fn left_behind(journal: &Journal, role: Role, session: u128) {
        let until = std::time::Instant::now() + Duration::from_secs(20);
        while journal.find(role, session).unwrap().unwrap().live {
            assert!(std::time::Instant::now() < until, "the lock outlives its owner");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_journal_is_read_as_it_was_written_and_knows_whether_its_engine_lives() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::new(&dir.path().join("not/yet"));
        assert_eq!(journal.entries().unwrap().0, []);
        let mut writer = journal.begin(Role::Source, 5, "10.0.0.2:7077", "redis", Some(ROOT)).unwrap();
        writer.step(Step::Held, &[ROOT, Process { pid: 8, start: 100 }]).unwrap();
        let store = Some(Path::new("/var/lib/pages"));
        writer.committing(true, vec!["10.0.0.9/24@eth0".to_owned()], store).unwrap();
        let entry = journal.find(Role::Source, 5).unwrap().unwrap();
        assert_eq!(entry.keep_store.as_deref(), store);
        assert_eq!(entry.addresses, ["10.0.0.9/24@eth0"]);
        assert!(entry.live && entry.owes && entry.step == Step::Committing && entry.processes.len() == 2);
        assert_eq!((entry.begin.peer.as_str(), entry.begin.root), ("10.0.0.2:7077", Some(ROOT)));
        assert_eq!(journal.find(Role::Destination, 5).unwrap(), None);
        drop(writer);
        left_behind(&journal, Role::Source, 5);
        assert!(journal.begin(Role::Source, 5, "", "", None).is_err(), "a session is written once");
        journal.begin(Role::Destination, 5, "", "", None).unwrap().close();
        assert_eq!(journal.entries().unwrap().0.len(), 1, "what is closed is gone");
    }

    #[test]
    fn one_at_a_time_takes_the_place_of_an_engine_that_ended() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::new(dir.path());
        let mut writer = journal.begin(Role::Source, 5, "10.0.0.2:7077", "redis", Some(ROOT)).unwrap();
        writer.committing(true, Vec::new(), None).unwrap();
        let alive = journal.find(Role::Source, 5).unwrap().unwrap();
        assert!(alive.take_over(Step::Resumed, &[]).unwrap().is_none(), "its engine lives");
        drop(writer);
        left_behind(&journal, Role::Source, 5);
        let dead = journal.find(Role::Source, 5).unwrap().unwrap();
        let stood = Stood { process: ROOT, threads: 3, switches: 1000 };
        let second = dead.take_over(Step::Resumed, &[stood]).unwrap().expect("nobody has it");
        let taken = journal.find(Role::Source, 5).unwrap().unwrap();
        assert_eq!(taken.stood, [stood]);
        assert!(taken.live && taken.owes && taken.step == Step::Resumed);
        assert_eq!(taken.begin.engine, std::process::id() as i32);
        assert!(dead.take_over(Step::Resumed, &[]).unwrap().is_none(), "somebody has it");
        drop(second);
        left_behind(&journal, Role::Source, 5);
        assert!(dead.take_over(Step::Resumed, &[]).unwrap().is_none(), "something was written since");
        let again = journal.find(Role::Source, 5).unwrap().unwrap();
        let later = Stood { switches: 1001, ..stood };
        let third = again.take_over(Step::Resumed, &[later]).unwrap().expect("nobody has it");
        assert_eq!(journal.find(Role::Source, 5).unwrap().unwrap().stood, [stood], "who looked first counts");
        third.close();
        assert!(again.take_over(Step::Resumed, &[]).unwrap().is_none(), "it was brought to its end");
        again.remove().unwrap();
    }

    #[test]
    fn an_engine_that_ended_in_the_middle_of_a_line_leaves_the_lines_before() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::new(dir.path());
        let mut writer = journal.begin(Role::Source, 1, "peer", "a", Some(ROOT)).unwrap();
        writer.step(Step::Held, &[ROOT]).unwrap();
        let whole = std::fs::read(&writer.path).unwrap();
        let line = whole[..whole.len() - 1].iter().rposition(|byte| *byte == b'\n').unwrap() + 1;
        for end in 0..whole.len() {
            let entry = parse(&writer.path, &whole[..end], false).unwrap();
            match end < line {
                true => assert!(entry.is_none_or(|entry| entry.step == Step::PreCopy)),
                false => assert_eq!(entry.unwrap().step, Step::PreCopy, "{end}"),
            }
        }
    }

    #[test]
    fn what_is_no_journal_is_named_and_hides_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::new(dir.path());
        drop(journal.begin(Role::Source, 1, "peer", "a", Some(ROOT)).unwrap());
        for (name, text) in [("a", "{\"journal\":2}\n"), ("b", "nonsense\n"), ("c", "{\"journal\":1}\n")] {
            std::fs::write(dir.path().join(name).with_extension("jsonl"), text).unwrap();
        }
        std::fs::write(dir.path().join("notes.txt"), "mine").unwrap();
        let (entries, broken) = journal.entries().unwrap();
        assert_eq!((entries.len(), broken.len()), (1, 3));
        assert!(broken.iter().any(|error| error.to_string().contains("version 2")), "{broken:?}");
    }

    #[test]
    fn what_a_destination_left_is_forgotten_after_a_time_and_what_a_source_left_never() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::new(dir.path());
        drop(journal.begin(Role::Destination, 1, "", "", None).unwrap());
        drop(journal.begin(Role::Source, 2, "", "", None).unwrap());
        left_behind(&journal, Role::Destination, 1);
        let live = journal.begin(Role::Destination, 3, "", "", None).unwrap();
        journal.forget_older_than(Duration::from_secs(60));
        assert_eq!(journal.entries().unwrap().0.len(), 3);
        journal.forget_older_than(Duration::ZERO);
        assert!(journal.find(Role::Destination, 1).unwrap().is_none());
        assert!(journal.find(Role::Source, 2).unwrap().is_some());
        assert!(journal.find(Role::Destination, 3).unwrap().is_some());
        drop(live);
    }
}
