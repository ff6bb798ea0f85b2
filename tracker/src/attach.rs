//! Tracks a whole tree: every address space with a source of its own, through forks, execs and exits.

use crate::freeze::{FreezeError, Frozen, PATIENCE};
use crate::inject::InjectError;
use crate::objects::{ObjectScan, Objects, Parts, parts};
use crate::page_set::PageSet;
use crate::pinned::{Pinned, pinned};
use crate::probe::TrackerKind;
use crate::region::{Mappings, Region, RegionError};
use crate::scope::{Backing, Files, Scope, Untracked, View};
use crate::source::compare::Compare;
use crate::source::soft_dirty::SoftDirty;
use crate::source::uffd_wp::UffdWp;
use crate::source::{Answer, DirtySource, WatchError};
use crate::sys::ptrace::same_memory;
use crate::target::{Fate, Target};
use crate::tree::{TreeError, discover, discover_with};

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// An address space, for as long as it is tracked; never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpaceKey(pub u32);

/// What the tree does while it is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TreeState {
    /// It runs.
    Running,
    /// Somebody else has stopped all of it, and keeps it so.
    Frozen,
}

/// Names what a collect returned, to acknowledge it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(u64);

/// What a collect found.
#[derive(Debug)]
pub struct Collected {
    /// To acknowledge it with.
    pub ticket: Ticket,
    /// Every address space of the tree, the root's first.
    pub spaces: Vec<SpaceScan>,
    /// Memory that is mapped as shared, which [`Tracker::attach_all`] watches: each once, whoever has it.
    pub objects: Vec<ObjectScan>,
    /// Spaces that were returned before and are gone.
    pub exited: Vec<SpaceKey>,
    /// How long the whole tree was stopped for it: zero for userfaultfd, which stops one thread of a new process for
    /// some 80 to 180 microseconds, for the comparison of contents, and for a tree that somebody else has stopped.
    pub pause: Duration,
}

/// One address space.
#[derive(Debug)]
pub struct SpaceScan {
    /// Its name.
    pub key: SpaceKey,
    /// Its process.
    pub target: Target,
    /// Whether it is returned for the first time.
    pub is_new: bool,
    /// Its mappings, shared with the next collect that finds the same.
    pub regions: Arc<Vec<Region>>,
    /// Pages of the mappings that can be lazy ([`Region::can_be_lazy`]) that are in memory or in swap, without the
    /// kernel's shared page of zeros. With [`Tracker::attach_all`] the pages of every private mapping: of a file those
    /// that were changed. What is shared is among the [`Collected::objects`].
    pub populated: PageSet,
    /// Of these, the pages that may have been written since the last acknowledged collect. Everything, the first
    /// time. Buffers that the program has registered with io_uring, at every collect: the kernel's writes leave no mark.
    /// In a frozen tree also all changed pages of files that are mapped privately; a comparison of digests
    /// takes out what did not change.
    pub dirty: PageSet,
    /// Mappings in which writes cannot be seen, and why.
    pub untracked: Vec<Untracked>,
    /// Whether it is watched. A process that is found only when the tree is frozen is not, and all of it is dirty; it
    /// keeps its key, and is watched from the next collect on that finds the tree running.
    pub tracked: bool,
}

