//! What is owed, what of it came, and whether that is what was sent. Pure.

use crate::page_bits::PageBits;
use pageferry_tracker::Run;
use pageferry_wire_format::digest::SpaceDigest;
use pageferry_wire_format::{PageDigest, SpaceId};
use std::collections::BTreeMap;

/// Why late pages, or what is said of them, cannot be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum LateError {
    /// A page came that never was owed.
    #[error("page {page:#x} of space {} came late and was never owed", space.0)]
    NotOwed {
        /// Whose.
        space: SpaceId,
        /// Which.
        page: u64,
    },
    /// Something is said of a space of which nothing is owed.
    #[error("nothing of space {} is owed", .0.0)]
    Space(SpaceId),
    /// Not every space with owed pages was sealed.
    #[error("{sealed} spaces were sealed late, and pages of {owed} were owed")]
    Seals {
        /// Seals that came.
        sealed: usize,
        /// Spaces with owed pages.
        owed: usize,
    },
    /// What came is not what was sent.
    #[error("the late pages of space {} are not what the source sent", .0.0)]
    Differs(SpaceId),
}

/// Late pages of one space.
#[derive(Debug, Default)]
pub(crate) struct LateSpace {
    pub(crate) vpid: i32,
    /// All that was to come.
    all: PageBits,
    /// Still to come.
    pub(crate) owed: PageBits,
    /// Need not come any more; may be under way.
    pub(crate) unwanted: PageBits,
    /// That came.
    pub(crate) pages: u64,
    /// Digest over them.
    pub(crate) digest: SpaceDigest,
    seal: Option<(u64, SpaceDigest)>,
}

/// Pages of a batch that nobody was waiting for any more.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Needless {
    /// The program gave them back.
    pub(crate) unwanted: Vec<u64>,
    /// They have come before: a page that is waited for while it is under way is sent a second time, by the quicker way.
    pub(crate) repeated: Vec<u64>,
}

/// Late pages of all spaces.
#[derive(Debug, Default)]
pub(crate) struct LateBooks {
    spaces: BTreeMap<SpaceId, LateSpace>,
    all_sealed: bool,
}

impl LateBooks {
    /// Pages of a space will come late.
    pub(crate) fn owe(&mut self, space: SpaceId, vpid: i32, runs: impl Iterator<Item = Run>) {
        let owed: PageBits = runs.collect();
        if !owed.is_empty() {
            let all = owed.clone();
            self.spaces.insert(space, LateSpace { vpid, all, owed, ..LateSpace::default() });
        }
    }

    /// Spaces of which pages are or were owed.
    pub(crate) fn spaces(&self) -> impl Iterator<Item = (SpaceId, &LateSpace)> {
        self.spaces.iter().map(|(space, late)| (*space, late))
    }

    /// What is still to come of a space.
    pub(crate) fn owed(&self, space: SpaceId) -> PageBits {
        self.spaces.get(&space).map(|late| late.owed.clone()).unwrap_or_default()
    }

    /// Pages that are still to come.
    pub(crate) fn left(&self) -> u64 {
        self.spaces.values().map(|late| late.owed.len()).sum()
    }

    /// Pages that came.
    pub(crate) fn came(&self) -> u64 {
        self.spaces.values().map(|late| late.pages).sum()
    }

    /// A batch has come, and its pages are what it says. Each counts when it comes first.
    ///
    /// # Errors
    /// [`LateError::NotOwed`]; then none of the batch counts.
    pub(crate) fn arrive(
        &mut self,
        space: SpaceId,
        pages: &[(u64, PageDigest)],
    ) -> Result<Needless, LateError> {
        let late = self.spaces.get_mut(&space).ok_or(LateError::Space(space))?;
        if let Some((page, _)) = pages.iter().find(|(page, _)| !late.all.has(*page)) {
            return Err(LateError::NotOwed { space, page: *page });
        }
        let mut needless = Needless::default();
        for (page, digest) in pages {
            if !late.owed.remove(*page) {
                if !late.unwanted.remove(*page) {
                    needless.repeated.push(*page);
                    continue;
                }
                needless.unwanted.push(*page);
            }
            late.pages += 1;
            late.digest.insert(pageferry_wire_format::PageNo(*page), digest);
        }
        Ok(needless)
    }

    /// The program gave memory back. Gives the pages of it that were owed: they need not come.
    pub(crate) fn forget(&mut self, space: SpaceId, pages: &[Run]) -> Vec<Run> {
        let Some(late) = self.spaces.get_mut(&space) else { return Vec::new() };
        let gone: Vec<Run> = pages.iter().flat_map(|run| late.owed.remove_run(run.start, run.len)).collect();
        gone.iter().for_each(|run| late.unwanted.insert(run.start, run.len));
        gone
    }

