//! Netlink: a message after another, written by hand, and the kernel's verdict. Two kinds of message in all need no library.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, netlink::SocketAddrNetlink,
};
use std::io;
use std::os::fd::OwnedFd;

/// Length of `nlmsghdr`.
const HEADER: usize = 16;
/// `NLMSG_ERROR`, which is an acknowledgement when its number is zero.
const ERROR: u16 = 2;
/// Bytes of a datagram at most: what the kernel makes of lists.
const BUFFER: usize = 64 << 10;
/// A kernel that is asked answers at once; this is against one that does not.
const PATIENCE: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// `NLMSG_DONE`: the end of a list.
const DONE: u16 = 3;

/// `NLM_F_REQUEST`.
const REQUEST: u16 = 1;
/// `NLM_F_ACK`.
pub(super) const ACK: u16 = 4;
/// `NLM_F_ROOT | NLM_F_MATCH`: all that there is.
const LIST: u16 = 0x300;
/// `NLM_F_REPLACE`.
pub(super) const REPLACE: u16 = 0x100;
/// `NLM_F_EXCL`.
pub(super) const EXCLUSIVE: u16 = 0x200;
/// `NLM_F_CREATE`.
pub(super) const CREATE: u16 = 0x400;
/// `NLM_F_APPEND`.
pub(super) const APPEND: u16 = 0x800;
/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;

/// One message: a head of the family's own, then attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message {
    bytes: Vec<u8>,
    /// Whether the kernel is asked to say that it has done it.
    answered: bool,
}

impl Message {
    /// A request of this kind with these further flags.
    pub(super) fn new(kind: u16, flags: u16, head: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(REQUEST | flags).to_ne_bytes());
        bytes.extend(head);
        let mut message = Self { bytes, answered: flags & ACK != 0 };
        message.pad();
        message
    }

    /// A request for all that there is of this kind.
    pub(super) fn list(kind: u16, head: &[u8]) -> Self {
        Self::new(kind, LIST, head)
    }

    /// Adds an attribute.
    pub(super) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        self.put(kind, value);
        self
    }

    /// Adds an attribute of attributes.
    pub(super) fn nest(mut self, kind: u16, inside: impl FnOnce(Self) -> Self) -> Self {
        let at = self.bytes.len();
        self.put(kind | NESTED, &[]);
        let mut message = inside(self);
        let len = (message.bytes.len() - at) as u16;
        message.bytes[at..at + 2].copy_from_slice(&len.to_ne_bytes());
        message
    }

    fn put(&mut self, kind: u16, value: &[u8]) {
        let len = (value.len() + 4) as u16;
        self.bytes.extend(len.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(value);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// Its bytes, under this number.
    fn numbered(mut self, number: u32) -> Vec<u8> {
        let len = self.bytes.len() as u32;
        self.bytes[..4].copy_from_slice(&len.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&number.to_ne_bytes());
        self.bytes
    }
}

/// A name as netlink has it: with a zero at its end.
pub(super) fn text(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

/// A connection to a part of the kernel.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    number: u32,
}

impl Netlink {
    /// To what knows addresses (`NETLINK_ROUTE`, which is number 0 and so the default).
    pub(super) fn addresses() -> io::Result<Self> {
        Self::open(None)
    }

    /// To what filters packets.
    pub(super) fn filters() -> io::Result<Self> {
        Self::open(Some(rustix::net::netlink::NETFILTER))
    }

    /// To what knows sockets.
    pub(super) fn sockets() -> io::Result<Self> {
        Self::open(Some(rustix::net::netlink::SOCK_DIAG))
    }

    fn open(protocol: Option<Protocol>) -> io::Result<Self> {
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            protocol,
        )?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self { socket, number: 0 })
    }

    /// Sends all of it at once, and waits until the kernel has said yes to each message that asks for an answer.
    ///
    /// # Errors
    /// The first no.
    pub(super) fn ask(&mut self, messages: Vec<Message>) -> io::Result<()> {
        let first = self.number.wrapping_add(1);
        let mut bytes = Vec::new();
        let mut open = 0usize;
        for message in messages {
            self.number = self.number.wrapping_add(1);
            open += usize::from(message.answered);
            bytes.extend(message.numbered(self.number));
        }
        rustix::net::send(&self.socket, &bytes, SendFlags::empty())?;
        let mut buffer = vec![0; BUFFER];
        while open > 0 {
            let got = self.receive(&mut buffer)?;
            for (number, verdict) in verdicts(&buffer[..got]) {
                // What is older is a late answer to somebody who gave up.
                if number.wrapping_sub(first) > self.number.wrapping_sub(first) {
                    continue;
                }
                if verdict != 0 {
                    return Err(io::Error::from_raw_os_error(-verdict));
                }
                open -= 1;
            }
        }
        Ok(())
    }

    /// Asks for a list, and hands over what stands in each answer.
    ///
    /// # Errors
    /// That there is none.
    pub(super) fn list(&mut self, message: Message, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        self.number = self.number.wrapping_add(1);
        rustix::net::send(&self.socket, &message.numbered(self.number), SendFlags::empty())?;
        let mut buffer = vec![0; BUFFER];
        loop {
            let got = self.receive(&mut buffer)?;
            for (number, kind, content) in messages(&buffer[..got]) {
                match kind {
                    _ if number != self.number => {}
                    DONE => return Ok(()),
                    ERROR => {
                        let errno = content.get(..4).and_then(|bytes| bytes.try_into().ok());
                        return Err(io::Error::from_raw_os_error(
                            -errno.map_or(-libc::EIO, i32::from_ne_bytes),
                        ));
                    }
                    _ => each(content),
                }
            }
        }
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        if poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&PATIENCE))? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(rustix::net::recv(&self.socket, buffer, RecvFlags::empty())?.0)
    }
}

