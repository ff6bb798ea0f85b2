//! Stops threads with ptrace, and lets them go.
//!
//! ptrace belongs to the thread that seized: everything here happens on the caller's thread. A tracer that dies
//! lets its tracees run on, whatever it had in mind.

use crate::sys::ptrace::{self as raw, Resume};
use crate::target::Target;
use crate::tree::{TreeError, discover};
use nix::sys::ptrace;
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::io;

/// Why threads could not be stopped.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// Another tracer has it, or we may not.
    #[error("thread {tid} of process {pid} is traced by somebody else, or may not be traced by us")]
    NotAllowed {
        /// The process.
        pid: i32,
        /// The thread.
        tid: i32,
    },
    /// The kernel refused.
    #[error("could not stop thread {tid} of process {pid}")]
    Io {
        /// The process.
        pid: i32,
        /// The thread.
        tid: i32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The tree could not be listed.
    #[error(transparent)]
    Tree(#[from] TreeError),
}

/// `PTRACE_EVENT_STOP` (include/uapi/linux/ptrace.h).
pub(crate) const EVENT_STOP: i32 = 128;

/// A stopped thread; dropping it lets it go.
#[derive(Debug)]
pub(crate) struct Stopped {
    pub(crate) tid: Pid,
    ended: bool,
    /// A signal that waits to be delivered; 0 for none.
    signal: i32,
}

impl Stopped {
    /// Seizes a thread and waits until it stands. `None`: it has ended meanwhile.
    pub(crate) fn new(pid: i32, tid: i32, options: ptrace::Options) -> Result<Option<Self>, FreezeError> {
        let thread = Pid::from_raw(tid);
        match ptrace::seize(thread, options) {
            Ok(()) => {}
            Err(nix::Error::ESRCH) => return Ok(None),
            Err(nix::Error::EPERM) => {
                // A zombie cannot be seized either, and is no loss.
                return match std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat")) {
                    Ok(stat) if !stat.contains(") Z ") && !stat.contains(") X ") => {
                        Err(FreezeError::NotAllowed { pid, tid })
                    }
                    _ => Ok(None),
                };
            }
            Err(errno) => return Err(FreezeError::Io { pid, tid, source: errno.into() }),
        }
        let mut stopped = Self { tid: thread, ended: false, signal: 0 };
        match ptrace::interrupt(thread) {
            Ok(()) => {}
            Err(nix::Error::ESRCH) => {}
            Err(errno) => return Err(FreezeError::Io { pid, tid, source: errno.into() }),
        }
        stopped.settle().map_err(|source| FreezeError::Io { pid, tid, source })?;
        Ok((!stopped.ended).then_some(stopped))
    }

    /// Waits for the stop that was asked for. A signal that comes first is delivered as if nobody had looked: the
    /// stop is still due after it.
    fn settle(&mut self) -> io::Result<()> {
        loop {
            match self.wait()? {
                Stop::Event => return Ok(()),
                Stop::Signal(signal) => self.resume(Resume::Continue, signal)?,
                Stop::Syscall | Stop::Other => self.resume(Resume::Continue, 0)?,
                Stop::Ended => return Ok(()),
            }
        }
    }

    /// Has it go on, with a signal or with none (0).
    pub(crate) fn resume(&mut self, how: Resume, signal: i32) -> io::Result<()> {
        self.signal = 0;
        match raw::resume(self.tid, how, signal) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => Err(error),
            _ => Ok(()),
        }
    }

    /// Waits for the next stop.
    pub(crate) fn wait(&mut self) -> io::Result<Stop> {
        let status = loop {
            match raw::wait(self.tid) {
                Ok(status) => break status,
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) if error.raw_os_error() == Some(libc::ECHILD) => {
                    self.ended = true;
                    return Ok(Stop::Ended);
                }
                Err(error) => return Err(error),
            }
        };
        if !libc::WIFSTOPPED(status) {
            self.ended = true;
            return Ok(Stop::Ended);
        }
        Ok(match (status >> 16, libc::WSTOPSIG(status)) {
            (EVENT_STOP, _) => Stop::Event,
            (0, signal) if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
            (0, signal) => {
                self.signal = signal;
                Stop::Signal(signal)
            }
            _ => Stop::Other,
        })
    }
}

/// What a stopped thread stopped for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// We asked it to, or its whole process is stopped.
    Event,
    /// A system call begins or ends.
    Syscall,
    /// A signal is to be delivered.
    Signal(i32),
    /// Anything else.
    Other,
    /// It has ended.
    Ended,
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if !self.ended {
            // It can only fail for a thread that has ended.
            let _ = raw::resume(self.tid, Resume::Detach, self.signal);
        }
    }
}

/// All threads of a tree, stopped; dropping it lets them go.
#[derive(Debug)]
pub(crate) struct Frozen {
    pub(crate) members: Vec<Target>,
    _threads: Vec<Stopped>,
}

impl Frozen {
    /// Stops every thread of every process of the tree: until a look finds no thread that runs.
    pub(crate) fn new(root: &Target) -> Result<Self, FreezeError> {
        let mut threads: Vec<Stopped> = Vec::new();
        let mut known = BTreeSet::new();
        loop {
            let members = discover(root)?;
            let mut news = false;
            for member in &members {
                let pid = member.pid();
                // A member that ends meanwhile has no threads any more.
                for tid in member.threads().unwrap_or_default() {
                    if known.contains(&tid) {
                        continue;
                    }
                    if let Some(thread) = Stopped::new(pid, tid, ptrace::Options::empty())? {
                        known.insert(tid);
                        threads.push(thread);
                        news = true;
                    }
                }
            }
            if !news {
                return Ok(Self { members, _threads: threads });
            }
        }
    }
}
