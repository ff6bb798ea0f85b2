//! Sending what is owed until the destination has everything, over connections that are made anew when they are lost: by the
//! engine that moved the program, or by who goes on in its place.

use super::session::LateSession;
use super::taking_up::{Taken, recount, take_up};
use super::{Counts, Debt, End};
use crate::effort::CpuShare;
use crate::link::{Channel, ChannelError};
use crate::observe::{Event, Observer};
use crate::plan::CodingChoice;
use crate::report::{FaultReport, FillReport, PostCopyReport};
use crate::source::failure::SendError;
use pageferry_wire_format::{Coding, CodingChooser, ControlMessage};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often progress is told.
const TELL: Duration = Duration::from_millis(100);

/// How long to wait between two tries to make the connections anew.
const TRY_AGAIN: Duration = Duration::from_millis(200);

/// Who sends owed pages.
pub(super) trait Sender {
    /// A connection of this number to the receiver, which has taken it.
    fn open(&mut self, stream: u16) -> Result<Channel, SendError>;
    /// Connections beside number 0.
    fn streams(&self) -> u16;
    /// By which way pages go that nobody has asked for, over one of these.
    fn chooser(&self) -> CodingChooser;
    /// What of a processor may go into these.
    fn cpu(&self) -> &CpuShare;
    /// How long to try to make connections anew.
    fn patience(&self) -> Duration;
    /// Who is told.
    fn observer(&self) -> &dyn Observer;
    /// How far it is.
    fn progress(&mut self, debt: &Debt);
    /// The connections were lost, and made anew.
    fn reconnected(&mut self);
}

/// The way of pages over one of so many connections that share a bandwidth.
pub(super) fn chooser(coding: CodingChoice, bandwidth: Option<u64>, streams: u16) -> CodingChooser {
    let mut chooser = match coding {
        CodingChoice::Auto => CodingChooser::default(),
        CodingChoice::Raw => CodingChooser::only(Coding::Raw),
        CodingChoice::Zstd => CodingChooser::only(Coding::Zstd),
    };
    if let Some(bandwidth) = bandwidth {
        chooser.observe_link((bandwidth / u64::from(streams.max(1))) as usize, Duration::from_secs(1));
    }
    chooser
}

/// Has the receiver take a new connection as number `stream` of those for owed pages.
pub(super) fn join(channel: &mut Channel, session: u128, stream: u16) -> Result<(), SendError> {
    channel.control(&ControlMessage::Late { session, stream })?;
    match channel.answer("a connection for owed pages to be taken")? {
        ControlMessage::Joined => Ok(()),
        other => Err(SendError::Protocol(format!("{other:?} instead of taking a connection"))),
    }
}

/// Enters in a report what went.
pub(super) fn count(report: &mut PostCopyReport, counts: Counts, duration: Duration) {
    report.demanded_pages = counts.demanded;
    report.pushed_pages = counts.pushed;
    report.repeated_pages = counts.repeated;
    report.zero_pages = counts.zero;
    report.sent_bytes = counts.bytes;
    report.held_up = counts.toil.held_up();
    report.duration_us = duration.as_micros() as u64;
}

/// Sends what is owed, until the destination has everything. `taken`: the connections are new, and what came over earlier ones is to be
/// compared.
pub(super) fn serve(
    sender: &mut dyn Sender,
    late: &mut LateSession,
    mut taken: Option<Taken>,
) -> Result<(), SendError> {
    let debt = Arc::clone(late.debt());
    loop {
        // The program runs.
        sender.cpu().lift(false);
        late.push_on(|| sender.chooser(), sender.cpu())?;
        let recounted = taken.take().map_or(Ok(()), |taken| recount(&debt, &taken));
        let end = match recounted {
            Err(error) => End::Failed(error),
            Ok(()) => loop {
                if let Some(end) = debt.wait_end(TELL) {
                    break end;
                }
                if let Err(error) = debt.look() {
                    break End::Failed(error);
                }
                sender.progress(&debt);
                let counts = debt.counts();
                sender.observer().event(&Event::Owed {
                    left_pages: debt.left(),
                    total_pages: debt.total(),
                    demanded_pages: counts.demanded,
                    sent_bytes: counts.bytes,
                });
            },
        };
        match end {
            End::Sealed => return Ok(()),
            End::Failed(error) => return Err(error),
            End::Lost(error) => {
                late.stop(false);
                let text = format!("the connections for owed pages were lost: {}", error.chain());
                sender.observer().event(&Event::Warning { text });
                taken = Some(connect_anew(sender, late)?);
                sender.reconnected();
            }
        }
    }
}

/// Makes the connections anew, as soon as it can be done.
pub(super) fn connect_anew(sender: &mut dyn Sender, late: &mut LateSession) -> Result<Taken, SendError> {
    let end = Instant::now() + sender.patience();
    loop {
        let failed = match try_to_connect(sender, late) {
            Ok(taken) => return Ok(taken),
            Err(SendError::Channel(error @ (ChannelError::Link(_) | ChannelError::Frame(_)))) => error.into(),
            Err(error) => return Err(error),
        };
        if Instant::now() >= end {
            return Err(failed);
        }
        std::thread::sleep(TRY_AGAIN);
    }
}

fn try_to_connect(sender: &mut dyn Sender, late: &mut LateSession) -> Result<Taken, SendError> {
    let mut first = sender.open(0)?;
    let taken = take_up(late.debt(), &mut first)?;
    let mut channels = vec![first];
    for stream in 1..=sender.streams() {
        channels.push(sender.open(stream)?);
    }
    late.answer_on(channels)?;
    Ok(taken)
}

/// How it went at the destination, over the connection on which it said that it has everything.
pub(super) fn hear_filled(
    channel: &mut Channel,
    report: Option<&mut PostCopyReport>,
    observer: &dyn Observer,
) -> Result<FillReport, SendError> {
    loop {
        match channel.answer("the times of page faults")? {
            ControlMessage::FaultTimes { count, p50_us, p99_us, max_us } => {
                if let Some(report) = report {
                    report.faults = FaultReport { count, p50_us, p99_us, max_us };
                }
                break;
            }
            // It has confirmed that it has everything. Some receivers ask once more for a page that a thread begins to wait
            // for before it is in place: it comes there without our doing.
            ControlMessage::Want { .. } | ControlMessage::Unwanted { .. } => {}
            other => return Err(SendError::Protocol(format!("{other:?} instead of times of page faults"))),
        }
    }
    match channel.answer("the destination to have every page in place")? {
        ControlMessage::Filled { pages, prefilled_pages, faults, max_fault_us, duration_us } => {
            observer.event(&Event::Filled { pages, faults, max_fault_us });
            Ok(FillReport { pages, prefilled_pages, faults, max_fault_us, duration_us })
        }
        other => Err(SendError::Protocol(format!("{other:?} instead of filled"))),
    }
}
