//! What happens when this engine is killed while the restored program still waits for pages.
//!
//! The missing pages exist in this process alone. Were it simply to end, the kernel would close its userfaultfds, and
//! every page that had not come would read as zeros: the program would run on, silently wrong. So a process of its own
//! keeps the descriptors open and waits for a word. If that word comes, everything is in place and it ends. If the
//! engine ends without it, the program's tasks, which can only wait for their pages, are killed.

use rustix::io::{FdFlags, fcntl_setfd};
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};

/// The watching process.
#[derive(Debug)]
pub(super) struct Guard {
    child: Child,
}

impl Guard {
    /// Watches over the tasks `pids`, whose userfaultfds are `uffds`.
    pub(super) fn new(pids: &[i32], uffds: Vec<OwnedFd>) -> io::Result<Self> {
        let mut script = String::from("read word; [ \"$word\" = done ] || kill -KILL");
        for pid in pids {
            let _ = write!(script, " {pid}");
        }
        for uffd in &uffds {
            fcntl_setfd(uffd, FdFlags::empty())?;
        }
        let child = Command::new("/bin/sh")
            .args(["-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        // Ours are closed here, so that the server's are the only ones of this process.
        drop(uffds);
        Ok(Self { child })
    }

    /// Every page is in place, or the tasks are dead: nothing is left to watch over.
    pub(super) fn dismiss(mut self) {
        if let Some(mut stdin) = self.child.stdin.take() {
            // If it is gone already there is nobody to tell.
            let _ = stdin.write_all(b"done\n");
        }
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper() -> Child {
        Command::new("sleep").arg("1000").spawn().unwrap()
    }

    #[test]
    fn it_kills_only_when_the_word_does_not_come() {
        let mut program = sleeper();
        Guard::new(&[program.id() as i32], Vec::new()).unwrap().dismiss();
        assert!(program.try_wait().unwrap().is_none(), "dismissed: the program lives");
        let mut guard = Guard::new(&[program.id() as i32], Vec::new()).unwrap();
        drop(guard.child.stdin.take());
        guard.child.wait().unwrap();
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(program.wait().unwrap().signal(), Some(9), "the engine's end of the pipe closed");
    }
}
