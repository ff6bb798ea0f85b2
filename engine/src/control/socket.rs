//! The socket of a migration, or a receiver: one thread that answers root, or the engine's own user, and nobody else.
//!
//! It never waits for a client: what does not come is not waited for, and a client that does not read its answers is let go.

use super::protocol::{Answer, Controlled, ErrorKind, MAX_LINE, answer};
use crate::Cancel;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, ErrorKind as Io, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Where sockets are unless they are asked for elsewhere: a directory of root's.
pub const DIRECTORY: &str = "/run/pageferry";

/// Clients at a time. One more takes the place of the one that was silent longest.
const MOST_CLIENTS: usize = 16;

/// A client that asks for nothing for so long is let go.
const SILENCE: Duration = Duration::from_secs(60);

/// How long to leave new clients alone when the system has no descriptors for them.
const RESPITE: Duration = Duration::from_millis(200);

/// The socket of the migration of a program.
pub fn path_of(pid: i32) -> PathBuf {
    Path::new(DIRECTORY).join(format!("migrate-{pid}.sock"))
}

/// The socket of the receiver that listens on a port.
pub fn receiver_path_of(port: u16) -> PathBuf {
    Path::new(DIRECTORY).join(format!("receive-{port}.sock"))
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody answers there.
    #[error("another engine answers at {0}")]
    Live(PathBuf),
    /// Something else has that name.
    #[error("{0} is there already, and no socket")]
    NotSocket(PathBuf),
    /// The directory is not this user's, so what is in it cannot be trusted.
    #[error("the directory {0} is not this user's")]
    Foreign(PathBuf),
    /// The system said no.
    #[error("could not make {path}")]
    Io {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A socket that answers for a migration, or a receiver. Dropping it takes the file away.
#[derive(Debug)]
pub struct ControlSocket {
    path: PathBuf,
    /// Which file it is: another may have its name by then.
    file: (u64, u64),
    stop: Cancel,
    thread: Option<JoinHandle<()>>,
}

impl ControlSocket {
    /// Listens at `path` for as long as this is kept; makes [`DIRECTORY`] if it is to be there. What a dead engine left at the path
    /// is replaced.
    ///
    /// # Errors
    /// [`SocketError`]; nothing has changed then.
    pub fn open(path: &Path, control: impl Controlled) -> Result<Self, SocketError> {
        if path.parent() == Some(Path::new(DIRECTORY)) {
            make_directory(Path::new(DIRECTORY))?;
            sweep(Path::new(DIRECTORY));
        }
        let failed = |source| SocketError::Io { path: path.to_owned(), source };
        let stop = Cancel::new().map_err(failed)?;
        let (listener, file) = listen(path)?;
        let mut socket = Self { path: path.to_owned(), file, stop: stop.clone(), thread: None };
        let mut server = Server { listener, control, clients: Vec::new(), respite: None };
        let thread = std::thread::Builder::new().name("control".to_owned()).spawn(move || server.run(&stop));
        socket.thread = Some(thread.map_err(failed)?);
        Ok(socket)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.file) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Takes away the sockets that engines left in a directory when they were killed: those that nobody listens at.
pub fn sweep(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        // A socket gets this name when somebody listens at it, and not before.
        let engine = ["migrate-", "receive-"].iter().any(|engine| name.starts_with(engine));
        let ours = engine && name.ends_with(".sock") && is_socket(&path);
        let dead = || UnixStream::connect(&path).is_err_and(|error| error.kind() == Io::ConnectionRefused);
        if ours && dead() {
            let _ = fs::remove_file(&path);
        }
    }
}

fn make_directory(dir: &Path) -> Result<(), SocketError> {
    let failed = |source| SocketError::Io { path: dir.to_owned(), source };
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == Io::AlreadyExists => {}
        made => return made.map_err(failed),
    }
    let meta = fs::symlink_metadata(dir).map_err(failed)?;
    if !meta.is_dir() || meta.uid() != nix::unistd::geteuid().as_raw() {
        return Err(SocketError::Foreign(dir.to_owned()));
    }
    match meta.mode() & 0o077 {
        0 => Ok(()),
        _ => fs::set_permissions(dir, Permissions::from_mode(0o700)).map_err(failed),
    }
}

/// Listens at the path, and says which file that is.
fn listen(path: &Path) -> Result<(UnixListener, (u64, u64)), SocketError> {
    let failed = |source| SocketError::Io { path: path.to_owned(), source };
    // It gets its name when it is as it should be, and takes nobody else's.
    let mut name = path.file_name().ok_or_else(|| failed(Io::InvalidFilename.into()))?.to_owned();
    name.push(format!(".{}", std::process::id()));
    let draft = path.with_file_name(name);
    if is_socket(&draft) {
        let _ = fs::remove_file(&draft);
    }
    let listener = UnixListener::bind(&draft).map_err(failed)?;
    let ready = (|| {
        fs::set_permissions(&draft, Permissions::from_mode(0o600)).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let meta = fs::symlink_metadata(&draft).map_err(failed)?;
        take_name(&draft, path)?;
        Ok((meta.dev(), meta.ino()))
    })();
    match ready {
        Ok(file) => Ok((listener, file)),
        Err(error) => {
            let _ = fs::remove_file(&draft);
            Err(error)
        }
    }
}

fn take_name(draft: &Path, path: &Path) -> Result<(), SocketError> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    let failed = |source| SocketError::Io { path: path.to_owned(), source };
    // Twice: what a dead engine has left goes in between.
    for _ in 0..2 {
        match renameat_with(CWD, draft, CWD, path, RenameFlags::NOREPLACE) {
            Err(rustix::io::Errno::EXIST) => {}
            renamed => return renamed.map_err(|errno| failed(errno.into())),
        }
        if !is_socket(path) {
            return Err(SocketError::NotSocket(path.to_owned()));
        }
        if !is_dead(path).map_err(failed)? {
            break;
        }
        let _ = fs::remove_file(path);
    }
    Err(SocketError::Live(path.to_owned()))
}

