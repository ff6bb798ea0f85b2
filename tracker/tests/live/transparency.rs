//! What the tracked program notices: nothing.

use crate::Case;
use crate::content::{collect, only, tracked};
use crate::program::compute;
use crate::subject::{Subject, dirty};
use crate::sys::process::queue;
use nix::sys::signal::Signal;
use pageferry_tracker::{AttachError, Target, Tracker, TrackerKind};
use std::sync::atomic::{AtomicBool, Ordering};

/// The argument that makes the test program a tracker of somebody else: PID and kind.
pub const ARGUMENT: &str = "--track";
/// The same, for all memory.
pub const ARGUMENT_ALL: &str = "--track-all";

pub const CASES: &[Case] = &[
    ("signals_are_delivered_exactly", signals_are_delivered_exactly),
    ("a_stop_that_arrives_is_not_lost", a_stop_that_arrives_is_not_lost),
    ("registers_survive", registers_survive),
    ("mappings_that_grow_while_they_are_taken_up_stay_in_one_piece", mappings_stay_in_one_piece),
    ("a_blocked_read_goes_on", a_blocked_read_goes_on),
    ("a_sleep_is_as_long_as_it_was_meant", a_sleep_is_as_long_as_it_was_meant),
    ("epoll_is_interrupted_at_most", epoll_is_interrupted_at_most),
    ("a_stopped_process_stays_stopped", a_stopped_process_stays_stopped),
    ("a_filtered_process_can_be_tracked", a_filtered_process_can_be_tracked),
    ("an_ignored_trap_stays_ignored", an_ignored_trap_stays_ignored),
    ("nothing_is_left_behind", nothing_is_left_behind),
    ("a_tracker_that_is_killed_leaves_nothing", a_tracker_that_is_killed_leaves_nothing),
];

/// Attaches, looks, and lets go.
fn visit(kind: TrackerKind, subject: &Subject) {
    let mut tracker = Tracker::attach(subject.target(), kind).expect("attach");
    let collected = collect(&mut tracker);
    tracker.acknowledge(collected.ticket);
    tracker.detach().expect("detach");
}

/// How a tracker attaches.
pub type Attach = fn(Target, TrackerKind) -> Result<Tracker, AttachError>;

/// What the first argument of a tracker of somebody else says.
pub fn how(argument: &str) -> Option<Attach> {
    match argument {
        ARGUMENT => Some(Tracker::attach),
        ARGUMENT_ALL => Some(Tracker::attach_all),
        _ => None,
    }
}

/// What a killed tracker does until then.
pub fn track(pid: i32, kind: TrackerKind, attach: Attach) -> ! {
    let target = Target::open(pid).expect("the target");
    let mut tracker = attach(target, kind).expect("attach");
    for turn in 0.. {
        let collected = collect(&mut tracker);
        tracker.acknowledge(collected.ticket);
        if turn == 3 {
            println!("ready");
        }
    }
    unreachable!("collects do not run out")
}

fn signals_are_delivered_exactly(kind: TrackerKind) {
    const QUEUED: u64 = 3000;
    let mut subject = Subject::start();
    subject.tell("count-signals");
    let pid = subject.pid();
    let over = AtomicBool::new(false);
    let plain = std::thread::scope(|scope| {
        let queuer = scope.spawn(|| {
            for value in 1..=QUEUED {
                // A full queue is emptied by the program.
                while queue(pid, value).is_err() {
                    std::thread::yield_now();
                }
                if value % 8 == 0 {
                    std::thread::sleep(std::time::Duration::from_micros(50));
                }
            }
            over.store(true, Ordering::SeqCst);
        });
        let mut plain = 0;
        let mut visits = 0;
        while !over.load(Ordering::SeqCst) || visits < 20 {
            // A plain signal is not queued: the next is sent when the last is not pending any more.
            subject.until("a delivery", |subject| subject.field("ShdPnd").ends_with("000"));
            subject.signal(Signal::SIGUSR1);
            plain += 1;
            visit(kind, &subject);
            visits += 1;
        }
        queuer.join().expect("the queuer ends");
        plain
    });
    subject.until("a delivery", |subject| subject.field("ShdPnd").chars().all(|digit| digit == '0'));
    let wanted = format!("{plain} {QUEUED} {}", QUEUED * (QUEUED + 1) / 2);
    assert_eq!(subject.ask("counts"), wanted, "plain, queued, and the sum of the values");
}

