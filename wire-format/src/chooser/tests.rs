use super::*;

const BATCH: f64 = 1048576.0;

/// A compressor on some data: bytes a second and what is left, at each level and on a base.
#[derive(Clone, Copy)]
struct Data {
    speed: f64,
    ratio: f64,
}

impl Data {
    fn of(self, way: Way) -> (f64, f64) {
        match way {
            Way::Raw => (f64::INFINITY, 1.0),
            Way::Zstd(1) => (self.speed, self.ratio),
            Way::Zstd(_) => (self.speed / 4.7, self.ratio * if self.ratio < 0.99 { 0.95 } else { 1.0 }),
            Way::ZstdOnBase(1) => (self.speed * 1.5, self.ratio * 0.2),
            Way::ZstdOnBase(_) => (self.speed / 3.0, self.ratio * 0.18),
        }
    }
}

/// One worker, a link, and the system's buffer between them, in virtual time.
struct World {
    /// Bytes a second.
    link: f64,
    data: Data,
    /// Bytes that the system takes before a send has to wait, and room at which it goes on.
    buffer: f64,
    wakes: f64,
    /// Bytes a second that are read and hashed.
    read: f64,
    has_base: bool,
    /// Share of the time in which the worker may work, what it has worked, and until when that is paid for.
    share: f64,
    worked: f64,
    paid: f64,
    /// Whether the system says what waits in its buffer.
    tells: bool,
    /// Bytes that were sent.
    sent: f64,
    /// Seed of the unrest of a machine that does other things too; 0: it does not.
    unrest: u64,
    now: f64,
    queued: f64,
    wire: f64,
    count: [usize; WAYS.len()],
}

/// What a run came to.
#[derive(Clone, Copy, Debug)]
struct Outcome {
    speed: f64,
    ratio: f64,
    packed: usize,
    /// Share of the time in which the worker worked.
    worked: f64,
}

impl World {
    fn new(link: f64, speed: f64, ratio: f64) -> Self {
        Self {
            link,
            data: Data { speed, ratio },
            buffer: 4.0 * BATCH,
            wakes: 0.0,
            read: 4e9,
            has_base: false,
            share: 1.0,
            worked: 0.0,
            paid: 0.0,
            tells: false,
            sent: 0.0,
            unrest: 0,
            now: 0.0,
            queued: 0.0,
            wire: 0.0,
            count: [0; WAYS.len()],
        }
    }

    /// What takes `seconds` on a quiet machine takes from 0.8 to 1.4 of them, and each 60 ms the core is lent to something
    /// else for 3 ms.
    fn restless(&mut self, seconds: f64) -> f64 {
        if self.unrest == 0 {
            return seconds;
        }
        // Xorshift (Marsaglia 2003).
        self.unrest ^= self.unrest << 13;
        self.unrest ^= self.unrest >> 7;
        self.unrest ^= self.unrest << 17;
        let dice = (self.unrest >> 11) as f64 / (1u64 << 53) as f64;
        seconds * (0.8 + 0.6 * dice) + if dice * 60e-3 < seconds { 3e-3 } else { 0.0 }
    }

    fn pass(&mut self, seconds: f64) {
        self.now += seconds;
        self.queued = (self.queued - seconds * self.link).max(0.0);
    }

    fn work(&mut self, seconds: f64) {
        self.worked += seconds;
        self.pass(seconds);
    }

    /// Rests for what was worked since `begin`, when so much had been.
    fn rest(&mut self, begin: f64, worked: f64) -> f64 {
        self.paid = self.paid.max(begin) + (self.worked - worked) / self.share;
        let rest = (self.paid - self.now).max(0.0);
        self.pass(rest);
        rest
    }

    /// Sends into the buffer and says how long that took.
    fn send(&mut self, bytes: f64) -> f64 {
        let begin = self.now;
        self.sent += bytes;
        let copy = self.restless(5e-6 + bytes / 6e9);
        self.work(copy);
        let mut surplus = self.queued + bytes - self.buffer;
        if surplus > 0.0 {
            // A sender that waits is woken only when there is some room.
            surplus = surplus.max((self.wakes * self.buffer).min(self.queued));
            self.pass(surplus / self.link);
        }
        self.queued += bytes;
        self.now - begin
    }

