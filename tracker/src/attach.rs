//! Tracks a whole tree: every address space with a source of its own, through forks, execs and exits.

use crate::freeze::{FreezeError, Frozen};
use crate::inject::InjectError;
use crate::page_set::PageSet;
use crate::probe::TrackerKind;
use crate::region::{self, Region, RegionError};
use crate::source::compare::Compare;
use crate::source::soft_dirty::SoftDirty;
use crate::source::uffd_wp::UffdWp;
use crate::source::{DirtySource, WatchError};
use crate::sys::ptrace::same_memory;
use crate::target::{Fate, Target};
use crate::tree::{TreeError, discover};

use std::io;
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
    /// Spaces that were returned before and are gone.
    pub exited: Vec<SpaceKey>,
    /// How long the whole tree was stopped for it: zero for userfaultfd, which stops one thread of a new process for
    /// some 80 microseconds, for the comparison of contents, and for a tree that somebody else has stopped.
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
    /// Its mappings.
    pub regions: Vec<Region>,
    /// Pages of the mappings that can be lazy ([`Region::can_be_lazy`]) that are in memory or in swap, without the
    /// kernel's shared page of zeros.
    pub populated: PageSet,
    /// Of these, the pages that may have been written since the last acknowledged collect. Everything, the first
    /// time.
    pub dirty: PageSet,
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
    /// What tells that the process is still the same program.
    layout: [u64; 4],
    returned: bool,
}

/// Watches what a process tree writes. Dropping it leaves the tree as it was found.
#[derive(Debug)]
pub struct Tracker {
    root: Target,
    kind: TrackerKind,
    spaces: Vec<Space>,
    next_key: u32,
    next_ticket: u64,
    exited: Vec<SpaceKey>,
}

/// How often a process may be replaced (`exec`) while one collect tries to look at it.
const TRIES: u32 = 20;

impl Tracker {
    /// Begins to watch every process of the tree of `root`. From here on every write is seen.
    ///
    /// # Errors
    /// [`AttachError`]; nothing is watched then.
    pub fn attach(root: Target, kind: TrackerKind) -> Result<Self, AttachError> {
        let (spaces, exited) = Default::default();
        let mut tracker = Self { root, kind, spaces, next_key: 0, next_ticket: 0, exited };
        let members = discover(&tracker.root)?;
        tracker.adopt(&members, TreeState::Running)?;
        Ok(tracker)
    }

    /// Which source is used.
    pub fn kind(&self) -> TrackerKind {
        self.kind
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
        let stop = self.kind.stops_the_tree() && state == TreeState::Running;
        let frozen = if stop { Some(Frozen::new(&self.root)?) } else { None };
        let members = match &frozen {
            Some(frozen) => frozen.members.clone(),
            None => discover(&self.root)?,
        };
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
        // A process that replaced itself is in the tree, and has a new space at the end of the list.
        spaces.sort_by_key(|space| !space.target.is(&self.root));
        drop(frozen);
        let pause = if stop { start.elapsed() } else { Duration::ZERO };
        self.spaces.iter_mut().for_each(|space| space.returned = true);
        self.next_ticket += 1;
        let exited = std::mem::take(&mut self.exited);
        Ok(Collected { ticket: Ticket(self.next_ticket), spaces, exited, pause })
    }

    /// The other side has everything that the collect of `ticket` returned. Only the latest can be acknowledged:
    /// an older one has no effect, and its pages come again.
    pub fn acknowledge(&mut self, ticket: Ticket) {
        if ticket.0 == self.next_ticket {
            for space in &mut self.spaces {
                space.pending = PageSet::default();
            }
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
            TrackerKind::UffdWp => Box::new(UffdWp::new(target).map_err(failed)?),
            TrackerKind::SoftDirty => Box::new(SoftDirty::new(target, false).map_err(failed)?),
            TrackerKind::SoftDirtyScan => Box::new(SoftDirty::new(target, true).map_err(failed)?),
            TrackerKind::Compare => Box::new(Compare::new(target).map_err(failed)?),
        };
        // What is found when the tree is frozen is left alone: it is all dirty, and watched when it runs again.
        if state == TreeState::Running {
            source.watch(&region::read(target)?).map_err(|error| match error {
                WatchError::Inject(source) => AttachError::Inject { pid, source },
                WatchError::Io(source) => failed(source),
            })?;
        }
        let key = SpaceKey(self.next_key);
        self.next_key += 1;
        let (pending, populated) = Default::default();
        let target = target.clone();
        self.spaces.push(Space { key, target, source, pending, populated, layout, returned: false });
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
        let exited = &mut self.exited;
        self.spaces.retain(|space| {
            let lives = members.iter().any(|member| member.is(&space.target));
            if !lives && space.returned {
                exited.push(space.key);
            }
            lives
        });
    }

    /// Scans the space at `at`; `None` when it is gone, and removed.
    fn scan_space(&mut self, at: usize, state: TreeState) -> Result<Option<SpaceScan>, CollectError> {
        for _ in 0..TRIES {
            let space = &mut self.spaces[at];
            let pid = space.target.pid();
            let looked = look(space, state);
            match looked {
                Ok((regions, answer)) => {
                    let first = !space.returned;
                    // The first time, whatever was written before it was watched is dirty too.
                    let tracked = space.source.watches() && !(first && state == TreeState::Frozen);
                    let dirty = if first {
                        answer.populated.clone()
                    } else {
                        let come = answer.populated.subtract(&space.populated);
                        space.pending.union(&answer.dirty).intersect(&answer.populated).union(&come)
                    };
                    space.pending = dirty.clone();
                    space.populated = answer.populated.clone();
                    return Ok(Some(SpaceScan {
                        key: space.key,
                        target: space.target.clone(),
                        is_new: first,
                        regions,
                        populated: answer.populated,
                        dirty,
                        tracked,
                    }));
                }
                // Its memory is gone: it has ended, or has become another program.
                Err(LookError::Scan(error)) if error.raw_os_error() == Some(libc::ESRCH) => {
                    let space = self.spaces.remove(at);
                    if space.returned {
                        self.exited.push(space.key);
                    }
                    let target = space.target;
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
                        let space = self.spaces.remove(at);
                        if space.returned {
                            self.exited.push(space.key);
                        }
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
fn look(space: &mut Space, state: TreeState) -> Result<(Vec<Region>, crate::source::Answer), LookError> {
    let regions = region::read(&space.target).map_err(LookError::Region)?;
    if state == TreeState::Running {
        space.source.watch(&regions).map_err(|error| match error {
            WatchError::Inject(InjectError::Gone(_)) => {
                LookError::Scan(io::Error::from_raw_os_error(libc::ESRCH))
            }
            WatchError::Inject(error) => LookError::Inject(error),
            WatchError::Io(error) => LookError::Scan(error),
        })?;
    }
    let answer = space.source.collect(&regions, state == TreeState::Frozen).map_err(LookError::Scan)?;
    // The memory of before may live on in another process, and look as if nothing had happened.
    if space.target.layout().map_err(LookError::Scan)? != space.layout {
        return Err(LookError::Scan(io::Error::from_raw_os_error(libc::ESRCH)));
    }
    Ok((regions, answer))
}
