//! A session whose connections are lost: what was received is held for as long as the source has said that it will try, until a
//! new first connection comes or somebody decides otherwise.

use super::{Books, FIRST, Hub, ReceiveError};
use crate::Cancel;
use crate::link::{Channel, LinkError, TcpLink};
use std::net::{IpAddr, Shutdown};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

/// How often it is looked whether the session is still wanted: a cancellation is no message.
const LOOK: Duration = Duration::from_millis(50);

/// How long a source that comes back waits for what it said before to be read.
const UNHEARD: Duration = Duration::from_secs(2);

/// What concerns the link as a whole.
#[derive(Debug, Default)]
pub(super) struct Away {
    /// For how long it is held without connections. Zero: not at all.
    hold: Duration,
    /// There are no connections.
    pub(super) away: bool,
    /// A new first connection, which has said that it is of this session.
    next: Option<Channel>,
    /// Where the source is, and the program that it moves.
    source: Option<(IpAddr, String)>,
    /// The same source has begun anew.
    replaced: bool,
}

impl Away {
    /// Nothing is waited for any more.
    pub(super) fn close(&mut self) {
        self.next = None;
    }
}

impl Hub {
    /// The connection that the session began with, and the program that moves: its source may begin anew while the session is held.
    pub(in crate::destination) fn begin(&self, first: &TcpLink, program: &str) -> Result<(), ReceiveError> {
        let handle = first.handle().map_err(LinkError::Lost)?;
        let mut books = self.lock();
        books.link.source = first.peer().ok().map(|at| (at.ip(), program.to_owned()));
        if let Some(first) = books.streams.get_mut(&FIRST) {
            first.handle = Some(handle);
        }
        Ok(())
    }

    /// For how long the session is held when its connections are lost from now on.
    pub(in crate::destination) fn set_hold(&self, hold: Duration) {
        self.lock().link.hold = hold;
        self.changed.notify_all();
    }

    /// As of [`Hub::set_hold`].
    pub(in crate::destination) fn hold(&self) -> Duration {
        self.lock().link.hold
    }

    /// A source that has lost its connections has made one anew: it takes the place of those that there were, of which this side may not
    /// know yet that they are lost. Gives it back if the session is not held.
    pub(in crate::destination) fn rejoin(&self, channel: Channel) -> Result<(), Box<Channel>> {
        // That it is to be held may be among what has come over the old connection and was not read yet.
        let unheard = |books: &mut Books| !books.closed && books.link.hold.is_zero();
        let waited = self.changed.wait_timeout_while(self.lock(), UNHEARD, unheard);
        let mut books = waited.unwrap_or_else(PoisonError::into_inner).0;
        if books.closed || books.link.replaced || books.link.hold.is_zero() {
            return Err(Box::new(channel));
        }
        // A try before this one was given up by the source.
        books.link.next = Some(channel);
        for handle in books.streams.values().filter_map(|stream| stream.handle.as_ref()) {
            let _ = handle.shutdown(Shutdown::Both);
        }
        self.changed.notify_all();
        Ok(())
    }

    /// Another session is about to begin. If it is the same source with the same program, this one has lost more than its link, and is not
    /// held any longer.
    pub(in crate::destination) fn give_way(&self, to: IpAddr, program: &str) -> bool {
        let mut books = self.lock();
        let same = books.link.source.as_ref().is_some_and(|(at, of)| *at == to && of == program);
        if books.link.away && same {
            books.link.replaced = true;
            self.changed.notify_all();
        }
        books.link.replaced
    }

    /// Ends all connections, and waits for a new first one as long as the session is held and `still` says that it is wanted.
    pub(in crate::destination) fn wait_for_link(
        &self,
        lost: ReceiveError,
        still: &dyn Fn() -> Result<(), ReceiveError>,
    ) -> Result<Channel, ReceiveError> {
        let mut books = self.lock();
        let end = Instant::now() + books.link.hold;
        books.link.away = true;
        for handle in books.streams.values().filter_map(|stream| stream.handle.as_ref()) {
            let _ = handle.shutdown(Shutdown::Both);
        }
        self.changed.notify_all();
        while books.streams.keys().any(|number| *number != FIRST) {
            books = self.changed.wait(books).unwrap_or_else(PoisonError::into_inner);
        }
        books.forget_what_was_under_way();
        let alarm = Cancel::new().map_err(LinkError::Lost)?;
        *self.alarm.lock().unwrap_or_else(PoisonError::into_inner) = alarm;
        loop {
            if books.link.replaced {
                return Err(ReceiveError::Replaced);
            }
            if let Some(channel) = books.link.next.take() {
                let handle = channel.link().handle().map_err(LinkError::Lost)?;
                if let Some(first) = books.streams.get_mut(&FIRST) {
                    first.handle = Some(handle);
                }
                books.link.away = false;
                return Ok(channel);
            }
            drop(books);
            still()?;
            books = self.lock();
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ReceiveError::NotBack { held: books.link.hold, source: Box::new(lost) });
            }
            books =
                self.changed.wait_timeout(books, left.min(LOOK)).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Books {
    /// What waited for other pages of its round, or was to be asked for again: the source does not know what has arrived, and asks.
    fn forget_what_was_under_way(&mut self) {
        self.later.clear();
        (self.later_bytes, self.later_pages) = (0, 0);
        self.again.clear();
        self.failure = None;
        self.streams.values_mut().for_each(|stream| {
            stream.reached = None;
            stream.handle = None;
        });
    }
}
