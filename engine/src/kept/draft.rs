//! A file that is there whole, or not at all.

use super::error::KeptError;
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Bytes that are collected before they are written.
const WRITE_BEHIND: usize = 1 << 20;

/// A file under way: as `PATH.partial`, which is gone when this is dropped, until it is kept.
#[derive(Debug)]
pub(super) struct Draft {
    path: PathBuf,
    partial: PathBuf,
    file: BufWriter<File>,
    bytes: u64,
    kept: bool,
}

impl Draft {
    /// Begins a file that is to be `path` in the end. What a writer that was killed has left is overwritten.
    ///
    /// # Errors
    /// [`KeptError::Exists`], [`KeptError::Busy`], or when the system does not let it be made.
    pub(super) fn begin(path: &Path) -> Result<Self, KeptError> {
        if fs::symlink_metadata(path).is_ok() {
            return Err(KeptError::Exists(path.to_owned()));
        }
        let name = path.file_name().ok_or_else(|| KeptError::NoName(path.to_owned()))?;
        let mut partial = OsString::from(name);
        partial.push(".partial");
        let partial = path.with_file_name(partial);
        let failed = |source| KeptError::Write { path: partial.clone(), source };
        // It holds the program's memory: for nobody else to read.
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&partial).map_err(failed)?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(KeptError::Busy(path.to_owned()));
        }
        // The one who had it may have finished between the two calls above.
        if file.metadata().map_err(failed)?.nlink() == 0 || fs::symlink_metadata(path).is_ok() {
            return Err(KeptError::Busy(path.to_owned()));
        }
        let draft = Self {
            path: path.to_owned(),
            partial: partial.clone(),
            file: BufWriter::with_capacity(WRITE_BEHIND, file),
            bytes: 0,
            kept: false,
        };
        // One that was left over may have been made by somebody else.
        draft.file.get_ref().set_permissions(Permissions::from_mode(0o600)).map_err(failed)?;
        draft.file.get_ref().set_len(0).map_err(failed)?;
        Ok(draft)
    }

    /// Another handle on the same file, to have it written out.
    pub(super) fn handle(&self) -> Result<File, KeptError> {
        self.file.get_ref().try_clone().map_err(|source| self.failed(source))
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), KeptError> {
        self.bytes += bytes.len() as u64;
        self.file.write_all(bytes).map_err(|source| self.failed(source))
    }

    /// Hands all to the system.
    pub(super) fn flush(&mut self) -> Result<(), KeptError> {
        self.file.flush().map_err(|source| self.failed(source))
    }

    /// Bytes that were written.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Gives the file its name, durably. On an error it is gone.
    pub(super) fn keep(&mut self) -> Result<(), KeptError> {
        self.flush()?;
        self.file.get_ref().sync_all().map_err(|source| self.failed(source))?;
        match renameat_with(CWD, &self.partial, CWD, &self.path, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            Err(rustix::io::Errno::EXIST) => return Err(KeptError::Exists(self.path.clone())),
            // A file system that cannot promise not to replace.
            Err(rustix::io::Errno::INVAL) if fs::symlink_metadata(&self.path).is_err() => {
                fs::rename(&self.partial, &self.path).map_err(|source| self.failed(source))?;
            }
            Err(errno) => return Err(self.failed(errno.into())),
        }
        self.kept = true;
        sync_folder(&self.path).map_err(|source| {
            let _ = fs::remove_file(&self.path);
            self.failed(source)
        })
    }

    /// Takes a kept file away again: something that belongs to it could not be kept.
    pub(super) fn discard(&self) {
        if self.kept {
            let _ = fs::remove_file(&self.path);
        }
    }

    /// Where it will be.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn failed(&self, source: io::Error) -> KeptError {
        KeptError::Write { path: self.path.clone(), source }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.kept {
            let _ = fs::remove_file(&self.partial);
        }
    }
}

/// Makes the names in the folder of `path` durable.
pub(super) fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_appears_when_it_is_kept_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stream");
        let mut draft = Draft::begin(&path).unwrap();
        draft.write(b"one").unwrap();
        assert_eq!(names(dir.path()), ["stream.partial"]);
        assert!(matches!(Draft::begin(&path), Err(KeptError::Busy(_))), "two writers");
        drop(draft);
        assert_eq!(names(dir.path()), Vec::<String>::new(), "nothing is left of what was given up");
        // What a killed writer has left.
        fs::write(dir.path().join("stream.partial"), b"something longer").unwrap();
        let mut draft = Draft::begin(&path).unwrap();
        draft.write(b"two").unwrap();
        draft.keep().unwrap();
        drop(draft);
        assert_eq!(
            (names(dir.path()), fs::read(&path).unwrap()),
            (vec!["stream".to_owned()], b"two".to_vec())
        );
        assert!(matches!(Draft::begin(&path), Err(KeptError::Exists(_))));
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_file_that_appears_meanwhile_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stream");
        let mut draft = Draft::begin(&path).unwrap();
        draft.write(b"ours").unwrap();
        fs::write(&path, b"theirs").unwrap();
        assert!(matches!(draft.keep(), Err(KeptError::Exists(_))));
        drop(draft);
        assert_eq!(
            (names(dir.path()), fs::read(&path).unwrap()),
            (vec!["stream".to_owned()], b"theirs".to_vec())
        );
    }
}
