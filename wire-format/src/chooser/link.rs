//! What a link takes, seen from the sender, whose sends only fill the system's buffer.
//!
//! A send that finds room costs the core its copy and says nothing about the link. One that has to wait ends when the
//! link has made room: between two ends of such sends the link has carried as much as was sent between them, however long
//! the core did something else in the meantime. So while sends wait, the time from end to end over the bytes is what the
//! link takes; and while none does, it is the most that the link can take.
//!
//! Some systems say how much of what was sent still waits in the buffer. Where some of it did just before the next send, the
//! link was busy since the last one, and its pace is that at which bytes arrive at the other end: then it is known from milliseconds.
//! (What leaves the buffer may only have gone into the next queue on the way.)

use crate::limits::PAGE_SIZE;

/// A measurement is made of at least so many bytes.
const SAMPLE: f64 = 65_536.0;
/// Weight of a new measurement in the sums.
const WEIGHT: f64 = 0.15;
/// Seconds that a byte takes the core to send: the first guess, and the most that is believed (a slower send waits).
const FIRST_SEND: f64 = 0.4e-9;
const SLOWEST_SEND: f64 = 1e-9;
/// A send that takes so many times what is usual waits.
const WAITS: f64 = 2.0;
/// The link is full when so much of the time is waiting for it.
const FULL: f64 = 0.05;
/// Weight of a measurement by which the link takes longer than was thought.
const RISE: f64 = 0.3;
/// The buffer is full when it was seen to be so many times in a row.
const SURELY: u32 = 3;
/// What the system buffers, about: 4 MiB is Linux's default limit for TCP.
pub(super) const BUFFER: f64 = 4.0 * 1_048_576.0;

/// A backlog is looked at for so many seconds until the pace of the link is believed: first, and later at most. TCP begins slowly,
/// and queues on the way let some of the first bytes through at once.
const FIRST_WINDOW: f64 = 1.5e-3;
const LONGEST_WINDOW: f64 = 24e-3;
/// ... and where TCP has found its pace already, and it is looked whether the link became faster.
const GLIMPSE_WINDOW: f64 = 0.5e-3;
/// So many bytes that have arrived say what the link can carry at least, though it was not always busy: if that is much more
/// than was thought. (Queues on the way and lumps of acknowledgements make up to a buffer look quicker than it was.)
const ENOUGH: f64 = 2.0 * 1_048_576.0;
const MUCH_FASTER: f64 = 0.4;
/// Weight of a measurement by which the link takes longer than was thought, where it was busy.
const SLOW_RISE: f64 = 0.1;

/// What the buffer held when it was looked at last, and what became of it since it was never empty.
#[derive(Clone, Debug)]
struct Backlog {
    /// When, and bytes that had arrived until then.
    last: Option<(f64, f64)>,
    /// Seconds and bytes of the link while it was busy all the time.
    time: f64,
    bytes: f64,
    window: f64,
    /// Whether something waited when it was looked at last, and whether the pace was measured since something waits.
    waits: bool,
    measured: bool,
}

impl Default for Backlog {
    fn default() -> Self {
        Self { last: None, time: 0.0, bytes: 0.0, window: FIRST_WINDOW, waits: false, measured: false }
    }
}

