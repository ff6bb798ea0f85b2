//! Programs that are started here: ended when nobody waits for them any more, also by Ctrl-C.

use anyhow::{Context, bail};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::workload::state::realtime_us;

static STOP: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// Makes SIGINT and SIGTERM end every wait of this module with an error, so that what was built is torn down by
/// its owners.
///
/// # Errors
/// What the system says.
pub fn watch_signals() -> anyhow::Result<()> {
    let stop = STOP.get_or_init(Arc::default);
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(stop)).context("watching for signals")?;
    }
    Ok(())
}

/// Fails if a signal asked for the end.
///
/// # Errors
/// That one did.
pub fn still_wanted() -> anyhow::Result<()> {
    match STOP.get().is_some_and(|stop| stop.load(Ordering::SeqCst)) {
        true => bail!("interrupted"),
        false => Ok(()),
    }
}

/// Sleeps in small steps, so that a signal ends it.
///
/// # Errors
/// That a signal did.
pub fn sleep(time: Duration) -> anyhow::Result<()> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        still_wanted()?;
        thread::sleep(Duration::from_millis(20).min(end.saturating_duration_since(Instant::now())));
    }
    still_wanted()
}

/// Asks again and again until there is an answer.
///
/// # Errors
/// What was asked for did not come within `limit`, or failed.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut ask: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let end = Instant::now() + limit;
    loop {
        still_wanted()?;
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        if Instant::now() > end {
            bail!("{what} did not come within {} s", limit.as_secs());
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// A line that a program printed, and when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimedLine {
    /// CLOCK_REALTIME when it was read, microseconds since 1970.
    pub at_us: u64,
    /// The line.
    pub text: String,
}

/// A started program whose output is read as it comes.
#[derive(Debug)]
pub struct Running {
    name: String,
    child: Child,
    readers: Vec<JoinHandle<()>>,
    stdout: Arc<Mutex<Vec<TimedLine>>>,
    stderr: Arc<Mutex<Vec<TimedLine>>>,
    ended: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A reader that panicked leaves whole lines behind.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn follow(pipe: impl Read + Send + 'static, lines: &Arc<Mutex<Vec<TimedLine>>>) -> JoinHandle<()> {
    let lines = Arc::clone(lines);
    thread::spawn(move || {
        for text in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
            let text = String::from_utf8_lossy(&text).trim_end().to_owned();
            lock(&lines).push(TimedLine { at_us: realtime_us(), text });
        }
    })
}

impl Running {
    /// Starts it, with nothing to read.
    ///
    /// # Errors
    /// What the system says.
    pub fn start(name: &str, command: &mut Command) -> anyhow::Result<Self> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        let (stdout, stderr) = (Arc::default(), Arc::default());
        let mut readers = Vec::new();
        readers.extend(child.stdout.take().map(|pipe| follow(pipe, &stdout)));
        readers.extend(child.stderr.take().map(|pipe| follow(pipe, &stderr)));
        Ok(Self { name: name.to_owned(), child, readers, stdout, stderr, ended: false })
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// What it printed so far.
    pub fn lines(&self) -> Vec<TimedLine> {
        lock(&self.stdout).clone()
    }

    /// The end of what it printed to stderr (or else to stdout), for error texts.
    pub fn last_words(&self) -> String {
        let errors = lock(&self.stderr);
        let output = lock(&self.stdout);
        let lines = if errors.is_empty() { &output } else { &errors };
        let tail: Vec<&str> = lines.iter().rev().take(15).map(|line| line.text.as_str()).collect();
        tail.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    /// Whether it has ended, and how.
    ///
    /// # Errors
    /// What the system says.
    pub fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        let status = self.child.try_wait().with_context(|| format!("waiting for {}", self.name))?;
        self.ended |= status.is_some();
        Ok(status)
    }

    /// Waits until it printed a line (to either side) that contains `text`, in whatever case.
    ///
    /// # Errors
    /// That it ended before, or did not within `limit`.
    pub fn wait_line(&mut self, text: &str, limit: Duration) -> anyhow::Result<()> {
        let what = format!("`{text}` from {}", self.name);
        let name = self.name.clone();
        wait_for(&what, limit, || {
            let said = |lines: &Mutex<Vec<TimedLine>>| {
                lock(lines).iter().any(|line| line.text.to_lowercase().contains(text))
            };
            if said(&self.stdout) || said(&self.stderr) {
                return Ok(Some(()));
            }
            match self.ended()? {
                Some(status) => bail!("{name} ended ({status}):\n{}", self.last_words()),
                None => Ok(None),
            }
        })
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// That it did not end within `limit`, or not well; with its last words.
    pub fn finish(&mut self, limit: Duration) -> anyhow::Result<()> {
        let what = format!("the end of {}", self.name);
        let status = wait_for(&what, limit, || self.ended())?;
        // Their ends come with the pipes': at once, unless a process that it left behind holds them.
        let end = Instant::now() + Duration::from_secs(1);
        while self.readers.iter().any(|reader| !reader.is_finished()) && Instant::now() < end {
            thread::sleep(Duration::from_millis(1));
        }
        if !status.success() {
            bail!("{} failed ({status}):\n{}", self.name, self.last_words());
        }
        Ok(())
    }

    /// Asks it to end (SIGTERM).
    pub fn terminate(&self) {
        if let (false, Some(pid)) = (self.ended, rustix::process::Pid::from_raw(self.child.id() as i32)) {
            // Not reaped yet, so the pid is still its own; if it has ended, there is nothing to do.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        self.terminate();
        let end = Instant::now() + Duration::from_secs(5);
        while Instant::now() < end {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a short command to its end and returns what it printed.
///
/// # Errors
/// That it failed, with its last words.
pub fn output(name: &str, command: &mut Command, limit: Duration) -> anyhow::Result<String> {
    let mut running = Running::start(name, command)?;
    running.finish(limit)?;
    Ok(running.lines().into_iter().map(|line| line.text).collect::<Vec<_>>().join("\n"))
}
