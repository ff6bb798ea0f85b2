//! Pages in swap: they exist, and their marks go there with them and come back.

use crate::Case;
use crate::content::{collect, only, tracked};
use crate::subject::{Subject, dirty, populated};
use crate::swap_device::Swap;
use nix::sys::signal::Signal;
use pageferry_tracker::{Collected, PageReader, Run, Tracker, TrackerKind, TreeState};
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::fs::File;
use std::os::unix::fs::FileExt;

pub const CASES: &[Case] = &[
    ("swapped_pages_keep_their_marks", swapped_pages_keep_their_marks),
    ("swapped_pages_that_are_written_are_dirty", swapped_pages_that_are_written_are_dirty),
    ("swapped_pages_that_are_read_are_not_dirty", swapped_pages_that_are_read_are_not_dirty),
    ("swapped_pages_are_there_from_the_first", swapped_pages_are_there_from_the_first),
    ("a_frozen_collect_sees_swapped_pages", a_frozen_collect_sees_swapped_pages),
    ("swapped_pages_that_are_given_back_are_gone", swapped_pages_that_are_given_back_are_gone),
    ("a_child_has_swapped_pages", a_child_has_swapped_pages),
    ("in_and_out_of_swap_many_times", in_and_out_of_swap_many_times),
    ("a_writer_whose_pages_are_swapped", a_writer_whose_pages_are_swapped),
    ("shared_memory_in_swap", shared_memory_in_swap),
];

/// Why these cases cannot run here.
pub fn obstacle() -> Option<String> {
    Swap::on().err().map(|why| format!("needs swap: {why}"))
}

const PAGES: u64 = 64;
const NONE: [u64; 0] = [];

fn first(count: u64) -> Vec<u64> {
    (0..count).collect()
}

/// A round that is acknowledged.
fn settle(tracker: &mut Tracker) -> Collected {
    let collected = collect(tracker);
    tracker.acknowledge(collected.ticket);
    collected
}

/// Swap, a subject with so many written pages, and a tracker that knows them. The swap goes last.
fn prepared(kind: TrackerKind, pages: u64) -> (Subject, u64, Tracker, Swap) {
    let swap = Swap::on().expect("swap");
    let mut subject = Subject::start();
    let at = subject.number(&format!("map {pages}"));
    subject.tell(&format!("write-all {at} {pages}"));
    let tracker = tracked(kind, &subject);
    (subject, at, tracker, swap)
}

/// Has the kernel swap pages out, and sees that it does.
fn swap_out(subject: &mut Subject, at: u64, pages: u64) {
    let there = |subject: &Subject| swapped(subject.pid(), at, pages).len() as u64;
    let out = page_out(subject, at, pages, |subject| there(subject) == pages);
    assert!(out, "of {pages} pages {} are in swap", there(subject));
}

/// Has the kernel take pages out of memory until `done` says that they are; whether it does.
fn page_out(subject: &mut Subject, at: u64, pages: u64, done: impl Fn(&Subject) -> bool) -> bool {
    // A page that came or was looked at lately waits, with thirty others at most, on the processor where that happened until it is put
    // in a list, and cannot be taken from there. The call puts those of its own processor in: so it is made on each of them.
    let pid = Pid::from_raw(subject.pid());
    let all = sched_getaffinity(pid).expect("the program's processors");
    let processors: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|processor| all.is_set(*processor)).collect();
    let out = processors.iter().cycle().take(500).any(|processor| {
        let mut one = CpuSet::new();
        one.set(*processor);
        sched_setaffinity(pid, &one).expect("one of its processors");
        subject.tell(&format!("advise {at} {pages} {}", libc::MADV_PAGEOUT));
        let out = done(subject);
        if !out {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        out
    });
    sched_setaffinity(pid, &all).expect("its processors");
    out
}

/// Which of `pages` pages from `address` on process `pid` has in swap, counted from there.
fn swapped(pid: i32, address: u64, pages: u64) -> Vec<u64> {
    // The last type of swap is no swap, but a note of the kernel's.
    entries(pid, address, pages, |entry| entry >> 62 == 1 && entry & 0x1f != 0x1f)
}

