//! The table of hidden ranges, and how ranges are cut out of what the kernel answered.
//!
//! Compiled twice: into the shim, which runs inside criu, and into this crate, which writes the table and tests
//! the arithmetic. No I/O, no allocation, no `unsafe`, nothing beyond `core`.
//!
//! The table is an array of native-endian 64-bit words in a memfd shared by the two processes:
//!
//! ```text
//! 0  MAGIC
//! 1  LOADED once the shim runs inside criu (written by the shim, everything else by the engine)
//! 2  READY once every other word is in place
//! 3  number of processes P
//! 4  P times: pid, index of its first range word, number of ranges, and the pid and descriptor under which the text
//!    that stands for its smaps can be opened (0, 0: the kernel's own is read)
//!    the ranges: start, end (bytes; sorted, disjoint, end exclusive)
//! ```

/// First word of every table.
pub const MAGIC: u64 = 0x3165_6469_6866_7067;
/// What the shim writes at [`AT_LOADED`].
pub const LOADED: u64 = 0x6465_6461_6f6c;
/// What the engine writes at [`AT_READY`], last of all.
pub const READY: u64 = 0x79_6461_6572;
/// Index of the word that says that the shim is inside criu.
pub const AT_LOADED: usize = 1;
/// Index of the word that says that the table is complete.
pub const AT_READY: usize = 2;
/// Words before the first process.
pub const HEADER_WORDS: usize = 4;
/// Words per process.
pub const PROCESS_WORDS: usize = 5;
/// The environment variable that names the table's file.
pub const ENVIRONMENT: &str = "PAGEFERRY_HIDE_TABLE";

/// `struct page_region` of `linux/fs.h`: one answer of `PAGEMAP_SCAN`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Region {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// `PAGE_IS_*` bits.
    pub categories: u64,
}

/// A complete table, borrowed from the words it lives in.
#[derive(Clone, Copy)]
pub struct Table<'a> {
    words: &'a [u64],
    processes: usize,
}

/// The hidden ranges of one process: `start, end` pairs.
#[derive(Clone, Copy, Debug)]
pub struct Ranges<'a>(&'a [u64]);

impl<'a> Table<'a> {
    /// Reads a table; `None` if it is not complete or not a table.
    pub fn parse(words: &'a [u64]) -> Option<Self> {
        if words.len() < HEADER_WORDS || words[0] != MAGIC || words[AT_READY] != READY {
            return None;
        }
        let processes = usize::try_from(words[3]).ok()?;
        let index_end = processes.checked_mul(PROCESS_WORDS)?.checked_add(HEADER_WORDS)?;
        if index_end > words.len() {
            return None;
        }
        Some(Self { words, processes })
    }

    /// Where the words of `pid` begin.
    fn process(&self, pid: u64) -> Option<usize> {
        (0..self.processes).map(|i| HEADER_WORDS + i * PROCESS_WORDS).find(|&at| self.words[at] == pid)
    }

    /// The process and its descriptor of what stands for the smaps of `pid`, if anything does.
    pub fn smaps(&self, pid: u64) -> Option<(u64, u64)> {
        let at = self.process(pid)?;
        let (owner, fd) = (self.words[at + 3], self.words[at + 4]);
        (owner != 0).then_some((owner, fd))
    }

    /// The ranges of `pid`: `Ok(None)` if the table does not know that process, `Err` if the table is damaged.
    pub fn ranges(&self, pid: u64) -> Result<Option<Ranges<'a>>, Damaged> {
        if let Some(at) = self.process(pid) {
            let first = usize::try_from(self.words[at + 1]).map_err(|_| Damaged)?;
            let count = usize::try_from(self.words[at + 2]).map_err(|_| Damaged)?;
            let end = count.checked_mul(2).and_then(|n| n.checked_add(first)).ok_or(Damaged)?;
            let pairs = self.words.get(first..end).ok_or(Damaged)?;
            return Ok(Some(Ranges(pairs)));
        }
        Ok(None)
    }
}

/// The table contradicts itself.
#[derive(Debug, PartialEq, Eq)]
pub struct Damaged;

impl<'a> Ranges<'a> {
    /// Takes `start, end` pairs that are sorted and disjoint.
    pub fn from_pairs(pairs: &'a [u64]) -> Self {
        Self(pairs)
    }

