//! One restore, in steps: prepared, started, held at each stage, finished or undone.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::dump::{TcpPolicy, script};
use crate::find::Criu;
use crate::image_dir::ImageDir;
use crate::lazy::{self, LazyListener};
use crate::process::{self, Member};
use crate::rpc::message::{CGROUPS_IGNORE, Features, InheritFd, NETWORK_LOCK_SKIP};
use crate::rpc::{Options, Request, RequestKind};
use crate::service::{CallError, Notice, Service, Wait, deadline};

/// criu's log of a restore, in the image directory.
pub(crate) const LOG_FILE: &str = "criu-restore.log";

/// How long killing a half-restored tree may take altogether.
const KILL: Duration = Duration::from_secs(10);
/// How long criu gets to notice that the restore is undone, and to clean up.
const NOTICE: Duration = Duration::from_secs(3);
/// Between two looks at what is left.
const LOOK: Duration = Duration::from_millis(1);

/// How to restore.
#[derive(Clone, Debug)]
pub struct RestoreOptions {
    /// Whether memory that is not in the images is brought in late, through [`LazyListener`]. Without it the
    /// images must be whole.
    pub lazy: bool,
    /// What becomes of TCP connections: the same as at the dump.
    pub tcp: TcpPolicy,
    /// As at the dump.
    pub shell_job: bool,
    /// As at the dump.
    pub file_locks: bool,
    /// As at the dump.
    pub ext_unix_sk: bool,
    /// What the dump called external, in criu's notation.
    pub external: Vec<String>,
    /// Descriptors of ours that take the place of dumped files.
    pub inherit: Vec<InheritedFd>,
    /// The root of the file system for a tree that has a mount namespace of its own.
    pub root: Option<PathBuf>,
    /// criu's log level: 1 errors, 2 warnings, 4 everything.
    pub log_level: i32,
}

impl Default for RestoreOptions {
    fn default() -> Self {
        Self {
            lazy: true,
            tcp: TcpPolicy::Close,
            shell_job: true,
            file_locks: true,
            ext_unix_sk: false,
            external: Vec::new(),
            inherit: Vec::new(),
            root: None,
            log_level: 2,
        }
    }
}

/// One descriptor that the restore takes instead of opening a dumped file.
#[derive(Clone, Debug)]
pub struct InheritedFd {
    /// Which file, in criu's notation (`pipe:[1234]`, `tmp/log`).
    pub key: String,
    /// The descriptor, which must stay open until the restore is finished.
    pub fd: std::os::fd::RawFd,
}

/// Where a restore holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Every task exists with all its memory areas, every userfaultfd is usable, nothing runs. **The last stage at
    /// which the end of this process undoes the restore**: from here on criu ignores what it is told. Whoever
    /// must decide between two copies of a tree decides here.
    PostRestore,
    /// Credentials are set and memory is registered for good; every task is stopped at its very last step. If this
    /// process ends now, the tree runs.
    PreResume,
    /// The tree runs.
    PostResume,
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Self::PostRestore => "post-restore",
            Self::PreResume => "pre-resume",
            Self::PostResume => "post-resume",
        }
    }

    fn of(script: &str) -> Option<Self> {
        [Self::PostRestore, Self::PreResume, Self::PostResume].into_iter().find(|s| s.name() == script)
    }

    fn awaited(self) -> &'static str {
        match self {
            Self::PostRestore => "to restore the tree",
            Self::PreResume => "to make the tree ready to run",
            Self::PostResume => "to let the tree run",
        }
    }
}

/// Why a restore did not come about.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// criu failed, died, took too long or was interrupted.
    #[error("restoring the tree")]
    Call(#[source] CallError),
    /// The socket for the lazy pages could not be made.
    #[error("could not make the socket for lazy pages in the image directory")]
    Socket(#[source] io::Error),
    /// The steps were called out of order.
    #[error("the restore is {state}, so it cannot {wanted}")]
    Order {
        /// Where it stands.
        state: &'static str,
        /// What was asked.
        wanted: &'static str,
    },
    /// What was restored could not be ended.
    #[error("processes {pids:?} of a restore that was undone are still alive; they must be ended by hand")]
    StillAlive {
        /// Which.
        pids: Vec<i32>,
    },
    /// A system call of ours failed.
    #[error("{what} for the restore")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl RestoreError {
    /// Whether the caller's own descriptor ended the wait.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Call(CallError::Cancelled { .. }))
    }

    /// Whether the other side of the caller's connection was closed.
    pub fn is_peer_closed(&self) -> bool {
        matches!(self, Self::Call(CallError::PeerClosed { .. }))
    }

    /// Whether time was up.
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::Call(CallError::Timeout { .. }))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Prepared,
    Started,
    Held(Stage),
    Broken,
    Over,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::Prepared => "not started",
            Self::Started => "under way",
            Self::Held(stage) => stage.name(),
            Self::Broken => "failed",
            Self::Over => "over",
        }
    }
}

