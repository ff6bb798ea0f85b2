//! All memory of a program: shared, of files, locked, huge, pinned.

use crate::Case;
use crate::content::{collect, only};
use crate::subject::{Subject, dirty, populated, within};
use crate::transparency::ARGUMENT_ALL;
use nix::sys::signal::Signal;
use pageferry_tracker::{Collected, ObjectScan, PageReader, Run, Scope, Tracker, TrackerKind, TreeState};

pub const CASES: &[Case] = &[
    ("who_does_nothing_writes_nothing", who_does_nothing_writes_nothing),
    ("anonymous_memory_is_shared_once", |kind| shared_once(kind, "share-pages 16")),
    ("a_memfd_is_shared_once", |kind| shared_once(kind, "memfd 16")),
    ("posix_memory_is_shared_once", |kind| shared_once(kind, "posix 16")),
    ("system_v_memory_is_shared_once", |kind| shared_once(kind, "system-v 16")),
    ("a_shared_file_is_shared_once", |kind| shared_once(kind, "file 16")),
    ("an_object_that_is_mapped_twice", an_object_that_is_mapped_twice),
    ("who_unmaps_or_ends_may_have_written", who_unmaps_or_ends_may_have_written),
    ("what_a_descriptor_does", what_a_descriptor_does),
    ("shared_memory_that_is_given_back", shared_memory_that_is_given_back),
    ("files_mapped_privately", files_mapped_privately),
    ("locked_pages_are_watched", locked_pages_are_watched),
    ("unacknowledged_objects_come_back", unacknowledged_objects_come_back),
    ("pinned_buffers_are_always_dirty", pinned_buffers_are_always_dirty),
    ("what_is_lazy_is_the_same", what_is_lazy_is_the_same),
    ("objects_are_read_where_they_are_mapped", objects_are_read_where_they_are_mapped),
    ("all_of_it_is_let_go", all_of_it_is_let_go),
];

const NONE: [u64; 0] = [];

fn tracked(kind: TrackerKind, subject: &Subject) -> Tracker {
    let mut tracker = Tracker::attach_all(subject.target(), kind).expect("attach");
    assert_eq!(tracker.scope(), Scope::All);
    settle(&mut tracker);
    tracker
}

/// A round that is acknowledged.
fn settle(tracker: &mut Tracker) -> Collected {
    let collected = collect(tracker);
    tracker.acknowledge(collected.ticket);
    collected
}

/// The object that lies at an address of a process; it must be listed once, and not be counted with the process.
fn object(collected: &Collected, pid: i32, at: u64) -> &ObjectScan {
    let scan = collected.spaces.iter().find(|scan| scan.target.pid() == pid).expect("the process");
    let region =
        scan.regions.iter().find(|region| (region.start..region.end).contains(&at)).expect("a mapping");
    assert!(region.shared, "{region:?}");
    for scan in &collected.spaces {
        assert_eq!(populated(scan, at, 1), NONE, "shared memory is no process' own");
        assert!(scan.dirty.subtract(&scan.populated).is_empty());
    }
    let key = (region.device, region.inode);
    let mut found = collected.objects.iter().filter(|object| (object.device, object.inode) == key);
    let object = found.next().expect("the object is listed");
    assert!(found.next().is_none(), "the object is listed twice");
    assert!(object.mapped_by.contains(&scan.key));
    object
}

fn pages(object: &ObjectScan) -> (Vec<u64>, Vec<u64>) {
    (object.populated.iter().collect(), object.dirty.iter().collect())
}

