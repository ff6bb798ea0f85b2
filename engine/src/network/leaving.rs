//! The source's side: an address that leaves, step by step, and what is undone when the program stays.

use super::NetworkError;
use super::ground::{Ground, Step};

/// How far it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// Nothing was done.
    Fresh,
    /// The destination may have told everybody that it has the address.
    Announced,
    /// Nothing gets in or out.
    Blocked,
    /// The address is not here.
    Gone,
    /// Nothing is left to do or to undo.
    Over,
}

/// Addresses that leave with a program. Dropped before [`Leaving::let_go`], everything is as it was.
#[derive(Debug)]
pub(crate) struct Leaving<G: Ground> {
    ground: G,
    stage: Stage,
}

impl<G: Ground> Leaving<G> {
    pub(crate) fn new(ground: G) -> Self {
        Self { ground, stage: Stage::Fresh }
    }

    /// The destination is about to announce the addresses. Packets that were on their way still get in here.
    pub(crate) fn announced(&mut self) {
        self.stage = self.stage.max(Stage::Announced);
    }

    /// Before the sockets are read: from here on neither a byte nor an acknowledgement gets in or out that the copy would
    /// not know of.
    pub(crate) fn block(&mut self) -> Result<(), NetworkError> {
        self.stage = self.stage.max(Stage::Blocked);
        self.ground.take(Step::Hold)
    }

    /// With the commit: the addresses are the destination's.
    pub(crate) fn remove(&mut self) -> Result<(), NetworkError> {
        self.stage = Stage::Gone;
        self.ground.take(Step::Remove)
    }

    /// The program is not here any more, or may not run here: the addresses do not come back.
    pub(crate) fn let_go(&mut self) -> Result<(), NetworkError> {
        let steps: &[Step] = match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Over => &[],
            Stage::Gone => &[Step::Lift],
            Stage::Fresh | Stage::Announced | Stage::Blocked => &[Step::Remove, Step::Lift],
        };
        self.all(steps)
    }

    /// The program stays, and the addresses with it.
    pub(crate) fn take_back(&mut self) -> Result<(), NetworkError> {
        let steps: &[Step] = match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Fresh | Stage::Over => &[],
            Stage::Announced => &[Step::Announce],
            Stage::Blocked => &[Step::Lift, Step::Announce],
            Stage::Gone => &[Step::PutBack, Step::Lift, Step::Announce],
        };
        self.all(steps)
    }

    fn all(&mut self, steps: &[Step]) -> Result<(), NetworkError> {
        steps.iter().map(|step| self.ground.take(*step)).fold(Ok(()), Result::and)
    }
}

impl<G: Ground> Drop for Leaving<G> {
    fn drop(&mut self) {
        if let Err(error) = self.take_back() {
            tracing::error!(%error, "an address that was to leave could not be taken back cleanly");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::ground::scripted::Scripted;
    use super::*;
    use Step::{Announce, Hold, Lift, PutBack, Remove};

    #[test]
    fn the_address_leaves() {
        let ground = Scripted::default();
        let mut leaving = Leaving::new(ground.clone());
        leaving.announced();
        leaving.block().unwrap();
        leaving.remove().unwrap();
        leaving.let_go().unwrap();
        drop(leaving);
        assert_eq!(ground.taken(), [Hold, Remove, Lift]);
    }

    #[test]
    fn it_comes_back_from_wherever_it_was() {
        let run = |until: usize| {
            let ground = Scripted::default();
            let mut leaving = Leaving::new(ground.clone());
            if until > 0 {
                leaving.announced();
            }
            if until > 1 {
                leaving.block().unwrap();
            }
            if until > 2 {
                leaving.remove().unwrap();
            }
            drop(leaving);
            ground.taken()
        };
        assert_eq!(run(0), []);
        assert_eq!(run(1), [Announce]);
        assert_eq!(run(2), [Hold, Lift, Announce]);
        assert_eq!(run(3), [Hold, Remove, PutBack, Lift, Announce]);
    }

    #[test]
    fn a_program_that_may_run_elsewhere_leaves_no_address_here() {
        let ground = Scripted::default();
        let mut leaving = Leaving::new(ground.clone());
        leaving.announced();
        leaving.block().unwrap();
        leaving.let_go().unwrap();
        drop(leaving);
        assert_eq!(ground.taken(), [Hold, Remove, Lift]);
    }

    #[test]
    fn no_failure_stops_the_undoing() {
        let ground = Scripted::failing(&[Hold, Lift]);
        let mut leaving = Leaving::new(ground.clone());
        leaving.announced();
        assert!(leaving.block().is_err());
        assert!(leaving.take_back().is_err());
        drop(leaving);
        assert_eq!(ground.taken(), [Hold, Lift, Announce]);
    }
}
