//! Memory of hugetlbfs. The machine must have huge pages for it: they are taken from the free memory for as long as it
//! takes to map them, and the machine's setting is what it was before when that is done.

use crate::Case;
use crate::content::{collect, only};
use crate::subject::{Subject, dirty, populated};
use crate::sys::objects::HUGE;
use pageferry_tracker::{Tracker, TrackerKind};
use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub const CASES: &[Case] = &[
    ("private_huge_pages", private_huge_pages),
    ("shared_huge_pages", shared_huge_pages),
    ("huge_pages_are_not_lazy", huge_pages_are_not_lazy),
];

const SETTING: &str = "/proc/sys/vm/nr_hugepages";
/// Pages of 2 MiB that a case maps.
const COUNT: u64 = 3;

/// Huge pages that wait to be mapped. Who has them keeps them when the setting is put back.
struct Reserve {
    before: String,
    _alone: MutexGuard<'static, ()>,
}

impl Reserve {
    fn new() -> Result<Self, String> {
        static ONE: Mutex<()> = Mutex::new(());
        let alone = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = |error| format!("{SETTING}: {error}");
        let before = fs::read_to_string(SETTING).map_err(failed)?.trim().to_owned();
        let count: u64 = before.parse().map_err(|_| format!("{SETTING} says {before:?}"))?;
        let reserve = Self { before, _alone: alone };
        fs::write(SETTING, (count + COUNT).to_string()).map_err(failed)?;
        let now = fs::read_to_string(SETTING).map_err(failed)?;
        if now.trim().parse() != Ok(count + COUNT) {
            return Err(format!("no {COUNT} free pages of 2 MiB (nr_hugepages stays {})", now.trim()));
        }
        // The kernel counts pages that are still mapped into a process of an earlier case, which has just been ended, as ours.
        let patience = Instant::now() + Duration::from_secs(10);
        while free()? < COUNT {
            if Instant::now() > patience {
                return Err(format!("others have all but {} of the {COUNT} pages of 2 MiB", free()?));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(reserve)
    }
}

/// Huge pages that nobody has mapped or reserved.
fn free() -> Result<u64, String> {
    let meminfo = fs::read_to_string("/proc/meminfo").map_err(|error| format!("/proc/meminfo: {error}"))?;
    let field = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|value| value.trim().parse::<u64>().ok())
            .ok_or_else(|| format!("/proc/meminfo has no {name}"))
    };
    Ok(field("HugePages_Free")?.saturating_sub(field("HugePages_Rsvd")?))
}

impl Drop for Reserve {
    fn drop(&mut self) {
        // In a test that fails already this cannot be told any better.
        let _ = fs::write(SETTING, &self.before);
    }
}

/// Why these cases cannot run here.
pub fn obstacle() -> Option<String> {
    Reserve::new().err().map(|why| format!("needs huge pages: {why}"))
}

/// A subject that has huge pages, all written.
fn prepared(shared: bool) -> (Subject, u64) {
    let mut subject = Subject::start();
    let reserve = Reserve::new().expect("huge pages");
    let at = subject.number(&format!("map-hugetlb {COUNT} {}", u64::from(shared)));
    subject.tell(&format!("write-all {at} {}", COUNT * HUGE));
    drop(reserve);
    (subject, at)
}

/// What a source says of one small page that was written: nobody less than that page.
fn expected(kind: TrackerKind, page: u64) -> Vec<u64> {
    match kind {
        TrackerKind::Compare => vec![page],
        // Protected as a whole.
        TrackerKind::UffdWp => (page / HUGE * HUGE..(page / HUGE + 1) * HUGE).collect(),
        // Has no bit for it.
        TrackerKind::SoftDirty | TrackerKind::SoftDirtyScan => (0..COUNT * HUGE).collect(),
    }
}

fn settle(tracker: &mut Tracker) -> pageferry_tracker::Collected {
    let collected = collect(tracker);
    tracker.acknowledge(collected.ticket);
    collected
}

fn private_huge_pages(kind: TrackerKind) {
    let (mut subject, at) = prepared(false);
    let all = COUNT * HUGE;
    let mut tracker = Tracker::attach_all(subject.target(), kind).expect("attach");
    let collected = settle(&mut tracker);
    assert_eq!(dirty(only(&collected), at, all), (0..all).collect::<Vec<_>>());
    for page in [0, HUGE + 5, all - 1] {
        subject.tell(&format!("write {at} {page}"));
        let collected = settle(&mut tracker);
        assert_eq!(dirty(only(&collected), at, all), expected(kind, page), "page {page}");
        assert_eq!(populated(only(&collected), at, all).len() as u64, all);
        let named =
            only(&collected).untracked.iter().any(|untracked| untracked.start == at && untracked.named);
        assert_eq!(named, kind.stops_the_tree(), "it says so where it cannot see");
    }
}

fn shared_huge_pages(kind: TrackerKind) {
    let (mut subject, at) = prepared(true);
    let all = COUNT * HUGE;
    subject.number("fork");
    // A first touch, so that the child has them in its page table too.
    assert!(!subject.ask(&format!("child read {at} {all}")).is_empty());
    let mut tracker = Tracker::attach_all(subject.target(), kind).expect("attach");
    let collected = settle(&mut tracker);
    let [object] = &collected.objects[..] else { panic!("{:?}", collected.objects) };
    assert_eq!((object.populated.len(), object.mapped_by.len()), (all, 2));
    subject.tell(&format!("write {at} 3"));
    let collected = settle(&mut tracker);
    assert_eq!(collected.objects[0].dirty.iter().collect::<Vec<_>>(), expected(kind, 3));
    let child = subject.ask(&format!("child write {at} {}", HUGE + 9));
    assert_eq!(child, "ok");
    let collected = settle(&mut tracker);
    assert_eq!(collected.objects[0].dirty.iter().collect::<Vec<_>>(), expected(kind, HUGE + 9));
}

fn huge_pages_are_not_lazy(kind: TrackerKind) {
    let (mut subject, at) = prepared(false);
    let mut tracker = Tracker::attach(subject.target(), kind).expect("attach");
    assert!(populated(only(&settle(&mut tracker)), at, COUNT * HUGE).is_empty());
    subject.tell(&format!("write {at} 5"));
    assert!(populated(only(&settle(&mut tracker)), at, COUNT * HUGE).is_empty());
}
