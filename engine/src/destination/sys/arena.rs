//! Anonymous memory for received pages: large regions, cut into slots of one page.
//!
//! A slot is either *lent* (its bytes belong to the one [`Extent`] that covers it, which may write them) or
//! *kept* (anybody who can borrow the [`Arena`] may read them). Lending takes `&mut Arena`, so that nobody can be
//! reading a slot at the moment it is lent; a lent slot is never readable through the arena. That is all that
//! keeps the references handed out here apart from each other.

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

/// Bytes of a slot: one page.
pub const SLOT_BYTES: usize = 4096;
/// Slots of a region: 64 MiB, few enough mappings for any memory size, small enough to stop growing in time.
pub const REGION_SLOTS: u32 = 16384;
/// Bytes of a region.
pub const REGION_BYTES: usize = REGION_SLOTS as usize * SLOT_BYTES;
/// Slots of a block: 2 MiB, one huge page, the unit in which memory is given back.
pub const BLOCK_SLOTS: u32 = 512;
/// Bytes of a block.
pub const BLOCK_BYTES: usize = BLOCK_SLOTS as usize * SLOT_BYTES;

const _: () = assert!(REGION_SLOTS.is_multiple_of(BLOCK_SLOTS) && BLOCK_SLOTS.is_multiple_of(64));
// madvise(2)'s numbers on x86-64, include/uapi/asm-generic/mman-common.h.
const _: () = assert!(Advice::LinuxPopulateWrite as u32 == 23 && Advice::LinuxHugepage as u32 == 14);
const _: () = assert!(Advice::LinuxDontNeed as u32 == 4 && Advice::LinuxDontFork as u32 == 10);

/// One mapping of [`REGION_BYTES`], aligned to a huge page, private and anonymous, read-write.
#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
}

// SAFETY: the mapping belongs to this value alone and is valid in every thread of the process; which thread may
// touch which byte is settled by `Arena` and `Extent`, not by the thread it happens in.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` only allows `populate`, which never changes what the bytes read as.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new() -> io::Result<Self> {
        // One block more than needed, so that an aligned region fits in wherever the kernel puts it.
        let span = REGION_BYTES + BLOCK_BYTES;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: no address is asked for, so the kernel chooses one where nothing is mapped.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), span, prot, flags)? };
        let head = start.align_offset(BLOCK_BYTES);
        let base = start.wrapping_byte_add(head);
        let tail = BLOCK_BYTES - head;
        if head > 0 {
            // SAFETY: the first `head` bytes of the mapping that was just made; nobody knows its address yet.
            unsafe { munmap(start, head)? };
        }
        if tail > 0 {
            // SAFETY: the last `tail` bytes of that mapping, behind the aligned region.
            unsafe { munmap(base.wrapping_byte_add(REGION_BYTES), tail)? };
        }
        let base = NonNull::new(base.cast::<u8>()).ok_or(io::ErrorKind::InvalidData)?;
        let mapping = Self { base };
        // Huge pages: fresh memory then costs half as much. A kernel without them says EINVAL, and all still works.
        let _ = mapping.advise(0, REGION_BYTES, Advice::LinuxHugepage);
        // Children (CRIU) have no use for the store, and copying its page tables would cost them time.
        let _ = mapping.advise(0, REGION_BYTES, Advice::LinuxDontFork);
        let _ = mapping.advise(0, REGION_BYTES, Advice::LinuxDontDump);
        Ok(mapping)
    }

    /// Only for advice that keeps the bytes' values, or over bytes to which the caller has the only access.
    fn advise(&self, offset: usize, len: usize, advice: Advice) -> io::Result<()> {
        assert!(offset <= REGION_BYTES && len <= REGION_BYTES - offset);
        let at = self.base.as_ptr().wrapping_add(offset).cast::<c_void>();
        // SAFETY: the range lies in this mapping (asserted above), which lives as long as `self`. The callers
        // are in this file: all but `Arena::release` give advice that does not change contents, and `release`
        // holds the arena exclusively and has checked that nothing of the range is lent.
        unsafe { madvise(at, len, advice)? };
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone, and the last owner of it is going away: every slice into it borrows
        // from an `Arena` or an `Extent`, both of which own a share of the mapping.
        let _ = unsafe { munmap(self.base.as_ptr().cast::<c_void>(), REGION_BYTES) };
    }
}

/// A region that is mapped, and not part of an arena yet.
#[derive(Debug)]
pub struct Region(Arc<Mapping>);