/// Which of them it has in memory.
fn present(pid: i32, address: u64, pages: u64) -> Vec<u64> {
    entries(pid, address, pages, |entry| entry >> 63 == 1)
}

fn entries(pid: i32, address: u64, pages: u64, wanted: impl Fn(u64) -> bool) -> Vec<u64> {
    let mut bytes = vec![0; pages as usize * 8];
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).expect("the program lives");
    pagemap.read_exact_at(&mut bytes, address / 4096 * 8).expect("its entries");
    let entries = bytes.chunks(8).map(|entry| u64::from_ne_bytes(entry.try_into().expect("eight bytes")));
    (0..pages).zip(entries).filter(|(_, entry)| wanted(*entry)).map(|(page, _)| page).collect()
}

/// The first word of each page, as we read it.
fn words(subject: &Subject, at: u64, pages: u64) -> String {
    let mut bytes = vec![0xEE; pages as usize * 4096];
    let run = Run { start: at / 4096, len: pages };
    let missing = PageReader::new(&subject.target()).expect("a reader").read(&[run], &mut bytes);
    assert_eq!(missing.expect("a read"), NONE);
    let word = |page: &[u8]| u64::from_ne_bytes(page[..8].try_into().expect("eight bytes")).to_string();
    bytes.chunks(4096).map(word).collect::<Vec<_>>().join(" ")
}

/// Whether a look leaves the pages in swap.
fn leaves_alone(kind: TrackerKind) -> bool {
    kind != TrackerKind::Compare
}

fn swapped_pages_keep_their_marks(kind: TrackerKind) {
    let (mut subject, at, mut tracker, _swap) = prepared(kind, PAGES);
    subject.tell(&format!("write {at} 0 9 10 63"));
    swap_out(&mut subject, at, PAGES);
    let collected = settle(&mut tracker);
    assert_eq!(populated(only(&collected), at, PAGES), first(PAGES));
    assert_eq!(dirty(only(&collected), at, PAGES), [0, 9, 10, 63]);
    if leaves_alone(kind) {
        assert_eq!(swapped(subject.pid(), at, PAGES), first(PAGES), "a look brings nothing back");
    }
    let collected = settle(&mut tracker);
    assert_eq!(populated(only(&collected), at, PAGES), first(PAGES));
    assert_eq!(dirty(only(&collected), at, PAGES), NONE, "the marks were taken away in swap");
}

fn swapped_pages_that_are_written_are_dirty(kind: TrackerKind) {
    let (mut subject, at, mut tracker, _swap) = prepared(kind, PAGES);
    for turn in 0..3 {
        swap_out(&mut subject, at, PAGES);
        assert_eq!(dirty(only(&settle(&mut tracker)), at, PAGES), NONE, "going to swap is no write");
        if kind == TrackerKind::Compare {
            swap_out(&mut subject, at, PAGES);
        }
        subject.tell(&format!("write {at} {turn} 20"));
        let collected = settle(&mut tracker);
        assert_eq!(dirty(only(&collected), at, PAGES), [turn, 20]);
        assert_eq!(populated(only(&collected), at, PAGES), first(PAGES));
    }
    // Written, out, and in again between two looks.
    subject.tell(&format!("write {at} 30"));
    swap_out(&mut subject, at, PAGES);
    subject.ask(&format!("read {at} {PAGES}"));
    assert_eq!(dirty(only(&settle(&mut tracker)), at, PAGES), [30]);
}

fn swapped_pages_that_are_read_are_not_dirty(kind: TrackerKind) {
    let (mut subject, at, mut tracker, _swap) = prepared(kind, PAGES);
    let before = subject.ask(&format!("read {at} {PAGES}"));
    swap_out(&mut subject, at, PAGES);
    settle(&mut tracker);
    swap_out(&mut subject, at, PAGES);
    assert_eq!(subject.ask(&format!("read {at} {PAGES}")), before);
    assert_eq!(dirty(only(&settle(&mut tracker)), at, PAGES), NONE, "read by the program");
    swap_out(&mut subject, at, PAGES);
    assert_eq!(words(&subject, at, PAGES), before);
    assert_eq!(dirty(only(&settle(&mut tracker)), at, PAGES), NONE, "read by us");
    subject.tell(&format!("write {at} 7"));
    assert_eq!(dirty(only(&settle(&mut tracker)), at, PAGES), [7], "it is watched like before");
}

