//! CRIU's images on their way, while the program stands still.

use super::Migration;
use super::failure::SendError;
use crate::link::Channel;
use crate::plan::CodingChoice;
use crate::policy::images::{MUCH, PIECE, Pace, Packed, Packing};
use pageferry_wire_format::{ControlMessage, EncodeError, ImageChunk, ZstdEncoder, version::PACKED_IMAGES};
use std::io::Read;
use std::time::Instant;

/// The level: of pages of libraries the next two make less than a hundredth less.
const LEVEL: i32 = 1;

/// What is read of a file at a time. It is memory of the engine for the whole migration.
const READ: usize = 4 * PIECE;

/// Sends pieces of images, packed where that is quicker. It is made before the freeze, with all the memory that it uses, because a page
/// that a process touches for the first time takes the kernel longer than zstd takes for it.
pub(super) struct Packer {
    packing: Packing,
    zstd: Option<ZstdEncoder>,
    buffer: Vec<u8>,
    packed: Vec<u8>,
}

impl Packer {
    /// For a peer that speaks this version.
    pub(super) fn new(coding: CodingChoice, spoken: u16) -> Result<Self, EncodeError> {
        let packing = Packing::new(match coding {
            _ if spoken < PACKED_IMAGES => Packed::Never,
            CodingChoice::Raw => Packed::Never,
            CodingChoice::Zstd => Packed::Always,
            CodingChoice::Auto => Packed::WhereQuicker,
        });
        let buffer = vec![0xff; READ];
        let (mut zstd, mut packed) = (None, Vec::new());
        if packing.is_possible() {
            let mut encoder = ZstdEncoder::new()?;
            encoder.encode(LEVEL, &buffer[..PIECE], &mut packed)?;
            packed.resize(packed.capacity(), 0xff);
            zstd = Some(encoder);
        }
        Ok(Self { packing, zstd, buffer, packed })
    }

    /// Sends what a file consists of; says how much that was.
    fn send_file(
        &mut self,
        channel: &mut Channel,
        (name, len): (&str, u64),
        file: &mut impl Read,
        began: Instant,
    ) -> Result<u64, SendError> {
        let mut offset = 0u64;
        loop {
            let got = read_full(file, &mut self.buffer).map_err(SendError::Images)?;
            // An empty file travels as one empty chunk: its existence means something to CRIU.
            if got == 0 && (offset > 0 || len > 0) {
                break;
            }
            self.send(channel, name, offset, got, began)?;
            offset += got as u64;
            if got < self.buffer.len() {
                break;
            }
        }
        Ok(offset)
    }

    /// Sends the first bytes of the buffer, which belong at `offset`: each piece packed, or all that is left as it is.
    fn send(
        &mut self,
        channel: &mut Channel,
        name: &str,
        offset: u64,
        len: usize,
        began: Instant,
    ) -> Result<(), SendError> {
        let Self { packing, zstd, buffer, packed } = self;
        let Some(zstd) = zstd else { return send_plain(channel, name, offset, &buffer[..len]) };
        let mut at = 0;
        while at < len || len == 0 {
            let (place, piece) = (offset + at as u64, &buffer[at..len.min(at + PIECE)]);
            if !packing.choose(piece.len(), waiting(channel)) {
                // Large pieces take fewer calls.
                let piece = if packing.is_sure() { &buffer[at..len] } else { piece };
                packing.observe_plain(piece.len());
                look(packing, channel, began);
                send_plain(channel, name, place, piece)?;
                at += piece.len();
            } else {
                let start = Instant::now();
                zstd.encode(LEVEL, piece, packed)?;
                packing.observe(piece.len(), packed.len(), start.elapsed().as_secs_f64());
                look(packing, channel, began);
                match packed.len() < piece.len() {
                    true => drop(channel.image(&ImageChunk::packed(name, place, piece), packed)?),
                    false => send_plain(channel, name, place, piece)?,
                }
                at += piece.len();
            }
            if len == 0 {
                break;
            }
        }
        Ok(())
    }
}

/// Bytes that were sent and are not known to have arrived; none where the system does not say.
fn waiting(channel: &Channel) -> u64 {
    channel.link().left().map_or(0, |(_, unacknowledged)| unacknowledged)
}

/// Looks how far the link is with what was sent before.
fn look(packing: &mut Packing, channel: &Channel, began: Instant) {
    let waiting = waiting(channel);
    packing.look(began.elapsed().as_secs_f64(), channel.link().sent().saturating_sub(waiting), waiting);
}

fn send_plain(channel: &mut Channel, name: &str, offset: u64, piece: &[u8]) -> Result<(), SendError> {
    channel.image(&ImageChunk::new(name, offset, piece), piece)?;
    Ok(())
}

impl Migration<'_> {
    /// Ships CRIU's images.
    pub(super) fn send_images(&mut self) -> Result<(), SendError> {
        let sent = self.channel().link().sent();
        let pace = self.pace();
        tracing::debug!(?pace, "the images begin");
        let names = self.images.list().map_err(SendError::Images)?;
        let (mut files, mut bytes) = (0u32, 0u64);
        let began = Instant::now();
        let mut packer = self.packer.take().expect("made with the connections");
        packer.packing.begin(pace);
        for (name, len) in names {
            let mut file = self.images.open(&name).map_err(SendError::Images)?;
            bytes += packer.send_file(self.channel(), (&name, len), &mut file, began)?;
            files += 1;
        }
        self.control(&ControlMessage::ImagesEnd { files, bytes })?;
        self.report.image_bytes = self.channel().link().sent() - sent;
        self.report.image_file_bytes = bytes;
        Ok(())
    }

    /// What the rounds and the last pages have shown of the link. Each worker knows what its connection takes while the others send too.
    fn pace(&self) -> Pace {
        let rate: f64 = self.workers.iter().filter_map(|worker| worker.link()).map(|time| 1.0 / time).sum();
        // A limit is lifted in the freeze: what is behind it nobody has seen.
        let limited = self.control.limit().rate().is_some();
        if rate > 0.0 && !limited {
            return Pace::Seconds(1.0 / rate);
        }
        match self.sent_bytes() >= MUCH && !limited || !self.peer.is_receiver() {
            true => Pace::Quick,
            false => Pace::Unknown,
        }
    }
}

/// Reads until the buffer is full or the file ends.
fn read_full(file: &mut impl Read, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match file.read(&mut buffer[got..]) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(got)
}
