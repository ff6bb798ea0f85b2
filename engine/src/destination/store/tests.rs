//! The store against a plain map of pages, and what it does with batches that are broken.

use super::*;
use pageferry_wire_format::{ZstdEncoder, delta};
use proptest::prelude::*;
use std::collections::BTreeMap;

const SPACE: SpaceId = SpaceId(3);

fn bytes(seed: u64) -> [u8; SLOT_BYTES] {
    let mut bytes = [0; SLOT_BYTES];
    for (at, word) in bytes.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ at as u64).to_le_bytes());
    }
    bytes
}

fn batch(round: u32, coding: Coding, pages: &[(u64, Option<u64>)]) -> PageBatch {
    let mut batch = PageBatch::default();
    batch.clear(SPACE, round, coding);
    for &(page, seed) in pages {
        let content = seed.map_or(digest::ZERO_PAGE, |seed| digest::page(&bytes(seed)));
        batch.push(PageNo(page), seed.is_none(), content);
    }
    batch
}

/// Begins a batch that is sent as it is.
fn begin(store: &mut PageStore, round: u32, pages: &[(u64, Option<u64>)]) -> Result<Landing, StoreError> {
    store.begin_batch(&batch(round, Coding::Raw, pages), payload(pages).len())
}

fn payload(pages: &[(u64, Option<u64>)]) -> Vec<u8> {
    pages.iter().filter_map(|page| page.1).flat_map(bytes).collect()
}

fn receive(landing: &mut Landing, mut payload: &[u8]) {
    assert_eq!(landing.payload_len(), payload.len());
    for mut slice in landing.slices() {
        let (here, rest) = payload.split_at(slice.len());
        slice.copy_from_slice(here);
        payload = rest;
    }
    assert!(payload.is_empty());
}

fn send(store: &mut PageStore, round: u32, pages: &[(u64, Option<u64>)]) -> Result<BatchOutcome, StoreError> {
    let mut landing = begin(store, round, pages)?;
    receive(&mut landing, &payload(pages));
    store.finish_batch(landing)
}

fn run(start: u64, len: u64) -> PageRun {
    PageRun { start: PageNo(start), len }
}

fn content(store: &PageStore, page: u64) -> Option<Vec<u8>> {
    store.page(SPACE, PageNo(page)).map(|page| match page {
        PageRef::Zero => vec![0; SLOT_BYTES],
        PageRef::Bytes(bytes) => bytes.to_vec(),
        PageRef::Delivered => panic!("nothing was delivered"),
    })
}

#[test]
fn pages_come_back_as_they_were_sent() {
    let mut store = PageStore::new(None, None).unwrap();
    let outcome = send(&mut store, 0, &[(7, Some(1)), (8, None), (9, Some(2))]).unwrap();
    assert_eq!(outcome, BatchOutcome { stored: 2, zero: 1 });
    assert_eq!(content(&store, 7).unwrap(), bytes(1));
    assert_eq!(store.page(SPACE, PageNo(8)), Some(PageRef::Zero));
    assert_eq!(store.digest_of(SPACE, PageNo(8)), Some(digest::page(&[0; SLOT_BYTES])));
    assert_eq!(store.digest_of(SPACE, PageNo(9)), Some(digest::page(&bytes(2))));
    assert_eq!((content(&store, 10), store.page(SpaceId(4), PageNo(7))), (None, None));
}

#[test]
fn a_corrupted_batch_leaves_every_old_page() {
    let mut store = PageStore::new(None, None).unwrap();
    send(&mut store, 0, &[(1, Some(1)), (2, Some(2))]).unwrap();
    let before = store.page_bytes();
    let pages = [(1, Some(10)), (2, Some(20)), (3, None)];
    let mut landing = begin(&mut store, 1, &pages).unwrap();
    let mut broken = payload(&pages);
    broken[SLOT_BYTES + 17] ^= 4;
    receive(&mut landing, &broken);
    let error = store.finish_batch(landing).unwrap_err();
    assert!(matches!(error, StoreError::DigestMismatch { space: SPACE, page: PageNo(1) }), "{error}");
    assert_eq!(content(&store, 1).unwrap(), bytes(1));
    assert_eq!(content(&store, 2).unwrap(), bytes(2));
    assert_eq!(content(&store, 3), None);
    // The slots of the broken batch are used again.
    send(&mut store, 1, &pages).unwrap();
    assert_eq!(content(&store, 1).unwrap(), bytes(10));
    assert_eq!(store.page_bytes(), before);
}

