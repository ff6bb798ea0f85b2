//! What happens when this engine is killed while the restored program still waits for pages.
//!
//! The missing pages exist in this process alone. Were it simply to end, the kernel would close its userfaultfds, and
//! every page that had not come would read as zeros: the program would run on, silently wrong. So a process of its own
//! keeps the descriptors open and waits for a word. If that word comes, everything is in place and it ends. If the
//! engine ends without it, the program's tasks, which can only wait for their pages, are killed.
//!
//! It is also who writes down in the journal that everything is in place: so that line is there exactly if the program was not
//! killed, whenever the engine ends. It holds the journal's lock as long as it lives, and with it whoever reads the journal.

use crate::journal;
use rustix::io::{FdFlags, fcntl_setfd};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};

/// The watching process.
#[derive(Debug)]
pub(super) struct Guard {
    child: Child,
}

impl Guard {
    /// Watches over the tasks `pids`, whose userfaultfds are `uffds`, and over the process `criu`. What becomes of them is written to
    /// `journal`.
    pub(super) fn new(
        pids: &[i32],
        uffds: Vec<OwnedFd>,
        criu: i32,
        journal: Option<File>,
    ) -> io::Result<Self> {
        let pids: Vec<String> = pids.iter().map(i32::to_string).collect();
        let (filled, pids) = (journal::FILLED_LINE, pids.join(" "));
        // CRIU tidies up and ends when it notices that the engine has gone, but not where it waits for the tasks that are gone now.
        let script = format!(
            "is_criu() {{ grep -q criu /proc/{criu}/cmdline 2>/dev/null; }}\n\
             read word\n\
             case $word in filled) echo '{filled}'; exit;; over) exit;; esac\n\
             kill -s KILL {pids}\n\
             turns=0\n\
             while is_criu && [ $turns -lt 30 ]; do sleep 0.1; turns=$((turns + 1)); done\n\
             ! is_criu || kill -s KILL {criu}"
        );
        for uffd in &uffds {
            fcntl_setfd(uffd, FdFlags::empty())?;
        }
        let child = Command::new("/bin/sh")
            .args(["-c", &script])
            .stdin(Stdio::piped())
            .stdout(journal.map_or_else(Stdio::null, Stdio::from))
            .stderr(Stdio::null())
            .spawn()?;
        // Ours are closed here, so that the server's are the only ones of this process.
        drop(uffds);
        Ok(Self { child })
    }

    /// Every page is in place. That is written down when this returns.
    pub(super) fn filled(self) {
        self.dismiss(b"filled\n");
    }

    /// The tasks are dead: nothing is left to watch over.
    pub(super) fn over(self) {
        self.dismiss(b"over\n");
    }

    fn dismiss(mut self, word: &[u8]) {
        if let Some(mut stdin) = self.child.stdin.take() {
            // If it is gone already there is nobody to tell.
            let _ = stdin.write_all(word);
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
        let written = tempfile::NamedTempFile::new().unwrap();
        let pid = program.id() as i32;
        let guard = || Guard::new(&[pid], Vec::new(), 1, Some(written.reopen().unwrap())).unwrap();
        guard().over();
        assert_eq!(std::fs::read(written.path()).unwrap(), b"");
        guard().filled();
        assert!(program.try_wait().unwrap().is_none(), "dismissed: the program lives");
        assert_eq!(std::fs::read_to_string(written.path()).unwrap(), format!("{}\n", journal::FILLED_LINE));
        std::fs::write(written.path(), "").unwrap();
        let mut guard = guard();
        drop(guard.child.stdin.take());
        guard.child.wait().unwrap();
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(program.wait().unwrap().signal(), Some(9), "the engine's end of the pipe closed");
        assert_eq!(std::fs::read(written.path()).unwrap(), b"");
    }
}
