//! A program's memory in rounds over links that are lost at any frame: what is held in the end is that memory, whatever was
//! under way when the link was lost.

use crate::destination::hub::Hub;
use crate::destination::network::Arrival;
use crate::destination::receive::Reception;
use crate::destination::store::PageStore;
use crate::link::{Channel, Incoming, TcpLink};
use crate::observe::Silent;
use crate::plan::ReceivePlan;
use crate::policy::memory::Savings;
use crate::source::books::{Books, Fate, Look, Output};
use crate::source::rejoin::{hear_what_stands, say_what_stands};
use crate::source::sent::wire_runs;
use pageferry_criu_glue::ImageDir;
use pageferry_tracker::PageSet;
use pageferry_wire_format::delta::Page;
use pageferry_wire_format::{
    Coding, ControlMessage, OwnedBatch, PageBatch, PageNo, SpaceDigest, SpaceId, SpaceInfo, ZstdEncoder,
    digest,
};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::io::IoSlice;
use std::time::Duration;

const STALL: Duration = Duration::from_secs(4);
const HOLD: Duration = Duration::from_secs(5);

/// What the program does between two looks.
#[derive(Clone, Debug)]
enum Write {
    /// A page of a process gets this content; 0 is zeros.
    Fill(u32, u64, u8),
    /// A page is given back.
    Drop(u32, u64),
    /// A process ends, and another one has its number from then on.
    End(u32),
}

fn write() -> impl Strategy<Value = Write> {
    prop_oneof![
        12 => (0u32..3, 0u64..30, 0u8..9).prop_map(|(of, page, seed)| Write::Fill(of, page, seed)),
        3 => (0u32..3, 0u64..30).prop_map(|(of, page)| Write::Drop(of, page)),
        1 => (0u32..3).prop_map(Write::End),
    ]
}

/// Few contents, of which some differ little, so that every coding is used.
fn bytes(seed: u8) -> Page {
    let mut page = [0; 4096];
    if seed > 0 {
        let mut state = u64::from(seed / 2) + 77;
        page.fill_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        });
        page[99] = seed;
    }
    page
}

/// The link was lost.
#[derive(Debug)]
struct Lost;

/// The source: a program's memory, and books about it.
struct Source {
    memory: BTreeMap<SpaceId, BTreeMap<u64, u8>>,
    /// The spaces of the processes.
    of: [SpaceId; 3],
    next: u32,
    books: Books,
    zstd: ZstdEncoder,
    channel: Option<Channel>,
    /// Written since what was last acknowledged.
    dirty: BTreeSet<(SpaceId, u64)>,
    announced: BTreeSet<SpaceId>,
    /// After so many frames each, the link is lost.
    losses: Vec<u32>,
    frames: u32,
    found: u64,
}

impl Source {
    fn frame(
        &mut self,
        send: impl FnOnce(&mut Channel) -> Result<(), crate::link::ChannelError>,
    ) -> Result<(), Lost> {
        let channel = self.channel.as_mut().ok_or(Lost)?;
        send(channel).map_err(|_| Lost)?;
        self.frames += 1;
        if self.losses.last() == Some(&self.frames) {
            self.losses.pop();
            self.frames = 0;
            channel.link().shutdown();
            return Err(Lost);
        }
        Ok(())
    }

    fn say(&mut self, message: &ControlMessage) -> Result<(), Lost> {
        self.frame(|channel| channel.control(message))
    }

    fn program(&mut self, writes: &[Write]) {
        for write in writes {
            match *write {
                Write::Fill(of, page, seed) => {
                    let space = self.of[of as usize];
                    self.memory.entry(space).or_default().insert(page, seed);
                    self.dirty.insert((space, page));
                }
                Write::Drop(of, page) => {
                    let space = self.of[of as usize];
                    self.memory.entry(space).or_default().remove(&page);
                }
                Write::End(of) => {
                    self.memory.remove(&self.of[of as usize]);
                    self.of[of as usize] = SpaceId(self.next);
                    self.next += 1;
                }
            }
        }
    }

