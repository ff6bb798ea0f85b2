//! Watches one process tree: who belongs to it, which pages it writes, and what is in them.
//!
//! A [`Target`] is a process that cannot be mistaken for another. A [`Tracker`] watches its whole tree;
//! [`Tracker::collect`] says which pages may have been written since the last collect that was acknowledged with
//! [`Tracker::acknowledge`]. A [`PageReader`] reads their bytes. [`uffd::Uffd`] is the other direction: it puts
//! pages into a process that waits for them. docs/KERNEL.md lists the kernel interfaces and their pitfalls.
//!
//! ```no_run
//! use pageferry_tracker::{PageReader, Target, Tracker, TreeState, probe::Kernel};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let target = Target::open(4711)?;
//! let (kind, reason) = Kernel::probe().choose(None)?;
//! println!("tracking by {kind}: {reason}");
//! let mut tracker = Tracker::attach(target, kind)?;
//! loop {
//!     let collected = tracker.collect(TreeState::Running)?;
//!     for space in &collected.spaces {
//!         let reader = PageReader::new(&space.target)?;
//!         let mut bytes = vec![0; space.dirty.len() as usize * 4096];
//!         let vanished = reader.read(space.dirty.runs(), &mut bytes)?;
//!         println!("{}: {} dirty pages, {} gone", space.target.pid(), space.dirty.len(), vanished.len());
//!     }
//!     tracker.acknowledge(collected.ticket);
//!     std::thread::sleep(std::time::Duration::from_secs(1));
//! }
//! # }
//! ```

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("pageferry-tracker knows x86-64 Linux only");

mod attach;
mod freeze;
mod inject;
mod objects;
pub mod observation;
mod page_set;
mod pinned;
pub mod probe;
mod read;
mod reclaim;
pub mod recording;
pub mod region;
mod run_times;
mod scope;
mod source;
mod standing;
mod sys;
mod target;
mod threads;
mod throttle;
pub mod tree;
pub mod uffd;
pub mod working_set;
mod write_check;

pub use attach::{
    AttachError, CollectError, Collected, DetachError, SpaceKey, SpaceScan, Ticket, Tracker, TreeState,
};
pub use freeze::FreezeError;
pub use inject::InjectError;
pub use objects::ObjectScan;
pub use page_set::{PageSet, Run};
pub use probe::{ChooseError, TrackerKind, UnknownTracker};
pub use read::{PageReader, ReadError};
pub use region::{Region, RegionError};
pub use run_times::{RunClock, RunTimes, RunTimesError};
pub use scope::{Scope, Untracked};
pub use standing::{PopulatedError, Stillness, populated};
pub use target::{OpenError, Target};
pub use threads::stack_pointers;
pub use throttle::{Throttle, Undisturbed};
pub use tree::TreeError;
pub use write_check::WriteCheck;
