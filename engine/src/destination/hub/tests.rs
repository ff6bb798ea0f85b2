//! Several connections that bring pages in every order.

use super::*;
use crate::link::TcpLink;
use pageferry_wire_format::{PageBatch, PageRef, digest};
use std::io::IoSlice;
use std::net::TcpListener;
use std::sync::Arc;

const SPACE: SpaceId = SpaceId(1);
const STALL: Duration = Duration::from_millis(300);

type Bytes = [u8; 4096];

fn bytes(seed: u8) -> Bytes {
    std::array::from_fn(|at| seed ^ (at / 7) as u8)
}

fn hub() -> Arc<Hub> {
    let hub = Hub::new(7, PageStore::new(None, None).unwrap(), STALL).unwrap();
    hub.open(SPACE, 100);
    Arc::new(hub)
}

fn pair() -> (Channel, Channel) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let source = TcpLink::connect(listener.local_addr().unwrap(), Duration::from_secs(5)).unwrap();
    let destination = TcpLink::new(listener.accept().unwrap().0).unwrap();
    (Channel::new(source), Channel::new(destination))
}

fn whole(page: u64, seed: u8) -> (PageBatch, Vec<u8>) {
    let mut batch = PageBatch::default();
    batch.clear(SPACE, 0, Coding::Raw);
    batch.push(PageNo(page), false, digest::page(&bytes(seed)));
    (batch, bytes(seed).to_vec())
}

fn copy(page: u64, seed: u8, from: u64) -> (PageBatch, Vec<u8>) {
    let mut batch = PageBatch::default();
    batch.clear(SPACE, 0, Coding::Copy);
    let from = PageRef { space: SPACE, page: PageNo(from) };
    batch.push_copy(PageNo(page), digest::page(&bytes(seed)), from);
    (batch, Vec::new())
}

/// Sends a batch over a connection of its own, as if it were the first.
fn bring(hub: &Hub, (batch, payload): (PageBatch, Vec<u8>)) -> Result<(), ReceiveError> {
    let (mut source, mut destination) = pair();
    source.pages(&batch, &[IoSlice::new(&payload)]).unwrap();
    match destination.receive().unwrap() {
        Incoming::Pages(len) => hub.pages(&mut destination, len, FIRST),
        other => panic!("{other:?}"),
    }
}

fn content(hub: &Hub, page: u64) -> Option<Vec<u8>> {
    let read = |store: &mut PageStore| Ok(store.stretch(SPACE, PageNo(page), 1).map(<[u8]>::to_vec));
    hub.with_store(read).unwrap()
}

#[test]
fn a_copy_waits_for_a_page_that_is_still_under_way() {
    let hub = hub();
    bring(&hub, copy(5, 1, 4)).unwrap();
    bring(&hub, copy(6, 1, 5)).unwrap();
    assert_eq!(content(&hub, 5), None);
    bring(&hub, whole(4, 1)).unwrap();
    bring(&hub, copy(7, 1, 4)).unwrap();
    assert_eq!(content(&hub, 7).as_deref(), Some(&bytes(1)[..]), "what is there is copied at once");
    assert_eq!(hub.complete(0, 0).unwrap(), []);
    assert_eq!(content(&hub, 5).as_deref(), Some(&bytes(1)[..]));
    assert_eq!(content(&hub, 6).as_deref(), Some(&bytes(1)[..]), "a copy of a copy");
}

#[test]
fn what_never_came_or_came_with_other_bytes_is_asked_for_again_once() {
    let hub = hub();
    bring(&hub, whole(4, 1)).unwrap();
    bring(&hub, copy(5, 2, 4)).unwrap();
    bring(&hub, copy(6, 2, 4)).unwrap();
    bring(&hub, copy(9, 2, 44)).unwrap();
    let run = |start, len| PageRun { start: PageNo(start), len };
    assert_eq!(hub.complete(0, 0).unwrap(), [(SPACE, vec![run(5, 2), run(9, 1)])]);
    assert_eq!(content(&hub, 5), None);
    assert_eq!(hub.complete(1, 0).unwrap(), []);
}

