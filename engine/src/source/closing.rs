//! The last short rounds, when everything else is ready for the freeze.

use super::Migration;
use super::failure::SendError;
use crate::plan::PolicyChoice;
use crate::policy::{Closing, Decision, StopReason};

impl Migration<'_> {
    /// Sends what the program has written since it was decided to freeze it, as long as that shortens the freeze. Nobody can hold the
    /// migration up any more, and a link that is lost ends it, as in the freeze.
    pub(super) fn close_in(&mut self, decision: &mut Decision) -> Result<(), SendError> {
        crate::fault::point("closing");
        let Some(mut rounds) = self.rounds.take() else { return Ok(()) };
        // Fixed rounds are as many as were asked for, what is owed comes late, and a pace that is kept for the program's sake is not
        // forgotten just before the end.
        let may = matches!(decision.stop, Some(StopReason::TargetMet | StopReason::NoProgress))
            && self.plan.policy == PolicyChoice::Adaptive
            && !self.owes
            && self.control.max_slowdown().is_none();
        if !may {
            return Ok(());
        }
        rounds.closing = Some(Closing::new(self.plan.freeze_cost));
        loop {
            let round = self.report.rounds.len() as u32;
            if let Some(last) = self.round(round, &mut rounds)? {
                decision.predicted_downtime = last.predicted_downtime;
                return Ok(());
            }
        }
    }
}
