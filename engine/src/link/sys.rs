//! The link's room for what the compiler cannot check: what the system says of a connection.

use rustix::ioctl::{Getter, ioctl};
use std::os::fd::BorrowedFd;

/// `SIOCOUTQNSD` of linux/sockios.h: bytes in a TCP socket's queue that were not sent for the first time yet.
const UNSENT: rustix::ioctl::Opcode = 0x894B;

/// Bytes that were written to a TCP connection and that the link has not taken yet. `None` for what is no such connection.
pub(super) fn unsent(connection: BorrowedFd<'_>) -> Option<u64> {
    // SAFETY: the request writes one `int` and nothing else (tcp(7), and `tcp_ioctl` in the kernel's sources).
    let request = unsafe { Getter::<UNSENT, libc::c_int>::new() };
    // SAFETY: the descriptor is open as long as it is borrowed, and the request's memory lives in the request. Sockets that are
    // not TCP refuse the number.
    let bytes = unsafe { ioctl(connection, request) };
    bytes.ok().and_then(|bytes| u64::try_from(bytes).ok())
}
