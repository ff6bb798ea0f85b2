//! The best mix of ways: quick, and among those that are nearly as quick one with few bytes.
//!
//! With one way alone either the core or the link is idle for a part of the time. Batches of a quicker and of a smaller way
//! in turn keep both busy, which can be half again as quick on a link that is somewhat slower than the core.

/// What may be given up of the speed at most for fewer bytes: the link is others' too. Within that a saving is worth to be
/// slower by as much as the square root of the bytes is smaller.
const SLOWER: f64 = 1.25;
/// Compression has to gain so much over no compression: its costs are averages, and the peer has to unpack.
const WORTH_IT: f64 = 0.92;
/// A batch in turn with others must be coded while the link carries what is buffered: in so many times what it takes the link
/// raw, which is a third of the buffer (a sender that waits is woken when so much is free).
const LONGEST_CODING: f64 = 0.3 * super::link::BUFFER / (super::MAX_BATCH_PAGES * super::PAGE_SIZE) as f64;
/// Shares that are tried between two ways.
const STEPS: u32 = 16;

/// A way with what it costs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choice {
    pub(super) way: usize,
    /// Seconds that coding a byte takes.
    pub(super) coding: f64,
    /// What is left of it.
    pub(super) ratio: f64,
}

/// Batches of two ways in turn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mix {
    ways: [(usize, f64); 2],
    /// Seconds a byte takes.
    pub(super) time: f64,
    /// What is left of it.
    pub(super) ratio: f64,
    /// Seconds of these that coding takes.
    pub(super) coding: f64,
}

impl Mix {
    /// The ways and their shares, which sum to 1.
    pub(super) fn parts(&self) -> impl Iterator<Item = (usize, f64)> + Clone {
        self.ways.into_iter()
    }
}

/// The best of what can be made of `choices`, of which there is at least one. A byte takes the link `link` seconds and the core
/// `send` to send and `work` before that, of which there is `share` of the time.
pub(super) fn best(choices: &[Choice], link: f64, send: f64, work: f64, share: f64) -> Mix {
    let blend = |a: &Choice, b: &Choice, of_b: f64| {
        let both = |a: f64, b: f64| a * (1.0 - of_b) + b * of_b;
        let (coding, ratio) = (both(a.coding, b.coding), both(a.ratio, b.ratio));
        let time = ((work + coding + send * ratio) / share).max(link * ratio);
        Mix { ways: [(a.way, 1.0 - of_b), (b.way, of_b)], time, ratio, coding }
    };
    let mut mixes = Vec::with_capacity(choices.len() * choices.len() * STEPS as usize);
    for (at, a) in choices.iter().enumerate() {
        mixes.push(blend(a, a, 0.0));
        for b in choices[at + 1..].iter().filter(|b| a.coding.max(b.coding) / share <= LONGEST_CODING * link)
        {
            mixes.extend((1..STEPS).map(|step| blend(a, b, f64::from(step) / f64::from(STEPS))));
        }
    }
    let quickest = mixes.iter().map(|mix| mix.time).fold(f64::INFINITY, f64::min);
    let raw = choices.iter().find(|choice| choice.way == super::RAW).map(|raw| blend(raw, raw, 0.0));
    let most = raw.map_or(quickest * SLOWER, |raw| (quickest * SLOWER).min(raw.time * WORTH_IT));
    let price = |mix: &Mix| mix.time * mix.ratio.sqrt();
    let small = mixes.into_iter().filter(|mix| mix.time <= most).min_by(|a, b| price(a).total_cmp(&price(b)));
    small.or(raw).unwrap_or(Mix {
        ways: [(super::RAW, 1.0), (super::RAW, 0.0)],
        time: f64::INFINITY,
        ratio: 1.0,
        coding: 0.0,
    })
}
