//! What of a program's memory only CRIU's images can carry: pages of files that it has changed, shared memory, locked memory.
//!
//! `predict` does not watch it, which would cost the program more; how much it is says smaps.

use pageferry_tracker::{Collected, Region};
use procfs::process::{MMPermissions, MMapPath, MemoryMap, Process};
use std::collections::BTreeSet;

const PAGE: u64 = 4096;

/// Pages of all processes that were found by a scan; of one that has ended since, none.
pub(super) fn pages(collected: &Collected) -> u64 {
    let mut bytes = 0;
    for space in &collected.spaces {
        match Process::new(space.target.pid()).and_then(|process| process.smaps()) {
            Ok(maps) => bytes += of(maps.iter(), &space.regions),
            Err(_) if !space.target.is_alive() => {}
            // A file's name that is no text, for one: what is predicted lacks some images then.
            Err(error) => {
                tracing::warn!(pid = space.target.pid(), %error, "could not count what CRIU's images would carry");
            }
        }
    }
    bytes / PAGE
}

/// Bytes of the mappings that are none of `regions` that can be lazy.
fn of<'a>(maps: impl Iterator<Item = &'a MemoryMap>, regions: &[Region]) -> u64 {
    let lazy: BTreeSet<u64> =
        regions.iter().filter(|region| region.can_be_lazy()).map(|region| region.start).collect();
    maps.filter(|map| !lazy.contains(&map.address.0)).map(carried).sum()
}

/// What CRIU dumps of a mapping.
fn carried(map: &MemoryMap) -> u64 {
    let field = |name: &str| map.extension.map.get(name).copied().unwrap_or(0);
    if !map.perms.contains(MMPermissions::SHARED) {
        return field("Anonymous") + field("Swap") + field("Private_Hugetlb");
    }
    // A file that has a name stays where it is. Each of those who share a page has its part of it here.
    let nameless = match &map.pathname {
        MMapPath::Path(path) => path.to_string_lossy().ends_with(" (deleted)"),
        MMapPath::Vsys(_) | MMapPath::Anonymous => true,
        _ => false,
    };
    if nameless { field("Pss") + field("SwapPss") } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use procfs::FromBufRead;
    use procfs::process::MemoryMaps;

    const SMAPS: &str = "\
55d000000000-55d000002000 rw-p 00001000 08:01 77 /usr/bin/program
Rss: 8 kB
Pss: 8 kB
Anonymous: 4 kB
Swap: 4 kB
VmFlags: rd wr mr mw me ac sd
55d000010000-55d000020000 rw-p 00000000 00:00 0 [heap]
Rss: 64 kB
Pss: 64 kB
Anonymous: 64 kB
Swap: 0 kB
VmFlags: rd wr mr mw me ac sd
7f0000000000-7f0000100000 rw-s 00000000 00:01 5 /memfd:buffers (deleted)
Rss: 1024 kB
Pss: 512 kB
Anonymous: 0 kB
Swap: 0 kB
SwapPss: 0 kB
VmFlags: rd wr sh mr mw me ms sd
7f0000200000-7f0000300000 rw-s 00000000 08:01 6 /var/lib/data
Rss: 1024 kB
Pss: 1024 kB
Anonymous: 0 kB
Swap: 0 kB
SwapPss: 0 kB
VmFlags: rd wr sh mr mw me ms sd
7f0000400000-7f0000402000 rw-p 00000000 00:00 0\x20
Rss: 8 kB
Pss: 8 kB
Anonymous: 8 kB
Swap: 0 kB
VmFlags: rd wr mr mw me lo ac sd
";

    fn region(start: u64, locked: bool) -> Region {
        Region { start, end: start + 0x2000, read: true, locked, ..Region::default() }
    }

    #[test]
    fn files_shared_and_locked_memory_are_counted() {
        let maps = MemoryMaps::from_buf_read(SMAPS.as_bytes()).expect("smaps");
        let regions = [region(0x55d0_0001_0000, false), region(0x7f00_0040_0000, true)];
        // What was changed of the program's file, half of what is shared by two, and what is locked.
        assert_eq!(of(maps.iter(), &regions), (8 + 512 + 8) * 1024);
    }
}
