//! Processes that fork, become others, and end.

use crate::Case;
use crate::content::{collect, only, tracked};
use crate::subject::{Subject, dirty, populated};
use pageferry_tracker::{Collected, SpaceScan, Target, Tracker, TrackerKind, TreeState, tree};

pub const CASES: &[Case] = &[
    ("a_fork_is_tracked_from_its_first_collect", a_fork_is_tracked_from_its_first_collect),
    ("a_tree_is_tracked_from_the_attach", a_tree_is_tracked_from_the_attach),
    ("a_fork_that_is_found_frozen_is_dirty", a_fork_that_is_found_frozen_is_dirty),
    ("an_exec_is_a_new_space", an_exec_is_a_new_space),
    ("execs_during_collects", execs_during_collects),
    ("who_exits_is_named_once", who_exits_is_named_once),
    ("children_that_come_and_go_disturb_nobody", children_that_come_and_go_disturb_nobody),
    ("the_end_of_the_root_is_an_error", the_end_of_the_root_is_an_error),
    ("threads_write_to_one_space", threads_write_to_one_space),
];

fn of(collected: &Collected, pid: i32) -> &SpaceScan {
    let found = collected.spaces.iter().find(|space| space.target.pid() == pid);
    found.unwrap_or_else(|| panic!("no space of process {pid}"))
}

fn pids(collected: &Collected) -> Vec<i32> {
    collected.spaces.iter().map(|space| space.target.pid()).collect()
}

fn a_fork_is_tracked_from_its_first_collect(kind: TrackerKind) {
    let mut subject = Subject::start();
    let at = subject.number("map 64");
    subject.tell(&format!("write-all {at} 32"));
    let mut tracker = tracked(kind, &subject);
    let child = subject.number("fork") as i32;
    assert_eq!(subject.ask(&format!("child write {at} 40")), "ok");
    let collected = collect(&mut tracker);
    assert_eq!(pids(&collected), [subject.pid(), child], "root first");
    let scan = of(&collected, child);
    let all: Vec<u64> = (0..32).chain([40]).collect();
    assert!(scan.is_new && scan.tracked);
    assert_eq!(dirty(scan, at, 64), all, "all of a new space is dirty");
    assert_eq!(populated(scan, at, 64), all);
    assert!(!of(&collected, subject.pid()).is_new);
    assert_ne!(scan.key, of(&collected, subject.pid()).key);
    tracker.acknowledge(collected.ticket);
    // Each writes to what they still share, and sees only its own.
    assert_eq!(subject.ask(&format!("child write {at} 3 50")), "ok");
    subject.tell(&format!("write {at} 5"));
    let collected = collect(&mut tracker);
    assert_eq!(dirty(of(&collected, child), at, 64), [3, 50]);
    assert_eq!(dirty(of(&collected, subject.pid()), at, 64), [5]);
    tracker.acknowledge(collected.ticket);
    // A grandchild.
    assert!(subject.ask("child fork").parse::<i32>().is_ok());
    assert_eq!(subject.ask(&format!("child child write {at} 60")), "ok");
    let collected = collect(&mut tracker);
    assert_eq!(collected.spaces.len(), 3);
    assert!(dirty(&collected.spaces[2], at, 64).contains(&60));
}

fn a_tree_is_tracked_from_the_attach(kind: TrackerKind) {
    let mut subject = Subject::start();
    let at = subject.number("map 16");
    let child = subject.number("fork") as i32;
    let mut tracker = tracked(kind, &subject);
    assert_eq!(subject.ask(&format!("child write {at} 1")), "ok");
    subject.tell(&format!("write {at} 2"));
    let collected = collect(&mut tracker);
    assert_eq!(dirty(of(&collected, child), at, 16), [1]);
    assert_eq!(dirty(of(&collected, subject.pid()), at, 16), [2]);
    let listed: Vec<i32> = tree::discover(&subject.target()).unwrap().iter().map(Target::pid).collect();
    assert_eq!(listed, [subject.pid(), child]);
}

fn a_fork_that_is_found_frozen_is_dirty(kind: TrackerKind) {
    let mut subject = Subject::start();
    let at = subject.number("map 64");
    subject.tell(&format!("write-all {at} 32"));
    let mut tracker = tracked(kind, &subject);
    let child = subject.number("fork") as i32;
    subject.tell(&format!("write {at} 7"));
    let collected = tracker.collect(TreeState::Frozen).expect("a frozen collect");
    let scan = of(&collected, child);
    assert!(scan.is_new && !scan.tracked);
    assert_eq!(dirty(scan, at, 64), (0..32).collect::<Vec<_>>());
    // The parent's page 7 may be named together with others: a fork protects all of them anew.
    assert!(dirty(of(&collected, subject.pid()), at, 64).contains(&7));
}

