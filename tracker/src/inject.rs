//! Has a process make a userfaultfd of its own memory for us: the one thing that cannot be done from outside.
//!
//! One thread is stopped, its registers are saved, and it is led through a `syscall` instruction that its
//! memory already contains (in the vDSO, or its C library): once for `userfaultfd`, and, after the descriptor was
//! taken out with `pidfd_getfd`, once for `close`. Then its registers are restored. Nothing is written to its
//! memory. Its signals are blocked meanwhile, so that one that arrives is delivered afterwards, unchanged.

use crate::freeze::{FreezeError, Stop, Stopped};
use crate::region::{self, RegionError};
use crate::sys::{ptrace as mask, uffd as sys};
use crate::target::Target;
use nix::sys::ptrace;
use std::fs::File;
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

/// A userfaultfd over the memory of `target`, which keeps no trace of it.
pub(crate) fn userfaultfd(target: &Target) -> Result<OwnedFd, InjectError> {
    let pid = target.pid();
    let failed = |step| move |source: io::Error| InjectError::Io { pid, step, source };
    let instruction = find_syscall(target)?;
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
        let blocked = mask::blocked(thread.tid).map_err(failed("saving its signal mask"))?;
        let puppet = Self { target, thread, registers, blocked, instruction, restored: false };
        mask::set_blocked(puppet.thread.tid, EVERY_SIGNAL).map_err(failed("blocking its signals"))?;
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
        let mut stops = 0;
        while stops < 2 {
            self.thread
                .resume(|tid| ptrace::syscall(tid, None))
                .map_err(failed("leading it through a system call"))?;
            match self.thread.wait().map_err(failed("waiting for it"))? {
                Stop::Syscall => stops += 1,
                Stop::Ended => return Err(InjectError::Gone(pid)),
                // The process as a whole is being stopped; that has to wait.
                Stop::Event | Stop::Other | Stop::Signal(_) => {}
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
        self.thread.resume(ptrace::interrupt)?;
        self.thread.resume(|tid| ptrace::cont(tid, None))?;
        loop {
            match self.thread.wait()? {
                Stop::Event | Stop::Ended => break,
                _ => self.thread.resume(|tid| ptrace::cont(tid, None))?,
            }
        }
        mask::set_blocked(self.thread.tid, self.blocked)?;
        self.thread.resume(|tid| ptrace::setregs(tid, self.registers))
    }
}

impl Drop for Puppet<'_> {
    fn drop(&mut self) {
        // It fails only for a thread that has ended.
        let _ = self.restore();
    }
}

/// The address of a `syscall` instruction in code that is mapped.
fn find_syscall(target: &Target) -> Result<u64, InjectError> {
    let pid = target.pid();
    let regions = region::read(target)?;
    let memory = File::open(format!("/proc/{pid}/mem")).map_err(|source| InjectError::Io {
        pid,
        step: "opening its memory",
        source,
    })?;
    let is_vdso = |path: Option<&std::path::Path>| path.is_some_and(|path| path.as_os_str() == "[vdso]");
    let mut code: Vec<_> = regions.iter().filter(|region| region.read && region.exec).collect();
    // The vDSO first: it is small, and always there.
    code.sort_by_key(|region| !is_vdso(region.path.as_deref()));
    let mut bytes = Vec::new();
    for region in code {
        if region.path.as_ref().is_some_and(|path| path.as_os_str() == "[vsyscall]") {
            continue;
        }
        bytes.resize((region.end - region.start).min(4 << 20) as usize, 0);
        let Ok(got) = memory.read_at(&mut bytes, region.start) else { continue };
        if let Some(at) = bytes[..got].windows(2).position(|window| window == SYSCALL) {
            return Ok(region.start + at as u64);
        }
    }
    Err(InjectError::NoInstruction(pid))
}
