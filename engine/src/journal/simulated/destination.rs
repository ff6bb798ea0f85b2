//! The destination's engine, its guard, and the receiver that is started after it.

use super::{Copy, Event, MS, Message, POST_COPY, SESSION, STALL, Us, World};
use crate::destination::sessions::Sessions;
use crate::journal::Step;
use crate::source::machine::Stake;
use std::time::Duration;

/// What it does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// No session is here, or no more.
    Nothing,
    Hear,
    Restore,
    Guard,
    WriteReady,
    SayReady,
    Accept,
    WriteCommitting,
    LetRun,
    HearOfIt,
    WriteResumed,
    NoteResumed,
    SayResumed,
    Fill,
    WriteFilled,
    NoteFilled,
    SayFilled,
}

pub(super) struct Destination {
    pub(super) alive: bool,
    next: Next,
    turn: u32,
    /// CRIU has the restored tree.
    criu: bool,
    /// The guard ends the tree when this engine ends without a word.
    guarded: bool,
    /// Pieces of memory that are not in place yet.
    missing: u32,
    heard: Us,
    told: bool,
}

impl Destination {
    pub(super) fn new() -> Self {
        Self {
            alive: true,
            next: Next::Nothing,
            turn: 0,
            criu: false,
            guarded: false,
            missing: 8,
            heard: 0,
            told: true,
        }
    }

    pub(super) fn in_session(&self) -> bool {
        self.alive && self.next != Next::Nothing
    }
}

impl World {
    fn destination_goes(&mut self, next: Next) {
        self.destination.next = next;
        self.destination.turn += 1;
        let (after, turn) = (self.while_of(5 * MS), self.destination.turn);
        self.at(after, Event::Destination(turn));
    }

    fn destination_waits(&mut self) {
        self.destination.next = Next::Hear;
        self.destination.turn += 1;
        let turn = self.destination.turn;
        self.at(STALL, Event::DestinationWaited(turn));
    }

    pub(super) fn destination_hears(&mut self, message: Message) {
        if !self.destination.alive {
            return;
        }
        self.say(("destination hears", message));
        match (self.destination.next, message) {
            (Next::Nothing, Message::Hello) => {
                let begun = self.sessions.begin(SESSION, self.instant(), Duration::from_secs(3600));
                if begun.is_err() {
                    return self.send(Event::ToSource(Message::Abort(false)));
                }
                self.destination_journal = Some(Step::PreCopy);
                self.send(Event::ToSource(Message::Welcome));
                self.destination_waits();
            }
            (Next::Hear, Message::Round) => {
                self.send(Event::ToSource(Message::Ack));
                self.destination_waits();
            }
            (Next::Hear, Message::Seal) => {
                self.send(Event::ToSource(Message::Sealed));
                self.destination_waits();
            }
            (Next::Hear, Message::Images) => self.destination_goes(Next::Restore),
            (Next::Hear, Message::Commit) => self.destination_goes(Next::Accept),
            (Next::Nothing, _) => {}
            (_, Message::GiveUp) => self.destination_fails(false),
            _ => {}
        }
    }

    pub(super) fn destination_turn(&mut self, turn: u32) {
        if !self.destination.alive || turn != self.destination.turn {
            return;
        }
        let next = self.destination.next;
        self.say(("destination", next));
        let restored = matches!(
            next,
            Next::Guard
                | Next::WriteReady
                | Next::SayReady
                | Next::Accept
                | Next::WriteCommitting
                | Next::LetRun
        );
        // CRIU takes with it what it restores.
        if restored && !(self.destination.criu && self.there.there) {
            return self.destination_fails(false);
        }
        match next {
            Next::Nothing | Next::Hear | Next::Fill => {}
            Next::Restore => {
                self.there = Copy { there: true, frozen: true, stopped: false };
                self.destination.criu = true;
                self.destination_goes(Next::Guard);
            }
            Next::Guard => {
                self.destination.guarded = true;
                self.destination_goes(Next::WriteReady);
            }
            Next::WriteReady => {
                self.destination_journal = Some(Step::Ready);
                self.sessions.ready(SESSION);
                self.destination_goes(Next::SayReady);
            }
            Next::SayReady => {
                self.send(Event::ToSource(Message::Ready));
                self.destination_waits();
            }
            Next::Accept => match self.sessions.commit(SESSION, self.instant()) {
                Ok(()) => self.destination_goes(Next::WriteCommitting),
                Err(_) => self.destination_fails(false),
            },
            Next::WriteCommitting => {
                self.destination_journal = Some(Step::Committing);
                self.destination_goes(Next::LetRun);
            }
            Next::LetRun => {
                (self.there.frozen, self.ran_there) = (false, true);
                self.destination.heard = self.now;
                self.destination_goes(Next::HearOfIt);
            }
            // CRIU may have let it run and have ended before it said so.
            Next::HearOfIt if !self.destination.criu => self.destination_fails(false),
            Next::HearOfIt => {
                self.at(MS, Event::Fill);
                self.destination_goes(Next::WriteResumed);
            }
            Next::WriteResumed => {
                self.destination_journal = Some(Step::Resumed);
                self.destination_goes(Next::NoteResumed);
            }
            Next::NoteResumed => {
                self.sessions.resumed(SESSION, 1, self.instant());
                self.destination_goes(Next::SayResumed);
            }
            Next::SayResumed => {
                self.destination.told = self.connected;
                self.send(Event::ToSource(Message::Resumed));
                self.destination.next = Next::Fill;
            }
            Next::WriteFilled => {
                // The guard writes it, and goes: together they are one step, because the line is its own.
                (self.destination_journal, self.destination.guarded, self.complete) =
                    (Some(Step::Filled), false, true);
                self.destination_goes(Next::NoteFilled);
            }
            Next::NoteFilled => {
                self.sessions.filled(SESSION, 1, self.instant());
                self.destination_goes(Next::SayFilled);
            }
            Next::SayFilled => {
                // In a post-copy over the connection that there is then; otherwise over the first.
                let late = self.stake == Stake::Part && self.link_up && self.source_serves();
                self.connected |= late;
                self.destination.told &= self.connected;
                self.send(Event::ToSource(Message::Filled));
                self.destination_ends(!self.destination.told);
            }
        }
    }

