//! Of which pages the sender has kept the bytes that it sent, so that they can be sent as what differs: the rules of
//! `source/deltas`, with the budget that it has unless it is told.

use super::trace::Pages;
use crate::policy::memory::DELTA_CACHE_SHARE;
use pageferry_tracker::{PageSet, SpaceKey};

/// The pages whose bytes are kept.
#[derive(Clone, Debug, Default)]
pub(super) struct Based {
    /// Sent once, in order. The later ones leave for pages that are sent again.
    once: Pages,
    /// Sent more than once, or when most others had been.
    twice: Pages,
}

impl Based {
    /// These were sent; in a first pass over `resident` pages, or after it.
    pub(super) fn sent(&mut self, pages: &Pages, first_pass: bool, resident: u64) {
        let room = resident / DELTA_CACHE_SHARE;
        let kept = if first_pass { &mut self.once } else { &mut self.twice };
        let mut left = room.saturating_sub(count(kept));
        for (key, pages) in pages {
            let kept = kept.entry(*key).or_default();
            let (new, _) = pages.subtract(kept).split(left);
            left -= new.len();
            kept.absorb(new);
        }
        let mut left = room - count(&self.twice).min(room);
        for pages in self.once.values_mut() {
            *pages = pages.split(left).0;
            left -= pages.len();
        }
    }

    /// How many of these pages are kept.
    pub(super) fn among(&self, key: SpaceKey, pages: &PageSet) -> u64 {
        let of = |kept: &Pages| kept.get(&key).map_or_else(PageSet::default, |kept| kept.intersect(pages));
        of(&self.once).union(&of(&self.twice)).len()
    }
}

fn count(pages: &Pages) -> u64 {
    pages.values().map(PageSet::len).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_tracker::Run;

    const KEY: SpaceKey = SpaceKey(0);

    fn pages(start: u64, len: u64) -> Pages {
        [(KEY, [Run { start, len }].into_iter().collect())].into_iter().collect()
    }

    #[test]
    fn a_sixteenth_is_kept_and_what_is_sent_twice_takes_the_place_of_the_others() {
        let mut based = Based::default();
        let among = |based: &Based, start, len| based.among(KEY, &pages(start, len)[&KEY]);
        based.sent(&pages(0, 1600), true, 1600);
        assert_eq!((among(&based, 0, 1600), among(&based, 90, 20)), (100, 10), "the first ones");
        based.sent(&pages(50, 60), false, 1600);
        assert_eq!((among(&based, 0, 40), among(&based, 40, 10), among(&based, 50, 100)), (40, 0, 60));
        based.sent(&pages(1000, 100), false, 1600);
        assert_eq!((among(&based, 0, 50), among(&based, 50, 60), among(&based, 1000, 100)), (0, 60, 40));
    }
}
