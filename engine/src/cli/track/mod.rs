//! `pageferry track`: what a program writes, without moving it.

mod contents;
mod heat;
mod launch;
mod output;
mod plot;
mod replay;
mod session;
mod sinks;
mod view;

use super::arguments::TrackVerb;
use super::failure::{REFUSED, USAGE};
use super::signals;
use anyhow::{Context, bail};
use launch::Launched;
use output::{Extent, Summary, Tally};
use pageferry::Cancel;
use pageferry_tracker::Target;
use pageferry_tracker::observation::Observation;
use pageferry_tracker::recording::Header;
use pageferry_tracker::working_set::Estimator;
use session::{News, Plan, Session};
use sinks::Sinks;
use std::io::IsTerminal;
use std::time::{Duration, Instant, SystemTime};
use view::{State, View};

/// How long the live view waits for a key before it looks for news.
const KEYS: Duration = Duration::from_millis(50);

/// Runs the verb.
pub(super) fn run(verb: &TrackVerb) -> anyhow::Result<u8> {
    if let Some(problem) = nonsense(verb) {
        eprintln!("error: {problem}");
        return Ok(USAGE);
    }
    if let Some(path) = &verb.replay {
        return replay::run(verb, path);
    }
    if !nix::unistd::geteuid().is_root() {
        eprintln!("error: tracking needs root: looking at another program's memory is privileged");
        return Ok(REFUSED);
    }
    let cancel = signals::token()?;
    let mut launched = match verb.command.is_empty() {
        true => None,
        false => Some(Launched::start(&verb.command)?),
    };
    let pid = launched.as_ref().map(Launched::pid).or(verb.pid).context("neither --pid nor a command")?;
    let target = Target::open(pid).context("the process cannot be tracked")?;
    let mut run = Run::new(verb, target, &cancel)?;
    let end = match run.follow(launched.as_mut()) {
        Err(error) if sinks::is_unread(&error) => End::Quit,
        end => end?,
    };
    match run.finish(&end) {
        Err(error) if !sinks::is_unread(&error) => return Err(error),
        _ => {}
    }
    match (launched, end) {
        (Some(mut launched), End::Exited) => {
            let status = launched.wait()?;
            eprintln!("{}", launch::ended(status));
            Ok(launch::code(status))
        }
        (Some(mut launched), End::Time | End::Quit) => {
            // It is this program's child, and uses its terminal: it is not left alone.
            eprintln!("tracking ended; waiting for the command (pid {pid})");
            Ok(launch::code(launched.wait()?))
        }
        (launched, End::Signal(signal)) => {
            if launched.is_some() {
                eprintln!("interrupted; the command is not ended by this (pid {pid})");
            }
            Ok(u8::try_from(128 + signal).unwrap_or(130))
        }
        (None, _) => Ok(0),
    }
}

/// What clap cannot see.
fn nonsense(verb: &TrackVerb) -> Option<String> {
    if verb.plot.is_some() && verb.replay.is_none() {
        return Some(
            "--plot draws a recording: record first (--record FILE), then --replay FILE --plot OUT.svg"
                .to_owned(),
        );
    }
    if verb.replay.is_none() && verb.pid.is_none() && verb.command.is_empty() {
        return Some(
            "what is to be tracked? Give --pid PID, or a command after --, or --replay FILE".to_owned(),
        );
    }
    if verb.interval.0 < Duration::from_millis(1) {
        return Some("an interval under 1ms is mostly scanning: choose 1ms or more".to_owned());
    }
    if verb.json && verb.csv.as_deref().is_some_and(|path| path.as_os_str() == "-") {
        return Some("--json and --csv - both want standard output: give --csv a file".to_owned());
    }
    None
}

/// Why tracking ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The program did.
    Exited,
    /// `--duration` is over.
    Time,
    /// The person pressed q.
    Quit,
    /// A signal.
    Signal(i32),
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            End::Exited => f.write_str("the program has ended"),
            End::Time => f.write_str("the time is over"),
            End::Quit => f.write_str("stopped"),
            End::Signal(_) => f.write_str("interrupted"),
        }
    }
}