fn a_stop_that_arrives_is_not_lost(kind: TrackerKind) {
    let mut subject = Subject::start();
    for _ in 0..100 {
        let target = subject.target();
        std::thread::scope(|scope| {
            let visitor = scope.spawn(|| {
                for _ in 0..3 {
                    Tracker::attach(target.clone(), kind).expect("attach").detach().expect("detach");
                }
            });
            subject.signal(Signal::SIGSTOP);
            visitor.join().expect("the visitor ends");
        });
        subject.until("the stop that was asked for", Subject::is_stopped);
        subject.signal(Signal::SIGCONT);
        assert_eq!(subject.ask("interrupted"), "0");
    }
}

fn registers_survive(kind: TrackerKind) {
    let mut subject = Subject::start();
    const ROUNDS: u64 = 20_000_000;
    let wanted = compute(ROUNDS);
    subject.order(&format!("compute {ROUNDS}"));
    for _ in 0..50 {
        visit(kind, &subject);
    }
    assert_eq!(subject.answer(), wanted);
}

/// The kernel cuts a mapping of which only a part is registered, and refuses to resize what lies in two.
fn mappings_stay_in_one_piece(kind: TrackerKind) {
    let mut subject = Subject::start();
    let mut tracker = Tracker::attach(subject.target(), kind).expect("attach");
    let subject = &mut subject;
    let answer = std::thread::scope(|scope| {
        let turns = scope.spawn(|| subject.ask("reshape 8000"));
        while !turns.is_finished() {
            let collected = collect(&mut tracker);
            tracker.acknowledge(collected.ticket);
        }
        turns.join().expect("the program answers")
    });
    assert_eq!(answer, "ok");
}

fn a_blocked_read_goes_on(kind: TrackerKind) {
    let mut subject = Subject::start();
    for _ in 0..20 {
        visit(kind, &subject);
    }
    assert_eq!(subject.ask("interrupted"), "0", "read is restarted by the kernel");
}

fn a_sleep_is_as_long_as_it_was_meant(kind: TrackerKind) {
    let mut subject = Subject::start();
    subject.order("sleep 500");
    for _ in 0..20 {
        visit(kind, &subject);
    }
    assert_eq!(subject.answer(), "ok");
}

fn epoll_is_interrupted_at_most(kind: TrackerKind) {
    let mut subject = Subject::start();
    subject.order("epoll");
    const VISITS: u64 = 20;
    for _ in 0..VISITS {
        visit(kind, &subject);
    }
    subject.order("now");
    let interrupted: u64 = subject.answer().parse().expect("no other error than EINTR");
    // Each visit stops it at most twice: to attach, and to look.
    assert!(interrupted <= 2 * VISITS, "{interrupted}");
}

fn a_stopped_process_stays_stopped(kind: TrackerKind) {
    let mut subject = Subject::start();
    let at = subject.number("map 8");
    subject.tell(&format!("write {at} 1 2"));
    subject.tell(&format!("thread {at} 3"));
    subject.stop();
    let mut tracker = Tracker::attach(subject.target(), kind).expect("attach");
    let collected = collect(&mut tracker);
    assert_eq!(dirty(only(&collected), at, 8), [1, 2, 3]);
    subject.until("a stop", Subject::is_stopped);
    tracker.detach().expect("detach");
    subject.until("a stop", Subject::is_stopped);
    // An order that it would obey if it ran.
    subject.order("interrupted");
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert!(subject.is_stopped());
    subject.signal(Signal::SIGCONT);
    assert_eq!(subject.answer(), "0");
}

