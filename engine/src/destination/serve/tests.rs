//! The page server with memory of this very process.

use super::*;
use crate::destination::store::PageRef;
use crate::destination::sys::test_memory::{TestMemory, forked_child_differs, new_uffd, wait_for};
use pageferry_wire_format::{Coding, PageBatch, PageNo, PageRun, digest};
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

pub(super) const SPACE: SpaceId = SpaceId(1);
/// A forked child shares all descriptors of this process, also those of the other tests: a userfaultfd that is
/// closed meanwhile lives on with it. So the tests that fork run alone.
static FORKING: RwLock<()> = RwLock::new(());

fn alone() -> RwLockWriteGuard<'static, ()> {
    FORKING.write().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn together() -> RwLockReadGuard<'static, ()> {
    FORKING.read().unwrap_or_else(PoisonError::into_inner)
}

pub(super) const LONG: Duration = Duration::from_secs(30);

/// The first word of a page with bytes; the rest follows from it.
fn seed(page: u64, round: u32) -> u64 {
    page << 20 | u64::from(round) << 8 | 1
}

pub(super) fn bytes(page: u64, round: u32) -> Vec<u8> {
    (0..512).flat_map(|word| (seed(page, round) + word).to_le_bytes()).collect()
}

/// Pages of `memory`, as they come in one round: from `start` on, every `step`th is with bytes, the others zero.
pub(super) fn send(
    store: &mut PageStore,
    memory: TestMemory,
    round: u32,
    pages: std::ops::Range<u64>,
    step: u64,
) {
    let all: Vec<u64> = pages.collect();
    for some in all.chunks(200) {
        let mut batch = PageBatch::default();
        batch.clear(SPACE, round, Coding::Raw);
        let mut payload = Vec::new();
        for &page in some {
            let zero = !page.is_multiple_of(step);
            let content = bytes(page, round);
            batch.push(PageNo(memory.first_page() + page), zero, digest::page(&content));
            if !zero {
                payload.extend(content);
            }
        }
        let mut landing = store.begin_batch(&batch, payload.len()).unwrap();
        let mut rest = &payload[..];
        for mut slice in landing.slices() {
            let (here, behind) = rest.split_at(slice.len());
            slice.copy_from_slice(here);
            rest = behind;
        }
        store.finish_batch(landing).unwrap();
    }
}

pub(super) fn is(memory: TestMemory, page: usize, round: u32) -> bool {
    let from = seed(page as u64, round);
    memory.word(page, 0) == from && memory.word(page, 511) == from + 511
}

pub(super) fn is_zero(memory: TestMemory, page: usize) -> bool {
    memory.word(page, 0) == 0 && memory.word(page, 511) == 0
}

/// A server for `pages` pages with bytes, of round 0, and the memory that they belong into.
fn served(pages: usize) -> (Server, TestMemory) {
    let memory = TestMemory::map(pages + 4);
    let mut store = PageStore::new(None, None).unwrap();
    send(&mut store, memory, 0, 0..pages as u64, 1);
    let owned = [PageRun { start: PageNo(memory.first_page()), len: pages as u64 }];
    store.seal(SPACE, &owned).unwrap();
    (serve(store, memory), memory)
}

fn serve(store: PageStore, memory: TestMemory) -> Server {
    let uffd = new_uffd();
    memory.register(&uffd);
    let server = Server::new(store).unwrap();
    server.add_task(SPACE, Uffd::from_fd(uffd)).unwrap();
    server
}

pub(super) fn filled(server: &Server) -> FillStats {
    server.wait_filled_for(LONG).unwrap().expect("filled in time")
}

#[test]
fn a_fault_is_answered_before_anything_was_put_in() {
    let _guard = together();
    let memory = TestMemory::map(100);
    let mut store = PageStore::new(None, None).unwrap();
    send(&mut store, memory, 0, 0..50, 2);
    let server = serve(store, memory);
    assert!(is(memory, 10, 0) && is_zero(memory, 11) && is_zero(memory, 70));
    server.start_background().unwrap();
    let stats = filled(&server);
    assert_eq!((stats.pages, stats.prefilled_pages, stats.vanished), (25, 0, 0));
    assert!(stats.faults >= 3 && stats.max_fault > Duration::ZERO);
    for page in 0..100 {
        let stored = page < 50 && page % 2 == 0;
        assert!(if stored { is(memory, page, 0) } else { is_zero(memory, page) }, "page {page}");
    }
}

