//! Which way whole pages travel: as they are, or compressed, how hard, and on top of what.
//!
//! One worker reads, compresses and sends, and the system buffers megabytes of what it sends: the core and the link work at
//! the same time. A byte of content that costs `c` seconds of coding, `s` for each byte that goes out, and is `ratio` long on a link that
//! takes `w` a byte, takes
//!
//! ```text
//! max(work + c + s * ratio, w * ratio)
//! ```
//!
//! where `work` is what reading and hashing take; a worker that may work for a share of the time only takes as many times longer
//! for its part of it. [`mix`] finds what is quickest under this, [`link`] what `w` and `s` are; here are
//! the costs of each way on this data, and the looks that keep them true.

mod link;
mod mix;
mod prospect;
#[cfg(test)]
mod tests;

use crate::batch::Coding;
use crate::limits::{MAX_BATCH_PAGES, PAGE_SIZE};
use link::Meter;
use mix::{Choice, Mix};
pub use prospect::{Prospect, prospect};
use std::time::Duration;

/// How the whole pages of a batch travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// As they are.
    Raw,
    /// By zstd at this level.
    Zstd(i32),
    /// By zstd at this level, on top of what was sent of these pages before.
    ZstdOnBase(i32),
}

/// The ways there are. Level 6 makes a twentieth less of a heap than level 1 in five times the time; what lies between gains
/// less for its time, and what lies above is slower than any link that could use it.
const WAYS: [Way; 5] = [Way::Raw, Way::Zstd(1), Way::Zstd(6), Way::ZstdOnBase(1), Way::ZstdOnBase(6)];
const RAW: usize = 0;
const QUICK: usize = 1;

/// Weight of a new measurement in the average of a way's cost.
const WEIGHT: f64 = 0.15;
/// No worker is thought to have less of the time.
const LEAST_SHARE: f64 = 1e-3;
/// Share of the time that goes into looking at ways that are not used.
const LOOKING: f64 = 0.01;
/// Seconds that may go into that at the beginning, before there was time to save them up, and at most.
const FIRST_LOOKS: f64 = 5e-3;
const MOST_LOOKS: f64 = 50e-3;
/// So many choices lie between two looks at a way at least.
const LOOK_AGAIN: u32 = 64;
/// A way that is not used is thought to be at best so much of what it was: data changes along a program's memory.
const BEST_RATIO: f64 = 0.8;
/// Below this time of a byte on the link compression is not even tried: only pages that are one repetition are compressed
/// faster than this, and the peer has to unpack them.
const FASTEST_ZSTD: f64 = 1.0 / 2.5e9;
/// A link that is not waited for is filled with raw pages from time to time, to see whether it became faster: not before it
/// could have carried them so many times.
const GLIMPSE_COST: f64 = 200.0;
/// What the link took when it was full last, and takes now at most: then it has become faster for sure.
const FASTER: f64 = 0.7;
/// Choices that a glimpse lasts at most: more than the system buffers.
const GLIMPSE: u32 = 64;
/// ... and where the system says what waits in its buffer, which need not be filled then.
const TOLD_GLIMPSE: u32 = 16;
/// A glimpse must be able to gain so much.
const WORTH_A_GLIMPSE: f64 = 1.3;
/// Seconds that it takes to keep a copy of a byte, in a virtual machine that has to get the memory for it: 8 us a page.
const KEEPING: f64 = 2e-9;
/// Where a byte takes the link less than this (seconds), nothing is kept: a fast link is a slower one for a moment when its other end is held up.
pub const SLOW_LINK: f64 = 6e-9;
/// Choices for which a plan is kept: making one takes microseconds, and a raw batch not many more.
const KEEP_PLAN: u32 = 8;

/// What a way was seen to cost.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    /// Seconds a byte takes, and what is left of it.
    coding: f64,
    ratio: f64,
    looks: u32,
    /// Choices since it was looked at.
    age: u32,
}