/// Tracking under way.
struct Run<'a> {
    verb: &'a TrackVerb,
    cancel: &'a Cancel,
    plan: Plan,
    estimator: Estimator,
    sinks: Sinks,
    header: Header,
    tally: Tally,
    extent: Extent,
    live: bool,
}

impl<'a> Run<'a> {
    fn new(verb: &'a TrackVerb, target: Target, cancel: &'a Cancel) -> anyhow::Result<Self> {
        let header = Header {
            version: pageferry_tracker::recording::VERSION,
            // Known when it is attached.
            source: String::new(),
            scope: verb.scope.scope(),
            started_unix_ms: SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |since| since.as_millis() as u64),
            interval: verb.interval.0,
            root_pid: target.pid(),
            root_name: target.name(),
        };
        // Before anything is touched: files that cannot be written are found out now.
        let sinks = Sinks::open(verb)?;
        let terminal = std::io::stdout().is_terminal() && std::io::stdin().is_terminal();
        let live = terminal && verb.command.is_empty() && !sinks.use_stdout();
        let plan = Plan {
            target,
            kind: verb.tracker.kind(),
            scope: verb.scope.scope(),
            interval: verb.interval.0,
            contents: verb.contents,
        };
        Ok(Self {
            verb,
            cancel,
            plan,
            estimator: Estimator::new(),
            sinks,
            header,
            tally: Tally::default(),
            extent: Extent::default(),
            live,
        })
    }

    /// Until the end, whatever it is.
    fn follow(&mut self, mut launched: Option<&mut Launched>) -> anyhow::Result<End> {
        let session = Session::start(self.plan.clone())?;
        let mut view = match self.live {
            true => Some(self.open_view()?),
            false => None,
        };
        let until = self.verb.duration.map(|duration| Instant::now() + duration.0);
        loop {
            if let Some(signal) = self.cancel.signal() {
                return Ok(End::Signal(signal));
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                return Ok(End::Time);
            }
            let mut news = Vec::new();
            match &mut view {
                Some(view) => {
                    if view.wants_to_leave(KEYS)? {
                        return Ok(End::Quit);
                    }
                    news.extend(session.news().try_iter());
                }
                None => news.extend(session.news().recv_timeout(KEYS)),
            }
            let fresh = !news.is_empty();
            for news in news {
                match news {
                    News::Attached { kind, reason } => {
                        self.header.source = kind.to_string();
                        self.sinks.begin(&self.header)?;
                        match &mut view {
                            Some(view) => view.state().attached(format!("tracked by {kind}")),
                            None => self.sinks.attached(&self.header, &reason)?,
                        }
                        if let Some(launched) = &mut launched {
                            launched.release()?;
                        }
                    }
                    News::Scan(observation) => self.take(&observation, view.as_mut())?,
                    News::Exited => return Ok(End::Exited),
                    News::Failed(error) => {
                        // What was recorded stays readable.
                        let _ = self.sinks.end();
                        return Err(error);
                    }
                }
            }
            if let Some(view) = view.as_mut().filter(|_| fresh) {
                view.draw(&self.estimator)?;
            }
        }
    }

    fn open_view(&self) -> anyhow::Result<View> {
        let recording = self.verb.record.as_ref().map(|path| path.display().to_string());
        let state = State::new(
            self.header.root_name.clone(),
            self.header.root_pid,
            self.header.interval,
            self.verb.link,
            recording,
        );
        let mut view = View::open(state).context("the terminal cannot be used for a live view")?;
        view.draw(&self.estimator)?;
        Ok(view)
    }

    fn take(&mut self, observation: &Observation, view: Option<&mut View>) -> anyhow::Result<()> {
        self.estimator.observe(observation);
        let line = self.tally.line(observation, &self.estimator);
        self.extent.scans += 1;
        self.extent.duration = observation.at;
        self.extent.written = self.tally.written();
        self.sinks.scan(observation, &line, view.is_none())?;
        if let Some(view) = view {
            view.state().observe(line);
        }
        Ok(())
    }

    fn finish(mut self, end: &End) -> anyhow::Result<()> {
        self.sinks.end()?;
        if self.extent.scans == 0 {
            bail!("{end} before it was looked at once");
        }
        let summary = Summary::of(&self.estimator, self.verb.link, self.extent, end.to_string());
        self.sinks.summary(&summary, &self.estimator)
    }
}