    /// The source says what it has sent of a space.
    ///
    /// # Errors
    /// [`LateError::Space`].
    pub(crate) fn seal(&mut self, space: SpaceId, pages: u64, digest: SpaceDigest) -> Result<(), LateError> {
        self.spaces.get_mut(&space).ok_or(LateError::Space(space))?.seal = Some((pages, digest));
        Ok(())
    }

    /// The source has sealed so many spaces.
    ///
    /// # Errors
    /// [`LateError::Seals`].
    pub(crate) fn end_seals(&mut self, spaces: u32) -> Result<(), LateError> {
        let sealed = self.spaces.values().filter(|late| late.seal.is_some()).count();
        if sealed != spaces as usize || sealed != self.spaces.len() {
            return Err(LateError::Seals { sealed, owed: self.spaces.len() });
        }
        self.all_sealed = true;
        Ok(())
    }

    /// The source begins anew: it will seal again.
    pub(crate) fn reopen(&mut self) {
        self.all_sealed = false;
        self.spaces.values_mut().for_each(|late| late.seal = None);
    }

    /// Whether all is here, and is what was sent.
    ///
    /// # Errors
    /// [`LateError::Differs`].
    pub(crate) fn is_complete(&self) -> Result<bool, LateError> {
        if self.left() > 0 || !self.all_sealed {
            return Ok(self.spaces.is_empty());
        }
        for (space, late) in &self.spaces {
            match late.seal {
                Some((pages, _)) if pages > late.pages => return Ok(false),
                Some((pages, digest)) if (pages, digest) == (late.pages, late.digest) => {}
                _ => return Err(LateError::Differs(*space)),
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_wire_format::{PageNo, digest};

    const A: SpaceId = SpaceId(3);

    fn books() -> LateBooks {
        let mut books = LateBooks::default();
        books.owe(A, 7, [Run { start: 10, len: 4 }].into_iter());
        books.owe(SpaceId(4), 8, std::iter::empty());
        books
    }

    fn page(number: u64) -> (u64, PageDigest) {
        (number, digest::page(&[number as u8; 4096]))
    }

    fn sum(pages: &[u64]) -> SpaceDigest {
        let mut sum = SpaceDigest::default();
        pages.iter().for_each(|number| sum.insert(PageNo(*number), &page(*number).1));
        sum
    }

    #[test]
    fn it_is_complete_when_all_came_and_is_what_was_sent() {
        let mut books = books();
        assert_eq!(books.arrive(A, &[page(10), page(11)]), Ok(Needless::default()));
        books.seal(A, 4, sum(&[10, 11, 12, 13])).unwrap();
        books.end_seals(1).unwrap();
        assert_eq!(books.is_complete(), Ok(false), "two pages are under way");
        books.arrive(A, &[page(12), page(13)]).unwrap();
        assert_eq!((books.is_complete(), books.left(), books.came()), (Ok(true), 0, 4));
        books.reopen();
        assert_eq!(books.is_complete(), Ok(false), "the source has not said it again");
        books.seal(A, 4, sum(&[10, 11, 12])).unwrap();
        books.end_seals(1).unwrap();
        assert_eq!(books.is_complete(), Err(LateError::Differs(A)));
    }

    #[test]
    fn what_was_given_back_may_come_or_not() {
        let mut books = books();
        assert_eq!(books.forget(A, &[Run { start: 0, len: 12 }]), [Run { start: 10, len: 2 }]);
        let needless = Needless { unwanted: vec![11], repeated: vec![] };
        assert_eq!(books.arrive(A, &[page(11), page(12)]), Ok(needless), "it was under way");
        books.arrive(A, &[page(13)]).unwrap();
        books.seal(A, 3, sum(&[11, 12, 13])).unwrap();
        books.end_seals(1).unwrap();
        assert_eq!(books.is_complete(), Ok(true));
    }

    #[test]
    fn what_comes_twice_counts_once() {
        let mut books = books();
        books.forget(A, &[Run { start: 10, len: 1 }]);
        books.arrive(A, &[page(10), page(12)]).unwrap();
        let needless = Needless { unwanted: vec![], repeated: vec![10, 12] };
        assert_eq!(books.arrive(A, &[page(10), page(11), page(12), page(13)]), Ok(needless));
        books.seal(A, 4, sum(&[10, 11, 12, 13])).unwrap();
        books.end_seals(1).unwrap();
        assert_eq!((books.is_complete(), books.left(), books.came()), (Ok(true), 0, 4));
    }

    #[test]
    fn what_is_not_owed_is_refused_and_changes_nothing() {
        let mut books = books();
        assert_eq!(books.arrive(A, &[page(12), page(14)]), Err(LateError::NotOwed { space: A, page: 14 }));
        assert_eq!(books.arrive(SpaceId(9), &[page(1)]), Err(LateError::Space(SpaceId(9))));
        assert_eq!((books.left(), books.came()), (4, 0));
        assert_eq!(books.end_seals(1), Err(LateError::Seals { sealed: 0, owed: 1 }));
        assert_eq!(LateBooks::default().is_complete(), Ok(true), "nothing is owed");
    }
}
