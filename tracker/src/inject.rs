//! Has a process make a userfaultfd of its own memory for us: the one thing that cannot be done from outside.
//!
//! One thread is stopped, its registers are saved, and it is led through a `syscall` instruction that its
//! memory already contains (in the vDSO, or its C library): once for `userfaultfd`, and, after the descriptor was
//! taken out with `pidfd_getfd`, once for `close`. Then its registers are restored. Nothing is written to its
//! memory. Its signals are blocked meanwhile, so that one that arrives is delivered afterwards, unchanged.

use crate::freeze::{self, FreezeError, PATIENCE, Traced};
use crate::region::{self, RegionError};
use crate::sys::ptrace::{self, Registers, Stop};
use crate::sys::uffd as sys;
use crate::target::Target;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use std::io::{self, IoSliceMut};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// Why the descriptor could not be had.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// A thread could not be stopped.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// The mappings could not be read.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The thread that was chosen is gone, with its process or without.
    #[error("process {0} has ended")]
    Gone(i32),
    /// There is no `syscall` instruction to use.
    #[error("process {0} has no system call instruction in its vDSO or its libraries")]
    NoInstruction(i32),
    /// Its registers and system calls are of another kind.
    #[error("process {0} is a 32-bit program: only 64-bit programs can be tracked")]
    Narrow(i32),
    /// Its seccomp filter would judge our system calls, and might end it.
    #[error("process {pid} has a seccomp filter, and we may not suspend it (that takes CAP_SYS_ADMIN)")]
    Filtered {
        /// The process.
        pid: i32,
    },
    /// The process may not have a userfaultfd.
    #[error("process {pid} may not make a userfaultfd")]
    Refused {
        /// The process.
        pid: i32,
        /// What the kernel told it.
        #[source]
        source: io::Error,
    },
    /// Anything else.
    #[error("could not have process {pid} make a userfaultfd ({step})")]
    Io {
        /// The process.
        pid: i32,
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// All signals; the kernel leaves out the two that cannot be blocked.
const EVERY_SIGNAL: u64 = u64::MAX;
/// The instruction `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// Bytes of the vDSO: two pages so far.
const VDSO: u64 = 2 * 4096;
/// `__USER_CS`: the code segment of 64-bit programs.
const WIDE_CODE: u64 = 0x33;
/// How long a thread may take to stop before another one is tried.
const TRY: Duration = Duration::from_millis(20);

/// A userfaultfd over the memory of `target`, which keeps no trace of it; and how long one of its threads stood still for
/// that, from the moment in which it was asked to stop.
pub(crate) fn userfaultfd(target: &Target) -> Result<(OwnedFd, Duration), InjectError> {
    // A thread of the target that does not stop in time is let go by the end of the thread that asked it.
    let work = || {
        // Looked for while it runs, which costs it nothing. What cannot be found now is looked for again.
        let likely = find_syscall(target).ok();
        let thread = any_thread(target)?;
        let asked = thread.asked;
        let uffd = Puppet::new(target, thread, likely)?.userfaultfd()?;
        Ok((uffd, asked.elapsed()))
    };
    freeze::apart(work).map_err(FreezeError::Thread)?
}

/// One thread of the process, stopped: the first that stops. One that waits for the disk, or for a child that it
/// made with `vfork`, does so when it likes.
fn any_thread(target: &Target) -> Result<Traced, InjectError> {
    let pid = target.pid();
    let failed = |step| move |source: io::Error| InjectError::Io { pid, step, source };
    let start = Instant::now();
    let mut asked: Vec<Traced> = Vec::new();
    for tid in target.threads().map_err(failed("listing its threads"))? {
        let Some(mut thread) = ask(target, tid)? else { continue };
        match thread.settle(target, TRY) {
            Ok(true) if thread.stands() => return unfiltered(target, thread),
            Ok(true) | Err(FreezeError::Stuck { .. }) => asked.push(thread),
            Ok(false) => {}
            Err(error) => return Err(error.into()),
        }
    }
    while let Some(first) = asked.first() {
        let (tid, waited) = (first.tid, start.elapsed());
        for at in (0..asked.len()).rev() {
            match asked[at].settle(target, Duration::ZERO) {
                Ok(true) if asked[at].stands() => return unfiltered(target, asked.swap_remove(at)),
                Ok(true) | Err(FreezeError::Stuck { .. }) => {}
                Ok(false) => drop(asked.swap_remove(at)),
                Err(error) => return Err(error.into()),
            }
        }
        if waited > PATIENCE {
            return Err(FreezeError::Stuck { pid, tid, waited }.into());
        }
    }
    Err(InjectError::Gone(pid))
}

/// Asks a thread to stop, with its filters suspended if we may do that.
fn ask(target: &Target, tid: i32) -> Result<Option<Traced>, FreezeError> {
    match Traced::ask(target, tid, ptrace::TELL_SYSCALLS | ptrace::SUSPEND_SECCOMP) {
        // Unprivileged, or without such a thing in the kernel, or with a filter of our own.
        Err(FreezeError::NotAllowed { .. } | FreezeError::Io { .. }) => {
            Traced::ask(target, tid, ptrace::TELL_SYSCALLS)
        }
        asked => asked,
    }
}

/// A thread that was asked without suspending its filters must have none. Filters are a thread's own.
fn unfiltered(target: &Target, thread: Traced) -> Result<Traced, InjectError> {
    let pid = target.pid();
    if thread.options & ptrace::SUSPEND_SECCOMP == 0 {
        let filters = target.thread_status(thread.tid, "Seccomp").map_err(|source| InjectError::Io {
            pid,
            step: "reading its status",
            source,
        })?;
        if filters.is_some_and(|mode| mode != "0") {
            return Err(InjectError::Filtered { pid });
        }
    }
    Ok(thread)
}

/// A stopped thread whose strings we pull; dropping it puts everything back.
struct Puppet<'a> {
    target: &'a Target,
    thread: Traced,
    registers: Registers,
    blocked: u64,
    instruction: u64,
    restored: bool,
}

