//! The little of the redis protocol (RESP2) that is needed: commands as arrays of strings, and plain replies.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Longest reply that redis gives (`proto-max-bulk-len`).
const BULK_LIMIT: usize = 512 << 20;
/// Longest line: an error text.
const LINE_LIMIT: usize = 64 << 10;

/// A reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// `+OK` and its like.
    Simple(String),
    /// `-ERR …`.
    Error(String),
    /// A number.
    Integer(i64),
    /// A string.
    Bulk(Vec<u8>),
    /// No such key.
    Nil,
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("a reply of redis {what}"))
}

/// Adds a command to a buffer.
pub fn encode(command: &[&[u8]], out: &mut Vec<u8>) {
    out.extend_from_slice(format!("*{}\r\n", command.len()).as_bytes());
    for argument in command {
        out.extend_from_slice(format!("${}\r\n", argument.len()).as_bytes());
        out.extend_from_slice(argument);
        out.extend_from_slice(b"\r\n");
    }
}

/// Takes the first reply of a buffer: it and its length, or `None` if it is not whole yet.
///
/// # Errors
/// `InvalidData` if it cannot become one.
pub fn parse(input: &[u8]) -> io::Result<Option<(Reply, usize)>> {
    let Some(end) = input.windows(2).position(|pair| pair == b"\r\n") else {
        return if input.len() > LINE_LIMIT { Err(malformed("has an endless line")) } else { Ok(None) };
    };
    let after = end + 2;
    let (Some(&kind), Ok(text)) = (input.first(), std::str::from_utf8(&input[1.min(end)..end])) else {
        return Err(malformed("is not text"));
    };
    let number = || text.parse::<i64>().map_err(|_| malformed("has no number where one must be"));
    let reply = match kind {
        b'+' => Reply::Simple(text.to_owned()),
        b'-' => Reply::Error(text.to_owned()),
        b':' => Reply::Integer(number()?),
        b'$' => match number()? {
            -1 => Reply::Nil,
            len => {
                let len = usize::try_from(len).map_err(|_| malformed("has a negative length"))?;
                if len > BULK_LIMIT {
                    return Err(malformed("is too long"));
                }
                let Some(body) = input.get(after..after + len + 2) else { return Ok(None) };
                if &body[len..] != b"\r\n" {
                    return Err(malformed("does not end where it says"));
                }
                return Ok(Some((Reply::Bulk(body[..len].to_vec()), after + len + 2)));
            }
        },
        _ => return Err(malformed("is of a kind that was not asked for")),
    };
    Ok(Some((reply, after)))
}

/// A connection with commands and replies under way. Reading and writing give up after a short time, so that the
/// caller can look at the clock.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    output: Vec<u8>,
    written: usize,
    input: Vec<u8>,
    parsed: usize,
}

impl Connection {
    /// Connects within `timeout`; later waits take `tick` at most.
    ///
    /// # Errors
    /// What connect says.
    pub fn open(address: SocketAddr, timeout: Duration, tick: Duration) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, timeout)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(tick))?;
        stream.set_write_timeout(Some(tick))?;
        Ok(Self { stream, output: Vec::new(), written: 0, input: Vec::new(), parsed: 0 })
    }

    /// Adds a command to what is to be sent.
    pub fn push(&mut self, command: &[&[u8]]) {
        encode(command, &mut self.output);
    }

    /// Sends what is waiting, or as much of it as goes in a tick.
    ///
    /// # Errors
    /// What the socket says, except that it was not ready.
    pub fn flush(&mut self) -> io::Result<()> {
        while self.written < self.output.len() {
            match self.stream.write(&self.output[self.written..]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => self.written += written,
                Err(error) if not_ready(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        self.output.clear();
        self.written = 0;
        Ok(())
    }

    /// The next reply, or `None` if there is none after a tick.
    ///
    /// # Errors
    /// What the socket says (`UnexpectedEof` when it was closed), or a reply that is none.
    pub fn reply(&mut self) -> io::Result<Option<Reply>> {
        loop {
            if let Some((reply, len)) = parse(&self.input[self.parsed..])? {
                self.parsed += len;
                if self.parsed == self.input.len() {
                    self.input.clear();
                    self.parsed = 0;
                }
                return Ok(Some(reply));
            }
            self.input.drain(..self.parsed);
            self.parsed = 0;
            let mut chunk = [0; 64 << 10];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(len) => self.input.extend_from_slice(&chunk[..len]),
                Err(error) if not_ready(&error) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// The next reply, waiting up to `ticks` ticks for it.
    ///
    /// # Errors
    /// As [`Connection::reply`], and `TimedOut`.
    pub fn wait_reply(&mut self, ticks: u32) -> io::Result<Reply> {
        for _ in 0..ticks {
            self.flush()?;
            if let Some(reply) = self.reply()? {
                return Ok(reply);
            }
        }
        Err(ErrorKind::TimedOut.into())
    }
}

fn not_ready(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn commands_are_arrays_of_strings() {
        let mut out = Vec::new();
        encode(&[b"SET", b"k", b"\r\n"], &mut out);
        assert_eq!(out, b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$2\r\n\r\n\r\n");
    }

    #[test]
    fn replies_are_taken_whole_or_not_at_all() {
        for (text, reply) in [
            (&b"+OK\r\n"[..], Reply::Simple("OK".to_owned())),
            (b"-ERR no\r\n", Reply::Error("ERR no".to_owned())),
            (b":-7\r\n", Reply::Integer(-7)),
            (b"$-1\r\n", Reply::Nil),
            (b"$4\r\na\r\nb\r\n", Reply::Bulk(b"a\r\nb".to_vec())),
        ] {
            for cut in 0..text.len() {
                assert_eq!(parse(&text[..cut]).expect("not wrong yet"), None);
            }
            let longer = [text, b"+more"].concat();
            assert_eq!(parse(&longer).expect("right"), Some((reply, text.len())));
        }
    }

    #[test]
    fn what_is_no_reply_is_an_error() {
        for text in [&b"\r\n"[..], b"*1\r\n", b"$x\r\n", b"$-2\r\n", b"$999999999999\r\n", b"$1\r\nab\r\n"] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
