//! Which pages are reported: never too few, and on small pages exactly those that were written.

use crate::Case;
use crate::subject::{Subject, dirty, populated, within};
use nix::sys::signal::Signal;
use pageferry_tracker::{Collected, PageReader, Run, SpaceScan, Tracker, TrackerKind, TreeState, WriteCheck};

pub const CASES: &[Case] = &[
    ("a_known_writer_exactly", a_known_writer_exactly),
    ("unacknowledged_pages_come_back", unacknowledged_pages_come_back),
    ("a_frozen_collect_sees_the_same", a_frozen_collect_sees_the_same),
    ("a_write_is_seen_before_it_is_collected", a_write_is_seen_before_it_is_collected),
    ("bytes_that_stay_the_same", bytes_that_stay_the_same),
    ("pages_written_meanwhile_are_not_lost", pages_written_meanwhile_are_not_lost),
    ("huge_pages_are_never_missing", huge_pages_are_never_missing),
    ("a_new_mapping_at_an_old_place_is_dirty", a_new_mapping_at_an_old_place_is_dirty),
    ("what_was_moved_is_dirty", what_was_moved_is_dirty),
    ("what_was_moved_onto_tracked_pages_is_dirty", what_was_moved_onto_tracked_pages_is_dirty),
    ("what_grows_is_dirty", what_grows_is_dirty),
    ("the_heap_grows", the_heap_grows),
    ("pages_given_back_are_gone", pages_given_back_are_gone),
    ("pages_of_zeros_are_not_populated", pages_of_zeros_are_not_populated),
    ("locked_pages_are_not_lazy_and_come_back_dirty", locked_pages_are_not_lazy_and_come_back_dirty),
    ("pages_without_access_are_read", pages_without_access_are_read),
    ("unmapped_pages_are_named_when_read", unmapped_pages_are_named_when_read),
    ("guard_pages_are_named_when_read", guard_pages_are_named_when_read),
    ("two_thousand_mappings", two_thousand_mappings),
    ("who_stands_still_is_seen_without_tracking", who_stands_still_is_seen_without_tracking),
];

/// A subject with a tracker on it, whose first collect is acknowledged.
pub fn tracked(kind: TrackerKind, subject: &Subject) -> Tracker {
    let mut tracker = Tracker::attach(subject.target(), kind).expect("attach");
    let collected = collect(&mut tracker);
    tracker.acknowledge(collected.ticket);
    tracker
}

pub fn collect(tracker: &mut Tracker) -> Collected {
    tracker.collect(TreeState::Running).expect("collect")
}

/// The space of the root.
pub fn only(collected: &Collected) -> &SpaceScan {
    assert_eq!(collected.spaces.len(), 1, "{:?}", collected.spaces);
    &collected.spaces[0]
}

fn a_known_writer_exactly(kind: TrackerKind) {
    let mut subject = Subject::start();
    let at = subject.number("map 1000");
    subject.tell(&format!("write-all {at} 500"));
    let mut tracker = Tracker::attach(subject.target(), kind).expect("attach");
    let first = collect(&mut tracker);
    let scan = only(&first);
    assert!(scan.is_new && scan.tracked);
    assert_eq!(dirty(scan, at, 1000), (0..500).collect::<Vec<_>>(), "everything, the first time");
    tracker.acknowledge(first.ticket);
    let key = scan.key;
    let mut there: Vec<u64> = (0..500).collect();
    for step in [7, 3, 101, 1, 250] {
        let wanted: Vec<u64> = (0..700).step_by(step).collect();
        let words: Vec<String> = wanted.iter().map(u64::to_string).collect();
        subject.tell(&format!("write {at} {}", words.join(" ")));
        let collected = collect(&mut tracker);
        let scan = only(&collected);
        assert_eq!(dirty(scan, at, 1000), wanted, "every {step}th page");
        there.extend(wanted);
        there.sort_unstable();
        there.dedup();
        assert_eq!(populated(scan, at, 1000), there);
        assert!(scan.key == key && !scan.is_new);
        tracker.acknowledge(collected.ticket);
    }
    let collected = collect(&mut tracker);
    assert_eq!(dirty(only(&collected), at, 1000), [0u64; 0], "nothing was written");
    let first_page = Run { start: at / 4096, len: 1 };
    let mut bytes = [0; 4096];
    let missing = PageReader::new(&subject.target()).unwrap().read(&[first_page], &mut bytes).unwrap();
    assert!(missing.is_empty());
    assert_eq!(
        u64::from_ne_bytes(bytes[..8].try_into().unwrap()).to_string(),
        subject.ask(&format!("read {at} 1"))
    );
    tracker.detach().expect("detach");
}

