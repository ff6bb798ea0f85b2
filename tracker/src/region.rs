//! The mappings of a process.

use crate::sys::procmap;
use crate::target::{Counts, Fate, Target, read_into};
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// One mapping, as `/proc/PID/maps` shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// May be read.
    pub read: bool,
    /// May be written.
    pub write: bool,
    /// May be executed.
    pub exec: bool,
    /// `MAP_SHARED`.
    pub shared: bool,
    /// Offset in the file.
    pub offset: u64,
    /// Device of the file, major and minor.
    pub device: (u32, u32),
    /// Inode of the file; 0 for none.
    pub inode: u64,
    /// The file, or what the kernel calls the mapping: `[heap]`, `[anon:name]`.
    pub path: Option<PathBuf>,
    /// Locked in memory (`mlock`).
    pub locked: bool,
}

/// Why the mappings could not be read.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// The kernel refused, or the process has ended.
    #[error("could not read the mappings of process {pid}")]
    Io {
        /// Whose.
        pid: i32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The kernel shows none: the first thread of the process has ended, and others go on.
    #[error(
        "the kernel does not show the mappings of process {0}: its first thread has ended while others run"
    )]
    Hidden(i32),
    /// A line of another shape.
    #[error("could not make sense of a mapping of process {pid}: {line:?}")]
    Line {
        /// Whose.
        pid: i32,
        /// The line.
        line: String,
    },
}

impl Region {
    /// Whether CRIU can leave the pages of this mapping to somebody else, and restore it with pages that come
    /// later: private, anonymous, not locked, not of hugetlbfs (which has a file), and not the kernel's own. The
    /// rule is CRIU's (`vma_entry_can_be_lazy`, and what its restorer registers), and has to be: a page that both
    /// sides leave to the other would be zero.
    pub fn can_be_lazy(&self) -> bool {
        let anonymous = self.inode == 0
            && self.path.as_ref().is_none_or(|path| {
                let name = path.as_os_str().as_encoded_bytes();
                matches!(name, b"[heap]" | b"[stack]") || name.starts_with(b"[anon:")
            });
        anonymous && !self.shared && !self.locked
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        (self.end - self.start) / 4096
    }
}

/// Reads the mappings of a process, in order.
///
/// # Errors
/// [`RegionError`].
pub fn read(target: &Target) -> Result<Vec<Region>, RegionError> {
    let mut mappings = Mappings::default();
    mappings.read(target)?;
    Ok(Arc::unwrap_or_clone(mappings.regions))
}

/// The mappings of a process, read again and again: of lines that are the same as the last time nothing is made anew.
#[derive(Debug, Default)]
pub(crate) struct Mappings {
    regions: Arc<Vec<Region>>,
    /// The text of `maps` that they were made of, and where the line of each ends.
    text: Vec<u8>,
    ends: Vec<usize>,
    /// What the next text is read into.
    spare: Vec<u8>,
    /// Whether one is marked as locked.
    locked: bool,
}

impl Mappings {
    /// Reads them as they are now, and what the kernel counts of the memory.
    pub(crate) fn read(&mut self, target: &Target) -> Result<(Arc<Vec<Region>>, Counts), RegionError> {
        let pid = target.pid();
        let failed = |source| RegionError::Io { pid, source };
        let counts = match self.look(target)? {
            Some(counts) => counts,
            // An empty list must not pass for an empty memory.
            None => {
                let mut again = Ok(None);
                let fate = target.fate(|| {
                    again = self.look(target);
                    matches!(again, Ok(Some(_)))
                });
                match (fate, again?) {
                    (Fate::Back, Some(counts)) => counts,
                    (Fate::Ended, _) => return Err(failed(io::Error::from_raw_os_error(libc::ESRCH))),
                    _ => return Err(RegionError::Hidden(pid)),
                }
            }
        };
        if self.locked || counts.locked {
            let regions = Arc::make_mut(&mut self.regions);
            regions.iter_mut().for_each(|region| region.locked = false);
            self.locked = counts.locked;
        }
        // smaps walks every page (8 ms a GiB): only where something is locked at all.
        if counts.locked {
            let smaps = target.read_file("smaps").map_err(failed)?;
            mark_locked(&smaps, Arc::<Vec<Region>>::make_mut(&mut self.regions));
        }
        if !target.is_alive() {
            return Err(failed(io::Error::from_raw_os_error(libc::ESRCH)));
        }
        Ok((Arc::clone(&self.regions), counts))
    }

