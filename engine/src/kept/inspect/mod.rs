//! Reads a kept stream to the end, and finds the first thing in it that is wrong.
//!
//! An independent reader: it makes every page with its bytes (deltas, compressed ones and copies too), by code of its own on
//! top of the wire format. It needs as much memory as the program had.

mod rebuilt;

use super::chain;
use super::checkpoints::stream_of;
use super::error::{Damage, KeptError};
use super::frames::{Frames, StreamFile};
use super::store::KeptPages;
use pageferry_wire_format::{Coding, ControlMessage, Head, PAGE_SIZE, ZstdDecoder, digest};
use rebuilt::Rebuilt;
use serde::Serialize;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// What a stream consists of. Sizes are bytes of the stream, heads of frames included; pages 4 KiB.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Inspection {
    /// Identity of the session, hexadecimal.
    pub session: String,
    /// Version of the engine that sent it.
    pub engine: String,
    /// Name of the program.
    pub program: String,
    /// Whether it has the digests for a comparison after each restore.
    pub verify: bool,
    /// Frames that were read, all of them valid.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
    /// By what is in a frame: `pages`, `images`, `control`, `digests`, `owned`.
    pub kinds: Vec<Share>,
    /// Pages by coding.
    pub codings: Vec<Share>,
    /// Pages by round; the last one is that of the freeze.
    pub rounds: Vec<Round>,
    /// Address spaces, as they were in the end.
    pub spaces: Vec<SpaceReport>,
    /// Bytes for pages of processes that ended before the freeze.
    pub ended_bytes: u64,
    /// CRIU's images by name.
    pub images: Vec<Share>,
    /// The first thing that is wrong, with its frame and its place; `None`: all of it is right, to the commit.
    pub fault: Option<String>,
}

/// A part of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Share {
    /// What it is.
    pub name: String,
    /// Frames, or pages where pages are counted, or pieces of an image.
    pub count: u64,
    /// Bytes.
    pub bytes: u64,
}

/// A round.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Round {
    /// From 0.
    pub round: u32,
    /// Pages with content.
    pub pages: u64,
    /// Pages of zeros.
    pub zero_pages: u64,
    /// Bytes.
    pub bytes: u64,
}

/// An address space.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SpaceReport {
    /// Its number in the stream.
    pub space: u32,
    /// Pid in the innermost namespace.
    pub vpid: i32,
    /// Name of the process.
    pub name: String,
    /// Pages in the end.
    pub pages: u64,
    /// Those of them that are zeros.
    pub zero_pages: u64,
    /// Bytes that all of them cost, over all rounds.
    pub bytes: u64,
    /// Bytes for pages that it did not have any more in the end.
    pub gone_bytes: u64,
    /// Its mappings that have pages here.
    pub regions: Vec<RegionReport>,
}

/// A mapping.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RegionReport {
    /// First byte.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// Pages.
    pub pages: u64,
    /// Those of them that are zeros.
    pub zero_pages: u64,
    /// Bytes that they cost.
    pub bytes: u64,
}

/// Reads the stream at `path`, or the last one of a directory of checkpoints.
///
/// # Errors
/// When there is nothing to read. Whatever is wrong with a stream is in [`Inspection::fault`], beside what was read up to there.
pub fn inspect(path: &Path) -> Result<Inspection, KeptError> {
    let stream = stream_of(path)?;
    let base = chain::pages_below(&stream)?;
    let mut reader = Reader::new(StreamFile::open(&stream)?, base);
    let outcome = reader.read();
    let mut inspection = reader.sum_up();
    inspection.fault = outcome.err().map(|error| error.chain());
    Ok(inspection)
}

/// Hands over all pages of a stream on top of `base` that are not zeros, when the stream was read to its end and all of it is right.
pub(super) fn rebuild(
    stream: &Path,
    base: Arc<KeptPages>,
    take: impl FnMut(&[u8; PAGE_SIZE]) -> io::Result<()>,
) -> Result<io::Result<()>, KeptError> {
    let mut reader = Reader::new(StreamFile::open(stream)?, base);
    reader.read()?;
    Ok(reader.rebuilt.contents().try_for_each(take))
}

/// The parts of a stream in which everything has to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Beginning,
    Rounds,
    Images,
    Digests,
}

