//! One connection: whole messages in and out, with a limit on standing still and an ear for cancellation. It is TCP
//! between hosts, and a pair of Unix sockets inside of a process: reads, writes and ends are the same for both.

use super::ahead::ReadAhead;
use crate::Cancel;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendFlags, recv, recvmsg, sendmsg};
use std::io::{self, IoSlice, IoSliceMut};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// A piece of so many bytes is large: what is copied of it twice would show.
const LARGE: usize = 16 << 10;

/// So long a read or a write waits in the kernel, which saves a busy link two system calls a wait; longer waits are those in which a
/// cancellation is heard.
const PATIENCE: Duration = Duration::from_millis(10);

/// How a link fails.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Nobody answers at the address.
    #[error("could not connect to {to}")]
    Connect {
        /// The address.
        to: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The peer closed its side.
    #[error("the peer closed the connection")]
    Closed,
    /// The connection broke.
    #[error("the connection broke")]
    Lost(#[source] io::Error),
    /// Not a byte moved for too long.
    #[error("the link made no progress for {0:?}")]
    Stalled(Duration),
    /// Somebody asked to stop.
    #[error("cancelled")]
    Cancelled,
}

/// A connected stream.
#[derive(Debug)]
pub struct TcpLink {
    stream: TcpStream,
    stall: Duration,
    cancel: Option<Cancel>,
    alarm: Option<Cancel>,
    sent: u64,
    received: u64,
    ahead: ReadAhead,
    /// Bytes that are read ahead at the end of a large piece.
    reach: usize,
}

impl TcpLink {
    /// Connects.
    ///
    /// # Errors
    /// [`LinkError::Connect`].
    pub fn connect(to: SocketAddr, timeout: Duration) -> Result<Self, LinkError> {
        let connect = |source| LinkError::Connect { to, source };
        let stream = TcpStream::connect_timeout(&to, timeout).map_err(connect)?;
        Self::new(stream).map_err(connect)
    }

    /// Takes an accepted or connected stream over.
    ///
    /// # Errors
    /// When the socket's options cannot be set.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        // The system's default may be an algorithm made for long fat networks that reaches a third of the rate
        // between neighbours. Where cubic is missing the default has to do.
        let _ = rustix::net::sockopt::set_tcp_congestion(&stream, "cubic");
        Self::over(stream)
    }

    /// Two ends of a connection inside of this process.
    ///
    /// # Errors
    /// When there are no more descriptors.
    pub fn pair() -> io::Result<(Self, Self)> {
        // The standard library's type holds any stream socket. What is TCP's alone, its options and addresses, is asked
        // for by those who have made a TCP connection.
        let end = |stream: UnixStream| Self::over(TcpStream::from(OwnedFd::from(stream)));
        let (one, other) = UnixStream::pair()?;
        Ok((end(one)?, end(other)?))
    }

    fn over(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self {
            stream,
            stall: Duration::from_secs(30),
            cancel: None,
            alarm: None,
            sent: 0,
            received: 0,
            ahead: ReadAhead::default(),
            reach: 0,
        })
    }

    /// Has the system send by this congestion control, such as `bbr`.
    ///
    /// # Errors
    /// `ENOENT` when the system does not have it.
    pub fn set_congestion(&self, name: &str) -> io::Result<()> {
        Ok(rustix::net::sockopt::set_tcp_congestion(&self.stream, name)?)
    }

    /// For single pages that somebody waits for: they pass what else leaves this machine.
    pub(crate) fn set_urgent(&self) {
        /// Of RFC 1349; the system's simplest queue still goes by it.
        const LOW_DELAY: u8 = 0x10;
        // Where it has no meaning, as between two ends in one process, nothing is lost.
        let _ = rustix::net::sockopt::set_ip_tos(&self.stream, LOW_DELAY);
    }

    /// For bulk that must not fill the way of what is urgent: little of it is handed to the system ahead of time.
    pub(crate) fn set_shallow(&self) {
        const AHEAD: u32 = 128 << 10;
        let _ = super::sys::keep_shallow(&self.stream, AHEAD);
    }

    /// Bytes a second that go over this connection at most, evenly; `None` is as fast as it goes.
    pub(crate) fn set_pace(&self, bytes_per_second: Option<u64>) {
        // Between two ends in one process there is no link to keep free.
        let _ = super::sys::set_pace(&self.stream, bytes_per_second);
    }

    /// How long not a byte may move.
    pub fn set_stall(&mut self, stall: Duration) {
        self.stall = stall;
    }

    /// How long not a byte may move.
    pub fn stall(&self) -> Duration {
        self.stall
    }

    /// Up to so many bytes are read at once from now on where less is asked for, and as many of what follows a large piece together with its
    /// end. Who waits at the descriptor for what comes next may wait in vain then, and has to ask [`Self::readable`] before.
    pub(crate) fn read_ahead(&mut self, bytes: usize) {
        self.reach = bytes;
    }

    /// Lays what comes next into `into`, without taking it; says how much of it is there now.
    ///
    /// # Errors
    /// [`LinkError::Closed`], [`LinkError::Lost`].
    pub fn peek(&self, into: &mut [u8]) -> Result<usize, LinkError> {
        let here = self.ahead.len().min(into.len());
        let (front, into) = into.split_at_mut(here);
        front.copy_from_slice(&self.ahead.bytes()[..here]);
        if into.is_empty() {
            return Ok(here);
        }
        loop {
            match recv(&self.stream, &mut *into, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
                Ok((0, _)) if here > 0 => return Ok(here),
                Ok((0, _)) => return Err(LinkError::Closed),
                Ok((n, _)) => return Ok(here + n),
                Err(Errno::AGAIN) => return Ok(here),
                Err(Errno::INTR) => {}
                Err(e) => return Err(LinkError::Lost(e.into())),
            }
        }
    }

    /// Bytes that have come and were not taken.
    ///
    /// # Errors
    /// [`LinkError::Lost`].
    pub fn waiting(&self) -> Result<usize, LinkError> {
        let bytes =
            rustix::io::ioctl_fionread(&self.stream).map_err(|errno| LinkError::Lost(errno.into()))?;
        Ok(usize::try_from(bytes).unwrap_or(usize::MAX).saturating_add(self.ahead.len()))
    }

    /// Who may interrupt a wait; `None` makes waits uninterruptible (after the commit).
    pub fn set_cancel(&mut self, cancel: Option<Cancel>) {
        self.cancel = cancel;
    }

    /// Who else may interrupt a wait: something that this connection belongs to has failed.
    pub fn set_alarm(&mut self, alarm: Option<Cancel>) {
        self.alarm = alarm;
    }

    /// Bytes that went out.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Bytes of these that the link has not taken yet, and bytes that the peer's system has not acknowledged; `None` where the
    /// system does not say.
    pub fn left(&self) -> Option<(u64, u64)> {
        super::sys::left(self.stream.as_fd())
    }

    /// How long there has been something to send or to have acknowledged, and the peer had room for it: the link decided how fast that went.
    /// `None` where the system does not say.
    pub(crate) fn busy(&self) -> Option<Duration> {
        super::sys::busy(&self.stream)
    }

    /// Bytes that came in.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// This end.
    ///
    /// # Errors
    /// When the connection is gone.
    pub fn local(&self) -> io::Result<SocketAddr> {
        self.stream.local_addr()
    }

    /// The other end.
    ///
    /// # Errors
    /// When the connection is gone.
    pub fn peer(&self) -> io::Result<SocketAddr> {
        self.stream.peer_addr()
    }

    /// Ends the connection in both directions.
    pub fn shutdown(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Says that nothing more will be sent, and throws away what still comes for a moment, so that the peer
    /// gets to read the last message instead of a reset. Says whether the peer has closed its side in order:
    /// then it has read everything.
    pub fn close_gently(&mut self, patience: Duration) -> bool {
        let _ = self.stream.shutdown(Shutdown::Write);
        let end = Instant::now() + patience;
        let mut sink = vec![0; 64 << 10];
        loop {
            match recv(&self.stream, &mut sink[..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => return true,
                Ok(_) => {}
                Err(Errno::AGAIN) => {
                    let left = end.saturating_duration_since(Instant::now());
                    if left.is_zero() || !matches!(self.poll(PollFlags::IN, left), Ok(true)) {
                        return false;
                    }
                }
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
            if Instant::now() >= end {
                return false;
            }
        }
    }

    /// Whether something can be read now (a message, or the end of the connection).
    pub fn readable(&self) -> bool {
        self.readable_within(Duration::ZERO)
    }

    /// Whether something can be read before `patience` is over.
    pub fn readable_within(&self, patience: Duration) -> bool {
        if self.ahead.len() > 0 {
            return true;
        }
        let mut fds = [PollFd::new(&self.stream, PollFlags::IN)];
        let spec =
            Timespec { tv_sec: patience.as_secs() as i64, tv_nsec: i64::from(patience.subsec_nanos()) };
        matches!(poll(&mut fds, Some(&spec)), Ok(n) if n > 0)
    }

    /// A handle by which another thread can end this connection.
    ///
    /// # Errors
    /// When there are no more descriptors.
    pub fn handle(&self) -> io::Result<TcpStream> {
        self.stream.try_clone()
    }

    /// Sends all of `slices`.
    ///
    /// # Errors
    /// [`LinkError`]; part of it may have gone out then.
    pub fn send_all(&mut self, mut slices: &mut [IoSlice<'_>]) -> Result<(), LinkError> {
        IoSlice::advance_slices(&mut slices, 0);
        while !slices.is_empty() {
            // The kernel takes 1024 slices at a call.
            let window = slices.len().min(1024);
            let mut nothing = SendAncillaryBuffer::default();
            match sendmsg(&self.stream, &slices[..window], &mut nothing, SendFlags::NOSIGNAL) {
                Ok(0) => return Err(LinkError::Closed),
                Ok(n) => {
                    self.sent += n as u64;
                    IoSlice::advance_slices(&mut slices, n);
                    self.heed_cancel(!slices.is_empty())?;
                }
                Err(e) => self.wait_after(e, PollFlags::OUT)?,
            }
        }
        Ok(())
    }

    /// Fills all of `slices`.
    ///
    /// # Errors
    /// [`LinkError`]; [`LinkError::Closed`] when the peer ended before or within it.
    pub fn receive_all(&mut self, mut slices: &mut [IoSliceMut<'_>]) -> Result<(), LinkError> {
        let mut left: usize = slices.iter().map(|slice| slice.len()).sum();
        let here = self.ahead.take(slices);
        self.received += here as u64;
        left -= here;
        IoSliceMut::advance_slices(&mut slices, here);
        while left > 0 {
            match self.read(slices, left) {
                Ok(0) => return Err(LinkError::Closed),
                Ok(n) => {
                    let n = n.min(left);
                    self.received += n as u64;
                    left -= n;
                    IoSliceMut::advance_slices(&mut slices, n);
                    self.heed_cancel(left > 0)?;
                }
                Err(e) => self.wait_after(e, PollFlags::IN)?,
            }
        }
        Ok(())
    }

    /// Reads what has come into `slices`, of `left` bytes, and ahead of it what is allowed.
    fn read(&mut self, slices: &mut [IoSliceMut<'_>], left: usize) -> rustix::io::Result<usize> {
        // The kernel takes 1024 slices at a call.
        const MOST: usize = 1024;
        if left < self.reach && left < LARGE {
            let (n, _) = recv(&self.stream, self.ahead.room(self.reach), RecvFlags::empty())?;
            self.ahead.came(n);
            return Ok(self.ahead.take(slices));
        }
        if self.reach == 0 || left < LARGE || slices.len() >= MOST {
            let window = slices.len().min(MOST);
            return receive(&self.stream, &mut slices[..window]);
        }
        let mut all: Vec<IoSliceMut<'_>> = Vec::with_capacity(slices.len() + 1);
        all.extend(slices.iter_mut().map(|slice| IoSliceMut::new(slice)));
        all.push(IoSliceMut::new(self.ahead.room(self.reach)));
        let n = receive(&self.stream, &mut all)?;
        self.ahead.came(n.saturating_sub(left));
        Ok(n)
    }

    fn wait_after(&self, error: Errno, flags: PollFlags) -> Result<(), LinkError> {
        match error {
            Errno::INTR => Ok(()),
            Errno::AGAIN => match self.poll(flags, self.stall)? {
                true => Ok(()),
                false => Err(LinkError::Stalled(self.stall)),
            },
            _ => Err(LinkError::Lost(error.into())),
        }
    }

    /// A slow link may make progress for long without a wait in which a cancellation would be heard.
    fn heed_cancel(&self, goes_on: bool) -> Result<(), LinkError> {
        let cancelled = || self.cancel.iter().chain(&self.alarm).any(Cancel::is_cancelled);
        if goes_on && cancelled() { Err(LinkError::Cancelled) } else { Ok(()) }
    }

    /// Waits until the stream is ready; false after `timeout`.
    fn poll(&self, flags: PollFlags, timeout: Duration) -> Result<bool, LinkError> {
        let end = Instant::now() + timeout;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let spec = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            let mut fds = vec![PollFd::new(&self.stream, flags)];
            for cancel in self.cancel.iter().chain(&self.alarm) {
                fds.push(PollFd::from_borrowed_fd(cancel.fd(), PollFlags::IN));
            }
            match poll(&mut fds, Some(&spec)) {
                Ok(0) => return Ok(false),
                Ok(_) if fds[1..].iter().any(|fd| !fd.revents().is_empty()) => {
                    return Err(LinkError::Cancelled);
                }
                Ok(_) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(e) => return Err(LinkError::Lost(e.into())),
            }
        }
    }
}

/// Reads what has come into `slices`.
fn receive(stream: &TcpStream, slices: &mut [IoSliceMut<'_>]) -> rustix::io::Result<usize> {
    let mut nothing = RecvAncillaryBuffer::default();
    Ok(recvmsg(stream, slices, &mut nothing, RecvFlags::empty())?.bytes)
}

impl AsFd for TcpLink {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn pair() -> (TcpLink, TcpLink) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let a = TcpLink::connect(listener.local_addr().unwrap(), Duration::from_secs(5)).unwrap();
        (a, TcpLink::new(listener.accept().unwrap().0).unwrap())
    }

    #[test]
    fn large_messages_arrive_whole() {
        let (mut a, mut b) = pair();
        let data: Vec<u8> = (0..5_000_000u32).map(|i| (i * 7) as u8).collect();
        let copy = data.clone();
        let sender = std::thread::spawn(move || {
            let (left, right) = copy.split_at(1234);
            a.send_all(&mut [IoSlice::new(left), IoSlice::new(&[]), IoSlice::new(right)]).unwrap();
            a.sent()
        });
        let mut got = vec![0; data.len()];
        let (left, right) = got.split_at_mut(4_000_001);
        b.receive_all(&mut [IoSliceMut::new(left), IoSliceMut::new(right)]).unwrap();
        assert!(got == data);
        assert_eq!(sender.join().unwrap(), b.received());
        assert!(matches!(b.receive_all(&mut [IoSliceMut::new(&mut [0])]), Err(LinkError::Closed)));
    }

    #[test]
    fn what_the_link_has_not_taken_is_known() {
        let (mut a, mut b) = pair();
        assert_eq!(a.left(), Some((0, 0)));
        // More than goes into the buffers of a receiver that takes nothing.
        a.set_stall(Duration::from_millis(50));
        let sent = a.send_all(&mut [IoSlice::new(&vec![1; 64 << 20])]);
        assert!(matches!(sent, Err(LinkError::Stalled(_))));
        let (unsent, unacknowledged) = a.left().unwrap();
        assert!(
            unsent > 0 && unsent <= unacknowledged && unacknowledged < a.sent(),
            "{unsent} of {}",
            a.sent()
        );
        let mut rest = vec![0; a.sent() as usize];
        b.receive_all(&mut [IoSliceMut::new(&mut rest)]).unwrap();
        assert_eq!(a.left().unwrap().0, 0);
        assert_eq!(TcpLink::pair().unwrap().0.left(), None, "there is no link");
    }

    #[test]
    fn both_ends_may_be_in_one_process() {
        let (mut a, mut b) = TcpLink::pair().unwrap();
        let data: Vec<u8> = (0..2_000_000u32).map(|i| (i * 7) as u8).collect();
        let copy = data.clone();
        let sender = std::thread::spawn(move || a.send_all(&mut [IoSlice::new(&copy)]).map(|()| a.sent()));
        let mut got = vec![0; data.len()];
        b.receive_all(&mut [IoSliceMut::new(&mut got)]).unwrap();
        assert!(got == data);
        assert_eq!(sender.join().unwrap().unwrap(), b.received());
        assert!(matches!(b.receive_all(&mut [IoSliceMut::new(&mut [0])]), Err(LinkError::Closed)));
    }

    #[test]
    fn what_is_read_ahead_comes_next_however_it_is_asked_for() {
        let data: Vec<u8> = (0..3_000_000u32).map(|i| (i * 7 / 3) as u8).collect();
        // Small and large pieces in turn, as frames are, with all lengths around what is read ahead.
        let mut sizes = Vec::new();
        for n in 0..60 {
            sizes.extend([32, 990 + n, if n % 3 == 0 { 0 } else { LARGE - 1 + n * 512 }]);
        }
        for reach in [0, 1, 40, 1024, 3 * LARGE] {
            let (mut a, mut b) = pair();
            b.read_ahead(reach);
            let copy = data.clone();
            let sender = std::thread::spawn(move || {
                for piece in copy.chunks(70_001) {
                    a.send_all(&mut [IoSlice::new(piece)]).unwrap();
                }
            });
            let mut got = Vec::new();
            for size in &sizes {
                let mut piece = vec![0; *size];
                if got.len() % 5 == 0 {
                    // Looking takes nothing away.
                    let mut look = [0; 16];
                    let here = b.peek(&mut look).unwrap();
                    assert!(here <= b.waiting().unwrap() && (here == 0 || b.readable()));
                    assert_eq!(look[..here], data[got.len()..got.len() + here]);
                }
                let (front, back) = piece.split_at_mut(size / 3);
                b.receive_all(&mut [IoSliceMut::new(front), IoSliceMut::new(back)]).unwrap();
                got.extend(piece);
                assert_eq!(b.received(), got.len() as u64);
            }
            // Not any more: what has been read already is not lost.
            b.read_ahead(0);
            let mut rest = vec![0; data.len() - got.len()];
            b.receive_all(&mut [IoSliceMut::new(&mut rest)]).unwrap();
            got.extend(rest);
            assert!(got == data, "{reach}");
            sender.join().unwrap();
            assert!(matches!(b.receive_all(&mut [IoSliceMut::new(&mut [0])]), Err(LinkError::Closed)));
        }
    }

    #[test]
    fn a_silent_peer_is_a_stall_and_a_cancel_is_heard() {
        let (_a, mut b) = pair();
        b.set_stall(Duration::from_millis(20));
        assert!(matches!(b.receive_all(&mut [IoSliceMut::new(&mut [0])]), Err(LinkError::Stalled(_))));
        let cancel = Cancel::new().unwrap();
        b.set_cancel(Some(cancel.clone()));
        b.set_stall(Duration::from_secs(600));
        cancel.cancel();
        assert!(matches!(b.receive_all(&mut [IoSliceMut::new(&mut [0])]), Err(LinkError::Cancelled)));
    }

    #[test]
    fn a_cancel_is_heard_on_a_link_that_is_never_waited_for_long() {
        let (mut a, mut b) = pair();
        let cancel = Cancel::new().unwrap();
        a.set_cancel(Some(cancel.clone()));
        let reader = std::thread::spawn(move || {
            // A little at a time, as often as it takes for no write to wait in vain.
            let mut piece = vec![0; 256 << 10];
            let mut got = 0;
            while b.receive_all(&mut [IoSliceMut::new(&mut piece)]).is_ok() {
                got += piece.len();
                if got == 64 * piece.len() {
                    cancel.cancel();
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            got
        });
        let sent = a.send_all(&mut [IoSlice::new(&vec![1; 512 << 20])]);
        assert!(matches!(sent, Err(LinkError::Cancelled)), "{sent:?}");
        drop(a);
        let got = reader.join().unwrap();
        assert!(got < 128 << 20, "it went on for {got} bytes");
    }
}