impl<'a> Puppet<'a> {
    fn new(target: &'a Target, thread: Traced, likely: Option<u64>) -> Result<Self, InjectError> {
        let pid = target.pid();
        let failed = |step| move |source: io::Error| InjectError::Io { pid, step, source };
        let mut registers = ptrace::registers(thread.tid).map_err(failed("saving its registers"))?;
        if registers.cs != WIDE_CODE {
            return Err(InjectError::Narrow(pid));
        }
        // Only now that it stands: one that runs may become another program, with other code at the same address.
        let is_there = |at: &u64| {
            let mut bytes = [0; SYSCALL.len()];
            peek(pid, *at, &mut bytes).is_some_and(|()| bytes == SYSCALL)
        };
        let instruction = match likely.filter(is_there) {
            Some(instruction) => instruction,
            None => find_syscall(target)?,
        };
        leave_critical_section(pid, thread.tid, &mut registers);
        let blocked = ptrace::blocked(thread.tid).map_err(failed("saving its signal mask"))?;
        let puppet = Self { target, thread, registers, blocked, instruction, restored: false };
        ptrace::set_blocked(puppet.thread.tid, EVERY_SIGNAL).map_err(failed("blocking its signals"))?;
        Ok(puppet)
    }

    fn userfaultfd(mut self) -> Result<OwnedFd, InjectError> {
        let pid = self.target.pid();
        let failed = |step| move |source: io::Error| InjectError::Io { pid, step, source };
        let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
        let mut number = self.call(libc::SYS_userfaultfd as u64, flags)?;
        if number == -i64::from(libc::EPERM) {
            number = self.call(libc::SYS_userfaultfd as u64, flags | sys::USER_MODE_ONLY)?;
        }
        if number < 0 {
            let source = io::Error::from_raw_os_error(-number as i32);
            return Err(InjectError::Refused { pid, source });
        }
        let taken = rustix::process::pidfd_getfd(
            self.target.pidfd(),
            number as i32,
            rustix::process::PidfdGetfdFlags::empty(),
        );
        let closed = self.call(libc::SYS_close as u64, number as u64)?;
        self.restore().map_err(failed("restoring its registers"))?;
        if closed != 0 {
            let source = io::Error::from_raw_os_error(-closed as i32);
            return Err(failed("closing the descriptor in it")(source));
        }
        taken.map_err(|errno| failed("taking the descriptor out")(errno.into()))
    }

    /// One system call of the thread.
    fn call(&mut self, number: u64, argument: u64) -> Result<i64, InjectError> {
        let pid = self.target.pid();
        let failed = |step| move |source: io::Error| InjectError::Io { pid, step, source };
        let mut registers = self.registers;
        registers.rip = self.instruction;
        registers.rax = number;
        registers.rdi = argument;
        // Not in a system call: nothing is to be restarted.
        registers.orig_rax = u64::MAX;
        ptrace::set_registers(self.thread.tid, &registers).map_err(failed("setting its registers"))?;
        let (mut stops, mut signal) = (0, 0);
        while stops < 2 {
            self.thread
                .go(ptrace::resume_to_syscall, signal)
                .map_err(failed("leading it through a system call"))?;
            signal = 0;
            match self.wait().map_err(failed("waiting for it"))? {
                Stop::Syscall => stops += 1,
                Stop::Ended => return Err(InjectError::Gone(pid)),
                // SIGSTOP, the only one that could not be blocked. It stops the other threads now, and this one
                // when we let go of it.
                Stop::Signal(arrived) => signal = arrived,
                Stop::Event | Stop::Other => {}
            }
        }
        let registers = ptrace::registers(self.thread.tid).map_err(failed("reading its registers"))?;
        Ok(registers.rax as i64)
    }

