//! What a stream has brought so far, as digests: enough to know that a receiver can make every page of it.
//!
//! 16 bytes a page. The bytes of pages that come whole are compared with their digests; those that are made of others
//! (deltas, and zstd on top of what was sent before) are not unpacked here, but their bases are compared.

use super::error::Damage;
use crate::source::sent::SentPages;
use pageferry_tracker::PageSet;
use pageferry_wire_format::{
    Chain, Coding, ControlMessage, Head, ImageChunk, PAGE_SIZE, PageBatch, PageDigest, PageNo, PageRef,
    PageRun, SpaceDigest, SpaceId, ZstdDecoder, digest, limits,
};
use std::collections::{BTreeMap, BTreeSet};

/// Pages that are made of others.
struct Made {
    space: SpaceId,
    pages: Vec<u64>,
    /// Pages of zeros among them, which are made of nothing.
    zeros: Vec<u64>,
    /// What each of the pages is made of, and the digest of all that.
    sources: Vec<PageRef>,
    originals: Chain,
    /// What they become, if they are not copies.
    each: Vec<PageDigest>,
}

impl Made {
    fn of(batch: &PageBatch) -> Self {
        let copies = batch.coding() == Coding::Copy;
        Self {
            space: batch.space(),
            pages: batch.stored().map(|page| page.0).collect(),
            zeros: batch.pages().filter(|(_, zero)| *zero).map(|(page, _)| page.0).collect(),
            sources: batch.sources().to_vec(),
            originals: if copies { batch.content() } else { batch.bases() },
            each: batch.each().to_vec(),
        }
    }

    fn is_copies(&self) -> bool {
        self.each.is_empty()
    }

    fn all(&self) -> impl Iterator<Item = u64> + '_ {
        self.pages.iter().chain(&self.zeros).copied()
    }
}

#[derive(Default)]
struct Space {
    pages: SentPages,
    owned: PageSet,
    sealed: bool,
}

/// Takes in frame after frame.
#[derive(Default)]
pub(super) struct Ledger {
    /// What the stream is on top of, by number.
    base: Vec<PageDigest>,
    spaces: BTreeMap<SpaceId, Space>,
    /// What is made of pages that have not come yet.
    later: Vec<Made>,
    /// Pages that cannot be made of what was sent, since the last round ended.
    again: BTreeMap<SpaceId, BTreeSet<u64>>,
    asked_again: bool,
    sealed: bool,
    files: BTreeMap<String, u64>,
    unpacker: Option<ZstdDecoder>,
    room: Vec<u8>,
}

/// What a receiver says to the end of the seal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It holds so many pages, exactly those of the source.
    Sealed(u64),
    /// Pages that were asked for are missing.
    Unsealed,
}

impl Ledger {
    /// A ledger of a stream on top of another one, whose pages are these.
    pub(super) fn on(base: Vec<PageDigest>) -> Self {
        Self { base, ..Self::default() }
    }

    /// The digests of all pages, in the order of spaces and pages.
    pub(super) fn contents(&self) -> impl Iterator<Item = PageDigest> {
        let mut all = Vec::new();
        self.spaces.values().for_each(|space| space.pages.each(|_, content| all.push(*content)));
        all.into_iter()
    }

    fn content_at(&self, from: &PageRef) -> Option<PageDigest> {
        match from.space {
            SpaceId::KEPT => self.base.get(usize::try_from(from.page.0).ok()?).copied(),
            space => self.spaces.get(&space)?.pages.get(from.page.0).copied(),
        }
    }

