//! One dump, in steps: held before the freeze, frozen, complete, decided.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::areas::Areas;
use crate::find::Criu;
use crate::hide::{Hide, HideError, HideKind, Owned, PARENT_FOLDER, Shim};
use crate::image::{HiddenError, check_hidden};
use crate::image_dir::ImageDir;
use crate::process::{self, Member};
use crate::rpc::message::{CGROUPS_IGNORE, NETWORK_LOCK_SKIP};
use crate::rpc::{Options, Request, RequestKind, Response};
use crate::service::{CallError, Service, Wait, deadline};
use crate::witness::Witness;

/// criu's log of a dump, in the image directory.
pub(crate) const LOG_FILE: &str = "criu-dump.log";

/// How long tasks get to be seen running again after a dump was undone.
const THAW: Duration = Duration::from_secs(2);

/// What becomes of established TCP connections. Listening sockets are always kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcpPolicy {
    /// They are closed by the restore: the restored sockets read as disconnected.
    Close,
    /// A tree that has any is refused.
    Refuse,
    /// Their state is saved and restored. That they reach the right machine is up to the caller.
    Established,
}

/// What to dump, and how.
#[derive(Clone, Debug)]
pub struct DumpRequest<'a> {
    /// The root of the tree, as this process sees it.
    pub pid: i32,
    /// Where the images go. Empty, or of an earlier dump that failed.
    pub images: &'a ImageDir,
    /// How criu is kept away from the engine's memory.
    pub hide: HideKind,
    /// What becomes of established TCP connections.
    pub tcp: TcpPolicy,
    /// Allows a tree whose session or terminal is outside of it (started from a shell).
    pub shell_job: bool,
    /// Allows file locks, which are then restored.
    pub file_locks: bool,
    /// Allows unix sockets whose other end is outside of the tree.
    pub ext_unix_sk: bool,
    /// Allows files that were unlinked but have another name, by giving them a name for the time being.
    pub link_remap: bool,
    /// Resources outside of the tree, in criu's own notation (`mnt[/data]:data`, `net[4026531840]:ns`).
    pub external: Vec<String>,
    /// criu's log level: 1 errors, 2 warnings, 4 everything.
    pub log_level: i32,
    /// How long criu may take until the tree can be frozen, and what ends the wait.
    pub start: Wait<'a>,
}

impl<'a> DumpRequest<'a> {
    /// A request with the usual choices: TCP connections are closed; locks, remapped links, and trees started
    /// from a shell are allowed.
    pub fn new(pid: i32, images: &'a ImageDir, hide: HideKind) -> Self {
        Self {
            pid,
            images,
            hide,
            tcp: TcpPolicy::Close,
            shell_job: true,
            file_locks: true,
            ext_unix_sk: false,
            link_remap: true,
            external: Vec::new(),
            log_level: 2,
            start: Duration::from_secs(10).into(),
        }
    }
}

/// Why a dump did not come about. The tree runs on, or will when the [`Dump`] is dropped, unless
/// [`DumpError::StillAlive`] or [`DumpError::LeftStopped`] says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// criu failed, died, took too long or was interrupted.
    #[error("dumping process {pid}")]
    Call {
        /// The root of the tree.
        pid: i32,
        /// What happened.
        #[source]
        source: CallError,
    },
    /// The memory could not be hidden.
    #[error("hiding memory of the tree of process {pid} from criu by {kind}")]
    Hide {
        /// The root of the tree.
        pid: i32,
        /// By which way.
        kind: HideKind,
        /// What happened.
        #[source]
        source: HideError,
    },
    /// The shim is not inside criu: the loader ignored it.
    #[error(
        "the shim was not loaded into {criu}; is it statically linked, set-uid, or a wrapper that clears its environment?"
    )]
    ShimNotLoaded {
        /// The executable.
        criu: std::path::PathBuf,
    },
    /// The images are not exactly what was asked for.
    #[error("the dump of process {pid} is not what was asked for")]
    Check {
        /// The root of the tree.
        pid: i32,
        /// What is wrong.
        #[source]
        source: HiddenError,
    },
    /// criu was given the flags that memory had before the freeze, and they are others now. Nothing is wrong with the
    /// tree; the next attempt will find the new ones.
    #[error("the memory of process {pid} changed its flags just before the freeze: {detail}; try again")]
    AreasChanged {
        /// The process.
        pid: i32,
        /// Which area, and how.
        detail: String,
    },
    /// The steps were called out of order.
    #[error("the dump of process {pid} is {state}, so it cannot {wanted}")]
    Order {
        /// The root of the tree.
        pid: i32,
        /// Where it stands.
        state: &'static str,
        /// What was asked.
        wanted: &'static str,
    },
    /// The tree was committed, and yet some of it could not be seen to be dead.
    #[error(
        "processes {pids:?} of the dumped tree are still alive after the commit; they must be ended by hand"
    )]
    StillAlive {
        /// Which.
        pids: Vec<i32>,
    },
    /// The dump was undone, but the tree is still held.
    #[error("processes {pids:?} are still stopped after the dump was undone{}", if *.killed { " and criu was killed" } else { "" })]
    LeftStopped {
        /// Which.
        pids: Vec<i32>,
        /// Whether criu had to be killed.
        killed: bool,
    },
    /// A system call of ours failed.
    #[error("{what} for the dump of process {pid}")]
    Io {
        /// The root of the tree.
        pid: i32,
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl DumpError {
    /// Whether the caller's own descriptor ended the wait.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Call { source: CallError::Cancelled { .. }, .. })
    }

    /// Whether time was up.
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::Call { source: CallError::Timeout { .. }, .. })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running,
    Frozen,
    Complete,
    Broken,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::Running => "not frozen yet",
            Self::Frozen => "frozen",
            Self::Complete => "complete",
            Self::Broken => "failed",
        }
    }
}

