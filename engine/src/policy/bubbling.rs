//! In which order owed pages go to a program that runs elsewhere already.
//!
//! What it waits for goes first. The rest spreads outwards from the pages that it waited for most recently, from several of them
//! at once: programs go on near where they are, and have several such places (threads, heaps, stacks). With one such place, or
//! pivot, this is the bubbling of Hines and Gopalan ("Post-copy based live virtual machine migration using adaptive
//! pre-paging and dynamic self-ballooning", VEE 2009), as is the idea of several.

use crate::page_bits::PageBits;
use pageferry_tracker::Run;
use pageferry_wire_format::SpaceId;
use std::collections::{BTreeMap, VecDeque};

/// Places that are spread from at once; the one that was waited at longest ago makes room.
const PIVOTS: usize = 8;

/// A page this near to where a pivot has spread belongs to it.
const NEAR: u64 = 64;

/// A pivot does not jump over more pages than this that are not owed: what lies behind is no neighbour.
const JUMP: u64 = 4096;

/// A place that is spread from: pages [low, high) are behind it.
#[derive(Clone, Copy, Debug)]
struct Pivot {
    space: SpaceId,
    low: u64,
    high: u64,
    /// Which way it goes next.
    upwards: bool,
}

/// What is owed and was not handed out yet, and what of it is next.
#[derive(Debug, Default)]
pub(crate) struct Bubbling {
    owed: BTreeMap<SpaceId, PageBits>,
    left: u64,
    /// The most recent one is first.
    pivots: VecDeque<Pivot>,
    /// Whose turn it is.
    turn: usize,
}

impl Bubbling {
    /// All of `owed` is to go.
    pub(crate) fn new(owed: BTreeMap<SpaceId, PageBits>) -> Self {
        let left = owed.values().map(PageBits::len).sum();
        Self { owed, left, pivots: VecDeque::new(), turn: 0 }
    }

    /// Pages that were not handed out yet.
    pub(crate) fn left(&self) -> u64 {
        self.left
    }

    /// The program waits for `page`. Whether it was still here: then it is handed out by this, and goes at once.
    pub(crate) fn want(&mut self, space: SpaceId, page: u64) -> bool {
        self.note(space, page);
        let here = self.owed.get_mut(&space).is_some_and(|owed| owed.remove(page));
        self.left -= u64::from(here);
        here
    }

    fn note(&mut self, space: SpaceId, page: u64) {
        let known = self.pivots.iter().position(|pivot| {
            pivot.space == space && (pivot.low.saturating_sub(NEAR)..pivot.high + NEAR).contains(&page)
        });
        let pivot = match known.and_then(|at| self.pivots.remove(at)) {
            Some(pivot) => Pivot {
                // It moves on to where it is needed.
                upwards: page >= pivot.low.midpoint(pivot.high),
                low: pivot.low.min(page),
                high: pivot.high.max(page + 1),
                space,
            },
            None => Pivot { space, low: page, high: page + 1, upwards: true },
        };
        self.pivots.push_front(pivot);
        self.pivots.truncate(PIVOTS);
        self.turn = 0;
    }

    /// Nobody needs these pages any more.
    pub(crate) fn forget(&mut self, space: SpaceId, run: Run) {
        if let Some(owed) = self.owed.get_mut(&space) {
            self.left -= owed.remove_run(run.start, run.len).iter().map(|run| run.len).sum::<u64>();
        }
    }

    /// Hands out the next pages that nobody waits for: puts at most `most` of one space into `runs`, in order. `None` when everything
    /// was handed out.
    pub(crate) fn next(&mut self, most: u64, runs: &mut Vec<Run>) -> Option<SpaceId> {
        runs.clear();
        while !self.pivots.is_empty() {
            self.turn %= self.pivots.len();
            let pivot = &mut self.pivots[self.turn];
            let space = pivot.space;
            if let Some(owed) = self.owed.get_mut(&space) {
                let upwards = pivot.upwards;
                pivot.upwards = !upwards;
                if !spread(pivot, owed, upwards, most, runs) {
                    spread(pivot, owed, !upwards, most, runs);
                }
            }
            if !runs.is_empty() {
                self.left -= runs.iter().map(|run| run.len).sum::<u64>();
                self.turn += 1;
                return Some(space);
            }
            // All around it went already.
            self.pivots.remove(self.turn);
        }
        while let Some(mut first) = self.owed.first_entry() {
            let space = *first.key();
            take_up(first.get_mut(), 0, u64::MAX, most, runs);
            if !runs.is_empty() {
                self.left -= runs.iter().map(|run| run.len).sum::<u64>();
                return Some(space);
            }
            first.remove();
        }
        None
    }
}

/// Takes the next pages on one side of a pivot. Whether there were any.
fn spread(pivot: &mut Pivot, owed: &mut PageBits, upwards: bool, most: u64, runs: &mut Vec<Run>) -> bool {
    if upwards {
        take_up(owed, pivot.high, pivot.high.saturating_add(JUMP), most, runs);
        pivot.high = runs.last().map_or(pivot.high, Run::end);
    } else {
        take_down(owed, pivot.low.saturating_sub(JUMP), pivot.low, most, runs);
        pivot.low = runs.first().map_or(pivot.low, |run| run.start);
    }
    !runs.is_empty()
}

