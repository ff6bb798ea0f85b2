//! A directory of streams, one a checkpoint, numbered, and an index of them in text: a line of what it is, and then one
//! for each stream with its name, its bytes and the program's name.

use super::draft::sync_folder;
use super::error::KeptError;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The index's name.
const INDEX: &str = "index";

/// What it begins with: the version grows when a line changes its meaning.
const TITLE: &str = "pageferry checkpoints 1";

/// The next checkpoint of a directory.
#[derive(Debug)]
pub(super) struct Entry {
    dir: PathBuf,
    number: u32,
    /// The directory was made for it.
    made: bool,
    entered: bool,
}

impl Entry {
    /// Finds the number of the next checkpoint; makes the directory if there is none.
    pub(super) fn next(dir: &Path) -> Result<Self, KeptError> {
        let made = !dir.is_dir();
        if made {
            let mut builder = fs::DirBuilder::new();
            std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
            let made = builder.create(dir);
            made.map_err(|source| KeptError::Write { path: dir.to_owned(), source })?;
        }
        let names = read(dir)?;
        let last = names.last().and_then(|name| name.split('.').next()?.parse::<u32>().ok());
        Ok(Self { dir: dir.to_owned(), number: last.map_or(1, |last| last + 1), made, entered: false })
    }

    /// Where its stream goes.
    pub(super) fn path(&self) -> PathBuf {
        self.dir.join(format!("{:06}.pageferry", self.number))
    }

    /// Puts the stream into the index, durably.
    pub(super) fn enter(mut self, stream: &Path, bytes: u64, program: &str) -> Result<(), KeptError> {
        let index = self.dir.join(INDEX);
        let written = (|| {
            let mut text = match fs::read_to_string(&index) {
                Ok(text) => text,
                Err(error) if error.kind() == io::ErrorKind::NotFound => format!("{TITLE}\n"),
                Err(error) => return Err(error),
            };
            let name = stream.file_name().unwrap_or_default().to_string_lossy();
            let program: String = program.chars().filter(|c| !c.is_control()).collect();
            text.push_str(&format!("{name} {bytes} {program}\n"));
            let draft = self.dir.join(format!("{INDEX}.partial"));
            let mut file = File::create(&draft)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&draft, &index)?;
            sync_folder(&index)
        })();
        self.entered = written.is_ok();
        written.map_err(|source| KeptError::Write { path: index, source })
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if self.made && !self.entered {
            // Only if nothing else is in it.
            let _ = fs::remove_dir(&self.dir);
        }
    }
}

/// The stream that stands for `path`: itself, or the last one of a directory.
pub(super) fn stream_of(path: &Path) -> Result<PathBuf, KeptError> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let names = read(path)?;
    let last = names.last().ok_or_else(|| KeptError::NoCheckpoints(path.to_owned()))?;
    Ok(path.join(last))
}

/// Names of the streams, the oldest first. Nothing, where there is no index.
fn read(dir: &Path) -> Result<Vec<String>, KeptError> {
    let path = dir.join(INDEX);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(KeptError::Read { path, source }),
    };
    let mut names = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let bad = || KeptError::Index { path: path.clone(), line: number + 1 };
        if number == 0 {
            (line == TITLE).then_some(()).ok_or_else(bad)?;
            continue;
        }
        let mut fields = line.splitn(3, ' ');
        let (name, bytes) = (fields.next().unwrap_or(""), fields.next().unwrap_or(""));
        let numbered = name.split('.').next().is_some_and(|number| number.parse::<u32>().is_ok());
        if !numbered || name.contains('/') || bytes.parse::<u64>().is_err() {
            return Err(bad());
        }
        names.push(name.to_owned());
    }
    if text.is_empty() {
        return Err(KeptError::Index { path, line: 1 });
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_are_numbered_and_the_last_one_counts() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("checkpoints");
        drop(Entry::next(&dir).unwrap());
        assert!(!dir.exists(), "nothing is left of a checkpoint that was given up");
        for number in 1..=3 {
            let entry = Entry::next(&dir).unwrap();
            let path = entry.path();
            assert_eq!(path, dir.join(format!("00000{number}.pageferry")));
            entry.enter(&path, 4096, "a name with spaces").unwrap();
            assert_eq!(stream_of(&dir).unwrap(), path);
        }
        // A checkpoint that is given up takes no number.
        drop(Entry::next(&dir).unwrap());
        assert_eq!(Entry::next(&dir).unwrap().number, 4);
        assert!(dir.exists());
        assert_eq!(stream_of(&dir.join("x")).unwrap(), dir.join("x"), "a file stands for itself");
    }

    #[test]
    fn another_text_is_no_index() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(stream_of(dir.path()), Err(KeptError::NoCheckpoints(_))));
        for (text, line) in [
            ("", 1),
            ("something\n", 1),
            ("pageferry checkpoints 2\n", 1),
            ("pageferry checkpoints 1\n000001.pageferry x y\n", 2),
            ("pageferry checkpoints 1\n1/../../x 5 y\n", 2),
        ] {
            fs::write(dir.path().join(INDEX), text).unwrap();
            let error = stream_of(dir.path()).unwrap_err();
            assert!(matches!(error, KeptError::Index { line: at, .. } if at == line), "{text:?}: {error}");
        }
    }
}
