//! How far beyond a mapping its registration has to go.
//!
//! The program runs while its new mappings are registered, and what was read of them a moment ago may be other than they
//! are. The kernel registers addresses, and where only a part of a mapping lies in them it cuts the mapping in two. A
//! program does not see that, but for one call: `mremap` of a stretch in two mappings fails with EFAULT. So one that grew its
//! mapping a moment before we registered the old part of it would fail where it never fails alone. Therefore a
//! registration covers the holes on both sides, and the neighbours with theirs: a mapping that grew, moved or came in between
//! lies in it as a whole. It ends at a mapping that must not be registered, or some mappings further on.

use crate::page_set::PageSet;
use std::ops::Range;

/// So many neighbours on either side: a program would have to unmap them all, and to map something across the last, while
/// we go from reading the mappings to registering. The kernel takes some 50 ns for each that is registered already.
const NEIGHBOURS: usize = 32;

/// A mapping, as far as it matters here.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// First address.
    pub(crate) start: u64,
    /// One past the last.
    pub(crate) end: u64,
    /// Whether it shall be registered.
    pub(crate) watched: bool,
}

/// What is registered at once.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Reach {
    /// First address.
    pub(crate) low: u64,
    /// One past the last.
    pub(crate) high: u64,
    /// The mappings in it, all of them watched, new or not: indices.
    pub(crate) places: Range<usize>,
}

/// The addresses of the mappings `within` (all of them watched), and of the holes around them.
pub(crate) fn with_holes(places: &[Place], within: Range<usize>) -> Reach {
    let low = within.start.checked_sub(1).map_or(places[within.start].start, |before| places[before].end);
    let high = places.get(within.end).map_or(places[within.end - 1].end, |behind| behind.start);
    Reach { low, high, places: within }
}

/// What has to be registered so that the pages `new` are, of which all in watched mappings count.
pub(crate) fn reaches(places: &[Place], new: &PageSet) -> Vec<Reach> {
    let mut merged: Vec<Range<usize>> = Vec::new();
    let mut first = 0;
    while first < places.len() {
        if !places[first].watched {
            first += 1;
            continue;
        }
        let group = places[first..].iter().take_while(|place| place.watched).count();
        let group = first..first + group;
        for index in group.clone().filter(|&index| is_new(places[index], new)) {
            let from = index.saturating_sub(NEIGHBOURS).max(group.start);
            let to = (index + 1 + NEIGHBOURS).min(group.end);
            match merged.last_mut() {
                Some(last) if last.end >= from && last.start >= group.start => last.end = to,
                _ => merged.push(from..to),
            }
        }
        first = group.end;
    }
    merged.into_iter().map(|within| with_holes(places, within)).collect()
}

/// Whether any page of it is among the new ones.
pub(crate) fn is_new(place: Place, new: &PageSet) -> bool {
    let (start, end) = (place.start / 4096, place.end / 4096);
    let runs = new.runs();
    runs.get(runs.partition_point(|run| run.end() <= start)).is_some_and(|run| run.start < end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page_set::Run;
    use proptest::prelude::*;

    fn place(start: u64, end: u64, watched: bool) -> Place {
        Place { start: start * 4096, end: end * 4096, watched }
    }

    fn pages(runs: &[(u64, u64)]) -> PageSet {
        runs.iter().map(|&(start, len)| Run { start, len }).collect()
    }

    #[test]
    fn it_covers_the_neighbours_and_the_holes_up_to_what_must_not_be_registered() {
        let places = [
            place(1, 2, false),
            place(10, 12, true),
            place(20, 22, true),
            place(22, 23, true),
            place(30, 31, false),
            place(40, 41, true),
        ];
        assert_eq!(
            reaches(&places, &pages(&[(20, 1)])),
            [Reach { low: 2 * 4096, high: 30 * 4096, places: 1..4 }]
        );
        // At the end of everything there is no neighbour that tells how far the hole goes.
        assert_eq!(
            reaches(&places, &pages(&[(40, 1)])),
            [Reach { low: 31 * 4096, high: 41 * 4096, places: 5..6 }]
        );
        assert_eq!(reaches(&places, &pages(&[(1, 1), (30, 1), (50, 3)])), []);
    }

    #[test]
    fn among_very_many_mappings_it_stays_near() {
        let places: Vec<Place> = (0..1000).map(|n| place(10 * n, 10 * n + 2, true)).collect();
        let reaches = reaches(&places, &pages(&[(5000, 2), (5100, 2), (9000, 1)]));
        let near =
            |reach: &Reach, from: usize, to: usize| reach.places == (from - NEIGHBOURS..to + NEIGHBOURS + 1);
        assert!(reaches.len() == 2 && near(&reaches[0], 500, 510) && near(&reaches[1], 900, 900));
        assert_eq!(reaches[1].low, places[900 - NEIGHBOURS - 1].end);
        assert_eq!(reaches[1].high, places[900 + NEIGHBOURS + 1].start);
    }

    proptest! {
        #[test]
        fn all_that_is_new_is_in_one_and_nothing_that_must_not_be(
            lengths in prop::collection::vec((1u64..4, 0u64..3, any::<bool>()), 1..200),
            new in prop::collection::vec((0u64..600, 1u64..5), 0..20),
        ) {
            let mut at = 0;
            let places: Vec<Place> = lengths
                .iter()
                .map(|&(length, hole, watched)| {
                    let start = at + hole;
                    at = start + length;
                    place(start, at, watched)
                })
                .collect();
            let new: PageSet = pages(&new);
            let reaches = reaches(&places, &new);
            for (index, place) in places.iter().enumerate() {
                let inside = reaches.iter().filter(|reach| reach.low < place.end && place.start < reach.high);
                let inside: Vec<_> = inside.collect();
                prop_assert!(inside.len() <= 1);
                prop_assert!(inside.is_empty() || place.watched);
                if place.watched && is_new(*place, &new) {
                    prop_assert!(inside.len() == 1 && inside[0].places.contains(&index));
                }
                prop_assert!(inside.iter().all(|reach| reach.low <= place.start && place.end <= reach.high));
            }
        }
    }
}
