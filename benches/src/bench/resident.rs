//! The private memory of a process tree, as a compressor sees it: how much it is, how much of it is there only once, and
//! what `zstd -3` makes of it as one stream.

use anyhow::{Context, ensure};
use clap::Args;
use pageferry_wire_format::{PAGE_SIZE, digest};
use procfs::process::{MemoryPageFlags, PageInfo, Process};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;

/// Level of the compressor that migrations are compared with.
const LEVEL: i32 = 3;
/// Pages that are read at a time.
const BATCH: usize = 256;

/// Options of the reader.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Root of the tree
    #[arg(long)]
    pid: i32,
}

/// What was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resident {
    /// Processes of the tree.
    pub processes: u64,
    /// Bytes of pages that each process has of its own or shares copy-on-write, in memory or in swap.
    pub raw_bytes: u64,
    /// Of these, bytes of pages that differ from all others, and are not zero.
    pub distinct_bytes: u64,
    /// All of them, zero pages too, one after the other, compressed by `zstd -3` as one stream.
    pub zstd3_bytes: u64,
}

/// Counts bytes and forgets them.
#[derive(Debug, Default)]
struct Counter(u64);

impl Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads the tree and prints what was found as JSON.
///
/// # Errors
/// What kept it from reading.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let mut found = Resident::default();
    let mut seen = HashSet::new();
    let mut zstd = zstd::stream::Encoder::new(Counter::default(), LEVEL).context("starting zstd")?;
    for pid in tree(options.pid)? {
        found.processes += 1;
        read(pid, |page| {
            found.raw_bytes += page.len() as u64;
            let new = !digest::is_zero(page) && seen.insert(digest::page(page));
            found.distinct_bytes += if new { page.len() as u64 } else { 0 };
            zstd.write_all(page).context("compressing")
        })?;
    }
    found.zstd3_bytes = zstd.finish().context("compressing")?.0;
    println!("{}", serde_json::to_string(&found)?);
    Ok(ExitCode::SUCCESS)
}

/// A process and all that come from it.
fn tree(root: i32) -> anyhow::Result<Vec<i32>> {
    let mut all = vec![root];
    let mut at = 0;
    while let Some(&pid) = all.get(at) {
        let process = Process::new(pid).with_context(|| format!("looking at process {pid}"))?;
        for task in process.tasks().with_context(|| format!("listing the threads of {pid}"))? {
            let children = task.and_then(|task| task.children());
            let children = children.with_context(|| format!("listing the children of {pid}"))?;
            all.extend(children.into_iter().map(|child| child as i32));
        }
        at += 1;
    }
    Ok(all)
}

/// Shows each page of a process that is there and is not a file's, in the order of addresses.
fn read(pid: i32, mut each: impl FnMut(&[u8; PAGE_SIZE]) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let process = Process::new(pid).with_context(|| format!("looking at process {pid}"))?;
    let maps = process.maps().with_context(|| format!("reading the mappings of {pid}"))?;
    let mut pagemap = process.pagemap().with_context(|| format!("opening the pagemap of {pid}"))?;
    let path = format!("/proc/{pid}/mem");
    let memory = File::open(&path).with_context(|| format!("opening {path}"))?;
    let mut buffer = vec![0; BATCH * PAGE_SIZE];
    let mut pages = 0u64;
    for map in maps.iter().filter(|map| !is_kernels(&map.pathname)) {
        let (first, end) = (map.address.0 as usize / PAGE_SIZE, map.address.1 as usize / PAGE_SIZE);
        let info =
            pagemap.get_range_info(first..end).with_context(|| format!("reading the pagemap of {pid}"))?;
        let mut at = 0;
        while at < info.len() {
            let there = info[at..].iter().take(BATCH).take_while(|info| is_private(info)).count();
            let bytes = &mut buffer[..there * PAGE_SIZE];
            memory
                .read_exact_at(bytes, ((first + at) * PAGE_SIZE) as u64)
                .with_context(|| format!("reading {path} at {:#x}", (first + at) * PAGE_SIZE))?;
            for page in bytes.as_chunks().0 {
                each(page)?;
            }
            pages += there as u64;
            at += there.max(1);
        }
    }
    ensure!(pages > 0, "process {pid} has no memory");
    Ok(())
}

/// Mappings that belong to the kernel, and differ from machine to machine.
fn is_kernels(path: &procfs::process::MMapPath) -> bool {
    use procfs::process::MMapPath::{Other, Vdso, Vsyscall, Vvar};
    matches!(path, Vdso | Vvar | Vsyscall) || matches!(path, Other(name) if name.starts_with("vvar"))
}

fn is_private(info: &PageInfo) -> bool {
    match info {
        PageInfo::MemoryPage(flags) => {
            flags.contains(MemoryPageFlags::PRESENT) && !flags.contains(MemoryPageFlags::FILE)
        }
        PageInfo::SwapPage(_) => true,
    }
}