fn swapped_pages_are_there_from_the_first(kind: TrackerKind) {
    let _swap = Swap::on().expect("swap");
    let mut subject = Subject::start();
    let at = subject.number(&format!("map {PAGES}"));
    subject.tell(&format!("write-all {at} {PAGES}"));
    let before = subject.ask(&format!("read {at} {PAGES}"));
    swap_out(&mut subject, at, PAGES);
    let mut tracker = Tracker::attach(subject.target(), kind).expect("attach");
    let collected = settle(&mut tracker);
    assert_eq!(dirty(only(&collected), at, PAGES), first(PAGES), "everything, the first time");
    assert_eq!(words(&subject, at, PAGES), before);
    assert_eq!(dirty(only(&settle(&mut tracker)), at, PAGES), NONE);
    subject.tell(&format!("write {at} 40"));
    assert_eq!(dirty(only(&settle(&mut tracker)), at, PAGES), [40]);
}

fn a_frozen_collect_sees_swapped_pages(kind: TrackerKind) {
    let (mut subject, at, mut tracker, _swap) = prepared(kind, PAGES);
    subject.tell(&format!("write {at} 3 50"));
    swap_out(&mut subject, at, PAGES);
    let before = words(&subject, at, 1);
    subject.stop();
    let collected = tracker.collect(TreeState::Frozen).expect("collect");
    assert_eq!(populated(only(&collected), at, PAGES), first(PAGES));
    let expected = if kind == TrackerKind::Compare { first(PAGES) } else { vec![3, 50] };
    assert_eq!(dirty(only(&collected), at, PAGES), expected);
    subject.signal(Signal::SIGCONT);
    assert_eq!(subject.ask(&format!("read {at} 1")), before);
}

fn swapped_pages_that_are_given_back_are_gone(kind: TrackerKind) {
    let (mut subject, at, mut tracker, _swap) = prepared(kind, PAGES);
    swap_out(&mut subject, at, PAGES);
    settle(&mut tracker);
    settle(&mut tracker);
    subject.tell(&format!("advise {at} 8 {}", libc::MADV_DONTNEED));
    let collected = settle(&mut tracker);
    assert_eq!(populated(only(&collected), at, PAGES), (8..PAGES).collect::<Vec<_>>());
    assert_eq!(dirty(only(&collected), at, PAGES), NONE);
    subject.tell(&format!("write {at} 2"));
    let collected = settle(&mut tracker);
    assert_eq!(dirty(only(&collected), at, PAGES), [2]);
    assert_eq!(populated(only(&collected), at, 8), [2]);
}

fn a_child_has_swapped_pages(kind: TrackerKind) {
    let (mut subject, at, mut tracker, _swap) = prepared(kind, PAGES);
    swap_out(&mut subject, at, PAGES);
    let child = subject.number("fork") as i32;
    let of = |collected: &Collected, pid| {
        let scan = collected.spaces.iter().find(|scan| scan.target.pid() == pid).expect("the process");
        (dirty(scan, at, PAGES), populated(scan, at, PAGES))
    };
    let collected = settle(&mut tracker);
    assert_eq!(of(&collected, child), (first(PAGES), first(PAGES)), "everything, the first time");
    assert_eq!(of(&collected, subject.pid()), (vec![], first(PAGES)));
    assert_eq!(subject.ask(&format!("child write {at} 5")), "ok");
    subject.tell(&format!("write {at} 6"));
    let collected = settle(&mut tracker);
    assert_eq!(of(&collected, child), (vec![5], first(PAGES)));
    assert_eq!(of(&collected, subject.pid()), (vec![6], first(PAGES)));
}