#[test]
fn a_batch_that_is_cut_off_leaves_nothing() {
    let mut store = PageStore::new(None, None).unwrap();
    send(&mut store, 0, &[(1, Some(1))]).unwrap();
    for _ in 0..100 {
        let mut landing = begin(&mut store, 1, &[(1, Some(9)), (2, Some(9))]).unwrap();
        landing.slices()[0][..100].fill(1);
        drop(landing);
    }
    assert_eq!(content(&store, 1).unwrap(), bytes(1));
    send(&mut store, 1, &[(2, Some(2))]).unwrap();
    assert_eq!(store.page_bytes(), 2 * SLOT_BYTES as u64);
}

#[test]
fn what_is_checked_and_written_again_is_checked_again() {
    let mut store = PageStore::new(None, None).unwrap();
    let pages = [(1, Some(1))];
    let mut landing = begin(&mut store, 0, &pages).unwrap();
    receive(&mut landing, &payload(&pages));
    landing.check().unwrap();
    landing.slices()[0][0] ^= 1;
    assert!(matches!(store.finish_batch(landing), Err(StoreError::DigestMismatch { .. })));
}

#[test]
fn packed_batches_are_unpacked_into_their_slots() {
    let mut store = PageStore::new(None, None).unwrap();
    let mut encoder = ZstdEncoder::new().unwrap();
    // Every second slot is freed, so that the packed batch finds its slots in pieces.
    let first: Vec<_> = (0..64).map(|page| (page, Some(page + 1))).collect();
    send(&mut store, 0, &first).unwrap();
    let every_second: Vec<_> = (0..32).map(|n| run(n * 2, 1)).collect();
    store.discard(SPACE, &every_second);
    for (at, count) in [(100, 20), (200, 1), (300, 40)] {
        let pages: Vec<_> = (at..at + count).map(|page| (page, Some(page))).collect();
        let mut packed = Vec::new();
        encoder.encode(1, &payload(&pages), &mut packed).unwrap();
        let mut landing = store.begin_batch(&batch(1, Coding::Zstd, &pages), packed.len()).unwrap();
        receive(&mut landing, &packed);
        store.finish_batch(landing).unwrap();
        assert!(pages.iter().all(|&(page, _)| content(&store, page).unwrap() == bytes(page)));
    }
    let landing = store.begin_batch(&batch(1, Coding::Zstd, &[(100, Some(1))]), 10).unwrap();
    let error = store.finish_batch(landing).unwrap_err();
    assert!(matches!(error, StoreError::Unpack { pages: 1, .. }), "{error}");
    assert_eq!(content(&store, 100).unwrap(), bytes(100));
}

/// A batch of deltas from one content of each page to another, and its payload.
fn deltas(round: u32, pages: &[(u64, Option<u64>, u64)]) -> (PageBatch, Vec<u8>) {
    let (mut batch, mut payload) = (PageBatch::default(), Vec::new());
    batch.clear(SPACE, round, Coding::Delta);
    for &(page, from, to) in pages {
        let base = from.map_or([0; SLOT_BYTES], bytes);
        let mut new = bytes(to);
        // Most of the page stays.
        new[64..].copy_from_slice(&base[64..]);
        delta::encode(&base, &new, &mut payload);
        let own = PageAt { space: SPACE, page: PageNo(page) };
        batch.push_on_base(PageNo(page), digest::page(&new), own, digest::page(&base));
    }
    (batch, payload)
}

#[test]
fn deltas_are_applied_to_what_is_here_and_to_nothing_else() {
    let mut store = PageStore::new(None, None).unwrap();
    send(&mut store, 0, &[(1, Some(1)), (2, None), (5, Some(5)), (6, Some(6))]).unwrap();
    let (batch, payload) = deltas(1, &[(1, Some(1), 11), (2, None, 12), (6, Some(6), 16)]);
    let mut landing = store.begin_batch(&batch, payload.len()).unwrap();
    receive(&mut landing, &payload);
    store.finish_batch(landing).unwrap();
    for (page, from, to) in [(1, bytes(1), 11), (2, [0; SLOT_BYTES], 12), (6, bytes(6), 16)] {
        let content = content(&store, page).unwrap();
        assert_eq!(content[..64], bytes(to)[..64]);
        assert_eq!(content[64..], from[64..]);
    }
    assert_eq!(content(&store, 5).unwrap(), bytes(5));
    let used = store.page_bytes();
    // Page 1 is another by now, 9 was never here, 5 has other bytes: nothing is touched.
    for pages in [&[(1, Some(1), 12)][..], &[(9, Some(9), 10)], &[(5, Some(5), 15), (6, Some(7), 8)]] {
        let (batch, payload) = deltas(2, pages);
        let error = store.begin_batch(&batch, payload.len()).unwrap_err();
        assert!(matches!(error, StoreError::Base { .. }), "{error}");
    }
    // Bytes that are no deltas, or too many, or of another outcome.
    let (batch, mut payload) = deltas(2, &[(5, Some(5), 15)]);
    payload.push(0);
    for (len, want) in [(payload.len(), "left"), (payload.len() - 2, "applying")] {
        let mut landing = store.begin_batch(&batch, len).unwrap();
        receive(&mut landing, &payload[..len]);
        let error = store.finish_batch(landing).unwrap_err();
        assert!(error.to_string().contains(want), "{error}");
    }
    payload.pop();
    *payload.last_mut().unwrap() ^= 1;
    let mut landing = store.begin_batch(&batch, payload.len()).unwrap();
    receive(&mut landing, &payload);
    assert!(matches!(store.finish_batch(landing), Err(StoreError::DigestMismatch { .. })));
    assert_eq!(content(&store, 5).unwrap(), bytes(5), "it is as it was");
    send(&mut store, 3, &[(7, Some(7))]).unwrap();
    assert_eq!(store.page_bytes(), used + SLOT_BYTES as u64, "what was given up was given back");
}

