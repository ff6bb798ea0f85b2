//! The program that is dumped and restored: it knows what its memory must be, and says so over TCP.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use crate::PAGE_SIZE;
use crate::service::poll_until;

/// Bytes of the memory that it watches over.
const LENGTH: usize = 4 << 20;
const PATIENCE: Duration = Duration::from_secs(5);

/// The word that belongs at byte `offset`: splitmix64, so that no two pages are alike.
fn word(offset: usize) -> u64 {
    let mut z = (offset as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The `main` of the subject: run it in a process of its own and nothing else in there.
pub(super) fn run() -> std::io::Result<()> {
    // A session of its own, and no terminal or pipe: nothing that leads out of the tree.
    rustix::process::setsid()?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let words: Vec<u64> = (0..LENGTH / 8).map(|i| word(8 * i)).collect();
    let mut out = std::io::stdout();
    writeln!(out, "{} {} {}", listener.local_addr()?.port(), words.as_ptr() as u64, LENGTH)?;
    out.flush()?;
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    rustix::stdio::dup2_stdin(&null)?;
    drop(null);
    for answers in 1u64.. {
        let (mut client, _) = listener.accept()?;
        let wrong = (0..LENGTH / 8).find(|&i| words[i] != word(8 * i));
        let _ = match wrong {
            None => writeln!(client, "intact {answers}"),
            Some(i) => writeln!(client, "wrong at byte {} {answers}", 8 * i),
        };
        // The client closes first, so that the port has no connection in TIME_WAIT.
        let _ = client.read(&mut [0]);
    }
    Ok(())
}

/// A running subject, ended and reaped on drop.
pub(super) struct Subject {
    child: Child,
    port: u16,
    /// Whole pages of the memory that it watches over.
    pub(super) address: u64,
    pub(super) pages: u64,
}

impl Subject {
    /// Runs `command`, which has to call [`run`].
    pub(super) fn start(mut command: Command) -> Result<Self, String> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("the subject could not be started: {e}"))?;
        let line = read_line(&mut child);
        let parse = |line: &str| {
            let mut numbers = line.split_ascii_whitespace().map(|n| n.parse::<u64>().ok());
            Some((numbers.next()??, numbers.next()??, numbers.next()??))
        };
        let Some((port, start, length)) = parse(&line) else {
            let _ = child.kill();
            let _ = child.wait();
            return Err(format!("the subject said {line:?} instead of where it is"));
        };
        let address = start.next_multiple_of(PAGE_SIZE);
        Ok(Self {
            child,
            port: port as u16,
            address,
            pages: (start + length) / PAGE_SIZE - address / PAGE_SIZE,
        })
    }

    pub(super) fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Asks it for the `n`th time whether its memory is intact.
    pub(super) fn ask(&self, n: u64) -> Result<(), String> {
        let ask = || -> std::io::Result<String> {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut line = String::new();
            BufReader::new(&mut stream).read_line(&mut line)?;
            Ok(line)
        };
        match ask() {
            Ok(line) if line == format!("intact {n}\n") => Ok(()),
            Ok(line) => Err(format!("the subject says {:?} instead of \"intact {n}\"", line.trim())),
            Err(e) => Err(format!("the subject does not answer on its port: {e}")),
        }
    }

    /// Waits for its end, which somebody else has brought about.
    pub(super) fn reap(&mut self) -> Result<(), String> {
        let until = Instant::now() + PATIENCE;
        while self.child.try_wait().map_err(|e| e.to_string())?.is_none() {
            if Instant::now() >= until {
                return Err("the subject survived the end of the dump".to_owned());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_line(child: &mut Child) -> String {
    let Some(mut stdout) = child.stdout.take() else { return String::new() };
    let until = Instant::now() + PATIENCE;
    let mut line = Vec::new();
    loop {
        let mut polled = [PollFd::from_borrowed_fd(stdout.as_fd(), PollFlags::IN)];
        if !poll_until(&mut polled, until).unwrap_or(false) {
            break;
        }
        let mut byte = [0];
        match stdout.read(&mut byte) {
            Ok(1) if byte[0] != b'\n' => line.push(byte[0]),
            _ => break,
        }
    }
    String::from_utf8_lossy(&line).into_owned()
}