/// A running dump. Dropping it undoes it: the tree runs on.
///
/// The thread that calls does not matter: criu is the tracer of the tree, we only talk to criu.
#[derive(Debug)]
pub struct Dump {
    service: Service,
    hide: Hide,
    kind: HideKind,
    images: DumpImages,
    pid: i32,
    state: State,
    /// The whole tree, once it is frozen.
    tree: Vec<Member>,
    /// What smaps said of the processes before the freeze.
    known: Vec<(i32, Areas)>,
    /// Counts since then what could have changed it; `None` where that is not possible. Kept to the end, because to close
    /// it costs more than to keep it.
    witness: Option<Witness>,
    /// Why what is known may not be so any more; `None` if it is, by what the witness says.
    doubt: Option<String>,
    /// Compares what criu was given with what is; `None` when that is done, or was not needed.
    comparison: Option<JoinHandle<Result<(), DumpError>>>,
    decided: bool,
}

/// What [`Dump::look_ahead`] took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LookAhead {
    /// Opening the counters of system calls.
    pub counters: Duration,
    /// Reading the areas.
    pub areas: Duration,
}

/// The image directory under a descriptor of our own, so that a dump does not borrow the caller's.
#[derive(Debug)]
struct DumpImages(ImageDir);

impl Dump {
    /// Starts criu and returns while it holds *before* the freeze: all of criu's start-up is done, the tree runs.
    pub fn start(criu: &Criu, request: DumpRequest<'_>) -> Result<Self, DumpError> {
        let pid = request.pid;
        let kind = request.hide;
        let of_hide = |source| DumpError::Hide { pid, kind, source };
        let of_io = |what| move |source| DumpError::Io { pid, what, source };
        let hide = match kind {
            HideKind::Shim => Hide::Shim(Shim::new().map_err(of_hide)?),
            HideKind::SyntheticParent => Hide::Parent,
        };
        let images = request.images.duplicate().map_err(of_io("duplicating the image directory"))?;
        let environment = match &hide {
            Hide::Shim(shim) => shim.environment().to_vec(),
            Hide::Parent => {
                // criu resolves the folder when the request comes; its files may come as late as the freeze.
                images.make_folder(PARENT_FOLDER.as_ref()).map_err(of_io("making the parent's folder"))?;
                Vec::new()
            }
        };
        let service = Service::start(criu, &images, LOG_FILE, &environment, false)
            .map_err(|source| DumpError::Call { pid, source })?;
        let mut dump = Self {
            service,
            hide,
            kind,
            images: DumpImages(images),
            pid,
            state: State::Running,
            tree: Vec::new(),
            known: Vec::new(),
            witness: None,
            doubt: None,
            comparison: None,
            decided: false,
        };
        let options = dump.options(&request);
        let dumping =
            Request { kind: RequestKind::Dump as i32, options: Some(options), ..Request::default() };
        let awaited = "to be ready to freeze";
        dump.guarded(|dump| {
            dump.service.send(&dumping, awaited).map_err(|source| DumpError::Call { pid, source })?;
            dump.until("pre-dump", request.start, awaited)?;
            match &dump.hide {
                Hide::Shim(shim) if !shim.is_loaded().map_err(of_io("reading the shim's table"))? => {
                    Err(DumpError::ShimNotLoaded { criu: criu.path().to_owned() })
                }
                _ => Ok(()),
            }
        })?;
        Ok(dump)
    }

