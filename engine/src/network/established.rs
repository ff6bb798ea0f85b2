//! The TCP connections that a program has (sock_diag(7), or proc_net_tcp where its network is another): found before anything is promised about them.

use super::diag::{self, LISTENING, Socket};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

/// A connection of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Connection {
    /// A process that has it.
    pub(crate) pid: i32,
    pub(crate) local: SocketAddr,
    pub(crate) peer: SocketAddr,
}

impl fmt::Display for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {} of process {}", self.local, self.peer, self.pid)
    }
}

/// Every connection that one of these processes has a socket of, each once.
///
/// # Errors
/// That /proc cannot be read. A process that ends meanwhile has none.
pub(crate) fn connections(pids: &[i32]) -> io::Result<Vec<Connection>> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for &pid in pids {
        let sockets = match sockets(pid) {
            Err(error) if gone(&error) => continue,
            sockets => sockets?,
        };
        let tables = match tables(pid, false) {
            Err(error) if gone(&error) => continue,
            tables => tables?,
        };
        for inode in sockets {
            if let Some(socket) = tables.get(&inode)
                && socket.connected()
                && seen.insert(inode)
            {
                found.push(Connection { pid, local: socket.local, peer: socket.peer });
            }
        }
    }
    Ok(found)
}

/// Connections that clients have made, and that none of these processes has accepted yet.
///
/// # Errors
/// As of [`connections`].
pub(crate) fn waiting(pids: &[i32]) -> io::Result<u64> {
    let mut listening = BTreeMap::new();
    for &pid in pids {
        let sockets = match sockets(pid) {
            Err(error) if gone(&error) => continue,
            sockets => sockets?,
        };
        let mut tables = match tables(pid, true) {
            Err(error) if gone(&error) => continue,
            tables => tables?,
        };
        tables.retain(|inode, socket| socket.state == LISTENING && sockets.contains(inode));
        listening.extend(tables);
    }
    Ok(listening.values().map(|socket| u64::from(socket.queue)).sum())
}

/// Every TCP socket of a process's network, by its inode: all, or only those that listen.
fn tables(pid: i32, listening: bool) -> io::Result<BTreeMap<u64, Socket>> {
    let network = |who: &str| fs::read_link(format!("/proc/{who}/ns/net"));
    if network("thread-self")? == network(&pid.to_string())? {
        match diag::sockets(listening) {
            Ok(sockets) => return Ok(sockets.into_iter().collect()),
            // A kernel without it has the lists.
            Err(error) => tracing::debug!(%error, "sockets are looked for in /proc"),
        }
    }
    let mut tables = BTreeMap::new();
    for file in ["tcp", "tcp6"] {
        match fs::read_to_string(format!("/proc/{pid}/net/{file}")) {
            Ok(text) => tables.extend(parse(&text)),
            // A kernel without IPv6 has no list of it.
            Err(error) if gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(tables)
}

fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// Inodes of the sockets that a process has open.
fn sockets(pid: i32) -> io::Result<BTreeSet<u64>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let Ok(target) = entry.and_then(|entry| fs::read_link(entry.path())) else { continue };
        found.extend(socket(&target));
    }
    Ok(found)
}

fn socket(target: &Path) -> Option<u64> {
    target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// Every socket of a list, by its inode.
fn parse(text: &str) -> Vec<(u64, Socket)> {
    text.lines().skip(1).filter_map(line).collect()
}

fn line(line: &str) -> Option<(u64, Socket)> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let state = u8::from_str_radix(words.get(3)?, 16).ok()?;
    let queue = u32::from_str_radix(words.get(4)?.split_once(':')?.1, 16).ok()?;
    let inode: u64 = words.get(9)?.parse().ok()?;
    let (local, peer) = (end(words.get(1)?)?, end(words.get(2)?)?);
    // One that only the kernel has still has no inode.
    (inode > 0).then_some((inode, Socket { state, local, peer, queue }))
}

/// An address as the kernel prints it: words of its memory in hexadecimal, and the port.
fn end(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let word = |at: usize| {
        let digits = address.get(8 * at..8 * at + 8)?;
        u32::from_str_radix(digits, 16).ok().map(u32::to_ne_bytes)
    };
    let address = match address.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let octets: Vec<u8> = [word(0)?, word(1)?, word(2)?, word(3)?].concat();
            let octets: [u8; 16] = octets.try_into().ok()?;
            // A socket of both families lists IPv4 in the clothes of IPv6.
            IpAddr::V6(Ipv6Addr::from(octets)).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(address, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn the_lists_of_the_kernel() {
        let text = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
             0: 0100007F:1538 00000000:0000 0A 00000000:00000003 00:00000000 00000000     0        0 900 1 0 100 0 0 10 0\n\
             1: 0100007F:1538 0200000A:B004 01 00000000:00000000 00:00000000 00000000     0        0 901 1 0 20 4 30 10 -1\n\
             2: 0100007F:1538 0200000A:B005 06 00000000:00000000 00:00000000 00000000     0        0 0 1 0 20 4 30 10 -1\n";
        if cfg!(target_endian = "little") {
            let found = parse(text);
            assert_eq!(found.len(), 2, "and not what has no socket any more");
            assert_eq!((found[0].0, found[1].0), (900, 901));
            assert!(!found[0].1.connected() && found[1].1.connected());
            assert_eq!(found[0].1.queue, 3, "connections that nobody has accepted");
            assert_eq!(found[1].1.local.to_string(), "127.0.0.1:5432");
            assert_eq!(found[1].1.peer.to_string(), "10.0.0.2:45060");
            let six = end("B80D0120000000000000000009000000:0050").unwrap();
            assert_eq!(six.to_string(), "[2001:db8::9]:80");
            assert_eq!(end("0000000000000000FFFF00000200000A:0050").unwrap().to_string(), "10.0.0.2:80");
        }
        assert!(end("0100007F").is_none());
        assert!(end("é100007F:0050").is_none());
    }

    #[test]
    fn this_programs_own_connections_are_found_and_its_listeners_are_not() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let own = [std::process::id() as i32];
        let mut queued = waiting(&own).unwrap();
        // Other tests of this process may have such connections for a moment too.
        while queued == 0 {
            queued = waiting(&own).unwrap();
        }
        let server = listener.accept().unwrap().0;
        let found = connections(&[std::process::id() as i32, i32::MAX]).unwrap();
        let has = |local: SocketAddr| found.iter().filter(|one| one.local == local).count();
        assert_eq!(has(client.local_addr().unwrap()), 1);
        assert_eq!(has(server.local_addr().unwrap()), 1, "and not the listener, which has the same address");
    }
}
