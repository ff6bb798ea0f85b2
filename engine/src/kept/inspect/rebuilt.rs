//! The program's pages as a stream makes them, with their bytes: a second opinion, which shares nothing with the store of a
//! receiver but the wire format.

use crate::kept::error::Damage;
use crate::kept::store::KeptPages;
use pageferry_wire_format::{
    Chain, Coding, OwnedBatch, PAGE_SIZE, PageBatch, PageDigest, PageNo, PageRun, RegionInfo, SpaceDigest,
    SpaceId, ZstdDecoder, delta, digest, limits,
};
use std::collections::BTreeMap;
use std::sync::Arc;

type Bytes = [u8; PAGE_SIZE];

/// A page, and what it has cost.
#[derive(Default)]
struct Page {
    /// `None`: zeros.
    bytes: Option<Box<Bytes>>,
    /// Bytes of the stream that went into it, over all rounds.
    cost: u64,
}

impl Page {
    fn content(&self) -> Bytes {
        self.bytes.as_ref().map_or([0; PAGE_SIZE], |bytes| **bytes)
    }

    fn digest(&self) -> PageDigest {
        self.bytes.as_ref().map_or(digest::ZERO_PAGE, |bytes| digest::page(&bytes[..]))
    }
}

/// An address space.
#[derive(Default)]
pub(super) struct Space {
    pub(super) vpid: i32,
    pub(super) name: String,
    pages: BTreeMap<u64, Page>,
    /// What pages cost that were gone before the end.
    pub(super) gone: u64,
    owned: Vec<PageRun>,
    pub(super) regions: Vec<RegionInfo>,
    pub(super) sealed: bool,
}

/// Bytes of the stream for each page of a batch.
struct Costs {
    each: u64,
    /// The first so many pages take one more, so that nothing is lost by rounding.
    more: u64,
}

/// A batch of pages that are made of others, with its payload and the bytes of its frame.
struct Made {
    batch: PageBatch,
    payload: Vec<u8>,
    frame_bytes: u64,
}

/// All spaces.
#[derive(Default)]
pub(super) struct Rebuilt {
    /// What the stream is on top of.
    base: Arc<KeptPages>,
    pub(super) spaces: BTreeMap<SpaceId, Space>,
    later: Vec<Made>,
    /// A receiver has asked for pages again: the seal that follows does not count.
    asked: bool,
    unpacker: Option<ZstdDecoder>,
    /// What ended spaces cost.
    pub(super) ended: u64,
}

impl Rebuilt {
    /// The pages of a stream on top of these.
    pub(super) fn on(base: Arc<KeptPages>) -> Self {
        Self { base, ..Self::default() }
    }

    pub(super) fn announce(&mut self, id: SpaceId, vpid: i32, name: &str) -> Result<(), Damage> {
        let space = Space { vpid, name: name.to_owned(), ..Space::default() };
        match self.spaces.insert(id, space) {
            None => Ok(()),
            Some(_) => Err(Damage::Order("a space is announced twice")),
        }
    }

    pub(super) fn end(&mut self, id: SpaceId) -> Result<(), Damage> {
        let space = self.spaces.remove(&id).ok_or(Damage::Space(id))?;
        self.ended += space.gone + space.pages.values().map(|page| page.cost).sum::<u64>();
        Ok(())
    }

    pub(super) fn discard(&mut self, id: SpaceId, runs: &[PageRun]) -> Result<(), Damage> {
        let space = self.spaces.get_mut(&id).ok_or(Damage::Space(id))?;
        for run in runs {
            space.forget(run.start.0..run.end());
        }
        Ok(())
    }

    /// Makes the pages of a batch, whose frame has `frame_bytes` bytes in all, and compares them with what it says.
    pub(super) fn pages(
        &mut self,
        batch: &PageBatch,
        payload: &[u8],
        frame_bytes: u64,
    ) -> Result<(), Damage> {
        let space = batch.space();
        if !self.spaces.contains_key(&space) {
            return Err(Damage::Space(space));
        }
        if self.base.digests().is_empty() && batch.sources().iter().any(|from| from.space == SpaceId::KEPT) {
            return Err(Damage::NoBase);
        }
        if matches!(batch.coding(), Coding::Raw | Coding::Zstd) {
            let mut room = Vec::new();
            if batch.coding() == Coding::Zstd {
                room.resize(batch.nonzero() * PAGE_SIZE, 0);
                let unpack = |source| Damage::Unpack { space, source };
                self.unpacker()?.decode(payload, &mut room).map_err(unpack)?;
            }
            let plain = if batch.coding() == Coding::Zstd { &room } else { payload };
            return self.put(batch, plain.as_chunks().0, frame_bytes);
        }
        let made = Made { batch: batch.clone(), payload: payload.to_vec(), frame_bytes };
        if !self.make(&made)? {
            self.later.push(made);
        }
        Ok(())
    }

