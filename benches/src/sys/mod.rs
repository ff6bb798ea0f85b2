//! The calls that the compiler cannot vouch for: raw mappings and fork.

pub mod memory;
pub mod process;
