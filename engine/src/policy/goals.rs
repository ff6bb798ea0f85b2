//! Which strategy serves the goals that were stated: after every collect, from what is known then. Pure.
//!
//! Three ways are open. Everything that is left can go while the program stands still; it can go in another round; or it can come after
//! the program runs at the destination. The first is the quickest as a whole, the second has the shortest downtime that costs nothing
//! when something fails, and the third has the shortest downtime whatever the program writes, but while pages are owed both machines
//! are needed. So the third is chosen only where a goal is missed otherwise.
//!
//! Nothing is known of the link before something was sent over it. Where it matters at once, because all of the program might go
//! in the freeze, or because there is a goal for the whole, the first round is a sample: a small part of the memory, which has to be
//! sent in any case.

use super::reasons::Reason;
use super::{Adaptive, Decision, Fixed, FreezeCost, RoundPolicy, RoundSample, StopReason, headroom};
use crate::plan::{PolicyChoice, Strategy};
use std::time::Duration;

/// All of it goes in the freeze where that takes this share of the downtime that is allowed at most: rounds would make it
/// shorter still, and a page that could not be seen to be large may follow.
const CLEARLY: f64 = 0.5;
/// A sample is this part of what is due ...
const SAMPLE_PART: u64 = 8;
/// ... and has so many pages, or it says nothing of the pace, or takes long by itself.
const SAMPLE: (u64, u64) = (super::PACE_PAGES, 4096);
/// Bytes of a page that does not compress, with its share of a frame's head.
const WHOLE_PAGE: f64 = crate::model::HEAD + 4096.0;
/// A round that leaves more than this share of what it had does not help.
const HELPS: f64 = 0.95;

/// What is aimed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Goals {
    /// Standing still.
    pub downtime: Duration,
    /// From the start until it runs at the destination with all of its pages; `None` is as long as it takes.
    pub total_time: Option<Duration>,
}

/// Whether the rest may come after the program runs at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Late {
    /// It may not: into a file, or because something else was asked for.
    Never,
    /// Where a goal is missed otherwise, and it helps.
    WhereItHelps,
    /// Wherever rounds do not bring the downtime under its goal, because that was asked for.
    Always,
}

/// What there is to choose from.
#[derive(Clone, Copy, Debug)]
pub struct Means {
    /// How; [`Strategy::Auto`] is what is chosen here, any other one is kept to.
    pub strategy: Strategy,
    /// Who decides between rounds and the freeze.
    pub policy: PolicyChoice,
    /// Rounds at most.
    pub max_rounds: u32,
    /// What a freeze costs beside the pages.
    pub cost: FreezeCost,
    /// Whether the rest may come after the program runs at the destination.
    pub late: Late,
    /// Pages a second that can be hoped for before anything was sent.
    pub hoped_pace: f64,
}

/// A strategy, and why.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The strategy.
    pub strategy: Strategy,
    /// Why.
    pub reason: Reason,
}

impl From<Decision> for Course {
    /// All of it, and the strategy is another's matter.
    fn from(decision: Decision) -> Self {
        Self { decision, most: None, choice: None }
    }
}

/// What to do with the pages that were just collected.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Course {
    /// Another round or the freeze.
    pub decision: Decision,
    /// Of another round, pages to send in it at most: the others are left for the next.
    pub most: Option<u64>,
    /// With the freeze: the strategy that was chosen; `None` where one was asked for.
    pub choice: Option<Choice>,
}

impl Course {
    /// Whether what is left is to come after the program runs at the destination, by choice.
    pub fn late(&self) -> bool {
        self.choice.is_some_and(|choice| choice.strategy.owes())
    }
}

/// Pages a second that can be hoped for where a page takes `time` by itself, and `bandwidth` bytes a second may be sent.
pub fn hoped_pace(time: Duration, bandwidth: f64) -> f64 {
    1.0 / time.as_secs_f64().max(WHOLE_PAGE / bandwidth).max(1e-9)
}

/// Asks the policy after every collect, and chooses the strategy where none was asked for.
pub struct Navigator {
    goals: Goals,
    means: Means,
    policy: Box<dyn RoundPolicy>,
    /// Rounds that were samples: they are none to the policy.
    samples: u32,
    /// The last round was one.
    sampled: bool,
}

impl std::fmt::Debug for Navigator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Navigator")
            .field("goals", &self.goals)
            .field("means", &self.means)
            .finish_non_exhaustive()
    }
}

