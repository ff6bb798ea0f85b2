//! Pages that outlive a migration: what a program had when it came here or left, by content. The next migration to here
//! copies from them what is the same, instead of sending it.
//!
//! Two files in a directory: `pages-N`, pages one after the other, and `index`, which names N and has a digest for each:
//!
//! ```text
//! "PGFYKEPT" | version u32 | 0 u32 | N u64 | pages u64 | digests 16 bytes each | xxh3-128 of all before
//! ```
//!
//! They are written anew, as N + 1, and the new index takes the old one's place in one step: whatever ends the writer, one of
//! the two is there, whole. An index that is not is no index: the store is empty then. The pages are not believed
//! either: each is compared with its digest when it is used.

use super::draft::sync_folder;
use super::error::KeptError;
use pageferry_tracker::{PageReader, Run};
use pageferry_wire_format::{PAGE_SIZE, PageDigest, digest, limits};
use rustix::fs::{FlockOperation, flock};
use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MAGIC: &[u8; 8] = b"PGFYKEPT";
const VERSION: u32 = 1;
const HEADER: usize = 32;
const DIGEST: usize = 16;

/// Pages that are read of a process at a time.
const STEP: u64 = 256;

/// Takes a page.
pub(crate) type Take<'a> = &'a mut dyn FnMut(&[u8]) -> io::Result<()>;

/// A store of the directory, for as long as this lives nobody else's.
#[derive(Debug)]
pub(crate) struct KeptStore {
    dir: PathBuf,
    _lock: File,
    number: u64,
    pages: Arc<KeptPages>,
}

/// The pages of a store at one time. They can be read as long as this lives, also when the store is written anew.
#[derive(Debug, Default)]
pub(crate) struct KeptPages {
    file: Option<File>,
    digests: Vec<PageDigest>,
}

impl KeptPages {
    /// Pages in a file, one after the other, from its beginning on, and what they look like.
    pub(super) fn new(file: File, digests: Vec<PageDigest>) -> Self {
        Self { file: Some(file), digests }
    }

    /// What the pages look like, from page 0 on.
    pub(crate) fn digests(&self) -> &[PageDigest] {
        &self.digests
    }

    /// Reads a page, if it is there and has this content.
    pub(crate) fn read(&self, page: u64, content: &PageDigest, into: &mut [u8; PAGE_SIZE]) -> bool {
        let known = usize::try_from(page).ok().and_then(|page| self.digests.get(page));
        let Some(file) = self.file.as_ref().filter(|_| known == Some(content)) else { return false };
        file.read_exact_at(into, page * PAGE_SIZE as u64).is_ok() && digest::page(into) == *content
    }
}