impl Backlog {
    /// The link was not busy, or may not have been.
    fn begin(&mut self) {
        *self = Self { last: self.last, window: self.window, ..Self::default() };
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    bytes: f64,
    /// Seconds, from the end of a send to the end of a send, and of these waiting.
    time: f64,
    waiting: f64,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Meter {
    /// Seconds that a byte takes the core.
    send: Option<f64>,
    /// Seconds that a byte takes the link; `None` as long as it was never full.
    link: Option<f64>,
    /// Between sends that waited, lately.
    carried: Sum,
    /// Since the last send that waited, or for some buffers' worth.
    since: Sum,
    /// Times in a row that the buffer was seen to be full.
    full: u32,
    /// All sends lately.
    lately: Sum,
    backlog: Backlog,
    /// What has arrived in some time.
    passed: Sum,
    /// The measurement under way.
    bytes: f64,
    sending: f64,
    working: f64,
}

impl Meter {
    /// Seconds that a byte takes the core to send.
    pub(super) fn send(&self) -> f64 {
        self.send.unwrap_or(FIRST_SEND)
    }

    /// Seconds that a byte takes the link, as far as is known; `None` as long as it was never waited for.
    pub(super) fn link(&self) -> Option<f64> {
        self.link
    }

    /// Whether the link is being waited for.
    pub(super) fn is_full(&self) -> bool {
        self.backlog.measured || self.full >= SURELY && self.lately.is_full()
    }

    /// Whether something that was sent still waited for the link when it was looked at last.
    pub(super) fn is_backlogged(&self) -> bool {
        self.backlog.waits
    }

    /// Whether the system says what waits.
    pub(super) fn is_told(&self) -> bool {
        self.backlog.last.is_some()
    }

    /// Just before a send, at `now`: so many bytes have arrived so far, and `waiting` have not left the system's buffer.
    pub(super) fn look(&mut self, now: f64, arrived: f64, waiting: f64) {
        let last = self.backlog.last.replace((now, arrived));
        let Some((then, arrived_then)) = last else { return };
        // Busy or not, the link can carry what it has carried.
        self.passed.time += (now - then).max(0.0);
        self.passed.bytes += (arrived - arrived_then).max(0.0);
        if self.passed.bytes >= ENOUGH {
            let most = self.passed.time / self.passed.bytes;
            self.link = self.link.map(|link| if most < MUCH_FASTER * link { most } else { link });
            self.passed = Sum::default();
        }
        if waiting <= 0.0 {
            self.backlog.begin();
            return;
        }
        let backlog = &mut self.backlog;
        backlog.waits = true;
        backlog.time += (now - then).max(0.0);
        backlog.bytes += (arrived - arrived_then).max(0.0);
        if backlog.time < backlog.window {
            return;
        }
        let measured = backlog.time / backlog.bytes.max(PAGE_SIZE as f64);
        backlog.window = (2.0 * backlog.window).min(LONGEST_WINDOW);
        let lately = std::mem::replace(&mut backlog.measured, true);
        (backlog.time, backlog.bytes) = (0.0, 0.0);
        let link = self.link.get_or_insert(measured);
        // Acknowledgements come in lumps, so that no measurement is believed by itself. A core that was lent to somebody else just
        // before it sent looks like a slow link, once.
        if measured < *link {
            *link += RISE * (measured - *link);
        } else if lately {
            *link += SLOW_RISE * (measured.min(2.0 * *link) - *link);
        }
    }

    /// Time passed in which nothing was sent: the buffer is not what it was.
    pub(super) fn pause(&mut self) {
        (self.since, self.full) = (Sum::default(), 0);
        self.lately = Sum::default();
        self.backlog.begin();
        (self.backlog.last, self.passed) = (None, Sum::default());
        (self.bytes, self.sending, self.working) = (0.0, 0.0, 0.0);
    }

    /// From now on it is looked whether the link takes whatever comes.
    pub(super) fn restart(&mut self) {
        (self.since, self.full) = (Sum::default(), 0);
        self.backlog.begin();
        self.passed = Sum::default();
        self.backlog.window = GLIMPSE_WINDOW;
    }

    /// The core did something else than sending.
    pub(super) fn worked(&mut self, time: f64) {
        self.working += time;
    }

    /// `bytes` were sent in `time`.
    pub(super) fn sent(&mut self, bytes: usize, time: f64) {
        // Frames without page bytes are all overhead and say nothing about the link.
        if bytes < PAGE_SIZE {
            return;
        }
        self.bytes += bytes as f64;
        self.sending += time;
        if self.bytes < SAMPLE {
            return;
        }
        let (bytes, sending) = (std::mem::take(&mut self.bytes), std::mem::take(&mut self.sending));
        let time = sending + std::mem::take(&mut self.working);
        let cost = sending / bytes;
        let send = self.send.get_or_insert(cost.min(FIRST_SEND));
        let waiting = (sending - WAITS * *send * bytes).max(0.0);
        if waiting > 0.0 {
            // Sending may have become slower, too: so much that it looks like waiting. That is found out slowly.
            *send = (*send * 1.002).min(SLOWEST_SEND);
        } else {
            *send += if cost < *send { 0.5 } else { 0.1 } * (cost - *send);
        }
        let sample = Sum { bytes, time, waiting };
        self.lately.decay();
        self.lately.add(&sample);
        self.carry(&sample);
    }

    fn carry(&mut self, sample: &Sum) {
        self.since.add(sample);
        let since = self.since;
        // A core that was lent to somebody else for a moment looks like a wait, but it does so rarely: by time if little is
        // sent, by bytes if much is. And more than this could have emptied the buffer, and left the link idle.
        let close = since.bytes <= BUFFER / 2.0;
        // A sample that is larger than any buffer says enough by itself.
        let large = sample.bytes > 2.0 * BUFFER;
        if sample.waiting > 0.0 && since.is_full() && (close || large) {
            self.full = self.full.saturating_add(if large { SURELY } else { 1 });
            if self.full > 1 {
                self.carried.decay();
                self.carried.add(&since);
            }
            if self.full >= SURELY {
                let measured = self.carried.time / self.carried.bytes;
                // What is too much is not found out by itself: then the core is busy, and the link not full. What is too
                // little is, at once.
                let link = self.link.get_or_insert(measured);
                *link += if measured > *link { RISE } else { 1.0 } * (measured - *link);
            }
            self.since = Sum::default();
        } else if sample.waiting > 0.0 && !close {
            (self.since, self.full) = (Sum::default(), 0);
        } else if since.bytes > 3.0 * BUFFER {
            // There was room nearly all the time: but for what the buffer took, the link has carried it.
            let most = Sum { bytes: since.bytes - BUFFER, ..since };
            if self.link.is_some_and(|link| most.time / most.bytes < link) {
                self.link = Some(most.time / most.bytes);
                self.carried = most;
            }
            (self.since, self.full) = (Sum::default(), 0);
        }
    }
}

impl Sum {
    fn add(&mut self, other: &Sum) {
        self.bytes += other.bytes;
        self.time += other.time;
        self.waiting += other.waiting;
    }

    fn decay(&mut self) {
        for part in [&mut self.bytes, &mut self.time, &mut self.waiting] {
            *part *= 1.0 - WEIGHT;
        }
    }

    fn is_full(&self) -> bool {
        self.waiting > FULL * self.time
    }
}
