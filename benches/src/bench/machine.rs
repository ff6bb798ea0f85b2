//! The machine that a table was made on.

use anyhow::Context;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

/// One line: kernel, processors, memory, and how memory is managed.
pub fn describe() -> String {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpus = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let model = field(&cpuinfo, "model name").unwrap_or("unknown processor");
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let gib = kib(&meminfo, "MemTotal").unwrap_or(0) as f64 / f64::from(1 << 20);
    let huge = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let huge = huge.split(['[', ']']).nth(1).unwrap_or("none").to_owned();
    format!("Linux {}, {cpus} × {model}, {gib:.1} GiB, transparent huge pages: {huge}", kernel.trim())
}

/// Bytes that could be used without swapping.
///
/// # Errors
/// That the kernel does not say.
pub fn available_memory() -> anyhow::Result<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
    Ok(kib(&meminfo, "MemAvailable").context("/proc/meminfo has no MemAvailable")? * 1024)
}

/// Uses this much memory once, and gives it back: what is allocated next is memory that the machine has at hand. A
/// virtual machine's host takes back what lies free (balloon, free page reporting), and gives it again at 4 to 9 us a page,
/// which is slower than any copying that could be measured.
///
/// # Errors
/// That the kernel refuses it.
pub fn touch(bytes: u64) -> anyhow::Result<()> {
    let length = usize::try_from(bytes).context("more memory than there are addresses")?;
    memmap2::MmapOptions::new()
        .len(length)
        .populate()
        .map_anon()
        .with_context(|| format!("touching {bytes} bytes of memory"))?;
    Ok(())
}

/// Keeps the processors from idling while it lives, at the lowest priority. A processor of a virtual machine that idles
/// is left and entered again by the host at each wake-up, so a program that waits often runs *faster* when something
/// else runs beside it; with this, both are measured on processors that are awake.
#[derive(Debug)]
pub struct Awake {
    ended: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Awake {
    /// One thread for each processor.
    ///
    /// # Errors
    /// That no thread could be started.
    pub fn new() -> anyhow::Result<Self> {
        let count = thread::available_parallelism().map_or(1, usize::from);
        let mut awake = Self { ended: Arc::default(), threads: Vec::new() };
        for _ in 0..count {
            let ended = Arc::clone(&awake.ended);
            let spin = move || {
                // Linux takes this for the calling thread alone. Without it the measurement would be of two programs.
                if rustix::process::setpriority_process(None, 19).is_ok() {
                    while !ended.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                }
            };
            let thread = thread::Builder::new().name("awake".to_owned()).spawn(spin);
            awake.threads.push(thread.context("starting a thread that keeps a processor awake")?);
        }
        Ok(awake)
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // It cannot panic.
            let _ = thread.join();
        }
    }
}

/// The value of `name: value` in a file of such lines.
pub fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

/// A value in KiB of such a file.
pub fn kib(text: &str, name: &str) -> Option<u64> {
    field(text, name)?.strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "VmHWM:\t   12 kB\nVmH: 7 kB\nName:\tx: y\n";
        assert_eq!(kib(text, "VmHWM"), Some(12));
        assert_eq!(kib(text, "VmH"), Some(7));
        assert_eq!(field(text, "Name"), Some("x: y"));
        assert_eq!(kib(text, "Name"), None);
        assert_eq!(kib(text, "Vm"), None);
    }

    #[test]
    fn this_machine_has_memory_and_a_kernel() {
        assert!(available_memory().expect("meminfo") > 0);
        assert!(describe().starts_with("Linux "));
    }
}