impl Region {
    /// Maps a region. Nothing of it is populated: this costs address space only.
    ///
    /// # Errors
    /// When the process may not map more.
    pub fn map() -> io::Result<Self> {
        Mapping::new().map(|mapping| Self(Arc::new(mapping)))
    }

    /// A handle that can populate the region from another thread.
    pub fn populator(&self) -> Populator {
        Populator(Arc::clone(&self.0))
    }
}

/// Populates a region's memory ahead of use.
#[derive(Clone, Debug)]
pub struct Populator(Arc<Mapping>);

impl Populator {
    /// Makes the kernel back `len` bytes at `offset` with memory now. The bytes keep their values, so that this
    /// may run while others read and write them.
    ///
    /// # Errors
    /// `ENOMEM` when there is no memory, `EINVAL` on kernels before 5.14.
    ///
    /// # Panics
    /// When the range does not lie in the region.
    pub fn populate(&self, offset: usize, len: usize) -> io::Result<()> {
        self.0.advise(offset, len, Advice::LinuxPopulateWrite)
    }
}

/// Consecutive slots that somebody may write, and nobody else can see. Dropping an extent without giving it back
/// loses its slots, and nothing else.
#[derive(Debug)]
pub struct Extent {
    mapping: Arc<Mapping>,
    first: u32,
    slots: u32,
}

impl Extent {
    /// Number of the first slot.
    pub fn first(&self) -> u32 {
        self.first
    }

    /// How many slots it covers.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    fn offset(&self) -> usize {
        (self.first % REGION_SLOTS) as usize * SLOT_BYTES
    }

    /// The bytes of the slots.
    pub fn bytes(&self) -> &[u8] {
        let at = self.mapping.base.as_ptr().wrapping_add(self.offset());
        // SAFETY: `Arena::lend` made sure that the slots lie in the region, were not lent, and marked them as
        // lent: this extent has the only access, and `&self` keeps `bytes_mut` away. The memory is anonymous, so
        // every byte is initialised, and the mapping lives as long as the extent's share of it.
        unsafe { std::slice::from_raw_parts(at, self.slots as usize * SLOT_BYTES) }
    }

    /// The bytes of the slots, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let at = self.mapping.base.as_ptr().wrapping_add(self.offset());
        // SAFETY: as in `bytes`; `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(at, self.slots as usize * SLOT_BYTES) }
    }
}

#[derive(Debug)]
struct Held {
    mapping: Arc<Mapping>,
    /// One bit a slot: lent out.
    lent: Box<[u64]>,
}

/// The slots of all regions. Slot `n` is in region `n / REGION_SLOTS`.
#[derive(Debug, Default)]
pub struct Arena {
    regions: Vec<Held>,
}

impl Arena {
    /// How many slots there are.
    pub fn slots(&self) -> u64 {
        self.regions.len() as u64 * u64::from(REGION_SLOTS)
    }

    /// Adds the slots of `region` at the end.
    pub fn push(&mut self, region: Region) {
        let lent = vec![0; REGION_SLOTS as usize / 64].into_boxed_slice();
        self.regions.push(Held { mapping: region.0, lent });
    }

    /// Lends slots to be written. `None` when they do not exist, span two regions, or are lent already.
    pub fn lend(&mut self, first: u32, slots: u32) -> Option<Extent> {
        let (region, range) = Self::locate(first, slots)?;
        let held = self.regions.get_mut(region)?;
        if !bits(&held.lent, range).all(|(word, mask)| word & mask == 0) {
            return None;
        }
        for_bits(&mut held.lent, range, |word, mask| *word |= mask);
        Some(Extent { mapping: Arc::clone(&held.mapping), first, slots })
    }

    /// Takes slots back: from now on they can be read, and lent again. Gives an extent of another arena back.
    ///
    /// # Errors
    /// The extent, when it is not one of this arena's.
    pub fn take_back(&mut self, extent: Extent) -> Result<(), Extent> {
        let Some((region, range)) = Self::locate(extent.first, extent.slots) else { return Err(extent) };
        match self.regions.get_mut(region) {
            Some(held) if Arc::ptr_eq(&held.mapping, &extent.mapping) => {
                for_bits(&mut held.lent, range, |word, mask| *word &= !mask);
                Ok(())
            }
            _ => Err(extent),
        }
    }

