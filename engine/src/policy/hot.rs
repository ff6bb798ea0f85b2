//! Which pages are written again before it pays to send them. Pure.
//!
//! A page that was dirty at each of the last looks will most likely be dirty at the next one: whatever is sent of it now is
//! thrown away. Such pages are held back until the freeze, or until a look finds them clean (Clark et al., "Live
//! Migration of Virtual Machines", NSDI 2005, section 5.2, skip pages that are dirty again already in the same round).

use pageferry_tracker::PageSet;
use std::collections::VecDeque;

/// Looks in a row at which a page was dirty, the present one included, that make it hot: after the first it was sent, after
/// the second it was sent again and its bytes kept, and after the third it is known whether deltas of it are small.
const LOOKS: usize = 4;

/// What is known of the writes of one space.
#[derive(Clone, Debug, Default)]
pub struct HotPages {
    /// What was dirty at the last looks, the newest first.
    before: VecDeque<PageSet>,
    held: PageSet,
}

impl HotPages {
    /// Takes in what is due now: the pages that are dirty at this look, and others that were never sent. `dirty` are those
    /// that were written since the look before. Gives the pages to send: what is due, and what was held back and has
    /// cooled, without what is hot. Without `hold` nothing is held back.
    pub fn look(&mut self, due: &PageSet, dirty: &PageSet, populated: &PageSet, hold: bool) -> PageSet {
        let held = self.held.intersect(populated);
        let mut hot = match hold && self.before.len() + 1 >= LOOKS {
            true => dirty.clone(),
            false => PageSet::default(),
        };
        for before in &self.before {
            hot = hot.intersect(before);
        }
        self.before.push_front(dirty.clone());
        self.before.truncate(LOOKS - 1);
        let todo = due.union(&held);
        // A page that was never sent is due whether it is hot or not: it is in no hot set before it was dirty often
        // enough, and it was sent meanwhile.
        self.held = hot.intersect(&todo);
        todo.subtract(&self.held)
    }

    /// Pages that are held back.
    pub fn held(&self) -> &PageSet {
        &self.held
    }

    /// The program is slower from now on: that a page was dirty at the last looks says nothing any more. What was held back is
    /// given out at the next look.
    pub fn begin_anew(&mut self) {
        self.before.clear();
    }

    /// These pages were given out to be sent, and were not.
    pub fn put_back(&mut self, pages: &PageSet) {
        self.held = self.held.union(pages);
    }

    /// Everything that was held back, which is sent now whether it is hot or not.
    pub fn release(&mut self) -> PageSet {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(runs: &[(u64, u64)]) -> PageSet {
        let mut set = PageSet::default();
        runs.iter().for_each(|(start, len)| set.insert(*start, *len));
        set
    }

    #[test]
    fn what_is_always_dirty_is_held_back_until_it_cools() {
        let (all, hot) = (set(&[(0, 100)]), set(&[(10, 5)]));
        let mut pages = HotPages::default();
        let mut look = |dirty: &PageSet, hold| pages.look(dirty, dirty, &all, hold);
        assert_eq!(look(&all, true).len(), 100, "everything is sent once");
        assert_eq!(look(&hot, true).len(), 5, "and once more, so that there is a base for deltas");
        assert_eq!(look(&hot, true).len(), 5, "and by them");
        assert_eq!(look(&hot, true).len(), 0);
        assert_eq!(look(&hot, false), hot, "nothing is held that need not be");
        assert_eq!(look(&hot, true).len(), 0);
        let cooled = look(&set(&[(10, 2)]), true);
        assert_eq!(cooled, set(&[(12, 3)]), "those that were not written any more");
        assert_eq!(pages.release(), set(&[(10, 2)]));
        assert!(pages.held().is_empty());
    }

    #[test]
    fn a_program_that_was_slowed_down_is_looked_at_anew() {
        let hot = set(&[(10, 5)]);
        let mut pages = HotPages::default();
        let mut sent = Vec::new();
        for look in 0..6 {
            if look == 5 {
                pages.begin_anew();
            }
            sent.push(pages.look(&hot, &hot, &set(&[(0, 100)]), true).len());
        }
        assert_eq!(sent, [5, 5, 5, 0, 0, 5]);
    }

    proptest! {
        /// Whatever is written: at every moment each page is clean at the destination, or sent now, or held; also when
        /// the last look is followed by the freeze instead of by a round.
        #[test]
        fn no_page_is_forgotten(looks in proptest::collection::vec(
            (proptest::collection::vec((0u64..60, 1u64..20), 0..6), proptest::bool::weighted(0.8)), 1..12)
        ) {
            let all = set(&[(0, 100)]);
            let mut pages = HotPages::default();
            // What the destination does not have in its last version.
            let mut stale = all.clone();
            let rounds = looks.len();
            for (round, (runs, hold)) in looks.into_iter().enumerate() {
                let dirty = set(&runs);
                stale = stale.union(&dirty);
                // What the engine asks for: the dirty and the never sent; what is held it knows from here.
                let due = stale.subtract(pages.held());
                let sent = pages.look(&due.union(&dirty), &dirty, &all, hold);
                if round + 1 == rounds {
                    pages.put_back(&sent);
                } else {
                    stale = stale.subtract(&sent);
                }
                prop_assert_eq!(&stale, pages.held());
            }
            let last = pages.release();
            prop_assert!(stale.subtract(&last).is_empty());
        }
    }
}
