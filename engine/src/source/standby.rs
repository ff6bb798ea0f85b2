//! A migration that is paused: nothing is read and nothing sent, the program runs at its full pace, and the receiver hears that
//! somebody is still there.

use super::Migration;
use super::failure::SendError;
use crate::control::Control;
use crate::link::{Channel, ChannelError, LinkError};
use crate::observe::{Event, Observer};
use pageferry_tracker::Throttle;
use pageferry_wire_format::ControlMessage;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often the receiver hears of us: it gives up on a silent source after a time of its own choice, which is seconds.
const BEAT: Duration = Duration::from_millis(250);

/// What a pause concerns.
pub(super) struct Standby<'a> {
    pub(super) control: &'a Control,
    pub(super) observer: &'a dyn Observer,
    pub(super) throttle: Option<&'a Throttle>,
    /// Whether silence means anything at the other end: a file has no use for signs of life.
    pub(super) beats: bool,
    /// Another connection has failed: there is nothing to wait for.
    pub(super) stop: Option<&'a AtomicBool>,
}

impl Standby<'_> {
    /// Waits until the migration is to go on, or is to stop; says for how long. Hears a receiver that gives up.
    pub(super) fn wait(&self, channel: &mut Channel) -> Result<Duration, ChannelError> {
        let started = Instant::now();
        self.observer.event(&Event::Paused);
        let share = self.set_throttle(0.0);
        let heard = self.beat(channel);
        self.set_throttle(share);
        if heard.is_ok() {
            self.observer.event(&Event::Unpaused);
        }
        heard.map(|()| started.elapsed())
    }

    fn beat(&self, channel: &mut Channel) -> Result<(), ChannelError> {
        let stopped = || self.stop.is_some_and(|stop| stop.load(Ordering::Relaxed));
        let (mut carried, mut since) = (0, Instant::now());
        while self.control.wait(BEAT) && !self.control.token().is_cancelled() && !stopped() {
            if self.beats {
                channel.control(&ControlMessage::Ping { n: 0 })?;
            }
            channel.hear_abort()?;
            // So little is sent that the system takes all of it for a long time: whether it arrives shows in what is acknowledged.
            let link = channel.link();
            let Some((_, on_the_way)) = link.left() else { continue };
            let arrived = link.sent().saturating_sub(on_the_way);
            if on_the_way == 0 || arrived > carried {
                (carried, since) = (arrived, Instant::now());
            } else if since.elapsed() > link.stall() {
                return Err(LinkError::Stalled(link.stall()).into());
            }
        }
        Ok(())
    }

    /// Gives the share of before.
    fn set_throttle(&self, share: f64) -> f64 {
        let before = self.throttle.map_or(0.0, Throttle::share);
        // One that has failed is at its full pace for good.
        if let Some(throttle) = self.throttle
            && (before > 0.0 || share > 0.0)
        {
            throttle.set(share);
            self.control.throttled(share);
        }
        before
    }
}

impl Migration<'_> {
    /// Between two rounds: waits while the migration is paused.
    pub(super) fn stand_by(&mut self) -> Result<(), SendError> {
        if self.control.is_paused() {
            let standby = Standby {
                control: self.control,
                observer: self.observer,
                throttle: self.throttle.as_ref(),
                beats: self.peer.is_receiver(),
                stop: None,
            };
            let channel = self.channel.as_mut().expect("connected before the first round");
            self.paused += standby.wait(channel)?;
            self.report.paused_us = self.paused.as_micros() as u64;
        }
        self.check_cancel()
    }
}