/// Decides batch by batch which way pages travel, from what the link and each way are seen to do. One for each worker.
///
/// Besides what is in use, another way is tried from time to time if its best case could win: data changes along a program's
/// memory, first measurements are made with cold caches, and links change their pace. That takes about a hundredth of the time.
#[derive(Clone, Debug)]
pub struct CodingChooser {
    meter: Meter,
    seen: [Seen; WAYS.len()],
    allowed: [bool; WAYS.len()],
    /// What is wanted and was not chosen yet, so that a mix of ways comes out as it should.
    owed: [f64; WAYS.len()],
    /// Seconds that reading and hashing take for a byte.
    work: f64,
    /// Share of the time in which the core may work.
    share: f64,
    /// Seconds that may go into looks.
    budget: f64,
    /// Seconds that were seen to pass, and when the next glimpse may begin.
    clock: f64,
    next_glimpse: Option<f64>,
    /// Choices that the glimpse under way still has.
    glimpse: u32,
    /// What the link took when it was full last.
    full_link: f64,
    compressing: bool,
    /// What is best for batches without and with a base, for the next choices; and how many were made.
    plans: [Option<Mix>; 2],
    turn: u32,
    /// Seconds of coding for a byte and what is left of it, as was planned last.
    lately: (f64, f64),
}

impl Default for CodingChooser {
    fn default() -> Self {
        Self {
            meter: Meter::default(),
            seen: Default::default(),
            allowed: [true; WAYS.len()],
            owed: Default::default(),
            work: 0.0,
            share: 1.0,
            budget: FIRST_LOOKS,
            clock: 0.0,
            next_glimpse: None,
            glimpse: 0,
            full_link: 0.0,
            compressing: false,
            plans: [None; 2],
            turn: 0,
            lately: (0.0, 1.0),
        }
    }
}

impl CodingChooser {
    /// One that leaves all pages raw ([`Coding::Raw`]) or compresses all ([`Coding::Zstd`]: on top of a base where there is
    /// one; [`Coding::ZstdOnBase`]: only these). Other codings are none of whole pages: with them pages are left raw.
    pub fn only(coding: Coding) -> Self {
        let allows = |way: &Way| match way {
            Way::Raw => !matches!(coding, Coding::Zstd),
            Way::Zstd(_) => coding == Coding::Zstd,
            Way::ZstdOnBase(_) => matches!(coding, Coding::Zstd | Coding::ZstdOnBase),
        };
        Self { allowed: WAYS.each_ref().map(allows), ..Self::default() }
    }

    /// The share of the time in which the worker may do anything, above 0 and at most 1: it rests for the remainder, while the link carries on.
    /// What is not a share is taken as the nearest.
    pub fn set_share(&mut self, share: f64) {
        self.share = if share.is_nan() { 1.0 } else { share.clamp(LEAST_SHARE, 1.0) };
        self.plans = [None; 2];
    }

    /// `bytes` (of a frame with its payload) took `time` to send.
    pub fn observe_link(&mut self, bytes: usize, time: Duration) {
        let time = time.as_secs_f64();
        self.meter.sent(bytes, time);
        self.pass(time);
    }

    /// Just before a send, `now` since any fixed point in time: so many bytes have arrived at the other end so far, and
    /// so many are still `waiting` in the system's buffer because the link has not taken them. For systems that say so; the
    /// pace of the link is known much sooner then.
    pub fn observe_backlog(&mut self, now: Duration, arrived: u64, waiting: u64) {
        self.meter.look(now.as_secs_f64(), arrived as f64, waiting as f64);
    }

    /// Time passes until the next batch in which nothing is sent: between rounds.
    pub fn pause(&mut self) {
        self.meter.pause();
    }

    /// The worker did nothing for so long, because it may work for a share of the time only.
    pub fn observe_rest(&mut self, time: Duration) {
        let time = time.as_secs_f64();
        self.meter.worked(time);
        self.pass(time);
    }