impl Navigator {
    /// One for a migration that begins.
    pub fn new(goals: Goals, means: Means) -> Self {
        let policy: Box<dyn RoundPolicy> = match means.policy {
            PolicyChoice::Adaptive => Box::new(Adaptive::new(goals.downtime, means.max_rounds, means.cost)),
            PolicyChoice::Fixed(rounds) => Box::new(Fixed::new(rounds, means.cost)),
        };
        Self { goals, means, policy, samples: 0, sampled: false }
    }

    /// The policy, for what it is to be told beside samples.
    pub fn policy(&mut self) -> &mut dyn RoundPolicy {
        self.policy.as_mut()
    }

    /// Called after every collect, in order, `elapsed` after the start of the migration.
    pub fn decide(&mut self, sample: &RoundSample, elapsed: Duration) -> Course {
        let chooses = self.means.strategy == Strategy::Auto && self.means.policy == PolicyChoice::Adaptive;
        if chooses && std::mem::take(&mut self.sampled) {
            return self.after_sample(sample, elapsed);
        }
        let sample = RoundSample { round: sample.round.saturating_sub(self.samples), ..*sample };
        let decision = self.policy.decide(&sample);
        if !chooses {
            let reason = Reason::Rounds { rounds: sample.round };
            let choice = (self.means.strategy == Strategy::Auto && decision.stop.is_some())
                .then_some(Choice { strategy: Strategy::PreCopy, reason });
            return Course { decision, most: None, choice };
        }
        if sample.measured.is_none() {
            let most = self.sample_pages(&sample);
            self.sampled = most.is_some();
            self.samples += u32::from(self.sampled);
            return Course { decision, most, choice: None };
        }
        self.choose(&sample, decision, elapsed)
    }

    /// How much of the first round is sent as a sample; `None` if nothing hangs on it.
    fn sample_pages(&self, sample: &RoundSample) -> Option<u64> {
        let copy = seconds(sample.todo_pages as f64 / self.means.hoped_pace.max(1.0));
        let fits = self.fixed(sample) + copy <= self.goals.downtime.mul_f64(CLEARLY);
        let pages = (sample.todo_pages / SAMPLE_PART).clamp(SAMPLE.0, SAMPLE.1);
        ((fits || self.goals.total_time.is_some()) && sample.todo_pages >= 2 * pages).then_some(pages)
    }

    /// The pace is known now, and nearly everything is still to be sent.
    fn after_sample(&self, sample: &RoundSample, elapsed: Duration) -> Course {
        let View { downtime, .. } = self.view(sample, sample.dirty_pages);
        let go_on = Course {
            decision: Decision { stop: None, predicted_downtime: downtime },
            most: None,
            choice: None,
        };
        let Some(measured) = sample.measured else { return go_on };
        // What the sample was of may compress better than the rest.
        let whole = seconds(sample.todo_pages as f64 * WHOLE_PAGE / measured.bytes_per_second.max(1.0));
        let most = downtime.max(self.fixed(sample) + whole);
        let goal = self.goals.downtime;
        if most <= goal.mul_f64(CLEARLY) {
            let reason = Reason::FitsFreeze { downtime: most, goal };
            return self.freeze(go_on.decision, StopReason::StopAndCopy, Strategy::StopAndCopy, reason);
        }
        self.within_time(sample, sample.dirty_pages, go_on, elapsed)
    }

    /// Between rounds.
    fn choose(&self, sample: &RoundSample, decision: Decision, elapsed: Duration) -> Course {
        let (downtime, goal) = (decision.predicted_downtime, self.goals.downtime);
        let late = self.fixed(sample);
        let Some(stop) = decision.stop else {
            let go_on = Course { decision, most: None, choice: None };
            return self.within_time(
                sample,
                sample.todo_pages.saturating_sub(sample.hot_pages),
                go_on,
                elapsed,
            );
        };
        let (strategy, reason) = if downtime <= goal {
            (Strategy::PreCopy, Reason::Converged { rounds: sample.round, downtime, goal })
        } else if self.means.late == Late::Never {
            (Strategy::PreCopy, Reason::NothingLate { downtime, goal })
        } else if self.means.late == Late::Always || late <= goal || late * 2 <= downtime {
            (Strategy::Hybrid, Reason::Diverges { downtime, late, goal })
        } else {
            (Strategy::PreCopy, Reason::FreezeIsLong { downtime, goal })
        };
        self.freeze(decision, stop, strategy, reason)
    }

