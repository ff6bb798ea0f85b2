//! Pages that are the same as others which are here already: they are copied, and never come over the link.

use super::index::Place;
use super::{PageStore, StoreError};
use crate::destination::sys::arena::SLOT_BYTES;
use pageferry_wire_format::{PageBatch, PageDigest, PageNo, PageRef, SpaceId, digest};

/// A page that is to have the bytes of another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyOrder {
    /// The space of the page.
    pub space: SpaceId,
    /// The page.
    pub page: PageNo,
    round: u32,
    content: PageDigest,
    from: PageRef,
}

impl CopyOrder {
    /// What a batch of copies asks for.
    pub fn of(batch: &PageBatch) -> Vec<Self> {
        let (space, round) = (batch.space(), batch.round());
        let pages = batch.pages().zip(batch.sources());
        pages.map(|((page, _, &content), &from)| Self { space, page, round, content, from }).collect()
    }
}

impl PageStore {
    /// Carries out copies. Gives back those whose original is not here, or has other bytes: it may be under way.
    ///
    /// # Errors
    /// [`StoreError::OutOfMemory`]; [`StoreError::DigestMismatch`] when bytes that lie here are not those that came.
    pub fn copy_pages(&mut self, orders: Vec<CopyOrder>) -> Result<Vec<CopyOrder>, StoreError> {
        let (mut left, mut bytes) = (Vec::new(), [0; SLOT_BYTES]);
        for order in orders {
            let CopyOrder { space, page, round, content, from } = order;
            let found = match from.space {
                // Not believed: read and compared, and asked for again if it is another one.
                SpaceId::KEPT => self.kept.read(from.page.0, &content, &mut bytes),
                space => self.read(space, from.page, &content, &mut bytes).is_some(),
            };
            if !found {
                left.push(order);
                continue;
            }
            if digest::page(&bytes) != content {
                return Err(StoreError::DigestMismatch { space: from.space, page: from.page });
            }
            let place = match content == digest::ZERO_PAGE {
                true => Place::Zero,
                false => {
                    let index_bytes = self.index_bytes();
                    let mut extents = self.slots.take(1, index_bytes + super::TABLE_BYTES)?;
                    let mut extent = extents.pop().ok_or(StoreError::Foreign { space })?;
                    extent.bytes_mut().copy_from_slice(&bytes);
                    let slot = extent.first();
                    self.slots.keep(extent).map_err(|_| StoreError::Foreign { space })?;
                    Place::Slot(slot)
                }
            };
            let slots = &mut self.slots;
            let entry = std::iter::once((page, place, content));
            self.spaces.entry(space).or_default().insert(round, entry, |slot| slots.free(slot));
        }
        Ok(left)
    }
}
