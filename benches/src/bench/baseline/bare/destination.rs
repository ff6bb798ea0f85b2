//! The bare loop, destination side.

use super::variant::{Into, Variant};
use super::{part, processor_us};
use crate::sys::memory::PAGE;
use anyhow::{Context, ensure};
use clap::Args;
use memmap2::{Advice, MmapMut, MmapOptions};
use rustix::net::{RecvFlags, recv};
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::thread;

/// Options of the destination side.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Address to listen on
    #[arg(long)]
    listen: SocketAddr,
    /// Length of the memory
    #[arg(long)]
    bytes: u64,
    /// Connections, a thread each
    #[arg(long)]
    connections: u16,
    /// Sizes and socket options
    #[arg(long)]
    variant: Variant,
}

/// Receives the memory of one program, and prints the processor time that it took in microseconds.
///
/// # Errors
/// What failed, or bytes that did not come.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    ensure!(options.connections > 0, "at least one connection is needed");
    let mut memory = room(options)?;
    let listener =
        TcpListener::bind(options.listen).with_context(|| format!("listening on {}", options.listen))?;
    options.variant.prepare_receiver(&listener)?;
    println!("listening on {}", options.listen);
    let mut links = Vec::new();
    for _ in 0..options.connections {
        let (mut link, _) = listener.accept().context("waiting for a connection")?;
        link.write_all(&[0]).context("answering the sender")?;
        links.push(link);
    }
    let before = processor_us()?;
    thread::scope(|scope| {
        let mut rest = &mut memory[..];
        let mut receivers = Vec::new();
        for (index, link) in (0..options.connections).zip(links) {
            let (from, to) = part(options.bytes, options.connections, index);
            let length = (to - from) as usize;
            let own = match options.variant.into {
                Into::Buffer => options.variant.receive as usize,
                Into::Touched | Into::Huge | Into::Fresh => length,
            };
            let (mine, others) = std::mem::take(&mut rest).split_at_mut(own);
            rest = others;
            receivers.push(scope.spawn(move || receive(&options.variant, link, mine, length)));
        }
        for receiver in receivers {
            receiver.join().map_err(|_| anyhow::anyhow!("a receiver panicked"))??;
        }
        anyhow::Ok(())
    })?;
    println!("{}", processor_us()? - before);
    Ok(ExitCode::SUCCESS)
}

/// Memory for what arrives.
fn room(options: &Options) -> anyhow::Result<MmapMut> {
    let length = match options.variant.into {
        Into::Buffer => options.variant.receive * u64::from(options.connections),
        Into::Touched | Into::Huge | Into::Fresh => options.bytes,
    };
    let mut memory = MmapOptions::new().len(length as usize).map_anon().context("mapping the memory")?;
    let advice = if options.variant.into == Into::Huge { Advice::HugePage } else { Advice::NoHugePage };
    // A kernel without huge pages knows neither; all pages are small then.
    let _ = memory.advise(advice);
    if options.variant.into != Into::Fresh {
        memory.iter_mut().step_by(PAGE).for_each(|byte| *byte = 1);
    }
    Ok(memory)
}

/// Takes `length` bytes into `memory`, which is used again from its start when it is full, and sends the receipt.
fn receive(variant: &Variant, mut link: TcpStream, memory: &mut [u8], length: usize) -> anyhow::Result<()> {
    let flags = if variant.wait_all { RecvFlags::WAITALL } else { RecvFlags::empty() };
    // Up to where digests are made, of `memory`.
    let (mut done, mut at, mut known) = (0, 0, 0);
    while done < length {
        let want = (variant.receive as usize).min(length - done).min(memory.len() - at);
        let got = match recv(&link, &mut memory[at..at + want], flags) {
            Ok((got, _)) => got,
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(io::Error::from(error)).context("receiving"),
        };
        ensure!(got > 0, "the sender ended after {done} bytes of {length}");
        done += got;
        at += got;
        if variant.digests {
            let whole = at / PAGE * PAGE;
            super::digest_pages(&memory[known..whole]);
            known = whole;
        }
        if at == memory.len() {
            (at, known) = (0, 0);
        }
    }
    link.write_all(&[0]).context("sending the receipt")
}
