//! What is large, many, or in motion: and what becomes somebody else.

use crate::Case;
use crate::content::{collect, only, tracked};
use crate::subject::{Subject, dirty, populated};
use pageferry_tracker::{Collected, SpaceScan, Tracker, TrackerKind, TreeState};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

pub const CASES: &[Case] = &[
    ("the_stack_grows", the_stack_grows),
    ("pages_that_may_be_taken_away", pages_that_may_be_taken_away),
    ("two_hundred_processes_come_and_go", two_hundred_processes_come_and_go),
    ("forty_thousand_mappings", forty_thousand_mappings),
    ("long_stretches", long_stretches),
    ("a_sparse_mapping_of_64_gib", a_sparse_mapping_of_64_gib),
    ("who_becomes_a_setuid_program", who_becomes_a_setuid_program),
    ("who_lives_in_another_pid_namespace", who_lives_in_another_pid_namespace),
];

const NONE: [u64; 0] = [];

fn of(collected: &Collected, pid: i32) -> &SpaceScan {
    collected.spaces.iter().find(|scan| scan.target.pid() == pid).expect("the process is there")
}

fn settle(tracker: &mut Tracker) -> Collected {
    let collected = collect(tracker);
    tracker.acknowledge(collected.ticket);
    collected
}

fn the_stack_grows(kind: TrackerKind) {
    let mut subject = Subject::start();
    let mut tracker = tracked(kind, &subject);
    for depth in [40, 80, 40, 300] {
        // The deepest page that it wrote, and how many there are up to where it began.
        let at = subject.number(&format!("grow-stack {depth}")) / 4096 * 4096;
        let collected = settle(&mut tracker);
        let found = dirty(only(&collected), at, depth);
        assert_eq!(found, (0..depth).collect::<Vec<_>>(), "{depth} pages deep");
    }
}

fn pages_that_may_be_taken_away(kind: TrackerKind) {
    let mut subject = Subject::start();
    let at = subject.number("map 64");
    subject.tell(&format!("write-all {at} 64"));
    let mut tracker = tracked(kind, &subject);
    subject.tell(&format!("advise {at} 32 {}", libc::MADV_FREE));
    let collected = settle(&mut tracker);
    // The kernel takes them when it needs memory; until then they are there, and one that is written again stays.
    assert!(populated(only(&collected), at, 64).ends_with(&(32..64).collect::<Vec<_>>()));
    subject.tell(&format!("write {at} 3 7 40"));
    let collected = settle(&mut tracker);
    let found = dirty(only(&collected), at, 64);
    assert!([3, 7, 40].iter().all(|page| found.contains(page)), "{found:?}");
    assert!(found.iter().all(|page| *page < 32 || *page == 40), "{found:?}");
}

fn two_hundred_processes_come_and_go(kind: TrackerKind) {
    const MANY: usize = 200;
    let mut subject = Subject::start();
    let at = subject.number("map 16");
    subject.tell(&format!("write-all {at} 16"));
    let mut tracker = tracked(kind, &subject);
    let pids =
        |answer: String| -> Vec<i32> { answer.split(' ').map(|pid| pid.parse().expect("a pid")).collect() };
    let children = pids(subject.ask(&format!("spawn {MANY} {at}")));
    let collected = settle(&mut tracker);
    assert_eq!(collected.spaces.len(), MANY + 1);
    let keys: Vec<_> = children.iter().map(|pid| of(&collected, *pid).key).collect();
    for pid in &children {
        let scan = of(&collected, *pid);
        assert!(scan.is_new && scan.tracked);
        assert_eq!(dirty(scan, at, 16), (0..16).collect::<Vec<_>>(), "everything, the first time");
    }
    // Each writes one page, which is its own.
    subject.tell("wake-all");
    let collected = settle(&mut tracker);
    for (number, pid) in children.iter().enumerate() {
        assert_eq!(dirty(of(&collected, *pid), at, 16), [number as u64 % 16], "child {number}");
    }
    assert_eq!(dirty(of(&collected, subject.pid()), at, 16), NONE);
    // Half of them end, and as many come.
    subject.tell(&format!("end {}", MANY / 2));
    let others = pids(subject.ask(&format!("spawn {} {at}", MANY / 2)));
    let collected = settle(&mut tracker);
    assert_eq!(collected.spaces.len(), MANY + 1);
    let mut exited = collected.exited.clone();
    exited.sort();
    assert_eq!(exited, keys[..MANY / 2], "each is named once");
    assert!(others.iter().all(|pid| of(&collected, *pid).is_new));
    subject.tell(&format!("end {MANY}"));
    let collected = settle(&mut tracker);
    assert_eq!((collected.spaces.len(), collected.exited.len()), (1, MANY));
}

