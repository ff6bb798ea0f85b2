//! What a store may take of memory, and a handle to change that while pages arrive.

use super::prefault::Shared;
use std::sync::{Arc, Weak};

/// Bytes of memory that a store may take; `None` is as many as there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Pages, with their index.
    pub(crate) pages: Option<u64>,
    /// The index, with the lists that others keep of pages.
    pub(crate) index: Option<u64>,
}

/// Bytes that a store has taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Taken {
    /// What pages were put into.
    pub(crate) used: u64,
    /// What was announced: it will come.
    pub(crate) announced: u64,
    /// As many as [`Limits::pages`] has to be at least: what was made ready, or announced if that is more, with its index.
    pub(crate) pages: u64,
    /// As many as [`Limits::index`] has to be at least.
    pub(crate) index: u64,
}

/// A handle on the limits of a store, that does not keep it.
#[derive(Clone, Debug)]
pub(crate) struct Bounds(Weak<Shared>);

impl Bounds {
    pub(super) fn of(shared: &Arc<Shared>) -> Self {
        Self(Arc::downgrade(shared))
    }

    /// What the store has taken; nothing, if there is no such store any more.
    pub(crate) fn taken(&self) -> Taken {
        self.0.upgrade().map(|shared| shared.taken()).unwrap_or_default()
    }

    /// Has the store hold to what `choose` makes of what it has taken and held to, from now on. It takes nothing more before that. Without
    /// such a store nothing is chosen.
    pub(crate) fn change<E>(
        &self,
        choose: impl FnOnce(&Taken, Limits) -> Result<Limits, E>,
    ) -> Result<(), E> {
        self.0.upgrade().map_or(Ok(()), |shared| shared.change(choose))
    }
}
