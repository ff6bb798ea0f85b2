//! `pageferry recover` at the source while the program at the destination is owed pages: it goes on in place of the engine that was
//! killed, and may be killed itself.

use super::{Copy, Event, POST_COPY, SECOND, Us, World};
use crate::journal::verdict::{self, Verdict};
use crate::journal::{Role, Step};
use crate::source::machine::Stake;
use pageferry_wire_format::HandoverState;

#[derive(Default)]
pub(super) struct Successor {
    /// It sends what is owed.
    pub(super) serves: bool,
    /// The destination was not heard since.
    silent: Option<Us>,
    /// It brought a handover to its end.
    pub(super) done: bool,
}

impl World {
    /// Somebody calls `recover`, perhaps too early, or too late.
    pub(super) fn successor_comes(&mut self) {
        let Some(step) = self.source_journal else { return };
        let live = self.source.alive || self.successor.serves;
        let mut verdict = verdict::judge(Role::Source, step, live, self.here.tree());
        if verdict == Verdict::Ask {
            verdict = verdict::answered(self.answer().as_ref(), self.stake == Stake::Part, self.here.tree());
        }
        self.say(("recover comes", verdict));
        if verdict == Verdict::Serve {
            self.source_journal = Some(Step::Resumed);
            self.successor.serves = true;
            self.at(SECOND, Event::SuccessorLooks);
            return;
        }
        self.successor_acts(verdict);
    }

    /// Whether the destination is still there, while it serves.
    pub(super) fn successor_looks(&mut self) {
        if !self.successor.serves {
            return;
        }
        let answer = self.answer();
        if let Some(HandoverState::Resumed { .. }) = answer {
            self.successor.silent = None;
            return self.at(SECOND, Event::SuccessorLooks);
        }
        let since = *self.successor.silent.get_or_insert(self.now);
        if answer.is_none() && self.now - since < POST_COPY {
            return self.at(SECOND, Event::SuccessorLooks);
        }
        self.say(("recover asks", &answer));
        self.successor.serves = false;
        let owes = self.stake == Stake::Part;
        self.successor_acts(verdict::answered(answer.as_ref(), owes, self.here.tree()));
    }

    /// Every page is in place.
    pub(super) fn successor_hears_filled(&mut self) {
        self.say("recover hears that all is there");
        (self.successor.serves, self.successor.done) = (false, true);
        self.successor_acts(Verdict::EndHere);
    }

    fn successor_acts(&mut self, verdict: Verdict) {
        match verdict {
            Verdict::RunHere => self.here = Copy { there: self.here.there, ..Copy::default() },
            Verdict::EndHere => self.here = Copy::default(),
            Verdict::Over => {}
            Verdict::UnderWay | Verdict::Ask | Verdict::Serve | Verdict::Unclear => return,
        }
        self.source_journal = None;
    }
}