    /// Reading and hashing `bytes` took `time`.
    pub fn observe_work(&mut self, bytes: usize, time: Duration) {
        let time = time.as_secs_f64();
        self.work += WEIGHT * (time / bytes.max(1) as f64 - self.work);
        self.spent(time);
    }

    /// `way` made `out` bytes of `bytes` in `time`; what it made is sent next.
    pub fn observe(&mut self, way: Way, bytes: usize, out: usize, time: Duration) {
        let (bytes, time) = (bytes.max(1) as f64, time.as_secs_f64());
        self.spent(time);
        let Some(index) = WAYS.iter().position(|known| *known == way).filter(|index| *index != RAW) else {
            return;
        };
        // Never nothing, so that it can be compared.
        let (coding, ratio) = ((time / bytes).max(1e-12), (out as f64 / bytes).max(1e-6));
        let before = self.seen[index];
        self.seen[index].look(coding, ratio);
        if before.looks == 0 {
            self.plans = [None; 2];
            return;
        }
        // What one level shows of the data holds for the other too, until that is looked at.
        let now = self.seen[index];
        let others = WAYS.iter().zip(&mut self.seen).enumerate();
        for (_, (_, seen)) in others.filter(|(at, (of, _))| *at != index && of.coding() == way.coding()) {
            seen.coding *= now.coding / before.coding;
            seen.ratio = (seen.ratio * now.ratio / before.ratio).min(1.0);
        }
    }

    /// Pages of the next batch: as many as a batch has where they are compressed, because zstd finds more in more; else a
    /// quarter of it, which stays in a core's second-level cache while it is read, hashed and sent.
    pub fn batch_pages(&self) -> usize {
        if self.compressing { MAX_BATCH_PAGES } else { MAX_BATCH_PAGES / 4 }
    }

    /// Whether the link is known, and slower than one on which a core's time matters more than bytes.
    pub fn link_is_slow(&self) -> bool {
        self.meter.link().is_some_and(|link| link >= SLOW_LINK)
    }

    /// Whether the core waits for the link, by so much that it can do something for later with each byte that is sent: keep a
    /// copy of it, into memory that it has to get first.
    pub fn core_is_idle(&self) -> bool {
        let (coding, ratio) = self.lately;
        let core = (self.work + coding + self.meter.send() * ratio) / self.share;
        self.meter.link().is_some_and(|link| link >= SLOW_LINK && link * ratio - core > KEEPING)
    }

    /// Seconds that a byte takes the link, as far as is known; `None` as long as it was never waited for.
    pub fn link(&self) -> Option<f64> {
        self.meter.link()
    }

    /// The way of the next batch. `has_base`: the bytes that were sent before of its pages are at hand.
    pub fn choose(&mut self, has_base: bool) -> Way {
        self.seen.iter_mut().for_each(|seen| seen.age = seen.age.saturating_add(1));
        let may = self.possible(has_base);
        let index = if may[RAW] { self.balance(&may, has_base) } else { self.compress(&may) };
        WAYS[index]
    }

    /// Which ways there are for a batch; raw where nothing else is.
    fn possible(&self, has_base: bool) -> [bool; WAYS.len()] {
        let mut may = self.allowed;
        for (may, way) in may.iter_mut().zip(WAYS) {
            *may &= has_base || way.coding() != Coding::ZstdOnBase;
        }
        may[RAW] |= !may.contains(&true);
        may
    }

    /// Where raw is no way: the quickest of the others, all of which are looked at first.
    fn compress(&mut self, may: &[bool; WAYS.len()]) -> usize {
        self.compressing = true;
        let unseen = (0..WAYS.len()).find(|&at| may[at] && self.seen[at].looks == 0);
        unseen.or_else(|| self.look(may, None)).unwrap_or_else(|| {
            let mix = self.mix(&self.choices(may));
            self.draw(&mix)
        })
    }

