//! What will be written again before it could be sent.
//!
//! Copying in rounds, a round sends what was written during the one before. If rounds take T, a page is in the next
//! one with about T / r, r being the time between its writes (and surely when T is longer than r); so a round has
//! W(T) = sum of min(1, T / r) pages, and takes W(T) x page size / rate. Rounds get shorter until T is as long as
//! sending W(T) takes: that is the shortest round there is. The pages with r <= T are in every round from then on.

use super::HotSet;
use super::pages::{REMEMBERED, Written};
use super::space::Space;
use crate::observation::Owner;
use crate::page_set::PageSet;
use std::collections::BTreeMap;
use std::time::Duration;

const PAGE: f64 = 4096.0;

/// Time between the writes of a page, in eighths of an interval; `None` when it was not seen to be written again.
fn between(written: &Written, intervals: u32) -> Option<u64> {
    let quiet = u64::from(written.age.max(intervals)) * 8;
    match written.recent {
        _ if !written.repeated => None,
        // Not written lately: at the best, it will be after as long again.
        0 => Some(quiet),
        count => Some(u64::from(intervals) * 8 / u64::from(count)),
    }
}

/// `intervals` is how far back the history goes, `interval` the mean length of one in seconds.
pub(super) fn set(
    spaces: &BTreeMap<Owner, Space>,
    now: u32,
    (intervals, interval): (u32, f64),
    bytes_per_second: f64,
) -> HotSet {
    debug_assert!(intervals <= REMEMBERED);
    let classes = classes(spaces, now, intervals);
    let round = shortest_round(&classes, interval, bytes_per_second);
    let hottest = classes.keys().next().map_or(f64::INFINITY, |between| *between as f64 / 8.0 * interval);
    if round < hottest {
        return HotSet::default();
    }
    let mut hot = HotSet::default();
    for (key, space) in spaces {
        let mut pages = PageSet::default();
        for written in space.pages.iter(now) {
            let time = between(&written, intervals).map(|between| between as f64 / 8.0 * interval);
            if time.is_some_and(|time| time <= round) {
                pages.insert(written.page, 1);
            }
        }
        if !pages.is_empty() {
            hot.total += pages.len();
            hot.pages.push((*key, pages));
        }
    }
    hot.round = Duration::try_from_secs_f64(round).unwrap_or(Duration::MAX);
    hot
}

/// Pages by the time between their writes.
fn classes(spaces: &BTreeMap<Owner, Space>, now: u32, intervals: u32) -> BTreeMap<u64, u64> {
    let mut classes: BTreeMap<u64, u64> = BTreeMap::new();
    // Most pages are like the one before.
    let (mut class, mut pages) = (0, 0);
    for written in spaces.values().flat_map(|space| space.pages.iter(now)) {
        match between(&written, intervals) {
            Some(same) if same == class => pages += 1,
            Some(other) => {
                *classes.entry(class).or_default() += pages;
                (class, pages) = (other, 1);
            }
            None => {}
        }
    }
    *classes.entry(class).or_default() += pages;
    classes.retain(|_, pages| *pages > 0);
    classes
}

/// The largest T that sending W(T) takes, in seconds; 0 when there is none but that. `classes` are pages by the time
/// between their writes, in eighths of an interval.
fn shortest_round(classes: &BTreeMap<u64, u64>, interval: f64, bytes_per_second: f64) -> f64 {
    let all: u64 = classes.values().sum();
    if all == 0 || interval <= 0.0 {
        return 0.0;
    }
    if bytes_per_second <= 0.0 || bytes_per_second.is_nan() {
        return f64::INFINITY;
    }
    let page = PAGE / bytes_per_second;
    // W(T) is a straight line between two neighbouring r: W(T) = sure + T x slope. The pages with r <= T are sure.
    let (mut sure, mut slope) = (all as f64, 0.0);
    for (between, pages) in classes.iter().rev() {
        let r = *between as f64 / 8.0 * interval;
        // Where the line of the r behind this one meets T: sure x page + T x slope x page = T.
        let rest = 1.0 - slope * page;
        if rest > 0.0 && sure * page / rest >= r {
            return sure * page / rest;
        }
        sure -= *pages as f64;
        slope += *pages as f64 / r;
    }
    0.0
}
