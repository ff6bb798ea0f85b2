//! Processes that share their memory, that track it themselves, or that are in the middle of something.

use crate::Case;
use crate::content::{collect, only, tracked};
use crate::subject::{Subject, dirty, populated};
use pageferry_tracker::{Collected, SpaceScan, Tracker, TrackerKind, TreeState};

pub const CASES: &[Case] = &[
    ("a_parent_in_vfork_is_looked_at", a_parent_in_vfork_is_looked_at),
    ("who_shares_its_memory_is_one_space", who_shares_its_memory_is_one_space),
    ("a_memory_that_stays_behind_is_another_space", a_memory_that_stays_behind_is_another_space),
    ("what_is_found_frozen_keeps_its_key", what_is_found_frozen_keeps_its_key),
    ("an_exec_that_is_found_frozen_is_all_dirty", an_exec_that_is_found_frozen_is_all_dirty),
    ("who_tracks_itself_takes_no_marks_from_us", who_tracks_itself_takes_no_marks_from_us),
    ("a_restartable_sequence_is_restarted", a_restartable_sequence_is_restarted),
    ("who_has_no_privileges_is_tracked", who_has_no_privileges_is_tracked),
    ("a_tracker_moves_between_threads", a_tracker_moves_between_threads),
];

fn of(collected: &Collected, pid: i32) -> &SpaceScan {
    let found = collected.spaces.iter().find(|space| space.target.pid() == pid);
    found.unwrap_or_else(|| panic!("no space of process {pid}"))
}

fn frozen(tracker: &mut Tracker) -> Collected {
    tracker.collect(TreeState::Frozen).expect("a frozen collect")
}

fn in_vfork(subject: &Subject) -> bool {
    subject.field("State").starts_with('D')
}

fn a_parent_in_vfork_is_looked_at(kind: TrackerKind) {
    let mut subject = Subject::start();
    let at = subject.number("map 16");
    subject.tell(&format!("write {at} 1 2"));
    // While it waits for its child, neither stops when it is told to.
    subject.order("vfork 300");
    subject.until("a vfork", in_vfork);
    let mut tracker = tracked(kind, &subject);
    assert_eq!(subject.answer(), "ok");
    subject.tell(&format!("write {at} 5"));
    for page in [6, 7, 8] {
        subject.order("vfork 100");
        subject.until("a vfork", in_vfork);
        let collected = collect(&mut tracker);
        assert_eq!(dirty(only(&collected), at, 16), [page - 1], "the child is no space of its own");
        assert!(collected.exited.is_empty());
        tracker.acknowledge(collected.ticket);
        assert_eq!(subject.answer(), "ok");
        subject.tell(&format!("write {at} {page}"));
    }
    // It has nobody who traces it, and stops for us again.
    assert_eq!(subject.field("TracerPid"), "0");
    assert_eq!(dirty(only(&collect(&mut tracker)), at, 16), [8]);
}

fn who_shares_its_memory_is_one_space(kind: TrackerKind) {
    let mut subject = Subject::start();
    let at = subject.number("map 16");
    subject.tell(&format!("write {at} 1 2 9"));
    subject.number(&format!("share {}", at + 9 * 4096));
    let mut tracker = Tracker::attach(subject.target(), kind).expect("attach");
    let first = collect(&mut tracker);
    assert_eq!(dirty(only(&first), at, 16), [1, 2, 9], "both were new");
    tracker.acknowledge(first.ticket);
    for page in [3, 4, 5] {
        subject.tell(&format!("write {at} {page}"));
        // The other one writes once a millisecond.
        let before = subject.number(&format!("read {} 1", at + 9 * 4096));
        while subject.number(&format!("read {} 1", at + 9 * 4096)) < before + 2 {}
        let collected = collect(&mut tracker);
        assert_eq!(dirty(only(&collected), at, 16), [page, 9], "what either writes");
        tracker.acknowledge(collected.ticket);
    }
}

fn a_memory_that_stays_behind_is_another_space(kind: TrackerKind) {
    let mut subject = Subject::start();
    let old = subject.number("map 16");
    subject.tell(&format!("write-all {old} 16"));
    let other = subject.number(&format!("share {}", old + 9 * 4096)) as i32;
    let mut tracker = tracked(kind, &subject);
    // The program is another now; its old memory lives on in the one that shared it.
    assert_eq!(subject.ask("exec"), "ready");
    let new = subject.number("map 16");
    subject.tell(&format!("write {new} 3"));
    let collected = collect(&mut tracker);
    assert_eq!(collected.spaces.len(), 2);
    assert_eq!(collected.exited.len(), 1);
    let scan = of(&collected, subject.pid());
    assert!(scan.is_new);
    assert_eq!(scan.dirty, scan.populated);
    assert_eq!(dirty(scan, new, 16), [3]);
    let scan = of(&collected, other);
    assert!(scan.is_new);
    assert_eq!(dirty(scan, old, 16), (0..16).collect::<Vec<_>>());
    tracker.acknowledge(collected.ticket);
    subject.tell(&format!("write {new} 7"));
    let collected = collect(&mut tracker);
    assert_eq!(dirty(of(&collected, subject.pid()), new, 16), [7]);
    assert!(dirty(of(&collected, other), old, 16).iter().all(|page| *page == 9));
    // And it ends with nobody to write for.
    assert_eq!(subject.number("kill-guest"), 0);
    let collected = collect(&mut tracker);
    assert_eq!(collected.spaces.len(), 1);
}

