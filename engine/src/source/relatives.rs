//! Which processes of a tree have pages that differ little at the same address: a child that has written some words of what it
//! shared with its parent. Pure: what to compare with, and whether comparing is worth it.

use pageferry_wire_format::SpaceId;
use std::collections::BTreeMap;

/// Pages that are compared before it is known whether that is worth it.
const TRIAL: u64 = 64;
/// One page in so many must differ little. Comparing takes a read of a page, and what is saved is most of one sent.
const WORTH: u64 = 8;
/// Where it is not worth it, one page in so many is compared all the same: programs change.
const SAMPLED: u64 = 16;
/// What was seen counts half when so many pages were compared since.
const HALF_LIFE: u64 = 4096;
/// Other processes that are asked whether they have the page.
const ASKED: usize = 4;

#[derive(Clone, Copy, Debug, Default)]
struct Kinship {
    /// Whose pages differed little last.
    with: Option<SpaceId>,
    compared: u64,
    worth: u64,
    passed: u64,
}

/// What was found out so far.
#[derive(Debug, Default)]
pub(crate) struct Relatives {
    of: BTreeMap<SpaceId, Kinship>,
}

impl Relatives {
    /// What a page of `space` is to be compared with, if anything: what `has` gives for one of the `others`.
    pub(crate) fn choose<T>(
        &mut self,
        space: SpaceId,
        others: impl Iterator<Item = SpaceId>,
        has: impl Fn(SpaceId) -> Option<T>,
    ) -> Option<T> {
        let kinship = self.of.entry(space).or_default();
        if kinship.compared >= TRIAL && kinship.worth * WORTH < kinship.compared {
            kinship.passed += 1;
            if !kinship.passed.is_multiple_of(SAMPLED) {
                return None;
            }
        }
        let (with, found) = (kinship.with, kinship.with.and_then(&has));
        found.or_else(|| others.filter(|other| Some(*other) != with).take(ASKED).find_map(has))
    }

    /// Of so many pages of `space` that were compared with those of `with`, so many differed little.
    pub(crate) fn note(&mut self, space: SpaceId, with: SpaceId, compared: u64, worth: u64) {
        let kinship = self.of.entry(space).or_default();
        (kinship.compared, kinship.worth) = (kinship.compared + compared, kinship.worth + worth);
        if worth > 0 {
            kinship.with = Some(with);
        }
        if kinship.compared > HALF_LIFE {
            (kinship.compared, kinship.worth) = (kinship.compared / 2, kinship.worth / 2);
        }
    }

    /// A space is gone.
    pub(crate) fn forget(&mut self, space: SpaceId) {
        self.of.remove(&space);
        self.of
            .values_mut()
            .filter(|kinship| kinship.with == Some(space))
            .for_each(|kinship| kinship.with = None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHILD: SpaceId = SpaceId(9);

    fn choose(relatives: &mut Relatives, has: &[u32]) -> Option<u32> {
        relatives.choose(CHILD, (0..9).map(SpaceId), |of| has.contains(&of.0).then_some(of.0))
    }

    #[test]
    fn whoever_was_alike_is_asked_first_and_few_others() {
        let mut relatives = Relatives::default();
        assert_eq!(choose(&mut relatives, &[]), None);
        assert_eq!(choose(&mut relatives, &[2, 3]), Some(2));
        assert_eq!(choose(&mut relatives, &[7]), None, "not everybody is asked for every page");
        relatives.note(CHILD, SpaceId(7), 1, 1);
        assert_eq!(choose(&mut relatives, &[2, 7]), Some(7));
        assert_eq!(choose(&mut relatives, &[2]), Some(2));
        relatives.forget(SpaceId(7));
        assert_eq!(choose(&mut relatives, &[2, 7]), Some(2));
    }

    #[test]
    fn what_is_not_worth_it_is_left_and_what_becomes_so_is_noticed() {
        let mut relatives = Relatives::default();
        relatives.note(CHILD, SpaceId(0), TRIAL - 1, 0);
        assert!((0..100).all(|_| choose(&mut relatives, &[0]).is_some()), "it is on trial");
        relatives.note(CHILD, SpaceId(0), 10_000, 0);
        let compared = (0..1600).filter(|_| choose(&mut relatives, &[0]).is_some()).count();
        assert_eq!(compared, 100);
        for _ in 0..2000 {
            relatives.note(CHILD, SpaceId(0), 1, 1);
        }
        assert!((0..100).all(|_| choose(&mut relatives, &[0]).is_some()));
        // A tenth is not enough.
        (0..10_000).for_each(|n| relatives.note(CHILD, SpaceId(0), 1, u64::from(n % 10 == 0)));
        assert!((0..100).filter(|_| choose(&mut relatives, &[0]).is_some()).count() < 10);
    }
}