/// Splits a datagram into its messages: number, kind, and what follows the header.
fn messages(mut bytes: &[u8]) -> Vec<(u32, u16, &[u8])> {
    let word = |at: &[u8]| u32::from_ne_bytes([at[0], at[1], at[2], at[3]]);
    let mut found = Vec::new();
    while bytes.len() >= HEADER {
        let len = word(bytes) as usize;
        if len < HEADER || len > bytes.len() {
            break;
        }
        found.push((word(&bytes[8..]), u16::from_ne_bytes([bytes[4], bytes[5]]), &bytes[HEADER..len]));
        bytes = &bytes[len.next_multiple_of(4).min(bytes.len())..];
    }
    found
}

/// Number and verdict (0, or minus an errno) of every answer in a datagram.
fn verdicts(bytes: &[u8]) -> Vec<(u32, i32)> {
    let verdict = |(number, kind, content): (u32, u16, &[u8])| {
        let errno = content.get(..4)?.try_into().ok()?;
        (kind == ERROR).then_some((number, i32::from_ne_bytes(errno)))
    };
    messages(bytes).into_iter().filter_map(verdict).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_as_the_kernel_reads_it() {
        let message = Message::new(20, ACK | CREATE, &[2, 24, 0, 0])
            .with(1, &[10, 0, 0, 9])
            .nest(3, |m| m.with(4, b"ab\0"))
            .numbered(7);
        #[rustfmt::skip]
        let expected: Vec<u8> = vec![
            40, 0, 0, 0, 20, 0, 0x05, 0x04, 7, 0, 0, 0, 0, 0, 0, 0,
            2, 24, 0, 0,
            8, 0, 1, 0, 10, 0, 0, 9,
            12, 0, 3, 0x80, 7, 0, 4, 0, b'a', b'b', 0, 0,
        ];
        assert_eq!(message, expected);
    }

    #[test]
    fn answers_are_told_apart_by_their_numbers() {
        let mut answer = Message::new(ERROR, 0, &(-17i32).to_ne_bytes()).numbered(5);
        answer.extend(Message::new(ERROR, 0, &0i32.to_ne_bytes()).numbered(6));
        assert_eq!(verdicts(&answer), [(5, -17), (6, 0)]);
        assert_eq!(verdicts(&answer[..10]), []);
        assert_eq!(verdicts(&[0; 32]), []);
    }
}
