//! Pages of a space.
//!
//! ```text
//! space u32 | round u32 | coding u16 | 0 u16 | pages u32
//! runs    until these are all pages: { pages between it and the run before, its pages }, numbers of few bytes
//! bitmap  ceil(pages / 8) bytes: bit set = the page is all zeros and has no bytes in the payload
//! content 16 bytes for all pages that are not zero together, unless none is; with codings 2 and 4 for each of them
//! bases   16 bytes with codings 2 and 4
//! sources with codings 2, 3 and 4, until these are all pages that are not zero: { pages, space, distance }, numbers of
//!         few bytes
//! ```
//! The payload is the bytes of the pages that are not zero, in order: as they are, as one zstd frame, or on top of bytes
//! that the receiver has of some page, as one delta each ([`crate::delta`]) or one zstd frame with these as its
//! prefix. The digest of the bases is that of those: a receiver that has others must not use them. Copies have no payload:
//! the receiver has the same bytes elsewhere, and takes them only if they have the digest.

use crate::delta;
use crate::digest::Chain;
use crate::error::{DecodeError, EncodeError};
use crate::frame::{self, Fields, FrameKind, Sequencer, limit};
use crate::limits::{MAX_BATCH_PAGES, MAX_PAGE_NO, PAGE_SIZE};
use crate::page::{PageDigest, PageNo, PageRef, PageRun, SpaceId, check_runs};
use crate::sources;
use crate::varint;

/// How the payload of a batch is coded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u16)]
pub enum Coding {
    /// As it is.
    #[default]
    Raw = 0,
    /// One zstd frame.
    Zstd = 1,
    /// A delta for each page, on top of what the receiver has of it, or of another page.
    Delta = 2,
    /// No payload: the receiver has the same bytes in another page. No zero pages.
    Copy = 3,
    /// One zstd frame whose prefix is what the receiver has of each page, or of another one, in order. No zero pages.
    ZstdOnBase = 4,
}

impl Coding {
    const ALL: [Self; 5] = [Self::Raw, Self::Zstd, Self::Delta, Self::Copy, Self::ZstdOnBase];

    /// Whether pages are on top of others.
    fn has_bases(self) -> bool {
        matches!(self, Self::Delta | Self::ZstdOnBase)
    }

    /// Whether pages are made of others.
    fn has_sources(self) -> bool {
        self.has_bases() || self == Self::Copy
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
    /// Of all pages that are not zero.
    content: Chain,
    /// On bases: the digest of each page that is not zero.
    each: Vec<PageDigest>,
    /// On bases: of all that pages were before.
    bases: Chain,
    /// With copies and on bases: where the receiver has what each page that is not zero is made of.
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
        self.each.clear();
        self.sources.clear();
        (self.content, self.bases) = (Chain::default(), Chain::default());
        self.stored = 0;
    }

    /// Adds a page, which has to be behind all that were added before.
    pub fn push(&mut self, page: PageNo, zero: bool, content: PageDigest) {
        self.append(page, zero);
        if !zero {
            self.content.push(&content);
        }
    }

    fn append(&mut self, page: PageNo, zero: bool) {
        match self.runs.last_mut() {
            Some(run) if run.end() == page.0 => run.len += 1,
            _ => self.runs.push(PageRun { start: page, len: 1 }),
        }
        self.zero.push(zero);
        self.stored += usize::from(!zero);
    }

    /// Adds a page that is not zero, on top of what the receiver has at `from` and has the digest `base`. For
    /// [`Coding::Delta`] and [`Coding::ZstdOnBase`] only.
    pub fn push_on_base(&mut self, page: PageNo, content: PageDigest, from: PageRef, base: PageDigest) {
        self.push(page, false, content);
        self.each.push(content);
        self.bases.push(&base);
        self.sources.push(from);
    }

    /// Adds a page that is not zero and whose bytes the receiver has at `from`. For [`Coding::Copy`] only.
    pub fn push_copy(&mut self, page: PageNo, content: PageDigest, from: PageRef) {
        self.push(page, false, content);
        self.sources.push(from);
    }

    /// The digest of all pages that are not zero, in order.
    pub fn content(&self) -> Chain {
        self.content
    }

    /// On bases the digests of the pages that are not zero, in order; else nothing: they follow from the bytes.
    pub fn each(&self) -> &[PageDigest] {
        &self.each
    }

