//! The programs that are migrated, and the redis client that watches one move.

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let command = pageferry_benches::workload::Command::parse();
    match command.run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("pageferry-workload: {error:#}");
            ExitCode::FAILURE
        }
    }
}
