//! The source's engine: its steps, and what it does about a failure.

use super::{Event, MS, Message, POST_COPY, RESOLVE, STALL, Us, World};
use crate::journal::Step;
use crate::source::machine::{Aftermath, Phase, Stake, after_abort, after_answer, after_failure};
use pageferry_wire_format::{AbortCode, HandoverState};

/// What it does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Connect,
    Round,
    WriteFrozen,
    Freeze,
    LastPages,
    Seal,
    Dump,
    Images,
    WriteHeld,
    Watch,
    Stop,
    Leave,
    WriteCommitting,
    Commit,
    WriteResumed,
    WriteFilled,
    End,
    Wait(Message),
    Ask,
}

pub(super) struct Source {
    pub(super) alive: bool,
    next: Next,
    /// What was planned for another turn does not count any more.
    turn: u32,
    rounds: u32,
    /// CRIU has the tree.
    criu: bool,
    /// The watchman lets the tree go when this engine ends.
    watched: bool,
    /// Until when it asks what became of the commit.
    asks_until: Us,
    failed: Option<(Phase, Option<bool>)>,
    pub(super) failed_in: Option<Phase>,
    /// The destination has been heard in the post-copy.
    lost_since: Option<Us>,
}

impl Source {
    pub(super) fn new(rounds: u32) -> Self {
        Self {
            alive: true,
            next: Next::Connect,
            turn: 0,
            rounds,
            criu: false,
            watched: false,
            asks_until: 0,
            failed: None,
            failed_in: None,
            lost_since: None,
        }
    }

    fn phase(&self, stake: Stake) -> Phase {
        match self.next {
            Next::Connect | Next::Wait(Message::Welcome) => Phase::Connecting,
            Next::Round | Next::Wait(Message::Ack) => Phase::PreCopy(0),
            Next::WriteFrozen | Next::Freeze => Phase::Freezing,
            Next::LastPages => Phase::LastPages,
            Next::Seal | Next::Wait(Message::Sealed) => Phase::Sealing,
            Next::Dump => Phase::Dumping,
            Next::Images => Phase::Images,
            Next::Wait(Message::Ready) | Next::WriteHeld | Next::Watch | Next::Stop => Phase::Restoring,
            Next::Leave | Next::WriteCommitting => Phase::Restoring,
            Next::Commit | Next::Wait(Message::Resumed) => Phase::Committing,
            Next::WriteResumed | Next::Wait(_) | Next::Ask if stake == Stake::Part => Phase::PostCopy,
            Next::WriteResumed | Next::Wait(_) | Next::Ask => Phase::Committed,
            Next::WriteFilled | Next::End => Phase::Filled,
        }
    }

    /// It answers what the destination asks for.
    fn serves(&self) -> bool {
        self.alive && matches!(self.next, Next::WriteResumed | Next::Wait(Message::Filled | Message::Resumed))
    }
}

impl World {
    /// Somebody answers what the destination asks for.
    pub(super) fn source_serves(&self) -> bool {
        self.source.serves() || self.successor.serves
    }

    pub(super) fn source_soon(&mut self) {
        self.source.turn += 1;
        let (after, turn) = (self.while_of(5 * MS), self.source.turn);
        self.at(after, Event::Source(turn));
    }

    fn source_goes(&mut self, next: Next) {
        self.source.next = next;
        self.source_soon();
    }

    fn source_waits(&mut self, message: Message) {
        self.source.next = Next::Wait(message);
        self.source.turn += 1;
        let turn = self.source.turn;
        self.at(STALL, Event::SourceWaited(turn));
    }