fn a_write_is_seen_before_it_is_collected(kind: TrackerKind) {
    let (mut subject, at, mut tracker) = prepared(kind);
    let Some(check) = WriteCheck::new(&subject.target(), kind).expect("a check") else {
        assert_eq!(kind, TrackerKind::Compare, "only bytes that are compared have no marks");
        return;
    };
    let seen = || {
        let runs = [(0, 10), (20, 44)].map(|(start, len)| Run { start: at / 4096 + start, len });
        within(&check.written(&runs).expect("a look"), at, 64)
    };
    assert_eq!(seen(), NONE);
    for turn in 0..3 {
        subject.tell(&format!("write {at} 3 9 10 40"));
        assert_eq!(seen(), [3, 9, 40], "turn {turn}: of those that were asked about");
        assert_eq!(seen(), [3, 9, 40], "turn {turn}: looking changes nothing");
        let collected = collect(&mut tracker);
        assert_eq!(dirty(only(&collected), at, 64), [3, 9, 10, 40], "turn {turn}");
        tracker.acknowledge(collected.ticket);
        assert_eq!(seen(), NONE, "turn {turn}");
    }
}

fn pages(list: &[u64]) -> String {
    list.iter().map(u64::to_string).collect::<Vec<_>>().join(" ")
}

const NONE: [u64; 0] = [];

fn first(count: u64) -> Vec<u64> {
    (0..count).collect()
}

/// A subject with 64 pages, all written, and a tracker that knows them.
fn prepared(kind: TrackerKind) -> (Subject, u64, Tracker) {
    let mut subject = Subject::start();
    let at = subject.number("map 64");
    subject.tell(&format!("write-all {at} 64"));
    let tracker = tracked(kind, &subject);
    (subject, at, tracker)
}

fn read_pages(subject: &Subject, at: u64, count: u64) -> (Vec<u8>, Vec<u64>) {
    let mut bytes = vec![0xEE; count as usize * 4096];
    let run = Run { start: at / 4096, len: count };
    let reader = PageReader::new(&subject.target()).expect("a reader");
    let missing = reader.read(&[run], &mut bytes).expect("a read");
    (bytes, missing.into_iter().map(|page| page - at / 4096).collect())
}

/// The first word of each page.
fn words(bytes: &[u8]) -> String {
    let word = |page: &[u8]| u64::from_ne_bytes(page[..8].try_into().expect("eight bytes")).to_string();
    bytes.chunks(4096).map(word).collect::<Vec<_>>().join(" ")
}

fn unacknowledged_pages_come_back(kind: TrackerKind) {
    let (mut subject, at, mut tracker) = prepared(kind);
    subject.tell(&format!("write {at} 1 5"));
    let lost = collect(&mut tracker);
    assert_eq!(dirty(only(&lost), at, 64), [1, 5]);
    subject.tell(&format!("write {at} 5 9"));
    let both = collect(&mut tracker);
    assert_eq!(dirty(only(&both), at, 64), [1, 5, 9]);
    // Too late: more was collected since.
    tracker.acknowledge(lost.ticket);
    let again = collect(&mut tracker);
    assert_eq!(dirty(only(&again), at, 64), [1, 5, 9], "an old ticket acknowledges nothing");
    tracker.acknowledge(again.ticket);
    subject.tell(&format!("write {at} 9"));
    let rest = collect(&mut tracker);
    assert_eq!(dirty(only(&rest), at, 64), [9], "what was acknowledged does not come back");
}

