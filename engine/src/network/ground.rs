//! The steps of a handover as they are taken on this machine.

use super::addresses::{self, Device, Use};
use super::capture::{Capture, Delivered, Waiting};
use super::filter::{Filter, Hold};
use super::frames::{self, Mac};
use super::netlink::Netlink;
use super::sys::packet;
use super::{MovedAddress, NetworkError};
use rustix::net::{SendFlags, SocketType};
use std::fmt;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

/// One step, for all addresses that move together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Packets of the addresses are held back, and at the destination kept.
    Hold,
    /// The addresses are put on their devices, so that nobody begins to speak from them.
    Place,
    /// This machine may say that it has the addresses; what waited until here is forgotten.
    Speak,
    /// Everybody is told that the addresses are here.
    Announce,
    /// Everybody is told that the addresses are where they were before.
    GiveBack,
    /// Packets are let in, and those that waited are taken.
    Open,
    /// Those are delivered.
    Deliver,
    /// The addresses are as good as any other's.
    Settle,
    /// The addresses are taken away.
    Remove,
    /// What [`Step::Remove`] took is put back.
    PutBack,
    /// Nothing is held back any more.
    Lift,
}

/// Where the steps are taken.
pub(crate) trait Ground: fmt::Debug + Send {
    /// Takes one.
    fn take(&mut self, step: Step) -> Result<(), NetworkError>;

    /// What came of the packets that waited.
    fn delivered(&self) -> Delivered {
        Delivered::default()
    }
}

/// An address that moves, on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) address: IpAddr,
    pub(crate) prefix: u8,
    /// `None`: somebody else moves it (a hook), and here its packets are held back only.
    pub(crate) device: Option<(String, Device)>,
    /// Who had it before, if that is another machine.
    pub(crate) owner: Option<Mac>,
}

/// This machine.
#[derive(Debug)]
pub(crate) struct Machine {
    name: String,
    hold: Hold,
    places: Vec<Place>,
    filter: Option<Filter>,
    captures: Vec<Capture>,
    /// Packet sockets that announcements leave by, one for each place.
    speakers: Vec<Option<OwnedFd>>,
    waiting: Vec<Waiting>,
    delivered: Delivered,
}

impl Machine {
    /// The destination, in tables of this name.
    pub(crate) fn destination(name: String, places: Vec<Place>) -> Self {
        Self::new(name, Hold::Arriving, places)
    }

    /// The source.
    pub(crate) fn source(name: String, places: Vec<Place>) -> Self {
        Self::new(name, Hold::Leaving, places)
    }

    fn new(name: String, hold: Hold, places: Vec<Place>) -> Self {
        Self {
            name,
            hold,
            places,
            filter: None,
            captures: Vec::new(),
            speakers: Vec::new(),
            waiting: Vec::new(),
            delivered: Delivered::default(),
        }
    }

    fn hold(&mut self) -> Result<(), NetworkError> {
        if self.hold == Hold::Arriving {
            for place in &self.places {
                let device = place.device.as_ref().map_or(0, |(_, device)| device.index);
                let failed = |source| NetworkError::Capture { address: place.address, source };
                self.captures.push(Capture::begin(place.address, device).map_err(failed)?);
            }
        }
        self.open_speakers()?;
        let addresses: Vec<IpAddr> = self.places.iter().map(|place| place.address).collect();
        self.filter = Some(Filter::up(&self.name, self.hold, &addresses).map_err(NetworkError::Hold)?);
        Ok(())
    }

    fn open_speakers(&mut self) -> Result<(), NetworkError> {
        if !self.speakers.is_empty() {
            return Ok(());
        }
        for place in &self.places {
            let speaker = match &place.device {
                None => None,
                Some((name, device)) => {
                    let failed = |source| NetworkError::Announce {
                        address: place.address,
                        device: name.clone(),
                        source,
                    };
                    let socket = packet::open(SocketType::RAW).map_err(failed)?;
                    packet::bind(&socket, 0, device.index).map_err(failed)?;
                    Some(socket)
                }
            };
            self.speakers.push(speaker);
        }
        Ok(())
    }

    fn place(&mut self, usage: Use, replace: bool) -> Result<(), NetworkError> {
        let mut netlink = Netlink::addresses().map_err(NetworkError::List)?;
        for place in &self.places {
            let Some((name, device)) = &place.device else { continue };
            let failed = |source| NetworkError::Put { address: place.address, device: name.clone(), source };
            addresses::put(&mut netlink, device.index, place.address, place.prefix, usage, replace)
                .map_err(failed)?;
        }
        Ok(())
    }