    /// Reads the mappings, and what is counted; `None` if there are none of either.
    fn look(&mut self, target: &Target) -> Result<Option<Counts>, RegionError> {
        let pid = target.pid();
        let failed = |source| RegionError::Io { pid, source };
        let mut maps = target.open_file("maps").map_err(failed)?;
        if !self.is_quickly_asked() || !are_as_before(&maps, &self.regions) {
            read_into(&mut maps, &mut self.spare).map_err(failed)?;
            self.take(pid)?;
        }
        // What lies in the kernel's half is there for everybody.
        if self.regions.first().is_none_or(|region| region.start >> 63 == 1) {
            return Ok(None);
        }
        target.counts().map_err(failed)
    }

    /// Whether asking for the mappings one by one takes less time than their text. A path costs the kernel some 800 ns,
    /// a question 400, and a line without a path 350.
    fn is_quickly_asked(&self) -> bool {
        let paths = self.regions.iter().filter(|region| has_path(region)).count();
        paths * 4 > self.regions.len()
    }

    /// Makes the text in `spare` the present one.
    fn take(&mut self, pid: i32) -> Result<(), RegionError> {
        if self.spare == self.text {
            return Ok(());
        }
        let (old, new) = (&self.text, &self.spare);
        let front = common_front(old, new);
        let kept = self.ends.partition_point(|end| *end <= front);
        let front = kept.checked_sub(1).map_or(0, |last| self.ends[last]);
        let back = common_back(&old[front..], &new[front..]);
        // With the end of the line before, so that it begins in the new text where it began in the old.
        let behind = self.ends.partition_point(|end| end + back < old.len() + 1).max(kept) + 1;
        let behind = behind.min(self.ends.len());
        let from = behind.checked_sub(1).map_or(0, |last| self.ends[last]);
        // Where the old lines behind begin in the new text.
        let (grown, to) = (new.len(), new.len() - (old.len() - from));
        let (mut regions, mut ends, mut at) = (Vec::new(), Vec::new(), front);
        for line in new[front..to].split_inclusive(|byte| *byte == b'\n') {
            at += line.len();
            let line = line.strip_suffix(b"\n").unwrap_or(line);
            if line.is_empty() {
                continue;
            }
            let Some(region) = parse(line) else {
                let line = String::from_utf8_lossy(line).into_owned();
                *self = Self::default();
                return Err(RegionError::Line { pid, line });
            };
            regions.push(region);
            ends.push(at);
        }
        let shrunk = old.len();
        self.ends[behind..].iter_mut().for_each(|end| *end = *end + grown - shrunk);
        self.ends.splice(kept..behind, ends);
        Arc::make_mut(&mut self.regions).splice(kept..behind, regions);
        std::mem::swap(&mut self.text, &mut self.spare);
        Ok(())
    }
}

fn has_path(region: &Region) -> bool {
    region.path.as_ref().is_some_and(|path| path.as_os_str().as_encoded_bytes().starts_with(b"/"))
}

/// Whether the mappings are those of `regions`, without their text (Linux 6.11); false where that cannot be known. A file is
/// known by its device and inode: that its name is another now does not show.
fn are_as_before(maps: &File, regions: &[Region]) -> bool {
    let mut name = [0; procmap::NAME];
    let mut at = 0;
    // What lies in the kernel's half is there for everybody, and is not told.
    for region in regions.iter().filter(|region| region.start >> 63 == 0) {
        let with_path = has_path(region);
        let Ok(Some(found)) = procmap::query(maps, at, (!with_path).then_some(&mut name)) else {
            return false;
        };
        let flags = [
            (region.read, procmap::READABLE),
            (region.write, procmap::WRITABLE),
            (region.exec, procmap::EXECUTABLE),
            (region.shared, procmap::SHARED),
        ];
        let known = procmap::Mapping {
            start: region.start,
            end: region.end,
            flags: flags.iter().filter(|(is_set, _)| *is_set).map(|(_, flag)| flag).sum(),
            offset: region.offset,
            inode: region.inode,
            device: region.device,
            name: match &region.path {
                Some(path) if !with_path => path.as_os_str().as_encoded_bytes(),
                _ => &[],
            },
        };
        if found != known {
            return false;
        }
        at = region.end;
    }
    matches!(procmap::query(maps, at, None), Ok(None))
}

/// Bytes that are compared at a time, before the one that differs is looked for.
const STEP: usize = 256;

