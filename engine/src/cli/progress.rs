//! What is told while a migration runs: bars on a terminal, plain lines elsewhere, JSON for programs.

use super::render::printable;
use super::units::{Bytes, Rate, micros};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pageferry::{Event, Observer};
use std::sync::Mutex;

/// One JSON object a line on standard output.
#[derive(Debug)]
pub(super) struct JsonLines;

impl Observer for JsonLines {
    fn event(&self, event: &Event) {
        if let Ok(mut line) = serde_json::to_vec(event) {
            line.push(b'\n');
            // A reader that went away must not stop a migration.
            let _ = super::print(&line);
        }
    }
}

/// One line for every step, on standard error.
#[derive(Debug)]
pub(super) struct Plain;

impl Observer for Plain {
    fn event(&self, event: &Event) {
        if let Some(line) = sentence(event) {
            eprintln!("{}", printable(&line));
        }
    }
}

/// The event in words; `None` for what only a bar shows.
fn sentence(event: &Event) -> Option<String> {
    Some(match event {
        Event::Connected { to, version } => format!("connected to {to} (pageferry {version})"),
        Event::Attached { tracker, reason, processes } => {
            let plural = if *processes == 1 { "process" } else { "processes" };
            format!("tracking {processes} {plural} by {tracker} ({reason})")
        }
        Event::RoundEnded(round) => format!(
            "round {}: {} dirty pages, {} sent, {} unchanged, {} zero, {} in {}",
            round.round,
            round.dirty_pages,
            round.sent_pages,
            round.unchanged_pages,
            round.zero_pages,
            Bytes(round.sent_bytes),
            micros(round.duration_us)
        ),
        Event::Freezing { stop_reason, predicted_downtime_us } => {
            format!("freezing ({stop_reason}; expecting {} of downtime)", micros(*predicted_downtime_us))
        }
        Event::Strategy { chosen, because, .. } => format!("chose {chosen}: {because}"),
        Event::Resumed { pid } => format!("running at the destination as process {pid}"),
        Event::GoesOn { program, to, left_pages, total_pages } => {
            format!("sending {program} at {to} what it is owed: {left_pages} of {total_pages} pages")
        }
        Event::Filled { pages, faults, max_fault_us } => format!(
            "all {pages} pages are in place ({faults} page faults served, the longest in {})",
            micros(*max_fault_us)
        ),
        Event::RolledBack { reason } => format!("rolled back, the program runs on here: {reason}"),
        Event::Paused => {
            "paused, as was asked for: nothing is sent, and the program runs at its full pace".to_owned()
        }
        Event::Unpaused => "it goes on".to_owned(),
        Event::LinkLost { reason, limit_us } => {
            format!("the link was lost, and is waited for ({} at most): {reason}", micros(*limit_us))
        }
        Event::LinkBack { away_us, found_pages } => format!(
            "the link is back after {}, and it goes on ({} had arrived that was in doubt)",
            micros(*away_us),
            Bytes(found_pages * 4096)
        ),
        Event::Throttled { share } => {
            format!(
                "it writes faster than the link carries: slowed down, it stands still for {:.0} % of the time",
                share * 100.0
            )
        }
        Event::Warning { text } => format!("warning: {text}"),
        Event::Listening { on } => format!("listening on {on}"),
        Event::Accepted { from, program } => format!("receiving {program} from {from}"),
        Event::Received { round, stored_pages } => {
            format!("round {round} received ({} so far)", Bytes(stored_pages * 4096))
        }
        Event::Discarded { reason } => format!("discarded, nothing of it is left here: {reason}"),
        _ => return None,
    })
}

/// A bar for every round, on standard error.
#[derive(Debug)]
pub(super) struct Bars {
    bar: Mutex<Option<ProgressBar>>,
}

impl Bars {
    pub(super) fn new() -> Self {
        Self { bar: Mutex::new(None) }
    }

    fn with(&self, change: impl FnOnce(&mut Option<ProgressBar>)) {
        change(&mut self.bar.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    }
}

impl Observer for Bars {
    fn event(&self, event: &Event) {
        match event {
            Event::RoundStarted { round, dirty_pages } => self.with(|slot| {
                let target = ProgressDrawTarget::stderr();
                let bar = ProgressBar::with_draw_target(Some(*dirty_pages), target);
                if let Ok(style) = ProgressStyle::with_template("{prefix} [{bar:40}] {percent:>3} %  {msg}") {
                    bar.set_style(style.progress_chars("=> "));
                }
                bar.set_prefix(format!("round {round}"));
                *slot = Some(bar);
            }),
            Event::Progress { done_pages, sent_bytes, .. } => self.with(|slot| {
                if let Some(bar) = slot {
                    bar.set_position(*done_pages);
                    let seconds = bar.elapsed().as_secs_f64().max(1e-3);
                    let rate = Rate((*sent_bytes as f64 / seconds) as u64);
                    bar.set_message(format!("{}  {rate}", Bytes(*sent_bytes)));
                }
            }),
            Event::Owed { left_pages, total_pages, sent_bytes, .. } => self.with(|slot| {
                let bar = slot.get_or_insert_with(|| {
                    let target = ProgressDrawTarget::stderr();
                    let bar = ProgressBar::with_draw_target(Some(*total_pages), target);
                    if let Ok(style) =
                        ProgressStyle::with_template("{prefix} [{bar:40}] {percent:>3} %  {msg}")
                    {
                        bar.set_style(style.progress_chars("=> "));
                    }
                    bar.set_prefix("owed pages");
                    bar
                });
                bar.set_position(total_pages.saturating_sub(*left_pages));
                bar.set_message(Bytes(*sent_bytes).to_string());
            }),
            other => {
                if let Some(line) = sentence(other) {
                    self.with(|slot| {
                        if let Some(bar) = slot.take() {
                            bar.finish_and_clear();
                        }
                    });
                    eprintln!("{}", printable(&line));
                }
            }
        }
    }
}
