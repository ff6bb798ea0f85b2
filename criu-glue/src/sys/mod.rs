//! The only rooms with `unsafe` in them.

pub(crate) mod perf;
pub(crate) mod spawn;
#[path = "shim/table.rs"]
#[allow(
    dead_code,
    reason = "this crate writes the table; cutting ranges out is the shim's half, tested here"
)]
pub(crate) mod table;
pub(crate) mod uffd;

/// The shared object that [`crate::hide`] preloads into criu.
pub(crate) const SHIM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/shim.so"));
