//! The program's pages as a stream makes them, with their bytes: a second opinion, which shares nothing with the store of a
//! receiver but the wire format.

use crate::kept::error::Damage;
use pageferry_wire_format::{
    Coding, OwnedBatch, PAGE_SIZE, PageBatch, PageDigest, PageNo, PageRef, PageRun, RegionInfo, SpaceDigest,
    SpaceId, ZstdDecoder, delta, digest, limits,
};
use std::collections::BTreeMap;

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

struct Order {
    space: SpaceId,
    page: u64,
    content: PageDigest,
    from: PageRef,
    cost: u64,
}

/// All spaces.
#[derive(Default)]
pub(super) struct Rebuilt {
    pub(super) spaces: BTreeMap<SpaceId, Space>,
    later: Vec<Order>,
    /// Pages that could not be made in this round.
    missed: u64,
    /// A receiver has asked for pages again: the seal that follows does not count.
    asked: bool,
    unpacker: Option<ZstdDecoder>,
    /// What ended spaces cost.
    pub(super) ended: u64,
}

impl Rebuilt {
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

    /// Makes the pages of a batch, whose frame has `frame_bytes` bytes in all, and compares each with its digest.
    pub(super) fn pages(
        &mut self,
        batch: &PageBatch,
        payload: &[u8],
        frame_bytes: u64,
    ) -> Result<(), Damage> {
        let id = batch.space();
        let bad = |page: PageNo| Damage::Page { space: id, page: page.0 };
        let unpack = |source| Damage::Unpack { space: id, source };
        let costs = Costs::of(frame_bytes, batch.len());
        if !self.spaces.contains_key(&id) {
            return Err(Damage::Space(id));
        }
        if batch.coding() == Coding::Copy {
            for (index, ((page, _, content), from)) in batch.pages().zip(batch.sources()).enumerate() {
                let (content, from, cost) = (*content, *from, costs.at(index));
                let order = Order { space: id, page: page.0, content, from, cost };
                if !self.copy(&order)? {
                    self.later.push(order);
                }
            }
            return Ok(());
        }
        let mut room = Vec::new();
        let mut deltas = payload;
        match batch.coding() {
            Coding::Zstd => {
                room.resize(batch.nonzero() * PAGE_SIZE, 0);
                self.unpacker()?.decode(payload, &mut room).map_err(unpack)?;
            }
            Coding::ZstdOnBase => {
                let Some(bases) = self.bases(batch) else { return self.miss(batch, &costs) };
                room.resize(bases.len(), 0);
                self.unpacker()?.decode_on(&bases, payload, &mut room).map_err(unpack)?;
            }
            _ => {}
        }
        let packed = if batch.coding() == Coding::Raw { payload } else { &room[..] };
        let mut whole = packed.as_chunks::<PAGE_SIZE>().0.iter();
        let mut bases = batch.bases().iter();
        let space = self.spaces.entry(id).or_default();
        for (index, (page, zero, content)) in batch.pages().enumerate() {
            let cost = costs.at(index);
            let bytes = match (zero, batch.coding()) {
                (true, _) => None,
                (false, Coding::Delta) => {
                    let base = bases.next().ok_or(bad(page))?;
                    let mut bytes = Box::new([0; PAGE_SIZE]);
                    let before = space.pages.get(&page.0);
                    let usable = before.is_some_and(|before| before.digest() == *base);
                    if let Some(before) = before.and_then(|before| before.bytes.as_ref()) {
                        bytes.copy_from_slice(&before[..]);
                    }
                    let taken = delta::apply(deltas, &mut bytes);
                    let taken = taken.map_err(|_| bad(page))?;
                    deltas = deltas.get(taken..).ok_or(bad(page))?;
                    if !usable {
                        self.missed += 1;
                        space.pages.entry(page.0).or_default().cost += cost;
                        continue;
                    }
                    Some(bytes)
                }
                (false, _) => Some(Box::new(*whole.next().ok_or(bad(page))?)),
            };
            if bytes.as_ref().is_some_and(|bytes| digest::page(&bytes[..]) != *content) {
                return Err(bad(page));
            }
            space.put(page.0, bytes, cost);
        }
        if batch.coding() == Coding::Delta && !deltas.is_empty() {
            return Err(Damage::Order("bytes after the last delta"));
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

    /// What a batch was compressed on top of; `None` if it is not here.
    fn bases(&self, batch: &PageBatch) -> Option<Vec<u8>> {
        let space = self.spaces.get(&batch.space())?;
        let mut bases = Vec::with_capacity(batch.len() * PAGE_SIZE);
        for ((page, ..), base) in batch.pages().zip(batch.bases()) {
            let before = space.pages.get(&page.0).filter(|before| before.digest() == *base)?;
            match &before.bytes {
                Some(bytes) => bases.extend_from_slice(&bytes[..]),
                None => bases.resize(bases.len() + PAGE_SIZE, 0),
            }
        }
        Some(bases)
    }

    /// A receiver would have to ask for these again.
    fn miss(&mut self, batch: &PageBatch, costs: &Costs) -> Result<(), Damage> {
        let space = self.spaces.get_mut(&batch.space()).ok_or(Damage::Space(batch.space()))?;
        space.gone += (0..batch.len()).map(|index| costs.at(index)).sum::<u64>();
        self.missed += batch.len() as u64;
        Ok(())
    }

    /// Makes a copy; says whether its original was here.
    fn copy(&mut self, order: &Order) -> Result<bool, Damage> {
        let original =
            self.spaces.get(&order.from.space).and_then(|space| space.pages.get(&order.from.page.0));
        let Some(original) = original.filter(|page| page.digest() == order.content) else { return Ok(false) };
        let bytes = original.bytes.clone();
        let space = self.spaces.get_mut(&order.space).ok_or(Damage::Space(order.space))?;
        space.put(order.page, bytes, order.cost);
        Ok(true)
    }

    pub(super) fn end_round(&mut self) -> Result<(), Damage> {
        for order in std::mem::take(&mut self.later) {
            if !self.copy(&order)? {
                self.missed += 1;
                if let Some(space) = self.spaces.get_mut(&order.space) {
                    space.gone += order.cost;
                }
            }
        }
        self.asked = std::mem::take(&mut self.missed) > 0;
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
