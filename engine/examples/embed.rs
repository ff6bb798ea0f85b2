//! How another migrator calls pageferry: both sides as a library, with an observer of its own.
//!
//! ```text
//! cargo run --release -p pageferry --example embed -- receive 127.0.0.1:7077
//! cargo run --release -p pageferry --example embed -- send PID 127.0.0.1:7077
//! ```

use pageferry::{Cancel, Event, MigrationError, Observer, ReceivePlan, Receiver, SendPlan};
use std::error::Error;

/// Tells the steps that matter to this program.
struct Steps;

impl Observer for Steps {
    fn event(&self, event: &Event) {
        match event {
            Event::RoundEnded(round) => {
                println!(
                    "round {}: {} dirty pages, {} bytes",
                    round.round, round.dirty_pages, round.sent_bytes
                );
            }
            Event::Resumed { pid } => println!("runs there as process {pid}"),
            Event::Discarded { reason } => println!("discarded: {reason}"),
            Event::RolledBack { reason } => println!("rolled back: {reason}"),
            _ => {}
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    // A program would cancel from a signal handler or a user's click; the token may be cloned.
    let cancel = Cancel::new()?;
    match arguments[..] {
        ["receive", listen] => {
            let mut plan = ReceivePlan::new(listen.parse()?);
            // This program's network is its own: everybody in it may start programs here.
            plan.insecure = true;
            let receiver = Receiver::bind(plan)?;
            println!("listening on {}", receiver.local_addr());
            receiver.serve(true, &Steps, &cancel)?;
        }
        ["send", pid, to] => {
            let mut plan = SendPlan::new(pid.parse()?, to.parse::<std::net::SocketAddr>()?);
            plan.verify = true;
            match pageferry::send(&plan, &Steps, &cancel) {
                Ok(report) => println!(
                    "{} pages compared, downtime {:?}",
                    report.verified_pages,
                    report.downtime_us.total()
                ),
                Err(MigrationError { source_state, destination_state, cause, .. }) => {
                    return Err(
                        format!("{cause} (source {source_state}, destination {destination_state})").into()
                    );
                }
            }
        }
        _ => return Err("usage: embed receive ADDRESS | embed send PID ADDRESS".into()),
    }
    Ok(())
}
