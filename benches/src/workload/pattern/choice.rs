//! Which page is written next: the access patterns that a working-set estimate has to get right.
//!
//! A choice follows from the seed and the number of earlier choices alone, so the history of a program can be computed
//! again when its memory is checked.

use crate::workload::content::Random;
use clap::ValueEnum;

/// How writes spread over the pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Pattern {
    /// Every page is as likely as every other
    Uniform,
    /// 90 % of the writes go to 5 % of the pages, which lie scattered
    HotSet,
    /// The k-th most likely page has a weight of 1/k^0.99; likely pages lie scattered
    Zipf,
    /// One page after the other, and from the start again
    Sequential,
    /// 90 % of the writes go to one eighth of the memory, another one every second
    Phased,
}

/// Share of the writes that a hot set gets.
const HOT_WRITES: f64 = 0.9;
/// Share of the pages that are the hot set.
const HOT_PAGES: f64 = 0.05;
/// Exponent of the Zipf distribution (that of the YCSB benchmarks).
const ZIPF: f64 = 0.99;
/// Parts of the memory through which the phased pattern moves.
const PARTS: u64 = 8;
/// From one part to the next: odd, so that all are visited, and not to a neighbour.
const PART_STEP: u64 = 3;

/// The choices of one pattern, in their order.
#[derive(Clone, Debug)]
pub struct Chooser {
    pattern: Pattern,
    pages: usize,
    /// Choices before the phased pattern moves.
    per_phase: u64,
    random: Random,
    made: u64,
    /// Pages from the most likely on, for the patterns in which they lie scattered.
    order: Vec<u32>,
    /// Zipf: the probability of the first k + 1 pages of `order`.
    up_to: Vec<f64>,
}

impl Chooser {
    /// Choices among `pages` pages; `per_phase` choices are a second of the phased pattern.
    ///
    /// # Panics
    /// If there are no pages, or 16 TiB of them.
    pub fn new(pattern: Pattern, pages: usize, per_phase: u64, seed: u64) -> Self {
        assert!(pages > 0 && u32::try_from(pages).is_ok(), "{pages} pages to choose from");
        let mut random = Random::new(seed);
        let order = match pattern {
            Pattern::HotSet | Pattern::Zipf => shuffled(pages, &mut random),
            _ => Vec::new(),
        };
        let up_to = match pattern {
            Pattern::Zipf => zipf(pages),
            _ => Vec::new(),
        };
        Self { pattern, pages, per_phase: per_phase.max(1), random, made: 0, order, up_to }
    }

    /// The next page.
    pub fn next_page(&mut self) -> usize {
        let n = self.made;
        self.made += 1;
        match self.pattern {
            Pattern::Uniform => self.random.below(self.pages),
            Pattern::Sequential => (n % self.pages as u64) as usize,
            Pattern::HotSet => {
                let hot = ((self.pages as f64 * HOT_PAGES) as usize).max(1);
                let place = self.hot_or_not(0, hot);
                self.order[place] as usize
            }
            Pattern::Zipf => {
                let draw = unit(&mut self.random);
                let place = self.up_to.partition_point(|&sum| sum <= draw).min(self.pages - 1);
                self.order[place] as usize
            }
            Pattern::Phased => {
                let part = n / self.per_phase * PART_STEP % PARTS;
                let edge = |part| (self.pages as u64 * part / PARTS) as usize;
                let (start, end) = (edge(part), edge(part + 1));
                // A field of less than eight pages has parts without any.
                self.hot_or_not(start.min(self.pages - 1), (end - start).max(1))
            }
        }
    }

    /// One of the `hot` pages from `start` on, or sometimes one of all the others.
    fn hot_or_not(&mut self, start: usize, hot: usize) -> usize {
        let cold = self.pages - hot;
        if cold == 0 || unit(&mut self.random) < HOT_WRITES {
            return start + self.random.below(hot);
        }
        let page = self.random.below(cold);
        if page < start { page } else { page + hot }
    }
}

/// A number from 0 up to, and without, 1.
fn unit(random: &mut Random) -> f64 {
    (random.draw() >> 11) as f64 / (1u64 << 53) as f64
}

/// All pages in a random order (Fisher and Yates).
fn shuffled(pages: usize, random: &mut Random) -> Vec<u32> {
    let mut order: Vec<u32> = (0..pages as u32).collect();
    for last in (1..pages).rev() {
        order.swap(last, random.below(last + 1));
    }
    order
}

