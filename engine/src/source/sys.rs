//! What the C library does for us, and Rust's has no name for.

/// Gives memory that was freed, and that the allocator has kept, back to the system.
pub(super) fn give_back() {
    // SAFETY: malloc_trim(3) takes no pointer and leaves every allocation as it is; it may be called at any time, by any thread.
    unsafe { libc::malloc_trim(0) };
}
