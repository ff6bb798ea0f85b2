//! How large recordings of large programs are.

use super::tests::{header, pages};
use super::*;
use crate::attach::SpaceKey;
use crate::observation::{Observation, ObservedRegion, ObservedSpace, RegionKind};
use crate::page_set::{PageSet, Run};

/// Counts bytes.
#[derive(Default)]
struct Counter(u64);

impl io::Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

const PAGES: u64 = 1 << 20; // 4 GiB
const BASE: u64 = 0x7_f000_0000;

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        // splitmix64 (Steele, Lea, Flood 2014)
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((u128::from(z ^ (z >> 31)) * u128::from(limit)) >> 64) as u64
    }
}

/// A minute of a process of 4 GiB at ten scans a second; how many bytes its recording takes.
fn minute(mut dirty: impl FnMut(u64) -> Vec<u64>) -> u64 {
    let mut writer = Writer::new(Counter::default(), &header()).unwrap();
    let populated = pages(&[(BASE, PAGES)]);
    for scan in 0..=600 {
        let mut written: Vec<u64> = dirty(scan);
        written.sort_unstable();
        let mut written: PageSet =
            written.into_iter().map(|page| Run { start: BASE + page, len: 1 }).collect();
        if scan == 0 {
            written = populated.clone();
        }
        let space = ObservedSpace {
            key: SpaceKey(0),
            pid: 4711,
            name: "program".into(),
            is_new: scan == 0,
            regions: vec![ObservedRegion {
                start: BASE,
                end: BASE + PAGES,
                kind: RegionKind::Anonymous,
                name: String::new(),
            }],
            populated: populated.clone(),
            dirty: written,
            unchanged: None,
        };
        let at = Duration::from_millis(100 * scan + scan % 7);
        let took = Duration::from_micros(1500 + scan % 13);
        let observation = Observation { at, took, spaces: vec![space], ..Observation::default() };
        writer.write(&observation).unwrap();
    }
    writer.finish().unwrap().0
}

#[test]
fn a_minute_of_four_gibibytes_stays_below_20_mb() {
    let limit = 20_000_000;
    let mut random = Random(1);
    // 10 MB/s over all of the memory: 244 pages a scan.
    let uniform = minute(|_| (0..244).map(|_| random.below(PAGES)).collect());
    assert!(uniform < limit / 20, "uniform writes at 10 MB/s take {uniform} bytes");
    // 400 MB/s, which are 9766 writes a scan, into hot sets of different sizes.
    for hot in [1 << 13, 1 << 15, 1 << 17, PAGES] {
        let size = minute(|_| (0..9766).map(|_| random.below(hot) * (PAGES / hot)).collect());
        assert!(size < limit, "a hot set of {hot} pages at 400 MB/s takes {size} bytes");
    }
    // The same as sequential writes.
    let sequential = minute(|scan| (0..9766).map(|page| (scan * 9766 + page) % PAGES).collect());
    assert!(sequential < limit / 200, "sequential writes take {sequential} bytes");
}

#[test]
fn forty_thousand_mappings_cost_what_changes_of_them() {
    let mut regions: Vec<ObservedRegion> = (0..40_000u64)
        .map(|at| ObservedRegion {
            start: BASE + at * 4,
            end: BASE + at * 4 + 2,
            kind: RegionKind::FilePrivate,
            name: format!("/usr/lib/lib{at}.so"),
        })
        .collect();
    let mut sizes = Vec::new();
    let mut writer = Writer::new(Vec::new(), &header()).unwrap();
    for scan in 0..4 {
        if scan == 2 {
            // One in the middle goes.
            regions.remove(20_000);
        }
        let populated = regions.iter().map(|r| Run { start: r.start, len: 1 }).collect();
        let space = ObservedSpace {
            key: SpaceKey(0),
            pid: 4711,
            name: "program".into(),
            is_new: scan == 0,
            regions: regions.clone(),
            populated,
            dirty: PageSet::default(),
            unchanged: None,
        };
        let observation = Observation { spaces: vec![space], ..Observation::default() };
        writer.write(&observation).unwrap();
        sizes.push(writer.output.len());
    }
    assert!(sizes[0] > 15_000, "{sizes:?}");
    assert!(sizes[3] - sizes[0] < 300, "{sizes:?}");
    let file = writer.finish().unwrap();
    let last = Reader::new(&file[..]).unwrap().last().unwrap().unwrap();
    assert_eq!(last.spaces[0].regions, regions);
}
