//! A process and everybody who descends from it.

use crate::target::{OpenError, Target};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::sync::OnceLock;

/// Why the tree could not be listed.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// The root has ended.
    #[error("process {0} has ended")]
    RootEnded(i32),
    /// The kernel does not tell who is whose child.
    #[error("this kernel does not list the children of a process (CONFIG_PROC_CHILDREN)")]
    NoChildren(#[source] io::Error),
    /// The kernel refused.
    #[error("could not read the children of process {pid}")]
    Io {
        /// Whose.
        pid: i32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A member cannot be a target.
    #[error("a member of the tree cannot be migrated")]
    Member(#[from] OpenError),
    /// It never stood still for long enough to be listed.
    #[error("the tree of process {0} changes too fast to be listed")]
    Unstable(i32),
}

/// How often the tree may differ between two looks.
const LOOKS: u32 = 1000;

/// All live processes of the tree, root first, parents before children. Looks until two looks agree, so that a
/// process that is forked meanwhile is not missed.
///
/// # Errors
/// [`TreeError`]. Zombies are left out.
pub fn discover(root: &Target) -> Result<Vec<Target>, TreeError> {
    discover_with(root, &[])
}

/// As [`discover`]; those that are known are not opened again, which takes two descriptors each.
pub(crate) fn discover_with(root: &Target, known: &[Target]) -> Result<Vec<Target>, TreeError> {
    // A kernel without these files (CONFIG_PROC_CHILDREN) would look like a world without children.
    static KNOWN: OnceLock<()> = OnceLock::new();
    if KNOWN.get().is_none() {
        fs::metadata("/proc/thread-self/children").map_err(TreeError::NoChildren)?;
        KNOWN.get_or_init(|| ());
    }
    let mut before: Option<Vec<Target>> = None;
    for _ in 0..LOOKS {
        let found = look(root, before.as_deref().unwrap_or(known))?;
        // What was known beforehand is a look too: then one more says that nothing has changed, and the next is only about
        // what comes later.
        let before_that = before.as_deref().unwrap_or(known);
        if before_that.len() == found.len() && before_that.iter().zip(&found).all(|(old, new)| old.is(new)) {
            return Ok(found);
        }
        before = Some(found);
    }
    Err(TreeError::Unstable(root.pid()))
}

fn look(root: &Target, known: &[Target]) -> Result<Vec<Target>, TreeError> {
    if !root.is_alive() {
        return Err(TreeError::RootEnded(root.pid()));
    }
    let known: BTreeMap<i32, &Target> = known.iter().map(|target| (target.pid(), target)).collect();
    let mut found = vec![root.clone()];
    let mut seen = BTreeSet::from([root.pid()]);
    let mut at = 0;
    while at < found.len() {
        let pid = found[at].pid();
        let children = found[at].children().map_err(|source| TreeError::Io { pid, source })?;
        at += 1;
        for child in children {
            if !seen.insert(child) {
                continue;
            }
            // Nobody else gets the pid of one that has not ended.
            if let Some(target) = known.get(&child).filter(|target| target.is_alive()) {
                found.push((*target).clone());
                continue;
            }
            match Target::open_any(child) {
                Ok(child) => found.push(child),
                // It has ended (or has since); its own children went elsewhere.
                Err(OpenError::NoSuchProcess(_) | OpenError::Zombie { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    if root.is_alive() { Ok(found) } else { Err(TreeError::RootEnded(root.pid())) }
}
