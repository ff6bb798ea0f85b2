//! Handovers in virtual time: both engines, the link, CRIU and the program end, or come and go, at moments that a seed gives.
//!
//! What an engine does about a failure is asked of the rules that the real one goes by: `source/machine`, `destination/sessions` and
//! `journal/verdict`. The steps between are those of `source/handover`, `destination/restore`, the watchman and the guard, in the order in
//! which they are taken there, cut wherever something could end between two of them. A world is over when nothing happens any more; then
//! the link is whole, somebody starts a receiver, and calls `pageferry recover` at both sides.

mod destination;
mod source;
mod successor;

use super::verdict::{self, Tree, Verdict};
use super::{Role, Step};
use crate::destination::sessions::Sessions;
use crate::source::machine::Stake;
use destination::Destination;
use pageferry_wire_format::HandoverState;
use source::Source;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::{Duration, Instant};
use successor::Successor;

/// Of virtual time, in microseconds.
type Us = u64;

const MS: Us = 1000;
const SECOND: Us = 1000 * MS;
/// The time-outs of both sides, as their options have them.
const STALL: Us = 30 * SECOND;
const RESOLVE: Us = 20 * SECOND;
const POST_COPY: Us = 300 * SECOND;
const SESSION: u128 = 7;

/// What goes over the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Message {
    Hello,
    Welcome,
    Round,
    Ack,
    Seal,
    Sealed,
    Images,
    Ready,
    Commit,
    Resumed,
    Filled,
    /// The destination has given up; whether the program may have run there.
    Abort(bool),
    /// The source has rolled back.
    GiveUp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Source(u32),
    Destination(u32),
    ToSource(Message),
    ToDestination(Message),
    /// Whoever still waits for a word then takes the connection for lost.
    SourceWaited(u32),
    DestinationWaited(u32),
    /// A question about the session, over a connection of its own.
    Ask(u32),
    Fill,
    GuardKills,
    LinkUp,
    ReceiverStarts,
    /// `pageferry recover` is called at the source, and later looks how far it is.
    SuccessorComes,
    SuccessorLooks,
}

/// What can end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    SourceEngine,
    DestinationEngine,
    /// And another receiver is started on that machine.
    DestinationEngineAnew,
    SourceCriu,
    DestinationCriu,
    /// The connection breaks, and a new one can be made.
    Reset,
    /// Nothing gets through for so long.
    Down(Us),
    SourceProgram,
    DestinationProgram,
}

/// One copy of the program.
#[derive(Clone, Copy, Debug, Default)]
struct Copy {
    there: bool,
    frozen: bool,
    stopped: bool,
}

impl Copy {
    fn runs(self) -> bool {
        self.there && !self.frozen && !self.stopped
    }

    fn tree(self) -> Tree {
        match (self.there, self.runs()) {
            (false, _) => Tree::Gone,
            (true, true) => Tree::Running,
            (true, false) => Tree::Stopped,
        }
    }
}

/// A generator of numbers that look random (Steele, Lea and Flood, OOPSLA 2014).
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

