//! Frames that tell a network where an address is now: gratuitous ARP (RFC 826, RFC 5227 §3) and unsolicited neighbour
//! advertisements (RFC 4861 §7.2.6).

use super::checksum;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An Ethernet address.
pub(crate) type Mac = [u8; 6];

const ETHER_ARP: u16 = 0x0806;
const ETHER_IPV6: u16 = 0x86dd;
/// Without its check sequence, which the device adds.
const SHORTEST: usize = 60;
const BROADCAST: Mac = [0xff; 6];
const REQUEST: u16 = 1;
const REPLY: u16 = 2;
/// Type of a neighbour advertisement.
const ADVERTISEMENT: u8 = 136;
/// It replaces what neighbours know.
const OVERRIDE: u8 = 0x20;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// The frames which say that `address` is at `owner`. `from` is the device that they leave from, which is another one when the
/// destination speaks for the source: switches learn by it, and must not learn `owner` there.
pub(super) fn announcement(address: IpAddr, owner: Mac, from: Mac) -> Vec<Vec<u8>> {
    match address {
        // Some systems listen to one form only, some to the other.
        IpAddr::V4(address) => {
            [REQUEST, REPLY].into_iter().map(|form| gratuitous_arp(address, owner, from, form)).collect()
        }
        IpAddr::V6(address) => vec![advertisement(address, owner, from)],
    }
}

fn ethernet(to: Mac, from: Mac, kind: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(96);
    frame.extend(to);
    frame.extend(from);
    frame.extend(kind.to_be_bytes());
    frame
}

fn gratuitous_arp(address: Ipv4Addr, owner: Mac, from: Mac, form: u16) -> Vec<u8> {
    let mut frame = ethernet(BROADCAST, from, ETHER_ARP);
    // Ethernet, IPv4, and the lengths of their addresses.
    frame.extend([0, 1, 0x08, 0, 6, 4]);
    frame.extend(form.to_be_bytes());
    frame.extend(owner);
    frame.extend(address.octets());
    // In an answer the target is the owner too: Linux takes it for gratuitous only then.
    frame.extend(if form == REPLY { owner } else { [0; 6] });
    frame.extend(address.octets());
    frame.resize(SHORTEST, 0);
    frame
}

fn advertisement(address: Ipv6Addr, owner: Mac, from: Mac) -> Vec<u8> {
    let mut body = vec![ADVERTISEMENT, 0, 0, 0, OVERRIDE, 0, 0, 0];
    body.extend(address.octets());
    // Option: the target's link-layer address, in units of 8 bytes.
    body.extend([2, 1]);
    body.extend(owner);
    let sum = checksum::transport(&address.octets(), &ALL_NODES.octets(), checksum::ICMPV6, &body);
    body[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut frame = ethernet([0x33, 0x33, 0, 0, 0, 1], from, ETHER_IPV6);
    frame.extend([0x60, 0, 0, 0]);
    frame.extend((body.len() as u16).to_be_bytes());
    // The hop limit shows that it has not come through a router.
    frame.extend([checksum::ICMPV6, 255]);
    frame.extend(address.octets());
    frame.extend(ALL_NODES.octets());
    frame.extend(body);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: Mac = [2, 0, 0, 0, 0, 1];
    const FROM: Mac = [2, 0, 0, 0, 0, 2];

    #[test]
    fn both_forms_of_a_gratuitous_arp() {
        let frames = announcement("10.1.2.3".parse().unwrap(), OWNER, FROM);
        assert_eq!(frames.len(), 2);
        for (frame, form) in frames.iter().zip([REQUEST, REPLY]) {
            assert_eq!(frame.len(), 60);
            assert_eq!(frame[..6], BROADCAST);
            assert_eq!(frame[6..12], FROM, "switches learn the sender's port from this");
            assert_eq!(frame[12..20], [0x08, 0x06, 0, 1, 0x08, 0, 6, 4]);
            assert_eq!(frame[20..22], form.to_be_bytes());
            assert_eq!(frame[22..28], OWNER);
            assert_eq!(frame[28..32], [10, 1, 2, 3]);
            assert_eq!(frame[38..42], [10, 1, 2, 3]);
        }
        assert_eq!(frames[0][32..38], [0; 6]);
        assert_eq!(frames[1][32..38], OWNER);
    }

    #[test]
    fn an_advertisement_that_overrides_and_that_receivers_accept() {
        let address: Ipv6Addr = "2001:db8::9".parse().unwrap();
        let frames = announcement(address.into(), OWNER, FROM);
        assert_eq!(frames.len(), 1);
        let packet = &frames[0][14..];
        assert_eq!(frames[0][..6], [0x33, 0x33, 0, 0, 0, 1]);
        assert_eq!(packet[7], 255, "receivers drop any other hop limit");
        assert_eq!(packet[8..24], address.octets());
        assert_eq!((packet[40], packet[44]), (ADVERTISEMENT, OVERRIDE));
        assert_eq!(packet[48..64], address.octets());
        assert_eq!(packet[64..66], [2, 1]);
        assert_eq!(packet[66..72], OWNER);
        let mut again = packet.to_vec();
        assert!(checksum::repair(&mut again));
        assert_eq!(again, packet, "its checksum is right");
    }
}
