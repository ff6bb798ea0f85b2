//! Which pages the destination holds already, by content: a page that is the same as another one, of whatever process of
//! the tree, is copied there instead of being sent.
//!
//! A table of hints. It says where content was last seen to be, in eight bytes a page, and whoever asks compares the
//! digest that is on the books for that place; so it may forget, and it may be out of date, but it cannot be wrong.

use pageferry_wire_format::{PageDigest, SpaceId};

/// Entries that share a line of the processor's cache: one look finds or misses a content.
const WAYS: usize = 8;
/// Room for this many more entries than pages, so that few are pushed out.
const SLACK: f64 = 1.25;

/// Bits of a page's number that are kept: 52-bit addresses. Pages beyond are not entered.
const PAGE_BITS: u32 = 40;
/// Bits of a space's number.
const SPACE_BITS: u32 = 12;
/// The number that stands for the pages that the destination kept; one less is the last of a space.
const KEPT: u64 = (1 << SPACE_BITS) - 1;
/// The rest tells the contents of one bucket apart.
const TAG_BITS: u32 = 64 - PAGE_BITS - SPACE_BITS;
/// An entry that is none: its tag is never made.
const NONE: u64 = 0;

/// Looks after which it is known whether a program of one process has equal pages at all.
const TRIAL: u64 = 1 << 15;
/// ... and the share of them (one in so many) that must have found something.
const WORTH: u64 = 256;
/// What is looked at when they did not: one content in so many, chosen by its digest.
const SAMPLED: u64 = 16;

/// The table.
#[derive(Debug, Default)]
pub(crate) struct Twins {
    buckets: Vec<[u64; WAYS]>,
    /// Contents that there may be.
    pages: u64,
    /// Whether to look at every page whatever is found: there are several processes, or pages that were kept.
    thorough: bool,
    looked: u64,
    found: u64,
    victim: usize,
    /// Bytes that it may take.
    most: u64,
}

impl Twins {
    /// There are `pages` pages, and the table may take `most` bytes. With `thorough` every page is looked at, whatever was found so
    /// far. Says whether the table was laid out anew, and is empty.
    pub(crate) fn reserve(&mut self, pages: u64, thorough: bool, most: u64) -> bool {
        self.pages = self.pages.max(pages);
        self.thorough = thorough;
        self.most = most;
        self.lay_out()
    }

    /// Makes the table as large as what was found so far is worth. Says whether it is new, and empty.
    pub(crate) fn lay_out(&mut self) -> bool {
        // What is not looked at needs no room.
        let pages =
            if self.is_worth_it() { self.pages } else { TRIAL.max(self.pages / SAMPLED).min(self.pages) };
        // One that is smaller than it should be forgets more.
        let most = usize::try_from(self.most / size_of::<[u64; WAYS]>() as u64).unwrap_or(usize::MAX);
        let wanted = ((pages as f64 * SLACK / WAYS as f64).ceil() as usize).min(most);
        if (wanted..=most).contains(&self.buckets.len()) {
            return false;
        }
        // A program that grows a little at a time must not empty the table every round.
        let room = if self.buckets.is_empty() { wanted } else { wanted + wanted / 8 };
        let room = room.min(most);
        self.buckets = Vec::new();
        self.buckets.resize(room, [NONE; WAYS]);
        true
    }

    /// Whether every page is looked at once the trial is over.
    fn is_worth_it(&self) -> bool {
        self.thorough || self.found >= (self.looked / WORTH).max(TRIAL / WORTH)
    }

    /// Whether a content is to be looked for and entered.
    pub(crate) fn is_of_interest(&self, digest: &PageDigest) -> bool {
        let all = self.looked < TRIAL || self.is_worth_it();
        !self.buckets.is_empty() && (all || u64::from(digest.0[8]).is_multiple_of(SAMPLED))
    }

    /// Where this content may be: the first of the places for which `confirm` says so.
    pub(crate) fn find(
        &mut self,
        digest: &PageDigest,
        mut confirm: impl FnMut(SpaceId, u64) -> bool,
    ) -> Option<(SpaceId, u64)> {
        let (bucket, tag) = self.locate(digest)?;
        self.looked += 1;
        let entry = self.buckets[bucket].iter().copied().filter(|entry| entry >> (64 - TAG_BITS) == tag);
        let place = entry.map(unpack).find(|&(space, page)| confirm(space, page));
        self.found += u64::from(place.is_some());
        place
    }

    /// The destination holds this content there.
    pub(crate) fn enter(&mut self, digest: &PageDigest, space: SpaceId, page: u64) {
        let Some((bucket, tag)) = self.locate(digest) else { return };
        // Space 0 is entered as 1, so that no entry is `NONE`.
        let number = u64::from(space.0) + 1;
        let space = if space == SpaceId::KEPT { KEPT } else { number };
        if space == number && space >= KEPT || page >> PAGE_BITS != 0 {
            return;
        }
        let entry = tag << (64 - TAG_BITS) | space << PAGE_BITS | page;
        let ways = &mut self.buckets[bucket];
        // The same place before, or the same tag (most likely the same content elsewhere), or room.
        let at = ways.iter().position(|old| *old == NONE || *old == entry);
        let at = at.unwrap_or_else(|| {
            self.victim = (self.victim + 1) % WAYS;
            self.victim
        });
        ways[at] = entry;
    }

    /// Bytes that the table takes.
    pub(crate) fn bytes(&self) -> usize {
        self.buckets.len() * size_of::<[u64; WAYS]>()
    }

