//! How criu is kept from dumping the memory that the engine owns.

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use crate::PAGE_SIZE;
use crate::image::pagemap::{self, Entry, Pagemap};
use crate::image::{ImageError, inventory};
use crate::image_dir::ImageDir;
use crate::ranges::{self, Range, RunError};
use crate::sys::table;

/// The folder of the synthetic parent inside the images.
pub(crate) const PARENT_FOLDER: &str = "p0";
/// The link by which criu's images name their parent.
const PARENT_LINK: &str = "parent";

/// A way to keep criu away from memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HideKind {
    /// criu's own incremental dump, on top of a parent that consists of pagemaps only. Needs a kernel with
    /// soft-dirty.
    SyntheticParent,
    /// A shared object preloaded into criu that cuts the memory out of the kernel's answers.
    Shim,
}

impl fmt::Display for HideKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SyntheticParent => "synthetic-parent",
            Self::Shim => "shim",
        })
    }
}

/// The memory of one process that criu shall not dump.
#[derive(Clone, Debug, Default)]
pub struct Owned {
    /// Its pid as this process and criu see it.
    pub pid: i32,
    /// Its pid in its own, innermost pid namespace: the N of `pagemap-N.img`.
    pub vpid: i32,
    /// What the engine owns: (first page number, pages), ascending, disjoint, only in memory that can be restored
    /// late (see [`crate::image::Area::can_be_lazy`]), and every page as it is now, while the tree is frozen.
    pub runs: Vec<(u64, u64)>,
    /// What exists in such memory: what of it is not in `runs` must be in criu's images, or the dump is refused.
    /// Leave it empty to go without this check.
    pub populated: Vec<(u64, u64)>,
}

