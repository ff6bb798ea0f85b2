//! Who is being received, and what became of those who were: a sender that lost its link around the commit
//! asks here, and the answer decides which copy of the program lives.
//!
//! The answer is a decision, not a guess: a session that is asked about before its commit has arrived is given
//! up there and then, under the same lock under which a commit is accepted. So a commit that is still in some
//! buffer when the sender is told "discarded" cannot bring a second copy to life.

use pageferry_wire_format::HandoverState;
use std::collections::{HashMap, HashSet};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Sessions that are remembered at most; the oldest ended one makes room.
const REMEMBERED: usize = 1024;

/// How far a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before the commit.
    Receiving,
    /// The commit was accepted; the program is being let go.
    Committed,
    /// The program runs.
    Resumed(i32),
    /// It does, and every page of it is in place.
    Filled(i32),
    /// There is no copy here, and there will be none.
    Discarded,
    /// It ran here, and was ended because its pages did not come.
    Ended,
}

/// The registry of a receiver.
#[derive(Debug, Default)]
pub(crate) struct Sessions {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    active: Option<u128>,
    states: HashMap<u128, (State, Instant)>,
    /// Sessions whose sender was told that its copy may be let go.
    ready: HashSet<u128>,
    /// Sessions whose sender has asked, and got a final answer.
    asked: HashSet<u128>,
}

/// Why a session cannot begin.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum BeginError {
    /// Another one is under way.
    #[error("another migration is being received")]
    Busy,
    /// The identity was used before.
    #[error("this session was begun before")]
    Repeated,
}

/// The session was given up before the commit arrived.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the session was given up before the commit arrived")]
pub(crate) struct GivenUp;

impl Sessions {
    /// Begins a session. One at a time: a restore takes the machine's memory, and two could both run out.
    pub(crate) fn begin(&self, id: u128, now: Instant, remember: Duration) -> Result<(), BeginError> {
        let mut inner = self.lock();
        if inner.active.is_some() {
            return Err(BeginError::Busy);
        }
        inner.states.retain(|_, (_, since)| now.saturating_duration_since(*since) < remember);
        if inner.states.contains_key(&id) {
            return Err(BeginError::Repeated);
        }
        while inner.states.len() >= REMEMBERED {
            let oldest = inner.states.iter().min_by_key(|(_, (_, since))| *since).map(|(id, _)| *id);
            oldest.map(|id| inner.states.remove(&id));
        }
        inner.active = Some(id);
        inner.states.insert(id, (State::Receiving, now));
        Ok(())
    }

    /// Whether the session was given up because its sender has asked about it.
    pub(crate) fn is_given_up(&self, id: u128) -> bool {
        !matches!(self.lock().states.get(&id), Some((State::Receiving, _)))
    }

    /// The sender is about to hear that the program could run here.
    pub(crate) fn ready(&self, id: u128) {
        self.lock().ready.insert(id);
    }

    /// Whether the sender may have committed.
    pub(crate) fn was_ready(&self, id: u128) -> bool {
        self.lock().ready.contains(&id)
    }

    /// Whether the sender has asked about the session and knows its end now.
    pub(crate) fn was_asked(&self, id: u128) -> bool {
        self.lock().asked.contains(&id)
    }

    /// Accepts the commit, unless the session was given up.
    pub(crate) fn commit(&self, id: u128, now: Instant) -> Result<(), GivenUp> {
        let mut inner = self.lock();
        match inner.states.get_mut(&id) {
            Some(entry) if entry.0 == State::Receiving => {
                *entry = (State::Committed, now);
                Ok(())
            }
            _ => Err(GivenUp),
        }
    }

    /// The program runs as `pid`. Called before anybody is told so.
    pub(crate) fn resumed(&self, id: u128, pid: i32, now: Instant) {
        self.lock().states.insert(id, (State::Resumed(pid), now));
    }

    /// Every page of the program is in place: it needs neither this engine nor the source.
    pub(crate) fn filled(&self, id: u128, pid: i32, now: Instant) {
        self.lock().states.insert(id, (State::Filled(pid), now));
    }