fn what_is_found_frozen_keeps_its_key(kind: TrackerKind) {
    let mut subject = Subject::start();
    let at = subject.number("map 32");
    subject.tell(&format!("write-all {at} 16"));
    let mut tracker = tracked(kind, &subject);
    let child = subject.number("fork") as i32;
    let first = frozen(&mut tracker);
    let (key, new) = (of(&first, child).key, of(&first, child).is_new);
    assert!(new && !of(&first, child).tracked);
    let second = frozen(&mut tracker);
    assert!(of(&second, child).key == key && !of(&second, child).is_new);
    tracker.clear_frozen().expect("the bits of all are cleared");
    // The freeze is given up, and everything goes on.
    let third = collect(&mut tracker);
    let scan = of(&third, child);
    assert!(scan.key == key && !scan.is_new && scan.tracked);
    assert_eq!(dirty(scan, at, 32), (0..16).collect::<Vec<_>>(), "never acknowledged");
    tracker.acknowledge(third.ticket);
    assert_eq!(subject.ask(&format!("child write {at} 3 20")), "ok");
    let fourth = collect(&mut tracker);
    assert_eq!(dirty(of(&fourth, child), at, 32), [3, 20]);
    assert_eq!(populated(of(&fourth, child), at, 32), (0..16).chain([20]).collect::<Vec<_>>());
    assert!(fourth.exited.is_empty());
}

fn an_exec_that_is_found_frozen_is_all_dirty(kind: TrackerKind) {
    let mut subject = Subject::start();
    let mut tracker = tracked(kind, &subject);
    assert_eq!(subject.ask("exec"), "ready");
    let at = subject.number("map 16");
    subject.tell(&format!("write {at} 2 4"));
    let collected = frozen(&mut tracker);
    let scan = only(&collected);
    assert!(scan.is_new && !scan.tracked);
    assert_eq!(scan.dirty, scan.populated);
    assert_eq!(dirty(scan, at, 16), [2, 4]);
    assert_eq!(collected.exited.len(), 1);
}

fn who_tracks_itself_takes_no_marks_from_us(kind: TrackerKind) {
    let mut subject = Subject::start();
    let at = subject.number("map 16");
    let aside = subject.number("map 16");
    subject.tell(&format!("write-all {at} 16"));
    subject.order(&format!("track-yourself {at} 16"));
    let answer = subject.answer();
    if answer != "ok" {
        // A kernel without asynchronous protection: no program can do that there.
        assert!(answer.contains("os error"), "{answer}");
        return;
    }
    let mut tracker = tracked(kind, &subject);
    for page in [3, 5, 7] {
        subject.tell(&format!("write {at} {page}"));
        subject.tell(&format!("write {aside} {page}"));
        // It looks, and protects what it found again: the mark is gone.
        assert!(subject.number(&format!("what-you-wrote {at} 16")) >= 1);
        let collected = collect(&mut tracker);
        assert!(dirty(only(&collected), at, 16).contains(&page), "page {page} is lost");
        assert_eq!(dirty(only(&collected), aside, 16), [page]);
        tracker.acknowledge(collected.ticket);
    }
    subject.tell(&format!("write {at} 9"));
    subject.number(&format!("what-you-wrote {at} 16"));
    assert!(dirty(only(&frozen(&mut tracker)), at, 16).contains(&9));
    // And we none from it.
    subject.tell(&format!("write {at} 11"));
    collect(&mut tracker);
    assert_eq!(subject.number(&format!("what-you-wrote {at} 16")), 1);
}

fn a_restartable_sequence_is_restarted(kind: TrackerKind) {
    let mut subject = Subject::start();
    subject.order("sequences 500");
    for _ in 0..50 {
        let mut tracker = Tracker::attach(subject.target(), kind).expect("attach");
        collect(&mut tracker);
    }
    let answer = subject.answer();
    let ends: Vec<u64> = answer.split(' ').map(|word| word.parse().expect("a number")).collect();
    assert!(ends[0] > 0, "none has finished");
    assert_eq!(ends[2], 0, "{} finished, {} restarted, and of some nobody knew", ends[0], ends[1]);
}

fn who_has_no_privileges_is_tracked(kind: TrackerKind) {
    let mut subject = Subject::start_as_nobody();
    assert_eq!(subject.field("CapEff"), "0000000000000000");
    let at = subject.number("map 16");
    subject.tell(&format!("write {at} 1"));
    let mut tracker = tracked(kind, &subject);
    subject.tell(&format!("write {at} 2 3"));
    assert_eq!(dirty(only(&collect(&mut tracker)), at, 16), [2, 3]);
    tracker.detach().expect("detach");
    assert!(!subject.is_registered());
}

fn a_tracker_moves_between_threads(kind: TrackerKind) {
    let mut subject = Subject::start();
    let at = subject.number("map 16");
    let target = subject.target();
    let elsewhere = std::thread::spawn(move || tracked_by(kind, target));
    let mut tracker = elsewhere.join().expect("attached on a thread that has ended");
    for page in 0..3 {
        subject.tell(&format!("write {at} {page}"));
        let elsewhere = std::thread::spawn(move || {
            let collected = collect(&mut tracker);
            tracker.acknowledge(collected.ticket);
            (tracker, collected)
        });
        let (back, collected) = elsewhere.join().expect("collected on another");
        assert_eq!(dirty(only(&collected), at, 16), [page]);
        tracker = back;
    }
}

fn tracked_by(kind: TrackerKind, target: pageferry_tracker::Target) -> Tracker {
    let mut tracker = Tracker::attach(target, kind).expect("attach");
    let collected = collect(&mut tracker);
    tracker.acknowledge(collected.ticket);
    tracker
}