    fn info(&self, space: SpaceId) -> SpaceInfo {
        let pages = self.memory[&space].len() as u64;
        SpaceInfo { space, vpid: space.0 as i32 + 1, name: "program".to_owned(), pages }
    }

    fn populated(&self, space: SpaceId) -> PageSet {
        let mut set = PageSet::default();
        self.memory[&space].keys().for_each(|page| set.insert(*page, 1));
        set
    }

    /// As the source takes in what it has collected: first the books, and then the messages.
    fn round(&mut self, round: u32) -> Result<(), Lost> {
        let mut said = Vec::new();
        for space in self.announced.clone() {
            if !self.memory.contains_key(&space) {
                self.announced.remove(&space);
                self.books.forget(space);
                said.push(ControlMessage::SpaceGone { space });
            }
        }
        let fresh: Vec<SpaceId> =
            self.memory.keys().filter(|space| !self.announced.contains(space)).copied().collect();
        if !fresh.is_empty() {
            let spaces = fresh.iter().map(|space| self.info(*space)).collect();
            said.push(ControlMessage::Spaces { round, spaces });
            self.announced.extend(fresh);
        }
        let dirty = self.dirty.clone();
        let mut todo = Vec::new();
        for space in self.announced.clone() {
            let populated = self.populated(space);
            let missing = self.books.space(space).missing(&populated);
            let due = |page: u64| missing.contains(page) || dirty.contains(&(space, page));
            todo.extend(self.memory[&space].keys().filter(|page| due(**page)).map(|page| (space, *page)));
            let gone = self.books.space(space).retain(&populated);
            if !gone.is_empty() {
                said.push(ControlMessage::Discard { space, runs: wire_runs(&gone) });
            }
        }
        self.books.make_room(100, 3, Savings { twins: u64::MAX, cache: 1 << 20 });
        said.iter().try_for_each(|message| self.say(message))?;
        for (space, page) in &todo {
            self.page(*space, *page, round, &todo)?;
        }
        self.say(&ControlMessage::RoundEnd { round, pages: todo.len() as u64, bytes: 0 })?;
        loop {
            match self.channel.as_mut().ok_or(Lost)?.answer("an acknowledgement").map_err(|_| Lost)? {
                ControlMessage::RoundAck { round: of } if of == round => break,
                ControlMessage::Again { spaces } => spaces.iter().for_each(|(space, runs)| {
                    self.books.take_back(*space, runs).unwrap();
                }),
                other => panic!("{other:?}"),
            }
        }
        self.books.settle();
        self.dirty.clear();
        Ok(())
    }

    fn page(&mut self, space: SpaceId, page: u64, round: u32, todo: &[(SpaceId, u64)]) -> Result<(), Lost> {
        let bytes = bytes(self.memory[&space][&page]);
        let zero = digest::is_zero(&bytes);
        let content = if zero { digest::ZERO_PAGE } else { digest::page(&bytes) };
        let look =
            Look { space, page, bytes: &bytes, content, zero, round, passes: true, last: false, idle: true };
        let mut out = Output::default();
        let stays = |of: SpaceId, at: u64| !todo.contains(&(of, at));
        let fate = self.books.enter(&look, &mut out, |_, _| None, stays);
        let (mut batch, mut payload) = (PageBatch::default(), Vec::new());
        let number = PageNo(page);
        match fate {
            Fate::Unchanged => return Ok(()),
            Fate::Zero => {
                batch.clear(space, round, Coding::Raw);
                batch.push(number, true, content);
            }
            Fate::Copy(from) => {
                batch.clear(space, round, Coding::Copy);
                batch.push_copy(number, content, from);
            }
            Fate::Delta(base, from, to) => {
                batch.clear(space, round, Coding::Delta);
                batch.push_on_base(number, content, base.at, base.content);
                payload.extend_from_slice(&out.deltas[from..to]);
            }
            Fate::OnBase(base, from) => {
                batch.clear(space, round, Coding::ZstdOnBase);
                batch.push_on_base(number, content, base.at, base.content);
                self.zstd.encode_on(1, &out.bases[from..from + 4096], &bytes, &mut payload).unwrap();
            }
            Fate::Beside(_) | Fate::Whole => {
                batch.clear(space, round, Coding::Raw);
                batch.push(number, false, content);
                payload.extend_from_slice(&bytes);
            }
        }
        self.frame(|channel| channel.pages(&batch, &[IoSlice::new(&payload)]).map(drop))
    }

