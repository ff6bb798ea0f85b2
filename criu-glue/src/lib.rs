//! Drives an unmodified CRIU for the final freeze and the restore, and keeps it away from memory.
//!
//! A migration uses criu twice. At the source, [`Dump`] starts it early, holds it until the last moment, has it
//! freeze the tree, tells it which memory not to touch ([`HideKind`]), and holds it again when the images are
//! complete: the answer to that last question decides whether the tree dies or runs on. At the destination,
//! [`Restore`] has criu build the tree from those images, while the engine serves the memory over the
//! userfaultfds that [`LazyListener`] yields.
//!
//! criu is always the one that holds the tree, and it is bound to us by one socket: when that socket closes, for
//! whatever reason, SIGKILL included, criu lets the source's tree run on, or kills the half-restored one.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("pageferry-criu-glue knows criu on x86-64 Linux only");

mod areas;
pub mod check;
mod dump;
mod find;
mod hide;
pub mod image;
mod image_dir;
mod lazy;
mod process;
mod ranges;
mod restore;
mod rpc;
mod service;
mod sys;
mod witness;

pub use dump::{Dump, DumpError, DumpRequest, LookAhead, TcpPolicy};
pub use find::{Criu, ENVIRONMENT, FindError, MINIMUM, PRIVATE_PREFIX, Version};
pub use hide::{HideError, HideKind, Owned};
pub use image::{HiddenError, ImageError, check_hidden};
pub use image_dir::{ImageDir, ImageDirError};
pub use lazy::{LazyError, LazyEvent, LazyListener};
pub use ranges::{Range, RunError};
pub use restore::{GettingReady, InheritedFd, Restore, RestoreError, RestoreOptions, Stage};
pub use service::{CallError, LogTail, Wait};

/// Bytes per page, everywhere in criu's images and in the kernel interfaces used here.
pub const PAGE_SIZE: u64 = 4096;
