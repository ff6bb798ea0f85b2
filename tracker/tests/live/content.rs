//! Which pages are reported: never too few, and on small pages exactly those that were written.

use crate::Case;
use crate::subject::{Subject, dirty, populated};
use pageferry_tracker::{Collected, PageReader, Run, SpaceScan, Tracker, TrackerKind, TreeState};

pub const CASES: &[Case] = &[("a_known_writer_exactly", a_known_writer_exactly)];

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
