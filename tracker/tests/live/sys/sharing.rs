//! Processes that share one memory; a memory that its own program protects; a restartable sequence.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a process on our memory does.
#[derive(Clone, Copy)]
pub enum Guest {
    /// Sleeps so many milliseconds while we wait for it (`vfork`), and ends.
    Borrows(u64),
    /// Writes to the page at this address for as long as we live.
    Writes(u64),
}

/// Starts a process on our memory, with a stack of its own, and returns its pid.
pub fn invite(guest: Guest) -> io::Result<i32> {
    extern "C" fn stay(argument: *mut libc::c_void) -> libc::c_int {
        // SAFETY: the box was leaked for us.
        let guest = unsafe { *argument.cast::<Guest>() };
        // Nothing here may use what belongs to a thread: we have those of our host.
        let nap = |milliseconds: u64| {
            let time = libc::timespec {
                tv_sec: (milliseconds / 1000) as i64,
                tv_nsec: (milliseconds % 1000 * 1_000_000) as i64,
            };
            // SAFETY: the kernel reads one timespec.
            unsafe { libc::syscall(libc::SYS_nanosleep, &raw const time, 0) };
        };
        match guest {
            Guest::Borrows(milliseconds) => nap(milliseconds),
            Guest::Writes(address) => {
                // SAFETY: takes no pointers.
                let host = unsafe { libc::syscall(libc::SYS_getppid) };
                // SAFETY: takes no pointers.
                while host == unsafe { libc::syscall(libc::SYS_getppid) } {
                    // SAFETY: the order names a page of ours that stays mapped; both write to it atomically.
                    let word = unsafe { AtomicU64::from_ptr(address as *mut u64) };
                    word.fetch_add(1, Ordering::SeqCst);
                    nap(1);
                }
            }
        }
        // SAFETY: ends this process alone.
        unsafe { libc::syscall(libc::SYS_exit_group, 0) };
        0
    }
    let flags = match guest {
        Guest::Borrows(_) => libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD,
        Guest::Writes(_) => libc::CLONE_VM | libc::SIGCHLD,
    };
    // Both are leaked: the guest may outlive this call.
    let stack = Box::leak(vec![0u128; 4096].into_boxed_slice()).as_mut_ptr_range().end;
    let argument = Box::into_raw(Box::new(guest));
    // SAFETY: the stack is fresh, aligned, and given as its end; the function never returns into our frames.
    let pid = unsafe { libc::clone(stay, stack.cast(), flags, argument.cast()) };
    if pid < 0 { Err(io::Error::last_os_error()) } else { Ok(pid) }
}

const UFFDIO_API: libc::c_ulong = 0xC018_AA3F;
const UFFDIO_REGISTER: libc::c_ulong = 0xC020_AA00;
const PAGEMAP_SCAN: libc::c_ulong = 0xC060_6610;

fn ask(fd: i32, request: libc::c_ulong, words: &mut [u64]) -> io::Result<i32> {
    // SAFETY: each caller passes as many words as the request's structure has.
    let result = unsafe { libc::ioctl(fd, request, words.as_mut_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Has this program track a range of its own memory, as a garbage collector may. Never ends.
pub fn track_ourselves(address: u64, pages: u64) -> io::Result<()> {
    // SAFETY: takes no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) } as i32;
    // WP_ASYNC and WP_UNPOPULATED.
    ask(fd, UFFDIO_API, &mut [0xAA, 1 << 15 | 1 << 13, 0])?;
    ask(fd, UFFDIO_REGISTER, &mut [address, pages * 4096, 2, 0])?;
    Ok(())
}

/// What this program wrote to a range since it asked last, in pages.
pub fn what_we_wrote(address: u64, pages: u64) -> io::Result<u64> {
    use std::os::fd::AsRawFd;
    let pagemap = std::fs::File::open("/proc/self/pagemap")?;
    let (end, mut found) = (address + pages * 4096, [0u64; 3 * 512]);
    let (protect, written) = (1, 1 << 1);
    let buffer = found.as_mut_ptr() as u64;
    let mut scan = [96, protect, address, end, 0, buffer, 512, 0, 0, written, 0, written];
    let count = ask(pagemap.as_raw_fd(), PAGEMAP_SCAN, &mut scan)?;
    Ok(found.chunks(3).take(count as usize).map(|range| (range[1] - range[0]) / 4096).sum())
}

/// How restartable sequences ended.
#[derive(Default)]
pub struct Sequences {
    /// As meant, undisturbed.
    pub finished: u64,
    /// Sent elsewhere by the kernel.
    pub restarted: u64,
    /// At their end, although the kernel had forgotten that they were under way.
    pub betrayed: u64,
}

/// Runs one restartable sequence after the other until told to stop.
pub fn run_sequences(mut go_on: impl FnMut() -> bool) -> Sequences {
    unsafe extern "C" {
        /// Where glibc (2.35) keeps the area of a thread, from the thread pointer on.
        static __rseq_offset: isize;
        static __rseq_size: u32;
    }
    // SAFETY: constants that the C library sets before `main`.
    let size = unsafe { __rseq_size };
    assert_ne!(size, 0, "the C library has registered no restartable sequences");
    // SAFETY: as above.
    let offset = unsafe { __rseq_offset };
    let mut ends = Sequences::default();
    while go_on() {
        let current: u64;
        // SAFETY: the descriptor names exactly the instructions between 2 and 3 and, behind the signature that glibc
        // registered, the one at 4. The sequence changes registers only, and the area's pointer to the descriptor is
        // taken back before the descriptor could be unloaded.
        unsafe {
            std::arch::asm!(
                ".pushsection __rseq_cs, \"aw\"",
                ".balign 32",
                "12: .long 0, 0",
                ".quad 22f, 33f - 22f, 44f",
                ".popsection",
                "lea {descriptor}, [rip + 12b]",
                "mov fs:[{offset} + 8], {descriptor}",
                "22:",
                "mov {count:e}, 200000",
                "55: dec {count:e}",
                "jnz 55b",
                "mov {current}, fs:[{offset} + 8]",
                "33:",
                "jmp 66f",
                ".long 0x53053053",
                "44: mov {current:e}, 1",
                "66: mov qword ptr fs:[{offset} + 8], 0",
                descriptor = out(reg) _,
                count = out(reg) _,
                current = out(reg) current,
                offset = in(reg) offset,
                options(nostack),
            );
        }
        match current {
            0 => ends.betrayed += 1,
            1 => ends.restarted += 1,
            _ => ends.finished += 1,
        }
    }
    ends
}
