//! What the engines may take of the processors: they keep to it while the program runs, and a program that stands still is not made to wait.

use super::Test;
use super::control::{control, sends, wait_for};
use super::ferry::{Ferry, LIMIT};
use super::kept::fresh;
use anyhow::{Context, ensure};
use pageferry_benches::bench::hosts::Host;
use pageferry_benches::bench::subject::Subject;
use std::path::Path;
use std::time::{Duration, Instant};

pub fn tests() -> Vec<(&'static str, Test)> {
    vec![
        ("effort: the sender keeps to its share of a processor, and to another one", sender),
        ("effort: the receiver keeps to its share of a processor, and to its priority", receiver),
        ("effort: a program moves with little of a processor at either side", little),
        ("effort: owed pages come with little of a processor at either side", owed),
        ("effort: what is kept is written within the shares of both sides", keeping),
    ]
}

/// Much to do for a long time, for both sides: it goes on until it is told to end.
const WRITER: [&str; 6] = ["writer", "--memory", "192MiB", "--rate", "400MB", "--full-page"];
const ENDLESS: [&str; 8] =
    ["--policy", "fixed:1000000", "--coding", "raw", "--delta-cache", "0", "--streams", "2"];

/// Clock ticks (of 10 ms) that the threads of a process had on a processor; those of its children are their own.
fn ticks(ferry: &Ferry, host: Host, pid: i32) -> anyhow::Result<f64> {
    let stat = ferry.sh(host, &format!("cat /proc/{pid}/stat"))?;
    // proc_pid_stat(5): utime and stime are the fields 14 and 15, the name is the second.
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split_whitespace().collect();
    let field =
        |at: usize| -> anyhow::Result<f64> { Ok(fields.get(at - 3).with_context(|| stat.clone())?.parse()?) };
    Ok(field(14)? + field(15)?)
}

/// What it takes of one processor over some seconds.
fn share(ferry: &Ferry, host: Host, pid: i32) -> anyhow::Result<f64> {
    let (began, before) = (Instant::now(), ticks(ferry, host, pid)?);
    std::thread::sleep(Duration::from_secs(3));
    let after = ticks(ferry, host, pid)?;
    Ok((after - before) / 100.0 / began.elapsed().as_secs_f64())
}

/// A share is kept, and used: how much of it is the machine's doing.
fn kept(share: f64, of: f64) -> anyhow::Result<()> {
    ensure!(share < of * 1.1 + 0.015, "{share:.3} of a processor where {of} are allowed");
    ensure!(share > of * 0.3, "{share:.3} of a processor where {of} are allowed");
    Ok(())
}

fn engine(log: &str) -> anyhow::Result<i32> {
    Ok(log.lines().next().context("no process id")?.trim().parse()?)
}

fn given_up(ferry: &Ferry, subject: &Subject, migration: super::ferry::Migration) -> anyhow::Result<()> {
    ensure!(control(ferry, subject, &["cancel"])?.status()?.cancelled, "not given up");
    migration.wait()?.failed(130, &["running at the source"])?;
    ferry.lives_only(Host::Source, subject)?;
    ferry.hosts.kill(Host::Source, subject.pid)
}

fn sender(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&WRITER)?;
    let receiver = ferry.receiver(None, &[])?;
    let migration = ferry.migrate_start(subject.pid, None, &[&["--cpu", "20%"][..], &ENDLESS].concat())?;
    wait_for(ferry, &subject, &migration, sends)?;
    let pid = engine(&migration.log())?;
    kept(share(ferry, Host::Source, pid)?, 0.2)?;
    let status = control(ferry, &subject, &["cpu", "10%"])?.status()?;
    ensure!(status.cpu == Some(10), "{status:?}");
    kept(share(ferry, Host::Source, pid)?, 0.1)?;
    ensure!(control(ferry, &subject, &["cpu", "none"])?.status()?.cpu.is_none(), "a limit is left");
    let free = share(ferry, Host::Source, pid)?;
    ensure!(free > 0.3, "{free} of a processor without a limit");
    given_up(ferry, &subject, migration)?;
    receiver.stop()
}

