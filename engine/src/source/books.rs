//! The source's books: what the destination holds, page by page, and so how each page has to travel. One for all workers,
//! behind a lock that is held for the looks, not for the reading, hashing and compressing.

use super::deltas::DeltaCache;
use super::relatives::Relatives;
use super::sent::SentPages;
use super::twins::Twins;
use crate::policy::memory::Savings;
use pageferry_tracker::PageSet;
use pageferry_wire_format::delta::{self, Page};
use pageferry_wire_format::{PageDigest, PageNo, PageRef, PageRun, SpaceId, digest};
use std::collections::BTreeMap;

/// A delta that is longer than this is not worth one: half a page, after which zstd or the link itself is as good.
const LONGEST_DELTA: usize = size_of::<Page>() / 2;

/// How a page travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// The destination has it as it is.
    Unchanged,
    /// As a mark.
    Zero,
    /// The destination copies another page that it holds.
    Copy(PageRef),
    /// As what differs from a base: these bytes of the deltas.
    Delta(Base, usize, usize),
    /// Whole, or compressed on top of a base, whose bytes were appended to the bases, from here on.
    OnBase(Base, usize),
    /// Perhaps as what differs from a base in another process, whose bytes have to be read there first; else whole.
    Beside(Base),
    /// Whole.
    Whole,
}

/// What a page can be coded on top of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Base {
    /// Where the destination has it.
    pub(crate) at: PageRef,
    /// What it has there.
    pub(crate) content: PageDigest,
}

/// What one look at a page needs to know.
pub(crate) struct Look<'a> {
    pub(crate) space: SpaceId,
    pub(crate) page: u64,
    pub(crate) bytes: &'a Page,
    pub(crate) content: PageDigest,
    pub(crate) zero: bool,
    pub(crate) round: u32,
    /// Most pages are sent for the first time, and say nothing by it.
    pub(crate) passes: bool,
    /// Nothing is sent again after this: there is no point in keeping bytes.
    pub(crate) last: bool,
    /// The link is what takes the time: bytes that are sent for the first time may be kept, too.
    pub(crate) idle: bool,
}

/// Where the bytes go that a page travels with instead of its own.
#[derive(Default)]
pub(crate) struct Output {
    pub(crate) deltas: Vec<u8>,
    pub(crate) bases: Vec<u8>,
}

impl Output {
    /// Codes a page on top of a base.
    pub(crate) fn code(&mut self, base: Base, base_bytes: &Page, bytes: &Page) -> Fate {
        let start = self.deltas.len();
        if delta::encode(base_bytes, bytes, &mut self.deltas) <= LONGEST_DELTA {
            return Fate::Delta(base, start, self.deltas.len());
        }
        self.deltas.truncate(start);
        let start = self.bases.len();
        self.bases.extend_from_slice(base_bytes);
        Fate::OnBase(base, start)
    }

    /// Codes a page on top of one of another process, from which it may differ in everything: then it goes whole.
    pub(crate) fn code_beside(&mut self, base: Base, base_bytes: &Page, bytes: &Page) -> Fate {
        let (deltas, bases) = (self.deltas.len(), self.bases.len());
        match self.code(base, base_bytes, bytes) {
            Fate::OnBase(..) => {
                self.deltas.truncate(deltas);
                self.bases.truncate(bases);
                Fate::Whole
            }
            fate => fate,
        }
    }
}

/// The books.
#[derive(Default)]
pub(crate) struct Books {
    spaces: BTreeMap<SpaceId, SentPages>,
    cache: DeltaCache,
    twins: Twins,
    relatives: Relatives,
    /// Only whole pages travel: without deltas and copies.
    plain: bool,
}

impl Books {
    /// Pages travel whole (raw or by zstd), and nothing is kept for deltas.
    pub(crate) fn set_plain(&mut self) {
        self.plain = true;
    }

    /// What the destination holds of a space.
    pub(crate) fn space(&mut self, space: SpaceId) -> &mut SentPages {
        self.spaces.entry(space).or_default()
    }

    /// The destination has kept this page from before: it is one of [`SpaceId::KEPT`], from which can be copied.
    pub(crate) fn enter_kept(&mut self, page: u64, content: PageDigest) {
        self.space(SpaceId::KEPT).insert(page, content);
    }

