//! Asking a destination what became of a session.

use crate::link::{Channel, ChannelError, TcpLink};
use pageferry_wire_format::{ControlMessage, HandoverState};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// How long to wait between two questions.
const AGAIN: Duration = Duration::from_millis(200);

/// Asks over a connection of its own; `None` for another answer.
pub(crate) fn ask(channel: &mut Channel, session: u128) -> Result<Option<HandoverState>, ChannelError> {
    channel.control(&ControlMessage::Query { session })?;
    match channel.answer("the state of the session")? {
        ControlMessage::State(state) => Ok(Some(state)),
        _ => Ok(None),
    }
}

/// Asks until there is an answer that does not change by itself any more, or the time is over; then what was heard last, if anything.
/// `owes`: a program that runs there and is owed pages is such an answer.
pub(super) fn ask_until(
    to: SocketAddr,
    session: u128,
    owes: bool,
    patience: Duration,
) -> Option<HandoverState> {
    let end = Instant::now() + patience;
    let mut last = None;
    loop {
        let left = end.saturating_duration_since(Instant::now()).max(AGAIN);
        let heard = TcpLink::connect(to, left).map_err(ChannelError::from).and_then(|mut link| {
            link.set_stall(left);
            ask(&mut Channel::new(link), session)
        });
        match heard {
            Ok(Some(HandoverState::Resumed { .. })) if !owes => {}
            Ok(Some(HandoverState::ReadyToRun | HandoverState::Receiving)) | Err(_) => {}
            Ok(state) => return state,
        }
        if let Ok(state) = heard {
            last = state;
        }
        if Instant::now() >= end {
            return last;
        }
        std::thread::sleep(AGAIN);
    }
}