fn who_does_nothing_writes_nothing(kind: TrackerKind) {
    let mut subject = Subject::start();
    let shared = subject.number("share-pages 16");
    subject.tell(&format!("write-all {shared} 16"));
    let mut tracker = tracked(kind, &subject);
    // It has answered, and waits for the next order only when it has cleaned up after that.
    let call = format!("/proc/{}/syscall", subject.pid());
    let read = format!("{} ", libc::SYS_read);
    subject.until("a read", |_| std::fs::read_to_string(&call).is_ok_and(|call| call.starts_with(&read)));
    // The kernel may move a page to another frame while we look (compaction), and a shared page is not mapped for that
    // moment: it comes back as a new one. That is rare; a source that always names something is not.
    settle(&mut tracker);
    let mut collected = settle(&mut tracker);
    for _ in 0..4 {
        if collected.objects.iter().any(|object| !object.dirty.is_empty()) {
            collected = settle(&mut tracker);
        }
    }
    let scan = only(&collected);
    // A thread that was stopped is told by the kernel on which processor it goes on, in a page of its own (`rseq`).
    let told = u64::from(kind.stops_the_tree());
    assert!(scan.dirty.len() <= told, "{:?}", scan.dirty);
    assert!(scan.untracked.is_empty(), "{:?}", scan.untracked);
    let written: u64 = collected.objects.iter().map(|object| object.dirty.len()).sum();
    assert_eq!(written, 0, "{:?}", collected.objects);
    // The relocated data of libraries is the program's own, their code is not.
    let of = |write| {
        let files = scan.regions.iter().filter(|region| region.inode != 0 && region.write == write);
        files.map(|region| within(&scan.populated, region.start, region.pages()).len()).sum::<usize>()
    };
    assert!(of(true) > 0, "variables");
    let code = scan.regions.iter().filter(|region| region.exec && region.inode != 0);
    assert_eq!(code.map(|region| populated(scan, region.start, region.pages()).len()).sum::<usize>(), 0);
}

fn mapped(subject: &mut Subject, order: &str) -> u64 {
    let answer = subject.number(order);
    match order.split(' ').next() {
        Some("memfd" | "posix" | "file") => {
            let length = order.split(' ').nth(1).expect("a length");
            subject.number(&format!("map-shared {answer} {length} 0"))
        }
        _ => answer,
    }
}

fn shared_once(kind: TrackerKind, order: &str) {
    let mut subject = Subject::start();
    let at = mapped(&mut subject, order);
    subject.tell(&format!("write {at} 0 1 2 3 4 5 6 7"));
    let child = subject.number("fork") as i32;
    let mut tracker = Tracker::attach_all(subject.target(), kind).expect("attach");
    let first = collect(&mut tracker);
    let scan = object(&first, subject.pid(), at);
    assert!(scan.is_new);
    assert_eq!(scan.mapped_by.len(), 2);
    let there: Vec<u64> = (0..8).collect();
    let (populated, dirty) = pages(scan);
    assert!(there.iter().all(|page| populated.contains(page)), "{populated:?}");
    assert_eq!(dirty, populated, "everything, the first time");
    tracker.acknowledge(first.ticket);
    for turn in 0..4 {
        subject.tell(&format!("write {at} 5 {turn}"));
        assert_eq!(subject.ask(&format!("child write {at} 7 {}", 9 + turn)), "ok");
        let collected = settle(&mut tracker);
        let scan = object(&collected, child, at);
        assert_eq!(pages(scan).1, [turn, 5, 7, 9 + turn], "turn {turn}");
        assert!(!scan.is_new);
    }
    assert_eq!(pages(object(&settle(&mut tracker), child, at)).1, NONE);
    // One of them goes on alone.
    assert_eq!(subject.ask("child exit"), "gone");
    subject.tell("reap");
    settle(&mut tracker);
    subject.tell(&format!("write {at} 3"));
    let collected = collect(&mut tracker);
    let scan = object(&collected, subject.pid(), at);
    assert_eq!((pages(scan).1, scan.mapped_by.len()), (vec![3], 1));
}

fn an_object_that_is_mapped_twice(kind: TrackerKind) {
    let mut subject = Subject::start();
    let fd = subject.number("memfd 32");
    let whole = subject.number(&format!("map-shared {fd} 32 0"));
    let half = subject.number(&format!("map-shared {fd} 16 16"));
    subject.tell(&format!("write-all {whole} 32"));
    let mut tracker = tracked(kind, &subject);
    subject.tell(&format!("write {whole} 1 20"));
    subject.tell(&format!("write {half} 4 9"));
    let collected = settle(&mut tracker);
    let scan = object(&collected, subject.pid(), half);
    // Contents are the same wherever they are looked at; and the pages of the second mapping come into its page table
    // when they are first touched there.
    assert_eq!(pages(scan), ((0..32).collect(), vec![1, 20, 25]));
    assert_eq!(scan.mapped_by.len(), 1);
    subject.tell(&format!("write {half} 9"));
    assert_eq!(pages(object(&settle(&mut tracker), subject.pid(), whole)).1, [25]);
}

