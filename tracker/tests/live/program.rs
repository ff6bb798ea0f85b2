//! The program that is tracked: it does what it is told, a line at a time, and answers with a line.

use crate::sys::memory::{self, NO_ACCESS, READ_WRITE};
use crate::sys::objects;
use crate::sys::process::{self, PLAIN, QUEUED, QUEUED_SUM, Side};
use crate::sys::ring::Ring;
use crate::sys::sharing::{self, Guest};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::ptrace;
use nix::unistd::Pid;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The argument that makes the test program this one.
pub const ARGUMENT: &str = "--tracked-program";

/// What `compute` computes: integers and floating point, held in registers.
pub fn compute(rounds: u64) -> String {
    let (mut word, mut sum) = (0x9E37_79B9_7F4A_7C15u64, 1.0f64);
    for round in 0..rounds {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        sum = (sum * 1.000_000_1 + (round & 7) as f64) % 1000.0;
    }
    format!("{word:x} {sum:?}")
}

/// Maps, grows, shrinks, moves and unmaps a few mappings, and looks that what was in them stays.
fn reshape(turns: u64) -> io::Result<()> {
    const MAPPINGS: usize = 6;
    let mut random = 1u64;
    let mut below = move |limit: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % limit
    };
    let mut mappings: Vec<(u64, u64)> = Vec::new();
    for turn in 0..turns {
        if mappings.len() < MAPPINGS {
            let pages = 1 + below(16);
            let at = memory::map(None, pages, READ_WRITE)?;
            (0..pages).for_each(|page| memory::store(at + page * 4096, page + 1));
            mappings.push((at, pages));
        }
        let index = below(mappings.len() as u64) as usize;
        let (at, pages) = mappings[index];
        let to = 1 + below(32);
        let at = memory::resize(at, pages, to).map_err(|error| {
            io::Error::other(format!("turn {turn}: resizing {pages} pages at {at:#x} to {to}: {error}"))
        })?;
        for page in 0..pages.min(to) {
            if memory::load(at + page * 4096) != page + 1 {
                return Err(io::Error::other(format!("turn {turn}: page {page} of {at:#x} is another")));
            }
        }
        (0..to).for_each(|page| memory::store(at + page * 4096, page + 1));
        mappings[index] = (at, to);
        if below(4) == 0 {
            mappings.swap_remove(index);
            memory::unmap(at, to)?;
        }
    }
    mappings.iter().try_for_each(|&(at, pages)| memory::unmap(at, pages))
}

/// Every write is of a value that was never written before.
static NEXT_VALUE: AtomicU64 = AtomicU64::new(1);

struct Program {
    input: OwnedFd,
    output: OwnedFd,
    buffer: Vec<u8>,
    interrupted: u64,
    child: Option<(i32, OwnedFd, OwnedFd)>,
    ring: Option<Ring>,
    flock: process::Flock,
}

pub fn run() -> ! {
    let duplicate = |fd: io::Result<OwnedFd>| fd.unwrap_or_else(|e| panic!("no standard streams: {e}"));
    let input = duplicate(io::stdin().as_fd().try_clone_to_owned());
    let output = duplicate(io::stdout().as_fd().try_clone_to_owned());
    Program {
        input,
        output,
        buffer: Vec::new(),
        interrupted: 0,
        child: None,
        ring: None,
        flock: Default::default(),
    }
    .obey()
}

impl Program {
    fn obey(&mut self) -> ! {
        self.answer("ready");
        loop {
            // Who gives the orders is gone.
            let Some(line) = self.line() else { std::process::exit(0) };
            let answer = self.execute(&line).unwrap_or_else(|error| format!("error: {line}: {error}"));
            self.answer(&answer);
        }
    }

    fn answer(&self, text: &str) {
        let line = format!("{text}\n");
        if rustix::io::write(&self.output, line.as_bytes()).is_err() {
            std::process::exit(0);
        }
    }

    fn line(&mut self) -> Option<String> {
        let mut interrupted = 0;
        let line = read_line(&self.input, &mut self.buffer, &mut interrupted);
        self.interrupted += interrupted;
        line
    }

