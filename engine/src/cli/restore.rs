//! `pageferry restore`.

use super::arguments::RestoreVerb;
use super::failure::{describe, exit_code};
use super::progress::{JsonLines, Plain};
use super::signals;
use pageferry::{Observer, RestorePlan};

/// Runs the verb.
pub(super) fn run(verb: RestoreVerb) -> anyhow::Result<u8> {
    let mut plan = RestorePlan::new(verb.path);
    plan.memory_limit = verb.memory_limit.map(|bytes| bytes.0);
    plan.criu = verb.criu;
    plan.stall_timeout = verb.stall_timeout.0;
    let cancel = signals::token()?;
    let observer: &dyn Observer = if verb.json { &JsonLines } else { &Plain };
    match pageferry::restore(&plan, observer, &cancel) {
        Ok(()) => Ok(0),
        Err(error) => {
            eprint!("{}", describe(&error));
            Ok(exit_code(&error, cancel.signal()))
        }
    }
}
