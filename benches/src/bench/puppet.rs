//! A program that does to its memory what it is told, and nothing else: what scans are measured with.

use crate::sys::memory::{Access, Backing, Mapping, PAGE};
use crate::workload::content::WORDS;
use anyhow::{Context, bail, ensure};
use bytesize::ByteSize;
use clap::Args;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// What the puppet is told at the start.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Memory that is filled before anything
    #[arg(long)]
    memory: ByteSize,
    /// Mappings of a page each, beside it
    #[arg(long, default_value_t = 0)]
    mappings: usize,
    /// Threads that sleep, beside the one that listens
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

/// How long `watch` looks at the clock.
const WATCH: Duration = Duration::from_millis(100);

/// Follows its input: `touch N` writes every N-th page (0: none), `map N` makes N new mappings of a page; each is
/// answered with `done`. `watch N` looks at the clock and nothing else for 100 ms, writes every N-th page meanwhile (0:
/// none), says `watching` when it begins, and then the longest time between two looks in nanoseconds. `write N` writes a page after
/// the other for N ms, as fast as it goes, and says how many that were a second.
///
/// # Errors
/// What the kernel refuses, or a command that is none.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let mut memory = Mapping::new(Backing::Private, (options.memory.as_u64() as usize / PAGE).max(1))?;
    memory.avoid_huge_pages()?;
    touch(&mut memory, 1);
    let mut small = Vec::new();
    scatter(&mut small, options.mappings)?;
    for _ in 0..options.threads {
        thread::Builder::new().stack_size(64 << 10).spawn(|| {
            loop {
                thread::park();
            }
        })?;
    }
    let mut out = std::io::stdout().lock();
    writeln!(out, "{} {}", memory.address(), memory.pages())?;
    out.flush()?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        match line.split_once(' ').and_then(|(word, number)| Some((word, number.parse().ok()?))) {
            Some(("touch", every)) => touch(&mut memory, every),
            Some(("map", count)) => scatter(&mut small, count)?,
            Some(("write", time)) => {
                writeln!(out, "{}", write(&mut memory, Duration::from_millis(time as u64)))?;
                out.flush()?;
                continue;
            }
            Some(("watch", every)) => {
                writeln!(out, "watching")?;
                out.flush()?;
                writeln!(out, "{}", watch(&mut memory, every).as_nanos())?;
                out.flush()?;
                continue;
            }
            _ => bail!("a puppet does not know {line:?}"),
        }
        writeln!(out, "done")?;
        out.flush()?;
    }
    Ok(ExitCode::SUCCESS)
}

fn touch(memory: &mut Mapping, every: usize) {
    if every > 0 {
        memory.words_mut().iter_mut().step_by(every * WORDS).for_each(|word| *word = word.wrapping_add(1));
    }
}

/// Pages a second, of a loop that adds up a page before it writes it: a program that did nothing but write would be a
/// measurement of page faults alone.
fn write(memory: &mut Mapping, time: Duration) -> f64 {
    let start = Instant::now();
    let mut pages = 0u64;
    loop {
        for page in memory.words_mut().chunks_exact_mut(WORDS) {
            page[0] = page.iter().fold(0u64, |sum, word| sum.wrapping_add(*word)).wrapping_add(pages);
            pages += 1;
        }
        let passed = start.elapsed();
        if passed >= time {
            return pages as f64 / passed.as_secs_f64();
        }
    }
}

/// The longest time between two looks at the clock. A page is written between them, if any are.
fn watch(memory: &mut Mapping, every: usize) -> Duration {
    let (start, step) = (Instant::now(), every * WORDS);
    let (mut before, mut longest, mut at) = (start, Duration::ZERO, 0);
    while before - start < WATCH {
        if step > 0 {
            let words = memory.words_mut();
            words[at] = words[at].wrapping_add(1);
            at = if at + step < words.len() { at + step } else { 0 };
        }
        let now = Instant::now();
        longest = longest.max(now - before);
        before = now;
    }
    longest
}

