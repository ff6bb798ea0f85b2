//! Scans a tree at a fixed interval, in a thread of its own: attaching to processes is bound to one thread, and
//! neither a slow disk nor a slow terminal may delay a scan.

use anyhow::Context;
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use pageferry_tracker::observation::Observation;
use pageferry_tracker::probe::Kernel;
use pageferry_tracker::{CollectError, Scope, Target, Tracker, TrackerKind, TreeState};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::contents::Contents;

/// Scans that may wait to be taken. A program that is slower than this on the whole makes scans late, and they say so.
const WAITING: usize = 64;

/// What is to be scanned, and how.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) target: Target,
    /// The tracker that was asked for.
    pub(super) kind: Option<TrackerKind>,
    pub(super) scope: Scope,
    pub(super) interval: Duration,
    /// Compare the bytes of pages that were written.
    pub(super) contents: bool,
}

/// What the thread says.
#[derive(Debug)]
pub(super) enum News {
    /// The tree is tracked.
    Attached { kind: TrackerKind, reason: String },
    /// One scan.
    Scan(Box<Observation>),
    /// All processes have ended.
    Exited,
    /// It went wrong; the tree was let go.
    Failed(anyhow::Error),
}

/// The thread. Dropping it lets the tree go.
#[derive(Debug)]
pub(super) struct Session {
    news: Receiver<News>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Session {
    /// Begins.
    pub(super) fn start(plan: Plan) -> anyhow::Result<Self> {
        let (say, news) = bounded(WAITING);
        let (stop, stopped) = bounded::<()>(0);
        let thread = std::thread::Builder::new().name("scans".to_owned()).spawn(move || {
            let last = match scan(&plan, &say, &stopped) {
                Ok(()) => return,
                Err(error) if !plan.target.is_alive() && is_about_the_end(&error) => News::Exited,
                Err(error) => News::Failed(error),
            };
            // Nobody listens any more: then nobody has to know.
            let _ = say.send(last);
        })?;
        Ok(Self { news, stop: Some(stop), thread: Some(thread) })
    }

    /// What is said; ends with the thread.
    pub(super) fn news(&self) -> &Receiver<News> {
        &self.news
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        drop(self.stop.take());
        // It may be waiting for room.
        while self.news.recv().is_ok() {}
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Whether a failure is what the end of the process looks like from a scan.
fn is_about_the_end(error: &anyhow::Error) -> bool {
    error.downcast_ref::<CollectError>().is_some()
}

/// Until told to stop, the end of the tree, or a failure.
fn scan(plan: &Plan, say: &Sender<News>, stopped: &Receiver<()>) -> anyhow::Result<()> {
    let (kind, reason) = Kernel::probe().choose(plan.kind)?;
    let target = plan.target.clone();
    let attached = match plan.scope {
        Scope::Lazy => Tracker::attach(target, kind),
        Scope::All => Tracker::attach_all(target, kind),
    };
    let mut tracker = attached.context("the process tree cannot be tracked")?;
    let mut contents = plan.contents.then(Contents::default);
    let _ = say.send(News::Attached { kind, reason });
    let start = Instant::now();
    let mut due = start;
    loop {
        let begin = Instant::now();
        let collected = tracker.collect(TreeState::Running)?;
        let end = Instant::now();
        if collected.spaces.is_empty() {
            let _ = say.send(News::Exited);
            return Ok(());
        }
        let mut observation = Observation::of(&collected, end - start, end - begin);
        if let Some(contents) = &mut contents {
            contents.compare(&collected, &mut observation)?;
        }
        tracker.acknowledge(collected.ticket);
        if say.send(News::Scan(Box::new(observation))).is_err() {
            return Ok(());
        }
        due += plan.interval;
        let now = Instant::now();
        while due <= now {
            // A scan that took longer than the interval: the grid is kept, and what is missed is missed.
            due += plan.interval;
        }
        match stopped.recv_timeout(due - now) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}
