//! An address that moves with a program, as a person writes it.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// Longest name of a device (IFNAMSIZ without its zero).
const MOST_NAME: usize = 15;

/// An address that moves with a program: `ADDR/LEN@DEV`, or `ADDR/LEN@DEV:DEVB` where the device has another name at the
/// destination. (A device's name has no colon in it.)
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MovedAddress {
    /// The address.
    pub address: IpAddr,
    /// Bits of its network.
    pub prefix: u8,
    /// Device that has it at the source.
    pub device: String,
    /// Device that gets it at the destination.
    pub device_there: String,
}

/// Text that is no address that could move.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MovedAddressError {
    /// A part is missing.
    #[error(
        "{0:?} is not written like 10.0.0.9/24@eth0 (or @eth0:ens3, where the destination's device is ens3)"
    )]
    Form(String),
    /// The first part is no address.
    #[error("{0:?} is no IPv4 or IPv6 address")]
    Address(String),
    /// An address that belongs to a machine or to many, and not to a service.
    #[error("{address} cannot move: it is {why}")]
    Kind {
        /// Which.
        address: IpAddr,
        /// What it is.
        why: &'static str,
    },
    /// A length that the address does not have.
    #[error("{text:?} is not the length of a network of {address}: 1 to {most}")]
    Prefix {
        /// Of which address.
        address: IpAddr,
        /// What was written.
        text: String,
        /// The longest.
        most: u8,
    },
    /// No device can be called this.
    #[error("{0:?} is no name of a network device")]
    Device(String),
}

impl FromStr for MovedAddress {
    type Err = MovedAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form = || MovedAddressError::Form(text.to_owned());
        let (network, devices) = text.split_once('@').ok_or_else(form)?;
        let (address, prefix) = network.split_once('/').ok_or_else(form)?;
        let address: IpAddr = address.parse().map_err(|_| MovedAddressError::Address(address.to_owned()))?;
        if let Some(why) = stays(address) {
            return Err(MovedAddressError::Kind { address, why });
        }
        let most = longest(address);
        let wrong = || MovedAddressError::Prefix { address, text: prefix.to_owned(), most };
        let prefix = prefix.parse().ok().filter(|prefix| (1..=most).contains(prefix)).ok_or_else(wrong)?;
        let (device, there) = devices.split_once(':').unwrap_or((devices, devices));
        for name in [device, there] {
            if !is_device_name(name) {
                return Err(MovedAddressError::Device(name.to_owned()));
            }
        }
        Ok(Self { address, prefix, device: device.to_owned(), device_there: there.to_owned() })
    }
}

impl fmt::Display for MovedAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}@{}", self.address, self.prefix, self.device)?;
        if self.device_there != self.device {
            write!(f, ":{}", self.device_there)?;
        }
        Ok(())
    }
}

/// Bits of an address of this family.
pub(super) fn longest(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// Why an address cannot be a service's.
pub(crate) fn stays(address: IpAddr) -> Option<&'static str> {
    if address.is_unspecified() {
        return Some("no address of anybody");
    }
    if address.is_loopback() {
        return Some("every machine's own");
    }
    if address.is_multicast() {
        return Some("an address of many");
    }
    match address {
        IpAddr::V4(address) if address.is_broadcast() => Some("an address of many"),
        IpAddr::V4(address) if address.is_link_local() => Some("of one link, and made up by each machine"),
        IpAddr::V6(address) if address.is_unicast_link_local() => {
            Some("of one link, and every machine's own")
        }
        IpAddr::V6(address) if address.to_ipv4_mapped().is_some() => Some("an IPv4 address in disguise"),
        _ => None,
    }
}

/// What the kernel lets a device be called (dev_valid_name).
pub(crate) fn is_device_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= MOST_NAME
        && name != "."
        && name != ".."
        && !name.chars().any(|c| c == '/' || c == ':' || c.is_whitespace() || c.is_control())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written_back() {
        for text in ["10.0.0.9/24@eth0", "10.0.0.9/32@eth0:ens3", "2001:db8::9/64@bond0.7"] {
            assert_eq!(text.parse::<MovedAddress>().unwrap().to_string(), text);
        }
        let both: MovedAddress = "10.0.0.9/24@eth0:eth0".parse().unwrap();
        assert_eq!((both.device.as_str(), both.device_there.as_str()), ("eth0", "eth0"));
        assert_eq!(both.to_string(), "10.0.0.9/24@eth0");
    }

    #[test]
    fn what_cannot_move_is_refused_with_the_reason() {
        let wrong = |text: &str| text.parse::<MovedAddress>().unwrap_err().to_string();
        for text in ["", "10.0.0.9", "10.0.0.9/24", "10.0.0.9@eth0"] {
            assert!(wrong(text).contains("10.0.0.9/24@eth0"), "{text}");
        }
        assert!(wrong("10.0.0/24@eth0").contains("no IPv4"));
        assert!(wrong("10.0.0.9/0@eth0").contains("1 to 32"));
        assert!(wrong("10.0.0.9/33@eth0").contains("1 to 32"));
        assert!(wrong("2001:db8::9/129@eth0").contains("1 to 128"));
        assert!(wrong("127.0.0.1/8@lo").contains("every machine's own"));
        assert!(wrong("fe80::1/64@eth0").contains("one link"));
        assert!(wrong("ff02::1/64@eth0").contains("many"));
        assert!(wrong("::ffff:10.0.0.9/96@eth0").contains("disguise"));
        for text in ["10.0.0.9/24@", "10.0.0.9/24@eth0:", "10.0.0.9/24@a/b", "10.0.0.9/24@sixteen-letters-"] {
            assert!(wrong(text).contains("no name of a network device"), "{text}");
        }
    }
}
