//! The only rooms with `unsafe` in them.

pub(crate) mod spawn;
#[path = "shim/table.rs"]
pub(crate) mod table;

/// The shared object that [`crate::hide`] preloads into criu.
pub(crate) const SHIM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/shim.so"));
