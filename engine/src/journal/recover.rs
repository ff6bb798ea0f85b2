//! What engines left behind when they were killed, and bringing it to an end.
//!
//! While an engine lives it decides alone. What a dead one left is judged by what it wrote down last ([`super::Step`]), by the processes
//! that are still there, and where only the other side can know, by its answer. Where nobody can know, nothing is done until a person says
//! which copy is the program ([`Choice`]).

use super::ask::ask_until;
use super::copy::Copy;
use super::verdict::{self, Tree, Verdict};
use super::{Entry, Journal, JournalError, Owed, Process, Role, Step, Writer};
use crate::network::{self, MovedAddress, traces};
use crate::observe::{Event, Observer};
use crate::report::PostCopyReport;
use crate::source::failure::SendError;
use crate::source::late::Orphaned;
use pageferry_tracker::Target;
use pageferry_wire_format::HandoverState;
use rustix::process::Signal;
use serde::Serialize;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What a person says where nobody else can know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The copy here is the program: let it run. The other side has none, and never will.
    RunHere,
    /// The program runs at the other side: end the copy here.
    EndHere,
}

/// What to recover.
#[derive(Clone, Debug)]
pub struct RecoverPlan {
    /// Directory of the journals.
    pub journal: PathBuf,
    /// Only the session whose identity begins with this.
    pub session: Option<String>,
    /// What to do where it is unclear. Asks for one session.
    pub choice: Option<Choice>,
    /// Say what is where, and change nothing. The other side is asked all the same, and its answer binds it: a commit that has not
    /// arrived will not be taken any more.
    pub dry_run: bool,
    /// How long to try to ask the other side.
    pub patience: Duration,
}

/// Why nothing could be recovered.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// Other people's processes.
    #[error("letting processes run, or ending them, needs root")]
    NotRoot,
    /// The journals cannot be read.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// No journal is of that session.
    #[error("there is no session {0} here")]
    NoSession(String),
    /// More than one is.
    #[error("{count} sessions begin with {session}: say more of it")]
    Ambiguous {
        /// What was given.
        session: String,
        /// How many.
        count: usize,
    },
    /// A choice is for one session.
    #[error("say for which session (--session): a choice is about one")]
    NoneChosen,
    /// Its engine lives.
    #[error("the engine of session {session} lives (process {engine}): it decides alone")]
    UnderWay {
        /// Which.
        session: String,
        /// Its engine.
        engine: i32,
    },
    /// Ending the copy here would lose the program, and letting it run would make two.
    #[error(
        "the program of session {session} runs at {peer}, and not all of its pages are in place there: `pageferry recover` sends it what is \
         only here, or waits; choose when it was ended there, which the receiver does after its --post-copy-timeout"
    )]
    Needed {
        /// Which.
        session: String,
        /// Where it runs.
        peer: String,
    },
    /// There would be two.
    #[error(
        "the program of session {session} runs at {peer}, and has all of its pages there: no other copy is let run"
    )]
    Complete {
        /// Which.
        session: String,
        /// Where it runs.
        peer: String,
    },
    /// A signal could not be sent.
    #[error("process {pid} could not be signalled")]
    Signal {
        /// Which.
        pid: i32,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It was killed and goes on.
    #[error("process {0} does not end")]
    Immortal(i32),
}

/// What was found of a session, and what was done about it.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What was written down.
    #[serde(flatten)]
    pub entry: Entry,
    /// The processes of the tree here, before anything was done.
    pub tree: Tree,
    /// What the other side said, if it was asked.
    pub answer: Option<String>,
    /// What it comes to.
    pub verdict: Verdict,
    /// What was done, or would be; or what a person can do.
    pub text: String,
    /// What the program was sent of the pages that it was owed, if all of them are in place there now.
    pub served: Option<PostCopyReport>,
    /// How many different pages of it were put into the store of the migration (`keep_store`), if any were.
    pub kept_pages: Option<u64>,
    /// Whether nothing is left to decide.
    pub settled: bool,
}

/// What became of a call.
#[derive(Debug)]
pub struct Recovered {
    /// One for each session that an engine of this machine has written of.
    pub findings: Vec<Finding>,
    /// Journals that cannot be read.
    pub broken: Vec<JournalError>,
    /// What dead engines had left of rules and addresses, and is taken away now.
    pub cleaned: Vec<String>,
}

