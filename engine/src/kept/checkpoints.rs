//! A directory of streams, one a checkpoint, numbered, and an index of them in text: a line of what it is, and then one
//! for each stream with its name, its bytes, what it is on top of, and the program's name.

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
        let last = read(dir)?.last().map(|line| line.number);
        Ok(Self { dir: dir.to_owned(), number: last.map_or(1, |last| last + 1), made, entered: false })
    }

    /// Where its stream goes.
    pub(super) fn path(&self) -> PathBuf {
        self.dir.join(format!("{:06}.pageferry", self.number))
    }

    /// The last checkpoint of a program so far.
    pub(super) fn last_of(&self, program: &str) -> Result<Option<PathBuf>, KeptError> {
        let program = one_line(program);
        let lines = read(&self.dir)?;
        let last = lines.iter().rev().find(|line| line.program == program);
        Ok(last.map(|line| self.dir.join(&line.name)))
    }

    /// Puts the stream into the index, durably.
    pub(super) fn enter(
        mut self,
        stream: &Path,
        bytes: u64,
        base: Option<&Below>,
        program: &str,
    ) -> Result<(), KeptError> {
        let index = self.dir.join(INDEX);
        let written = (|| {
            let mut text = match fs::read_to_string(&index) {
                Ok(text) => text,
                Err(error) if error.kind() == io::ErrorKind::NotFound => format!("{TITLE}\n"),
                Err(error) => return Err(error),
            };
            let name = stream.file_name().unwrap_or_default().to_string_lossy();
            let base = base.map_or("-".to_owned(), |Below { name, check }| format!("{name}:{check:016x}"));
            text.push_str(&format!("{name} {bytes} {base} {}\n", one_line(program)));
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
    let lines = read(path)?;
    let last = lines.last().ok_or_else(|| KeptError::NoCheckpoints(path.to_owned()))?;
    Ok(path.join(&last.name))
}

/// The stream below another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Below {
    /// Its name, in the same directory.
    pub(super) name: String,
    /// Its running digest at the end.
    pub(super) check: u64,
}

/// What a stream is on top of, by the index of its directory. Where there is none, or it says nothing of it, nothing.
pub(super) fn below(stream: &Path) -> Result<Option<Below>, KeptError> {
    let folder = match stream.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let name = stream.file_name().unwrap_or_default();
    let lines = read(folder)?;
    Ok(lines.into_iter().find(|line| name == line.name.as_str()).and_then(|line| line.below))
}

/// A name for a line of text.
fn one_line(program: &str) -> String {
    program.chars().filter(|c| !c.is_control()).collect()
}

/// A line of an index.
#[derive(Debug)]
struct Line {
    name: String,
    number: u32,
    below: Option<Below>,
    program: String,
}

impl Line {
    fn read(line: &str) -> Option<Self> {
        let mut fields = line.splitn(4, ' ');
        let (name, bytes) = (fields.next()?, fields.next()?);
        let (base, program) = (fields.next()?, fields.next()?);
        let number = number(name)?;
        bytes.parse::<u64>().ok()?;
        let below = match base {
            "-" => None,
            base => {
                let (below, check) = base.split_once(':')?;
                // Below is before: there is an end to every chain.
                (self::number(below)? < number).then_some(())?;
                Some(Below { name: below.to_owned(), check: u64::from_str_radix(check, 16).ok()? })
            }
        };
        Some(Self { name: name.to_owned(), number, below, program: program.to_owned() })
    }
}

/// The number that a stream's name begins with.
fn number(name: &str) -> Option<u32> {
    (!name.contains('/')).then(|| name.split('.').next()?.parse().ok()).flatten()
}

/// What the index has, the oldest first. Nothing, where there is no index.
fn read(dir: &Path) -> Result<Vec<Line>, KeptError> {
    let path = dir.join(INDEX);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        // Beside a stream that is no checkpoint anything may be called so.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::IsADirectory) => {
            return Ok(Vec::new());
        }
        Err(source) => return Err(KeptError::Read { path, source }),
    };
    let mut lines = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let bad = || KeptError::Index { path: path.clone(), line: number + 1 };
        match number {
            0 => (line == TITLE).then_some(()).ok_or_else(bad)?,
            _ => lines.push(Line::read(line).ok_or_else(bad)?),
        }
    }
    if text.is_empty() {
        return Err(KeptError::Index { path, line: 1 });
    }
    Ok(lines)
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
            entry.enter(&path, 4096, None, "a name with spaces").unwrap();
            assert_eq!(stream_of(&dir).unwrap(), path);
        }
        let entry = Entry::next(&dir).unwrap();
        assert_eq!(entry.last_of("a name with spaces").unwrap(), Some(dir.join("000003.pageferry")));
        assert_eq!(entry.last_of("another").unwrap(), None);
        let under = Below { name: "000002.pageferry".to_owned(), check: 0xabc };
        let path = entry.path();
        entry.enter(&path, 5, Some(&under), "another").unwrap();
        assert_eq!(below(&path).unwrap(), Some(under));
        assert_eq!(below(&dir.join("000003.pageferry")).unwrap(), None);
        assert_eq!(below(&dir.join("elsewhere")).unwrap(), None);
        // A checkpoint that is given up takes no number.
        drop(Entry::next(&dir).unwrap());
        assert_eq!(Entry::next(&dir).unwrap().number, 5);
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
            ("pageferry checkpoints 1\n000001.pageferry x - y\n", 2),
            ("pageferry checkpoints 1\n000001.pageferry 5 y\n", 2),
            ("pageferry checkpoints 1\n1/../../x 5 - y\n", 2),
            ("pageferry checkpoints 1\n000001.pageferry 5 - y\n000002.pageferry 5 000002.pageferry:0 y\n", 3),
            ("pageferry checkpoints 1\n000001.pageferry 5 - y\n000002.pageferry 5 000001.pageferry y\n", 3),
            (
                "pageferry checkpoints 1\n000001.pageferry 5 - y\n000002.pageferry 5 ../000001.pageferry:0 y\n",
                3,
            ),
        ] {
            fs::write(dir.path().join(INDEX), text).unwrap();
            let error = stream_of(dir.path()).unwrap_err();
            assert!(matches!(error, KeptError::Index { line: at, .. } if at == line), "{text:?}: {error}");
        }
    }
}