    /// Goes on, unless the goal for the whole says otherwise. `dirty` pages were written since the last collect.
    fn within_time(&self, sample: &RoundSample, dirty: u64, go_on: Course, elapsed: Duration) -> Course {
        let Some(goal) = self.goals.total_time else { return go_on };
        let view = self.view(sample, dirty);
        let by_rounds = view.rounds(self.goals.downtime, self.means.max_rounds.saturating_sub(sample.round));
        let by_rounds = by_rounds.map(|time| elapsed + time);
        let now = elapsed + view.downtime;
        if view.downtime <= self.goals.downtime {
            // Rounds go on although the downtime is short enough, because they make it shorter.
            let after = elapsed + view.round() + view.after_a_round();
            if after <= goal {
                return go_on;
            }
            let reason = Reason::TimeIsUp { downtime: view.downtime, total: now, goal };
            return self.freeze(go_on.decision, StopReason::TotalTime, Strategy::PreCopy, reason);
        }
        // What comes late is sent once, as in the freeze, and leaves some of the link to what is waited for.
        let fixed = self.fixed(sample);
        let late = elapsed + fixed + (view.downtime - fixed).div_f64(headroom::SHARE);
        if self.means.late != Late::Never && late <= goal && by_rounds.is_none_or(|rounds| rounds > goal) {
            let reason = Reason::TooLong { rounds: by_rounds, late, goal };
            return self.freeze(go_on.decision, StopReason::TotalTime, Strategy::Hybrid, reason);
        }
        go_on
    }

    fn freeze(&self, decision: Decision, stop: StopReason, strategy: Strategy, reason: Reason) -> Course {
        let choice = Some(Choice { strategy, reason });
        Course { decision: Decision { stop: Some(stop), ..decision }, most: None, choice }
    }

    /// What a freeze costs beside the pages.
    fn fixed(&self, sample: &RoundSample) -> Duration {
        self.means.cost.of(sample.processes, sample.resident_pages)
    }

    fn view(&self, sample: &RoundSample, dirty: u64) -> View {
        let measured = sample.measured;
        let rate = measured.map_or(self.means.hoped_pace, |measured| measured.pages_per_second).max(1.0);
        let held = seconds(sample.hot_pages as f64 / rate);
        let copy = seconds(sample.todo_pages.saturating_sub(sample.hot_pages) as f64 / rate);
        let dirty_rate = match sample.since_last.as_secs_f64() {
            seconds if seconds > 0.0 => dirty as f64 / seconds,
            _ => 0.0,
        };
        let standing = self.fixed(sample) + held;
        let overhead = measured.map_or(Duration::ZERO, |measured| measured.round_overhead);
        View { downtime: standing + copy, standing, copy, overhead, outrun: dirty_rate / rate }
    }
}

/// The fluid model of [`Adaptive`], from one moment on.
#[derive(Clone, Copy, Debug)]
struct View {
    /// If it were frozen now.
    downtime: Duration,
    /// Of this, what no round makes shorter.
    standing: Duration,
    /// What is due, and can be sent in a round.
    copy: Duration,
    /// Of a round.
    overhead: Duration,
    /// Pages that become dirty for one that can be sent.
    outrun: f64,
}

impl View {
    /// How long a round takes.
    fn round(&self) -> Duration {
        self.overhead + self.copy
    }

    /// Standing still after it.
    fn after_a_round(&self) -> Duration {
        self.standing + seconds(self.round().as_secs_f64() * self.outrun)
    }

    /// How long it takes to run there by rounds that bring the downtime to `goal`; `None` if so many rounds do not.
    fn rounds(mut self, goal: Duration, most: u32) -> Option<Duration> {
        let mut time = Duration::ZERO;
        for _ in 0..=most {
            if self.standing + self.copy <= goal {
                return Some(time + self.standing + self.copy);
            }
            let next = seconds(self.round().as_secs_f64() * self.outrun);
            if next > self.copy.mul_f64(HELPS) {
                return None;
            }
            time += self.round();
            self.copy = next;
        }
        None
    }
}

/// A time; one beyond all measure is the longest.
fn seconds(value: f64) -> Duration {
    Duration::try_from_secs_f64(value).unwrap_or(Duration::from_secs(u64::from(u32::MAX)))
}

#[cfg(test)]
#[path = "goals_tests.rs"]
mod tests;