fn receiver(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&WRITER)?;
    let receiver = ferry.receiver(None, &["--cpu", "15%", "--nice", "11"])?;
    let migration = ferry.migrate_start(subject.pid, None, &ENDLESS)?;
    wait_for(ferry, &subject, &migration, sends)?;
    kept(share(ferry, Host::Destination, receiver.pid)?, 0.15)?;
    // The threads that receive have it, and not CRIU, which waits for the images.
    let list = ferry.sh(Host::Destination, &format!("ps -L -o ni= -p {}", receiver.pid))?;
    ensure!(list.split_whitespace().filter(|nice| *nice == "11").count() >= 2, "nice values: {list}");
    let criu = ferry.sh(Host::Destination, &format!("ps -o ni= --ppid {}", receiver.pid))?;
    ensure!(!criu.is_empty() && criu.split_whitespace().all(|nice| nice == "0"), "CRIU's: {criu}");
    given_up(ferry, &subject, migration)?;
    receiver.stop()
}

/// Moves it there with `options`.
fn moves(ferry: &Ferry, options: &[&str]) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "48MiB", "--rate", "1MB"])?;
    let receiver = ferry.receiver(None, &["--once", "--cpu", "4%", "--nice", "19", "--standby", "16MiB"])?;
    let usual = ["--verify", "--cpu", "4%", "--nice", "19", "--streams", "2"];
    let outcome = ferry.migrate(subject.pid, None, &[&usual[..], options].concat())?;
    let report = outcome.moved()?;
    ensure!(report.verified, "not verified");
    // What nobody waits for takes many times longer than on a whole processor, and than the program stands still.
    let stood = Duration::from_micros(report.downtime_us.total);
    let late = report.post_copy.as_ref().map_or(0, |late| late.duration_us);
    let unawaited = Duration::from_micros(report.total_us + late) - stood;
    ensure!(stood * 2 < unawaited, "stood still for {stood:?}, and for the rest it took {unawaited:?}");
    ferry.lives_only(Host::Destination, &subject)?;
    let nice = ferry.sh(Host::Destination, &format!("ps -L -o ni= -p {}", subject.pid))?;
    ensure!(nice.split_whitespace().all(|nice| nice == "0"), "the program's own priority: {nice}");
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    ferry.hosts.kill(Host::Destination, subject.pid)
}

fn little(ferry: &Ferry) -> anyhow::Result<()> {
    moves(ferry, &["--downtime", "200ms"])
}

fn owed(ferry: &Ferry) -> anyhow::Result<()> {
    moves(ferry, &["--strategy", "post-copy"])
}

/// What an engine took of the processors while it wrote its kept store: looks at both.
#[derive(Default)]
struct Writing {
    first: Option<(Instant, f64)>,
    last: Option<(Instant, f64)>,
    over: bool,
}

impl Writing {
    fn look(&mut self, ferry: &Ferry, host: Host, pid: i32, store: &Path) -> anyhow::Result<()> {
        if self.over || !store.join("pages-1").exists() {
            return Ok(());
        }
        let taken = ticks(ferry, host, pid);
        // It is put in place when all pages are written.
        self.over = store.join("index").exists();
        if !self.over {
            let now = Some((Instant::now(), taken?));
            self.first = self.first.or(now);
            self.last = now;
        }
        Ok(())
    }

    fn share(&self) -> anyhow::Result<f64> {
        let ((began, before), (ended, after)) =
            self.first.zip(self.last).context("it was written before anybody could look")?;
        let time = ended - began;
        ensure!(time > Duration::from_millis(300), "it was written within {time:?}");
        Ok((after - before) / 100.0 / time.as_secs_f64())
    }
}

/// The program runs there by then: nobody waits for either.
fn keeping(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "256MiB", "--rate", "1MB"])?;
    let (here, there) = (fresh(ferry, "here"), fresh(ferry, "there"));
    let store = there.display().to_string();
    let receiver = ferry.receiver(None, &["--cpu", "20%", "--keep-store", &store])?;
    let store = here.display().to_string();
    let options = ["--cpu", "20%", "--keep-store", &store];
    let migration = ferry.migrate_start(subject.pid, None, &options)?;
    wait_for(ferry, &subject, &migration, sends)?;
    let sender = engine(&migration.log())?;
    let (mut at_source, mut at_destination) = (Writing::default(), Writing::default());
    let end = Instant::now() + LIMIT;
    while !(at_source.over && at_destination.over) {
        at_source.look(ferry, Host::Source, sender, &here)?;
        at_destination.look(ferry, Host::Destination, receiver.pid, &there)?;
        ensure!(Instant::now() < end, "nothing was kept in {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
    migration.wait()?.moved()?;
    for (side, writing) in [("source", at_source), ("destination", at_destination)] {
        kept(writing.share()?, 0.2).with_context(|| format!("at the {side}"))?;
    }
    ferry.lives_only(Host::Destination, &subject)?;
    receiver.stop()
}
