//! The link's room for what the compiler cannot check: what the system says of a connection, and is told of it.

use rustix::ioctl::{Getter, ioctl};
use std::io;
use std::mem::{MaybeUninit, offset_of};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

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

/// How long a TCP connection has had something to send or to have acknowledged, while its peer had room for it: `tcpi_busy_time` without
/// `tcpi_rwnd_limited` of tcp(7)'s `TCP_INFO`, which count in ticks of the kernel (a few milliseconds). `None` for what is no such connection.
pub(super) fn busy(stream: &TcpStream) -> Option<Duration> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut len = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the kernel writes `len` bytes at most, which is the size of what it writes to, and says in `len` how many they were; the
    // descriptor is open as long as `stream` is borrowed.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    // SAFETY: all of it was zero, which is a value of every one of its fields (numbers), and the kernel has written more numbers.
    let info = unsafe { info.assume_init() };
    let whole = len as usize >= offset_of!(libc::tcp_info, tcpi_rwnd_limited) + size_of::<u64>();
    (result == 0 && whole)
        .then(|| Duration::from_micros(info.tcpi_busy_time.saturating_sub(info.tcpi_rwnd_limited)))
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

    fn connected() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (sender, listener.accept().unwrap().0)
    }

    #[test]
    fn a_connection_is_busy_as_long_as_its_link_is() {
        let (mut sender, mut receiver) = connected();
        assert_eq!(busy(&sender), Some(Duration::ZERO), "nothing was sent");
        const BYTES: usize = 6_000_000;
        set_pace(&sender, Some(10_000_000)).unwrap();
        let reader = std::thread::spawn(move || std::io::copy(&mut receiver, &mut std::io::sink()));
        let began = std::time::Instant::now();
        sender.write_all(&vec![7; BYTES]).unwrap();
        let (took, busy_for) = (began.elapsed(), busy(&sender).unwrap());
        assert!(took > Duration::from_millis(50), "the last bytes wait for those before them: {took:?}");
        assert!(busy_for > took / 2, "{busy_for:?} of {took:?}");
        drop(sender);
        assert_eq!(reader.join().unwrap().unwrap(), BYTES as u64);
    }

    #[test]
    fn a_connection_whose_peer_has_no_room_is_not_busy() {
        let (mut sender, receiver) = connected();
        sender.set_nonblocking(true).unwrap();
        let full = Duration::from_millis(100);
        for _ in 0..5 {
            while sender.write(&[7; 4096]).is_ok() {}
            std::thread::sleep(full);
        }
        let before = busy(&sender).unwrap();
        std::thread::sleep(4 * full);
        assert!(busy(&sender).unwrap() - before < full, "{before:?}, then {:?}", busy(&sender));
        drop(receiver);
    }

    #[test]
    fn what_is_no_tcp_connection_does_not_say_how_busy_it_is() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(busy(&TcpStream::from(std::os::fd::OwnedFd::from(one))), None);
    }

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
