//! The server: one thread, every connection at once, as servers are.

use super::{CHUNK, Kind, TICK_MS, fill, is_stream};
use clap::Args;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Bytes that are written or read at a time.
const BLOCK: usize = 64 << 10;

/// Options of the server.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Where to listen (several)
    #[arg(long = "listen", value_name = "ADDR", required = true)]
    pub listen: Vec<SocketAddr>,
}

/// A connection.
struct Served {
    stream: TcpStream,
    kind: Option<Kind>,
    /// Bytes that were received (uploads), or sent (bulk), or numbers that were said (ticks).
    done: u64,
    /// What could not be written yet.
    owed: Vec<u8>,
    /// An upload was not what it should be.
    wrong: bool,
    next_tick: Instant,
}

/// Serves until it is killed.
///
/// # Errors
/// That it cannot listen.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let listeners: Vec<TcpListener> =
        options.listen.iter().map(TcpListener::bind).collect::<io::Result<_>>()?;
    listeners.iter().try_for_each(|listener| listener.set_nonblocking(true))?;
    let mut served: Vec<Served> = Vec::new();
    let mut buffer = vec![0; BLOCK];
    let patience = Timespec { tv_sec: 0, tv_nsec: (TICK_MS * 1_000_000 / 2) as i64 };
    loop {
        let mut polled: Vec<PollFd<'_>> =
            listeners.iter().map(|listener| PollFd::new(listener, PollFlags::IN)).collect();
        for one in &served {
            let mut flags = if one.kind == Some(Kind::Ticks) { PollFlags::empty() } else { PollFlags::IN };
            if one.kind == Some(Kind::Bulk) || !one.owed.is_empty() {
                flags |= PollFlags::OUT;
            }
            polled.push(PollFd::new(&one.stream, flags));
        }
        match poll(&mut polled, Some(&patience)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(io::Error::from(errno).into()),
        }
        let ready: Vec<PollFlags> = polled.iter().map(PollFd::revents).collect();
        drop(polled);
        let now = Instant::now();
        let mut states = ready[listeners.len()..].iter();
        served.retain_mut(|one| {
            let ready = states.next().copied().unwrap_or(PollFlags::empty());
            one.serve(ready, &mut buffer, now).unwrap_or(false)
        });
        for (listener, _) in listeners.iter().zip(&ready).filter(|(_, ready)| !ready.is_empty()) {
            while let Ok((stream, _)) = listener.accept() {
                stream.set_nonblocking(true)?;
                stream.set_nodelay(true)?;
                let owed = Vec::new();
                served.push(Served { stream, kind: None, done: 0, owed, wrong: false, next_tick: now });
            }
        }
    }
}

impl Served {
    /// Does what there is to do; says whether the connection goes on.
    fn serve(&mut self, ready: PollFlags, buffer: &mut [u8], now: Instant) -> io::Result<bool> {
        if ready.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) && self.kind != Some(Kind::Ticks)
        {
            match self.stream.read(buffer) {
                Ok(0) => return Ok(false),
                Ok(got) => self.take(&buffer[..got]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        if self.kind == Some(Kind::Ticks) && now >= self.next_tick {
            self.owed.extend(self.done.to_le_bytes());
            self.done += 1;
            self.next_tick = now + Duration::from_millis(TICK_MS);
        }
        if self.kind == Some(Kind::Bulk) && self.owed.is_empty() {
            self.owed.resize(BLOCK, 0);
            fill(&mut self.owed, self.done);
            self.done += BLOCK as u64;
        }
        if !self.owed.is_empty() {
            match self.stream.write(&self.owed) {
                Ok(written) => drop(self.owed.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn take(&mut self, mut bytes: &[u8]) {
        if self.kind.is_none() {
            self.kind = Kind::of(bytes[0]);
            bytes = &bytes[1..];
        }
        match self.kind {
            Some(Kind::Echo) => self.owed.extend(bytes),
            Some(Kind::Upload) => {
                self.wrong |= !is_stream(bytes, self.done);
                let before = self.done / CHUNK;
                self.done += bytes.len() as u64;
                for chunk in before..self.done / CHUNK {
                    let answer = if self.wrong { u64::MAX } else { (chunk + 1) * CHUNK };
                    self.owed.extend(answer.to_le_bytes());
                }
            }
            _ => {}
        }
    }
}
