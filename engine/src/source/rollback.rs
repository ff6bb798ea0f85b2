//! The end of a migration that did not end well: who owns the program now, and undoing the rest.

use super::failure::SendError;
use super::handover::ASK_AGAIN;
use super::machine::{Aftermath, Phase, after_abort, after_answer, after_failure};
use super::{Migration, Peer, peak_resident_bytes, states};
use crate::error::{FailureKind, MigrationError};
use crate::journal::{Step, ask};
use crate::observe::Event;
use crate::report::MigrationReport;
use pageferry_wire_format::{AbortCode, ControlMessage, HandoverState};
use std::time::{Duration, Instant};

impl Migration<'_> {
    /// Turns the outcome of the happy path into a report, after having done what the outcome asks for.
    pub(super) fn conclude(
        mut self,
        result: Result<(), SendError>,
        started: Instant,
    ) -> Result<MigrationReport, MigrationError> {
        if self.report.total_us == 0 {
            self.report.total_us = started.elapsed().as_micros() as u64;
        }
        self.report.engine_peak_rss_bytes = peak_resident_bytes();
        self.report.bytes_sent = self.sent_bytes();
        let Err(mut error) = result else {
            self.report.outcome = "completed".to_owned();
            self.judge_goals();
            self.close_journal();
            return Ok(self.report);
        };
        let mut failed_in = self.phase;
        let mut aftermath = after_failure(failed_in, self.stake());
        if aftermath == Aftermath::Ask {
            aftermath = match error.peers_abort().filter(|_| failed_in == Phase::Committing) {
                Some(code) => after_abort(code),
                None => {
                    let stake = self.stake();
                    after_answer(self.ask_what_became().as_ref(), stake)
                }
            };
        }
        if aftermath == Aftermath::Serve && failed_in == Phase::Committing {
            // The program runs there, as was meant, and needs what is here.
            error = match self.after_commit() {
                Ok(()) => {
                    self.report.bytes_sent = self.sent_bytes();
                    self.report.outcome = "completed".to_owned();
                    self.judge_goals();
                    self.close_journal();
                    return Ok(self.report);
                }
                Err(error) => error,
            };
            failed_in = self.phase;
            aftermath = match after_failure(failed_in, self.stake()) {
                Aftermath::Ask => after_answer(self.ask_what_became().as_ref(), self.stake()),
                aftermath => aftermath,
            };
        }
        match aftermath {
            Aftermath::RunOn => self.run_on(&error),
            Aftermath::End => self.end_source(),
            Aftermath::Ask | Aftermath::Hold | Aftermath::Serve => self.hold(),
        }
        if matches!(aftermath, Aftermath::RunOn | Aftermath::End) {
            self.close_journal();
        }
        self.describe(error, failed_in, aftermath)
    }

    /// Undoes everything, with the tree running on.
    fn run_on(&mut self, error: &SendError) {
        if let Some(channel) = &mut self.channel {
            // The receiver hears why, and can clean up at once instead of at a time-out.
            let (code, patience) = match error.is_cancel() {
                true => (AbortCode::Cancelled, Duration::from_millis(500)),
                false => (AbortCode::SourceFailed, Duration::from_millis(500)),
            };
            channel.link_mut().set_cancel(None);
            channel.link_mut().set_stall(patience);
            let _ = channel.control(&ControlMessage::abort(code, &error.to_string()));
        } else if !error.is_peers_abort() {
            self.say_farewell();
        }
        if let Some(dump) = self.dump.take()
            && let Err(error) = dump.abort()
        {
            tracing::warn!(%error, "CRIU did not end cleanly after the abort");
        }
        for target in self.held.drain(..) {
            let _ = rustix::process::pidfd_send_signal(target.pidfd(), rustix::process::Signal::CONT);
        }
        // The sockets are the program's again, and out of CRIU's hands.
        self.take_network_back();
        if let Some(tracker) = self.tracker.take()
            && let Err(error) = tracker.detach()
        {
            tracing::warn!(%error, "the tracker could not be detached cleanly");
        }
        if let Some(channel) = &self.channel {
            channel.link().shutdown();
        }
        self.observer.event(&Event::RolledBack { reason: error.to_string() });
    }

    fn close_journal(&mut self) {
        if let Some(journal) = self.journal.take() {
            journal.close();
        }
    }

    /// Writes a step down that has been taken already: without that line, what is found after a crash is asked about.
    pub(super) fn note_down(&mut self, step: Step) {
        if let Err(error) = self.write_down(step, &[]) {
            let text = format!("{error}");
            self.observer.event(&Event::Warning { text });
        }
    }

    /// The destination runs the program: the copy here must not.
    fn end_source(&mut self) {
        self.let_network_go(true);
        // In that phase they have been.
        if self.phase != Phase::Filled {
            self.keep_pages();
        }
        if let Some(dump) = self.dump.take()
            && let Err(error) = dump.commit(self.plan.stall_timeout)
        {
            tracing::warn!(%error, "CRIU did not end the tree; ending it by hand");
        }
        for target in self.held.drain(..) {
            let _ = rustix::process::pidfd_send_signal(target.pidfd(), rustix::process::Signal::KILL);
        }
    }

    /// Nobody knows: the tree stays, stopped and whole.
    fn hold(&mut self) {
        // They may be the other's, and only one may have them.
        let addresses = self.let_network_go(false);
        if !addresses.is_empty() {
            let text = format!(
                "taken away here, as the receiver may have them: {}. `pageferry recover` puts them back when it lets the program run on here; by hand: `ip address add ADDR/LEN dev DEV`",
                addresses.join(", ")
            );
            self.observer.event(&Event::Warning { text });
        }
        self.note_down(Step::InDoubt);
        // CRIU lets the tasks go, and each runs into the SIGSTOP that waits for it.
        if let Some(dump) = self.dump.take()
            && let Err(error) = dump.abort()
        {
            tracing::warn!(%error, "CRIU did not end cleanly");
        }
        if let Some(tracker) = self.tracker.take() {
            let _ = tracker.detach();
        }
    }

    /// Asks the receiver over new connections, until it knows or the time is over.
    pub(super) fn ask_what_became(&mut self) -> Option<HandoverState> {
        if let Some(channel) = self.channel.take() {
            channel.link().shutdown();
        }
        if let Peer::Archive(archive) = &mut self.peer {
            let kept = archive.is_kept();
            return Some(if kept { HandoverState::Filled { pid: 0 } } else { HandoverState::Discarded });
        }
        let end = Instant::now() + self.plan.resolve_timeout;
        let mut last = None;
        loop {
            match self.ask_once() {
                Ok(HandoverState::ReadyToRun | HandoverState::Receiving) | Err(_) => {}
                // Its pages are being put in place.
                Ok(state @ HandoverState::Resumed { .. }) if self.late.is_none() => last = Some(state),
                // A receiver that was started anew does not know the session. Asking again does not help.
                Ok(state) => return Some(state),
            }
            if Instant::now() >= end {
                return last;
            }
            std::thread::sleep(ASK_AGAIN);
        }
    }

    fn ask_once(&mut self) -> Result<HandoverState, SendError> {
        let mut channel = self.open_channel()?;
        channel.link_mut().set_cancel(None);
        let state = ask(&mut channel, self.session)?;
        if let Some(HandoverState::Resumed { pid } | HandoverState::Filled { pid }) = state {
            self.report.destination_pid = Some(pid);
        }
        state.ok_or_else(|| SendError::Protocol("no state of the session".to_owned()))
    }

    fn describe(
        mut self,
        error: SendError,
        failed_in: Phase,
        aftermath: Aftermath,
    ) -> Result<MigrationReport, MigrationError> {
        let (source_state, destination_state) = states(aftermath);
        let kind = match aftermath {
            Aftermath::RunOn if error.is_cancel() => FailureKind::Interrupted,
            Aftermath::RunOn if failed_in <= Phase::Attaching => FailureKind::Refused,
            Aftermath::RunOn => FailureKind::RolledBack,
            Aftermath::End => FailureKind::AfterCommit,
            Aftermath::Ask | Aftermath::Hold | Aftermath::Serve => FailureKind::InDoubt,
        };
        let help = match aftermath {
            Aftermath::Hold | Aftermath::Serve if failed_in == Phase::PostCopy => Some(format!(
                "{}the program is stopped here, whole, as it was when it moved; the receiver {} ends its copy, which cannot go on without these \
                 pages, or has done so. When it has, `kill -CONT {}` lets the program run on here from where it was, without what it did \
                 there; `kill -KILL {}` ends it",
                match self.plan.journal {
                    Some(_) =>
                        "`pageferry recover` sends these pages, as long as the receiver waits for them; ",
                    None => "",
                },
                self.plan.to,
                pids(&self.held),
                pids(&self.held)
            )),
            Aftermath::Hold | Aftermath::Ask | Aftermath::Serve => Some(format!(
                "{}look at the receiver {}: if the program runs there, end the copy here with `kill -KILL {}`; \
                 if it does not and never will, let this one run on with `kill -CONT {}`",
                match self.plan.journal {
                    Some(_) =>
                        "`pageferry recover` asks the receiver again, and does what the answer says; or ",
                    None => "",
                },
                self.plan.to,
                pids(&self.held),
                pids(&self.held)
            )),
            _ => error.help(),
        };
        self.report.outcome = match kind {
            FailureKind::Interrupted => "interrupted",
            FailureKind::Refused | FailureKind::Usage => "refused",
            FailureKind::RolledBack => "rolled-back",
            FailureKind::AfterCommit => "completed-with-errors",
            FailureKind::InDoubt => "in-doubt",
        }
        .to_owned();
        self.report.error = Some(error.chain());
        let report = std::mem::take(&mut self.report);
        Err(MigrationError {
            kind,
            phase: failed_in.to_string(),
            source_state,
            destination_state,
            help,
            cause: Box::new(error),
            report: Some(Box::new(report)),
        })
    }
}

fn pids(held: &[pageferry_tracker::Target]) -> String {
    held.iter().map(|target| target.pid().to_string()).collect::<Vec<_>>().join(" ")
}