fn forty_thousand_mappings(kind: TrackerKind) {
    const PAIRS: u64 = 20_000;
    let mut subject = Subject::start();
    let at = subject.number(&format!("map-many {PAIRS}"));
    let mut tracker = tracked(kind, &subject);
    let wanted: Vec<u64> = (0..PAIRS).step_by(37).map(|pair| pair * 2 + 1).collect();
    let words: Vec<String> = wanted.iter().map(u64::to_string).collect();
    for turn in 0..2 {
        subject.tell(&format!("write {at} {}", words.join(" ")));
        let collected = settle(&mut tracker);
        let scan = only(&collected);
        assert!(scan.regions.len() as u64 >= PAIRS * 2);
        assert_eq!(dirty(scan, at, PAIRS * 2), wanted, "turn {turn}");
        assert_eq!(populated(scan, at, PAIRS * 2), wanted);
    }
    // One of them goes, and a new one comes.
    subject.tell(&format!("unmap {} 1", at + wanted[5] * 4096));
    subject.tell(&format!("map-at {} 1", at + wanted[7] * 4096));
    subject.tell(&format!("write {at} {}", wanted[7]));
    let collected = settle(&mut tracker);
    let found = dirty(only(&collected), at, PAIRS * 2);
    assert!(found.contains(&wanted[7]) && !found.contains(&wanted[5]), "{found:?}");
}

/// Long enough to be scanned in the quickest way, which does not ask whether pages exist. Writes are exact all the same;
/// pages that were given back may be named once more, and stay on the list for some collects, but not in a frozen one.
fn long_stretches(kind: TrackerKind) {
    const PAGES: u64 = 6000;
    let mut subject = Subject::start();
    let at = subject.number(&format!("map {PAGES}"));
    subject.tell(&format!("write-all {at} {PAGES}"));
    let mut tracker = tracked(kind, &subject);
    let all: Vec<u64> = (0..PAGES).collect();
    for pages in [&[0, 17, 2047, 2048, 5999][..], &[], &[1, 2, 3, 4096]] {
        let list: Vec<String> = pages.iter().map(u64::to_string).collect();
        if !pages.is_empty() {
            subject.tell(&format!("write {at} {}", list.join(" ")));
        }
        let collected = settle(&mut tracker);
        assert_eq!(dirty(only(&collected), at, PAGES), pages);
        assert_eq!(populated(only(&collected), at, PAGES), all);
    }
    subject.tell(&format!("advise {} 100 {}", at + 3000 * 4096, libc::MADV_DONTNEED));
    let collected = settle(&mut tracker);
    let found = dirty(only(&collected), at, PAGES);
    assert!(found.iter().all(|page| (3000..3100).contains(page)), "{found:?}");
    subject.tell(&format!("write {at} 3050 10"));
    let collected = settle(&mut tracker);
    assert_eq!(dirty(only(&collected), at, PAGES), [10, 3050]);
    let left: Vec<u64> = (0..3000).chain([3050]).chain(3100..PAGES).collect();
    let frozen = tracker.collect(TreeState::Frozen).expect("a frozen collect");
    assert_eq!(populated(only(&frozen), at, PAGES), left, "what is there when nothing runs is known exactly");
    tracker.acknowledge(frozen.ticket);
    subject.tell(&format!("advise {at} 50 {}", libc::MADV_DONTNEED));
    let mut looks = 0;
    loop {
        let collected = settle(&mut tracker);
        let there = populated(only(&collected), at, PAGES);
        if there == left[50..] {
            break;
        }
        looks += 1;
        assert!(there.len() <= left.len() && looks < 20, "after {looks} looks: {} pages", there.len());
    }
    // And over the end of a stretch that was cut off, where something new begins: too short for a huge page, which a
    // kernel that uses them everywhere would put there for one write, with all its pages, wherever the addresses allow it.
    subject.tell(&format!("unmap {} 1000", at + 5000 * 4096));
    subject.tell(&format!("map-at {} 500", at + 5000 * 4096));
    subject.tell(&format!("write {} 7", at + 5000 * 4096));
    let collected = settle(&mut tracker);
    assert_eq!(dirty(only(&collected), at + 5000 * 4096, 500), [7]);
    assert_eq!(populated(only(&collected), at + 5000 * 4096, 500), [7], "the old pages are gone");
}