    fn tell(&self, chooser: &mut CodingChooser) {
        if self.tells {
            let arrived = (self.sent - self.queued) as u64;
            chooser.observe_backlog(Duration::from_secs_f64(self.now), arrived, self.queued as u64);
        }
    }

    /// Sends so many bytes of content as `chooser` says, or all in one way.
    fn run(&mut self, content: f64, chooser: &mut CodingChooser, fixed: Option<Way>) -> Outcome {
        let (begin, wire, worked) = (self.now, self.wire, self.worked);
        let (mut sent, mut batches, mut packed) = (0.0, 0, 0);
        while sent < content {
            let bytes = (chooser.batch_pages() * PAGE_SIZE) as f64;
            let seconds = |time: f64| Duration::from_secs_f64(time);
            let before = (self.now, self.worked);
            let read = self.restless(bytes / self.read);
            self.work(read);
            chooser.observe_work(bytes as usize, seconds(read));
            self.tell(chooser);
            let way = fixed.unwrap_or_else(|| chooser.choose(self.has_base));
            let (speed, ratio) = self.data.of(way);
            let mut out = bytes;
            if way != Way::Raw {
                packed += 1;
                out = bytes * ratio;
                let time = self.restless(bytes / speed);
                self.work(time);
                chooser.observe(way, bytes as usize, out as usize, seconds(time));
            }
            self.tell(chooser);
            let time = self.send(out);
            chooser.observe_link(out as usize, seconds(time));
            self.wire += out;
            chooser.observe_rest(seconds(self.rest(before.0, before.1)));
            self.count[WAYS.iter().position(|known| *known == way).unwrap()] += 1;
            sent += bytes;
            batches += 1;
        }
        self.pass(self.queued / self.link);
        let took = self.now - begin;
        Outcome {
            speed: sent / took,
            ratio: (self.wire - wire) / sent,
            packed: packed * 1000 / batches,
            worked: (self.worked - worked) / took,
        }
    }
}

/// After what fills the system's buffer for the first time, and that no choice can know about.
fn run_in(mut world: World, fixed: Option<Way>) -> Outcome {
    let mut chooser = CodingChooser::default();
    world.run(64.0 * BATCH, &mut chooser, fixed);
    world.run(1000.0 * BATCH, &mut chooser, fixed)
}

fn run(link: f64, speed: f64, ratio: f64, fixed: Option<Way>) -> Outcome {
    run_in(World::new(link, speed, ratio), fixed)
}

const LINKS: [f64; 12] = [1e6, 12.5e6, 60e6, 125e6, 250e6, 400e6, 600e6, 800e6, 1.25e9, 2e9, 3e9, 6e9];
const SPEEDS: [f64; 5] = [80e6, 300e6, 600e6, 1.2e9, 2.2e9];
const RATIOS: [f64; 7] = [0.01, 0.1, 0.25, 0.5, 0.8, 0.99, 1.0];

#[test]
fn a_slow_link_compresses_and_a_fast_one_does_not() {
    for link in [1.25e6, 12.5e6, 125e6] {
        let packed = run(link, 600e6, 0.25, None).packed;
        assert!(packed > 970, "{link} bytes a second and a heap: {packed}");
    }
    assert_eq!(run(4e9, 600e6, 0.25, None).packed, 0, "32 Gbit/s: not even tried");
    assert!(run(125e6, 600e6, 1.0, None).packed <= 17, "incompressible: only looked at from time to time");
}