/// Why the memory could not be hidden.
#[derive(Debug, thiserror::Error)]
pub enum HideError {
    /// The runs are unusable.
    #[error("the owned runs of process {pid} are unusable")]
    Runs {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: RunError,
    },
    /// A process was named twice.
    #[error("process {pid} was named twice")]
    NamedTwice {
        /// The process.
        pid: i32,
    },
    /// An owned run lies where it may not.
    #[error(
        "process {pid}: the pages at {:#x}-{:#x} are not in private anonymous memory and cannot be hidden", .range.0, .range.1
    )]
    NotLazy {
        /// The process.
        pid: i32,
        /// The first such range of addresses.
        range: Range,
    },
    /// A file could not be read or written.
    #[error("could not access {what}")]
    Io {
        /// Which.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An image could not be used.
    #[error("the images cannot be completed")]
    Image(#[from] ImageError),
}

fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> HideError {
    let what = what.into();
    move |source| HideError::Io { what, source }
}

/// What one dump needs for its hide.
#[derive(Debug)]
pub(crate) enum Hide {
    Parent,
    Shim(Shim),
}

/// The preloaded object and the table that it reads, each in a memfd: nothing is left when we end.
#[derive(Debug)]
pub(crate) struct Shim {
    library: OwnedFd,
    table: File,
}

impl Shim {
    pub(crate) fn new() -> Result<Self, HideError> {
        let memfd = |name: &str| {
            rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC)
                .map_err(|e| HideError::Io { what: format!("a memfd for {name}"), source: e.into() })
        };
        let library = memfd("pageferry-shim")?;
        let mut file = File::from(library);
        file.write_all(crate::sys::SHIM).map_err(failed("the shim"))?;
        let table = File::from(memfd("pageferry-hide")?);
        table
            .write_all_at(&words_to_bytes(&[table::MAGIC, 0, 0, 0]), 0)
            .map_err(failed("the shim's table"))?;
        Ok(Self { library: file.into(), table })
    }

    /// What criu has to find in its environment.
    pub(crate) fn environment(&self) -> [(&'static str, String); 2] {
        let path = |fd: i32| format!("/proc/{}/fd/{fd}", std::process::id());
        [("LD_PRELOAD", path(self.library.as_raw_fd())), (table::ENVIRONMENT, path(self.table.as_raw_fd()))]
    }

    /// Whether the shim has said that it runs inside criu.
    pub(crate) fn is_loaded(&self) -> io::Result<bool> {
        let mut word = [0; 8];
        self.table.read_exact_at(&mut word, 8 * table::AT_LOADED as u64)?;
        Ok(u64::from_ne_bytes(word) == table::LOADED)
    }

    fn publish(&self, owned: &[Owned], smaps: &[(i32, OwnedFd)]) -> Result<(), HideError> {
        let mut index = vec![owned.len() as u64];
        let mut pairs: Vec<u64> = Vec::new();
        let first = table::HEADER_WORDS + table::PROCESS_WORDS * owned.len();
        for process in owned {
            let ranges = owned_ranges(process)?;
            let smaps = smaps.iter().find(|(pid, _)| *pid == process.pid);
            let (owner, fd) =
                smaps.map_or((0, 0), |(_, text)| (u64::from(std::process::id()), text.as_raw_fd() as u64));
            index.extend([process.pid as u64, (first + pairs.len()) as u64, ranges.len() as u64, owner, fd]);
            pairs.extend(ranges.iter().flat_map(|&(start, end)| [start, end]));
        }
        index.extend(pairs);
        let write =
            |word: usize, words: &[u64]| self.table.write_all_at(&words_to_bytes(words), 8 * word as u64);
        // READY last: a shim that sees it sees everything.
        write(table::HEADER_WORDS - 1, &index)
            .and_then(|()| write(table::AT_READY, &[table::READY]))
            .map_err(failed("the shim's table"))
    }
}

fn words_to_bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

fn owned_ranges(process: &Owned) -> Result<Vec<Range>, HideError> {
    ranges::from_runs(&process.runs).map_err(|source| HideError::Runs { pid: process.pid, source })
}

impl Hide {
    /// Tells criu what to leave out, and what to read in place of the smaps of some of the processes. The tree is
    /// frozen, and criu waits for our answer.
    pub(crate) fn publish(
        &self,
        images: &ImageDir,
        owned: &[Owned],
        smaps: &[(i32, OwnedFd)],
    ) -> Result<(), HideError> {
        for (i, process) in owned.iter().enumerate() {
            if owned[..i].iter().any(|other| other.pid == process.pid || other.vpid == process.vpid) {
                return Err(HideError::NamedTwice { pid: process.pid });
            }
        }
        match self {
            Self::Shim(shim) => shim.publish(owned, smaps),
            Self::Parent => write_parent(images, owned),
        }
    }

    /// Makes the finished images the same whichever way was used: complete without the owned memory.
    pub(crate) fn complete(&self, images: &ImageDir, owned: &[Owned]) -> Result<(), HideError> {
        match self {
            Self::Shim(_) => Ok(()),
            Self::Parent => dissolve_parent(images, owned),
        }
    }
}

/// Bytes that are copied into criu's pages at a time.
const PIECE: usize = 256 * 1024;

/// What `/proc/PID/maps` says about one area.
struct MapsLine {
    range: Range,
    private_anonymous: bool,
    /// Whether criu dumps pages of it into the process's own images, and would ask its parent for them.
    private: bool,
}

fn read_maps(pid: i32) -> Result<Vec<MapsLine>, HideError> {
    let path = format!("/proc/{pid}/maps");
    let file = File::open(&path).map_err(failed(&path))?;
    let lines: io::Result<Vec<String>> = BufReader::new(file).lines().collect();
    lines
        .map_err(failed(&path))?
        .iter()
        .map(|line| {
            let strange = io::Error::new(io::ErrorKind::InvalidData, format!("the line {line:?}"));
            parse_maps_line(line).ok_or(strange).map_err(failed(&path))
        })
        .collect()
}

fn parse_maps_line(line: &str) -> Option<MapsLine> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let range = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    let permissions = fields.next()?;
    let inode = fields.nth(2)?;
    let name = fields.next().unwrap_or("");
    let anonymous = inode == "0"
        && (name.is_empty() || name == "[heap]" || name == "[stack]" || name.starts_with("[anon:"));
    Some(MapsLine {
        range,
        private_anonymous: anonymous && permissions.ends_with('p'),
        // What is left out is not memory of the process.
        private: permissions.ends_with('p') && !name.starts_with("[vvar") && name != "[vsyscall]",
    })
}