    pub(super) fn source_turn(&mut self, turn: u32) {
        if !self.source.alive || turn != self.source.turn {
            return;
        }
        let next = self.source.next;
        self.say(("source", next));
        // A program that is gone cannot be read, frozen or held.
        if !self.here.there && matches!(next, Next::Round | Next::Freeze | Next::LastPages | Next::WriteHeld)
        {
            return self.source_fails(None);
        }
        // Who lost CRIU lost the freeze with it; `confirm`, just before the tree is held, is the last to notice.
        if !self.source.criu && matches!(next, Next::LastPages | Next::Dump | Next::WriteHeld) {
            return self.source_fails(None);
        }
        match next {
            Next::Connect => {
                if !self.link_up || !self.destination.alive {
                    return self.source_fails(None);
                }
                self.connected = true;
                self.source_journal = Some(Step::PreCopy);
                self.send(Event::ToDestination(Message::Hello));
                self.source_waits(Message::Welcome);
            }
            Next::Round => {
                self.send(Event::ToDestination(Message::Round));
                self.source_waits(Message::Ack);
            }
            Next::WriteFrozen => {
                self.source_journal = Some(Step::Frozen);
                self.source_goes(Next::Freeze);
            }
            Next::Freeze => {
                (self.here.frozen, self.source.criu) = (true, true);
                self.source_goes(Next::LastPages);
            }
            Next::LastPages => self.source_goes(Next::Seal),
            Next::Seal => {
                self.send(Event::ToDestination(Message::Seal));
                self.source_waits(Message::Sealed);
            }
            Next::Dump => self.source_goes(Next::Images),
            Next::Images => {
                self.send(Event::ToDestination(Message::Images));
                self.source_waits(Message::Ready);
            }
            Next::WriteHeld => {
                self.source_journal = Some(Step::Held);
                self.source_goes(Next::Watch);
            }
            Next::Watch => {
                self.source.watched = true;
                self.source_goes(Next::Stop);
            }
            Next::Stop => {
                self.here.stopped = self.here.there;
                self.source_goes(Next::Leave);
            }
            Next::Leave => {
                self.source.watched = false;
                self.source_goes(Next::WriteCommitting);
            }
            Next::WriteCommitting => {
                self.source_journal = Some(Step::Committing);
                self.source_goes(Next::Commit);
            }
            Next::Commit => {
                self.send(Event::ToDestination(Message::Commit));
                self.source_waits(Message::Resumed);
            }
            Next::WriteResumed => {
                self.source_journal = Some(Step::Resumed);
                self.source_waits(Message::Filled);
            }
            Next::WriteFilled => {
                self.source_journal = Some(Step::Filled);
                self.source_goes(Next::End);
            }
            Next::End => {
                self.here = super::Copy::default();
                self.source_journal = None;
                self.source.alive = false;
            }
            Next::Wait(_) => {}
            Next::Ask => {
                let turn = self.source.turn;
                self.source_asks(turn);
            }
        }
    }

    pub(super) fn source_hears(&mut self, message: Message) {
        if self.successor.serves && message == Message::Filled {
            return self.successor_hears_filled();
        }
        if !self.source.alive {
            return;
        }
        self.say(("source hears", message));
        match (self.source.next, message) {
            (_, Message::Abort(ran)) => self.source_fails(Some(ran)),
            (Next::Wait(Message::Welcome), Message::Welcome) => {
                let rounds = self.source.rounds;
                self.source_goes(if rounds > 0 { Next::Round } else { Next::WriteFrozen });
            }
            (Next::Wait(Message::Ack), Message::Ack) => {
                self.source.rounds -= 1;
                let next = if self.source.rounds > 0 { Next::Round } else { Next::WriteFrozen };
                self.source_goes(next);
            }
            (Next::Wait(Message::Sealed), Message::Sealed) => self.source_goes(Next::Dump),
            (Next::Wait(Message::Ready), Message::Ready) => self.source_goes(Next::WriteHeld),
            (Next::Wait(Message::Resumed), Message::Resumed) => self.source_goes(Next::WriteResumed),
            // The line that it runs there may be written after the word that all is there has come.
            (Next::Wait(Message::Filled) | Next::WriteResumed, Message::Filled) => {
                self.source_goes(Next::WriteFilled);
            }
            _ => {}
        }
    }

    pub(super) fn source_waited(&mut self, turn: u32) {
        if !self.source.alive || turn != self.source.turn {
            return;
        }
        let next = self.source.next;
        match next {
            // Signs of life come over a whole link, and in a post-copy both sides hold.
            Next::Wait(Message::Filled) if self.source_is_told() => self.source_waits(Message::Filled),
            Next::Wait(_) => {
                self.connected = false;
                self.source_fails(None);
                self.destination_lost();
            }
            _ => {}
        }
    }

