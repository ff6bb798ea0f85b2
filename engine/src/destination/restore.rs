//! From the last image to a running program: CRIU, the page server, and this side of the two-phase commit.

use super::failure::ReceiveError;
use super::guard::Guard;
use super::hub::LAST_WORDS;
use super::late::Late;
use super::network::Arrival;
use super::receive::Cargo;
use super::serve::{Budget, FillStats, ServeError, Server, say_filled};
use super::sessions::Sessions;
use super::store::Kills;
use super::verify;
use crate::Cancel;
use crate::fault::{self, Fault};
use crate::journal::{self, Process, Step};
use crate::link::{Channel, ChannelError, LinkError};
use crate::observe::{Event, Observer};
use crate::plan::ReceivePlan;
use crate::policy::estimate::PREFILL;
use pageferry_criu_glue::{LazyEvent, LazyListener, Restore, Stage, Wait};
use pageferry_tracker::{self as tracker, Target, uffd::Uffd};
use pageferry_wire_format::{ControlMessage, Part, SpaceId, version};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often the source hears that the pages are still being put in place.
const SIGN_OF_LIFE: Duration = Duration::from_secs(2);

/// Restores what was received and hands it over. On an error nothing of it runs, or ever will.
pub(super) struct Rebirth<'a, 'b> {
    pub(super) plan: &'a ReceivePlan,
    pub(super) observer: &'a dyn Observer,
    pub(super) cancel: &'a Cancel,
    pub(super) sessions: &'a Sessions,
    pub(super) session: u128,
    pub(super) verify: bool,
    /// Version of the protocol.
    pub(super) spoken: u16,
    pub(super) channel: &'a mut Channel,
    pub(super) cargo: Cargo,
    pub(super) images: &'a pageferry_criu_glue::ImageDir,
    pub(super) network: &'a mut Arrival<'b>,
    pub(super) journal: Option<&'a mut journal::Writer>,
}

/// A program that runs here now.
pub(super) struct Alive {
    pub(super) server: Server,
    pub(super) restore: Restore,
    /// Its root, as this process sees it.
    pub(super) pid: i32,
    /// Whether the source was told that the program runs here.
    pub(super) told: bool,
    guard: Guard,
}

impl Rebirth<'_, '_> {
    /// Restores, waits for the commit, and lets the program run.
    pub(super) fn run(mut self, restore: Restore, server: Server) -> Result<Alive, ReceiveError> {
        let kills = Kills::begin();
        match self.bring_up(restore, &server) {
            Ok((restore, (told, pid), guard)) => Ok(Alive { server, restore, pid, told, guard }),
            Err(error) => {
                server.abort();
                Err(error.starved(kills.since()))
            }
        }
    }