    /// Makes pages of others; says whether these were here.
    fn make(&mut self, made: &Made) -> Result<bool, Damage> {
        let Made { batch, payload, frame_bytes } = made;
        let space = batch.space();
        let Some(mut pages) = self.originals(batch) else { return Ok(false) };
        match batch.coding() {
            Coding::Delta => {
                let mut rest = &payload[..];
                for (bytes, page) in pages.iter_mut().zip(batch.stored()) {
                    let bad = Damage::Page { space, page: page.0 };
                    let Ok(taken) = delta::apply(rest, bytes) else { return Err(bad) };
                    rest = &rest[taken..];
                }
                if !rest.is_empty() {
                    return Err(Damage::Order("bytes after the last delta"));
                }
            }
            Coding::ZstdOnBase => {
                let mut plain = vec![0; pages.len() * PAGE_SIZE];
                let unpack = |source| Damage::Unpack { space, source };
                self.unpacker()?.decode_on(pages.as_flattened(), payload, &mut plain).map_err(unpack)?;
                pages = plain.as_chunks().0.to_vec();
            }
            Coding::Raw | Coding::Zstd | Coding::Copy => {}
        }
        self.put(batch, &pages, *frame_bytes)?;
        Ok(true)
    }

    /// Puts the pages of a batch in their places, if they are those that it says.
    fn put(&mut self, batch: &PageBatch, stored: &[Bytes], frame_bytes: u64) -> Result<(), Damage> {
        let id = batch.space();
        let contents: Vec<PageDigest> = stored.iter().map(|bytes| digest::page(bytes)).collect();
        if contents.iter().collect::<Chain>() != batch.content() {
            let differs = batch.each().iter().zip(&contents).position(|(says, is)| says != is);
            let page = batch.stored().nth(differs.unwrap_or(0)).unwrap_or_default();
            return Err(Damage::Page { space: id, page: page.0 });
        }
        let costs = Costs::of(frame_bytes, batch.len());
        let space = self.spaces.get_mut(&id).ok_or(Damage::Space(id))?;
        let mut stored = stored.iter();
        for (index, (page, zero)) in batch.pages().enumerate() {
            let bytes = if zero { None } else { stored.next() };
            let bytes = bytes.filter(|bytes| !digest::is_zero(&bytes[..])).map(|bytes| Box::new(*bytes));
            space.put(page.0, bytes, costs.at(index));
        }
        Ok(())
    }

    fn unpacker(&mut self) -> Result<&mut ZstdDecoder, Damage> {
        if self.unpacker.is_none() {
            let unpack = |source| Damage::Unpack { space: SpaceId(0), source };
            self.unpacker = Some(ZstdDecoder::new().map_err(unpack)?);
        }
        self.unpacker.as_mut().ok_or(Damage::Order("there is no memory"))
    }

    /// What a batch is made of; `None` if it is not here. A copy may be of one that is made before it in the same batch.
    fn originals(&self, batch: &PageBatch) -> Option<Vec<Bytes>> {
        let copies = batch.coding() == Coding::Copy;
        let numbers: Vec<PageNo> = batch.stored().collect();
        let mut pages: Vec<Bytes> = Vec::with_capacity(numbers.len());
        for (at, source) in batch.sources().iter().enumerate() {
            let here = match copies && source.space == batch.space() {
                true => numbers[..at].binary_search(&source.page).ok(),
                false => None,
            };
            pages.push(match here {
                Some(here) => pages[here],
                None if source.space == SpaceId::KEPT => self.kept(source.page.0)?,
                None => self.spaces.get(&source.space)?.pages.get(&source.page.0)?.content(),
            });
        }
        let contents: Vec<PageDigest> = pages.iter().map(|bytes| digest::page(bytes)).collect();
        let wanted = if copies { batch.content() } else { batch.bases() };
        (contents.iter().collect::<Chain>() == wanted).then_some(pages)
    }

