//! Why a strategy was chosen, with the figures that it was chosen by. Pure.

use std::fmt::{self, Display, Formatter};
use std::time::Duration;

/// Why a strategy was chosen. Times of goals are those that were asked for, the others were predicted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reason {
    /// All of it can go while the program stands still.
    FitsFreeze {
        /// Standing still then.
        downtime: Duration,
        /// To aim for.
        goal: Duration,
    },
    /// Rounds brought the downtime under its goal.
    Converged {
        /// Rounds that were sent.
        rounds: u32,
        /// Standing still.
        downtime: Duration,
        /// To aim for.
        goal: Duration,
    },
    /// Rounds do not bring the downtime under its goal, and post-copy makes it shorter.
    Diverges {
        /// Standing still if everything that is left went then.
        downtime: Duration,
        /// Standing still if it comes late.
        late: Duration,
        /// To aim for.
        goal: Duration,
    },
    /// Rounds would miss the goal for the whole, and post-copy does not.
    TooLong {
        /// Until all of it is there by rounds; `None` if they would not come to their end.
        rounds: Option<Duration>,
        /// Until all of it is there by post-copy.
        late: Duration,
        /// To aim for.
        goal: Duration,
    },
    /// Another round would miss the goal for the whole, and the downtime is under its own already.
    TimeIsUp {
        /// Standing still.
        downtime: Duration,
        /// Until all of it is there.
        total: Duration,
        /// To aim for.
        goal: Duration,
    },
    /// Rounds do not bring the downtime under its goal, and nothing may come late.
    NothingLate {
        /// Standing still.
        downtime: Duration,
        /// To aim for.
        goal: Duration,
    },
    /// Rounds do not bring the downtime under its goal, and post-copy would change little: most of it is the freeze itself.
    FreezeIsLong {
        /// Standing still.
        downtime: Duration,
        /// To aim for.
        goal: Duration,
    },
    /// A number of rounds was asked for.
    Rounds {
        /// How many.
        rounds: u32,
    },
    /// Somebody said so while it ran.
    ByHand,
}

impl Reason {
    /// The word in reports.
    pub fn name(&self) -> &'static str {
        match self {
            Reason::FitsFreeze { .. } => "fits-freeze",
            Reason::Converged { .. } => "converged",
            Reason::Diverges { .. } => "diverges",
            Reason::TooLong { .. } => "too-long",
            Reason::TimeIsUp { .. } => "time-is-up",
            Reason::NothingLate { .. } => "nothing-late",
            Reason::FreezeIsLong { .. } => "freeze-is-long",
            Reason::Rounds { .. } => "rounds",
            Reason::ByHand => "by-hand",
        }
    }
}

impl Display for Reason {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match *self {
            Reason::FitsFreeze { downtime, goal } => write!(
                f,
                "all of it goes in about {} of downtime, and {} are allowed",
                in_words(downtime),
                in_words(goal)
            ),
            Reason::Converged { rounds, downtime, goal } => write!(
                f,
                "after {rounds} {} about {} of downtime are left, and {} are allowed",
                if rounds == 1 { "round" } else { "rounds" },
                in_words(downtime),
                in_words(goal)
            ),
            Reason::Diverges { downtime, late, goal } => write!(
                f,
                "rounds leave it at about {} of downtime where {} are allowed, and with the rest sent afterwards it is about {}",
                in_words(downtime),
                in_words(goal),
                in_words(late)
            ),
            Reason::TooLong { rounds, late, goal } => {
                match rounds {
                    Some(rounds) => write!(f, "rounds would take until {}", in_words(rounds))?,
                    None => write!(f, "rounds would not come to an end")?,
                }
                write!(
                    f,
                    " where {} are allowed, and with the rest sent afterwards all of it is there after about {}",
                    in_words(goal),
                    in_words(late)
                )
            }
            Reason::TimeIsUp { downtime, total, goal } => write!(
                f,
                "another round would take longer than the {} that are allowed for all of it, and now it is about {}, with {} of downtime",
                in_words(goal),
                in_words(total),
                in_words(downtime)
            ),
            Reason::NothingLate { downtime, goal } => write!(
                f,
                "rounds leave it at about {} of downtime where {} are wanted, and nothing may be sent afterwards",
                in_words(downtime),
                in_words(goal)
            ),
            Reason::FreezeIsLong { downtime, goal } => write!(
                f,
                "about {} of downtime are left where {} are wanted, and most of it is the freeze itself, which post-copy does not shorten",
                in_words(downtime),
                in_words(goal)
            ),
            Reason::Rounds { rounds } => write!(f, "a fixed number of rounds was asked for: {rounds}"),
            Reason::ByHand => write!(f, "post-copy was asked for while it ran"),
        }
    }
}

/// A time as people say it.
pub(crate) fn in_words(time: Duration) -> String {
    let ms = time.as_secs_f64() * 1e3;
    match ms {
        ms if ms < 9.95 => format!("{ms:.1} ms"),
        ms if ms < 999.5 => format!("{ms:.0} ms"),
        ms if ms < 99_950.0 => format!("{:.1} s", ms / 1e3),
        ms => format!("{:.0} s", ms / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_a_sentence_with_its_figures() {
        let ms = Duration::from_millis;
        let reason = Reason::Diverges { downtime: ms(420), late: ms(24), goal: ms(30) };
        let text = reason.to_string();
        assert!(["420 ms", "24 ms", "30 ms"].iter().all(|figure| text.contains(figure)), "{text}");
        let reason = Reason::TooLong { rounds: None, late: ms(1940), goal: ms(2500) };
        assert!(reason.to_string().contains("1.9 s") && reason.to_string().contains("not come to an end"));
        assert_eq!(reason.name(), "too-long");
    }

    #[test]
    fn times_are_short() {
        for (us, text) in
            [(0, "0.0 ms"), (9_940, "9.9 ms"), (9_960, "10 ms"), (999_600, "1.0 s"), (123_000_000, "123 s")]
        {
            assert_eq!(in_words(Duration::from_micros(us)), text);
        }
    }
}