#[test]
fn deltas_of_other_bytes_change_nothing() {
    let hub = hub();
    bring(&hub, whole(4, 1)).unwrap();
    let (mut batch, mut deltas) = (PageBatch::default(), Vec::new());
    batch.clear(SPACE, 1, Coding::Delta);
    let mut new = bytes(2);
    new[100] ^= 1;
    pageferry_wire_format::delta::encode(&bytes(2), &new, &mut deltas);
    let own = PageRef { space: SPACE, page: PageNo(4) };
    batch.push_on_base(PageNo(4), digest::page(&new), own, digest::page(&bytes(2)));
    bring(&hub, (batch, deltas)).unwrap();
    assert_eq!(content(&hub, 4).as_deref(), Some(&bytes(1)[..]));
    let run = PageRun { start: PageNo(4), len: 1 };
    assert_eq!(hub.complete(1, 0).unwrap(), [(SPACE, vec![run])]);
}

/// A page that differs from page `from` in one byte, in a coding that says so.
fn made(coding: Coding, page: u64, seed: u8, from: u64) -> (PageBatch, Vec<u8>) {
    let (mut batch, mut payload) = (PageBatch::default(), Vec::new());
    batch.clear(SPACE, 0, coding);
    let mut new = bytes(seed);
    new[100] ^= 1;
    match coding {
        Coding::Delta => drop(pageferry_wire_format::delta::encode(&bytes(seed), &new, &mut payload)),
        _ => {
            let mut zstd = pageferry_wire_format::ZstdEncoder::new().unwrap();
            zstd.encode_on(1, &bytes(seed), &new, &mut payload).unwrap();
        }
    }
    let at = PageRef { space: SPACE, page: PageNo(from) };
    batch.push_on_base(PageNo(page), digest::page(&new), at, digest::page(&bytes(seed)));
    (batch, payload)
}

#[test]
fn what_is_on_top_of_another_page_waits_for_it_and_is_asked_for_if_it_does_not_come() {
    let mut wanted = bytes(1).to_vec();
    wanted[100] ^= 1;
    for coding in [Coding::Delta, Coding::ZstdOnBase] {
        let hub = hub();
        bring(&hub, made(coding, 20, 1, 4)).unwrap();
        bring(&hub, made(coding, 21, 2, 4)).unwrap();
        assert_eq!(content(&hub, 20), None);
        bring(&hub, whole(4, 1)).unwrap();
        assert_eq!(
            content(&hub, 20),
            Some(wanted.clone()),
            "as soon as it is there, not at the end of the round"
        );
        let run = PageRun { start: PageNo(21), len: 1 };
        assert_eq!(hub.complete(0, 0).unwrap(), [(SPACE, vec![run])], "its base is another page");
        assert_eq!((content(&hub, 21), content(&hub, 4)), (None, Some(bytes(1).to_vec())));
        bring(&hub, made(coding, 22, 1, 4)).unwrap();
        assert_eq!(content(&hub, 22), Some(wanted.clone()), "what is there is used at once");
    }
}

#[test]
fn what_waits_has_a_limit() {
    let hub = hub();
    let most = hub.lock().most_later.load(Ordering::Relaxed);
    hub.lock().later_bytes = most;
    bring(&hub, made(Coding::Delta, 20, 1, 4)).unwrap();
    bring(&hub, whole(4, 1)).unwrap();
    let run = PageRun { start: PageNo(20), len: 1 };
    assert_eq!(hub.complete(0, 0).unwrap(), [(SPACE, vec![run])]);
}

#[test]
fn a_peer_that_asks_for_copies_of_nothing_for_ever_is_refused() {
    let hub = hub();
    hub.lock().patience = 3;
    for page in 0..3 {
        bring(&hub, copy(page, 1, 1000)).unwrap();
    }
    assert!(matches!(bring(&hub, copy(3, 1, 1000)), Err(ReceiveError::Order(_))));
}

