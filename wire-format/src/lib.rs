//! The frames that pageferry sends: bytes <-> meaning, without I/O, clock or unsafe code.
#![forbid(unsafe_code)]