fn in_and_out_of_swap_many_times(kind: TrackerKind) {
    // Long enough for what is remembered of the look before, and for the quick question.
    const MANY: u64 = 2000;
    let (mut subject, at, mut tracker, _swap) = prepared(kind, MANY);
    for turn in 0..12u64 {
        let (from, len) = (turn * 137 % 1500, 400);
        swap_out(&mut subject, at + from * 4096, len);
        let wanted = [turn, from + 1, from + len - 1];
        let mut sorted = wanted.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        if turn % 3 == 0 {
            settle(&mut tracker);
        }
        let list: Vec<String> = wanted.iter().map(u64::to_string).collect();
        subject.tell(&format!("write {at} {}", list.join(" ")));
        if turn % 2 == 0 {
            swap_out(&mut subject, at, 300);
        }
        let collected = settle(&mut tracker);
        assert_eq!(dirty(only(&collected), at, MANY), sorted, "turn {turn}");
        assert_eq!(populated(only(&collected), at, MANY), first(MANY), "turn {turn}");
    }
}

/// A copy that follows the looks has in the end what the program has.
fn a_writer_whose_pages_are_swapped(kind: TrackerKind) {
    let (mut subject, at, mut tracker, _swap) = prepared(kind, PAGES);
    subject.tell(&format!("write-behind {at} {PAGES}"));
    let mut copy: Vec<String> = words(&subject, at, PAGES).split(' ').map(str::to_owned).collect();
    for _ in 0..20 {
        subject.tell(&format!("advise {at} {PAGES} {}", libc::MADV_PAGEOUT));
        let collected = settle(&mut tracker);
        for page in dirty(only(&collected), at, PAGES) {
            copy[page as usize] = words(&subject, at + page * 4096, 1);
        }
    }
    subject.stop();
    let collected = tracker.collect(TreeState::Frozen).expect("collect");
    for page in dirty(only(&collected), at, PAGES) {
        copy[page as usize] = words(&subject, at + page * 4096, 1);
    }
    assert_eq!(copy.join(" "), words(&subject, at, PAGES));
    subject.signal(Signal::SIGCONT);
}

fn shared_memory_in_swap(kind: TrackerKind) {
    let _swap = Swap::on().expect("swap");
    let mut subject = Subject::start();
    let at = subject.number(&format!("share-pages {PAGES}"));
    subject.tell(&format!("write-all {at} {PAGES}"));
    let mut tracker = Tracker::attach_all(subject.target(), kind).expect("attach");
    let of = |collected: &Collected| {
        let [object] = &collected.objects[..] else { panic!("{:?}", collected.objects) };
        (object.dirty.iter().collect::<Vec<_>>(), object.populated.iter().collect::<Vec<_>>())
    };
    assert_eq!(of(&settle(&mut tracker)), (first(PAGES), first(PAGES)));
    let out = |subject: &mut Subject| {
        // Of shared memory the page table keeps nothing, or a note.
        let out = page_out(subject, at, PAGES, |subject| present(subject.pid(), at, PAGES).is_empty());
        assert!(out, "the pages stay: {}", subject.status());
    };
    for turn in 0..3 {
        out(&mut subject);
        let (_, there) = of(&settle(&mut tracker));
        assert_eq!(there, first(PAGES), "in swap");
        subject.tell(&format!("write {at} {turn} 33"));
        let (written, there) = of(&settle(&mut tracker));
        assert!([turn, 33].iter().all(|page| written.contains(page)), "written in swap: {written:?}");
        assert_eq!(there, first(PAGES));
        // Written, out, and in again between two looks: the page table that had the mark has another entry now.
        settle(&mut tracker);
        subject.ask(&format!("read {at} {PAGES}"));
        settle(&mut tracker);
        subject.tell(&format!("write {at} 50 {}", 51 + turn));
        out(&mut subject);
        subject.ask(&format!("read {at} {PAGES}"));
        let (written, _) = of(&settle(&mut tracker));
        assert!([50, 51 + turn].iter().all(|page| written.contains(page)), "out and in again: {written:?}");
        // In, written, and out again.
        out(&mut subject);
        settle(&mut tracker);
        subject.tell(&format!("write {at} 40"));
        out(&mut subject);
        let (written, there) = of(&settle(&mut tracker));
        assert!(written.contains(&40), "in and out again: {written:?}");
        assert_eq!(there, first(PAGES));
    }
}
