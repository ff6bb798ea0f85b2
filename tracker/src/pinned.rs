//! Memory that the kernel writes to behind the page tables: buffers that a program has registered with io_uring. They
//! are pinned, and what the kernel reads into them leaves no mark.

use crate::page_set::PageSet;
use crate::target::Target;
use std::io;
use std::time::Duration;

/// Buffers of a process.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Pinned {
    /// These pages.
    Pages(PageSet),
    /// The kernel does not say which: it may be all of them.
    Unknown,
}

impl Default for Pinned {
    fn default() -> Self {
        Self::Pages(PageSet::default())
    }
}

/// A ring that is busy is not described: it is asked so often.
const TRIES: u32 = 10;
const PAUSE: Duration = Duration::from_micros(200);

/// The buffers that the rings of `target` have pinned.
pub(crate) fn pinned(target: &Target) -> io::Result<Pinned> {
    let mut pages = PageSet::default();
    for number in target.descriptors_of("anon_inode:[io_uring]")? {
        let mut tries = 0;
        loop {
            let info = match target.read_file(&format!("fdinfo/{number}")) {
                Ok(info) => info,
                // It was closed meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(error) => return Err(error),
            };
            if let Some(buffers) = parse(&String::from_utf8_lossy(&info)) {
                pages = pages.union(&buffers);
                break;
            }
            tries += 1;
            if tries == TRIES {
                return Ok(Pinned::Unknown);
            }
            std::thread::sleep(PAUSE);
        }
    }
    Ok(Pinned::Pages(pages))
}

/// Reads `UserBufs:` and the lines `index: 0xaddress/length` behind it (io_uring/fdinfo.c); `None` if some are missing.
fn parse(info: &str) -> Option<PageSet> {
    let mut lines = info.lines().skip_while(|line| !line.starts_with("UserBufs:"));
    let count: usize = lines.next()?.strip_prefix("UserBufs:")?.trim().parse().ok()?;
    let mut pages = PageSet::default();
    for index in 0..count {
        let (number, buffer) = lines.next()?.split_once(':')?;
        if number.trim().parse() != Ok(index) {
            return None;
        }
        let buffer = buffer.trim();
        // An empty place in the table.
        if buffer == "<none>" {
            continue;
        }
        let (address, length) = buffer.split_once('/')?;
        let address = u64::from_str_radix(address.strip_prefix("0x")?, 16).ok()?;
        let length: u64 = length.parse().ok()?;
        if length > 0 {
            let first = address / 4096;
            pages.insert(first, address.checked_add(length)?.div_ceil(4096) - first);
        }
    }
    Some(pages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page_set::Run;

    #[test]
    fn buffers_are_read() {
        let info = "pos:\t0\nSqMask:\t0x3\nUserFiles:\t0\nUserBufs:\t3\n    0: 0x7f0000001000/8192\n    1: <none>\n    \
                    2: 0x7f0000005ff0/32\nPollList:\n";
        let runs = [Run { start: 0x7f0000001, len: 2 }, Run { start: 0x7f0000005, len: 2 }];
        assert_eq!(parse(info), Some(runs.into_iter().collect()));
        assert_eq!(parse("UserBufs:\t0\n"), Some(PageSet::default()));
        for busy in
            ["pos:\t0\n", "UserBufs:\t1\n", "UserBufs:\t1\nPollList:\n", "UserBufs:\t1\n 1: 0x1000/1\n"]
        {
            assert_eq!(parse(busy), None, "{busy}");
        }
    }
}
