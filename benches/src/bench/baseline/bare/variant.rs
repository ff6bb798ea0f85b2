//! What can be chosen about the bare loop: sizes, socket options, and where the bytes go.

use crate::sys::memory::PAGE;
use anyhow::{Context, bail, ensure};
use bytesize::ByteSize;
use rustix::fd::AsFd;
use rustix::net::sockopt;
use std::fmt;
use std::str::FromStr;

/// How the sender writes a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Write {
    /// One buffer.
    #[default]
    Whole,
    /// One call, a piece for each page: as one writes pages that do not lie in a row.
    Vectored,
}

/// Where the receiver puts the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Into {
    /// Memory for all of it, touched before.
    #[default]
    Touched,
    /// The same in transparent huge pages.
    Huge,
    /// Memory for all of it that it has not touched: each page is a page fault.
    Fresh,
    /// One buffer again and again.
    Buffer,
}

/// One way to run the bare loop. As text: `key=value` pairs with commas between, and what is left out is
/// the default: `batch=256,receive-buffer=1MiB`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variant {
    /// Pages that the sender reads and writes at a time.
    pub batch: usize,
    /// SO_SNDBUF in bytes; `None` leaves it to the kernel.
    pub send_buffer: Option<u64>,
    /// SO_RCVBUF in bytes; `None` leaves it to the kernel.
    pub receive_buffer: Option<u64>,
    /// TCP_CONGESTION of the sender; `None` is the machine's default.
    pub congestion: Option<String>,
    /// How the sender writes.
    pub write: Write,
    /// Bytes that the receiver asks for at a time.
    pub receive: u64,
    /// Whether the receiver waits until it gets as many as it asked for (MSG_WAITALL).
    pub wait_all: bool,
    /// Where the receiver puts them.
    pub into: Into,
    /// Whether both sides make a digest of every page, as an engine does that wants to know that it has arrived.
    pub digests: bool,
}

impl Default for Variant {
    fn default() -> Self {
        Self {
            batch: 64,
            send_buffer: None,
            receive_buffer: None,
            congestion: None,
            write: Write::Whole,
            receive: 256 << 10,
            wait_all: false,
            into: Into::Touched,
            digests: false,
        }
    }
}

impl Variant {
    /// Sets what a connection's sending end is to have.
    ///
    /// # Errors
    /// What the kernel refuses: a congestion control that it does not have.
    pub fn prepare_sender(&self, socket: impl AsFd) -> anyhow::Result<()> {
        if let Some(bytes) = self.send_buffer {
            sockopt::set_socket_send_buffer_size(&socket, bytes as usize).context("setting SO_SNDBUF")?;
        }
        if let Some(name) = &self.congestion {
            sockopt::set_tcp_congestion(&socket, name)
                .with_context(|| format!("setting TCP_CONGESTION to {name}"))?;
        }
        sockopt::set_tcp_nodelay(&socket, true).context("setting TCP_NODELAY")
    }

    /// Sets what a listening socket is to have, so that its connections have it from their first packet on.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn prepare_receiver(&self, socket: impl AsFd) -> anyhow::Result<()> {
        match self.receive_buffer {
            Some(bytes) => {
                sockopt::set_socket_recv_buffer_size(&socket, bytes as usize).context("setting SO_RCVBUF")
            }
            None => Ok(()),
        }
    }
}

