//! ptrace(2) and waitpid(2) on one thread, with signals as plain numbers: nix has no name for a real-time signal,
//! and one that is lost because it has no name is lost for ever.

use std::io;

/// `PTRACE_O_TRACESYSGOOD`: a stop for a system call can be told from a signal.
pub(crate) const TELL_SYSCALLS: i32 = libc::PTRACE_O_TRACESYSGOOD;
/// `PTRACE_O_SUSPEND_SECCOMP` (Linux 4.3; privileged): the filters of the thread do not judge what we do.
pub(crate) const SUSPEND_SECCOMP: i32 = libc::PTRACE_O_SUSPEND_SECCOMP;

const GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
const GETSIGMASK: libc::c_uint = 0x420a;
const SETSIGMASK: libc::c_uint = 0x420b;
/// `PTRACE_EVENT_STOP` (include/uapi/linux/ptrace.h).
const EVENT_STOP: i32 = 128;
/// Bytes of the kernel's signal set.
const SIGNAL_SET: usize = 8;

/// The registers of a stopped thread.
pub(crate) type Registers = libc::user_regs_struct;

/// What a thread stopped for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// We asked it to, or its whole process is stopped.
    Event,
    /// A system call begins or ends.
    Syscall,
    /// This signal is to be delivered.
    Signal(i32),
    /// Anything else.
    Other,
    /// It has ended.
    Ended,
}

/// One request whose two arguments are numbers.
fn request(request: libc::c_uint, thread: i32, first: usize, second: usize) -> io::Result<()> {
    // SAFETY: this is only called with requests that take numbers (SEIZE, INTERRUPT, CONT, SYSCALL, DETACH): the
    // kernel does not look at memory of this process.
    let result = unsafe { libc::ptrace(request, thread, first, second) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Becomes the tracer of a thread, which runs on.
pub(crate) fn seize(thread: i32, options: i32) -> io::Result<()> {
    request(libc::PTRACE_SEIZE, thread, 0, options as usize)
}

/// Asks a thread to stop.
pub(crate) fn interrupt(thread: i32) -> io::Result<()> {
    request(libc::PTRACE_INTERRUPT, thread, 0, 0)
}

/// Lets a stopped thread run, with a signal or with none (0).
pub(crate) fn resume(thread: i32, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_CONT, thread, 0, signal as usize)
}

/// As [`resume`]; it stops again where a system call begins or ends.
pub(crate) fn resume_to_syscall(thread: i32, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_SYSCALL, thread, 0, signal as usize)
}

/// Lets a stopped thread go for good, with a signal or with none (0).
pub(crate) fn detach(thread: i32, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_DETACH, thread, 0, signal as usize)
}

/// What a thread that we trace stopped for; `None` while it runs.
pub(crate) fn stop_of(thread: i32) -> io::Result<Option<Stop>> {
    let mut status = 0;
    loop {
        // SAFETY: the kernel writes one int to the address, which is that of `status`.
        let result = unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL | libc::WNOHANG) };
        match result {
            0 => return Ok(None),
            1.. => break,
            _ => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::EINTR) => {}
                error if error.raw_os_error() == Some(libc::ECHILD) => return Ok(Some(Stop::Ended)),
                error => return Err(error),
            },
        }
    }
    if !libc::WIFSTOPPED(status) {
        return Ok(Some(Stop::Ended));
    }
    Ok(Some(match (status >> 16, libc::WSTOPSIG(status)) {
        (EVENT_STOP, _) => Stop::Event,
        (0, signal) if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
        (0, signal) => Stop::Signal(signal),
        _ => Stop::Other,
    }))
}

/// The registers of a stopped thread.
pub(crate) fn registers(thread: i32) -> io::Result<Registers> {
    let mut registers = std::mem::MaybeUninit::<Registers>::zeroed();
    // SAFETY: the kernel writes one `user_regs_struct` to the address, which is that of one.
    let result = unsafe { libc::ptrace(libc::PTRACE_GETREGS, thread, 0usize, registers.as_mut_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is all integers, zeroed at first and then written by the kernel.
    Ok(unsafe { registers.assume_init() })
}

/// Changes the registers of a stopped thread.
pub(crate) fn set_registers(thread: i32, registers: &Registers) -> io::Result<()> {
    // SAFETY: the kernel reads one `user_regs_struct` from the address, which is that of one.
    let result = unsafe { libc::ptrace(libc::PTRACE_SETREGS, thread, 0usize, std::ptr::from_ref(registers)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The signals that a stopped thread blocks.
pub(crate) fn blocked(thread: i32) -> io::Result<u64> {
    let mut mask = 0u64;
    // SAFETY: the kernel writes `SIGNAL_SET` bytes to the address, which is that of a u64.
    let result = unsafe { libc::ptrace(GETSIGMASK, thread, SIGNAL_SET, &raw mut mask) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(mask) }
}

/// Has a stopped thread block exactly these signals.
pub(crate) fn set_blocked(thread: i32, mask: u64) -> io::Result<()> {
    // SAFETY: the kernel reads `SIGNAL_SET` bytes from the address, which is that of a u64.
    let result = unsafe { libc::ptrace(SETSIGMASK, thread, SIGNAL_SET, &raw const mask) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Where a stopped thread has its restartable-sequence area (`rseq(2)`): `None` where it has none, or where the
/// kernel (before 5.13) does not tell.
pub(crate) fn rseq_area(thread: i32) -> Option<u64> {
    /// `struct ptrace_rseq_configuration`.
    #[repr(C)]
    #[derive(Default)]
    struct Configuration {
        pointer: u64,
        size: u32,
        signature: u32,
        flags: u32,
        pad: u32,
    }
    const _: () = assert!(size_of::<Configuration>() == 24);
    let mut found = Configuration::default();
    // SAFETY: the kernel writes at most as many bytes as it is told to the address, which is that of a structure
    // of that size.
    let result =
        unsafe { libc::ptrace(GET_RSEQ_CONFIGURATION, thread, size_of::<Configuration>(), &raw mut found) };
    (result > 0 && found.pointer != 0).then_some(found.pointer)
}

/// Whether two processes share one address space (`kcmp(2)`, KCMP_VM).
pub(crate) fn same_memory(a: i32, b: i32) -> io::Result<bool> {
    const KCMP_VM: libc::c_int = 1;
    // SAFETY: the call takes no pointers.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_VM, 0, 0) };
    if order < 0 { Err(io::Error::last_os_error()) } else { Ok(order == 0) }
}
