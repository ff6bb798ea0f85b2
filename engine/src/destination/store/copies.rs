//! Pages that are the same as others which are here already: they are copied, and never come over the link.

use super::index::Place;
use super::{PageAt, PageStore, StoreError};
use crate::destination::sys::arena::SLOT_BYTES;
use pageferry_wire_format::{Chain, PageBatch, PageDigest, PageNo, SpaceId, digest};

/// Pages that are to have the bytes of other ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyOrder {
    /// The space of the pages.
    pub space: SpaceId,
    round: u32,
    /// The digest of all of them.
    content: Chain,
    /// The pages, in order, and where their bytes are.
    pages: Vec<(PageNo, PageAt)>,
}

impl CopyOrder {
    /// What a batch of copies asks for.
    pub fn of(batch: &PageBatch) -> Self {
        let pages = batch.stored().zip(batch.sources().iter().copied()).collect();
        Self { space: batch.space(), round: batch.round(), content: batch.content(), pages }
    }

    /// The pages.
    pub fn pages(&self) -> impl Iterator<Item = PageNo> + '_ {
        self.pages.iter().map(|(page, _)| *page)
    }
}

impl PageStore {
    /// Carries out copies. `None`: an original is not here, or has other bytes; it may be under way, and nothing was
    /// copied. Else the pages that could not be copied because the kept original is damaged.
    ///
    /// # Errors
    /// [`StoreError::OutOfMemory`]; [`StoreError::DigestMismatch`] when bytes that lie here are not those that came.
    pub fn copy_pages(&mut self, order: &CopyOrder) -> Result<Option<Vec<PageNo>>, StoreError> {
        let Some(contents) = self.originals(order) else { return Ok(None) };
        let (mut damaged, mut bytes) = (Vec::new(), [0; SLOT_BYTES]);
        for (&(page, from), content) in order.pages.iter().zip(contents) {
            if self.read(&from, &mut bytes).is_none() {
                damaged.push(page);
                continue;
            }
            if digest::page(&bytes) != content {
                return Err(StoreError::DigestMismatch { space: from.space, page: from.page });
            }
            self.put(order.space, order.round, page, &content, &bytes)?;
        }
        Ok(Some(damaged))
    }

    /// What the originals are, if they are those that the order says.
    fn originals(&self, order: &CopyOrder) -> Option<Vec<PageDigest>> {
        let mut contents: Vec<PageDigest> = Vec::with_capacity(order.pages.len());
        for (at, (_, from)) in order.pages.iter().enumerate() {
            // The original may be a copy itself, which is made first.
            let made = match from.space == order.space {
                true => order.pages[..at].binary_search_by_key(&from.page, |(page, _)| *page).ok(),
                false => None,
            };
            contents.push(match made {
                Some(made) => contents[made],
                None => self.content_at(from)?,
            });
        }
        (contents.iter().collect::<Chain>() == order.content).then_some(contents)
    }

    fn put(
        &mut self,
        space: SpaceId,
        round: u32,
        page: PageNo,
        content: &PageDigest,
        bytes: &[u8; SLOT_BYTES],
    ) -> Result<(), StoreError> {
        let place = match *content == digest::ZERO_PAGE {
            true => Place::Zero,
            false => {
                let index_bytes = self.index_bytes();
                let mut extents = self.slots.take(1, index_bytes + super::TABLE_BYTES)?;
                let mut extent = extents.pop().ok_or(StoreError::Foreign { space })?;
                extent.bytes_mut().copy_from_slice(bytes);
                let slot = extent.first();
                self.slots.keep(extent).map_err(|_| StoreError::Foreign { space })?;
                Place::Slot(slot)
            }
        };
        let slots = &mut self.slots;
        let entry = std::iter::once((page, place, *content));
        self.spaces.entry(space).or_default().insert(round, entry, |slot| slots.free(slot));
        Ok(())
    }
}
