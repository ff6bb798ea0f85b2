//! `--verify`: every page that the frozen source has in memory, compared with the restored tree before the
//! commit. It reads both sides' memory anew and believes neither the tracker nor the store, which is its point.

use pageferry_criu_glue::image::tree::RseqArea;
use pageferry_tracker::{PageSet, Region};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const PAGE: u64 = 4096;
/// Bits of a pagemap entry (Documentation/admin-guide/mm/pagemap.rst).
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// A guard page (Linux 6.15): it has an entry like a page in swap, and no content.
const GUARD: u64 = 1 << 58;

/// Whether a region's content is the program's: not what the kernel provides, and not a device.
pub(crate) fn is_comparable(region: &Region) -> bool {
    match region.path.as_deref().and_then(|path| path.to_str()) {
        Some("[vdso]" | "[vvar]" | "[vvar_vclock]" | "[vsyscall]") => false,
        Some(path) => {
            !path.starts_with("/dev/") || path.starts_with("/dev/zero") || path.starts_with("/dev/shm/")
        }
        None => true,
    }
}

/// The pages of comparable regions that are in memory or in swap.
pub(crate) fn resident(pid: i32, regions: &[Region]) -> io::Result<PageSet> {
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let mut pages = PageSet::default();
    let mut buffer = vec![0u8; 64 << 10];
    for region in regions.iter().filter(|region| is_comparable(region)) {
        let (mut page, end) = (region.start / PAGE, region.end / PAGE);
        let mut run: Option<u64> = None;
        while page < end {
            let want = ((end - page) as usize * 8).min(buffer.len());
            let got = pagemap.read_at(&mut buffer[..want], page * 8)?;
            if got < 8 {
                return Err(io::Error::other(format!("pagemap of process {pid} ends at page {page:#x}")));
            }
            for entry in buffer[..got - got % 8].chunks_exact(8) {
                let entry = u64::from_le_bytes(entry.try_into().expect("chunks of eight"));
                let here = entry & (PRESENT | SWAPPED) != 0 && entry & GUARD == 0;
                match (here, run) {
                    (true, None) => run = Some(page),
                    (false, Some(start)) => {
                        pages.insert(start, page - start);
                        run = None;
                    }
                    _ => {}
                }
                page += 1;
            }
        }
        if let Some(start) = run {
            pages.insert(start, end - start);
        }
    }
    Ok(pages)
}

/// Blanks what the kernel writes by itself whenever a thread is scheduled (restartable sequences: the cpu
/// number), so that it does not count as a difference.
pub(crate) fn blank_rseq(areas: &[RseqArea], vpid: i32, page: u64, bytes: &mut [u8]) {
    let (start, end) = (page * PAGE, (page + 1) * PAGE);
    for area in areas.iter().filter(|area| area.vpid == vpid) {
        let from = area.address.max(start);
        let to = (area.address + area.length).min(end);
        if from < to {
            bytes[(from - start) as usize..(to - start) as usize].fill(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rseq_is_blanked_across_a_page_border() {
        let areas = [RseqArea { vpid: 3, address: 8190, tid: 3, length: 4 }];
        let (mut first, mut second, mut other) = ([1u8; 4096], [1u8; 4096], [1u8; 4096]);
        blank_rseq(&areas, 3, 1, &mut first);
        blank_rseq(&areas, 3, 2, &mut second);
        blank_rseq(&areas, 4, 1, &mut other);
        assert_eq!((first[4093], first[4094], first[4095]), (1, 0, 0));
        assert_eq!((second[0], second[1], second[2]), (0, 0, 1));
        assert!(other.iter().all(|b| *b == 1));
    }

    #[test]
    fn our_own_stack_is_resident() {
        let here = 0u8;
        let address = std::ptr::from_ref(&here) as u64;
        let me = std::process::id() as i32;
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let (start, end) = maps
            .lines()
            .filter_map(|line| {
                let (range, _) = line.split_once(' ')?;
                let (start, end) = range.split_once('-')?;
                Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
            })
            .find(|(start, end)| (*start..*end).contains(&address))
            .unwrap();
        let region = Region { start, end, ..Region::default() };
        assert!(resident(me, &[region]).unwrap().contains(address / PAGE));
    }
}
