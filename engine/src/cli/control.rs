//! `pageferry control`.

use super::failure::REFUSED;
use super::render::printable;
use super::units::{Bytes, Percent, Rate, Share, micros};
use clap::{Args, Subcommand};
use pageferry::control::{Answer, AskError, ErrorKind, Request, Status, ask, path_of};
use std::error::Error;
use std::fmt::Write;
use std::path::PathBuf;

/// What was asked for may have been done, or not.
const FAILED: u8 = 1;

#[derive(Debug, Args)]
#[command(disable_help_subcommand = true)]
pub(super) struct ControlVerb {
    /// The program that is moved: the process that `migrate` was given.
    #[arg(long, value_name = "PID", required_unless_present = "socket")]
    pid: Option<i32>,
    /// The socket of `migrate --control PATH` [default: /run/pageferry/migrate-PID.sock].
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The answer as one JSON object (docs/CONTROL.md).
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Says how far it is.
    Status,
    /// Sends nothing any more until it is resumed; the program runs at its full pace. Not from the freeze on.
    Pause,
    /// Goes on.
    Resume,
    /// Gives it up: the program runs on here. Not from the commit on.
    Cancel,
    /// Ends the rounds now: the program goes on at the destination, and the rest of its memory follows.
    PostCopy,
    /// Limits what it sends from now on.
    Bandwidth {
        /// Such as 1Gbit or 100MB (a second), or none.
        #[arg(value_name = "RATE|none", value_parser = limit)]
        rate: Limit,
    },
    /// Lets the program lose so much of its running time from now on. Not from the freeze on.
    MaxSlowdown {
        /// Such as 5%, or none: as much as it takes.
        #[arg(value_name = "SHARE|none", value_parser = ceiling)]
        share: Ceiling,
    },
    /// Lets the engine take so much of one processor from now on. Not while the program stands still.
    Cpu {
        /// Such as 50%, or none: as much as makes the migration quicker.
        #[arg(value_name = "PERCENT|none", value_parser = percent)]
        percent: Processor,
    },
    /// Lets the engine take so much memory for itself from now on; caches are made smaller or larger. Not from the freeze on.
    EngineMemory {
        /// Such as 64MiB, or none: as much as it takes.
        #[arg(value_name = "SIZE|none", value_parser = size)]
        size: Size,
    },
}

/// A size, or none.
#[derive(Clone, Copy, Debug)]
struct Size(Option<u64>);

fn size(text: &str) -> Result<Size, String> {
    match text {
        "none" => Ok(Size(None)),
        text => text.parse().map(|Bytes(bytes)| Size(Some(bytes))),
    }
}

/// A share of one processor, or none.
#[derive(Clone, Copy, Debug)]
struct Processor(Option<u32>);

fn percent(text: &str) -> Result<Processor, String> {
    match text {
        "none" => Ok(Processor(None)),
        text => text.parse().map(|Percent(percent)| Processor(Some(percent))),
    }
}

/// A share, or none.
#[derive(Clone, Copy, Debug)]
struct Ceiling(Option<f64>);

fn ceiling(text: &str) -> Result<Ceiling, String> {
    match text {
        "none" => Ok(Ceiling(None)),
        text => text.parse().map(|Share(share)| Ceiling(Some(share))),
    }
}

/// A rate, or none.
#[derive(Clone, Copy, Debug)]
struct Limit(Option<u64>);

fn limit(text: &str) -> Result<Limit, String> {
    match text {
        "none" => Ok(Limit(None)),
        text => text.parse().map(|Rate(rate)| Limit(Some(rate))),
    }
}