/// Takes at most `most` pages in [from, end), the lowest first.
fn take_up(owed: &mut PageBits, mut from: u64, end: u64, most: u64, runs: &mut Vec<Run>) {
    let mut room = most;
    while room > 0
        && let Some(start) = owed.next(from, end)
    {
        let len = owed.run(start, room.min(end - start));
        owed.remove_run(start, len);
        runs.push(Run { start, len });
        (from, room) = (start + len, room - len);
    }
}

/// Takes at most `most` pages in [start, end), the highest first; gives them in ascending order.
fn take_down(owed: &mut PageBits, start: u64, mut end: u64, most: u64, runs: &mut Vec<Run>) {
    for _ in 0..most {
        let Some(page) = owed.last(start, end) else { break };
        owed.remove(page);
        match runs.last_mut() {
            Some(run) if run.start == page + 1 => *run = Run { start: page, len: run.len + 1 },
            _ => runs.push(Run { start: page, len: 1 }),
        }
        end = page;
    }
    runs.reverse();
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const A: SpaceId = SpaceId(0);

    fn owing(runs: &[(u32, u64, u64)]) -> Bubbling {
        let mut owed: BTreeMap<SpaceId, PageBits> = BTreeMap::new();
        for (space, start, len) in runs {
            owed.entry(SpaceId(*space)).or_default().insert(*start, *len);
        }
        Bubbling::new(owed)
    }

    fn next(order: &mut Bubbling, most: u64) -> Vec<u64> {
        let mut runs = Vec::new();
        order.next(most, &mut runs);
        runs.iter().flat_map(|run| run.start..run.end()).collect()
    }

    #[test]
    fn pages_go_outwards_from_the_one_that_was_waited_for() {
        let mut order = owing(&[(0, 0, 1000)]);
        assert!(order.want(A, 500));
        assert!(!order.want(A, 500), "it has gone");
        assert_eq!(next(&mut order, 3), [501, 502, 503]);
        assert_eq!(next(&mut order, 3), [497, 498, 499]);
        assert_eq!(next(&mut order, 3), [504, 505, 506]);
        assert!(order.want(A, 496), "the program goes down from here");
        assert_eq!(next(&mut order, 2), [494, 495]);
    }

    #[test]
    fn several_places_have_their_turns_and_the_most_recent_is_first() {
        let mut order = owing(&[(0, 0, 10_000), (1, 0, 10_000)]);
        order.want(A, 1000);
        order.want(SpaceId(1), 7000);
        order.want(A, 9000);
        assert_eq!(next(&mut order, 1), [9001]);
        assert_eq!(next(&mut order, 1), [7001]);
        assert_eq!(next(&mut order, 1), [1001]);
        assert_eq!(next(&mut order, 1), [8999]);
        order.want(A, 5000);
        assert_eq!(next(&mut order, 1), [5001], "what is waited for at the moment is nearer than what was");
    }

    #[test]
    fn what_lies_far_behind_a_gap_is_no_neighbour() {
        let mut order = owing(&[(0, 10, 2), (0, 100_000, 2)]);
        order.want(A, 100_000);
        assert_eq!(next(&mut order, 10), [100_001]);
        assert_eq!(next(&mut order, 10), [10, 11], "the rest, from the bottom");
        assert!(next(&mut order, 10).is_empty());
        assert_eq!(order.left(), 0);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Want(u32, u64),
        Forget(u32, u64, u64),
        Next(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..3u32, 0..600u64).prop_map(|(space, page)| Step::Want(space, page)),
            (0..3u32, 0..600u64, 0..40u64).prop_map(|(space, page, len)| Step::Forget(space, page, len)),
            (1..20u64).prop_map(Step::Next),
            (1..20u64).prop_map(Step::Next),
        ]
    }

    proptest! {
        #[test]
        fn every_owed_page_goes_once_and_what_is_wanted_goes_at_once(
            owed in proptest::collection::vec((0..3u32, 0..500u64, 1..60u64), 1..12),
            steps in proptest::collection::vec(step(), 0..60),
        ) {
            let mut order = owing(&owed);
            let mut model: BTreeSet<(u32, u64)> = BTreeSet::new();
            for (space, start, len) in owed {
                model.extend((start..start + len).map(|page| (space, page)));
            }
            let mut runs = Vec::new();
            let rest = std::iter::repeat_n(Step::Next(7), 2000);
            for step in steps.into_iter().chain(rest) {
                match step {
                    Step::Want(space, page) => {
                        prop_assert_eq!(order.want(SpaceId(space), page), model.remove(&(space, page)));
                    }
                    Step::Forget(space, start, len) => {
                        order.forget(SpaceId(space), Run { start, len });
                        (start..start + len).for_each(|page| _ = model.remove(&(space, page)));
                    }
                    Step::Next(most) => match order.next(most, &mut runs) {
                        None => prop_assert!(model.is_empty()),
                        Some(space) => {
                            prop_assert!(runs.is_sorted_by(|a, b| a.end() <= b.start));
                            let pages: Vec<u64> = runs.iter().flat_map(|run| run.start..run.end()).collect();
                            prop_assert!(!pages.is_empty() && pages.len() as u64 <= most);
                            for page in pages {
                                prop_assert!(model.remove(&(space.0, page)), "{} was not owed", page);
                            }
                        }
                    },
                }
                prop_assert_eq!(order.left(), model.len() as u64);
            }
            prop_assert!(model.is_empty());
        }
    }
}
