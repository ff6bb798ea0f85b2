//! Moves programs between two hosts and measures.

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let command = pageferry_benches::bench::Command::parse();
    match command.run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("pageferry-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
