//! What arrives for an address while nobody is there to take it: kept by the kernel in the buffer of a packet socket, and
//! delivered afterwards as if it had come then.
//!
//! A packet socket sees a packet before the rules that hold it back do. No thread of ours has to look: reading begins when the
//! program runs.

use super::checksum;
use super::sys::packet::{self, Instruction};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

/// Room for packets that wait, as the kernel counts it (with what it needs for each): seconds of what windows let in.
const ROOM: usize = 64 << 20;
/// The largest packet that there is.
const MOST: usize = 1 << 16;
const ETHER_IPV4: u16 = 0x0800;
const ETHER_IPV6: u16 = 0x86dd;

/// `BPF_LD | BPF_W | BPF_ABS`, the same for a byte, `BPF_JMP | BPF_JEQ`, `BPF_JMP | BPF_JGE`, `BPF_JGT`, `BPF_RET`.
const LOAD_WORD: u16 = 0x20;
const LOAD_BYTE: u16 = 0x30;
const EQUAL: u16 = 0x15;
const AT_LEAST: u16 = 0x35;
const MORE: u16 = 0x25;
const RETURN: u16 = 0x06;
/// `SKF_AD_OFF + SKF_AD_PKTTYPE`: whom the packet is for. 0 is this machine.
const FOR_WHOM: u32 = 0xffff_f004;

/// Packets of one address that wait.
#[derive(Debug)]
pub(crate) struct Capture {
    socket: OwnedFd,
    address: IpAddr,
}

/// What was delivered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Delivered {
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
    /// Packets for which there was no room, or which the kernel did not take: their senders send them again.
    pub(crate) lost: u64,
}

/// The packets that had arrived when the rules went.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    address: Option<IpAddr>,
    packets: Vec<Vec<u8>>,
    lost: u64,
}