/// Writes a parent whose pagemaps cover all private memory, and calls all that clean: then criu leaves it out. criu
/// skips a page if it is not soft-dirty and the parent's pagemap covers it, refuses one that is clean and not covered,
/// and does not look at the parent's pages. What it left out and nobody owns is put in by [`dissolve_parent`].
fn write_parent(images: &ImageDir, owned: &[Owned]) -> Result<(), HideError> {
    let write = |name: String, bytes: &[u8]| {
        images.create(&name).and_then(|mut f| f.write_all(bytes)).map_err(failed(format!("image {name}")))
    };
    for (process, pages_id) in owned.iter().zip(1u32..) {
        let pid = process.pid;
        let maps = read_maps(pid)?;
        let ranges = owned_ranges(process)?;
        let lazy: Vec<Range> = maps.iter().filter(|m| m.private_anonymous).map(|m| m.range).collect();
        if let Some(range) = ranges::first_outside(&ranges, &lazy) {
            return Err(HideError::NotLazy { pid, range });
        }
        let pieces: Vec<Range> = maps.iter().filter(|m| m.private).map(|m| m.range).collect();
        let entries = pieces
            .iter()
            .map(|&(start, end)| Entry {
                address: start,
                pages: (end - start) / PAGE_SIZE,
                flags: pagemap::PRESENT,
            })
            .collect();
        let pagemap = Pagemap { pages_id, entries };
        write(format!("{PARENT_FOLDER}/{}", pagemap::file_name(process.vpid)), &pagemap.encode())?;
        write(format!("{PARENT_FOLDER}/{}", pagemap::pages_name(pages_id)), &[])?;
    }
    for process in owned {
        let path = format!("/proc/{}/clear_refs", process.pid);
        std::fs::write(&path, "4").map_err(failed(path))?;
    }
    write(format!("{PARENT_FOLDER}/inventory.img"), &inventory::parent())
}