    fn announce(&mut self, for_owner: bool) -> Result<(), NetworkError> {
        self.open_speakers()?;
        for (place, speaker) in self.places.iter().zip(&self.speakers) {
            let (Some((name, device)), Some(speaker)) = (&place.device, speaker) else { continue };
            let owner = match (for_owner, place.owner) {
                (false, _) => device.mac,
                (true, Some(owner)) => owner,
                (true, None) => continue,
            };
            for frame in frames::announcement(place.address, owner, device.mac) {
                rustix::net::send(speaker, &frame, SendFlags::empty()).map_err(|errno| {
                    let (address, device) = (place.address, name.clone());
                    NetworkError::Announce { address, device, source: errno.into() }
                })?;
            }
        }
        Ok(())
    }

    fn open(&mut self) -> Result<(), NetworkError> {
        if let Some(filter) = &mut self.filter {
            filter.open().map_err(NetworkError::Release)?;
        }
        // After the rules: what comes in between is delivered twice, which TCP does not mind, and never lost.
        for capture in &self.captures {
            self.waiting.push(capture.end().map_err(NetworkError::Deliver)?);
        }
        Ok(())
    }

    fn deliver(&mut self) -> Result<(), NetworkError> {
        for waiting in self.waiting.drain(..) {
            let one = waiting.deliver().map_err(NetworkError::Deliver)?;
            self.delivered.packets += one.packets;
            self.delivered.bytes += one.bytes;
            self.delivered.lost += one.lost;
        }
        Ok(())
    }

    fn remove(&mut self) -> Result<(), NetworkError> {
        let before = addresses::list().map_err(NetworkError::List)?;
        let mut netlink = Netlink::addresses().map_err(NetworkError::List)?;
        let mut gone = Vec::new();
        for place in &self.places {
            let Some((name, device)) = &place.device else { continue };
            gone.push(place.address);
            let failed =
                |source| NetworkError::Remove { address: place.address, device: name.clone(), source };
            match addresses::delete(&mut netlink, device.index, place.address, place.prefix) {
                // Somebody else was quicker, which is as well.
                Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {}
                result => result.map_err(failed)?,
            }
        }
        // With the first address of a network the kernel may take those away that came after it (promote_secondaries).
        let after = addresses::list().map_err(NetworkError::List)?;
        for lost in before.iter().filter(|one| !after.contains(one) && !gone.contains(&one.address)) {
            if let Some(device) = addresses::device(&lost.device).map_err(NetworkError::List)? {
                addresses::put(&mut netlink, device.index, lost.address, lost.prefix, Use::Ordinary, true)
                    .map_err(|source| NetworkError::Put {
                        address: lost.address,
                        device: lost.device.clone(),
                        source,
                    })?;
            }
        }
        Ok(())
    }

    fn lift(&mut self) -> Result<(), NetworkError> {
        let lifted = match self.filter.take() {
            Some(mut filter) => filter.down().map_err(NetworkError::Release),
            None => Ok(()),
        };
        self.captures.clear();
        self.waiting.clear();
        lifted
    }
}

impl Ground for Machine {
    fn take(&mut self, step: Step) -> Result<(), NetworkError> {
        match step {
            Step::Hold => self.hold(),
            Step::Place => self.place(Use::Deprecated, false),
            Step::Speak => {
                if let Some(filter) = &mut self.filter {
                    filter.speak().map_err(NetworkError::Hold)?;
                }
                self.captures.iter().try_for_each(|capture| {
                    let failed = |source| NetworkError::Capture { address: capture.address(), source };
                    capture.forget().map_err(failed)
                })
            }
            Step::Announce => self.announce(false),
            Step::GiveBack => self.announce(true),
            Step::Open => self.open(),
            Step::Deliver => self.deliver(),
            Step::Settle | Step::PutBack => self.place(Use::Ordinary, true),
            Step::Remove => self.remove(),
            Step::Lift => self.lift(),
        }
    }

    fn delivered(&self) -> Delivered {
        self.delivered
    }
}

