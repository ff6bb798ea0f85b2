//! The load client: writes numbered keys, reads some back, and remembers what was acknowledged.

use super::journal::Journal;
use super::resp::{Connection, Reply};
use crate::workload::content::Random;
use crate::workload::state::{State, realtime_us};
use clap::Args;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Longest wait for a socket before the clock is looked at.
const TICK: Duration = Duration::from_millis(2);
/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_millis(50);

/// Options of the load client.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Where redis is, or may come to be (several)
    #[arg(long = "address", value_name = "ADDR", required = true)]
    pub addresses: Vec<SocketAddr>,
    /// Stop after so many seconds (otherwise at SIGTERM or SIGINT)
    #[arg(long)]
    pub duration: Option<f64>,
    /// Operations a second at most
    #[arg(long)]
    pub rate: Option<f64>,
    /// Commands under way at a time
    #[arg(long, default_value_t = 16)]
    pub pipeline: usize,
    /// Number of keys
    #[arg(long, default_value_t = 20_000)]
    pub keys: usize,
    /// Bytes of a value
    #[arg(long, default_value_t = 1024)]
    pub value_size: usize,
    /// Of how many operations one is a read that is checked (0: none)
    #[arg(long, default_value_t = 8)]
    pub read_every: u64,
    /// Look at the other addresses when nothing was acknowledged for so many milliseconds
    #[arg(long, default_value_t = 20)]
    pub probe_after: u64,
    /// Seed of the values
    #[arg(long, default_value_t = 7)]
    pub seed: u64,
    /// Write progress there (as the other workloads do)
    #[arg(long, value_name = "FILE")]
    pub state: Option<PathBuf>,
    /// Write the report there (otherwise to stdout)
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Write what was acknowledged there, for redis-verify
    #[arg(long, value_name = "FILE")]
    pub journal: Option<PathBuf>,
}

/// What the client saw.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LoadReport {
    /// How long it ran, in microseconds.
    pub duration_us: u64,
    /// Writes that redis acknowledged.
    pub acknowledged: u64,
    /// Writes whose fate is not known: they were under way when a connection was lost.
    pub unknown: u64,
    /// Reads that gave what was acknowledged.
    pub good_reads: u64,
    /// Reads that did not; each is lost or damaged data.
    pub bad_reads: u64,
    /// The first of them.
    pub first_bad_read: Option<String>,
    /// Errors that redis answered.
    pub errors: u64,
    /// The first of them.
    pub first_error: Option<String>,
    /// Longest time between two acknowledgements, on the client's CLOCK_MONOTONIC, in microseconds.
    pub longest_gap_us: u64,
    /// When that ended, CLOCK_REALTIME, microseconds since 1970.
    pub longest_gap_end_us: u64,
    /// Connections made after the first.
    pub reconnects: u64,
    /// Where the last acknowledgement came from.
    pub last_address: Option<SocketAddr>,
}

#[derive(Clone, Copy)]
struct Sent {
    key: usize,
    /// Version written, or `None` for a read.
    version: Option<u64>,
    /// Acknowledged when it was sent: what a read must at least give.
    floor: u64,
}

struct Client<'a> {
    options: &'a Options,
    journal: Journal,
    report: LoadReport,
    random: Random,
    address: usize,
    connection: Option<Connection>,
    sent: VecDeque<Sent>,
    operations: u64,
    /// Operations that the rate allows now, and when that was last reckoned.
    allowance: f64,
    reckoned: Instant,
    started: Instant,
    last_ack: Option<Instant>,
}

