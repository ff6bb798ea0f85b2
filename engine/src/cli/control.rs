//! `pageferry control`.

use super::failure::REFUSED;
use super::render::printable;
use super::units::{Bytes, Percent, Rate, Share, micros};
use clap::{Args, Subcommand};
use pageferry::control::{
    Answer, AskError, ControlSocket, Controlled, ErrorKind, ReceiverStatus, Request, Status, ask, path_of,
    receiver_path_of,
};
use pageferry::{Event, Observer};
use std::error::Error;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// What was asked for may have been done, or not.
const FAILED: u8 = 1;

#[derive(Debug, Args)]
#[command(disable_help_subcommand = true)]
pub(super) struct ControlVerb {
    /// The program that is moved: the process that `migrate` was given.
    #[arg(long, value_name = "PID", required_unless_present_any = ["socket", "receiver"])]
    pid: Option<i32>,
    /// The receiver that listens on this port here. It is told `status`, `cpu`, `engine-memory` and `memory-limit`.
    #[arg(long, value_name = "PORT", conflicts_with = "pid")]
    receiver: Option<u16>,
    /// The socket of `migrate --control PATH` or `receive --control PATH` [default: /run/pageferry/migrate-PID.sock, or
    /// receive-PORT.sock there].
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
    /// Lets the engine take so much of one processor from now on. A migration: not while the program stands still.
    Cpu {
        /// Such as 50%, or none: as much as makes the migration quicker.
        #[arg(value_name = "PERCENT|none", value_parser = percent)]
        percent: Processor,
    },
    /// Lets the engine take so much memory for itself from now on; caches are made smaller or larger. Not from the freeze on: a receiver holds
    /// to it for the next program then.
    EngineMemory {
        /// Such as 64MiB, or none: as much as it takes.
        #[arg(value_name = "SIZE|none", value_parser = size)]
        size: Size,
    },
    /// Lets received pages and their index take so much memory from now on, and not less than was promised to a program that comes. For
    /// receivers.
    MemoryLimit {
        /// Such as 4GiB, or none: what the machine has free.
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

/// Opens the socket by which others have a say in what runs here: at `path`, or `usual`; `none` is nowhere. An engine without it is one all the
/// same.
pub(super) fn open_socket(
    path: Option<&Path>,
    usual: PathBuf,
    control: impl Controlled,
    observer: &dyn Observer,
) -> Option<ControlSocket> {
    // Whoever is not root is refused, with the reason.
    if path == Some(Path::new("none")) || !nix::unistd::geteuid().is_root() {
        return None;
    }
    match ControlSocket::open(path.unwrap_or(&usual), control) {
        Ok(socket) => Some(socket),
        Err(error) => {
            let cause = error.source().map_or_else(String::new, |cause| format!(": {cause}"));
            let text = format!("`pageferry control` cannot reach this engine: {error}{cause}");
            observer.event(&Event::Warning { text });
            None
        }
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
        What::MemoryLimit { size: Size(bytes) } => Request::MemoryLimit { bytes },
    };
    let path = match (&verb.socket, verb.receiver) {
        (Some(socket), _) => socket.clone(),
        (None, Some(port)) => receiver_path_of(port),
        (None, None) => path_of(verb.pid.unwrap_or_default()),
    };
    let answer = match ask(&path, &request) {
        Ok(answer) => answer,
        Err(error) => {
            eprint!("{}", failure(&error, verb.receiver.is_some()));
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
    let described = match &answer {
        Answer { ok: true, status: Some(status), .. } => Some(describe(status)),
        Answer { ok: true, receiver: Some(status), .. } => Some(describe_receiver(status)),
        _ => None,
    };
    if let Some(text) = described {
        if !verb.json {
            super::print(printable(&text).as_bytes())?;
        }
        return Ok(0);
    }
    let message = answer.message.as_deref().unwrap_or("no reason was given");
    let what = if answer.error == Some(ErrorKind::Refused) { "refused because " } else { "" };
    eprintln!("error: {what}{}", printable(message));
    match answer.error {
        Some(ErrorKind::NotAllowed) => eprintln!("  try: run it as root"),
        Some(ErrorKind::BadRequest) => {
            eprintln!("  try: the engine may be another version's: pageferry --version");
        }
        _ => {}
    }
    Ok(REFUSED)
}

fn failure(error: &AskError, receiver: bool) -> String {
    let mut text = format!("error: {}\n", printable(&error.to_string()));
    if let Some(cause) = error.source() {
        let _ = writeln!(text, "  because: {}", printable(&cause.to_string()));
    }
    let help = match error {
        AskError::Nobody(_) if receiver => {
            "is `pageferry receive` listening on this port here, and over no other --control?"
        }
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

/// The same of a receiver.
fn describe_receiver(status: &ReceiverStatus) -> String {
    let mut text = status.stage.name().to_owned();
    text += "\n";
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<20}{value}");
    };
    if let Some(program) = &status.program {
        line("program", program.clone());
        line("for", micros(status.elapsed_us).to_string());
    }
    if status.announced_bytes > 0 {
        line("announced", Bytes(status.announced_bytes).to_string());
        line("pages take", Bytes(status.page_bytes).to_string());
        line("their index", Bytes(status.index_bytes).to_string());
    }
    let limit = |limit: Option<u64>| {
        limit.map_or_else(|| "no limit".to_owned(), |bytes| format!("{} at most", Bytes(bytes)))
    };
    line("received pages", limit(status.memory_limit));
    line("engine memory", limit(status.engine_memory));
    line(
        "processor",
        status.cpu.map_or_else(|| "no limit".to_owned(), |percent| format!("{percent} % of one at most")),
    );
    if status.nice > 0 {
        line("nice value", status.nice.to_string());
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

    #[test]
    fn a_receiver_tells_what_it_holds_to() {
        let mut status = ReceiverStatus::default();
        assert_eq!(
            describe_receiver(&status),
            "waiting\nreceived pages      no limit\nengine memory       no limit\nprocessor           no limit\n"
        );
        status.stage = pageferry::control::ReceiverStage::Receiving;
        status.program = Some("redis-server".to_owned());
        (status.announced_bytes, status.page_bytes, status.index_bytes) = (1 << 30, 512 << 20, 6 << 20);
        (status.memory_limit, status.cpu, status.nice) = (Some(2 << 30), Some(50), 5);
        let text = describe_receiver(&status);
        for part in [
            "receiving\nprogram             redis-server\n",
            "announced           1.00 GiB\n",
            "pages take          512 MiB\n",
            "received pages      2.00 GiB at most\n",
            "processor           50 % of one at most\n",
            "nice value          5\n",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
