//! QEMU's coding of a page that was sent before (XBZRLE), written from its published description, to compare with.
//!
//! The XOR of old and new page is coded as pairs of a run of zero bytes and a run of others: the length of each run as
//! ULEB128, and behind the second the new bytes (docs/devel/migration in QEMU: "XBZRLE"). As there, runs are looked
//! for a machine word at a time.

use pageferry_wire_format::PAGE_SIZE;

type Page = [u8; PAGE_SIZE];

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Whether a byte of the word is zero.
fn has_zero(word: u64) -> bool {
    word.wrapping_sub(0x0101_0101_0101_0101) & !word & 0x8080_8080_8080_8080 != 0
}

fn uleb128(mut value: usize, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn read_uleb128(bytes: &mut &[u8]) -> Option<usize> {
    let mut value = 0;
    for shift in (0..14).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= usize::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// Appends the coding of `new` on top of `old`. Pages that are equal have none.
pub fn encode(old: &Page, new: &Page, out: &mut Vec<u8>) {
    let mut at = 0;
    while at < PAGE_SIZE {
        let start = at;
        while at + 8 <= PAGE_SIZE && word(old, at) == word(new, at) {
            at += 8;
        }
        while at < PAGE_SIZE && old[at] == new[at] {
            at += 1;
        }
        if at == PAGE_SIZE {
            // What is left is equal, and not coded.
            return;
        }
        uleb128(at - start, out);
        let start = at;
        while at + 8 <= PAGE_SIZE && !has_zero(word(old, at) ^ word(new, at)) {
            at += 8;
        }
        while at < PAGE_SIZE && old[at] != new[at] {
            at += 1;
        }
        uleb128(at - start, out);
        out.extend_from_slice(&new[start..at]);
    }
}

/// Makes the new page of the old one; `None` if the bytes are no coding.
pub fn apply(mut bytes: &[u8], page: &mut Page) -> Option<()> {
    let mut at = 0;
    while !bytes.is_empty() {
        at += read_uleb128(&mut bytes)?;
        let len = read_uleb128(&mut bytes)?;
        let new = bytes.get(..len)?;
        page.get_mut(at..at + len)?.copy_from_slice(new);
        bytes = &bytes[len..];
        at += len;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_page_comes_back(changes in proptest::collection::vec((0usize..PAGE_SIZE, 1u8..), 0..300)) {
            let old: Page = std::array::from_fn(|at| (at * 7) as u8);
            let mut new = old;
            for (at, xor) in changes {
                new[at] = old[at] ^ xor;
            }
            let mut bytes = Vec::new();
            encode(&old, &new, &mut bytes);
            let mut page = old;
            prop_assert_eq!(apply(&bytes, &mut page), Some(()));
            prop_assert_eq!(page, new);
        }
    }
}
