//! Processes, signals, filters.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counted by the handlers below.
pub static PLAIN: AtomicU64 = AtomicU64::new(0);
pub static QUEUED: AtomicU64 = AtomicU64::new(0);
pub static QUEUED_SUM: AtomicU64 = AtomicU64::new(0);

/// The signal that is queued with values.
pub fn queued_signal() -> i32 {
    libc::SIGRTMIN() + 1
}

extern "C" fn handler(signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    if signal == libc::SIGUSR1 {
        PLAIN.fetch_add(1, Ordering::SeqCst);
        return;
    }
    // SAFETY: a handler with SA_SIGINFO gets a valid siginfo_t.
    let info = unsafe { &*info };
    // SAFETY: this signal is sent by sigqueue alone, which gives it a value.
    let value = unsafe { info.si_value() };
    QUEUED.fetch_add(1, Ordering::SeqCst);
    QUEUED_SUM.fetch_add(value.sival_ptr as u64, Ordering::SeqCst);
}

/// Counts SIGUSR1 and the queued signal from now on; interrupted calls are restarted.
pub fn count_signals() -> io::Result<()> {
    for signal in [libc::SIGUSR1, queued_signal()] {
        // SAFETY: all zeros is a valid sigaction.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
        // SAFETY: the handler only touches atomics, and lives for ever.
        if unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Ignores a signal.
pub fn ignore(signal: i32) {
    // SAFETY: SIG_IGN is no function.
    unsafe { libc::signal(signal, libc::SIG_IGN) };
}

/// Whether a signal is ignored.
pub fn is_ignored(signal: i32) -> bool {
    // SAFETY: all zeros is a valid sigaction.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: only asks; the kernel writes one sigaction.
    unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) };
    action.sa_sigaction == libc::SIG_IGN
}

/// Queues the signal with a value.
pub fn queue(pid: i32, value: u64) -> io::Result<()> {
    let value = libc::sigval { sival_ptr: value as usize as *mut libc::c_void };
    // SAFETY: the value is never used as a pointer.
    let result = unsafe { libc::sigqueue(pid, queued_signal(), value) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What a fork returns.
pub enum Side {
    Parent(i32),
    Child,
}

/// Forks. The program that does it has one thread.
pub fn fork() -> io::Result<Side> {
    // SAFETY: with one thread the child may do whatever the parent may.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Side::Child),
        pid => Ok(Side::Parent(pid)),
    }
}

/// Kills this process, from now on, when it calls userfaultfd.
pub fn forbid_userfaultfd() -> io::Result<()> {
    let op = |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter { code: code as u16, jt, jf, k };
    let program = [
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, libc::SYS_userfaultfd as u32, 0, 1),
        op(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_KILL_PROCESS, 0, 0),
        op(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // SAFETY: takes no pointers.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel reads the filter and its program, which live until the call returns, and writes nothing.
    let result = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Calls userfaultfd, for whatever it brings.
pub fn call_userfaultfd() {
    // SAFETY: takes no pointers; the descriptor, if there is one, is this process' own.
    unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
}

/// Ends this thread alone, in a way that the C library never does.
pub fn end_this_thread() -> ! {
    // SAFETY: nothing that other threads use lives on this thread's stack.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    unreachable!("it has ended")
}

/// Children that write a page when they are told to.
#[derive(Default)]
pub struct Flock {
    pids: Vec<i32>,
    /// What wakes them, and what they say when they have written.
    pipes: Option<[OwnedFd; 4]>,
}

impl Flock {
    /// Makes one that waits.
    pub fn add(&mut self, page: u64, value: u64) -> io::Result<i32> {
        let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
        if self.pipes.is_none() {
            let ((told, tell), (heard, say)) = (pipe()?, pipe()?);
            self.pipes = Some([told, tell, heard, say]);
        }
        let Some([told, _, _, say]) = &self.pipes else { unreachable!("made above") };
        match fork()? {
            Side::Parent(pid) => {
                self.pids.push(pid);
                Ok(pid)
            }
            Side::Child => {
                // It goes with its parent.
                // SAFETY: takes no pointers.
                unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
                let mut word = [0];
                if matches!(rustix::io::read(told, &mut word), Ok(1)) {
                    super::memory::store(page, value);
                    // Who listens counts.
                    let _ = rustix::io::write(say, &word);
                }
                loop {
                    // SAFETY: takes no pointers.
                    unsafe { libc::pause() };
                }
            }
        }
    }

    /// Has every one write its page, once.
    pub fn wake(&mut self) -> io::Result<()> {
        let Some([_, tell, heard, _]) = &self.pipes else { return Ok(()) };
        for _ in &self.pids {
            rustix::io::write(tell, &[1])?;
        }
        for _ in &self.pids {
            rustix::io::read(heard, &mut [0])?;
        }
        Ok(())
    }

    /// Ends the first of them.
    pub fn end(&mut self, count: usize) -> io::Result<()> {
        for pid in self.pids.drain(..count.min(self.pids.len())) {
            let pid = nix::unistd::Pid::from_raw(pid);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)?;
            nix::sys::wait::waitpid(pid, None)?;
        }
        Ok(())
    }
}

/// The next child is the first of a pid namespace.
pub fn unshare_pids() -> io::Result<()> {
    // SAFETY: takes no pointers.
    if unsafe { libc::unshare(libc::CLONE_NEWPID) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
