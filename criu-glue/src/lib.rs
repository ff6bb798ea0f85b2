//! Drives an unmodified CRIU for the final freeze and the restore, and keeps it away from memory.
