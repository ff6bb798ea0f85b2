//! The destination's room for what the compiler cannot check: memory that the kernel populates and takes back.

pub mod arena;
#[cfg(test)]
pub mod test_memory;