/// Looks at every session that an engine of this machine left behind, and ends what can be ended. Where a program at the other side is owed
/// pages that are here, it sends them first, in place of the engine: `observer` is told how far that is.
///
/// # Errors
/// [`RecoverError`]; what was done before stays done, and is found done by the next call.
pub fn recover(plan: &RecoverPlan, observer: &dyn Observer) -> Result<Recovered, RecoverError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(RecoverError::NotRoot);
    }
    let journal = Journal::new(&plan.journal);
    let (mut entries, broken) = when_guards_are_done(&journal)?;
    if let Some(session) = &plan.session {
        entries.retain(|entry| entry.begin.session.starts_with(session.as_str()));
        match entries.len() {
            0 => return Err(RecoverError::NoSession(session.clone())),
            1 => {}
            // Both sides may be this machine.
            2 if plan.choice.is_none() && entries[0].begin.session == entries[1].begin.session => {}
            count => return Err(RecoverError::Ambiguous { session: session.clone(), count }),
        }
    } else if plan.choice.is_some() {
        return Err(RecoverError::NoneChosen);
    }
    // What comes to its end at a destination here can be asked about by a source here.
    entries.sort_by_key(|entry| entry.begin.role == Role::Source);
    let mut findings = Vec::with_capacity(entries.len());
    let mut owing = Vec::new();
    for entry in entries {
        match settle(plan, entry)? {
            Settled::Found(finding) => findings.push(*finding),
            Settled::Owes(debtor) => owing.push(debtor),
        }
    }
    // Beside each other: a program that waits for its pages is not given all the time that another one takes.
    let served = std::thread::scope(|scope| {
        let serve = |debtor: Box<Debtor>| scope.spawn(move || debtor.serve(plan, observer));
        let all: Vec<_> = owing.into_iter().map(serve).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<Finding, RecoverError>>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        // All of them come to their end before one's failure is told.
        all.into_iter().map(join).collect::<Vec<_>>()
    });
    for finding in served {
        findings.push(finding?);
    }
    // Afterwards: an address that is still announced here may be that of a program that is let go above.
    let cleaned = if plan.dry_run { Vec::new() } else { traces::clean() };
    Ok(Recovered { findings, broken, cleaned })
}