    /// As the source takes a session up, over one link after the other.
    fn rejoin(&mut self, hub: &Hub) {
        let mut doubted = self.books.forget_doubted();
        loop {
            let (ours, mut theirs) = pair();
            let mut ours = ours;
            ours.control(&ControlMessage::Rejoin { session: 7 }).unwrap();
            match theirs.receive().unwrap() {
                Incoming::Control(ControlMessage::Rejoin { session: 7 }) => hub.rejoin(theirs).unwrap(),
                other => panic!("{other:?}"),
            }
            assert_eq!(ours.answer("the session").unwrap(), ControlMessage::Rejoined);
            let spaces: Vec<SpaceInfo> =
                self.announced.iter().map(|space| self.info_or_empty(*space)).collect();
            // This link may be lost too: before the destination has heard everything, or before it was heard.
            self.frames += 1;
            if self.losses.last() == Some(&self.frames) {
                self.losses.pop();
                self.frames = 0;
                if self.found.is_multiple_of(2) {
                    say_what_stands(&mut ours, &mut self.books, &spaces, &doubted).unwrap();
                }
                ours.link().shutdown();
                continue;
            }
            say_what_stands(&mut ours, &mut self.books, &spaces, &doubted).unwrap();
            self.found += hear_what_stands(&mut ours, &mut self.books, &doubted).unwrap();
            doubted.clear();
            self.channel = Some(ours);
            return;
        }
    }

    /// A process may have ended since the last look: it is announced until the next one.
    fn info_or_empty(&self, space: SpaceId) -> SpaceInfo {
        match self.memory.contains_key(&space) {
            true => self.info(space),
            false => SpaceInfo { space, vpid: space.0 as i32 + 1, name: "program".to_owned(), pages: 0 },
        }
    }

    /// Both sides compare everything, and the destination hears that there are no images.
    fn seal(&mut self) {
        for space in self.announced.clone() {
            let populated = self.populated(space);
            let mut digest = SpaceDigest::default();
            for (page, seed) in &self.memory[&space] {
                digest.insert(
                    PageNo(*page),
                    &match digest::is_zero(&bytes(*seed)) {
                        true => digest::ZERO_PAGE,
                        false => digest::page(&bytes(*seed)),
                    },
                );
            }
            let channel = self.channel.as_mut().unwrap();
            channel.owned(&OwnedBatch { space, runs: wire_runs(&populated), more: false }).unwrap();
            let pages = populated.len();
            let (vpid, regions) = (space.0 as i32 + 1, Vec::new());
            channel.control(&ControlMessage::SpaceSeal { space, vpid, pages, digest, regions }).unwrap();
        }
        let spaces = self.announced.len() as u32;
        let channel = self.channel.as_mut().unwrap();
        channel.control(&ControlMessage::SealEnd { spaces }).unwrap();
        let all = self.memory.values().map(|memory| memory.len() as u64).sum();
        assert_eq!(channel.answer("the seal").unwrap(), ControlMessage::Sealed { pages: all });
        channel.control(&ControlMessage::ImagesEnd { files: 0, bytes: 0 }).unwrap();
    }
}

fn pair() -> (Channel, Channel) {
    let (mut ours, mut theirs) = TcpLink::pair().unwrap();
    ours.set_stall(STALL);
    theirs.set_stall(STALL);
    (Channel::new(ours), Channel::new(theirs))
}