fn a_frozen_collect_sees_the_same(kind: TrackerKind) {
    let (mut subject, at, mut tracker) = prepared(kind);
    subject.tell(&format!("write {at} 2 3 40"));
    subject.stop();
    for turn in ["once", "and again: nothing was cleared"] {
        let frozen = tracker.collect(TreeState::Frozen).expect("a frozen collect");
        // Who compares contents names everything then: what was copied while it ran may be older or newer than what
        // he saw.
        let wanted = if kind == TrackerKind::Compare { first(64) } else { vec![2, 3, 40] };
        assert_eq!(dirty(only(&frozen), at, 64), wanted, "{turn}");
        assert_eq!(populated(only(&frozen), at, 64), first(64));
        assert_eq!(frozen.pause, std::time::Duration::ZERO);
    }
    // The freeze is given up: the next round goes on from there.
    subject.signal(Signal::SIGCONT);
    subject.tell(&format!("write {at} 41"));
    let collected = collect(&mut tracker);
    let wanted = if kind == TrackerKind::Compare { first(64) } else { vec![2, 3, 40, 41] };
    assert_eq!(dirty(only(&collected), at, 64), wanted);
    tracker.acknowledge(collected.ticket);
    subject.tell(&format!("write {at} 7"));
    assert_eq!(dirty(only(&collect(&mut tracker)), at, 64), [7]);
}

fn bytes_that_stay_the_same(kind: TrackerKind) {
    let (mut subject, at, mut tracker) = prepared(kind);
    let same = subject.ask(&format!("read {at} 1"));
    subject.tell(&format!("store {at} {same}"));
    subject.tell(&format!("write {at} 5"));
    let found = dirty(only(&collect(&mut tracker)), at, 64);
    // The kernel sees the write, a comparison that nothing came of it.
    let wanted: &[u64] = if kind == TrackerKind::Compare { &[5] } else { &[0, 5] };
    assert_eq!(found, wanted);
}

fn pages_written_meanwhile_are_not_lost(kind: TrackerKind) {
    const PAGES: u64 = 128;
    let mut subject = Subject::start();
    let at = subject.number(&format!("map {PAGES}"));
    subject.tell(&format!("write-behind {at} {PAGES}"));
    let mut tracker = Tracker::attach(subject.target(), kind).expect("attach");
    // What a migration does: a copy that follows what the collects say, and is compared when all stands still.
    let mut copy = vec![0u8; PAGES as usize * 4096];
    let mut follow = |tracker: &mut Tracker, state| {
        let collected = tracker.collect(state).expect("collect");
        for page in dirty(only(&collected), at, PAGES) {
            let (bytes, missing) = read_pages(&subject, at + page * 4096, 1);
            assert!(missing.is_empty());
            copy[page as usize * 4096..][..4096].copy_from_slice(&bytes);
        }
        tracker.acknowledge(collected.ticket);
    };
    for _ in 0..50 {
        follow(&mut tracker, TreeState::Running);
    }
    subject.stop();
    follow(&mut tracker, TreeState::Frozen);
    let (truth, missing) = read_pages(&subject, at, PAGES);
    assert!(missing.is_empty());
    assert!(copy == truth, "the copy differs from the memory");
}

fn huge_pages_are_never_missing(kind: TrackerKind) {
    const PAGES: u64 = 4096;
    let mut subject = Subject::start();
    let at = subject.number(&format!("map-huge {PAGES}"));
    subject.tell(&format!("write-all {at} {PAGES}"));
    let mut tracker = tracked(kind, &subject);
    for wanted in [vec![0, 511, 513, 4095], vec![], (5..4096).step_by(97).collect(), first(PAGES)] {
        subject.tell(&format!("write {at} {}", pages(&wanted)));
        let collected = collect(&mut tracker);
        let found = dirty(only(&collected), at, PAGES);
        assert!(wanted.iter().all(|page| found.contains(page)), "written {wanted:?}, found {found:?}");
        assert_eq!(populated(only(&collected), at, PAGES), first(PAGES));
        tracker.acknowledge(collected.ticket);
    }
    // A part of a huge page that is given back.
    subject.tell(&format!("advise {} 100 {}", at + 600 * 4096, libc::MADV_DONTNEED));
    let collected = collect(&mut tracker);
    let left: Vec<u64> = (0..PAGES).filter(|page| !(600..700).contains(page)).collect();
    assert_eq!(populated(only(&collected), at, PAGES), left);
}

