//! Checksums of captured packets, computed anew: a packet that a virtual device hands over may have none yet, because the
//! hardware would have made it (RFC 1071, RFC 768, RFC 9293, RFC 8200 §8.1).

/// Protocol numbers (IANA).
pub(super) const TCP: u8 = 6;
const UDP: u8 = 17;
pub(super) const ICMPV6: u8 = 58;
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;

/// The ones' complement sum of 16-bit words, not folded. Bytes of an odd end count as if a zero followed.
fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).fold(0u32, |sum, pair| {
        let word = u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]);
        // 64 KiB of words at most: 2^15 * 2^16 fits.
        sum + u32::from(word)
    })
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The checksum of a transport's bytes, with its pseudo header, as it stands on the wire.
pub(super) fn transport(source: &[u8], destination: &[u8], protocol: u8, bytes: &[u8]) -> u16 {
    let length = bytes.len() as u32;
    let pseudo = sum(source) + sum(destination) + u32::from(protocol) + (length >> 16) + (length & 0xffff);
    fold(fold_once(pseudo) + fold_once(sum(bytes)))
}

fn fold_once(sum: u32) -> u32 {
    (sum & 0xffff) + (sum >> 16)
}

/// Puts the right checksums into an IPv4 or IPv6 packet. `false`: these bytes are no packet that is whole.
pub(super) fn repair(packet: &mut [u8]) -> bool {
    match packet.first().map(|first| first >> 4) {
        Some(4) => repair_v4(packet),
        Some(6) => repair_v6(packet),
        _ => false,
    }
}

fn repair_v4(packet: &mut [u8]) -> bool {
    if packet.len() < IPV4_HEADER {
        return false;
    }
    let header = usize::from(packet[0] & 0xf) * 4;
    let total = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
    if header < IPV4_HEADER || total < header || packet.len() < total {
        return false;
    }
    packet[10..12].fill(0);
    let checksum = fold(sum(&packet[..header]));
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    // A fragment has a part of what its checksum is over.
    let fragment = u16::from_be_bytes([packet[6], packet[7]]) & 0x3fff != 0;
    let protocol = packet[9];
    if fragment {
        return true;
    }
    let (head, body) = packet[..total].split_at_mut(header);
    repair_transport(&head[12..16], &head[16..20], protocol, body)
}

fn repair_v6(packet: &mut [u8]) -> bool {
    if packet.len() < IPV6_HEADER {
        return false;
    }
    let total = IPV6_HEADER + usize::from(u16::from_be_bytes([packet[4], packet[5]]));
    if packet.len() < total {
        return false;
    }
    let protocol = packet[6];
    let (head, body) = packet[..total].split_at_mut(IPV6_HEADER);
    repair_transport(&head[8..24], &head[24..40], protocol, body)
}

/// Where the checksum stands in a transport's header; others than these have come as they will go on.
fn repair_transport(source: &[u8], destination: &[u8], protocol: u8, body: &mut [u8]) -> bool {
    let at = match protocol {
        TCP => 16,
        UDP => 6,
        ICMPV6 => 2,
        _ => return true,
    };
    if body.len() < at + 2 {
        return false;
    }
    // A UDP sender over IPv4 may go without.
    if protocol == UDP && source.len() == 4 && body[at..at + 2] == [0, 0] {
        return true;
    }
    body[at..at + 2].fill(0);
    let checksum = match transport(source, destination, protocol, body) {
        // Zero would say that there is none.
        0 if protocol == UDP => 0xffff,
        checksum => checksum,
    };
    body[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A SYN of 172.16.10.99 to 172.16.10.12. Its IP header is the usual example, with the checksum 0xb1e6.
    const SYN: [u8; 60] = [
        0x45, 0x00, 0x00, 0x3c, 0x1c, 0x46, 0x40, 0x00, 0x40, 0x06, 0xb1, 0xe6, 0xac, 0x10, 0x0a, 0x63, 0xac,
        0x10, 0x0a, 0x0c, 0xa9, 0x30, 0x00, 0x50, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00, 0x00, 0xa0, 0x02,
        0xff, 0xff, 0x00, 0x00, 0x00, 0x00, 0x02, 0x04, 0x05, 0xb4, 0x04, 0x02, 0x08, 0x0a, 0x00, 0x00, 0x00,
        0x01, 0x00, 0x00, 0x00, 0x00, 0x01, 0x03, 0x03, 0x07,
    ];

    /// What a receiver does: over header and pseudo header, checksum included, the sum is all ones.
    fn holds_v4(packet: &[u8]) -> bool {
        let total = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
        let body = &packet[20..total];
        let pseudo = sum(&packet[12..20]) + u32::from(packet[9]) + body.len() as u32;
        fold(sum(&packet[..20])) == 0 && fold(fold_once(pseudo) + fold_once(sum(body))) == 0
    }

    #[test]
    fn the_example_of_rfc_1071() {
        assert_eq!(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), 0x2ddf0);
        assert_eq!(fold(0x2ddf0), !0xddf2);
    }

    #[test]
    fn a_packet_without_checksums_gets_those_that_a_receiver_accepts() {
        let mut packet = SYN;
        packet[10..12].fill(0);
        assert!(repair(&mut packet));
        assert_eq!(packet[10..12], SYN[10..12], "the header's is known");
        assert!(holds_v4(&packet));
        let again = packet;
        assert!(repair(&mut packet));
        assert_eq!(packet, again);
    }

    #[test]
    fn an_ipv6_packet_gets_its_checksum() {
        // A neighbour solicitation as in RFC 4861, from fe80::1 to ff02::1:ff00:2.
        let mut packet = vec![0x60, 0, 0, 0, 0, 24, ICMPV6, 255];
        packet.extend(std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1).octets());
        packet.extend(std::net::Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 2).octets());
        packet.extend([135, 0, 0, 0, 0, 0, 0, 0]);
        packet.extend(std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2).octets());
        assert!(repair(&mut packet));
        let pseudo = sum(&packet[8..40]) + u32::from(ICMPV6) + 24;
        assert_eq!(fold(fold_once(pseudo) + fold_once(sum(&packet[40..]))), 0);
    }

    #[test]
    fn udp_without_a_checksum_stays_so_over_ipv4() {
        let mut packet = SYN[..28].to_vec();
        packet[2..4].copy_from_slice(&28u16.to_be_bytes());
        packet[9] = UDP;
        packet[26..28].fill(0);
        assert!(repair(&mut packet));
        assert_eq!(packet[26..28], [0, 0]);
    }

    #[test]
    fn a_fragment_keeps_what_its_sender_computed_over_the_whole() {
        let mut packet = SYN;
        packet[6] = 0x20;
        packet[36..38].copy_from_slice(&[7, 9]);
        assert!(repair(&mut packet));
        assert_eq!(packet[36..38], [7, 9]);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            repair(&mut bytes);
        }

        #[test]
        fn any_tcp_packet_is_accepted_afterwards(
            payload in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut packet = SYN[..40].to_vec();
            packet.extend(&payload);
            let total = packet.len() as u16;
            packet[2..4].copy_from_slice(&total.to_be_bytes());
            prop_assert!(repair(&mut packet));
            prop_assert!(holds_v4(&packet));
        }
    }
}
