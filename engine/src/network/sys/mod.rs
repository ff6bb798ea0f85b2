//! The network's room for what the compiler cannot check: packet sockets (packet(7)), which no safe crate here binds.

pub(super) mod packet;