/// Finds the device that has an address which is to leave.
///
/// # Errors
/// That there is no such device, or that it does not have the address like this.
pub(crate) fn of_source(address: IpAddr, prefix: u8, device: &str) -> Result<Place, NetworkError> {
    let found = addresses::device(device).map_err(NetworkError::List)?;
    let found = found.ok_or_else(|| NetworkError::NoDevice(device.to_owned()))?;
    let list = addresses::list().map_err(NetworkError::List)?;
    let Some(placed) = list.iter().find(|placed| placed.address == address && placed.device == device) else {
        let there = list.iter().find(|placed| placed.address == address).map(|placed| placed.device.clone());
        return Err(NetworkError::NotThere { address, device: device.to_owned(), there });
    };
    if placed.prefix != prefix {
        let (is, said) = (placed.prefix, prefix);
        return Err(NetworkError::OtherPrefix { address, device: device.to_owned(), is, said });
    }
    if found.mac == [0; 6] {
        return Err(NetworkError::NoEthernet(device.to_owned()));
    }
    Ok(Place { address, prefix, device: Some((device.to_owned(), found)), owner: None })
}

/// Puts addresses back on their devices, which had them before, and tells everybody that they are here.
///
/// # Errors
/// That there is no such device, or what the kernel says.
pub(crate) fn put_back(session: u128, moved: &[MovedAddress]) -> Result<(), NetworkError> {
    let place = |moved: &MovedAddress| -> Result<Place, NetworkError> {
        let device = addresses::device(&moved.device).map_err(NetworkError::List)?;
        let device = device.ok_or_else(|| NetworkError::NoDevice(moved.device.clone()))?;
        let device = Some((moved.device.clone(), device));
        Ok(Place { address: moved.address, prefix: moved.prefix, device, owner: None })
    };
    let places = moved.iter().map(place).collect::<Result<_, _>>()?;
    let mut machine = Machine::source(super::traces::name(session), places);
    machine.take(Step::PutBack)?;
    machine.take(Step::Announce)
}

/// Takes addresses away that are the destination's: an engine that was killed as it sent the commit may have left them here. Says
/// which were.
///
/// # Errors
/// What the kernel says.
pub(crate) fn take_away(moved: &[MovedAddress]) -> Result<Vec<String>, NetworkError> {
    let mut netlink = Netlink::addresses().map_err(NetworkError::List)?;
    let mut gone = Vec::new();
    for MovedAddress { address, prefix, device, .. } in moved {
        let Some(found) = addresses::device(device).map_err(NetworkError::List)? else { continue };
        match addresses::delete(&mut netlink, found.index, *address, *prefix) {
            Ok(()) => gone.push(format!("{address}/{prefix} of {device}")),
            Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {}
            Err(source) => {
                return Err(NetworkError::Remove { address: *address, device: device.clone(), source });
            }
        }
    }
    Ok(gone)
}

/// Finds the device that is to get an address.
///
/// # Errors
/// That there is no such device, or that this machine has the address already.
pub(crate) fn of_destination(
    address: IpAddr,
    prefix: u8,
    device: &str,
    owner: Mac,
) -> Result<Place, NetworkError> {
    let found = addresses::device(device).map_err(NetworkError::List)?;
    let found = found.ok_or_else(|| NetworkError::NoDevice(device.to_owned()))?;
    let list = addresses::list().map_err(NetworkError::List)?;
    if let Some(placed) = list.into_iter().find(|placed| placed.address == address) {
        return Err(NetworkError::Taken { address, device: placed.device });
    }
    if found.mac == [0; 6] {
        return Err(NetworkError::NoEthernet(device.to_owned()));
    }
    Ok(Place { address, prefix, device: Some((device.to_owned(), found)), owner: Some(owner) })
}

/// A ground that only writes down the steps, for tests of their order.
#[cfg(test)]
pub(super) mod scripted {
    use super::{Ground, NetworkError, Step};
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Debug, Default)]
    pub(crate) struct Scripted {
        taken: Arc<Mutex<Vec<Step>>>,
        failing: Vec<Step>,
    }

    impl Scripted {
        pub(crate) fn failing(steps: &[Step]) -> Self {
            Self { failing: steps.to_vec(), ..Self::default() }
        }

        pub(crate) fn taken(&self) -> Vec<Step> {
            self.taken.lock().unwrap().clone()
        }
    }

    impl Ground for Scripted {
        fn take(&mut self, step: Step) -> Result<(), NetworkError> {
            self.taken.lock().unwrap().push(step);
            match self.failing.contains(&step) {
                true => Err(NetworkError::NoDevice("scripted".to_owned())),
                false => Ok(()),
            }
        }
    }
}
