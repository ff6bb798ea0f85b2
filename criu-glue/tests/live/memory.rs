//! A tree of two processes with memory that can be told right from wrong, and what is known about it from outside.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use pageferry_criu_glue::{Owned, PAGE_SIZE};

/// The argument by which the test program is this tree.
pub const ARGUMENT: &str = "__memory";
const PATIENCE: Duration = Duration::from_secs(20);
/// `PM_PRESENT` and `PM_SWAP` of `/proc/PID/pagemap`.
const POPULATED: u64 = 3 << 62;

/// The word that belongs at `index` in the process that calls itself `who`.
fn word(who: u64, index: u64) -> u64 {
    (index ^ (who << 56)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29) | 1
}

/// The `main` of each process: `pages` pages of known words, of which the first one counts.
pub fn run(who: u64, pages: u64) -> std::io::Result<()> {
    let words_of_page = PAGE_SIZE / 8;
    let mut words: Vec<u64> = (0..(pages + 2) * words_of_page).map(|i| word(who, i)).collect();
    let first = (words.as_ptr() as u64).next_multiple_of(PAGE_SIZE);
    let counter = ((first - words.as_ptr() as u64) / 8) as usize;
    words[counter] = 0;
    let child = match who {
        0 => {
            rustix::process::setsid()?;
            Some(Command::new("/proc/self/exe").args([ARGUMENT, "1", &pages.to_string()]).spawn()?)
        }
        _ => None,
    };
    let parent = rustix::process::getppid();
    println!("{who} {} {first}", std::process::id());
    std::io::stdout().flush()?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    drop(null);
    loop {
        let count = std::hint::black_box(words[counter]);
        words[counter] = count + 1;
        std::hint::black_box(&words);
        std::thread::sleep(Duration::from_millis(1));
        // The child ends with the root; a restored root has the pid of the first one.
        if child.is_none() && rustix::process::getppid() != parent {
            return Ok(());
        }
    }
}

/// Whether nothing is left of a process, not even for a parent to reap. Reaps it if that is up to us.
pub fn is_gone(pid: i32) -> bool {
    // Not our child, or not any more: then somebody else reaps it, or has done so.
    let _ =
        rustix::process::waitpid(rustix::process::Pid::from_raw(pid), rustix::process::WaitOptions::NOHANG);
    !std::path::Path::new(&format!("/proc/{pid}")).exists()
}

/// One process of the tree.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    who: u64,
    pub pid: i32,
    pub address: u64,
    pub pages: u64,
}

impl Member {
    fn memory(&self) -> std::io::Result<File> {
        File::open(format!("/proc/{}/mem", self.pid))
    }

    pub fn count(&self) -> Result<u64, Failed> {
        let mut bytes = [0; 8];
        self.memory()?.read_exact_at(&mut bytes, self.address)?;
        Ok(u64::from_ne_bytes(bytes))
    }

    /// Everything but the counter must be what it was made as. Reading brings in what is not there yet.
    pub fn verify(&self) -> Result<(), Failed> {
        let mut bytes = vec![0; (self.pages * PAGE_SIZE) as usize];
        self.memory()?.read_exact_at(&mut bytes, self.address)?;
        let words: Vec<u64> =
            bytes.chunks_exact(8).map(|c| u64::from_ne_bytes(c.try_into().expect("eight bytes"))).collect();
        // Where in its vector the first whole page begins is in the words themselves.
        let offset = (0..=PAGE_SIZE / 8)
            .find(|&o| word(self.who, o + 1) == words[1])
            .ok_or_else(|| format!("{self:?}: the first page is wrong: {:#x}", words[1]))?;
        match (1..words.len()).find(|&i| words[i] != word(self.who, offset + i as u64)) {
            None => Ok(()),
            Some(i) => Err(format!("{self:?}: word {i} is wrong: {:#x}", words[i]).into()),
        }
    }