#[test]
fn the_limit_is_an_error_and_what_is_there_stays() {
    let limit = 1 << 20;
    let mut store = PageStore::new(Some(limit), None).unwrap();
    assert!(matches!(store.reserve(limit + 1), Err(StoreError::OutOfMemory { of: Bound::Limit, .. })));
    store.reserve(limit / 2).unwrap();
    let mut page = 0;
    let error = loop {
        match send(&mut store, 0, &[(page, Some(page)), (page + 1, Some(page + 1))]) {
            Ok(_) => page += 2,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, StoreError::OutOfMemory { of: Bound::Limit, .. }), "{error}");
    let taken = store.page_bytes() + store.index_bytes();
    assert!(taken <= limit && taken + (40 << 10) > limit, "{taken} of {limit}");
    assert!((0..page).all(|page| content(&store, page).unwrap() == bytes(page)));
    // What is discarded is room for others, and zero pages need none.
    send(&mut store, 1, &[(0, None), (1, None)]).unwrap();
    send(&mut store, 1, &[(2, Some(5)), (3, Some(6))]).unwrap();
    assert_eq!(content(&store, 3).unwrap(), bytes(6));
}

#[test]
fn the_index_and_lists_have_a_limit_of_their_own() {
    let mut store = PageStore::new(None, Some(40_000)).unwrap();
    let refused = |result: Result<(), StoreError>| {
        assert!(matches!(result, Err(StoreError::OutOfMemory { of: Bound::Engine, .. })), "{result:?}");
    };
    store.reserve(6 << 20).unwrap();
    refused(store.reserve(8 << 20));
    store.keep_lists(5_000).unwrap();
    refused(store.reserve(6 << 20 | 1));
    // A table of the index for each 2 MiB of address space.
    for page in [0, 512, 1024] {
        send(&mut store, 0, &[(page, Some(page))]).unwrap();
    }
    refused(store.keep_lists(20_000));
    store.keep_lists(0).unwrap();
    refused(send(&mut store, 0, &[(3072, Some(4))]).map(drop));
    send(&mut store, 0, &[(1025, Some(5))]).unwrap();
}

#[test]
fn more_than_the_machine_has_is_refused() {
    let store = PageStore::new(None, None).unwrap();
    assert!(matches!(store.reserve(1 << 50), Err(StoreError::OutOfMemory { .. })));
}

#[test]
fn a_batch_of_another_store_is_refused() {
    let (mut one, mut other) = (PageStore::new(None, None).unwrap(), PageStore::new(None, None).unwrap());
    let landing = begin(&mut one, 0, &[(1, Some(1))]).unwrap();
    assert!(matches!(other.finish_batch(landing), Err(StoreError::Foreign { space: SPACE })));
}