#[test]
fn the_choice_is_never_slower_than_no_compression() {
    for link in LINKS {
        for speed in SPEEDS {
            for ratio in RATIOS {
                for (wakes, tells) in [(0.0, false), (0.3, false), (0.0, true), (0.3, true)] {
                    let world = || World { wakes, tells, ..World::new(link, speed, ratio) };
                    let raw = run_in(world(), Some(Way::Raw)).speed;
                    let chosen = run_in(world(), None);
                    assert!(
                        chosen.speed > 0.97 * raw,
                        "link {link:e}, zstd {speed:e}, ratio {ratio}, wakes {wakes}, tells {tells}: {raw:e} raw, {chosen:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_restless_machine_does_not_lead_astray() {
    for link in LINKS {
        for speed in SPEEDS {
            for ratio in RATIOS {
                for tells in [false, true] {
                    let world =
                        || World { wakes: 0.3, tells, unrest: 0x9e37_79b9, ..World::new(link, speed, ratio) };
                    let alone = |way| run_in(world(), Some(way)).speed;
                    let raw = alone(Way::Raw);
                    let chosen = run_in(world(), None);
                    assert!(
                        chosen.speed > 0.96 * raw,
                        "link {link:e}, zstd {speed:e}, ratio {ratio}, tells {tells}: {raw:e} raw, {chosen:?}"
                    );
                    let best = [Way::Zstd(1), Way::Zstd(6)].map(alone).into_iter().fold(raw, f64::max);
                    assert!(
                        chosen.speed > 0.9 * best,
                        "link {link:e}, zstd {speed:e}, ratio {ratio}, tells {tells}: {best:e} is possible, {chosen:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn the_choice_is_nearly_as_quick_as_the_best_way_by_itself() {
    for link in LINKS {
        for speed in SPEEDS {
            for ratio in RATIOS {
                let alone = |way| run(link, speed, ratio, Some(way)).speed;
                let best = [Way::Raw, Way::Zstd(1), Way::Zstd(6)].map(alone).into_iter().fold(0.0, f64::max);
                let chosen = run(link, speed, ratio, None);
                assert!(
                    chosen.speed > 0.92 * best,
                    "link {link:e}, zstd {speed:e}, ratio {ratio}: {best:e} is possible, {chosen:?}"
                );
            }
        }
    }
}

#[test]
fn a_slow_link_takes_the_smallest_that_keeps_up() {
    // A heap over 100 Mbit/s: level 6 takes less time than its bytes.
    let chosen = run(12.5e6, 412e6, 0.217, None);
    let small = run(12.5e6, 412e6, 0.217, Some(Way::Zstd(6)));
    assert!(chosen.ratio < 1.01 * small.ratio && chosen.speed > 0.98 * small.speed, "{chosen:?}, {small:?}");
    // Over 1 Gbit/s it does not, and level 1 does.
    let chosen = run(125e6, 412e6, 0.217, None);
    let quick = run(125e6, 412e6, 0.217, Some(Way::Zstd(1)));
    assert!(chosen.ratio < 1.02 * quick.ratio && chosen.speed > 0.95 * quick.speed, "{chosen:?}, {quick:?}");
}

#[test]
fn a_slow_link_is_known_from_the_first_megabyte() {
    for link in [1e6, 12.5e6, 60e6, 125e6] {
        let mut world = World { tells: true, ..World::new(link, 500e6, 0.2) };
        world.run(32.0 * BATCH, &mut CodingChooser::default(), None);
        let raw = (world.count[RAW] * MAX_BATCH_PAGES / 4 * PAGE_SIZE) as f64;
        assert!(raw <= BATCH, "{link:e} bytes a second: {raw:e} bytes went raw");
    }
    // One that takes everything is not slowed down by looking.
    for link in [3e9, 6e9, 20e9] {
        let speed = |fixed| {
            let mut world = World { tells: true, ..World::new(link, 500e6, 0.2) };
            world.run(256.0 * BATCH, &mut CodingChooser::default(), fixed).speed
        };
        let (chosen, raw) = (speed(None), speed(Some(Way::Raw)));
        assert!(chosen > 0.95 * raw, "{link:e} bytes a second: {chosen:e} instead of {raw:e}");
    }
}

#[test]
fn only_a_core_that_waits_is_idle() {
    let idle = |link, speed, ratio| {
        let mut chooser = CodingChooser::default();
        let mut world = World { tells: true, ..World::new(link, speed, ratio) };
        world.run(100.0 * BATCH, &mut chooser, None);
        (0..8).all(|_| {
            chooser.choose(false);
            chooser.core_is_idle()
        })
    };
    assert!(!CodingChooser::default().core_is_idle(), "nothing is known");
    assert!(idle(12.5e6, 400e6, 0.2) && idle(12.5e6, 400e6, 1.0), "100 Mbit/s");
    assert!(idle(125e6, 400e6, 1.0), "noise over 1 Gbit/s");
    assert!(!idle(125e6, 400e6, 0.2), "a heap over 1 Gbit/s: the core compresses as fast as it can");
    assert!(!idle(1.25e9, 400e6, 1.0) && !idle(4e9, 400e6, 0.2), "10 Gbit/s and more");
}

#[test]
fn two_ways_in_turn_are_quicker_than_either() {
    let (link, speed, ratio) = (700e6, 600e6, 0.25);
    let alone = [Way::Raw, Way::Zstd(1)].map(|way| run(link, speed, ratio, Some(way)).speed);
    let chosen = run(link, speed, ratio, None);
    assert!(alone.iter().all(|speed| chosen.speed > 1.1 * speed), "{chosen:?} and {alone:?}");
}

#[test]
fn a_slow_first_look_at_the_compressor_is_not_believed_for_ever() {
    let mut chooser = CodingChooser::default();
    let mut world = World::new(125e6, 50e6, 0.2);
    world.run(60.0 * BATCH, &mut chooser, None);
    world.data.speed = 700e6;
    world.run(1000.0 * BATCH, &mut chooser, None);
    let packed = world.run(1000.0 * BATCH, &mut chooser, None).packed;
    assert!(packed > 950, "{packed}");
}

#[test]
fn a_link_that_becomes_fast_is_noticed() {
    for (link, speed, tells) in [
        (125e6, 600e6, false),
        (125e6, 400e6, false),
        (12.5e6, 400e6, false),
        (125e6, 600e6, true),
        (12.5e6, 400e6, true),
    ] {
        let mut chooser = CodingChooser::default();
        let mut world = World { tells, ..World::new(link, speed, 0.25) };
        let packed = world.run(1000.0 * BATCH, &mut chooser, None).packed;
        assert!(packed > 800, "{packed}");
        world.link = 5e9;
        world.run(4000.0 * BATCH, &mut chooser, None);
        let packed = world.run(1000.0 * BATCH, &mut chooser, None).packed;
        assert!(packed < 20, "from {link:e}, at {speed:e}: {packed}");
    }
}

#[test]
fn a_link_that_becomes_slow_is_noticed() {
    let mut chooser = CodingChooser::default();
    let mut world = World::new(5e9, 600e6, 0.25);
    world.run(1000.0 * BATCH, &mut chooser, None);
    world.link = 60e6;
    world.run(50.0 * BATCH, &mut chooser, None);
    let outcome = world.run(1000.0 * BATCH, &mut chooser, None);
    assert!(outcome.ratio < 0.26, "{outcome:?}");
}

#[test]
fn data_that_stops_to_compress_and_starts_again_is_noticed() {
    let mut chooser = CodingChooser::default();
    let mut world = World::new(60e6, 600e6, 0.25);
    world.run(500.0 * BATCH, &mut chooser, None);
    world.data.ratio = 1.0;
    world.run(50.0 * BATCH, &mut chooser, None);
    let packed = world.run(500.0 * BATCH, &mut chooser, None).packed;
    assert!(packed < 20, "{packed}");
    world.data.ratio = 0.25;
    world.run(200.0 * BATCH, &mut chooser, None);
    let outcome = world.run(500.0 * BATCH, &mut chooser, None);
    assert!(outcome.ratio < 0.27, "{outcome:?}");
}

#[test]
fn what_has_a_base_is_compressed_on_top_of_it() {
    let outcome = run_in(World { has_base: true, ..World::new(60e6, 600e6, 0.5) }, None);
    assert!(outcome.ratio < 0.12, "{outcome:?}");
    let outcome = run_in(World { has_base: true, ..World::new(5e9, 600e6, 0.5) }, None);
    assert_eq!(outcome.packed, 0);
    let mut chooser = CodingChooser::default();
    let mut world = World { has_base: true, ..World::new(60e6, 600e6, 0.5) };
    world.run(500.0 * BATCH, &mut chooser, None);
    assert!((0..500).all(|_| !matches!(chooser.choose(false), Way::ZstdOnBase(_))), "there is none");
}

#[test]
fn what_is_allowed_is_kept_to() {
    for (coding, has_base, wanted) in [
        (Coding::Raw, true, &[0][..]),
        (Coding::Zstd, false, &[1, 2]),
        (Coding::Zstd, true, &[1, 2, 3, 4]),
        (Coding::ZstdOnBase, true, &[0, 3, 4]),
        (Coding::ZstdOnBase, false, &[0]),
        (Coding::Delta, true, &[0]),
        (Coding::Copy, false, &[0]),
    ] {
        for link in [12.5e6, 5e9] {
            let mut world = World { has_base, ..World::new(link, 600e6, 0.25) };
            world.run(500.0 * BATCH, &mut CodingChooser::only(coding), None);
            let used: Vec<usize> = (0..WAYS.len()).filter(|way| world.count[*way] > 0).collect();
            assert!(used.iter().all(|way| wanted.contains(way)), "{coding:?}: {used:?}");
        }
    }
    // Where only compression is allowed, it keeps up with a fast link as well as it can.
    let mut world = World::new(5e9, 600e6, 0.25);
    let outcome = world.run(1000.0 * BATCH, &mut CodingChooser::only(Coding::Zstd), None);
    let alone = run(5e9, 600e6, 0.25, Some(Way::Zstd(1)));
    assert!(outcome.speed > 0.9 * alone.speed, "{outcome:?}, {alone:?}");
}

#[test]
fn a_worker_that_may_work_a_share_of_the_time_makes_the_best_of_it() {
    for link in [12.5e6, 60e6, 125e6, 400e6] {
        for share in [0.02, 0.1, 0.3, 0.6] {
            let run = |chooser: &mut CodingChooser, fixed| {
                let mut world = World { share, ..World::new(link, 412e6, 0.217) };
                world.run(64.0 * BATCH, chooser, fixed);
                world.run(1000.0 * BATCH, chooser, fixed)
            };
            let mut chooser = CodingChooser::default();
            chooser.set_share(share);
            let outcome = run(&mut chooser, None);
            assert!(outcome.worked < share * 1.02, "link {link:e}, {share}: {outcome:?}");
            for way in [Way::Raw, Way::Zstd(1)] {
                let alone = run(&mut CodingChooser::default(), Some(way));
                assert!(
                    outcome.speed > 0.8 * alone.speed,
                    "link {link:e}, {share}: {outcome:?}, {way:?} {alone:?}"
                );
            }
            if share == 0.02 && link > 1e8 {
                assert!(outcome.packed < 100, "there is no time for it: {outcome:?}");
            }
        }
    }
    let mut chooser = CodingChooser::default();
    chooser.set_share(f64::NAN);
    assert_eq!(chooser.share, 1.0);
    chooser.set_share(-1.0);
    assert!(chooser.share > 0.0);
}

#[test]
fn batches_are_larger_where_they_are_compressed() {
    let mut chooser = CodingChooser::default();
    assert_eq!(chooser.batch_pages(), MAX_BATCH_PAGES / 4);
    World::new(12.5e6, 600e6, 0.25).run(200.0 * BATCH, &mut chooser, None);
    assert_eq!(chooser.batch_pages(), MAX_BATCH_PAGES);
    World::new(5e9, 600e6, 0.25).run(4000.0 * BATCH, &mut chooser, None);
    assert_eq!(chooser.batch_pages(), MAX_BATCH_PAGES / 4);
}

#[test]
fn frames_without_pages_do_not_make_the_link_look_slow() {
    let mut chooser = CodingChooser::default();
    let mut world = World::new(5e9, 600e6, 0.25);
    world.run(100.0 * BATCH, &mut chooser, None);
    for _ in 0..10_000 {
        chooser.observe_link(90, Duration::from_micros(8));
    }
    assert_eq!(world.run(100.0 * BATCH, &mut chooser, None).packed, 0);
}

#[test]
fn a_pace_that_is_known_from_elsewhere_counts_at_once() {
    let mut chooser = CodingChooser::default();
    chooser.observe_link(12_500_000, Duration::from_secs(1));
    assert_ne!(chooser.choose(false), Way::Raw, "a slow link: looked at from the first batch on");
    let mut chooser = CodingChooser::default();
    chooser.observe_link(4_000_000_000, Duration::from_secs(1));
    assert_eq!(chooser.choose(false), Way::Raw);
}
