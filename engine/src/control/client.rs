//! Asking a migration that runs, or a receiver.

use super::protocol::{Answer, MAX_LINE, Request};
use std::io::{self, ErrorKind as Io, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long an engine may take for an answer, which it gives at once unless the machine is very busy.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// No engine listens there.
    #[error("no engine answers at {0}")]
    Nobody(PathBuf),
    /// The socket is another user's.
    #[error("not allowed to ask at {0}: that is for root and the user of the engine")]
    NotAllowed(PathBuf),
    /// The engine closed the connection, or did not answer: it may have ended meanwhile.
    #[error("the engine at {path} did not answer")]
    Lost {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What came is no answer.
    #[error("what answers at {path} is no engine of this kind: {why}")]
    Garbage {
        /// Where.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// Asks the engine that listens at `path`.
///
/// # Errors
/// [`AskError`]. That something is refused is an answer.
pub fn ask(path: &Path, request: &Request) -> Result<Answer, AskError> {
    let lost = |source: io::Error| AskError::Lost { path: path.to_owned(), source };
    let garbage = |why: String| AskError::Garbage { path: path.to_owned(), why };
    let mut stream = UnixStream::connect(path).map_err(|error| match error.kind() {
        Io::NotFound | Io::ConnectionRefused | Io::NotADirectory => AskError::Nobody(path.to_owned()),
        Io::PermissionDenied => AskError::NotAllowed(path.to_owned()),
        _ => lost(error),
    })?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(lost)?;
    stream.set_write_timeout(Some(PATIENCE)).map_err(lost)?;
    let mut line = serde_json::to_vec(request).expect("words and numbers");
    line.push(b'\n');
    // One that does not listen to us may have said why.
    let written = stream.write_all(&line);
    let mut answer = Vec::new();
    let mut piece = [0; 1024];
    while answer.last() != Some(&b'\n') {
        match stream.read(&mut piece) {
            Ok(0) => {
                written.map_err(lost)?;
                return Err(lost(Io::UnexpectedEof.into()));
            }
            Ok(got) => answer.extend_from_slice(&piece[..got]),
            Err(error) if error.kind() == Io::Interrupted => {}
            Err(error) => return Err(lost(error)),
        }
        if answer.len() > MAX_LINE {
            return Err(garbage(format!("a line has more than {MAX_LINE} bytes")));
        }
    }
    serde_json::from_slice(&answer).map_err(|error| garbage(error.to_string()))
}
