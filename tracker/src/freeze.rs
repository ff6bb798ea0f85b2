//! Stops threads with ptrace, and lets them go.
//!
//! ptrace belongs to the thread that seized, and a thread that runs cannot be let go: it has to stop first, and
//! may take its time (a parent in `vfork` stops when its child lets it). So all of this happens on a thread made for
//! it. When that thread ends, however it ends, the kernel lets go of whatever it still holds.

use crate::sys::ptrace::{self, Stop};
use crate::target::Target;
use crate::tree::{TreeError, discover_with};
use std::collections::BTreeSet;
use std::io;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Why threads could not be stopped.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// Another tracer has it.
    #[error("thread {tid} of process {pid} is traced by somebody else: process {tracer}")]
    Traced {
        /// The process.
        pid: i32,
        /// The thread.
        tid: i32,
        /// Who traces it.
        tracer: i32,
    },
    /// We may not.
    #[error("thread {tid} of process {pid} may not be traced by us")]
    NotAllowed {
        /// The process.
        pid: i32,
        /// The thread.
        tid: i32,
    },
    /// It does not stop: it waits in the kernel for something that does not happen.
    #[error("thread {tid} of process {pid} did not stop within {waited:?}")]
    Stuck {
        /// The process.
        pid: i32,
        /// The thread.
        tid: i32,
        /// How long we waited.
        waited: Duration,
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
    /// There is no thread to do it on.
    #[error("could not start a thread to stop others from")]
    Thread(#[source] io::Error),
}

/// How long a thread may take to stop.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// After so long it is looked at why a thread does not stop.
const SUSPICION: Duration = Duration::from_millis(2);

/// A thread that we trace; dropping it lets it go, if it stands.
#[derive(Debug)]
pub(crate) struct Traced {
    pub(crate) pid: i32,
    pub(crate) tid: i32,
    /// What it was seized with.
    pub(crate) options: i32,
    /// When it was asked to stop.
    pub(crate) asked: Instant,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Runs,
    /// It stands, and this signal (0 for none) waits to be delivered.
    Stands(i32),
    /// It waits in the kernel for a child that we hold, and stops before it comes back.
    WaitsForChild,
    Ended,
}

impl Traced {
    /// Asks a thread to stop, and does not wait for it. `None`: it has ended meanwhile.
    pub(crate) fn ask(target: &Target, tid: i32, options: i32) -> Result<Option<Self>, FreezeError> {
        let pid = target.pid();
        let start = Instant::now();
        while let Err(error) = ptrace::seize(tid, options) {
            match error.raw_os_error() {
                Some(libc::ESRCH) => return Ok(None),
                // A zombie cannot be seized either, and is no loss.
                Some(libc::EPERM) if !target.thread_lives(tid) => return Ok(None),
                Some(libc::EPERM) => match target.tracer(tid) {
                    // A thread of ours that is about to end; the kernel lets go a little after that is known.
                    Some(tracer) if tracer == std::process::id() as i32 && start.elapsed() < PATIENCE => {
                        thread::sleep(Duration::from_micros(50));
                    }
                    Some(tracer) => return Err(FreezeError::Traced { pid, tid, tracer }),
                    None => return Err(FreezeError::NotAllowed { pid, tid }),
                },
                _ => return Err(FreezeError::Io { pid, tid, source: error }),
            }
        }
        let traced = Self { pid, tid, options, asked: Instant::now(), state: State::Runs };
        match ptrace::interrupt(tid) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                Err(FreezeError::Io { pid, tid, source: error })
            }
            _ => Ok(Some(traced)),
        }
    }

    /// Waits for the stop that was asked for, and says whether the thread stands. A signal that comes first is
    /// delivered as if nobody had looked: the stop is still due after it.
    pub(crate) fn settle(&mut self, target: &Target, patience: Duration) -> Result<bool, FreezeError> {
        let (pid, tid) = (self.pid, self.tid);
        let failed = |source| FreezeError::Io { pid, tid, source };
        loop {
            match self.wait(target, patience).map_err(failed)? {
                Some(Stop::Event) => return Ok(true),
                Some(Stop::Ended) => return Ok(false),
                Some(Stop::Signal(signal)) => self.go(ptrace::resume, signal).map_err(failed)?,
                Some(Stop::Syscall | Stop::Other) => self.go(ptrace::resume, 0).map_err(failed)?,
                None if self.state == State::WaitsForChild => return Ok(true),
                None => return Err(FreezeError::Stuck { pid, tid, waited: patience }),
            }
        }
    }

    /// Whether it stands where registers can be changed.
    pub(crate) fn stands(&self) -> bool {
        matches!(self.state, State::Stands(_))
    }

    /// Has a standing thread run.
    pub(crate) fn go(&mut self, how: fn(i32, i32) -> io::Result<()>, signal: i32) -> io::Result<()> {
        self.state = State::Runs;
        match how(self.tid, signal) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => Err(error),
            _ => Ok(()),
        }
    }

    /// Waits for the next stop; `None` when it does not come.
    ///
    /// Waiting is done by looking: a first thread that ends before the others never reports it, and a wait that
    /// blocks would block for as long as they live.
    pub(crate) fn wait(&mut self, target: &Target, patience: Duration) -> io::Result<Option<Stop>> {
        let start = Instant::now();
        let mut nap = Duration::from_micros(20);
        loop {
            if let Some(stop) = ptrace::stop_of(self.tid)? {
                self.state = match stop {
                    Stop::Ended => State::Ended,
                    Stop::Signal(signal) => State::Stands(signal),
                    _ => State::Stands(0),
                };
                return Ok(Some(stop));
            }
            let waited = start.elapsed();
            if waited < Duration::from_micros(300) {
                thread::yield_now();
                continue;
            }
            if waited >= SUSPICION {
                if !target.thread_lives(self.tid) {
                    self.state = State::Ended;
                    return Ok(Some(Stop::Ended));
                }
                if target.waits_for_vfork(self.tid) {
                    self.state = State::WaitsForChild;
                    return Ok(None);
                }
                if waited >= patience {
                    return Ok(None);
                }
            }
            thread::sleep(nap);
            nap = (nap * 2).min(Duration::from_millis(1));
        }
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        if let State::Stands(signal) = self.state {
            // It can only fail for a thread that was killed.
            let _ = ptrace::detach(self.tid, signal);
        }
    }
}