/// A restore under way. Dropping it before [`Restore::finish`] kills whatever was restored.
///
/// The restored root is criu's child, so that it can be found and ended at every stage; when criu ends, it goes to
/// the nearest subreaper among our ancestors, ourselves included, or to init, and whoever that is reaps it one day.
/// Nothing ties it to this process.
#[derive(Debug)]
pub struct Restore {
    service: Service,
    images: ImageDir,
    options: RestoreOptions,
    listener: Option<OwnedFd>,
    /// Both ends of a pipe; that our end closes is what stops the listeners.
    stop: (OwnedFd, OwnedFd),
    state: State,
    root: Option<Member>,
    /// How long criu took to start, and its look at the kernel.
    start: Duration,
    look: Notice,
}

/// How long criu takes to be ready for a restore, while that goes on.
#[derive(Clone, Debug)]
pub struct GettingReady {
    start: Duration,
    look: Notice,
}

impl GettingReady {
    /// From its start until it knew the kernel; until now, if it does not yet.
    pub fn took(&self) -> Duration {
        self.start + self.look.took()
    }
}

/// How long criu may take to learn what the kernel can do.
const ACQUAINTING: Duration = Duration::from_secs(20);

/// Has criu learn what the kernel can do, and remember it in /run: on a machine where it has not run since the start it
/// takes some 30 ms, for trying things out and for grace periods of the kernel, and a restore would begin with that.
/// Asking for a feature does it.
fn acquaint(images: &ImageDir) -> Request {
    let options = Options {
        images_dir_fd: images.fd().as_raw_fd(),
        log_file: Some("features.log".to_owned()),
        ..Options::default()
    };
    Request {
        kind: RequestKind::FeatureCheck as i32,
        options: Some(options),
        keep_open: Some(true),
        features: Some(Features { lazy_pages: Some(true), ..Features::default() }),
        ..Request::default()
    }
}

impl Restore {
    /// Starts criu, whose start-up is then over, and makes the socket for lazy pages. Nothing is restored yet, and
    /// the images need not be there yet.
    pub fn prepare(criu: &Criu, images: &ImageDir, options: RestoreOptions) -> Result<Self, RestoreError> {
        let of_io = |what| move |source| RestoreError::Io { what, source };
        let images = images.duplicate().map_err(of_io("duplicating the image directory"))?;
        let listener = options.lazy.then(|| lazy::bind(&images)).transpose().map_err(RestoreError::Socket)?;
        let stop = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .map_err(|e| of_io("making a pipe")(e.into()))?;
        // As a subreaper criu keeps what a task leaves behind when it dies: so everything that was restored can be
        // found, and ended, as long as criu is there.
        let began = Instant::now();
        let mut service = Service::start(criu, &images, LOG_FILE, &[], true).map_err(RestoreError::Call)?;
        let start = began.elapsed();
        let awaited = "its look at the kernel";
        service.send(&acquaint(&images), awaited).map_err(RestoreError::Call)?;
        let look = service.notice(awaited).map_err(RestoreError::Call)?;
        let state = State::Prepared;
        Ok(Self { service, images, options, listener, stop, state, root: None, start, look })
    }

    /// How long criu took, or has taken so far, to be ready.
    pub fn getting_ready(&self) -> GettingReady {
        GettingReady { start: self.start, look: self.look.clone() }
    }

    /// What becomes of TCP connections, if that is known later than the rest. To be said before [`Restore::start`].
    pub fn set_tcp(&mut self, tcp: TcpPolicy) {
        self.options.tcp = tcp;
    }

