//! The bytes that were last sent of pages that are likely to be dirty again, so that these can be sent as what differs.
//!
//! A page gets in when it is sent a second time: most pages of a program are sent once, and those that were written twice
//! are written again. So does one that was not sent when most were for the first time. Where there is room a page gets in
//! when it is sent first, and leaves for any of those. The others leave when they were not sent for some rounds and another one
//! wants their place. An entry counts only while its digest is that of what the destination has.

use pageferry_wire_format::{PageDigest, SpaceId, delta::Page};
use std::collections::HashMap;

/// Rounds without being sent, after which a page has to make room.
const PATIENCE: u32 = 4;
/// What an entry takes besides its bytes, about: digest, round, key, and the table's slack.
const OVERHEAD: u64 = 128;

struct Entry {
    bytes: Box<Page>,
    digest: PageDigest,
    round: u32,
    /// It was sent once.
    once: bool,
}

/// The cache, under a budget of bytes.
#[derive(Default)]
pub(crate) struct DeltaCache {
    room: usize,
    pages: HashMap<(SpaceId, u64), Entry>,
    /// Those that were sent once when they got in.
    once: Vec<(SpaceId, u64)>,
    /// The round in which it was looked for room last: once a round is enough.
    cleared: u32,
}

impl DeltaCache {
    /// What the cache may take, in bytes. 0 turns it off. Says whether pages were thrown away for it.
    pub(crate) fn set_budget(&mut self, bytes: u64) -> bool {
        self.room = usize::try_from(bytes / (4096 + OVERHEAD)).unwrap_or(usize::MAX);
        let excess = self.pages.len().saturating_sub(self.room);
        if excess > 0 {
            let out: Vec<_> = self.pages.keys().take(excess).copied().collect();
            out.iter().for_each(|page| drop(self.pages.remove(page)));
            let pages = &self.pages;
            self.once.retain(|page| pages.contains_key(page));
            self.pages.shrink_to_fit();
            self.once.shrink_to_fit();
        }
        excess > 0
    }

    /// The bytes with this digest that were sent of a page, if they are here.
    pub(crate) fn base(&self, space: SpaceId, page: u64, digest: &PageDigest) -> Option<&Page> {
        let entry = self.pages.get(&(space, page))?;
        (entry.digest == *digest).then_some(&*entry.bytes)
    }

    /// A page was sent with these bytes for the first time, and there is time to keep them.
    pub(crate) fn keep_first(
        &mut self,
        space: SpaceId,
        page: u64,
        bytes: &Page,
        digest: PageDigest,
        round: u32,
    ) {
        if self.pages.len() < self.room {
            let entry = Entry { bytes: Box::new(*bytes), digest, round, once: true };
            self.pages.insert((space, page), entry);
            self.once.push((space, page));
        }
    }

    /// A page was sent with these bytes, and not for the first time.
    pub(crate) fn keep(&mut self, space: SpaceId, page: u64, bytes: &Page, digest: PageDigest, round: u32) {
        if let Some(entry) = self.pages.get_mut(&(space, page)) {
            entry.bytes.copy_from_slice(bytes);
            (entry.digest, entry.round, entry.once) = (digest, round, false);
            return;
        }
        if self.pages.len() >= self.room && !self.drop_one_of_once() {
            if self.room == 0 || self.cleared == round {
                return;
            }
            self.cleared = round;
            self.pages.retain(|_, entry| entry.round + PATIENCE > round);
            if self.pages.len() >= self.room {
                return;
            }
        }
        let entry = Entry { bytes: Box::new(*bytes), digest, round, once: false };
        self.pages.insert((space, page), entry);
    }

    /// Makes room for a page by another one that was sent only once, if there is one.
    fn drop_one_of_once(&mut self) -> bool {
        while let Some(page) = self.once.pop() {
            if self.pages.get(&page).is_some_and(|entry| entry.once) {
                self.pages.remove(&page);
                return self.pages.len() < self.room;
            }
        }
        false
    }

    /// A space is gone.
    pub(crate) fn forget(&mut self, space: SpaceId) {
        self.pages.retain(|(of, _), _| *of != space);
        self.once.retain(|(of, _)| *of != space);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_wire_format::digest;

    const SPACE: SpaceId = SpaceId(3);

    #[test]
    fn only_what_the_destination_has_is_a_base() {
        let mut cache = DeltaCache::default();
        cache.set_budget(1 << 20);
        let (one, two) = ([1; 4096], [2; 4096]);
        let (first, second) = (digest::page(&one), digest::page(&two));
        cache.keep(SPACE, 7, &one, first, 1);
        assert_eq!(cache.base(SPACE, 7, &first), Some(&one));
        assert_eq!(cache.base(SPACE, 7, &second), None, "other bytes were sent since");
        assert_eq!(cache.base(SpaceId(4), 7, &first), None);
        cache.keep(SPACE, 7, &two, second, 2);
        assert_eq!(cache.base(SPACE, 7, &second), Some(&two));
        cache.forget(SPACE);
        assert_eq!(cache.base(SPACE, 7, &second), None);
    }

    #[test]
    fn what_was_sent_once_fills_the_room_and_leaves_it_to_what_was_sent_twice() {
        let mut cache = DeltaCache::default();
        let bytes = [9; 4096];
        let digest = digest::page(&bytes);
        cache.keep_first(SPACE, 1, &bytes, digest, 0);
        assert!(cache.base(SPACE, 1, &digest).is_none(), "off");
        cache.set_budget(10 * (4096 + OVERHEAD));
        (0..20).for_each(|page| cache.keep_first(SPACE, page, &bytes, digest, 0));
        let held = |cache: &DeltaCache, page| cache.base(SPACE, page, &digest).is_some();
        assert!((0..10).all(|page| held(&cache, page)) && !held(&cache, 10));
        cache.keep(SPACE, 9, &bytes, digest, 1);
        (30..39).for_each(|page| cache.keep(SPACE, page, &bytes, digest, 1));
        assert!(held(&cache, 9) && (30..39).all(|page| held(&cache, page)), "sent twice");
        assert!((0..9).all(|page| !held(&cache, page)));
        cache.keep(SPACE, 50, &bytes, digest, 2);
        assert!(!held(&cache, 50) && held(&cache, 9), "there is nothing left to leave");
        assert!(cache.pages.len() <= 10 && cache.once.is_empty());
    }

    #[test]
    fn the_budget_holds_and_what_is_hot_stays() {
        let mut cache = DeltaCache::default();
        let bytes = [9; 4096];
        let digest = digest::page(&bytes);
        cache.keep(SPACE, 1, &bytes, digest, 1);
        assert!(cache.base(SPACE, 1, &digest).is_none(), "off");
        cache.set_budget(10 * (4096 + OVERHEAD));
        for page in 0..20 {
            cache.keep(SPACE, page, &bytes, digest, 1);
        }
        let held = |cache: &DeltaCache| {
            (0..40).filter(|page| cache.base(SPACE, *page, &digest).is_some()).collect::<Vec<_>>()
        };
        assert_eq!(held(&cache), (0..10).collect::<Vec<_>>());
        for round in 2..=PATIENCE + 1 {
            cache.keep(SPACE, 3, &bytes, digest, round);
            cache.keep(SPACE, 20 + u64::from(round), &bytes, digest, round);
        }
        assert_eq!(held(&cache), [3, 20 + u64::from(PATIENCE) + 1], "the others were not sent for too long");
        cache.set_budget(4096 + OVERHEAD);
        assert_eq!(held(&cache).len(), 1, "a smaller budget takes no more than it must");
    }
}
