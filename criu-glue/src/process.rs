//! Processes by pidfd: who belongs to a tree, who is dead, and killing them.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;
use std::{fs, io};

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::service::poll_until;

/// A process that keeps its identity, whatever becomes of its pid.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) pid: i32,
    pidfd: OwnedFd,
}

impl Member {
    /// `None` if there is no such process any more.
    pub(crate) fn open(pid: i32) -> io::Result<Option<Self>> {
        let Some(raw) = Pid::from_raw(pid) else { return Ok(None) };
        match rustix::process::pidfd_open(raw, PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Some(Self { pid, pidfd })),
            Err(rustix::io::Errno::SRCH | rustix::io::Errno::INVAL) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// SIGKILL; a process that is dead already is none the worse for it.
    pub(crate) fn kill(&self) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Waits until the process has ended (it may be a zombie then): `false` when `deadline` came first.
    pub(crate) fn ended_by(&self, deadline: Instant) -> io::Result<bool> {
        poll_until(&mut [PollFd::from_borrowed_fd(self.pidfd.as_fd(), PollFlags::IN)], deadline)
    }
}

/// The children of all threads of `pid`; empty if it is gone.
fn children(pid: i32) -> Vec<i32> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let of_thread =
        |entry: io::Result<fs::DirEntry>| fs::read_to_string(entry.ok()?.path().join("children")).ok();
    let lists: Vec<String> = threads.filter_map(of_thread).collect();
    lists.iter().flat_map(|list| list.split_ascii_whitespace()).filter_map(|n| n.parse().ok()).collect()
}

/// Everything below `pid`, parents before children, without `pid` itself. Exact while nothing there forks or
/// ends; otherwise call it again until nothing new appears.
pub(crate) fn descendants(pid: i32) -> io::Result<Vec<Member>> {
    let mut members = Vec::new();
    let mut open = children(pid);
    let mut seen = std::collections::HashSet::new();
    while let Some(child) = open.pop() {
        if !seen.insert(child) {
            continue;
        }
        if let Some(member) = Member::open(child)? {
            members.push(member);
            open.extend(children(child));
        }
    }
    Ok(members)
}

/// The one-letter state in `/proc/PID/stat` (`R`, `S`, `t` for held by a tracer...), `None` if it is gone.
pub(crate) fn state(pid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may contain anything, parentheses included.
    stat.rsplit_once(") ")?.1.chars().next()
}
