//! How fast a workload writes.

use super::content::WORDS;
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

/// Bytes of pages to dirty a second: a size (`10MB`, `64MiB`), `0` for none or `max` for as fast as it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rate {
    /// This many bytes a second, a page for every write.
    Bytes(u64),
    /// As fast as it goes.
    Max,
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "max" => Ok(Self::Max),
            size => size.parse().map(|size: bytesize::ByteSize| Self::Bytes(size.as_u64())),
        }
    }
}

/// Operations that [`Pace::due`] hands out at once when nothing holds it back.
const BATCH: u64 = 256;

/// Deals out operations at a rate. Operations that fell due while the program stood still are not made up for
/// beyond 50 ms: a migrated program should not come to life with a burst.
#[derive(Debug)]
pub struct Pace {
    per_second: Option<f64>,
    last: Instant,
    owed: f64,
    /// Operations that are left to deal out, if there is an end to them.
    left: Option<u64>,
}

impl Pace {
    /// One operation a page, at this rate.
    pub fn pages(rate: Rate) -> Self {
        Self::new(match rate {
            Rate::Bytes(bytes) => Some(bytes as f64 / (WORDS * 8) as f64),
            Rate::Max => None,
        })
    }

    /// This many operations a second; `None` is as fast as it goes.
    pub fn new(per_second: Option<f64>) -> Self {
        Self { per_second, last: Instant::now(), owed: 0.0, left: None }
    }

    /// The same for one of `parts` that share a rate.
    pub fn share(rate: Rate, parts: usize) -> Self {
        let whole = Self::pages(rate);
        Self { per_second: whole.per_second.map(|rate| rate / parts as f64), ..whole }
    }

    /// The same until so many operations were dealt out; `None` is for ever.
    pub fn at_most(self, left: Option<u64>) -> Self {
        Self { left, ..self }
    }

    /// How many operations are due. Sleeps for a millisecond first unless there is no limit.
    pub fn due(&mut self) -> u64 {
        let due = self.due_for_ever();
        let Some(left) = &mut self.left else { return due };
        let due = due.min(*left);
        *left -= due;
        due
    }

    fn due_for_ever(&mut self) -> u64 {
        let Some(per_second) = self.per_second.or((self.left == Some(0)).then_some(0.0)) else {
            return BATCH;
        };
        thread::sleep(Duration::from_millis(1));
        let now = Instant::now();
        let passed = now.saturating_duration_since(self.last).as_secs_f64().min(0.05);
        self.last = now;
        self.owed += passed * per_second;
        let due = self.owed.floor();
        self.owed -= due;
        due as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_sizes_or_max() {
        assert_eq!("10MB".parse(), Ok(Rate::Bytes(10_000_000)));
        assert_eq!("1MiB".parse(), Ok(Rate::Bytes(1 << 20)));
        assert_eq!("0".parse(), Ok(Rate::Bytes(0)));
        assert_eq!("max".parse(), Ok(Rate::Max));
        assert!("fast".parse::<Rate>().is_err());
    }

    #[test]
    fn no_limit_hands_out_batches_and_a_rate_of_zero_nothing() {
        assert_eq!(Pace::pages(Rate::Max).due(), BATCH);
        assert_eq!(Pace::pages(Rate::Bytes(0)).due(), 0);
    }

    #[test]
    fn no_more_are_dealt_out_than_there_are() {
        let mut pace = Pace::pages(Rate::Max).at_most(Some(BATCH + 3));
        assert_eq!([pace.due(), pace.due(), pace.due()], [BATCH, 3, 0]);
    }
}
