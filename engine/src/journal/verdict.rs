//! What a journal and what is left of the processes mean together. Pure: like `source/machine`, this is a rule that keeps
//! one copy of the program, and only one, alive.

use super::{Role, Step};
use pageferry_wire_format::HandoverState;
use serde::Serialize;

/// How the processes of a tree are, at the side that is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tree {
    /// All of them have ended.
    Gone,
    /// They run, or are about to.
    Running,
    /// All that live are stopped.
    Stopped,
    /// The same, and they have run after somebody had begun to send their pages.
    RanOn,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Its engine lives: it is not ours to say.
    UnderWay,
    /// Nothing is left to do here.
    Over,
    /// The copy here is the program, and may run.
    RunHere,
    /// The program is at the other side, and the copy here must end.
    EndHere,
    /// The other side has to be asked.
    Ask,
    /// The program is at the other side, and is sent the pages of it that are only here.
    Serve,
    /// Only a person can know.
    Unclear,
}

/// What to do about a session of which this side wrote `step` last, before the other side is asked.
pub(super) fn judge(role: Role, step: Step, live: bool, tree: Tree) -> Verdict {
    if live {
        return Verdict::UnderWay;
    }
    match (role, step, tree) {
        // There is nothing that could run twice, or be lost.
        (_, _, Tree::Gone) => Verdict::Over,
        // The commit was not sent. Whoever stopped the tree has gone, and so may have who would have let it go.
        (Role::Source, Step::PreCopy | Step::Frozen | Step::Held, _) => Verdict::RunHere,
        // A person has let it run: nobody else does after the commit.
        (Role::Source, Step::Committing | Step::InDoubt, Tree::Running) => Verdict::Over,
        (Role::Source, Step::Committing | Step::Resumed | Step::InDoubt, _) => Verdict::Ask,
        (Role::Source, Step::Filled, _) => Verdict::EndHere,
        // Every page is in place: it needs nobody.
        (Role::Destination, Step::Filled, _) => Verdict::Over,
        // Its pages have gone with the engine. The guard ends it, and where that has gone too, we do.
        (Role::Destination, _, _) => Verdict::EndHere,
        // Steps of the other side.
        (Role::Source, Step::Ready | Step::Discarded | Step::Ended, _) => Verdict::Unclear,
    }
}

/// The same, with the other side's answer (`None`: it could not be asked). `owes`: pages were left here with the commit.
pub(super) fn answered(answer: Option<&HandoverState>, owes: bool, tree: Tree) -> Verdict {
    match answer {
        Some(HandoverState::Discarded) => Verdict::RunHere,
        // What a person has let run is for a person to end.
        Some(HandoverState::Filled { .. }) if matches!(tree, Tree::Stopped | Tree::Gone) => Verdict::EndHere,
        // A copy that was let go has other pages by now.
        Some(HandoverState::Resumed { .. }) if owes && tree == Tree::Stopped => Verdict::Serve,
        // A person has let it go, and there is no other.
        Some(HandoverState::Ended) if tree == Tree::Running => Verdict::Over,
        // Also where it runs there and has not all of its pages: should it lose them, what is here is all that there is.
        _ => Verdict::Unclear,
    }
}

