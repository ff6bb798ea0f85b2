//! What a migration tells while it runs.

use crate::report::RoundReport;
use serde::Serialize;
use std::net::SocketAddr;

/// Told of every [`Event`]; called from the migration's own threads, so it must be quick.
pub trait Observer: Sync {
    /// Something happened.
    fn event(&self, event: &Event);
}

/// An observer that ignores everything.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {
    fn event(&self, _event: &Event) {}
}

/// A step of a migration. Sizes are bytes, times microseconds, pages 4 KiB.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Event {
    /// Source: the receiver has answered.
    Connected {
        /// Its address.
        to: SocketAddr,
        /// Its engine's version.
        version: String,
    },
    /// Source: the tree is being tracked.
    Attached {
        /// Dirty tracker in use.
        tracker: String,
        /// Why it was chosen.
        reason: String,
        /// Processes of the tree.
        processes: u32,
    },
    /// Source: a pre-copy round begins.
    RoundStarted {
        /// From 0.
        round: u32,
        /// Pages to look at.
        dirty_pages: u64,
    },
    /// Source: some batches of a round were sent (about ten times a second).
    Progress {
        /// The round.
        round: u32,
        /// Pages of the round that are done.
        done_pages: u64,
        /// Pages of the round altogether.
        total_pages: u64,
        /// Bytes sent in this round.
        sent_bytes: u64,
    },
    /// Source: the destination has a whole round.
    RoundEnded(RoundReport),
    /// Source: the program outruns the link, and is slowed down from now on.
    Throttled {
        /// Share of the time for which it stands still.
        share: f64,
    },
    /// Source: the migration is held up, as was asked for ([`crate::Control::pause`]).
    Paused,
    /// Source: it goes on.
    Unpaused,
    /// Both: the link was lost while the program runs at the source. It is waited for: the source tries to make it anew, and the
    /// destination holds what it has.
    LinkLost {
        /// Why.
        reason: String,
        /// How long it is waited for, in microseconds.
        limit_us: u64,
    },
    /// Both: the link is there again, and the rounds go on.
    LinkBack {
        /// How long it was away, in microseconds, as this side has noticed it.
        away_us: u64,
        /// Pages of which it had not been known whether they had arrived, and which had.
        found_pages: u64,
    },
    /// Source: a strategy was chosen, because none was asked for.
    Strategy {
        /// `auto`.
        asked: String,
        /// The strategy.
        chosen: String,
        /// Why, as a word.
        reason: String,
        /// Why, as a sentence with its figures.
        because: String,
    },
    /// Source: pre-copy is over; the tree is about to be frozen.
    Freezing {
        /// Why pre-copy stopped.
        stop_reason: String,
        /// What the policy expects, in microseconds.
        predicted_downtime_us: u64,
    },
    /// Source: the handover reached a step; `name` is a part of the downtime that ended now.
    Step {
        /// Part of the downtime, as in the report.
        name: String,
        /// How long it took.
        duration_us: u64,
    },
    /// Source: the point of no return was passed.
    Committed,
    /// Both: the program runs at the destination.
    Resumed {
        /// Its pid there, as the destination's engine sees it.
        pid: i32,
    },
    /// Source: the program runs at the destination, and pages that it is owed are on their way (about ten times a second).
    Owed {
        /// Pages that were not sent yet.
        left_pages: u64,
        /// Pages that were owed in the beginning.
        total_pages: u64,
        /// Pages that the program asked for, of those that were sent.
        demanded_pages: u64,
        /// Bytes sent for these pages.
        sent_bytes: u64,
    },
    /// In place of a source's engine that was killed: the program at the destination is sent what it is owed.
    GoesOn {
        /// The program.
        program: String,
        /// Where it runs.
        to: SocketAddr,
        /// Pages that it does not have yet.
        left_pages: u64,
        /// Pages that were owed in the beginning.
        total_pages: u64,
    },
    /// Both: every page was put in place at the destination.
    Filled {
        /// Pages.
        pages: u64,
        /// Page faults that were served.
        faults: u64,
        /// Longest service of a fault.
        max_fault_us: u64,
    },
    /// Source: the migration failed and the source runs on.
    RolledBack {
        /// Why.
        reason: String,
    },
    /// Something that a person should know and that does not stop the migration.
    Warning {
        /// What.
        text: String,
    },
    /// Destination: waiting for a sender.
    Listening {
        /// The address, with the port that was taken.
        on: SocketAddr,
    },
    /// Destination: a sender began a migration.
    Accepted {
        /// Its address.
        from: SocketAddr,
        /// The program that comes.
        program: String,
    },
    /// Destination: a whole round has arrived.
    Received {
        /// The round.
        round: u32,
        /// Pages that were stored so far; one that came twice counts twice.
        stored_pages: u64,
    },
    /// Destination: the migration ended without the program coming to life here; nothing is left of it.
    Discarded {
        /// Why.
        reason: String,
    },
}