#[test]
fn sealing_says_what_is_missing_and_drops_what_is_left() {
    let mut store = PageStore::new(None, None).unwrap();
    send(&mut store, 0, &[(1, Some(1)), (2, None), (600, Some(3)), (5000, Some(4))]).unwrap();
    let missing = |error| match error {
        Err(StoreError::Missing { page, .. }) => page.0,
        other => panic!("{other:?}"),
    };
    assert_eq!(missing(store.seal(SPACE, &[run(1, 3)])), 3);
    assert_eq!(missing(store.seal(SPACE, &[run(1, 2), run(700, 1)])), 700);
    assert_eq!(missing(store.seal(SPACE, &[run(1, 2), run(2000, 9)])), 2000);
    assert_eq!(missing(store.seal(SPACE, &[run(1, 2), run(9999, 1)])), 9999);
    assert_eq!(missing(store.seal(SpaceId(77), &[run(0, 1)])), 0);
    let disorder = store.seal(SPACE, &[run(1, 2), run(2, 1)]);
    assert!(matches!(disorder, Err(StoreError::Disorder { page: PageNo(2), .. })));
    let sealed = store.seal(SPACE, &[run(1, 1), run(2, 1), run(5000, 1), run(6000, 0)]).unwrap();
    assert_eq!((sealed.pages, sealed.stored, sealed.dropped), (3, 2, 1));
    let mut expected = SpaceDigest::default();
    for (page, seed) in [(1, Some(1)), (2, None), (5000, Some(4))] {
        let page_bytes = seed.map_or([0; SLOT_BYTES], bytes);
        expected.insert(PageNo(page), &digest::page(&page_bytes));
    }
    assert_eq!(sealed.digest, expected);
    assert_eq!(content(&store, 600), None);
    assert_eq!(store.page_bytes(), 2 * SLOT_BYTES as u64);
    assert_eq!(store.seal(SpaceId(78), &[]).unwrap().pages, 0);
}

#[test]
fn a_stretch_is_as_long_as_its_memory_is_together() {
    let mut store = PageStore::new(None, None).unwrap();
    let pages: Vec<_> = (500..600).map(|page| (page, Some(page))).collect();
    send(&mut store, 0, &pages).unwrap();
    let expected: Vec<u8> = (510..590).flat_map(bytes).collect();
    assert!(store.stretch(SPACE, PageNo(510), 80).unwrap() == &expected[..]);
    send(&mut store, 1, &[(550, Some(1)), (551, None)]).unwrap();
    assert_eq!(store.stretch(SPACE, PageNo(510), 80).unwrap().len(), 40 * SLOT_BYTES);
    assert!(store.stretch(SPACE, PageNo(550), 80).unwrap() == &bytes(1)[..]);
    assert_eq!(store.stretch(SPACE, PageNo(551), 1), None);
    assert_eq!(store.stretch(SPACE, PageNo(552), 1000).unwrap().len(), 48 * SLOT_BYTES);
}

#[test]
fn delivered_pages_leave_their_digest_and_give_their_memory_back() {
    let mut store = PageStore::new(None, None).unwrap();
    store.reserve(8 << 20).unwrap();
    let pages: Vec<_> = (0..1100).map(|page| (page, Some(page))).collect();
    for batch in pages.chunks(100) {
        send(&mut store, 0, batch).unwrap();
    }
    while store.drain(1) {}
    for page in 0..1000 {
        store.deliver(SPACE, PageNo(page));
    }
    assert_eq!(store.page(SPACE, PageNo(5)), Some(PageRef::Delivered));
    assert_eq!(store.digest_of(SPACE, PageNo(5)), Some(digest::page(&bytes(5))));
    assert_eq!(store.stored_pages(SPACE).map(|(_, mask)| mask.count()).sum::<u64>(), 100);
    assert!((1000..1100).all(|page| content(&store, page).unwrap() == bytes(page)));
    assert_eq!(store.page_bytes(), 100 * SLOT_BYTES as u64);
}

#[test]
fn while_a_program_stands_still_only_what_arrives_next_has_memory_ready() {
    let effort = Effort::default();
    effort.lift(true);
    let mut store = PageStore::sparing(Limits::default(), &effort).unwrap();
    store.reserve(80 << 20).unwrap();
    let ready_within = |store: &PageStore, most: u64, bytes: u64| {
        (0..most).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(1));
            store.ready_bytes() >= bytes
        })
    };
    assert!(ready_within(&store, 10_000, 8 << 20));
    assert!(!ready_within(&store, 50, 12 << 20), "{} bytes", store.ready_bytes());
    effort.lift(false);
    let pages: Vec<_> = (0..1100).map(|page| (page, Some(page))).collect();
    for batch in pages.chunks(100) {
        send(&mut store, 0, batch).unwrap();
    }
    assert!(ready_within(&store, 10_000, 60 << 20), "{} bytes", store.ready_bytes());
}