fn an_exec_is_a_new_space(kind: TrackerKind) {
    let mut subject = Subject::start();
    let at = subject.number("map 64");
    subject.tell(&format!("write-all {at} 64"));
    let mut tracker = Tracker::attach(subject.target(), kind).expect("attach");
    let before = collect(&mut tracker);
    let old = only(&before).key;
    // The exec answers like a new program.
    assert_eq!(subject.ask("exec"), "ready");
    let at = subject.number("map 64");
    subject.tell(&format!("write {at} 3"));
    let after = collect(&mut tracker);
    assert_eq!(after.exited, [old]);
    let scan = only(&after);
    assert!(scan.is_new && scan.tracked && scan.key != old);
    assert_eq!(scan.dirty, scan.populated);
    assert_eq!(dirty(scan, at, 64), [3]);
    tracker.acknowledge(after.ticket);
    subject.tell(&format!("write {at} 9"));
    let collected = collect(&mut tracker);
    assert_eq!(dirty(only(&collected), at, 64), [9]);
    assert!(collected.exited.is_empty());
}

fn execs_during_collects(kind: TrackerKind) {
    let mut subject = Subject::start();
    let mut tracker = Tracker::attach(subject.target(), kind).expect("attach");
    let mut known = Vec::new();
    for _ in 0..20 {
        subject.order("exec");
        for _ in 0..3 {
            let collected = collect(&mut tracker);
            for space in &collected.spaces {
                assert_eq!(space.is_new, !known.contains(&space.key));
                if space.is_new {
                    assert_eq!(space.dirty, space.populated);
                    known.push(space.key);
                }
            }
            tracker.acknowledge(collected.ticket);
        }
        assert_eq!(subject.answer(), "ready");
        let at = subject.number("map 8");
        subject.tell(&format!("write {at} 5"));
        let collected = collect(&mut tracker);
        assert_eq!(dirty(only(&collected), at, 8), [5]);
        known.push(only(&collected).key);
    }
    // The same while a tracker comes: it may find the old program, the new one, or one after the other.
    drop(tracker);
    for _ in 0..20 {
        subject.order("exec");
        let mut tracker = Tracker::attach(subject.target(), kind).expect("attach to who becomes another");
        assert_eq!(subject.answer(), "ready");
        let at = subject.number("map 8");
        subject.tell(&format!("write {at} 5"));
        assert_eq!(dirty(only(&collect(&mut tracker)), at, 8), [5]);
    }
}

fn who_exits_is_named_once(kind: TrackerKind) {
    let mut subject = Subject::start();
    let child = subject.number("fork") as i32;
    let mut tracker = Tracker::attach(subject.target(), kind).expect("attach");
    let first = collect(&mut tracker);
    let key = of(&first, child).key;
    tracker.acknowledge(first.ticket);
    assert_eq!(subject.ask("child exit"), "gone");
    subject.until("the child's end", |_| Target::open(child).is_err());
    let second = collect(&mut tracker);
    assert_eq!(second.exited, [key], "it is a zombie still");
    assert_eq!(pids(&second), [subject.pid()]);
    subject.tell("reap");
    assert!(collect(&mut tracker).exited.is_empty());
    // One that came and went between two collects was never there.
    subject.ask("fork");
    assert_eq!(subject.ask("child exit"), "gone");
    subject.tell("reap");
    let third = collect(&mut tracker);
    assert!(third.exited.is_empty() && third.spaces.len() == 1);
}

fn the_end_of_the_root_is_an_error(kind: TrackerKind) {
    let mut subject = Subject::start();
    let target = subject.target();
    let mut tracker = tracked(kind, &subject);
    subject.kill();
    let error = tracker.collect(TreeState::Running).expect_err("nobody is there");
    assert!(error.to_string().contains("has ended"), "{error}");
    let error = Tracker::attach(target, kind).expect_err("nobody is there");
    assert!(error.to_string().contains("has ended"), "{error}");
    tracker.detach().expect("detach");
}

fn threads_write_to_one_space(kind: TrackerKind) {
    let mut subject = Subject::start();
    let at = subject.number("map 64");
    subject.tell(&format!("thread {at} 1"));
    let mut tracker = tracked(kind, &subject);
    for page in 2..20 {
        subject.tell(&format!("thread {at} {page}"));
    }
    let collected = collect(&mut tracker);
    let found = dirty(only(&collected), at, 64);
    assert_eq!(found, (2..20).collect::<Vec<_>>());
    subject.stop();
    let pointers = pageferry_tracker::stack_pointers(&subject.target()).expect("all stand still");
    assert_eq!(pointers.len(), 20);
    let regions = &only(&collected).regions;
    assert!(pointers.iter().all(|sp| regions.iter().any(|r| r.start <= *sp && *sp < r.end && r.write)));
}

fn children_that_come_and_go_disturb_nobody(kind: TrackerKind) {
    let mut subject = Subject::start();
    let at = subject.number("map 8");
    let mut tracker = tracked(kind, &subject);
    for _ in 0..20 {
        subject.ask("fork");
        for page in 0..4 {
            assert_eq!(subject.ask(&format!("child thread {at} {page}")), "ok");
        }
        // Its threads end one after the other, while it is looked at.
        subject.order("child exit");
        for _ in 0..4 {
            let collected = collect(&mut tracker);
            assert!(collected.spaces.len() <= 2);
            tracker.acknowledge(collected.ticket);
        }
        assert_eq!(subject.answer(), "gone");
        subject.order("reap");
        collect(&mut tracker);
        assert_eq!(subject.answer(), "ok");
    }
    subject.tell(&format!("write {at} 3"));
    assert_eq!(dirty(only(&collect(&mut tracker)), at, 8), [3]);
}
