//! `pagemap-N.img`: which pages of a task are in `pages-K.img`, in the order in which they are there.

use super::frame::{self, FormatError, Messages};
use super::{ImageError, format};
use crate::image_dir::ImageDir;

/// The pages are in the parent's images.
pub const PARENT: u32 = 1;
/// The pages may be brought in late.
pub const LAZY: u32 = 2;
/// The pages are in this `pages-K.img`.
pub const PRESENT: u32 = 4;

const MAGIC: [u32; 2] = [frame::COMMON, frame::PAGEMAP];

/// A run of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Address of the first page.
    pub address: u64,
    /// Number of pages.
    pub pages: u64,
    /// [`PARENT`], [`LAZY`], [`PRESENT`].
    pub flags: u32,
}

impl Entry {
    /// One past the last byte.
    pub fn end(&self) -> u64 {
        self.address + self.pages * crate::PAGE_SIZE
    }

    /// Whether the bytes are in this image's own pages file.
    pub fn is_present(&self) -> bool {
        self.flags & PRESENT != 0
    }
}

/// A whole `pagemap-N.img`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pagemap {
    /// The K of `pages-K.img`.
    pub pages_id: u32,
    /// Ascending, disjoint.
    pub entries: Vec<Entry>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct HeadMessage {
    #[prost(uint32, required, tag = "1")]
    pages_id: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct EntryMessage {
    #[prost(uint64, required, tag = "1")]
    address: u64,
    /// How many pages, up to criu 4.1; newer ones write it in `pages`.
    #[prost(uint32, required, tag = "2")]
    compatible_pages: u32,
    #[prost(bool, optional, tag = "3")]
    in_parent: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    flags: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    pages: Option<u64>,
}

impl Pagemap {
    /// Reads the bytes of a `pagemap-N.img`.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut messages = Messages::new(bytes, &MAGIC)?;
        let head: HeadMessage = messages.one("head")?;
        let mut entries: Vec<Entry> = Vec::new();
        while let Some(message) = messages.next::<EntryMessage>()? {
            let pages = message.pages.unwrap_or(message.compatible_pages.into());
            let flags = message.flags.unwrap_or(match message.in_parent {
                Some(true) => PARENT,
                _ => PRESENT,
            });
            let end = pages.checked_mul(crate::PAGE_SIZE).and_then(|n| n.checked_add(message.address));
            let sorted = entries.last().is_none_or(|last| last.end() <= message.address);
            if message.address % crate::PAGE_SIZE != 0 || end.is_none() || pages == 0 || !sorted {
                return Err(FormatError::Value(format!(
                    "an entry of {pages} pages at {:#x} is misaligned, empty or out of order",
                    message.address
                )));
            }
            entries.push(Entry { address: message.address, pages, flags });
        }
        Ok(Self { pages_id: head.pages_id, entries })
    }

    /// The bytes of a `pagemap-N.img` that criu of any version reads: runs are cut where the old field ends.
    pub fn encode(&self) -> Vec<u8> {
        let mut image = frame::begin(&MAGIC);
        frame::push(&mut image, &HeadMessage { pages_id: self.pages_id });
        for entry in &self.entries {
            let (mut address, mut left) = (entry.address, entry.pages);
            while left > 0 {
                let pages = left.min(u32::MAX.into());
                frame::push(
                    &mut image,
                    &EntryMessage {
                        address,
                        compatible_pages: pages as u32,
                        in_parent: None,
                        flags: Some(entry.flags),
                        pages: Some(pages),
                    },
                );
                address += pages * crate::PAGE_SIZE;
                left -= pages;
            }
        }
        image
    }

    /// Reads the pagemap of a task. `vpid` is its pid in its own pid namespace.
    pub fn read(images: &ImageDir, vpid: i32) -> Result<Self, ImageError> {
        let name = file_name(vpid);
        Self::decode(&super::read(images, &name)?).map_err(format(&name))
    }
}

/// The name of a task's pagemap image.
pub fn file_name(vpid: i32) -> String {
    format!("pagemap-{vpid}.img")
}

/// The name of the pages image with this number.
pub fn pages_name(pages_id: u32) -> String {
    format!("pages-{pages_id}.img")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn golden() {
        let pagemap =
            Pagemap { pages_id: 3, entries: vec![Entry { address: 0x1000, pages: 2, flags: PRESENT }] };
        let bytes = pagemap.encode();
        let expected = [
            0x19, 0x43, 0x56, 0x54, 0x25, 0x40, 0x08, 0x56, 2, 0, 0, 0, 0x08, 3, 9, 0, 0, 0, 0x08, 0x80,
            0x20, 0x10, 2, 0x20, 4, 0x28, 2,
        ];
        assert_eq!(bytes[..], expected[..]);
        assert_eq!(Pagemap::decode(&bytes).unwrap(), pagemap);
    }

    /// The last two bytes say the number of pages as criu 4.2 does; without them it is the old field's.
    #[test]
    fn both_page_counts_are_read() {
        let head = [0x19, 0x43, 0x56, 0x54, 0x25, 0x40, 0x08, 0x56, 2, 0, 0, 0, 0x08, 3];
        let new = [9, 0, 0, 0, 0x08, 0x80, 0x20, 0x10, 0, 0x20, 4, 0x28, 2];
        let old = [7, 0, 0, 0, 0x08, 0x80, 0x20, 0x10, 2, 0x20, 4];
        for entry in [&new[..], &old[..]] {
            let bytes = [&head[..], entry].concat();
            assert_eq!(Pagemap::decode(&bytes).unwrap().entries[0].pages, 2);
        }
    }

    proptest! {
        #[test]
        fn round_trip(runs in proptest::collection::vec((1u64..1000, 1u64..1_000_000, 1u32..8), 0..50)) {
            let mut at = 0;
            let entries = runs.into_iter().map(|(gap, pages, flags)| {
                let entry = Entry { address: (at + gap) * 4096, pages, flags };
                at += gap + pages;
                entry
            }).collect();
            let pagemap = Pagemap { pages_id: 1, entries };
            prop_assert_eq!(Pagemap::decode(&pagemap.encode()).unwrap(), pagemap);
        }

        #[test]
        fn hostile_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Pagemap::decode(&bytes);
            let mut image = super::frame::begin(&MAGIC);
            image.extend(bytes);
            let _ = Pagemap::decode(&image);
        }
    }
}