#[test]
fn all_is_put_in_before_and_the_digests_stay() {
    let _guard = together();
    let (server, memory) = served(1500);
    let done = server.prefill_all().unwrap();
    assert_eq!((done.pages, done.missing), (1500, 0));
    server.with_store(|store| {
        let page = PageNo(memory.first_page() + 7);
        assert_eq!(store.page(SPACE, page), Some(PageRef::Delivered));
        assert_eq!(store.digest_of(SPACE, page), Some(digest::page(&bytes(7, 0))));
    });
    // Beyond what is owned, and before the background: still answered.
    assert!(is_zero(memory, 1502));
    server.start_background().unwrap();
    assert_eq!(filled(&server).prefilled_pages, 1500);
    assert!((0..1500).all(|page| is(memory, page, 0)));
}

#[test]
fn the_latest_rounds_go_first() {
    let _guard = together();
    let memory = TestMemory::map(1000);
    let mut store = PageStore::new(None, None).unwrap();
    send(&mut store, memory, 0, 0..1000, 1);
    send(&mut store, memory, 1, 700..800, 1);
    send(&mut store, memory, 5, 40..60, 1);
    send(&mut store, memory, 70, 900..910, 1);
    let server = serve(store, memory);
    let in_place = |server: &Server| -> Vec<u64> {
        let delivered = |page: &u64| {
            let page = PageNo(memory.first_page() + page);
            server.with_store(|store| store.page(SPACE, page) == Some(PageRef::Delivered))
        };
        (0..1000).filter(delivered).collect()
    };
    assert_eq!(server.prefill(Budget::Pages(25)).unwrap().pages, 25);
    assert_eq!(in_place(&server), (40..55).chain(900..910).collect::<Vec<_>>());
    assert_eq!(server.prefill(Budget::Pages(105)).unwrap().missing, 870);
    assert_eq!(in_place(&server), (40..60).chain(700..800).chain(900..910).collect::<Vec<_>>());
    assert_eq!(server.prefill(Budget::Time(Duration::ZERO)).unwrap().pages, 0);
    assert_eq!(server.prefill(Budget::Time(LONG)).unwrap().missing, 0);
    assert!(is(memory, 50, 5) && is(memory, 750, 1) && is(memory, 905, 70) && is(memory, 0, 0));
    server.start_background().unwrap();
    assert_eq!(filled(&server).pages, 1000);
}

#[test]
fn many_threads_wait_while_the_rest_is_put_in() {
    let _guard = together();
    let (server, memory) = served(20_000);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            scope.spawn(move || {
                let mut at = thread + 1;
                for _ in 0..3000 {
                    at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let page = (at >> 33) as usize % 20_000;
                    assert!(is(memory, page, 0), "page {page}");
                }
            });
        }
        server.start_background().unwrap();
    });
    let stats = filled(&server);
    assert_eq!(stats.pages, 20_000);
    assert!((0..20_000).all(|page| is(memory, page, 0)));
}

#[test]
fn memory_that_moves_takes_its_pages_along() {
    let _guard = together();
    let (server, memory) = served(64);
    let moved = memory.relocate(32);
    assert!((8..16).all(|page| is(moved, page, 0)));
    // Something new at the old place knows nothing of the pages that were there.
    server.start_background().unwrap();
    assert_eq!(filled(&server).pages, 64);
    assert!((0..32).all(|page| is(moved, page, 0)));
    assert!((32..64).all(|page| is(memory, page, 0)));
}

#[test]
fn what_the_program_drops_reads_as_zero() {
    let _guard = together();
    let (server, memory) = served(64);
    assert!(is(memory, 3, 0));
    memory.remove(2, 10);
    assert!((2..12).all(|page| is_zero(memory, page)));
    memory.set_word(5, 0, 77);
    memory.unmap(40, 8);
    server.start_background().unwrap();
    let stats = filled(&server);
    assert_eq!((stats.pages, stats.vanished), (64 - 9 - 8, 0));
    assert_eq!(memory.word(5, 0), 77);
    assert!((0..2).chain(12..40).chain(48..64).all(|page| is(memory, page, 0)));
    assert!((2..12).filter(|&page| page != 5).all(|page| is_zero(memory, page)));
}

