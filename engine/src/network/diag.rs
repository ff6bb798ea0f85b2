//! The kernel's TCP sockets, asked for over netlink (sock_diag(7)): a hundred times quicker than its lists in /proc, which look
//! into every corner of a large table, and the program is about to stop.

use super::netlink::{Message, Netlink};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// `SOCK_DIAG_BY_FAMILY`.
const BY_FAMILY: u16 = 20;
/// The state of a listening socket (`tcp_states.h`).
pub(super) const LISTENING: u8 = 10;
/// A socket without a peer.
pub(super) const CLOSED: u8 = 7;
/// Length of `inet_diag_sockid`, and of `inet_diag_msg`, which has it after four bytes.
const NAME: usize = 48;
const ANSWER: usize = 72;

/// A TCP socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Socket {
    pub(super) state: u8,
    pub(super) local: SocketAddr,
    pub(super) peer: SocketAddr,
    /// Bytes that wait to be read; of a listening socket, connections that wait to be accepted.
    pub(super) queue: u32,
}

impl Socket {
    /// Whether it has a peer.
    pub(super) fn connected(&self) -> bool {
        self.state != CLOSED && self.state != LISTENING
    }
}

/// The TCP sockets of this network namespace that a process may have, by inode: all, or only those that listen.
pub(super) fn sockets(listening: bool) -> io::Result<Vec<(u64, Socket)>> {
    let mut netlink = Netlink::sockets()?;
    let states = if listening { 1 << LISTENING } else { u32::MAX };
    let mut found = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let mut head = vec![family as u8, libc::IPPROTO_TCP as u8, 0, 0];
        head.extend(states.to_ne_bytes());
        head.extend([0; NAME]);
        netlink.list(Message::list(BY_FAMILY, &head), |answer| found.extend(socket(answer)))?;
    }
    Ok(found)
}

fn socket(answer: &[u8]) -> Option<(u64, Socket)> {
    let answer = answer.get(..ANSWER)?;
    let word = |at: usize| u32::from_ne_bytes([answer[at], answer[at + 1], answer[at + 2], answer[at + 3]]);
    let port = |at: usize| u16::from_be_bytes([answer[at], answer[at + 1]]);
    let address = |at: usize| -> Option<IpAddr> {
        let octets: [u8; 16] = answer[at..at + 16].try_into().ok()?;
        match i32::from(answer[0]) {
            libc::AF_INET => Some(Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3]).into()),
            libc::AF_INET6 => Some(IpAddr::V6(Ipv6Addr::from(octets)).to_canonical()),
            _ => None,
        }
    };
    let inode = u64::from(word(68));
    let local = SocketAddr::new(address(8)?, port(4));
    let peer = SocketAddr::new(address(24)?, port(6));
    // One that only the kernel has still has no inode.
    (inode > 0).then_some((inode, Socket { state: answer[1], local, peer, queue: word(56) }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn sockets_are_found_as_they_are() {
        let listener = TcpListener::bind("[::1]:0").unwrap();
        let address = listener.local_addr().unwrap();
        let _waits = std::net::TcpStream::connect(address).unwrap();
        let own = |listening: bool| {
            let all = sockets(listening).unwrap().into_iter();
            all.map(|(_, socket)| socket).filter(|socket| socket.local == address).collect::<Vec<_>>()
        };
        // The client may be connected a moment before the queue shows it.
        while own(true).iter().map(|socket| socket.queue).sum::<u32>() == 0 {}
        let listening = own(true);
        assert_eq!(listening.len(), 1);
        assert_eq!((listening[0].state, listening[0].queue, listening[0].connected()), (LISTENING, 1, false));
        let server = listener.accept().unwrap().0;
        let all = own(false);
        assert_eq!(all.len(), 2, "{all:?}");
        assert!(all.iter().any(|socket| socket.connected() && socket.peer == server.peer_addr().unwrap()));
    }

    #[test]
    fn half_an_answer_is_none() {
        assert!(socket(&[0; ANSWER - 1]).is_none());
        assert!(socket(&[0; ANSWER]).is_none(), "of no family, and without an inode");
    }
}
