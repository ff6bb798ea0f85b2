use super::*;
use crate::attach::SpaceKey;
use crate::observation::{ObjectId, ObservedObject, ObservedRegion, ObservedSpace};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const KEY: SpaceKey = SpaceKey(0);

fn pages(runs: &[(u64, u64)]) -> PageSet {
    runs.iter().map(|(start, len)| Run { start: *start, len: *len }).collect()
}

fn region(start: u64, end: u64, kind: RegionKind) -> ObservedRegion {
    ObservedRegion { start, end, kind, name: String::new() }
}

fn space(key: SpaceKey, is_new: bool, regions: Vec<ObservedRegion>, dirty: PageSet) -> ObservedSpace {
    let populated = regions.iter().map(|r| Run { start: r.start, len: r.end - r.start }).collect();
    ObservedSpace {
        key,
        pid: 100 + key.0 as i32,
        name: "program".into(),
        is_new,
        regions,
        populated,
        dirty,
        unchanged: None,
    }
}

/// A program with one heap of 10 000 pages that is scanned ten times a second.
struct Program {
    estimator: Estimator,
    scans: u32,
}

impl Program {
    fn new() -> Self {
        let mut program = Self { estimator: Estimator::new(), scans: 0 };
        program.scan(&[(0, 10_000)]);
        program
    }

    fn scan(&mut self, dirty: &[(u64, u64)]) {
        let heap = region(0, 10_000, RegionKind::Heap);
        let seen = space(KEY, self.scans == 0, vec![heap], pages(dirty));
        let at = Duration::from_millis(100) * self.scans;
        self.estimator.observe(&Observation { at, spaces: vec![seen], ..Observation::default() });
        self.scans += 1;
    }
}

fn near(found: f64, expected: f64) {
    assert!((found - expected).abs() <= 1e-6 * expected.abs().max(1.0), "{found} instead of {expected}");
}

#[test]
fn nothing_is_known_before_the_second_scan() {
    for program in [Estimator::new(), Program::new().estimator] {
        assert!(program.curve().is_empty());
        assert_eq!(program.wws(Duration::from_millis(100)), None);
        assert_eq!(program.wws(Duration::ZERO), None);
        assert_eq!(program.dirty_rate(), DirtyRate::default());
        assert_eq!(program.last_interval(), DirtyRate::default());
        assert_eq!(program.hot_set(1.0), HotSet::default());
        assert!(program.frequency(KEY).is_empty());
        assert!(program.regions().iter().all(|region| region.dirty == 0 && region.distinct == 0));
    }
    assert_eq!(Program::new().estimator.regions()[0].populated, 10_000);
}

#[test]
fn between_two_points_the_neighbours_bound_the_error() {
    let mut program = Program::new();
    (0..20).for_each(|scan| program.scan(&[(scan * 10, 10)]));
    let estimator = &program.estimator;
    near(estimator.wws(Duration::from_millis(300)).unwrap().pages, 30.0);
    let between = estimator.wws(Duration::from_millis(325)).unwrap();
    near(between.pages, 32.5);
    // Scans without jitter that take no time: only the neighbours are left.
    near(between.error, 7.5);
    // Below the interval nothing was seen.
    let below = estimator.wws(Duration::from_millis(50)).unwrap();
    assert_eq!((below.pages, below.error), (5.0, 5.0));
    assert_eq!(estimator.wws(Duration::ZERO).unwrap().pages, 0.0);
    // The whole run is the longest window.
    near(estimator.wws(Duration::from_secs(2)).unwrap().pages, 200.0);
    assert_eq!(estimator.wws(Duration::from_millis(2001)), None);
}

#[test]
fn uneven_and_slow_scans_are_stated_as_error() {
    let with = |jitter: u64, took: u64| {
        let mut estimator = Estimator::new();
        for scan in 0..40u64 {
            let heap = region(0, 1000, RegionKind::Heap);
            let seen = space(KEY, scan == 0, vec![heap], pages(&[(scan * 20, 20)]));
            let at = Duration::from_millis(100 * scan + 50 + scan % 2 * jitter);
            let took = Duration::from_millis(took);
            estimator.observe(&Observation { at, took, spaces: vec![seen], ..Observation::default() });
        }
        estimator.wws(Duration::from_millis(200)).unwrap().error
    };
    assert!(with(0, 0) < 1e-6);
    near(with(0, 10), 2.0); // 200 pages/s for 10 ms
    assert!(with(20, 0) > 0.0 && with(20, 10) > with(0, 10));
}

