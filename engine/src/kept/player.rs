//! Speaks a kept stream to a receiver in this process, as the source did.

use super::error::{Damage, KeptError, Spot};
use super::frames::{Frames, StreamFile};
use super::ledger::Ledger;
use crate::link::{Channel, Incoming, TcpLink};
use pageferry_wire_format::{ControlMessage, Head, PageDigest};
use std::io::IoSlice;
use std::path::Path;

/// Goes through a whole stream without its payloads: every frame is there and follows the one before, the first is a
/// `Hello`, and the last, at the end of the file, a `Commit`. Gives the running digest of all heads, which no other stream has.
pub(super) fn survey(path: &Path) -> Result<u64, KeptError> {
    let mut frames = Frames::new(StreamFile::open(path)?);
    let damaged = |spot, what| KeptError::Damaged { spot, source: Damage::Order(what) };
    match frames.next_head()? {
        Some(Head::Control(ControlMessage::Hello(_))) => {}
        Some(_) => return Err(damaged(frames.spot(), "a stream begins with something else")),
        None => return Err(KeptError::Empty),
    }
    loop {
        match frames.next_head()? {
            Some(Head::Control(ControlMessage::Commit)) => break,
            Some(Head::Control(ControlMessage::Hello(_))) => {
                return Err(damaged(frames.spot(), "a second beginning"));
            }
            Some(_) => {}
            None => {
                let Spot { frame, offset } = frames.spot();
                return Err(KeptError::Unfinished { frame, end: offset });
            }
        }
    }
    match frames.next_head() {
        Ok(None) => Ok(frames.digest()),
        _ => Err(KeptError::Trailing(frames.spot().offset)),
    }
}

/// Plays the stream, which is on top of pages that look like `base`, to the end, and waits for the program to run.
///
/// The commit is sent when the receiver says that it is ready; until then anything that is wrong ends the session, and
/// nothing of it is left.
pub(super) fn play(path: &Path, base: &[PageDigest], link: TcpLink) -> Result<(), KeptError> {
    let mut frames = Frames::new(StreamFile::open(path)?);
    let mut channel = Channel::new(link);
    let mut ledger = Ledger::on(base.to_vec());
    let result = run(&mut frames, &mut channel, &mut ledger);
    if result.is_err() {
        channel.link().shutdown();
    }
    result
}

fn run(frames: &mut Frames<StreamFile>, channel: &mut Channel, ledger: &mut Ledger) -> Result<(), KeptError> {
    loop {
        let Some(head) = frames.next()? else {
            let Spot { frame, offset } = frames.spot();
            return Err(KeptError::Unfinished { frame, end: offset });
        };
        let checked = match &head {
            Head::Pages { .. } => ledger.pages(frames.batch(), frames.payload()),
            Head::Image { chunk, .. } => ledger.image(chunk, frames.payload()),
            Head::Control(ControlMessage::RoundEnd { .. }) => {
                ledger.end_round();
                Ok(())
            }
            Head::Control(ControlMessage::SealEnd { spaces }) => ledger.end_seal(*spaces).map(drop),
            other => ledger.take(other),
        };
        checked.map_err(|source| KeptError::Damaged { spot: frames.spot(), source })?;
        let is_commit = matches!(head, Head::Control(ControlMessage::Commit));
        if is_commit {
            wait_for(channel, |message| matches!(message, ControlMessage::Ready { .. }))?;
        }
        let mut slices = [IoSlice::new(frames.head()), IoSlice::new(frames.payload())];
        channel.link_mut().send_all(&mut slices)?;
        if is_commit {
            wait_for(channel, |message| matches!(message, ControlMessage::Filled { .. }))?;
            return Ok(());
        }
        // What the receiver says on the way is taken, so that it is never held up by it.
        while channel.link().readable() {
            passing(channel.receive()?)?;
        }
    }
}

fn wait_for(channel: &mut Channel, is: impl Fn(&ControlMessage) -> bool) -> Result<(), KeptError> {
    loop {
        let message = passing(channel.receive()?)?;
        if is(&message) {
            return Ok(());
        }
    }
}

fn passing(incoming: Incoming) -> Result<ControlMessage, KeptError> {
    match incoming {
        Incoming::Control(ControlMessage::Abort { detail, .. }) => Err(KeptError::Refused(detail)),
        Incoming::Control(message) => Ok(message),
        other => Err(KeptError::Refused(format!("it said {other:?}"))),
    }
}
