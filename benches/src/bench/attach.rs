//! How long one thread of a program stands still while the tracker attaches to it: the time from the moment in which the
//! thread is asked to stop until it is let go. Where the program itself can watch the clock, also what it saw.

use super::puppet::Puppet;
use super::redis::Server;
use super::stats::Runs;
use super::table::Table;
use super::{child, machine};
use anyhow::{Context, bail, ensure};
use bytesize::ByteSize;
use clap::Args;
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use pageferry_tracker::probe::Kernel;
use pageferry_tracker::{Target, Tracker, TrackerKind};
use serde::Serialize;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// The median of a pause, in microseconds.
const LIMIT_US: f64 = 100.0;
/// Threads of the program with many.
const THREADS: usize = 200;
/// SETs that keep redis busy for longer than the measurement lasts; the load ends with it.
const ENDLESS: u64 = 1_000_000_000;

/// Options of this measurement.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Times that the tracker attaches to each target; the table shows medians
    #[arg(long, default_value_t = 51)]
    runs: usize,
    /// One JSON object a row instead of the table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Row {
    target: &'static str,
    /// From the request to stop until the thread was let go, in microseconds.
    pause_us: Runs,
    /// The same for one system call that it is led through, and nothing else: the least that ptrace can do.
    bare_us: Runs,
    /// Longest time between two looks at the clock of the thread itself, with what the machine did to it besides.
    #[serde(skip_serializing_if = "Option::is_none")]
    seen_us: Option<Runs>,
    /// The same without a tracker.
    #[serde(skip_serializing_if = "Option::is_none")]
    seen_without_us: Option<Runs>,
    pass: bool,
}

/// Measures and prints the table. The exit status is a failure if a limit was missed.
///
/// # Errors
/// What kept it from measuring.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    ensure!(options.runs > 0, "--runs must be at least 1");
    Kernel::probe()
        .choose(Some(TrackerKind::UffdWp))
        .context("only this tracker stops a thread to attach")?;
    let runs = options.runs;
    let mut rows = Vec::new();
    let mut add = |target, Measured { pause, bare, seen }: Measured| -> anyhow::Result<()> {
        let (pause_us, bare_us) = (Runs::new(pause), Runs::new(bare));
        let pass = pause_us.median <= LIMIT_US;
        let (seen_us, seen_without_us) =
            seen.map(|seen| seen.map(Runs::new)).map(<(Runs, Runs)>::from).unzip();
        let row = Row { target, pause_us, bare_us, seen_us, seen_without_us, pass };
        if options.json {
            println!("{}", serde_json::to_string(&row)?);
        }
        rows.push(row);
        Ok(())
    };
    let server = Server::start()?;
    add("redis, idle", attached(server.pid(), runs)?.into())?;
    let load = server.load(ENDLESS)?;
    child::sleep(Duration::from_millis(500))?;
    add("redis, 16 in flight", attached(server.pid(), runs)?.into())?;
    drop((load, server));
    let puppet = Puppet::start(ByteSize::mib(16), 0, THREADS)?;
    add("200 sleeping threads", attached(puppet.pid(), runs)?.into())?;
    drop(puppet);
    add("thread that watches the clock", busy(runs, 0)?)?;
    add("busy writer", busy(runs, 1)?)?;
    if !options.json {
        print!("{}", render(&rows, options));
    }
    let missed = rows.iter().any(|row| !row.pass);
    Ok(if missed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Attaches to a process again and again, in turns with the bare calls: the pauses of each time in microseconds.
fn attached(pid: i32, runs: usize) -> anyhow::Result<(Vec<f64>, Vec<f64>)> {
    (0..runs)
        .map(|_| {
            let bare = one_call(pid).context("leading a thread through a system call")?;
            child::sleep(Duration::from_millis(23))?;
            let tracker = Tracker::attach(Target::open(pid)?, TrackerKind::UffdWp)?;
            let pause = tracker.attach_stop();
            ensure!(
                pause > Duration::ZERO,
                "the tracker attached to process {pid} without stopping anything"
            );
            tracker.detach()?;
            // Not in step with anything that the program does.
            child::sleep(Duration::from_millis(23))?;
            Ok((pause.as_secs_f64() * 1e6, bare.as_secs_f64() * 1e6))
        })
        .collect()
}

/// One figure of each run, in microseconds.
struct Measured {
    pause: Vec<f64>,
    bare: Vec<f64>,
    /// What the thread saw with the tracker, and without.
    seen: Option<[Vec<f64>; 2]>,
}

impl From<(Vec<f64>, Vec<f64>)> for Measured {
    fn from((pause, bare): (Vec<f64>, Vec<f64>)) -> Self {
        Self { pause, bare, seen: None }
    }
}

/// How long the first thread of a process stands still to be led through one system call (`getpid`): seized, interrupted,
/// one step, its registers put back, let go.
fn one_call(pid: i32) -> anyhow::Result<Duration> {
    let instruction = syscall_instruction(pid)?;
    let pid = Pid::from_raw(pid);
    let stop = || -> anyhow::Result<()> {
        match waitpid(pid, Some(WaitPidFlag::__WALL))? {
            WaitStatus::Stopped(..) | WaitStatus::PtraceEvent(..) => Ok(()),
            other => bail!("the thread does not stop: {other:?}"),
        }
    };
    let start = Instant::now();
    ptrace::seize(pid, ptrace::Options::empty())?;
    ptrace::interrupt(pid)?;
    stop()?;
    let before = ptrace::getregs(pid)?;
    // Not in a system call: nothing is to be restarted before it is back where it was.
    let there = libc::user_regs_struct {
        rip: instruction,
        rax: libc::SYS_getpid as u64,
        orig_rax: u64::MAX,
        ..before
    };
    ptrace::setregs(pid, there)?;
    ptrace::step(pid, None)?;
    stop()?;
    let after = ptrace::getregs(pid)?;
    ptrace::setregs(pid, before)?;
    ptrace::detach(pid, None)?;
    let took = start.elapsed();
    ensure!(after.rip == instruction + 2, "the thread did not go through the system call");
    Ok(took)
}

/// Where the vDSO of a process has the instruction `syscall`.
fn syscall_instruction(pid: i32) -> anyhow::Result<u64> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let line = maps.lines().find(|line| line.ends_with("[vdso]")).context("no vDSO")?;
    let (start, end) = line.split(' ').next().and_then(|range| range.split_once('-')).context("a range")?;
    let (start, end) = (u64::from_str_radix(start, 16)?, u64::from_str_radix(end, 16)?);
    let mut code = vec![0; (end - start) as usize];
    File::open(format!("/proc/{pid}/mem"))?.read_exact_at(&mut code, start)?;
    let at = code.windows(2).position(|bytes| bytes == [0x0f, 0x05]).context("no system call in the vDSO")?;
    Ok(start + at as u64)
}

