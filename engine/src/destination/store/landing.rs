//! One batch on its way in: where its bytes are received, before anything of it counts.

use super::error::StoreError;
use crate::destination::sys::arena::{Extent, SLOT_BYTES};
use pageferry_wire_format::{Chain, Coding, PageDigest, PageNo, SpaceId, ZstdDecoder, delta, digest};
use std::io::IoSliceMut;
use std::sync::{Arc, Mutex, PoisonError};

/// What dropped landings leave behind: slots to use again, and buffers.
#[derive(Debug, Default)]
pub(super) struct Returned {
    pub(super) extents: Vec<Extent>,
    pub(super) buffers: Buffers,
}

/// Buffers of packed batches, used again so that they are not cleared for each.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    pub(super) packed: Vec<u8>,
    /// What a batch was compressed on top of.
    pub(super) bases: Vec<u8>,
    plain: Vec<u8>,
    decoder: Option<ZstdDecoder>,
}

/// A batch whose bytes are being received. Its slots are new ones: a batch that breaks, or is dropped, leaves the
/// pages that were there before as they were.
#[derive(Debug)]
#[must_use = "a batch counts only once it is finished"]
pub struct Landing {
    pub(super) space: SpaceId,
    pub(super) round: u32,
    /// Pages with bytes, and when they were checked their digests.
    pub(super) pages: Vec<PageNo>,
    pub(super) digests: Vec<PageDigest>,
    /// What these have to be: all together, and where the head has them, each.
    pub(super) content: Chain,
    pub(super) each: Vec<PageDigest>,
    pub(super) zeros: Vec<PageNo>,
    pub(super) extents: Vec<Extent>,
    pub(super) coding: Coding,
    pub(super) buffers: Buffers,
    pub(super) checked: bool,
    pub(super) returned: Arc<Mutex<Returned>>,
}

impl Landing {
    /// Where the payload is to be received, in order. The lengths sum to the payload's length; there are at
    /// most as many slices as pages with bytes.
    pub fn slices(&mut self) -> Vec<IoSliceMut<'_>> {
        self.checked = false;
        match self.coding {
            Coding::Zstd | Coding::ZstdOnBase | Coding::Delta => {
                vec![IoSliceMut::new(&mut self.buffers.packed)]
            }
            Coding::Copy => Vec::new(),
            Coding::Raw => {
                self.extents.iter_mut().map(|extent| IoSliceMut::new(extent.bytes_mut())).collect()
            }
        }
    }

    /// Bytes of payload that are to be received.
    #[cfg(test)]
    pub fn payload_len(&self) -> usize {
        match self.coding {
            Coding::Zstd | Coding::ZstdOnBase | Coding::Delta => self.buffers.packed.len(),
            Coding::Copy => 0,
            Coding::Raw => self.pages.len() * SLOT_BYTES,
        }
    }

    /// Of each page with bytes, in order, what it is: once they were checked.
    pub fn digests(&self) -> &[PageDigest] {
        &self.digests
    }

    /// Unpacks what was received, and compares it with what was announced. Finishing a batch does this
    /// if it was not done before; it needs no store, so that it can be done outside a lock.
    ///
    /// # Errors
    /// [`StoreError::DigestMismatch`], [`StoreError::Unpack`], [`StoreError::Delta`].
    pub fn check(&mut self) -> Result<(), StoreError> {
        if self.checked {
            return Ok(());
        }
        self.unpack()?;
        let bytes = self.extents.iter().flat_map(|extent| extent.bytes().as_chunks::<SLOT_BYTES>().0);
        self.digests.clear();
        self.digests.extend(bytes.map(|bytes| digest::page(bytes)));
        if self.digests.iter().collect::<Chain>() != self.content {
            let differs = self.each.iter().zip(&self.digests).position(|(announced, is)| announced != is);
            let page = self.pages.get(differs.unwrap_or(0)).copied().unwrap_or_default();
            return Err(StoreError::DigestMismatch { space: self.space, page });
        }
        self.checked = true;
        Ok(())
    }

    /// Applies deltas to the slots, which have the bytes that each page had before.
    fn apply(&mut self) -> Result<(), StoreError> {
        let space = self.space;
        let mut deltas = &self.buffers.packed[..];
        let slots =
            self.extents.iter_mut().flat_map(|extent| extent.bytes_mut().as_chunks_mut::<SLOT_BYTES>().0);
        for (bytes, &page) in slots.zip(&self.pages) {
            let used =
                delta::apply(deltas, bytes).map_err(|cause| StoreError::Delta { space, page, cause })?;
            deltas = &deltas[used..];
        }
        match deltas.len() {
            0 => Ok(()),
            rest => Err(StoreError::DeltasLeft { space, rest }),
        }
    }

    /// Makes pages of a packed payload, in their slots.
    fn unpack(&mut self) -> Result<(), StoreError> {
        match self.coding {
            Coding::Raw | Coding::Copy => return Ok(()),
            Coding::Delta => return self.apply(),
            Coding::Zstd | Coding::ZstdOnBase => {}
        }
        let on_base = self.coding == Coding::ZstdOnBase;
        let (space, pages) = (self.space, self.pages.len());
        let failed = |cause| StoreError::Unpack { space, pages, cause };
        let Buffers { packed, bases, plain, decoder } = &mut self.buffers;
        let decoder = match decoder {
            Some(decoder) => decoder,
            None => decoder.insert(ZstdDecoder::new().map_err(failed)?),
        };
        let mut unpack = |into: &mut [u8]| match on_base {
            true => decoder.decode_on(bases, packed, into).map_err(failed),
            false => decoder.decode(packed, into).map_err(failed),
        };
        if let [extent] = &mut self.extents[..] {
            return unpack(extent.bytes_mut());
        }
        plain.resize(pages * SLOT_BYTES, 0);
        unpack(plain)?;
        let mut rest = &self.buffers.plain[..];
        for extent in &mut self.extents {
            let slots = extent.bytes_mut();
            let (here, behind) = rest.split_at(slots.len());
            slots.copy_from_slice(here);
            rest = behind;
        }
        Ok(())
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        let mut returned = self.returned.lock().unwrap_or_else(PoisonError::into_inner);
        returned.extents.append(&mut self.extents);
        if self.buffers.packed.capacity() > returned.buffers.packed.capacity() {
            returned.buffers = std::mem::take(&mut self.buffers);
        }
    }
}
