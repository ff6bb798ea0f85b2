//! The bare loop, source side.

use super::variant::{Variant, Write as How};
use super::{Copied, part, processor_us};
use crate::sys::memory::PAGE;
use anyhow::{Context, ensure};
use clap::Args;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::sync::Barrier;
use std::thread;
use std::time::Instant;

/// Options of the source side.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Process to read
    #[arg(long)]
    pid: i32,
    /// Where its memory begins
    #[arg(long)]
    start: u64,
    /// Length of its memory
    #[arg(long)]
    bytes: u64,
    /// Where the other side listens
    #[arg(long)]
    to: SocketAddr,
    /// Connections, a thread each
    #[arg(long)]
    connections: u16,
    /// Sizes and socket options
    #[arg(long)]
    variant: Variant,
}

/// Sends the memory and prints the time as JSON.
///
/// # Errors
/// What failed.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    ensure!(options.connections > 0, "at least one connection is needed");
    let mut links = Vec::new();
    for _ in 0..options.connections {
        let mut link =
            TcpStream::connect(options.to).with_context(|| format!("connecting to {}", options.to))?;
        options.variant.prepare_sender(&link)?;
        // The other side takes the next connection only after this one: the order says which part is whose.
        link.read_exact(&mut [0]).context("waiting for the other side")?;
        links.push(link);
    }
    let start = Barrier::new(links.len() + 1);
    let before = processor_us()?;
    let (copied, duration) = thread::scope(|scope| {
        let senders: Vec<_> = (0..options.connections)
            .zip(links)
            .map(|(index, link)| {
                let start = &start;
                scope.spawn(move || {
                    // Touched, so that the first batch costs what the others do.
                    let mut buffer = vec![1; options.variant.batch * PAGE];
                    start.wait();
                    send(options, part(options.bytes, options.connections, index), link, &mut buffer)
                })
            })
            .collect();
        start.wait();
        let started = Instant::now();
        let mut copied = 0;
        for sender in senders {
            copied += sender.join().map_err(|_| anyhow::anyhow!("a sender panicked"))??;
        }
        anyhow::Ok((copied, started.elapsed()))
    })?;
    let copied = Copied {
        bytes: copied,
        duration_us: duration.as_micros() as u64,
        processor_us: processor_us()? - before,
    };
    println!("{}", serde_json::to_string(&copied)?);
    Ok(ExitCode::SUCCESS)
}

/// Sends a part of the memory, and waits for the receipt.
fn send(
    options: &Options,
    (from, to): (u64, u64),
    mut link: TcpStream,
    buffer: &mut [u8],
) -> anyhow::Result<u64> {
    let pid = Pid::from_raw(options.pid);
    let mut at = from;
    while at < to {
        let want = buffer.len().min((to - at) as usize);
        let remote = [RemoteIoVec { base: (options.start + at) as usize, len: want }];
        let got = process_vm_readv(pid, &mut [IoSliceMut::new(&mut buffer[..want])], &remote)
            .with_context(|| format!("reading the memory of {pid}"))?;
        if options.variant.digests {
            super::digest_pages(&buffer[..got]);
        }
        match options.variant.write {
            How::Whole => link.write_all(&buffer[..got]),
            How::Vectored => write_pages(&mut link, &buffer[..got]),
        }
        .context("sending")?;
        at += got as u64;
    }
    link.read_exact(&mut [0]).context("waiting for the receipt")?;
    Ok(to - from)
}

/// Writes all, a piece for each page.
fn write_pages(link: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
    let mut pieces: Vec<IoSlice<'_>> = bytes.chunks(PAGE).map(IoSlice::new).collect();
    let mut rest = &mut pieces[..];
    while !rest.is_empty() {
        match link.write_vectored(rest)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            sent => IoSlice::advance_slices(&mut rest, sent),
        }
    }
    Ok(())
}