    /// The bytes of slots. `None` when they do not exist, span two regions, or are lent.
    pub fn bytes(&self, first: u32, slots: u32) -> Option<&[u8]> {
        let (region, range) = Self::locate(first, slots)?;
        let held = self.regions.get(region)?;
        if !bits(&held.lent, range).all(|(word, mask)| word & mask == 0) {
            return None;
        }
        let at = held.mapping.base.as_ptr().wrapping_add(range.0 as usize * SLOT_BYTES);
        // SAFETY: the slots lie in the region (`locate`), which this arena keeps mapped. None is lent, so no
        // `Extent` can write them, and none can be lent or released while `&self` is borrowed.
        Some(unsafe { std::slice::from_raw_parts(at, slots as usize * SLOT_BYTES) })
    }

    /// Gives the memory of slots back to the system: they read as zero from now on. Says whether it did, which it
    /// does not when any of them is lent.
    pub fn release(&mut self, first: u32, slots: u32) -> bool {
        let Some((region, range)) = Self::locate(first, slots) else { return false };
        let Some(held) = self.regions.get(region) else { return false };
        if !bits(&held.lent, range).all(|(word, mask)| word & mask == 0) {
            return false;
        }
        let (offset, len) = (range.0 as usize * SLOT_BYTES, slots as usize * SLOT_BYTES);
        held.mapping.advise(offset, len, Advice::LinuxDontNeed).is_ok()
    }

    /// Region, and the first slot and number of slots in it.
    fn locate(first: u32, slots: u32) -> Option<(usize, (u32, u32))> {
        let at = first % REGION_SLOTS;
        (slots > 0 && slots <= REGION_SLOTS - at).then_some(((first / REGION_SLOTS) as usize, (at, slots)))
    }
}

/// The part of `range` (first, count) that falls into word `index`.
fn mask_in_word(index: u32, (first, count): (u32, u32)) -> u64 {
    let low = first.max(index * 64) - index * 64;
    let high = (first + count).min(index * 64 + 64) - index * 64;
    let upto = |n: u32| if n == 64 { u64::MAX } else { (1 << n) - 1 };
    upto(high) & !upto(low)
}

fn bits(words: &[u64], range: (u32, u32)) -> impl Iterator<Item = (u64, u64)> {
    let (from, to) = (range.0 / 64, (range.0 + range.1).div_ceil(64));
    (from..to).map(move |index| (words[index as usize], mask_in_word(index, range)))
}

fn for_bits(words: &mut [u64], range: (u32, u32), mut change: impl FnMut(&mut u64, u64)) {
    for index in range.0 / 64..(range.0 + range.1).div_ceil(64) {
        change(&mut words[index as usize], mask_in_word(index, range));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arena() -> Arena {
        let mut arena = Arena::default();
        arena.push(Region::map().unwrap());
        arena
    }

    #[test]
    fn a_lent_slot_is_nobody_elses() {
        let mut arena = arena();
        let mut extent = arena.lend(60, 10).unwrap();
        assert!(arena.lend(69, 1).is_none() && arena.lend(0, 61).is_none());
        assert!(arena.bytes(60, 1).is_none() && arena.bytes(65, 10).is_none());
        assert!(!arena.release(0, 64));
        assert!(arena.bytes(0, 60).is_some() && arena.bytes(70, 5).is_some());
        extent.bytes_mut().fill(7);
        arena.take_back(extent).unwrap();
        assert!(arena.bytes(60, 10).unwrap().iter().all(|&b| b == 7));
        assert!(arena.release(60, 10));
        assert!(arena.bytes(60, 10).unwrap().iter().all(|&b| b == 0));
        assert!(arena.lend(60, 10).is_some());
    }

    #[test]
    fn slots_that_do_not_exist_or_span_regions_are_refused() {
        let mut arena = arena();
        assert_eq!(arena.slots(), u64::from(REGION_SLOTS));
        assert!(arena.lend(REGION_SLOTS - 1, 2).is_none());
        assert!(arena.lend(REGION_SLOTS, 1).is_none());
        assert!(arena.lend(0, 0).is_none());
        assert!(arena.bytes(u32::MAX, 1).is_none());
    }

    #[test]
    fn an_extent_of_another_arena_comes_back() {
        let (mut one, mut other) = (arena(), arena());
        let extent = one.lend(0, 1).unwrap();
        let extent = other.take_back(extent).unwrap_err();
        one.take_back(extent).unwrap();
    }

    #[test]
    fn populating_keeps_what_was_written() {
        let region = Region::map().unwrap();
        let populator = region.populator();
        let mut arena = Arena::default();
        arena.push(region);
        let mut extent = arena.lend(3, 1).unwrap();
        extent.bytes_mut().fill(9);
        populator.populate(0, BLOCK_BYTES).unwrap();
        drop(arena);
        assert!(extent.bytes().iter().all(|&b| b == 9));
    }
}
