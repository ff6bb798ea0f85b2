//! `pageferry recover`.

use super::failure::REFUSED;
use super::progress::{Bars, Plain};
use super::render;
use super::units::Time;
use clap::Args;
use pageferry::journal::recover::{Choice, Finding, RecoverPlan, Recovered, recover};
use pageferry::journal::{self, Role};
use pageferry::{Observer, Silent, control};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

#[derive(Debug, Args)]
pub(super) struct RecoverVerb {
    /// Only this session: its identity, or the beginning of it.
    #[arg(long, value_name = "ID")]
    pub(super) session: Option<String>,
    /// Where nobody knows: the copy here is the program, and the other side has none. Let it run.
    #[arg(long, requires = "session", conflicts_with = "end_here")]
    pub(super) run_here: bool,
    /// Where nobody knows: the program runs at the other side. End the copy here.
    #[arg(long, requires = "session")]
    pub(super) end_here: bool,
    /// Say what would be done. The other side is asked all the same, and a commit that it has not got it will not take any more.
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Where the engines of this machine wrote down how far they were.
    #[arg(long, value_name = "DIR", default_value = journal::DIRECTORY)]
    pub(super) journal: PathBuf,
    /// How long to try to ask the other side.
    #[arg(long, value_name = "TIME", default_value = "5s")]
    pub(super) timeout: Time,
    /// One JSON object a session.
    #[arg(long)]
    pub(super) json: bool,
}

/// It is not known which copy is the program.
const IN_DOUBT: u8 = 4;

/// Runs the verb.
pub(super) fn run(verb: &RecoverVerb) -> anyhow::Result<u8> {
    let choice = match (verb.run_here, verb.end_here) {
        (true, _) => Some(Choice::RunHere),
        (_, true) => Some(Choice::EndHere),
        _ => None,
    };
    let plan = RecoverPlan {
        journal: verb.journal.clone(),
        session: verb.session.clone(),
        choice,
        dry_run: verb.dry_run,
        patience: verb.timeout.0,
    };
    // With --json every line is a session's.
    let observer: &dyn Observer = match (verb.json, std::io::stderr().is_terminal()) {
        (true, _) => &Silent,
        (false, true) => &Bars::new(),
        (false, false) => &Plain,
    };
    let Recovered { findings, broken, cleaned } = recover(&plan, observer)?;
    if !verb.dry_run {
        control::sweep(Path::new(control::DIRECTORY));
    }
    for text in &cleaned {
        eprintln!("{text}");
    }
    for error in &broken {
        eprintln!("warning: {error}");
    }
    if verb.json {
        for finding in &findings {
            let mut line = serde_json::to_vec(finding)?;
            line.push(b'\n');
            super::print(&line)?;
        }
    } else if findings.is_empty() {
        super::print(b"no engine has left anything behind here\n")?;
    } else {
        super::print(render(&findings).as_bytes())?;
    }
    Ok(match () {
        () if findings.iter().any(|finding| !finding.settled) => IN_DOUBT,
        () if !broken.is_empty() => REFUSED,
        () => 0,
    })
}

fn render(findings: &[Finding]) -> String {
    let mut text = String::new();
    for Finding { entry, text: what, .. } in findings {
        let begin = &entry.begin;
        let (side, other) = match begin.role {
            Role::Source => ("left for", &begin.peer),
            Role::Destination => ("came from", &begin.peer),
        };
        let (program, session) = (render::printable(&begin.program), &begin.session[..8]);
        text += &format!("{session}  {program}, {side} {other}, {}\n          {what}\n", entry.step);
    }
    text
}
