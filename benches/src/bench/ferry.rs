//! A migration by the `pageferry` command, and what its report says.

use super::child::{Running, TimedLine, wait_for};
use super::hosts::{Host, Hosts};
use super::rss::{Peaks, find, resident};
use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

/// Longest time that a migration takes here.
const LIMIT: Duration = Duration::from_secs(600);
/// Where `pageferry` remembers what migrations took.
pub const CALIBRATION: &str = "--calibration";
/// Port of the receiver.
const PORT: u16 = 7077;

/// The part of a report that is measured by.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Report {
    /// How the migration ended.
    pub outcome: String,
    /// Why pre-copy ended.
    pub stop_reason: String,
    /// Dirty tracker.
    pub tracker: String,
    /// How CRIU was kept from the memory.
    pub hide: String,
    /// Rounds.
    pub rounds: Vec<Round>,
    /// Bytes on the wire, CRIU's images included.
    pub bytes_sent: u64,
    /// Of these, CRIU's images.
    pub image_bytes: u64,
    /// Whole time.
    pub total_us: u64,
    /// When all of its memory was there, which post-copy reaches later.
    pub complete_us: u64,
    /// Downtime.
    pub downtime_us: Downtime,
    /// Share of the time for which the program was made to stand still before the freeze.
    pub throttle_share: f64,
    /// Pages that came after the program.
    pub post_copy: Option<PostCopy>,
    /// What became of established TCP connections.
    pub tcp: String,
    /// What moved of the network.
    pub network: Option<Network>,
}

/// The network in the report.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Network {
    /// Established connections that were kept.
    pub connections: u64,
    /// From the announcement to the delivery of what waited.
    pub away_us: u64,
    /// Packets that waited.
    pub held_packets: u64,
}

/// Owed pages in the report.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct PostCopy {
    /// Pages that were owed.
    pub owed_pages: u64,
    /// Until none was.
    pub duration_us: u64,
    /// How long threads waited for them.
    pub faults: Faults,
}

/// Times of page faults in the report.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Faults {
    /// How many.
    pub count: u64,
    /// The median.
    pub p50_us: u64,
    /// 99 of 100 were not longer.
    pub p99_us: u64,
    /// The longest.
    pub max_us: u64,
}

/// Downtime in the report.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Downtime {
    /// All of it.
    pub total: u64,
    /// Until the destination was ready to let the program run.
    pub restore: u64,
}

/// A round in the report.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Round {
    /// Pages that were dirty, or had never been sent.
    pub dirty_pages: u64,
    /// Pages whose bytes were sent.
    pub sent_pages: u64,
    /// Bytes on the wire.
    pub sent_bytes: u64,
    /// From the scan until the acknowledgement.
    pub duration_us: u64,
    /// Whether it ran in the freeze.
    pub frozen: bool,
    /// How its pages travelled, by the name of the coding.
    pub codings: BTreeMap<String, Share>,
}

/// What went by a coding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Share {
    /// Pages.
    pub pages: u64,
    /// Bytes on the wire for them.
    pub bytes: u64,
}

impl Report {
    /// How pages travelled in all rounds, by the name of the coding.
    pub fn codings(&self) -> BTreeMap<String, Share> {
        let mut all = BTreeMap::<String, Share>::new();
        for (name, share) in self.rounds.iter().flat_map(|round| &round.codings) {
            let sum = all.entry(name.clone()).or_default();
            sum.pages += share.pages;
            sum.bytes += share.bytes;
        }
        all
    }

    /// Time of all rounds before the freeze, in seconds.
    pub fn precopy_s(&self) -> f64 {
        let live = self.rounds.iter().filter(|round| !round.frozen);
        live.map(|round| round.duration_us).sum::<u64>() as f64 / 1e6
    }
}

/// A migration that succeeded.
#[derive(Clone, Debug)]
pub struct Migration {
    /// Its report.
    pub report: Report,
    /// Events that the source printed.
    pub events: Vec<TimedLine>,
    /// Largest resident size of the source's engine as the kernel counted it (VmHWM), sampled from outside.
    pub engine_peak_bytes: u64,
    /// Most that all processes of the destination had in memory at a time (the sum of their VmRSS), sampled from outside.
    pub destination_peak_bytes: u64,
}

