//! The mappings of a process.

use crate::target::{Fate, Target};
use std::io;
use std::path::PathBuf;

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
    let pid = target.pid();
    let failed = |source| RegionError::Io { pid, source };
    let mut regions = mappings(target)?;
    // An empty list must not pass for an empty memory. (What lies in the kernel's half is there for everybody.)
    let is_empty = |regions: &[Region]| regions.iter().all(|region| region.start >> 63 == 1);
    if is_empty(&regions) {
        let mut again = Ok(Vec::new());
        let fate = target.fate(|| {
            again = mappings(target);
            again.as_ref().is_ok_and(|regions| !is_empty(regions))
        });
        regions = match fate {
            Fate::Ended => return Err(failed(io::Error::from_raw_os_error(libc::ESRCH))),
            Fate::Back => again?,
            Fate::Headless => return Err(RegionError::Hidden(pid)),
        };
    }
    // smaps walks every page (8 ms a GiB): only where something is locked at all.
    let locked = target.status("VmLck").map_err(failed)?;
    if locked.is_some_and(|size| !size.starts_with("0 ")) {
        mark_locked(&target.read_file("smaps").map_err(failed)?, &mut regions);
    }
    if !target.is_alive() {
        return Err(failed(io::Error::from_raw_os_error(libc::ESRCH)));
    }
    Ok(regions)
}

fn mappings(target: &Target) -> Result<Vec<Region>, RegionError> {
    let pid = target.pid();
    let text = target.read_file("maps").map_err(|source| RegionError::Io { pid, source })?;
    text.split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| {
            parse(line)
                .ok_or_else(|| RegionError::Line { pid, line: String::from_utf8_lossy(line).into_owned() })
        })
        .collect()
}

fn parse(line: &[u8]) -> Option<Region> {
    let mut rest = line;
    let mut field = || {
        let start = rest.iter().position(|byte| *byte != b' ').unwrap_or(rest.len());
        let end = rest[start..].iter().position(|byte| *byte == b' ').map_or(rest.len(), |len| start + len);
        let field = &rest[start..end];
        rest = &rest[end..];
        std::str::from_utf8(field).ok()
    };
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let (start, end) = field()?.split_once('-')?;
    let flags = field()?.as_bytes();
    let offset = hex(field()?)?;
    let (major, minor) = field()?.split_once(':')?;
    let inode = field()?.parse().ok()?;
    let name_at = rest.iter().position(|byte| *byte != b' ');
    let path = name_at.map(|at| {
        use std::os::unix::ffi::OsStrExt;
        PathBuf::from(std::ffi::OsStr::from_bytes(&rest[at..]))
    });
    Some(Region {
        start: hex(start)?,
        end: hex(end)?,
        read: *flags.first()? == b'r',
        write: *flags.get(1)? == b'w',
        exec: *flags.get(2)? == b'x',
        shared: *flags.get(3)? == b's',
        offset,
        device: (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?),
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
        assert!(parse(b"garbage").is_none());
    }
}