fn who_unmaps_or_ends_may_have_written(kind: TrackerKind) {
    let mut subject = Subject::start();
    let fd = subject.number("memfd 32");
    let whole = subject.number(&format!("map-shared {fd} 32 0"));
    subject.tell(&format!("write-all {whole} 32"));
    subject.number("fork");
    let half = subject.number(&format!("map-shared {fd} 16 16"));
    let mut tracker = tracked(kind, &subject);
    // Through a mapping that is not there any more when we look.
    subject.tell(&format!("write {half} 3"));
    subject.tell(&format!("unmap {half} 16"));
    let found = pages(object(&settle(&mut tracker), subject.pid(), whole)).1;
    assert!(found.contains(&19), "{found:?}");
    // By a process that is not there any more.
    assert_eq!(subject.ask(&format!("child write {whole} 11")), "ok");
    assert_eq!(subject.ask("child exit"), "gone");
    subject.tell("reap");
    let found = pages(object(&settle(&mut tracker), subject.pid(), whole)).1;
    assert!(found.contains(&11), "{found:?}");
    assert_eq!(pages(object(&settle(&mut tracker), subject.pid(), whole)).1, NONE);
}

fn what_a_descriptor_does(kind: TrackerKind) {
    let mut subject = Subject::start();
    let fd = subject.number("memfd 32");
    let at = subject.number(&format!("map-shared {fd} 32 0"));
    subject.tell(&format!("write-all {at} 16"));
    let mut tracker = tracked(kind, &subject);
    let pid = subject.pid();
    // A page that was not there, and one that is: only the first can be seen while it runs.
    subject.tell(&format!("write-through {fd} 20"));
    subject.tell(&format!("write-through {fd} 3"));
    let collected = settle(&mut tracker);
    let (populated, dirty) = pages(object(&collected, pid, at));
    assert_eq!(populated, (0..16).chain([20]).collect::<Vec<_>>());
    assert!(dirty.contains(&20), "{dirty:?}");
    assert_eq!(dirty.contains(&3), kind == TrackerKind::Compare, "{dirty:?}");
    subject.tell(&format!("punch {fd} 5 4"));
    let collected = settle(&mut tracker);
    let left: Vec<u64> = (0..5).chain(9..16).chain([20]).collect();
    assert_eq!(pages(object(&collected, pid, at)).0, left, "a hole is punched");
    subject.tell(&format!("truncate {fd} 12"));
    subject.tell(&format!("write {at} 10"));
    let collected = settle(&mut tracker);
    let left: Vec<u64> = (0..5).chain(9..12).collect();
    let (populated, dirty) = pages(object(&collected, pid, at));
    assert_eq!(populated, left, "the end is cut off");
    assert!(dirty.contains(&10), "{dirty:?}");
    subject.tell(&format!("truncate {fd} 32"));
    subject.tell(&format!("write {at} 10 31"));
    let left: Vec<u64> = left.into_iter().chain([31]).collect();
    let (populated, dirty) = pages(object(&settle(&mut tracker), pid, at));
    assert_eq!(populated, left, "and is there again");
    assert!(dirty.contains(&10) && dirty.contains(&31), "{dirty:?}");
    subject.tell(&format!("write-through {fd} 1"));
    subject.stop();
    let frozen = tracker.collect(TreeState::Frozen).expect("a frozen collect");
    assert_eq!(pages(object(&frozen, pid, at)), (left.clone(), left), "all of it, when it stands still");
    subject.signal(Signal::SIGCONT);
}

fn shared_memory_that_is_given_back(kind: TrackerKind) {
    let mut subject = Subject::start();
    let at = subject.number("share-pages 32");
    subject.tell(&format!("write-all {at} 32"));
    let mut tracker = tracked(kind, &subject);
    let pid = subject.pid();
    // From the page table only: the object keeps it.
    subject.tell(&format!("write {at} 2"));
    subject.tell(&format!("advise {at} 8 {}", libc::MADV_DONTNEED));
    let collected = settle(&mut tracker);
    let (populated, dirty) = pages(object(&collected, pid, at));
    assert_eq!(populated, (0..32).collect::<Vec<_>>());
    assert!(dirty.contains(&2), "its mark is gone, and it was written: {dirty:?}");
    subject.tell(&format!("advise {} 8 {}", at + 8 * 4096, libc::MADV_REMOVE));
    let collected = settle(&mut tracker);
    assert_eq!(pages(object(&collected, pid, at)).0, (0..8).chain(16..32).collect::<Vec<_>>());
    subject.tell(&format!("write {at} 9 30"));
    let found = pages(object(&settle(&mut tracker), pid, at)).1;
    assert!(found.contains(&9) && found.contains(&30), "{found:?}");
}

