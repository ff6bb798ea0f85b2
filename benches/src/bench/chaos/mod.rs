//! Kills what takes part in a migration, at moments that a seed chooses, and looks what becomes of the program.
//!
//! Real migrations, and real SIGKILLs (or a link that goes down). Then what an operator would do: wait for what is left, start a
//! receiver where one is missing, and call `pageferry recover` on both sides; where that says that only a person can know, do what it prints. In the
//! end exactly one copy of the program runs, its whole memory is what it must be, and nothing else is left.

mod field;
mod strike;

use super::Common;
use super::hosts::Host;
use super::table::Table;
use crate::workload::content::Random;
use anyhow::ensure;
use clap::Args;
use field::{Decided, Field, Memory};
use serde::Serialize;
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

/// Options of this measurement.
#[derive(Clone, Debug, Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// What the faults and their moments follow from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only this fault
    #[arg(long, value_enum)]
    fault: Option<Fault>,
}

/// What happens to a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Fault {
    /// SIGKILL to the engine at the source
    SourceEngine,
    /// SIGKILL to the engine at the destination
    DestinationEngine,
    /// SIGKILL to both engines
    BothEngines,
    /// SIGKILL to CRIU at the source
    SourceCriu,
    /// SIGKILL to CRIU at the destination
    DestinationCriu,
    /// SIGKILL to the program, wherever there is a copy
    Target,
    /// The link is down for some seconds, longer than the engines wait
    Link,
}

const FAULTS: [Fault; 7] = [
    Fault::SourceEngine,
    Fault::DestinationEngine,
    Fault::BothEngines,
    Fault::SourceCriu,
    Fault::DestinationCriu,
    Fault::Target,
    Fault::Link,
];
const STRATEGIES: [&str; 5] = ["auto", "pre-copy", "hybrid", "post-copy", "stop-and-copy"];

/// When it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moment {
    /// So long after the start.
    After(Duration),
    /// So long after a side has written this step into its journal.
    Step(Host, &'static str, Duration),
}

impl Moment {
    fn name(self) -> String {
        match self {
            Self::After(_) => "pre-copy".to_owned(),
            Self::Step(host, step, _) => format!("{} {step}", host.name()),
        }
    }

    fn delay(self) -> Duration {
        match self {
            Self::After(delay) | Self::Step(_, _, delay) => delay,
        }
    }
}

/// One migration and its fault.
#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    pub(super) strategy: &'static str,
    pub(super) fault: Fault,
    pub(super) moment: Moment,
    pub(super) verify: bool,
}

/// The cases of a seed: every fault in turn, all else by lot.
fn cases(seed: u64, only: Option<Fault>, count: usize) -> Vec<Case> {
    let mut random = Random::new(seed);
    (0..count)
        .map(|index| {
            let fault = only.unwrap_or(FAULTS[index % FAULTS.len()]);
            let strategy = STRATEGIES[random.below(STRATEGIES.len())];
            // Around the commit a few milliseconds are whole phases.
            let short = Duration::from_micros(random.below(20_000) as u64);
            let moment = match random.below(10) {
                0 | 1 => Moment::After(Duration::from_millis(random.below(1500) as u64)),
                2 => Moment::Step(Host::Source, "frozen", short),
                3 => Moment::Step(Host::Source, "frozen", 3 * short),
                4 => Moment::Step(Host::Destination, "ready", short),
                5 => Moment::Step(Host::Source, "held", short / 10),
                6 => Moment::Step(Host::Source, "committing", short / 10),
                7 => Moment::Step(Host::Destination, "committing", short / 4),
                8 => Moment::Step(Host::Destination, "resumed", short),
                _ => Moment::Step(Host::Destination, "resumed", 10 * short),
            };
            Case { strategy, fault, moment, verify: random.below(3) == 0 }
        })
        .collect()
}

