//! What `/proc/PID/smaps` says of memory areas, read before the freeze instead of inside it.
//!
//! criu wants one line of smaps of each area, `VmFlags`, and the kernel counts every page of the area to make the
//! lines around it: 10 ms for each GiB that is in memory, while the tree stands still. So it is read while the tree
//! still runs ([`Areas::read`]); in the freeze `/proc/PID/maps`, which costs nothing, says which areas there are, and
//! criu gets those with the flags of before ([`Areas::as_of`]). That these are the flags of now is what a
//! [`crate::witness`] says. Where there is none, or it saw something, they are compared with the real smaps when criu is
//! done ([`Areas::differ`]), beside the restore at the other side, and before anybody relies on it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};

/// Bytes of smaps that are asked for at a time. A read goes on to the next area until it has that many, and an area
/// whose lines do not fit into the kernel's buffer of 4096 bytes any more is walked again for the next read. With this
/// much, and some 800 bytes an area, none is walked twice.
const READ: usize = 2048;

/// Where the addresses end that a 32-bit system call can name.
pub(crate) const LOW: u64 = 1 << 32;

/// The areas of one process: the line that maps and smaps begin an area with, and its flags.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Areas {
    /// By first address.
    areas: BTreeMap<u64, Area>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Area {
    head: Head,
    /// What stands behind `VmFlags:`; empty where the kernel says nothing.
    flags: String,
}

/// The first line of an area.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Head {
    start: u64,
    end: u64,
    /// Everything behind the addresses: access, offset, device, inode, name.
    rest: String,
}

impl Head {
    /// `None`: the line is not of this kind.
    fn parse(line: &str) -> Option<Self> {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let address = |text: &str| u64::from_str_radix(text, 16).ok();
        Some(Self { start: address(start)?, end: address(end)?, rest: rest.to_owned() })
    }

    /// Without the offset in the file, which differs between parts of one mapping.
    fn kind(&self) -> impl Iterator<Item = &str> {
        let mut fields = self.rest.splitn(3, ' ');
        [fields.next(), fields.nth(1)].into_iter().flatten()
    }

    fn line(&self) -> String {
        // As show_vma_header_prefix() of fs/proc/task_mmu.c: at least eight digits.
        format!("{:08x}-{:08x} {}\n", self.start, self.end, self.rest)
    }
}

/// Reads a file of /proc to its end in pieces of [`READ`].
fn read_gently(path: &str) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut text = Vec::new();
    loop {
        let have = text.len();
        text.resize(have + READ, 0);
        let got = match file.read(&mut text[have..]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
            Ok(0) => {
                text.truncate(have);
                break;
            }
            Ok(got) => got,
        };
        text.truncate(have + got);
    }
    // Names of files may be anything; what cannot be kept as it is will not be equal to what comes later.
    Ok(String::from_utf8_lossy(&text).into_owned())
}

impl Areas {
    /// Reads the real thing. In a running process areas may change meanwhile.
    pub(crate) fn read(pid: i32) -> io::Result<Self> {
        Ok(Self::parse(&read_gently(&format!("/proc/{pid}/smaps"))?))
    }

    fn parse(smaps: &str) -> Self {
        let mut areas: BTreeMap<u64, Area> = BTreeMap::new();
        let mut current = None;
        for line in smaps.lines() {
            if let Some(flags) = line.strip_prefix("VmFlags:") {
                if let Some(area) = current.and_then(|start| areas.get_mut(&start)) {
                    area.flags = flags.trim().to_owned();
                }
            } else if let Some(head) = Head::parse(line) {
                current = Some(head.start);
                areas.insert(head.start, Area { head, flags: String::new() });
            }
        }
        Self { areas }
    }

    /// The areas that the frozen process `pid` has now, with the flags that they had at [`Areas::read`]; `None` when
    /// there is one that cannot be known from before.
    pub(crate) fn as_of(&self, pid: i32) -> io::Result<Option<Self>> {
        Ok(self.carried_over(&read_gently(&format!("/proc/{pid}/maps"))?))
    }