#[test]
fn the_curve_has_every_short_window_and_the_whole_run() {
    let mut program = Program::new();
    (0..1000).for_each(|scan| program.scan(&[(scan % 100, 1)]));
    let curve = program.estimator.curve();
    assert!(curve.len() < 130, "{} points", curve.len());
    for (at, point) in curve.iter().take(16).enumerate() {
        assert_eq!(point.tau.as_millis(), 100 * (at as u128 + 1));
        near(point.pages, at as f64 + 1.0);
    }
    assert!(curve.windows(2).all(|w| w[0].tau < w[1].tau && w[0].pages <= w[1].pages + 1e-9));
    let last = curve.last().unwrap();
    assert_eq!((last.tau, last.pages), (Duration::from_secs(100), 100.0));
}

#[test]
fn rates_tell_first_writes_from_others_and_bytes_that_stay() {
    let mut program = Program::new();
    program.scan(&[(0, 100)]);
    program.scan(&[(50, 100)]);
    let whole = program.estimator.dirty_rate();
    near(whole.total, 1000.0);
    near(whole.first_time, 750.0);
    near(whole.repeated, 250.0);
    assert_eq!(whole.unchanged, None);
    let last = program.estimator.last_interval();
    near(last.total, 1000.0);
    near(last.first_time, 500.0);
    near(last.repeated, 500.0);

    // From here on somebody looks at contents.
    let heap = region(0, 10_000, RegionKind::Heap);
    let mut seen = space(KEY, false, vec![heap], pages(&[(0, 10)]));
    seen.unchanged = Some(pages(&[(2, 4)]));
    let at = Duration::from_millis(300);
    program.estimator.observe(&Observation { at, spaces: vec![seen], ..Observation::default() });
    near(program.estimator.last_interval().unchanged.unwrap(), 40.0);
    near(program.estimator.dirty_rate().unchanged.unwrap(), 40.0);
}

#[test]
fn frequency_counts_the_last_eight_intervals() {
    let mut program = Program::new();
    program.scan(&[(500, 3)]);
    for scan in 0..8 {
        // Pages 0..64 always, the next 64 every other time, page 200 once at the very beginning.
        let every_other = if scan % 2 == 0 { 64 } else { 0 };
        program.scan(&[(0, 64 + every_other), (200, u64::from(scan == 0))]);
    }
    let frequency = program.estimator.frequency(KEY);
    let expected =
        [(0, 64, 8), (64, 64, 4), (200, 1, 1)].map(|(start, len, count)| (Run { start, len }, count));
    assert_eq!(frequency, expected, "page 500 was written too long ago");
    assert!(program.estimator.frequency(SpaceKey(7)).is_empty());
}

#[test]
fn the_hot_set_is_what_a_link_cannot_keep_up_with() {
    let mut program = Program::new();
    // 1000 pages in every interval, 800 others in every fourth, and ever new ones that are not written again.
    for scan in 0..16 {
        let others = if scan % 4 == 0 { 800 } else { 0 };
        program.scan(&[(0, 1000), (2000, others), (5000 + scan * 100, 100)]);
    }
    let hot = |pages_per_second: f64| program.estimator.hot_set(pages_per_second * 4096.0);
    // Hot pages come at 10 000/s, the others at 2000/s.
    assert_eq!(hot(20_000.0), HotSet::default());
    // Too slow for the first, quick enough to send both within the 400 ms of the others:
    // 1000 + T x 2000 = T x 8000 at T = 167 ms.
    let some = hot(8_000.0);
    assert_eq!(some.pages, [(KEY.into(), pages(&[(0, 1000)]))]);
    assert_eq!(some.total, 1000);
    near(some.round.as_secs_f64(), 1.0 / 6.0);
    // Too slow for both; what was written once is still no reason.
    let both = hot(4_000.0);
    assert_eq!(both.pages, [(KEY.into(), pages(&[(0, 1000), (2000, 800)]))]);
    near(both.round.as_secs_f64(), 0.45);
    for none in [0.0, -1.0, f64::NAN] {
        assert_eq!(hot(none).total, 1800, "no link at all");
    }
}

#[test]
fn a_page_that_rests_for_long_is_hot_for_a_slow_link_only() {
    let mut program = Program::new();
    program.scan(&[(0, 100)]);
    program.scan(&[(0, 100)]);
    (0..38).for_each(|_| program.scan(&[]));
    // Written twice, and then not for 3.8 s: at the best, again after as long.
    let hot = |pages_per_second: f64| program.estimator.hot_set(pages_per_second * 4096.0).total;
    assert_eq!(hot(100.0 / 3.7), 0);
    assert_eq!(hot(100.0 / 3.9), 100);
}

