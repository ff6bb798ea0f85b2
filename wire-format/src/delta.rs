//! A page as what differs from the bytes that were sent of it before.
//!
//! A program that writes to a page mostly changes a few words of it. QEMU's XBZRLE codes such a page as runs of zero and
//! other bytes of the XOR with the old one; here a bitmap says which blocks of 64 bytes differ and a mask for each of
//! these which words, so that finding and applying are a few wide steps and no loop over bytes:
//!
//! ```text
//! form   u8: 0 words, 1 bytes
//! blocks u64: bit i = block i (64 bytes) differs
//! masks  one u8 for each block that differs, not zero: bit j = word j (8 bytes) differs
//! then for each word that differs, in order:
//!   words: its 8 new bytes
//!   bytes: a u8, not zero: bit k = byte k differs; then the new bytes that do
//! ```
//! A delta says itself how long it is. The encoder takes the shorter form.

use crate::limits::PAGE_SIZE;

/// Blocks of a page.
const BLOCKS: usize = 64;
/// Bytes of a block, and words in it.
const BLOCK: usize = PAGE_SIZE / BLOCKS;
const WORDS: usize = BLOCK / 8;
const WORD_FORM: u8 = 0;
const BYTE_FORM: u8 = 1;
/// Form and bitmap.
const HEAD: usize = 9;

/// The shortest delta: of a page that is equal.
pub const MIN_DELTA_BYTES: usize = HEAD;

/// The longest delta: every word in words.
pub const MAX_DELTA_BYTES: usize = HEAD + BLOCKS + PAGE_SIZE;

/// A page's bytes.
pub type Page = [u8; PAGE_SIZE];

/// Why bytes are no delta. The page that they were to be applied to is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    /// It ends too soon.
    #[error("a delta ends after {0} bytes, in the middle")]
    Short(usize),
    /// A form that this version does not know.
    #[error("a delta of form {0} is not known here")]
    Form(u8),
    /// A block or word that is said to differ, in which nothing does.
    #[error("a delta says that something differs at byte {0} of the page, and not what")]
    Empty(usize),
}

#[inline]
fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Which blocks differ.
#[inline]
fn blocks(base: &Page, page: &Page) -> u64 {
    let pairs = base.chunks_exact(BLOCK).zip(page.chunks_exact(BLOCK));
    pairs.enumerate().fold(0, |bitmap, (block, (old, new))| {
        let differs = (0..WORDS).fold(0, |or, at| or | (word(old, at * 8) ^ word(new, at * 8)));
        bitmap | u64::from(differs != 0) << block
    })
}

/// One in each byte of a word that is not zero (Hacker's Delight, 6-1).
#[inline]
fn ones(word: u64) -> u64 {
    const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    ((((word & LOW) + LOW) | word) & !LOW) >> 7
}

/// The bytes of a word that are not zero, as a mask of eight bits: each one lands in the top byte by a shift of its own.
#[inline]
fn nonzero_bytes(word: u64) -> u8 {
    (ones(word).wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8
}

/// The words of a page that differ, found without a branch that a program's habits could mislead.
struct Differing {
    bitmap: u64,
    masks: [u8; BLOCKS],
    /// Numbers of the words, in order.
    words: [u16; PAGE_SIZE / 8],
    count: usize,
    /// Bytes that differ.
    bytes: u64,
}

impl Differing {
    #[inline]
    fn find(base: &Page, page: &Page) -> Self {
        let bitmap = blocks(base, page);
        let mut found = Self { bitmap, masks: [0; BLOCKS], words: [0; PAGE_SIZE / 8], count: 0, bytes: 0 };
        let mut left = bitmap;
        for slot in &mut found.masks[..bitmap.count_ones() as usize] {
            let block = left.trailing_zeros() as usize;
            left &= left - 1;
            let (old, new): (&[u8; BLOCK], &[u8; BLOCK]) = (
                base[block * BLOCK..][..BLOCK].try_into().expect("a block"),
                page[block * BLOCK..][..BLOCK].try_into().expect("a block"),
            );
            let mut mask = 0;
            for at in 0..WORDS {
                let differs = word(old, at * 8) ^ word(new, at * 8);
                let yes = differs != 0;
                // Written whether it counts or not: what does not is written over.
                found.words[found.count & 511] = (block * WORDS + at) as u16;
                found.count += usize::from(yes);
                mask |= u8::from(yes) << at;
                found.bytes += ones(differs).wrapping_mul(0x0101_0101_0101_0101) >> 56;
            }
            *slot = mask;
        }
        found
    }
}

/// Appends the delta that makes `page` of `base`, and returns its length. Equal pages have a delta of nine bytes.
pub fn encode(base: &Page, page: &Page, out: &mut Vec<u8>) -> usize {
    let begin = out.len();
    let found = Differing::find(base, page);
    let words = &found.words[..found.count];
    let by_bytes = (found.count as u64 + found.bytes) < words.len() as u64 * 8;
    out.reserve(MAX_DELTA_BYTES);
    out.push(if by_bytes { BYTE_FORM } else { WORD_FORM });
    out.extend_from_slice(&found.bitmap.to_le_bytes());
    out.extend_from_slice(&found.masks[..found.bitmap.count_ones() as usize]);
    let body = out.len();
    if by_bytes {
        out.resize(body + words.len() + found.bytes as usize, 0);
        let to = &mut out[body..];
        let mut at = 0;
        for &number in words {
            let from = usize::from(number) * 8;
            let mut differs = nonzero_bytes(word(base, from) ^ word(page, from));
            to[at] = differs;
            at += 1;
            while differs != 0 {
                to[at] = page[from + differs.trailing_zeros() as usize];
                at += 1;
                differs &= differs - 1;
            }
        }
    } else {
        out.resize(body + words.len() * 8, 0);
        for (to, &number) in out[body..].chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&page[usize::from(number) * 8..][..8]);
        }
    }
    out.len() - begin
}

