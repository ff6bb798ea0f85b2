//! What a failure means, by how far the handover had come. Pure: this is the rule that keeps one copy of the
//! program, and only one, alive.

use pageferry_wire_format::{AbortCode, HandoverState};

/// How far the source had come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// Nothing was touched.
    Preparing,
    /// The receiver is being talked to.
    Connecting,
    /// The tree is being tracked.
    Attaching,
    /// Rounds are being sent; the tree runs.
    PreCopy(u32),
    /// CRIU stops the tree.
    Freezing,
    /// The last pages are found and sent.
    LastPages,
    /// The destination confirms the memory.
    Sealing,
    /// CRIU dumps the rest.
    Dumping,
    /// The images travel.
    Images,
    /// The destination restores.
    Restoring,
    /// The commit may have been sent.
    Committing,
    /// The program runs at the destination, and pages of it are still here.
    PostCopy,
    /// The destination has said that the program runs there. Not every page is in place yet, and the engine there has the rest.
    Committed,
    /// Every page is in place there.
    Filled,
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Phase::Preparing => f.write_str("preparing"),
            Phase::Connecting => f.write_str("connecting"),
            Phase::Attaching => f.write_str("attaching the tracker"),
            Phase::PreCopy(round) => write!(f, "pre-copy round {round}"),
            Phase::Freezing => f.write_str("freezing"),
            Phase::LastPages => f.write_str("sending the last pages"),
            Phase::Sealing => f.write_str("sealing the memory"),
            Phase::Dumping => f.write_str("dumping"),
            Phase::Images => f.write_str("sending the images"),
            Phase::Restoring => f.write_str("waiting for the restore"),
            Phase::Committing => f.write_str("committing"),
            Phase::PostCopy => f.write_str("post-copy"),
            Phase::Committed => f.write_str("the time after the commit"),
            Phase::Filled => f.write_str("ending the copy here"),
        }
    }
}

/// What the source does with its own copy after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Aftermath {
    /// Let it run on: the destination cannot have one, now or later.
    RunOn,
    /// Ask the destination what became of the commit.
    Ask,
    /// End it: the destination's copy runs.
    End,
    /// Keep it stopped: it cannot be known which copy is the one, or the other one cannot live without it.
    Hold,
    /// Keep it stopped, and go on sending what the destination's copy is owed.
    Serve,
}

/// What the commit gives away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stake {
    /// The program: one copy of it may run, here or there.
    Program,
    /// The program, but for pages that are owed: they are nowhere else, whoever runs.
    Part,
    /// An image of it that does not run by itself, while the program never stops being here.
    Image,
}

/// What to do when something failed in `phase`.
///
/// The destination lets its copy run after it received the commit, and only then. So as long as no byte of
/// the commit was sent, the source may run on whatever happened; once it was sent, only the destination knows.
/// Where only an image is at stake, nobody else ever has the program: it runs on whatever becomes of the image.
pub(crate) fn after_failure(phase: Phase, stake: Stake) -> Aftermath {
    match (phase, stake) {
        (_, Stake::Image) => Aftermath::RunOn,
        (Phase::Filled, _) => Aftermath::End,
        (Phase::Committing | Phase::PostCopy | Phase::Committed, _) => Aftermath::Ask,
        _ => Aftermath::RunOn,
    }
}

/// What to do when the destination was asked, and answered `state` (`None`: it could not be reached in time).
pub(crate) fn after_answer(state: Option<&HandoverState>, stake: Stake) -> Aftermath {
    match state {
        Some(HandoverState::Filled { .. }) => Aftermath::End,
        Some(HandoverState::Resumed { .. }) if stake == Stake::Part => Aftermath::Serve,
        // Should that engine end too, its pages go with it, and those that are here are the only ones.
        Some(HandoverState::Resumed { .. }) => Aftermath::Hold,
        // It has given its copy up and will never let it run.
        Some(HandoverState::Discarded) => Aftermath::RunOn,
        // A receiver that was started anew knows nothing of the session: its predecessor may have died after
        // letting the copy run. `Receiving` and `ReadyToRun` are passing states that are asked again.
        // What it did there happened, and what is here is older: a person has to say whether that may run.
        Some(HandoverState::Ended) => Aftermath::Hold,
        Some(HandoverState::Unknown | HandoverState::Receiving | HandoverState::ReadyToRun) | None => {
            Aftermath::Hold
        }
    }
}