/// Runs until the duration is over or a signal comes.
///
/// # Errors
/// What kept it from running. Damaged data is not an error but an exit status of 1.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(options.keys > 0 && options.pipeline > 0, "at least one key and one command are needed");
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    let mut state = options.state.as_deref().map(State::create).transpose()?;
    let mut client = Client::new(options);
    let end = options.duration.map(|seconds| client.started + Duration::from_secs_f64(seconds));
    while !stop.load(Ordering::SeqCst) && end.is_none_or(|end| Instant::now() < end) {
        client.turn();
        if let Some(state) = &mut state
            && let Some(check) = state.beat(client.report.acknowledged + client.report.good_reads)?
        {
            state.answer(check, &client.verdict())?;
        }
    }
    client.finish();
    let text = serde_json::to_string_pretty(&client.report)?;
    match &options.report {
        Some(path) => std::fs::write(path, text + "\n")?,
        None => println!("{text}"),
    }
    if let Some(path) = &options.journal {
        client.journal.save(path)?;
    }
    let clean = client.report.bad_reads == 0 && client.report.errors == 0;
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl<'a> Client<'a> {
    fn new(options: &'a Options) -> Self {
        Self {
            options,
            journal: Journal::new(options.seed, options.value_size, options.keys),
            report: LoadReport::default(),
            random: Random::new(options.seed),
            address: 0,
            connection: None,
            sent: VecDeque::new(),
            operations: 0,
            allowance: 0.0,
            reckoned: Instant::now(),
            started: Instant::now(),
            last_ack: None,
        }
    }

    fn verdict(&self) -> Result<String, String> {
        match &self.report.first_bad_read {
            None => Ok(format!("{} acknowledged writes", self.report.acknowledged)),
            Some(bad) => Err(bad.clone()),
        }
    }

    /// One turn: send what may be sent, take what came.
    fn turn(&mut self) {
        let Some(mut connection) = self.connection.take() else {
            self.connect();
            return;
        };
        match self.exchange(&mut connection) {
            Ok(()) => {
                self.connection = Some(connection);
                self.look_elsewhere();
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                self.note_error(error.to_string());
                self.lose();
            }
            Err(_) => self.lose(),
        }
    }

    fn exchange(&mut self, connection: &mut Connection) -> io::Result<()> {
        while self.sent.len() < self.options.pipeline && self.may_send() {
            self.send_one(connection);
        }
        if self.sent.is_empty() {
            std::thread::sleep(Duration::from_micros(500));
            return Ok(());
        }
        connection.flush()?;
        // All that is there, or one tick of waiting.
        while !self.sent.is_empty() {
            match connection.reply()? {
                Some(reply) => self.take(reply),
                None => break,
            }
        }
        Ok(())
    }

    /// Whether the rate allows one more. What could not be sent while the server stood still is not made up for
    /// beyond 50 ms: a server that was just moved should not be met with a burst that is the client's own.
    fn may_send(&mut self) -> bool {
        let Some(rate) = self.options.rate else { return true };
        let now = Instant::now();
        self.allowance += (now - self.reckoned).as_secs_f64().min(0.05) * rate;
        self.allowance = self.allowance.min(0.05 * rate + 1.0);
        self.reckoned = now;
        let may = self.allowance >= 1.0;
        self.allowance -= f64::from(u8::from(may));
        may
    }

    fn send_one(&mut self, connection: &mut Connection) {
        self.operations += 1;
        let key = self.random.below(self.options.keys);
        let name = Journal::name(key);
        let versions = &mut self.journal.keys[key];
        let read = self.options.read_every != 0 && self.operations.is_multiple_of(self.options.read_every);
        let mut sent = Sent { key, version: None, floor: versions.acknowledged };
        if read {
            connection.push(&[b"GET", name.as_bytes()]);
        } else {
            versions.sent += 1;
            let version = versions.sent;
            sent.version = Some(version);
            let value = self.journal.values().value(key as u64, version);
            connection.push(&[b"SET", name.as_bytes(), &value]);
        }
        self.sent.push_back(sent);
    }

    fn take(&mut self, reply: Reply) {
        let Some(sent) = self.sent.pop_front() else { return };
        let now = Instant::now();
        let versions = &mut self.journal.keys[sent.key];
        match (sent.version, reply) {
            (_, Reply::Error(text)) => self.note_error(text),
            (Some(version), _) => {
                // Replies come in the order of the commands, so versions only grow.
                versions.acknowledged = version;
                self.report.acknowledged += 1;
                self.journal.acknowledged += 1;
                if let Some(last) = self.last_ack {
                    let gap = (now - last).as_micros() as u64;
                    if gap > self.report.longest_gap_us {
                        self.report.longest_gap_us = gap;
                        self.report.longest_gap_end_us = realtime_us();
                    }
                }
                self.last_ack = Some(now);
                self.report.last_address = Some(self.options.addresses[self.address]);
            }
            (None, reply) => {
                let (sent_so_far, floor) = (versions.sent, sent.floor);
                let version = match &reply {
                    Reply::Bulk(value) => self.journal.values().version_of(sent.key as u64, value),
                    _ => Some(0),
                };
                match version {
                    Some(version) if (floor..=sent_so_far).contains(&version) => self.report.good_reads += 1,
                    other => {
                        self.report.bad_reads += 1;
                        let found = other.map_or("damaged bytes".to_owned(), |v| format!("version {v}"));
                        self.report.first_bad_read.get_or_insert(format!(
                            "{}: {found} instead of version {floor} to {sent_so_far}",
                            Journal::name(sent.key)
                        ));
                    }
                }
            }
        }
    }

    fn note_error(&mut self, text: String) {
        self.report.errors += 1;
        self.report.first_error.get_or_insert(text);
    }

    /// The connection is gone, and with it the answers to what was under way.
    fn lose(&mut self) {
        self.report.unknown += self.sent.iter().filter(|sent| sent.version.is_some()).count() as u64;
        self.sent.clear();
        self.connection = None;
    }

    /// Tries the address in use and then the others, each once.
    fn connect(&mut self) {
        let addresses = &self.options.addresses;
        for turn in 0..addresses.len() {
            let index = (self.address + turn) % addresses.len();
            if let Some(connection) = alive(addresses[index]) {
                self.use_connection(index, connection);
                return;
            }
        }
        std::thread::sleep(TICK);
    }

    /// A server that was frozen and moved away may leave its connections without a word. So when nothing comes,
    /// see whether redis answers somewhere else; as long as it does not, the old connection may still wake up.
    fn look_elsewhere(&mut self) {
        let patience = Duration::from_millis(self.options.probe_after);
        let stalled = !self.sent.is_empty() && self.last_ack.is_some_and(|last| last.elapsed() > patience);
        if !stalled {
            return;
        }
        for index in (0..self.options.addresses.len()).filter(|&index| index != self.address) {
            if let Some(connection) = alive(self.options.addresses[index]) {
                self.lose();
                self.use_connection(index, connection);
                return;
            }
        }
    }

    fn use_connection(&mut self, index: usize, connection: Connection) {
        self.report.reconnects += u64::from(self.last_ack.is_some());
        self.address = index;
        self.connection = Some(connection);
    }

    fn finish(&mut self) {
        // What is under way may still be answered; a second is plenty for a server that runs.
        if let Some(mut connection) = self.connection.take() {
            let until = Instant::now() + Duration::from_secs(1);
            while !self.sent.is_empty() && Instant::now() < until {
                match connection.flush().and_then(|()| connection.reply()) {
                    Ok(Some(reply)) => self.take(reply),
                    Ok(None) => {}
                    Err(_) => break,
                }
            }
        }
        self.lose();
        self.report.duration_us = self.started.elapsed().as_micros() as u64;
    }
}

/// A connection to a redis that answers, if there is one at the address.
fn alive(address: SocketAddr) -> Option<Connection> {
    let mut connection = Connection::open(address, CONNECT, TICK).ok()?;
    connection.push(&[b"PING"]);
    match connection.wait_reply(5) {
        Ok(Reply::Simple(text)) if text == "PONG" => Some(connection),
        _ => None,
    }
}
