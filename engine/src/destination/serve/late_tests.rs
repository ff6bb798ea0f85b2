//! Owed pages: the page server with memory of this very process, and a source that the test plays.

use super::tests::{LONG, SPACE, bytes, filled, is, is_zero, together};
use super::*;
use crate::destination::sys::test_memory::{TestMemory, new_uffd};
use crate::link::{Incoming, TcpLink};
use pageferry_wire_format::digest::{self, SpaceDigest};
use pageferry_wire_format::{Coding, PageBatch, PageNo, PageRun};
use std::io::IoSlice;
use std::ops::Range;

/// What the source says and hears on connection 0.
struct Source {
    channel: Channel,
    memory: TestMemory,
    pages: u64,
    digest: SpaceDigest,
}

impl Source {
    fn connect(late: &Arc<Late>, memory: TestMemory) -> Self {
        let (here, there) = TcpLink::pair().unwrap();
        let late = Arc::clone(late);
        std::thread::spawn(move || late.serve(Channel::new(there), 0));
        let mut source =
            Self { channel: Channel::new(here), memory, pages: 0, digest: SpaceDigest::default() };
        assert_eq!(source.hear(), ControlMessage::Joined);
        source
    }

    fn hear(&mut self) -> ControlMessage {
        self.channel.answer("anything").unwrap()
    }

    fn runs(&self, pages: Range<u64>) -> Vec<PageRun> {
        let start = PageNo(self.memory.first_page() + pages.start);
        vec![PageRun { start, len: pages.end - pages.start }]
    }

    /// Sends pages with bytes but every tenth, which is zeros.
    fn send(&mut self, pages: Range<u64>) {
        let mut batch = PageBatch::default();
        batch.clear(SPACE, u32::MAX, Coding::Raw);
        let mut payload = Vec::new();
        for page in pages {
            let (zero, content) = (page % 10 == 9, bytes(page, 0));
            let digest = if zero { digest::ZERO_PAGE } else { digest::page(&content) };
            let number = PageNo(self.memory.first_page() + page);
            batch.push(number, zero, digest);
            self.digest.insert(number, &digest);
            self.pages += 1;
            if !zero {
                payload.extend(content);
            }
        }
        self.channel.pages(&batch, &[IoSlice::new(&payload)]).unwrap();
    }

    fn seal(&mut self) {
        let seal = ControlMessage::LateSeal { space: SPACE, pages: self.pages, digest: self.digest };
        self.channel.control(&seal).unwrap();
        self.channel.control(&ControlMessage::LateSealEnd { spaces: 1 }).unwrap();
    }
}

/// A running program of `pages` pages, all of them owed.
fn owing(pages: u64) -> (Arc<Late>, Server, TestMemory) {
    let memory = TestMemory::map(pages as usize + 4);
    let late = Arc::new(Late::new(7, LONG));
    let owed = pageferry_tracker::Run { start: memory.first_page(), len: pages };
    late.with_books(|books| books.owe(SPACE, 1, std::iter::once(owed)));
    let uffd = new_uffd();
    memory.register(&uffd);
    let server = Server::with_late(PageStore::new(None, None).unwrap(), Arc::clone(&late)).unwrap();
    server.add_task(SPACE, Uffd::from_fd(uffd)).unwrap();
    server.start_background().unwrap();
    (late, server, memory)
}

fn as_sent(memory: TestMemory, page: usize) -> bool {
    if page % 10 == 9 { is_zero(memory, page) } else { is(memory, page, 0) }
}

#[test]
fn what_a_thread_waits_for_is_asked_for_and_what_is_unmapped_is_not_wanted() {
    let _guard = together();
    let (late, server, memory) = owing(100);
    let mut source = Source::connect(&late, memory);
    std::thread::scope(|scope| {
        let readers = [7, 9].map(|page| scope.spawn(move || as_sent(memory, page)));
        // In one message or in two.
        let mut wanted: Vec<PageRun> = Vec::new();
        while wanted.len() < 2 {
            match source.hear() {
                ControlMessage::Want { space: SPACE, runs } => wanted.extend(runs),
                other => panic!("{other:?} instead of what is waited for"),
            }
        }
        wanted.sort_by_key(|run| run.start);
        assert_eq!(wanted, [source.runs(7..8), source.runs(9..10)].concat());
        source.send(7..8);
        source.send(9..10);
        readers.into_iter().for_each(|reader| assert!(reader.join().unwrap()));
    });
    memory.remove(40, 20);
    assert_eq!(source.hear(), ControlMessage::Unwanted { space: SPACE, runs: source.runs(40..60) });
    assert!(is_zero(memory, 45), "what was given back reads as zeros, and nobody is asked");
    source.send(0..7);
    source.send(8..9);
    source.send(10..40);
    // Some of it was under way.
    source.send(55..100);
    source.seal();
    assert_eq!(source.hear(), ControlMessage::LateSealed { pages: 85 });
    let stats = filled(&server);
    assert_eq!(stats.waited.count(), 2);
    assert!((0..40).chain(60..100).all(|page| as_sent(memory, page)));
    assert!((40..60).all(|page| is_zero(memory, page)), "they do not come back");
    assert!(server.take_demand().is_some(), "the connection is there for the rest");
}