#[test]
fn regions_have_their_own_numbers() {
    let mut estimator = Estimator::new();
    for scan in 0..=10u64 {
        let regions = vec![region(0, 100, RegionKind::Heap), region(100, 150, RegionKind::Anonymous)];
        let first = space(KEY, scan == 0, regions, pages(&[(90, 20)]));
        let other =
            space(SpaceKey(1), scan == 0, vec![region(90, 200, RegionKind::Stack)], pages(&[(90 + scan, 1)]));
        let at = Duration::from_millis(100 * scan);
        estimator.observe(&Observation { at, spaces: vec![first, other], ..Observation::default() });
    }
    let uses = estimator.regions();
    let numbers: Vec<_> = uses.iter().map(|u| (u.pid, u.kind, u.populated, u.dirty, u.distinct)).collect();
    assert_eq!(
        numbers,
        [
            (Some(100), RegionKind::Heap, 100, 10, 10),
            (Some(100), RegionKind::Anonymous, 50, 10, 10),
            (Some(101), RegionKind::Stack, 110, 1, 10),
        ]
    );
    near(uses[0].pages_per_second, 100.0);
    near(uses[2].pages_per_second, 10.0);
}

/// docs/WORKING-SET.md states this.
#[test]
fn five_bytes_and_a_half_remember_a_page() {
    let block = pages::block_size();
    // Number and pointer are in the map.
    assert_eq!((block + 16, 64), (344, 64), "bytes of a block of 64 pages");
    assert!((block + 16) as f64 / 64.0 < 5.5);
}

/// What a page is called in the model: its space, how often its mapping was replaced, its number.
type Page = (SpaceKey, u32, u64);

#[derive(Clone, Debug)]
enum Event {
    Nothing,
    Unmap,
    Map,
    Fork,
    Exit,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        8 => Just(Event::Nothing),
        1 => Just(Event::Unmap),
        1 => Just(Event::Map),
        1 => Just(Event::Fork),
        1 => Just(Event::Exit),
    ]
}

type Step = (Event, u64, u64, Vec<(bool, u64, u64)>);

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let writes = proptest::collection::vec((any::<bool>(), 0u64..150, 1u64..40), 0..4);
    proptest::collection::vec((event(), 1u64..200, 0u64..100, writes), 1..40)
}

proptest! {
    /// The estimator beside a model that keeps every write: mappings that go and come back, children that come and
    /// end, uneven intervals.
    #[test]
    fn the_estimator_agrees_with_a_log_of_all_writes(steps in steps()) {
        let mut estimator = Estimator::new();
        let mut log: Vec<BTreeSet<Page>> = Vec::new();
        let mut times: Vec<Duration> = Vec::new();
        let (mut total, mut mapped, mut generation) = (0u64, true, 0u32);
        let mut child: Option<(SpaceKey, bool)> = None;
        let mut next_key = 1;
        let mut at = Duration::from_millis(200);
        for (scan, (event, dt, took, writes)) in steps.into_iter().enumerate() {
            at += Duration::from_millis(dt);
            let took = Duration::from_millis(took.min(dt));
            let mut exited = Vec::new();
            match event {
                Event::Unmap if mapped => { mapped = false; generation += 1; }
                Event::Map => mapped = true,
                Event::Fork if child.is_none() => {
                    child = Some((SpaceKey(next_key), true));
                    next_key += 1;
                }
                Event::Exit => exited.extend(child.take().map(|(key, _)| key)),
                _ => {}
            }
            let mut regions = vec![region(0, 100, RegionKind::Heap)];
            if mapped {
                regions.push(region(100, 200, RegionKind::Anonymous));
            }
            let present = if mapped { 200 } else { 100 };
            let (mut own, mut of_child) = (PageSet::default(), PageSet::default());
            for (by_child, start, len) in writes {
                if by_child { of_child.insert(start, len) } else { own.insert(start, len) }
            }
            own = own.intersect(&pages(&[(0, present)]));
            let mut interval = BTreeSet::new();
            interval.extend(own.iter().map(|page| (KEY, if page < 100 { 0 } else { generation }, page)));
            let mut spaces = vec![space(KEY, scan == 0, regions, own)];
            if let Some((key, is_new)) = &mut child {
                if !*is_new {
                    interval.extend(of_child.iter().map(|page| (*key, 0, page)));
                }
                spaces.push(space(*key, *is_new, vec![region(0, 200, RegionKind::Heap)], of_child));
                *is_new = false;
            }
            estimator.observe(&Observation { at, took, spaces, exited, ..Observation::default() });
            let middle = at - took / 2;
            times.push(middle.max(times.last().copied().unwrap_or_default()));
            if scan > 0 {
                total += interval.len() as u64;
                log.push(interval);
            }
        }

        let n = log.len();
        let curve = estimator.curve();
        prop_assert_eq!(curve.len(), curve::thinned(n).len());
        for (k, point) in curve::thinned(n).into_iter().zip(curve) {
            let windows = log.windows(k).map(|w| w.iter().flatten().collect::<BTreeSet<_>>().len());
            let mean = windows.sum::<usize>() as f64 / (n - k + 1) as f64;
            prop_assert!((point.pages - mean).abs() < 1e-6, "{} intervals: {} for {}", k, point.pages, mean);
            let lengths: f64 = (k..=n).map(|end| (times[end] - times[end - k]).as_secs_f64()).sum();
            let tau = lengths / (n - k + 1) as f64;
            prop_assert!((point.tau.as_secs_f64() - tau).abs() < 1e-6);
            prop_assert!(point.error >= 0.0);
            let found = estimator.wws(point.tau);
            prop_assert!(found.is_some(), "{:?}", point);
        }

        let seconds = (times[n] - times[0]).as_secs_f64();
        if seconds > 0.0 {
            let distinct = log.iter().flatten().collect::<BTreeSet<_>>().len() as f64;
            let rate = estimator.dirty_rate();
            prop_assert!((rate.total * seconds - total as f64).abs() < 1e-6);
            prop_assert!((rate.first_time * seconds - distinct).abs() < 1e-6);
            prop_assert!((rate.first_time + rate.repeated - rate.total).abs() < 1e-6);
        }

        let mut counts: BTreeMap<u64, u8> = BTreeMap::new();
        let now = |page: u64| if page < 100 { 0 } else { generation };
        for (key, of, page) in log.iter().rev().take(8).flatten() {
            if *key == KEY && *of == now(*page) {
                *counts.entry(*page).or_default() += 1;
            }
        }
        let frequency = estimator.frequency(KEY);
        let found: BTreeMap<u64, u8> =
            frequency.iter().flat_map(|(run, count)| (run.start..run.end()).map(|page| (page, *count))).collect();
        prop_assert_eq!(found, counts);
        prop_assert!(frequency.windows(2).all(|w| w[0].0.end() < w[1].0.start || w[0].1 != w[1].1));

        for region in estimator.regions() {
            let own = |(key, of, page): &&Page| {
                let is_now = region.owner != KEY.into() || *of == now(*page);
                region.owner == (*key).into() && is_now && (region.start..region.end).contains(page)
            };
            let distinct = log.iter().flatten().filter(own).collect::<BTreeSet<_>>().len();
            prop_assert_eq!(region.distinct, distinct as u64);
        }
    }
}