#[test]
fn pages_of_a_round_are_those_that_came_last_in_it() {
    let mut store = PageStore::new(None, None).unwrap();
    send(&mut store, 0, &[(1, Some(1)), (2, Some(2)), (3, Some(3))]).unwrap();
    send(&mut store, 2, &[(2, Some(9)), (4, None)]).unwrap();
    send(&mut store, 1000, &[(3, Some(9))]).unwrap();
    let of = |round| store.stored_in_round(SPACE, 0, round).iter().collect::<Vec<_>>();
    assert_eq!((of(0), of(1), of(2), of(PageStore::LAST_ROUND)), (vec![1], vec![], vec![2], vec![3]));
    assert!(store.has_round(SPACE, 2) && !store.has_round(SPACE, 1) && !store.has_round(SpaceId(9), 0));
}

#[derive(Clone, Debug)]
enum Step {
    Batch { corrupt: bool, drop: bool, pages: Vec<(u64, Option<u64>)> },
    Discard(Vec<PageRun>),
    Remove,
}

fn step() -> impl Strategy<Value = Step> {
    // Around a border of tables, and so few pages that most are sent again.
    let page = 480..560u64;
    let pages = proptest::collection::vec((page.clone(), proptest::option::weighted(0.8, 1..1000u64)), 1..40);
    let runs = proptest::collection::vec((page, 1..30u64).prop_map(|(at, len)| run(at, len)), 1..4);
    prop_oneof![
        12 => (prop::bool::weighted(0.2), prop::bool::weighted(0.1), pages)
            .prop_map(|(corrupt, drop, pages)| Step::Batch { corrupt, drop, pages }),
        3 => runs.prop_map(Step::Discard),
        1 => Just(Step::Remove),
    ]
}

proptest! {
    #[test]
    fn agrees_with_a_map_of_pages(steps in proptest::collection::vec(step(), 0..30), owned in proptest::collection::vec(any::<bool>(), 80)) {
        let mut store = PageStore::new(None, None).unwrap();
        let mut model: BTreeMap<u64, Option<u64>> = BTreeMap::new();
        for (round, step) in steps.into_iter().enumerate() {
            match step {
                Step::Batch { corrupt, drop: dropped, mut pages } => {
                    pages.sort_unstable();
                    pages.dedup_by_key(|page| page.0);
                    let mut bytes = payload(&pages);
                    let mut landing = begin(&mut store, round as u32, &pages).unwrap();
                    let corrupt = corrupt && !bytes.is_empty();
                    if corrupt {
                        let at = bytes.len() / 2;
                        bytes[at] ^= 0x80;
                    }
                    receive(&mut landing, &bytes);
                    if dropped {
                        drop(landing);
                    } else {
                        let outcome = store.finish_batch(landing);
                        prop_assert_eq!(outcome.is_err(), corrupt);
                        if !corrupt {
                            model.extend(pages);
                        }
                    }
                }
                Step::Discard(runs) => {
                    store.discard(SPACE, &runs);
                    model.retain(|&page, _| !runs.iter().any(|r| (r.start.0..r.start.0 + r.len).contains(&page)));
                }
                Step::Remove => {
                    store.remove_space(SPACE);
                    model.clear();
                }
            }
        }
        for page in 470..570 {
            let expected = model.get(&page).map(|seed| seed.map_or(vec![0; SLOT_BYTES], |seed| bytes(seed).to_vec()));
            prop_assert!(content(&store, page) == expected, "page {}", page);
        }
        let stored = model.values().filter(|seed| seed.is_some()).count() as u64;
        // Dropped landings' slots come back with the next batch.
        send(&mut store, 99, &[(1, None)]).unwrap();
        store.discard(SPACE, &[run(1, 1)]);
        prop_assert_eq!(store.page_bytes(), stored * SLOT_BYTES as u64);

        let owned: Vec<u64> = (480..560u64).zip(owned).filter(|(_, owned)| *owned).map(|(page, _)| page).collect();
        let runs: Vec<PageRun> = owned.iter().map(|&page| run(page, 1)).collect();
        let missing = owned.iter().find(|page| !model.contains_key(page));
        match (store.seal(SPACE, &runs), missing) {
            (Err(StoreError::Missing { page, .. }), Some(&expected)) => prop_assert_eq!(page.0, expected),
            (Ok(sealed), None) => {
                let mut sum = SpaceDigest::default();
                for &page in &owned {
                    let page_bytes = model[&page].map_or([0; SLOT_BYTES], bytes);
                    sum.insert(PageNo(page), &digest::page(&page_bytes));
                }
                prop_assert_eq!(sealed.digest, sum);
                prop_assert_eq!(sealed.pages, owned.len() as u64);
                prop_assert_eq!(sealed.dropped, (model.len() - owned.len()) as u64);
            }
            (other, missing) => prop_assert!(false, "{:?} but {:?} is missing", other, missing),
        }
    }
}
