//! What a page must hold: every byte follows from a seed, the page's number and how often it was written.

use std::fmt;

/// 64-bit words of a page.
pub const WORDS: usize = 512;

/// How the content looks to a compressor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Entropy {
    /// Random words.
    #[default]
    Incompressible,
    /// Runs of one repeated byte.
    Compressible,
}

/// Mixes two numbers into one that looks random (the finaliser of splitmix64).
pub fn mix(a: u64, b: u64) -> u64 {
    let mut z = a.wrapping_add(b.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Word `at` of the page with this key.
pub fn word(key: u64, at: usize, entropy: Entropy) -> u64 {
    match entropy {
        Entropy::Incompressible => mix(key, at as u64),
        Entropy::Compressible => (mix(key, at as u64 / 64) & 0xff) * 0x0101_0101_0101_0101,
    }
}

/// Writes a page whole.
pub fn fill(page: &mut [u64], key: u64, entropy: Entropy) {
    for (at, slot) in page.iter_mut().enumerate() {
        *slot = word(key, at, entropy);
    }
}

/// A word that is not what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Corruption {
    /// Page, counted from the start of the region.
    pub page: usize,
    /// Word in the page.
    pub word: usize,
    /// What was written there.
    pub expected: u64,
    /// What is there.
    pub found: u64,
    /// If what is there was right so many writes of the page ago: that.
    pub writes_ago: Option<u64>,
}

impl fmt::Display for Corruption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { page, word, expected, found, writes_ago } = self;
        write!(f, "page {page} word {word}: {found:#018x} instead of {expected:#018x}")?;
        match writes_ago {
            Some(writes) => write!(f, ", as it was before its last {writes} writes"),
            None => Ok(()),
        }
    }
}

/// Compares a page with what the function says about each word.
///
/// # Errors
/// The first word that differs.
pub fn compare(
    page_number: usize,
    page: &[u64],
    mut expected: impl FnMut(usize) -> u64,
) -> Result<(), Corruption> {
    for (at, &found) in page.iter().enumerate() {
        let expected = expected(at);
        if found != expected {
            return Err(Corruption { page: page_number, word: at, expected, found, writes_ago: None });
        }
    }
    Ok(())
}

/// Deterministic random numbers (splitmix64): the same seed gives the same history on both sides of a move.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0, 0)
    }

    /// The next number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.draw()) * bound as u128) >> 64) as usize
    }
}