fn a_filtered_process_can_be_tracked(kind: TrackerKind) {
    let mut subject = Subject::start();
    let at = subject.number("map 8");
    subject.tell("forbid-userfaultfd");
    let mut tracker = tracked(kind, &subject);
    subject.tell(&format!("write {at} 5"));
    assert_eq!(dirty(only(&collect(&mut tracker)), at, 8), [5]);
    tracker.detach().expect("detach");
    assert_eq!(subject.field("Seccomp"), "2");
    // The filter judges again.
    subject.order("call-userfaultfd");
    subject.until("its end", |subject| subject.field("State").starts_with('Z'));
}

fn an_ignored_trap_stays_ignored(kind: TrackerKind) {
    let mut subject = Subject::start();
    subject.tell(&format!("ignore {}", libc::SIGTRAP));
    visit(kind, &subject);
    assert_eq!(subject.ask(&format!("is-ignored {}", libc::SIGTRAP)), "true");
    subject.signal(Signal::SIGTRAP);
    visit(kind, &subject);
    assert_eq!(subject.ask("interrupted"), "0");
}

fn nothing_is_left_behind(kind: TrackerKind) {
    let mut subject = Subject::start();
    let at = subject.number("map 64");
    subject.tell(&format!("write-all {at} 64"));
    let masks = |subject: &Subject| ["SigBlk", "SigIgn", "SigCgt", "Threads"].map(|name| subject.field(name));
    let (descriptors, before) = (subject.descriptors(), masks(&subject));
    let maps = |subject: &Subject| std::fs::read_to_string(format!("/proc/{}/maps", subject.pid())).unwrap();
    let mappings = maps(&subject);
    let mut tracker = tracked(kind, &subject);
    assert_eq!(subject.is_registered(), kind == TrackerKind::UffdWp);
    assert_eq!(subject.descriptors(), descriptors, "while it is tracked");
    assert_eq!(subject.field("TracerPid"), "0", "while it is tracked");
    collect(&mut tracker);
    tracker.detach().expect("detach");
    assert!(!subject.is_registered());
    assert_eq!(subject.descriptors(), descriptors);
    assert_eq!(masks(&subject), before);
    assert_eq!(subject.field("TracerPid"), "0");
    assert_eq!(maps(&subject), mappings);
    // A tracker that is only dropped does the same; and another can come after it.
    let tracker = tracked(kind, &subject);
    drop(tracker);
    assert!(!subject.is_registered());
    let mut tracker = tracked(kind, &subject);
    subject.tell(&format!("write {at} 6"));
    assert_eq!(dirty(only(&collect(&mut tracker)), at, 64), [6]);
}

fn a_tracker_that_is_killed_leaves_nothing(kind: TrackerKind) {
    let mut subject = Subject::start();
    let at = subject.number("map 1000");
    subject.tell(&format!("write-all {at} 1000"));
    let descriptors = subject.descriptors();
    for turn in 0..10 {
        let mut killed = Subject::start_as(&[ARGUMENT, &subject.pid().to_string(), &kind.to_string()]);
        // Somewhere in a collect.
        std::thread::sleep(std::time::Duration::from_micros(turn * 777));
        killed.kill();
        subject.until("the tracker's end", |subject| subject.field("TracerPid") == "0");
        subject.until("the end of the registration", |subject| !subject.is_registered());
        assert_eq!(subject.descriptors(), descriptors);
        assert!(!subject.is_stopped());
        subject.tell(&format!("write-all {at} 1000"));
    }
    let mut tracker = tracked(kind, &subject);
    subject.tell(&format!("write {at} 77"));
    assert_eq!(dirty(only(&collect(&mut tracker)), at, 1000), [77]);
}