    /// The receiver of the userfaultfds, for a thread of its own. One is enough: two would share the events.
    pub fn lazy(&self) -> Result<LazyListener, RestoreError> {
        let Some(listener) = &self.listener else {
            return Err(RestoreError::Order { state: "not lazy", wanted: "hand over memory" });
        };
        let of_io = |source| RestoreError::Io { what: "duplicating the listener", source };
        let listener = listener.try_clone().map_err(of_io)?;
        Ok(LazyListener::new(listener, self.stop.0.try_clone().map_err(of_io)?))
    }

    /// Asks criu to restore. The images must be complete.
    pub fn start(&mut self) -> Result<(), RestoreError> {
        if self.state != State::Prepared {
            return Err(RestoreError::Order { state: self.state.name(), wanted: "be started" });
        }
        let o = &self.options;
        let options = Options {
            images_dir_fd: self.images.fd().as_raw_fd(),
            ext_unix_sk: Some(o.ext_unix_sk),
            tcp_established: Some(o.tcp == TcpPolicy::Established),
            tcp_close: Some(o.tcp == TcpPolicy::Close),
            shell_job: Some(o.shell_job),
            file_locks: Some(o.file_locks),
            log_level: Some(o.log_level),
            log_file: Some(LOG_FILE.to_owned()),
            notify_scripts: Some(true),
            root: o.root.as_ref().map(|p| p.to_string_lossy().into_owned()),
            inherit_fd: o.inherit.iter().map(|i| InheritFd { key: i.key.clone(), fd: i.fd }).collect(),
            external: o.external.clone(),
            manage_cgroups_mode: Some(CGROUPS_IGNORE),
            lazy_pages: o.lazy.then_some(true),
            network_lock: Some(NETWORK_LOCK_SKIP),
            ..Options::default()
        };
        let request =
            Request { kind: RequestKind::Restore as i32, options: Some(options), ..Request::default() };
        self.state = State::Broken;
        // Long over, as a rule. What it says does not matter: the restore looks for itself at what is not known.
        let awaited = "its look at the kernel";
        let wait = Wait::from(ACQUAINTING);
        self.service.receive(wait, deadline(wait.timeout), awaited).map_err(RestoreError::Call)?;
        self.service.send(&request, "the start of the restore").map_err(RestoreError::Call)?;
        self.state = State::Started;
        Ok(())
    }