/// Moves the memory in rounds, with the losses; gives the number of pages that were found to have arrived.
fn moves(rounds: &[Vec<Write>], losses: Vec<u32>) -> u64 {
    let (ours, mut theirs) = pair();
    let hub = Hub::new(7, PageStore::new(None, None).unwrap(), STALL).unwrap();
    hub.begin(theirs.link(), "program").unwrap();
    let images = ImageDir::new().expect("this test makes a file system, which needs root");
    let plan = ReceivePlan::new("127.0.0.1:0".parse().unwrap());
    let mut source = Source {
        memory: BTreeMap::new(),
        of: [SpaceId(0), SpaceId(1), SpaceId(2)],
        next: 3,
        books: Books::default(),
        zstd: ZstdEncoder::new().unwrap(),
        channel: Some(ours),
        dirty: BTreeSet::new(),
        announced: BTreeSet::new(),
        losses,
        frames: 0,
        found: 0,
    };
    std::thread::scope(|scope| {
        let hub = &hub;
        let destination = scope.spawn(move || {
            let mut network = Arrival::new(&plan, &Silent, 7, "program", String::new());
            let reception =
                Reception::new(&mut theirs, hub, &images, &Silent, &|| Ok(()), &mut network, &|| {
                    Duration::ZERO
                });
            reception.run().map(|cargo| cargo.spaces.len())
        });
        let hold = ControlMessage::Hold { ms: HOLD.as_millis() as u64 };
        source.channel.as_mut().unwrap().control(&hold).unwrap();
        for (round, writes) in rounds.iter().enumerate() {
            source.program(writes);
            while source.round(round as u32).is_err() {
                source.rejoin(hub);
                // It runs on meanwhile.
                source.program(&writes[..writes.len() / 2]);
            }
        }
        // What is left, as in the freeze.
        while source.round(rounds.len() as u32).is_err() {
            source.rejoin(hub);
        }
        source.seal();
        assert_eq!(destination.join().unwrap().unwrap(), source.announced.len());
    });
    let store = hub.close().unwrap();
    for (space, memory) in &source.memory {
        for (page, seed) in memory {
            let held = store.stretch(*space, PageNo(*page), 1).map_or(bytes(0).to_vec(), <[u8]>::to_vec);
            assert!(held == bytes(*seed), "page {page} of space {}", space.0);
        }
    }
    source.found
}