/// Runs `work` on a thread of its own, which holds what it traces no longer than that.
pub(crate) fn apart<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let worker = thread::Builder::new().name("ptrace".to_owned()).spawn_scoped(scope, work)?;
        worker.join().map_err(|panic| std::panic::resume_unwind(panic))
    })
}

/// All threads of a tree, stopped; dropping it lets them go.
#[derive(Debug)]
pub(crate) struct Frozen {
    pub(crate) members: Vec<Target>,
    /// Dropping it tells the holder to let go.
    release: Option<mpsc::Sender<()>>,
    holder: Option<JoinHandle<()>>,
}

impl Frozen {
    /// Stops every thread of every process of the tree: until a look finds no thread that runs. One that does not stop within
    /// `patience` is an error, and all others run again.
    pub(crate) fn new(root: &Target, known: &[Target], patience: Duration) -> Result<Self, FreezeError> {
        let (root, known) = (root.clone(), known.to_vec());
        let (tell, told) = mpsc::channel();
        let (release, released) = mpsc::channel();
        let holder = thread::Builder::new()
            .name("ptrace".to_owned())
            .spawn(move || match stop_all(&root, &known, patience) {
                Ok((members, threads)) => {
                    if tell.send(Ok(members)).is_ok() {
                        // Nothing is ever sent: this ends when the other end is dropped.
                        let _ = released.recv();
                    }
                    drop(threads);
                }
                Err(error) => {
                    let _ = tell.send(Err(error));
                }
            })
            .map_err(FreezeError::Thread)?;
        let mut frozen = Self { members: Vec::new(), release: Some(release), holder: Some(holder) };
        frozen.members = told
            .recv()
            .unwrap_or_else(|_| Err(FreezeError::Thread(io::Error::other("the thread has panicked"))))?;
        Ok(frozen)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        drop(self.release.take());
        if let Some(holder) = self.holder.take() {
            // A panic there has let go of everything as well.
            let _ = holder.join();
        }
    }
}

fn stop_all(
    root: &Target,
    acquainted: &[Target],
    patience: Duration,
) -> Result<(Vec<Target>, Vec<Traced>), FreezeError> {
    let mut stopped: Vec<Traced> = Vec::new();
    let mut known = BTreeSet::new();
    loop {
        let members = discover_with(root, acquainted)?;
        let mut asked = Vec::new();
        for member in &members {
            // A member that ends meanwhile has no threads any more.
            for tid in member.threads().unwrap_or_default() {
                if !known.contains(&tid)
                    && let Some(thread) = Traced::ask(member, tid, 0)?
                {
                    asked.push((member, thread));
                }
            }
        }
        // Nothing new ran between the listing and now: whoever is not in it was made by one that was.
        if asked.is_empty() {
            return Ok((members, stopped));
        }
        // All are asked before the first is waited for: they stop side by side.
        for (member, mut thread) in asked {
            if thread.settle(member, patience)? {
                known.insert(thread.tid);
                stopped.push(thread);
            }
        }
    }
}
