//! The system calls of the program that is tracked, and of who disturbs it: raw, because the tests are about what
//! the kernel makes of them.

pub mod memory;
pub mod objects;
pub mod process;
pub mod ring;
pub mod sharing;