fn zipf(pages: usize) -> Vec<f64> {
    let mut sums: Vec<f64> = (1..=pages)
        .scan(0.0, |sum, rank| {
            *sum += (rank as f64).powf(-ZIPF);
            Some(*sum)
        })
        .collect();
    let whole = sums[pages - 1];
    sums.iter_mut().for_each(|sum| *sum /= whole);
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: usize = 1000;

    /// How often each page was chosen.
    fn counts(pattern: Pattern, choices: usize) -> Vec<usize> {
        let mut chooser = Chooser::new(pattern, PAGES, u64::MAX, 3);
        let mut counts = vec![0; PAGES];
        (0..choices).for_each(|_| counts[chooser.next_page()] += 1);
        counts
    }

    fn near(found: f64, expected: f64, tolerance: f64) {
        assert!((found / expected - 1.0).abs() < tolerance, "{found} instead of {expected}");
    }

    #[test]
    fn uniform_writes_leave_the_pages_untouched_that_chance_leaves() {
        // After n choices among p pages, a page is untouched with (1 - 1/p)^n.
        let untouched = counts(Pattern::Uniform, 2 * PAGES).iter().filter(|&&count| count == 0).count();
        near(untouched as f64, PAGES as f64 * (-2.0f64).exp(), 0.15);
        assert!(counts(Pattern::Uniform, 100 * PAGES).iter().all(|count| (50..160).contains(count)));
    }

    #[test]
    fn a_twentieth_of_the_pages_gets_nine_tenths_of_the_writes() {
        let mut counts = counts(Pattern::HotSet, 200_000);
        counts.sort_unstable_by(|a, b| b.cmp(a));
        near(counts[..50].iter().sum::<usize>() as f64, 180_000.0, 0.01);
        assert!(counts[49] > 5 * counts[50], "the edge of the hot set: {} and {}", counts[49], counts[50]);
        assert!(counts[999] > 0, "the others are written, too");
    }

    #[test]
    fn zipf_gives_the_first_ranks_their_weights_and_scatters_them() {
        let counts = counts(Pattern::Zipf, 400_000);
        let mut ranked: Vec<usize> = (0..PAGES).collect();
        ranked.sort_unstable_by_key(|&page| std::cmp::Reverse(counts[page]));
        let whole: f64 = (1..=PAGES).map(|rank| (rank as f64).powf(-0.99)).sum();
        for rank in [1usize, 2, 4, 8] {
            let expected = 400_000.0 * (rank as f64).powf(-0.99) / whole;
            near(counts[ranked[rank - 1]] as f64, expected, 0.05);
        }
        let neighbours = ranked.windows(2).take(20).filter(|pair| pair[0].abs_diff(pair[1]) == 1).count();
        assert!(neighbours < 3, "{:?}", &ranked[..20]);
    }

    #[test]
    fn sequential_writes_wrap_around() {
        let mut chooser = Chooser::new(Pattern::Sequential, 3, 1, 0);
        assert_eq!(std::array::from_fn(|_| chooser.next_page()), [0, 1, 2, 0, 1, 2, 0]);
    }

    #[test]
    fn a_phase_stays_in_its_eighth_and_eight_phases_visit_all() {
        let mut chooser = Chooser::new(Pattern::Phased, PAGES, 2000, 9);
        let mut visited = [false; 8];
        for phase in 0..8 {
            let mut parts = [0; 8];
            (0..2000).for_each(|_| parts[chooser.next_page() * 8 / PAGES] += 1);
            let hot = (0..8).max_by_key(|&part| parts[part]).expect("eight parts");
            assert!((1740..1860).contains(&parts[hot]), "phase {phase}: {parts:?}");
            visited[hot] = true;
        }
        assert_eq!(visited, [true; 8]);
    }

    #[test]
    fn the_smallest_fields_work_and_a_seed_repeats_itself() {
        for pattern in Pattern::value_variants() {
            for pages in 1..20 {
                let mut first = Chooser::new(*pattern, pages, 5, 1);
                let mut second = first.clone();
                for _ in 0..200 {
                    let page = first.next_page();
                    assert!(page < pages, "{pattern:?}: page {page} of {pages}");
                    assert_eq!(page, second.next_page());
                }
            }
        }
    }
}