    /// Waits until it has counted on from `count`.
    pub fn counts_on_from(&self, count: u64) -> Result<(), Failed> {
        let until = Instant::now() + PATIENCE;
        while self.count()? <= count {
            if Instant::now() > until {
                let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid))?;
                return Err(format!("{self:?} does not count on from {count}: {stat}").into());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    pub fn is_dead(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        stat.rsplit(") ").next().is_none_or(|rest| rest.is_empty() || rest.starts_with(['Z', 'X']))
    }

    /// Every populated page of its private anonymous memory, read while it is frozen.
    pub fn populated(&self) -> Result<Vec<(u64, u64)>, Failed> {
        let pagemap = File::open(format!("/proc/{}/pagemap", self.pid))?;
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for line in std::fs::read_to_string(format!("/proc/{}/maps", self.pid))?.lines() {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            let name = fields.get(5).copied().unwrap_or("");
            if fields[4] != "0" || !fields[1].ends_with('p') || !matches!(name, "" | "[heap]" | "[stack]") {
                continue;
            }
            let (start, end) = fields[0].split_once('-').ok_or("no range")?;
            let start = u64::from_str_radix(start, 16)? / PAGE_SIZE;
            let end = u64::from_str_radix(end, 16)? / PAGE_SIZE;
            let mut entries = vec![0; ((end - start) * 8) as usize];
            pagemap.read_exact_at(&mut entries, start * 8)?;
            for (page, entry) in (start..).zip(entries.chunks_exact(8)) {
                if u64::from_ne_bytes(entry.try_into().expect("eight bytes")) & POPULATED == 0 {
                    continue;
                }
                match runs.last_mut() {
                    Some((first, pages)) if *first + *pages == page => *pages += 1,
                    _ => runs.push((page, 1)),
                }
            }
        }
        Ok(runs)
    }

    /// All of that, as something that criu shall not dump.
    pub fn owned(&self) -> Result<Owned, Failed> {
        let runs = self.populated()?;
        Ok(Owned { pid: self.pid, vpid: self.pid, populated: runs.clone(), runs })
    }

    /// Page number and bytes of every page of `runs`.
    pub fn read(&self, runs: &[(u64, u64)]) -> Result<Vec<(u64, Vec<u8>)>, Failed> {
        let memory = self.memory()?;
        let mut pages = Vec::new();
        for page in runs.iter().flat_map(|&(first, count)| first..first + count) {
            let mut bytes = vec![0; PAGE_SIZE as usize];
            memory.read_exact_at(&mut bytes, page * PAGE_SIZE)?;
            pages.push((page, bytes));
        }
        Ok(pages)
    }
}

/// The running tree, ended and reaped on drop. A restored one is no child of ours: [`Tree::gone`] ends that.
pub struct Tree {
    child: Option<Child>,
    pub members: [Member; 2],
}

impl Tree {
    pub fn start(pages: u64) -> Result<Self, Failed> {
        let mut child = Command::new("/proc/self/exe")
            .args([ARGUMENT, "0", &pages.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
        let mut members = Vec::new();
        for _ in 0..2 {
            let line = lines.next().ok_or("the tree did not start")??;
            let numbers: Vec<u64> =
                line.split_ascii_whitespace().map(str::parse).collect::<Result<_, _>>()?;
            members.push(Member { who: numbers[0], pid: numbers[1] as i32, address: numbers[2], pages });
        }
        members.sort_by_key(|m| m.who);
        let members = [members[0], members[1]];
        // Counting has begun when both have let go of the pipe.
        members.iter().try_for_each(|m| m.counts_on_from(0))?;
        Ok(Self { child: Some(child), members })
    }

    pub fn root(&self) -> i32 {
        self.members[0].pid
    }

    pub fn lives(&self) -> Result<(), Failed> {
        for member in &self.members {
            member.counts_on_from(member.count()?)?;
            member.verify()?;
        }
        Ok(())
    }

    /// Waits until every process of it is dead and its pid is free. The root is our child; the other one, and what
    /// was restored, comes to us because we are a subreaper.
    pub fn gone(&mut self) -> Result<(), Failed> {
        if let Some(mut child) = self.child.take() {
            child.wait()?;
        }
        let until = Instant::now() + PATIENCE;
        for member in &self.members {
            while !is_gone(member.pid) {
                if Instant::now() > until {
                    return Err(format!("{member:?} is not gone").into());
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // The other one ends by itself when its parent does.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
