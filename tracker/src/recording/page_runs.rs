//! A set of pages in a payload: the gaps and lengths of its runs, or one bit a page, whichever is smaller.

use super::fields::{Fields, Malformed, put};
use crate::page_set::PageSet;

const EMPTY: u8 = 0;
const RUNS: u8 = 1;
const BITS: u8 = 2;

/// A page number has at most this: 64 bits of address less 12 of the page.
const LAST: u64 = 1 << 52;
/// No machine has more pages (16 TiB); whoever counts through a set relies on that it ends.
const MOST: u64 = 1 << 32;

pub(super) fn put_pages(out: &mut Vec<u8>, pages: &PageSet) {
    let runs = pages.runs();
    let (Some(first), Some(last)) = (runs.first(), runs.last()) else {
        out.push(EMPTY);
        return;
    };
    let start = out.len();
    out.push(RUNS);
    put(out, runs.len() as u64);
    // Gaps apart from lengths: each kind compresses better among its own.
    let mut end = 0;
    for run in runs {
        put(out, run.start - end);
        end = run.end();
    }
    for run in runs {
        put(out, run.len - 1);
    }
    let bytes = (last.end() - first.start).div_ceil(8);
    // A bitmap has a head of up to ten bytes.
    if bytes + 10 >= (out.len() - start) as u64 {
        return;
    }
    out.truncate(start);
    out.push(BITS);
    put(out, first.start);
    put(out, bytes);
    let at = out.len();
    out.resize(at + bytes as usize, 0);
    let bits = &mut out[at..];
    for run in runs {
        let (mut bit, end) = ((run.start - first.start) as usize, (run.end() - first.start) as usize);
        while bit < end {
            if bit % 8 == 0 && end - bit >= 8 {
                bits[bit / 8] = 0xff;
                bit += 8;
            } else {
                bits[bit / 8] |= 1 << (bit % 8);
                bit += 1;
            }
        }
    }
}

pub(super) fn pages(fields: &mut Fields<'_>) -> Result<PageSet, Malformed> {
    let beyond = Malformed("a page lies beyond all addresses");
    let mut pages = PageSet::default();
    match fields.byte()? {
        EMPTY => {}
        RUNS => {
            let count = fields.count(2)?;
            let mut lengths = Fields(fields.0);
            for _ in 0..count {
                lengths.number()?;
            }
            let (mut end, mut total) = (0u64, 0u64);
            for at in 0..count {
                let gap = fields.number()?;
                let len = lengths.number()?;
                if gap >= LAST || len >= LAST || end + gap + len >= LAST {
                    return Err(beyond);
                }
                if gap == 0 && at > 0 {
                    return Err(Malformed("two runs of pages are one"));
                }
                total += len + 1;
                if total > MOST {
                    return Err(Malformed("a set has more pages than any machine"));
                }
                pages.insert(end + gap, len + 1);
                end += gap + len + 1;
            }
            fields.0 = lengths.0;
        }
        BITS => {
            let first = fields.number()?;
            let len = fields.count(1)?;
            if first.saturating_add(len as u64 * 8) > LAST {
                return Err(beyond);
            }
            for (at, byte) in fields.bytes(len)?.iter().enumerate() {
                let page = first + at as u64 * 8;
                match byte {
                    0 => {}
                    0xff => pages.insert(page, 8),
                    byte => {
                        (0..8).filter(|bit| byte >> bit & 1 == 1).for_each(|bit| pages.insert(page + bit, 1))
                    }
                }
            }
        }
        _ => return Err(Malformed("a set of pages has an unknown form")),
    }
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page_set::Run;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn sets_come_back(start in 0u64..1 << 51, runs in proptest::collection::vec((1u64..300, 1u64..60), 0..60)) {
            let mut end = start;
            let set: PageSet = runs
                .iter()
                .map(|(gap, len)| {
                    let run = Run { start: end + gap, len: *len };
                    end = run.end();
                    run
                })
                .collect();
            let mut out = Vec::new();
            put_pages(&mut out, &set);
            let mut fields = Fields(&out);
            prop_assert_eq!(pages(&mut fields).unwrap(), set);
            prop_assert!(fields.0.is_empty());
        }

        #[test]
        fn any_bytes_are_a_set_or_an_error(form in 0u8..3, bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let bytes = [&[form][..], &bytes[..]].concat();
            if let Ok(set) = pages(&mut Fields(&bytes)) {
                prop_assert!(set.len() <= MOST);
                prop_assert!(set.runs().last().is_none_or(|run| run.end() <= LAST));
            }
        }
    }

    #[test]
    fn the_smaller_form_is_taken() {
        let size = |set: PageSet| {
            let mut out = Vec::new();
            put_pages(&mut out, &set);
            (out[0], out.len())
        };
        let every = |step: u64| (0..1000).map(|at| Run { start: at * step, len: 1 }).collect::<PageSet>();
        assert_eq!(size(every(2)), (BITS, 1 + 1 + 2 + 250), "one bit a page");
        assert_eq!(size(every(100)), (RUNS, 1 + 2 + 1000 + 1000), "two bytes a run");
        assert_eq!(size(every(1)), (RUNS, 1 + 1 + 1 + 2));
        assert_eq!(size(PageSet::default()), (EMPTY, 1));
    }
}
