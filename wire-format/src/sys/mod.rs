//! What the compiler cannot check: instructions that not every processor has.

mod xxh3;

pub(crate) use xxh3::page_digest;
