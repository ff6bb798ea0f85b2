//! Writes a growing file out to the disk while more of it comes, so that little is left to wait for at the end.

use std::fs::File;
use std::io;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::thread::JoinHandle;
use std::time::Duration;

enum Order {
    /// Write out what there is by now.
    Begin,
    /// ... and say how all of it went.
    Finish(SyncSender<io::Result<()>>),
}

/// A thread that waits for the disk.
#[derive(Debug)]
pub(super) struct Flusher {
    orders: Option<Sender<Order>>,
    thread: Option<JoinHandle<()>>,
}

impl Flusher {
    pub(super) fn start(file: File) -> io::Result<Self> {
        let (orders, received) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("kept-flusher".to_owned())
            .spawn(move || run(&file, &received))?;
        Ok(Self { orders: Some(orders), thread: Some(thread) })
    }

    /// Has what was written so far put on the disk, and does not wait for it.
    pub(super) fn begin(&self) {
        if let Some(orders) = &self.orders {
            // A thread that is gone says so when its result is asked for.
            let _ = orders.send(Order::Begin);
        }
    }

    /// Has all of it on the disk; calls `alive` every `often` while that takes.
    pub(super) fn finish(&self, often: Duration, mut alive: impl FnMut()) -> io::Result<()> {
        let gone = || io::Error::other("the thread that writes the file out has ended");
        let (done, result) = mpsc::sync_channel(1);
        let sent = self.orders.as_ref().is_some_and(|orders| orders.send(Order::Finish(done)).is_ok());
        if !sent {
            return Err(gone());
        }
        loop {
            match result.recv_timeout(often) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Timeout) => alive(),
                Err(RecvTimeoutError::Disconnected) => return Err(gone()),
            }
        }
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        drop(self.orders.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(file: &File, orders: &Receiver<Order>) {
    // The system tells of a failed write once, so the first one is remembered.
    let mut failed: Option<io::Error> = None;
    for order in orders {
        let result = file.sync_data();
        if let Err(error) = result {
            failed.get_or_insert(error);
        }
        if let Order::Finish(done) = order {
            let _ = done.send(failed.take().map_or(Ok(()), Err));
        }
    }
}
