//! Pages of a space.
//!
//! ```text
//! space u32 | round u32 | coding u16 | 0 u16 | runs u32 | pages u32
//! runs    x { first page u64, pages u32 }
//! bitmap    ceil(pages / 8) bytes: bit set = the page is all zeros and has no bytes in the payload
//! digests   16 bytes for each page that is not zero, in order
//! bases     with codings 2 and 4: 16 bytes for each page that is not zero, in order
//! sources x { space u32, page u64 } with coding 3: one for each page, in order
//! ```
//! The payload is the bytes of the pages that are not zero, in order: as they are, as one zstd frame, or on top of the
//! bytes that were sent of each page before, as one delta each ([`crate::delta`]) or one zstd frame with these as its
//! prefix. The base is the digest of those: a receiver that has others must not use them. Copies have no payload:
//! the receiver has the same bytes elsewhere, and takes them only if they have the digest.

use crate::delta;
use crate::digest;
use crate::error::{DecodeError, EncodeError};
use crate::frame::{self, Fields, FrameKind, Sequencer, limit};
use crate::limits::{MAX_BATCH_PAGES, PAGE_SIZE};
use crate::page::{PageDigest, PageNo, PageRef, PageRun, SpaceId, check_runs};

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
    /// No payload: the receiver has the same bytes in another page. No zero pages.
    Copy = 3,
    /// One zstd frame whose prefix is what the receiver has of each page, in order. No zero pages.
    ZstdOnBase = 4,
}

impl Coding {
    const ALL: [Self; 5] = [Self::Raw, Self::Zstd, Self::Delta, Self::Copy, Self::ZstdOnBase];

    /// Whether each page names what it is on top of.
    fn has_bases(self) -> bool {
        matches!(self, Self::Delta | Self::ZstdOnBase)
    }
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
    /// On bases: what each page that is not zero was before.
    bases: Vec<PageDigest>,
    /// With copies: where each page is.
    sources: Vec<PageRef>,
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
        self.sources.clear();
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

    /// Adds a page that is not zero, on top of what has the digest `base`. For [`Coding::Delta`] and
    /// [`Coding::ZstdOnBase`] only.
    pub fn push_on_base(&mut self, page: PageNo, content: PageDigest, base: PageDigest) {
        self.push(page, false, content);
        self.bases.push(base);
    }

    /// Adds a page that is not zero and whose bytes the receiver has at `from`. For [`Coding::Copy`] only.
    pub fn push_copy(&mut self, page: PageNo, content: PageDigest, from: PageRef) {
        self.push(page, false, content);
        self.sources.push(from);
    }

    /// On bases the digests of the bases of the pages that are not zero, in order; else nothing.
    pub fn bases(&self) -> &[PageDigest] {
        &self.bases
    }

    /// With copies where the receiver has each page, in order; else nothing.
    pub fn sources(&self) -> &[PageRef] {
        &self.sources
    }

    /// Says how the payload is coded. Bases are forgotten where the coding has none.
    pub fn set_coding(&mut self, coding: Coding) {
        if !matches!(coding, Coding::Delta | Coding::ZstdOnBase) {
            self.bases.clear();
        }
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

    /// Appends the next frame of a direction to `out`, without its payload of `payload_len` bytes.
    ///
    /// # Errors
    /// A batch that breaks a rule of the protocol: a bug of the caller.
    pub fn encode(
        &self,
        payload_len: usize,
        at: &mut Sequencer,
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        self.validate(payload_len)?;
        frame::encode(FrameKind::PageBatch, payload_len, at, out, |out| {
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
            for source in &self.sources {
                out.extend_from_slice(&source.space.0.to_le_bytes());
                out.extend_from_slice(&source.page.0.to_le_bytes());
            }
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
        let number = fields.u16()?;
        let coding = Coding::ALL.into_iter().find(|coding| *coding as u16 == number);
        let coding = coding.ok_or(DecodeError::Invalid("an unknown coding"))?;
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
        if coding.has_bases() {
            for _ in 0..self.stored {
                self.bases.push(PageDigest(fields.bytes(16)?.try_into().expect("sixteen bytes")));
            }
        }
        if coding == Coding::Copy {
            for _ in 0..self.stored {
                self.sources.push(PageRef { space: SpaceId(fields.u32()?), page: PageNo(fields.u64()?) });
            }
        }
        fields.end()
    }

    fn validate(&self, payload_len: usize) -> Result<(), DecodeError> {
        let invalid = |what| Err(DecodeError::Invalid(what));
        self.space.check_of_source()?;
        limit("a batch's pages", self.zero.len(), MAX_BATCH_PAGES)?;
        if self.zero.is_empty() {
            return invalid("a batch without pages");
        }
        if check_runs(&self.runs)? != self.zero.len() as u64 {
            return invalid("runs that do not add up to the number of pages");
        }
        let counted = |yes: bool| if yes { self.stored } else { 0 };
        if self.bases.len() != counted(self.coding.has_bases()) {
            return invalid("bases that are not one for each page on top of one");
        }
        if self.sources.len() != counted(self.coding == Coding::Copy) {
            return invalid("sources that are not one for each copy");
        }
        self.sources.iter().try_for_each(PageRef::validate)?;
        if matches!(self.coding, Coding::Copy | Coding::ZstdOnBase) && self.stored != self.zero.len() {
            return invalid("zero pages in a coding that has none");
        }
        let raw = self.stored * PAGE_SIZE;
        match self.coding {
            Coding::Raw if payload_len != raw => invalid("a payload that is not as long as its pages"),
            Coding::Zstd if raw == 0 => invalid("compressed nothing"),
            Coding::Zstd | Coding::ZstdOnBase if payload_len == 0 || payload_len > raw => {
                invalid("a compressed payload that is longer than its pages, or empty")
            }
            Coding::Delta if raw == 0 => invalid("deltas of nothing"),
            Coding::Delta if payload_len < self.stored * delta::MIN_DELTA_BYTES || payload_len > raw => {
                invalid("deltas that are longer than their pages, or too short")
            }
            Coding::Copy if payload_len != 0 => invalid("copies with a payload"),
            _ => Ok(()),
        }
    }
}