    fn balance(&mut self, may: &[bool; WAYS.len()], has_base: bool) -> usize {
        let Some(link) = self.meter.link() else {
            // Until it was waited for, the link is as fast as any. While something waits for it for the first time, what is sent
            // is compressed: if the link is slow this was right, and if not it is soon known.
            let quick = self.quick_look(may);
            return quick.unwrap_or_else(|| self.stay_raw());
        };
        if self.glimpse > 0 {
            self.glimpse -= 1;
            if !self.meter.is_full() {
                return self.stay_raw();
            }
            self.glimpse = 0;
        }
        if link < FASTEST_ZSTD {
            return self.stay_raw();
        }
        self.turn = self.turn.wrapping_add(1);
        if self.turn.is_multiple_of(KEEP_PLAN) {
            self.plans = [None; 2];
        }
        let plan = usize::from(has_base);
        if let Some(mix) = self.plans[plan] {
            return self.draw(&mix);
        }
        let mix = self.mix(&self.choices(may));
        if self.begins_glimpse(link, &mix) {
            return self.stay_raw();
        }
        if let Some(index) = self.look(may, Some(&mix)) {
            return index;
        }
        if !has_base {
            // What has a base is rare, and says nothing about the batches to come.
            self.compressing = mix.parts().any(|(way, share)| way != RAW && share > 0.0);
            self.lately = (mix.coding, mix.ratio);
        }
        self.plans[plan] = Some(mix);
        self.draw(&mix)
    }

    fn stay_raw(&mut self) -> usize {
        (self.compressing, self.plans, self.lately) = (false, [None; 2], (0.0, 1.0));
        RAW
    }

    /// What is known of each possible way.
    fn choices(&self, may: &[bool; WAYS.len()]) -> Vec<Choice> {
        let known = |&way: &usize| may[way] && (way == RAW || self.seen[way].looks > 0);
        (0..WAYS.len()).filter(known).map(|way| self.choice(way)).collect()
    }

    fn choice(&self, way: usize) -> Choice {
        match way {
            RAW => Choice { way, coding: 0.0, ratio: 1.0 },
            _ => Choice { way, coding: self.seen[way].coding, ratio: self.seen[way].ratio },
        }
    }

    fn mix(&self, choices: &[Choice]) -> Mix {
        let link = self.meter.link().unwrap_or(0.0);
        mix::best(choices, link, self.meter.send(), self.work, self.share)
    }

    /// Takes the way of a mix that is furthest behind its share.
    fn draw(&mut self, mix: &Mix) -> usize {
        let mut wanted = [0.0; WAYS.len()];
        mix.parts().for_each(|(way, share)| wanted[way] += share);
        for (owed, wanted) in self.owed.iter_mut().zip(wanted) {
            *owed = if wanted == 0.0 { 0.0 } else { *owed + wanted };
        }
        let parts = mix.parts().filter(|(_, share)| *share > 0.0).map(|(way, _)| way);
        let way = parts.max_by(|a, b| self.owed[*a].total_cmp(&self.owed[*b])).unwrap_or(RAW);
        self.owed[way] -= 1.0;
        way
    }

    /// A way that is not used, could win, and can be tried for what was saved up.
    fn look(&mut self, may: &[bool; WAYS.len()], now: Option<&Mix>) -> Option<usize> {
        let bytes = (self.batch_pages() * PAGE_SIZE) as f64;
        let index = (1..WAYS.len()).find(|&way| {
            let seen = self.seen[way];
            let uses = |way| now.is_some_and(|mix| mix.parts().any(|(of, share)| of == way && share > 0.0));
            // The harder level is not worth a look where the other one is not.
            let too_early = way % 2 == 0 && now.is_some() && !uses(way - 1);
            if !may[way] || uses(way) || too_early || (seen.looks > 0 && seen.age < LOOK_AGAIN) {
                return false;
            }
            let (guess, best) = self.expect(way);
            if guess * bytes > self.budget {
                return false;
            }
            let mut choices = self.choices(may);
            choices.retain(|choice| choice.way != way);
            choices.push(best);
            let hoped = self.mix(&choices);
            now.is_none_or(|mix| {
                hoped.time < 0.9 * mix.time || (hoped.time <= mix.time && hoped.ratio < 0.97 * mix.ratio)
            })
        })?;
        self.budget -= self.expect(index).0 * bytes;
        self.seen[index].age = 0;
        Some(index)
    }

