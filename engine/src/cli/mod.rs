//! The command line: for people first, with `--json` for programs.

mod arguments;
mod calibration;
mod check;
mod checkpoint;
mod control;
mod failure;
mod inspect;
mod migrate;
mod predict;
mod progress;
mod receive;
mod recover;
mod render;
mod restore;
mod signals;
mod simulate;
mod track;
mod units;

use arguments::{Arguments, Verb};
use clap::{CommandFactory, Parser};
use std::io::Write;
use std::process::ExitCode;

/// Parses the arguments and runs what they ask for.
pub fn run() -> ExitCode {
    // What `pageferry check` dumps and restores is this program itself.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == check::SUBJECT) {
        return pageferry_criu_glue::check::subject_main();
    }
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let code = if error.use_stderr() { failure::USAGE } else { 0 };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    trace(arguments.verbose);
    let result = match arguments.verb {
        Verb::Check(verb) => check::run(&verb),
        Verb::Receive(verb) => receive::run(verb),
        Verb::Migrate(verb) => migrate::run(&verb),
        Verb::Control(verb) => control::run(&verb),
        Verb::Predict(verb) => predict::run(&verb),
        Verb::Simulate(verb) => simulate::run(&verb),
        Verb::Checkpoint(verb) => checkpoint::run(&verb),
        Verb::Inspect(verb) => inspect::run(&verb),
        Verb::Restore(verb) => restore::run(verb),
        Verb::Track(verb) => track::run(&verb),
        Verb::Recover(verb) => recover::run(&verb),
        Verb::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "pageferry", &mut text);
            print(&text)
        }
        Verb::Man { dir } => man(dir.as_deref()),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(failure::REFUSED)
        }
    }
}

/// Writes to standard output; a reader that has gone away (`| head`) is no failure.
fn print(text: &[u8]) -> anyhow::Result<u8> {
    match std::io::stdout().write_all(text) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(0),
    }
}

fn man(dir: Option<&std::path::Path>) -> anyhow::Result<u8> {
    match dir {
        Some(dir) => {
            clap_mangen::generate_to(Arguments::command(), dir)?;
            Ok(0)
        }
        None => {
            let mut text = Vec::new();
            clap_mangen::Man::new(Arguments::command()).render(&mut text)?;
            print(&text)
        }
    }
}

/// Diagnostics of the libraries, on standard error: warnings, more with `-v`, anything by `RUST_LOG`.
fn trace(verbose: u8) {
    use tracing_subscriber::EnvFilter;
    let level = ["warn", "info", "debug", "trace"][usize::from(verbose.min(3))];
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
}
