//! The destination's side: an address that comes, step by step, and what is undone when the program does not.

use super::NetworkError;
use super::ground::{Ground, Step};

/// How far it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// Nothing was done.
    Fresh,
    /// Packets may be held back.
    Holding,
    /// The address may be here, silently.
    Placed,
    /// Everybody may have been told.
    Announced,
    /// Packets may get in.
    Open,
    /// The program runs here: the address stays.
    Ours,
    /// Nothing is left to do or to undo.
    Over,
}

/// Addresses that come with a program. Dropped before [`Arriving::deliver`], everything is as it was.
#[derive(Debug)]
pub(crate) struct Arriving<G: Ground> {
    ground: G,
    stage: Stage,
}

impl<G: Ground> Arriving<G> {
    pub(crate) fn new(ground: G) -> Self {
        Self { ground, stage: Stage::Fresh }
    }

    /// Long before the freeze: the addresses are here, and nobody can tell.
    pub(crate) fn prepare(&mut self) -> Result<(), NetworkError> {
        self.go(Stage::Holding, Step::Hold)?;
        self.go(Stage::Placed, Step::Place)
    }

    /// When the program is being stopped: packets come here from now on, and wait.
    pub(crate) fn announce(&mut self) -> Result<(), NetworkError> {
        self.go(Stage::Announced, Step::Speak)?;
        self.ground.take(Step::Announce)
    }

    /// When the commit has come. Packets are let in, and those that waited wait for [`Arriving::deliver`].
    ///
    /// Before the sockets leave their repair mode: what the kernel says to the clients then has answers, which must get in.
    pub(crate) fn open(&mut self) -> Result<(), NetworkError> {
        self.go(Stage::Open, Step::Open)
    }

    /// When the program runs here: whatever happens, the addresses stay.
    pub(crate) fn deliver(&mut self) -> Result<(), NetworkError> {
        self.go(Stage::Ours, Step::Deliver)
    }

    /// When there is time: the rules go, and the addresses are like any other.
    pub(crate) fn settle(mut self) -> Result<(), NetworkError> {
        self.end()
    }

    pub(crate) fn ground(&self) -> &G {
        &self.ground
    }

    /// The stage counts from before the step: one that failed may have been half of it.
    fn go(&mut self, stage: Stage, step: Step) -> Result<(), NetworkError> {
        self.stage = self.stage.max(stage);
        self.ground.take(step)
    }

    fn end(&mut self) -> Result<(), NetworkError> {
        let steps: &[Step] = match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Fresh | Stage::Over => &[],
            Stage::Holding => &[Step::Lift],
            // First the address: when packets are let in there must be nobody who says that nobody is there.
            Stage::Placed => &[Step::Remove, Step::Lift],
            Stage::Announced | Stage::Open => &[Step::Remove, Step::GiveBack, Step::Lift],
            Stage::Ours => &[Step::Settle, Step::Lift],
        };
        // Each of them, whatever becomes of the others.
        steps.iter().map(|step| self.ground.take(*step)).fold(Ok(()), Result::and)
    }
}

impl<G: Ground> Drop for Arriving<G> {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(%error, "an address that came could not be undone, or settled, cleanly");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::ground::scripted::Scripted;
    use super::*;

    #[test]
    fn the_address_comes() {
        let ground = Scripted::default();
        let mut arriving = Arriving::new(ground.clone());
        arriving.prepare().unwrap();
        arriving.announce().unwrap();
        arriving.open().unwrap();
        arriving.deliver().unwrap();
        arriving.settle().unwrap();
        use Step::{Announce, Deliver, Hold, Lift, Open, Place, Settle, Speak};
        assert_eq!(ground.taken(), [Hold, Place, Speak, Announce, Open, Deliver, Settle, Lift]);
    }

    #[test]
    fn what_was_done_is_undone_at_every_point_before_the_program_runs() {
        use Step::{Announce, Deliver, GiveBack, Hold, Lift, Open, Place, Remove, Settle, Speak};
        type Arrival = Arriving<Scripted>;
        let run = |until: usize| {
            let ground = Scripted::default();
            let mut arriving = Arriving::new(ground.clone());
            let calls = [Arrival::prepare, Arrival::announce, Arrival::open, Arrival::deliver];
            calls.iter().take(until).for_each(|call| call(&mut arriving).unwrap());
            drop(arriving);
            ground.taken()
        };
        assert_eq!(run(0), []);
        assert_eq!(run(1), [Hold, Place, Remove, Lift]);
        assert_eq!(run(2), [Hold, Place, Speak, Announce, Remove, GiveBack, Lift]);
        assert_eq!(run(3), [Hold, Place, Speak, Announce, Open, Remove, GiveBack, Lift]);
        assert_eq!(run(4), [Hold, Place, Speak, Announce, Open, Deliver, Settle, Lift], "it stays");
    }

    #[test]
    fn a_step_that_failed_is_undone_too_and_no_failure_stops_the_undoing() {
        use Step::{Announce, GiveBack, Hold, Lift, Place, Remove, Speak};
        for (failing, expected) in [
            (vec![Hold], vec![Hold, Lift]),
            (vec![Place], vec![Hold, Place, Remove, Lift]),
            (vec![Place, Remove], vec![Hold, Place, Remove, Lift]),
            (vec![Speak], vec![Hold, Place, Speak, Remove, GiveBack, Lift]),
            (vec![Announce, Remove, GiveBack], vec![Hold, Place, Speak, Announce, Remove, GiveBack, Lift]),
        ] {
            let ground = Scripted::failing(&failing);
            let mut arriving = Arriving::new(ground.clone());
            assert!(arriving.prepare().and_then(|()| arriving.announce()).is_err(), "{failing:?}");
            drop(arriving);
            assert_eq!(ground.taken(), expected, "{failing:?}");
        }
    }
}