    fn kept(&self, page: u64) -> Option<Bytes> {
        let content = self.base.digests().get(usize::try_from(page).ok()?)?;
        let mut bytes = [0; PAGE_SIZE];
        self.base.read(page, content, &mut bytes).then_some(bytes)
    }

    /// The bytes of all pages that are not zeros, in the order of spaces and pages.
    pub(super) fn contents(&self) -> impl Iterator<Item = &Bytes> {
        self.spaces.values().flat_map(|space| space.pages.values()).filter_map(|page| page.bytes.as_deref())
    }

    pub(super) fn end_round(&mut self) -> Result<(), Damage> {
        let mut missed = 0;
        for made in std::mem::take(&mut self.later) {
            if !self.make(&made)? {
                // A receiver would have to ask for these again.
                missed += made.batch.len();
                if let Some(space) = self.spaces.get_mut(&made.batch.space()) {
                    space.gone += made.frame_bytes;
                }
            }
        }
        self.asked = missed > 0;
        Ok(())
    }

    pub(super) fn own(&mut self, batch: &OwnedBatch) -> Result<(), Damage> {
        let space = self.spaces.get_mut(&batch.space).ok_or(Damage::Space(batch.space))?;
        if space.owned.len() + batch.runs.len() > limits::MAX_OWNED_RUNS {
            return Err(Damage::Order("more owned runs than a space may have"));
        }
        space.owned.extend(&batch.runs);
        Ok(())
    }

    /// Compares a space with what the source had when it was frozen.
    pub(super) fn seal(
        &mut self,
        id: SpaceId,
        vpid: i32,
        pages: u64,
        wanted: &SpaceDigest,
        regions: &[RegionInfo],
    ) -> Result<(), Damage> {
        let asked = self.asked;
        let space = self.spaces.get_mut(&id).ok_or(Damage::Space(id))?;
        (space.vpid, space.regions, space.sealed) = (vpid, regions.to_vec(), true);
        if asked {
            return Ok(());
        }
        let mut at = 0;
        for run in std::mem::take(&mut space.owned) {
            space.forget(at..run.start.0);
            at = run.end();
        }
        space.forget(at..limits::MAX_PAGE_NO);
        let mut sum = SpaceDigest::default();
        for (number, page) in &space.pages {
            sum.insert(PageNo(*number), &page.digest());
        }
        if space.pages.len() as u64 != pages || sum != *wanted {
            return Err(Damage::Seal(id));
        }
        Ok(())
    }

    /// All are sealed; says whether it counts.
    pub(super) fn end_seal(&mut self, spaces: u32) -> Result<bool, Damage> {
        let sealed = self.spaces.values().filter(|space| space.sealed).count();
        if sealed != self.spaces.len() || sealed != spaces as usize {
            return Err(Damage::Order("not all spaces are sealed"));
        }
        if std::mem::take(&mut self.asked) {
            for space in self.spaces.values_mut() {
                (space.owned, space.sealed) = (Vec::new(), false);
            }
            return Ok(false);
        }
        Ok(true)
    }
}

impl Space {
    fn put(&mut self, number: u64, bytes: Option<Box<Bytes>>, cost: u64) {
        let page = self.pages.entry(number).or_default();
        page.bytes = bytes;
        page.cost += cost;
    }

    fn forget(&mut self, range: std::ops::Range<u64>) {
        if range.is_empty() {
            return;
        }
        let numbers: Vec<u64> = self.pages.range(range).map(|(number, _)| *number).collect();
        for number in numbers {
            self.gone += self.pages.remove(&number).map_or(0, |page| page.cost);
        }
    }

    /// Pages, those of them that are zeros, and what all of them cost, of the numbers in `range`.
    pub(super) fn part(&self, range: std::ops::Range<u64>) -> (u64, u64, u64) {
        let mut sums = (0, 0, 0);
        for (_, page) in self.pages.range(range) {
            sums.0 += 1;
            sums.1 += u64::from(page.bytes.is_none());
            sums.2 += page.cost;
        }
        sums
    }
}

impl Costs {
    fn of(bytes: u64, pages: usize) -> Self {
        let pages = pages.max(1) as u64;
        Self { each: bytes / pages, more: bytes % pages }
    }

    fn at(&self, index: usize) -> u64 {
        self.each + u64::from((index as u64) < self.more)
    }
}
