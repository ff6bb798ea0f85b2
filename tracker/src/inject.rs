//! Has a process make a userfaultfd of its own memory for us: the one thing that cannot be done from outside.
//!
//! One thread is stopped, its registers are saved, and it is led through a `syscall` instruction that its
//! memory already contains (in the vDSO, or its C library): once for `userfaultfd`, and, after the descriptor was
//! taken out with `pidfd_getfd`, once for `close`. Then its registers are restored. Nothing is written to its
//! memory. Its signals are blocked meanwhile, so that one that arrives is delivered afterwards, unchanged.

use crate::freeze::{FreezeError, Stop, Stopped};
use crate::region::{self, RegionError};
use crate::sys::ptrace::{self as raw, Resume};
use crate::sys::uffd as sys;
use crate::target::Target;
use nix::sys::ptrace;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

/// Why the descriptor could not be had.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// A thread could not be stopped.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// The mappings could not be read.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The process has no thread that runs.
    #[error("process {0} has ended")]
    Gone(i32),
    /// There is no `syscall` instruction to use.
    #[error("process {0} has no system call instruction in its vDSO or its libraries")]
    NoInstruction(i32),
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
/// `PTRACE_O_SUSPEND_SECCOMP`: the filters of the process do not judge what we do.
const SUSPEND_SECCOMP: i32 = 1 << 21;
/// The instruction `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// Bytes of the vDSO: two pages so far.
const VDSO: u64 = 2 * 4096;

/// A userfaultfd over the memory of `target`, which keeps no trace of it.
pub(crate) fn userfaultfd(target: &Target) -> Result<OwnedFd, InjectError> {
    let pid = target.pid();
    let failed = |step| move |source: io::Error| InjectError::Io { pid, step, source };
    let filtered = target.status("Seccomp").map_err(failed("reading its status"))?;
    let options = match filtered.as_deref() {
        None | Some("0") => ptrace::Options::PTRACE_O_TRACESYSGOOD,
        Some(_) => {
            ptrace::Options::from_bits_retain(ptrace::Options::PTRACE_O_TRACESYSGOOD.bits() | SUSPEND_SECCOMP)
        }
    };
    // The first thread is as good as any other; it may have ended before the others.
    let threads = target.threads().map_err(failed("listing its threads"))?;
    for tid in threads {
        if let Some(thread) = Stopped::new(pid, tid, options)? {
            // Only now: one that runs may become another program, with other code at the same address.
            let instruction = find_syscall(target)?;
            return Puppet::new(target, thread, instruction)?.userfaultfd();
        }
    }
    Err(InjectError::Gone(pid))
}

/// A stopped thread whose strings we pull; dropping it puts everything back.
struct Puppet<'a> {
    target: &'a Target,
    thread: Stopped,
    registers: libc::user_regs_struct,
    blocked: u64,
    instruction: u64,
    restored: bool,
}

impl<'a> Puppet<'a> {
    fn new(target: &'a Target, thread: Stopped, instruction: u64) -> Result<Self, InjectError> {
        let pid = target.pid();
        let failed = |step| move |source: io::Error| InjectError::Io { pid, step, source };
        let registers = ptrace::getregs(thread.tid).map_err(|e| failed("saving its registers")(e.into()))?;
        let blocked = raw::blocked(thread.tid).map_err(failed("saving its signal mask"))?;
        let puppet = Self { target, thread, registers, blocked, instruction, restored: false };
        raw::set_blocked(puppet.thread.tid, EVERY_SIGNAL).map_err(failed("blocking its signals"))?;
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
        ptrace::setregs(self.thread.tid, registers).map_err(|e| failed("setting its registers")(e.into()))?;
        let (mut stops, mut signal) = (0, 0);
        while stops < 2 {
            self.thread
                .resume(Resume::Syscall, signal)
                .map_err(failed("leading it through a system call"))?;
            signal = 0;
            match self.thread.wait().map_err(failed("waiting for it"))? {
                Stop::Syscall => stops += 1,
                Stop::Ended => return Err(InjectError::Gone(pid)),
                // SIGSTOP, the only one that could not be blocked. It stops the other threads now, and this one
                // when we let go of it.
                Stop::Signal(arrived) => signal = arrived,
                Stop::Event | Stop::Other => {}
            }
        }
        let registers =
            ptrace::getregs(self.thread.tid).map_err(|e| failed("reading its registers")(e.into()))?;
        Ok(registers.rax as i64)
    }

    /// Puts the thread back to where it was. It was stopped on its way out of the kernel, and is again: from
    /// there the kernel restarts a system call that the first stop has interrupted.
    fn restore(&mut self) -> io::Result<()> {
        if std::mem::replace(&mut self.restored, true) {
            return Ok(());
        }
        match ptrace::interrupt(self.thread.tid) {
            Ok(()) | Err(nix::Error::ESRCH) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut signal = 0;
        loop {
            self.thread.resume(Resume::Continue, signal)?;
            signal = match self.thread.wait()? {
                Stop::Event | Stop::Ended => break,
                Stop::Signal(arrived) => arrived,
                Stop::Syscall | Stop::Other => 0,
            };
        }
        raw::set_blocked(self.thread.tid, self.blocked)?;
        match ptrace::setregs(self.thread.tid, self.registers) {
            Ok(()) | Err(nix::Error::ESRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Drop for Puppet<'_> {
    fn drop(&mut self) {
        // It fails only for a thread that has ended.
        let _ = self.restore();
    }
}

/// The address of a `syscall` instruction in code that is mapped. The process is stopped: first where it is quick.
fn find_syscall(target: &Target) -> Result<u64, InjectError> {
    let pid = target.pid();
    let failed = |step| move |source: io::Error| InjectError::Io { pid, step, source };
    let memory = File::open(format!("/proc/{pid}/mem")).map_err(failed("opening its memory"))?;
    let mut bytes = Vec::new();
    let mut find = |start: u64, len: u64| {
        bytes.resize(len.min(4 << 20) as usize, 0);
        let got = memory.read_at(&mut bytes, start).ok()?;
        let at = bytes[..got].windows(2).position(|window| window == SYSCALL)?;
        Some(start + at as u64)
    };
    // The vDSO calls the kernel for the clocks that it does not know.
    let auxv = fs::read(format!("/proc/{pid}/auxv")).map_err(failed("reading its auxiliary vector"))?;
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
