//! The system calls that no crate wraps: numbers and structures, asserted at compile time, with safe handles
//! above them.

pub(crate) mod pagemap;
pub(crate) mod procmap;
pub(crate) mod ptrace;
pub(crate) mod uffd;
