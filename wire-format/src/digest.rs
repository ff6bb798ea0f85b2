//! Digests: xxh3 with 128 bits over a page's bytes, and an order-independent sum over a whole space.
//!
//! xxh3 is not a cryptographic hash: it protects from accidents (a page that was not tracked, a damaged link, a
//! bug), not from a peer that wants to deceive. For two different pages to agree by accident has a chance of
//! 2^-128.

use crate::limits::PAGE_SIZE;
pub use crate::page::PageDigest;
use crate::page::PageNo;
use crate::sys;
use xxhash_rust::xxh3::xxh3_128;

/// The digest of a page of zeros, so that it need not be computed for each.
pub const ZERO_PAGE: PageDigest = PageDigest(ZERO_PAGE_BYTES);

const ZERO_PAGE_BYTES: [u8; 16] = xxhash_rust::const_xxh3::xxh3_128(&[0; 4096]).to_le_bytes();

/// The digest of a page's bytes (or of any others). Of whole pages with the widest vectors that this processor has.
#[inline]
pub fn page(bytes: &[u8]) -> PageDigest {
    let wide = <&[u8; PAGE_SIZE]>::try_from(bytes).ok().and_then(sys::page_digest);
    PageDigest(wide.unwrap_or_else(|| xxh3_128(bytes)).to_le_bytes())
}

/// Whether all bytes are zero. Looks at 256 bytes at a time, so that a page with content is left after the
/// first block and a page without is read at the speed of the cache.
#[inline]
pub fn is_zero(page: &[u8]) -> bool {
    let mut blocks = page.chunks_exact(256);
    blocks.by_ref().all(|block| {
        block
            .chunks_exact(8)
            .fold(0, |or, word| or | u64::from_ne_bytes(word.try_into().expect("chunks of eight")))
            == 0
    }) && blocks.remainder().iter().all(|byte| *byte == 0)
}

/// The check of a frame's header and head, chained to that of the frame before.
pub(crate) fn check(before: u64, header: &[u8], head: &[u8]) -> u64 {
    let mut hasher = xxhash_rust::xxh3::Xxh3::with_seed(before);
    hasher.update(header);
    hasher.update(head);
    hasher.digest()
}

/// The digest of pages one after the other: begins as zeros, and with each page becomes `xxh3_128(it, then the page's digest)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Chain(u128);

impl Chain {
    /// Counts the next page in.
    #[inline]
    pub fn push(&mut self, digest: &PageDigest) {
        let mut bytes = [0; 32];
        bytes[..16].copy_from_slice(&self.0.to_le_bytes());
        bytes[16..].copy_from_slice(&digest.0);
        self.0 = xxh3_128(&bytes);
    }

    /// As 16 little-endian bytes.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0.to_le_bytes()
    }

    /// From [`Chain::to_bytes`].
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(u128::from_le_bytes(bytes))
    }
}

impl<'a> FromIterator<&'a PageDigest> for Chain {
    fn from_iter<T: IntoIterator<Item = &'a PageDigest>>(digests: T) -> Self {
        digests.into_iter().fold(Self::default(), |mut chain, digest| {
            chain.push(digest);
            chain
        })
    }
}

/// The digest of all pages of a space, whatever the order in which they were counted: the sum, modulo 2^128, of
/// `xxh3_128(page number as 8 little-endian bytes, then the page's digest)`. Pages can be taken out again, so
/// that it is kept up to date while pages change and costs nothing when it is needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct SpaceDigest(u128);

impl SpaceDigest {
    /// Counts a page in.
    #[inline]
    pub fn insert(&mut self, page: PageNo, digest: &PageDigest) {
        self.0 = self.0.wrapping_add(term(page, digest));
    }

    /// Takes a page out that was counted in with this digest.
    #[inline]
    pub fn remove(&mut self, page: PageNo, digest: &PageDigest) {
        self.0 = self.0.wrapping_sub(term(page, digest));
    }

    /// Counts in what another digest has counted in.
    pub fn merge(&mut self, other: &SpaceDigest) {
        self.0 = self.0.wrapping_add(other.0);
    }

    /// As 16 little-endian bytes.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0.to_le_bytes()
    }

    /// From [`SpaceDigest::to_bytes`].
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(u128::from_le_bytes(bytes))
    }
}

impl std::fmt::Display for SpaceDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

#[inline]
fn term(page: PageNo, digest: &PageDigest) -> u128 {
    let mut bytes = [0; 24];
    bytes[..8].copy_from_slice(&page.0.to_le_bytes());
    bytes[8..].copy_from_slice(&digest.0);
    xxh3_128(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_zero_page_is_known() {
        assert_eq!(page(&[0; 4096]), ZERO_PAGE);
        assert!(is_zero(&[0; 4096]));
        for at in [0, 7, 255, 256, 4095] {
            let mut bytes = [0; 4096];
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "byte {at}");
        }
        assert!(!is_zero(&[0, 0, 1]), "a remainder counts too");
    }

    #[test]
    fn a_space_digest_has_no_order_and_can_forget() {
        let (a, b) = (page(&[1; 4096]), page(&[2; 4096]));
        let (mut left, mut right) = (SpaceDigest::default(), SpaceDigest::default());
        left.insert(PageNo(1), &a);
        left.insert(PageNo(2), &b);
        right.insert(PageNo(2), &b);
        right.insert(PageNo(1), &a);
        assert_eq!(left, right);
        right.insert(PageNo(3), &a);
        assert_ne!(left, right);
        right.remove(PageNo(3), &a);
        assert_eq!(left, right);
        let mut swapped = SpaceDigest::default();
        swapped.insert(PageNo(1), &b);
        swapped.insert(PageNo(2), &a);
        assert_ne!(left, swapped, "the place of a page counts");
        let mut sum = SpaceDigest::default();
        sum.merge(&left);
        assert_eq!(sum, left);
        assert_eq!(SpaceDigest::from_bytes(sum.to_bytes()), sum);
        assert_eq!(SpaceDigest::from_bytes([1; 16]).to_string(), "01".repeat(16));
    }
}