fn a_new_mapping_at_an_old_place_is_dirty(kind: TrackerKind) {
    let (mut subject, at, mut tracker) = prepared(kind);
    subject.tell(&format!("unmap {} 16", at + 16 * 4096));
    let collected = collect(&mut tracker);
    let left: Vec<u64> = (0..16).chain(32..64).collect();
    assert_eq!(populated(only(&collected), at, 64), left, "what was unmapped is gone");
    assert_eq!(dirty(only(&collected), at, 64), NONE);
    tracker.acknowledge(collected.ticket);
    // Within one round, and with what was there before; and once more into the gap.
    subject.tell(&format!("unmap {} 4", at + 40 * 4096));
    subject.tell(&format!("map-at {} 4", at + 40 * 4096));
    subject.tell(&format!("write {at} 41 43"));
    subject.tell(&format!("map-at {} 16", at + 16 * 4096));
    subject.tell(&format!("write {at} 16 20"));
    let collected = collect(&mut tracker);
    let found = dirty(only(&collected), at, 64);
    assert!([16, 20, 41, 43].iter().all(|page| found.contains(page)), "{found:?}");
    let left: Vec<u64> = (0..64).filter(|page| left.contains(page) || [16, 20].contains(page)).collect();
    let left: Vec<u64> = left.into_iter().filter(|page| ![40, 42].contains(page)).collect();
    assert_eq!(populated(only(&collected), at, 64), left);
    tracker.acknowledge(collected.ticket);
    // From now on they are watched like all others.
    subject.tell(&format!("write {at} 41 17"));
    let found = dirty(only(&collect(&mut tracker)), at, 64);
    assert_eq!(found, [17, 41]);
}

fn what_was_moved_is_dirty(kind: TrackerKind) {
    let (mut subject, at, mut tracker) = prepared(kind);
    let to = subject.number("map 64");
    let collected = collect(&mut tracker);
    tracker.acknowledge(collected.ticket);
    subject.tell(&format!("move {at} 64 {to}"));
    let collected = collect(&mut tracker);
    assert_eq!(dirty(only(&collected), to, 64), first(64), "nobody wrote, and yet all of it is new there");
    assert_eq!(populated(only(&collected), at, 64), NONE);
    tracker.acknowledge(collected.ticket);
    subject.tell(&format!("write {to} 8"));
    assert_eq!(dirty(only(&collect(&mut tracker)), to, 64), [8], "and it is watched there");
}

fn what_was_moved_onto_tracked_pages_is_dirty(kind: TrackerKind) {
    let (mut subject, at, mut tracker) = prepared(kind);
    let to = subject.number("map 64");
    subject.tell(&format!("write-all {to} 64"));
    for _ in 0..2 {
        let collected = collect(&mut tracker);
        tracker.acknowledge(collected.ticket);
    }
    // Both places are tracked, and clean; now the pages of one lie at the other.
    subject.tell(&format!("move {at} 32 {to}"));
    let collected = collect(&mut tracker);
    let found = dirty(only(&collected), to, 64);
    assert!((0..32).all(|page| found.contains(&page)), "{found:?}");
    let (bytes, missing) = read_pages(&subject, to, 64);
    assert!(missing.is_empty());
    assert_eq!(words(&bytes), subject.ask(&format!("read {to} 64")));
}

fn what_grows_is_dirty(kind: TrackerKind) {
    let (mut subject, at, mut tracker) = prepared(kind);
    subject.tell(&format!("unmap {} 1", at + 64 * 4096));
    subject.tell(&format!("unmap {} 24", at + 40 * 4096));
    let collected = collect(&mut tracker);
    tracker.acknowledge(collected.ticket);
    subject.tell(&format!("grow {at} 40 60"));
    subject.tell(&format!("write {at} 3 50 59"));
    let collected = collect(&mut tracker);
    let found = dirty(only(&collected), at, 64);
    assert!([3, 50, 59].iter().all(|page| found.contains(page)), "{found:?}");
    tracker.acknowledge(collected.ticket);
    subject.tell(&format!("write {at} 50"));
    assert_eq!(dirty(only(&collect(&mut tracker)), at, 64), [50]);
}

fn the_heap_grows(kind: TrackerKind) {
    let (mut subject, _, mut tracker) = prepared(kind);
    let mut places = Vec::new();
    for turn in 0..5 {
        let at = subject.number("grow-heap 32");
        subject.tell(&format!("write {at} 0 {} 31", turn + 10));
        let collected = collect(&mut tracker);
        let found = dirty(only(&collected), at, 32);
        assert!([0, turn + 10, 31].iter().all(|page| found.contains(page)), "turn {turn}: {found:?}");
        tracker.acknowledge(collected.ticket);
        places.push(at);
    }
    for at in &places {
        subject.tell(&format!("write {at} 31"));
    }
    let collected = collect(&mut tracker);
    for at in places {
        assert!(dirty(only(&collected), at, 32).contains(&31));
    }
}

