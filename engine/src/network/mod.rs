//! The network side of a handover: a service's address moves with the program, and the program's connections with it.
//!
//! The destination has the address beforehand, silently, and holds back what arrives for it. When the program stops, the
//! destination announces the address, so that clients send there; what they send is kept, and delivered when the program
//! runs. The source holds back everything in and out of the address meanwhile, and takes it away at the commit. What each
//! order of these steps costs, and which ones lose data, stands in docs/NETWORK.md.
//!
//! - [`moved`]: an address as a person writes it
//! - [`established`]: the connections that a program has
//! - [`arriving`], [`leaving`]: the steps of either side, and how they are undone (machines, without system calls)
//! - [`ground`]: the steps as they are taken on this machine
//! - [`filter`], [`addresses`], [`capture`], [`frames`]: rules, addresses, packets that wait, announcements
//! - [`traces`]: what an engine that died has left
//! - [`hooks`]: commands of a person's own at each stage

pub(crate) mod addresses;
pub(crate) mod arriving;
mod capture;
mod checksum;
mod diag;
pub(crate) mod established;
mod filter;
mod frames;
pub(crate) mod ground;
pub(crate) mod hooks;
pub(crate) mod leaving;
mod moved;
mod netlink;
mod sys;
#[cfg(test)]
mod tests;
pub(crate) mod traces;

pub use hooks::Hooks;
pub use moved::{MovedAddress, MovedAddressError};

pub(crate) use moved::{is_device_name, stays};

use std::io;
use std::net::IpAddr;

/// A step of the network's handover that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    #[error("this machine has no network device {0}")]
    NoDevice(String),
    #[error("{device} does not have the address {address}{}", elsewhere(.there))]
    NotThere { address: IpAddr, device: String, there: Option<String> },
    #[error("{device} has {address} with the length {is}, not {said}")]
    OtherPrefix { address: IpAddr, device: String, is: u8, said: u8 },
    #[error("this machine has the address {address} already, on {device}")]
    Taken { address: IpAddr, device: String },
    #[error("the device {0} has no Ethernet address: nobody could be told that the address is there")]
    NoEthernet(String),
    #[error("could not list the addresses of this machine")]
    List(#[source] io::Error),
    #[error("could not hold back packets of the address: is nf_tables in this kernel?")]
    Hold(#[source] io::Error),
    #[error("could not keep packets that arrive for {address}")]
    Capture {
        address: IpAddr,
        #[source]
        source: io::Error,
    },
    #[error("could not put {address} on {device}")]
    Put {
        address: IpAddr,
        device: String,
        #[source]
        source: io::Error,
    },
    #[error("could not take {address} away from {device}")]
    Remove {
        address: IpAddr,
        device: String,
        #[source]
        source: io::Error,
    },
    #[error("could not announce {address} on {device}")]
    Announce {
        address: IpAddr,
        device: String,
        #[source]
        source: io::Error,
    },
    #[error("could not let packets of the address in again")]
    Release(#[source] io::Error),
    #[error("could not deliver the packets that had waited")]
    Deliver(#[source] io::Error),
    #[error(
        "could not write down what is done to the network, for an engine that has to clean up after this one"
    )]
    Trace(#[source] io::Error),
    #[error(transparent)]
    Hook(#[from] hooks::HookError),
}

fn elsewhere(there: &Option<String>) -> String {
    there.as_ref().map_or_else(String::new, |device| format!("; {device} has it"))
}
