//! Where the receiver has what pages are made of: one place for each of them, written as runs at one distance. A copy of a
//! mapping, at the same address in another process, is one run however its pages are scattered.

use crate::error::DecodeError;
use crate::frame::Fields;
use crate::page::{PageNo, PageRef, SpaceId};
use crate::varint;

/// Bytes of a run of one page at most.
pub(crate) const MAX_RUN_BYTES: usize = 1 + 5 + varint::MAX_PAGE_BYTES;

/// The number that a space is written as: one more than it is, so that the kept store, the last, takes one byte.
fn number(space: SpaceId) -> u64 {
    u64::from(space.0.wrapping_add(1))
}

/// How far from a page its source is.
fn distance(page: PageNo, source: &PageRef) -> i64 {
    source.page.0 as i64 - page.0 as i64
}

/// Appends the sources of `pages`.
pub(crate) fn put(sources: &[PageRef], pages: impl Iterator<Item = PageNo>, out: &mut Vec<u8>) {
    let mut places =
        sources.iter().zip(pages).map(|(source, page)| (source.space, distance(page, source))).peekable();
    while let Some(place) = places.next() {
        let mut len = 1;
        while places.next_if_eq(&place).is_some() {
            len += 1;
        }
        varint::put(len, out);
        varint::put(number(place.0), out);
        varint::put(varint::fold(place.1), out);
    }
}

/// Reads the sources of `pages`, which are `count`, into `sources`.
///
/// # Errors
/// What [`put`] would not have written.
pub(crate) fn get(
    fields: &mut Fields<'_>,
    mut pages: impl Iterator<Item = PageNo>,
    count: usize,
    sources: &mut Vec<PageRef>,
) -> Result<(), DecodeError> {
    let (mut left, mut before) = (count as u64, None);
    while left > 0 {
        let (len, space, folded) = (varint::get(fields)?, varint::get(fields)?, varint::get(fields)?);
        if len == 0 || len > left {
            return Err(DecodeError::Invalid("a run of sources that is empty or longer than the pages"));
        }
        let space = u32::try_from(space).map_err(|_| DecodeError::Invalid("a source in no space"))?;
        let (space, distance) = (SpaceId(space.wrapping_sub(1)), varint::unfold(folded));
        if before.replace((space, distance)) == Some((space, distance)) {
            return Err(DecodeError::Invalid("two runs of sources that are one"));
        }
        for page in pages.by_ref().take(len as usize) {
            let page = page.0.checked_add_signed(distance).filter(|page| *page < space.end());
            let page = page.ok_or(DecodeError::Invalid("a source beyond the end of its space"))?;
            sources.push(PageRef { space, page: PageNo(page) });
        }
        left -= len;
    }
    Ok(())
}