    fn locate(&self, digest: &PageDigest) -> Option<(usize, u64)> {
        let low = u64::from_le_bytes(digest.0[..8].try_into().expect("eight bytes"));
        let high = u64::from_le_bytes(digest.0[8..].try_into().expect("eight bytes"));
        // The high half of the product is evenly spread over the buckets whatever their number.
        let bucket = ((u128::from(low) * self.buckets.len() as u128) >> 64) as usize;
        (!self.buckets.is_empty()).then_some((bucket, high >> (64 - TAG_BITS)))
    }
}

fn unpack(entry: u64) -> (SpaceId, u64) {
    let space = match entry >> PAGE_BITS & ((1 << SPACE_BITS) - 1) {
        KEPT => SpaceId::KEPT,
        number => SpaceId((number as u32).wrapping_sub(1)),
    };
    (space, entry & ((1 << PAGE_BITS) - 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_wire_format::digest;

    fn content(n: u64) -> PageDigest {
        let mut page = [0; 4096];
        page[..8].copy_from_slice(&n.to_le_bytes());
        digest::page(&page)
    }

    #[test]
    fn what_was_entered_is_found_and_nothing_else() {
        let mut twins = Twins::default();
        assert_eq!(twins.find(&content(1), |_, _| true), None, "an empty table");
        twins.reserve(10_000, true, u64::MAX);
        for n in 0..10_000 {
            twins.enter(&content(n), SpaceId((n % 7) as u32), 0x7f00_0000 + n);
        }
        let mut found = 0;
        for n in 0..10_000 {
            let place = (SpaceId((n % 7) as u32), 0x7f00_0000 + n);
            let mut asked = Vec::new();
            let got = twins.find(&content(n), |space, page| {
                asked.push((space, page));
                (space, page) == place
            });
            found += usize::from(got == Some(place));
            assert!(asked.len() <= WAYS);
        }
        assert!(found > 9_000, "{found} of 10000: a table of this size forgets few");
        assert_eq!(twins.find(&content(77_777), |_, page| page == 1), None);
    }

    #[test]
    fn a_place_that_does_not_have_the_content_any_more_is_passed_over() {
        let mut twins = Twins::default();
        twins.reserve(100, true, u64::MAX);
        twins.enter(&content(5), SpaceId(0), 1);
        twins.enter(&content(5), SpaceId(3), 2);
        assert_eq!(twins.find(&content(5), |space, _| space == SpaceId(3)), Some((SpaceId(3), 2)));
        assert_eq!(twins.find(&content(5), |_, _| false), None);
    }

    #[test]
    fn places_that_cannot_be_named_are_not_entered() {
        let mut twins = Twins::default();
        twins.reserve(100, true, u64::MAX);
        twins.enter(&content(1), SpaceId(0), 1 << PAGE_BITS);
        twins.enter(&content(1), SpaceId(1 << SPACE_BITS), 1);
        twins.enter(&content(1), SpaceId(KEPT as u32 - 1), 1);
        assert_eq!(twins.find(&content(1), |_, _| true), None);
        for space in [SpaceId::KEPT, SpaceId(KEPT as u32 - 2)] {
            twins.enter(&content(1), space, 1);
            assert_eq!(twins.find(&content(1), |of, _| of == space), Some((space, 1)));
        }
    }

    #[test]
    fn a_program_without_equal_pages_is_soon_left_alone_and_one_that_gets_some_is_noticed() {
        let mut twins = Twins::default();
        twins.reserve(1 << 16, false, u64::MAX);
        let look = |twins: &mut Twins, n: u64| {
            let digest = content(n);
            if !twins.is_of_interest(&digest) {
                return false;
            }
            if twins.find(&digest, |_, page| page == n).is_none() {
                twins.enter(&digest, SpaceId(0), n);
            }
            true
        };
        let looks = (0..TRIAL).filter(|n| look(&mut twins, *n)).count();
        assert_eq!(looks as u64, TRIAL);
        let looks = (TRIAL..2 * TRIAL).filter(|n| look(&mut twins, *n)).count() as u64;
        assert!((TRIAL / 32..TRIAL / 8).contains(&looks), "{looks}: one in sixteen");
        for n in 0..2 * TRIAL {
            look(&mut twins, n);
        }
        let looks = (0..1000).filter(|n| look(&mut twins, *n)).count();
        assert_eq!(looks, 1000, "equal pages were found, so every page is looked at again");
        assert!(twins.lay_out(), "and the table grows");
    }

    #[test]
    fn one_that_may_take_little_forgets_more_and_gives_back_what_it_has() {
        let mut twins = Twins::default();
        twins.reserve(10_000, true, 20_000);
        assert!((15_000..=20_000).contains(&twins.bytes()), "{}", twins.bytes());
        (0..10_000).for_each(|n| twins.enter(&content(n), SpaceId(0), n));
        let found = (0..10_000).filter(|n| twins.find(&content(*n), |_, page| page == *n).is_some()).count();
        assert!((1500..=2500).contains(&found), "{found}");
        assert!(!twins.reserve(10_000, true, 20_000), "it stays as it is");
        assert!(twins.reserve(10_000, true, 6400) && twins.bytes() == 6400);
        assert!(twins.reserve(10_000, true, 0) && twins.bytes() == 0);
        assert!(!twins.is_of_interest(&content(1)) && !twins.reserve(20_000, true, 0));
    }

    #[test]
    fn it_takes_a_quarter_of_a_per_cent_and_a_tenth_of_that_where_nothing_is_equal() {
        let of = |thorough| {
            let mut twins = Twins::default();
            twins.reserve(1 << 20, thorough, u64::MAX);
            twins.bytes() as f64 / (1u64 << 32) as f64
        };
        assert!(of(true) <= 0.003 && of(false) <= 0.0003, "{} and {}", of(true), of(false));
    }
}