/// What to do when the destination has answered the commit with its end, and said why.
pub(crate) fn after_abort(code: AbortCode) -> Aftermath {
    match code {
        // The commit had been accepted. What the program did there, if only for a moment, happened.
        AbortCode::Ended | AbortCode::Unknown(_) => Aftermath::Hold,
        // It was not: its copy is gone, and never ran.
        _ => Aftermath::RunOn,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_source_runs_on_until_the_commit_and_never_after_it() {
        for phase in [
            Phase::Preparing,
            Phase::Connecting,
            Phase::Attaching,
            Phase::PreCopy(7),
            Phase::Freezing,
            Phase::LastPages,
            Phase::Sealing,
            Phase::Dumping,
            Phase::Images,
            Phase::Restoring,
        ] {
            assert_eq!(after_failure(phase, Stake::Program), Aftermath::RunOn, "{phase}");
            assert_eq!(after_failure(phase, Stake::Image), Aftermath::RunOn, "{phase}");
        }
        assert_eq!(after_failure(Phase::Committing, Stake::Program), Aftermath::Ask);
        for phase in [Phase::PostCopy, Phase::Committed] {
            assert_eq!(after_failure(phase, Stake::Program), Aftermath::Ask, "{phase}");
        }
        assert_eq!(after_failure(Phase::Filled, Stake::Program), Aftermath::End);
        assert_eq!(after_failure(Phase::Filled, Stake::Part), Aftermath::End);
    }

    #[test]
    fn a_program_of_which_only_an_image_was_made_runs_on_in_every_case() {
        for phase in [Phase::Committing, Phase::Committed] {
            assert_eq!(after_failure(phase, Stake::Image), Aftermath::RunOn, "{phase}");
        }
    }

    #[test]
    fn an_answer_to_the_commit_lets_the_source_run_on_if_the_program_did_not_run_there() {
        assert_eq!(after_abort(AbortCode::RestoreFailed), Aftermath::RunOn);
        assert_eq!(after_abort(AbortCode::Ended), Aftermath::Hold);
        assert_eq!(after_abort(AbortCode::Unknown(99)), Aftermath::Hold, "of a later version");
    }

    #[test]
    fn only_a_certain_answer_lets_either_copy_go() {
        assert_eq!(after_answer(Some(&HandoverState::Filled { pid: 5 }), Stake::Program), Aftermath::End);
        assert_eq!(after_answer(Some(&HandoverState::Resumed { pid: 5 }), Stake::Program), Aftermath::Hold);
        assert_eq!(after_answer(Some(&HandoverState::Discarded), Stake::Program), Aftermath::RunOn);
        for state in [
            HandoverState::Unknown,
            HandoverState::Receiving,
            HandoverState::ReadyToRun,
            HandoverState::Ended,
        ] {
            assert_eq!(after_answer(Some(&state), Stake::Program), Aftermath::Hold);
        }
        assert_eq!(after_answer(None, Stake::Program), Aftermath::Hold);
    }

    #[test]
    fn a_copy_that_the_other_needs_is_neither_ended_nor_let_go() {
        for phase in [Phase::PostCopy, Phase::Committed] {
            assert_eq!(after_failure(phase, Stake::Part), Aftermath::Ask, "{phase}");
        }
        assert_eq!(after_failure(Phase::Restoring, Stake::Part), Aftermath::RunOn);
        assert_eq!(after_failure(Phase::Committing, Stake::Part), Aftermath::Ask);
        assert_eq!(after_answer(Some(&HandoverState::Resumed { pid: 5 }), Stake::Part), Aftermath::Serve);
        assert_eq!(after_answer(None, Stake::Part), Aftermath::Hold);
    }
}