impl Migration {
    /// When an event was first printed (microseconds since 1970).
    pub fn event_us(&self, name: &str) -> Option<u64> {
        self.events.iter().find_map(|line| {
            let event: serde_json::Value = serde_json::from_str(&line.text).ok()?;
            (event.get("event")?.as_str()? == name).then_some(line.at_us)
        })
    }
}

/// The `pageferry` command.
#[derive(Clone, Debug)]
pub struct Ferry {
    program: PathBuf,
    /// Memory that the receiver makes ready before the migration begins, in bytes.
    standby: u64,
}

impl Ferry {
    /// The command at this path.
    pub fn new(program: PathBuf) -> Self {
        Self { program, standby: 0 }
    }

    /// The same, with a receiver that has so many bytes of memory ready before the migration begins.
    pub fn with_standby(&self, bytes: u64) -> Self {
        Self { standby: bytes, ..self.clone() }
    }

    /// The command itself.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Moves a process from the source to the destination.
    ///
    /// # Errors
    /// What failed, with the last words of both sides.
    pub fn migrate(
        &self,
        hosts: &Hosts,
        scratch: &Path,
        pid: i32,
        options: &[&str],
    ) -> anyhow::Result<Migration> {
        let program = self.program.to_string_lossy().into_owned();
        let listen = format!("{}:{PORT}", Host::Destination.address());
        let standby = self.standby.to_string();
        let receive = ["receive", "--listen", &listen, "--insecure", "--once", "--standby", &standby];
        let mut receiver = Running::start(
            "pageferry receive",
            &mut hosts.exec(Host::Destination, [program.as_str()].iter().chain(&receive)),
        )?;
        receiver.wait_line("listening", Duration::from_secs(30))?;
        wait_for("the receiver's memory", LIMIT, || {
            let pid = find(&program, &listen);
            Ok((self.standby == 0 || pid.is_some_and(|pid| resident(pid) >= self.standby)).then_some(()))
        })?;
        let report = scratch.join("report.json");
        let _ = fs::remove_file(&report);
        let report_text = report.to_string_lossy().into_owned();
        let pid = pid.to_string();
        let mut migrate = vec![
            program.as_str(),
            "migrate",
            "--pid",
            &pid,
            "--to",
            &listen,
            "--report",
            &report_text,
            "--json",
        ];
        migrate.extend(options);
        // Clients of what is measured here connect again, unless their connections are what is measured.
        if !["--tcp", "--move-address"].iter().any(|own| options.contains(own)) {
            migrate.extend(["--tcp", "close"]);
        }
        // What is measured is the same in every run.
        if !options.contains(&"--strategy") {
            migrate.extend(["--strategy", "pre-copy"]);
        }
        // What other runs took is nothing to go by, and this one nothing to remember, unless that is what is measured.
        if !options.contains(&CALIBRATION) {
            migrate.extend([CALIBRATION, "none"]);
        }
        let mut sender = Running::start("pageferry migrate", &mut hosts.exec(Host::Source, &migrate))?;
        let peaks = Peaks::default();
        thread::scope(|scope| {
            scope.spawn(|| peaks.watch_sender(&program, &report_text));
            scope.spawn(|| peaks.watch_destination(&program, &listen));
            let finished = sender.finish(LIMIT);
            let ended = finished
                .with_context(|| format!("the receiver's last words:\n{}", receiver.last_words()))
                .and_then(|_| wait_for("the end of pageferry receive", LIMIT, || receiver.ended()));
            peaks.end();
            ended
        })?;
        let text = fs::read_to_string(&report)
            .with_context(|| format!("reading the report {}", report.display()))?;
        let report: Report = serde_json::from_str(&text).context("understanding the report")?;
        if report.outcome != "completed" {
            bail!("the report says {:?}", report.outcome);
        }
        Ok(Migration {
            report,
            events: sender.lines(),
            engine_peak_bytes: peaks.sender.load(Ordering::SeqCst),
            destination_peak_bytes: peaks.destination.load(Ordering::SeqCst),
        })
    }
}