/// A further connection, and the thread that serves it.
fn further(hub: &Arc<Hub>, stream: u16) -> (Channel, std::thread::JoinHandle<()>) {
    let (mut source, destination) = pair();
    let hub = Arc::clone(hub);
    let thread = std::thread::spawn(move || hub.serve(destination, stream));
    assert_eq!(source.answer("to be taken").unwrap(), ControlMessage::Joined);
    (source, thread)
}

#[test]
fn a_round_is_complete_when_every_connection_says_so() {
    let hub = hub();
    let (mut source, thread) = further(&hub, 3);
    let waiting = {
        let hub = Arc::clone(&hub);
        std::thread::spawn(move || hub.complete(0, 0))
    };
    let (batch, payload) = whole(8, 4);
    // Longer than the stall in all, but something moves.
    for _ in 0..3 {
        std::thread::sleep(STALL / 2);
        source.pages(&batch, &[IoSlice::new(&payload)]).unwrap();
        assert!(!waiting.is_finished());
    }
    source.control(&ControlMessage::RoundEnd { round: 0, pages: 1, bytes: 0 }).unwrap();
    assert_eq!(waiting.join().unwrap().unwrap(), []);
    assert_eq!(content(&hub, 8).as_deref(), Some(&bytes(4)[..]));
    // Pages that were asked for again come under the same number: what was said before does not count for them.
    let again = {
        let hub = Arc::clone(&hub);
        std::thread::spawn(move || hub.complete(0, 0))
    };
    std::thread::sleep(STALL / 2);
    assert!(!again.is_finished());
    let (batch, payload) = whole(9, 5);
    source.pages(&batch, &[IoSlice::new(&payload)]).unwrap();
    source.control(&ControlMessage::RoundEnd { round: 0, pages: 1, bytes: 0 }).unwrap();
    assert_eq!(again.join().unwrap().unwrap(), []);
    assert_eq!(content(&hub, 9).as_deref(), Some(&bytes(5)[..]));
    hub.shut(SPACE);
    drop(source);
    thread.join().unwrap();
    assert!(hub.close().is_some());
}

#[test]
fn pages_that_are_ahead_of_their_announcement_wait_for_it() {
    let hub = Arc::new(Hub::new(7, PageStore::new(None, None).unwrap(), STALL).unwrap());
    let (mut source, thread) = further(&hub, 1);
    let (batch, payload) = whole(8, 4);
    source.pages(&batch, &[IoSlice::new(&payload)]).unwrap();
    source.control(&ControlMessage::RoundEnd { round: 0, pages: 1, bytes: 0 }).unwrap();
    std::thread::sleep(STALL / 3);
    hub.open(SPACE, 1);
    assert_eq!(hub.complete(0, 0).unwrap(), []);
    assert_eq!(content(&hub, 8).as_deref(), Some(&bytes(4)[..]));
    assert!(hub.close().is_some());
    thread.join().unwrap();
}

#[test]
fn a_connection_that_fails_or_falls_silent_ends_the_round() {
    let hub = hub();
    let (source, thread) = further(&hub, 1);
    drop(source);
    thread.join().unwrap();
    assert!(hub.alarm().is_cancelled(), "the first connection is woken");
    assert!(hub.complete(0, 0).is_err());

    let hub = self::hub();
    let (_source, thread) = further(&hub, 1);
    let error = hub.complete(0, 0).unwrap_err();
    assert!(matches!(error, ReceiveError::Channel(ChannelError::Link(LinkError::Stalled(_)))), "{error}");
    assert!(hub.close().is_some());
    thread.join().unwrap();
}

#[test]
fn the_first_connection_may_say_why_the_others_end() {
    let hub = hub();
    let (source, thread) = further(&hub, 1);
    drop(source);
    std::thread::sleep(LAST_WORDS / 4);
    assert!(!hub.alarm().is_cancelled(), "whoever reads the first connection is not disturbed yet");
    // It was told the reason there, and gives the session up.
    assert!(hub.close().is_some());
    thread.join().unwrap();
    assert!(hub.failure().is_none(), "the end of a connection is no failure of its own then");
}