impl FromStr for Variant {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let mut variant = Self::default();
        for pair in text.split(',').filter(|pair| !pair.is_empty() && *pair != "plain") {
            let (key, value) = pair.split_once('=').with_context(|| format!("{pair:?} is not key=value"))?;
            let bytes = || match value.parse() {
                Ok(ByteSize(bytes)) if (1..=1 << 30).contains(&bytes) => Ok(bytes),
                _ => Err(anyhow::anyhow!("{pair}: a size up to 1GiB is needed")),
            };
            match (key, value) {
                ("batch", _) => variant.batch = value.parse().with_context(|| pair.to_owned())?,
                ("send-buffer", _) => variant.send_buffer = Some(bytes()?),
                ("receive-buffer", _) => variant.receive_buffer = Some(bytes()?),
                ("congestion", _) => variant.congestion = Some(value.to_owned()),
                ("write", "whole") => variant.write = Write::Whole,
                ("write", "vectored") => variant.write = Write::Vectored,
                ("receive", _) => variant.receive = bytes()?,
                ("wait-all", "yes") => variant.wait_all = true,
                ("wait-all", "no") => variant.wait_all = false,
                ("into", "touched") => variant.into = Into::Touched,
                ("into", "huge") => variant.into = Into::Huge,
                ("into", "fresh") => variant.into = Into::Fresh,
                ("into", "buffer") => variant.into = Into::Buffer,
                ("digests", "yes") => variant.digests = true,
                ("digests", "no") => variant.digests = false,
                _ => bail!(
                    "the bare loop does not know {pair}: there are batch=PAGES, send-buffer=SIZE, receive-buffer=SIZE, \
                     congestion=NAME, write=whole|vectored, receive=SIZE, wait-all=yes|no, digests=yes|no and \
                     into=touched|huge|fresh|buffer"
                ),
            }
        }
        ensure!((1..=1024).contains(&variant.batch), "a batch has 1 to 1024 pages, not {}", variant.batch);
        ensure!(variant.receive >= PAGE as u64, "the receiver asks for a page at least");
        Ok(variant)
    }
}

impl fmt::Display for Variant {
    /// Only what differs from the default; `plain` if nothing does. Can be parsed again.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let usual = Self::default();
        let size = |bytes: u64| match bytes {
            bytes if bytes % (1 << 20) == 0 => format!("{}MiB", bytes >> 20),
            bytes if bytes % (1 << 10) == 0 => format!("{}KiB", bytes >> 10),
            bytes => bytes.to_string(),
        };
        let mut words = Vec::new();
        if self.batch != usual.batch {
            words.push(format!("batch={}", self.batch));
        }
        words.extend(self.send_buffer.map(|bytes| format!("send-buffer={}", size(bytes))));
        words.extend(self.receive_buffer.map(|bytes| format!("receive-buffer={}", size(bytes))));
        words.extend(self.congestion.as_ref().map(|name| format!("congestion={name}")));
        if self.write == Write::Vectored {
            words.push("write=vectored".to_owned());
        }
        if self.receive != usual.receive {
            words.push(format!("receive={}", size(self.receive)));
        }
        if self.wait_all {
            words.push("wait-all=yes".to_owned());
        }
        match self.into {
            Into::Touched => {}
            Into::Huge => words.push("into=huge".to_owned()),
            Into::Fresh => words.push("into=fresh".to_owned()),
            Into::Buffer => words.push("into=buffer".to_owned()),
        }
        if self.digests {
            words.push("digests=yes".to_owned());
        }
        f.write_str(if words.is_empty() { "plain".to_owned() } else { words.join(",") }.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variant_is_what_its_text_says_and_only_what_differs_is_said() {
        for text in [
            "plain",
            "batch=16",
            "send-buffer=512KiB,receive-buffer=4MiB,congestion=reno",
            "batch=256,write=vectored,receive=1MiB,wait-all=yes,into=huge",
            "receive=5000,into=buffer",
            "into=huge,digests=yes",
        ] {
            let variant: Variant = text.parse().expect(text);
            assert_eq!(variant.to_string(), text);
        }
        let same: Variant = "batch=64,into=touched,wait-all=no,digests=no".parse().expect("defaults");
        assert_eq!(same, Variant::default());
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for text in
            ["batch", "batch=0", "batch=99999", "receive=1", "into=nowhere", "speed=9", "send-buffer=0"]
        {
            assert!(text.parse::<Variant>().is_err(), "{text}");
        }
    }
}
