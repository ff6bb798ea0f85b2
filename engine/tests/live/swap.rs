//! Programs that lie in swap in part when they are moved.

use super::Test;
use super::ferry::{Ferry, Ignored};
use super::swap_device::Swap;
use anyhow::{Context, ensure};
use pageferry_benches::bench::hosts::Host;
use std::time::{Duration, Instant};

pub fn tests() -> Vec<(&'static str, Test)> {
    vec![
        ("swap: a writer of which most is in swap", |ferry| {
            moves(ferry, &["writer", "--memory", "32MiB", "--rate", "1MB"])
        }),
        ("swap: every kind of memory", |ferry| moves(ferry, &["mixed", "--memory", "16MiB"])),
        ("swap: a multi-threaded writer", |ferry| {
            moves(ferry, &["threads", "--memory", "16MiB", "--threads", "2"])
        }),
    ]
}

/// Has the kernel take away what it can of a process' private memory, and says how many pages of it are in swap then.
fn swap_out(ferry: &Ferry, pid: i32) -> anyhow::Result<u64> {
    // From outside: `process_madvise(pidfd, ranges, MADV_PAGEOUT)`, mapping by mapping.
    let script = r#"
import ctypes, os, sys
pid = int(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
class Range(ctypes.Structure):
    _fields_ = [("start", ctypes.c_size_t), ("length", ctypes.c_size_t)]
PIDFD_OPEN, PROCESS_MADVISE, MADV_PAGEOUT = 434, 440, 21
pidfd = libc.syscall(PIDFD_OPEN, pid, 0)
assert pidfd >= 0, os.strerror(ctypes.get_errno())
for line in open(f"/proc/{pid}/maps"):
    words = line.split()
    if words[1] != "rw-p" or words[4] != "0":
        continue
    start, end = (int(word, 16) for word in words[0].split("-"))
    part = Range(start, end - start)
    libc.syscall(PROCESS_MADVISE, pidfd, ctypes.byref(part), 1, MADV_PAGEOUT, 0)
for line in open(f"/proc/{pid}/status"):
    if line.startswith("VmSwap:"):
        print(int(line.split()[1]) // 4)
"#;
    let output =
        ferry.hosts.exec(Host::Source, ["python3", "-I", "-c", script, &pid.to_string()]).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout)?;
    text.trim().parse().with_context(|| format!("no count of pages in swap: {text:?}"))
}

fn moves(ferry: &Ferry, workload: &[&str]) -> anyhow::Result<()> {
    let swap = Swap::on().map_err(|why| Ignored(format!("needs swap: {why}")))?;
    let subject = ferry.subject(workload)?;
    subject.check().context("before the move")?;
    // A page that came lately waits on some processor to be put in a list, and cannot be taken from there.
    let until = Instant::now() + Duration::from_secs(20);
    while swap_out(ferry, subject.pid)? < 2000 {
        ensure!(Instant::now() < until, "the program does not go to swap");
        std::thread::sleep(Duration::from_millis(20));
    }
    let receiver = ferry.receiver(None, &["--once"])?;
    let migration = ferry.migrate_start(subject.pid, None, &["--verify", "--bandwidth", "20MB"])?;
    // Again while rounds are under way: pages that were sent, and are written, and go.
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(100));
        // It may have moved by now.
        let _ = swap_out(ferry, subject.pid);
    }
    let outcome = migration.wait()?;
    let report = outcome.moved()?;
    ensure!(report.verified && report.verified_pages > 0, "it was not verified");
    ferry.lives_only(Host::Destination, &subject).context("after the move")?;
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    // Before the swap goes, so that nobody is moved in between.
    ferry.hosts.kill(Host::Destination, subject.pid)?;
    drop(swap);
    Ok(())
}