impl KeptStore {
    /// Takes the store of `dir`, which is made if there is none. One that is damaged is empty.
    ///
    /// # Errors
    /// [`KeptError::Busy`]; a directory that cannot be made, read or written.
    pub(crate) fn open(dir: &Path) -> Result<Self, KeptError> {
        let failed = |source| KeptError::Write { path: dir.to_owned(), source };
        if !dir.is_dir() {
            // It holds the memory of programs.
            fs::DirBuilder::new().mode(0o700).create(dir).map_err(failed)?;
        }
        let lock = private(&dir.join("lock")).map_err(failed)?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(KeptError::Busy(dir.to_owned()));
        }
        let (number, pages) = load(dir).unwrap_or_else(|why| {
            tracing::warn!(dir = %dir.display(), why, "the kept store cannot be used, and begins anew");
            (0, KeptPages::default())
        });
        let store = Self { dir: dir.to_owned(), _lock: lock, number, pages: Arc::new(pages) };
        store.sweep().map_err(failed)?;
        Ok(store)
    }

    /// What is in it now.
    pub(crate) fn pages(&self) -> &Arc<KeptPages> {
        &self.pages
    }

    /// Puts the pages that `give` hands over into the store, instead of what was there. Says how many different ones they
    /// are; pages of zeros are none.
    ///
    /// # Errors
    /// When it cannot be written: then the store is as it was.
    pub(crate) fn refill(&mut self, give: impl FnOnce(Take<'_>) -> io::Result<()>) -> Result<u64, KeptError> {
        let number = self.number + 1;
        let path = self.dir.join(format!("pages-{number}"));
        let failed = |source| KeptError::Write { path: path.clone(), source };
        let written = self.write(number, &path, give);
        let digests = written.map_err(|error| {
            let _ = fs::remove_file(&path);
            failed(error)
        })?;
        let count = digests.len() as u64;
        let file = File::open(&path).map_err(failed)?;
        self.number = number;
        self.pages = Arc::new(KeptPages { file: Some(file), digests });
        self.sweep().map_err(failed)?;
        Ok(count)
    }

    fn write(
        &self,
        number: u64,
        path: &Path,
        give: impl FnOnce(Take<'_>) -> io::Result<()>,
    ) -> io::Result<Vec<PageDigest>> {
        let file = private(path)?;
        file.set_len(0)?;
        let mut pages = BufWriter::with_capacity(1 << 20, file);
        let (mut digests, mut known) = (Vec::new(), HashSet::new());
        give(&mut |bytes| {
            let content = digest::page(bytes);
            let room = (digests.len() as u64) < limits::MAX_KEPT_PAGES;
            if room && !digest::is_zero(bytes) && known.insert(content) {
                pages.write_all(bytes)?;
                digests.push(content);
            }
            Ok(())
        })?;
        drop(known);
        pages.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        let draft = self.dir.join("index.partial");
        let file = private(&draft)?;
        file.set_len(0)?;
        let mut index = Vec::with_capacity(HEADER + (digests.len() + 1) * DIGEST);
        index.extend_from_slice(MAGIC);
        index.extend_from_slice(&VERSION.to_le_bytes());
        index.extend_from_slice(&[0; 4]);
        index.extend_from_slice(&number.to_le_bytes());
        index.extend_from_slice(&(digests.len() as u64).to_le_bytes());
        digests.iter().for_each(|digest| index.extend_from_slice(&digest.0));
        let check = digest::page(&index);
        index.extend_from_slice(&check.0);
        let mut file = file;
        file.write_all(&index)?;
        file.sync_all()?;
        sync_folder(path)?;
        fs::rename(&draft, self.dir.join("index"))?;
        sync_folder(path)?;
        Ok(digests)
    }

    /// Removes what other writers have left.
    fn sweep(&self) -> io::Result<()> {
        let ours = format!("pages-{}", self.number);
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name == "index.partial" || (name.starts_with("pages-") && name != ours) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

/// Hands the pages of a process over, one after the other, and calls `rest` after every few. Those of a process that has ended are left out.
pub(crate) fn give_pages(
    reader: &PageReader,
    runs: &[Run],
    take: Take<'_>,
    rest: &mut dyn FnMut(),
) -> io::Result<()> {
    let mut buffer = vec![0; STEP as usize * PAGE_SIZE];
    for run in runs {
        let (mut at, end) = (run.start, run.start + run.len);
        while at < end {
            let len = (end - at).min(STEP);
            let bytes = &mut buffer[..len as usize * PAGE_SIZE];
            // A page that is not there any more reads as zeros, which are not kept.
            if let Err(error) = reader.read(&[Run { start: at, len }], bytes) {
                tracing::warn!(%error, "pages are left out of the kept store");
                return Ok(());
            }
            bytes.chunks_exact(PAGE_SIZE).try_for_each(&mut *take)?;
            rest();
            at += len;
        }
    }
    Ok(())
}

/// Reads the index; says what is wrong with it, or with the pages' file.
fn load(dir: &Path) -> Result<(u64, KeptPages), &'static str> {
    let index = match fs::read(dir.join("index")) {
        Ok(index) => index,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((0, KeptPages::default())),
        Err(_) => return Err("its index cannot be read"),
    };
    let (Some(body), Some(check)) =
        (index.len().checked_sub(DIGEST).map(|at| &index[..at]), index.last_chunk())
    else {
        return Err("its index is cut off");
    };
    if !body.starts_with(MAGIC) || digest::page(body) != PageDigest(*check) || body.len() < HEADER {
        return Err("its index is damaged");
    }
    let u64_at = |at: usize| u64::from_le_bytes(body[at..at + 8].try_into().expect("eight bytes"));
    if body[8..16] != u64::from(VERSION).to_le_bytes() {
        return Err("its index is of another version");
    }
    let (number, count) = (u64_at(16), u64_at(24));
    let digests: Vec<PageDigest> = body[HEADER..].as_chunks().0.iter().copied().map(PageDigest).collect();
    if digests.len() as u64 != count || count > limits::MAX_KEPT_PAGES {
        return Err("its index does not add up");
    }
    let file = File::open(dir.join(format!("pages-{number}"))).map_err(|_| "its pages are missing")?;
    match file.metadata() {
        Ok(about) if about.len() == count * PAGE_SIZE as u64 => {}
        _ => return Err("its pages are cut off"),
    }
    Ok((number, KeptPages { file: Some(file), digests }))
}

/// Opens a file for writing that nobody else may read, and makes it if there is none.
fn private(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(n: u8) -> [u8; PAGE_SIZE] {
        std::array::from_fn(|at| n.wrapping_mul(37).wrapping_add((at % 253) as u8))
    }

    fn fill(store: &mut KeptStore, contents: &[u8]) -> u64 {
        store.refill(|take| contents.iter().try_for_each(|n| take(&page(*n)))).unwrap()
    }

    fn has(store: &KeptStore, n: u8) -> bool {
        let (content, mut bytes) = (digest::page(&page(n)), [0; PAGE_SIZE]);
        let at = store.pages().digests().iter().position(|digest| *digest == content);
        at.is_some_and(|at| store.pages().read(at as u64, &content, &mut bytes) && bytes == page(n))
    }

    fn files(dir: &Path) -> usize {
        fs::read_dir(dir).unwrap().count()
    }

    #[test]
    fn what_was_kept_is_found_again_and_replaced_as_a_whole() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("store");
        let mut store = KeptStore::open(&dir).unwrap();
        assert!(store.pages().digests().is_empty());
        assert!(matches!(KeptStore::open(&dir), Err(KeptError::Busy(_))), "one at a time");
        assert_eq!(store.refill(|take| take(&[0; PAGE_SIZE])).unwrap(), 0, "zeros are not kept");
        assert_eq!(fill(&mut store, &[1, 2, 3, 2, 1]), 3, "each content once");
        drop(store);
        let mut store = KeptStore::open(&dir).unwrap();
        assert!([1, 2, 3].iter().all(|n| has(&store, *n)));
        let before = Arc::clone(store.pages());
        assert_eq!(fill(&mut store, &[3, 4]), 2);
        assert!(has(&store, 4) && !has(&store, 1));
        let mut bytes = [0; PAGE_SIZE];
        assert!(before.read(0, &digest::page(&page(1)), &mut bytes), "who reads is not disturbed");
        assert!(!before.read(1, &digest::page(&page(1)), &mut bytes), "another content");
        assert!(!before.read(9, &digest::page(&page(1)), &mut bytes), "a page that is not there");
        assert_eq!(files(&dir), 3, "lock, index and one file of pages");
    }

    #[test]
    fn a_writer_that_fails_leaves_what_was_there() {
        let base = tempfile::tempdir().unwrap();
        let mut store = KeptStore::open(base.path()).unwrap();
        fill(&mut store, &[1]);
        let error = store.refill(|take| {
            take(&page(2))?;
            Err(io::ErrorKind::StorageFull.into())
        });
        assert!(error.is_err() && has(&store, 1));
        // One that was killed: its pages are there, and its index is not.
        fs::write(base.path().join("pages-2"), page(5)).unwrap();
        fs::write(base.path().join("index.partial"), b"half").unwrap();
        drop(store);
        let store = KeptStore::open(base.path()).unwrap();
        assert!(has(&store, 1) && files(base.path()) == 3);
    }

    #[test]
    fn an_index_that_is_damaged_anywhere_is_none_and_pages_that_are_are_not_given_out() {
        let base = tempfile::tempdir().unwrap();
        let path = |name: &str| base.path().join(name);
        let reset = || {
            let mut store = KeptStore::open(base.path()).unwrap();
            fill(&mut store, &[1, 2]);
            store.number
        };
        reset();
        let index = fs::read(path("index")).unwrap();
        for at in 0..index.len() {
            let number = reset();
            let mut index = fs::read(path("index")).unwrap();
            index[at] ^= 0x41;
            fs::write(path("index"), &index).unwrap();
            assert!(load(base.path()).is_err(), "byte {at} of generation {number}");
            assert!(KeptStore::open(base.path()).unwrap().pages().digests().is_empty());
            fs::write(path("index"), &index[..at]).unwrap();
            assert!(load(base.path()).is_err(), "cut at {at}");
        }
        let pages = path(&format!("pages-{}", reset()));
        let mut bytes = fs::read(&pages).unwrap();
        bytes[100] ^= 1;
        fs::write(&pages, &bytes).unwrap();
        let store = KeptStore::open(base.path()).unwrap();
        assert!(!has(&store, 1) && has(&store, 2));
        drop(store);
        fs::write(&pages, &bytes[..PAGE_SIZE]).unwrap();
        assert!(
            KeptStore::open(base.path()).unwrap().pages().digests().is_empty(),
            "fewer pages than digests"
        );
    }
}
