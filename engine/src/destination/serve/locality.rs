//! Where the background is wanted first: around pages at which the program touches one after the other.

use std::collections::VecDeque;

/// Waits that are remembered: as many places may a program go through at the same time.
const REMEMBERED: usize = 64;

/// Two waits with no more pages between them belong together. As many pages, aligned, are put in place at once.
pub(super) const WINDOW: u64 = 64;

/// The waits of a program that belong together.
///
/// A program that touches pages here and there gains nothing from their neighbours, and loses by them: the background would go through
/// its memory as it does, here and there, and the store could give none of its own back, which lies in pieces of 2 MiB, until nearly
/// all of it is in place: for a program of 4 GiB the two took 6 together.
#[derive(Debug, Default)]
pub(super) struct Locality {
    recent: VecDeque<u64>,
    near: Option<u64>,
}

impl Locality {
    /// The program has waited for this page.
    pub(super) fn waited(&mut self, page: u64) {
        if self.recent.iter().any(|recent| recent.abs_diff(page) <= WINDOW) {
            self.near = Some(page);
        }
        if self.recent.len() == REMEMBERED {
            self.recent.pop_front();
        }
        self.recent.push_back(page);
    }

    /// The pages that are wanted next, as (from, to).
    pub(super) fn window(&self) -> Option<(u64, u64)> {
        let start = self.near? / WINDOW * WINDOW;
        Some((start, start + WINDOW))
    }

    /// All of the window is there.
    pub(super) fn is_filled(&mut self) {
        self.near = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_wait_of_a_row_has_its_neighbours_come_also_where_there_are_many_rows() {
        let mut locality = Locality::default();
        for row in 0..REMEMBERED as u64 {
            locality.waited(row * 10_000 + 5);
            assert_eq!(locality.window(), None);
        }
        locality.waited(6);
        assert_eq!(locality.window(), Some((0, 64)));
        locality.is_filled();
        assert_eq!(locality.window(), None);
        // Also backwards, and over the window's edge.
        locality.waited(10_000 - 20);
        assert_eq!(locality.window(), Some((9_920, 9_984)));
    }

    #[test]
    fn waits_here_and_there_do_not() {
        let mut locality = Locality::default();
        let (mut at, mut wanted) = (1u64, 0);
        for _ in 0..10_000 {
            at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            locality.waited((at >> 33) % (1 << 20));
            wanted += u64::from(locality.window().is_some());
            locality.is_filled();
        }
        assert!(wanted < 200, "{wanted} of 10000");
    }
}