    /// A space is gone.
    pub(crate) fn forget(&mut self, space: SpaceId) {
        self.spaces.remove(&space);
        self.cache.forget(space);
        self.relatives.forget(space);
    }

    /// The destination has everything that was sent so far.
    pub(crate) fn settle(&mut self) {
        self.spaces.values_mut().for_each(SentPages::settle);
    }

    /// The link was lost: forgets what may not have arrived, and gives it. No page is made of one that is forgotten, because what
    /// a page can be made of is looked up here.
    pub(crate) fn forget_doubted(&mut self) -> BTreeMap<SpaceId, PageSet> {
        let spaces = self.spaces.iter_mut().filter(|(space, _)| **space != SpaceId::KEPT);
        spaces.map(|(space, sent)| (*space, sent.forget_doubted())).collect()
    }

    /// The tree has `pages` pages in `processes` processes, and what saves bytes on the wire may take so many of memory.
    /// Says whether something was thrown away for it.
    pub(crate) fn make_room(&mut self, pages: u64, processes: usize, savings: Savings) -> bool {
        if self.plain {
            return false;
        }
        let had = self.twins.bytes();
        let shrunk = self.cache.set_budget(savings.cache);
        let kept = self.spaces.get(&SpaceId::KEPT).map_or(0, SentPages::len);
        if self.twins.reserve(pages + kept, processes > 1 || kept > 0, savings.twins) {
            self.enter_all();
        }
        shrunk || self.twins.bytes() < had
    }

    /// Enters everything that the destination holds into a table that is new.
    fn enter_all(&mut self) {
        let Self { spaces, twins, .. } = self;
        for (space, sent) in spaces {
            sent.each(|page, content| twins.enter(content, *space, page));
        }
    }