    fn carried_over(&self, maps: &str) -> Option<Self> {
        let mut areas = BTreeMap::new();
        for line in maps.lines() {
            let head = Head::parse(line)?;
            let flags = self.flags_of(&head)?.to_owned();
            areas.insert(head.start, Area { head, flags });
        }
        Some(Self { areas })
    }

    /// The flags of the area, or of one that it overlaps and looks like: it has grown, or was cut.
    fn flags_of(&self, head: &Head) -> Option<&str> {
        let overlapping = self.areas.range(..head.end).next_back().map(|(_, area)| area)?;
        let same = overlapping.head.end > head.start && overlapping.head.kind().eq(head.kind());
        let exact = self.areas.get(&head.start).filter(|area| area.head.kind().eq(head.kind()));
        exact.or(same.then_some(overlapping)).map(|area| area.flags.as_str())
    }

    /// Whether these are areas whose flags only such calls can change as a [`crate::witness`] counts.
    ///
    /// Not so if a shared one is where a 32-bit `remap_file_pages` reaches, which is not counted; or if any but the main
    /// stack grows by itself, alone in that: it could grow to where another was, and look like that.
    pub(crate) fn may_be_witnessed(&self) -> bool {
        let mut stacks = 0;
        for area in self.areas.values() {
            let shared = area.head.rest.as_bytes().get(3) == Some(&b's');
            if shared && area.head.start < LOW {
                return false;
            }
            if area.flags.split_ascii_whitespace().any(|flag| flag == "gd") {
                stacks += 1;
                if stacks > 1 || !area.head.rest.ends_with(" [stack]") {
                    return false;
                }
            }
        }
        true
    }

    /// A smaps with what criu reads of one.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        for area in self.areas.values() {
            text.push_str(&area.head.line());
            // No flags, no line: criu takes its absence for an old kernel.
            if !area.flags.is_empty() {
                text.push_str("VmFlags: ");
                text.push_str(&area.flags);
                text.push_str(" \n");
            }
        }
        text
    }

    /// The first area that is not as in the real smaps of now.
    pub(crate) fn differ(&self, pid: i32) -> io::Result<Option<String>> {
        Ok(self.difference(&Self::read(pid)?))
    }

    fn difference(&self, real: &Self) -> Option<String> {
        let mut ours = self.areas.values();
        let mut theirs = real.areas.values();
        loop {
            match (ours.next(), theirs.next()) {
                (None, None) => return None,
                (Some(a), Some(b)) if a.head == b.head && same_flags(&a.flags, &b.flags) => {}
                (Some(a), Some(b)) => {
                    return Some(format!(
                        "{:?} ({}) is {:?} ({})",
                        a.head.line(),
                        a.flags,
                        b.head.line(),
                        b.flags
                    ));
                }
                (Some(a), None) => return Some(format!("{:?} is not there", a.head.line())),
                (None, Some(b)) => return Some(format!("{:?} was not there", b.head.line())),
            }
        }
    }
}

