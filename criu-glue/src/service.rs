//! One `criu swrk`: its process, its socket, its log.

use std::fmt;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use prost::Message;
use rustix::event::{PollFd, PollFlags};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::find::Criu;
use crate::image_dir::ImageDir;
use crate::rpc::{Request, Response};

/// Lines of criu's log in an error.
const LOG_LINES: usize = 20;
/// Bytes of the log's end that are read for them.
const LOG_BYTES: u64 = 16 << 10;
/// Largest message accepted from criu: they are of a few hundred bytes, error texts included.
const MESSAGE_BYTES: usize = 64 << 10;
/// How long criu gets to undo what it did before it is killed: restoring the tasks of a large tree takes
/// milliseconds, so only a stuck one reaches this.
const GRACE: Duration = Duration::from_secs(15);

/// How long to wait, and what ends the wait early. Made from a [`Duration`] where nothing can cancel it.
#[derive(Clone, Copy, Debug)]
pub struct Wait<'a> {
    /// The longest time to wait.
    pub timeout: Duration,
    /// A descriptor that becomes readable when the wait shall end: a pipe, an eventfd, a pidfd, a socket.
    pub cancel: Option<BorrowedFd<'a>>,
    /// A connection without whose other side there is nothing to wait for: when that is closed the wait ends, whatever of it is unread.
    pub peer: Option<BorrowedFd<'a>>,
}

impl From<Duration> for Wait<'_> {
    fn from(timeout: Duration) -> Self {
        Self { timeout, cancel: None, peer: None }
    }
}

/// The last lines of criu's log, for an error's text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogTail(String);

impl LogTail {
    /// The lines, without any decoration; empty if criu wrote nothing.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for LogTail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("; its log is empty");
        }
        f.write_str("; the end of its log:")?;
        self.0.lines().try_for_each(|line| write!(f, "\n    {line}"))
    }
}