    /// Whether something of the destination is heard, or is waited for yet.
    fn source_is_told(&mut self) -> bool {
        let heard = self.link_up && self.destination.alive && self.destination.in_session();
        if heard && (self.connected || self.stake == Stake::Part) {
            self.source.lost_since = None;
            return true;
        }
        let since = *self.source.lost_since.get_or_insert(self.now);
        self.stake == Stake::Part && self.now - since < POST_COPY
    }

    pub(super) fn source_lost(&mut self) {
        if !self.source.alive {
            return;
        }
        match self.source.next {
            Next::Ask => {}
            // It makes the connections anew.
            Next::Wait(Message::Filled) | Next::WriteResumed if self.stake == Stake::Part => {}
            _ => self.source_fails(None),
        }
    }

    /// Something has failed; `abort`: the destination has said so, and whether the program may have run there.
    fn source_fails(&mut self, abort: Option<bool>) {
        let phase = self.source.phase(self.stake);
        self.say(("source fails", phase, abort));
        self.source.failed_in.get_or_insert(phase);
        self.source.failed = Some((phase, abort));
        match after_failure(phase, self.stake) {
            Aftermath::Ask if phase == Phase::Committing && abort.is_some() => {
                let code = if abort == Some(true) { AbortCode::Ended } else { AbortCode::RestoreFailed };
                self.source_ends(after_abort(code));
            }
            Aftermath::Ask => {
                self.connected = false;
                self.destination_lost();
                self.source.asks_until = self.now + RESOLVE;
                self.source_goes(Next::Ask);
            }
            aftermath => self.source_ends(aftermath),
        }
    }

    pub(super) fn source_asks(&mut self, turn: u32) {
        if !self.source.alive || turn != self.source.turn {
            return;
        }
        let answer = self.answer();
        self.say(("source asks", &answer));
        match &answer {
            Some(HandoverState::ReadyToRun | HandoverState::Receiving) | None => {}
            Some(HandoverState::Resumed { .. }) if self.stake == Stake::Program => {}
            Some(state) => {
                let aftermath = after_answer(Some(state), self.stake);
                return match (aftermath, self.source.failed) {
                    (Aftermath::Serve, Some((Phase::Committing, _))) => self.source_goes(Next::WriteResumed),
                    _ => self.source_ends(aftermath),
                };
            }
        }
        if self.now >= self.source.asks_until {
            return self.source_ends(after_answer(answer.as_ref(), self.stake));
        }
        self.source.turn += 1;
        let turn = self.source.turn;
        self.at(200 * MS, Event::Ask(turn));
    }

    fn source_ends(&mut self, aftermath: Aftermath) {
        self.say(("source ends", aftermath));
        match aftermath {
            Aftermath::RunOn => {
                self.send(Event::ToDestination(Message::GiveUp));
                (self.here.frozen, self.here.stopped) = (false, false);
                self.source_journal = None;
            }
            Aftermath::End => {
                self.here = super::Copy::default();
                self.source_journal = None;
            }
            Aftermath::Ask | Aftermath::Hold | Aftermath::Serve => {
                self.source_journal = Some(Step::InDoubt);
                self.here.frozen = false;
            }
        }
        self.source.alive = false;
    }

    /// SIGKILL: CRIU lets the tree go, and so does the watchman, if it still watches. Or to who goes on in its place.
    pub(super) fn kill_source(&mut self) {
        self.successor.serves = false;
        if !self.source.alive {
            return;
        }
        self.source.failed_in.get_or_insert(self.source.phase(self.stake));
        (self.source.alive, self.source.criu, self.here.frozen) = (false, false, false);
        if std::mem::take(&mut self.source.watched) {
            self.here.stopped = false;
        }
        if std::mem::take(&mut self.connected) {
            self.destination_lost();
        }
    }

    /// The kernel lets its tasks go.
    pub(super) fn kill_source_criu(&mut self) {
        (self.source.criu, self.here.frozen) = (false, false);
    }
}