    fn execute(&mut self, line: &str) -> io::Result<String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |at: usize| -> io::Result<u64> {
            let word = words.get(at).ok_or_else(|| io::Error::other("a number is missing"))?;
            match word.strip_prefix("0x") {
                Some(hex) => u64::from_str_radix(hex, 16),
                None => word.parse(),
            }
            .map_err(io::Error::other)
        };
        match words[0] {
            // Between two pages that nobody may touch: mappings that the kernel merges share their soft-dirty mark.
            "map" => {
                let outer = memory::map(None, number(1)? + 2, NO_ACCESS)?;
                memory::protect(outer + 4096, number(1)?, READ_WRITE)?;
                memory::advise(outer + 4096, number(1)?, libc::MADV_NOHUGEPAGE)?;
                return Ok(format!("{}", outer + 4096));
            }
            "map-at" => drop(memory::map(Some(number(1)?), number(2)?, READ_WRITE)?),
            // Aligned, so that the kernel can use huge pages.
            "map-huge" => {
                let huge = 512;
                let pages = number(1)?.next_multiple_of(huge);
                let outer = memory::map(None, pages + 2 * huge, NO_ACCESS)?;
                let inner = (outer + 4096).next_multiple_of(huge * 4096);
                memory::protect(inner, pages, READ_WRITE)?;
                memory::advise(inner, pages, libc::MADV_HUGEPAGE)?;
                return Ok(format!("{inner}"));
            }
            // Memory that outlives its mappings; files are answered with their descriptor.
            "share-pages" => return Ok(format!("{}", objects::shared(number(1)?)?)),
            "system-v" => return Ok(format!("{}", objects::system_v(number(1)?)?)),
            "memfd" => return Ok(format!("{}", objects::memfd(number(1)?)?)),
            "posix" => return Ok(format!("{}", objects::posix(number(1)?)?)),
            "file" => return Ok(format!("{}", objects::file(number(1)?)?)),
            // `map-shared DESCRIPTOR PAGES FIRST-PAGE`
            "map-shared" | "map-private" => {
                let shared = words[0] == "map-shared";
                let at = objects::map_descriptor(number(1)? as i32, number(2)?, number(3)?, shared)?;
                return Ok(format!("{at}"));
            }
            "map-hugetlb" => return Ok(format!("{}", objects::huge(number(1)?, number(2)? == 1)?)),
            "truncate" => objects::truncate(number(1)? as i32, number(2)?)?,
            "punch" => objects::punch(number(1)? as i32, number(2)?, number(3)?)?,
            "write-through" => {
                let value = NEXT_VALUE.fetch_add(1, Ordering::SeqCst);
                objects::write_word(number(1)? as i32, number(2)?, value)?;
            }
            // Registered with io_uring, and read into by it.
            "pin" => {
                if self.ring.is_none() {
                    self.ring = Some(Ring::new()?);
                }
                self.ring()?.register(number(1)?, number(2)?)?;
            }
            "unpin" => self.ring()?.unregister()?,
            "read-pinned" => self.ring()?.read(number(1)? as i32, number(2)?)?,
            "unmap" => memory::unmap(number(1)?, number(2)?)?,
            "move" => memory::relocate(number(1)?, number(2)?, number(3)?)?,
            "grow" => memory::grow(number(1)?, number(2)?, number(3)?)?,
            "advise" => memory::advise(number(1)?, number(2)?, number(3)? as i32)?,
            "seal" => memory::protect(number(1)?, number(2)?, NO_ACCESS)?,
            "unseal" => memory::protect(number(1)?, number(2)?, READ_WRITE)?,
            "lock" => memory::lock(number(1)?, number(2)?)?,
            "unlock" => memory::unlock(number(1)?, number(2)?)?,
            "grow-heap" => return Ok(format!("{}", memory::grow_heap(number(1)?)?)),
            "map-sparse" => return Ok(format!("{}", memory::map_sparse(number(1)?)?)),
            // So many pages deep; says where the last of them is.
            "grow-stack" => {
                let value = NEXT_VALUE.fetch_add(1, Ordering::SeqCst);
                return Ok(format!("{}", memory::descend(number(1)?, value)));
            }
            // `write ADDRESS PAGE…`: into these pages of the range that begins there.
            "write" => {
                for at in 2..words.len() {
                    let value = NEXT_VALUE.fetch_add(1, Ordering::SeqCst);
                    memory::store(number(1)? + number(at)? * 4096, value);
                }
            }
            "store" => memory::store(number(1)?, number(2)?),
            "write-all" => {
                for page in 0..number(2)? {
                    let value = NEXT_VALUE.fetch_add(1, Ordering::SeqCst);
                    memory::store(number(1)? + page * 4096, value);
                }
            }
            "read" => {
                let words: io::Result<Vec<String>> = (0..number(2)?)
                    .map(|page| Ok(memory::load(number(1)? + page * 4096).to_string()))
                    .collect();
                return Ok(words?.join(" "));
            }
            // Every second page of another protection, so that they cannot merge.
            "map-many" => {
                let base = memory::map(None, number(1)? * 2, READ_WRITE)?;
                for at in 0..number(1)? {
                    memory::protect(base + at * 8192, 1, NO_ACCESS)?;
                }
                return Ok(format!("{base}"));
            }
            // `write-behind ADDRESS PAGES`: another thread writes without end.
            "write-behind" => {
                let (base, pages) = (number(1)?, number(2)?);
                std::thread::spawn(move || {
                    for turn in 1u64.. {
                        for page in 0..pages {
                            memory::store(base + page * 4096, turn);
                        }
                    }
                });
            }
            // `thread ADDRESS PAGE`: another thread writes once, and stays.
            "thread" => {
                let address = number(1)? + number(2)? * 4096;
                let (tell, told) = std::sync::mpsc::channel();
                std::thread::spawn(move || {
                    memory::store(address, NEXT_VALUE.fetch_add(1, Ordering::SeqCst));
                    // The other end waits for it.
                    let _ = tell.send(());
                    loop {
                        std::thread::park();
                    }
                });
                told.recv().map_err(io::Error::other)?;
            }
            "fork" => return self.fork(),
            // `spawn COUNT ADDRESS`: children that wait to be told to write a page there.
            "spawn" => {
                let mut pids = Vec::new();
                for turn in 0..number(1)? {
                    let (page, value) =
                        (number(2)? + turn % 16 * 4096, NEXT_VALUE.fetch_add(1, Ordering::SeqCst));
                    pids.push(self.flock.add(page, value)?);
                }
                let words: Vec<String> = pids.iter().map(i32::to_string).collect();
                return Ok(words.join(" "));
            }
            "wake-all" => self.flock.wake()?,
            "end" => self.flock.end(number(1)? as usize)?,
            "unshare-pids" => process::unshare_pids()?,
            "child" => return self.child(line.strip_prefix("child ").unwrap_or_default()),
            "reap" => {
                let Some((pid, ..)) = self.child.take() else { return Err(io::Error::other("no child")) };
                nix::sys::wait::waitpid(Pid::from_raw(pid), None)?;
            }
            "abandon" => self.child = None,
            "exec" => return Err(Command::new("/proc/self/exe").arg(ARGUMENT).exec()),
            "exec-program" => return Err(Command::new(words[1]).arg(ARGUMENT).exec()),
            // Another thread obeys from now on, and says so.
            "leave-it-to-a-thread" => {
                let (input, output) = (self.input.try_clone()?, self.output.try_clone()?);
                let child = self.child.take();
                let mut heir = Program {
                    input,
                    output,
                    buffer: Vec::new(),
                    interrupted: 0,
                    child,
                    ring: None,
                    flock: Default::default(),
                };
                std::thread::spawn(move || heir.obey());
                process::end_this_thread();
            }
            "exit" => std::process::exit(0),
            "sleep" => {
                let start = Instant::now();
                let length = Duration::from_millis(number(1)?);
                let slept = rustix::thread::nanosleep(&rustix::thread::Timespec {
                    tv_sec: length.as_secs() as i64,
                    tv_nsec: i64::from(length.subsec_nanos()),
                });
                return Ok(match slept {
                    rustix::thread::NanosleepRelativeResult::Ok if start.elapsed() >= length => "ok".into(),
                    other => format!("{other:?} after {:?}", start.elapsed()),
                });
            }
            // Waits for the next line, and says how often that was interrupted.
            "epoll" => {
                let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
                epoll.add(&self.input, EpollEvent::new(EpollFlags::EPOLLIN, 7))?;
                let mut events = [EpollEvent::empty()];
                let mut interrupted = 0;
                loop {
                    match epoll.wait(&mut events, EpollTimeout::NONE) {
                        Ok(1) if events[0].data() == 7 => break,
                        Err(nix::Error::EINTR) => interrupted += 1,
                        other => return Ok(format!("{other:?}")),
                    }
                }
                self.line();
                return Ok(format!("{interrupted}"));
            }
            "interrupted" => return Ok(format!("{}", self.interrupted)),
            "reshape" => reshape(number(1)?)?,
            "compute" => return Ok(compute(number(1)?)),
            "count-signals" => process::count_signals()?,
            "ignore" => process::ignore(number(1)? as i32),
            "is-ignored" => return Ok(format!("{}", process::is_ignored(number(1)? as i32))),
            "counts" => {
                let count = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
                return Ok(format!("{} {} {}", count(&PLAIN), count(&QUEUED), count(&QUEUED_SUM)));
            }
            "forbid-userfaultfd" => process::forbid_userfaultfd()?,
            "call-userfaultfd" => process::call_userfaultfd(),
            // `vfork MILLISECONDS`: waits for a child on this memory.
            "vfork" => {
                let child = sharing::invite(Guest::Borrows(number(1)?))?;
                nix::sys::wait::waitpid(Pid::from_raw(child), None)?;
            }
            // `share ADDRESS`: a child on this memory writes there, without end.
            "share" => return Ok(format!("{}", sharing::invite(Guest::Writes(number(1)?))?)),
            // The only child, whoever made it: it is there also after an exec.
            "kill-guest" => {
                let children = std::fs::read_to_string("/proc/thread-self/children")?;
                let child = Pid::from_raw(children.trim().parse().map_err(io::Error::other)?);
                nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL)?;
                nix::sys::wait::waitpid(child, None)?;
                return Ok("0".to_owned());
            }
            "track-yourself" => sharing::track_ourselves(number(1)?, number(2)?)?,
            "what-you-wrote" => return Ok(format!("{}", sharing::what_we_wrote(number(1)?, number(2)?)?)),
            // `sequences MILLISECONDS`: how restartable sequences end.
            "sequences" => {
                let (start, length) = (Instant::now(), Duration::from_millis(number(1)?));
                let ends = sharing::run_sequences(|| start.elapsed() < length);
                return Ok(format!("{} {} {}", ends.finished, ends.restarted, ends.betrayed));
            }
            "trace" => {
                ptrace::seize(Pid::from_raw(number(1)? as i32), ptrace::Options::empty())?;
            }
            other => return Err(io::Error::other(format!("{other} is no command"))),
        }
        Ok("ok".to_owned())
    }

    fn ring(&self) -> io::Result<&Ring> {
        self.ring.as_ref().ok_or_else(|| io::Error::other("nothing is pinned"))
    }

    /// The child obeys too; its orders come through us.
    fn fork(&mut self) -> io::Result<String> {
        let (orders, to_child) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let (from_child, answers) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        match process::fork()? {
            Side::Child => {
                drop((to_child, from_child));
                self.child = None;
                (self.input, self.output) = (orders, answers);
                self.buffer.clear();
                self.obey()
            }
            Side::Parent(pid) => {
                drop((orders, answers));
                read_line(&from_child, &mut Vec::new(), &mut 0);
                self.child = Some((pid, to_child, from_child));
                Ok(format!("{pid}"))
            }
        }
    }

    fn child(&mut self, order: &str) -> io::Result<String> {
        let Some((_, to_child, from_child)) = &self.child else { return Err(io::Error::other("no child")) };
        rustix::io::write(to_child, format!("{order}\n").as_bytes())?;
        Ok(read_line(from_child, &mut Vec::new(), &mut 0).unwrap_or_else(|| "gone".to_owned()))
    }
}

fn read_line(fd: &OwnedFd, buffer: &mut Vec<u8>, interrupted: &mut u64) -> Option<String> {
    loop {
        if let Some(at) = buffer.iter().position(|byte| *byte == b'\n') {
            let line = String::from_utf8_lossy(&buffer[..at]).into_owned();
            buffer.drain(..=at);
            return Some(line);
        }
        let mut piece = [0; 4096];
        match rustix::io::read(fd, &mut piece) {
            Ok(0) => return None,
            Ok(got) => buffer.extend_from_slice(&piece[..got]),
            Err(rustix::io::Errno::INTR) => *interrupted += 1,
            Err(_) => return None,
        }
    }
}