    fn len(&self) -> usize {
        self.0.len() / 2
    }

    fn get(&self, i: usize) -> Option<(u64, u64)> {
        Some((*self.0.get(2 * i)?, *self.0.get(2 * i + 1)?))
    }

    /// Index of the first range that ends behind `address`.
    fn first_after(&self, address: u64) -> usize {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = low + (high - low) / 2;
            if self.0[2 * middle + 1] <= address { low = middle + 1 } else { high = middle }
        }
        low
    }

    /// The next stretch of `[at, end)` that has to be asked about: without the hidden ranges of at least `worth` bytes.
    /// Smaller ones may lie in it, because going round each of them would cost more than asking.
    pub fn next_stretch(&self, mut at: u64, end: u64, worth: u64) -> Option<(u64, u64)> {
        let mut next = self.first_after(at);
        while at < end {
            match self.get(next) {
                Some((start, stop)) if start <= at && stop - start >= worth => {
                    at = stop;
                    next += 1;
                }
                _ => break,
            }
        }
        if at >= end {
            return None;
        }
        let mut to = end;
        while let Some((start, stop)) = self.get(next) {
            if start >= end {
                break;
            }
            if start > at && stop - start >= worth {
                to = start;
                break;
            }
            next += 1;
        }
        Some((at, to))
    }

    /// Whether the page at `address` is hidden.
    pub fn contains(&self, address: u64) -> bool {
        self.get(self.first_after(address)).is_some_and(|(start, _)| start <= address)
    }
}

/// Where [`subtract`] has got to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// How many regions of `out` are filled now.
    pub filled: usize,
    /// `out` was too small: everything below this address is in `out`, nothing at or above it.
    pub stopped_at: Option<u64>,
}

/// Appends what is left of `regions` without `hidden` to `out`, of which `filled` regions are in use.
///
/// Cutting a hole makes two regions of one, so `out` can run full before `regions` is exhausted.
pub fn subtract(regions: &[Region], hidden: Ranges<'_>, out: &mut [Region], filled: usize) -> Cut {
    let mut filled = filled;
    for region in regions {
        let mut at = region.start;
        let mut next = hidden.first_after(at);
        while at < region.end {
            let (hole_start, hole_end) = hidden.get(next).unwrap_or((u64::MAX, u64::MAX));
            let visible_end = hole_start.min(region.end);
            if visible_end > at {
                let Some(slot) = out.get_mut(filled) else {
                    return Cut { filled, stopped_at: Some(at) };
                };
                *slot = Region { start: at, end: visible_end, categories: region.categories };
                filled += 1;
            }
            if hole_start >= region.end {
                break;
            }
            at = hole_end;
            next += 1;
        }
    }
    Cut { filled, stopped_at: None }
}