    /// Takes a frame with pages in.
    pub(super) fn pages(&mut self, batch: &PageBatch, payload: &[u8]) -> Result<(), Damage> {
        let id = batch.space();
        if !self.spaces.contains_key(&id) {
            return Err(Damage::Space(id));
        }
        if self.base.is_empty() && batch.sources().iter().any(|from| from.space == SpaceId::KEPT) {
            return Err(Damage::NoBase);
        }
        let contents = match batch.coding() {
            Coding::Raw => digests(batch, payload)?,
            Coding::Zstd => {
                let unpack = |source| Damage::Unpack { space: id, source };
                let mut room = std::mem::take(&mut self.room);
                room.resize(batch.nonzero() * PAGE_SIZE, 0);
                let unpacker = match &mut self.unpacker {
                    Some(unpacker) => unpacker,
                    none => none.insert(ZstdDecoder::new().map_err(unpack)?),
                };
                unpacker.decode(payload, &mut room).map_err(unpack)?;
                let contents = digests(batch, &room);
                self.room = room;
                contents?
            }
            Coding::Copy | Coding::Delta | Coding::ZstdOnBase => {
                let made = Made::of(batch);
                if !self.make(&made) {
                    self.later.push(made);
                }
                return Ok(());
            }
        };
        let space = self.spaces.entry(id).or_default();
        let mut contents = contents.into_iter();
        for (page, zero) in batch.pages() {
            let content = if zero { Some(digest::ZERO_PAGE) } else { contents.next() };
            space.pages.insert(page.0, content.ok_or(Damage::Page { space: id, page: page.0 })?);
        }
        Ok(())
    }

    /// Takes pages in whose originals are there; says whether they are.
    fn make(&mut self, made: &Made) -> bool {
        let mut contents: Vec<PageDigest> = Vec::with_capacity(made.pages.len());
        for (at, from) in made.sources.iter().enumerate() {
            // A copy may be of one that is made here before it.
            let here = match made.is_copies() && from.space == made.space {
                true => made.pages[..at].binary_search(&from.page.0).ok(),
                false => None,
            };
            let there = || self.content_at(from);
            let Some(content) = here.map(|here| contents[here]).or_else(there) else { return false };
            contents.push(content);
        }
        let Some(space) = self.spaces.get_mut(&made.space) else { return false };
        if contents.iter().collect::<Chain>() != made.originals {
            return false;
        }
        let contents = if made.is_copies() { &contents } else { &made.each };
        let zeros = made.zeros.iter().map(|page| (page, &digest::ZERO_PAGE));
        for (page, content) in made.pages.iter().zip(contents).chain(zeros) {
            space.pages.insert(*page, *content);
        }
        true
    }

    /// A piece of an image, packed or not.
    pub(super) fn image(&mut self, chunk: &ImageChunk, payload: &[u8]) -> Result<(), Damage> {
        if !self.sealed {
            return Err(Damage::Order("an image before the seal"));
        }
        let (name, offset) = (chunk.name.clone(), chunk.offset);
        let Self { unpacker, room, .. } = self;
        let unpacked = match unpacker {
            Some(unpacker) => chunk.piece(payload, unpacker, room),
            none => ZstdDecoder::new().and_then(|new| chunk.piece(payload, none.insert(new), room)),
        };
        let bytes = match unpacked {
            Ok(bytes) => bytes,
            Err(source) => return Err(Damage::UnpackImage { name, offset, source }),
        };
        if digest::page(bytes) != chunk.digest {
            return Err(Damage::Image { name, offset });
        }
        let size = self.files.entry(name).or_default();
        if *size != offset {
            return Err(Damage::Order("a piece of an image at the wrong place"));
        }
        *size += bytes.len() as u64;
        Ok(())
    }