    fn bring_up(
        &mut self,
        mut restore: Restore,
        server: &Server,
    ) -> Result<(Restore, (bool, i32), Guard), ReceiveError> {
        let by_vpid: BTreeMap<i32, SpaceId> =
            self.cargo.spaces.iter().map(|(space, incomer)| (incomer.vpid, *space)).collect();
        let lazy = restore.lazy()?;
        let kept = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            let tasks = scope.spawn(|| take_tasks(lazy, &by_vpid, server, &kept));
            let mut guard = None;
            let mut result = match self.steps(&mut restore, server, &kept, &mut guard) {
                Ok(told) => Ok((restore, told)),
                Err(error) => {
                    // First the tasks, then (in the caller) their pages: a task that lost its server would read
                    // zeros. The listener of the userfaultfds ends with the restore.
                    if let Err(error) = restore.abort() {
                        tracing::warn!(%error, "the restore did not end cleanly");
                    }
                    Err(error)
                }
            };
            match tasks.join() {
                Ok(Err(error)) if result.is_ok() => {
                    // Dropping the restore ends what was restored.
                    result = Err(error);
                }
                // What broke the restore is the better explanation of the two.
                Ok(_) => {}
                Err(panic) => std::panic::resume_unwind(panic),
            }
            match (result, guard) {
                (Ok((restore, told)), Some(guard)) => Ok((restore, told, guard)),
                (result, guard) => {
                    if let Some(guard) = guard {
                        guard.over();
                    }
                    Err(result.err().unwrap_or(ReceiveError::NotRestored { vpid: 0 }))
                }
            }
        })
    }

    /// The steps up to the running program; says whether the source could be told, and the program's pid.
    fn steps(
        &mut self,
        restore: &mut Restore,
        server: &Server,
        kept: &Mutex<Vec<OwnedFd>>,
        guard: &mut Option<Guard>,
    ) -> Result<(bool, i32), ReceiveError> {
        let patience = self.plan.stall_timeout;
        let mut laps = Laps { last: Instant::now(), timings: Vec::new() };
        fault::point("dest-restore");
        restore.start()?;
        // While CRIU works there is time to say so.
        if self.spoken >= version::PREPARED {
            let timings = std::mem::take(&mut self.cargo.prepared);
            self.channel.control(&ControlMessage::Prepared { timings })?;
        }
        // A source that has gone will not send a commit, nor what CRIU may wait for just now: the restored tree is not let go. One that is
        // silent may come back.
        let wait = Wait {
            timeout: patience,
            cancel: Some(self.cancel.fd()),
            peer: Some(self.channel.link().as_fd()),
        };
        let root = match restore.wait(Stage::PostRestore, wait) {
            Err(error) if error.is_peer_closed() => return Err(self.last_words()),
            root => root?,
        };
        laps.lap(Part::Restore);
        if self.verify {
            server.prefill_all()?;
        } else {
            server.prefill(Budget::Time(PREFILL))?;
        }
        laps.lap(Part::Prefill);
        let mut verified_pages = 0;
        if self.verify {
            let root = root.ok_or(ReceiveError::NotRestored { vpid: 0 })?;
            verified_pages = verify::compare(self.channel, root, &self.cargo, self.images)?;
            laps.lap(Part::Verify);
        }
        let uffds = std::mem::take(&mut *kept.lock().unwrap_or_else(PoisonError::into_inner));
        let tree = tree_of(root)?;
        let file =
            self.journal.as_ref().map(|journal| journal.file()).transpose().map_err(ReceiveError::Guard)?;
        *guard = Some(Guard::new(&pids(&tree), uffds, restore.criu(), file).map_err(ReceiveError::Guard)?);
        self.write_down(Step::Ready, &Process::of(&tree))?;
        // Here, and not at CRIU's later stages: it is the last one at which the end of this engine takes the
        // restored tree with it.
        fault::point("dest-ready");
        self.sessions.ready(self.session);
        let timings = std::mem::take(&mut laps.timings);
        self.channel.control(&ControlMessage::Ready { timings, verified_pages })?;
        match self.channel.answer("the commit")? {
            ControlMessage::Commit => {}
            other => return Err(ReceiveError::Unexpected(format!("{other:?}"))),
        }
        fault::point("dest-commit");
        self.sessions.commit(self.session, Instant::now())?;
        self.write_down(Step::Committing, &[])?;
        fault::point("dest-committed");
        laps.last = Instant::now();
        // The sockets leave their repair mode in what follows, and ask their clients how they stand: the answers must get in.
        self.network.open();
        let pid = restore.wait(Stage::PostResume, patience)?.or(root).unwrap_or(0);
        laps.lap(Part::Run);
        let delivered = self.network.deliver();
        server.start_background()?;
        // It runs: without this line it would be said of it, after a crash, that it never did.
        if let Err(error) = self.write_down(Step::Resumed, &[]) {
            self.observer.event(&Event::Warning { text: error.chain() });
        }
        self.sessions.resumed(self.session, pid, Instant::now());
        if fault::point("dest-resumed") == Some(Fault::Cut) {
            self.channel.link().shutdown();
        }
        // The program runs, and that is written down: a link that is lost here is the source's to ask about, and
        // no reason to undo anything.
        let told = delivered.is_none_or(|message| self.channel.control(&message).is_ok());
        let resumed = ControlMessage::Resumed { pid, timings: laps.timings };
        let told = told && self.channel.control(&resumed).is_ok();
        self.network.settle();
        self.observer.event(&Event::Resumed { pid });
        Ok((told, pid))
    }
}

impl Rebirth<'_, '_> {
    /// Why the source has closed the connection, as far as it has said so.
    fn last_words(&mut self) -> ReceiveError {
        match self.channel.last_words(LAST_WORDS) {
            Some(ChannelError::Aborted { code, detail }) => ReceiveError::SourceAborted { code, detail },
            _ => LinkError::Closed.into(),
        }
    }

    fn write_down(&mut self, step: Step, processes: &[Process]) -> Result<(), ReceiveError> {
        Ok(self.journal.as_mut().map_or(Ok(()), |journal| journal.step(step, processes))?)
    }
}