/// How many bytes at the front are the same.
fn common_front(a: &[u8], b: &[u8]) -> usize {
    let same = STEP * a.chunks_exact(STEP).zip(b.chunks_exact(STEP)).take_while(|(a, b)| a == b).count();
    same + a[same..].iter().zip(&b[same..]).take_while(|(a, b)| a == b).count()
}

/// How many bytes at the end are the same.
fn common_back(a: &[u8], b: &[u8]) -> usize {
    let same = STEP * a.rchunks_exact(STEP).zip(b.rchunks_exact(STEP)).take_while(|(a, b)| a == b).count();
    let rest = a[..a.len() - same].iter().rev().zip(b[..b.len() - same].iter().rev());
    same + rest.take_while(|(a, b)| a == b).count()
}

/// A number of base 16 or 10 at the front, and what follows.
fn number(text: &[u8], base: u64) -> Option<(u64, &[u8])> {
    let (mut value, mut at) = (0u64, 0);
    while let Some(digit) = text.get(at).and_then(|byte| char::from(*byte).to_digit(base as u32)) {
        value = value.checked_mul(base)?.checked_add(u64::from(digit))?;
        at += 1;
    }
    (at > 0).then(|| (value, &text[at..]))
}

/// `START-END rwxp OFFSET MAJOR:MINOR INODE    NAME`, proc_pid_maps(5).
fn parse(line: &[u8]) -> Option<Region> {
    let (start, rest) = number(line, 16)?;
    let (end, rest) = number(rest.strip_prefix(b"-")?, 16)?;
    let ([b' ', read, write, exec, shared, b' '], rest) = rest.split_first_chunk::<6>()? else { return None };
    let (offset, rest) = number(rest, 16)?;
    let (major, rest) = number(rest.strip_prefix(b" ")?, 16)?;
    let (minor, rest) = number(rest.strip_prefix(b":")?, 16)?;
    let (inode, rest) = number(rest.strip_prefix(b" ")?, 10)?;
    let name_at = rest.iter().position(|byte| *byte != b' ');
    let path = name_at.map(|at| {
        use std::os::unix::ffi::OsStrExt;
        PathBuf::from(std::ffi::OsStr::from_bytes(&rest[at..]))
    });
    Some(Region {
        start,
        end,
        read: *read == b'r',
        write: *write == b'w',
        exec: *exec == b'x',
        shared: *shared == b's',
        offset,
        device: (u32::try_from(major).ok()?, u32::try_from(minor).ok()?),
        inode,
        path,
        locked: false,
    })
}