fn files_mapped_privately(kind: TrackerKind) {
    let mut subject = Subject::start();
    let fd = subject.number("file 16");
    let at = subject.number(&format!("map-private {fd} 16 0"));
    subject.ask(&format!("read {at} 16"));
    let mut tracker = tracked(kind, &subject);
    assert_eq!(populated(only(&settle(&mut tracker)), at, 16), NONE, "they are the file's");
    subject.tell(&format!("write {at} 3 7"));
    let collected = settle(&mut tracker);
    assert_eq!(dirty(only(&collected), at, 16), [3, 7]);
    assert_eq!(populated(only(&collected), at, 16), [3, 7]);
    subject.tell(&format!("write {at} 7"));
    assert_eq!(dirty(only(&settle(&mut tracker)), at, 16), [7]);
    // It is the file's again.
    subject.tell(&format!("advise {} 1 {}", at + 3 * 4096, libc::MADV_DONTNEED));
    let collected = settle(&mut tracker);
    assert_eq!(populated(only(&collected), at, 16), [7]);
    assert_eq!(dirty(only(&collected), at, 16), NONE);
    subject.stop();
    let frozen = tracker.collect(TreeState::Frozen).expect("a frozen collect");
    assert_eq!(dirty(only(&frozen), at, 16), [7], "all of it, when it stands still");
    subject.signal(Signal::SIGCONT);
}

fn locked_pages_are_watched(kind: TrackerKind) {
    let mut subject = Subject::start();
    let at = subject.number("map 64");
    subject.tell(&format!("write-all {at} 64"));
    let mut tracker = tracked(kind, &subject);
    subject.tell(&format!("lock {} 16", at + 8 * 4096));
    settle(&mut tracker);
    subject.tell(&format!("write {at} 2 12"));
    let collected = settle(&mut tracker);
    assert_eq!(dirty(only(&collected), at, 64), [2, 12]);
    assert_eq!(populated(only(&collected), at, 64).len(), 64);
    subject.tell(&format!("unlock {} 16", at + 8 * 4096));
    settle(&mut tracker);
    subject.tell(&format!("write {at} 12"));
    assert_eq!(dirty(only(&settle(&mut tracker)), at, 64), [12]);
}

fn unacknowledged_objects_come_back(kind: TrackerKind) {
    let mut subject = Subject::start();
    let at = subject.number("share-pages 32");
    subject.tell(&format!("write-all {at} 32"));
    let mut tracker = tracked(kind, &subject);
    let pid = subject.pid();
    subject.tell(&format!("write {at} 1 5"));
    let lost = collect(&mut tracker);
    assert_eq!(pages(object(&lost, pid, at)).1, [1, 5]);
    subject.tell(&format!("write {at} 9"));
    let both = collect(&mut tracker);
    assert_eq!(pages(object(&both, pid, at)).1, [1, 5, 9]);
    tracker.acknowledge(lost.ticket);
    assert_eq!(pages(object(&settle(&mut tracker), pid, at)).1, [1, 5, 9]);
    assert_eq!(pages(object(&settle(&mut tracker), pid, at)).1, NONE);
}

fn pinned_buffers_are_always_dirty(kind: TrackerKind) {
    let mut subject = Subject::start();
    let at = subject.number("map 64");
    subject.tell(&format!("write-all {at} 64"));
    let fd = subject.number("file 4");
    for attach in [Tracker::attach, Tracker::attach_all] {
        let mut tracker = attach(subject.target(), kind).expect("attach");
        settle(&mut tracker);
        subject.tell(&format!("pin {} 3", at + 16 * 4096));
        let pinned = [16, 17, 18];
        for _ in 0..2 {
            let found = dirty(only(&settle(&mut tracker)), at, 64);
            assert!(pinned.iter().all(|page| found.contains(page)), "{found:?}");
        }
        subject.tell(&format!("write {at} 17"));
        let before = subject.ask(&format!("read {at} 64"));
        subject.tell(&format!("read-pinned {fd} {}", at + 17 * 4096));
        assert_ne!(subject.ask(&format!("read {at} 64")), before, "the kernel has written");
        subject.tell(&format!("write {at} 40"));
        assert_eq!(dirty(only(&settle(&mut tracker)), at, 64), [16, 17, 18, 40]);
        // The last that the kernel wrote, and it lets go.
        subject.tell(&format!("write {} 0", at + 17 * 4096));
        subject.tell(&format!("read-pinned {fd} {}", at + 17 * 4096));
        subject.tell("unpin");
        assert_eq!(dirty(only(&settle(&mut tracker)), at, 64), pinned);
        assert_eq!(dirty(only(&settle(&mut tracker)), at, 64), NONE);
    }
}