/// The same with a thread that is busy and watches the clock.
fn busy(runs: usize, every: u64) -> anyhow::Result<Measured> {
    let mut puppet = Puppet::start(ByteSize::mib(64), 0, 0)?;
    let (mut pauses, mut bare, mut seen, mut without) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs {
        puppet.watch(every)?;
        child::sleep(Duration::from_millis(20))?;
        let tracker = Tracker::attach(Target::open(puppet.pid())?, TrackerKind::UffdWp)?;
        pauses.push(tracker.attach_stop().as_secs_f64() * 1e6);
        tracker.detach()?;
        seen.push(puppet.watched()?.as_secs_f64() * 1e6);
        puppet.watch(every)?;
        without.push(puppet.watched()?.as_secs_f64() * 1e6);
        puppet.watch(every)?;
        child::sleep(Duration::from_millis(20))?;
        bare.push(one_call(puppet.pid())?.as_secs_f64() * 1e6);
        puppet.watched()?;
    }
    Ok(Measured { pause: pauses, bare, seen: Some([seen, without]) })
}

fn render(rows: &[Row], options: &Options) -> String {
    let mut table = Table::new(&[
        "target",
        "thread stood still us",
        "for one system call us",
        "longest gap it saw us",
        "and without tracker us",
        "goal",
    ]);
    for row in rows {
        let seen = |seen: &Option<Runs>| seen.as_ref().map_or_else(|| "-".to_owned(), |runs| runs.display(0));
        table.row(vec![
            row.target.to_owned(),
            row.pause_us.display(0),
            row.bare_us.display(0),
            seen(&row.seen_us),
            seen(&row.seen_without_us),
            if row.pass { "met" } else { "missed" }.to_owned(),
        ]);
    }
    format!(
        "{}\nuserfaultfd; median (smallest..largest) of {} times; goal: a median of at most {LIMIT_US} us\n\n{}",
        machine::describe(),
        options.runs,
        table.render()
    )
}
