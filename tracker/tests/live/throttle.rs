//! Programs that are slowed down.

use crate::Case;
use crate::content::{collect, only};
use crate::subject::Subject;
use nix::sys::signal::Signal;
use pageferry_tracker::{Throttle, Tracker, TrackerKind};
use std::fs;
use std::time::{Duration, Instant};

pub const CASES: &[Case] = &[
    ("a_throttled_program_stands_still_for_its_share", stands_still_for_its_share),
    ("what_a_throttled_program_writes_is_found", what_it_writes_is_found),
    ("a_throttled_program_may_end", it_may_end),
];

/// Time of processors that it has used, in ticks of 10 ms.
fn used(subject: &Subject) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{}/stat", subject.pid())).expect("the subject lives");
    let fields: Vec<&str> = stat[stat.rfind(')').expect("a name") + 1..].split_whitespace().collect();
    let ticks = |field: usize| fields[field - 3].parse::<u64>().expect("a number");
    Duration::from_millis(10 * (ticks(14) + ticks(15)))
}

fn stands_still_for_its_share(_: TrackerKind) {
    let mut subject = Subject::start();
    let address = subject.number("map 4");
    subject.tell(&format!("write-behind {address} 4"));
    let throttle = Throttle::new(subject.target()).expect("a thread");
    for share in [0.25, 0.75] {
        throttle.set(share);
        let (start, before, stood_before) = (Instant::now(), used(&subject), throttle.stood());
        // Its share of the processor within a second; where the throttle itself had to wait for a processor, it makes up for it.
        for second in 1..=10 {
            std::thread::sleep(Duration::from_secs(1));
            let (wall, used) = (start.elapsed().as_secs_f64(), (used(&subject) - before).as_secs_f64());
            let stood = (throttle.stood() - stood_before).as_secs_f64();
            assert!(throttle.failure().is_none());
            assert!(stood >= wall * share * 0.5, "share {share}: {stood} s of {wall} s");
            // A tick is 10 ms.
            if used <= wall * (1.0 - share) * 1.15 + 0.05 {
                break;
            }
            eprintln!("share {share}: {used} s used in {wall} s");
            assert!(second < 10, "share {share}: {used} s used in {wall} s");
        }
    }
    drop(throttle);
    assert_eq!(subject.field("TracerPid"), "0", "nobody traces it any more");
    let turns = |subject: &mut Subject| subject.number(&format!("read {address} 1"));
    let before = turns(&mut subject);
    std::thread::sleep(Duration::from_millis(50));
    assert!(turns(&mut subject) > before, "it runs on");
}

fn what_it_writes_is_found(kind: TrackerKind) {
    let mut subject = Subject::start();
    let address = subject.number("map 64");
    let mut tracker = Tracker::attach(subject.target(), kind).expect("attach");
    let throttle = Throttle::new(subject.target()).expect("a thread");
    throttle.set(0.8);
    let look = |tracker: &mut Tracker| {
        let _undisturbed = throttle.undisturbed();
        let collected = collect(tracker);
        tracker.acknowledge(collected.ticket);
        collected
    };
    look(&mut tracker);
    look(&mut tracker);
    for page in 0..8u64 {
        subject.tell(&format!("write {address} {}", page * 8));
        let collected = look(&mut tracker);
        let space = only(&collected);
        assert!(
            space.dirty.contains(address / 4096 + page * 8),
            "page {page} was written: {:?}",
            space.dirty
        );
    }
    drop(throttle);
    tracker.detach().expect("detach");
}

fn it_may_end(_: TrackerKind) {
    let subject = Subject::start();
    let throttle = Throttle::new(subject.target()).expect("a thread");
    throttle.set(0.9);
    std::thread::sleep(Duration::from_millis(120));
    subject.signal(Signal::SIGKILL);
    for _ in 0..1000 {
        if throttle.share() == 0.0 {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(throttle.share(), 0.0, "nothing is left to slow down");
    assert!(throttle.failure().is_some(), "and it is said");
}