/// Runs the verb.
pub(super) fn run(verb: &ControlVerb) -> anyhow::Result<u8> {
    let request = match verb.what {
        What::Status => Request::Status {},
        What::Pause => Request::Pause {},
        What::Resume => Request::Resume {},
        What::Cancel => Request::Cancel {},
        What::PostCopy => Request::PostCopy {},
        What::Bandwidth { rate: Limit(bytes_per_second) } => Request::Bandwidth { bytes_per_second },
        What::MaxSlowdown { share: Ceiling(share) } => Request::MaxSlowdown { share },
        What::Cpu { percent: Processor(percent) } => Request::Cpu { percent },
        What::EngineMemory { size: Size(bytes) } => Request::EngineMemory { bytes },
    };
    let path = verb.socket.clone().unwrap_or_else(|| path_of(verb.pid.unwrap_or_default()));
    let answer = match ask(&path, &request) {
        Ok(answer) => answer,
        Err(error) => {
            eprint!("{}", failure(&error));
            return Ok(match error {
                AskError::Nobody(_) | AskError::NotAllowed(_) => REFUSED,
                _ => FAILED,
            });
        }
    };
    if verb.json {
        let mut line = serde_json::to_vec(&answer)?;
        line.push(b'\n');
        super::print(&line)?;
    }
    match &answer {
        Answer { ok: true, status: Some(status), .. } => {
            if !verb.json {
                super::print(printable(&describe(status)).as_bytes())?;
            }
            Ok(0)
        }
        Answer { error, message, .. } => {
            let message = message.as_deref().unwrap_or("no reason was given");
            let what = if *error == Some(ErrorKind::Refused) { "refused because " } else { "" };
            eprintln!("error: {what}{}", printable(message));
            match error {
                Some(ErrorKind::NotAllowed) => eprintln!("  try: run it as root"),
                Some(ErrorKind::BadRequest) => {
                    eprintln!("  try: the migration may be another version's: pageferry --version");
                }
                _ => {}
            }
            Ok(REFUSED)
        }
    }
}

fn failure(error: &AskError) -> String {
    let mut text = format!("error: {}\n", printable(&error.to_string()));
    if let Some(cause) = error.source() {
        let _ = writeln!(text, "  because: {}", printable(&cause.to_string()));
    }
    let help = match error {
        AskError::Nobody(_) => {
            "is `pageferry migrate` of this process running here, and over no other --control?"
        }
        AskError::NotAllowed(_) => "run it as root",
        _ => return text,
    };
    let _ = writeln!(text, "  try: {help}");
    text
}

/// The status as people read it.
fn describe(status: &Status) -> String {
    let mut text = status.stage.name().to_owned();
    if status.paused {
        text += ", paused";
    }
    if status.link_away {
        text += ", waiting for the link";
    }
    if status.cancelled {
        text += ", being given up";
    }
    text += "\n";
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<20}{value}");
    };
    line("round", status.round.to_string());
    line("pages", format!("{} of {}", status.done_pages, status.total_pages));
    line("sent", Bytes(status.sent_bytes).to_string());
    line("bandwidth", status.bandwidth.map_or_else(|| "no limit".to_owned(), |rate| Rate(rate).to_string()));
    if let Some(share) = status.max_slowdown {
        line("may lose", format!("{:.1} % of its running time", share * 100.0));
    }
    if let Some(percent) = status.cpu {
        line("processor", format!("{percent} % of one at most"));
    }
    if let Some(bytes) = status.engine_memory {
        line("engine memory", format!("{} at most", Bytes(bytes)));
    }
    if status.throttle_share > 0.0 {
        line("slowed down by", format!("{:.0} %", status.throttle_share * 100.0));
    }
    if let Some(us) = status.predicted_downtime_us {
        line("predicted downtime", micros(us).to_string());
    }
    if status.post_copy {
        line("the rest", "comes after the program".to_owned());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_a_rate_or_none() {
        assert_eq!(limit("none").unwrap().0, None);
        assert_eq!(limit("100MB").unwrap().0, Some(100_000_000));
        assert_eq!(limit("1Gbit").unwrap().0, Some(125_000_000));
        assert_eq!((ceiling("none").unwrap().0, ceiling("5%").unwrap().0), (None, Some(0.05)));
        assert!(ceiling("5").is_err() && ceiling("200%").is_err());
        assert!(limit("0").is_err() && limit("fast").is_err() && limit("").is_err());
    }

    #[test]
    fn a_status_tells_what_matters() {
        let mut status = Status::default();
        assert_eq!(
            describe(&status),
            "preparing\nround               0\npages               0 of 0\nsent                0 B\nbandwidth           no limit\n"
        );
        status.stage = pageferry::control::Stage::PreCopy;
        status.paused = true;
        status.link_away = true;
        status.throttle_share = 0.25;
        status.bandwidth = Some(12_500_000);
        status.max_slowdown = Some(0.05);
        status.engine_memory = Some(64 << 20);
        status.predicted_downtime_us = Some(1500);
        status.post_copy = true;
        let text = describe(&status);
        for part in [
            "pre-copy, paused, waiting for the link\n",
            "25 %",
            "5.0 % of its running time",
            "64.0 MiB at most",
            "12.5 MB/s",
            "1.50 ms",
            "comes after the program",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
