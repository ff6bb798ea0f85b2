//! Live migration of Linux process trees.
#![forbid(unsafe_code)]
