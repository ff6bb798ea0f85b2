//! A process that cannot be mistaken for another: a pid is not an identity, a pidfd and a start time are.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, RawDir, openat};
use std::fs::{self, File};
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// A live process.
#[derive(Clone, Debug)]
pub struct Target {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    pid: i32,
    start_time: u64,
    name: String,
    pidfd: OwnedFd,
    /// `/proc/PID`, of this process and no other: once it is gone, nothing can be opened in there, whoever has the
    /// pid then.
    folder: OwnedFd,
}

/// What became of a process that showed no memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It has ended.
    Ended,
    /// It has memory again.
    Back,
    /// Neither: it lives without its first thread.
    Headless,
}

/// Why a process cannot be a target.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is none.
    #[error("there is no process {0}")]
    NoSuchProcess(i32),
    /// It lives in the kernel.
    #[error("process {pid} ({name}) is a kernel thread")]
    KernelThread {
        /// Its pid.
        pid: i32,
        /// Its name.
        name: String,
    },
    /// It has ended, and only its entry in the table is left.
    #[error("process {pid} ({name}) has ended and waits for its parent (a zombie)")]
    Zombie {
        /// Its pid.
        pid: i32,
        /// Its name.
        name: String,
    },
    /// Its first thread has ended, and others go on: Linux shows no memory for such a process.
    #[error("the first thread of process {pid} ({name}) has ended while others run: it cannot be looked at")]
    LeaderEnded {
        /// Its pid.
        pid: i32,
        /// Its name.
        name: String,
    },
    /// It belongs to somebody else.
    #[error("process {pid} ({name}) may not be looked at by us")]
    NotPermitted {
        /// Its pid.
        pid: i32,
        /// Its name.
        name: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// We cannot stop ourselves, nor those who wait for us.
    #[error("process {0} is this program itself, or one that it descends from")]
    Ourselves(i32),
    /// The number is a thread's.
    #[error("{pid} is a thread of process {process}")]
    Thread {
        /// The number.
        pid: i32,
        /// The process it belongs to.
        process: i32,
    },
    /// The kernel refused.
    #[error("could not open process {pid}")]
    Io {
        /// Its pid.
        pid: i32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// The fields of `/proc/PID/stat` that make an identity.
struct Stat {
    name: String,
    state: char,
    parent: i32,
    flags: u64,
    start_time: u64,
}

/// `PF_KTHREAD` of include/linux/sched.h.
const KERNEL_THREAD: u64 = 0x0020_0000;

fn stat(pid: i32) -> io::Result<Stat> {
    let text = fs::read(format!("/proc/{pid}/stat"))?;
    let text = String::from_utf8_lossy(&text);
    parse_stat(&text).ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat cannot be read: {text:?}")))
}

/// The name stands in parentheses and may contain any character, parentheses too.
fn parse_stat(text: &str) -> Option<Stat> {
    let (open, close) = (text.find('(')?, text.rfind(')')?);
    let fields: Vec<&str> = text.get(close + 1..)?.split_whitespace().collect();
    Some(Stat {
        name: text.get(open + 1..close)?.to_owned(),
        state: fields.first()?.chars().next()?,
        parent: fields.get(1)?.parse().ok()?,
        flags: fields.get(6)?.parse().ok()?,
        start_time: fields.get(19)?.parse().ok()?,
    })
}

/// Reads a file of `/proc` from where it stands to its end into a buffer, whose memory is used again; what was in it is gone.
pub(crate) fn read_into(file: &mut File, bytes: &mut Vec<u8>) -> io::Result<()> {
    // Not `read_to_end`, which begins with small pieces: these files say nothing of their length.
    let mut length = 0;
    bytes.resize(bytes.capacity().max(4096), 0);
    loop {
        if length == bytes.len() {
            bytes.resize(2 * length, 0);
        }
        match file.read(&mut bytes[length..]) {
            Ok(0) => break,
            Ok(more) => length += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(length);
    Ok(())
}

impl Target {
    /// Opens the process `pid`.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(pid: i32) -> Result<Self, OpenError> {
        let mut ancestor = std::process::id() as i32;
        while ancestor > 0 {
            if ancestor == pid {
                return Err(OpenError::Ourselves(pid));
            }
            ancestor = stat(ancestor).map_or(0, |stat| stat.parent);
        }
        Self::open_any(pid)
    }

    /// Opens a process that may be one of our own descendants or ancestors.
    pub(crate) fn open_any(pid: i32) -> Result<Self, OpenError> {
        let failed = |source: io::Error| match source.raw_os_error() {
            Some(libc::ESRCH | libc::ENOENT) => OpenError::NoSuchProcess(pid),
            _ => OpenError::Io { pid, source },
        };
        let raw = (pid > 0).then(|| rustix::process::Pid::from_raw(pid)).flatten();
        let raw = raw.ok_or(OpenError::NoSuchProcess(pid))?;
        let before = stat(pid).map_err(failed)?;
        let pidfd = match rustix::process::pidfd_open(raw, rustix::process::PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            // EINVAL, from 6.15 on ENOENT: the number is that of a thread.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {
                let status = fs::read_to_string(format!("/proc/{pid}/status")).map_err(failed)?;
                let process = status
                    .lines()
                    .find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok())
                    .unwrap_or(0);
                return Err(if process == pid {
                    OpenError::NoSuchProcess(pid)
                } else {
                    OpenError::Thread { pid, process }
                });
            }
            Err(errno) => return Err(failed(errno.into())),
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(format!("/proc/{pid}"), flags, Mode::empty())
            .map_err(|errno| failed(errno.into()))?;
        // Both are of who had the pid then; the same start time says that it is one and the same.
        let stat = stat(pid).map_err(failed)?;
        if stat.start_time != before.start_time {
            return Err(OpenError::NoSuchProcess(pid));
        }
        if stat.flags & KERNEL_THREAD != 0 {
            return Err(OpenError::KernelThread { pid, name: stat.name });
        }
        let ended = matches!(stat.state, 'Z' | 'X');
        let inner = Inner { pid, start_time: stat.start_time, name: stat.name, pidfd, folder };
        let target = Self { inner: Arc::new(inner) };
        if ended {
            let name = target.name();
            let is_back = || !matches!(target.thread_state(pid), Some('Z' | 'X'));
            return match target.fate(is_back) {
                Fate::Ended => Err(OpenError::Zombie { pid, name }),
                Fate::Back => Self::open_any(pid),
                Fate::Headless => Err(OpenError::LeaderEnded { pid, name }),
            };
        }
        match target.open_file("maps") {
            Err(source) if source.kind() == io::ErrorKind::PermissionDenied => {
                return Err(OpenError::NotPermitted { pid, name: target.name(), source });
            }
            // Whatever else it is, it is said where the file is needed.
            _ => {}
        }
        if target.is_alive() { Ok(target) } else { Err(OpenError::NoSuchProcess(pid)) }
    }

    /// Its pid in our pid namespace.
    pub fn pid(&self) -> i32 {
        self.inner.pid
    }

    /// When it was started, in clock ticks since boot.
    pub fn start_time(&self) -> u64 {
        self.inner.start_time
    }

    /// Its name when it was opened.
    pub fn name(&self) -> String {
        self.inner.name.clone()
    }

    /// Whether it has not ended.
    pub fn is_alive(&self) -> bool {
        !self.ends_within(Timespec { tv_sec: 0, tv_nsec: 0 })
    }

    /// What becomes of a process that shows no memory: its threads end one after the other, the first perhaps before
    /// the others, and one that becomes another program has none for a moment. Waits a little for either; whether
    /// it is there again is for `is_back` to say.
    pub(crate) fn fate(&self, mut is_back: impl FnMut() -> bool) -> Fate {
        for _ in 0..1000 {
            if self.ends_within(Timespec { tv_sec: 0, tv_nsec: 1_000_000 }) {
                return Fate::Ended;
            }
            if is_back() {
                return Fate::Back;
            }
        }
        Fate::Headless
    }

    /// Whether there is memory to look at.
    pub(crate) fn has_memory(&self) -> bool {
        // Of no memory, no byte can be read.
        self.open_file("pagemap").and_then(|file| file.read_at(&mut [0; 8], 0)).is_ok_and(|got| got > 0)
    }

    /// A pidfd speaks for all threads: it is readable when the last one has ended.
    fn ends_within(&self, limit: Timespec) -> bool {
        loop {
            match poll(&mut [PollFd::new(&self.inner.pidfd, PollFlags::IN)], Some(&limit)) {
                Err(rustix::io::Errno::INTR) => {}
                ready => return ready != Ok(0),
            }
        }
    }

    /// The descriptor that refers to it.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.inner.pidfd.as_fd()
    }

    /// Whether two targets are the same process.
    pub fn is(&self, other: &Target) -> bool {
        self.pid() == other.pid() && self.start_time() == other.start_time()
    }

    /// Opens a file of its folder in `/proc` for reading; `ESRCH` when it has ended.
    pub(crate) fn open_file(&self, name: &str) -> io::Result<File> {
        self.open_with(name, OFlags::RDONLY)
    }

    /// Opens a file of its folder in `/proc` for writing; `ESRCH` when it has ended.
    pub(crate) fn open_to_write(&self, name: &str) -> io::Result<File> {
        self.open_with(name, OFlags::WRONLY)
    }

    fn open_with(&self, name: &str, flags: OFlags) -> io::Result<File> {
        match openat(&self.inner.folder, name, flags | OFlags::CLOEXEC, Mode::empty()) {
            Ok(file) => Ok(file.into()),
            // In the folder of a process (or thread) that has ended, there is nothing any more.
            Err(rustix::io::Errno::NOENT) => Err(io::Error::from_raw_os_error(libc::ESRCH)),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Reads a file of its folder in `/proc`.
    pub(crate) fn read_file(&self, name: &str) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        read_into(&mut self.open_file(name)?, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads a file of its folder in `/proc` that the kernel writes in one piece (`stat`, `status`): what does not fill the
    /// buffer is all of it.
    fn read_piece(&self, name: &str) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; 4096];
        let got = self.open_file(name)?.read(&mut bytes)?;
        if got == bytes.len() {
            return self.read_file(name);
        }
        bytes.truncate(got);
        Ok(bytes)
    }

    /// Where the program's code, stack, data and heap begin: another program has others, as has the same one when it is
    /// started again (addresses are random). Tells that a process has become another program.
    pub(crate) fn layout(&self) -> io::Result<[u64; 4]> {
        let text = self.read_piece("stat")?;
        let text = String::from_utf8_lossy(&text);
        // Fields are counted from 1 in proc(5); the third is the first behind the name.
        let fields: Vec<&str> =
            text.rfind(')').map_or(Vec::new(), |at| text[at + 1..].split_whitespace().collect());
        let field = |number: usize| fields.get(number - 3).and_then(|field| field.parse().ok());
        match (field(26), field(28), field(45), field(47)) {
            (Some(code), Some(stack), Some(data), Some(heap)) => Ok([code, stack, data, heap]),
            _ => Err(io::Error::other(format!("a strange stat: {text:?}"))),
        }
    }

    /// What the kernel counts of its memory; `None` if it has none (any more).
    pub(crate) fn counts(&self) -> io::Result<Option<Counts>> {
        Ok(counts(&self.read_piece("status")?))
    }

    /// A field of a thread's status.
    pub(crate) fn thread_status(&self, tid: i32, field: &str) -> io::Result<Option<String>> {
        Ok(find_field(&self.read_file(&format!("task/{tid}/status"))?, field))
    }

    /// The process that traces a thread.
    pub(crate) fn tracer(&self, tid: i32) -> Option<i32> {
        let tracer = self.thread_status(tid, "TracerPid").ok()??.parse().ok()?;
        (tracer != 0).then_some(tracer)
    }

    fn thread_state(&self, tid: i32) -> Option<char> {
        let text = self.read_file(&format!("task/{tid}/stat")).ok()?;
        Some(parse_stat(&String::from_utf8_lossy(&text))?.state)
    }

    /// Whether a thread has not ended.
    pub(crate) fn thread_lives(&self, tid: i32) -> bool {
        self.thread_state(tid).is_some_and(|state| !matches!(state, 'Z' | 'X'))
    }

    /// Whether a thread is stopped, by a signal or by a tracer.
    pub(crate) fn thread_stands(&self, tid: i32) -> bool {
        matches!(self.thread_state(tid), Some('T' | 't'))
    }

    /// Whether a thread waits in the kernel for a child that uses its memory (`vfork`, `posix_spawn`). It comes back
    /// when the child becomes another program or ends, and touches nothing until then.
    pub(crate) fn waits_for_vfork(&self, tid: i32) -> bool {
        if self.thread_state(tid) != Some('D') {
            return false;
        }
        let call = self.read_file(&format!("task/{tid}/syscall")).unwrap_or_default();
        let number = String::from_utf8_lossy(&call).split_whitespace().next().and_then(|n| n.parse().ok());
        matches!(number, Some(libc::SYS_vfork | libc::SYS_clone | libc::SYS_clone3))
    }

    /// Its descriptors that refer to `name`.
    pub(crate) fn descriptors_of(&self, name: &str) -> io::Result<Vec<i32>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = openat(&self.inner.folder, "fd", flags, Mode::empty())?;
        let mut found = Vec::new();
        for entry in rustix::fs::Dir::read_from(&folder)? {
            let entry = entry?;
            let number = entry.file_name().to_str().ok().and_then(|name| name.parse::<i32>().ok());
            let Some(number) = number else { continue };
            // One that cannot be read was closed meanwhile.
            let link = rustix::fs::readlinkat(&folder, entry.file_name(), Vec::new());
            if link.is_ok_and(|link| link.as_bytes() == name.as_bytes()) {
                found.push(number);
            }
        }
        Ok(found)
    }

    /// The file of a mapping, named and not opened.
    pub(crate) fn name_mapped_file(&self, start: u64, end: u64) -> io::Result<OwnedFd> {
        self.mapped_file(start, end, OFlags::PATH)
    }

    /// The file of a mapping, to be looked at. Not for devices.
    pub(crate) fn open_mapped_file(&self, start: u64, end: u64) -> io::Result<OwnedFd> {
        self.mapped_file(start, end, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)
    }

    fn mapped_file(&self, start: u64, end: u64, flags: OFlags) -> io::Result<OwnedFd> {
        let name = format!("map_files/{start:x}-{end:x}");
        Ok(openat(&self.inner.folder, name, flags | OFlags::CLOEXEC, Mode::empty())?)
    }

    /// The processes that its threads have made and that are their children now; none if it has ended.
    pub(crate) fn children(&self) -> io::Result<Vec<i32>> {
        let mut children = Vec::new();
        let gone = |errno| matches!(errno, rustix::io::Errno::NOENT | rustix::io::Errno::SRCH);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let tasks = match openat(&self.inner.folder, "task", flags, Mode::empty()) {
            Err(errno) if gone(errno) => return Ok(children),
            tasks => tasks?,
        };
        let mut room = [MaybeUninit::uninit(); 2048];
        let mut entries = RawDir::new(&tasks, &mut room);
        let (mut name, mut text) = (String::new(), [0; 4096]);
        while let Some(entry) = entries.next() {
            let entry = match entry {
                Err(errno) if gone(errno) => break,
                entry => entry?,
            };
            let Some(tid) = entry.file_name().to_str().ok().filter(|name| !name.starts_with('.')) else {
                continue;
            };
            name.clear();
            name.push_str(tid);
            name.push_str("/children");
            let mut file = match openat(&tasks, &name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
                Err(errno) if gone(errno) => continue,
                file => File::from(file?),
            };
            let mut rest = Vec::new();
            loop {
                let got = match file.read(&mut text) {
                    Err(error) if error.raw_os_error() == Some(libc::ESRCH) => 0,
                    got => got?,
                };
                rest.extend_from_slice(&text[..got]);
                if got == 0 {
                    break;
                }
            }
            let pids = rest.split(u8::is_ascii_whitespace).filter_map(|pid| std::str::from_utf8(pid).ok());
            children.extend(pids.filter_map(|pid| pid.parse::<i32>().ok()));
        }
        children.sort_unstable();
        Ok(children)
    }

    /// Its threads that have not ended.
    pub(crate) fn threads(&self) -> io::Result<Vec<i32>> {
        let folder = openat(
            &self.inner.folder,
            "task",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let mut threads = Vec::new();
        for entry in rustix::fs::Dir::read_from(&folder)? {
            let entry = entry?;
            let Some(tid) = entry.file_name().to_str().ok().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            if self.thread_lives(tid) {
                threads.push(tid);
            }
        }
        threads.sort_unstable();
        Ok(threads)
    }
}

/// What the kernel counts of a process' memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Pages of its own, in memory or in swap: neither a file's (also those that were changed in a private mapping are its own)
    /// nor shared memory's nor of hugetlbfs. Some dozens wrong before Linux 6.16.
    pub(crate) own: u64,
    /// Whether any of it is locked in memory.
    pub(crate) locked: bool,
}

/// The counts of a `status`; `None` of a process without memory.
fn counts(status: &[u8]) -> Option<Counts> {
    let (mut resident, mut swapped, mut locked) = (None, 0, false);
    for line in status.split(|byte| *byte == b'\n') {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let kib = || -> Option<u64> {
            std::str::from_utf8(&line[colon + 1..]).ok()?.trim().strip_suffix(" kB")?.parse().ok()
        };
        match &line[..colon] {
            b"RssAnon" => resident = kib(),
            b"VmSwap" => swapped = kib()?,
            b"VmLck" => locked = kib()? > 0,
            _ => {}
        }
    }
    Some(Counts { own: (resident? + swapped) / 4, locked })
}

pub(crate) fn find_field(status: &[u8], field: &str) -> Option<String> {
    let status = String::from_utf8_lossy(status);
    let value = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    Some(value.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_may_contain_anything() {
        let stat = parse_stat(
            "42 (a) R (b) c) S 1 42 42 0 -1 4194560 9 0 0 0 0 0 0 0 20 0 1 0 777 1 1 18446744073709551615",
        )
        .unwrap();
        assert_eq!(
            (stat.name.as_str(), stat.state, stat.parent, stat.start_time),
            ("a) R (b) c", 'S', 1, 777)
        );
        assert!(parse_stat("42 (x").is_none());
    }

    #[test]
    fn memory_is_counted() {
        let status =
            b"Name:\tRssAnon: 9 kB\nVmLck:\t       0 kB\nRssAnon:\t    4096 kB\nVmSwap:\t     400 kB\n";
        assert_eq!(counts(status), Some(Counts { own: 1124, locked: false }));
        let locked = b"VmLck:\t       8 kB\nVmRSS:\t   8192 kB\nRssAnon:\t    4096 kB\n";
        assert_eq!(counts(locked), Some(Counts { own: 1024, locked: true }), "a kernel without swap");
        assert_eq!(counts(b"Name:\tkthreadd\n"), None);
    }

    #[test]
    fn who_cannot_be_a_target() {
        assert!(matches!(Target::open(std::process::id() as i32), Err(OpenError::Ourselves(_))));
        assert!(matches!(Target::open(i32::MAX), Err(OpenError::NoSuchProcess(_))));
        assert!(matches!(Target::open(-1), Err(OpenError::NoSuchProcess(_))));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(200));
        assert!(matches!(Target::open(child.id() as i32), Err(OpenError::Zombie { .. })));
        child.wait().unwrap();
    }

    #[test]
    fn a_target_knows_that_it_has_ended() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let target = Target::open(child.id() as i32).unwrap();
        assert!(target.is_alive());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!target.is_alive());
    }
}
