//! Somebody who lets the held tree go if this engine dies before the commit.
//!
//! From the SIGSTOPs on, the tree runs again only if somebody says so, and an engine that is killed cannot. Until the
//! commit may have been sent, the right end of that is a program that runs on. So a small process of its own (a
//! shell that waits on a pipe) knows the tree; when the pipe ends without a word, it sends the SIGCONTs. Told that the
//! commit is about to be sent, it leaves: from there on nobody may decide alone.

use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};

/// What it runs. `hold` names the tree; `leave`, like any other word, ends its watch.
const SCRIPT: &str = "held=; while read -r word rest; do case $word in hold) held=$rest;; *) exit 0;; esac; done; \
                      [ -z \"$held\" ] || kill -CONT $held";

/// The process, until it was told to leave or is dropped.
#[derive(Debug)]
pub(super) struct Watchman {
    child: Child,
    orders: Option<ChildStdin>,
}

impl Watchman {
    /// Starts it: before the freeze, because starting a process takes a millisecond.
    pub(super) fn start() -> io::Result<Self> {
        let mut child = Command::new("/bin/sh")
            .args(["-c", SCRIPT])
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // What ends the engine's whole process group must not end it.
            .process_group(0)
            .spawn()?;
        let orders = child.stdin.take();
        Ok(Self { child, orders })
    }

    /// From now on these processes are let go if this engine dies. They must be stopped only after this.
    pub(super) fn hold(&mut self, pids: impl Iterator<Item = i32>) -> io::Result<()> {
        let pids: Vec<String> = pids.map(|pid| pid.to_string()).collect();
        self.order(&format!("hold {}\n", pids.join(" ")))
    }

    /// The commit is about to be sent: nothing is let go any more.
    pub(super) fn leave(&mut self) -> io::Result<()> {
        self.order("leave\n")
    }

    fn order(&mut self, order: &str) -> io::Result<()> {
        // A line is shorter than a pipe's buffer unless the tree has thousands of processes; it reads, so nothing hangs.
        match &mut self.orders {
            Some(orders) => orders.write_all(order.as_bytes()),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

impl Drop for Watchman {
    fn drop(&mut self) {
        // Whoever drops it has decided about the tree.
        let _ = self.leave();
        drop(self.orders.take());
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    /// A process that stands still, and its state letter.
    struct Stopped(Child);

    impl Stopped {
        fn new() -> Self {
            let child = Command::new("sleep").arg("1000").spawn().expect("sleep starts");
            let stopped = Self(child);
            let pid = nix::unistd::Pid::from_raw(stopped.0.id() as i32);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).expect("it can be stopped");
            stopped.becomes('T');
            stopped
        }

        fn state(&self) -> char {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).expect("it lives");
            stat.rsplit(") ").next().and_then(|rest| rest.chars().next()).expect("a state")
        }

        fn becomes(&self, state: char) {
            let until = Instant::now() + Duration::from_secs(10);
            while self.state() != state {
                assert!(Instant::now() < until, "it is {} instead of {state}", self.state());
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }

    impl Drop for Stopped {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn an_end_without_a_word_lets_the_tree_go() {
        let stopped = Stopped::new();
        let mut watchman = Watchman::start().expect("a shell");
        watchman.hold([stopped.0.id() as i32].into_iter()).expect("it listens");
        // As the kernel closes it when the engine dies.
        drop(watchman.orders.take());
        stopped.becomes('S');
    }

    #[test]
    fn after_the_commit_nothing_is_let_go() {
        let stopped = Stopped::new();
        let mut watchman = Watchman::start().expect("a shell");
        watchman.hold([stopped.0.id() as i32].into_iter()).expect("it listens");
        watchman.leave().expect("it listens");
        drop(watchman.orders.take());
        watchman.child.wait().expect("it ends");
        assert_eq!(stopped.state(), 'T');
    }
}