    /// On bases the digest of all bases, in the order of the pages.
    pub fn bases(&self) -> Chain {
        self.bases
    }

    /// With copies where the receiver has each page, and on bases where it has what the page is on top of, for each page
    /// that is not zero, in order; else nothing.
    pub fn sources(&self) -> &[PageRef] {
        &self.sources
    }

    /// Says how the payload is coded. Bases are forgotten where the coding has none.
    pub fn set_coding(&mut self, coding: Coding) {
        if !coding.has_bases() {
            self.each.clear();
            self.bases = Chain::default();
        }
        if !coding.has_sources() {
            self.sources.clear();
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

    /// Every page in order: its number, and whether it is zero.
    pub fn pages(&self) -> impl Iterator<Item = (PageNo, bool)> {
        let numbers = self.runs.iter().flat_map(PageRun::pages).map(PageNo);
        numbers.zip(self.zero.iter().copied())
    }

    /// The pages that are not zero, in order.
    pub fn stored(&self) -> impl Iterator<Item = PageNo> {
        self.pages().filter(|(_, zero)| !zero).map(|(page, _)| page)
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
            out.extend_from_slice(&(self.zero.len() as u32).to_le_bytes());
            let mut end = 0;
            for run in &self.runs {
                varint::put(run.start.0 - end, out);
                varint::put(run.len, out);
                end = run.end();
            }
            let bitmap = out.len();
            out.resize(bitmap + self.zero.len().div_ceil(8), 0);
            for (index, zero) in self.zero.iter().enumerate() {
                out[bitmap + index / 8] |= u8::from(*zero) << (index % 8);
            }
            match self.coding.has_bases() {
                true => {
                    self.each.iter().for_each(|digest| out.extend_from_slice(&digest.0));
                    out.extend_from_slice(&self.bases.to_bytes());
                }
                false if self.stored > 0 => out.extend_from_slice(&self.content.to_bytes()),
                false => {}
            }
            sources::put(&self.sources, self.stored(), out);
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
        let pages = fields.u32()? as usize;
        limit("a batch's pages", pages, MAX_BATCH_PAGES)?;
        let (mut end, mut left) = (0, pages as u64);
        while left > 0 {
            let (gap, len) = (varint::get(&mut fields)?, varint::get(&mut fields)?);
            if gap == 0 && !self.runs.is_empty() {
                return Err(DecodeError::Invalid("two page runs that are one"));
            }
            if gap >= MAX_PAGE_NO || len == 0 || len > left {
                return Err(DecodeError::Invalid(
                    "a page run beyond the address space, or the pages of the batch",
                ));
            }
            self.runs.push(PageRun { start: PageNo(end + gap), len });
            (end, left) = (end + gap + len, left - len);
        }
        let bitmap = fields.bytes(pages.div_ceil(8))?;
        if !pages.is_multiple_of(8) && bitmap[pages / 8] >> (pages % 8) != 0 {
            return Err(DecodeError::Invalid("marks for pages beyond the last"));
        }
        for index in 0..pages {
            let zero = bitmap[index / 8] >> (index % 8) & 1 == 1;
            self.zero.push(zero);
            self.stored += usize::from(!zero);
        }
        let mut digest = || Ok::<_, DecodeError>(fields.bytes(16)?.try_into().expect("sixteen bytes"));
        if coding.has_bases() {
            for _ in 0..self.stored {
                let content = PageDigest(digest()?);
                self.content.push(&content);
                self.each.push(content);
            }
            self.bases = Chain::from_bytes(digest()?);
        } else if self.stored > 0 {
            self.content = Chain::from_bytes(digest()?);
        }
        if coding.has_sources() {
            let numbers = self.runs.iter().flat_map(PageRun::pages).map(PageNo).zip(&self.zero);
            let stored = numbers.filter(|(_, zero)| !**zero).map(|(page, _)| page);
            sources::get(&mut fields, stored, self.stored, &mut self.sources)?;
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
        if self.each.len() != counted(self.coding.has_bases()) {
            return invalid("bases that are not one for each page on top of one");
        }
        if self.sources.len() != counted(self.coding.has_sources()) {
            return invalid("sources that are not one for each page that is made of another");
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
