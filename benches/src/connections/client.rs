//! The client: connections of every kind, each watched for bytes that are wrong and for time without any.

use super::{CHUNK, Kind, fill, is_stream};
use anyhow::{Context, ensure};
use clap::Args;
use serde::{Deserialize, Serialize};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Longest wait for a byte: a connection that needs more is dead.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two requests of the busy connection, two new connections, two states.
const PACE: Duration = Duration::from_millis(1);
const FRESH: Duration = Duration::from_millis(50);
const STATE: Duration = Duration::from_millis(20);

/// Options of the client.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Where the server is (several: every kind of connection to each)
    #[arg(long = "address", value_name = "ADDR", required = true)]
    pub addresses: Vec<SocketAddr>,
    /// Connections that say nothing until the end
    #[arg(long, default_value_t = 200)]
    pub idle: usize,
    /// Where the state is written; the end begins when a file of the same name with `.end` behind it is there
    #[arg(long, value_name = "FILE")]
    pub state: PathBuf,
}

/// What the client has seen so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    /// Requests of the busy connections that were answered.
    pub echoes: u64,
    /// Longest time between sending such a request and its answer, in microseconds.
    pub longest_us: u64,
    /// Bytes that the server sent in bulk, all as they should be.
    pub bulk_bytes: u64,
    /// Bytes that the server has said it received as they should be.
    pub upload_bytes: u64,
    /// Numbers that came over connections of which our half is closed.
    pub ticks: u64,
    /// New connections that were made and answered.
    pub fresh: u64,
    /// Idle connections that were there in the end.
    pub idle: u64,
    /// What went wrong.
    pub errors: Vec<String>,
    /// Whether this is the last word.
    pub ended: bool,
}

#[derive(Default)]
struct Counters {
    echoes: AtomicU64,
    longest_us: AtomicU64,
    bulk_bytes: AtomicU64,
    upload_bytes: AtomicU64,
    ticks: AtomicU64,
    fresh: AtomicU64,
    idle: AtomicU64,
    errors: Mutex<Vec<String>>,
    over: AtomicBool,
}

impl Counters {
    fn over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    fn seen(&self, ended: bool) -> Seen {
        let of = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
        Seen {
            echoes: of(&self.echoes),
            longest_us: of(&self.longest_us),
            bulk_bytes: of(&self.bulk_bytes),
            upload_bytes: of(&self.upload_bytes),
            ticks: of(&self.ticks),
            fresh: of(&self.fresh),
            idle: of(&self.idle),
            errors: self.errors.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            ended,
        }
    }
}

/// What is done with the server as long as it is not over.
type Job = fn(SocketAddr, &Counters) -> anyhow::Result<()>;

/// Uses the server until it is told to end; fails if anything was wrong.
///
/// # Errors
/// That a connection could not be made in the beginning, or that the state cannot be written.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let counters = Arc::new(Counters::default());
    let mut idle = Vec::new();
    for address in &options.addresses {
        for _ in 0..options.idle {
            idle.push(open(*address, Kind::Echo)?);
        }
    }
    let jobs: [(&str, Job); 5] =
        [("echo", echo), ("bulk", bulk), ("upload", upload), ("ticks", ticks), ("fresh", fresh)];
    let mut threads = Vec::new();
    for address in options.addresses.iter().copied() {
        for (name, job) in jobs {
            let counters = Arc::clone(&counters);
            threads.push(thread::spawn(move || {
                if let Err(error) = job(address, &counters) {
                    let text = format!("{name} with {address}: {error:#}");
                    counters.errors.lock().unwrap_or_else(PoisonError::into_inner).push(text);
                }
            }));
        }
    }
    let mut end = options.state.clone().into_os_string();
    end.push(".end");
    while !Path::new(&end).exists() {
        write(&options.state, &counters.seen(false))?;
        thread::sleep(STATE);
    }
    counters.over.store(true, Ordering::SeqCst);
    for thread in threads {
        let _ = thread.join();
    }
    for (n, mut stream) in idle.into_iter().enumerate() {
        match exchange(&mut stream, n as u64) {
            Ok(()) => drop(counters.idle.fetch_add(1, Ordering::SeqCst)),
            Err(error) => {
                let mut errors = counters.errors.lock().unwrap_or_else(PoisonError::into_inner);
                errors.push(format!("idle connection {n}: {error:#}"));
            }
        }
    }
    let seen = counters.seen(true);
    write(&options.state, &seen)?;
    Ok(if seen.errors.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Whole or not at all.
fn write(path: &Path, seen: &Seen) -> anyhow::Result<()> {
    let draft = path.with_extension("part");
    std::fs::write(&draft, serde_json::to_vec(seen)?)?;
    std::fs::rename(&draft, path).context("writing the state")
}

fn open(address: SocketAddr, kind: Kind) -> anyhow::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE).context("connecting")?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&[kind.byte()])?;
    Ok(stream)
}

