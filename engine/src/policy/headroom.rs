//! How fast pages may go for which nobody waits, on a link that they share with those that somebody waits for. Pure.
//!
//! Whoever sends as fast as it can keeps the queue before the narrowest place of the way full, and what is waited for stands in
//! it, for milliseconds. So the pace is a little less than what the link carries, which is measured now and then by sending as
//! fast as it goes for a moment. Whoever compresses more slowly than the link takes it leaves no queue, and is not held back.

use std::time::Duration;

/// A measurement lasts so long at least, and so many bytes.
const PROBE: (Duration, u64) = (Duration::from_millis(20), 1 << 20);
/// ... and so long at most.
const PATIENCE: Duration = Duration::from_millis(400);
/// What a measurement has left in the queue goes at half the pace until no more than this much of a second is in it, ...
const SHORT: f64 = 2e-3;
/// ... or for so long.
const DRAIN: Duration = Duration::from_millis(200);
/// With less than this much of a second in the queue when the next piece is there, the link waits for the sender and not the
/// other way round.
const EMPTY: f64 = 0.25e-3;
/// So many pieces in a row that find more in it are looked into.
const BUSY: u32 = 4;
/// From one measurement to the next.
const CRUISE: Duration = Duration::from_secs(1);
/// Of what was measured, what is used: an eighth is left for what is waited for, and for the queue to become empty.
pub(super) const SHARE: f64 = 0.875;
/// Measurements that are remembered: a thread that was not given a processor in one has sent less than the link carries.
const REMEMBERED: usize = 3;

/// What one connection takes of the link.
#[derive(Clone, Debug, Default)]
pub(crate) struct Headroom {
    phase: Option<Phase>,
    /// Bytes a second.
    rates: [f64; REMEMBERED],
    measured: usize,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    Probe {
        since: Duration,
        acknowledged: u64,
        /// Pieces that found the queue long, less those that found it empty.
        balance: i32,
    },
    Drain {
        since: Duration,
    },
    Cruise {
        since: Duration,
    },
    /// The link takes more than it is given, but for so many pieces in a row.
    Open {
        busy: u32,
    },
}

impl Phase {
    fn probe(since: Duration, acknowledged: u64) -> Self {
        Self::Probe { since, acknowledged, balance: 0 }
    }
}

/// What a connection has taken and given.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Carried {
    /// Bytes that have arrived at the other side.
    pub(crate) acknowledged: u64,
    /// Bytes that are on their way.
    pub(crate) queued: u64,
}

/// A change of pace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    /// As fast as it goes.
    Free,
    /// So many bytes a second.
    Limit(u64),
}

impl Headroom {
    /// Called before each piece. `now`: since some moment. Says the pace when it is another one from now on.
    pub(crate) fn look(&mut self, now: Duration, carried: Carried) -> Option<Pace> {
        let Carried { acknowledged, queued } = carried;
        match &mut self.phase {
            None => {
                self.phase = Some(Phase::probe(now, acknowledged));
                None
            }
            Some(Phase::Probe { since, acknowledged: before, balance }) => {
                let (time, bytes) = (now.saturating_sub(*since), acknowledged.saturating_sub(*before));
                let rate = bytes as f64 / time.as_secs_f64().max(1e-6);
                *balance += if queued as f64 > rate * EMPTY { 1 } else { -1 };
                if time < PROBE.0 || (bytes < PROBE.1 && time < PATIENCE) {
                    return None;
                }
                let open = *balance < 0;
                self.rates[self.measured % REMEMBERED] = rate;
                self.measured += 1;
                if open {
                    self.phase = Some(Phase::Open { busy: 0 });
                    return None;
                }
                self.phase = Some(Phase::Drain { since: now });
                self.limit(0.5)
            }
            Some(Phase::Drain { since }) => {
                let since = *since;
                if queued as f64 > self.rate() * SHORT && now.saturating_sub(since) < DRAIN {
                    return None;
                }
                self.phase = Some(Phase::Cruise { since: now });
                self.limit(SHARE)
            }
            Some(Phase::Cruise { since }) if now.saturating_sub(*since) < CRUISE => None,
            Some(Phase::Cruise { .. }) => {
                self.phase = Some(Phase::probe(now, acknowledged));
                Some(Pace::Free)
            }
            Some(Phase::Open { busy }) => {
                let busy = *busy + 1;
                self.phase = Some(match queued as f64 > self.rate() * EMPTY {
                    true if busy < BUSY => Phase::Open { busy },
                    true => Phase::probe(now, acknowledged),
                    false => Phase::Open { busy: 0 },
                });
                None
            }
        }
    }

