//! The test's end of a program that is tracked.

use crate::program::ARGUMENT;
use pageferry_tracker::{PageSet, SpaceScan, Target};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// Ends what hangs; nothing is expected to take a fraction of it.
const PATIENCE: Timespec = Timespec { tv_sec: 120, tv_nsec: 0 };

/// A program that does what it is told. Dropping it ends it.
pub struct Subject {
    child: Child,
    orders: ChildStdin,
    answers: ChildStdout,
    buffer: Vec<u8>,
}

impl Subject {
    /// Starts one.
    pub fn start() -> Self {
        Self::start_as(&[ARGUMENT])
    }

    /// Starts the test program with other arguments, which has to say "ready".
    pub fn start_as(arguments: &[&str]) -> Self {
        Self::run(Command::new("/proc/self/exe").args(arguments))
    }

    /// Starts one that is nobody in particular.
    pub fn start_as_nobody() -> Self {
        const NOBODY: u32 = 65534;
        Self::run(Command::new("/proc/self/exe").arg(ARGUMENT).uid(NOBODY).gid(NOBODY))
    }

    fn run(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the test program starts itself");
        let orders = child.stdin.take().expect("a pipe");
        let answers = child.stdout.take().expect("a pipe");
        let mut subject = Self { child, orders, answers, buffer: Vec::new() };
        assert_eq!(subject.answer(), "ready");
        subject
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn target(&self) -> Target {
        Target::open(self.pid()).expect("the subject lives")
    }

    /// Gives an order, without waiting.
    pub fn order(&mut self, line: &str) {
        self.orders.write_all(format!("{line}\n").as_bytes()).expect("the subject listens");
    }

    /// The next line that it says.
    pub fn answer(&mut self) -> String {
        loop {
            if let Some(at) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line = String::from_utf8_lossy(&self.buffer[..at]).into_owned();
                self.buffer.drain(..=at);
                return line;
            }
            let ready = poll(&mut [PollFd::new(&self.answers, PollFlags::IN)], Some(&PATIENCE));
            assert_eq!(ready, Ok(1), "process {} does not answer: {}", self.pid(), self.status());
            let mut piece = [0; 4096];
            let got = self.answers.read(&mut piece).expect("a pipe can be read");
            assert_ne!(got, 0, "process {} has ended: {:?}", self.pid(), self.child.try_wait());
            self.buffer.extend_from_slice(&piece[..got]);
        }
    }

    /// Gives an order and returns the answer.
    pub fn ask(&mut self, line: &str) -> String {
        self.order(line);
        let answer = self.answer();
        assert!(!answer.starts_with("error"), "{answer}");
        answer
    }

    /// An order that is answered with "ok".
    pub fn tell(&mut self, line: &str) {
        assert_eq!(self.ask(line), "ok", "{line}");
    }

    /// An order that is answered with a number.
    pub fn number(&mut self, line: &str) -> u64 {
        let answer = self.ask(line);
        answer.parse().unwrap_or_else(|_| panic!("{line}: {answer} is no number"))
    }

    pub fn status(&self) -> String {
        fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap_or_default()
    }

    /// A field of `/proc/PID/status`.
    pub fn field(&self, name: &str) -> String {
        let status = self.status();
        let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        value.unwrap_or_else(|| panic!("no {name} in {status}")).trim().to_owned()
    }

    /// What its descriptors refer to.
    pub fn descriptors(&self) -> Vec<(String, String)> {
        let folder = format!("/proc/{}/fd", self.pid());
        let mut found: Vec<_> = fs::read_dir(folder)
            .expect("the subject lives")
            .map(|entry| entry.expect("an entry").path())
            .map(|path| {
                let to = fs::read_link(&path).map(|to| to.display().to_string()).unwrap_or_default();
                (path.display().to_string(), to)
            })
            .collect();
        found.sort();
        found
    }

    /// Whether a mapping is registered for write-protection (`uw` in VmFlags).
    pub fn is_registered(&self) -> bool {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", self.pid())).expect("the subject lives");
        smaps
            .lines()
            .filter_map(|line| line.strip_prefix("VmFlags:"))
            .any(|flags| flags.split_whitespace().any(|flag| flag == "uw"))
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid()), signal).expect("the subject lives");
    }

    /// Stops it, and waits until none of its threads runs.
    pub fn stop(&self) {
        self.signal(nix::sys::signal::Signal::SIGSTOP);
        self.until("a stop", Self::is_stopped);
    }

    /// Whether all its threads are stopped by a signal.
    pub fn is_stopped(&self) -> bool {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).expect("the subject lives");
        tasks.flatten().all(|task| {
            let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
        })
    }

    /// Ends it without a word.
    pub fn kill(&mut self) {
        // It fails only for one that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits until a condition holds, for things that the kernel does in its own time.
    pub fn until(&self, what: &str, mut condition: impl FnMut(&Self) -> bool) {
        for _ in 0..12_000 {
            if condition(self) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("process {}: {what} did not happen: {}", self.pid(), self.status());
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The pages of a set that lie in `pages` pages from `address` on, counted from there.
pub fn within(set: &PageSet, address: u64, pages: u64) -> Vec<u64> {
    let first = address / 4096;
    let mut range = PageSet::default();
    range.insert(first, pages);
    set.intersect(&range).iter().map(|page| page - first).collect()
}

/// The dirty pages of a range.
pub fn dirty(scan: &SpaceScan, address: u64, pages: u64) -> Vec<u64> {
    within(&scan.dirty, address, pages)
}

/// The populated pages of a range.
pub fn populated(scan: &SpaceScan, address: u64, pages: u64) -> Vec<u64> {
    within(&scan.populated, address, pages)
}
