//! What a stream has brought so far, as digests: enough to know that a receiver can make every page of it.
//!
//! 16 bytes a page. The bytes of pages that come whole are compared with their digests; those that are made of others
//! (deltas, and zstd on top of what was sent before) are not unpacked here, but their bases are compared.

use super::error::Damage;
use crate::source::sent::SentPages;
use pageferry_tracker::PageSet;
use pageferry_wire_format::{
    Coding, ControlMessage, Head, PAGE_SIZE, PageBatch, PageDigest, PageNo, PageRef, PageRun, SpaceDigest,
    SpaceId, ZstdDecoder, digest, limits,
};
use std::collections::{BTreeMap, BTreeSet};

/// A page that is to be copied from one that has not come yet.
struct Pending {
    space: SpaceId,
    page: u64,
    content: PageDigest,
    from: PageRef,
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
    spaces: BTreeMap<SpaceId, Space>,
    later: Vec<Pending>,
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
    /// Takes a frame with pages in.
    pub(super) fn pages(&mut self, batch: &PageBatch, payload: &[u8]) -> Result<(), Damage> {
        let id = batch.space();
        if !self.spaces.contains_key(&id) {
            return Err(Damage::Space(id));
        }
        match batch.coding() {
            Coding::Raw => check(batch, payload)?,
            Coding::Zstd => {
                let unpack = |source| Damage::Unpack { space: id, source };
                let mut room = std::mem::take(&mut self.room);
                room.resize(batch.nonzero() * PAGE_SIZE, 0);
                let unpacker = match &mut self.unpacker {
                    Some(unpacker) => unpacker,
                    none => none.insert(ZstdDecoder::new().map_err(unpack)?),
                };
                unpacker.decode(payload, &mut room).map_err(unpack)?;
                let checked = check(batch, &room);
                self.room = room;
                checked?;
            }
            Coding::Copy => {
                for ((page, _, content), from) in batch.pages().zip(batch.sources()) {
                    let order = Pending { space: id, page: page.0, content: *content, from: *from };
                    if !self.copy(&order) {
                        self.later.push(order);
                    }
                }
                return Ok(());
            }
            Coding::Delta | Coding::ZstdOnBase => {
                let whole = batch.coding() == Coding::ZstdOnBase;
                let space = self.spaces.entry(id).or_default();
                let nonzero = batch.pages().filter(|(_, zero, _)| !zero);
                let missing = nonzero
                    .zip(batch.bases())
                    .any(|((page, ..), base)| space.pages.get(page.0) != Some(base));
                // A receiver may take some deltas of a batch and leave others; to ask for all of them is never wrong.
                if missing {
                    let pages = batch.pages().filter(|(_, zero, _)| whole || !zero);
                    self.again.entry(id).or_default().extend(pages.map(|(page, ..)| page.0));
                    return Ok(());
                }
            }
        }
        let space = self.spaces.entry(id).or_default();
        for (page, _, content) in batch.pages() {
            space.pages.insert(page.0, *content);
        }
        Ok(())
    }

    /// Whether the original is there.
    fn copy(&mut self, order: &Pending) -> bool {
        let from = self.spaces.get(&order.from.space).and_then(|space| space.pages.get(order.from.page.0));
        if from != Some(&order.content) {
            return false;
        }
        match self.spaces.get_mut(&order.space) {
            Some(space) => {
                space.pages.insert(order.page, order.content);
                true
            }
            None => false,
        }
    }

    /// A piece of an image.
    pub(super) fn image(
        &mut self,
        name: &str,
        offset: u64,
        content: &PageDigest,
        bytes: &[u8],
    ) -> Result<(), Damage> {
        if !self.sealed {
            return Err(Damage::Order("an image before the seal"));
        }
        if digest::page(bytes) != *content {
            return Err(Damage::Image { name: name.to_owned(), offset });
        }
        let size = self.files.entry(name.to_owned()).or_default();
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
        for order in std::mem::take(&mut self.later) {
            if !self.copy(&order) {
                self.again.entry(order.space).or_default().insert(order.page);
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

/// Compares the bytes of a batch's pages with their digests.
fn check(batch: &PageBatch, bytes: &[u8]) -> Result<(), Damage> {
    let nonzero = batch.pages().filter(|(_, zero, _)| !zero);
    for ((page, _, content), bytes) in nonzero.zip(bytes.chunks_exact(PAGE_SIZE)) {
        if digest::page(bytes) != *content {
            return Err(Damage::Page { space: batch.space(), page: page.0 });
        }
    }
    Ok(())
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