    /// A piece of memory comes, or does not.
    pub(super) fn fill(&mut self) {
        if !self.destination.in_session() || self.destination.missing == 0 {
            return;
        }
        let owes = self.stake == Stake::Part;
        if !self.there.there {
            return self.destination_ended_by_itself();
        }
        if !owes || (self.link_up && self.source_serves()) {
            self.destination.missing -= 1;
            self.destination.heard = self.now;
        } else if self.now - self.destination.heard > POST_COPY {
            // Without its pages it cannot go on, and must not go on with others.
            return self.destination_fails(false);
        }
        match self.destination.missing {
            // Not before the source was told that it runs.
            0 if self.destination.next == Next::Fill => self.destination_goes(Next::WriteFilled),
            0 => {
                self.destination.missing = 1;
                self.at(MS, Event::Fill);
            }
            _ if self.destination.heard == self.now => {
                let after = self.while_of(20 * MS);
                self.at(after, Event::Fill);
            }
            _ => self.at(1000 * MS, Event::Fill),
        }
    }

    /// Nothing can be put in place in a program that is gone: that is all of it.
    fn destination_ended_by_itself(&mut self) {
        self.destination.missing = 0;
        if self.destination.next == Next::Fill {
            self.destination_goes(Next::WriteFilled);
        } else {
            self.destination.missing = 1;
            self.at(MS, Event::Fill);
        }
    }

    pub(super) fn destination_waited(&mut self, turn: u32) {
        if self.destination.alive && turn == self.destination.turn && self.destination.next == Next::Hear {
            self.connected = false;
            self.destination_fails(true);
            self.source_lost();
        }
    }

    /// The first connection is lost.
    pub(super) fn destination_lost(&mut self) {
        if self.destination.alive && self.destination.next == Next::Hear {
            self.destination_fails(true);
        }
    }

    /// Nothing of it runs, or ever will; `link`: because the connection is lost.
    fn destination_fails(&mut self, link: bool) {
        self.there = Copy::default();
        self.destination.guarded = false;
        let ran = self.sessions.discarded(SESSION, self.instant());
        self.say(("destination fails", ran));
        self.destination_journal = Some(if ran { Step::Ended } else { Step::Discarded });
        self.send(Event::ToSource(Message::Abort(ran)));
        let unclear = self.sessions.was_ready(SESSION) && link;
        self.destination_ends(unclear);
    }

    fn destination_ends(&mut self, unclear: bool) {
        self.sessions.end(SESSION);
        self.destination.next = Next::Nothing;
        if !unclear {
            self.destination_journal = None;
        }
    }

    /// SIGKILL: the guard ends the tree; before there is one, CRIU does.
    pub(super) fn kill_destination(&mut self) {
        if !std::mem::take(&mut self.destination.alive) {
            return;
        }
        self.sessions = Sessions::default();
        if self.destination.guarded || self.there.frozen {
            let after = self.while_of(50 * MS);
            self.at(after, Event::GuardKills);
        }
        self.destination.next = Next::Nothing;
        if std::mem::take(&mut self.connected) {
            self.source_lost();
        }
    }

    pub(super) fn guard_kills(&mut self) {
        if !self.complete {
            self.there = Copy::default();
        }
        self.destination.guarded = false;
    }

    /// As long as it has the tree, that ends with it.
    pub(super) fn kill_destination_criu(&mut self) {
        self.destination.criu = false;
        if self.there.frozen {
            self.there = Copy::default();
        }
    }

    /// Another receiver on that machine, which remembers nothing but the journal.
    pub(super) fn start_receiver(&mut self) {
        if !self.destination.alive {
            self.destination.alive = true;
            self.destination.next = Next::Nothing;
        }
    }
}
