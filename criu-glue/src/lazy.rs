//! How a restore hands over its memory: criu connects to a socket and sends a userfaultfd for every task.
//!
//! The stream is, per task, an `int` with its pid in its own namespace, then one byte that carries the
//! descriptor; for a zombie an `int` with minus its pid and no descriptor; then, when every task is there, the
//! number [`RESTORED`]; then its end. An end before that number means that the restore failed.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};

use crate::image_dir::ImageDir;
use crate::service::poll_until;

/// The socket's name in criu's work directory.
pub(crate) const SOCKET_NAME: &str = "lazy-pages.socket";
/// `LAZY_PAGES_RESTORE_FINISHED` of criu's `uffd.h`.
const RESTORED: u32 = 0x5253_5446;

/// What criu says about the tasks that it restores.
#[derive(Debug)]
pub enum LazyEvent {
    /// A task and the userfaultfd through which its memory is to be served: non-blocking, MISSING mode, with
    /// FORK, REMAP, REMOVE and UNMAP events, its ranges not registered yet (UFFDIO_COPY gives ENOENT until they
    /// are).
    Task {
        /// Its pid in its own namespace: the N of `pagemap-N.img`.
        vpid: i32,
        /// The userfaultfd.
        uffd: OwnedFd,
    },
    /// A task that is a zombie and has no memory.
    Exited {
        /// Its pid in its own namespace.
        vpid: i32,
    },
    /// Every task is restored.
    Restored,
    /// Nothing more will come.
    End,
}

/// Why there are no more events.
#[derive(Debug, thiserror::Error)]
pub enum LazyError {
    /// criu closed the connection too early, or the [`crate::Restore`] has ended before criu connected.
    #[error("the restore failed: criu's lazy-pages connection ended before all tasks were restored")]
    Ended,
    /// criu sent what makes no sense.
    #[error("criu's lazy-pages connection carries nonsense: {0}")]
    Protocol(String),
    /// A system call failed.
    #[error("could not {what} criu's lazy-pages connection")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The receiving end. It may be moved to a thread of its own; it ends when the [`crate::Restore`] does.
#[derive(Debug)]
pub struct LazyListener {
    listener: OwnedFd,
    /// Hangs up when the [`crate::Restore`] is gone.
    stop: OwnedFd,
    stream: Option<OwnedFd>,
    restored: bool,
    ended: bool,
}

/// Binds the socket in `images`.
pub(crate) fn bind(images: &ImageDir) -> io::Result<OwnedFd> {
    images.remove(SOCKET_NAME)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let listener = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let address = SocketAddrUnix::new(images.proc_path().join(SOCKET_NAME))?;
    rustix::net::bind(&listener, &address)?;
    rustix::net::listen(&listener, 1)?;
    Ok(listener)
}

impl LazyListener {
    pub(crate) fn new(listener: OwnedFd, stop: OwnedFd) -> Self {
        Self { listener, stop, stream: None, restored: false, ended: false }
    }

    /// Waits for the next event. After [`LazyEvent::End`] there is only [`LazyEvent::End`].
    #[expect(clippy::should_implement_trait, reason = "an error is no item, and the end is an event")]
    pub fn next(&mut self) -> Result<LazyEvent, LazyError> {
        if self.ended {
            return Ok(LazyEvent::End);
        }
        let Some(word) = self.number()? else {
            self.ended = true;
            return if self.restored { Ok(LazyEvent::End) } else { Err(LazyError::Ended) };
        };
        if word == RESTORED {
            self.restored = true;
            return Ok(LazyEvent::Restored);
        }
        match word as i32 {
            vpid @ 1.. => {
                let mut byte = [0];
                let (read, uffd) = self.receive(&mut byte)?;
                match uffd {
                    Some(uffd) if read == 1 => Ok(LazyEvent::Task { vpid, uffd }),
                    _ => Err(LazyError::Protocol(format!("no descriptor came with task {vpid}"))),
                }
            }
            minus @ ..=-1 if minus != i32::MIN => Ok(LazyEvent::Exited { vpid: -minus }),
            other => Err(LazyError::Protocol(format!("{other} is no process id"))),
        }
    }

    /// Four bytes, or `None` at the end of the stream.
    fn number(&mut self) -> Result<Option<u32>, LazyError> {
        let mut word = [0; 4];
        let mut filled = 0;
        while filled < word.len() {
            let (read, descriptor) = self.receive(&mut word[filled..])?;
            if descriptor.is_some() {
                return Err(LazyError::Protocol("a descriptor where a number was due".to_owned()));
            }
            match (read, filled) {
                (0, 0) => return Ok(None),
                (0, _) => return Err(LazyError::Protocol("it ends inside a number".to_owned())),
                _ => filled += read,
            }
        }
        Ok(Some(u32::from_ne_bytes(word)))
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Result<(usize, Option<OwnedFd>), LazyError> {
        let of_io = |what| move |source: io::Error| LazyError::Io { what, source };
        if self.stream.is_none() {
            if !self.wait_for(|s| s.listener.as_fd()).map_err(of_io("wait for"))? {
                return Ok((0, None));
            }
            let accepted = rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC);
            self.stream = Some(accepted.map_err(|e| of_io("accept")(e.into()))?);
        }
        // criu's own end outlives ours in every case, so the stream's end is the only one that counts here.
        let Some(stream) = &self.stream else { return Ok((0, None)) };
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [io::IoSliceMut::new(buffer)];
        let received = loop {
            match rustix::net::recvmsg(stream, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CONNRESET) => return Ok((0, None)),
                other => break other.map_err(|e| of_io("read from")(e.into()))?,
            }
        };
        let rights = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        Ok((received.bytes, rights.flatten().next()))
    }

    /// Waits for a descriptor of ours: `false` if the restore has ended first.
    fn wait_for(&self, which: impl Fn(&Self) -> rustix::fd::BorrowedFd<'_>) -> io::Result<bool> {
        loop {
            let mut polled = [
                PollFd::from_borrowed_fd(which(self), PollFlags::IN),
                PollFd::new(&self.stop, PollFlags::IN),
            ];
            if poll_until(&mut polled, Instant::now() + Duration::from_secs(3600))? {
                return Ok(!polled[0].revents().is_empty());
            }
        }
    }
}