/// Sets `locked` from the `lo` of smaps' VmFlags.
fn mark_locked(text: &[u8], regions: &mut [Region]) {
    let mut at = 0;
    let mut current = 0u64;
    for line in text.split(|byte| *byte == b'\n') {
        if let Some(flags) = line.strip_prefix(b"VmFlags:") {
            let locked = flags.split(|byte| *byte == b' ').any(|flag| flag == b"lo" || flag == b"lf");
            while at < regions.len() && regions[at].start < current {
                at += 1;
            }
            if let Some(region) = regions.get_mut(at).filter(|region| region.start == current) {
                region.locked = locked;
            }
        } else if let Some(region) = parse(line) {
            current = region.start;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lines_are_read() {
        let heap = parse(b"55d0a000-55d0b000 rw-p 00000000 00:00 0                          [heap]").unwrap();
        assert!(heap.can_be_lazy() && heap.write && heap.pages() == 1);
        let lib = parse(b"7f00-8f00 r-xp 00028000 fe:01 123   /usr/lib/a name (deleted)").unwrap();
        assert_eq!(lib.path.as_deref(), Some(std::path::Path::new("/usr/lib/a name (deleted)")));
        assert_eq!((lib.device, lib.inode, lib.offset), ((0xfe, 1), 123, 0x28000));
        assert!(!lib.can_be_lazy() && lib.exec);
        let anon = parse(b"7f00-8f00 ---p 00000000 00:00 0 ").unwrap();
        assert!(anon.path.is_none() && anon.can_be_lazy());
        for other in [
            &b"7f00-8f00 r-xp 00000000 00:00 0    [vdso]"[..],
            b"7f00-8f00 rw-s 00000000 00:01 5    /dev/zero (deleted)",
            b"7f00-8f00 rw-p 00000000 00:0f 5    /anon_hugepage (deleted)",
            b"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0  [vsyscall]",
        ] {
            assert!(!parse(other).unwrap().can_be_lazy(), "{}", String::from_utf8_lossy(other));
        }
        assert!(parse(b"7f00-8f00 rw-p 00000000 00:00 0  [anon:glibc: malloc]").unwrap().can_be_lazy());
        for broken in [
            &b"garbage"[..],
            b"",
            b"7f00-8f00",
            b"7f00-8f00 rw",
            b"7f00-8f00 rw-p 0 00:00",
            b"7f00-8f00 rw-p 0 00:00 x",
            b"10000000000000000-2 rw-p 0 00:00 0",
        ] {
            assert!(parse(broken).is_none(), "{}", String::from_utf8_lossy(broken));
        }
    }

    proptest! {
        /// Whatever changes, the regions are those of the new text.
        #[test]
        fn only_what_changed_is_parsed(
            texts in proptest::collection::vec(proptest::collection::btree_map(1u64..40, 0u64..4, 0..30), 1..6),
        ) {
            let mut mappings = Mappings::default();
            for lines in texts {
                let line = |(start, what): (&u64, &u64)| {
                    let name = ["", "[heap]", "/a", "/b\u{e9} (deleted)"][*what as usize];
                    format!("{start:x}000-{:x}000 r{}-p 00000000 00:00 {what}    {name}\n", start + 1, if what % 2 == 0 { 'w' } else { '-' })
                };
                let text: String = lines.iter().map(line).collect();
                mappings.spare = text.clone().into_bytes();
                mappings.take(1).unwrap();
                let whole: Vec<Region> = text.lines().map(|line| parse(line.as_bytes()).unwrap()).collect();
                prop_assert_eq!(&*mappings.regions, &whole);
                let mut end = 0;
                let ends: Vec<usize> = text.lines().map(|line| { end += line.len() + 1; end }).collect();
                prop_assert_eq!(&mappings.ends, &ends);
            }
        }
    }

    /// A program that sleeps, ended with the test.
    struct Sleeper(std::process::Child);

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn mappings_that_are_asked_for_one_by_one_are_those_of_the_text() {
        let sleeper =
            Sleeper(std::process::Command::new("sleep").arg("60").spawn().expect("coreutils are there"));
        let target = Target::open(sleeper.0.id() as i32).unwrap();
        let mut mappings = Mappings::default();
        // It has loaded what it needs when it sleeps.
        let asleep = format!("{} ", libc::SYS_clock_nanosleep);
        while !target.read_file("syscall").unwrap().starts_with(asleep.as_bytes()) {
            std::thread::yield_now();
        }
        mappings.read(&target).unwrap();
        let maps = target.open_file("maps").unwrap();
        // Before Linux 6.11 nothing can be asked, and nothing is ever taken for unchanged.
        let known = !matches!(procmap::query(&maps, 0, None), Err(error) if error.raw_os_error() == Some(libc::ENOTTY));
        let regions = mappings.regions.to_vec();
        assert!(regions.len() > 5);
        assert_eq!(are_as_before(&maps, &regions), known);
        assert!(!are_as_before(&maps, &regions[1..]) && !are_as_before(&maps, &regions[..regions.len() - 2]));
        for at in (0..regions.len()).filter(|at| regions[*at].start >> 63 == 0) {
            let changes: [fn(&mut Region); 9] = [
                |region| region.start += 4096,
                |region| region.end += 4096,
                |region| region.read ^= true,
                |region| region.write ^= true,
                |region| region.exec ^= true,
                |region| region.shared ^= true,
                |region| region.offset += 4096,
                |region| region.inode += 1,
                |region| region.device.1 += 1,
            ];
            for (number, change) in changes.into_iter().enumerate() {
                let mut others = regions.clone();
                change(&mut others[at]);
                assert!(!are_as_before(&maps, &others), "change {number} of {:?} is not seen", regions[at]);
            }
            if !has_path(&regions[at]) {
                let mut others = regions.clone();
                others[at].path = Some("[anon:another]".into());
                assert!(!are_as_before(&maps, &others), "the name of {:?} is not seen", regions[at]);
            }
        }
    }

    #[test]
    fn a_line_that_makes_no_sense_is_named_and_forgotten() {
        let mut mappings =
            Mappings { spare: b"1000-2000 rw-p 0 00:00 0\nwhat\n".to_vec(), ..Mappings::default() };
        let error = mappings.take(7).unwrap_err().to_string();
        assert!(error.contains("process 7") && error.contains("what"), "{error}");
        mappings.spare = b"1000-2000 rw-p 0 00:00 0\n".to_vec();
        mappings.take(7).unwrap();
        assert_eq!(mappings.regions.len(), 1);
    }
}
