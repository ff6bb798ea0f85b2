//! A region of memory that is dirtied in an order which can be computed, so that the content of every page
//! follows from the number of writes alone.
//!
//! No table of versions is kept: it would live in the same memory, and if a page and its entry were both lost
//! to the same stale copy, they would agree with each other.

use super::content::{self, Corruption, Entropy, WORDS, mix};

/// A fixed order of `pages` pages that looks random and visits each once before it begins again.
#[derive(Clone, Copy, Debug)]
struct Sweep {
    pages: u64,
    step: u64,
    inverse: u64,
}

impl Sweep {
    fn new(pages: u64) -> Self {
        // A step near the golden section spreads neighbours in time over the whole range.
        let mut step = (pages as f64 * 0.618) as u64 % pages.max(1);
        let inverse = loop {
            match inverse(step, pages) {
                Some(inverse) => break inverse,
                None => step += 1,
            }
        };
        Self { pages, step, inverse }
    }

    /// Page of the n-th write.
    fn page(&self, n: u64) -> u64 {
        (u128::from(n % self.pages) * u128::from(self.step) % u128::from(self.pages)) as u64
    }

    /// How often a page was written in the first `n` writes.
    fn visits(&self, page: u64, n: u64) -> u64 {
        let place = (u128::from(page) * u128::from(self.inverse) % u128::from(self.pages)) as u64;
        n / self.pages + u64::from(place < n % self.pages)
    }
}

/// The multiplicative inverse of `a` modulo `m`, if there is one.
fn inverse(a: u64, m: u64) -> Option<u64> {
    if m == 1 {
        return Some(0);
    }
    let (mut r0, mut r1) = (i128::from(m), i128::from(a % m));
    let (mut t0, mut t1) = (0i128, 1i128);
    while r1 != 0 {
        let q = r0 / r1;
        (r0, r1) = (r1, r0 - q * r1);
        (t0, t1) = (t1, t0 - q * t1);
    }
    (r0 == 1).then(|| t0.rem_euclid(i128::from(m)) as u64)
}

/// How many older versions of a page a wrong word is compared with.
const OLDER: usize = 1000;

/// What a write changes in a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// So many words of it (1 to [`WORDS`]), always the same ones, spread evenly.
    Words(usize),
    /// All of it, to content that looks like this.
    Page(Entropy),
}

/// How the pages of a field are filled and written.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    /// Look of the content.
    pub entropy: Entropy,
    /// What a write changes.
    pub change: Change,
}

impl Default for Style {
    fn default() -> Self {
        Self { entropy: Entropy::default(), change: Change::Words(1) }
    }
}

/// What a region holds: all pages filled, then every `stride`-th from `offset` on written again and again.
#[derive(Clone, Debug)]
pub struct Field {
    seed: u64,
    pages: usize,
    offset: usize,
    stride: usize,
    style: Style,
    sweep: Sweep,
    done: u64,
}

impl Field {
    /// A field of `pages` pages that are all written in turn.
    pub fn new(seed: u64, pages: usize, style: Style) -> Self {
        Self::lattice(seed, pages, 0, 1, style)
    }

    /// A field of which only the pages `offset`, `offset + stride`, … are written after the filling.
    ///
    /// # Panics
    /// If no page would be written.
    pub fn lattice(seed: u64, pages: usize, offset: usize, stride: usize, style: Style) -> Self {
        assert!(stride > 0 && offset < stride && offset < pages, "no page to write");
        let sweep = Sweep::new((pages - offset).div_ceil(stride) as u64);
        Self { seed, pages, offset, stride, style, sweep, done: 0 }
    }

    /// Writes so far.
    pub fn done(&self) -> u64 {
        self.done
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Writes every page for the first time.
    pub fn fill(&self, words: &mut [u64]) {
        for (page, words) in words.chunks_exact_mut(WORDS).enumerate() {
            content::fill(words, self.key(page), self.style.entropy);
        }
    }

    /// Does the next write.
    pub fn write(&mut self, words: &mut [u64]) {
        let visited = self.sweep.page(self.done);
        let page = self.offset + self.stride * visited as usize;
        let visits = self.sweep.visits(visited, self.done) + 1;
        let words = &mut words[page * WORDS..(page + 1) * WORDS];
        let key = self.key(page);
        match self.style.change {
            Change::Page(entropy) => content::fill(words, mix(key, visits), entropy),
            Change::Words(count) => {
                for at in marked_words(key, count) {
                    words[at] = content::word(mix(key, visits), at, Entropy::Incompressible);
                }
            }
        }
        self.done += 1;
    }

    /// Compares everything.
    ///
    /// # Errors
    /// The first word that is not what it must be.
    ///
    /// # Panics
    /// If `words` is not the whole field.
    pub fn check(&self, words: &[u64]) -> Result<(), Corruption> {
        assert_eq!(words.len(), self.pages * WORDS, "a field is checked whole");
        words.chunks_exact(WORDS).enumerate().try_for_each(|(page, words)| self.check_page(page, words))
    }

    /// Compares one page.
    ///
    /// # Errors
    /// The first word that is not what it must be.
    pub fn check_page(&self, page: usize, words: &[u64]) -> Result<(), Corruption> {
        let (key, visits) = (self.key(page), self.visits(page));
        let version = |visits| Version { key, visits, style: self.style };
        let compared = content::compare(page, words, version(visits).expected());
        compared.map_err(|bad| {
            let older =
                (0..visits).rev().take(OLDER).find(|&older| version(older).word(bad.word) == bad.found);
            Corruption { writes_ago: older.map(|older| visits - older), ..bad }
        })
    }

    fn key(&self, page: usize) -> u64 {
        mix(self.seed, page as u64)
    }

    fn visits(&self, page: usize) -> u64 {
        if page % self.stride != self.offset {
            return 0;
        }
        self.sweep.visits((page / self.stride) as u64, self.done)
    }
}

/// A page as it is after a number of writes.
#[derive(Clone, Copy)]
struct Version {
    key: u64,
    visits: u64,
    style: Style,
}

impl Version {
    fn word(self, at: usize) -> u64 {
        let Style { entropy, change } = self.style;
        let written = mix(self.key, self.visits);
        match change {
            Change::Page(rewritten) if self.visits > 0 => content::word(written, at, rewritten),
            Change::Words(count) if self.visits > 0 && is_marked(self.key, count, at) => {
                content::word(written, at, Entropy::Incompressible)
            }
            _ => content::word(self.key, at, entropy),
        }
    }

