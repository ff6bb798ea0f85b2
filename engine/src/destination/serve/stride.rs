//! How many pages are put in place in one call while somebody may have to wait for it to end.

use std::time::Duration;

/// Pages at most, 256 KiB: longer calls are no quicker.
pub(super) const MOST: u64 = 64;
const LEAST: u64 = 4;
/// A thread of the program that waits for a page waits for the call that is under way, too.
const LONG: Duration = Duration::from_micros(150);

/// As many pages as the kernel takes a tenth of a millisecond for. How long that is for one of them differs tenfold: memory that a
/// virtual machine has to get from its host first takes the most.
#[derive(Debug)]
pub(super) struct Stride {
    pages: u64,
}

impl Default for Stride {
    fn default() -> Self {
        Self { pages: MOST }
    }
}

impl Stride {
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    /// So many pages have taken so long.
    pub(super) fn took(&mut self, pages: u64, time: Duration) {
        let whole = time.mul_f64(self.pages as f64 / pages.max(1) as f64);
        if whole > LONG {
            self.pages = (self.pages / 2).max(LEAST);
        } else if whole * 2 <= LONG {
            self.pages = (self.pages * 2).min(MOST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(stride: &mut Stride, calls: usize, us_a_page: f64) -> u64 {
        for _ in 0..calls {
            let pages = stride.pages();
            stride.took(pages, Duration::from_secs_f64(us_a_page * pages as f64 / 1e6));
        }
        stride.pages()
    }

    #[test]
    fn it_is_as_long_as_its_time_allows_and_comes_back() {
        let mut stride = Stride::default();
        assert_eq!(after(&mut stride, 10, 0.5), MOST);
        assert_eq!(after(&mut stride, 10, 2.0), MOST, "128 us");
        assert_eq!(after(&mut stride, 10, 12.0), 8, "96 us; 16 would be 192");
        assert_eq!(after(&mut stride, 10, 1000.0), LEAST);
        assert_eq!(after(&mut stride, 10, 2.0), MOST);
    }

    #[test]
    fn one_call_that_was_held_up_is_soon_forgotten_and_few_pages_count_for_what_they_are() {
        let mut stride = Stride::default();
        stride.took(MOST, Duration::from_millis(20));
        assert_eq!(stride.pages(), MOST / 2);
        assert_eq!(after(&mut stride, 1, 2.0), MOST);
        stride.took(1, Duration::from_micros(2));
        assert_eq!(stride.pages(), MOST);
        stride.took(1, Duration::from_micros(12));
        assert_eq!(stride.pages(), MOST / 2);
        stride.took(0, Duration::ZERO);
        assert_eq!(stride.pages(), MOST);
    }
}
