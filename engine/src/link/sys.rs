//! The link's room for what the compiler cannot check: what the system says of a connection, and is told of it.

use rustix::ioctl::{Getter, ioctl};
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `SIOCOUTQNSD` of linux/sockios.h: bytes in a TCP socket's queue that were not sent for the first time yet.
const UNSENT: rustix::ioctl::Opcode = 0x894B;
/// `SIOCOUTQ` of linux/sockios.h: bytes in it that the peer has not acknowledged.
const UNACKNOWLEDGED: rustix::ioctl::Opcode = 0x5411;

/// What is left of the bytes that were written to a TCP connection: those that the link has not taken, and those that the
/// peer's system does not have for sure. `None` for what is no such connection.
pub(super) fn left(connection: BorrowedFd<'_>) -> Option<(u64, u64)> {
    Some((ask::<UNSENT>(connection)?, ask::<UNACKNOWLEDGED>(connection)?))
}

fn ask<const NUMBER: rustix::ioctl::Opcode>(connection: BorrowedFd<'_>) -> Option<u64> {
    // SAFETY: both requests write one `int` and nothing else (tcp(7), and `tcp_ioctl` in the kernel's sources).
    let request = unsafe { Getter::<NUMBER, libc::c_int>::new() };
    // SAFETY: the descriptor is open as long as it is borrowed, and the request's memory lives in the request. Sockets that are
    // not TCP refuse the first number, or answer with an `int` too.
    let bytes = unsafe { ioctl(connection, request) };
    bytes.ok().and_then(|bytes| u64::try_from(bytes).ok())
}

/// Has the system take no more from us while `bytes` wait to be sent for the first time (`TCP_NOTSENT_LOWAT`): what it has taken cannot be
/// overtaken.
pub(super) fn keep_shallow(stream: &TcpStream, bytes: u32) -> io::Result<()> {
    // SAFETY: the option's value is four bytes, which live on this frame until the call returns, and the kernel only reads
    // them; the descriptor is open as long as `stream` is borrowed.
    let result = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_NOTSENT_LOWAT,
            (&raw const bytes).cast(),
            size_of::<u32>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Has the system send no more than so many bytes a second over a TCP connection, spread evenly; `None` is as fast as it goes.
/// (`SO_MAX_PACING_RATE` of socket(7); the kernel takes eight bytes since 4.20, and all ones for no limit.)
pub(super) fn set_pace(stream: &TcpStream, bytes_per_second: Option<u64>) -> io::Result<()> {
    let rate = bytes_per_second.unwrap_or(u64::MAX);
    // SAFETY: the option's value is eight bytes, which live on this frame until the call returns, and the kernel only reads
    // them; the descriptor is open as long as `stream` is borrowed.
    let result = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MAX_PACING_RATE,
            (&raw const rate).cast(),
            size_of::<u64>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::TcpListener;

    #[test]
    fn the_system_takes_little_more_than_was_said() {
        let taken = |shallow: Option<u32>| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let receiver = listener.accept().unwrap();
            sender.set_nonblocking(true).unwrap();
            if let Some(bytes) = shallow {
                keep_shallow(&sender, bytes).unwrap();
            }
            let mut taken = 0;
            while let Ok(bytes) = sender.write(&[7; 4096]) {
                taken += bytes;
            }
            drop(receiver);
            taken
        };
        let (deep, shallow) = (taken(None), taken(Some(64 << 10)));
        assert!(shallow < deep, "{shallow} and {deep} bytes");
    }
}
