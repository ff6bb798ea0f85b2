//! System calls by number, through each of the kernel's doors.

use std::arch::asm;
use std::io;

fn outcome(result: i64) -> io::Result<i64> {
    if (-4095..0).contains(&result) { Err(io::Error::from_raw_os_error(-result as i32)) } else { Ok(result) }
}

/// A call by its 64-bit number. With arguments that the kernel refuses, or that name memory which nobody uses, or none.
pub fn call(number: i64, a: [u64; 6]) -> io::Result<i64> {
    // SAFETY: the callers of this test program pass what does no harm to its memory: nothing, or their own mapping.
    let result = unsafe { libc::syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A call by its 32-bit number with no arguments.
pub fn call_32(number: i32) -> io::Result<i64> {
    let result: i64;
    // SAFETY: with zeros for arguments, the calls that the test makes touch no memory. `rbx` is put back, and what the
    // 32-bit door may overwrite is named.
    unsafe {
        asm!(
            "xchg rbx, {first}",
            "int 0x80",
            "xchg rbx, {first}",
            first = inout(reg) 0u64 => _,
            inlateout("rax") i64::from(number) => result,
            inlateout("rcx") 0u64 => _,
            inlateout("rdx") 0u64 => _,
            inlateout("rsi") 0u64 => _,
            inlateout("rdi") 0u64 => _,
            out("r8") _,
            out("r9") _,
            out("r10") _,
            out("r11") _,
        );
    }
    outcome(i64::from(result as i32))
}

/// Has a child make one call and waits for its end.
pub fn in_child(call: impl FnOnce()) -> io::Result<i32> {
    // SAFETY: the child makes one system call, and ends without running anything of ours.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        call();
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(0) };
    }
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut status = 0;
    // SAFETY: the kernel writes `status`, which lives through the call.
    if unsafe { libc::waitpid(pid, &raw mut status, 0) } != pid {
        return Err(io::Error::last_os_error());
    }
    Ok(status)
}