fn is_socket(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket())
}

/// Whether nobody listens there any more. Never waits.
fn is_dead(path: &Path) -> io::Result<bool> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )?;
    match connect(&socket, &SocketAddrUnix::new(path)?) {
        Err(rustix::io::Errno::CONNREFUSED | rustix::io::Errno::NOENT) => Ok(true),
        // A full queue is somebody's.
        Ok(()) | Err(rustix::io::Errno::AGAIN) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

struct Server<C> {
    listener: UnixListener,
    control: C,
    clients: Vec<Client>,
    /// From when on new clients are taken again.
    respite: Option<Instant>,
}

struct Client {
    stream: UnixStream,
    /// Of a line that is not complete.
    line: Vec<u8>,
    /// It asked for something, or came.
    heard: Instant,
}

impl<C: Controlled> Server<C> {
    fn run(&mut self, stop: &Cancel) {
        while !stop.is_cancelled() {
            let now = Instant::now();
            self.clients.retain(|client| now - client.heard < SILENCE);
            self.respite = self.respite.filter(|until| *until > now);
            let Some(ready) = self.wait(stop, now) else { continue };
            let mut ready = ready.into_iter();
            let control = &self.control;
            self.clients.retain_mut(|client| !ready.next().unwrap_or(false) || client.hear(control));
            self.accept();
        }
    }

    /// Waits for whatever comes; says of every client whether it said something, and nothing when there is no saying.
    fn wait(&self, stop: &Cancel, now: Instant) -> Option<Vec<bool>> {
        let mut fds = vec![PollFd::from_borrowed_fd(stop.fd(), PollFlags::IN)];
        fds.extend(self.clients.iter().map(|client| PollFd::new(&client.stream, PollFlags::IN)));
        if self.respite.is_none() {
            fds.push(PollFd::new(&self.listener, PollFlags::IN));
        }
        let next_silence = self.clients.iter().map(|client| SILENCE.saturating_sub(now - client.heard)).min();
        let end = self.respite.map(|until| until - now).into_iter().chain(next_silence).min();
        let end = end.map(|time| Timespec {
            // A little later, so that it is over then.
            tv_sec: time.as_secs() as i64 + 1,
            tv_nsec: 0,
        });
        poll(&mut fds, end.as_ref()).ok()?;
        Some(fds[1..=self.clients.len()].iter().map(|fd| !fd.revents().is_empty()).collect())
    }

    fn accept(&mut self) {
        if self.respite.is_some() {
            return;
        }
        // A few at a time: those that are here want answers.
        for _ in 0..MOST_CLIENTS {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == Io::WouldBlock => return,
                Err(error) if matches!(error.kind(), Io::Interrupted | Io::ConnectionAborted) => continue,
                Err(error) => {
                    tracing::debug!(%error, "a client could not be taken");
                    self.respite = Some(Instant::now() + RESPITE);
                    return;
                }
            };
            let _ = stream.set_nonblocking(true);
            let mut client = Client { stream, line: Vec::new(), heard: Instant::now() };
            match client.uid() {
                Ok(uid) if is_allowed(uid, nix::unistd::geteuid().as_raw()) => {
                    if self.clients.len() == MOST_CLIENTS
                        && let Some(longest) = (0..MOST_CLIENTS).min_by_key(|n| self.clients[*n].heard)
                    {
                        self.clients.swap_remove(longest);
                    }
                    self.clients.push(client);
                }
                _ => {
                    let text = "only root and the user of the engine may ask";
                    client.say(&Answer::no(ErrorKind::NotAllowed, text));
                }
            }
        }
    }
}

/// Whether a user may ask an engine of another.
fn is_allowed(uid: u32, engine: u32) -> bool {
    uid == 0 || uid == engine
}

impl Client {
    fn uid(&self) -> io::Result<u32> {
        Ok(getsockopt(&self.stream, PeerCredentials)?.uid())
    }

    /// Reads what has come, and answers; false when it is to be let go.
    fn hear(&mut self, control: &impl Controlled) -> bool {
        let mut piece = [0; 1024];
        let got = match self.stream.read(&mut piece) {
            Ok(0) => return false,
            Ok(got) => got,
            Err(error) => return matches!(error.kind(), Io::WouldBlock | Io::Interrupted),
        };
        for part in piece[..got].split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(part);
            if self.line.len() > MAX_LINE || (self.line.len() == MAX_LINE && part.last() != Some(&b'\n')) {
                let text = format!("a line has more than {MAX_LINE} bytes");
                self.say(&Answer::no(ErrorKind::TooLong, text));
                return false;
            }
            if part.last() == Some(&b'\n') {
                let said = self.say(&answer(control, &self.line));
                self.line.clear();
                self.heard = Instant::now();
                if !said {
                    return false;
                }
            }
        }
        true
    }

    /// Says it whole, or not at all any more.
    fn say(&mut self, answer: &Answer) -> bool {
        let line = answer.line();
        matches!(self.stream.write(&line), Ok(written) if written == line.len())
    }
}

#[cfg(test)]
#[path = "socket_tests.rs"]
mod tests;
