//! The destination's side of the network's handover, during one session.

use super::failure::ReceiveError;
use crate::network::arriving::Arriving;
use crate::network::ground::{Ground, Machine, Place, of_destination};
use crate::network::hooks::{HookStage, environment};
use crate::network::traces::{self, Trace};
use crate::network::{NetworkError, is_device_name, stays};
use crate::observe::{Event, Observer};
use crate::plan::ReceivePlan;
use pageferry_wire_format::{ControlMessage, MovingAddress};
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// What comes of the network with a program. Dropped before [`Arrival::deliver`], everything is as it was; so it has to live longer than
/// the restored processes.
pub(super) struct Arrival<'a> {
    plan: &'a ReceivePlan,
    observer: &'a dyn Observer,
    session: u128,
    program: String,
    peer: String,
    addresses: Vec<IpAddr>,
    arriving: Option<Arriving<Machine>>,
    // Behind what it is about, which has to be undone first.
    trace: Option<Trace>,
    state: State,
    keep_tcp: bool,
    release_us: u64,
    /// How long it took to make everything ready.
    prepared: Option<Duration>,
}

/// How far the hooks have come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The source has said nothing of a network.
    Untouched,
    /// Something may be prepared.
    Prepared,
    /// Clients may have been told.
    Announced,
    /// Packets may get in.
    Open,
    /// The program is ours.
    Ours,
}

impl<'a> Arrival<'a> {
    pub(super) fn new(
        plan: &'a ReceivePlan,
        observer: &'a dyn Observer,
        session: u128,
        program: &str,
        peer: String,
    ) -> Self {
        Self {
            plan,
            observer,
            session,
            program: program.to_owned(),
            peer,
            addresses: Vec::new(),
            arriving: None,
            trace: None,
            state: State::Untouched,
            keep_tcp: false,
            release_us: 0,
            prepared: None,
        }
    }

    /// Whether established connections are kept.
    pub(super) fn keeps_tcp(&self) -> bool {
        self.keep_tcp
    }

    /// Makes everything ready, so that nobody notices.
    pub(super) fn prepare(&mut self, moving: Vec<MovingAddress>, keep_tcp: bool) -> Result<(), ReceiveError> {
        if self.state != State::Untouched {
            return Err(ReceiveError::Order("what moves of the network twice"));
        }
        let started = Instant::now();
        let mut places = Vec::new();
        for one in moving {
            if stays(one.address).is_some() || one.device.as_deref().is_some_and(|name| !is_device_name(name))
            {
                return Err(ReceiveError::Order("an address that cannot move"));
            }
            places.push(match &one.device {
                Some(device) => of_destination(one.address, one.prefix, device, one.owner)?,
                None => Place { address: one.address, prefix: one.prefix, device: None, owner: None },
            });
        }
        self.state = State::Prepared;
        self.keep_tcp = keep_tcp;
        self.addresses = places.iter().map(|place| place.address).collect();
        if !places.is_empty() {
            let name = traces::name(self.session);
            self.trace = Some(Trace::write(&name, &places)?);
            let arriving = self.arriving.insert(Arriving::new(Machine::destination(name, places)));
            arriving.prepare()?;
        }
        self.hook(HookStage::Prepare)?;
        self.prepared = Some(started.elapsed());
        Ok(())
    }

    /// How long that took; `None` if nothing of the network moves.
    pub(super) fn prepared_in(&self) -> Option<Duration> {
        self.prepared
    }

    /// Clients send here from now on. Says how long that took, in microseconds.
    pub(super) fn announce(&mut self) -> Result<u64, ReceiveError> {
        if self.state != State::Prepared {
            return Err(ReceiveError::Order("an announcement of nothing, or twice"));
        }
        let started = Instant::now();
        self.state = State::Announced;
        crate::fault::point("dest-announce");
        if let Some(arriving) = &mut self.arriving {
            arriving.announce()?;
        }
        self.hook(HookStage::BeforeFreeze)?;
        Ok(started.elapsed().as_micros() as u64)
    }

    /// The commit has come, and the sockets are there: packets are let in. Where that fails it is tried again at the end.
    pub(super) fn open(&mut self) {
        if self.state == State::Untouched {
            return;
        }
        let started = Instant::now();
        self.state = State::Open;
        if let Some(Err(error)) = self.arriving.as_mut().map(Arriving::open) {
            self.warn(&error);
        }
        self.release_us = started.elapsed().as_micros() as u64;
    }

    /// The program runs: it is given what had arrived for it. `None` where nothing moved.
    pub(super) fn deliver(&mut self) -> Option<ControlMessage> {
        if self.state != State::Open {
            return None;
        }
        let started = Instant::now();
        self.state = State::Ours;
        if let Some(Err(error)) = self.trace.as_mut().map(Trace::keep) {
            self.warn(&error);
        }
        let delivered = match &mut self.arriving {
            None => Default::default(),
            Some(arriving) => {
                let result = arriving.deliver();
                let delivered = arriving.ground().delivered();
                if let Err(error) = result {
                    self.warn(&error);
                }
                delivered
            }
        };
        Some(ControlMessage::Delivered {
            packets: delivered.packets,
            bytes: delivered.bytes,
            lost: delivered.lost,
            release_us: self.release_us,
            deliver_us: started.elapsed().as_micros() as u64,
        })
    }

    /// When there is time: nothing is held back any more, and nothing is left to be undone.
    pub(super) fn settle(&mut self) {
        if self.state != State::Ours {
            return;
        }
        if let Some(arriving) = self.arriving.take()
            && let Err(error) = arriving.settle()
        {
            self.warn(&error);
        }
        self.trace = None;
        if let Err(error) = self.hook(HookStage::AfterResume) {
            self.observer.event(&Event::Warning { text: error.chain() });
        }
    }

    fn warn(&self, error: &NetworkError) {
        let cause = std::error::Error::source(error).map_or_else(String::new, |cause| format!(": {cause}"));
        self.observer.event(&Event::Warning { text: format!("{error}{cause}") });
    }

    fn hook(&self, stage: HookStage) -> Result<(), ReceiveError> {
        let environment =
            environment("destination", self.session, &self.program, None, &self.addresses, &self.peer);
        let hooks = &self.plan.hooks;
        hooks.run(stage, &environment, self.plan.stall_timeout).map_err(NetworkError::from)?;
        Ok(())
    }
}

impl Drop for Arrival<'_> {
    fn drop(&mut self) {
        match self.state {
            State::Untouched => {}
            State::Prepared | State::Announced | State::Open => {
                self.arriving = None;
                self.trace = None;
                if let Err(error) = self.hook(HookStage::Rollback) {
                    self.observer.event(&Event::Warning { text: error.chain() });
                }
            }
            State::Ours => {
                self.arriving = None;
                self.trace = None;
            }
        }
    }
}
