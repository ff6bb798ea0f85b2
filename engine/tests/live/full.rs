//! A destination that runs out of memory, in each phase in which it takes some: the migration ends with a reason, and the program runs on.
//! Only a restore has the kernel end somebody for it: what CRIU makes of its images is not announced.

use super::Test;
use super::ferry::{Ferry, Ignored, Receiver};
use anyhow::{Context, ensure};
use pageferry_benches::bench::hosts::Host;
use std::fs;
use std::path::{Path, PathBuf};

pub fn tests() -> Vec<(&'static str, Test)> {
    vec![
        ("full: the receiver's control group has no room for the pages", pages),
        ("full: the receiver's control group has no room for the images", images),
        (
            "full: the receiver's control group has room for the images, and not for what is made of them",
            restore,
        ),
        ("full: the program grows beyond the receiver's limit while it is copied", grows),
    ]
}

/// A control group whose members have so much memory and no more.
struct Group {
    dir: PathBuf,
}

impl Group {
    fn of(bytes: u64) -> anyhow::Result<Self> {
        let name = format!("pageferry-live-{}", std::process::id());
        // Version 1 of control groups has a tree for memory alone; in version 2 memory has to be enabled for the children of the root.
        for (root, limit) in
            [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")]
        {
            let dir = Path::new(root).join(&name);
            if !Path::new(root).join("cgroup.procs").exists() || fs::create_dir(&dir).is_err() {
                continue;
            }
            let group = Self { dir };
            if fs::write(group.dir.join(limit), bytes.to_string()).is_ok() {
                return Ok(group);
            }
        }
        Err(Ignored("needs a control group for memory that can be made here".to_owned()).into())
    }

    fn take(&self, ferry: &Ferry, receiver: &Receiver) -> anyhow::Result<()> {
        // By its number in its own host.
        let procs = self.dir.join("cgroup.procs");
        ferry.sh(Host::Destination, &format!("echo {} > {}", receiver.pid, procs.display()))?;
        let members = fs::read_to_string(&procs)?;
        ensure!(members.lines().count() == 1, "the group has {members:?}");
        Ok(())
    }

    /// Processes that the kernel has killed for it.
    fn killed(&self) -> anyhow::Result<u64> {
        for file in ["memory.oom_control", "memory.events"] {
            let text = fs::read_to_string(self.dir.join(file)).unwrap_or_default();
            if let Some(count) = text.lines().find_map(|line| line.strip_prefix("oom_kill ")) {
                return Ok(count.trim().parse()?);
            }
        }
        anyhow::bail!("the group does not say whether anybody was killed")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.dir);
    }
}

fn pages(ferry: &Ferry) -> anyhow::Result<()> {
    let subject = ferry.subject(&["writer", "--memory", "96MiB", "--rate", "1MB"])?;
    let group = Group::of(96 << 20)?;
    let receiver = ferry.receiver(None, &[])?;
    group.take(ferry, &receiver)?;
    for streams in ["1", "3"] {
        let outcome = ferry.migrate(subject.pid, None, &["--streams", streams, "--coding", "raw"])?;
        outcome.failed(1, &["out of memory", "in the control group", "running at the source"])?;
        ensure!(outcome.report.context("no report")?.interruptions == 0, "it was taken for a lost link");
        ferry.lives_only(Host::Source, &subject)?;
    }
    ensure!(group.killed()? == 0, "somebody was killed for memory");
    receiver.stop()
}

/// Shared memory travels in CRIU's images, which are kept in a file system in memory.
fn images(ferry: &Ferry) -> anyhow::Result<()> {
    let program = "import mmap, os, time\n\
                   memory = mmap.mmap(-1, 128 << 20)\n\
                   for page in range(0, len(memory), 4096): memory[page:page + 8] = os.urandom(8)\n\
                   print('ready', flush=True)\n\
                   while True: time.sleep(0.1)";
    let pid = ferry.python(program, 1)?;
    let group = Group::of(112 << 20)?;
    let receiver = ferry.receiver(None, &[])?;
    group.take(ferry, &receiver)?;
    let outcome = ferry.migrate(pid, None, &[])?;
    outcome.failed(1, &["out of memory", "in the control group", "running at the source"])?;
    ensure!(ferry.state(Host::Source, pid)? == Some('S'), "it does not run at the source");
    ensure!(group.killed()? == 0, "somebody was killed for memory");
    receiver.stop()?;
    // With room it moves.
    drop(group);
    let receiver = ferry.receiver(None, &["--once"])?;
    let outcome = ferry.migrate(pid, None, &[])?;
    ensure!(outcome.moved()?.image_file_bytes > 128 << 20, "what was to be in the images was not");
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    ferry.hosts.kill(Host::Destination, pid)
}

/// The kernel ends something there while CRIU restores: whoever that is, the program runs on here, and nothing of it is left there.
fn restore(ferry: &Ferry) -> anyhow::Result<()> {
    let program = "import mmap, os, time\n\
                   memory = mmap.mmap(-1, 96 << 20)\n\
                   for page in range(0, len(memory), 4096): memory[page:page + 8] = os.urandom(8)\n\
                   print('ready', flush=True)\n\
                   while True: time.sleep(0.1)";
    let pid = ferry.python(program, 1)?;
    // The images and the receiver take some 125 MiB, and CRIU makes 96 more of the former.
    let group = Group::of(190 << 20)?;
    let receiver = ferry.receiver(None, &[])?;
    group.take(ferry, &receiver)?;
    let outcome = ferry.migrate(pid, None, &[])?;
    outcome.failed(1, &["out of memory", "the kernel has ended", "running at the source", "more memory"])?;
    ensure!(group.killed()? > 0, "there was memory enough: it fails for something else");
    ensure!(outcome.report.context("no report")?.outcome == "rolled-back", "the report's outcome");
    ensure!(ferry.state(Host::Source, pid)? == Some('S'), "it does not run at the source");
    ensure!(ferry.state(Host::Destination, pid)?.is_none(), "something of it is left at the destination");
    receiver.stop()?;
    drop(group);
    // With room it moves.
    let receiver = ferry.receiver(None, &["--once"])?;
    ferry.migrate(pid, None, &[])?.moved()?;
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    ferry.hosts.kill(Host::Destination, pid)
}

fn grows(ferry: &Ferry) -> anyhow::Result<()> {
    let program = "import time\n\
                   memory = []\n\
                   while True:\n  \
                   memory.append(bytearray(b'x' * (1 << 20)))\n  \
                   time.sleep(0.05 if len(memory) < 40 else 1000)";
    let pid = ferry.program(&["python3", "-I", "-c", program])?;
    let receiver = ferry.receiver(None, &["--memory-limit", "32MiB"])?;
    let options = ["--bandwidth", "8MB", "--coding", "raw", "--policy", "fixed:20"];
    let outcome = ferry.migrate(pid, None, &options)?;
    ensure!(outcome.code == 1 && outcome.err.contains("running at the source"), "{}", outcome.err);
    ensure!(
        outcome.err.contains("memory free") || outcome.err.contains("of the limit"),
        "it does not say why: {}",
        outcome.err
    );
    ensure!(ferry.state(Host::Source, pid)? == Some('S'), "it does not run at the source");
    receiver.stop()
}
