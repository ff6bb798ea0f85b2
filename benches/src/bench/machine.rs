//! The machine that a table was made on.

use anyhow::Context;
use std::fs;

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

/// Uses this much memory once, and gives it back.
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
