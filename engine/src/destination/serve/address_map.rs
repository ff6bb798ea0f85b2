//! Where in a running program the pages of the store belong, after it moved and unmapped some of its memory.

use pageferry_wire_format::limits::MAX_PAGE_NO;
use std::collections::BTreeMap;

/// A piece of the program's address space: pages [start, start + len) hold those of the store from `origin` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) start: u64,
    pub(super) len: u64,
    pub(super) origin: u64,
}

/// The pieces of an address space. A page that is in no piece has lost its connection with the store: whatever the
/// program has there now reads as zero first.
#[derive(Clone, Debug)]
pub(super) struct AddressMap {
    /// Length and origin by start.
    pieces: BTreeMap<u64, (u64, u64)>,
}

impl AddressMap {
    /// Everything is where it was.
    pub(super) fn identity() -> Self {
        Self { pieces: BTreeMap::from([(0, (MAX_PAGE_NO, 0))]) }
    }

    /// The piece that holds `page`, from there on.
    pub(super) fn at(&self, page: u64) -> Option<Piece> {
        let (&start, &(len, origin)) = self.pieces.range(..=page).next_back()?;
        let into = page - start;
        (into < len).then(|| Piece { start: page, len: len - into, origin: origin + into })
    }

    /// The first piece at or behind `page`, without what is before `page`.
    pub(super) fn from(&self, page: u64) -> Option<Piece> {
        self.at(page).or_else(|| {
            let (&start, &(len, origin)) = self.pieces.range(page..).next()?;
            Some(Piece { start, len, origin })
        })
    }

    /// Where the store's page `origin` is in the program, and how many pages behind it are still together.
    pub(super) fn find(&self, origin: u64) -> Option<(u64, u64)> {
        self.pieces.iter().find_map(|(&start, &(len, from))| {
            let into = origin.checked_sub(from).filter(|&into| into < len)?;
            Some((start + into, len - into))
        })
    }

    /// Pages [start, end) are gone, or empty again. Gives the store's pages that no longer belong anywhere, as
    /// (first, count).
    pub(super) fn cut(&mut self, start: u64, end: u64) -> Vec<(u64, u64)> {
        self.take(start, end).into_iter().map(|piece| (piece.origin, piece.len)).collect()
    }

    /// `len` pages moved from `from` to `to`. Gives the store's pages that were at `to` and are overwritten.
    pub(super) fn shift(&mut self, from: u64, to: u64, len: u64) -> Vec<(u64, u64)> {
        let moved = self.take(from, from.saturating_add(len));
        let lost = self.cut(to, to.saturating_add(len));
        for piece in moved {
            self.pieces.insert(piece.start - from + to, (piece.len, piece.origin));
        }
        lost
    }

    fn take(&mut self, start: u64, end: u64) -> Vec<Piece> {
        let mut taken = Vec::new();
        while let Some(piece) = self.from(start).filter(|piece| piece.start < end) {
            let Some((&whole, &(len, origin))) = self.pieces.range(..=piece.start).next_back() else { break };
            self.pieces.remove(&whole);
            let (from, to) = (piece.start, end.min(whole + len));
            if whole < from {
                self.pieces.insert(whole, (from - whole, origin));
            }
            if to < whole + len {
                self.pieces.insert(to, (whole + len - to, origin + (to - whole)));
            }
            taken.push(Piece { start: from, len: to - from, origin: piece.origin });
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_move_takes_the_connection_along() {
        let mut map = AddressMap::identity();
        assert_eq!(map.shift(10, 100, 5), [(100, 5)]);
        assert_eq!(map.at(102), Some(Piece { start: 102, len: 3, origin: 12 }));
        assert_eq!((map.at(10), map.at(14)), (None, None));
        assert_eq!(map.at(15).unwrap().origin, 15);
        assert_eq!(map.find(12), Some((102, 3)));
        assert_eq!(map.find(102), None);
        assert_eq!(map.cut(0, 1000).iter().map(|r| r.1).sum::<u64>(), 1000 - 5);
        assert_eq!(map.from(0).unwrap().start, 1000);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Cut(u64, u64),
        Shift(u64, u64, u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..60u64, 0..20u64).prop_map(|(at, len)| Step::Cut(at, at + len)),
            (0..30u64, 30..60u64, 1..15u64).prop_map(|(a, b, len)| Step::Shift(a, b + 15, len)),
            (0..30u64, 30..60u64, 1..15u64).prop_map(|(a, b, len)| Step::Shift(b, a, len.min(b - a))),
        ]
    }

    proptest! {
        #[test]
        fn agrees_with_a_page_by_page_model(steps in proptest::collection::vec(step(), 0..20)) {
            let mut map = AddressMap::identity();
            let mut model: Vec<Option<u64>> = (0..100).map(Some).collect();
            for step in steps {
                let mut lost: Vec<u64>;
                let expected: Vec<u64>;
                let cut = match step {
                    Step::Cut(start, end) => {
                        expected = model[start as usize..end as usize].iter_mut().filter_map(Option::take).collect();
                        map.cut(start, end)
                    }
                    Step::Shift(from, to, len) => {
                        let moved: Vec<_> =
                            model[from as usize..(from + len) as usize].iter_mut().map(Option::take).collect();
                        let target = &mut model[to as usize..(to + len) as usize];
                        expected = target.iter_mut().filter_map(Option::take).collect();
                        target.copy_from_slice(&moved);
                        map.shift(from, to, len)
                    }
                };
                lost = cut.into_iter().flat_map(|(first, count)| first..first + count).collect();
                lost.sort_unstable();
                let mut expected = expected;
                expected.sort_unstable();
                prop_assert_eq!(lost, expected);
            }
            for (page, origin) in model.iter().enumerate() {
                let page = page as u64;
                prop_assert_eq!(map.at(page).map(|piece| piece.origin), *origin);
                if let Some(origin) = origin {
                    prop_assert_eq!(map.find(*origin).map(|found| found.0), Some(page));
                }
            }
        }
    }
}