    /// Nothing of the session is alive here any more. Called after that has become true. Says whether the program ran, or may have
    /// for a moment, because it was being let go: that it has ended is no leave to let another run.
    pub(crate) fn discarded(&self, id: u128, now: Instant) -> bool {
        let mut inner = self.lock();
        let ran =
            matches!(inner.states.get(&id), Some((State::Committed | State::Resumed(_) | State::Ended, _)));
        inner.states.insert(id, (if ran { State::Ended } else { State::Discarded }, now));
        ran
    }

    /// Answers a sender that lost its link.
    pub(crate) fn ask(&self, id: u128, now: Instant) -> HandoverState {
        let mut inner = self.lock();
        let state = match inner.states.get_mut(&id) {
            None => HandoverState::Unknown,
            Some(entry) => match entry.0 {
                State::Receiving => {
                    *entry = (State::Discarded, now);
                    HandoverState::Discarded
                }
                State::Committed => HandoverState::ReadyToRun,
                State::Resumed(pid) => HandoverState::Resumed { pid },
                State::Filled(pid) => HandoverState::Filled { pid },
                State::Discarded => HandoverState::Discarded,
                State::Ended => HandoverState::Ended,
            },
        };
        if matches!(state, HandoverState::Filled { .. } | HandoverState::Discarded | HandoverState::Ended) {
            inner.asked.insert(id);
        }
        state
    }

    /// The session takes nothing of the machine any more.
    pub(crate) fn end(&self, id: u128) {
        let mut inner = self.lock();
        if inner.active == Some(id) {
            inner.active = None;
        }
        let Inner { states, ready, asked, .. } = &mut *inner;
        ready.retain(|id| states.contains_key(id));
        asked.retain(|id| states.contains_key(id));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // A panic elsewhere leaves the map whole: every change is one call.
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(600);

    #[test]
    fn one_at_a_time_and_the_past_is_remembered() {
        let (sessions, t0) = (Sessions::default(), Instant::now());
        sessions.begin(1, t0, LONG).unwrap();
        assert_eq!(sessions.begin(2, t0, LONG), Err(BeginError::Busy));
        sessions.commit(1, t0).unwrap();
        sessions.resumed(1, 7, t0);
        sessions.end(1);
        assert_eq!(sessions.begin(1, t0, LONG), Err(BeginError::Repeated));
        sessions.begin(2, t0 + Duration::from_secs(1), LONG).unwrap();
        assert_eq!(sessions.ask(1, t0), HandoverState::Resumed { pid: 7 });
        assert_eq!(sessions.ask(3, t0), HandoverState::Unknown);
        sessions.end(2);
        sessions.begin(4, t0 + LONG + Duration::from_secs(1), LONG).unwrap();
        assert_eq!(sessions.ask(1, t0), HandoverState::Unknown, "forgotten after the time it is kept");
    }

    #[test]
    fn a_question_before_the_commit_gives_the_session_up_for_good() {
        let (sessions, t0) = (Sessions::default(), Instant::now());
        sessions.begin(1, t0, LONG).unwrap();
        assert!(!sessions.is_given_up(1));
        assert_eq!(sessions.ask(1, t0), HandoverState::Discarded);
        assert!(sessions.is_given_up(1));
        assert_eq!(sessions.commit(1, t0), Err(GivenUp), "the late commit must not start a second copy");
    }

    #[test]
    fn one_that_ran_and_was_ended_is_not_one_that_never_was() {
        let (sessions, t0) = (Sessions::default(), Instant::now());
        sessions.begin(1, t0, LONG).unwrap();
        sessions.commit(1, t0).unwrap();
        sessions.resumed(1, 7, t0);
        assert!(!sessions.was_asked(1) && sessions.discarded(1, t0));
        assert_eq!(sessions.ask(1, t0), HandoverState::Ended);
        assert!(sessions.was_asked(1));
    }

    #[test]
    fn a_question_after_the_commit_waits_for_the_outcome() {
        let (sessions, t0) = (Sessions::default(), Instant::now());
        sessions.begin(1, t0, LONG).unwrap();
        sessions.commit(1, t0).unwrap();
        assert_eq!(sessions.ask(1, t0), HandoverState::ReadyToRun);
        assert!(sessions.discarded(1, t0), "it may have run for a moment");
        assert_eq!(sessions.ask(1, t0), HandoverState::Ended);
    }
}