/// Clears the entries of hidden pages in an answer read from `/proc/PID/pagemap`, whose first entry is that of
/// the page at `first_address`.
pub fn clear_entries(entries: &mut [u64], first_address: u64, page_size: u64, hidden: Ranges<'_>) {
    let end_address = first_address.saturating_add((entries.len() as u64).saturating_mul(page_size));
    let mut i = hidden.first_after(first_address);
    while let Some((start, end)) = hidden.get(i) {
        if start >= end_address {
            return;
        }
        let from = (start.max(first_address) - first_address) / page_size;
        let to = (end.min(end_address) - first_address) / page_size;
        if let Some(hit) = entries.get_mut(from as usize..to as usize) {
            hit.fill(0);
        }
        i += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn region(start: u64, end: u64) -> Region {
        Region { start, end, categories: 9 }
    }

    #[test]
    fn a_hole_makes_two_of_one() {
        let mut out = [Region::default(); 4];
        let cut = subtract(&[region(0, 100)], Ranges::from_pairs(&[40, 60]), &mut out, 0);
        assert_eq!(cut, Cut { filled: 2, stopped_at: None });
        assert_eq!(out[..2], [region(0, 40), region(60, 100)]);
    }

    #[test]
    fn a_full_answer_says_where_to_go_on() {
        let mut out = [Region::default(); 1];
        let cut = subtract(&[region(0, 100)], Ranges::from_pairs(&[40, 60]), &mut out, 0);
        assert_eq!(cut, Cut { filled: 1, stopped_at: Some(60) });
    }

    #[test]
    fn an_incomplete_table_is_no_table() {
        let mut words = [MAGIC, LOADED, 0, 1, 7, 9, 1, 300, 12, 4096, 8192];
        assert!(Table::parse(&words).is_none());
        words[AT_READY] = READY;
        let table = Table::parse(&words).unwrap();
        assert!(table.ranges(7).unwrap().unwrap().contains(4096));
        assert!(!table.ranges(7).unwrap().unwrap().contains(8192));
        assert!(table.ranges(8).unwrap().is_none());
        assert_eq!((table.smaps(7), table.smaps(8)), (Some((300, 12)), None));
        words[6] = 2;
        assert_eq!(Table::parse(&words).unwrap().ranges(7).unwrap_err(), Damaged);
        words[3] = u64::MAX;
        assert!(Table::parse(&words).is_none());
    }

    /// Sorted disjoint ranges in page numbers below 200, none adjacent.
    fn ranges() -> impl Strategy<Value = Vec<(u64, u64)>> {
        proptest::collection::vec((1u64..9, 1u64..9), 0..20).prop_map(|steps| {
            let mut at = 0;
            steps
                .into_iter()
                .map(|(gap, len)| {
                    let start = at + gap;
                    at = start + len;
                    (start, at)
                })
                .collect()
        })
    }

    proptest! {
        /// However small the caller's answer is, walking on from `stopped_at` yields exactly the visible pages.
        #[test]
        fn subtraction_is_exact(scan in ranges(), hide in ranges(), room in 1usize..5) {
            let pairs: Vec<u64> = hide.iter().flat_map(|&(s, e)| [s, e]).collect();
            let hidden = Ranges::from_pairs(&pairs);
            let mut seen = Vec::new();
            let mut from = 0;
            loop {
                let regions: Vec<Region> = scan.iter().filter(|r| r.1 > from)
                    .map(|&(s, e)| region(s.max(from), e)).collect();
                let mut out = vec![Region::default(); room];
                let cut = subtract(&regions, hidden, &mut out, 0);
                seen.extend(out[..cut.filled].iter().flat_map(|r| r.start..r.end));
                match cut.stopped_at {
                    Some(at) => { prop_assert!(at > from || cut.filled > 0); from = at }
                    None => break,
                }
            }
            let inside = |set: &[(u64, u64)], p: u64| set.iter().any(|&(s, e)| (s..e).contains(&p));
            let expected: Vec<u64> = (0..400).filter(|&p| inside(&scan, p) && !inside(&hide, p)).collect();
            prop_assert_eq!(seen, expected);
        }

        #[test]
        fn stretches_leave_out_only_what_is_hidden(hide in ranges(), end in 1u64..300, worth in 1u64..8) {
            let pairs: Vec<u64> = hide.iter().flat_map(|&(start, end)| [start, end]).collect();
            let hidden = Ranges::from_pairs(&pairs);
            let mut asked = vec![false; end as usize];
            let mut at = 0;
            while let Some((from, to)) = hidden.next_stretch(at, end, worth) {
                prop_assert!(from >= at && to > from && to <= end);
                asked[from as usize..to as usize].fill(true);
                at = to;
            }
            for (address, asked) in asked.into_iter().enumerate() {
                let in_large = hide.iter().any(|&(start, end)| {
                    (start..end).contains(&(address as u64)) && end - start >= worth
                });
                prop_assert_eq!(asked, !in_large, "{}", address);
            }
        }

        #[test]
        fn clearing_is_exact(hide in ranges(), first in 0u64..100, len in 0usize..200) {
            let pairs: Vec<u64> = hide.iter().flat_map(|&(s, e)| [s * 4096, e * 4096]).collect();
            let mut entries = vec![1u64; len];
            clear_entries(&mut entries, first * 4096, 4096, Ranges::from_pairs(&pairs));
            for (i, entry) in entries.iter().enumerate() {
                let hidden = hide.iter().any(|&(s, e)| (s..e).contains(&(first + i as u64)));
                prop_assert_eq!(*entry == 0, hidden);
            }
        }
    }
}