    fn rate(&self) -> f64 {
        self.rates.iter().fold(0.0, |most, rate| most.max(*rate))
    }

    fn limit(&self, share: f64) -> Option<Pace> {
        let rate = self.rate();
        // A link that has carried nothing is lost, or about to be: that is for others to find out.
        (rate > 0.0).then_some(Pace::Limit((rate * share) as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends for `seconds` pieces of 128 KiB over a link that carries `rate(now)`; says what went a second, and the share of the time
    /// for which the queue was longer than half a millisecond.
    fn run(headroom: &mut Headroom, seconds: f64, rate: impl Fn(f64) -> f64) -> (f64, f64) {
        run_of(headroom, seconds, rate, |_| 0.0)
    }

    /// The same of a sender that works for `piece(now)` seconds on each piece.
    fn run_of(
        headroom: &mut Headroom,
        seconds: f64,
        rate: impl Fn(f64) -> f64,
        piece: impl Fn(f64) -> f64,
    ) -> (f64, f64) {
        const PIECE: f64 = 131_072.0;
        // As much as the system takes at once.
        const ROOM: f64 = 4.0 * PIECE;
        let (mut now, mut queue, mut sent, mut pace) = (0.0, 0.0f64, 0.0, f64::INFINITY);
        // Of a piece at the link's pace.
        let (mut long, mut next, step) = (0.0, 0.0, (PIECE / rate(0.0) / 20.0).min(50e-6));
        while now < seconds {
            while now >= next && queue + PIECE <= ROOM {
                let carried = Carried { acknowledged: (sent - queue) as u64, queued: queue as u64 };
                match headroom.look(Duration::from_secs_f64(now), carried) {
                    Some(Pace::Free) => pace = f64::INFINITY,
                    Some(Pace::Limit(rate)) => pace = rate as f64,
                    None => {}
                }
                queue += PIECE;
                sent += PIECE;
                next = now + (PIECE / pace).max(piece(now));
            }
            queue = (queue - rate(now) * step).max(0.0);
            if queue > rate(now) * 0.5e-3 + PIECE {
                long += step;
            }
            now += step;
        }
        (sent / seconds, long / seconds)
    }

    #[test]
    fn the_queue_is_short_and_the_link_is_used() {
        for link in [12.5e6, 125e6, 1.25e9] {
            let (went, long) = run(&mut Headroom::default(), 10.0, |_| link);
            assert!(went > 0.84 * link, "{went} of {link}");
            assert!(long < 0.15, "{long} of the time");
        }
    }

    #[test]
    fn a_link_that_changes_is_followed() {
        let mut headroom = Headroom::default();
        let (went, _) = run(&mut headroom, 20.0, |now| if now < 10.0 { 12.5e6 } else { 125e6 });
        assert!(went > 0.8 * (12.5e6 + 125e6) / 2.0, "{went}");
        let (went, long) = run(&mut Headroom::default(), 20.0, |now| if now < 10.0 { 125e6 } else { 12.5e6 });
        assert!(went > 0.8 * (12.5e6 + 125e6) / 2.0, "{went}");
        assert!(long < 0.25, "the pace of before is forgotten after three measurements: {long}");
    }

    #[test]
    fn who_is_slower_than_the_link_is_not_held_back() {
        // Half of what the link carries, for the first half; nothing to do for a piece, later.
        let work = |now| if now < 5.0 { 131_072.0 / 62.5e6 } else { 0.0 };
        let (went, long) = run_of(&mut Headroom::default(), 10.0, |_| 125e6, work);
        assert!(went > 0.5 * (62.0e6 + 0.84 * 125e6), "{went}");
        assert!(long < 0.15, "{long} of the time");
    }

    #[test]
    fn a_link_that_carries_nothing_sets_no_pace() {
        let mut headroom = Headroom::default();
        let paces: Vec<Pace> = (0..100)
            .filter_map(|tenth| {
                headroom.look(Duration::from_millis(tenth * 100), Carried { acknowledged: 7, queued: 99 })
            })
            .collect();
        assert!(paces.iter().all(|pace| *pace == Pace::Free), "{paces:?}");
    }
}
