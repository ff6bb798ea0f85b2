//! What is known about the threads of a stopped process.

use crate::target::Target;
use std::io;

/// The stack pointer of every thread, from `/proc/PID/task/TID/syscall`. The process has to stand still: of a
/// thread that runs the kernel says only so.
///
/// # Errors
/// When a thread cannot be looked at, or runs.
pub fn stack_pointers(target: &Target) -> io::Result<Vec<u64>> {
    let pid = target.pid();
    let mut pointers = Vec::new();
    for tid in target.threads()? {
        let text = target.read_file(&format!("task/{tid}/syscall"))?;
        let text = String::from_utf8_lossy(&text);
        pointers.push(parse(&text).ok_or_else(|| {
            io::Error::other(format!("thread {tid} of process {pid} does not stand still: {:?}", text.trim()))
        })?);
    }
    Ok(pointers)
}

/// `nr a b c d e f sp pc` in a system call, `-1 sp pc` outside of one, `running` otherwise.
fn parse(text: &str) -> Option<u64> {
    let fields: Vec<&str> = text.split_whitespace().collect();
    let at = match (fields.first()?, fields.len()) {
        (&"-1", 3) => 1,
        (_, 9) => 7,
        _ => return None,
    };
    u64::from_str_radix(fields[at].strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_read() {
        assert_eq!(parse("0 0x3 0x7ffc 0x400 0x0 0x0 0x0 0x7ffd1000 0x7f33\n"), Some(0x7ffd_1000));
        assert_eq!(parse("-1 0x7ffd2000 0x7f33\n"), Some(0x7ffd_2000));
        assert_eq!(parse("running\n"), None);
    }
}