/// Why a call of criu did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// criu could not be started.
    #[error("could not start {path}")]
    Start {
        /// The executable.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The caller's descriptor became readable.
    #[error("cancelled while waiting for criu ({awaited})")]
    Cancelled {
        /// What was awaited.
        awaited: &'static str,
    },
    /// The other side of the caller's connection was closed.
    #[error("the connection was closed while waiting for criu ({awaited})")]
    PeerClosed {
        /// What was awaited.
        awaited: &'static str,
    },
    /// Time is up.
    #[error("criu did not get there ({awaited}) within {limit:?}{log}")]
    Timeout {
        /// What was awaited.
        awaited: &'static str,
        /// The limit.
        limit: Duration,
        /// The end of its log.
        log: LogTail,
    },
    /// criu says that it failed.
    #[error("criu failed ({awaited}; errno {errno}){}{log}", .message.as_ref().map(|m| format!(": {m}")).unwrap_or_default())]
    Criu {
        /// What was awaited.
        awaited: &'static str,
        /// Its `cr_errno`, 0 if it gave none.
        errno: i32,
        /// Its first error message, if it gave one.
        message: Option<String>,
        /// The end of its log.
        log: LogTail,
    },
    /// criu ended without saying anything.
    #[error("criu ended ({status}) before it got there ({awaited}){log}")]
    Died {
        /// What was awaited.
        awaited: &'static str,
        /// Its exit status.
        status: String,
        /// The end of its log.
        log: LogTail,
    },
    /// criu said something that has no meaning here.
    #[error("criu sent an unexpected message ({awaited}): {detail}")]
    Protocol {
        /// What was awaited.
        awaited: &'static str,
        /// What came.
        detail: String,
    },
    /// A system call on our side failed.
    #[error("talking to criu failed ({awaited})")]
    Io {
        /// What was being done.
        awaited: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A running `criu swrk`. Dropping it closes the socket, which makes criu undo what it did, and reaps it.
#[derive(Debug)]
pub(crate) struct Service {
    child: Child,
    pidfd: OwnedFd,
    socket: Option<OwnedFd>,
    status: Option<ExitStatus>,
    images: OwnedFd,
    log_file: &'static str,
    stderr: std::fs::File,
}

impl Service {
    /// Starts criu, which waits for a request then. Its log will be `log_file` in `images`.
    pub(crate) fn start(
        criu: &Criu,
        images: &ImageDir,
        log_file: &'static str,
        environment: &[(&str, String)],
        subreaper: bool,
    ) -> Result<Self, CallError> {
        let awaited = "its start";
        let failed = |source: rustix::io::Errno| CallError::Io { awaited, source: source.into() };
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(failed)?;
        // What criu says before it has a log (options, loader errors) goes here.
        let stderr =
            rustix::fs::memfd_create("criu-stderr", rustix::fs::MemfdFlags::CLOEXEC).map_err(failed)?;
        let stderr = std::fs::File::from(stderr);
        let for_child = stderr.try_clone().map_err(|source| CallError::Io { awaited, source })?;
        let images = images.fd().try_clone_to_owned().map_err(|source| CallError::Io { awaited, source })?;

        let mut command = Command::new(criu.path());
        command.arg("swrk").arg(theirs.as_raw_fd().to_string());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(for_child).current_dir("/");
        for (key, value) in environment {
            command.env(key, value);
        }
        crate::sys::spawn::inherit_only(&mut command, theirs.as_fd(), subreaper);
        let child =
            command.spawn().map_err(|source| CallError::Start { path: criu.path().to_owned(), source })?;
        drop(theirs);
        let pid = rustix::process::Pid::from_child(&child);
        let pidfd = match rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(e) => {
                let mut child = child;
                let _ = child.kill();
                let _ = child.wait();
                return Err(failed(e));
            }
        };
        Ok(Self { child, pidfd, socket: Some(ours), status: None, images, log_file, stderr })
    }

    /// criu's process id.
    pub(crate) fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Sends one message.
    pub(crate) fn send(&mut self, message: &Request, awaited: &'static str) -> Result<(), CallError> {
        let Some(socket) = &self.socket else { return Err(self.died(awaited)) };
        match rustix::net::send(socket, &message.encode_to_vec(), SendFlags::NOSIGNAL) {
            Ok(_) => Ok(()),
            Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => Err(self.died(awaited)),
            Err(source) => Err(CallError::Io { awaited, source: source.into() }),
        }
    }

    /// Waits for one message. `deadline` belongs to `wait`, which names the limit and what else ends it.
    pub(crate) fn receive(
        &mut self,
        wait: Wait<'_>,
        deadline: Instant,
        awaited: &'static str,
    ) -> Result<Response, CallError> {
        let Some(socket) = &self.socket else { return Err(self.died(awaited)) };
        let mut polled = vec![PollFd::new(socket, PollFlags::IN)];
        if let Some(cancel) = &wait.cancel {
            polled.push(PollFd::new(cancel, PollFlags::IN));
        }
        if let Some(peer) = &wait.peer {
            polled.push(PollFd::new(peer, PollFlags::RDHUP));
        }
        match poll_until(&mut polled, deadline) {
            Err(source) => return Err(CallError::Io { awaited, source }),
            Ok(false) => {
                return Err(CallError::Timeout { awaited, limit: wait.timeout, log: self.log_tail() });
            }
            // An answer that is there already counts more than what came with it.
            Ok(true) if !polled[0].revents().is_empty() => {}
            Ok(true) if wait.cancel.is_some() && !polled[1].revents().is_empty() => {
                return Err(CallError::Cancelled { awaited });
            }
            Ok(true) => return Err(CallError::PeerClosed { awaited }),
        }
        let mut buffer = vec![0u8; MESSAGE_BYTES];
        let length = match rustix::net::recv(socket, &mut buffer[..], RecvFlags::TRUNC) {
            // With TRUNC the second number is the packet's true length.
            Ok((_, 0)) | Err(rustix::io::Errno::CONNRESET) => return Err(self.died(awaited)),
            Ok((_, length)) => length,
            Err(source) => return Err(CallError::Io { awaited, source: source.into() }),
        };
        let Some(bytes) = buffer.get(..length) else {
            return Err(CallError::Protocol { awaited, detail: format!("a message of {length} bytes") });
        };
        Response::decode(bytes).map_err(|e| CallError::Protocol { awaited, detail: e.to_string() })
    }

    /// criu's verdict in `response`, as an error.
    pub(crate) fn verdict(&self, response: &Response, awaited: &'static str) -> CallError {
        CallError::Criu {
            awaited,
            errno: response.errno.unwrap_or(0),
            message: response.message.clone().filter(|m| !m.is_empty()),
            log: self.log_tail(),
        }
    }

    fn died(&mut self, awaited: &'static str) -> CallError {
        self.hang_up();
        let status = match self.reap(GRACE) {
            Ok(Some(status)) => status.to_string(),
            Ok(None) => "killed, as it closed its socket and went on".to_owned(),
            Err(e) => e.to_string(),
        };
        CallError::Died { awaited, status, log: self.log_tail() }
    }

    /// Closes the socket: criu undoes what it did when it next looks at it.
    pub(crate) fn close(&mut self) {
        self.hang_up();
    }

    /// Ends the connection, whoever else has a descriptor of it.
    fn hang_up(&mut self) {
        if let Some(socket) = self.socket.take() {
            let _ = rustix::net::shutdown(&socket, rustix::net::Shutdown::Both);
        }
    }

    /// Notes in another thread when criu says something next: what it is stays where it is. The thread ends with that, or with criu.
    pub(crate) fn notice(&self, awaited: &'static str) -> Result<Notice, CallError> {
        let failed = |source| CallError::Io { awaited, source };
        let Some(socket) = &self.socket else { return Ok(Notice::new()) };
        let socket = socket.try_clone().map_err(failed)?;
        let notice = Notice::new();
        let said = notice.said.clone();
        let wait = move || {
            let far = deadline(Duration::MAX);
            // Should it fail, nothing is noticed: whoever asks is told the time that has passed.
            if poll_until(&mut [PollFd::new(&socket, PollFlags::IN)], far).unwrap_or(false) {
                let _ = said.set(Instant::now());
            }
        };
        std::thread::Builder::new().name("notice".to_owned()).spawn(wait).map_err(failed)?;
        Ok(notice)
    }

    /// Waits for criu's end until `deadline`, and does nothing else about it.
    pub(crate) fn ended_by(&self, deadline: Instant) -> io::Result<bool> {
        poll_until(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], deadline)
    }

    /// Stops criu where it is, for good: the only thing to do after this is to kill it.
    pub(crate) fn stop(&self) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::STOP) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Closes the socket, if that has not happened, and waits for criu's end; kills it when `grace` is over.
    /// `None` says that it had to be killed.
    pub(crate) fn reap(&mut self, grace: Duration) -> io::Result<Option<ExitStatus>> {
        self.hang_up();
        if let Some(status) = self.status {
            return Ok(Some(status));
        }
        let mut polled = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let ended = poll_until(&mut polled, Instant::now() + grace)?;
        if !ended {
            tracing::warn!(pid = self.child.id(), "criu did not end in time and is killed");
            self.child.kill()?;
        }
        let status = self.child.wait()?;
        self.status = Some(status);
        Ok(ended.then_some(status))
    }

    /// As [`Self::reap`] with the usual patience.
    pub(crate) fn end(&mut self) -> io::Result<Option<ExitStatus>> {
        self.reap(GRACE)
    }

    /// The last lines of criu's log, or what it wrote to stderr if it came to no log.
    pub(crate) fn log_tail(&self) -> LogTail {
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC;
        let log = rustix::fs::openat(&self.images, self.log_file, flags, rustix::fs::Mode::empty());
        let mut text = log.ok().and_then(|fd| tail(std::fs::File::from(fd)).ok()).unwrap_or_default();
        if text.trim().is_empty() {
            // A descriptor of its own: the offset is shared with criu's stderr.
            let path = format!("/proc/self/fd/{}", self.stderr.as_raw_fd());
            text = std::fs::File::open(path).and_then(tail).unwrap_or_default();
        }
        let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
        LogTail(lines[lines.len().saturating_sub(LOG_LINES)..].join("\n"))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(%error, "criu could not be waited for");
        }
    }
}

