//! The source's side of the network's handover: what moves, when, and back again.

use super::failure::SendError;
use super::{Migration, Peer};
use crate::link::ChannelError;
use crate::network::established::{Connection, connections, waiting};
use crate::network::ground::{Machine, Place, of_source};
use crate::network::hooks::HookStage;
use crate::network::leaving::Leaving;
use crate::network::{NetworkError, traces};
use crate::observe::Event;
use crate::plan::TcpChoice;
use crate::report::NetworkReport;
use pageferry_tracker as tracker;
use pageferry_wire_format::{AbortCode, ControlMessage, MovingAddress};
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// How long a program gets to accept connections that its clients have made already: those that are left are lost with a
/// move, and a client that has nothing more to say would not notice.
const ACCEPTING: Duration = Duration::from_millis(20);
/// Between two looks at them.
const LOOK: Duration = Duration::from_micros(500);

/// Addresses that leave with the program.
#[derive(Debug)]
pub(super) struct Departure {
    leaving: Leaving<Machine>,
    addresses: Vec<IpAddr>,
    /// As a person reads them.
    names: Vec<String>,
    /// When the destination was told to announce them.
    announced: Option<Instant>,
    /// How it ends is settled.
    over: bool,
}

impl Migration<'_> {
    /// Looks at what is to move before anybody is told: the addresses, and the program's connections.
    pub(super) fn look_at_network(&mut self) -> Result<Vec<Place>, SendError> {
        let mut places = Vec::new();
        for moved in &self.plan.move_addresses {
            places.push(of_source(moved.address, moved.prefix, &moved.device)?);
        }
        let found = self.connections()?;
        if self.plan.tcp() == TcpChoice::Keep && places.is_empty() {
            // Hooks move the addresses that the connections have; here their packets are only held back.
            for connection in inner(&found).1 {
                let address = connection.local.ip();
                if places.iter().all(|place: &Place| place.address != address) {
                    let prefix = if address.is_ipv4() { 32 } else { 128 };
                    places.push(Place { address, prefix, device: None, owner: None });
                }
            }
        }
        let addresses: Vec<IpAddr> = places.iter().map(|place| place.address).collect();
        self.judge(&found, &addresses)?;
        Ok(places)
    }

    /// The same just before the freeze: a program goes on making connections.
    pub(super) fn look_at_connections(&mut self) -> Result<(), SendError> {
        let found = self.connections()?;
        let addresses = self.network.as_ref().map(|network| network.addresses.clone()).unwrap_or_default();
        self.judge(&found, &addresses)?;
        if let Some(report) = &mut self.report.network
            && self.plan.tcp() == TcpChoice::Keep
        {
            report.connections = found.len() as u64;
        }
        Ok(())
    }

    fn connections(&self) -> Result<Vec<Connection>, SendError> {
        if self.plan.tcp() == TcpChoice::Close {
            return Ok(Vec::new());
        }
        connections(&self.pids()?).map_err(SendError::Connections)
    }

    fn pids(&self) -> Result<Vec<i32>, SendError> {
        Ok(tracker::tree::discover(&self.root)?.iter().map(tracker::Target::pid).collect())
    }

    fn judge(&self, found: &[Connection], addresses: &[IpAddr]) -> Result<(), SendError> {
        match self.plan.tcp() {
            TcpChoice::Close => Ok(()),
            TcpChoice::Refuse => match found.first() {
                Some(&example) => Err(SendError::Connected { count: found.len(), example }),
                None => Ok(()),
            },
            TcpChoice::Keep => {
                let outer = inner(found).1;
                let staying = |one: &&Connection| !addresses.contains(&one.local.ip());
                let staying: Vec<Connection> = outer.iter().filter(staying).copied().collect();
                match staying.first() {
                    Some(&example) => Err(SendError::NotMoving { count: staying.len(), example }),
                    None => Ok(()),
                }
            }
        }
    }

    /// Has the receiver make ready for the addresses.
    pub(super) fn prepare_network(&mut self, places: Vec<Place>) -> Result<(), SendError> {
        let keep_tcp = self.plan.tcp() == TcpChoice::Keep;
        if places.is_empty() && !keep_tcp && !self.plan.hooks.any() {
            return Ok(());
        }
        // The link of this migration must not be cut with the program's.
        if let Ok(local) = self.channel().link().local()
            && let Some(place) = places.iter().find(|place| place.address == local.ip().to_canonical())
        {
            return Err(SendError::LinkMoves(place.address));
        }
        let devices_there = self.plan.move_addresses.iter().map(|moved| moved.device_there.clone());
        let mut devices_there = devices_there.map(Some).chain(std::iter::repeat(None));
        let moving = places.iter().map(|place| MovingAddress {
            address: place.address,
            prefix: place.prefix,
            device: devices_there.next().flatten(),
            owner: place.device.as_ref().map_or([0; 6], |(_, device)| device.mac),
        });
        let message = ControlMessage::Network { addresses: moving.collect(), keep_tcp };
        let addresses: Vec<IpAddr> = places.iter().map(|place| place.address).collect();
        let moved = self.plan.move_addresses.iter().map(ToString::to_string);
        let names: Vec<String> = match self.plan.move_addresses.is_empty() {
            true => addresses.iter().map(ToString::to_string).collect(),
            false => moved.collect(),
        };
        let machine = Machine::source(traces::name(self.session), places);
        let over = false;
        self.report.network = Some(NetworkReport { addresses: names.clone(), ..NetworkReport::default() });
        let departure = Departure { leaving: Leaving::new(machine), addresses, names, announced: None, over };
        self.network = Some(departure);
        self.hook(HookStage::Prepare)?;
        self.control(&message)?;
        match self.answer("the destination to make ready for the addresses") {
            Ok(ControlMessage::NetworkReady) => Ok(()),
            Ok(other) => Err(SendError::Protocol(format!("{other:?} instead of a ready network"))),
            Err(SendError::Channel(ChannelError::Aborted { code: AbortCode::BadFrame, .. })) => {
                Err(SendError::TooOld)
            }
            Err(error) => Err(error),
        }
    }

    /// Has clients sent to the destination, while the program still runs: what is on its way here gets in, and connections that
    /// were made and not accepted yet are, as far as the program is quick enough. New ones are made at the destination.
    pub(super) fn announce_network(&mut self) -> Result<(), SendError> {
        if self.network.is_none() {
            return Ok(());
        }
        self.hook(HookStage::BeforeFreeze)?;
        if let Some(network) = &mut self.network {
            network.leaving.announced();
            network.announced = Some(Instant::now());
        }
        crate::fault::point("announce");
        self.control(&ControlMessage::Announce)?;
        match self.answer("the destination to announce the addresses")? {
            ControlMessage::Announced { us } => self.network_report().announce_us = us,
            other => return Err(SendError::Protocol(format!("{other:?} instead of an announcement"))),
        }
        if self.plan.tcp() == TcpChoice::Keep {
            let until = Instant::now() + ACCEPTING;
            let pids = self.pids()?;
            while waiting(&pids).map_err(SendError::Connections)? > 0 && Instant::now() < until {
                std::thread::sleep(LOOK);
            }
        }
        Ok(())
    }

    /// Before CRIU reads the sockets: nothing gets in or out any more that the copy would not know of.
    pub(super) fn block_network(&mut self) -> Result<(), SendError> {
        let Some(network) = &mut self.network else { return Ok(()) };
        let started = Instant::now();
        network.leaving.block()?;
        self.network_report().block_us = started.elapsed().as_micros() as u64;
        Ok(())
    }

    /// The commit is on its way: the addresses are the destination's, or will be nobody's until that is known.
    pub(super) fn remove_addresses(&mut self) {
        if let Some(network) = &mut self.network
            && let Err(error) = network.leaving.remove()
        {
            self.warn("an address could not be taken away here", &error);
        }
    }

    /// What had arrived meanwhile has been delivered.
    pub(super) fn hear_delivered(&mut self) -> Result<(), SendError> {
        let Some(announced) = self.network.as_ref().map(|network| network.announced) else { return Ok(()) };
        match self.answer("the destination to deliver what waited")? {
            ControlMessage::Delivered { packets, bytes, lost, release_us, deliver_us } => {
                let report = self.network_report();
                report.held_packets = packets;
                report.held_bytes = bytes;
                report.lost_packets = lost;
                report.release_us = release_us;
                report.deliver_us = deliver_us;
                report.away_us = announced.map_or(0, |since| since.elapsed().as_micros() as u64);
                Ok(())
            }
            other => Err(SendError::Protocol(format!("{other:?} instead of a delivery"))),
        }
    }

    /// The addresses do not come back; `resumed`: because the program runs there. Says which have been taken away.
    pub(super) fn let_network_go(&mut self, resumed: bool) -> Vec<String> {
        let Some(network) = self.network.as_mut().filter(|network| !network.over) else { return Vec::new() };
        network.over = true;
        let names = network.names.clone();
        if let Err(error) = network.leaving.let_go() {
            self.warn("an address could not be let go cleanly", &error);
        }
        if resumed && let Err(error) = self.hook(HookStage::AfterResume) {
            self.warn("after the program has moved", &error);
        }
        names
    }

    /// The program stays, and its addresses with it.
    pub(super) fn take_network_back(&mut self) {
        let Some(network) = self.network.as_mut().filter(|network| !network.over) else { return };
        network.over = true;
        if let Err(error) = network.leaving.take_back() {
            self.warn("an address could not be taken back cleanly", &error);
        }
        if let Err(error) = self.hook(HookStage::Rollback) {
            self.warn("undoing", &error);
        }
    }

    fn warn(&self, what: &str, error: &dyn std::error::Error) {
        let cause = error.source().map_or_else(String::new, |cause| format!(": {cause}"));
        self.observer.event(&Event::Warning { text: format!("{what}: {error}{cause}") });
    }

    fn network_report(&mut self) -> &mut NetworkReport {
        self.report.network.get_or_insert_default()
    }

    fn hook(&self, stage: HookStage) -> Result<(), SendError> {
        let addresses = self.network.as_ref().map(|network| network.addresses.as_slice()).unwrap_or_default();
        let peer = match &self.peer {
            Peer::Receiver(to) => to.to_string(),
            Peer::Archive(_) => String::new(),
        };
        let environment = crate::network::hooks::environment(
            "source",
            self.session,
            &self.report.program,
            Some(self.plan.pid),
            addresses,
            &peer,
        );
        let hooks = &self.plan.hooks;
        hooks.run(stage, &environment, self.plan.stall_timeout).map_err(NetworkError::from)?;
        Ok(())
    }
}

/// Connections between processes of the program, and the others. The former move as they are.
fn inner(found: &[Connection]) -> (Vec<Connection>, Vec<Connection>) {
    found.iter().partition(|one| {
        let back = |other: &Connection| other.local == one.peer && other.peer == one.local;
        found.iter().any(back)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_inside_of_the_program_are_told_apart() {
        let one = |local: &str, peer: &str| Connection {
            pid: 1,
            local: local.parse().unwrap(),
            peer: peer.parse().unwrap(),
        };
        let found = [
            one("127.0.0.1:5000", "127.0.0.1:6000"),
            one("127.0.0.1:6000", "127.0.0.1:5000"),
            one("127.0.0.1:6001", "127.0.0.1:5000"),
            one("10.0.0.9:80", "10.0.0.3:4000"),
        ];
        let (inside, outside) = inner(&found);
        assert_eq!(inside, found[..2]);
        assert_eq!(outside, found[2..]);
    }
}