struct World {
    now: Us,
    queue: BinaryHeap<Reverse<(Us, u64, Event)>>,
    count: u64,
    random: SplitMix,
    base: Instant,
    stake: Stake,
    link_up: bool,
    /// Of the first connection; messages of a connection that is no more get lost.
    connected: bool,
    source: Source,
    successor: Successor,
    destination: Destination,
    sessions: Sessions,
    here: Copy,
    there: Copy,
    ran_there: bool,
    /// Every page is in place at the destination.
    complete: bool,
    /// A fault has ended the program itself.
    killed: bool,
    source_journal: Option<Step>,
    destination_journal: Option<Step>,
    faults: Vec<(u64, Fault)>,
    trace: Vec<String>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = SplitMix(seed);
        let stake = if random.below(2) == 0 { Stake::Program } else { Stake::Part };
        let mut faults: Vec<(u64, Fault)> = (0..=random.below(3))
            .map(|_| {
                let fault = match random.below(11) {
                    0 | 1 => Fault::SourceEngine,
                    2 => Fault::DestinationEngine,
                    3 => Fault::DestinationEngineAnew,
                    4 => Fault::SourceCriu,
                    5 => Fault::DestinationCriu,
                    6 => Fault::Reset,
                    7 => Fault::Down(random.below(20 * SECOND)),
                    8 => Fault::Down(STALL + random.below(400 * SECOND)),
                    9 => Fault::SourceProgram,
                    _ => Fault::DestinationProgram,
                };
                // After so many events: a handover without a fault has about fifty.
                (random.below(60), fault)
            })
            .collect();
        faults.sort();
        let mut world = Self {
            now: 0,
            queue: BinaryHeap::new(),
            count: 0,
            source: Source::new(random.below(4) as u32),
            successor: Successor::default(),
            random,
            base: Instant::now(),
            stake,
            link_up: true,
            connected: false,
            destination: Destination::new(),
            sessions: Sessions::default(),
            here: Copy { there: true, ..Copy::default() },
            there: Copy::default(),
            ran_there: false,
            complete: false,
            killed: false,
            source_journal: None,
            destination_journal: None,
            faults,
            trace: Vec::new(),
        };
        world.source_soon();
        world
    }

    fn at(&mut self, after: Us, event: Event) {
        self.count += 1;
        self.queue.push(Reverse((self.now + after, self.count, event)));
    }

    fn instant(&self) -> Instant {
        self.base + Duration::from_micros(self.now)
    }

    fn say(&mut self, text: impl std::fmt::Debug) {
        self.trace.push(format!("{:>12} {text:?}", self.now));
    }

    /// A while of up to `most`, of which most are short.
    fn while_of(&mut self, most: Us) -> Us {
        let half = 1 + self.random.below(most);
        1 + self.random.below(half)
    }

    /// Sends a message over the first connection. It is late while the link is down, and lost with the connection.
    fn send(&mut self, event: Event) {
        if self.connected {
            let after = self.while_of(2 * MS);
            self.at(after, event);
        }
    }

    /// Until nothing happens any more.
    fn run(&mut self) {
        let mut events = 0;
        while let Some(Reverse((time, _, event))) = self.queue.pop() {
            self.now = time;
            while self.faults.first().is_some_and(|(at, _)| *at <= events) {
                let (_, fault) = self.faults.remove(0);
                self.strike(fault);
                self.check();
            }
            events += 1;
            assert!(events < 100_000, "it does not come to an end:\n{}", self.story());
            self.happen(event);
            self.check();
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Source(turn) => self.source_turn(turn),
            Event::Destination(turn) => self.destination_turn(turn),
            // The link holds back what is on its way, as TCP does.
            Event::ToSource(_) | Event::ToDestination(_) if !self.link_up && self.connected => {
                self.at(100 * MS, event);
            }
            Event::ToSource(_) | Event::ToDestination(_) if !self.connected => {}
            Event::ToSource(message) => self.source_hears(message),
            Event::ToDestination(message) => self.destination_hears(message),
            Event::SourceWaited(turn) => self.source_waited(turn),
            Event::DestinationWaited(turn) => self.destination_waited(turn),
            Event::Ask(turn) => self.source_asks(turn),
            Event::Fill => self.fill(),
            Event::GuardKills => self.guard_kills(),
            Event::LinkUp => self.link_up = true,
            Event::ReceiverStarts => self.start_receiver(),
            Event::SuccessorComes => self.successor_comes(),
            Event::SuccessorLooks => self.successor_looks(),
        }
    }

    fn strike(&mut self, fault: Fault) {
        self.say(fault);
        match fault {
            Fault::SourceEngine => {
                self.kill_source();
                // Before long, in most cases: the receiver waits for some minutes only.
                if self.random.below(2) == 0 {
                    let after = self.while_of(400 * SECOND);
                    self.at(after, Event::SuccessorComes);
                }
            }
            Fault::DestinationEngine => self.kill_destination(),
            Fault::DestinationEngineAnew => {
                self.kill_destination();
                let after = self.while_of(40 * SECOND);
                self.at(after, Event::ReceiverStarts);
            }
            Fault::SourceCriu => self.kill_source_criu(),
            Fault::DestinationCriu => self.kill_destination_criu(),
            Fault::Reset => self.disconnect(),
            Fault::Down(time) => {
                self.link_up = false;
                self.at(time, Event::LinkUp);
            }
            Fault::SourceProgram => {
                // It is what the other is made of until that is complete.
                self.killed |= self.here.there && !self.complete;
                self.here = Copy::default();
            }
            Fault::DestinationProgram => {
                self.killed |= self.there.runs();
                self.there = Copy::default();
            }
        }
    }

    /// Both ends notice.
    fn disconnect(&mut self) {
        if std::mem::take(&mut self.connected) {
            self.source_lost();
            self.destination_lost();
        }
    }

    /// What the machine at the destination says of the session.
    fn answer(&mut self) -> Option<HandoverState> {
        if !self.link_up || !self.destination.alive {
            return None;
        }
        let state = match self.sessions.ask(SESSION, self.instant()) {
            HandoverState::Unknown => self.remembered(),
            state => state,
        };
        Some(state)
    }

    /// As `recover::remembered`: of a session of an earlier engine.
    fn remembered(&mut self) -> HandoverState {
        let Some(step) = self.destination_journal else { return HandoverState::Unknown };
        if verdict::judge(Role::Destination, step, false, self.there.tree()) == Verdict::EndHere {
            self.there = Copy::default();
        }
        verdict::state_of(step, false, self.there.tree(), 1)
    }

    /// What must be true at every moment.
    fn check(&self) {
        assert!(!(self.here.runs() && self.there.runs()), "both copies run:\n{}", self.story());
        assert!(!(self.here.runs() && self.ran_there), "it runs here after it ran there:\n{}", self.story());
        assert!(
            self.killed || self.here.there || (self.there.runs() && self.complete),
            "there is no whole copy:\n{}",
            self.story()
        );
    }

    /// Somebody looks after it: the link is whole, a receiver runs, and `recover` is called, at the destination first.
    fn recover(&mut self) -> Outcome {
        assert!(!self.source.alive, "the source's engine waits for ever:\n{}", self.story());
        assert!(!self.successor.serves, "who goes on in its place waits for ever:\n{}", self.story());
        self.link_up = true;
        if !self.destination.alive {
            self.start_receiver();
        }
        let active = self.destination.in_session();
        if let Some(step) = self.destination_journal
            && verdict::judge(Role::Destination, step, active, self.there.tree()) == Verdict::EndHere
        {
            self.there = Copy::default();
        }
        let before = self.here.tree();
        let mut verdict = match self.source_journal {
            None => Verdict::Over,
            Some(step) => verdict::judge(Role::Source, step, false, before),
        };
        if verdict == Verdict::Ask {
            verdict = verdict::answered(self.answer().as_ref(), self.stake == Stake::Part, before);
        }
        self.say(("recover", verdict, before));
        match verdict {
            Verdict::RunHere => self.here = Copy { there: true, ..Copy::default() },
            Verdict::EndHere => self.here = Copy::default(),
            _ => {}
        }
        self.check();
        match (self.here.tree(), self.there.tree()) {
            (Tree::Running, Tree::Gone) => Outcome::Here,
            (Tree::Gone, Tree::Running) if self.complete => Outcome::There,
            (Tree::Stopped, _) if verdict == Verdict::Unclear => Outcome::Asked,
            _ if self.killed => Outcome::Killed,
            other => panic!("nobody has it, or two have: {other:?}, {verdict:?}\n{}", self.story()),
        }
    }

    fn story(&self) -> String {
        format!(
            "{:?}, here {:?}, there {:?}, ran there {}, complete {}, journals {:?} and {:?}\n{}",
            self.stake,
            self.here,
            self.there,
            self.ran_there,
            self.complete,
            self.source_journal,
            self.destination_journal,
            self.trace.join("\n")
        )
    }
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    /// It runs at the source.
    Here,
    /// It runs at the destination, with everything.
    There,
    /// It stands stopped and whole at the source, and a person is asked.
    Asked,
    /// The fault was that the program ended.
    Killed,
}