    /// Goes on until criu holds at `until`. Stages in between are passed through. Returns the pid of the restored
    /// root as this process sees it.
    ///
    /// Read what [`Stage`] says about the end of this process before passing [`Stage::PostRestore`].
    pub fn wait<'w>(&mut self, until: Stage, wait: impl Into<Wait<'w>>) -> Result<Option<i32>, RestoreError> {
        let held = match self.state {
            State::Started => None,
            State::Held(stage) if stage < until => Some(stage),
            other => return Err(RestoreError::Order { state: other.name(), wanted: until.name() }),
        };
        self.state = State::Broken;
        self.advance(held, until, wait.into()).map_err(RestoreError::Call)?;
        self.state = State::Held(until);
        Ok(self.root.as_ref().map(|m| m.pid))
    }

    fn advance(&mut self, held: Option<Stage>, until: Stage, wait: Wait<'_>) -> Result<(), CallError> {
        let awaited = until.awaited();
        let limit = deadline(wait.timeout);
        if held.is_some() {
            self.service.send(&Request::answer(true), awaited)?;
        }
        loop {
            let response = self.service.receive(wait, limit, awaited)?;
            let Some(name) = script(&response) else {
                return Err(self.service.verdict(&response, awaited));
            };
            let pid = response.notify.as_ref().and_then(|n| n.pid);
            if let (Some(pid), None) = (pid, &self.root) {
                self.root = Member::open(pid).map_err(|source| CallError::Io { awaited, source })?;
            }
            if Stage::of(name) == Some(until) {
                return Ok(());
            }
            tracing::debug!(name, "answering a notification of criu");
            self.service.send(&Request::answer(true), awaited)?;
        }
    }

    /// criu's pid.
    pub fn criu(&self) -> i32 {
        self.service.pid()
    }

    /// The last step: criu ends, the tree stays. To be called at [`Stage::PostResume`]. Returns the root's pid.
    pub fn finish(mut self) -> Result<i32, RestoreError> {
        if self.state != State::Held(Stage::PostResume) {
            return Err(RestoreError::Order { state: self.state.name(), wanted: "be finished" });
        }
        // The tree runs: whatever criu says from here on, killing it is no answer.
        self.state = State::Over;
        let awaited = "to end";
        let wait = Duration::from_secs(10);
        let until = deadline(wait);
        let mut run = || {
            self.service.send(&Request::answer(true), awaited)?;
            loop {
                let response = self.service.receive(wait.into(), until, awaited)?;
                match script(&response) {
                    Some(_) => self.service.send(&Request::answer(true), awaited)?,
                    None if response.success => return Ok(response.restore.map(|r| r.pid)),
                    None => return Err(self.service.verdict(&response, awaited)),
                }
            }
        };
        let pid = run().map_err(RestoreError::Call)?;
        let known = self.root.as_ref().map(|m| m.pid);
        self.service.end().map_err(|source| RestoreError::Io { what: "ending criu", source })?;
        known.or(pid).ok_or(RestoreError::Call(CallError::Protocol {
            awaited,
            detail: "it never named the restored process".to_owned(),
        }))
    }

    /// Undoes the restore at any stage: every task of it is killed and seen dead, and criu is gone.
    pub fn abort(mut self) -> Result<(), RestoreError> {
        self.undo()
    }

    fn undo(&mut self) -> Result<(), RestoreError> {
        let before = std::mem::replace(&mut self.state, State::Over);
        if before == State::Over {
            return Ok(());
        }
        let of_io = |what| move |source| RestoreError::Io { what, source };
        let until = Instant::now() + KILL;
        let mut members = Vec::new();
        if before != State::Prepared {
            self.kill_root(&mut members).map_err(of_io("killing the restored tree"))?;
            while Instant::now() < until
                && self.kill_below(&mut members).map_err(of_io("killing the restored tree"))?
            {
                std::thread::sleep(LOOK);
            }
        }
        if before == State::Held(Stage::PostRestore) {
            // criu cleans up what it made for the restore (mount points, remapped files) when it is told.
            let _ = self.service.send(&Request::answer(false), "to undo the restore");
        }
        self.end_criu(&mut members, matches!(before, State::Held(_))).map_err(of_io("ending criu"))?;
        let alive = |m: &&Member| !m.ended_by(until).unwrap_or(false);
        let pids: Vec<i32> = members.iter().filter(alive).map(|m| m.pid).collect();
        if pids.is_empty() { Ok(()) } else { Err(RestoreError::StillAlive { pids }) }
    }

    /// Kills the tree of the root that criu has named. It is below criu, as long as criu is there.
    fn kill_root(&self, members: &mut Vec<Member>) -> io::Result<()> {
        let Some(root) = &self.root else { return Ok(()) };
        let mut tree = process::descendants(root.pid)?;
        tree.extend(Member::open(root.pid)?);
        // The pid may be somebody else's by now if the root has ended: looked at after the tree was.
        if !root.ended_by(Instant::now())? {
            tree.iter().try_for_each(Member::kill)?;
            members.append(&mut tree);
        }
        Ok(())
    }

    /// Kills everything that lives below criu now, and says whether there was anything.
    fn kill_below(&self, members: &mut Vec<Member>) -> io::Result<bool> {
        let mut living = false;
        for member in process::descendants(self.service.pid())? {
            if !member.ended_by(Instant::now())? {
                living = true;
                member.kill()?;
                members.push(member);
            }
        }
        Ok(living)
    }

    /// Has criu end. Unless it holds still, it may go on making tasks until it notices that we left: those are killed
    /// as they come. One that does not end is stopped, so that nothing more can come, and then killed.
    fn end_criu(&mut self, members: &mut Vec<Member>, holds: bool) -> io::Result<()> {
        self.service.close();
        let until = Instant::now() + NOTICE;
        while Instant::now() < until {
            if self.service.ended_by(Instant::now() + LOOK)? {
                self.service.end()?;
                return Ok(());
            }
            if !holds {
                self.kill_below(members)?;
            }
        }
        tracing::warn!("criu does not undo the restore by itself and is killed");
        self.service.stop()?;
        while self.kill_below(members)? {
            std::thread::sleep(LOOK);
        }
        self.service.reap(Duration::ZERO)?;
        Ok(())
    }
}

impl Drop for Restore {
    fn drop(&mut self) {
        if let Err(error) = self.undo() {
            tracing::error!(%error, "undoing a restore");
        }
    }
}