    /// Takes in everything without a payload that changes what a receiver has.
    pub(super) fn take(&mut self, head: &Head) -> Result<(), Damage> {
        match head {
            Head::Owned(batch) => {
                let space = self.spaces.get_mut(&batch.space).ok_or(Damage::Space(batch.space))?;
                batch.runs.iter().for_each(|run| space.owned.insert(run.start.0, run.len));
            }
            // Nobody would bring them later.
            Head::Owed(_) => return Err(Damage::Order("owed pages in a file")),
            Head::Control(ControlMessage::Spaces { spaces, .. }) => {
                for info in spaces {
                    if self.spaces.insert(info.space, Space::default()).is_some() {
                        return Err(Damage::Order("a space is announced twice"));
                    }
                }
            }
            Head::Control(ControlMessage::SpaceGone { space }) => {
                self.spaces.remove(space).ok_or(Damage::Space(*space))?;
            }
            Head::Control(ControlMessage::Discard { space, runs }) => {
                let held = self.spaces.get_mut(space).ok_or(Damage::Space(*space))?;
                let mut gone = PageSet::default();
                runs.iter().for_each(|run| gone.insert(run.start.0, run.len));
                let mut all = PageSet::default();
                all.insert(0, limits::MAX_PAGE_NO);
                held.pages.retain(&all.subtract(&gone));
            }
            Head::Control(ControlMessage::SpaceSeal { space, pages, digest, .. }) => {
                self.seal(*space, *pages, digest)?;
            }
            Head::Control(ControlMessage::ImagesEnd { files, bytes }) => {
                let all = self.files.len() == *files as usize && self.files.values().sum::<u64>() == *bytes;
                all.then_some(()).ok_or(Damage::Order("not all images are there"))?;
            }
            _ => {}
        }
        Ok(())
    }

    fn seal(&mut self, id: SpaceId, pages: u64, digest: &SpaceDigest) -> Result<(), Damage> {
        let space = self.spaces.get_mut(&id).ok_or(Damage::Space(id))?;
        space.sealed = true;
        if self.asked_again {
            return Ok(());
        }
        space.pages.retain(&space.owned);
        if space.pages.len() != pages || space.owned.len() != pages || space.pages.digest() != *digest {
            return Err(Damage::Seal(id));
        }
        Ok(())
    }

    /// A round has ended: says what is to be asked for again.
    pub(super) fn end_round(&mut self) -> Vec<(SpaceId, Vec<PageRun>)> {
        for made in std::mem::take(&mut self.later) {
            if !self.make(&made) {
                self.again.entry(made.space).or_default().extend(made.all());
            }
        }
        let again = std::mem::take(&mut self.again);
        self.asked_again = !again.is_empty();
        again.into_iter().map(|(space, pages)| (space, runs(&pages))).collect()
    }

    /// All spaces are sealed.
    pub(super) fn end_seal(&mut self, spaces: u32) -> Result<Verdict, Damage> {
        let sealed = self.spaces.values().filter(|space| space.sealed).count();
        if sealed != self.spaces.len() || sealed != spaces as usize {
            return Err(Damage::Order("not all spaces are sealed"));
        }
        if std::mem::take(&mut self.asked_again) {
            for space in self.spaces.values_mut() {
                (space.owned, space.sealed) = (PageSet::default(), false);
            }
            return Ok(Verdict::Unsealed);
        }
        self.sealed = true;
        Ok(Verdict::Sealed(self.spaces.values().map(|space| space.pages.len()).sum()))
    }
}

/// The digests of a batch's pages that are not zeros, compared with what the batch says.
fn digests(batch: &PageBatch, bytes: &[u8]) -> Result<Vec<PageDigest>, Damage> {
    let contents: Vec<PageDigest> = bytes.chunks_exact(PAGE_SIZE).map(digest::page).collect();
    if contents.iter().collect::<Chain>() != batch.content() {
        return Err(Damage::Page { space: batch.space(), page: batch.runs()[0].start.0 });
    }
    Ok(contents)
}

fn runs(pages: &BTreeSet<u64>) -> Vec<PageRun> {
    let mut runs: Vec<PageRun> = Vec::new();
    for &page in pages {
        match runs.last_mut() {
            Some(run) if run.end() == page => run.len += 1,
            _ => runs.push(PageRun { start: PageNo(page), len: 1 }),
        }
    }
    runs
}