/// Takes the parent away again: owned pages are dropped from criu's pagemaps, and the bytes of what criu left to the
/// parent and nobody owns (changed pages of private files, the vdso, the pages under stack pointers) are put into
/// criu's pages. The tree is frozen, so they are those that criu would have written. The other way round, owned pages
/// that criu has dumped are taken out: it dumps areas that cannot be read whole, whatever their parent has, and its
/// own code in the tasks has the kernel write to the page with the restartable sequence.
fn dissolve_parent(images: &ImageDir, owned: &[Owned]) -> Result<(), HideError> {
    for process in owned {
        let pid = process.pid;
        let pagemap = Pagemap::read(images, process.vpid)?;
        let owned = owned_ranges(process)?;
        let pages_name = pagemap::pages_name(pagemap.pages_id);
        let new_name = format!("{pages_name}.new");
        let of_pages = || failed(format!("image {pages_name}"));
        let memory = File::open(format!("/proc/{pid}/mem")).map_err(failed(format!("/proc/{pid}/mem")))?;
        let mut old = images.open(&pages_name).map_err(of_pages())?;
        let mut new = images.create(&new_name).map_err(of_pages())?;
        let mut entries = Vec::new();
        let mut piece = vec![0; PIECE];
        for entry in &pagemap.entries {
            if entry.is_present() {
                let mut at = entry.address;
                let kept = ranges::subtract(&[(entry.address, entry.end())], &owned);
                for (start, end) in kept.into_iter().chain([(entry.end(), entry.end())]) {
                    old.seek(SeekFrom::Current((start - at) as i64)).map_err(of_pages())?;
                    let copied =
                        io::copy(&mut Read::take(&mut old, end - start), &mut new).map_err(of_pages())?;
                    if copied != end - start {
                        return Err(of_pages()(io::ErrorKind::UnexpectedEof.into()));
                    }
                    if start < end {
                        let pages = (end - start) / PAGE_SIZE;
                        entries.push(Entry { address: start, pages, ..*entry });
                    }
                    at = end;
                }
                continue;
            }
            for (start, end) in ranges::subtract(&[(entry.address, entry.end())], &owned) {
                let mut at = start;
                while at < end {
                    let piece = &mut piece[..((end - at) as usize).min(PIECE)];
                    memory.read_exact_at(piece, at).map_err(failed(format!("/proc/{pid}/mem")))?;
                    new.write_all(piece).map_err(of_pages())?;
                    at += piece.len() as u64;
                }
                let pages = (end - start) / PAGE_SIZE;
                entries.push(Entry { address: start, pages, flags: pagemap::PRESENT });
            }
        }
        images.rename(&new_name, &pages_name).map_err(of_pages())?;
        let name = pagemap::file_name(process.vpid);
        let bytes = Pagemap { pages_id: pagemap.pages_id, entries }.encode();
        images
            .create(&name)
            .and_then(|mut f| f.write_all(&bytes))
            .map_err(failed(format!("image {name}")))?;
    }
    images
        .remove(PARENT_LINK)
        .and_then(|()| images.remove_folder(PARENT_FOLDER))
        .map_err(failed("the parent"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_areas_can_be_hidden() {
        let yes = [
            "7f00-7f01 rw-p 00000000 00:00 0 ",
            "7f00-7f01 rw-p 00000000 00:00 0                          [heap]",
            "7f00-7f01 ---p 00000000 00:00 0                          [anon:some name]",
        ];
        let no = [
            "7f00-7f01 rw-s 00000000 00:01 1026                       /dev/zero (deleted)",
            "7f00-7f01 r-xp 00000000 00:00 0                          [vdso]",
            "7f00-7f01 r--p 00000000 00:00 0                          [vvar]",
            "7f00-7f01 rw-p 00000000 08:01 99                         /lib/x.so",
        ];
        assert!(yes.iter().all(|line| parse_maps_line(line).unwrap().private_anonymous));
        assert!(!no.iter().any(|line| parse_maps_line(line).unwrap().private_anonymous));
        let private = |line| parse_maps_line(line).unwrap().private;
        assert!(yes.iter().all(|line| private(line)));
        assert_eq!(no.map(private), [false, true, false, true]);
        assert!(parse_maps_line("nonsense").is_none());
    }

    #[test]
    fn the_table_is_what_the_shim_reads() {
        let shim = Shim::new().unwrap();
        let owned = [
            Owned { pid: 7, vpid: 7, runs: vec![(1, 1), (3, 2)], ..Owned::default() },
            Owned { pid: 9, vpid: 9, runs: vec![(5, 1)], ..Owned::default() },
        ];
        shim.publish(&owned, &[]).unwrap();
        let mut bytes = vec![0; 8 * 32];
        let length = shim.table.read_at(&mut bytes, 0).unwrap();
        let words: Vec<u64> =
            bytes[..length].chunks_exact(8).map(|c| u64::from_ne_bytes(c.try_into().unwrap())).collect();
        let table = table::Table::parse(&words).unwrap();
        let hidden = |pid, page: u64| table.ranges(pid).unwrap().unwrap().contains(page * PAGE_SIZE);
        let pages = |pid| (0..8).filter(|&page| hidden(pid, page)).collect::<Vec<_>>();
        assert_eq!((pages(7), pages(9)), (vec![1, 3, 4], vec![5]));
        assert!(!shim.is_loaded().unwrap());
    }
}