struct Reader {
    frames: Frames<StreamFile>,
    rebuilt: Rebuilt,
    stage: Stage,
    inspection: Inspection,
    kinds: BTreeMap<&'static str, (u64, u64)>,
    codings: BTreeMap<&'static str, (u64, u64)>,
    rounds: BTreeMap<u32, Round>,
    images: BTreeMap<String, (u64, u64, u64)>,
    /// For packed pieces of images, and what comes out.
    unpacker: Option<ZstdDecoder>,
    room: Vec<u8>,
}

impl Reader {
    fn new(file: StreamFile, base: Arc<KeptPages>) -> Self {
        Self {
            frames: Frames::new(file),
            rebuilt: Rebuilt::on(base),
            stage: Stage::Beginning,
            inspection: Inspection::default(),
            kinds: BTreeMap::new(),
            codings: BTreeMap::new(),
            rounds: BTreeMap::new(),
            images: BTreeMap::new(),
            unpacker: None,
            room: Vec::new(),
        }
    }

    fn read(&mut self) -> Result<(), KeptError> {
        loop {
            let Some(head) = self.frames.next()? else {
                let spot = self.frames.spot();
                return Err(match spot.frame {
                    0 => KeptError::Empty,
                    frame => KeptError::Unfinished { frame, end: spot.offset },
                });
            };
            let bytes = (self.frames.head().len() + self.frames.payload().len()) as u64;
            let taken = self.take(&head, bytes);
            taken.map_err(|source| KeptError::Damaged { spot: self.frames.spot(), source })?;
            self.inspection.frames += 1;
            self.inspection.bytes += bytes;
            let kind = self.kinds.entry(kind_of(&head)).or_default();
            *kind = (kind.0 + 1, kind.1 + bytes);
            if matches!(head, Head::Control(ControlMessage::Commit)) {
                break;
            }
        }
        match self.frames.next_head() {
            Ok(None) => Ok(()),
            _ => Err(KeptError::Trailing(self.frames.spot().offset)),
        }
    }

    fn take(&mut self, head: &Head, bytes: u64) -> Result<(), Damage> {
        match (self.stage, head) {
            (Stage::Beginning, Head::Control(ControlMessage::Hello(hello))) => {
                let inspection = &mut self.inspection;
                inspection.session = format!("{:032x}", hello.session);
                inspection.engine.clone_from(&hello.engine);
                inspection.program.clone_from(&hello.program);
                inspection.verify = hello.verify;
                self.stage = Stage::Rounds;
                Ok(())
            }
            (Stage::Beginning, _) => Err(Damage::Order("a stream begins with something else")),
            (Stage::Rounds, Head::Pages { .. }) => self.pages(bytes),
            (Stage::Rounds, Head::Owned(batch)) => self.rebuilt.own(batch),
            (Stage::Images, Head::Image { chunk, .. }) => {
                let Self { frames, unpacker, room, .. } = self;
                let failed =
                    |source| Damage::UnpackImage { name: chunk.name.clone(), offset: chunk.offset, source };
                let unpacker = match unpacker {
                    Some(unpacker) => unpacker,
                    none => none.insert(ZstdDecoder::new().map_err(failed)?),
                };
                let piece = chunk.piece(frames.payload(), unpacker, room).map_err(failed)?;
                if digest::page(piece) != chunk.digest {
                    return Err(Damage::Image { name: chunk.name.clone(), offset: chunk.offset });
                }
                let (pieces, size, cost) = self.images.entry(chunk.name.clone()).or_default();
                if *size != chunk.offset {
                    return Err(Damage::Order("a piece of an image at the wrong place"));
                }
                (*pieces, *size, *cost) = (*pieces + 1, *size + piece.len() as u64, *cost + bytes);
                Ok(())
            }
            (Stage::Digests, Head::Digests(_)) if self.inspection.verify => Ok(()),
            (stage, Head::Control(message)) => self.control(stage, message),
            _ => Err(Damage::Order("a frame at the wrong time")),
        }
    }

