//! A migration's way into a file, as its source sees it.

use super::archivist;
use super::chain::Base;
use super::checkpoints::Entry;
use super::draft::Draft;
use super::error::KeptError;
use crate::effort::CpuShare;
use crate::link::{LinkError, TcpLink};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// A peer in the same process does not go away without closing its end: silence needs no limit of its own.
pub(super) const PATIENCE: Duration = Duration::from_secs(7 * 24 * 3600);

/// A place in a directory, and what the checkpoint there is to be on top of.
#[derive(Debug)]
pub(super) struct Checkpoint {
    pub(super) entry: Entry,
    pub(super) base: Option<Base>,
}

/// A file that is to be, and the thread that writes it. Dropping it waits for the thread; what was not committed is
/// gone then.
#[derive(Debug)]
pub(crate) struct Archive {
    draft: Option<(Draft, Option<Checkpoint>)>,
    thread: Option<JoinHandle<Result<(), KeptError>>>,
    end: Option<TcpStream>,
    kept: Arc<AtomicBool>,
}

impl Archive {
    /// Makes sure that the file can be made.
    pub(crate) fn in_file(path: &Path) -> Result<Self, KeptError> {
        Ok(Self::new(Draft::begin(path)?, None))
    }

    /// The same for the next file of a directory of checkpoints; on top of the last one of `program` there, if it is given.
    pub(crate) fn in_directory(dir: &Path, program: Option<&str>) -> Result<Self, KeptError> {
        let entry = Entry::next(dir)?;
        let last = program.map_or(Ok(None), |program| entry.last_of(program))?;
        let base = last.map(|stream| Base::read(&stream)).transpose()?;
        Ok(Self::new(Draft::begin(&entry.path())?, Some(Checkpoint { entry, base })))
    }

    fn new(draft: Draft, checkpoint: Option<Checkpoint>) -> Self {
        Self { draft: Some((draft, checkpoint)), thread: None, end: None, kept: Arc::default() }
    }

    /// The link to the thread that writes, which keeps within `cpu` with those of the source. There is one, once.
    pub(crate) fn connect(&mut self, cpu: &CpuShare) -> Result<TcpLink, KeptError> {
        let (draft, checkpoint) = self.draft.take().ok_or(LinkError::Closed)?;
        let (ours, mut theirs) = TcpLink::pair().map_err(LinkError::Lost)?;
        theirs.set_stall(PATIENCE);
        self.end = Some(ours.handle().map_err(LinkError::Lost)?);
        let (kept, cpu) = (Arc::clone(&self.kept), cpu.clone());
        let thread = std::thread::Builder::new()
            .name("kept-archivist".to_owned())
            .spawn(move || archivist::run(theirs, draft, checkpoint, &kept, &cpu))
            .map_err(LinkError::Lost)?;
        self.thread = Some(thread);
        Ok(ours)
    }

    /// Whether the file is there, which is certain: ends the link, and waits for the thread.
    pub(crate) fn is_kept(&mut self) -> bool {
        if let Some(end) = self.end.take() {
            let _ = end.shutdown(std::net::Shutdown::Both);
        }
        if let Some(thread) = self.thread.take() {
            match thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(error = %error.chain(), "the stream was not kept"),
                Err(_) => tracing::warn!("the thread that keeps the stream has panicked"),
            }
        }
        self.kept.load(Ordering::SeqCst)
    }
}

impl Drop for Archive {
    fn drop(&mut self) {
        let _ = self.is_kept();
    }
}