/// What a delta that was looked through is made of.
struct Parts<'a> {
    by_bytes: bool,
    bitmap: u64,
    masks: &'a [u8],
    body: &'a [u8],
    len: usize,
}

/// Looks through a delta at the beginning of `bytes`: nothing is applied of one that is not whole.
fn parse(bytes: &[u8]) -> Result<Parts<'_>, DeltaError> {
    let short = DeltaError::Short(bytes.len());
    let form = *bytes.first().ok_or(short)?;
    let by_bytes = match form {
        WORD_FORM => false,
        BYTE_FORM => true,
        other => return Err(DeltaError::Form(other)),
    };
    let bitmap = u64::from_le_bytes(bytes.get(1..HEAD).ok_or(short)?.try_into().expect("eight bytes"));
    let count = bitmap.count_ones() as usize;
    let masks = bytes.get(HEAD..HEAD + count).ok_or(short)?;
    let mut words = 0;
    let mut left = bitmap;
    for mask in masks {
        if *mask == 0 {
            return Err(DeltaError::Empty(left.trailing_zeros() as usize * BLOCK));
        }
        left &= left - 1;
        words += mask.count_ones() as usize;
    }
    let body = &bytes[HEAD + count..];
    let body_len = if by_bytes {
        let mut at = 0;
        for _ in 0..words {
            let mask = *body.get(at).ok_or(short)?;
            if mask == 0 {
                return Err(DeltaError::Empty(at));
            }
            at += 1 + mask.count_ones() as usize;
        }
        at
    } else {
        words * 8
    };
    let body = body.get(..body_len).ok_or(short)?;
    Ok(Parts { by_bytes, bitmap, masks, body, len: HEAD + count + body_len })
}