    /// The quickest way of compression, if the link seems to be the slower one and this can be tried for what was saved up.
    fn quick_look(&mut self, may: &[bool; WAYS.len()]) -> Option<usize> {
        let cost = self.expect(QUICK).0 * (self.batch_pages() * PAGE_SIZE) as f64;
        if !may[QUICK] || !self.meter.is_backlogged() || cost > self.budget {
            return None;
        }
        self.budget -= cost;
        Some(QUICK)
    }

    /// What a way is expected to cost for a byte, and what it could be at best.
    fn expect(&self, way: usize) -> (f64, Choice) {
        let seen = self.seen[way];
        if seen.looks > 0 {
            // The longer ago it was looked at, the less what was seen is believed.
            let cheaper = (f64::from(LOOK_AGAIN / 2) / f64::from(seen.age)).min(0.5);
            let (coding, ratio) = (seen.coding * cheaper, seen.ratio * BEST_RATIO);
            return (seen.coding, Choice { way, coding, ratio });
        }
        let sibling = match WAYS[way] {
            Way::Zstd(6) => self.seen[1],
            Way::ZstdOnBase(6) => self.seen[3],
            Way::ZstdOnBase(_) => self.seen[1],
            _ => Seen::default(),
        };
        let (slower, smaller) = match WAYS[way] {
            Way::Zstd(6) | Way::ZstdOnBase(6) => (4.0, 0.9),
            _ => (1.0, 0.3),
        };
        match sibling.looks {
            0 => (slower * 3e-9, Choice { way, coding: slower * FASTEST_ZSTD, ratio: 0.02 }),
            _ => (
                slower * sibling.coding,
                Choice { way, coding: slower / 2.0 * sibling.coding, ratio: smaller * sibling.ratio },
            ),
        }
    }

    /// A link that is not waited for could have become any faster: only filling it shows.
    fn begins_glimpse(&mut self, link: f64, mix: &Mix) -> bool {
        let cost = GLIMPSE_COST * link::BUFFER * link;
        let next = *self.next_glimpse.get_or_insert(self.clock + cost);
        if self.meter.is_full() {
            self.full_link = link;
            return false;
        }
        let surely = link < FASTER * self.full_link;
        let gains = mix.time > WORTH_A_GLIMPSE * (self.work + self.meter.send()) / self.share;
        if !gains || !(surely || self.clock >= next) {
            return false;
        }
        self.full_link = link;
        self.next_glimpse = Some(self.clock + cost);
        self.glimpse = if self.meter.is_told() { TOLD_GLIMPSE } else { GLIMPSE };
        self.meter.restart();
        true
    }

    /// The core worked for so long, and not at sending.
    fn spent(&mut self, time: f64) {
        self.meter.worked(time);
        self.pass(time);
    }

    fn pass(&mut self, time: f64) {
        self.clock += time;
        self.budget = (self.budget + LOOKING * time).min(MOST_LOOKS);
    }
}

impl Way {
    /// The coding of a batch that travels this way.
    pub fn coding(self) -> Coding {
        match self {
            Way::Raw => Coding::Raw,
            Way::Zstd(_) => Coding::Zstd,
            Way::ZstdOnBase(_) => Coding::ZstdOnBase,
        }
    }
}

impl Seen {
    fn look(&mut self, coding: f64, ratio: f64) {
        self.looks = self.looks.saturating_add(1);
        let weight = WEIGHT.max(1.0 / f64::from(self.looks));
        self.coding += weight * (coding - self.coding);
        self.ratio += weight * (ratio - self.ratio);
        self.age = 0;
    }
}