#[test]
fn strangers_and_seconds_are_not_taken() {
    let hub = hub();
    let (_source, thread) = further(&hub, 1);
    for stream in [0, 1, MOST_STREAMS + 1] {
        let (mut source, destination) = pair();
        hub.serve(destination, stream);
        assert!(matches!(source.answer("to be taken"), Err(ChannelError::Aborted { .. })), "{stream}");
    }
    drop(hub.close());
    thread.join().unwrap();
}

/// A hub whose first connection came from this machine, and what waits for its link.
fn waiting(hold: Duration) -> (Arc<Hub>, std::thread::JoinHandle<Result<Channel, ReceiveError>>) {
    let hub = hub();
    let (_source, first) = pair();
    hub.begin(first.link(), "redis").unwrap();
    hub.set_hold(hold);
    let waits = {
        let hub = Arc::clone(&hub);
        std::thread::spawn(move || hub.wait_for_link(LinkError::Closed.into(), &|| Ok(())))
    };
    while !hub.lock().link.away {
        std::thread::sleep(Duration::from_millis(1));
    }
    (hub, waits)
}

#[test]
fn a_link_that_is_lost_takes_the_others_with_it_and_leaves_no_half_of_a_round() {
    let hub = hub();
    hub.set_hold(STALL * 10);
    let (_source, thread) = further(&hub, 1);
    bring(&hub, copy(5, 1, 4)).unwrap();
    let (mut ours, theirs) = pair();
    ours.control(&ControlMessage::Ping { n: 1 }).unwrap();
    hub.rejoin(theirs).unwrap();
    let mut taken = hub.wait_for_link(LinkError::Closed.into(), &|| Ok(())).unwrap();
    assert!(matches!(taken.receive(), Ok(Incoming::Control(ControlMessage::Ping { n: 1 }))));
    thread.join().unwrap();
    assert!(!hub.alarm().is_cancelled(), "the new link is not disturbed by the end of the old");
    // Its number is free again, and what waited for a page is not asked for: the source does not believe that it came.
    let (mut source, thread) = further(&hub, 1);
    source.control(&ControlMessage::RoundEnd { round: 0, pages: 0, bytes: 0 }).unwrap();
    assert_eq!(hub.complete(0, 0).unwrap(), []);
    assert!(hub.close().is_some());
    thread.join().unwrap();
}

#[test]
fn a_session_is_held_for_as_long_as_was_said_and_as_it_is_wanted() {
    let (hub, waits) = waiting(STALL / 3);
    assert!(matches!(waits.join().unwrap(), Err(ReceiveError::NotBack { .. })));
    let given_up = hub.wait_for_link(LinkError::Closed.into(), &|| Err(ReceiveError::UnknownSession));
    assert!(matches!(given_up, Err(ReceiveError::UnknownSession)));
    // From the freeze on.
    hub.set_hold(Duration::ZERO);
    assert!(hub.rejoin(pair().1).is_err());
    assert!(hub.close().is_some());
    assert!(hub.rejoin(pair().1).is_err());
}

#[test]
fn only_its_own_source_may_begin_anew_in_place_of_a_held_session() {
    let (hub, waits) = waiting(STALL * 100);
    let (here, elsewhere) = (std::net::IpAddr::from([127, 0, 0, 1]), std::net::IpAddr::from([10, 0, 0, 9]));
    assert!(!hub.give_way(elsewhere, "redis") && !hub.give_way(here, "postgres"));
    assert!(!waits.is_finished());
    assert!(hub.give_way(here, "redis"));
    assert!(matches!(waits.join().unwrap(), Err(ReceiveError::Replaced)));
    assert!(hub.rejoin(pair().1).is_err(), "the one before comes too late");

    let hub = self::hub();
    let (_source, first) = pair();
    hub.begin(first.link(), "redis").unwrap();
    hub.set_hold(STALL);
    assert!(!hub.give_way(here, "redis"), "it has its link");
}