/// Makes of the base in `page` the page that the delta at the beginning of `delta` was made from, and returns the
/// delta's length. The base has to be the very same bytes: that is for the caller to know (by its digest).
///
/// # Errors
/// [`DeltaError`]; `page` is as it was then.
pub fn apply(delta: &[u8], page: &mut Page) -> Result<usize, DeltaError> {
    let Parts { by_bytes, mut bitmap, masks, mut body, len } = parse(delta)?;
    for mask in masks {
        let start = bitmap.trailing_zeros() as usize * BLOCK;
        bitmap &= bitmap - 1;
        let mut mask = *mask;
        while mask != 0 {
            let at = start + mask.trailing_zeros() as usize * 8;
            mask &= mask - 1;
            let to = &mut page[at..at + 8];
            if !by_bytes {
                let (new, rest) = body.split_at(8);
                to.copy_from_slice(new);
                body = rest;
                continue;
            }
            let mut differs = body[0];
            let mut from = 1;
            while differs != 0 {
                to[differs.trailing_zeros() as usize] = body[from];
                from += 1;
                differs &= differs - 1;
            }
            body = &body[from..];
        }
    }
    Ok(len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn changed(words: &[(usize, u64)]) -> (Box<Page>, Box<Page>) {
        let mut base = Box::new([0u8; PAGE_SIZE]);
        base.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at * 31 + at / 256) as u8);
        let mut page = base.clone();
        for &(at, xor) in words {
            let new = word(&base[..], at * 8) ^ xor;
            page[at * 8..at * 8 + 8].copy_from_slice(&new.to_le_bytes());
        }
        (base, page)
    }

    fn delta(base: &Page, page: &Page) -> Vec<u8> {
        let mut out = vec![0xee];
        let len = encode(base, page, &mut out);
        assert_eq!(out.len(), len + 1);
        out.split_off(1)
    }

    #[test]
    fn few_words_are_few_bytes() {
        let (base, page) = changed(&[]);
        assert_eq!(delta(&base, &page).len(), HEAD);
        // Words all of whose bytes differ, far apart.
        let words: Vec<_> = (0..8).map(|k| (k * 64 + 3, u64::MAX)).collect();
        let (base, page) = changed(&words);
        assert_eq!(delta(&base, &page).len(), HEAD + 8 + 64);
        // Counters: one byte of each differs.
        let words: Vec<_> = (0..64).map(|k| (k * 8, 1)).collect();
        let (base, page) = changed(&words);
        assert_eq!(delta(&base, &page).len(), HEAD + 64 + 128);
        let words: Vec<_> = (0..512).map(|k| (k, u64::MAX)).collect();
        let (base, page) = changed(&words);
        assert_eq!(delta(&base, &page).len(), MAX_DELTA_BYTES);
    }

    #[test]
    fn the_bytes_are_those_of_the_table() {
        let (base, page) = changed(&[(9, 0xff00)]);
        let new = page[9 * 8 + 1];
        assert_eq!(delta(&base, &page), [1, 2, 0, 0, 0, 0, 0, 0, 0, 2, 2, new]);
        let (base, page) = changed(&[(511, u64::MAX)]);
        let mut wanted = vec![0, 0, 0, 0, 0, 0, 0, 0, 0x80, 0x80];
        wanted.extend_from_slice(&page[4088..]);
        assert_eq!(delta(&base, &page), wanted);
    }

    #[test]
    fn masks_of_bytes_are_exact() {
        for mask in 0..=255u8 {
            for fill in [0x01, 0x80, 0xff] {
                let bytes: [u8; 8] = std::array::from_fn(|k| if mask >> k & 1 == 1 { fill } else { 0 });
                assert_eq!(nonzero_bytes(u64::from_le_bytes(bytes)), mask);
            }
        }
    }

    #[test]
    fn what_is_no_delta_changes_nothing() {
        let (base, page) = changed(&[(1, 0xff), (100, u64::MAX), (101, 0xff_0000)]);
        let whole = delta(&base, &page);
        for len in 0..whole.len() {
            let mut target = base.clone();
            assert_eq!(apply(&whole[..len], &mut target), Err(DeltaError::Short(len)));
            assert_eq!(target, base);
        }
        let mut target = base.clone();
        assert_eq!(apply(&[7; 40], &mut target), Err(DeltaError::Form(7)));
        assert_eq!(apply(&[0, 4, 0, 0, 0, 0, 0, 0, 0, 0], &mut target), Err(DeltaError::Empty(128)));
        assert!(matches!(apply(&[1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0], &mut target), Err(DeltaError::Empty(_))));
        assert_eq!(target, base);
    }

    proptest! {
        #[test]
        fn applying_gives_the_page(
            words in proptest::collection::vec((0usize..512, any::<u64>(), 0u8..8), 0..200),
            behind in proptest::collection::vec(any::<u8>(), 0..20),
        ) {
            let words: Vec<_> = words.into_iter().map(|(at, xor, shift)| (at, xor >> (shift * 8))).collect();
            let (base, page) = changed(&words);
            let mut bytes = delta(&base, &page);
            let len = bytes.len();
            bytes.extend(&behind);
            let mut target = base.clone();
            prop_assert_eq!(apply(&bytes, &mut target), Ok(len));
            prop_assert_eq!(target, page);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), form in 0u8..2) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() {
                *first = form;
            }
            let mut target = [7u8; PAGE_SIZE];
            if let Ok(len) = apply(&bytes, &mut target) {
                prop_assert!(len <= bytes.len());
            } else {
                prop_assert!(target.iter().all(|byte| *byte == 7));
            }
        }
    }
}