    fn options(&self, request: &DumpRequest<'_>) -> Options {
        use std::os::fd::AsRawFd;
        let parent = self.kind == HideKind::SyntheticParent;
        Options {
            images_dir_fd: self.images.0.fd().as_raw_fd(),
            pid: Some(request.pid),
            ext_unix_sk: Some(request.ext_unix_sk),
            tcp_established: Some(request.tcp == TcpPolicy::Established),
            tcp_close: Some(request.tcp == TcpPolicy::Close),
            // One that nobody has accepted yet is no reason to fail: its client hears that there is none.
            tcp_skip_in_flight: (request.tcp == TcpPolicy::Established).then_some(true),
            shell_job: Some(request.shell_job),
            file_locks: Some(request.file_locks),
            link_remap: Some(request.link_remap),
            external: request.external.clone(),
            log_level: Some(request.log_level),
            log_file: Some(LOG_FILE.to_owned()),
            notify_scripts: Some(true),
            parent_img: parent.then(|| PARENT_FOLDER.to_owned()),
            track_mem: parent.then_some(true),
            manage_cgroups_mode: Some(CGROUPS_IGNORE),
            network_lock: Some(NETWORK_LOCK_SKIP),
            ..Options::default()
        }
    }

    /// Reads, while the tree runs, what criu would have to ask the kernel for inside the freeze: the flags of the areas
    /// of these processes, 10 ms for each GiB in memory. To be called just before [`Dump::freeze`], or not at all: what
    /// is not known from here, criu asks for itself.
    ///
    /// Until the freeze the system calls of these processes are counted that could change it. If there was one, or they
    /// cannot be counted, what was read is compared with what is after the dump ([`Dump::confirm`]).
    pub fn look_ahead(&mut self, pids: &[i32]) -> LookAhead {
        if !matches!(self.hide, Hide::Shim(_)) {
            return LookAhead::default();
        }
        let began = Instant::now();
        (self.witness, self.doubt) = match Witness::open(pids) {
            Ok(witness) => (Some(witness), None),
            Err(reason) => (None, Some(reason.to_string())),
        };
        let counters = began.elapsed();
        // One that ends meanwhile, or cannot be read, is left to criu.
        self.known = pids.iter().filter_map(|&pid| Some((pid, Areas::read(pid).ok()?))).collect();
        LookAhead { counters, areas: began.elapsed() - counters }
    }