    /// Puts the thread back to where it was. It was stopped on its way out of the kernel, and is again: from
    /// there the kernel restarts a system call that the first stop has interrupted.
    fn restore(&mut self) -> io::Result<()> {
        if std::mem::replace(&mut self.restored, true) {
            return Ok(());
        }
        let gone = |error: io::Error| match error.raw_os_error() {
            Some(libc::ESRCH) => Ok(()),
            _ => Err(error),
        };
        ptrace::interrupt(self.thread.tid).or_else(gone)?;
        let mut signal = 0;
        loop {
            self.thread.go(ptrace::resume, signal)?;
            signal = match self.wait()? {
                Stop::Event => break,
                Stop::Ended => return Ok(()),
                Stop::Signal(arrived) => arrived,
                Stop::Syscall | Stop::Other => 0,
            };
        }
        ptrace::set_blocked(self.thread.tid, self.blocked).or_else(gone)?;
        ptrace::set_registers(self.thread.tid, &self.registers).or_else(gone)
    }

    /// The next stop of a thread that has nothing to wait for.
    fn wait(&mut self) -> io::Result<Stop> {
        self.thread.wait(self.target, PATIENCE)?.ok_or_else(|| io::Error::from(io::ErrorKind::TimedOut))
    }
}

impl Drop for Puppet<'_> {
    fn drop(&mut self) {
        // It fails only for a thread that has ended.
        let _ = self.restore();
    }
}

/// Takes a thread out of a restartable sequence (`rseq(2)`) that it was stopped in, as the kernel does with one that it
/// puts aside: it goes on where the sequence says. Our detour makes the kernel forget that it was in one, and it would
/// finish as if nothing had come in between.
fn leave_critical_section(pid: i32, tid: i32, registers: &mut Registers) {
    let words = |at: u64, words: &mut [u64]| -> Option<()> {
        for (n, word) in words.iter_mut().enumerate() {
            let mut bytes = [0; 8];
            peek(pid, at + n as u64 * 8, &mut bytes)?;
            *word = u64::from_ne_bytes(bytes);
        }
        Some(())
    };
    // `struct rseq` has the address of the current `struct rseq_cs` in its second word; that one is version and
    // flags, first instruction, length, where to go instead.
    let inside = || -> Option<u64> {
        let (mut current, mut sequence) = ([0; 1], [0; 4]);
        words(ptrace::rseq_area(tid)? + 8, &mut current)?;
        (current[0] != 0).then_some(())?;
        words(current[0], &mut sequence)?;
        let [_, start, len, instead] = sequence;
        (registers.rip.wrapping_sub(start) < len).then_some(instead)
    };
    if let Some(instead) = inside() {
        registers.rip = instead;
    }
}

/// Reads a few bytes that the program itself can read. Quicker than by a file, which would have to be opened.
fn peek(pid: i32, at: u64, bytes: &mut [u8]) -> Option<()> {
    let len = bytes.len();
    let remote = [RemoteIoVec { base: at as usize, len }];
    let got = process_vm_readv(Pid::from_raw(pid), &mut [IoSliceMut::new(bytes)], &remote).ok()?;
    (got == len).then_some(())
}

/// The address of a `syscall` instruction in code that is mapped: first where it is quick.
fn find_syscall(target: &Target) -> Result<u64, InjectError> {
    let pid = target.pid();
    let failed = |step| move |source: io::Error| InjectError::Io { pid, step, source };
    let memory = target.open_file("mem").map_err(failed("opening its memory"))?;
    let mut bytes = Vec::new();
    let mut find = |start: u64, len: u64| {
        bytes.resize(len.min(4 << 20) as usize, 0);
        let got = memory.read_at(&mut bytes, start).ok()?;
        let at = bytes[..got].windows(2).position(|window| window == SYSCALL)?;
        Some(start + at as u64)
    };
    // The vDSO calls the kernel for the clocks that it does not know.
    let auxv = target.read_file("auxv").map_err(failed("reading its auxiliary vector"))?;
    let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().expect("eight bytes of a pair"));
    let vdso = auxv.chunks_exact(16).find(|pair| word(&pair[..8]) == libc::AT_SYSINFO_EHDR);
    if let Some(found) = vdso.and_then(|pair| find(word(&pair[8..]), VDSO)) {
        return Ok(found);
    }
    region::read(target)?
        .iter()
        .filter(|region| region.read && region.exec)
        .find_map(|region| find(region.start, region.end - region.start))
        .ok_or(InjectError::NoInstruction(pid))
}