#[test]
fn a_shared_object_is_counted_once_and_forgotten_when_it_is_gone() {
    let id = ObjectId { device: (0, 1), inode: 7 };
    let object = |is_new, len, dirty: &[(u64, u64)]| ObservedObject {
        id,
        name: "/dev/shm/x".into(),
        is_new,
        mapped_by: vec![SpaceKey(0), SpaceKey(1)],
        populated: pages(&[(0, len)]),
        dirty: pages(dirty),
        unchanged: None,
    };
    let shared = region(500, 600, RegionKind::Shared);
    let mut estimator = Estimator::new();
    let mut scan = |at: u64, objects: Vec<ObservedObject>| {
        let of = |key| ObservedSpace {
            populated: PageSet::default(),
            ..space(SpaceKey(key), at == 0, vec![shared.clone()], PageSet::default())
        };
        let at = Duration::from_millis(100 * at);
        let spaces = vec![of(0), of(1)];
        estimator.observe(&Observation { at, spaces, objects, ..Observation::default() });
        estimator.clone()
    };
    scan(0, vec![object(true, 100, &[(0, 100)])]);
    scan(1, vec![object(false, 100, &[(0, 10)])]);
    let estimator = scan(2, vec![object(false, 80, &[(5, 10)])]);
    near(estimator.dirty_rate().total, 100.0);
    near(estimator.wws(Duration::from_millis(200)).unwrap().pages, 15.0);
    assert_eq!(
        estimator.frequency(id),
        [(Run { start: 0, len: 5 }, 1), (Run { start: 5, len: 5 }, 2), (Run { start: 10, len: 5 }, 1)]
    );
    let uses = estimator.regions();
    let of_object: Vec<_> = uses.iter().filter(|region| region.owner == id.into()).collect();
    let [only] = &of_object[..] else { panic!("{uses:?}") };
    assert_eq!((only.pid, only.processes, only.start, only.end), (None, 2, 0, 80));
    assert_eq!((only.populated, only.dirty, only.distinct, only.kind), (80, 10, 15, RegionKind::Shared));
    assert_eq!(
        uses.iter().filter(|region| region.pid.is_some()).map(|region| region.populated).sum::<u64>(),
        0
    );
    let gone = scan(3, vec![]);
    assert!(gone.regions().iter().all(|region| region.owner != id.into()));
    // Another one with its numbers is a base, and no write.
    let estimator = scan(4, vec![object(true, 100, &[(0, 100)])]);
    assert_eq!(estimator.last_interval().total, 0.0);
}