/// New mappings of a written page each, of which neighbours differ in what they allow: the kernel would merge them.
fn scatter(small: &mut Vec<Mapping>, count: usize) -> anyhow::Result<()> {
    if count == 0 {
        return Ok(());
    }
    let mut rest = Mapping::new(Backing::Private, count + 1)?;
    rest.avoid_huge_pages()?;
    touch(&mut rest, 1);
    for at in 0..count {
        let (mut one, others) = rest.split(1);
        if at % 2 == 1 {
            one.protect(Access::Read)?;
        }
        small.push(one);
        rest = others;
    }
    // The page that is left differs from the last, too.
    if count % 2 == 1 {
        rest.protect(Access::Read)?;
    }
    small.push(rest);
    Ok(())
}

/// A puppet, from the side of the measurement. It ends with this value.
#[derive(Debug)]
pub struct Puppet {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    /// Address of its memory.
    pub address: u64,
    /// Pages of its memory.
    pub pages: u64,
}

impl Puppet {
    /// Starts one, and waits until its memory is filled.
    ///
    /// # Errors
    /// What kept it from starting.
    pub fn start(memory: ByteSize, mappings: usize, threads: usize) -> anyhow::Result<Self> {
        let this = std::env::current_exe().context("asking for the path of this program")?;
        let number = |number: u64| number.to_string();
        let mut child = Command::new(this)
            .args(["puppet", "--memory", &number(memory.as_u64())])
            .args(["--mappings", &number(mappings as u64), "--threads", &number(threads as u64)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting a puppet")?;
        let input = child.stdin.take();
        let output = child.stdout.take().context("a puppet without output")?;
        let mut puppet = Self { child, input, output: BufReader::new(output), address: 0, pages: 0 };
        let line = puppet.line()?;
        let (address, pages) = line.split_once(' ').context("a puppet that says something else")?;
        (puppet.address, puppet.pages) = (address.parse()?, pages.parse()?);
        Ok(puppet)
    }

    /// Its pid.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Has it do something, and waits until it has.
    ///
    /// # Errors
    /// That it ended.
    pub fn tell(&mut self, command: &str) -> anyhow::Result<()> {
        let input = self.input.as_mut().context("a puppet without input")?;
        writeln!(input, "{command}").with_context(|| format!("telling a puppet to {command}"))?;
        let answer = self.line()?;
        ensure!(answer == "done", "a puppet that was told to {command} says {answer:?}");
        Ok(())
    }

    /// Has it watch the clock, and write every N-th page (0: none). It does so when this returns.
    ///
    /// # Errors
    /// That it ended.
    pub fn watch(&mut self, every: u64) -> anyhow::Result<()> {
        let input = self.input.as_mut().context("a puppet without input")?;
        writeln!(input, "watch {every}").context("telling a puppet to watch the clock")?;
        let answer = self.line()?;
        ensure!(answer == "watching", "a puppet that was told to watch the clock says {answer:?}");
        Ok(())
    }

    /// Waits for the end of a [`Puppet::watch`]: the longest time between two looks.
    ///
    /// # Errors
    /// That it ended.
    pub fn watched(&mut self) -> anyhow::Result<Duration> {
        Ok(Duration::from_nanos(self.line()?.parse().context("reading what a puppet saw")?))
    }

    /// Has it write for a while: the pages a second that it wrote.
    ///
    /// # Errors
    /// That it ended.
    pub fn write_for(&mut self, time: Duration) -> anyhow::Result<f64> {
        let input = self.input.as_mut().context("a puppet without input")?;
        writeln!(input, "write {}", time.as_millis()).context("telling a puppet to write")?;
        self.line()?.parse().context("reading how much a puppet wrote")
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line).context("listening to a puppet")?;
        ensure!(!line.is_empty(), "a puppet ended");
        Ok(line.trim_end().to_owned())
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        // It ends with its input; killed, because giving back its memory may wait for nobody.
        drop(self.input.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