/// More than the 200 that would do: a world takes some microseconds.
const WORLDS: u64 = 20_000;

#[test]
fn whatever_ends_at_whatever_moment_there_is_one_program() {
    let mut outcomes = BTreeMap::new();
    let mut failed_in = BTreeMap::new();
    let mut served = 0;
    for seed in 0..WORLDS {
        let mut world = World::new(seed);
        world.run();
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.recover()))
            .unwrap_or_else(|_| panic!("seed {seed}"));
        *outcomes.entry(outcome).or_insert(0u64) += 1;
        served += u64::from(world.successor.done);
        if let Some(phase) = world.source.failed_in {
            *failed_in.entry(phase).or_insert(0u64) += 1;
        }
    }
    for outcome in [Outcome::Here, Outcome::There, Outcome::Asked, Outcome::Killed] {
        assert!(outcomes.get(&outcome).is_some_and(|count| *count > WORLDS / 200), "{outcomes:?}");
    }
    assert!(served > WORLDS / 200, "few went on in place of an engine: {served}");
    assert!(failed_in.len() >= 12, "not every phase was struck: {failed_in:?}");
}

#[test]
fn without_a_fault_it_moves() {
    for seed in 0..200 {
        let mut world = World::new(seed);
        world.faults.clear();
        world.run();
        assert_eq!((world.here.tree(), world.there.tree()), (Tree::Gone, Tree::Running), "{}", world.story());
        assert_eq!((world.source_journal, world.destination_journal), (None, None), "nothing is left");
        assert_eq!(world.recover(), Outcome::There);
    }
}