/// Whether they are the same but for what says who watches the memory, and means nothing to criu: the soft-dirty mark of a
/// whole area, which goes whenever marks are cleared, and the registrations with a userfaultfd (missing, write-protected,
/// minor), which go when a program moves an area.
fn same_flags(a: &str, b: &str) -> bool {
    let counts = |flag: &&str| !matches!(*flag, "sd" | "um" | "uw" | "ui");
    a.split_ascii_whitespace().filter(counts).eq(b.split_ascii_whitespace().filter(counts))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAP: &str = "55d0a000-55d0b000 rw-p 00000000 00:00 0                          [heap]";
    const FILE: &str =
        "7f0000000000-7f0000003000 r--p 00001000 fe:01 123                        /usr/lib/a name";

    fn smaps() -> String {
        format!(
            "{HEAP}\nSize:                 4 kB\nVmFlags: rd wr mr mw me ac sd \n{FILE}\nRss:  0 kB\nVmFlags: rd mr mw me \n"
        )
    }

    #[test]
    fn criu_gets_heads_and_flags_of_before() {
        let before = Areas::parse(&smaps());
        let now = before.carried_over(&format!("{HEAP}\n{FILE}\n")).unwrap();
        assert_eq!(
            now.text(),
            format!("{HEAP}\nVmFlags: rd wr mr mw me ac sd \n{FILE}\nVmFlags: rd mr mw me \n")
        );
        assert_eq!(now.difference(&before), None);
    }

    #[test]
    fn what_grew_or_was_cut_keeps_its_flags_and_what_is_new_is_not_guessed() {
        let before = Areas::parse(&smaps());
        let grown = "55d0a000-55d0f000 rw-p 00000000 00:00 0                          [heap]";
        let cut = "7f0000001000-7f0000002000 r--p 00002000 fe:01 123                        /usr/lib/a name";
        let now = before.carried_over(&format!("{grown}\n{cut}\n")).unwrap();
        assert!(now.text().contains("VmFlags: rd wr mr mw me ac sd"), "{}", now.text());
        assert!(now.text().ends_with("VmFlags: rd mr mw me \n"), "{}", now.text());
        for new in [
            "55d0c000-55d0f000 rw-p 00000000 00:00 0 ",
            "55d0a000-55d0b000 r--p 00000000 00:00 0                          [heap]",
            "7f0000000000-7f0000003000 r--p 00001000 fe:01 124                        /usr/lib/b",
            "1000-2000 rw-p 00000000 00:00 0 ",
        ] {
            assert_eq!(before.carried_over(new), None, "{new}");
        }
    }

    #[test]
    fn a_witness_is_enough_unless_areas_can_change_without_being_seen() {
        let stack = "7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]";
        let ours = |more: &str| Areas::parse(&format!("{}{more}", smaps()));
        assert!(ours("").may_be_witnessed());
        assert!(ours(&format!("{stack}\nVmFlags: rd wr mr mw me gd ac \n")).may_be_witnessed());
        let high =
            "7e0000000000-7e0000001000 rw-s 00000000 00:01 7                          /dev/zero (deleted)";
        assert!(ours(&format!("{high}\nVmFlags: rd wr sh mr mw me ms \n")).may_be_witnessed());
        for more in [
            // One more that grows, or one that is not the stack.
            format!(
                "{stack}\nVmFlags: gd \n7ffc00021000-7ffc00022000 rw-p 00000000 00:00 0 \nVmFlags: gd \n"
            ),
            "7ffc00021000-7ffc00022000 rw-p 00000000 00:00 0 \nVmFlags: rd wr gd \n".to_owned(),
            "40000000-40001000 rw-s 00000000 00:01 7          /dev/zero (deleted)\nVmFlags: rd sh \n"
                .to_owned(),
        ] {
            assert!(!ours(&more).may_be_witnessed(), "{more}");
        }
    }

    #[test]
    fn a_flag_that_changed_is_found_unless_it_says_only_who_watches() {
        let before = Areas::parse(&smaps());
        let moved = Areas::parse(&smaps().replace(" ac", " uw ac"));
        assert_eq!(before.difference(&moved), None);
        let cleared = Areas::parse(&smaps().replace(" sd", ""));
        assert_eq!(before.difference(&cleared), None);
        let unforkable = Areas::parse(&smaps().replace(" ac", " dc ac"));
        assert!(before.difference(&unforkable).unwrap().contains("dc"));
        let gone = Areas::parse(&smaps().replace(FILE, "Nothing"));
        assert!(before.difference(&gone).is_some() && gone.difference(&before).is_some());
    }

    #[test]
    fn our_own_areas_are_read_whole() {
        let pid = std::process::id() as i32;
        let areas = Areas::read(pid).unwrap();
        assert!(areas.areas.len() > 10 && areas.text().contains("[stack]"));
        assert!(areas.areas.values().all(|area| area.head.rest.contains("[v") || !area.flags.is_empty()));
    }
}
