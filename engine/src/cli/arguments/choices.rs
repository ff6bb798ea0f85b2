//! What migrations, predictions and simulations are asked alike.

use clap::ValueEnum;
use pageferry::{PolicyChoice, Strategy};

/// Where earlier migrations of this machine are remembered.
pub(in crate::cli) const CALIBRATION: &str = "/var/lib/pageferry/calibration.json";

/// Reads `adaptive` and `fixed:N`.
pub(in crate::cli) fn policy(text: &str) -> Result<PolicyChoice, String> {
    match text.split_once(':') {
        None if text == "adaptive" => Ok(PolicyChoice::Adaptive),
        Some(("fixed", rounds)) => match rounds.parse() {
            Ok(rounds) if rounds > 0 => Ok(PolicyChoice::Fixed(rounds)),
            _ => Err(format!("{rounds} is not a number of rounds")),
        },
        _ => Err("adaptive and fixed:N are known".to_owned()),
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(in crate::cli) enum StrategyName {
    /// Whichever of these serves the goals (--downtime, --total-time, --bandwidth), by what is measured on the way.
    Auto,
    /// All of it while the program stands still: for comparisons, and for links that are faster than its memory is large.
    StopAndCopy,
    /// Memory first: a failure at any time costs nothing.
    PreCopy,
    /// The program first: it stands still shortest, and waits for what it touches; if either machine is lost before all has come, it is.
    PostCopy,
    /// Memory in rounds, then the program, then what it had written last.
    Hybrid,
}

impl StrategyName {
    /// The choice in the words of the library.
    pub(in crate::cli) fn choice(self) -> Strategy {
        match self {
            StrategyName::Auto => Strategy::Auto,
            StrategyName::StopAndCopy => Strategy::StopAndCopy,
            StrategyName::PreCopy => Strategy::PreCopy,
            StrategyName::PostCopy => Strategy::PostCopy,
            StrategyName::Hybrid => Strategy::Hybrid,
        }
    }
}
