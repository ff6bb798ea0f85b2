//! Migrations that are kept. As a stream: the frames of one connection in a file, from `Hello` to `Commit`, and their way back to a
//! running program. docs/KEPT.md describes the file.
//!
//! The source speaks to a thread of its own process as it would to a receiver ([`Archive`]), and [`restore`] speaks to a
//! receiver in its own process as a source would. So neither of the two knows that there is a file.
//!
//! As pages by content (`store`): what a program had when it came or left, from which the next migration copies.

mod archive;
mod archivist;
mod chain;
mod checkpoints;
mod draft;
mod error;
mod flusher;
mod frames;
mod inspect;
mod ledger;
mod player;
mod restore;
mod store;

pub(crate) use archive::Archive;
pub use error::{Damage, KeptError, Spot};
pub use inspect::{Inspection, RegionReport, Round, Share, SpaceReport, inspect};
pub use restore::{RestorePlan, restore};
pub(crate) use store::{KeptPages, KeptStore, Take, give_pages};

#[cfg(test)]
mod tests;