#[test]
fn a_forked_child_gets_every_page_of_its_own() {
    let _guard = alone();
    let (server, memory) = served(256);
    // In both: before the fork. Only in the parent: written, and dropped, after it.
    assert!(is(memory, 1, 0));
    memory.set_word(2, 0, 5);
    let (go, write) = rustix::pipe::pipe().unwrap();
    let expected: Vec<(usize, u64)> =
        (0..256).map(|page| (page, if page == 2 { 5 } else { seed(page as u64, 0) })).collect();
    let child = forked_child_differs(memory, &expected, Some(&go));
    memory.set_word(3, 0, 6);
    memory.remove(100, 50);
    assert!((100..150).all(|page| is_zero(memory, page)));
    rustix::io::write(&write, &[1]).unwrap();
    assert_eq!(wait_for(child), 0, "pages that the child saw wrong");
    server.start_background().unwrap();
    filled(&server);
    assert_eq!((memory.word(2, 0), memory.word(3, 0)), (5, 6));
    assert!((4..100).chain(150..256).all(|page| is(memory, page, 0)));
}

#[test]
fn a_child_is_filled_in_the_background_like_its_parent() {
    let _guard = alone();
    let (server, memory) = served(4096);
    let (go, write) = rustix::pipe::pipe().unwrap();
    memory.keep_from_children(4000, 10);
    let expected: Vec<(usize, u64)> = (0..4000).map(|page| (page, seed(page as u64, 0))).collect();
    let child = forked_child_differs(memory, &expected, Some(&go));
    server.start_background().unwrap();
    let stats = filled(&server);
    // Ten pages have no memory in the child.
    assert_eq!((stats.pages, stats.vanished), (2 * 4096 - 10, 10));
    drop(server);
    rustix::io::write(&write, &[1]).unwrap();
    assert_eq!(wait_for(child), 0, "pages that the child saw wrong");
    assert!((0..4096).all(|page| is(memory, page, 0)));
}

#[test]
fn a_copy_is_split_where_mappings_are() {
    let _guard = together();
    let (server, memory) = served(600);
    for page in [0, 77, 300, 301, 599] {
        memory.split(page);
    }
    assert_eq!(server.prefill_all().unwrap().pages, 600);
    assert!((0..600).all(|page| is(memory, page, 0)));
}

#[test]
fn a_page_that_no_region_waits_for_is_an_error_before_the_program_runs() {
    let _guard = together();
    let (memory, other) = (TestMemory::map(10), TestMemory::map(10));
    let mut store = PageStore::new(None, None).unwrap();
    send(&mut store, memory, 0, 0..10, 1);
    let server = serve(store, other);
    let error = server.prefill_all().unwrap_err();
    let first = PageNo(memory.first_page());
    assert!(matches!(error, ServeError::NotRegistered { space: SPACE, page } if page == first), "{error}");
    assert!(server.with_store(|store| matches!(store.page(SPACE, first), Some(PageRef::Bytes(_)))));
    // Faults are still answered.
    assert!(is_zero(other, 3));
    server.abort();
}

#[test]
fn nothing_is_served_after_an_abort() {
    let _guard = together();
    let (server, memory) = served(10);
    assert!(is(memory, 1, 0));
    server.abort();
    assert!(is_zero(memory, 2) && is(memory, 1, 0));
}

#[test]
fn dropping_waits_while_the_program_needs_its_pages() {
    let _guard = together();
    let (server, memory) = served(3000);
    server.start_background().unwrap();
    drop(server);
    assert!((0..3000).all(|page| is(memory, page, 0)));
}

#[test]
fn a_descriptor_that_is_no_userfaultfd_is_an_error_that_surfaces() {
    let _guard = together();
    let store = PageStore::new(None, None).unwrap();
    let server = Server::new(store).unwrap();
    let (_read, write) = rustix::pipe::pipe().unwrap();
    server.add_task(SPACE, Uffd::from_fd(write)).unwrap();
    let started = Instant::now();
    while server.status.lock().failing.is_none() && started.elapsed() < LONG {
        std::thread::yield_now();
    }
    let state = server.status.lock();
    assert!(matches!(state.failing, Some((_, ServeError::Events { space: SPACE, .. }))), "{state:?}");
}