#[test]
fn what_comes_twice_is_put_in_place_once() {
    let _guard = together();
    let (late, server, memory) = owing(30);
    let mut source = Source::connect(&late, memory);
    source.send(0..20);
    assert!((0..20).all(|page| as_sent(memory, page)), "they are in place");
    // The program goes on with them, and gives some back.
    (0..10).for_each(|page| memory.set_word(page, 0, 77));
    memory.remove(12, 4);
    let (pages, digest) = (source.pages, source.digest);
    source.send(0..20);
    // The first and the second right behind each other, over one connection: the first may not be in place yet.
    (source.pages, source.digest) = (pages, digest);
    source.send(20..30);
    let (pages, digest) = (source.pages, source.digest);
    source.send(20..30);
    (source.pages, source.digest) = (pages, digest);
    source.seal();
    loop {
        match source.hear() {
            // What was read before it had come.
            ControlMessage::Want { .. } => {}
            message => {
                assert_eq!(message, ControlMessage::LateSealed { pages: 30 });
                break;
            }
        }
    }
    filled(&server);
    assert!((0..10).all(|page| memory.word(page, 0) == 77), "what the program wrote is not written over");
    assert!((12..16).all(|page| is_zero(memory, page)), "what it gave back does not come back");
    assert!((16..30).all(|page| as_sent(memory, page)));
}

#[test]
fn a_lost_connection_is_taken_up_where_it_was() {
    let _guard = together();
    let (late, server, memory) = owing(30);
    let mut source = Source::connect(&late, memory);
    source.send(0..10);
    let waits = std::thread::spawn(move || as_sent(memory, 20));
    assert!(matches!(source.hear(), ControlMessage::Want { .. }));
    memory.remove(28, 2);
    assert!(matches!(source.hear(), ControlMessage::Unwanted { .. }));
    let (pages, digest) = (source.pages, source.digest);
    drop(source);

    let mut source = Source::connect(&late, memory);
    source.channel.control(&ControlMessage::TakeUp).unwrap();
    let Incoming::Owed(owed) = source.channel.receive().unwrap() else { panic!("what is owed comes first") };
    assert_eq!((owed.space, owed.runs, owed.more), (SPACE, source.runs(10..28), false));
    assert_eq!(source.hear(), ControlMessage::Unwanted { space: SPACE, runs: source.runs(28..30) });
    assert_eq!(source.hear(), ControlMessage::Taken { space: SPACE, vpid: 1, pages, digest });
    assert_eq!(source.hear(), ControlMessage::TakenUp { spaces: 1 });
    let again = ControlMessage::Want { space: SPACE, runs: source.runs(20..21) };
    assert_eq!(source.hear(), again, "somebody still waits for it");
    (source.pages, source.digest) = (pages, digest);
    source.send(10..28);
    assert!(waits.join().unwrap());
    source.seal();
    assert_eq!(source.hear(), ControlMessage::LateSealed { pages: 28 });
    filled(&server);
    assert!((0..28).all(|page| as_sent(memory, page)));
}

#[test]
fn a_source_that_says_it_sent_something_else_is_not_believed() {
    let _guard = together();
    let (late, server, memory) = owing(10);
    let mut source = Source::connect(&late, memory);
    source.send(0..10);
    source.digest = SpaceDigest::default();
    source.seal();
    let refused = source.channel.answer("a refusal");
    assert!(matches!(refused, Err(crate::link::ChannelError::Aborted { .. })), "{refused:?}");
    assert!(late.failure().is_some());
    assert_eq!(server.wait_filled_for(Duration::from_millis(50)).unwrap(), None);
    server.abort();
}

#[test]
fn a_page_that_is_not_owed_is_refused() {
    let _guard = together();
    let (late, server, memory) = owing(10);
    let mut source = Source::connect(&late, memory);
    source.send(9..12);
    let refused = source.channel.answer("a refusal");
    assert!(matches!(refused, Err(crate::link::ChannelError::Aborted { .. })), "{refused:?}");
    assert!(late.failure().is_some());
    assert_eq!(late.left(), 10, "nothing of the batch counts");
    server.abort();
}