    /// Enters a page that is about to be sent, and says how. `in_hand` gives the bytes of a page that was looked at in
    /// the same batch before, if it was; `stays` says whether a page that the destination has is not sent anew in this round.
    pub(crate) fn enter<'a>(
        &mut self,
        look: &Look<'_>,
        out: &mut Output,
        in_hand: impl Fn(SpaceId, u64) -> Option<&'a Page>,
        stays: impl Fn(SpaceId, u64) -> bool,
    ) -> Fate {
        let Look { space, page, bytes, content, zero, round, passes, last, idle } = *look;
        let sent = self.spaces.entry(space).or_default();
        let before = sent.insert(page, content);
        if before == Some(content) {
            return Fate::Unchanged;
        }
        if zero {
            return Fate::Zero;
        }
        if self.plain {
            return Fate::Whole;
        }
        let mut fate = Fate::Whole;
        if self.twins.is_of_interest(&content) {
            let spaces = &self.spaces;
            let there = |of: SpaceId, at: u64| {
                (of, at) != (space, page)
                    && spaces.get(&of).and_then(|sent| sent.get(at)) == Some(&content)
                    // Equal digests are believed, but where both pages are at hand there is no need to.
                    && in_hand(of, at).is_none_or(|other| other == bytes)
            };
            match self.twins.find(&content, there) {
                Some((of, at)) => {
                    fate = Fate::Copy(PageRef { space: of, page: PageNo(at) });
                    if self.twins.lay_out() {
                        self.enter_all();
                    }
                }
                None => self.twins.enter(&content, space, page),
            }
        }
        if fate == Fate::Whole
            && let Some(before) = before
            && let Some(bytes_before) = self.cache.base(space, page, &before)
        {
            let base = Base { at: PageRef { space, page: PageNo(page) }, content: before };
            fate = out.code(base, bytes_before, bytes);
        }
        if fate == Fate::Whole
            && let Some((of, content)) = self.beside(space, page, stays)
        {
            fate = Fate::Beside(Base { at: PageRef { space: of, page: PageNo(page) }, content });
        }
        match before {
            _ if last => {}
            // The page is sent a second time at least: from now on its bytes are worth keeping. So are those of one that is sent
            // for the first time when all others were: it is new, or was written again before its turn came.
            Some(_) => self.cache.keep(space, page, bytes, content, round),
            None if !passes => self.cache.keep(space, page, bytes, content, round),
            None if idle => self.cache.keep_first(space, page, bytes, content, round),
            None => {}
        }
        fate
    }

    /// The page at the same address of another process, which this one may differ little from, and what the destination has of it.
    fn beside(
        &mut self,
        space: SpaceId,
        page: u64,
        stays: impl Fn(SpaceId, u64) -> bool,
    ) -> Option<(SpaceId, PageDigest)> {
        let Self { spaces, relatives, .. } = self;
        if spaces.len() == 1 {
            return None;
        }
        let has = |of: SpaceId| {
            let content = *spaces.get(&of)?.get(page)?;
            (content != digest::ZERO_PAGE && stays(of, page)).then_some((of, content))
        };
        let others = spaces.keys().copied().filter(|of| *of != space && *of != SpaceId::KEPT);
        relatives.choose(space, others, has)
    }

    /// Of so many pages that were compared with those of other processes, so many differed little.
    pub(crate) fn compared(&mut self, space: SpaceId, of: SpaceId, pages: u64, worth: u64) {
        self.relatives.note(space, of, pages, worth);
    }

    /// The destination could not make these pages of what it was sent: they count as never sent. Gives their number, or
    /// `None`, and takes nothing back, when they are more than it was given: what a peer says is not gone through page by
    /// page before it is known to be possible.
    pub(crate) fn take_back(&mut self, space: SpaceId, runs: &[PageRun]) -> Option<u64> {
        let asked = runs.iter().fold(0u64, |sum, run| sum.saturating_add(run.len));
        if asked > self.spaces.get(&space).map_or(0, SentPages::len) {
            return None;
        }
        for page in runs.iter().flat_map(PageRun::pages) {
            let Some(sent) = self.spaces.get_mut(&space) else { break };
            let content = sent.get(page).copied();
            sent.remove(page);
            // Perhaps it was a copy of a page that was kept, and is damaged there: it is not copied again.
            if let Some(content) = content
                && let Some(kept) = self.spaces.get_mut(&SpaceId::KEPT)
                && let Some((_, at)) =
                    self.twins.find(&content, |of, at| of == SpaceId::KEPT && kept.get(at) == Some(&content))
            {
                kept.remove(at);
            }
        }
        Some(asked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: SpaceId = SpaceId(0);
    const SAVINGS: Savings = Savings { twins: u64::MAX, cache: 1 << 20 };
    const SEVEN: PageRun = PageRun { start: PageNo(7), len: 1 };
    const B: SpaceId = SpaceId(1);

    struct Bench {
        books: Books,
        out: Output,
    }

    impl Bench {
        fn new() -> Self {
            let mut books = Books::default();
            books.make_room(1000, 2, SAVINGS);
            Self { books, out: Output::default() }
        }

        fn send(&mut self, space: SpaceId, page: u64, bytes: &Page, round: u32) -> Fate {
            let zero = digest::is_zero(bytes);
            let content = if zero { digest::ZERO_PAGE } else { digest::page(bytes) };
            let look = Look {
                space,
                page,
                bytes,
                content,
                zero,
                round,
                passes: round == 0,
                last: false,
                idle: false,
            };
            self.books.enter(&look, &mut self.out, |_, _| None, |_, _| true)
        }
    }

    fn noise(seed: u64) -> Page {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        std::array::from_fn(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
    }

    #[test]
    fn a_page_goes_once_and_then_only_what_is_new() {
        let mut bench = Bench::new();
        let mut page = noise(1);
        assert_eq!(bench.send(A, 7, &page, 0), Fate::Whole);
        assert_eq!(bench.send(A, 7, &page, 1), Fate::Unchanged);
        page[100] ^= 1;
        let second = digest::page(&page);
        assert_eq!(bench.send(A, 7, &page, 2), Fate::Whole, "what was sent once was not kept");
        page[100] ^= 3;
        let own = |content| Base { at: PageRef { space: A, page: PageNo(7) }, content };
        let len = bench.out.deltas.len();
        assert_eq!(bench.send(A, 7, &page, 3), Fate::Delta(own(second), len, bench.out.deltas.len()));
        assert!(bench.out.deltas.len() < 40 && bench.out.bases.is_empty());
        let third = digest::page(&page);
        assert_eq!(bench.send(A, 7, &noise(2), 4), Fate::OnBase(own(third), 0));
        assert_eq!(bench.out.bases, page);
        assert_eq!(bench.send(A, 7, &[0; 4096], 5), Fate::Zero);
    }

    #[test]
    fn while_the_link_takes_the_time_the_second_sending_is_a_delta() {
        let mut bench = Bench::new();
        let mut page = noise(1);
        let first = digest::page(&page);
        let look = Look {
            space: A,
            page: 7,
            bytes: &page,
            content: first,
            zero: false,
            round: 0,
            passes: true,
            last: false,
            idle: true,
        };
        assert_eq!(bench.books.enter(&look, &mut bench.out, |_, _| None, |_, _| true), Fate::Whole);
        page[100] ^= 1;
        let base = Base { at: PageRef { space: A, page: PageNo(7) }, content: first };
        assert!(matches!(bench.send(A, 7, &page, 1), Fate::Delta(on, ..) if on == base));
    }

    #[test]
    fn equal_pages_are_sent_once_as_long_as_the_other_one_is_there() {
        let mut bench = Bench::new();
        let page = noise(1);
        let at = |space, page| Fate::Copy(PageRef { space, page: PageNo(page) });
        bench.send(A, 7, &page, 0);
        assert_eq!(bench.send(B, 7, &page, 0), at(A, 7));
        assert_eq!(bench.send(A, 8, &page, 0), at(A, 7));
        bench.send(A, 7, &noise(2), 1);
        assert_eq!(bench.send(B, 9, &page, 1), Fate::Whole, "only the first of equal pages is remembered");
        assert_eq!(bench.send(B, 10, &page, 1), at(B, 9));
        bench.books.forget(B);
        assert_eq!(bench.send(A, 11, &page, 2), Fate::Whole);
    }

    #[test]
    fn a_page_of_a_child_is_compared_with_its_parents_as_long_as_that_pays() {
        let mut bench = Bench::new();
        let page = noise(1);
        bench.send(A, 7, &page, 0);
        let mut changed = page;
        changed[100] ^= 1;
        let base = Base { at: PageRef { space: A, page: PageNo(7) }, content: digest::page(&page) };
        assert_eq!(bench.send(B, 7, &changed, 0), Fate::Beside(base));
        assert!(matches!(bench.out.code_beside(base, &page, &changed), Fate::Delta(..)));
        assert_eq!(bench.out.code_beside(base, &page, &noise(2)), Fate::Whole, "nothing of it is the same");
        assert!(bench.out.bases.is_empty());
        assert_eq!(
            bench.send(B, 8, &changed, 0),
            Fate::Copy(PageRef { space: B, page: PageNo(7) }),
            "the same is better than alike"
        );
        let look = Look {
            space: B,
            page: 7,
            bytes: &noise(3),
            content: digest::page(&noise(3)),
            zero: false,
            round: 1,
            passes: false,
            last: false,
            idle: false,
        };
        let fate = bench.books.enter(&look, &mut bench.out, |_, _| None, |of, _| of != A);
        assert_eq!(
            fate,
            Fate::Whole,
            "the parent's page is sent anew in this round: it may come before or after"
        );
        bench.send(A, 9, &[0; 4096], 1);
        assert_eq!(bench.send(B, 9, &noise(4), 1), Fate::Whole, "zeros are no base");
        // Nothing was found to be alike for a long time.
        bench.books.compared(B, A, 100_000, 3);
        let mut asked = 0;
        for n in 0..320 {
            bench.send(A, 1000 + n, &noise(1000 + n), 2);
            asked += u64::from(matches!(bench.send(B, 1000 + n, &noise(5000 + n), 2), Fate::Beside(_)));
        }
        assert!((10..40).contains(&asked), "{asked}");
    }

    #[test]
    fn equal_digests_are_not_believed_against_the_bytes() {
        let mut bench = Bench::new();
        let (page, other) = (noise(1), noise(2));
        let content = digest::page(&page);
        let look = |page, bytes| Look {
            space: A,
            page,
            bytes,
            content,
            zero: false,
            round: 0,
            passes: true,
            last: false,
            idle: false,
        };
        assert_eq!(bench.books.enter(&look(1, &page), &mut bench.out, |_, _| None, |_, _| true), Fate::Whole);
        // The bytes of another page under the same digest: what a collision would be.
        let fate = bench.books.enter(
            &look(2, &other),
            &mut bench.out,
            |_, at| (at == 1).then_some(&page),
            |_, _| true,
        );
        assert_eq!(fate, Fate::Whole);
    }

    #[test]
    fn what_is_asked_for_again_is_sent_whole() {
        let mut bench = Bench::new();
        let page = noise(1);
        bench.send(A, 7, &page, 0);
        assert!(matches!(bench.send(B, 7, &page, 0), Fate::Copy(_)));
        bench.books.take_back(A, &[SEVEN]);
        bench.books.take_back(B, &[SEVEN]);
        let before = (bench.books.space(A).len(), bench.books.space(B).len());
        assert_eq!(before, (0, 0));
        assert_eq!(bench.send(B, 7, &page, 1), Fate::Whole);
    }

    #[test]
    fn what_may_not_have_arrived_is_sent_anew_and_is_the_base_of_nothing() {
        let mut bench = Bench::new();
        let (page, mut other) = (noise(1), noise(2));
        let at = |space, page| Fate::Copy(PageRef { space, page: PageNo(page) });
        bench.send(A, 7, &page, 0);
        bench.send(A, 8, &other, 0);
        other[100] ^= 1;
        bench.send(A, 8, &other, 0);
        bench.books.settle();
        other[100] ^= 3;
        assert!(matches!(bench.send(A, 8, &other, 1), Fate::Delta(..)));
        assert_eq!(bench.send(B, 9, &noise(3), 1), Fate::Whole);
        let doubted = bench.books.forget_doubted();
        let runs = |space| doubted[&space].runs().iter().map(|run| (run.start, run.len)).collect::<Vec<_>>();
        assert_eq!((runs(A), runs(B)), (vec![(8, 1)], vec![(9, 1)]));
        assert_eq!(bench.send(A, 7, &page, 2), Fate::Unchanged, "it had arrived");
        assert_eq!(bench.send(A, 20, &page, 2), at(A, 7), "and can be copied");
        assert_eq!(bench.send(A, 8, &other, 2), Fate::Whole, "not on top of what may not be there");
        assert_eq!(bench.send(B, 21, &noise(3), 2), Fate::Whole, "nor copied from it");
        assert_eq!(bench.send(B, 9, &noise(3), 2), at(B, 21));
    }

    #[test]
    fn what_the_destination_kept_is_copied_until_it_says_that_it_is_not_there() {
        let mut books = Books::default();
        let page = noise(1);
        books.enter_kept(77, digest::page(&page));
        books.make_room(1000, 1, SAVINGS);
        let mut bench = Bench { books, out: Output::default() };
        let kept = Fate::Copy(PageRef { space: SpaceId::KEPT, page: PageNo(77) });
        assert_eq!(bench.send(A, 7, &page, 0), kept);
        assert_eq!(bench.send(A, 8, &noise(2), 0), Fate::Whole);
        bench.books.take_back(A, &[SEVEN]);
        assert_eq!(bench.send(A, 7, &page, 1), Fate::Whole, "it is not asked for again and again");
    }

    #[test]
    fn a_peer_that_asks_for_more_than_it_was_given_is_not_believed() {
        let mut bench = Bench::new();
        bench.send(A, 7, &noise(1), 0);
        let endless = PageRun { start: PageNo(0), len: 1 << 51 };
        assert_eq!(bench.books.take_back(A, &[endless, endless]), None);
        assert_eq!(bench.books.take_back(B, &[SEVEN]), None, "nothing was sent of this space");
        assert_eq!(bench.books.space(A).len(), 1);
        assert_eq!(bench.books.take_back(A, &[SEVEN]), Some(1));
    }

    #[test]
    fn plain_is_plain() {
        let mut bench = Bench::new();
        bench.books.set_plain();
        let mut page = noise(1);
        for round in 0..4 {
            page[0] ^= 1;
            assert_eq!(bench.send(A, 1, &page, round), Fate::Whole);
        }
        assert_eq!(bench.send(B, 1, &page, 4), Fate::Whole);
    }
}
