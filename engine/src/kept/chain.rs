//! Checkpoints on top of each other: each stores what the one before does not have, and needs all of those below it.
//!
//! The pages of a checkpoint, each content once and no zeros, in the order of spaces and pages, have numbers from 0 on: by these
//! the next one names them, as it would name those of a receiver's store.

use super::checkpoints::{Below, below};
use super::error::KeptError;
use super::frames::{Frames, StreamFile};
use super::inspect::rebuild;
use super::ledger::Ledger;
use super::player::survey;
use super::store::KeptPages;
use pageferry_wire_format::{ControlMessage, Head, PAGE_SIZE, PageDigest, digest, limits};
use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The checkpoint that a new one is made on top of.
#[derive(Debug)]
pub(super) struct Base {
    /// What the index says of it.
    pub(super) below: Below,
    /// What its pages look like, by number.
    pub(super) digests: Vec<PageDigest>,
}

impl Base {
    /// Reads what a checkpoint consists of, and those below it.
    pub(super) fn read(stream: &Path) -> Result<Self, KeptError> {
        let unusable =
            |source: KeptError| KeptError::Below { path: stream.to_owned(), source: Box::new(source) };
        let check = survey(stream).map_err(unusable)?;
        let mut digests = Vec::new();
        for stream in chain(stream)?.iter().map(PathBuf::as_path).chain([stream]) {
            let read = digests_of(stream, digests);
            digests = read
                .map_err(|source| KeptError::Below { path: stream.to_owned(), source: Box::new(source) })?;
        }
        let name = stream.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { below: Below { name, check }, digests })
    }
}

/// The pages that a stream is on top of, made from the streams below it. They are in a file without a name beside it.
///
/// # Errors
/// What is wrong with which of them.
pub(super) fn pages_below(stream: &Path) -> Result<Arc<KeptPages>, KeptError> {
    let mut pages = Arc::new(KeptPages::default());
    for stream in chain(stream)? {
        pages = Arc::new(pages_of(&stream, pages)?);
    }
    Ok(pages)
}

/// The streams below one, the oldest first: all of them are there, and are those that they were.
fn chain(stream: &Path) -> Result<Vec<PathBuf>, KeptError> {
    let mut chain = Vec::new();
    let mut at = stream.to_owned();
    while let Some(Below { name, check }) = below(&at)? {
        let path = at.with_file_name(name);
        match survey(&path) {
            Ok(is) if is == check => {}
            Ok(_) => return Err(KeptError::OtherBelow { above: at, path }),
            Err(source) => return Err(KeptError::Below { path, source: Box::new(source) }),
        }
        chain.push(path.clone());
        at = path;
    }
    chain.reverse();
    Ok(chain)
}

/// Each content once, as long as there are numbers.
#[derive(Default)]
struct Numbers {
    digests: Vec<PageDigest>,
    known: HashSet<PageDigest>,
}

impl Numbers {
    /// Whether it gets a number.
    fn take(&mut self, content: PageDigest) -> bool {
        let room = (self.digests.len() as u64) < limits::MAX_KEPT_PAGES;
        let new = room && content != digest::ZERO_PAGE && self.known.insert(content);
        if new {
            self.digests.push(content);
        }
        new
    }
}

fn digests_of(stream: &Path, base: Vec<PageDigest>) -> Result<Vec<PageDigest>, KeptError> {
    let mut frames = Frames::new(StreamFile::open(stream)?);
    let mut ledger = Ledger::on(base);
    while let Some(head) = frames.next()? {
        let checked = match &head {
            Head::Pages { .. } => ledger.pages(frames.batch(), frames.payload()),
            Head::Control(ControlMessage::RoundEnd { .. }) => {
                ledger.end_round();
                Ok(())
            }
            Head::Control(ControlMessage::SealEnd { spaces }) => ledger.end_seal(*spaces).map(drop),
            // Images say nothing of pages.
            Head::Image { .. } | Head::Control(ControlMessage::ImagesEnd { .. }) => Ok(()),
            other => ledger.take(other),
        };
        checked.map_err(|source| KeptError::Damaged { spot: frames.spot(), source })?;
    }
    let mut numbers = Numbers::default();
    for content in ledger.contents() {
        numbers.take(content);
    }
    Ok(numbers.digests)
}

fn pages_of(stream: &Path, base: Arc<KeptPages>) -> Result<KeptPages, KeptError> {
    let folder = stream.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let failed = |source| KeptError::Write { path: folder.to_owned(), source };
    let file = nameless(folder).map_err(failed)?;
    let mut writer = BufWriter::with_capacity(1 << 20, file);
    let mut numbers = Numbers::default();
    let rebuilt = rebuild(stream, base, |bytes: &[u8; PAGE_SIZE]| match numbers.take(digest::page(bytes)) {
        true => writer.write_all(bytes),
        false => Ok(()),
    });
    rebuilt
        .map_err(|source| KeptError::Below { path: stream.to_owned(), source: Box::new(source) })?
        .map_err(failed)?;
    let file = writer.into_inner().map_err(io::IntoInnerError::into_error).map_err(failed)?;
    Ok(KeptPages::new(file, numbers.digests))
}

/// A file that is gone when it is closed.
fn nameless(folder: &Path) -> io::Result<File> {
    use rustix::fs::{Mode, OFlags, open};
    let made = open(folder, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR);
    Ok(File::from(made?))
}
