//! Memory that processes have, sampled from outside while a migration runs.

use super::machine;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How often the sender's own account of its peak is read: the last look before its end says nearly all.
const SENDER_EVERY: Duration = Duration::from_millis(20);
/// How often the destination's processes are added up.
const DESTINATION_EVERY: Duration = Duration::from_millis(50);
/// How often it is looked which they are.
const LIST_EVERY: Duration = Duration::from_millis(500);

/// Peaks of one migration.
#[derive(Debug, Default)]
pub(super) struct Peaks {
    /// Largest resident size of the sender as the kernel counts it (VmHWM), in bytes.
    pub(super) sender: AtomicU64,
    /// Most that all processes of the destination had at a time (the sum of their VmRSS), in bytes.
    pub(super) destination: AtomicU64,
    over: AtomicBool,
}

impl Peaks {
    /// The migration is over: nobody samples any more.
    pub(super) fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// Samples the process of that program and argument until the end. It is known by its command line, because its pid in the host's
    /// namespace says nothing here.
    pub(super) fn watch_sender(&self, program: &str, argument: &str) {
        let mut pid = None;
        while !self.is_over() {
            pid = pid.or_else(|| find(program, argument));
            if let Some(peak) = pid.and_then(|pid| size(pid, "VmHWM")) {
                self.sender.fetch_max(peak, Ordering::SeqCst);
            }
            thread::sleep(SENDER_EVERY);
        }
    }

    /// Samples all processes in the pid namespace of the one of that program and argument, until the end.
    pub(super) fn watch_destination(&self, program: &str, argument: &str) {
        let Some(namespace) = find(program, argument).and_then(namespace) else { return };
        let (mut pids, mut listed) = (Vec::new(), None::<Instant>);
        while !self.is_over() {
            if listed.is_none_or(|listed| listed.elapsed() > LIST_EVERY) {
                pids = all().filter(|pid| self::namespace(*pid).as_ref() == Some(&namespace)).collect();
                listed = Some(Instant::now());
            }
            let sum = pids.iter().filter_map(|pid| size(*pid, "VmRSS")).sum();
            self.destination.fetch_max(sum, Ordering::SeqCst);
            thread::sleep(DESTINATION_EVERY);
        }
    }
}

/// Bytes that a process has in memory, as far as it says.
pub(super) fn resident(pid: u32) -> u64 {
    size(pid, "VmRSS").unwrap_or(0)
}

fn size(pid: u32, field: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    Some(machine::kib(&status, field)? * 1024)
}

fn namespace(pid: u32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/pid")).ok()
}

fn all() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// A process by its program and one of its arguments.
pub(super) fn find(program: &str, argument: &str) -> Option<u32> {
    all().find(|pid| {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = command.split(|&byte| byte == 0);
        words.next() == Some(program.as_bytes()) && words.any(|word| word == argument.as_bytes())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process that is ended with the test.
    struct Sleeper(std::process::Child);

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn all_of_a_processs_namespace_is_added_up() {
        let length = format!("{}.5", 100_000 + std::process::id());
        let sleeper = Sleeper(std::process::Command::new("sleep").arg(&length).spawn().unwrap());
        let until = Instant::now() + Duration::from_secs(60);
        // Between fork and exec it has another command line.
        while find("sleep", &length) != Some(sleeper.0.id()) {
            assert!(Instant::now() < until, "it is not found");
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(find("sleep", "no such argument"), None);
        let own = resident(std::process::id());
        assert!(own > 1 << 20, "{own}");
        let peaks = Peaks::default();
        thread::scope(|scope| {
            scope.spawn(|| peaks.watch_destination("sleep", &length));
            while peaks.destination.load(Ordering::SeqCst) == 0 && Instant::now() < until {
                thread::sleep(Duration::from_millis(1));
            }
            peaks.end();
        });
        let sum = peaks.destination.load(Ordering::SeqCst);
        assert!(sum > own / 2, "{sum} bytes of all, and {own} of this one");
    }
}