    /// Freezes the whole tree and returns while it is frozen, with nothing of criu inside the tasks yet. Now the
    /// last pages can be read.
    pub fn freeze<'w>(&mut self, wait: impl Into<Wait<'w>>) -> Result<(), DumpError> {
        self.expect(State::Running, "be frozen")?;
        let pid = self.pid;
        self.guarded(|dump| {
            dump.answer("the freeze")?;
            // network-lock comes in between if the tree has a network namespace of its own.
            dump.until("query-ext-files", wait.into(), "to freeze the tree")?;
            let members = || -> io::Result<Vec<Member>> {
                let mut tree: Vec<Member> = Member::open(pid)?.into_iter().collect();
                tree.extend(process::descendants(pid)?);
                Ok(tree)
            };
            dump.tree = members().map_err(|source| DumpError::Io {
                pid,
                what: "opening the processes of the tree",
                source,
            })?;
            dump.ask_witness();
            dump.state = State::Frozen;
            Ok(())
        })
    }

    /// Asks whether anything can have changed since [`Dump::look_ahead`]. The tree is frozen, and nothing of criu is in it.
    fn ask_witness(&mut self) {
        if let Some(witness) = &self.witness {
            let unwatched = self.known.iter().find(|(_, areas)| !areas.may_be_witnessed());
            self.doubt = match unwatched {
                Some((pid, _)) => Some(format!("process {pid} has areas that can change without a call")),
                None => witness.saw(),
            };
        }
        if let Some(doubt) = &self.doubt {
            tracing::debug!(doubt, "what was read of memory areas is compared with what is");
        }
    }

    /// Why it is not known since the freeze that what [`Dump::look_ahead`] read is still so; `None` if it is. Where there
    /// is a reason, [`Dump::confirm`] may take as long as to look ahead.
    pub fn doubt(&self) -> Option<&str> {
        self.doubt.as_deref()
    }

    /// Has criu write its images, without the pages in `owned`, and returns while the tree is still frozen and
    /// the images are complete. They have been checked with [`check_hidden`] then.
    ///
    /// A process of the tree that is not in `owned` is dumped whole by criu. Before the tree may be ended,
    /// [`Dump::confirm`] has to be waited for.
    pub fn dump<'w>(&mut self, owned: &[Owned], wait: impl Into<Wait<'w>>) -> Result<(), DumpError> {
        self.expect(State::Frozen, "be dumped")?;
        let (pid, kind) = (self.pid, self.kind);
        self.guarded(|dump| {
            let areas = dump.known_areas(owned);
            let of_io = |source| DumpError::Io { pid, what: "writing down the memory areas", source };
            let texts = areas
                .iter()
                .map(|(pid, areas)| Ok((*pid, text_file(&areas.text())?)))
                .collect::<io::Result<Vec<_>>>()
                .map_err(of_io)?;
            let images = &dump.images.0;
            dump.hide.publish(images, owned, &texts).map_err(|source| DumpError::Hide {
                pid,
                kind,
                source,
            })?;
            dump.answer("writing the images")?;
            dump.until("post-dump", wait.into(), "to write the images")?;
            let images = &dump.images.0;
            dump.hide.complete(images, owned).map_err(|source| DumpError::Hide { pid, kind, source })?;
            check_hidden(images, owned).map_err(|source| DumpError::Check { pid, source })?;
            let witnessed = dump.witness.is_some() && dump.doubt.is_none();
            if !areas.is_empty() && !witnessed {
                let compare = move || compare(&areas);
                let thread = std::thread::Builder::new().name("areas".to_owned()).spawn(compare);
                dump.comparison = Some(thread.map_err(|source| DumpError::Io {
                    pid,
                    what: "starting the comparison of memory areas",
                    source,
                })?);
            }
            dump.state = State::Complete;
            Ok(())
        })
    }

    /// What is known from before of the areas that the processes have now.
    fn known_areas(&self, owned: &[Owned]) -> Vec<(i32, Areas)> {
        let of = |pid: i32| {
            let (_, before) = self.known.iter().find(|(known, _)| *known == pid)?;
            before.as_of(pid).ok().flatten()
        };
        owned.iter().filter_map(|process| Some((process.pid, of(process.pid)?))).collect()
    }

    /// Waits until what criu was told of memory areas has been compared with what they are, if that is needed
    /// ([`Dump::doubt`]). The tree must still be frozen; nobody may rely on the images before.
    ///
    /// # Errors
    /// [`DumpError::AreasChanged`]; the dump can only be undone then.
    pub fn confirm(&mut self) -> Result<(), DumpError> {
        self.expect(State::Complete, "be confirmed")?;
        let pid = self.pid;
        self.guarded(|dump| match dump.comparison.take() {
            None => Ok(()),
            Some(thread) => thread.join().unwrap_or_else(|_| {
                let source = io::Error::other("the thread has panicked");
                Err(DumpError::Io { pid, what: "comparing memory areas", source })
            }),
        })
    }

    /// The processes of the tree, known once it is frozen, the root first.
    pub fn tree(&self) -> Vec<i32> {
        self.tree.iter().map(|m| m.pid).collect()
    }

    /// The point of no return: ends the tree, which lives on elsewhere. Returns when every process of it is seen
    /// dead (its parent may still have to reap it). Should criu fail to do it, it is done here.
    pub fn commit<'w>(mut self, wait: impl Into<Wait<'w>>) -> Result<(), DumpError> {
        self.expect(State::Complete, "be committed")?;
        self.confirm()?;
        self.decided = true;
        let wait = wait.into();
        let until = deadline(wait.timeout);
        let awaited = "to end the dumped tree";
        let outcome = self.service.send(&Request::answer(true), awaited).and_then(|()| {
            loop {
                // Nobody may cancel this.
                let response = self.service.receive(wait.timeout.into(), until, awaited)?;
                match script(&response) {
                    Some(_) => self.service.send(&Request::answer(true), awaited)?,
                    None if response.success => return Ok(()),
                    None => return Err(self.service.verdict(&response, awaited)),
                }
            }
        });
        if let Err(error) = &outcome {
            tracing::warn!(pid = self.pid, %error, "criu did not end the committed tree; doing it ourselves");
            for member in &self.tree {
                let _ = member.kill();
            }
        }
        let _ = self.service.end();
        let until = until.max(Instant::now() + Duration::from_secs(1));
        let alive = |m: &&Member| !m.ended_by(until).unwrap_or(false);
        let pids: Vec<i32> = self.tree.iter().filter(alive).map(|m| m.pid).collect();
        if pids.is_empty() { Ok(()) } else { Err(DumpError::StillAlive { pids }) }
    }

    /// Undoes the dump at any point before the commit: the tree runs on as if nothing had happened.
    pub fn abort(mut self) -> Result<(), DumpError> {
        self.undo()
    }

    fn undo(&mut self) -> Result<(), DumpError> {
        if std::mem::replace(&mut self.decided, true) {
            return Ok(());
        }
        if let Some(thread) = self.comparison.take() {
            // Nobody asks for its result any more; it should not outlive us.
            let _ = thread.join();
        }
        let awaited = "to undo the dump";
        if self.state != State::Broken && self.service.send(&Request::answer(false), awaited).is_ok() {
            let wait = Duration::from_secs(10);
            let until = deadline(wait);
            // criu may ask for the network to be unlocked; its final word is that the dump failed.
            while let Ok(response) = self.service.receive(wait.into(), until, awaited) {
                if script(&response).is_none() || self.service.send(&Request::answer(true), awaited).is_err()
                {
                    break;
                }
            }
        }
        let pid = self.pid;
        let ended =
            self.service.end().map_err(|source| DumpError::Io { pid, what: "ending criu", source })?;
        let until = Instant::now() + THAW;
        loop {
            let held = |pid: &i32| process::state(*pid) == Some('t');
            let pids: Vec<i32> = self.tree.iter().map(|m| m.pid).chain([pid]).filter(held).collect();
            if pids.is_empty() {
                return Ok(());
            }
            if Instant::now() >= until {
                return Err(DumpError::LeftStopped { pids, killed: ended.is_none() });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn expect(&self, state: State, wanted: &'static str) -> Result<(), DumpError> {
        if self.state == state {
            return Ok(());
        }
        Err(DumpError::Order { pid: self.pid, state: self.state.name(), wanted })
    }

    /// Runs a step; after an error no further step is possible, but while criu waits for an answer it can still
    /// be told in good order to undo the dump.
    fn guarded(&mut self, step: impl FnOnce(&mut Self) -> Result<(), DumpError>) -> Result<(), DumpError> {
        let before = std::mem::replace(&mut self.state, State::Broken);
        step(self)?;
        if self.state == State::Broken {
            self.state = before;
        }
        Ok(())
    }

    fn answer(&mut self, awaited: &'static str) -> Result<(), DumpError> {
        let pid = self.pid;
        self.service.send(&Request::answer(true), awaited).map_err(|source| DumpError::Call { pid, source })
    }

    /// Answers notifications until the one that is wanted, which is left unanswered.
    fn until(&mut self, wanted: &str, wait: Wait<'_>, awaited: &'static str) -> Result<(), DumpError> {
        let pid = self.pid;
        let until = deadline(wait.timeout);
        let mut run = || loop {
            let response = self.service.receive(wait, until, awaited)?;
            match script(&response) {
                None if response.success => {
                    let detail = "it says it is done".to_owned();
                    return Err(CallError::Protocol { awaited, detail });
                }
                None => return Err(self.service.verdict(&response, awaited)),
                Some(name) if name == wanted => return Ok(()),
                Some(name) => {
                    tracing::debug!(name, "answering a notification of criu");
                    self.service.send(&Request::answer(true), awaited)?;
                }
            }
        };
        run().map_err(|source| DumpError::Call { pid, source })
    }
}

/// A text in memory, as a file that criu can open through us.
fn text_file(text: &str) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create("pageferry-areas", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = File::from(fd);
    file.write_all(text.as_bytes())?;
    Ok(file.into())
}

fn compare(areas: &[(i32, Areas)]) -> Result<(), DumpError> {
    for (pid, areas) in areas {
        let pid = *pid;
        let difference = areas.differ(pid).map_err(|source| DumpError::Io {
            pid,
            what: "reading the memory areas again",
            source,
        })?;
        if let Some(detail) = difference {
            return Err(DumpError::AreasChanged { pid, detail });
        }
    }
    Ok(())
}

impl Drop for Dump {
    fn drop(&mut self) {
        if let Err(error) = self.undo() {
            tracing::error!(%error, "undoing a dump");
        }
    }
}

/// The name in a notification; `None` for the final response.
pub(crate) fn script(response: &Response) -> Option<&str> {
    if response.kind != RequestKind::Notify as i32 {
        return None;
    }
    Some(response.notify.as_ref().and_then(|n| n.script.as_deref()).unwrap_or(""))
}