fn a_sparse_mapping_of_64_gib(kind: TrackerKind) {
    const PAGES: u64 = 16 << 20;
    let mut subject = Subject::start();
    let at = subject.number(&format!("map-sparse {PAGES}"));
    let wanted = [0, 1, 511, 512, 1 << 18, (1 << 20) + 7, PAGES / 2, PAGES - 1];
    let order = |pages: &[u64]| {
        let words: Vec<String> = pages.iter().map(u64::to_string).collect();
        format!("write {at} {}", words.join(" "))
    };
    subject.tell(&order(&wanted));
    let mut tracker = tracked(kind, &subject);
    let resident = |subject: &Subject| subject.field("VmRSS");
    let tables = |subject: &Subject| -> u64 {
        let size = subject.field("VmPTE");
        size.split(' ').next().and_then(|size| size.parse().ok()).expect("a size in kB")
    };
    let before = tables(&subject);
    subject.tell(&order(&[1, PAGES - 1, 77]));
    let collected = settle(&mut tracker);
    assert_eq!(dirty(only(&collected), at, PAGES), [1, 77, PAGES - 1]);
    assert_eq!(populated(only(&collected), at, PAGES).len(), wanted.len() + 1);
    settle(&mut tracker);
    // What is looked at is not made: neither pages nor page tables.
    let after = tables(&subject);
    assert!(after <= before + 64, "page tables grew from {before} to {after} kB ({})", resident(&subject));
}

/// A copy of this program that becomes root, whoever starts it. Gone when it is dropped.
struct SetUid(PathBuf);

impl SetUid {
    fn new(kind: TrackerKind) -> Self {
        let name = format!("pageferry-live-setuid-{}-{kind}", std::process::id());
        let path = Path::new("/var/tmp").join(name);
        let copy = Self(path);
        fs::copy("/proc/self/exe", &copy.0).expect("a copy");
        fs::set_permissions(&copy.0, fs::Permissions::from_mode(0o4755)).expect("the setuid bit");
        copy
    }
}

impl Drop for SetUid {
    fn drop(&mut self) {
        // It may never have been made.
        let _ = fs::remove_file(&self.0);
    }
}

fn who_becomes_a_setuid_program(kind: TrackerKind) {
    let program = SetUid::new(kind);
    let mut subject = Subject::start_as_nobody();
    let at = subject.number("map 8");
    subject.tell(&format!("write-all {at} 8"));
    let mut tracker = tracked(kind, &subject);
    let key = only(&settle(&mut tracker)).key;
    assert!(subject.field("Uid").starts_with("65534\t65534"));
    assert_eq!(subject.ask(&format!("exec-program {}", program.0.display())), "ready");
    assert!(subject.field("Uid").starts_with("65534\t0"), "{}", subject.field("Uid"));
    let collected = settle(&mut tracker);
    let scan = only(&collected);
    assert!(scan.is_new && scan.tracked);
    assert_eq!((scan.dirty.len(), &collected.exited[..]), (scan.populated.len(), &[key][..]));
    let at = subject.number("map 64");
    subject.tell(&format!("write-all {at} 64"));
    settle(&mut tracker);
    subject.tell(&format!("write {at} 3"));
    assert_eq!(dirty(only(&settle(&mut tracker)), at, 64), [3]);
}

fn who_lives_in_another_pid_namespace(kind: TrackerKind) {
    let mut subject = Subject::start();
    let at = subject.number("map 64");
    subject.tell(&format!("write-all {at} 64"));
    subject.tell("unshare-pids");
    let child = subject.number("fork") as i32;
    let status = fs::read_to_string(format!("/proc/{child}/status")).expect("it lives");
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:")).expect("its numbers");
    assert!(numbers.trim().ends_with("\t1"), "the first of its namespace: {numbers}");
    let mut tracker = Tracker::attach(subject.target(), kind).expect("attach");
    settle(&mut tracker);
    subject.tell(&format!("write {at} 5"));
    assert_eq!(subject.ask(&format!("child write {at} 9 10")), "ok");
    let collected = settle(&mut tracker);
    assert_eq!(dirty(of(&collected, subject.pid()), at, 64), [5]);
    assert_eq!(dirty(of(&collected, child), at, 64), [9, 10]);
}