    fn expected(self) -> impl FnMut(usize) -> u64 {
        move |at| self.word(at)
    }
}

/// The words of a page that a write of so many changes: not the same in every page, so that the whole page counts.
fn marked_words(key: u64, count: usize) -> impl Iterator<Item = usize> {
    (0..count).map(move |nth| (key as usize % WORDS + nth * (WORDS / count)) % WORDS)
}

/// Whether a word is one of them, without going through all.
fn is_marked(key: u64, count: usize, at: usize) -> bool {
    let (step, distance) = (WORDS / count, (at + WORDS - key as usize % WORDS) % WORDS);
    distance.is_multiple_of(step) && distance / step < count
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_sweep_visits_every_page_once() {
        for pages in 1..200 {
            let sweep = Sweep::new(pages);
            let mut seen = vec![0; pages as usize];
            for n in 0..3 * pages + pages / 2 {
                let page = sweep.page(n);
                assert_eq!(sweep.visits(page, n), seen[page as usize], "{pages} pages, write {n}");
                seen[page as usize] += 1;
            }
        }
    }

    #[test]
    fn a_field_that_was_written_checks_and_one_wrong_bit_anywhere_does_not() {
        for style in [
            Style::default(),
            Style { change: Change::Words(8), ..Style::default() },
            Style { change: Change::Words(WORDS), ..Style::default() },
            Style { change: Change::Page(Entropy::Incompressible), ..Style::default() },
            Style { change: Change::Page(Entropy::Compressible), ..Style::default() },
            Style { entropy: Entropy::Compressible, change: Change::Words(1) },
        ] {
            let mut words = vec![0u64; 9 * WORDS];
            let mut field = Field::lattice(5, 9, 1, 3, style);
            field.fill(&mut words);
            for n in 0..40 {
                assert_eq!(field.check(&words), Ok(()), "after {n} writes");
                field.write(&mut words);
            }
            for at in 0..words.len() {
                words[at] ^= 1 << (at % 64);
                let corruption = field.check(&words).expect_err("a flipped bit is found");
                assert_eq!(corruption.page * WORDS + corruption.word, at);
                words[at] ^= 1 << (at % 64);
            }
        }
    }

    #[test]
    fn a_write_changes_as_many_words_as_it_says() {
        for count in [1, 3, 8, 64, 100, WORDS] {
            let mut words = vec![0u64; 5 * WORDS];
            let mut field = Field::new(1, 5, Style { change: Change::Words(count), ..Style::default() });
            field.fill(&mut words);
            for _ in 0..12 {
                let before = words.clone();
                field.write(&mut words);
                let changed = words.iter().zip(&before).filter(|(new, old)| new != old).count();
                assert_eq!(changed, count);
                assert_eq!(field.check(&words), Ok(()));
            }
        }
    }

    #[test]
    fn a_page_as_it_was_before_its_last_write_is_found() {
        let mut words = vec![0u64; 7 * WORDS];
        let mut field = Field::new(1, 7, Style::default());
        field.fill(&mut words);
        for _ in 0..30 {
            let stale = words.clone();
            field.write(&mut words);
            let bad = field.check(&stale).expect_err("the state before a write is not the state after it");
            assert_eq!(bad.writes_ago, Some(1));
        }
    }

    proptest! {
        #[test]
        fn inverses_invert(a in 1u64..1 << 40, m in 2u64..1 << 40) {
            if let Some(i) = inverse(a, m) {
                prop_assert_eq!(u128::from(a % m) * u128::from(i) % u128::from(m), 1);
            }
        }

        #[test]
        fn any_number_of_writes_checks(pages in 1usize..60, writes in 0usize..300, seed: u64) {
            let mut words = vec![0u64; pages * WORDS];
            let mut field = Field::new(seed, pages, Style::default());
            field.fill(&mut words);
            for _ in 0..writes {
                field.write(&mut words);
            }
            prop_assert_eq!(field.check(&words), Ok(()));
        }
    }
}