/// Reads the journals. A guard or a watchman that an engine has left behind holds the lock for as long as it has to do something
/// (milliseconds), and then says what.
fn when_guards_are_done(journal: &Journal) -> Result<(Vec<Entry>, Vec<JournalError>), JournalError> {
    let until = Instant::now() + GUARDS;
    loop {
        let (entries, broken) = journal.entries()?;
        let waits = entries.iter().any(|entry| entry.live && !is_process(entry.begin.engine));
        if !waits || Instant::now() > until {
            return Ok((entries, broken));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Longest wait for what an engine has left behind to watch over a program.
const GUARDS: Duration = Duration::from_secs(10);

fn is_process(pid: i32) -> bool {
    rustix::process::Pid::from_raw(pid).is_some_and(|pid| rustix::process::test_kill_process(pid).is_ok())
}

/// What a first look at a session came to.
enum Settled {
    Found(Box<Finding>),
    /// The program at the other side is owed pages that are here.
    Owes(Box<Debtor>),
}

fn settle(plan: &RecoverPlan, entry: Entry) -> Result<Settled, RecoverError> {
    let begin = &entry.begin;
    let tree = Copy::find(&entry);
    let state = tree.look(&entry);
    let mut verdict = verdict::judge(begin.role, entry.step, entry.live, state);
    if let (Verdict::UnderWay, Some(_)) = (verdict, plan.choice) {
        return Err(RecoverError::UnderWay { session: begin.session.clone(), engine: begin.engine });
    }
    let mut answer = None;
    if verdict == Verdict::Ask {
        answer = ask(&entry, plan.patience);
        verdict = verdict::answered(answer.as_ref(), entry.owes, state);
    }
    if matches!(verdict, Verdict::Unclear | Verdict::Serve)
        && plan.choice.is_some()
        && needed_there(answer.as_ref())
    {
        return Err(RecoverError::Needed { session: begin.session.clone(), peer: begin.peer.clone() });
    }
    if (verdict, plan.choice) == (Verdict::Unclear, Some(Choice::RunHere))
        && matches!(answer, Some(HandoverState::Filled { .. }))
    {
        return Err(RecoverError::Complete { session: begin.session.clone(), peer: begin.peer.clone() });
    }
    let mut failure = None;
    if verdict == Verdict::Serve {
        match entry.owed().map_err(SendError::from).and_then(|owed| owed.ok_or(SendError::NothingOwed)) {
            Ok(owed) if !plan.dry_run => return Ok(Settled::Owes(Box::new(Debtor { entry, tree, owed }))),
            Ok(_) => {}
            Err(error) => (verdict, failure) = (Verdict::Unclear, Some(error)),
        }
    }
    let finding =
        conclude(plan, entry, &tree, state, verdict, Heard { answer, served: None, failure }, None)?;
    Ok(Settled::Found(Box::new(finding)))
}

/// What was heard of the other side, and of who sent pages there.
#[derive(Default)]
struct Heard {
    answer: Option<HandoverState>,
    served: Option<PostCopyReport>,
    /// Why pages could not be sent.
    failure: Option<SendError>,
}

/// Does what was found is to be done, and says it. `writer`: the place of the engine has been taken.
fn conclude(
    plan: &RecoverPlan,
    entry: Entry,
    tree: &Copy,
    state: Tree,
    verdict: Verdict,
    heard: Heard,
    writer: Option<Writer>,
) -> Result<Finding, RecoverError> {
    let Heard { answer, served, failure } = heard;
    let chosen = match (verdict, plan.choice) {
        (Verdict::Unclear, Some(Choice::RunHere)) => Verdict::RunHere,
        (Verdict::Unclear, Some(Choice::EndHere)) => Verdict::EndHere,
        (verdict, _) => verdict,
    };
    let ends = chosen == Verdict::EndHere && entry.begin.role == Role::Source;
    // What comes before the end takes its time, and is done once.
    let _writer = match writer {
        None if ends && !plan.dry_run => match entry.take_over(Step::Filled, &[])? {
            None => {
                let heard = Heard { answer, ..Heard::default() };
                return conclude(plan, entry, tree, state, Verdict::UnderWay, heard, None);
            }
            taken => taken,
        },
        writer => writer,
    };
    let mut text = match (&served, failure) {
        (Some(report), _) if ends => format!(
            "ended here: it runs at {}, and was sent what it was owed ({} of {} pages were missing)",
            entry.begin.peer,
            report.demanded_pages + report.pushed_pages,
            report.owed_pages
        ),
        (_, Some(error)) => not_sent(&error, &entry, state, answer.as_ref()),
        (_, None) => describe(chosen, &entry, state, answer.as_ref(), plan.dry_run),
    };
    if chosen == Verdict::RunHere && entry.step >= Step::Held && !plan.dry_run {
        // A packet that finds a socket in its repair mode has it count bytes as sent that never were (tcp_write_xmit).
        tree.await_release();
    }
    if chosen == Verdict::RunHere && !entry.addresses.is_empty() {
        let addresses = entry.addresses.join(", ");
        text += &match plan.dry_run {
            true => format!("; its addresses would be put back: {addresses}"),
            // The program is worth more than its addresses: that these could not be put back is said, and it runs.
            false => put_back(&entry).map_or_else(
                |error| format!("; its addresses ({addresses}) could not be put back here: {error}"),
                |()| format!("; its addresses are here: {addresses}"),
            ),
        };
    }
    if ends && !entry.addresses.is_empty() {
        text += &match plan.dry_run {
            true => format!(
                "; of its addresses what is still here would be taken away: {}",
                entry.addresses.join(", ")
            ),
            // Before the end of the copy: who is killed in between is called again.
            false => take_away(&entry).map_or_else(String::new, |text| format!("; {text}")),
        };
    }
    let mut kept_pages = None;
    if let (true, Some(dir)) = (ends, &entry.keep_store) {
        text += &match plan.dry_run {
            true => format!("; its pages would be kept in {}", dir.display()),
            // The next migration costs bytes without them, and nothing else.
            false => match tree.keep(dir) {
                Ok(pages) => {
                    kept_pages = Some(pages);
                    format!("; its pages are kept in {}", dir.display())
                }
                Err(error) => format!("; nothing is kept of it in {}: {error}", dir.display()),
            },
        };
    }
    if !plan.dry_run {
        act(chosen, &entry, tree)?;
    }
    let settled = !matches!(chosen, Verdict::Unclear | Verdict::Serve);
    let answer = answer.map(|answer| format!("{answer:?}"));
    Ok(Finding { tree: state, answer, verdict: chosen, text, served, kept_pages, settled, entry })
}

/// A copy that has pages which the program at the other side needs.
struct Debtor {
    entry: Entry,
    tree: Copy,
    owed: Owed,
}

/// How often the sending is begun anew when the last word of the other side is lost.
const TRIES: u32 = 3;

impl Debtor {
    /// Sends them, and ends the copy when the other side has said that every page is in place.
    fn serve(self, plan: &RecoverPlan, observer: &dyn Observer) -> Result<Finding, RecoverError> {
        let Self { mut entry, tree, owed } = self;
        // Whoever looked first has noted it: what has run since is not what the program is owed, however often this is called.
        let noted = if entry.stood.is_empty() { tree.stand() } else { Ok(entry.stood.clone()) };
        let stood = noted.as_deref().unwrap_or_default();
        let Some(mut writer) = entry.take_over(Step::Resumed, stood)? else {
            // Somebody else has, meanwhile.
            let state = tree.look(&entry);
            return conclude(plan, entry, &tree, state, Verdict::UnderWay, Heard::default(), None);
        };
        (entry.begin.engine, entry.step, entry.stood) =
            (std::process::id() as i32, Step::Resumed, stood.to_vec());
        if let Some(text) = take_away(&entry) {
            observer.event(&Event::Warning { text });
        }
        let mut tries = 0;
        let (verdict, heard) = loop {
            tries += 1;
            let orphaned = || {
                let noted = noted.as_deref().map_err(|pid| *pid).and_then(|stood| tree.noted(stood));
                let tree = noted.map_err(|pid| SendError::NotStanding { pid })?;
                let to = entry.begin.peer.parse().map_err(|_| SendError::NothingOwed)?;
                let (session, program) = (session_of(&entry).unwrap_or_default(), &entry.begin.program);
                let (owed, patience) = (owed.clone(), plan.patience);
                Orphaned { session, program, to, owed, tree, patience, observer }.serve()
            };
            let error = match orphaned() {
                Ok(report) => {
                    let heard = Heard { served: Some(report), ..Heard::default() };
                    match tree.look(&entry) {
                        Tree::Stopped | Tree::Gone => break (Verdict::EndHere, heard),
                        // All was sent before it was let go, or else the destination had not been told that this was all. What it has said just now
                        // counts, also where its receiver has ended since.
                        Tree::Running | Tree::RanOn => {
                            let answer = Some(HandoverState::Filled { pid: 0 });
                            break (Verdict::Unclear, Heard { answer, ..heard });
                        }
                    }
                }
                Err(error) => error,
            };
            // What became of it meanwhile says more than how the sending ended.
            let answer = ask(&entry, plan.patience);
            match verdict::answered(answer.as_ref(), entry.owes, tree.look(&entry)) {
                Verdict::Serve if error.is_lost_link() && tries < TRIES => {}
                Verdict::Serve | Verdict::Unclear => {
                    break (Verdict::Unclear, Heard { answer, served: None, failure: Some(error) });
                }
                verdict => break (verdict, Heard { answer, ..Heard::default() }),
            }
        };
        if verdict == Verdict::EndHere {
            writer.step(Step::Filled, &[])?;
        }
        let state = tree.look(&entry);
        conclude(plan, entry, &tree, state, verdict, heard, Some(writer))
    }
}

/// Why owed pages were not sent, where the program is, and what to do.
fn not_sent(error: &SendError, entry: &Entry, tree: Tree, answer: Option<&HandoverState>) -> String {
    let (peer, short) = (&entry.begin.peer, &entry.begin.session[..8]);
    let why = error.chain();
    if tree != Tree::Stopped || !needed_there(answer) {
        return format!("{why}; {}", describe(Verdict::Unclear, entry, tree, answer, false));
    }
    let again = match error.is_lost_link()
        || matches!(error, SendError::Owing { source, .. } if source.is_lost_link())
    {
        true => format!("`pageferry recover --session {short}` tries again, and goes on from there"),
        false => "they cannot be sent".to_owned(),
    };
    format!(
        "{why}; stopped here, and whole; it runs at {peer} and waits for pages that are only here: {again}. Without them it is ended there after the \
         receiver's --post-copy-timeout; then `pageferry recover --session {short} --run-here` lets it run here as it was when it moved"
    )
}

fn put_back(entry: &Entry) -> Result<(), String> {
    let moved = moved(entry)?;
    network::ground::put_back(session_of(entry).unwrap_or_default(), &moved).map_err(|error| chain(&error))
}

/// The program runs at the other side, and has its addresses there: what an engine that was killed just then had not taken away here yet
/// goes now. Says what there is to say of it.
fn take_away(entry: &Entry) -> Option<String> {
    if entry.addresses.is_empty() {
        return None;
    }
    let taken =
        moved(entry).and_then(|moved| network::ground::take_away(&moved).map_err(|error| chain(&error)));
    match taken {
        Ok(gone) if gone.is_empty() => None,
        Ok(gone) => Some(format!("taken away here, because the program has it there: {}", gone.join(", "))),
        Err(error) => {
            Some(format!("addresses that the program has there could not be taken away here: {error}"))
        }
    }
}

fn moved(entry: &Entry) -> Result<Vec<MovedAddress>, String> {
    let moved: Result<Vec<MovedAddress>, _> = entry.addresses.iter().map(|text| text.parse()).collect();
    moved.map_err(|error| error.to_string())
}

fn chain(error: &dyn std::error::Error) -> String {
    let cause = error.source().map_or_else(String::new, |cause| format!(": {cause}"));
    format!("{error}{cause}")
}

/// Whether the program runs at the other side, and has not all of its pages yet.
fn needed_there(answer: Option<&HandoverState>) -> bool {
    matches!(answer, Some(HandoverState::Resumed { .. }))
}

fn ask(entry: &Entry, patience: Duration) -> Option<HandoverState> {
    // Nobody can be asked about a file.
    let to: SocketAddr = entry.begin.peer.parse().ok()?;
    ask_until(to, session_of(entry)?, entry.owes, patience)
}

fn session_of(entry: &Entry) -> Option<u128> {
    u128::from_str_radix(&entry.begin.session, 16).ok()
}

/// Does what a verdict says, and takes the journal away where nobody will ask about it.
fn act(verdict: Verdict, entry: &Entry, tree: &Copy) -> Result<(), RecoverError> {
    match verdict {
        Verdict::UnderWay | Verdict::Ask | Verdict::Serve | Verdict::Unclear => return Ok(()),
        Verdict::Over => {}
        // Before that step nobody but its user has stopped it.
        Verdict::RunHere if entry.step >= Step::Held => tree.signal(Signal::CONT)?,
        Verdict::RunHere => {}
        Verdict::EndHere => tree.end()?,
    }
    if entry.begin.role == Role::Source {
        entry.remove()?;
    }
    // A destination's stays: the source may ask.
    Ok(())
}

fn describe(
    verdict: Verdict,
    entry: &Entry,
    tree: Tree,
    answer: Option<&HandoverState>,
    dry_run: bool,
) -> String {
    let Entry { begin, step, .. } = entry;
    let (would, short) = (if dry_run { "would be " } else { "" }, &begin.session[..8]);
    let root = entry.processes.first().or(begin.root.as_ref()).map_or(0, |process| process.pid);
    match (begin.role, verdict) {
        (_, Verdict::UnderWay) => format!("goes on: its engine is process {}", begin.engine),
        (Role::Source, Verdict::Over) if tree == Tree::Running => {
            format!("runs here as process {root}: somebody has let it go")
        }
        (Role::Source, Verdict::Over) if entry.owes && *step != Step::Filled => format!(
            "no process of it is left here: should it run at {}, and have been owed pages, it is ended there after the receiver's --post-copy-timeout",
            begin.peer
        ),
        (Role::Source, Verdict::Over) => "no process of it is left here".to_owned(),
        (_, Verdict::Serve) => format!(
            "stopped here, and whole; it runs at {}, and would be sent the pages that it is owed, and then ended here",
            begin.peer
        ),
        (Role::Destination, Verdict::Over) if *step == Step::Filled && tree != Tree::Gone => {
            format!("runs here, complete, as process {root}; whoever asks is told so")
        }
        (Role::Destination, Verdict::Over) if *step == Step::Filled => {
            format!("ran here, complete, as process {root}, and has ended since")
        }
        (Role::Destination, Verdict::Over) if *step >= Step::Committing && *step != Step::Discarded => {
            "ran here, or was about to, and was ended with its engine, which had pages of it; the source has it as it was when it moved"
                .to_owned()
        }
        (Role::Destination, Verdict::Over) => "nothing of it is here, and the source is told so".to_owned(),
        (Role::Source, Verdict::RunHere) if *step < Step::Held => {
            "runs here as before; it was not stopped".to_owned()
        }
        (_, Verdict::RunHere) => format!("{would}let go: it runs here as process {root}"),
        (Role::Source, Verdict::EndHere) => format!("{would}ended here: it runs at {}", begin.peer),
        (Role::Destination, Verdict::EndHere) => {
            format!("{would}ended here: pages of it had gone with the engine; the source has it")
        }
        (_, Verdict::Ask | Verdict::Unclear) => {
            let here = match tree {
                Tree::Running => "runs here, because somebody has let it go",
                Tree::RanOn => "stopped here, and somebody had let it go since its pages were taken up to be sent",
                _ => "stopped here, and whole",
            };
            let heard = match answer {
                None if begin.peer.parse::<SocketAddr>().is_err() => {
                    format!("whether {} is complete is not known (`pageferry inspect` tells)", begin.peer)
                }
                None => format!("{} does not answer (`pageferry receive` there does)", begin.peer),
                Some(HandoverState::Unknown) => format!("{} does not know the session", begin.peer),
                Some(HandoverState::Ended) => format!(
                    "it ran at {}, or was about to, and was ended there with its engine{}",
                    begin.peer,
                    if tree == Tree::Stopped { "; the copy here is as it was when it moved" } else { "" }
                ),
                Some(HandoverState::Resumed { .. }) if !entry.owes => {
                    return format!(
                        "stopped here, and whole; it runs at {}, where its pages are being put in place. Call this again: when they are, it is ended here",
                        begin.peer
                    );
                }
                Some(HandoverState::Resumed { .. }) => format!(
                    "it runs at {} and waits for pages that were only here, and may be others by now: nothing is sent, and it is ended there after the \
                     receiver's --post-copy-timeout",
                    begin.peer
                ),
                Some(HandoverState::Filled { .. }) => {
                    return format!(
                        "{here}; it runs at {}, and all of its pages are in place there. `pageferry recover --session {short} --end-here` ends what is here",
                        begin.peer
                    );
                }
                Some(_) => format!("{} is not done with it", begin.peer),
            };
            format!(
                "{here}; {heard}. If there is none there: `pageferry recover --session {short} --run-here`; if it runs \
                 there: `pageferry recover --session {short} --end-here`"
            )
        }
    }
}

/// What a receiver answers about a session that it has not had itself.
pub(crate) fn remembered(journal: &Journal, session: u128) -> HandoverState {
    let until = Instant::now() + GUARDS;
    let entry = loop {
        match journal.find(Role::Destination, session) {
            Ok(Some(entry)) if entry.live && !is_process(entry.begin.engine) && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Ok(Some(entry)) => break entry,
            Ok(None) => return HandoverState::Unknown,
            Err(error) => {
                tracing::warn!(%error, "asked about a session whose journal cannot be read");
                return HandoverState::Unknown;
            }
        }
    };
    let copy = Copy::find(&entry);
    let mut tree = copy.state();
    if verdict::judge(Role::Destination, entry.step, entry.live, tree) == Verdict::EndHere {
        // The guard does it too; what is said here has to be true when it is said.
        if let Err(error) = copy.end() {
            tracing::warn!(%error, "what is left of a session could not be ended");
        }
        tree = copy.state();
    }
    let pid = entry.processes.first().map_or(0, |process| process.pid);
    verdict::state_of(entry.step, entry.live, tree, pid)
}

/// What says that `target` is not to be moved now: it is being moved, or an engine has left it here stopped.
pub(crate) fn left_behind(journal: &Journal, target: &Target) -> Result<Option<Entry>, JournalError> {
    let (entries, _) = journal.entries()?;
    let process = Process { pid: target.pid(), start: target.start_time() };
    Ok(entries.into_iter().find(|entry| {
        let of_it = entry.begin.root == Some(process) || entry.processes.contains(&process);
        let stopped = || entry.step >= Step::Held && Copy::find(entry).state() == Tree::Stopped;
        entry.begin.role == Role::Source && of_it && (entry.live || stopped())
    }))
}

/// Removes journals of dead engines that leave nothing to decide.
pub(crate) fn sweep(journal: &Journal) {
    let (entries, _) = journal.entries().unwrap_or_default();
    for entry in entries {
        let tree = Copy::find(&entry).state();
        let verdict = verdict::judge(entry.begin.role, entry.step, entry.live, tree);
        let untouched = verdict == Verdict::RunHere && (entry.step < Step::Held || tree == Tree::Running);
        if entry.begin.role == Role::Source && (verdict == Verdict::Over || untouched) {
            let _ = entry.remove();
        }
    }
    journal.forget_older_than(REMEMBERED);
}

/// How long a destination's journal of a dead engine can be asked about.
const REMEMBERED: Duration = Duration::from_secs(7 * 24 * 3600);