/// What became of it.
#[derive(Clone, Debug, Serialize)]
struct Row {
    run: usize,
    fault: Fault,
    strategy: &'static str,
    /// The last thing that was waited for, and how long after it.
    phase: String,
    after_us: u64,
    /// Whether the fault came before everything was over.
    struck: bool,
    /// Exit code of `pageferry migrate`; 137 when it was killed.
    exit_code: i32,
    /// Who brought it to its end.
    decided: Decided,
    /// Where copies run in the end.
    survivors: Vec<&'static str>,
    memory_ok: Memory,
    /// Processes, mounts, rules and journals that are left.
    left_over: Vec<String>,
    pass: bool,
}

/// Runs the cases and prints what became of each. The exit status is a failure if any did not end as it must.
///
/// # Errors
/// What kept it from running.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    ensure!(options.common.runs > 0, "--runs must be at least 1");
    let field = Field::new(&options.common)?;
    let mut rows = Vec::new();
    for (index, case) in cases(options.seed, options.fault, options.common.runs).into_iter().enumerate() {
        let end = field.play(index, case)?;
        // A program that was killed may be gone, or may have been moved before.
        let expected = match case.fault {
            Fault::Target => end.survivors.len() <= 1,
            _ => end.survivors.len() == 1,
        };
        let pass = expected && end.memory != Memory::Wrong && end.left_over.is_empty();
        let row = Row {
            run: index,
            fault: case.fault,
            strategy: case.strategy,
            phase: case.moment.name(),
            after_us: case.moment.delay().as_micros() as u64,
            struck: end.struck,
            exit_code: end.exit_code,
            decided: end.decided,
            survivors: end.survivors,
            memory_ok: end.memory,
            left_over: end.left_over,
            pass,
        };
        if !pass {
            eprintln!("{}", end.words);
        }
        match options.common.json {
            true => println!("{}", serde_json::to_string(&row)?),
            false => eprintln!("{}", describe(&row)),
        }
        rows.push(row);
    }
    if !options.common.json {
        print!("{}", render(&rows));
    }
    Ok(if rows.iter().all(|row| row.pass) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn describe(row: &Row) -> String {
    format!(
        "{:>3}  {:?}, {} at {} + {} us{}: exit {}, decided by {:?}, runs at {:?}, memory {:?}{}{}",
        row.run,
        row.fault,
        row.strategy,
        row.phase,
        row.after_us,
        if row.struck { "" } else { " (too late)" },
        row.exit_code,
        row.decided,
        row.survivors,
        row.memory_ok,
        if row.left_over.is_empty() { String::new() } else { format!(", left: {:?}", row.left_over) },
        if row.pass { "" } else { "  FAILED" },
    )
}

/// A line for each fault.
fn render(rows: &[Row]) -> String {
    let mut table = Table::new(&[
        "fault",
        "runs",
        "source",
        "destination",
        "ended",
        "engine",
        "recover",
        "person",
        "pass",
    ]);
    let mut by_fault: BTreeMap<Fault, Vec<&Row>> = BTreeMap::new();
    for row in rows {
        by_fault.entry(row.fault).or_default().push(row);
    }
    for (fault, rows) in by_fault {
        let count = |wanted: &dyn Fn(&Row) -> bool| rows.iter().filter(|row| wanted(row)).count().to_string();
        let name = serde_json::to_value(fault).ok();
        table.row(vec![
            name.as_ref().and_then(serde_json::Value::as_str).unwrap_or_default().to_owned(),
            rows.len().to_string(),
            count(&|row| row.survivors == ["source"]),
            count(&|row| row.survivors == ["destination"]),
            count(&|row| row.survivors.is_empty()),
            count(&|row| row.decided == Decided::Engine),
            count(&|row| row.decided == Decided::Recover),
            count(&|row| row.decided == Decided::Person),
            count(&|row| row.pass),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_its_cases_and_every_fault_has_its_turn() {
        let text = |seed| format!("{:?}", cases(seed, None, 40));
        assert_eq!(text(5), text(5));
        assert_ne!(text(5), text(6));
        for fault in FAULTS {
            assert!(cases(1, None, 7).iter().any(|case| case.fault == fault));
        }
        for strategy in STRATEGIES {
            assert!(cases(1, None, 40).iter().any(|case| case.strategy == strategy), "{strategy}");
        }
        assert!(cases(1, Some(Fault::Link), 9).iter().all(|case| case.fault == Fault::Link));
    }
}
