//! How much a program that outruns the link is slowed down. Pure.

/// Shares of the time for which it stands still, one after the other. Small at first, because little is often enough; then in ever smaller
/// steps, because half of what is left of its pace is half of what it writes.
const STEPS: [f64; 7] = [0.2, 0.4, 0.6, 0.75, 0.87, 0.94, 0.98];

/// The next share after `share`, not above `most`; `None` when it is slowed down as much as is allowed.
pub fn next_share(share: f64, most: f64) -> Option<f64> {
    let next = STEPS.into_iter().find(|step| *step > share).unwrap_or(most).min(most);
    (next > share).then_some(next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_becomes_slower_step_by_step_and_no_slower_than_allowed() {
        for (most, steps) in [(0.9, 6), (0.5, 3), (0.1, 1), (0.99, 8), (0.0, 0)] {
            let mut shares = vec![0.0];
            while let Some(next) = next_share(shares[shares.len() - 1], most) {
                shares.push(next);
            }
            assert!(shares.windows(2).all(|pair| pair[0] < pair[1]), "{shares:?}");
            assert_eq!((shares.len() - 1, shares[shares.len() - 1]), (steps, most));
        }
    }
}