fn exchange(stream: &mut TcpStream, number: u64) -> anyhow::Result<()> {
    stream.write_all(&number.to_le_bytes()).context("asking")?;
    let mut answer = [0; 8];
    stream.read_exact(&mut answer).context("being answered")?;
    ensure!(u64::from_le_bytes(answer) == number, "{} came back for {number}", u64::from_le_bytes(answer));
    Ok(())
}

fn echo(address: SocketAddr, counters: &Counters) -> anyhow::Result<()> {
    let mut stream = open(address, Kind::Echo)?;
    for number in 0.. {
        if counters.over() {
            break;
        }
        let asked = Instant::now();
        exchange(&mut stream, number)?;
        counters.longest_us.fetch_max(asked.elapsed().as_micros() as u64, Ordering::SeqCst);
        counters.echoes.fetch_add(1, Ordering::SeqCst);
        thread::sleep(PACE);
    }
    Ok(())
}

fn bulk(address: SocketAddr, counters: &Counters) -> anyhow::Result<()> {
    let mut stream = open(address, Kind::Bulk)?;
    let (mut buffer, mut at) = (vec![0; 64 << 10], 0u64);
    while !counters.over() {
        let got = stream.read(&mut buffer).context("reading")?;
        ensure!(got > 0, "the server has closed it");
        ensure!(is_stream(&buffer[..got], at), "other bytes than were to come, from {at} on");
        at += got as u64;
        counters.bulk_bytes.fetch_add(got as u64, Ordering::SeqCst);
        // Slower than the server: its queue is full all the time.
        thread::sleep(PACE);
    }
    Ok(())
}

fn upload(address: SocketAddr, counters: &Counters) -> anyhow::Result<()> {
    let mut stream = open(address, Kind::Upload)?;
    let (mut buffer, mut at) = (vec![0; 64 << 10], 0u64);
    while !counters.over() {
        fill(&mut buffer, at);
        stream.write_all(&buffer).context("writing")?;
        at += buffer.len() as u64;
        if at.is_multiple_of(CHUNK) {
            let mut answer = [0; 8];
            stream.read_exact(&mut answer).context("being answered")?;
            ensure!(u64::from_le_bytes(answer) == at, "of {at} bytes the server has got others, or fewer");
            counters.upload_bytes.store(at, Ordering::SeqCst);
            thread::sleep(PACE);
        }
    }
    Ok(())
}

fn ticks(address: SocketAddr, counters: &Counters) -> anyhow::Result<()> {
    let mut stream = open(address, Kind::Ticks)?;
    stream.shutdown(Shutdown::Write)?;
    for number in 0u64.. {
        if counters.over() {
            break;
        }
        let mut tick = [0; 8];
        stream.read_exact(&mut tick).context("hearing the next number")?;
        ensure!(u64::from_le_bytes(tick) == number, "{} instead of {number}", u64::from_le_bytes(tick));
        counters.ticks.fetch_add(1, Ordering::SeqCst);
    }
    Ok(())
}

/// New connections all the time. One that is made at the moment of the move, and that nobody has accepted yet, does not survive
/// it: its client connects again.
fn fresh(address: SocketAddr, counters: &Counters) -> anyhow::Result<()> {
    while !counters.over() {
        let again = Instant::now() + PATIENCE;
        loop {
            match open(address, Kind::Echo).and_then(|mut stream| exchange(&mut stream, 1)) {
                Ok(()) => break,
                Err(error) if Instant::now() > again => return Err(error),
                Err(_) => thread::sleep(PACE),
            }
        }
        counters.fresh.fetch_add(1, Ordering::SeqCst);
        thread::sleep(FRESH);
    }
    Ok(())
}