/// The steps of the destination, each from the end of the one before.
struct Laps {
    last: Instant,
    timings: Vec<(Part, u64)>,
}

impl Laps {
    fn lap(&mut self, part: Part) {
        let now = Instant::now();
        self.timings.push((part, (now - self.last).as_micros() as u64));
        self.last = now;
    }
}

/// The restored tasks as this process sees them.
fn tree_of(root: Option<i32>) -> Result<Vec<Target>, ReceiveError> {
    let root = root.ok_or(ReceiveError::NotRestored { vpid: 0 })?;
    let look = |source: Box<dyn std::error::Error + Send + Sync>| ReceiveError::Look { pid: root, source };
    let target = Target::open(root).map_err(|error| look(error.into()))?;
    tracker::tree::discover(&target).map_err(|error| look(error.into()))
}

fn pids(tree: &[Target]) -> Vec<i32> {
    tree.iter().map(Target::pid).collect()
}

/// Hands every task's userfaultfd to the server as CRIU makes it.
fn take_tasks(
    mut lazy: LazyListener,
    by_vpid: &BTreeMap<i32, SpaceId>,
    server: &Server,
    kept: &Mutex<Vec<OwnedFd>>,
) -> Result<(), ReceiveError> {
    loop {
        match lazy.next()? {
            LazyEvent::Task { vpid, uffd } => {
                let space = by_vpid.get(&vpid).ok_or(ReceiveError::NotRestored { vpid })?;
                let copy = uffd.try_clone().map_err(ReceiveError::Guard)?;
                kept.lock().unwrap_or_else(PoisonError::into_inner).push(copy);
                server.add_task(*space, Uffd::from_fd(uffd))?;
            }
            LazyEvent::Exited { .. } => {}
            LazyEvent::Restored | LazyEvent::End => return Ok(()),
        }
    }
}

impl Alive {
    /// Waits until every page is in place, and lets CRIU go. Says also whether the source has heard of it.
    pub(super) fn settle(
        self,
        channel: &mut Channel,
        late: &Late,
        plan: &ReceivePlan,
    ) -> Result<(FillStats, bool), ReceiveError> {
        let Self { server, restore, pid, told, guard } = self;
        let owing = late.owing();
        if let Err(error) = restore.finish() {
            // The tree runs, and no word of CRIU's changes that.
            tracing::warn!(%error, "CRIU did not end cleanly");
        }
        // A sign of life now and then: large memories take longer than a silent link is believed in.
        let stats = loop {
            match server.wait_filled_for(SIGN_OF_LIFE) {
                Ok(Some(stats)) => break Ok(stats),
                Ok(None) => {}
                Err(error @ (ServeError::Died | ServeError::Aborted)) => break Err(error),
                // A page could not be put in place for some time, and is tried again: the program waits for it.
                Err(error) => tracing::warn!(%error, "a page is late"),
            }
            if owing {
                let silence = late.silence();
                // What nobody waits for any more is not missing; but who has ended gets nothing settled.
                let in_vain = || late.left() > 0 || Target::open(pid).is_err();
                let lost = (silence > plan.post_copy_timeout && in_vain())
                    .then(|| ReceiveError::SourceLost { left: late.left(), silence });
                if let Some(error) = late.failure().or(lost) {
                    // Without its pages it cannot go on, and must not go on with others.
                    end_tree(pid);
                    drop(guard);
                    server.abort();
                    return Err(error);
                }
            } else {
                let _ = channel.control(&ControlMessage::Ping { n: 0 });
            }
        };
        if stats.is_ok() {
            guard.filled();
        }
        let stats = stats?;
        if owing {
            late.end_taker();
            let told = say_filled(late, server.take_demand(), &stats, plan.stall_timeout);
            return Ok((stats, told));
        }
        let _ = channel.control(&stats.message());
        let closed = channel.link_mut().close_gently(Duration::from_secs(2));
        Ok((stats, told && closed))
    }
}

/// Ends a program that cannot go on: all of its processes.
fn end_tree(root: i32) {
    let tree = Target::open(root).ok().and_then(|root| tracker::tree::discover(&root).ok());
    for target in tree.unwrap_or_default() {
        let _ = rustix::process::pidfd_send_signal(target.pidfd(), rustix::process::Signal::KILL);
    }
}