/// Why a tree cannot be tracked.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The tree could not be listed.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// A process could not be prepared.
    #[error("could not prepare process {pid}")]
    Inject {
        /// Which.
        pid: i32,
        /// Why.
        #[source]
        source: InjectError,
    },
    /// It is not known whose memory it has.
    #[error("could not find out whether processes {pid} and {other} share their memory")]
    Compare {
        /// One.
        pid: i32,
        /// The other.
        other: i32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Its mappings could not be read.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The kernel refused.
    #[error("could not watch process {pid}")]
    Io {
        /// Which.
        pid: i32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl AttachError {
    /// Whether the memory that was looked at is gone, which a process survives when it becomes another program.
    fn is_gone(&self) -> bool {
        match self {
            AttachError::Io { source, .. }
            | AttachError::Inject { source: InjectError::Io { source, .. }, .. } => {
                source.raw_os_error() == Some(libc::ESRCH)
            }
            // The thread that was chosen ended: by `exec` of another, perhaps.
            AttachError::Inject { source: InjectError::Gone(_), .. } => true,
            _ => false,
        }
    }
}

/// Why a collect failed. Nothing is lost: what it had found comes back with the next.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// The tree could not be listed.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// A process that is new could not be tracked.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The tree could not be stopped.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// Mappings could not be read.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// A scan failed.
    #[error("could not scan process {pid}")]
    Scan {
        /// Which.
        pid: i32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Why a tracker could not be taken away cleanly.
#[derive(Debug, thiserror::Error)]
#[error("could not let go of the tracked tree")]
pub struct DetachError(#[source] io::Error);

#[derive(Debug)]
struct Space {
    key: SpaceKey,
    target: Target,
    source: Box<dyn DirtySource>,
    /// Collected, but not acknowledged.
    pending: PageSet,
    /// What was there at the last collect. Whatever was not is dirty when it comes, whether its bit says so or not:
    /// pages that were locked belong to CRIU, and nobody counts their bits meanwhile; and the kernel loses the
    /// soft-dirty mark of new mappings that it merges.
    populated: PageSet,
    /// What it has of shared memory.
    parts: Parts,
    /// What the kernel may have written to behind the page tables since the last look.
    pinned: Pinned,
    mappings: Mappings,
    /// What tells that the process is still the same program.
    layout: [u64; 4],
    returned: bool,
}

/// Watches what a process tree writes. Dropping it leaves the tree as it was found.
#[derive(Debug)]
pub struct Tracker {
    root: Target,
    kind: TrackerKind,
    scope: Scope,
    files: Files,
    objects: Objects,
    spaces: Vec<Space>,
    next_key: u32,
    next_ticket: u64,
    exited: Vec<SpaceKey>,
}

/// How often a process may be replaced (`exec`) while one collect tries to look at it.
const TRIES: u32 = 20;

impl Tracker {
    /// Begins to watch every process of the tree of `root`. From here on every write is seen to the memory that a
    /// migration can send by itself ([`Region::can_be_lazy`]). Takes three or four descriptors a process.
    ///
    /// # Errors
    /// [`AttachError`]; nothing is watched then.
    pub fn attach(root: Target, kind: TrackerKind) -> Result<Self, AttachError> {
        Self::attach_scope(root, kind, Scope::Lazy)
    }

    /// As [`Tracker::attach`], for all memory that the programs can write or have written: also shared anonymous memory,
    /// memfd, System V and POSIX shared memory, private and shared mappings of files, locked memory, and hugetlbfs.
    ///
    /// What changes shared memory without touching a mapping of the tree (a write to its descriptor, a hole that is
    /// punched, a process outside of the tree) shows in a frozen collect only, which names all of it.
    ///
    /// # Errors
    /// [`AttachError`]; nothing is watched then.
    pub fn attach_all(root: Target, kind: TrackerKind) -> Result<Self, AttachError> {
        Self::attach_scope(root, kind, Scope::All)
    }

    fn attach_scope(root: Target, kind: TrackerKind, scope: Scope) -> Result<Self, AttachError> {
        let (files, spaces, exited) = Default::default();
        let objects = Objects::new(kind.stops_the_tree());
        let mut tracker =
            Self { root, kind, scope, files, objects, spaces, next_key: 0, next_ticket: 0, exited };
        let members = discover(&tracker.root)?;
        tracker.adopt(&members, TreeState::Running)?;
        Ok(tracker)
    }

    /// Which source is used.
    pub fn kind(&self) -> TrackerKind {
        self.kind
    }

    /// Which mappings are watched.
    pub fn scope(&self) -> Scope {
        self.scope
    }

    /// How long a thread stood still when its process began to be watched: the longest of the processes that are watched
    /// now. Seen from outside, from the moment in which the thread was asked to stop until it was let go, which is more than
    /// the thread itself notices. Zero where no thread is stopped for it: the other sources stop nothing, or everything
    /// at each collect ([`Collected::pause`]).
    pub fn attach_stop(&self) -> Duration {
        self.spaces.iter().map(|space| space.source.attach_stop()).max().unwrap_or_default()
    }

    /// What was written since the last acknowledged collect, in every process of the tree; processes that were
    /// forked since are taken in.
    ///
    /// Bytes are to be read after this returns: a write that lands while they are read shows in the next collect.
    ///
    /// # Errors
    /// [`CollectError`].
    pub fn collect(&mut self, state: TreeState) -> Result<Collected, CollectError> {
        let start = Instant::now();
        // Soft-dirty reads and clears in two steps: nothing may run in between.
        let known: Vec<Target> = self.spaces.iter().map(|space| space.target.clone()).collect();
        let stop = self.kind.stops_the_tree() && state == TreeState::Running;
        let frozen = if stop { Some(Frozen::new(&self.root, &known, PATIENCE)?) } else { None };
        let members = match &frozen {
            Some(frozen) => frozen.members.clone(),
            None => discover_with(&self.root, &known)?,
        };
        if self.scope == Scope::All {
            self.objects.begin();
        }
        self.forget_the_dead(&members);
        self.adopt(&members, state)?;
        let mut spaces = Vec::with_capacity(members.len());
        let mut at = 0;
        while at < self.spaces.len() {
            // A space that is gone was removed: who is next stands in its place.
            if let Some(scan) = self.scan_space(at, state)? {
                spaces.push(scan);
                at += 1;
            }
        }
        let known = self.spaces.iter().map(|space| (space.key, &space.target, &space.parts));
        let objects = self.objects.finish(known, state == TreeState::Frozen);
        // A process that replaced itself is in the tree, and has a new space at the end of the list.
        spaces.sort_by_key(|space| !space.target.is(&self.root));
        drop(frozen);
        let pause = if stop { start.elapsed() } else { Duration::ZERO };
        self.spaces.iter_mut().for_each(|space| space.returned = true);
        self.next_ticket += 1;
        let exited = std::mem::take(&mut self.exited);
        Ok(Collected { ticket: Ticket(self.next_ticket), spaces, objects, exited, pause })
    }

    /// The other side has everything that the collect of `ticket` returned. Only the latest can be acknowledged:
    /// an older one has no effect, and its pages come again.
    pub fn acknowledge(&mut self, ticket: Ticket) {
        if ticket.0 == self.next_ticket {
            for space in &mut self.spaces {
                space.pending.clear();
            }
            self.objects.acknowledge();
        }
    }

    /// After the last collect of a frozen tree: marks every page of every process as not written, so that who
    /// looks next (CRIU) sees only what was written after this.
    ///
    /// # Errors
    /// When the bits of a process cannot be cleared.
    pub fn clear_frozen(&mut self) -> Result<(), CollectError> {
        for space in &mut self.spaces {
            let pid = space.target.pid();
            space.source.clear().map_err(|source| CollectError::Scan { pid, source })?;
        }
        Ok(())
    }

    /// Stops watching, and leaves the tree as it was.
    ///
    /// # Errors
    /// None so far: everything that was done to the tree hangs on descriptors that are closed here.
    pub fn detach(self) -> Result<(), DetachError> {
        drop(self.spaces);
        Ok(())
    }

    /// Takes in the processes that are new. One that shares its memory with another (`vfork`, `CLONE_VM`) is not
    /// counted: its pages are the other's.
    fn adopt(&mut self, members: &[Target], state: TreeState) -> Result<(), AttachError> {
        for member in members {
            // One at a time: two new ones may share with each other.
            if self.spaces.iter().any(|space| space.target.is(member)) || self.is_shared(member)? {
                continue;
            }
            let mut tries = 0;
            while let Err(error) = self.adopt_one(member, state) {
                tries += 1;
                if member.is_alive() && (tries == TRIES || !error.is_gone()) {
                    return Err(error);
                }
                // One that has ended meanwhile is no failure; one that has become another program has memory that
                // we know nothing of yet.
                match member.fate(|| member.has_memory()) {
                    Fate::Ended => break,
                    Fate::Back => {}
                    Fate::Headless => return Err(error),
                }
            }
        }
        Ok(())
    }

    fn adopt_one(&mut self, target: &Target, state: TreeState) -> Result<(), AttachError> {
        let pid = target.pid();
        let failed = |source| AttachError::Io { pid, source };
        let layout = target.layout().map_err(failed)?;
        let mut source: Box<dyn DirtySource> = match self.kind {
            TrackerKind::UffdWp => Box::new(UffdWp::new(target, self.scope).map_err(failed)?),
            TrackerKind::SoftDirty => Box::new(SoftDirty::new(target, false).map_err(failed)?),
            TrackerKind::SoftDirtyScan => Box::new(SoftDirty::new(target, true).map_err(failed)?),
            TrackerKind::Compare => Box::new(Compare::new(target).map_err(failed)?),
        };
        let mut mappings = Mappings::default();
        // What is found when the tree is frozen is left alone: it is all dirty, and watched when it runs again.
        if state == TreeState::Running {
            let view = View::new(target, mappings.read(target)?, self.scope, &mut self.files);
            source.watch(&view).map_err(|error| match error {
                WatchError::Inject(source) => AttachError::Inject { pid, source },
                WatchError::Io(source) => failed(source),
            })?;
        }
        let key = SpaceKey(self.next_key);
        self.next_key += 1;
        let (pending, populated, parts, pinned) = Default::default();
        let target = target.clone();
        let returned = false;
        let space =
            Space { key, target, source, pending, populated, parts, pinned, mappings, layout, returned };
        self.spaces.push(space);
        Ok(())
    }

    /// Whether the memory of a process is that of a space already.
    fn is_shared(&self, member: &Target) -> Result<bool, AttachError> {
        let pid = member.pid();
        for space in &self.spaces {
            let other = space.target.pid();
            match same_memory(other, pid) {
                Ok(true) => return Ok(true),
                Ok(false) => {}
                // One of the two has ended.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                Err(source) => return Err(AttachError::Compare { pid, other, source }),
            }
        }
        Ok(false)
    }

    fn forget_the_dead(&mut self, members: &[Target]) {
        let mut at = 0;
        while let Some(space) = self.spaces.get(at) {
            if members.iter().any(|member| member.is(&space.target)) {
                at += 1;
            } else {
                self.forget(at);
            }
        }
    }

    /// A space is gone. What it could write of shared memory may be written.
    fn forget(&mut self, at: usize) -> Target {
        let space = self.spaces.remove(at);
        self.objects.changed(&space.parts, &Parts::new());
        if space.returned {
            self.exited.push(space.key);
        }
        space.target
    }

    /// Scans the space at `at`; `None` when it is gone, and removed.
    fn scan_space(&mut self, at: usize, state: TreeState) -> Result<Option<SpaceScan>, CollectError> {
        for _ in 0..TRIES {
            let space = &mut self.spaces[at];
            let pid = space.target.pid();
            let looked = look(space, state, self.scope, &mut self.files);
            match looked {
                Ok((view, mut answer)) => {
                    if self.scope == Scope::All {
                        let parts = parts(&view, &answer.populated, &answer.dirty);
                        self.objects.changed(&space.parts, &parts);
                        space.parts = parts;
                        let shared = view.pages(|_, care| care.backing == Backing::Shared);
                        answer.populated = answer.populated.subtract(&shared);
                        answer.dirty = answer.dirty.subtract(&shared);
                    }
                    let first = !space.returned;
                    // The first time, whatever was written before it was watched is dirty too.
                    let tracked = space.source.watches() && !(first && state == TreeState::Frozen);
                    let dirty = if first {
                        answer.populated.clone()
                    } else {
                        let come = answer.populated.subtract(&space.populated);
                        // What was dirty and is gone needs nobody.
                        let mut dirty = match space.pending.is_empty() {
                            true => PageSet::default(),
                            false => space.pending.intersect(&answer.populated),
                        };
                        dirty.absorb(answer.dirty);
                        dirty.absorb(come);
                        dirty
                    };
                    space.pending.clone_from(&dirty);
                    space.populated.clone_from(&answer.populated);
                    return Ok(Some(SpaceScan {
                        key: space.key,
                        target: space.target.clone(),
                        is_new: first,
                        regions: view.regions,
                        populated: answer.populated,
                        dirty,
                        untracked: view.untracked.into_iter().chain(answer.untracked).collect(),
                        tracked,
                    }));
                }
                // Its memory is gone: it has ended, or has become another program.
                Err(LookError::Scan(error)) if error.raw_os_error() == Some(libc::ESRCH) => {
                    let target = self.forget(at);
                    if !target.is_alive() {
                        return Ok(None);
                    }
                    // Its memory may be another's now: the space, if it has one, is at the end.
                    let count = self.spaces.len();
                    self.adopt(&[target], state)?;
                    if self.spaces.len() == count {
                        return Ok(None);
                    }
                    self.spaces[at..].rotate_right(1);
                }
                Err(LookError::Inject(source)) => {
                    return Err(AttachError::Inject { pid, source }.into());
                }
                Err(LookError::Scan(source)) => return Err(CollectError::Scan { pid, source }),
                Err(LookError::Region(error)) => {
                    if !space.target.is_alive() {
                        self.forget(at);
                        return Ok(None);
                    }
                    return Err(error.into());
                }
            }
        }
        let pid = self.spaces[at].target.pid();
        let source = io::Error::other("it replaces itself faster than it can be looked at");
        Err(CollectError::Scan { pid, source })
    }
}

enum LookError {
    Region(RegionError),
    Inject(InjectError),
    Scan(io::Error),
}

/// One look at a space. In a running one the mappings may change between the steps: what is missed is found by the
/// next look.
fn look(
    space: &mut Space,
    state: TreeState,
    scope: Scope,
    files: &mut Files,
) -> Result<(View, Answer), LookError> {
    let mappings = space.mappings.read(&space.target).map_err(LookError::Region)?;
    let view = View::new(&space.target, mappings, scope, files);
    if state == TreeState::Running {
        space.source.watch(&view).map_err(|error| match error {
            WatchError::Inject(InjectError::Gone(_)) => {
                LookError::Scan(io::Error::from_raw_os_error(libc::ESRCH))
            }
            WatchError::Inject(error) => LookError::Inject(error),
            WatchError::Io(error) => LookError::Scan(error),
        })?;
    }
    // Before the marks are taken away: whatever fails after that loses them.
    let pinned = buffers(&space.target, &view, scope).map_err(LookError::Scan)?;
    let mut answer = space.source.collect(&view, state == TreeState::Frozen).map_err(LookError::Scan)?;
    // What was given back since the last look was written until then.
    let before = std::mem::replace(&mut space.pinned, pinned);
    for pages in [&before, &space.pinned] {
        match pages {
            Pinned::Pages(pages) => answer.dirty.absorb(pages.intersect(&answer.populated)),
            Pinned::Unknown => answer.dirty = answer.populated.clone(),
        }
    }
    if state == TreeState::Frozen {
        // They change in ways that leave no mark: the file is written or cut off.
        let of_files = view.pages(|_, care| care.backing == Backing::File);
        answer.dirty.absorb(of_files.intersect(&answer.populated));
    }
    // The memory of before may live on in another process, and look as if nothing had happened.
    if space.target.layout().map_err(LookError::Scan)? != space.layout {
        return Err(LookError::Scan(io::Error::from_raw_os_error(libc::ESRCH)));
    }
    Ok((view, answer))
}

/// Buffers that the program has registered with io_uring.
fn buffers(target: &Target, view: &View, scope: Scope) -> io::Result<Pinned> {
    let is_ring = |region: &Region| {
        region.path.as_ref().is_some_and(|path| path.as_os_str() == "anon_inode:[io_uring]")
    };
    // Who uses io_uring has its rings mapped, as a rule; looking through all descriptors takes longer.
    if scope == Scope::Lazy && !view.regions.iter().any(is_ring) {
        return Ok(Pinned::default());
    }
    pinned(target).map_err(|error| match error.kind() {
        // Its folder in /proc goes with it.
        io::ErrorKind::NotFound => io::Error::from_raw_os_error(libc::ESRCH),
        _ => error,
    })
}