fn what_is_lazy_is_the_same(kind: TrackerKind) {
    let mut subject = Subject::start();
    let at = subject.number("map 64");
    subject.tell(&format!("write-all {at} 32"));
    let shared = subject.number("share-pages 8");
    subject.tell(&format!("write-all {shared} 8"));
    let mut lazy = Tracker::attach(subject.target(), kind).expect("attach");
    let few = collect(&mut lazy);
    assert!(few.objects.is_empty());
    drop(lazy);
    let mut all = Tracker::attach_all(subject.target(), kind).expect("attach");
    let many = collect(&mut all);
    let (few, many) = (only(&few), only(&many));
    assert_eq!(populated(few, at, 64), populated(many, at, 64));
    assert!(few.populated.subtract(&many.populated).is_empty(), "what is lazy is among all");
}

fn objects_are_read_where_they_are_mapped(kind: TrackerKind) {
    let mut subject = Subject::start();
    let fd = subject.number("memfd 32");
    let at = subject.number(&format!("map-shared {fd} 16 16"));
    subject.tell(&format!("write {at} 3"));
    subject.tell(&format!("write-through {fd} 20"));
    let mut tracker = tracked(kind, &subject);
    let collected = collect(&mut tracker);
    let scan = only(&collected);
    let object = object(&collected, subject.pid(), at);
    assert_eq!(object.page_in(scan, 19), Some(at / 4096 + 3));
    assert_eq!((object.page_in(scan, 15), object.page_in(scan, 32)), (None, None), "not mapped");
    let reader = PageReader::new(&scan.target).expect("a reader");
    for page in [19, 20] {
        let run = Run { start: object.page_in(scan, page).expect("it is mapped"), len: 1 };
        let mut bytes = [0; 4096];
        assert!(reader.read(&[run], &mut bytes).expect("a read").is_empty());
        let word = u64::from_ne_bytes(bytes[..8].try_into().expect("eight bytes"));
        assert_eq!(subject.ask(&format!("read {} 1", at + (page - 16) * 4096)), word.to_string());
        assert_ne!(word, 0);
    }
}

fn all_of_it_is_let_go(kind: TrackerKind) {
    let mut subject = Subject::start();
    let shared = subject.number("share-pages 32");
    let fd = subject.number("file 16");
    let file = subject.number(&format!("map-private {fd} 16 0"));
    let write = |subject: &mut Subject| {
        subject.tell(&format!("write-all {shared} 32"));
        subject.tell(&format!("write-all {file} 16"));
    };
    write(&mut subject);
    let descriptors = subject.descriptors();
    let tracker = tracked(kind, &subject);
    assert_eq!(subject.is_registered(), kind == TrackerKind::UffdWp);
    assert_eq!(subject.descriptors(), descriptors, "while it is tracked");
    tracker.detach().expect("detach");
    for turn in 0..3 {
        assert!(!subject.is_registered());
        assert_eq!(subject.descriptors(), descriptors);
        assert_eq!(subject.field("TracerPid"), "0");
        write(&mut subject);
        // And by one that is killed.
        let mut killed = Subject::start_as(&[ARGUMENT_ALL, &subject.pid().to_string(), &kind.to_string()]);
        std::thread::sleep(std::time::Duration::from_micros(turn * 1777));
        killed.kill();
        subject.until("the tracker's end", |subject| subject.field("TracerPid") == "0");
        subject.until("the end of the registration", |subject| !subject.is_registered());
        assert!(!subject.is_stopped());
    }
    write(&mut subject);
}
