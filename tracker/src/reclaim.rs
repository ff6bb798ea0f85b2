//! Whether the kernel has taken pages away from programs: to swap them, or to read them from their file again.
//!
//! A private page takes its mark along: it lies in the entry of the page table that says where in swap the page is. Of a
//! shared page, and of a file's, the page table keeps nothing, and the mark of a write is gone. Nothing tells whose page
//! was taken. But the kernel counts how many it looked at and moved (`/proc/vmstat`): while these counts stand still, none
//! was.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Memory of programs and of tmpfs: what went to swap and came from there, and what was considered for it. Since Linux 4.20
/// or later; one that a kernel does not count, it does not do, or counts among the others.
const OF_MEMORY: [&[u8]; 7] =
    [b"pswpin", b"pswpout", b"zswpin", b"zswpout", b"swpin_zero", b"swpout_zero", b"pgscan_anon"];
/// Pages of files.
const OF_FILES: [&[u8]; 1] = [b"pgscan_file"];

/// What may have been taken since the look before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Taken {
    /// Pages that swap can hold.
    pub(crate) memory: bool,
    /// Pages of files that lie on a disk.
    pub(crate) files: bool,
}

/// The kernel's counts, over time.
#[derive(Debug, Default)]
pub(crate) struct Reclaim {
    vmstat: Option<File>,
    /// At the look before.
    before: Option<[u64; 2]>,
}

impl Reclaim {
    /// What was taken since the last call: everything may have been where the kernel does not say, and at the first
    /// call nothing.
    pub(crate) fn since_last(&mut self) -> Taken {
        let first = self.vmstat.is_none();
        let before = self.before.take();
        let now = self.read().ok();
        self.before = now;
        let differs = |of: usize| match (before, now) {
            (Some(before), Some(now)) => before[of] != now[of],
            _ => !first || now.is_none(),
        };
        Taken { memory: differs(0), files: differs(1) }
    }

    fn read(&mut self) -> io::Result<[u64; 2]> {
        let file = match self.vmstat.take() {
            Some(file) => file,
            None => File::open("/proc/vmstat")?,
        };
        let file = self.vmstat.insert(file);
        // Some 200 lines of 25 bytes.
        let (mut text, mut length) = (vec![0; 16 << 10], 0);
        loop {
            if length == text.len() {
                text.resize(2 * length, 0);
            }
            match file.read_at(&mut text[length..], length as u64)? {
                0 => break,
                more => length += more,
            }
        }
        counts(&text[..length])
            .ok_or_else(|| io::Error::other("/proc/vmstat does not count what is reclaimed"))
    }
}

/// The sums of both kinds; `None` where one that every kernel has is not there.
fn counts(text: &[u8]) -> Option<[u64; 2]> {
    let (mut sums, mut seen) = ([0u64; 2], [false; 2]);
    for line in text.split(|byte| *byte == b'\n') {
        let Some(space) = line.iter().position(|byte| *byte == b' ') else { continue };
        let (name, value) = (&line[..space], &line[space + 1..]);
        for (of, names) in [&OF_MEMORY[..], &OF_FILES[..]].into_iter().enumerate() {
            if names.contains(&name) {
                let value: u64 = std::str::from_utf8(value).ok()?.trim().parse().ok()?;
                sums[of] = sums[of].wrapping_add(value);
                seen[of] |= name.starts_with(b"pgscan");
            }
        }
    }
    (seen == [true; 2]).then_some(sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted() {
        let text =
            b"nr_free_pages 5\npswpin 1\npswpout 20\npgscan_anon 300\npgscan_file 7\npgscan_file_x 9\n";
        assert_eq!(counts(text), Some([321, 7]));
        assert_eq!(counts(b"pswpin 1\npswpout 20\n"), None, "nobody counts who is looked at");
    }

    #[test]
    fn this_kernel_counts() {
        let mut reclaim = Reclaim::default();
        assert_eq!(reclaim.since_last(), Taken::default(), "the first time");
        assert!(reclaim.before.is_some());
        reclaim.before = Some([u64::MAX, u64::MAX]);
        assert_eq!(reclaim.since_last(), Taken { memory: true, files: true });
        reclaim.before = None;
        assert_eq!(reclaim.since_last(), Taken { memory: true, files: true }, "it was not counted");
    }
}