/// When criu said something, told to whoever asks.
#[derive(Clone, Debug)]
pub(crate) struct Notice {
    since: Instant,
    said: Arc<OnceLock<Instant>>,
}

impl Notice {
    fn new() -> Self {
        Self { since: Instant::now(), said: Arc::default() }
    }

    /// How long it has taken; so far, if it has not come.
    pub(crate) fn took(&self) -> Duration {
        self.said.get().copied().unwrap_or_else(Instant::now).saturating_duration_since(self.since)
    }
}

fn tail(mut file: std::fs::File) -> io::Result<String> {
    let length = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_BYTES)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Polls until something is ready (`true`) or `deadline` has come (`false`).
pub(crate) fn poll_until(polled: &mut [PollFd<'_>], deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = rustix::event::Timespec {
            tv_sec: left.as_secs().min(i64::MAX as u64) as i64,
            tv_nsec: left.subsec_nanos().into(),
        };
        match rustix::event::poll(polled, Some(&timeout)) {
            Ok(0) if Instant::now() >= deadline => return Ok(false),
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(e) => return Err(e.into()),
        }
    }
}

/// When `timeout` from now is over; as good as never for one that cannot be represented.
pub(crate) fn deadline(timeout: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(timeout).unwrap_or(now + Duration::from_secs(365 * 24 * 3600))
}