impl Capture {
    /// Keeps what arrives for `address` on a device (0: on any) from now on.
    ///
    /// # Errors
    /// What the kernel says: packet sockets need CAP_NET_RAW.
    pub(crate) fn begin(address: IpAddr, device: u32) -> io::Result<Self> {
        let socket = packet::open(SocketType::DGRAM)?;
        packet::attach(&socket, &program(address))?;
        rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, ROOM)?;
        // Last, so that nothing gets in that the filter does not want.
        packet::bind(&socket, if address.is_ipv4() { ETHER_IPV4 } else { ETHER_IPV6 }, device)?;
        Ok(Self { socket, address })
    }

    /// Whose packets these are.
    pub(crate) fn address(&self) -> IpAddr {
        self.address
    }

    /// Forgets what has arrived.
    pub(crate) fn forget(&self) -> io::Result<()> {
        self.read(|_| {})?;
        packet::lost(&self.socket).map(drop)
    }

    /// What has arrived. Nothing is kept any more.
    ///
    /// The socket stays open: closing one waits for a grace period of the kernel, which may be milliseconds.
    pub(crate) fn end(&self) -> io::Result<Waiting> {
        let mut packets = Vec::new();
        self.read(|packet| packets.push(packet.to_vec()))?;
        let nothing = Instruction { code: RETURN, if_true: 0, if_false: 0, operand: 0 };
        packet::attach(&self.socket, &[nothing])?;
        Ok(Waiting { address: Some(self.address), packets, lost: packet::lost(&self.socket)? })
    }

    fn read(&self, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        let mut buffer = vec![0; MOST];
        loop {
            match rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((got, _)) => each(&buffer[..got]),
                Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                // The device went down for a moment: what had come is still there.
                Err(rustix::io::Errno::NETDOWN) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// Takes a packet that is for this machine, and to the address. (Offsets from the IP header on.)
fn program(address: IpAddr) -> Vec<Instruction> {
    let words: Vec<(u32, u32)> = match address {
        IpAddr::V4(v4) => vec![(16, u32::from(v4))],
        IpAddr::V6(v6) => {
            let octets = v6.octets();
            let word =
                |at: usize| u32::from_be_bytes([octets[at], octets[at + 1], octets[at + 2], octets[at + 3]]);
            (0..4).map(|n| (24 + 4 * n as u32, word(4 * n))).collect()
        }
    };
    let step = |code, if_true, if_false, operand| Instruction { code, if_true, if_false, operand };
    let mut all = vec![step(LOAD_WORD, 0, 0, FOR_WHOM)];
    // What follows each comparison, and has to be jumped over to get to the no at the end.
    let discovery = if address.is_ipv6() { 5 } else { 0 };
    let mut left = 2 * words.len() as u8 + discovery + 1;
    all.push(step(EQUAL, 0, left, 0));
    for (offset, word) in words {
        all.push(step(LOAD_WORD, 0, 0, offset));
        left -= 2;
        all.push(step(EQUAL, 0, left, word));
    }
    if address.is_ipv6() {
        // Neighbour discovery is not held back, so it is not delivered a second time either.
        all.extend([
            step(LOAD_BYTE, 0, 0, 6),
            step(EQUAL, 0, 3, checksum::ICMPV6.into()),
            step(LOAD_BYTE, 0, 0, 40),
            step(AT_LEAST, 0, 1, 133),
            step(MORE, 0, 1, 137),
        ]);
    }
    all.push(step(RETURN, 0, 0, MOST as u32));
    all.push(step(RETURN, 0, 0, 0));
    all
}

impl Waiting {
    /// Delivers them to this machine, in the order in which they came.
    ///
    /// # Errors
    /// That no raw socket can be had. A packet that the kernel refuses counts as lost.
    pub(crate) fn deliver(mut self) -> io::Result<Delivered> {
        let mut delivered = Delivered { lost: self.lost, ..Delivered::default() };
        let Some(address) = self.address.filter(|_| !self.packets.is_empty()) else { return Ok(delivered) };
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        // With this protocol the header is ours (raw(7)).
        let socket =
            rustix::net::socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::RAW))?;
        let to = SocketAddr::new(address, 0);
        for packet in &mut self.packets {
            let sent = checksum::repair(packet)
                && rustix::net::sendto(&socket, packet, SendFlags::empty(), &to).is_ok();
            if sent {
                delivered.packets += 1;
                delivered.bytes += packet.len() as u64;
            } else {
                delivered.lost += 1;
            }
        }
        Ok(delivered)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel does with a program (the instructions that are used here).
    fn run(program: &[Instruction], packet: &[u8], for_whom: u32) -> bool {
        let (mut at, mut loaded) = (0usize, 0u32);
        loop {
            let step = program[at];
            at += 1;
            let jump = |yes: bool| usize::from(if yes { step.if_true } else { step.if_false });
            match step.code {
                LOAD_WORD if step.operand == FOR_WHOM => loaded = for_whom,
                LOAD_WORD => {
                    let from = step.operand as usize;
                    let Some(bytes) = packet.get(from..from + 4) else { return false };
                    loaded = u32::from_be_bytes(bytes.try_into().unwrap());
                }
                LOAD_BYTE => {
                    let Some(byte) = packet.get(step.operand as usize) else { return false };
                    loaded = (*byte).into();
                }
                EQUAL => at += jump(loaded == step.operand),
                AT_LEAST => at += jump(loaded >= step.operand),
                MORE => at += jump(loaded > step.operand),
                RETURN => return step.operand > 0,
                code => panic!("an instruction that is not used: {code:#x}"),
            }
        }
    }

    fn v4(to: [u8; 4]) -> Vec<u8> {
        let mut packet = vec![0; 40];
        packet[0] = 0x45;
        packet[16..20].copy_from_slice(&to);
        packet
    }

    fn v6(to: &str, protocol: u8, kind: u8) -> Vec<u8> {
        let mut packet = vec![0; 64];
        packet[0] = 0x60;
        packet[6] = protocol;
        packet[24..40].copy_from_slice(&to.parse::<std::net::Ipv6Addr>().unwrap().octets());
        packet[40] = kind;
        packet
    }

    #[test]
    fn only_packets_to_the_address_are_kept() {
        let program = program("10.0.0.9".parse().unwrap());
        assert!(run(&program, &v4([10, 0, 0, 9]), 0));
        assert!(!run(&program, &v4([10, 0, 0, 8]), 0));
        assert!(!run(&program, &v4([10, 0, 0, 9]), 4), "what this machine sends itself");
        assert!(!run(&program, &v4([10, 0, 0, 9])[..18], 0), "half a header");
    }

    #[test]
    fn neighbour_discovery_is_not_kept() {
        let program = program("2001:db8::9".parse().unwrap());
        assert!(run(&program, &v6("2001:db8::9", checksum::TCP, 0), 0));
        assert!(run(&program, &v6("2001:db8::9", checksum::ICMPV6, 128), 0), "a ping is");
        for kind in 133..=137 {
            assert!(!run(&program, &v6("2001:db8::9", checksum::ICMPV6, kind), 0), "{kind}");
        }
        assert!(run(&program, &v6("2001:db8::9", checksum::ICMPV6, 138), 0));
        for other in ["2001:db8::8", "2001:db8:0:0:1::9", "2001:db9::9", "2001:db8:1::9"] {
            assert!(!run(&program, &v6(other, checksum::TCP, 0), 0), "{other}");
        }
        assert!(!run(&program, &v6("2001:db8::9", checksum::TCP, 0), 4));
    }
}
