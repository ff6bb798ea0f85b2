//! Frames that are long lists: the pages that the engine owns in the end, those that it owes, and digests of many pages.

use crate::error::{DecodeError, EncodeError};
use crate::frame::{self, Fields, FrameKind, Sequencer, limit};
use crate::limits::{MAX_DIGESTS_PER_FRAME, MAX_RUNS_PER_FRAME};
use crate::page::{PageDigest, PageNo, PageRun, SpaceId, check_runs};

/// Pages of a space that the engine carries, and that are not in CRIU's images.
///
/// `space u32 | more u32 (0 or 1) | runs u32 | runs x { first page u64, pages u64 }`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnedBatch {
    /// The space.
    pub space: SpaceId,
    /// The runs, ascending; they go on where the frame before has ended.
    pub runs: Vec<PageRun>,
    /// Whether another frame of this space follows.
    pub more: bool,
}

impl OwnedBatch {
    /// Appends the next frame of a direction to `out`.
    ///
    /// # Errors
    /// Too many runs, or runs that are out of order: a bug of the caller.
    pub fn encode(&self, at: &mut Sequencer, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        self.space.check_of_source()?;
        frame::encode(FrameKind::Owned, 0, at, out, |out| {
            put_start(out, self.space, self.more);
            put_runs(out, &self.runs)
        })
    }

    /// Reads a head.
    ///
    /// # Errors
    /// Any head that [`OwnedBatch::encode`] would not have written.
    pub fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let mut fields = Fields::new(head);
        let (space, more) = get_start(&mut fields)?;
        space.check_of_source()?;
        let (runs, _) = get_runs(&mut fields)?;
        fields.end()?;
        Ok(Self { space, runs, more })
    }
}

/// Pages of a space that the engine carries and that come after the program runs. From the source in the seal; from the
/// destination when a post-copy is taken up again: those that have not come yet.
///
/// `space u32 | more u32 (0 or 1) | runs u32 | runs x { first page u64, pages u64 }`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwedBatch {
    /// The space.
    pub space: SpaceId,
    /// The runs, ascending; they go on where the frame before has ended.
    pub runs: Vec<PageRun>,
    /// Whether another frame of this space follows.
    pub more: bool,
}

impl OwedBatch {
    /// Appends the next frame of a direction to `out`.
    ///
    /// # Errors
    /// Too many runs, or runs that are out of order: a bug of the caller.
    pub fn encode(&self, at: &mut Sequencer, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        self.space.check_of_source()?;
        frame::encode(FrameKind::Owed, 0, at, out, |out| {
            put_start(out, self.space, self.more);
            put_runs(out, &self.runs)
        })
    }

    /// Reads a head.
    ///
    /// # Errors
    /// Any head that [`OwedBatch::encode`] would not have written.
    pub fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let OwnedBatch { space, runs, more } = OwnedBatch::decode(head)?;
        Ok(Self { space, runs, more })
    }
}

/// What many pages look like: those of the frozen source, for the verification; or, from the destination, those of a
/// store that it kept ([`SpaceId::KEPT`]).
///
/// `space u32 | more u32 (0 or 1) | runs u32 | runs x { first page u64, pages u64 } | 16 bytes for each page`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DigestBatch {
    /// The space.
    pub space: SpaceId,
    /// The pages.
    pub runs: Vec<PageRun>,
    /// A digest for each, in order.
    pub digests: Vec<PageDigest>,
    /// Whether another frame follows, of this space or of another.
    pub more: bool,
}

impl DigestBatch {
    /// Appends the next frame of a direction to `out`.
    ///
    /// # Errors
    /// Lists that are too long or do not fit each other: a bug of the caller.
    pub fn encode(&self, at: &mut Sequencer, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        limit("a frame's digests", self.digests.len(), MAX_DIGESTS_PER_FRAME)?;
        if check_runs(&self.runs)? != self.digests.len() as u64 {
            return Err(DecodeError::Invalid("runs that do not add up to the number of digests").into());
        }
        check_end(self.space, &self.runs)?;
        frame::encode(FrameKind::Digests, 0, at, out, |out| {
            put_start(out, self.space, self.more);
            put_runs(out, &self.runs)?;
            for digest in &self.digests {
                out.extend_from_slice(&digest.0);
            }
            Ok(())
        })
    }

    /// Reads a head.
    ///
    /// # Errors
    /// Any head that [`DigestBatch::encode`] would not have written.
    pub fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let mut fields = Fields::new(head);
        let (space, more) = get_start(&mut fields)?;
        let (runs, pages) = get_runs(&mut fields)?;
        check_end(space, &runs)?;
        limit("a frame's digests", usize::try_from(pages).unwrap_or(usize::MAX), MAX_DIGESTS_PER_FRAME)?;
        let bytes = fields.bytes(pages as usize * 16)?;
        fields.end()?;
        let digests =
            bytes.chunks_exact(16).map(|b| PageDigest(b.try_into().expect("sixteen bytes"))).collect();
        Ok(Self { space, runs, digests, more })
    }
}

/// A kept store ends sooner than an address space.
fn check_end(space: SpaceId, runs: &[PageRun]) -> Result<(), DecodeError> {
    match runs.last() {
        Some(last) if last.end() > space.end() => {
            Err(DecodeError::Invalid("digests of pages beyond the end of their space"))
        }
        _ => Ok(()),
    }
}

fn put_start(out: &mut Vec<u8>, space: SpaceId, more: bool) {
    out.extend_from_slice(&space.0.to_le_bytes());
    out.extend_from_slice(&u32::from(more).to_le_bytes());
}

fn get_start(fields: &mut Fields<'_>) -> Result<(SpaceId, bool), DecodeError> {
    let space = SpaceId(fields.u32()?);
    match fields.u32()? {
        0 => Ok((space, false)),
        1 => Ok((space, true)),
        _ => Err(DecodeError::Invalid("a mark that is neither 0 nor 1")),
    }
}

fn put_runs(out: &mut Vec<u8>, runs: &[PageRun]) -> Result<(), EncodeError> {
    limit("a frame's runs", runs.len(), MAX_RUNS_PER_FRAME)?;
    check_runs(runs)?;
    out.extend_from_slice(&(runs.len() as u32).to_le_bytes());
    for run in runs {
        out.extend_from_slice(&run.start.0.to_le_bytes());
        out.extend_from_slice(&run.len.to_le_bytes());
    }
    Ok(())
}

fn get_runs(fields: &mut Fields<'_>) -> Result<(Vec<PageRun>, u64), DecodeError> {
    let count = fields.u32()? as usize;
    limit("a frame's runs", count, MAX_RUNS_PER_FRAME)?;
    let mut bytes = Fields::new(fields.bytes(count * 16)?);
    let mut runs = Vec::with_capacity(count);
    for _ in 0..count {
        runs.push(PageRun { start: PageNo(bytes.u64()?), len: bytes.u64()? });
    }
    let pages = check_runs(&runs)?;
    Ok((runs, pages))
}