/// What a destination says about a session of an earlier engine.
pub(super) fn state_of(step: Step, live: bool, tree: Tree, pid: i32) -> HandoverState {
    match (live, step, tree) {
        // Another receiver of this machine is at it, and would say more.
        (true, _, _) => HandoverState::Unknown,
        (false, Step::Filled, _) => HandoverState::Filled { pid },
        // It ran, or may have for a moment, and somebody may have heard from it. It is here no more.
        (false, Step::Committing | Step::Resumed | Step::Ended, Tree::Gone) => HandoverState::Ended,
        (false, _, Tree::Gone) => HandoverState::Discarded,
        // It is being ended: ask again.
        (false, _, _) => HandoverState::ReadyToRun,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: [Step; 7] = [
        Step::PreCopy,
        Step::Frozen,
        Step::Held,
        Step::Committing,
        Step::Resumed,
        Step::Filled,
        Step::InDoubt,
    ];
    const DESTINATION: [Step; 7] = [
        Step::PreCopy,
        Step::Ready,
        Step::Committing,
        Step::Resumed,
        Step::Filled,
        Step::Discarded,
        Step::Ended,
    ];
    const ANSWERS: [Option<HandoverState>; 8] = [
        None,
        Some(HandoverState::Unknown),
        Some(HandoverState::Receiving),
        Some(HandoverState::ReadyToRun),
        Some(HandoverState::Resumed { pid: 4 }),
        Some(HandoverState::Discarded),
        Some(HandoverState::Ended),
        Some(HandoverState::Filled { pid: 4 }),
    ];

    #[test]
    fn before_the_commit_the_source_has_it_and_after_it_nobody_guesses() {
        for tree in [Tree::Running, Tree::Stopped] {
            for step in SOURCE {
                let verdict = judge(Role::Source, step, false, tree);
                let wanted = match step {
                    Step::PreCopy | Step::Frozen | Step::Held => Verdict::RunHere,
                    Step::Filled => Verdict::EndHere,
                    Step::Resumed => Verdict::Ask,
                    _ if tree == Tree::Running => Verdict::Over,
                    _ => Verdict::Ask,
                };
                assert_eq!(verdict, wanted, "{step}");
            }
        }
    }

    /// Whatever the last lines of both sides are, and whoever of them can be asked: never are both copies let run, and never
    /// are both ended.
    #[test]
    fn no_pair_of_journals_makes_two_programs_or_none() {
        for there in DESTINATION {
            for tree_there in [Tree::Gone, Tree::Running, Tree::Stopped] {
                // What is ended there is gone before it is said.
                let after = match judge(Role::Destination, there, false, tree_there) {
                    Verdict::EndHere => Tree::Gone,
                    _ => tree_there,
                };
                let answer = state_of(there, false, after, 4);
                let lives_there = there == Step::Filled;
                for here in SOURCE {
                    // The source cannot have heard of what the destination has not done, nor the other way round.
                    let possible = match here {
                        Step::PreCopy | Step::Frozen | Step::Held => {
                            there <= Step::Ready || there == Step::Discarded
                        }
                        Step::Resumed => there >= Step::Resumed && there != Step::Discarded,
                        Step::Filled => there == Step::Filled,
                        _ => true,
                    };
                    if !possible {
                        continue;
                    }
                    let verdict = match judge(Role::Source, here, false, Tree::Stopped) {
                        Verdict::Ask => answered(Some(&answer), true, Tree::Stopped),
                        verdict => verdict,
                    };
                    // An engine that lives is served; what a dead one left has come to its end, one way or the other.
                    assert_ne!(verdict, Verdict::Serve, "{here} and {there}");
                    assert!(!(verdict == Verdict::RunHere && lives_there), "two: {here} and {there}");
                    assert!(verdict != Verdict::EndHere || lives_there, "none: {here} and {there}");
                }
            }
        }
    }

    #[test]
    fn without_a_certain_answer_nothing_is_done() {
        for answer in ANSWERS {
            for (owes, tree) in
                [(false, Tree::Stopped), (true, Tree::Running), (true, Tree::RanOn), (true, Tree::Gone)]
            {
                let verdict = answered(answer.as_ref(), owes, tree);
                assert_ne!(verdict, Verdict::Serve, "{answer:?}, {owes}, {tree:?}");
                let has_run = matches!(tree, Tree::Running | Tree::RanOn);
                assert!(verdict != Verdict::EndHere || !has_run, "{answer:?}, {owes}, {tree:?}");
                let over = tree == Tree::Running && answer == Some(HandoverState::Ended);
                assert_eq!(verdict == Verdict::Over, over, "{answer:?}, {owes}, {tree:?}");
            }
            let verdict = answered(answer.as_ref(), true, Tree::Stopped);
            match answer {
                Some(HandoverState::Resumed { .. }) => assert_eq!(verdict, Verdict::Serve),
                Some(HandoverState::Discarded) => assert_eq!(verdict, Verdict::RunHere),
                Some(HandoverState::Filled { .. }) => assert_eq!(verdict, Verdict::EndHere),
                _ => assert_eq!(verdict, Verdict::Unclear),
            }
        }
    }

    #[test]
    fn a_living_engine_decides_alone() {
        for step in SOURCE {
            assert_eq!(judge(Role::Source, step, true, Tree::Stopped), Verdict::UnderWay);
        }
    }
}
