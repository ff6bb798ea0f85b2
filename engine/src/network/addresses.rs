//! Addresses of this machine's devices: which there are, and putting one there or taking it away (rtnetlink(7)).

use super::frames::Mac;
use super::netlink::{ACK, CREATE, EXCLUSIVE, Message, Netlink, REPLACE};
use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage};
use std::io;
use std::net::IpAddr;

const NEW_ADDRESS: u16 = 20;
const DELETE_ADDRESS: u16 = 21;
/// `IFA_ADDRESS`.
const ADDRESS: u16 = 1;
/// `IFA_LOCAL`.
const LOCAL: u16 = 2;
/// `IFA_BROADCAST`.
const BROADCAST: u16 = 4;
/// `IFA_CACHEINFO`.
const LIFETIMES: u16 = 6;
/// `IFA_F_NODAD`: nobody is asked whether the address is taken. It is, until the program has moved.
const WITHOUT_ASKING: u8 = 0x02;
const FOR_EVER: u32 = u32::MAX;

/// An address of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) device: String,
    pub(crate) address: IpAddr,
    pub(crate) prefix: u8,
}

/// A device of this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) index: u32,
    /// Zeros where it has none.
    pub(crate) mac: Mac,
}

/// Every address of this machine.
pub(crate) fn list() -> io::Result<Vec<Placed>> {
    let mut found = Vec::new();
    for entry in nix::ifaddrs::getifaddrs()? {
        let (Some(address), Some(mask)) = (entry.address.and_then(ip), entry.netmask.and_then(ip)) else {
            continue;
        };
        let prefix = match mask {
            IpAddr::V4(mask) => u32::from(mask).count_ones(),
            IpAddr::V6(mask) => u128::from(mask).count_ones(),
        };
        // An address of the old kind is listed under its label, such as eth0:1.
        let device = entry.interface_name.split(':').next().unwrap_or("").to_owned();
        found.push(Placed { device, address, prefix: prefix as u8 });
    }
    Ok(found)
}

fn ip(address: SockaddrStorage) -> Option<IpAddr> {
    match address.family()? {
        AddressFamily::Inet => address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip())),
        AddressFamily::Inet6 => address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())),
        _ => None,
    }
}

/// A device by its name; `None` if this machine has none of that name.
pub(crate) fn device(name: &str) -> io::Result<Option<Device>> {
    let Ok(index) = nix::net::if_::if_nametoindex(name) else { return Ok(None) };
    let mut mac = [0; 6];
    for entry in nix::ifaddrs::getifaddrs()? {
        if entry.interface_name == name
            && let Some(found) = entry.address.as_ref().and_then(SockaddrStorage::as_link_addr)
        {
            mac = found.addr().unwrap_or_default();
        }
    }
    Ok(Some(Device { index, mac }))
}

/// How an address is put on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// Nothing of this machine begins to speak from it by itself (IPv6; for IPv4 the kernel prefers the one that was first).
    Deprecated,
    /// As any other.
    Ordinary,
}

/// Puts an address on a device; one that is there gets this use.
pub(super) fn put(
    netlink: &mut Netlink,
    index: u32,
    address: IpAddr,
    prefix: u8,
    usage: Use,
    replace: bool,
) -> io::Result<()> {
    let flags = ACK | CREATE | if replace { REPLACE } else { EXCLUSIVE };
    netlink.ask(vec![added(flags, index, address, prefix, usage)])
}

fn added(flags: u16, index: u32, address: IpAddr, prefix: u8, usage: Use) -> Message {
    let message = about(NEW_ADDRESS, flags, index, address, prefix);
    match address {
        IpAddr::V4(address) if prefix < 31 => {
            let broadcast = u32::from(address) | (u32::MAX >> prefix);
            message.with(BROADCAST, &broadcast.to_be_bytes())
        }
        IpAddr::V4(_) => message,
        IpAddr::V6(_) => {
            let preferred = if usage == Use::Deprecated { 0 } else { FOR_EVER };
            // Preferred, valid, and two times that the kernel does not read.
            let lifetimes: Vec<u8> =
                [preferred, FOR_EVER, 0, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
            message.with(LIFETIMES, &lifetimes)
        }
    }
}

/// Takes an address away from a device, and with it what the kernel knows by it: routes that prefer it.
pub(super) fn delete(netlink: &mut Netlink, index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
    netlink.ask(vec![about(DELETE_ADDRESS, ACK, index, address, prefix)])
}

/// `ifaddrmsg`, and the address.
fn about(kind: u16, flags: u16, index: u32, address: IpAddr, prefix: u8) -> Message {
    let (family, bytes) = match address {
        IpAddr::V4(address) => (libc::AF_INET, address.octets().to_vec()),
        IpAddr::V6(address) => (libc::AF_INET6, address.octets().to_vec()),
    };
    let flag = if address.is_ipv6() && kind == NEW_ADDRESS { WITHOUT_ASKING } else { 0 };
    let mut head = vec![family as u8, prefix, flag, 0];
    head.extend(index.to_ne_bytes());
    let message = Message::new(kind, flags, &head).with(LOCAL, &bytes);
    message.with(ADDRESS, &bytes)
}
