//! Stops threads with ptrace, and lets them go.
//!
//! ptrace belongs to the thread that seized: everything here happens on the caller's thread. A tracer that dies
//! lets its tracees run on, whatever it had in mind.

use crate::target::Target;
use crate::tree::{TreeError, discover};
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
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
        let mut stopped = Self { tid: thread, ended: false };
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
                Stop::Signal(signal) => self.resume(|tid| ptrace::cont(tid, Some(signal)))?,
                Stop::Syscall | Stop::Other => self.resume(|tid| ptrace::cont(tid, None))?,
                Stop::Ended => return Ok(()),
            }
        }
    }

    pub(crate) fn resume(&self, how: impl FnOnce(Pid) -> nix::Result<()>) -> io::Result<()> {
        match how(self.tid) {
            Ok(()) | Err(nix::Error::ESRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Waits for the next stop.
    pub(crate) fn wait(&mut self) -> io::Result<Stop> {
        loop {
            return Ok(match waitpid(self.tid, Some(WaitPidFlag::__WALL)) {
                Ok(WaitStatus::PtraceEvent(_, _, EVENT_STOP)) => Stop::Event,
                Ok(WaitStatus::PtraceSyscall(_)) => Stop::Syscall,
                Ok(WaitStatus::Stopped(_, signal)) => Stop::Signal(signal),
                Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) | Err(nix::Error::ECHILD) => {
                    self.ended = true;
                    Stop::Ended
                }
                Ok(_) => Stop::Other,
                Err(nix::Error::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            });
        }
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
    Signal(Signal),
    /// Anything else.
    Other,
    /// It has ended.
    Ended,
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if !self.ended {
            // It can only fail for a thread that has ended.
            let _ = ptrace::detach(self.tid, None);
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