#[test]
fn what_has_arrived_of_a_lost_round_is_found() {
    let writes: Vec<Write> = (0..30).map(|page| Write::Fill(0, page, 1 + (page % 8) as u8)).collect();
    assert_eq!(moves(std::slice::from_ref(&writes), Vec::new()), 0);
    // A message and twenty pages; the last of them may have been on its way when the link went.
    let found = moves(&[writes], vec![21]);
    assert!((19..=20).contains(&found), "{found}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    #[test]
    fn whatever_is_lost_the_memory_arrives(
        rounds in proptest::collection::vec(proptest::collection::vec(write(), 0..60), 1..5),
        losses in proptest::collection::vec(1u32..60, 0..6),
    ) {
        moves(&rounds, losses);
    }
}

/// A destination that holds page 4 of one space, and a source that has come back and says `says` of it; gives what it answers.
fn answer(says: impl FnOnce(&mut Channel, SpaceInfo, SpaceDigest)) -> Result<(), crate::link::ChannelError> {
    let (mut ours, mut theirs) = pair();
    let hub = Hub::new(7, PageStore::new(None, None).unwrap(), STALL).unwrap();
    hub.begin(theirs.link(), "program").unwrap();
    let images = ImageDir::new().expect("this test makes a file system, which needs root");
    let plan = ReceivePlan::new("127.0.0.1:0".parse().unwrap());
    let info = SpaceInfo { space: SpaceId(0), vpid: 1, name: "program".to_owned(), pages: 1 };
    let content = digest::page(&bytes(3));
    let mut batch = PageBatch::default();
    batch.clear(info.space, 0, Coding::Raw);
    batch.push(PageNo(4), false, content);
    ours.control(&ControlMessage::Hold { ms: 2000 }).unwrap();
    ours.control(&ControlMessage::Spaces { round: 0, spaces: vec![info.clone()] }).unwrap();
    ours.pages(&batch, &[IoSlice::new(&bytes(3))]).unwrap();
    ours.control(&ControlMessage::RoundEnd { round: 0, pages: 1, bytes: 4096 }).unwrap();
    let answered = std::thread::scope(|scope| {
        let hub = &hub;
        let destination = scope.spawn(move || {
            let mut network = Arrival::new(&plan, &Silent, 7, "program", String::new());
            let reception =
                Reception::new(&mut theirs, hub, &images, &Silent, &|| Ok(()), &mut network, &|| {
                    Duration::ZERO
                });
            let ended = reception.run().map(drop);
            if let Err(error) = ended {
                let _ = theirs.control(&ControlMessage::abort(error.code(), &error.chain()));
            }
        });
        assert_eq!(ours.answer("the end of the round").unwrap(), ControlMessage::RoundAck { round: 0 });
        let (mut again, back) = pair();
        hub.rejoin(back).unwrap();
        assert_eq!(again.answer("the session").unwrap(), ControlMessage::Rejoined);
        let mut sum = SpaceDigest::default();
        sum.insert(PageNo(4), &content);
        says(&mut again, info, sum);
        let answered = again.answer("what stands").map(|answer| {
            assert_eq!(answer, ControlMessage::Stands { pages: 0 });
        });
        let _ = again.control(&ControlMessage::abort(pageferry_wire_format::AbortCode::Cancelled, ""));
        destination.join().unwrap();
        answered
    });
    drop(hub.close());
    answered
}

#[test]
fn an_account_that_is_not_what_is_here_or_contradicts_itself_ends_the_session() {
    use crate::link::ChannelError::Aborted;
    use pageferry_wire_format::{AbortCode, OwedBatch, PageRun};
    let run = |start| vec![PageRun { start: PageNo(start), len: 1 }];
    let owned = |start| OwnedBatch { space: SpaceId(0), runs: run(start), more: false };
    let owed = |start| OwedBatch { space: SpaceId(0), runs: run(start), more: false };
    let end =
        |channel: &mut Channel, spaces| channel.control(&ControlMessage::StandingEnd { spaces }).unwrap();
    let standing = |channel: &mut Channel, info, pages, digest| {
        channel.control(&ControlMessage::Standing { info, pages, digest }).unwrap();
    };
    let told = answer(|channel, info, digest| {
        channel.owned(&owned(4)).unwrap();
        channel.owed(&owed(9)).unwrap();
        standing(channel, info, 1, digest);
        end(channel, 1);
    });
    assert!(told.is_ok(), "page 9 never came, which is said: {told:?}");

    let another = answer(|channel, info, _| {
        channel.owned(&owned(4)).unwrap();
        standing(channel, info, 1, SpaceDigest::default());
        end(channel, 1);
    });
    assert!(matches!(another, Err(Aborted { code: AbortCode::SealMismatch, .. })), "{another:?}");
    let missing = answer(|channel, info, digest| {
        channel.owned(&owned(5)).unwrap();
        standing(channel, info, 1, digest);
        end(channel, 1);
    });
    assert!(matches!(missing, Err(Aborted { code: AbortCode::SealMismatch, .. })), "{missing:?}");
    let both = answer(|channel, info, digest| {
        channel.owned(&owned(4)).unwrap();
        channel.owed(&owed(4)).unwrap();
        standing(channel, info, 1, digest);
        end(channel, 1);
    });
    assert!(matches!(both, Err(Aborted { code: AbortCode::BadFrame, .. })), "{both:?}");
    let counted = answer(|channel, info, digest| {
        channel.owned(&owned(4)).unwrap();
        standing(channel, info, 1, digest);
        end(channel, 2);
    });
    assert!(matches!(counted, Err(Aborted { code: AbortCode::BadFrame, .. })), "{counted:?}");
    let unsaid = answer(|channel, _, _| {
        channel.owned(&owned(4)).unwrap();
        end(channel, 1);
    });
    assert!(matches!(unsaid, Err(Aborted { code: AbortCode::BadFrame, .. })), "{unsaid:?}");
}
