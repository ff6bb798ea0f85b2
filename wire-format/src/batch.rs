//! Pages of a space.
//!
//! ```text
//! space u32 | round u32 | coding u16 | 0 u16 | runs u32 | pages u32
//! runs   x { first page u64, pages u32 }
//! bitmap   ceil(pages / 8) bytes: bit set = the page is all zeros and has no bytes in the payload
//! digests  16 bytes for each page that is not zero, in order
//! bases    with coding 2: 16 bytes for each page that is not zero, in order
//! ```
//! The payload is the bytes of the pages that are not zero, in order: as they are, as one zstd frame, or as one
//! delta each ([`crate::delta`]) on top of the bytes that were sent of that page before. The base is the digest of those:
//! a receiver that has others must not apply the delta.

use crate::delta;
use crate::digest;
use crate::error::{DecodeError, EncodeError};
use crate::frame::{self, Fields, FrameKind, limit};
use crate::limits::{MAX_BATCH_PAGES, PAGE_SIZE};
use crate::page::{PageDigest, PageNo, PageRun, SpaceId, check_runs};

/// How the payload of a batch is coded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u16)]
pub enum Coding {
    /// As it is.
    #[default]
    Raw = 0,
    /// One zstd frame.
    Zstd = 1,
    /// A delta for each page, on top of what the receiver has of it.
    Delta = 2,
}

/// The head of a batch of pages. Reused for every batch: it keeps its memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageBatch {
    space: SpaceId,
    round: u32,
    coding: Coding,
    runs: Vec<PageRun>,
    zero: Vec<bool>,
    digests: Vec<PageDigest>,
    /// With deltas: what each page that is not zero was before.
    bases: Vec<PageDigest>,
    stored: usize,
}

impl PageBatch {
    /// Begins anew.
    pub fn clear(&mut self, space: SpaceId, round: u32, coding: Coding) {
        self.space = space;
        self.round = round;
        self.coding = coding;
        self.runs.clear();
        self.zero.clear();
        self.digests.clear();
        self.bases.clear();
        self.stored = 0;
    }

    /// Adds a page, which has to be behind all that were added before.
    pub fn push(&mut self, page: PageNo, zero: bool, content: PageDigest) {
        match self.runs.last_mut() {
            Some(run) if run.end() == page.0 => run.len += 1,
            _ => self.runs.push(PageRun { start: page, len: 1 }),
        }
        self.zero.push(zero);
        self.digests.push(if zero { digest::ZERO_PAGE } else { content });
        self.stored += usize::from(!zero);
    }

    /// Adds a page that is not zero, as a delta on top of what has the digest `base`. For batches of deltas only.
    pub fn push_delta(&mut self, page: PageNo, content: PageDigest, base: PageDigest) {
        self.push(page, false, content);
        self.bases.push(base);
    }

    /// In a batch of deltas the digests of the bases of its pages that are not zero, in order; else nothing.
    pub fn bases(&self) -> &[PageDigest] {
        &self.bases
    }

    /// Says how the payload is coded.
    pub fn set_coding(&mut self, coding: Coding) {
        self.coding = coding;
    }

    /// The space.
    pub fn space(&self) -> SpaceId {
        self.space
    }

    /// The round.
    pub fn round(&self) -> u32 {
        self.round
    }

    /// How the payload is coded.
    pub fn coding(&self) -> Coding {
        self.coding
    }

    /// The pages, as runs.
    pub fn runs(&self) -> &[PageRun] {
        &self.runs
    }

    /// Number of pages.
    pub fn len(&self) -> usize {
        self.zero.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.zero.is_empty()
    }

    /// Number of pages that have bytes in the payload.
    pub fn nonzero(&self) -> usize {
        self.stored
    }

    /// Every page in order: its number, whether it is zero, and its digest.
    pub fn pages(&self) -> impl Iterator<Item = (PageNo, bool, &PageDigest)> {
        let numbers = self.runs.iter().flat_map(PageRun::pages).map(PageNo);
        numbers.zip(&self.zero).zip(&self.digests).map(|((page, zero), digest)| (page, *zero, digest))
    }