fn pages_given_back_are_gone(kind: TrackerKind) {
    let (mut subject, at, mut tracker) = prepared(kind);
    subject.tell(&format!("write {at} 10"));
    subject.tell(&format!("advise {} 8 {}", at + 8 * 4096, libc::MADV_DONTNEED));
    let collected = collect(&mut tracker);
    let left: Vec<u64> = (0..8).chain(16..64).collect();
    assert_eq!(populated(only(&collected), at, 64), left);
    assert_eq!(dirty(only(&collected), at, 64), NONE, "what is gone is not dirty");
    tracker.acknowledge(collected.ticket);
    subject.tell(&format!("write {at} 12"));
    let collected = collect(&mut tracker);
    assert_eq!(dirty(only(&collected), at, 64), [12], "one that is there again is new");
    tracker.acknowledge(collected.ticket);
    // Given back and written again within a round.
    subject.tell(&format!("advise {} 8 {}", at + 20 * 4096, libc::MADV_DONTNEED));
    subject.tell(&format!("write {at} 21"));
    assert_eq!(dirty(only(&collect(&mut tracker)), at, 64), [21]);
}

fn pages_of_zeros_are_not_populated(kind: TrackerKind) {
    let mut subject = Subject::start();
    let at = subject.number("map 64");
    subject.tell(&format!("write {at} 0 7"));
    assert_eq!(subject.ask(&format!("read {} 3", at + 30 * 4096)), "0 0 0");
    let mut tracker = tracked(kind, &subject);
    assert_eq!(subject.ask(&format!("read {} 4", at + 40 * 4096)), "0 0 0 0");
    let collected = collect(&mut tracker);
    assert_eq!(populated(only(&collected), at, 64), [0, 7], "they were only read");
    tracker.acknowledge(collected.ticket);
    subject.tell(&format!("write {at} 31 41 50"));
    let collected = collect(&mut tracker);
    assert_eq!(dirty(only(&collected), at, 64), [31, 41, 50]);
    assert_eq!(populated(only(&collected), at, 64), [0, 7, 31, 41, 50]);
}

fn who_stands_still_is_seen_without_tracking(kind: TrackerKind) {
    let mut subject = Subject::start();
    let at = subject.number("map 1000");
    subject.tell(&format!("write {at} 0 7 999"));
    assert_eq!(subject.ask(&format!("read {} 1", at + 30 * 4096)), "0");
    let sealed = subject.number("map 4");
    subject.tell(&format!("write {sealed} 1"));
    subject.tell(&format!("seal {sealed} 4"));
    let mut tracker = tracked(kind, &subject);
    subject.stop();
    let collected = tracker.collect(TreeState::Frozen).expect("collect");
    let by_tracking = only(&collected).populated.clone();
    let looked = || pageferry_tracker::populated(&subject.target()).expect("a look");
    assert_eq!(within(&looked(), at, 1000), [0, 7, 999]);
    assert_eq!(looked(), by_tracking);
    tracker.detach().expect("detach");
    assert_eq!(looked(), by_tracking, "also when nobody watches any more");
}

fn locked_pages_are_not_lazy_and_come_back_dirty(kind: TrackerKind) {
    let (mut subject, at, mut tracker) = prepared(kind);
    subject.tell(&format!("write {at} 12 40"));
    let unacknowledged = collect(&mut tracker);
    assert_eq!(dirty(only(&unacknowledged), at, 64), [12, 40]);
    subject.tell(&format!("lock {} 16", at + 8 * 4096));
    subject.tell(&format!("write {at} 13 41"));
    let collected = collect(&mut tracker);
    let left: Vec<u64> = (0..8).chain(24..64).collect();
    assert_eq!(populated(only(&collected), at, 64), left);
    assert_eq!(dirty(only(&collected), at, 64), [40, 41]);
    assert!(only(&collected).regions.iter().any(|region| region.locked && region.start == at + 8 * 4096));
    tracker.acknowledge(collected.ticket);
    subject.tell(&format!("write {at} 14"));
    subject.tell(&format!("unlock {} 16", at + 8 * 4096));
    let collected = collect(&mut tracker);
    let found = dirty(only(&collected), at, 64);
    assert!([12, 13, 14].iter().all(|page| found.contains(page)), "{found:?}");
    assert_eq!(populated(only(&collected), at, 64), first(64));
}