    fn pages(&mut self, bytes: u64) -> Result<(), Damage> {
        let batch = self.frames.batch();
        self.rebuilt.pages(batch, self.frames.payload(), bytes)?;
        let zero = (batch.len() - batch.nonzero()) as u64;
        let round = self.rounds.entry(batch.round()).or_default();
        round.pages += batch.nonzero() as u64;
        round.zero_pages += zero;
        round.bytes += bytes;
        let coding = self.codings.entry(name_of(batch.coding())).or_default();
        *coding = (coding.0 + batch.nonzero() as u64, coding.1 + bytes);
        if zero > 0 {
            self.codings.entry("zero").or_default().0 += zero;
        }
        Ok(())
    }

    fn control(&mut self, stage: Stage, message: &ControlMessage) -> Result<(), Damage> {
        match (stage, message) {
            (_, ControlMessage::Ping { .. }) => Ok(()),
            (Stage::Rounds, ControlMessage::Spaces { spaces, .. }) => {
                spaces.iter().try_for_each(|info| self.rebuilt.announce(info.space, info.vpid, &info.name))
            }
            (Stage::Rounds, ControlMessage::SpaceGone { space }) => self.rebuilt.end(*space),
            (Stage::Rounds, ControlMessage::Discard { space, runs }) => self.rebuilt.discard(*space, runs),
            (Stage::Rounds, ControlMessage::RoundEnd { .. }) => self.rebuilt.end_round(),
            (Stage::Rounds, ControlMessage::SpaceSeal { space, vpid, pages, digest, regions }) => {
                self.rebuilt.seal(*space, *vpid, *pages, digest, regions)
            }
            (Stage::Rounds, ControlMessage::SealEnd { spaces }) => {
                if self.rebuilt.end_seal(*spaces)? {
                    self.stage = Stage::Images;
                }
                Ok(())
            }
            (Stage::Images, ControlMessage::ImagesEnd { files, bytes }) => {
                let size: u64 = self.images.values().map(|(_, size, _)| size).sum();
                if self.images.len() != *files as usize || size != *bytes {
                    return Err(Damage::Order("not all images are there"));
                }
                self.stage = Stage::Digests;
                Ok(())
            }
            (Stage::Digests, ControlMessage::Commit) => Ok(()),
            (_, ControlMessage::Abort { .. }) => Err(Damage::Order("the source gave up here")),
            _ => Err(Damage::Order("a message at the wrong time")),
        }
    }

    fn sum_up(self) -> Inspection {
        let share =
            |(name, (count, bytes)): (&str, (u64, u64))| Share { name: name.to_owned(), count, bytes };
        let mut inspection = self.inspection;
        inspection.kinds = self.kinds.into_iter().map(share).collect();
        inspection.codings = self.codings.into_iter().map(share).collect();
        inspection.rounds = self.rounds.into_iter().map(|(round, row)| Round { round, ..row }).collect();
        inspection.ended_bytes = self.rebuilt.ended;
        inspection.spaces = self.rebuilt.spaces.iter().map(|(id, space)| space_of(id.0, space)).collect();
        let image = |(name, (count, _, bytes))| Share { name, count, bytes };
        inspection.images = self.images.into_iter().map(image).collect();
        inspection
    }
}

fn space_of(number: u32, space: &rebuilt::Space) -> SpaceReport {
    let (pages, zero_pages, bytes) = space.part(0..u64::MAX);
    let region = |start: u64, end: u64| {
        let (pages, zero_pages, bytes) = space.part(start / 4096..end / 4096);
        RegionReport { start, end, pages, zero_pages, bytes }
    };
    SpaceReport {
        space: number,
        vpid: space.vpid,
        name: space.name.clone(),
        pages,
        zero_pages,
        bytes,
        gone_bytes: space.gone,
        regions: space
            .regions
            .iter()
            .map(|info| region(info.start, info.end))
            .filter(|region| region.pages > 0)
            .collect(),
    }
}

fn kind_of(head: &Head) -> &'static str {
    match head {
        Head::Pages { .. } => "pages",
        Head::Image { .. } => "images",
        Head::Digests(_) => "digests",
        Head::Owned(_) => "owned",
        Head::Owed(_) => "owed",
        Head::Control(_) => "control",
    }
}

fn name_of(coding: Coding) -> &'static str {
    match coding {
        Coding::Raw => "raw",
        Coding::Zstd => "zstd",
        Coding::Delta => "delta",
        Coding::Copy => "copy",
        Coding::ZstdOnBase => "zstd on base",
    }
}