    /// Appends the frame to `out`, without its payload of `payload_len` bytes.
    ///
    /// # Errors
    /// A batch that breaks a rule of the protocol: a bug of the caller.
    pub fn encode(&self, payload_len: usize, sequence: u64, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        self.validate(payload_len)?;
        frame::encode(FrameKind::PageBatch, payload_len, sequence, out, |out| {
            out.extend_from_slice(&self.space.0.to_le_bytes());
            out.extend_from_slice(&self.round.to_le_bytes());
            out.extend_from_slice(&(self.coding as u16).to_le_bytes());
            out.extend_from_slice(&[0; 2]);
            out.extend_from_slice(&(self.runs.len() as u32).to_le_bytes());
            out.extend_from_slice(&(self.zero.len() as u32).to_le_bytes());
            for run in &self.runs {
                out.extend_from_slice(&run.start.0.to_le_bytes());
                out.extend_from_slice(&(run.len as u32).to_le_bytes());
            }
            let bitmap = out.len();
            out.resize(bitmap + self.zero.len().div_ceil(8), 0);
            for (index, zero) in self.zero.iter().enumerate() {
                out[bitmap + index / 8] |= u8::from(*zero) << (index % 8);
            }
            for (zero, digest) in self.zero.iter().zip(&self.digests) {
                if !zero {
                    out.extend_from_slice(&digest.0);
                }
            }
            self.bases.iter().for_each(|base| out.extend_from_slice(&base.0));
            Ok(())
        })
    }

    /// Reads a head into this batch.
    ///
    /// # Errors
    /// Any head that [`PageBatch::encode`] would not have written; the batch is empty then.
    pub fn decode_into(&mut self, head: &[u8], payload_len: usize) -> Result<(), DecodeError> {
        let read = self.read(head).and_then(|()| self.validate(payload_len));
        if read.is_err() {
            self.clear(SpaceId(0), 0, Coding::Raw);
        }
        read
    }

    fn read(&mut self, head: &[u8]) -> Result<(), DecodeError> {
        let mut fields = Fields::new(head);
        let (space, round) = (SpaceId(fields.u32()?), fields.u32()?);
        let coding = match fields.u16()? {
            0 => Coding::Raw,
            1 => Coding::Zstd,
            2 => Coding::Delta,
            _ => return Err(DecodeError::Invalid("an unknown coding")),
        };
        if fields.u16()? != 0 {
            return Err(DecodeError::Invalid("a reserved field that is not zero"));
        }
        self.clear(space, round, coding);
        let (runs, pages) = (fields.u32()? as usize, fields.u32()? as usize);
        limit("a batch's runs", runs, MAX_BATCH_PAGES)?;
        limit("a batch's pages", pages, MAX_BATCH_PAGES)?;
        for _ in 0..runs {
            let run = PageRun { start: PageNo(fields.u64()?), len: u64::from(fields.u32()?) };
            self.runs.push(run);
        }
        let bitmap = fields.bytes(pages.div_ceil(8))?;
        if pages % 8 != 0 && bitmap[pages / 8] >> (pages % 8) != 0 {
            return Err(DecodeError::Invalid("marks for pages beyond the last"));
        }
        for index in 0..pages {
            let zero = bitmap[index / 8] >> (index % 8) & 1 == 1;
            self.zero.push(zero);
            self.stored += usize::from(!zero);
        }
        for zero in &self.zero {
            self.digests.push(match zero {
                true => digest::ZERO_PAGE,
                false => PageDigest(fields.bytes(16)?.try_into().expect("sixteen bytes")),
            });
        }
        if coding == Coding::Delta {
            for _ in 0..self.stored {
                self.bases.push(PageDigest(fields.bytes(16)?.try_into().expect("sixteen bytes")));
            }
        }
        fields.end()
    }

    fn validate(&self, payload_len: usize) -> Result<(), DecodeError> {
        limit("a batch's pages", self.zero.len(), MAX_BATCH_PAGES)?;
        if self.zero.is_empty() {
            return Err(DecodeError::Invalid("a batch without pages"));
        }
        if check_runs(&self.runs)? != self.zero.len() as u64 {
            return Err(DecodeError::Invalid("runs that do not add up to the number of pages"));
        }
        let raw = self.stored * PAGE_SIZE;
        let bases = if self.coding == Coding::Delta { self.stored } else { 0 };
        if self.bases.len() != bases {
            return Err(DecodeError::Invalid("bases that are not one for each delta"));
        }
        match self.coding {
            Coding::Raw if payload_len != raw => {
                Err(DecodeError::Invalid("a payload that is not as long as its pages"))
            }
            Coding::Zstd if raw == 0 => Err(DecodeError::Invalid("compressed nothing")),
            Coding::Zstd if payload_len == 0 || payload_len > raw => {
                Err(DecodeError::Invalid("a compressed payload that is longer than its pages, or empty"))
            }
            Coding::Delta if raw == 0 => Err(DecodeError::Invalid("deltas of nothing")),
            Coding::Delta if payload_len < self.stored * delta::MIN_DELTA_BYTES || payload_len > raw => {
                Err(DecodeError::Invalid("deltas that are longer than their pages, or too short"))
            }
            _ => Ok(()),
        }
    }
}
