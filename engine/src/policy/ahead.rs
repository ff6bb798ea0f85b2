//! Which pages the program is ahead of. Pure.
//!
//! The first pass over a program's memory takes as long as the link does, and what is written all the time has been
//! written again before its turn comes. Sent now, it would be sent once more in the next round, so it is left for that one
//! (Clark et al., "Live Migration of Virtual Machines", NSDI 2005, section 5.2: pages that are dirty again are skipped; there,
//! every one of them).
//!
//! A page that was written once by then and never again would cost the next round what it saves in this, and make that one
//! longer. So pages are left where it is likely that they will be written once more: where half of their neighbours were
//! written too, or where the pass so far shows that writes come back to the same pages. With `f(t)` the share of pages that
//! were written within `t`, and writes that do not change their ways, `2 f(t) - f(2t)` is the share of pages that were
//! written in each of two intervals of `t`, and over `f(t)` the probability that a page that was written in one is written in the
//! next. It is 1 for a hot set, and near 0 for a program that writes here and there.

use std::time::Duration;

/// One in so many of the pages of a pass may be left: what is left of a program that writes to everything would be all of it.
const MOST: u64 = 4;
/// Likely enough.
const LIKELY: f64 = 0.5;
/// The first of the intervals over which the shares of written pages are averaged; each is twice as long as the one before.
const FIRST: Duration = Duration::from_millis(10);
const INTERVALS: usize = 24;
/// Pages that have to be seen in an interval before anything is made of it, and written ones among them.
const ENOUGH: (u64, u64) = (1024, 64);

/// What a pass over a program's memory has seen so far.
#[derive(Clone, Debug, Default)]
pub struct Pass {
    /// Pages that may still be left.
    room: u64,
    /// Written pages, and all, by the time since the pass began.
    seen: [(u64, u64); INTERVALS],
}

impl Pass {
    /// A pass over so many pages.
    pub fn new(pages: u64) -> Self {
        Self { room: pages / MOST, ..Self::default() }
    }

    /// Whether nothing can be left any more.
    pub fn is_over(&self) -> bool {
        self.room == 0
    }

    /// Of the `pages` of a batch, `written` have been written in the time `since` the pass began: whether those are left for
    /// the next round.
    pub fn leaves(&mut self, since: Duration, written: u64, pages: u64) -> bool {
        let interval = (since.as_nanos() / FIRST.as_nanos()).checked_ilog2().unwrap_or(0) as usize;
        let interval = interval.min(INTERVALS - 1);
        let seen = &mut self.seen[interval];
        *seen = (seen.0 + written, seen.1 + pages);
        if written == 0 || written > self.room {
            return false;
        }
        let leaves = written as f64 >= LIKELY * pages as f64 || self.comes_back(interval) >= LIKELY;
        self.room -= if leaves { written } else { 0 };
        leaves
    }

    /// How likely a page that was written is written again, as far as is known in an interval: from the two before it, which
    /// are complete.
    fn comes_back(&self, interval: usize) -> f64 {
        let share = |before: usize| {
            let (written, pages) = self.seen[interval.checked_sub(before)?];
            (pages >= ENOUGH.0 && written >= ENOUGH.1).then_some(written as f64 / pages as f64)
        };
        match (share(2), share(1)) {
            (Some(early), Some(late)) => (2.0 * early - late) / early,
            _ => 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BATCH: u64 = 256;

    /// A pass of `seconds` over pages of which `share` gives how many are written by then. How many of the written ones are
    /// left, and how many there were.
    fn pass(seconds: f64, share: impl Fn(f64) -> f64) -> (u64, u64) {
        const BATCHES: u64 = 2000;
        let mut pass = Pass::new(BATCHES * BATCH);
        let (mut left, mut all, mut owed) = (0, 0, 0.0);
        for batch in 0..BATCHES {
            let at = seconds * batch as f64 / BATCHES as f64;
            owed += share(at) * BATCH as f64;
            let written = owed as u64;
            owed -= written as f64;
            all += written;
            if pass.leaves(Duration::from_secs_f64(at), written, BATCH) {
                left += written;
            }
        }
        (left, all)
    }

    #[test]
    fn a_hot_set_is_left_wherever_its_pages_lie() {
        let (left, all) = pass(9.0, |at| if at > 0.1 { 0.05 } else { 0.5 * at });
        assert!(left * 100 > all * 95, "{left} of {all}");
        let (left, all) = pass(9.0, |at| f64::from(at > 4.0 && at < 5.0));
        assert_eq!(left, all, "in one place");
    }

    #[test]
    fn what_is_written_here_and_there_is_sent() {
        for rate in [0.001, 0.01, 0.04] {
            let (left, all) = pass(9.0, |at| 1.0 - (-rate * at).exp());
            assert!(left * 20 <= all, "{rate}: {left} of {all}");
        }
    }

    #[test]
    fn no_more_is_left_than_may_be() {
        let (left, all) = pass(9.0, |at| f64::from(at > 0.01));
        assert!(all > 500_000 && left <= 512_000 / MOST && left > 100_000, "{left} of {all}");
        assert!(Pass::new(3).is_over());
    }
}
