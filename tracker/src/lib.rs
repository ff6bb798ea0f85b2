//! Dirty-page tracking of a running process tree on Linux.
