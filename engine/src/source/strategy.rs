//! The strategy that is chosen where none was asked for, and what became of the goals.

use super::Migration;
use super::failure::SendError;
use crate::observe::Event;
use crate::plan::{PolicyChoice, SendTo, Strategy};
use crate::policy::goals::{Choice, hoped_pace};
use crate::policy::reasons::{Reason, in_words};
use crate::policy::{Goals, Means, Navigator};
use std::time::Duration;

impl Migration<'_> {
    /// Who says after every collect how to go on.
    pub(super) fn navigator(&self) -> Navigator {
        let plan = self.plan;
        let bandwidth = self.control.limit().rate().map_or(f64::INFINITY, |rate| rate as f64);
        Navigator::new(
            Goals { downtime: plan.downtime, total_time: plan.total_time },
            Means {
                strategy: plan.strategy,
                policy: plan.policy,
                max_rounds: plan.max_rounds,
                cost: plan.freeze_cost,
                late: plan.late(),
                hoped_pace: hoped_pace(plan.page_time, bandwidth),
            },
        )
    }

    /// The rounds are to end by a strategy that was chosen, or because somebody asked for post-copy meanwhile. What was decided of
    /// pages that come late stays, if something holds the freeze up.
    pub(super) fn note_choice(&mut self, choice: Option<Choice>, by_hand: bool) -> Result<(), SendError> {
        if self.plan.strategy != Strategy::Auto || self.choice.is_some_and(|choice| choice.strategy.owes()) {
            return Ok(());
        }
        self.choice = match (by_hand, self.report.rounds.is_empty()) {
            (true, true) => Some(Choice { strategy: Strategy::PostCopy, reason: Reason::ByHand }),
            (true, false) => Some(Choice { strategy: Strategy::Hybrid, reason: Reason::ByHand }),
            (false, _) => choice,
        };
        match self.choice {
            Some(choice) if choice.strategy.owes() => self.get_ready_to_owe(),
            _ => Ok(()),
        }
    }

    /// What is left comes after the program runs at the destination: makes the connections for it.
    pub(super) fn get_ready_to_owe(&mut self) -> Result<(), SendError> {
        self.owes = true;
        if self.late_channels.is_empty() {
            self.open_late(self.peer_streams)?;
        }
        Ok(())
    }

    /// The choice is final: the freeze begins.
    pub(super) fn tell_choice(&mut self) {
        let Some(Choice { strategy, reason }) = self.choice else { return };
        if matches!(self.plan.to, SendTo::Receiver(_)) {
            self.report.strategy = strategy.name().to_owned();
        }
        self.report.strategy_reason = reason.name().to_owned();
        self.report.strategy_because = reason.to_string();
        self.observer.event(&Event::Strategy {
            asked: self.report.strategy_asked.clone(),
            chosen: strategy.name().to_owned(),
            reason: self.report.strategy_reason.clone(),
            because: self.report.strategy_because.clone(),
        });
    }

    /// It is completed: says which goals were missed.
    pub(super) fn judge_goals(&mut self) {
        let plan = self.plan;
        let stood = self.report.downtime_us.total();
        self.report.downtime_goal_met = Some(stood <= plan.downtime);
        // Nobody aims for one who asks for all of it in the freeze, or for a number of rounds.
        let aims = plan.strategy != Strategy::StopAndCopy && plan.policy == PolicyChoice::Adaptive;
        if aims && stood > plan.downtime {
            self.missed(format!(
                "the program stood still for {}, and {} were aimed for (--downtime)",
                in_words(stood),
                in_words(plan.downtime)
            ));
        }
        self.judge_slowdown();
        if let Some(goal) = plan.total_time {
            let took = Duration::from_micros(self.report.complete_us);
            self.report.total_time_goal_met = Some(took <= goal);
            if took > goal {
                self.missed(format!(
                    "all of it was there after {}, and {} were aimed for (--total-time)",
                    in_words(took),
                    in_words(goal)
                ));
            }
        }
    }

    fn missed(&self, text: String) {
        self.observer.event(&Event::Warning { text });
    }
}
