//! One batch on its way in: where its bytes are received, before anything of it counts.

use super::error::StoreError;
use crate::destination::sys::arena::{Extent, SLOT_BYTES};
use pageferry_wire_format::{PageDigest, PageNo, PageRun, SpaceId, digest};
use std::error::Error;
use std::io::IoSliceMut;
use std::sync::{Arc, Mutex, PoisonError};

/// What a batch says of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Announced {
    /// All bytes of these pages are zero; nothing is sent for them.
    Zero(PageRun),
    /// The page's bytes follow, in the order of the announcements, and have this digest.
    Bytes(PageNo, PageDigest),
}

/// Unpacks a payload (first argument) into exactly the bytes of a batch's pages (second argument). Anything but
/// exactly that many bytes is an error.
pub type Unpack = fn(&[u8], &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>>;

/// How the bytes of a batch are sent.
#[derive(Clone, Copy, Debug)]
pub enum Payload {
    /// As they are.
    Raw,
    /// All pages of the batch together in so many bytes, which `unpack` makes pages of.
    Packed {
        /// Length of the payload.
        len: usize,
        /// How it is unpacked.
        unpack: Unpack,
    },
}

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
    pub(super) plain: Vec<u8>,
}

/// A batch whose bytes are being received. Its slots are new ones: a batch that breaks, or is dropped, leaves the
/// pages that were there before as they were.
#[derive(Debug)]
#[must_use = "a batch counts only once it is finished"]
pub struct Landing {
    pub(super) space: SpaceId,
    pub(super) round: u32,
    pub(super) pages: Vec<(PageNo, PageDigest)>,
    pub(super) zeros: Vec<PageRun>,
    pub(super) extents: Vec<Extent>,
    /// How `buffers.packed` is unpacked; `None` when the bytes come as they are.
    pub(super) unpack: Option<Unpack>,
    pub(super) buffers: Buffers,
    pub(super) checked: bool,
    pub(super) returned: Arc<Mutex<Returned>>,
}

impl Landing {
    /// Where the payload is to be received, in order. The lengths sum to the payload's length; there are at
    /// most as many slices as pages with bytes.
    pub fn slices(&mut self) -> Vec<IoSliceMut<'_>> {
        self.checked = false;
        match self.unpack {
            Some(_) => vec![IoSliceMut::new(&mut self.buffers.packed)],
            None => self.extents.iter_mut().map(|extent| IoSliceMut::new(extent.bytes_mut())).collect(),
        }
    }

    /// Bytes of payload that are to be received.
    pub fn payload_len(&self) -> usize {
        match self.unpack {
            Some(_) => self.buffers.packed.len(),
            None => self.pages.len() * SLOT_BYTES,
        }
    }

    /// Unpacks what was received, and compares each page with its announced digest. Finishing a batch does this
    /// if it was not done before; it needs no store, so that it can be done outside a lock.
    ///
    /// # Errors
    /// [`StoreError::DigestMismatch`], [`StoreError::Unpack`].
    pub fn check(&mut self) -> Result<(), StoreError> {
        if self.checked {
            return Ok(());
        }
        self.unpack()?;
        let bytes = self.extents.iter().flat_map(|extent| extent.bytes().as_chunks::<SLOT_BYTES>().0);
        for (bytes, &(page, announced)) in bytes.zip(&self.pages) {
            if digest::page(bytes) != announced {
                return Err(StoreError::DigestMismatch { space: self.space, page });
            }
        }
        self.checked = true;
        Ok(())
    }

    /// Makes pages of a packed payload, in their slots.
    fn unpack(&mut self) -> Result<(), StoreError> {
        let Some(unpack) = self.unpack else { return Ok(()) };
        let (space, pages) = (self.space, self.pages.len());
        let failed = |cause| StoreError::Unpack { space, pages, cause };
        if let [extent] = &mut self.extents[..] {
            return unpack(&self.buffers.packed, extent.bytes_mut()).map_err(failed);
        }
        self.buffers.plain.resize(pages * SLOT_BYTES, 0);
        unpack(&self.buffers.packed, &mut self.buffers.plain).map_err(failed)?;
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