fn pages_without_access_are_read(kind: TrackerKind) {
    let (mut subject, at, mut tracker) = prepared(kind);
    let wanted = subject.ask(&format!("read {at} 64"));
    subject.tell(&format!("write {at} 10"));
    let changed = subject.ask(&format!("read {at} 64"));
    assert_ne!(wanted, changed);
    subject.tell(&format!("seal {} 20", at + 5 * 4096));
    let collected = collect(&mut tracker);
    let found = dirty(only(&collected), at, 64);
    assert!(found.contains(&10), "{found:?}");
    assert_eq!(populated(only(&collected), at, 64), first(64));
    let (bytes, missing) = read_pages(&subject, at, 64);
    assert!(missing.is_empty());
    assert_eq!(words(&bytes), changed);
}

fn unmapped_pages_are_named_when_read(kind: TrackerKind) {
    let (mut subject, at, mut tracker) = prepared(kind);
    subject.tell(&format!("write-all {at} 64"));
    let collected = collect(&mut tracker);
    assert_eq!(dirty(only(&collected), at, 64), first(64));
    let wanted = subject.ask(&format!("read {at} 64"));
    subject.tell(&format!("unmap {} 3", at + 20 * 4096));
    subject.tell(&format!("unmap {} 1", at + 63 * 4096));
    let (bytes, missing) = read_pages(&subject, at, 64);
    assert_eq!(missing, [20, 21, 22, 63]);
    let wanted: Vec<&str> = wanted
        .split(' ')
        .enumerate()
        .map(|(page, word)| if missing.contains(&(page as u64)) { "0" } else { word })
        .collect();
    assert_eq!(words(&bytes), wanted.join(" "));
}

fn two_thousand_mappings(kind: TrackerKind) {
    let mut subject = Subject::start();
    let at = subject.number("map-many 2000");
    let mut tracker = tracked(kind, &subject);
    let wanted: Vec<u64> = (0..2000).map(|at| at * 2 + 1).collect();
    subject.tell(&format!("write {at} {}", pages(&wanted)));
    let collected = collect(&mut tracker);
    assert!(only(&collected).regions.len() >= 4000);
    assert_eq!(dirty(only(&collected), at, 4000), wanted);
    assert_eq!(populated(only(&collected), at, 4000), wanted);
    tracker.acknowledge(collected.ticket);
    let some: Vec<u64> = wanted.into_iter().step_by(3).collect();
    subject.tell(&format!("write {at} {}", pages(&some)));
    assert_eq!(dirty(only(&collect(&mut tracker)), at, 4000), some);
    let many: Vec<Run> = some.iter().map(|page| Run { start: at / 4096 + page, len: 1 }).collect();
    let mut bytes = vec![0; many.len() * 4096];
    assert!(PageReader::new(&subject.target()).unwrap().read(&many, &mut bytes).unwrap().is_empty());
    assert!(bytes.chunks(4096).all(|page| page[..8] != [0; 8]));
}

fn guard_pages_are_named_when_read(kind: TrackerKind) {
    /// `MADV_GUARD_INSTALL` (Linux 6.13).
    const GUARD: i32 = 102;
    let (mut subject, at, mut tracker) = prepared(kind);
    subject.order(&format!("advise {} 4 {GUARD}", at + 10 * 4096));
    let answer = subject.answer();
    let known = answer == "ok";
    assert!(known || answer.contains("Invalid argument"), "{answer}");
    let guards: Vec<u64> = if known { (10..14).collect() } else { Vec::new() };
    subject.tell(&format!("write {at} 9 14"));
    let collected = collect(&mut tracker);
    let found = dirty(only(&collected), at, 64);
    assert!(found.contains(&9) && found.contains(&14), "{found:?}");
    let (_, missing) = read_pages(&subject, at, 64);
    assert_eq!(missing, guards, "they cannot be read, and that is said");
}
