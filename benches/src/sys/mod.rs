//! The calls that the compiler cannot vouch for: raw mappings, fork, and scans of page tables.

pub mod memory;
pub mod process;
pub mod scan;
